"""The documentation agrees with the code: links, snippets, commands, flags, files and names exist."""

from __future__ import annotations

import ast
import contextlib
import io
import re
import shlex
from collections.abc import Iterator
from dataclasses import fields
from functools import cache
from pathlib import Path

import pytest
import yaml

from cogview.cli.main import main
from cogview.config_io import from_mapping
from cogview.emoji.export import SceneRecipe
from cogview.training.settings import TransformerSettings, TransformerTraining
from cogview.training.text_tokenizer import TextTokenizerRecipe
from cogview.training.vqvae_recipe import VQVAERecipe

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "scripts" / "benchmarks" / "RESULTS.md"
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "examples").glob("*.md"), RESULTS])
GUIDES = [page for page in PAGES if page.name not in ("CHANGELOG.md", "RESULTS.md")]
WHOLE = {
    "scenes": SceneRecipe,
    "text": TextTokenizerRecipe,
    "image": VQVAERecipe,
}  # sections that are whole
GENERATED = ("contributing.md", "changelog.md", "results.md")  # of docs/hooks.py

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
_LINK = re.compile(r"\]\((?!https?:|mailto:)([^)#\s]*)(#[^)\s]*)?\)")
_FOLDERS = "cogview|kernels|tokenizers|vqvae|scripts|examples|tests|docs"
_PATH = re.compile(rf"^(?:{_FOLDERS})/[\w./-]*$")
_NAME_IN_FILE = re.compile(r"`([A-Za-z_][\w.]*)`,? in\s+`([\w/]+\.py)`")


def prose(page: Path) -> str:
    """Return the text of a page without its fenced blocks."""
    return _FENCE.sub("", page.read_text(encoding="utf-8"))


def blocks(page: Path, *languages: str) -> Iterator[str]:
    for language, content in _FENCE.findall(page.read_text(encoding="utf-8")):
        if language in languages:
            yield content


def anchors(page: Path) -> set[str]:
    """Return the anchors of the headings of a page, as code-hosting sites and mkdocs make them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def commands(page: Path) -> Iterator[list[str]]:
    """Yield the words of every ``cogview …`` command of a page, from fenced blocks and from inline code."""
    lines = [line for block in blocks(page, "bash") for line in block.splitlines()]
    lines += _INLINE.findall(prose(page))
    for line in lines:
        for part in re.split(r"&&|\|\|", line):
            with contextlib.suppress(ValueError):  # a quotation mark of prose
                words = shlex.split(part, comments=True)
                if "cogview" in words:
                    yield words[words.index("cogview") + 1 :]


@cache
def help_of(*command: str) -> str:
    """Return the output of ``cogview COMMAND --help``."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.suppress(SystemExit):
        main([*command, "--help"])
    return output.getvalue()


@cache
def definitions(path: str) -> set[str]:
    """Return the names that a source defines: functions, classes, constants, methods and fields as ``Class.name``."""
    found: set[str] = set()

    def visit(body: list[ast.stmt], prefix: str = "") -> None:
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                found.add(prefix + node.name)
            if isinstance(node, ast.ClassDef):
                visit(node.body, f"{node.name}.")
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            found.update(prefix + target.id for target in targets if isinstance(target, ast.Name))

    visit(ast.parse((ROOT / path).read_text(encoding="utf-8")).body)
    return found


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    for target, anchor in _LINK.findall(prose(page)):
        path = (page.parent / target).resolve() if target else page
        if path.parent == ROOT / "docs" and path.name in GENERATED:
            continue
        assert path.exists(), f"{name(page)} links to {target}"
        if anchor and path.suffix == ".md":
            assert anchor[1:] in anchors(path), f"{name(page)} links to {target}{anchor}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_python_snippets_compile(page: Path) -> None:
    for number, block in enumerate(blocks(page, "python"), start=1):
        compile(block, f"{name(page)}, snippet {number}", "exec")


@pytest.mark.parametrize("page", GUIDES, ids=name)
def test_commands_and_their_flags_exist(page: Path) -> None:
    known = help_of()
    for words in commands(page):
        if not words or not re.fullmatch(r"[a-z][a-z-]+", words[0]):
            continue
        assert re.search(rf"^\s+{words[0]}\b", known, re.MULTILINE), f"{name(page)}: cogview {words[0]}"
        group = words[:2] if words[0] in ("adapter", "data", "eval") and len(words) > 1 else words[:1]
        flags = {word.split("=")[0] for word in words if re.match(r"--?[a-z]", word)}
        described = help_of(*group) or help_of(words[0])
        for flag in flags:
            assert re.search(rf"(?<![\w-]){re.escape(flag)}(?![\w-])", described), (
                f"{name(page)}: cogview {' '.join(group)} has no {flag}"
            )


@pytest.mark.parametrize("page", GUIDES, ids=name)
def test_flags_of_prose_exist_in_a_command(page: Path) -> None:
    """A flag that stands alone, such as ``--grid``, belongs to some command or script."""
    listed = re.findall(r"^\s{2,6}([a-z][a-z-]+)\b", help_of(), re.MULTILINE)
    nested = [
        (group, action)
        for group in ("data", "eval")
        for action in re.findall(r"^  ([a-z-]+)  ", help_of(group), re.MULTILINE)
    ]
    everything = "\n".join([help_of(), *map(help_of, listed), *(help_of(*words) for words in nested)]) + "".join(
        path.read_text(encoding="utf-8") for path in (ROOT / "scripts").glob("*.py")
    )
    for code in _INLINE.findall(prose(page)):
        if re.match(r"--[a-z]", code):
            flag = code.split()[0].split("=")[0]
            assert flag in everything, f"{name(page)} mentions {flag}"


@pytest.mark.parametrize("page", GUIDES, ids=name)
def test_files_in_code_marks_exist(page: Path) -> None:
    for code in _INLINE.findall(prose(page)):
        if _PATH.match(code):
            assert (ROOT / code).exists(), f"{name(page)} mentions {code}"


@pytest.mark.parametrize("page", GUIDES, ids=name)
def test_names_are_defined_in_the_files_that_pages_give(page: Path) -> None:
    """Pages write "`decode` in `cogview/generation/decode.py`"."""
    for wanted, path in _NAME_IN_FILE.findall(prose(page)):
        assert wanted in definitions(path), f"{name(page)}: {path} defines no {wanted}"


@pytest.mark.parametrize("page", GUIDES, ids=name)
def test_yaml_snippets_hold_settings_of_a_recipe(page: Path) -> None:
    for block in blocks(page, "yaml"):
        recipe = yaml.safe_load(block)
        assert set(recipe) <= {"work", "transformer", "training", *WHOLE}, f"{name(page)}: {block}"
        for kind in WHOLE.keys() & recipe:
            from_mapping(WHOLE[kind], recipe[kind], block)
        section = recipe.get("transformer", {})
        training = recipe.get("training", section.get("training", {}))
        assert set(section) <= {setting.name for setting in fields(TransformerSettings)}, f"{name(page)}: {block}"
        assert set(training) <= {setting.name for setting in fields(TransformerTraining)}, f"{name(page)}: {block}"


def test_settings_of_training_prose_exist() -> None:
    """A word in code marks that looks like a setting, such as ``full_mask_rate``, is a key of some recipe section."""
    sources = [path for folder in ("cogview", "vqvae") for path in (ROOT / folder).rglob("*.py")]
    known = set().union(*(definitions(str(path.relative_to(ROOT))) for path in sources))
    leaves = {one.rpartition(".")[2] for one in known}
    for page in ("training.md", "data.md", "adapters.md"):
        for code in _INLINE.findall(prose(ROOT / "docs" / page)):
            if match := re.fullmatch(r"([a-z]+(?:_[a-z]+)+)(?:: .*)?", code):
                assert match[1] in leaves | {"low_level"}, f"docs/{page} mentions {match[1]}"


def test_api_page_names_modules_and_classes_that_exist() -> None:
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    identifiers = re.findall(r"^::: (cogview[.\w]*)$", page, re.MULTILINE)
    assert identifiers
    for identifier in identifiers:
        path = re.sub("^cogview/(kernels|tokenizers|vqvae)/", r"\1/", identifier.replace(".", "/"))
        if not (ROOT / f"{path}.py").is_file():
            parent, _, member = path.rpartition("/")
            assert member in definitions(f"{parent}.py"), identifier


def test_readme_fits_on_a_page() -> None:
    for page in ("README.md", "README.zh.md"):
        assert len((ROOT / page).read_text(encoding="utf-8").splitlines()) <= 130


def test_readme_in_chinese_is_in_step() -> None:
    """Both have the same headings by level, links, images and commands."""
    english, chinese = (ROOT / page for page in ("README.md", "README.zh.md"))

    def outline(page: Path) -> list[str]:
        return re.findall(r"^#+", prose(page), re.MULTILINE)

    def code(page: Path) -> list[str]:
        return [re.sub(r"\s*#.*", "", block) for block in blocks(page, "bash", "python")] + [
            code for code in _INLINE.findall(prose(page)) if " " in code
        ]

    def targets(page: Path) -> set[str]:
        return {"".join(link) for link in _LINK.findall(prose(page))} - {"README.md", "README.zh.md"}

    assert outline(english) == outline(chinese)
    assert code(english) == code(chinese)
    assert targets(english) - targets(chinese) <= {"docs/quickstart.md", "docs/quickstart.md#install"}
    assert targets(chinese) - targets(english) <= {"docs/quickstart.zh.md", "docs/quickstart.zh.md#安装"}


def test_quickstart_in_chinese_is_in_step() -> None:
    english, chinese = (ROOT / "docs" / page for page in ("quickstart.md", "quickstart.zh.md"))
    assert [re.sub(r"\s*#.*", "", block) for block in blocks(english, "bash", "python")] == [
        re.sub(r"\s*#.*", "", block) for block in blocks(chinese, "bash", "python")
    ]


def test_glossary_is_sorted() -> None:
    rows = re.findall(r"^\| ([^|]+) \|", (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8"), re.MULTILINE)
    terms = [row.casefold() for row in rows[1:]]  # the first row is the heading
    assert terms == sorted(terms)
    assert len(set(terms)) >= 40
