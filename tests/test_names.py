"""Names of tests: `test_<unit>_<behaviour>` or `test_<unit>_<behaviour>_when_<condition>`."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAX_NAME = 79
# Words that begin a sentence but no unit, unless a function begins with them: `from_pretrained`, `is_quantized`.
NO_UNITS = re.compile(
    "a|all|an|another|any|are|as|at|before|by|each|every|for|from|how|if|in|is|it|its|more|never|no|not|nothing|of|on|"
    "one|only|other|same|some|than|that|the|there|these|they|this|those|two|until|what|when|where|which|while|who|with|"
    "without"
)


def functions_of(path: Path) -> Iterator[str]:
    """Yield the names of the functions and methods of a source."""
    yield from re.findall(r"^[ ]*(?:async )?def (\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)


def library_functions() -> set[str]:
    """Return the names of all functions of the library and of the tests' helpers."""
    folders = ("cogview", "kernels", "tokenizers", "vqvae", "scripts", "tests")
    found = {"all"}  # of __all__
    for folder in folders:
        for parent, _, names in os.walk(ROOT / folder):
            for name in names:
                if name.endswith(".py"):
                    found.update(functions_of(Path(parent, name)))
    return {name.strip("_") for name in found if not name.startswith("test_")}


def problem_with(name: str, functions: set[str]) -> str | None:
    """Return what is wrong with the name of a test, or None."""
    words = name.removeprefix("test_").split("_")
    if len(name) > MAX_NAME:
        return f"{len(name)} characters, at most {MAX_NAME} are allowed"
    if len(words) < 3:
        return "expected a unit and a behaviour"
    begins_with_function = any("_".join(words[:count]) in functions for count in range(1, len(words)))
    if NO_UNITS.fullmatch(words[0]) and not begins_with_function:
        return f'"{words[0]}" names no unit'
    return None


def test_names_of_tests_have_a_unit_and_a_behaviour() -> None:
    """Every name says which unit is tested, so that `pytest -k unit` selects its tests."""
    functions = library_functions()
    problems = []
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        for name in functions_of(path):
            problem = problem_with(name, functions) if name.startswith("test_") else None
            if problem is not None:
                problems.append(f"{path.relative_to(ROOT)}: {name}: {problem}")
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("test_token_store_reads_rows", None),
        ("test_from_pretrained_merges_the_adapter", None),
        ("test_objects", "expected a unit and a behaviour"),
        ("test_what_is_written_is_read", '"what" names no unit'),
        ("test_store_" + "x" * 70, "81 characters, at most 79 are allowed"),
    ],
)
def test_problem_with_finds_names_without_a_unit(name: str, problem: str | None) -> None:
    """The check accepts units and functions, and rejects sentences, single words and long names."""
    assert problem_with(name, {"from_pretrained", "all"}) == problem
