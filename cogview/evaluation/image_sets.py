"""Sets of images to measure: folders of pictures, tar shards, and token stores whose codes are decoded."""

# N images, G codes on a side, H W pixels
from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Protocol, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from cogview.data.sources.pictures import picture_records
from cogview.data.sources.records import PictureFile, PictureRecord
from cogview.data.sources.tables import TableOptions
from cogview.data.sources.tar_shards import TarShard
from cogview.data.store import TEXT_FIELD, TokenStore
from cogview.data.store_checksum import DATA_FILE
from cogview.data.store_export import largest_field
from cogview.data.store_stats import chunks
from cogview.errors import InputError
from cogview.image_io.reading import IMAGE_SUFFIXES, read_image
from cogview.signals import worker_init
from cogview.vqvae.codec import to_uint8
from cogview.vqvae.model import VQVAE

BATCH = 64  # images that are decoded or measured together
SHARD_SUFFIX = ".tar"
EXPECTED = "a folder of pictures, a folder of .tar shards, a .tar shard, or a token store"

Prepare: TypeAlias = Callable[[Image.Image], np.ndarray]  # an RGB image to uint8 (H, W, 3); sent to worker processes


@dataclass(frozen=True, kw_only=True, eq=False)
class SetImage:
    """An image of a set.

    Attributes:
        key: Its name in the set: path or member without suffix, or the number of a stored picture.
        sha256: Hash of its file, or of the codebook and the codes.
        pixels: uint8 RGB (H, W, 3); None if it cannot be read.
        problem: Why it cannot be read, with its name; empty otherwise.
    """

    key: str
    sha256: str = ""
    pixels: np.ndarray | None = None
    problem: str = ""


class ImageSet(Protocol):
    """Images in the order of their keys.

    Attributes:
        name: Name of the set, without folders of this machine.
        path: Its file or folder.
        keys: Key of each image, sorted.
    """

    name: str
    path: Path
    keys: list[str]

    def read(self, prepare: Prepare, workers: int = 0) -> Iterator[SetImage]:
        """Yield all images in the order of ``keys``.

        Args:
            prepare: Turns an RGB image into pixels.
            workers: Processes that read images ahead; the images are the same with any number.
        """
        ...


class PictureSet:
    """Pictures in files or in tar shards.

    Args:
        path: The folder or file, whose name is that of the set.
        records: Each picture with the folder or archive that its key leaves out.
    """

    def __init__(self, path: Path, records: Iterable[tuple[PictureRecord, Path]]) -> None:
        self.path = path
        self.name = path.resolve().name
        keyed = sorted(((_key(record, root), record) for record, root in records), key=lambda each: each[0])
        self.keys = [key for key, _ in keyed]
        self._records = [record for _, record in keyed]

    def read(self, prepare: Prepare, workers: int = 0) -> Iterator[SetImage]:
        """Yield all images (``ImageSet.read``)."""
        loader: DataLoader[SetImage] = DataLoader(
            _PictureReader(self.keys, self._records, prepare),
            batch_size=None,
            num_workers=workers,
            worker_init_fn=worker_init,
        )
        return iter(loader)


class _PictureReader(Dataset[SetImage]):
    """Reads and prepares pictures, in worker processes as well."""

    def __init__(self, keys: Sequence[str], records: Sequence[PictureRecord], prepare: Prepare) -> None:
        self.keys = keys
        self.records = records
        self.prepare = prepare

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, position: int) -> SetImage:
        key, record = self.keys[position], self.records[position]
        if record.file is None:
            return SetImage(key=key, problem=f"{record.name}: {record.problem}")
        try:
            content = record.file.read_part()
            if content is None:
                content = _read_file(record.file.path)
            image = read_image(Path(record.name), content=content)
        except InputError as error:
            text = str(error)
            return SetImage(key=key, problem=text if record.name in text else f"{record.name}: {text}")
        return SetImage(key=key, sha256=hashlib.sha256(content).hexdigest(), pixels=self.prepare(image))


class StoredSet:
    """The pictures of a token store, decoded from their largest codes.

    Rows of one picture that follow each other, with several captions, are one image. Its key is its number in nine
    digits, as ``cogview data export`` names it.

    Args:
        store: The store.
        tokenizer: Its image tokenizer.

    Raises:
        InputError: The store has no pictures, or was made with another codebook.
    """

    def __init__(self, store: TokenStore, tokenizer: VQVAE) -> None:
        from cogview.checkpoints.image_tokenizer import codebook_hash

        if not set(store.header.fields) - {TEXT_FIELD}:
            raise InputError(f"{store.path} has no codes of pictures")
        store.check_compatible(codebook_sha256=codebook_hash(tokenizer))
        self.path = store.path
        self.name = store.path.resolve().name
        self._store, self._tokenizer = store, tokenizer
        self.keys = [f"{number:09d}" for number, _ in enumerate(self._codes())]

    def read(self, prepare: Prepare, workers: int = 0) -> Iterator[SetImage]:
        """Yield all images (``ImageSet.read``); this process decodes them."""
        codes, keys = self._codes(), iter(self.keys)
        while batch := list(islice(codes, BATCH)):
            side = round(len(batch[0]) ** 0.5)
            grid = torch.from_numpy(np.stack(batch).astype(np.int64)).reshape(-1, side, side)
            images = to_uint8(self._tokenizer.decode(grid.to(self._tokenizer.codebook.device)))
            for each, pixels in zip(batch, images, strict=True):
                digest = hashlib.sha256(self._store.header.codebook_sha256.encode() + each.astype("<u2").tobytes())
                prepared = prepare(Image.fromarray(pixels))
                yield SetImage(key=next(keys), sha256=digest.hexdigest(), pixels=prepared)

    def _codes(self) -> Iterator[np.ndarray]:
        """Yield the codes of each picture: (G * G,)."""
        name, before = largest_field(self._store), None
        for rows in chunks(self._store):
            for codes in rows[name]:
                if before is None or not np.array_equal(codes, before):
                    yield codes
                before = codes


def is_store(path: Path) -> bool:
    """Return whether a path is a token store, whose images a model decodes."""
    return (path / DATA_FILE).is_file()


def open_image_set(path: Path, open_tokenizer: Callable[[], VQVAE]) -> ImageSet:
    """Open a set of images.

    Args:
        path: A folder of pictures (with those below it), a folder of ``.tar`` shards, one shard, or a token store.
        open_tokenizer: Returns the image tokenizer, for a store.

    Raises:
        InputError: It does not exist, is nothing of these, or has no pictures.
    """
    if not path.exists():
        raise InputError(f"{path} does not exist; expected {EXPECTED}")
    if is_store(path):
        return StoredSet(TokenStore(path), open_tokenizer())
    if path.is_file():
        if path.suffix.lower() != SHARD_SUFFIX:
            raise InputError(f"{path} is a file; expected {EXPECTED}")
        shards = [path]
    else:
        suffixes = {each: each.suffix.lower() for each in path.iterdir()}
        shards = sorted(each for each, suffix in suffixes.items() if suffix == SHARD_SUFFIX)
        if any(suffix in IMAGE_SUFFIXES for suffix in suffixes.values()):
            shards = []
    if not shards:
        files = picture_records(path, TableOptions(), lambda note: None)
        return PictureSet(path, ((record, path) for record in files))
    records = [(record, shard) for shard in shards for record in TarShard(shard, needs_captions=False)]
    if not any(record.file for record, _ in records):
        if records:
            raise InputError(
                f"{path} has no pictures; the first problem: {records[0][0].name}: {records[0][0].problem}"
            )
        raise InputError(f"{path} has no pictures; expected {EXPECTED}")
    return PictureSet(path, records)


def match_keys(a: ImageSet, b: ImageSet) -> None:
    """Check that two sets pair each image with one of the same key.

    Raises:
        InputError: A key is repeated, or is in one set alone; the message names the first ones.
    """
    for each in (a, b):
        repeated = sorted({key for key, after in zip(each.keys, each.keys[1:], strict=False) if key == after})
        if repeated:
            raise InputError(f"{each.path} has several pictures of one name: {_first(repeated)}")
    parts = []
    for one, other in ((a, b), (b, a)):
        if lone := sorted(set(one.keys) - set(other.keys)):
            parts.append(f"only in {one.path}: {_first(lone)}")
    if parts:
        raise InputError(
            f"pairs need pictures of the same names, {a.path} has {len(a.keys)} and {b.path} has {len(b.keys)}; "
            + "; ".join(parts)
        )


def _first(names: Sequence[str], count: int = 3) -> str:
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")


def _key(record: PictureRecord, root: Path) -> str:
    """Return the path of a picture below ``root`` without its suffix."""
    path = Path(record.name)
    inner = path.relative_to(root) if path.is_relative_to(root) else path
    return inner.with_suffix("").as_posix() if inner.name else path.name


def _read_file(path: Path) -> bytes:
    """Return the bytes of a regular file; InputError with the reason of ``read_image`` for anything else."""
    size = path.stat().st_size if path.is_file() else 0
    if not size:
        read_image(path)  # raises with the reason
    content = PictureFile(path=path, size=size).read_part()
    assert content is not None
    return content
