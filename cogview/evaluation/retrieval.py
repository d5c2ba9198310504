"""Retrieval of texts by pictures and of pictures by texts, with the scores of a model."""

# N pairs of a text and a picture
from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from cogview.data.store import NO_TOKEN, TEXT_FIELD, TokenStore
from cogview.errors import InputError
from cogview.formatting import plural
from cogview.pipeline.cogview import CogView
from cogview.pipeline.ranking import term_scores
from cogview.pipeline.ranking_rules import SCORE_TERMS

RANKS = (1, 5, 10)
MIN_PAIRS = 2


def recall_at(scores_NN: NDArray[np.float64], ranks: Sequence[int] = RANKS) -> dict[int, NDArray[np.bool_]]:
    """Return, for each rank K and each query, whether its match is among the K best candidates.

    Args:
        scores_NN: Score of each query (row) with each candidate (column); the match of a query has its index. A
            candidate with the score of the match counts as better, so that a constant score finds nothing.
        ranks: The ranks.

    Returns:
        bool (N,) by rank.

    Raises:
        ValueError: The scores are not square, or one is no number.
    """
    if scores_NN.ndim != 2 or scores_NN.shape[0] != scores_NN.shape[1] or np.isnan(scores_NN).any():
        raise ValueError(f"recall needs a square of numbers, got {scores_NN.shape} with NaN or of unlike sides")
    better = (scores_NN >= np.diag(scores_NN)[:, None]).sum(axis=1)  # the match itself is one of them
    return {rank: better <= rank for rank in ranks}


def distinct_rows(store: TokenStore, count: int) -> list[int]:
    """Return the first rows whose texts and images all differ, ``count`` at most.

    Raises:
        InputError: There are fewer than two.
    """
    texts: set[bytes] = set()
    images: set[bytes] = set()
    chosen = []
    for number in range(len(store)):
        row = store[number]
        text, image = row[TEXT_FIELD].tobytes(), row["image"].tobytes()
        if text in texts or image in images:
            continue
        texts.add(text)
        images.add(image)
        chosen.append(number)
        if len(chosen) == count:
            break
    if len(chosen) < MIN_PAIRS:
        raise InputError(
            f"{store.path} has {plural(len(chosen), 'different pair')} of a text and an image, retrieval needs "
            f"{MIN_PAIRS}: encode more rows, or leave retrieval out with --pairs 0"
        )
    return chosen


def pair_scores(
    model: CogView, store: TokenStore, rows: Sequence[int], *, batch_size: int | None = None
) -> Mapping[str, NDArray[np.float64]]:
    """Return scores of every text with every picture of some rows.

    Args:
        model: The model.
        store: A store of its tokenizers.
        rows: Numbers of the rows.
        batch_size: Maximum number of pairs in a batch; None: as many as memory holds and pay.

    Returns:
        By name of the ranking rule, (N, N) with texts as rows and pictures as columns: ``caption`` and ``picture``
        where the model was trained for the task, ``both`` with both, ``guidance`` with caption dropout.
    """
    content = store.read(rows)
    texts, images = [text[text != NO_TOKEN] for text in content[TEXT_FIELD]], list(content["image"])
    found: dict[str, NDArray[np.float64]] = {}

    def scores(text: NDArray[np.integer], name: str) -> NDArray[np.float64]:
        """Return the scores (N,) of one text with every image."""
        pairs, planner = [(text, image) for image in images], model.context.planner(batch_size)
        return np.array([value for value, _ in term_scores(SCORE_TERMS[name], pairs, model.context, planner)])

    for name, task in (("caption", "caption"), ("picture", "generate")):
        if task in model.config.tasks:
            bar = tqdm(texts, unit="text", desc=f"scoring pairs by {name}", disable=None)
            found[name] = np.stack([scores(text, name) for text in bar])
    if len(found) == 2:
        lengths = np.array([len(text) for text in texts])
        found["both"] = found["caption"] / lengths[:, None] + found["picture"] / len(images[0])
    if "picture" in found and model.config.caption_dropout:
        found["guidance"] = found["picture"] - scores(texts[0], "picture alone")
    return found
