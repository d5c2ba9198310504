"""Sprites from an Iconify package: one picture for each code point, and what is refused."""

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image

ICONS = {
    "icons": {"red-apple": {"body": "<path/>"}, "fox": {"body": "<circle/>", "width": 36}},
    "aliases": {"reineke": {"parent": "fox"}},
    "width": 32,
    "height": 32,
}


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An unpacked package, and a renderer that draws a square of the width that is asked for."""

    def svg_to_bytes(*, svg_string: str, width: int, height: int) -> list[int]:
        content = io.BytesIO()
        Image.new("RGBA", (width, height), "red" if "path" in svg_string else "blue").save(content, "PNG")
        return list(content.getvalue())

    renderer = ModuleType("resvg_py")
    vars(renderer)["svg_to_bytes"] = svg_to_bytes
    monkeypatch.setitem(sys.modules, "resvg_py", renderer)
    folder = tmp_path / "package"
    folder.mkdir()
    (folder / "icons.json").write_text(json.dumps(ICONS), encoding="utf-8")
    (folder / "chars.json").write_text(json.dumps({"1f34e": "red-apple", "1f98a": "reineke"}), encoding="utf-8")
    return folder


@pytest.fixture
def script(load_script: Callable[[str], ModuleType]) -> ModuleType:
    """The script."""
    return load_script("emoji_sprites")


def test_svg_of_has_the_size_of_the_icon_or_of_the_set(script: ModuleType) -> None:
    assert (
        script.svg_of(ICONS, "red-apple") == '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32"><path/></svg>'
    )
    assert 'viewBox="0 0 36 32"><circle/>' in script.svg_of(ICONS, "reineke")


def test_emoji_sprites_are_named_by_code_points(script: ModuleType, package: Path, tmp_path: Path) -> None:
    assert script.main([str(package), "-o", str(tmp_path / "sprites")]) == 0
    pictures = {path.name: Image.open(path) for path in (tmp_path / "sprites").iterdir()}
    assert {name: (picture.size, picture.getpixel((0, 0))) for name, picture in pictures.items()} == {
        "1f34e.png": ((128, 128), (255, 0, 0, 255)),
        "1f98a.png": ((128, 128), (0, 0, 255, 255)),
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "chars.json").unlink(), "chars.json is missing: expected the unpacked folder"),
        (lambda folder: (folder / "icons.json").write_text("[]"), "icons.json holds no icons"),
        (lambda folder: (folder / "chars.json").write_text('{"1f34e": "pear"}'), "no icon named pear"),
    ],
)
def test_emoji_sprites_refuses_what_is_no_package(
    script: ModuleType, package: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change, message: str
) -> None:
    change(package)
    assert script.main([str(package), "-o", str(tmp_path / "sprites")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "sprites").exists()


def test_emoji_sprites_takes_pictures_without_flags(script: ModuleType, tmp_path: Path) -> None:
    assets = tmp_path / "package" / "assets"
    assets.mkdir(parents=True)
    for name in ("1f98a", "1f43b-200d-2744-fe0f", "1f1e8-1f1f3", "1f3f4-e0067_e0062_e007f"):
        Image.new("RGBA", (256, 256), "green").save(assets / f"{name}.webp", lossless=True)
    assert script.main([str(tmp_path / "package"), "-o", str(tmp_path / "sprites")]) == 0
    found = {path.name: Image.open(path).size for path in (tmp_path / "sprites").iterdir()}
    assert found == {"1f98a.png": (128, 128), "1f43b-200d-2744-fe0f.png": (128, 128)}


def test_emoji_sprites_refuses_pictures_of_other_names(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assets = tmp_path / "package" / "assets"
    assets.mkdir(parents=True)
    Image.new("RGBA", (8, 8)).save(assets / "fox.webp")
    assert script.main([str(tmp_path / "package"), "-o", str(tmp_path / "sprites")]) == 2
    assert "fox.webp is not named by code points, such as 1f34e.webp" in capsys.readouterr().err
