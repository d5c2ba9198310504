"""Measures of a model on a token store, as rows of a result."""

# N rows
from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cogview.checkpoints.image_tokenizer import codebook_hash
from cogview.config_io import to_mapping
from cogview.data.store import TokenStore
from cogview.data.v1_datasets import open_dataset
from cogview.errors import InputError
from cogview.evaluation.likelihood import caption_scores, measure_likelihood, part_name
from cogview.evaluation.manifest import ResultCurve, ResultItems, ResultValue, SetRecord, hash_set
from cogview.evaluation.metrics import bootstrap, wilson_interval
from cogview.evaluation.reconstruction import code_usage
from cogview.evaluation.retrieval import distinct_rows, pair_scores, recall_at
from cogview.pipeline.cogview import CogView

DIRECTIONS = ("text_to_picture", "picture_to_text")


@dataclass(kw_only=True)
class ResultTable:
    """Measured values by name, the values of single items for paired comparisons, and curves.

    Attributes:
        values: The values.
        items: By name of a value that is a mean over items: the value of each item by its id.
        curves: The curves.
        settings: Further entries of the manifest's settings.
    """

    values: dict[str, ResultValue] = field(default_factory=dict)
    items: dict[str, dict[str, float]] = field(default_factory=dict)
    curves: dict[str, ResultCurve] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    def add(
        self, name: str, interval: Mapping[str, float], n: int, unit: str, *, higher_is_better: bool | None = False
    ) -> None:
        """Add a value.

        Args:
            name: Its name.
            interval: ``value``, and ``low`` and ``high`` if they are known.
            n: Number of items.
            unit: Unit of the value.
            higher_is_better: Whether a larger value is better; None where neither is.
        """
        known = {key: interval.get(key) for key in ("low", "high")}
        self.values[name] = ResultValue(
            value=interval["value"], **known, n=n, unit=unit, higher_is_better=higher_is_better
        )

    def result_items(self) -> ResultItems | None:
        """Return the values of all items; an item that a value does not count has None there."""
        ids = list(dict.fromkeys(chain.from_iterable(self.items.values())))
        if not ids:
            return None
        return ResultItems(
            ids=ids, values={name: [found.get(each) for each in ids] for name, found in self.items.items()}
        )


def describe_rows(store: TokenStore, rows: Sequence[int]) -> SetRecord:
    """Return the record of rows of a store: equal rows have one hash, whatever store they are in."""
    content = store.read(rows)
    hashes = [
        hashlib.sha256(b"".join(content[name][index].tobytes() for name in sorted(content))).hexdigest()
        for index in range(len(rows))
    ]
    return hash_set(Path(store.path).name, hashes)


def open_matching_store(model: CogView, path: Path | str) -> TokenStore:
    """Open a token store that the tokenizers of a model made.

    Args:
        model: The model.
        path: A token store, or a dataset of CogView v1, which is taken to be of these tokenizers.

    Raises:
        InputError: There is none, it is empty, or it is of other tokenizers or another grid.
    """
    vocabulary, codebook = model.vocabulary, codebook_hash(model.image_tokenizer)
    text = hashlib.sha256(model.text_tokenizer.model_bytes).hexdigest()
    store = open_dataset(
        path,
        num_image_codes=vocabulary.num_image_codes,
        num_text_pieces=vocabulary.num_text_pieces,
        codebook_sha256=codebook,
        text_sha256=text,
    )
    store.check_compatible(codebook_sha256=codebook, text_sha256=text, grid=model.config.grid)
    if not len(store):
        raise InputError(f"{path} has no rows: encode some first")
    return store


def spread_rows(store: TokenStore, count: int) -> list[int]:
    """Return ``count`` rows at equal distances, or all of a store that has fewer."""
    return [int(row) for row in np.unique(np.linspace(0, len(store) - 1, min(count, len(store))).astype(np.int64))]


def add_likelihood(
    table: ResultTable, model: CogView, store: TokenStore, rows: Sequence[int], batch_size: int | None
) -> None:
    """Add the losses by task, part and band of positions, and the caption score.

    Args:
        table: The table.
        model: The model.
        store: A store of its tokenizers.
        rows: Numbers of the rows.
        batch_size: Maximum number of rows in a batch; None: as many as memory holds and pay.
    """
    for part in measure_likelihood(model, store, rows, batch_size=batch_size):
        name = part_name(part.task, part.part)
        table.add(name, part.loss(), len(rows), "nats per token")
        if len({len(tokens) for tokens in part.tokens}) == 1:  # only then is the loss the mean over rows
            table.items[name] = _by_row(rows, [-tokens.mean() for tokens in part.tokens])
        for band, (loss, count) in part.bands().items():
            table.add(f"{name}_tokens_{band}", {"value": loss}, count, "nats per token")
    if "caption" in model.config.tasks and "caption" in store.header.layouts:
        scores, counts = caption_scores(model, store, rows, batch_size=batch_size)
        table.add("caps", bootstrap(_mean_of(scores), len(rows)), len(rows), "nats per text", higher_is_better=True)
        table.add("caploss", bootstrap(_mean_of(-scores / counts), len(rows)), len(rows), "nats per token")
        table.items |= {"caps": _by_row(rows, scores), "caploss": _by_row(rows, -scores / counts)}


def add_code_usage(table: ResultTable, store: TokenStore, rows: Sequence[int], num_codes: int) -> None:
    """Add the fraction of the codebook that occurs in some rows, and the perplexity of its codes.

    Args:
        table: The table.
        store: The store.
        rows: Numbers of the rows.
        num_codes: Size of the codebook.
    """
    counts = np.bincount(store.read(rows)["image"].reshape(-1), minlength=num_codes)
    used, perplexity = code_usage(counts)
    table.add("codes_used", {"value": used}, int(counts.sum()), "fraction", higher_is_better=True)
    table.add("code_perplexity", {"value": perplexity}, int(counts.sum()), "codes", higher_is_better=True)


def add_retrieval(table: ResultTable, model: CogView, store: TokenStore, pairs: int, batch_size: int | None) -> None:
    """Add R@1, R@5 and R@10 of texts for pictures and pictures for texts, for each score of the model.

    A random choice finds K of N pairs.

    Args:
        table: The table.
        model: The model.
        store: A store of its tokenizers.
        pairs: Maximum number of pairs, at least 2; all scores of all pairs are computed.
        batch_size: Maximum number of pairs in a batch; None: as many as memory holds and pay.

    Raises:
        InputError: The store has fewer than two different pairs.
    """
    rows = distinct_rows(store, pairs)
    table.settings["pairs"] = to_mapping(describe_rows(store, rows))
    for by, scores_NN in pair_scores(model, store, rows, batch_size=batch_size).items():
        for direction, scores in zip(DIRECTIONS, (scores_NN, scores_NN.T), strict=True):
            for rank, found in recall_at(scores).items():
                low, high = wilson_interval(int(found.sum()), len(rows))
                interval = {"value": float(found.mean()), "low": low, "high": high}
                name = f"{direction}_r{rank}_by_{by}"
                table.add(name, interval, len(rows), "fraction", higher_is_better=True)
                table.items[name] = _by_row(rows, found)


def _by_row(rows: Sequence[int], values: Sequence[float] | NDArray[Any]) -> dict[str, float]:
    """Return the value of each row by its id."""
    return {f"row {row}": float(value) for row, value in zip(rows, values, strict=True)}


def _mean_of(values: NDArray[np.float64]) -> Callable[[np.ndarray], np.ndarray]:
    """Return the statistic of ``bootstrap`` that is the mean of the chosen values."""
    return lambda rows: np.asarray(values[rows].mean(axis=-1))
