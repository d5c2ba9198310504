"""Score images by a text with the command line of CogView v1, as generate_samples.py does for post-selection.

Lines TEXT<TAB>IMAGE<TAB>IMAGE… come from a file; with --with-id they start with ID<TAB>. Each line is printed, and
below it the scores of its images in their order, separated by tabs: the log-probability of the text given the image,
larger is better, and nan where the image cannot be read or the text is too long. OUTPUT_PATH/scores.txt holds the same.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import v1_flags

from cogview.cli.inputs import ImageReader, TextImageQuery
from cogview.cli.rerank import LINE, load_scorer, rank_files, report_rankings
from cogview.cli.text_io import LineWriter
from cogview.errors import ExitStatus, InputError


def main(argv: Sequence[str] | None = None) -> int:
    """Run; return the exit status."""
    return v1_flags.main(argv, program="rerank.py", description=__doc__, tasks=TASKS)


def run(flags: v1_flags.V1Flags, lines: list[str] | None) -> int:
    """Score every image that can be read; return the exit status, 1 if a line was skipped."""
    if lines is None:
        raise InputError(f"post-selection takes lines {LINE} from a file: give it with --input-source")
    with LineWriter(flags.output_path / "scores.txt") as writer:
        model = load_scorer(flags.model)
        parted = [(line, parts[1]) for line in lines if (parts := v1_flags.split_id(flags, line)) is not None]
        reader, rankings = ImageReader(), []
        queries = [TextImageQuery.parse(rest) for _, rest in parted]
        ranked = rank_files(model, reader, queries, flags.max_batch_size)
        for (line, _), ranking in zip(parted, ranked, strict=True):
            writer.write(line)
            scores = ["nan" if score is None else str(score.log_probability) for score in ranking.scores]
            writer.write("\t".join(scores))
            rankings.append(ranking)
        status = report_rankings(reader, rankings)
        return max(status, ExitStatus.of(len(parted), len(lines) - len(parted)))


TASKS: dict[str, v1_flags.Task] = {"post-selection": run}

if __name__ == "__main__":
    sys.exit(main())
