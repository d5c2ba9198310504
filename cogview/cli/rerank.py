"""``cogview rerank``: rank images by how well a text describes them."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import click

from cogview.cli.inputs import READ_AT_A_TIME, ImageReader, QueryOptions, TextImageQuery, batches, query_options
from cogview.cli.messages import is_json
from cogview.cli.options import Command, ModelOptions, json_option, model_options
from cogview.cli.ranking_options import rank_by_option
from cogview.cli.session import check_prompt, open_model
from cogview.cli.text_io import LineWriter
from cogview.errors import ExitStatus

if TYPE_CHECKING:
    from cogview.pipeline.cogview import CogView
    from cogview.pipeline.results import Ranking, Score

LINE = "TEXT<TAB>IMAGE<TAB>IMAGE…"


@click.command(cls=Command)
@query_options(LINE)
@model_options("images")
@rank_by_option(default="caption")
@json_option()
def command(queries: QueryOptions, model: ModelOptions, rank_by: str) -> int:
    """Rank images by how well a text fits them.

    Prints a line of JSON for each text, with its images in the given order: file, score (by default the log-probability
    of the text in nats; larger is better), per_piece and rank. A readable ranking goes to stderr. An image that cannot
    be read stays in the list, with an error in place of a score, and is listed at the end, with status 1.
    """
    reader = ImageReader()
    pairs = queries.read(reader)
    scorer = load_scorer(model, rank_by)
    lines = LineWriter()
    rankings = []
    for ranking in rank_files(scorer, reader, pairs, model.max_batch_size, by=rank_by):
        lines.write(json.dumps(ranking.as_json(), ensure_ascii=False))
        if not is_json():
            print("\n".join(ranking.as_text()), file=sys.stderr)
        rankings.append(ranking)
    return report_rankings(reader, rankings)


def load_scorer(options: ModelOptions, by: str = "caption") -> CogView:
    """Load a model for ``rank_files``, and print a header on stderr; errors as in ``open_model``.

    Args:
        options: The model.
        by: Name of the score.
    """
    model = open_model(options, [])
    model.require_ranking(by)
    print(f"model {model.label} on {model.placement}", file=sys.stderr)
    return model


def report_rankings(reader: ImageReader, rankings: Sequence[Ranking]) -> int:
    """Print the images that could not be read on stderr.

    Returns:
        The exit status: 1 if an image could not be read or a text was refused, 2 if no image has a score.

    Raises:
        InputError: No image could be read.
    """
    scored = sum(len(ranking.order) for ranking in rankings)
    reader.report_failures(scored)
    return ExitStatus.of(scored, sum(len(ranking.order) < max(1, len(ranking.files)) for ranking in rankings))


def rank_files(
    model: CogView,
    reader: ImageReader,
    queries: Sequence[TextImageQuery],
    max_batch_size: int | None,
    *,
    by: str = "caption",
) -> Iterator[Ranking]:
    """Score the images of each query.

    Batches extend across queries, and the ranking of a query follows when all its images have scores.

    Args:
        model: A model that can compute the score.
        reader: The reader of the images.
        queries: The texts and their images.
        max_batch_size: Maximum number of images in a batch; None for as many as fit into memory.
        by: Name of the score.

    Yields:
        One ranking for each query, in order.

    Raises:
        InputError: There are images, and none can be read.
    """
    from cogview.pipeline.results import Ranking

    for query in queries:
        if not query.paths:
            print(f"skipped: “{query.prompt}” comes without an image; expected {LINE}", file=sys.stderr)
    prompts = dict.fromkeys(query.prompt for query in queries if query.paths)
    problems = {prompt: None if check_prompt(model, prompt) else model.prompt_problem(prompt) for prompt in prompts}

    scores: list[list[Score | None]] = [[None] * len(query.paths) for query in queries]
    slots = [  # (index of the query, index of the image in it) of each image to score
        (number, index)
        for number, query in enumerate(queries)
        for index in range(len(query.paths))
        if problems[query.prompt] is None
    ]

    def ranking(number: int) -> Ranking:
        query = queries[number]
        problem = problems.get(query.prompt)
        errors = [problem or reader.problems.get(path) for path in query.paths]
        return Ranking(prompt=query.prompt, files=query.paths, scores=scores[number], errors=errors, ranked_by=by)

    complete = done = 0
    images = reader.read_all([queries[number].paths[index] for number, index in slots], model, task="score")
    for batch in batches(images, max_batch_size or READ_AT_A_TIME):
        texts = [queries[slots[position][0]].prompt for position, _ in batch]
        found = model.score([image for _, image in batch], texts, by=by, batch_size=max_batch_size)
        for (position, _), score in zip(batch, found, strict=True):
            number, index = slots[position]
            scores[number][index] = score
        done += len(batch)
        unfinished = slots[batch[-1][0]][0]  # further images of this query may follow
        yield from map(ranking, range(complete, unfinished))
        complete = unfinished
    reader.require_some(done)
    yield from map(ranking, range(complete, len(queries)))
