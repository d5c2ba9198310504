"""Traditional characters of simplified ones, by Unihan."""

from __future__ import annotations

import bz2
import re
from collections.abc import Mapping
from pathlib import Path

from cogview.emoji.attributes import scene_tables
from cogview.errors import InputError

VARIANTS = Path("/usr/share/unicode/Unihan_Variants.txt.bz2")
"""Path of Unihan_Variants.txt, compressed by bzip2, on Debian."""

_QUOTED = re.compile("(“[^”]*”)")


def read_simplified(path: Path) -> dict[str, str]:
    """Return the simplified forms of traditional characters; of several forms the first.

    Args:
        path: Unihan_Variants.txt, compressed by bzip2.
    """
    forms = {}
    with bz2.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            fields = line.rstrip("\n").split("\t")
            if len(fields) == 3 and fields[1] == "kSimplifiedVariant":
                old, *new = (chr(int(code.removeprefix("U+"), 16)) for code in (fields[0], *fields[2].split()))
                if old not in new:  # some characters, such as 着, are simplified in a part of their meanings
                    forms[old] = new[0]
    return forms


def traditional_characters(path: Path = VARIANTS) -> dict[str, str]:
    """Return the traditional characters of the simplified ones that have exactly one, and of those of ``scenes.yaml``.

    Args:
        path: Unihan_Variants.txt, compressed by bzip2.

    Raises:
        InputError: The file is missing.
    """
    if not path.is_file():
        raise InputError(f"{path} is missing; on Debian or Ubuntu: apt install unicode-data")
    simplified = read_simplified(path)
    forms: dict[str, list[str]] = {}
    for old, new in simplified.items():
        if len(new.encode("utf-16-le")) == len(old.encode("utf-16-le")) == 2:  # rare ones lie in further planes
            forms.setdefault(new, []).append(old)
    single = {new: old[0] for new, old in forms.items() if len(old) == 1 and new not in _STANDS_FOR_ITSELF}
    return single | scene_tables().traditional


# Simplified characters of captions that are traditional characters too, in the meaning that captions have.
_STANDS_FOR_ITSELF = frozenset("松面干表卷向胡升采范志几系出谷斗后丑余制")


def to_traditional(text: str, traditional: Mapping[str, str]) -> str:
    """Return a caption in traditional characters; what stands in quotes is left as it is, in quotes of the other form.

    Args:
        text: The caption.
        traditional: Traditional characters by simplified ones.
    """
    parts = _QUOTED.split(text)
    table = str.maketrans(dict(traditional))
    for index in range(0, len(parts), 2):
        for word, form in scene_tables().traditional_words.items():
            parts[index] = parts[index].replace(word, form)
        parts[index] = parts[index].translate(table)
    return "".join(part if index % 2 == 0 else f"「{part[1:-1]}」" for index, part in enumerate(parts))


def simplifying_table(traditional: Mapping[str, str]) -> dict[int, str]:
    """Return the table for ``str.translate`` that inverts ``to_traditional`` outside of quotes.

    Args:
        traditional: Traditional characters by simplified ones.
    """
    forms = {old: new for new, old in traditional.items()}
    for word, form in scene_tables().traditional_words.items():
        forms |= {old: new for new, old in zip(word, form, strict=True) if new != old}
    return str.maketrans(forms)
