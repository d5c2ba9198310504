"""The architecture: which room may import which, and how large files, functions and calls may grow."""

from __future__ import annotations

import ast
import functools
import os
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
GROUND_FLOOR = ("kernels", "tokenizers", "vqvae")  # linked into cogview/

# From the ground up. A room imports from storeys below its own; ``None`` in front of a storey lets its rooms import
# each other as well.
STOREYS: tuple[tuple[str | None, ...], ...] = (
    (*GROUND_FLOOR,),
    (
        None,
        "errors",
        "files",
        "formatting",
        "input_files",
        "limits",
        "plain_data",
        "process_variables",
        "tables",
        "pickle_limits",
        "signals",
        "config_io",
        "device",
        "image_io",
    ),
    ("modeling",),
    ("generation",),
    ("checkpoints", "data"),
    ("planning",),
    ("pipeline",),
    ("evaluation",),
    ("training", "jobs", "benchmark"),
    ("emoji",),
    ("diagnostics", "serving"),
    ("cli",),
)
MAX_FILE_LINES = 420
MAX_FUNCTION_LINES = 60
MAX_ARGUMENTS = 8
DATA_TABLES: tuple[str, ...] = ()  # may be longer than other files, as Triton kernels may

LIST_TAKERS = ("Sequential", "option_group")  # callables whose arguments are a list

REMEDIES = {
    "import": "move the shared type or function to the lower room, or pass the value down as an argument",
    "file": f"split the file by duty; {MAX_FILE_LINES} lines are the limit",
    "function": f"name a step of it and call that; {MAX_FUNCTION_LINES} lines are the limit",
    "call": f"group arguments in a dataclass or bind some earlier; {MAX_ARGUMENTS} arguments are the limit",
    "class": "give one of the classes another name: one word, one meaning",
}


def library_files() -> list[Path]:
    """Return the sources of the library, each once: links in ``cogview/`` are not followed."""
    return sorted(
        Path(parent, name)
        for folder in ("cogview", *GROUND_FLOOR)
        for parent, _, names in os.walk(ROOT / folder)
        for name in names
        if name.endswith(".py")
    )


def module_of(path: Path) -> str:
    """Return the dotted name under which ``path`` is imported."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    dotted = ".".join(parts if parts[0] == "cogview" else ("cogview", *parts))
    return dotted.removesuffix(".__init__")


def room_of(module: str) -> str:
    """Return the second part of a dotted name: the folder or file directly below ``cogview``."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def storey_of(room: str) -> int:
    """Return the storey of a room, counted from the ground."""
    for number, storey in enumerate(STOREYS):
        if room in storey:
            return number
    raise AssertionError(f"the room cogview.{room} stands in no storey: add it to STOREYS in {Path(__file__).name}")


def may_import(room: str, imported: str) -> bool:
    """Return whether ``room`` may import ``imported``."""
    if room == imported:
        return True
    upper, lower = storey_of(room), storey_of(imported)
    return lower < upper if upper != lower else STOREYS[upper][0] is None


def imported_modules(tree: ast.AST) -> Iterator[str]:
    """Yield the modules of the library that a source imports, lazily and for type checkers as well."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module is not None and node.level == 0:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from names if node.module == "cogview" else [node.module]
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def is_record_or_list(call: ast.Call) -> bool:
    """Return whether a call fills a record, whose fields are all named, or takes a list of things."""
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    is_class = name == "cls" or bool(re.match(r"_?[A-Z]", name))
    return name in LIST_TAKERS or (is_class and not call.args)


def functions_of(tree: ast.AST, prefix: str = "") -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Yield the functions of a source by their qualified names."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield f"{prefix}{node.name}", node
            yield from functions_of(node, f"{prefix}{node.name}.")
        elif isinstance(node, ast.ClassDef):
            yield from functions_of(node, f"{prefix}{node.name}.")
        else:
            yield from functions_of(node, prefix)


def code_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Return the lines of a function without its docstring."""
    lines = (function.end_lineno or 0) - function.lineno + 1
    first = function.body[0]
    documented = ast.get_docstring(function, clean=False) is not None
    return lines - ((first.end_lineno or 0) - first.lineno + 1 if documented else 0)


def outer_calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    """Yield the calls of a source, each with the name of the outermost function or class that holds it."""
    for node in ast.iter_child_nodes(tree):
        name = getattr(node, "name", "") if isinstance(node, ast.FunctionDef | ast.ClassDef) else ""
        for inner in ast.walk(node):
            if isinstance(inner, ast.Call):
                yield name, inner


@functools.cache
def offenders() -> dict[str, set[str]]:
    """Return what breaks each rule."""
    found: dict[str, set[str]] = defaultdict(set)
    homes: dict[str, list[str]] = defaultdict(list)
    for path in library_files():
        source = path.read_text(encoding="utf-8")
        tree, module = ast.parse(source), module_of(path)
        name, room = path.relative_to(ROOT).as_posix(), room_of(module)
        is_kernel = name.startswith("kernels/")
        if room not in ("", "__main__"):
            for other in imported_modules(tree):
                if (
                    other.startswith("cogview.")
                    and other != "cogview.__version__"
                    and not may_import(room, room_of(other))
                ):
                    found["import"].add(f"{module} -> {other}")
        if source.count("\n") > MAX_FILE_LINES and not name.endswith("_triton.py") and name not in DATA_TABLES:
            found["file"].add(name)
        for qualified, node in functions_of(tree):
            if code_lines(node) > MAX_FUNCTION_LINES and not is_kernel:
                found["function"].add(f"{name}:{qualified}")
        for holder, call in outer_calls(tree):
            if len(call.args) + len(call.keywords) > MAX_ARGUMENTS and not is_kernel and not is_record_or_list(call):
                found["call"].add(f"{name}:{holder}:{ast.unparse(call.func)}")
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                homes[node.name].append(module)
    found["class"] = {f"{name}: {', '.join(modules)}" for name, modules in homes.items() if len(modules) > 1}
    return found


@pytest.mark.parametrize("rule", list(REMEDIES))
def test_library_keeps_rule(rule: str) -> None:
    """Every file of the library keeps the rule; the message says how to mend one that does not."""
    found = sorted(offenders().get(rule, ()))
    assert not found, f"{REMEDIES[rule]}:\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("room", "imported", "allowed"),
    [
        ("pipeline", "planning", True),
        ("planning", "pipeline", False),
        ("training", "jobs", False),
        ("files", "errors", True),
        ("tokenizers", "vqvae", False),
        ("cli", "emoji", True),
    ],
)
def test_may_import_follows_storeys(room: str, imported: str, allowed: bool) -> None:
    """Imports go down, and sideways only where a storey allows it."""
    assert may_import(room, imported) is allowed


def test_imported_modules_finds_lazy_and_typing_imports() -> None:
    """An import inside a function or below TYPE_CHECKING counts as any other."""
    source = "if TYPE_CHECKING:\n    from cogview.pipeline import x\ndef f():\n    from cogview import cli\n"
    assert sorted(imported_modules(ast.parse(source))) == ["cogview.cli", "cogview.pipeline"]


def test_is_record_or_list_excludes_positional_calls() -> None:
    """A class called with named fields is a record; a function, or a class with unnamed ones, is not."""
    texts = ("A(x=1)", "_B(x=1)", "m.C(x=1)", "nn.Sequential(1)", "A(1)", "f(x=1)")
    calls = [ast.parse(text, mode="eval").body for text in texts]
    allowed = [is_record_or_list(call) for call in calls if isinstance(call, ast.Call)]
    assert allowed == [True, True, True, True, False, False]
