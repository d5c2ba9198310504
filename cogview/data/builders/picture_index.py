"""An index of pictures to train an image tokenizer on: files, sizes and hashes of pixels, divided into two splits.

The index is a file of JSON lines. A training that is resumed reads it in place of the pictures, so that it goes on with
the same ones in the same order. Files that are not changed are not read again for a new index.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, get_type_hints

from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from cogview.data.builders.prepare import MIN_SIDE, is_held_out, pixel_digest
from cogview.data.sources.records import PictureFile, PictureRecord
from cogview.errors import InputError
from cogview.files import atomic_write, json_line, read_json_lines
from cogview.image_io.reading import read_image
from cogview.signals import worker_init

READ_AT_ONCE = 16  # pictures in a task of a worker process
MAX_INDEX_BYTES = 1 << 31  # ten million pictures


@dataclass(frozen=True, kw_only=True)
class IndexedPicture:
    """A picture of an index.

    Attributes:
        name: Name in messages.
        path: The file.
        offset: First byte of the picture in an archive.
        size: Bytes of the picture in an archive; -1 for a file of its own.
        file_bytes: Bytes of the file when the picture was read.
        file_time: Time of the file's last change, in nanoseconds.
        digest: Hash of the decoded pixels; empty for a picture that cannot be used.
        left_out: Why it cannot be used; empty for one that can.
    """

    name: str
    path: str = ""
    offset: int = 0
    size: int = -1
    file_bytes: int = 0
    file_time: int = 0
    digest: str = ""
    left_out: str = ""

    @property
    def state(self) -> tuple[object, ...]:
        """What is the same as long as the file is unchanged."""
        return self.name, self.path, self.offset, self.size, self.file_bytes, self.file_time

    @property
    def file(self) -> PictureFile:
        """Where the picture is."""
        return PictureFile(path=Path(self.path), offset=self.offset, size=None if self.size < 0 else self.size)

    def to_line(self) -> bytes:
        """Return the picture as a line of JSON."""
        return json_line({key: value for key, value in asdict(self).items() if value != _DEFAULTS.get(key)})


_DEFAULTS = {each.name: each.default for each in fields(IndexedPicture)}
_TYPES = get_type_hints(IndexedPicture)


class PictureScanner(Dataset[IndexedPicture]):
    """Hashes the pixels of pictures whose files are known; a ``DataLoader`` passes these in place of indices."""

    def __getitem__(self, found: IndexedPicture) -> IndexedPicture:
        """Return a picture with its hash, or with the reason why it cannot be used."""
        values = asdict(found)
        try:
            image = read_image(Path(found.name), content=found.file.read_part())
            if min(image.size) < MIN_SIDE:
                width, height = image.size
                raise InputError(f"the picture is {width} x {height} pixels, expected at least {MIN_SIDE} on a side")
        except InputError as error:
            return IndexedPicture(**{**values, "left_out": str(error)})
        return IndexedPicture(**{**values, "digest": pixel_digest(image)})


@dataclass(frozen=True, kw_only=True)
class PictureIndex:
    """The pictures of an index.

    Attributes:
        training: The pictures to train on, in the order of the sources.
        held_out: The held-out pictures, in the order of their hashes.
        left_out: Name and reason of each picture that is not used.
    """

    training: tuple[IndexedPicture, ...]
    held_out: tuple[IndexedPicture, ...]
    left_out: tuple[tuple[str, str], ...]

    def check(self, share: float) -> None:
        """Raise InputError unless both splits have pictures.

        Args:
            share: The held-out share, for the message.
        """
        if self.training and self.held_out:
            return
        count = len(self.training) + len(self.held_out)
        if not count:
            name, reason = self.left_out[0] if self.left_out else ("", "no picture")
            raise InputError(f"none of {len(self.left_out)} pictures can be used; the first: {name}: {reason}")
        split = "trained on" if self.held_out else "held out"
        raise InputError(
            f"of {count} pictures, none is {split} with held_out: {share:g}; change it, or add more pictures"
        )


def divide(pictures: Iterable[IndexedPicture], share: float) -> PictureIndex:
    """Divide pictures into two splits by the hash of their pixels, each picture once.

    Args:
        pictures: All pictures.
        share: Share of the held-out pictures.
    """
    first: dict[str, IndexedPicture] = {}
    left_out = []
    for picture in pictures:
        if picture.left_out:
            left_out.append((picture.name, picture.left_out))
        elif picture.digest in first:
            left_out.append((picture.name, f"a copy of {first[picture.digest].name}"))
        else:
            first[picture.digest] = picture
    held_out = {digest for digest in first if is_held_out(digest, share)}
    return PictureIndex(
        training=tuple(picture for digest, picture in first.items() if digest not in held_out),
        held_out=tuple(first[digest] for digest in sorted(held_out)),  # so that the first ones are a random part
        left_out=tuple(left_out),
    )


def read_index(path: Path, settings: Mapping[str, Any]) -> list[IndexedPicture] | None:
    """Return the pictures of an index file; None if there is none, or one of other settings.

    Args:
        path: The file.
        settings: What it was made from, as plain data.
    """
    lines = read_json_lines(path, MAX_INDEX_BYTES)
    header = next(lines, None)
    if header is None or header.get("settings") != settings:
        return None
    return list(_pictures_of(lines))


def known_pictures(path: Path) -> list[IndexedPicture]:
    """Return the pictures of an index file, whatever it was made from; none if there is no file.

    Args:
        path: The file.
    """
    return list(_pictures_of(read_json_lines(path, MAX_INDEX_BYTES)))


def make_index(
    path: Path,
    settings: Mapping[str, Any],
    records: Iterable[PictureRecord],
    num_workers: int = 0,
    on_note: Callable[[str], object] = print,
) -> list[IndexedPicture]:
    """Read pictures, and write an index of them.

    A scan that was killed goes on: what it has read stands in ``PATH.unfinished``.

    Args:
        path: The file to write. Pictures of the one before are not read again if their files are unchanged.
        settings: What it is made from, as plain data.
        records: The pictures.
        num_workers: Processes that read pictures; 0 reads in the main process.
        on_note: Called with a line about the number of pictures that are not read again.

    Returns:
        The pictures in the order of the records.

    Raises:
        InputError: A source cannot be read.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.unfinished")
    known = {
        each.state: each for file in (path, unfinished) for each in _pictures_of(read_json_lines(file, MAX_INDEX_BYTES))
    }
    listed = [_listed(record) for record in records]
    missing = [each for each in listed if not each.left_out and each.state not in known]
    if known and missing:
        on_note(f"{len(missing)} of {len(listed)} pictures are new or changed, and are read")
    with unfinished.open("ab") as file:
        file.write(b"\n")  # after a line that a kill cut short
        for picture in _scanned(missing, num_workers):
            known[picture.state] = picture
            file.write(picture.to_line())
            file.flush()
    pictures = [each if each.left_out else known[each.state] for each in listed]
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        file.write(json_line({"settings": settings}))
        file.writelines(picture.to_line() for picture in pictures)
    unfinished.unlink()
    return pictures


def file_state(path: Path) -> tuple[int, int]:
    """Return the bytes of a file and the time of its last change in nanoseconds; raise OSError if it is missing."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _listed(record: PictureRecord) -> IndexedPicture:
    """Return a picture that is not read yet, or the reason why it cannot be."""
    if record.file is None:
        return IndexedPicture(name=record.name, left_out=record.problem or "no picture")
    file = record.file
    try:
        file_bytes, file_time = file_state(file.path)
    except (OSError, ValueError):  # ValueError: a name with a zero byte
        return IndexedPicture(name=record.name, left_out=f"image {record.name} does not exist")
    return IndexedPicture(
        name=record.name,
        path=os.fspath(file.path),
        offset=file.offset,
        size=-1 if file.size is None else file.size,
        file_bytes=file_bytes,
        file_time=file_time,
    )


def _scanned(pictures: list[IndexedPicture], num_workers: int) -> Iterator[IndexedPicture]:
    """Yield pictures with their hashes, in their order."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="This DataLoader will create")  # the user chose how many
        loader: DataLoader[IndexedPicture] = DataLoader(
            PictureScanner(),
            batch_size=READ_AT_ONCE,
            sampler=pictures,
            collate_fn=list,
            num_workers=num_workers if pictures else 0,
            worker_init_fn=worker_init,
        )
        batches = iter(loader)
    with tqdm(total=len(pictures), unit="picture", desc="reading", disable=None, leave=False) as bar:
        for batch in batches:
            bar.update(len(batch))
            yield from batch


def _pictures_of(lines: Iterable[Mapping[str, Any]]) -> Iterator[IndexedPicture]:
    """Yield the pictures of lines; lines of another form are passed over."""
    for line in lines:
        if "name" in line and all(type(value) is _TYPES.get(key) for key, value in line.items()):
            yield IndexedPicture(**line)
