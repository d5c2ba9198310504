"""The option that chooses the score by which images are ranked."""

from __future__ import annotations

from typing import Any

import click

from cogview.cli.options import Decorator

RANK_BY = ("caption", "picture", "both")  # ``cogview.pipeline.ranking_rules``


def rank_by_option(**settings: Any) -> Decorator:
    """Return ``--rank-by``, the score by which images are ranked."""
    return click.option(
        "--rank-by",
        type=click.Choice(RANK_BY),
        help="score of the ranking: caption, log p(text | picture); picture, log p(picture | text); both, their "
        "sum per token, with that of masked codes",
        **settings,
    )
