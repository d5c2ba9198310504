"""Objects of the emoji world: their sprites, their Chinese names, and their measure words.

Three files are read, at the paths where Debian installs them or at given ones: the Noto Color Emoji font (sprites), the
Chinese annotations of the Unicode CLDR (names) and emoji-test.txt (groups). The package contains none of them; a saved
world holds the parts that it needs. ``things.yaml`` has the names and measure words in common use.
"""

# N objects
from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

import numpy as np

from cogview.errors import InputError, reason_of
from cogview.plain_data import read_yaml

SPRITE_PIXELS = 128
"""Side of a stored sprite. The bitmaps of the font are 136 wide and 128 high."""

GROUPS = ("Food & Drink", "Animals & Nature", "Objects", "Travel & Places", "Activities")
"""Groups of emoji-test.txt with objects; the others hold people, smileys, symbols and flags."""

VARIATION_SELECTOR = "\ufe0f"
"""Character that emoji-test.txt writes behind some emoji, and the annotations mostly do not."""

_FONT_SIZE = 109  # the one size the bitmap font has
_FONT_LEFT = 4  # columns 4 to 132 of the 136 hold the glyph


@dataclass(frozen=True, kw_only=True)
class EmojiFiles:
    """Paths of the files to read; the defaults are those of Debian.

    Args:
        font: The Noto Color Emoji font.
        annotations: Files zh.xml of the Unicode CLDR.
        emoji_test: The list of emoji, emoji-test.txt.
    """

    font: Path = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
    annotations: tuple[Path, ...] = (
        Path("/usr/share/unicode/cldr/common/annotations/zh.xml"),
        Path("/usr/share/unicode/cldr/common/annotationsDerived/zh.xml"),
    )
    emoji_test: Path = Path("/usr/share/unicode/emoji/emoji-test.txt")

    def check(self, *, with_font: bool = True) -> None:
        """Check that all files exist.

        Args:
            with_font: Also check the font, which sprites from a folder do without.

        Raises:
            InputError: A file is missing; the message names its Debian package.
        """
        needed = [(self.font, "fonts-noto-color-emoji"), (self.emoji_test, "unicode-data")]
        needed[1:1] = [(path, "unicode-cldr-core") for path in self.annotations]
        for path, package in needed if with_font else needed[1:]:
            if not path.is_file():
                raise InputError(
                    f"{path} is missing; on Debian or Ubuntu: apt install {package} "
                    f"(or give the path of a copy: cogview scenes --help)"
                )


@dataclass(frozen=True, kw_only=True)
class EmojiObject:
    """One object that a scene can hold; no two objects share a name.

    Args:
        emoji: The emoji, which identifies the object.
        name: The usual name in captions.
        synonyms: Rarer names.
        measures: Measure words, the usual one first.
        group: Group of emoji-test.txt.
        subgroup: Subgroup of emoji-test.txt.

    Raises:
        ValueError: Emoji, name or measure words are empty.
    """

    emoji: str
    name: str
    synonyms: tuple[str, ...] = ()
    measures: tuple[str, ...] = ("个",)
    group: str = field(default="", compare=False)
    subgroup: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        if not self.emoji or not self.name or not self.measures:
            raise ValueError(f"an object needs an emoji, a name and a measure word, got {self.emoji!r}, {self.name!r}")

    @property
    def names(self) -> tuple[str, ...]:
        """The usual name, then the synonyms."""
        return (self.name, *self.synonyms)


@dataclass(frozen=True, kw_only=True)
class NameTables:
    """Content of ``things.yaml``. Emoji of names and measures have no variation selector.

    Args:
        common: Emoji of common objects, the commonest first.
        names: Names in common use by emoji, the usual one first.
        subgroup_measures: Measure word by subgroup of emoji-test.txt.
        measures: Measure words by emoji, for objects that differ from their subgroup.
    """

    common: tuple[str, ...]
    names: dict[str, tuple[str, ...]]
    subgroup_measures: dict[str, str]
    measures: dict[str, tuple[str, ...]]


@cache
def name_tables() -> NameTables:
    """Return the tables of ``things.yaml``, which is read once."""
    plain = read_yaml(Path(__file__).with_name("things.yaml"))
    return NameTables(
        common=tuple(plain["common"].split()),
        names={emoji: tuple(names.split()) for emoji, names in plain["names"].items()},
        subgroup_measures=plain["subgroup_measures"],
        measures={
            emoji: tuple(words.split()) for words, members in plain["measures"].items() for emoji in members.split()
        },
    )


def read_things(files: EmojiFiles, *, with_font: bool = True) -> tuple[EmojiObject, ...]:
    """Return every named emoji of ``GROUPS``: common ones first, the others in the order of emoji-test.txt.

    Args:
        files: Paths of the files to read.
        with_font: Require the font too, which sprites are drawn from.

    Raises:
        InputError: A file is missing, or the files have no emoji in common.
    """
    files.check(with_font=with_font)
    tables = name_tables()
    annotations = read_annotations(files.annotations)
    things: dict[str, EmojiObject] = {}
    for emoji, group, subgroup in read_groups(files.emoji_test):
        key = emoji.replace(VARIATION_SELECTOR, "")
        if group in GROUPS and key in annotations:
            tts_name = annotations[key].name.replace(" ", "")
            name, *synonyms = dict.fromkeys((*tables.names.get(key, ()), tts_name))
            measures = (*tables.measures.get(key, (tables.subgroup_measures.get(subgroup, "个"),)), "个")
            things[key] = EmojiObject(
                emoji=emoji,
                name=name,
                synonyms=tuple(synonyms),
                measures=tuple(dict.fromkeys(measures)),
                group=group,
                subgroup=subgroup,
            )
    if not things:
        raise InputError(f"{files.emoji_test} and {files.annotations[0]} have no named emoji in common")
    common = [emoji.replace(VARIATION_SELECTOR, "") for emoji in tables.common]
    order = dict.fromkeys([emoji for emoji in common if emoji in things] + list(things))
    return _without_shared_names([things[emoji] for emoji in order])


def draw_sprites(things: Sequence[EmojiObject], font: Path) -> np.ndarray:
    """Return the sprites of objects.

    Args:
        things: The N objects.
        font: The Noto Color Emoji font.

    Returns:
        uint8 (N, 128, 128, 4), RGBA with straight alpha.

    Raises:
        InputError: Pillow cannot shape joined emoji.
    """
    from PIL import Image, ImageDraw, ImageFont, features

    if not features.check("raqm"):  # without it a joined emoji such as the polar bear falls into its parts
        raise InputError("this build of Pillow lacks the Raqm text layout; install Pillow from its wheels")
    try:
        face = ImageFont.truetype(str(font), _FONT_SIZE, layout_engine=ImageFont.Layout.RAQM)
    except OSError as error:
        raise InputError(f"{font} cannot be read as a font: {reason_of(error)}; expected NotoColorEmoji.ttf") from error
    sprites = np.zeros((len(things), SPRITE_PIXELS, SPRITE_PIXELS, 4), dtype=np.uint8)
    for index, thing in enumerate(things):
        canvas = Image.new("RGBA", (_FONT_LEFT + SPRITE_PIXELS + _FONT_LEFT, SPRITE_PIXELS), (0, 0, 0, 0))
        ImageDraw.Draw(canvas).text((0, 0), thing.emoji, font=face, embedded_color=True)
        sprites[index] = np.asarray(canvas)[:, _FONT_LEFT : _FONT_LEFT + SPRITE_PIXELS]
    return sprites


def read_sprites(things: Sequence[EmojiObject], folder: Path) -> tuple[tuple[EmojiObject, ...], np.ndarray]:
    """Return the objects that have a picture in a folder, and their sprites.

    A picture is named by the code points of its emoji in hexadecimal, with hyphens between them: ``1f34e.png``,
    ``1f43b-200d-2744.webp``. Variation selectors (``fe0f``) may be there or not. Pictures of other emoji are ignored.

    Args:
        things: Objects to look for.
        folder: Folder of the pictures, with transparency; those that are not 128 x 128 pixels are scaled to fit.

    Returns:
        The N objects with a picture, in their order; and uint8 (N, 128, 128, 4), RGBA with straight alpha.

    Raises:
        InputError: There is no such folder, no picture of any object in it, or one that cannot be read.
    """
    if not folder.is_dir():
        raise InputError(f"there is no folder of sprites {folder}")
    pictures = {_without_selectors(path.stem): path for path in sorted(folder.iterdir()) if path.is_file()}
    names = {thing.emoji: _without_selectors("-".join(f"{ord(point):x}" for point in thing.emoji)) for thing in things}
    found = tuple(thing for thing in things if names[thing.emoji] in pictures)
    if not found:
        first = f"{names[things[0].emoji]}.png" if things else "1f34e.png"
        raise InputError(f"no picture in {folder} is named by the code points of a known emoji, such as {first}")
    return found, np.stack([read_sprite(pictures[names[thing.emoji]]) for thing in found])


def _without_selectors(code_points: str) -> str:
    """1F43B-200D-2744-FE0F to 1f43b-200d-2744."""
    return "-".join(point for point in code_points.lower().split("-") if point != f"{ord(VARIATION_SELECTOR):x}")


def read_sprite(path: Path) -> np.ndarray:
    """Return the picture of a file as a sprite: uint8 (128, 128, 4), RGBA with straight alpha.

    Args:
        path: The file; a picture of another size is scaled to fit.

    Raises:
        InputError: The picture cannot be read.
    """
    from PIL import Image, ImageOps

    from cogview.image_io.reading import open_image

    with open_image(path) as opened:
        try:
            picture = opened.convert("RGBA")
        except Exception as error:  # Pillow's readers raise nearly anything on broken data
            raise InputError(f"the sprite {path} cannot be read: {reason_of(error)}") from None
    side = (SPRITE_PIXELS, SPRITE_PIXELS)
    if picture.size != side:
        picture = ImageOps.pad(picture, side, Image.Resampling.LANCZOS, color=(0, 0, 0, 0))
    return np.asarray(picture)


@dataclass(frozen=True, kw_only=True)
class Annotation:
    """What the CLDR says about an emoji in one language.

    Args:
        name: The name for text-to-speech.
        keywords: Words of its meaning.
    """

    name: str
    keywords: tuple[str, ...] = ()


def read_annotations(paths: Sequence[Path]) -> dict[str, Annotation]:
    """Return the named annotations of files of the CLDR, by emoji without variation selectors.

    Args:
        paths: Files of one language.

    Raises:
        InputError: A file is no XML.
    """
    names: dict[str, str] = {}
    keywords: dict[str, tuple[str, ...]] = {}
    for path in paths:
        try:
            annotations = ElementTree.parse(path).iter("annotation")
        except ElementTree.ParseError as error:
            raise InputError(f"{path} is no XML file: {error}; expected annotations of the Unicode CLDR") from error
        for annotation in annotations:
            emoji, text = annotation.get("cp", "").replace(VARIATION_SELECTOR, ""), annotation.text
            if annotation.get("type") == "tts" and text:
                names[emoji] = text
            elif text:
                keywords[emoji] = tuple(word.strip() for word in text.split("|"))
    return {emoji: Annotation(name=name, keywords=keywords.get(emoji, ())) for emoji, name in names.items()}


def read_groups(path: Path) -> list[tuple[str, str, str]]:
    """Return (emoji, group, subgroup) of every fully qualified emoji, in the order of emoji-test.txt."""
    found = []
    group = subgroup = ""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("# group:"):
            group = line.removeprefix("# group:").strip()
        elif line.startswith("# subgroup:"):
            subgroup = line.removeprefix("# subgroup:").strip()
        elif "; fully-qualified" in line:
            emoji = "".join(chr(int(code, 16)) for code in line.split(";")[0].split())
            found.append((emoji, group, subgroup))
    return found


def _without_shared_names(things: Sequence[EmojiObject]) -> tuple[EmojiObject, ...]:
    """Give every name one meaning: drop objects with the name of an earlier one, and synonyms of several objects."""
    by_name: dict[str, EmojiObject] = {}
    for thing in things:
        by_name.setdefault(thing.name, thing)
    uses = Counter(name for thing in by_name.values() for name in thing.names)
    return tuple(
        replace(thing, synonyms=tuple(name for name in thing.synonyms if uses[name] == 1)) for thing in by_name.values()
    )
