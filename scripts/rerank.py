"""Score images by a text with the command line of the released CogView v1, as generate_samples.py for post-selection.

Lines TEXT<TAB>IMAGE<TAB>IMAGE… come from a file; with --with-id they begin with ID<TAB>. Each line is printed, and
below it the scores of its images in their order, split by tabs: the log-probability of the text given the image, larger
is better, and nan where there is none because the image cannot be read or the text is too long. OUTPUT_PATH/scores.txt
holds the same.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import v1_flags

from cogview.cli.inputs import ImageReader, TextImageQuery
from cogview.cli.rerank import LINE, finish, open_scorer, rank
from cogview.cli.text_io import LineWriter
from cogview.errors import InputError


def main(argv: Sequence[str] | None = None) -> int:
    """Run; returns the exit status."""
    return v1_flags.main(argv, program="rerank.py", description=__doc__, tasks=TASKS)


def run(args: argparse.Namespace, lines: list[str] | None) -> int:
    """Score every image that can be read; status 1 if there was one that cannot, 2 if there was a wrong line."""
    if lines is None:
        raise InputError(f"post-selection takes lines {LINE} from a file: give it with --input-source")
    with LineWriter(args.output_path / "scores.txt") as writer:
        model = open_scorer(args.load, device=args.device, adapter=args.adapter)
        parted = [(line, parts[1]) for line in lines if (parts := v1_flags.split_id(args, line)) is not None]
        images, rankings = ImageReader(), []
        queries = [TextImageQuery.parse(rest) for _, rest in parted]
        ranked = rank(model, images, queries, args.ceiling)
        for (line, _), ranking in zip(parted, ranked, strict=True):
            writer.write(line)
            scores = ["nan" if score is None else str(score.log_probability) for score in ranking.scores]
            writer.write("\t".join(scores))
            rankings.append(ranking)
        status = finish(images, rankings)
        return status if len(parted) == len(lines) else 2


TASKS: dict[str, v1_flags.Task] = {"post-selection": run}

if __name__ == "__main__":
    sys.exit(main())
