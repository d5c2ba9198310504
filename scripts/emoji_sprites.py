"""Render the emoji of an Iconify package as sprites: transparent PNG files that are named by code points.

    npm pack @iconify-json/fluent-emoji-flat && tar xf iconify-json-fluent-emoji-flat-*.tgz
    pip install resvg-py
    python scripts/emoji_sprites.py package -o sprites

The package holds ``icons.json``, the icons as SVG, and ``chars.json``, their names by code points. ``1f34e.png`` is the
red apple, ``1f43b-200d-2744.png`` the polar bear. ``scenes: {sprites: FOLDER}`` in a recipe takes the folder in place
of the font.
"""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from cogview.cli.main import run_command
from cogview.cli.options import FILE, Command, argument, output_option
from cogview.emoji.things import SPRITE_PIXELS
from cogview.errors import InputError
from cogview.files import new_folder
from cogview.plain_data import read_json

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


@click.command(cls=Command)
@argument("package", type=FILE, metavar="PACKAGE", help="folder with icons.json and chars.json")
@output_option(required=True, help="folder of the sprites, which must not exist")
def command(package: Path, output: Path) -> int:
    """Render the emoji of an Iconify package as PNG files of 128 x 128 pixels, named by code points."""
    try:
        from resvg_py import svg_to_bytes
    except ImportError:
        raise InputError("the package resvg-py is missing: pip install resvg-py") from None
    icons, names = read_part(package, "icons.json"), read_part(package, "chars.json")
    with new_folder(output) as folder:
        for code_points, name in names.items():
            png = svg_to_bytes(svg_string=svg_of(icons, name), width=SPRITE_PIXELS, height=SPRITE_PIXELS)
            (folder / f"{code_points}.png").write_bytes(bytes(png))
    print(f"{len(names)} sprites", file=sys.stderr)
    print(output)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script; return its exit status."""
    return run_command(command, argv, "emoji_sprites.py")


if __name__ == "__main__":
    sys.exit(main())
