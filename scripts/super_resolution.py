"""Generate images at twice their side with the command line of CogView v1, as generate_samples.py does.

Lines TEXT<TAB>IMAGE come from a file, or are asked for. One image for each goes to OUTPUT_PATH, as
NAME-up-seedSEED.png; with --with-id a line starts with ID<TAB>, and its image goes to OUTPUT_PATH/ID/. Super-resolution
starts from the size of the model's images, low-level super-resolution from half of it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import v1_flags

from cogview.cli.inputs import ImageReader, TextImageQuery
from cogview.cli.upscale import upscale_files
from cogview.errors import ExitStatus
from cogview.image_io.png import safe_name

LOW_LEVEL = "low-level super-resolution"


def main(argv: Sequence[str] | None = None) -> int:
    """Run; return the exit status."""
    return v1_flags.main(argv, program="super_resolution.py", description=__doc__, tasks=TASKS)


def run(flags: v1_flags.V1Flags, lines: list[str] | None) -> int:
    """Upscale every image that can be read; return the exit status, 1 if a line was skipped."""
    low_level = flags.generation_task == LOW_LEVEL
    session = v1_flags.open_session(flags, "low_level" if low_level else "upscale")

    def upscale_lines(lines: list[str]) -> int:
        parted = [parts for line in lines if (parts := v1_flags.split_id(flags, line)) is not None]
        queries = [
            (TextImageQuery.parse(rest), flags.output_path if name is None else flags.output_path / safe_name(name))
            for name, rest in parted
        ]
        status = upscale_files(session, ImageReader(), queries, low_level=low_level)
        return max(status, ExitStatus.of(len(parted), len(lines) - len(parted)))

    return v1_flags.process_lines(lines, "Which text and image? TEXT<TAB>IMAGE", upscale_lines)


TASKS: dict[str, v1_flags.Task] = {"super-resolution": run, LOW_LEVEL: run}

if __name__ == "__main__":
    sys.exit(main())
