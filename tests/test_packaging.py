"""Packaging: links, package names that collide with no other package, and imports between folders."""

import ast
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
GROUND_FLOOR = ("kernels", "tokenizers", "vqvae")


def python_files(*folders):
    """Sources below ``folders`` of the checkout, each once: links in ``cogview/`` are not followed."""
    found = [
        Path(parent, name)
        for folder in folders
        for parent, _, names in os.walk(ROOT / folder)
        for name in sorted(names)
        if name.endswith(".py")
    ]
    assert found
    return found


def packages_of_setup():
    for node in ast.walk(ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.keyword) and node.arg == "packages":
            return ast.literal_eval(node.value)
    raise AssertionError("setup.py names no packages")


def imported_modules(source):
    """Every module a source imports, ``from a import b`` as ``a.b``; a relative import begins with a dot."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names)


def belongs_to(module, *packages):
    return any(f"{module}.".startswith(f"{package}.") for package in packages)


@pytest.mark.parametrize(
    ("name", "target"),
    [*((name, name) for name in (*GROUND_FLOOR, "checkpoints.yaml")), ("recipes", "scripts/recipes")],
)
def test_links_in_cogview_are_relative(name, target):
    link = ROOT / "cogview" / name
    assert link.is_symlink()
    assert str(link.readlink()) == f"../{target}"  # relative, so that a clone anywhere works
    assert link.exists()


def test_ground_floor_folders_have_no_init_file():
    """With an ``__init__.py`` they would hide Hugging Face's ``tokenizers`` and ``kernels`` from the root."""
    assert [path for path in python_files(*GROUND_FLOOR) if path.name == "__init__.py"] == []


def test_setup_names_exactly_the_packages():
    found = {
        ".".join(Path(parent).relative_to(ROOT).parts)
        for parent, _, names in os.walk(ROOT / "cogview", followlinks=True)
        if any(name.endswith(".py") for name in names)
    }
    named = packages_of_setup()
    assert sorted(named) == sorted(found)
    assert all(belongs_to(name, "cogview") for name in named)  # nothing is installed as top-level `tokenizers`


@pytest.mark.parametrize("folder", GROUND_FLOOR)
def test_ground_floor_modules_are_imported_below_cogview(folder):
    names = [path.stem for path in python_files(folder) if path.parent == ROOT / folder]
    for name in names:
        assert importlib.import_module(f"cogview.{folder}.{name}").__name__ == f"cogview.{folder}.{name}"


@pytest.mark.multiprocess
@pytest.mark.parametrize("folder", GROUND_FLOOR)
def test_installed_packages_win_over_folders_of_the_same_name(folder, tmp_path):
    (tmp_path / folder).mkdir()
    (tmp_path / folder / "__init__.py").write_text("origin = 'elsewhere'")
    code = f"import sys; sys.path[:0] = {[str(ROOT), str(tmp_path)]}; import {folder}; print({folder}.origin)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.stdout == "elsewhere\n", done.stderr


@pytest.mark.parametrize("folder", GROUND_FLOOR)
def test_ground_floor_imports_nothing_above_it(folder):
    for path in python_files(folder):
        for module in imported_modules(path.read_text(encoding="utf-8")):
            inside = belongs_to(module, f"cogview.{folder}")
            assert inside or not belongs_to(module, "cogview", "scripts"), f"{path} imports {module}"


def test_library_imports_no_script_and_no_short_name():
    for path in python_files("cogview", *GROUND_FLOOR):
        for module in imported_modules(path.read_text(encoding="utf-8")):
            assert not belongs_to(module, "scripts", *GROUND_FLOOR), f"{path} imports {module}"
            assert not module.startswith("."), f"{path} has the relative import {module}"


def test_imported_modules_finds_nested_and_relative_imports():
    source = "import torch.nn as nn\ndef f():\n    from cogview import vqvae, cli\n    from ..data import store\n"
    assert list(imported_modules(source)) == ["torch.nn", "cogview.vqvae", "cogview.cli", "..data.store"]
    assert belongs_to("cogview.vqvae.model", "cogview.vqvae")
    assert not belongs_to("cogview.vqvae_tools", "cogview.vqvae")


# Devices are chosen in cogview/device.py, and files from elsewhere never run code.
FORBIDDEN = re.compile(
    r"""
    \.cuda\( | cuda:\d+(?!\d|GB) | (\.to\(|device=|torch\.device\()["']cuda
    | pickle\.loads?\( | weights_only=False
    """,
    re.VERBOSE,
)


def test_sources_contain_no_fixed_device_and_no_pickle_load():
    exempt = (ROOT / "cogview" / "device.py", ROOT / "scripts" / "benchmarks" / "frozen.py")  # asks for a missing GPU
    for path in python_files("cogview", "scripts", *GROUND_FLOOR):
        if path not in exempt:
            lines = path.read_text(encoding="utf-8").splitlines()
            assert [(str(path), line) for line in lines if FORBIDDEN.search(line)] == []


@pytest.mark.parametrize(
    "line",
    [
        "x.cuda()",
        'x.to("cuda")',
        "d = 'cuda:0'",
        "zeros(1, device='cuda')",
        "pickle.load(f)",
        "load(f, weights_only=False)",
    ],
)
def test_forbidden_pattern_matches_devices_and_pickles(line):
    assert FORBIDDEN.search(line)
    assert not FORBIDDEN.search("x.to(device); torch.cuda.is_available(); load(f, weights_only=True)")
    assert not FORBIDDEN.search("such as cuda:24GB")  # a size, of a card that need not be there
