"""Describe the rows of a token store: lengths of texts, codes in use, frequent captions, duplicates."""

# N rows, W width of a field
from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from cogview.data.store import NAMES_FIELD, NO_TOKEN, TEXT_FIELD, TEXT_FIELDS, TokenStore, text_lengths
from cogview.data.store_hashes import HashCounter
from cogview.tokenizers.text import TextTokenizer

CHUNK = 4096  # rows
NUM_FREQUENT = 10  # captions


@dataclass(frozen=True, kw_only=True)
class StoreStats:
    """Facts of a token store.

    Attributes:
        rows: Number of rows.
        fields: Width of each field.
        tasks: Tasks that the rows can feed.
        grid: Codes on a side.
        shortest: Pieces of the shortest text.
        mean_length: Pieces of a text on average.
        longest: Pieces of the longest text.
        text_width: Pieces that a row has room for.
        codes_used: Number of different codes by image field.
        num_codes: Size of the codebook.
        distinct_texts: Number of different texts.
        distinct_images: Number of different images.
        repeated_rows: Rows that equal an earlier one.
        named_share: Share of the codes whose object is named; None in a store without names.
        byte_share: Share of the pieces that are bytes; None without a text tokenizer.
        frequent: The most frequent captions with their rows; none without a text tokenizer.
    """

    rows: int
    fields: Mapping[str, int]
    tasks: tuple[str, ...]
    grid: int
    shortest: int
    mean_length: float
    longest: int
    text_width: int
    codes_used: Mapping[str, int]
    num_codes: int
    distinct_texts: int
    distinct_images: int
    repeated_rows: int
    named_share: float | None = None
    byte_share: float | None = None
    frequent: tuple[tuple[str, int], ...] = ()

    def as_json(self) -> dict[str, Any]:
        """Return the facts as plain data."""
        return asdict(self)

    def as_text(self) -> list[str]:
        """Return the facts as lines ``name: value``."""
        fields = ", ".join(f"{name} {width}" for name, width in self.fields.items())
        codes = ", ".join(f"{name} {count:,} of {self.num_codes:,}" for name, count in self.codes_used.items())
        lines = [
            f"rows: {self.rows:,}",
            f"fields: {fields}; grid {self.grid}",
            f"tasks: {', '.join(self.tasks)}",
            f"text: {self.shortest} to {self.longest} pieces, {self.mean_length:.1f} on average, room for "
            f"{self.text_width}",
            f"codes in use: {codes}",
            f"distinct: {self.distinct_texts:,} texts, {self.distinct_images:,} images",
            f"repeated rows: {self.repeated_rows:,}",
        ]
        if self.named_share is not None:
            lines.append(f"codes with a name: {self.named_share:.0%}")
        if self.byte_share is not None:
            lines.append(f"pieces that are bytes: {self.byte_share:.0%}")
        lines += [f"{count:>8,}  {caption}" for caption, count in self.frequent]
        return lines


def store_stats(store: TokenStore, text_tokenizer: TextTokenizer | None = None) -> StoreStats:
    """Return the facts of a store.

    Args:
        store: The store, with at least one row.
        text_tokenizer: Its text tokenizer, for what captions say.

    Raises:
        InputError: The store is damaged.
    """
    header = store.header
    images = [name for name in header.fields if name not in (*TEXT_FIELDS, NAMES_FIELD)]
    used = {name: np.zeros(header.num_image_codes, dtype=bool) for name in images}
    pieces = np.zeros(header.num_text_pieces, dtype=np.int64)
    by_length = np.zeros(header.fields[TEXT_FIELD] + 1, dtype=np.int64)
    named = 0
    with ExitStack() as stack:
        texts, pictures, whole = (stack.enter_context(HashCounter(len(store))) for _ in range(3))
        for rows in chunks(store):
            if NAMES_FIELD in rows:
                named += int((rows[NAMES_FIELD] != NO_TOKEN).sum())
            by_length += np.bincount(text_lengths(rows[TEXT_FIELD]), minlength=len(by_length))
            text = rows[TEXT_FIELD][rows[TEXT_FIELD] != NO_TOKEN]
            pieces += np.bincount(text, minlength=len(pieces))
            for name in images:
                used[name][rows[name].ravel()] = True
            texts.add(rows[TEXT_FIELD])
            pictures.add(rows[images[0]])
            whole.add(np.concatenate([rows[TEXT_FIELD], *(rows[name] for name in images)], axis=1))
        distinct_texts, frequent = texts.count(NUM_FREQUENT)
        distinct_images, distinct_rows = pictures.count()[0], whole.count()[0]
    lengths = np.flatnonzero(by_length)
    return StoreStats(
        rows=len(store),
        fields=header.fields,
        tasks=header.layouts,
        grid=header.grid,
        shortest=int(lengths[0]),
        mean_length=float((by_length * np.arange(len(by_length))).sum() / len(store)),
        longest=int(lengths[-1]),
        text_width=header.fields[TEXT_FIELD],
        codes_used={name: int(each.sum()) for name, each in used.items()},
        num_codes=header.num_image_codes,
        distinct_texts=distinct_texts,
        distinct_images=distinct_images,
        repeated_rows=len(store) - distinct_rows,
        named_share=named / (len(store) * header.fields[NAMES_FIELD]) if NAMES_FIELD in header.fields else None,
        byte_share=None if text_tokenizer is None else _byte_share(pieces, text_tokenizer),
        frequent=()
        if text_tokenizer is None
        else tuple((caption_of_row(store[row][TEXT_FIELD], text_tokenizer), count) for row, count in frequent),
    )


def chunks(store: TokenStore) -> Iterator[dict[str, np.ndarray]]:
    """Yield the rows of a store in order, ``CHUNK`` at a time."""
    for start in range(0, len(store), CHUNK):
        yield store.read(range(start, min(start + CHUNK, len(store))))


def caption_of_row(text_W: np.ndarray, text_tokenizer: TextTokenizer) -> str:
    """Return the caption of a text field: (W,)."""
    return text_tokenizer.decode(text_W[text_W != NO_TOKEN].tolist())


def _byte_share(counts: np.ndarray, text_tokenizer: TextTokenizer) -> float:
    """Return the share of pieces that are bytes, given the occurrences of each piece."""
    is_byte = np.array([piece.startswith("<0x") for piece in text_tokenizer.pieces])
    return float(counts[is_byte].sum() / max(1, counts.sum()))
