"""Caption images with the command line of CogView v1, as generate_samples.py does for image2text.

Paths of images come from a file, one per line, or are asked for; with --with-id a line is ID<TAB>PATH. The BATCH_SIZE
captions of an image are sampled, as in CogView v1, but end at the stop token. They are printed as lines of JSON, which
OUTPUT_PATH/captions.jsonl holds as well.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import v1_flags

from cogview.cli.caption import caption_files, caption_line, load_captioner
from cogview.cli.inputs import ImageReader
from cogview.cli.text_io import LineWriter
from cogview.errors import ExitStatus
from cogview.pipeline.inputs import resolve_seed


def main(argv: Sequence[str] | None = None) -> int:
    """Run; return the exit status."""
    return v1_flags.main(argv, program="caption_images.py", description=__doc__, tasks=TASKS)


def run(flags: v1_flags.V1Flags, lines: list[str] | None) -> int:
    """Caption every image that can be read; return the exit status, 1 if a line was skipped."""
    settings = {"method": "sample", "n": flags.batch_size, "seed": resolve_seed(flags.seed), **flags.settings}
    with LineWriter(flags.output_path / "captions.jsonl") as writer:
        model = load_captioner(flags.model, settings)

        def write_captions(lines: list[str]) -> int:
            sources = [parts for line in lines if (parts := v1_flags.split_id(flags, line)) is not None]
            paths = [Path(path) for _, path in sources]
            reader, done = ImageReader(), 0
            for index, captions in caption_files(model, reader, paths, settings, flags.max_batch_size):
                name, path = sources[index]
                about = {"file": path} if name is None else {"id": name, "file": path}
                for caption in captions:
                    writer.write(caption_line(caption, **about))
                done += 1
            status = reader.report_failures(done)
            return max(status, ExitStatus.of(len(sources), len(lines) - len(sources)))

        return v1_flags.process_lines(lines, "Which image shall I caption?", write_captions)


TASKS: dict[str, v1_flags.Task] = {"image2text": run}

if __name__ == "__main__":
    sys.exit(main())
