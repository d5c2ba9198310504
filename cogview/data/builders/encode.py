"""Build a token store from captioned images: render, encode by the image tokenizer, tokenize, and write."""

# G codes on a side of the grid
from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from cogview.data.image_dataset import ImageDataset, NamedRegion, caption_of, check_dataset, render, render_source
from cogview.data.store import NAMES_FIELD, NO_TOKEN, TEXT_FIELD, StoreHeader
from cogview.data.store_writer import StoreWriter, pad_text
from cogview.errors import InputError
from cogview.signals import worker_init
from cogview.tokenizers.store_tasks import tasks_of_store
from cogview.tokenizers.tasks import INSTRUCTION_FIELD, SOURCE_FIELD
from cogview.tokenizers.text import TextTokenizer
from cogview.vqvae.codec import ImageTokenizer, codebook_sha256, to_float
from cogview.vqvae.ranges import BATCH, WORKERS, check_ranges

LINE_SECONDS = 60.0  # between two lines of progress where stderr is no terminal


@dataclass(frozen=True, kw_only=True)
class EncodeSettings:
    """Settings of a store that is built from captioned images.

    Args:
        text_width: Text pieces in the longest caption.
        large: Also store the codes of each image at twice the side, for the task upscale.
        small: Also store the codes of each image at half the side, for the task low_level.
        source: Also store the codes of the image before an edit that leads to the image, and the instruction, for the
            task edit.
        named: Also store, for each code, the piece of the caption that names the object there.
        batch_size: Images encoded in one forward pass.
        num_workers: Processes that render images; 0 renders in the main process.

    Raises:
        ValueError: A number is out of range.
    """

    text_width: int = 48
    large: bool = False
    small: bool = False
    source: bool = field(default=False, metadata={"omit_default": True})
    named: bool = False
    batch_size: int = 256
    num_workers: int = 0

    def __post_init__(self) -> None:
        check_ranges(self, {"text_width": "[1, 65535]", "batch_size": BATCH, "num_workers": WORKERS})

    @property
    def scales(self) -> dict[str, float]:
        """Scale of the rendition of each image field of the store."""
        return {"image": 1.0, **({"large": 2.0} if self.large else {}), **({"small": 0.5} if self.small else {})}

    @property
    def edit_fields(self) -> tuple[str, ...]:
        """Fields of the edit that leads to an image: its source, and an instruction beside the caption."""
        return (SOURCE_FIELD, INSTRUCTION_FIELD) if self.source else ()

    @property
    def tasks(self) -> tuple[str, ...]:
        """Tasks that the store can feed."""
        return tasks_of_store({"text", *self.scales, *self.edit_fields})


@dataclass(frozen=True, kw_only=True, eq=False)
class _Row:
    """Renditions, text pieces and regions of one row, before encoding."""

    images: Mapping[str, np.ndarray]  # uint8 (H, W, 3) by field
    pieces: list[int]
    instruction: list[int]
    regions: tuple[NamedRegion, ...]


class _RenderedRows(Dataset[_Row]):
    """Rows of a dataset, rendered and tokenized in the worker process."""

    def __init__(self, dataset: ImageDataset, text_tokenizer: TextTokenizer, settings: EncodeSettings) -> None:
        self.dataset = dataset
        self.text_tokenizer = text_tokenizer
        self.scales = settings.scales
        self.has_source = settings.source

    def __getitem__(self, row: int) -> _Row:
        example, caption = caption_of(self.dataset, row)
        images = {field: render(example, self.dataset.side, scale) for field, scale in self.scales.items()}
        if self.has_source:
            images[SOURCE_FIELD] = render_source(example, self.dataset.side)
        encode = self.text_tokenizer.encode
        instruction = encode(example.instruction) if self.has_source else []
        return _Row(images=images, pieces=encode(caption), instruction=instruction, regions=example.regions)


def name_pieces(names: Sequence[str], text_tokenizer: TextTokenizer) -> dict[str, int]:
    """Return the text piece of each name.

    Args:
        names: The names.
        text_tokenizer: The text tokenizer.

    Raises:
        InputError: A name takes several pieces.
    """
    pieces = {name: text_tokenizer.encode(name) for name in names}
    for name, ids in pieces.items():
        if len(ids) != 1:
            raise InputError(
                f"the name {name} of an object takes {len(ids)} pieces, expected one piece that stands for it; "
                "train the text tokenizer with whole_names: true, or encode with named: false"
            )
    return {name: ids[0] for name, ids in pieces.items()}


def name_grid(
    regions: Sequence[NamedRegion], caption: Sequence[int], pieces: Mapping[str, int], grid: int
) -> np.ndarray:
    """Return, for each code of an image, the piece of its caption that names the object there.

    Args:
        regions: Named objects of the image.
        caption: Piece ids of the caption.
        pieces: Piece id of each name.
        grid: Codes on a side of the image.

    Returns:
        uint16 (G * G,); ``NO_TOKEN`` outside the regions, and where the caption has no name of the object or several.
    """
    named = np.full((grid, grid), NO_TOKEN, dtype=np.uint16)
    for region in regions:
        present = {pieces[name] for name in region.names}.intersection(caption)
        if len(present) == 1:
            left, top, right, bottom = (int(edge * grid) for edge in region.box)
            named[top:bottom, left:right] = next(iter(present))
    return named.ravel()


def store_header(
    dataset: ImageDataset, text_tokenizer: TextTokenizer, image_tokenizer: ImageTokenizer, settings: EncodeSettings
) -> StoreHeader:
    """Return the header of the store that ``encode_dataset`` writes.

    Args:
        dataset: The images and captions.
        text_tokenizer: The text tokenizer.
        image_tokenizer: The image tokenizer.
        settings: Settings of the encoding.

    Raises:
        InputError: There are no images, or their side does not divide into the codes that the tasks need.
    """
    check_dataset(dataset, image_tokenizer.downsampling, settings.tasks)
    return make_header(dataset.side, dataset.provenance, text_tokenizer, image_tokenizer, settings)


def make_header(
    side: int,
    provenance: Mapping[str, Any],
    text_tokenizer: TextTokenizer,
    image_tokenizer: ImageTokenizer,
    settings: EncodeSettings,
) -> StoreHeader:
    """Return the header of a store of captioned images.

    Args:
        side: Side of the images at scale 1, in pixels, which divides into codes at every scale (``check_side``).
        provenance: Description of the data, as plain JSON data.
        text_tokenizer: The text tokenizer.
        image_tokenizer: The image tokenizer.
        settings: Settings of the encoding.
    """
    grid = side // image_tokenizer.downsampling
    return StoreHeader(
        fields={
            TEXT_FIELD: settings.text_width,
            **{field: round(grid * scale) ** 2 for field, scale in settings.scales.items()},
            **({NAMES_FIELD: grid**2} if settings.named else {}),
            **{name: grid**2 if name == SOURCE_FIELD else settings.text_width for name in settings.edit_fields},
        },
        grid=grid,
        num_image_codes=len(image_tokenizer.codebook),
        num_text_pieces=text_tokenizer.size,
        layouts=settings.tasks,
        codebook_sha256=codebook_sha256(image_tokenizer.codebook),
        text_sha256=hashlib.sha256(text_tokenizer.model_bytes).hexdigest(),
        provenance=dict(provenance),
    )


def encode_renditions(
    images: Sequence[Mapping[str, np.ndarray]], image_tokenizer: ImageTokenizer
) -> dict[str, np.ndarray]:
    """Return the codes of a batch of images.

    Args:
        images: N images, each with the uint8 RGB (H, H, 3) of its renditions by field; all have the same fields.
        image_tokenizer: The image tokenizer.

    Returns:
        The int64 codes (N, width) of each field.
    """
    device = image_tokenizer.codebook.device
    codes = {}
    for name in images[0]:
        with torch.inference_mode():
            batch = to_float(np.stack([each[name] for each in images]), device)
            codes[name] = image_tokenizer.encode(batch).flatten(1).cpu().numpy()
    return codes


def encode_dataset(
    path: Path,
    dataset: ImageDataset,
    text_tokenizer: TextTokenizer,
    image_tokenizer: ImageTokenizer,
    settings: EncodeSettings,
    *,
    rows: int | None = None,
) -> None:
    """Write rows of a dataset to a token store; a store that was interrupted is continued.

    Args:
        path: Folder of the store.
        dataset: Captioned images.
        text_tokenizer: Tokenizer of the captions.
        image_tokenizer: Tokenizer of the images.
        settings: Fields of the rows, and the size of batches.
        rows: Number of rows, one per example by default. More rows repeat the examples with their next captions.

    Raises:
        InputError: The store was begun with other settings, a caption is longer than ``text_width``, or a name of
            the dataset takes several pieces.
    """
    pieces = name_pieces(dataset.names, text_tokenizer) if settings.named else None
    header = store_header(dataset, text_tokenizer, image_tokenizer, settings)
    total = len(dataset) if rows is None else rows
    printed = time.monotonic()
    with (
        StoreWriter(path, header, resume=True) as writer,
        tqdm(total=total, initial=writer.count, unit="image", desc=path.name, disable=None) as bar,
    ):
        for batch in _batches(_RenderedRows(dataset, text_tokenizer, settings), writer.count, total, settings):
            fields = {TEXT_FIELD: pad_text([row.pieces for row in batch], settings.text_width)}
            fields |= encode_renditions([row.images for row in batch], image_tokenizer)
            if settings.source:
                fields[INSTRUCTION_FIELD] = pad_text([row.instruction for row in batch], settings.text_width)
            if pieces is not None:
                fields[NAMES_FIELD] = np.stack(
                    [name_grid(row.regions, row.pieces, pieces, header.grid) for row in batch]
                )
            writer.append(fields)
            bar.update(len(batch))
            if bar.disable and time.monotonic() - printed >= LINE_SECONDS:  # no terminal
                printed = time.monotonic()
                print(f"{path.name}: {writer.count} of {total} rows", file=sys.stderr)


def _batches(rows: _RenderedRows, first: int, end: int, settings: EncodeSettings) -> Iterator[list[_Row]]:
    """Yield batches of rows ``first`` to ``end`` - 1."""
    loader: DataLoader[_Row] = DataLoader(
        rows,
        batch_size=settings.batch_size,
        sampler=range(first, end),
        collate_fn=list,
        num_workers=settings.num_workers,
        worker_init_fn=worker_init,
    )
    return iter(loader)
