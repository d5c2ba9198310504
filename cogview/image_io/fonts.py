"""A font of the system that has the characters of some texts, and texts broken into lines of a width."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import TypeAlias

from PIL import ImageFont

Font: TypeAlias = ImageFont.FreeTypeFont

MAX_LENGTH = 400  # characters of a text that are laid out
MAX_QUERIED = 500  # characters that fontconfig is asked for
# Files that Pillow finds in the font folders of Linux, macOS and Windows, with the index of the Chinese face.
_FILES = (
    ("NotoSansCJK-Regular.ttc", 2),
    ("NotoSansCJKsc-Regular.otf", 0),
    ("NotoSansSC-Regular.otf", 0),
    ("NotoSansSC-Regular.ttf", 0),
    ("SourceHanSansSC-Regular.otf", 0),
    ("SourceHanSansCN-Regular.otf", 0),
    ("wqy-microhei.ttc", 0),
    ("wqy-zenhei.ttc", 0),
    ("DroidSansFallbackFull.ttf", 0),
    ("DroidSansFallback.ttf", 0),
    ("PingFang.ttc", 0),
    ("Hiragino Sans GB.ttc", 0),
    ("STHeiti Light.ttc", 0),
    ("msyh.ttc", 0),
    ("simhei.ttf", 0),
    ("simsun.ttc", 0),
    ("DejaVuSans.ttf", 0),
    ("Arial.ttf", 0),
)
_NO_CHARACTER = "\U0010ffff"  # of no font: it shows the glyph of whatever is missing
# Parts that stay together: words, and characters with the punctuation that may not begin a line.
_CLOSING = "，。、！？：；…”’）》」』】"
_PARTS = re.compile(rf"[!-~]+[{_CLOSING}]*|\s+|.[{_CLOSING}]*")


def system_font(texts: Sequence[str], size: int, fonts: Iterable[Font] | None = None) -> Font:
    """Return the first font that has all characters of ``texts``, else the one that has most of the texts whole.

    Args:
        texts: The texts to draw.
        size: Height of the font in pixels.
        fonts: Fonts to choose from; None: those of the system, and the Latin one of Pillow.
    """
    best, most = None, -1
    for font in _system_fonts("".join(texts), size) if fonts is None else fonts:
        count = sum(not missing_characters(text, font) for text in texts)
        if count > most:
            best, most = font, count
        if count == len(texts):
            break
    assert best is not None  # Pillow brings a font
    return best


def missing_characters(text: str, font: Font) -> str:
    """Return the characters of ``text`` that ``font`` would show as boxes, each once."""
    box = _glyph(_NO_CHARACTER, font)
    return "".join(one for one in dict.fromkeys(text) if not one.isspace() and _glyph(one, font) == box)


def wrap_text(text: str, width: float, font: Font, max_lines: int) -> list[str]:
    """Return a text in lines; what does not fit is replaced by an ellipsis.

    Args:
        text: The text, on one line.
        width: Width of a line in pixels.
        font: The font.
        max_lines: Maximum number of lines.
    """
    lines = [""]
    for part in _PARTS.findall(text[:MAX_LENGTH]):
        pieces = [part] if font.getlength(part) <= width else list(part)  # a long word is broken anywhere
        for piece in pieces:
            if lines[-1] and font.getlength(lines[-1] + piece.rstrip()) > width:
                lines.append("")
            lines[-1] += piece if lines[-1] else piece.lstrip()
    lines = [line.rstrip() for line in lines if line.strip()]
    if len(lines) <= max_lines and len(text) <= MAX_LENGTH:
        return lines
    last = lines[max_lines - 1] if len(lines) >= max_lines else lines[-1]
    while last and font.getlength(last + "…") > width:
        last = last[:-1]
    return [*lines[: max_lines - 1], last.rstrip() + "…"]


def _glyph(character: str, font: Font) -> tuple[tuple[int, int], bytes]:
    """Return the size and the pixels of a character."""
    mask = font.getmask(character)
    return mask.size, bytes(mask)


def _system_fonts(characters: str, size: int) -> Iterator[Font]:
    """Yield the fonts of the system for Chinese, others with ``characters``, and the Latin one of Pillow."""
    for name, index in chain(_FILES, _fonts_of_fontconfig(characters)):
        try:
            yield ImageFont.truetype(name, size, index, layout_engine=ImageFont.Layout.BASIC)
        except OSError:  # not installed, or in sizes of its own only
            continue
    yield ImageFont.load_default(size)  # type: ignore[misc]  # of FreeType, which Pillow's packages bring


def _fonts_of_fontconfig(characters: str) -> Iterator[tuple[str, int]]:
    """Yield the files, with the index of the face, that fontconfig knows to have ``characters``."""
    if (program := shutil.which("fc-list")) is None:
        return
    wanted = sorted({one for one in characters if not one.isspace()})[:MAX_QUERIED]
    query = ":charset=" + " ".join(f"{ord(one):x}" for one in wanted)
    try:
        found = subprocess.run(
            [program, query, "--format", "%{file}\t%{index}\n"], capture_output=True, timeout=20, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return
    for line in sorted(found.stdout.decode(errors="replace").splitlines()):
        name, _, index = line.partition("\t")
        if index.isdecimal():  # others are variants of a variable font
            yield name, int(index)
