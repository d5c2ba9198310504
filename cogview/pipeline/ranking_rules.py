"""Table of the scores by which images of a text are ranked.

This module imports no torch, so that commands and jobs can read it at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from cogview.errors import InputError
from cogview.tokenizers.tasks import TASKS


@dataclass(frozen=True, kw_only=True)
class ScoreTerm:
    """A log-probability of a picture with a text.

    Attributes:
        task: Task whose layout the sequence has.
        span: Text or image of the layout that is scored.
        given_text: Whether the text stands before the image; if not, it is empty.
        masked: Whether all scored tokens are masked in the input, so that each is predicted from the rest alone.
    """

    task: str
    span: str
    given_text: bool = True
    masked: bool = False


@dataclass(frozen=True, kw_only=True)
class RankingRule:
    """A score by which images of a text are ranked.

    Attributes:
        formula: The score in words.
        weights: Factor of each of ``SCORE_TERMS`` in the sum.
        per_token: Whether each log-probability is divided by its number of tokens, so that the many codes of an image
            do not outweigh the few pieces of a text.
        with_masks: The rule in its place for weights that were trained with masked codes; None: this one.
    """

    formula: str
    weights: Mapping[str, float]
    per_token: bool = False
    with_masks: RankingRule | None = None

    @property
    def tasks(self) -> tuple[str, ...]:
        """Tasks that the weights must have been trained for."""
        return tuple(dict.fromkeys(TASKS[SCORE_TERMS[term].task].weights for term in self.weights))


SCORE_TERMS: Mapping[str, ScoreTerm] = {
    "caption": ScoreTerm(task="score", span="text"),
    "picture": ScoreTerm(task="generate", span="image"),
    "picture alone": ScoreTerm(task="generate", span="image", given_text=False),
    "masked": ScoreTerm(task="generate", span="image", masked=True),
}
RANKING_RULES: Mapping[str, RankingRule] = {
    "caption": RankingRule(formula="log p(text | picture)", weights={"caption": 1}),
    "picture": RankingRule(formula="log p(picture | text)", weights={"picture": 1}),
    "both": RankingRule(
        formula="log p(picture | text) per code + log p(text | picture) per piece",
        weights={"picture": 1, "caption": 1},
        per_token=True,
        with_masks=RankingRule(
            formula="log p(picture | text) per code + log p(text | picture) per piece "
            "+ log p(masked code | text) per code",
            weights={"picture": 1, "caption": 1, "masked": 1},
            per_token=True,
        ),
    ),
}
DEFAULT_RULE = "both"  # of the images of a prompt


def ranking_rule(name: str, *, masked_codes: bool = False) -> RankingRule:
    """Return the rule of a name.

    Args:
        name: Name of the score.
        masked_codes: Whether the weights were trained with all codes of an image masked.

    Raises:
        InputError: It is unknown.
    """
    if name not in RANKING_RULES:
        raise InputError(f"images cannot be ranked by {name!r}; known: {', '.join(RANKING_RULES)}")
    rule = RANKING_RULES[name]
    return rule.with_masks if masked_codes and rule.with_masks is not None else rule
