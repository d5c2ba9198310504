"""Export the rows of a token store as pictures with captions, in tar shards of WebDataset's form."""

# B images, G codes on a side, H image in pixels
from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from cogview.data.store import TEXT_FIELD, TokenStore
from cogview.data.store_stats import caption_of_row, chunks
from cogview.files import new_folder
from cogview.tokenizers.text import TextTokenizer

BATCH = 256  # pictures that are decoded before they are written

DecodeImages = Callable[[np.ndarray], Sequence[np.ndarray]]  # (B, G, G) codes to B uint8 RGB images (H, H, 3)


def export_shards(
    store: TokenStore,
    folder: Path,
    text_tokenizer: TextTokenizer,
    decode: DecodeImages,
    *,
    shard_size: int,
    on_picture: Callable[[], object] = lambda: None,
) -> tuple[int, int]:
    """Write the pictures of a store, decoded from their largest codes, with their captions.

    Rows of one picture that follow each other are one picture with several captions. Equal stores give equal files.

    Args:
        store: The store.
        folder: Folder of the shards ``000000.tar``, …, which must not exist.
        text_tokenizer: The text tokenizer of the store.
        decode: Decodes codes.
        shard_size: Pictures in a shard.
        on_picture: Called after each picture.

    Returns:
        The numbers of pictures and of shards.

    Raises:
        InputError: ``folder`` exists, or the store is damaged.
    """
    count = 0
    with new_folder(folder) as target:
        shard: tarfile.TarFile | None = None
        try:
            for captions, pixels in _pictures(store, text_tokenizer, decode):
                if count % shard_size == 0:
                    if shard is not None:
                        shard.close()
                    shard = tarfile.open(target / f"{count // shard_size:06d}.tar", "w")  # noqa: SIM115  one of many
                assert shard is not None
                add_picture(shard, f"{count:09d}", pixels, captions)
                count += 1
                on_picture()
        finally:
            if shard is not None:
                shard.close()
    return count, -(-count // shard_size)


def add_picture(shard: tarfile.TarFile, key: str, pixels: np.ndarray, captions: Iterable[str]) -> None:
    """Add a picture to a shard as ``KEY.png``, and its captions as the lines of ``KEY.txt``.

    Args:
        shard: The archive, open for writing.
        key: Name of the picture, which no other picture of the shard has.
        pixels: uint8 RGB (H, W, 3).
        captions: The captions; spaces and line breaks within one become single spaces.
    """
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG")
    _add(shard, f"{key}.png", content.getvalue())
    lines = [" ".join(caption.split()) + "\n" for caption in captions]
    _add(shard, f"{key}.txt", "".join(lines).encode())


def largest_field(store: TokenStore) -> str:
    """Return the image field of a store with the largest pictures."""
    return "large" if "large" in store.header.fields else "image"


def _pictures(
    store: TokenStore, text_tokenizer: TextTokenizer, decode: DecodeImages
) -> Iterator[tuple[list[str], np.ndarray]]:
    """Yield the captions and the pixels of each picture."""
    waiting: list[tuple[list[str], np.ndarray]] = []
    for captions, codes in _groups(store, text_tokenizer):
        waiting.append((captions, codes))
        if len(waiting) == BATCH:
            yield from _decoded(waiting, decode)
            waiting = []
    if waiting:
        yield from _decoded(waiting, decode)


def _groups(store: TokenStore, text_tokenizer: TextTokenizer) -> Iterator[tuple[list[str], np.ndarray]]:
    """Yield the captions and the codes of each picture."""
    name = largest_field(store)
    captions: list[str] = []
    codes: np.ndarray | None = None
    for rows in chunks(store):
        for text, own in zip(rows[TEXT_FIELD], rows[name], strict=True):
            if codes is not None and not np.array_equal(codes, own):
                yield captions, codes
                captions = []
            captions.append(caption_of_row(text, text_tokenizer))
            codes = own
    if codes is not None:
        yield captions, codes


def _decoded(
    pictures: Sequence[tuple[list[str], np.ndarray]], decode: DecodeImages
) -> Iterator[tuple[list[str], np.ndarray]]:
    side = round(len(pictures[0][1]) ** 0.5)
    codes = np.stack([codes for _, codes in pictures]).astype(np.int64).reshape(-1, side, side)
    for (captions, _), pixels in zip(pictures, decode(codes), strict=True):
        yield captions, pixels


def _add(shard: tarfile.TarFile, name: str, content: bytes) -> None:
    """Add a member without the time, so that equal stores give equal files."""
    info = tarfile.TarInfo(name)
    info.size = len(content)
    shard.addfile(info, io.BytesIO(content))
