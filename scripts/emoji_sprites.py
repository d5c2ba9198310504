"""Render the emoji of an npm package as sprites: transparent PNG files that are named by code points.

    npm pack @iconify-json/fluent-emoji-flat && tar xf iconify-json-fluent-emoji-flat-*.tgz
    pip install resvg-py
    python scripts/emoji_sprites.py package -o sprites

A package of Iconify holds ``icons.json``, the icons as SVG, and ``chars.json``, their names by code points.
``@lobehub/fluent-emoji-3d`` holds pictures that are named by code points already; its flags are of unknown origin and
are left out. ``1f34e.png`` is the red apple, ``1f43b-200d-2744.png`` the polar bear. ``scenes: {sprites: FOLDER}`` in a
recipe takes the folder in place of the font, and ``scenes: {styles: …, style_folder: FOLDER}`` takes one folder for
each style.
"""

from __future__ import annotations

import re
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from PIL import Image

from cogview.cli.main import run_command
from cogview.cli.options import FILE, Command, argument, output_option
from cogview.emoji.things import SPRITE_PIXELS, read_sprite
from cogview.errors import InputError
from cogview.files import new_folder
from cogview.plain_data import read_json

REGIONAL_INDICATORS = range(0x1F1E6, 0x1F200)  # of which flags of countries are made
TAGS = range(0xE0020, 0xE0080)  # of flags of regions
SVG = "http://www.w3.org/2000/svg"  # the namespace


def svg_of(icons: Mapping[str, Any], name: str) -> str:
    """Return an icon of an Iconify set as an SVG document.

    Args:
        icons: Content of ``icons.json``.
        name: Name of the icon, or of an alias.

    Raises:
        InputError: There is no icon of that name.
    """
    aliases = icons.get("aliases", {})
    while name in aliases:
        name = aliases[name]["parent"]
    icon = icons["icons"].get(name)
    if icon is None:
        raise InputError(f"icons.json has no icon named {name}, which chars.json names")
    width, height = (icon.get(side, icons.get(side, 16)) for side in ("width", "height"))  # 16: Iconify's default
    frame = ElementTree.Element("svg", xmlns=SVG, viewBox=" ".join(map(str, (0, 0, width, height))))
    head, tail = ElementTree.tostring(frame, encoding="unicode", short_empty_elements=False).split("></")
    return "".join((head, ">", icon["body"], "</", tail))


def read_part(package: Path, name: str) -> dict[str, Any]:
    """Return the object in a JSON file of a package; raise InputError if it is missing or holds none."""
    path = package / name
    if not path.is_file():
        raise InputError(f"{path} is missing: expected the unpacked folder of an npm package @iconify-json/…")
    content = read_json(path)
    if not isinstance(content, dict) or not content:
        raise InputError(f"{path} holds no icons: expected an object that is not empty")
    return content


def is_flag(code_points: str) -> bool:
    """Return whether code points in hexadecimal, with hyphens between them, are the flag of a country or region."""
    first, *others = (int(point, 16) for point in code_points.split("-"))
    return first in REGIONAL_INDICATORS or any(point in TAGS for point in others)


def write_pictures(package: Path, folder: Path) -> int:
    """Write the pictures of a package as sprites, without the flags.

    Args:
        package: Folder of the package, with ``assets/CODE-POINTS.webp``.
        folder: Folder of the sprites.

    Returns:
        The number of sprites.

    Raises:
        InputError: A picture is not named by code points, or cannot be read.
    """
    paths = {path.stem.replace("_", "-"): path for path in sorted((package / "assets").glob("*.webp"))}
    for name, path in paths.items():
        if not re.fullmatch("[0-9a-f]+(-[0-9a-f]+)*", name):
            raise InputError(f"{path} is not named by code points, such as 1f34e.webp")
    kept = {name: path for name, path in paths.items() if not is_flag(name)}
    for name, path in kept.items():
        Image.fromarray(read_sprite(path)).save(folder / f"{name}.png")
    return len(kept)


def write_icons(package: Path, folder: Path) -> int:
    """Render the icons of a package of Iconify as sprites.

    Args:
        package: Folder of the package, with ``icons.json`` and ``chars.json``.
        folder: Folder of the sprites.

    Returns:
        The number of sprites.

    Raises:
        InputError: resvg-py or a part of the package is missing.
    """
    try:
        from resvg_py import svg_to_bytes
    except ImportError:
        raise InputError("the package resvg-py is missing: pip install resvg-py") from None
    icons, names = read_part(package, "icons.json"), read_part(package, "chars.json")
    for code_points, name in names.items():
        png = svg_to_bytes(svg_string=svg_of(icons, name), width=SPRITE_PIXELS, height=SPRITE_PIXELS)
        (folder / f"{code_points}.png").write_bytes(bytes(png))
    return len(names)


@click.command(cls=Command)
@argument("package", type=FILE, metavar="PACKAGE", help="unpacked folder of an npm package")
@output_option(required=True, help="folder of the sprites, which must not exist")
def command(package: Path, output: Path) -> int:
    """Render the emoji of an npm package as PNG files of 128 x 128 pixels, named by code points."""
    with new_folder(output) as folder:
        write = write_pictures if (package / "assets").is_dir() else write_icons
        count = write(package, folder)
    print(f"{count} sprites", file=sys.stderr)
    print(output)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script; return its exit status."""
    return run_command(command, argv, "emoji_sprites.py")


if __name__ == "__main__":
    sys.exit(main())
