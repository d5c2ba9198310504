"""Likelihood of held-out rows of a token store: loss by task and part, and the caption score.

All log-probabilities are natural logarithms at temperature 1, of one forward pass per row.
"""

# N rows, M scored tokens of a row
from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from cogview.data.row_layout import arrange_row, text_of_row
from cogview.data.store import NO_TOKEN, TEXT_FIELD, TokenStore
from cogview.errors import InputError
from cogview.evaluation.metrics import bootstrap
from cogview.generation.scoring import ScoringRequest
from cogview.pipeline.cogview import CogView
from cogview.pipeline.ranking import score_tokens, term_scores
from cogview.pipeline.ranking_rules import SCORE_TERMS
from cogview.tokenizers.store_tasks import feeds
from cogview.tokenizers.tasks import TASKS
from cogview.tokenizers.vocabulary import TokenKind
from cogview.tokenizers.windows import NUM_WINDOWS

PARTS = {"text": TokenKind.TEXT, "image": TokenKind.IMAGE}
IMAGE_BANDS = 4  # equal parts of the codes, in raster order
TEXT_BANDS = (4, 8, 16)  # pieces before the end of a band; the last band has no end
ROWS_AT_A_TIME = 256


@dataclass(frozen=True, kw_only=True, eq=False)
class PartLikelihood:
    """Log-probabilities of the learnt tokens of one kind in the rows of a store.

    Attributes:
        task: Task whose layout the rows have.
        part: ``text`` or ``image``.
        tokens: Log-probabilities (M,) of the tokens of each row, in nats.
    """

    task: str
    part: str
    tokens: Sequence[NDArray[np.float64]] = field(repr=False)

    @property
    def num_tokens(self) -> int:
        """Tokens of all rows."""
        return sum(map(len, self.tokens))

    def loss(self) -> dict[str, float]:
        """Return the mean loss of a token in nats, with a 95% interval over rows: ``value``, ``low`` and ``high``."""
        sums = np.array([-row.sum() for row in self.tokens])
        counts = np.array([len(row) for row in self.tokens], dtype=float)
        return bootstrap(lambda rows: sums[rows].sum(axis=-1) / counts[rows].sum(axis=-1), len(sums))

    def bands(self) -> dict[str, tuple[float, int]]:
        """Return the mean loss of a token in nats, and the number of tokens, of each band of positions.

        The codes of an image are divided into quarters in raster order, texts after 4, 8 and 16 tokens.
        """
        longest = max(map(len, self.tokens))
        if self.part == "image":
            ends = [longest * (number + 1) // IMAGE_BANDS for number in range(IMAGE_BANDS)]
        else:
            ends = [*(end for end in TEXT_BANDS if end < longest), longest]
        found, start = {}, 0
        for end in ends:
            values = np.concatenate([row[start:end] for row in self.tokens])
            if len(values):
                found[f"{start + 1}-{end}"] = (float(-values.mean()), len(values))
            start = end
        return found


def part_name(task: str, part: str) -> str:
    """Return the name of the loss of a task's part, such as ``loss_generate_image``."""
    return f"loss_{task}_{part}"


def store_captions(model: CogView, store: TokenStore, rows: Sequence[int]) -> list[str]:
    """Return the texts of rows of a store.

    Args:
        model: The model, whose text tokenizer made the store.
        store: The store.
        rows: Numbers of the rows.
    """
    texts = store.read(rows)[TEXT_FIELD]
    return [model.text_tokenizer.decode(text[text != NO_TOKEN].tolist()) for text in texts]


def usable_tasks(model: CogView, store: TokenStore) -> list[str]:
    """Return the tasks that the model was trained for and the store can feed.

    Raises:
        InputError: There is none.
    """
    tasks = [task for task in model.config.tasks if feeds(store.header.layouts, task)]
    if not tasks:
        raise InputError(
            f"{store.path} feeds {', '.join(store.header.layouts)}, {model.name} was trained for "
            f"{', '.join(model.config.tasks)}: encode a store for one of its tasks"
        )
    return tasks


def measure_likelihood(
    model: CogView, store: TokenStore, rows: Sequence[int], *, batch_size: int | None = None
) -> list[PartLikelihood]:
    """Compute the log-probability of every learnt token of some rows, for each task and part.

    Targets and competing ids are those of training: codes compete with codes; text tokens and the stop of a caption
    with text and commands. Row r of a windowed task has window r modulo nine.

    Args:
        model: The model.
        store: A store of its tokenizers.
        rows: Numbers of the rows.
        batch_size: Maximum number of rows in a batch; None: as many as memory holds and pay.

    Returns:
        One entry for each task of the model that the store can feed, and each of its parts.

    Raises:
        InputError: The store feeds no task of the model.
    """
    found = []
    for task in usable_tasks(model, store):
        kinds = {content.kind for content in TASKS[task].contents.values() if content.loss}
        for part, kind in PARTS.items():
            if kind in kinds:
                label = f"{task}, {part}"
                bar = tqdm(
                    _token_log_probs(model, store, rows, (task, part), batch_size),
                    total=len(rows),
                    unit="row",
                    desc=label,
                    disable=None,
                )
                found.append(PartLikelihood(task=task, part=part, tokens=list(bar)))
    return found


def _token_log_probs(
    model: CogView, store: TokenStore, rows: Sequence[int], key: tuple[str, str], batch_size: int | None
) -> Iterator[NDArray[np.float64]]:
    """Yield the log-probabilities (M,) of the learnt tokens of a task and a part, row by row."""
    task, part = key
    context, vocabulary, layout = model.context, model.vocabulary, model.config.layouts[task]
    planner = context.planner(batch_size)
    candidates = vocabulary.image if part == "image" else range(vocabulary.text.start, vocabulary.size)
    for first in range(0, len(rows), ROWS_AT_A_TIME):
        numbers = rows[first : first + ROWS_AT_A_TIME]
        content = store.read(numbers)
        requests = []
        for index, number in enumerate(numbers):
            row = {name: values[index] for name, values in content.items()}
            text = text_of_row(TASKS[task], row)
            sequence = arrange_row(TASKS[task], layout, vocabulary, text, row, int(number) % NUM_WINDOWS)
            learnt = np.flatnonzero(sequence.loss & (sequence.kinds == PARTS[part]))
            requests.append(ScoringRequest(sequence=sequence, indices=learnt))
        yield from score_tokens(requests, task, candidates, context, planner)


def caption_scores(
    model: CogView, store: TokenStore, rows: Sequence[int], *, batch_size: int | None = None
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return CogView's caption score of each row.

    CapS is log p(text | picture), the sum over the pieces; CapLoss is its negative mean over the pieces
    (arXiv:2105.13290, section 3.2). As in ``CogView.score``, the stop of a caption does not count.

    Args:
        model: A model that was trained for the task ``caption``.
        store: A store of its tokenizers with texts and images.
        rows: Numbers of the rows.
        batch_size: Maximum number of rows in a batch; None: as many as memory holds and pay.

    Returns:
        CapS (N,) in nats, and the number of pieces (N,).
    """
    model.require_task("caption")
    content = store.read(rows)
    texts = [text[text != NO_TOKEN] for text in content[TEXT_FIELD]]
    pairs = zip(texts, content["image"], strict=True)
    scores = term_scores(SCORE_TERMS["caption"], pairs, model.context, model.context.planner(batch_size))
    values, counts = zip(*scores, strict=True)
    return np.array(values), np.array(counts)
