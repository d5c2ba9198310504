"""Scores of texts and images for each other, by which images of a text are ranked.

A ranking is a weighted sum of log-probabilities, each computed in one forward pass at temperature 1: the sampling
settings of an image do not matter.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cogview.errors import InputError
from cogview.generation.scoring import ScoringRequest, scored_ids, token_scores
from cogview.pipeline.context import PipelineContext
from cogview.pipeline.programs import given_values
from cogview.pipeline.requests import GenerationRequest
from cogview.pipeline.results import Score
from cogview.planning.batch_memory import score_bytes
from cogview.planning.batches import BatchPlanner
from cogview.tokenizers.tasks import TASKS


@dataclass(frozen=True, kw_only=True)
class ScoreTerm:
    """A log-probability of a picture with a text.

    Attributes:
        task: Task whose layout the sequence has.
        span: Text or image of the layout that is scored.
        given_text: Whether the text stands before the image; if not, it is empty.
    """

    task: str
    span: str
    given_text: bool = True


@dataclass(frozen=True, kw_only=True)
class RankingRule:
    """A score by which images of a text are ranked.

    Attributes:
        formula: The score in words.
        weights: Factor of each of ``SCORE_TERMS`` in the sum.
    """

    formula: str
    weights: Mapping[str, float]

    @property
    def tasks(self) -> tuple[str, ...]:
        """Tasks that the weights must have been trained for."""
        return tuple(dict.fromkeys(TASKS[SCORE_TERMS[term].task].weights for term in self.weights))


SCORE_TERMS: Mapping[str, ScoreTerm] = {
    "caption": ScoreTerm(task="score", span="text"),
    "picture": ScoreTerm(task="generate", span="image"),
    "picture alone": ScoreTerm(task="generate", span="image", given_text=False),
}
RANKING_RULES: Mapping[str, RankingRule] = {
    "caption": RankingRule(formula="log p(text | picture)", weights={"caption": 1}),
    "picture": RankingRule(formula="log p(picture | text)", weights={"picture": 1}),
    "both": RankingRule(formula="log p(picture | text) + log p(text | picture)", weights={"picture": 1, "caption": 1}),
    "guidance": RankingRule(
        formula="log p(picture | text) - log p(picture)", weights={"picture": 1, "picture alone": -1}
    ),
}
DEFAULT_RULE = "picture"  # of the images of a prompt


def ranking_rule(name: str) -> RankingRule:
    """Return the rule of a name.

    Raises:
        InputError: It is unknown.
    """
    if name not in RANKING_RULES:
        raise InputError(f"images cannot be ranked by {name!r}; known: {', '.join(RANKING_RULES)}")
    return RANKING_RULES[name]


def score_requests(
    requests: Sequence[GenerationRequest], rule_name: str, context: PipelineContext, planner: BatchPlanner
) -> Iterator[Score]:
    """Yield the score of the image of each request with its prompt, in their order, as batches are finished.

    Args:
        requests: Requests of the task ``score``, with the piece ids of the text and the codes of the image.
        rule_name: Name of a ranking rule.
        context: The model.
        planner: Splits the images into batches that fit in memory.
    """
    weights = ranking_rule(rule_name).weights
    pairs = [(request.prompt_ids or (), request.codes) for request in requests if request.codes is not None]
    parts = [term_scores(SCORE_TERMS[name], pairs, context, planner) for name in weights]
    for values in zip(*parts, strict=True):
        yield Score(
            log_probability=sum(weight * value for weight, (value, _) in zip(weights.values(), values, strict=True)),
            num_pieces=sum(count for weight, (_, count) in zip(weights.values(), values, strict=True) if weight > 0),
            ranked_by=rule_name,
        )


def score_tokens(
    sequences: Iterable[ScoringRequest], task: str, candidates: range, context: PipelineContext, planner: BatchPlanner
) -> Iterator[NDArray[np.float64]]:
    """Yield the log-probabilities of the scored tokens of each sequence, in nats, as batches are finished.

    Args:
        sequences: The sequences.
        task: Task whose weights are used.
        candidates: Ids that compete.
        context: The model.
        planner: Splits the sequences into batches that fit in memory.
    """
    transformer = context.transformer_for(TASKS[task].weights)

    def bytes_of(batch: Sequence[ScoringRequest]) -> int:
        return transformer.prepack_bytes(candidates) + score_bytes(
            context.config.transformer,
            candidates,
            batch,
            dtype=context.placement.weight_format,
            device_type=context.placement.device.type,
        )

    def score_batch(batch: Sequence[ScoringRequest]) -> list[NDArray[np.float64]]:
        return token_scores(transformer, context.vocabulary, batch, candidates)

    return planner.run(list(sequences), bytes_of, score_batch, "scoring")


def term_scores(
    term: ScoreTerm,
    pairs: Iterable[tuple[Sequence[int] | NDArray[np.integer], np.ndarray]],
    context: PipelineContext,
    planner: BatchPlanner,
) -> Iterator[tuple[float, int]]:
    """Yield a log-probability of each pair of a text and an image, in nats, and the number of its tokens.

    Args:
        term: The log-probability.
        pairs: Piece ids of each text, and codes of its image.
        context: The model.
        planner: Splits the pairs into batches that fit in memory.
    """
    layout = context.config.layouts[term.task]
    requests = []
    for text, codes in pairs:
        values = given_values(TASKS[term.task], text if term.given_text else (), codes)
        requests.append(ScoringRequest.of_span(layout.arrange(context.vocabulary, **values), term.span))
    candidates = scored_ids(context.vocabulary, term.task, term.span)
    for tokens in score_tokens(requests, term.task, candidates, context, planner):
        yield float(tokens.sum()), len(tokens)
