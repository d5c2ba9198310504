"""Fixtures that several test files share, and the conditions of markers."""

from __future__ import annotations

import functools
import gc
import json
import os
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from cogview.emoji.settings import WorldSettings
from cogview.emoji.things import EmojiFiles, EmojiObject
from cogview.emoji.world import EmojiWorld
from cogview.kernels.dispatch import select_backend
from cogview.kernels.native import load_library
from cogview.kernels.native_library import SOURCES, CompileError
from tests import v1_release
from tests.factories import tiny_model as build_tiny_model
from tests.factories import tiny_text_tokenizer

if TYPE_CHECKING:
    from cogview.pipeline.cogview import CogView

# Without a GPU Triton's kernels are interpreted. Triton reads the variable when it is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

os.environ["COGVIEW_LANGUAGE"] = "en"  # tests read messages in any locale

# Tiny models gain nothing from threads, and threads that wait for each other on a busy machine take ten times as long.
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


with suppress(CompileError):
    for name in SOURCES:
        load_library(name)  # compiles the native kernels, if need be, before tests read messages


def missing_emoji_files() -> str:
    """Return why tests of the emoji font cannot run, or an empty text."""
    files = EmojiFiles()
    if all(path.is_file() for path in (files.font, *files.annotations, files.emoji_test)):
        return ""
    return "apt install fonts-noto-color-emoji unicode-cldr-core unicode-data"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config) -> None:
    """Distribute files in the order of ``pytest_collection_modifyitems``, and not by their number of tests."""
    config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start with the files that have most slow tests, so that no process is left alone with one at the end.

    Skip tests whose marker asks for what this machine lacks.
    """
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    total = Counter(item.path for item in items)
    items.sort(key=lambda item: (-slow[item.path], -total[item.path], item.path))
    reasons = {"font": missing_emoji_files(), "gpu": "" if torch.cuda.is_available() else "needs a CUDA GPU"}
    for item in items:
        for marker, reason in reasons.items():
            if reason and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=f"{marker}: {reason}"))


def pytest_sessionfinish() -> None:
    """Return frozen objects to garbage collection, so that the interpreter can delete them at its end."""
    gc.unfreeze()


@pytest.fixture(scope="session", autouse=True)
def ctrl_c_interrupts() -> None:
    """Restore SIGINT, which a shell has background processes ignore: tests of Ctrl-C need it."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="module", autouse=True)
def older_objects_are_frozen() -> None:
    """Exclude objects of earlier modules from garbage collection: a full collection would take 0.4 s at the end."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def trainings_are_quick() -> Iterator[None]:
    """Measure the device once, and leave out ``curves.png``, which takes longer than the training of a tiny model.

    ``tests/training/test_plots.py`` draws it, and `test_recipe_commands_run_in_sequence` asks ``train`` for it.
    """
    from cogview.benchmark import report
    from cogview.planning import hardware, target
    from cogview.training import memory_plan, setup

    measure_once = functools.cache(hardware.measure_hardware)
    with pytest.MonkeyPatch.context() as patch:
        for module in (report, target, memory_plan):
            patch.setattr(module, "measure_hardware", measure_once)
        patch.setattr(setup, "save_run_plots", lambda folder: None)
        yield


@pytest.fixture(autouse=True)
def kernel_choices_are_forgotten() -> Iterator[None]:
    """Forget the backends that a test has chosen through ``COGVIEW_KERNELS``, so that tests run in any order."""
    yield
    select_backend.cache_clear()


@pytest.fixture(scope="session")
def make_tiny_world() -> Callable[..., EmojiWorld]:
    """Return a function that creates a world of six drawn shapes under Chinese names; it needs no font."""
    things = (
        EmojiObject(emoji="🍎", name="红苹果", synonyms=("苹果",)),
        EmojiObject(emoji="🦊", name="狐狸", measures=("只", "个")),
        EmojiObject(emoji="🐕", name="狗", synonyms=("小狗",), measures=("只", "条", "个")),
        EmojiObject(emoji="🚗", name="汽车", measures=("辆", "个")),
        EmojiObject(emoji="📖", name="打开的书", measures=("本", "个")),
        EmojiObject(emoji="🐟", name="鱼", measures=("条", "个")),
    )
    sprites = np.stack([_shape(index) for index in range(len(things))])

    def make(**settings: Any) -> EmojiWorld:
        return EmojiWorld(WorldSettings(**settings), things, sprites)

    return make


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a whole checkpoint folder with random weights: 8 x 8 codes, prompts of up to 20 pieces.

    Its weights are the same in every run. Tests share the folder: copy it before changing a file.
    """
    from cogview.checkpoints.checkpoint import NamedThing, save_model
    from cogview.modeling.config import Sampling

    captions = tuple(
        f"{colour}色背景上的{number}只{thing}在{other}的左边"
        for colour in "红蓝绿黄"
        for number in "一两三四"
        for thing in ("狐狸", "狗", "苹果")
        for other in ("汽车", "鱼")
    )
    things = (
        NamedThing(name="狐狸", emoji="🦊"),
        NamedThing(name="狗", emoji="🐕"),
        NamedThing(name="红苹果", emoji="🍎", synonyms=("苹果",)),
        NamedThing(name="汽车", emoji="🚗", synonyms=("轿车", "小汽车")),
    )
    model = build_tiny_model(
        tiny_text_tokenizer(captions, 320, max_piece_length=1),
        max_text=20,
        caption_dropout=0.1,
        sampling=Sampling(temperature=0.9, top_k=100),
        things=things,
        card="# tiny\n",
    )
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    save_model(folder, model)
    return folder


@pytest.fixture(scope="session")
def tiny_model(tiny_checkpoint: Path) -> CogView:
    """Return the tiny checkpoint, opened on the CPU in float32."""
    from cogview.pipeline.cogview import CogView

    return CogView.from_pretrained(tiny_checkpoint, device="cpu")


@pytest.fixture(scope="session")
def edit_checkpoint(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of the tiny checkpoint that was trained for edits and fills as well."""
    folder = shutil.copytree(tiny_checkpoint, tmp_path_factory.mktemp("edits") / "editor")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config |= {"tasks": ["generate", "caption", "edit", "fill"], "source_dropout": 0.1}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def edit_model(edit_checkpoint: Path) -> CogView:
    """Return the tiny checkpoint for edits, opened on the CPU in float32."""
    from cogview.pipeline.cogview import CogView

    return CogView.from_pretrained(edit_checkpoint, device="cpu")


@pytest.fixture(scope="session")
def save_image() -> Callable[..., Image.Image]:
    """Return a function that writes an image of smooth colours, different for each ``number``, and returns it."""

    def save(path: str | Path, number: int = 0, size: tuple[int, int] = (64, 64)) -> Image.Image:
        x, y = np.meshgrid(np.linspace(0, 1, size[0]), np.linspace(0, 1, size[1]))
        waves = [np.sin(9 * x + number) + np.cos(7 * y - number), x + number % 2, np.sin(20 * x * y + number)]
        image = Image.fromarray((np.stack(waves, axis=-1) * 60 + 120).astype(np.uint8))
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
        return image

    return save


@pytest.fixture(scope="session")
def golden_release() -> v1_release.V1Release:
    """Return the published format of the model that ``released.npz`` was computed with."""
    return v1_release.golden_release()


@pytest.fixture(scope="session")
def small_release() -> v1_release.V1Release:
    """Return a model of 2 MB in the published format."""
    return v1_release.small_release()


def _shape(index: int) -> np.ndarray:
    """Draw the shape of an index, RGBA (128, 128, 4) uint8."""
    image = Image.new("RGBA", (128, 128), (0, 0, 0, 0))
    draw = ImageDraw.Draw(image)
    if index == 0:
        draw.ellipse((8, 8, 120, 120), fill=(200, 20, 60, 255))
    elif index == 1:
        draw.polygon([(64, 4), (124, 124), (4, 124)], fill=(230, 120, 10, 255))
    elif index == 2:
        draw.rectangle((20, 20, 108, 108), fill=(120, 70, 30, 255), outline=(255, 255, 255, 255), width=14)
    elif index == 3:
        draw.rectangle((4, 44, 124, 84), fill=(20, 60, 200, 255))
        draw.rectangle((44, 4, 84, 124), fill=(20, 60, 200, 255))
    elif index == 4:
        draw.ellipse((8, 8, 120, 120), outline=(20, 140, 60, 255), width=24)
    else:
        draw.polygon([(4, 4), (124, 64), (4, 124)], fill=(250, 250, 120, 255))
        draw.rectangle((90, 90, 124, 124), fill=(10, 10, 10, 255))
    return np.asarray(image)
