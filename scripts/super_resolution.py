"""Draw images at twice their side with the command line of the released CogView v1, as generate_samples.py does.

Lines TEXT<TAB>IMAGE come from a file, or are asked for. One picture of each goes to OUTPUT_PATH, as
NAME-up-seedSEED.png; with --with-id a line begins with ID<TAB>, and it goes to OUTPUT_PATH/ID/. Super-resolution starts
from the size of the model's pictures, low-level super-resolution from half of it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import v1_flags

from cogview.cli.inputs import ImageReader, TextImageQuery
from cogview.cli.upscale import upscale_files
from cogview.image_io.png import safe_name

LOW_LEVEL = "low-level super-resolution"


def main(argv: Sequence[str] | None = None) -> int:
    """Run; returns the exit status."""
    return v1_flags.main(argv, program="super_resolution.py", description=__doc__, tasks=TASKS)


def run(args: argparse.Namespace, lines: list[str] | None) -> int:
    """Upscale every image that can be read; status 1 if there was one that cannot, 2 if there was a wrong line."""
    low_level = args.generation_task == LOW_LEVEL
    easel = v1_flags.open_easel(args, "low_level" if low_level else "upscale")

    def upscale_lines(lines: list[str]) -> int:
        parted = [parts for line in lines if (parts := v1_flags.split_id(args, line)) is not None]
        queries = [
            (TextImageQuery.parse(rest), args.output_path if name is None else args.output_path / safe_name(name))
            for name, rest in parted
        ]
        status = upscale_files(easel, ImageReader(), queries, low_level=low_level)
        return status if len(parted) == len(lines) else 2

    return v1_flags.answer(lines, "Which text and image? TEXT<TAB>IMAGE", upscale_lines)


TASKS: dict[str, v1_flags.Task] = {"super-resolution": run, LOW_LEVEL: run}

if __name__ == "__main__":
    sys.exit(main())
