"""Every example in Python runs: those of the documentation, and those of the docstrings of the public interface."""

from __future__ import annotations

import doctest
import importlib
import inspect
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import cogview
from cogview import CogView
from cogview.tokenizers.tasks import TASKS

ROOT = Path(__file__).parents[1]
PAGES = [*ROOT.glob("README*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "examples").glob("*.md")]
MODULES = (
    "cogview",
    "cogview.pipeline.cogview",
    "cogview.pipeline.captioning",
    "cogview.pipeline.scoring",
    "cogview.pipeline.running",
    "cogview.pipeline.editing",
    "cogview.pipeline.model",
    "cogview.pipeline.requests",
    "cogview.pipeline.results",
    "cogview.modeling.transformer",
)
# Methods that need no example: callers of the library rarely use them.
WITHOUT_EXAMPLE = (
    "transformer_for",
    "require_task",
    "tokenize",
    "prompt_problem",
    "prompt_warning",
    "log_image_warnings",
)

pytestmark = pytest.mark.slow


def snippets() -> Iterator[tuple[str, str]]:
    """Yield the Python blocks of the documentation with their names."""
    for page in sorted(PAGES):
        blocks = re.findall(r"^```python\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
        for number, block in enumerate(blocks, start=1):
            yield f"{page.relative_to(ROOT)} {number}", block


@pytest.fixture(scope="module")
def embedded() -> CogView:
    return CogView.from_pretrained("cogview-emoji", device="cpu")


@pytest.fixture(scope="module")
def editor(embedded: CogView) -> CogView:
    """Return the embedded model as if it had been trained for edits and fills."""
    config = replace(embedded.config, tasks=(*embedded.config.tasks, "edit", "fill"))
    return CogView(replace(embedded.model, config=config), embedded.placement, "EDITOR")


@pytest.fixture
def in_a_folder(embedded: CogView, editor: CogView, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Stand in an empty folder, where the embedded model opens at once and others stand for what a reader has."""
    opened = CogView.from_pretrained

    def from_pretrained(name: str = "cogview-emoji", **settings: Any) -> CogView:
        if name == "EDITOR":
            return editor
        if name == "studio/fox" or "adapter" in settings:  # of the Hub, or trained by the reader
            assert set(settings) <= {"adapter", "revision", "cache_dir"}
            settings = {}
        plain = {key: value for key, value in settings.items() if (key, value) != ("device", "cpu")}
        return opened("cogview-emoji", **settings) if plain else embedded

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(CogView, "from_pretrained", from_pretrained)
    known = set(TASKS)
    yield
    for name in set(TASKS) - known:
        del TASKS[name]


def write_store(path: Path, model: CogView) -> None:
    """Write a token store of one row, as ``cogview encode`` does."""
    from cogview.data.store import StoreHeader
    from cogview.data.store_writer import StoreWriter, pad_text

    header = StoreHeader(
        fields={"text": 8, "image": 64},
        grid=8,
        num_image_codes=model.vocabulary.num_image_codes,
        num_text_pieces=model.text_tokenizer.size,
        layouts=("generate",),
        codebook_sha256="0" * 64,
        text_sha256="0" * 64,
    )
    with StoreWriter(path, header) as writer:
        writer.append({"text": pad_text([[1, 2, 3]], 8), "image": np.zeros((1, 64), dtype=np.uint16)})


@pytest.mark.parametrize(("name", "block"), list(snippets()), ids=[name for name, _ in snippets()])
@pytest.mark.usefixtures("in_a_folder")
def test_python_of_the_documentation_runs(name: str, block: str, embedded: CogView) -> None:
    """Each block stands by itself, as a reader copies it."""
    if "TokenStore(" in block:
        write_store(Path("runs/emoji-cpu/store"), embedded)
    exec(compile(block, name, "exec"), {"__name__": "snippet"})


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.usefixtures("in_a_folder")
def test_examples_of_docstrings_hold(module: str, embedded: CogView, editor: CogView) -> None:
    """They use the embedded model as ``model``, whose results are the same on every CPU up to near ties."""
    names = {name: getattr(cogview, name) for name in cogview.__all__}
    names |= {"model": editor if module.endswith("editing") else embedded, "Image": Image, "np": np, "torch": torch}
    embedded.generate("一个红苹果", seed=7)[0].save("apple.png")
    finder, runner = (
        doctest.DocTestFinder(),
        doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE),
    )
    found = [test for test in finder.find(importlib.import_module(module), globs=names) if test.examples]
    for test in found:
        runner.run(test)
    assert found
    assert runner.summarize(verbose=False).failed == 0


def test_public_methods_have_an_example() -> None:
    """``help(CogView.caption)`` teaches: every argument with its range, and a call."""
    for name in dir(CogView):
        method = getattr(CogView, name)
        if name.startswith("_") or not callable(method) or name in WITHOUT_EXAMPLE:
            continue
        assert ">>> " in (method.__doc__ or ""), f"CogView.{name} has no example"
        described = re.findall(r"^ {12}(\*{0,2}\w+): ", method.__doc__ or "", re.MULTILINE)
        described = [argument.lstrip("*") for argument in described]
        taken = [argument for argument in inspect.signature(method).parameters if argument != "self"]
        assert described[: len(taken)] == taken, f"the Args of CogView.{name}"
