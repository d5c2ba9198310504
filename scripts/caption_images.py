"""Describe images with the command line of the released CogView v1, as generate_samples.py does for image2text.

Paths of images come from a file, one per line, or are asked for; with --with-id a line is ID<TAB>PATH. The BATCH_SIZE
captions of an image are drawn, as in the release, but end where the model ends them. They are printed as lines of JSON,
which OUTPUT_PATH/captions.jsonl holds as well.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import v1_flags

from cogview.cli.caption import caption_line, describe, open_describer
from cogview.cli.inputs import ImageReader
from cogview.cli.text_io import LineWriter
from cogview.pipeline.cogview import resolve_seed


def main(argv: Sequence[str] | None = None) -> int:
    """Run; returns the exit status."""
    return v1_flags.main(argv, program="caption_images.py", description=__doc__, tasks=TASKS)


def run(args: argparse.Namespace, lines: list[str] | None) -> int:
    """Describe every image that can be read; status 1 if there was one that cannot, 2 if there was a wrong line."""
    settings = {
        "method": "sample",
        "n": args.batch_size,
        "seed": resolve_seed(args.seed),
        **v1_flags.sampling_settings(args),
    }
    with LineWriter(args.output_path / "captions.jsonl") as writer:
        model = open_describer(args.load, settings, device=args.device, adapter=args.adapter)

        def write_captions(lines: list[str]) -> int:
            sources = [parts for line in lines if (parts := v1_flags.split_id(args, line)) is not None]
            paths = [Path(path) for _, path in sources]
            images, done = ImageReader(), 0
            for number, captions in describe(model, images, paths, settings, args.ceiling):
                name, path = sources[number]
                about = {"file": path} if name is None else {"id": name, "file": path}
                for caption in captions:
                    writer.write(caption_line(caption, **about))
                done += 1
            status = images.report_failures(done)
            return status if len(sources) == len(lines) else 2

        return v1_flags.answer(lines, "Which image shall I describe?", write_captions)


TASKS: dict[str, v1_flags.Task] = {"image2text": run}

if __name__ == "__main__":
    sys.exit(main())
