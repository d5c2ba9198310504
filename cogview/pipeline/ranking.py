"""Scores of texts and images for each other, by which images of a text are ranked.

A ranking is a weighted sum of log-probabilities, each computed in one forward pass at temperature 1: the sampling
settings of an image do not matter.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from cogview.generation.scoring import ScoringRequest, scored_ids, token_scores
from cogview.pipeline.context import PipelineContext
from cogview.pipeline.programs import given_values
from cogview.pipeline.ranking_rules import SCORE_TERMS, ScoreTerm, ranking_rule
from cogview.pipeline.requests import GenerationRequest
from cogview.pipeline.results import Score
from cogview.planning.batch_memory import score_bytes
from cogview.planning.batches import BatchPlanner
from cogview.tokenizers.tasks import TASKS


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
    rule = ranking_rule(rule_name, masked_codes=context.config.full_mask_rate > 0)
    pairs = [(request.prompt_ids or (), request.codes) for request in requests if request.codes is not None]
    parts = [term_scores(SCORE_TERMS[name], pairs, context, planner) for name in rule.weights]
    for values in zip(*parts, strict=True):
        weighted = list(zip(rule.weights.values(), values, strict=True))
        totals = [weight * (value / count if rule.per_token else value) for weight, (value, count) in weighted]
        yield Score(
            log_probability=sum(totals),
            num_pieces=1 if rule.per_token else sum(count for weight, (_, count) in weighted if weight > 0),
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
        requests.append(
            ScoringRequest.of_span(layout.arrange(context.vocabulary, **values), term.span, masked=term.masked)
        )
    candidates = scored_ids(context.vocabulary, term.task, term.span)
    for tokens in score_tokens(requests, term.task, candidates, context, planner):
        yield float(tokens.sum()), len(tokens)
