"""``cogview rerank``: which image does a text describe best?"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cogview.cli.inputs import READ_AT_A_TIME, ImageReader, TextImageQuery, batches, read_queries
from cogview.cli.options import add_model_arguments, add_query_arguments, parse_max_batch_size
from cogview.cli.session import check_prompt, open_model
from cogview.cli.text_io import LineWriter

if TYPE_CHECKING:
    from cogview.pipeline.cogview import CogView
    from cogview.pipeline.results import Score

LINE = "TEXT<TAB>IMAGE<TAB>IMAGE…"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.description = (
        "Rank images by how likely a text is as the caption of each. Prints a line of JSON for each text, with its "
        "images in the order given: file, score (log-probability of the text in nats, larger is better), per_piece and "
        "rank; and a ranking to read on stderr. An image that cannot be read keeps its place, with an error in place "
        "of a score, and is named at the end, with status 1."
    )
    add_query_arguments(parser, LINE)
    add_model_arguments(parser, "images")


def run(args: argparse.Namespace) -> int:
    """Rank the images of every text; status 1 if there was one that cannot be read, 2 if a text was refused."""
    at_a_time = parse_max_batch_size(args)
    images = ImageReader()
    queries = read_queries(args, images, LINE)
    model = open_scorer(
        args.model,
        device=args.device,
        dtype=args.dtype,
        kv_dtype=args.kv_dtype,
        adapter=args.adapter,
        revision=args.revision,
    )
    lines = LineWriter()
    rankings = []
    for ranking in rank(model, images, queries, at_a_time):
        lines.write(json.dumps(ranking.as_json(), ensure_ascii=False))
        print("\n".join(ranking.as_text()), file=sys.stderr)
        rankings.append(ranking)
    return finish(images, rankings)


def open_scorer(name: str, **opening: Any) -> CogView:
    """A model for ``rank``, opened as ``open_model`` takes it. Says on stderr where it runs."""
    model = open_model(name, tasks=["caption"], **opening)
    print(f"{model.label} on {model.placement}", file=sys.stderr)
    return model


def finish(images: ImageReader, rankings: Sequence[Ranking]) -> int:
    """The exit status; images that cannot be read are named on stderr."""
    status = images.report_failures(sum(len(ranking.order) for ranking in rankings))
    return 2 if any(ranking.refused for ranking in rankings) else status


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """The scores of one query's images, in their order; None, and an error, for an image that has none."""

    query: TextImageQuery
    scores: Sequence[Score | None]
    errors: Sequence[str | None]
    refused: bool  # whether the text cannot be scored, or has no images

    @property
    def order(self) -> list[int]:
        """Numbers of the images that have a score, the best first; equal ones as they were given."""
        scored = [(-score.log_probability, number) for number, score in enumerate(self.scores) if score is not None]
        return [number for _, number in sorted(scored)]

    def as_json(self) -> dict[str, object]:
        """Prompt and images, in the order given."""
        ranks = {number: rank for rank, number in enumerate(self.order, start=1)}
        images = []
        for number, (path, score, error) in enumerate(zip(self.query.paths, self.scores, self.errors, strict=True)):
            image: dict[str, object] = {
                "file": str(path),
                "score": None if score is None else score.log_probability,
                "per_piece": None if score is None else score.per_piece,
                "rank": ranks.get(number),
            }
            images.append(image if error is None else image | {"error": error})
        return {"prompt": self.query.prompt, "images": images}

    def as_text(self) -> list[str]:
        """Lines to read: the prompt, and its images from the best down."""
        lines = [self.query.prompt]
        for rank, number in enumerate(self.order, start=1):
            score = self.scores[number]
            assert score is not None
            figures = f"{score.log_probability:9.2f} ({score.per_piece:.2f} per piece)"
            lines.append(f"{rank:3}. {figures}  {self.query.paths[number]}")
        return lines


def rank(
    model: CogView, images: ImageReader, queries: Sequence[TextImageQuery], ceiling: int | None
) -> Iterator[Ranking]:
    """Score the images of each query, at most ``ceiling`` at a time.

    Batches go across queries, and a query comes out when all its images are done. InputError if there are images and
    none can be read.
    """
    side = model.image_size()
    for query in queries:
        if not query.paths:
            print(f"skipped: “{query.prompt}” comes without an image; expected {LINE}", file=sys.stderr)
    prompts = dict.fromkeys(query.prompt for query in queries if query.paths)
    problems = {prompt: None if check_prompt(model, prompt) else model.prompt_problem(prompt) for prompt in prompts}

    scores: list[list[Score | None]] = [[None] * len(query.paths) for query in queries]
    places = [
        (number, place)
        for number, query in enumerate(queries)
        for place in range(len(query.paths))
        if problems[query.prompt] is None
    ]
    paths = [queries[number].paths[place] for number, place in places]

    def ranking(number: int) -> Ranking:
        query = queries[number]
        problem = problems.get(query.prompt)
        return Ranking(
            query=query,
            scores=scores[number],
            errors=[problem or images.problems.get(path) for path in query.paths],
            refused=problem is not None or not query.paths,
        )

    complete = done = 0
    for batch in batches(images.read_all(paths, side), ceiling or READ_AT_A_TIME):
        texts = [queries[places[index][0]].prompt for index, _ in batch]
        found = model.score([image for _, image in batch], texts, batch_size=ceiling)
        for (index, _), score in zip(batch, found, strict=True):
            number, place = places[index]
            scores[number][place] = score
        done += len(batch)
        begun = places[batch[-1][0]][0]  # further images of this query may follow
        yield from map(ranking, range(complete, begun))
        complete = begun
    images.require_some(done)
    yield from map(ranking, range(complete, len(queries)))
