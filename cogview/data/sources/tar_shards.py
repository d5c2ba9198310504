"""A tar shard in WebDataset's form: members of one key follow each other, as ``0001.jpg`` and ``0001.txt``.

The archive is read in order, its pictures later by their offsets. Nothing is extracted.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any, TypeAlias

from cogview.data.sources.columns import CAPTION_NAMES
from cogview.data.sources.names import CAPTION_SUFFIX
from cogview.data.sources.records import GB18030_NOTE, PictureFile, PictureRecord, boxes_cell
from cogview.errors import InputError, reason_of
from cogview.image_io.reading import IMAGE_SUFFIXES
from cogview.plain_data import parse_json
from cogview.tables import decode_text, numbered_lines

MAX_TEXT = 1 << 20  # bytes of a member with captions

BLOCK = tarfile.BLOCKSIZE

# Key, suffix in lower case, and header of a file; three empty values where the archive is damaged.
_Member: TypeAlias = tuple[str, str, tarfile.TarInfo | None]


class TarShard:
    """The records of one tar archive in its order.

    Args:
        path: The archive, not compressed. Where it is cut off, a record says so.
        boxes_key: Key of the member ``.json`` with named boxes; None for none.
        needs_captions: Whether a picture without a caption is a problem. Otherwise captions are not read at all, and
            keys without a picture are passed over.

    Raises:
        InputError: The archive cannot be read, or its first header is none.
    """

    def __init__(self, path: Path, boxes_key: str | None = None, *, needs_captions: bool = True) -> None:
        self.path = path
        self.boxes_key = boxes_key
        self.needs_captions = needs_captions
        try:
            with path.open("rb") as file:
                self._size = file.seek(0, os.SEEK_END)
                file.seek(0)
                first = file.read(BLOCK)
        except OSError as error:
            raise InputError(f"cannot read {path}: {reason_of(error)}") from None
        if len(first) == BLOCK and any(first):
            try:
                tarfile.TarInfo.frombuf(first, tarfile.ENCODING, "surrogateescape")
            except tarfile.TarError as error:
                raise InputError(f"{path} is no tar archive: {error}") from None
        self._count = sum(1 for _ in self._groups())

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[PictureRecord]:
        for key, members in self._groups():
            yield self._record(key, members)

    def _groups(self) -> Iterator[tuple[str, dict[str, tarfile.TarInfo]]]:
        """Yield the members of each key by their suffixes; an empty key and no members where the archive is cut."""
        for key, members in groupby(_members(self.path, self._size), key=lambda member: member[0]):
            by_suffix = {suffix: info for _, suffix, info in members if info is not None}
            if self.needs_captions or not by_suffix or not by_suffix.keys().isdisjoint(IMAGE_SUFFIXES):
                yield key, by_suffix

    def _record(self, key: str, members: Mapping[str, tarfile.TarInfo]) -> PictureRecord:
        if not members:
            return PictureRecord(name=str(self.path), problem="the archive is cut off or damaged at its end")
        for info in members.values():
            if (there := self._size - info.offset_data) < info.size:
                problem = f"the archive is cut off within it, after {max(0, there)} of {info.size} bytes"
                return PictureRecord(name=self._name(info.name), problem=problem)
        pictures = [suffix for suffix in members if suffix in IMAGE_SUFFIXES]
        texts = [suffix for suffix in (CAPTION_SUFFIX, ".json") if suffix in members]
        if not pictures:
            first = members[texts[0]].name if texts else key
            reason = "a caption without a picture" if texts else "no picture and no caption"
            return PictureRecord(name=self._name(first), problem=f"{reason} under the key {key}")
        picture = members[pictures[0]]
        name = self._name(picture.name)
        file = PictureFile(path=self.path, offset=picture.offset_data, size=picture.size)
        if not self.needs_captions:
            return PictureRecord(name=name, file=file)
        notes: list[str] = []
        try:
            captions = self._captions(members, texts, notes)
            boxes = self._boxes(members)
        except (InputError, OSError, ValueError) as error:
            return PictureRecord(name=name, problem=str(error))
        if not captions:
            return PictureRecord(name=name, problem=f"a picture without a caption: expected {key}{CAPTION_SUFFIX}")
        return PictureRecord(name=name, captions=captions, boxes=boxes, file=file, notes=tuple(notes))

    def _captions(self, members: Mapping[str, tarfile.TarInfo], texts: list[str], notes: list[str]) -> tuple[str, ...]:
        """Return the captions of a key: the lines of its .txt, or else a text or list of its .json."""
        for suffix in texts:
            info = members[suffix]
            content = self._content(info)
            if suffix == CAPTION_SUFFIX:
                text = decode_text(content, self._name(info.name), lambda note: notes.append(GB18030_NOTE))
                lines = tuple(line for _, line in numbered_lines(text))
            else:
                lines = _captions_of_json(content, self._name(info.name))
            if lines:
                return lines
        return ()

    def _boxes(self, members: Mapping[str, tarfile.TarInfo]) -> tuple[str, ...]:
        """Return the named boxes of a key, from its .json."""
        if self.boxes_key is None or ".json" not in members:
            return ()
        content = self._content(members[".json"])
        try:
            found = parse_json(content)
        except ValueError:
            return (content.decode("utf-8", "replace"),)  # the picture is kept, and the build reports the boxes
        return boxes_cell(found.get(self.boxes_key)) if isinstance(found, Mapping) else ()

    def _content(self, info: tarfile.TarInfo) -> bytes:
        """Return the bytes of a member with captions or boxes."""
        if info.size > MAX_TEXT:
            raise InputError(f"its captions {info.name} have {info.size:,} bytes, at most {MAX_TEXT:,} are read")
        return PictureFile(path=self.path, offset=info.offset_data, size=info.size).read_part() or b""

    def _name(self, member: str) -> str:
        return str(self.path / member)


def _members(path: Path, size: int) -> Iterator[_Member]:
    """Yield key, suffix and header of each file, and empty ones at the end of an archive that lacks its end mark.

    ``tarfile`` takes a damaged header for the end, so the mark is looked for: a block of zeros. An archive that is cut
    within a member ends with that member.
    """
    end = 0
    try:
        with tarfile.open(path, "r:") as archive:
            while end <= size and (info := archive.next()) is not None:
                archive.members = []  # type: ignore[attr-defined]  # they would grow without limit
                if info.size < 0:  # it would lead back, for ever
                    raise tarfile.ReadError("a negative size")
                end = info.offset_data + (-(-info.size // BLOCK) * BLOCK if info.isreg() else 0)
                folder, _, base = info.name.rpartition("/")
                stem, dot, suffix = base.partition(".")  # WebDataset's rule: the key ends at the first dot
                if info.isreg() and stem:
                    yield f"{folder}/{stem}" if folder else stem, f"{dot}{suffix}".lower(), info
                    if info.offset_data + info.size > size:
                        return
        with path.open("rb") as file:
            file.seek(end)
            is_whole = file.read(BLOCK) == bytes(BLOCK)
    except (tarfile.TarError, OSError):
        is_whole = False
    if not is_whole:
        yield "", "", None


def _captions_of_json(content: bytes, name: str) -> tuple[str, ...]:
    """Return the captions of an object: a text or a list of texts under the first usual name."""
    try:
        found: Any = parse_json(content)
    except ValueError as error:
        raise InputError(f"{name} is not JSON: {error}") from None
    for key in CAPTION_NAMES if isinstance(found, Mapping) else ():
        texts = found.get(key)
        texts = texts if isinstance(texts, list) else [texts]
        if lines := tuple(text.strip() for text in texts if isinstance(text, str) and text.strip()):
            return lines
    return ()
