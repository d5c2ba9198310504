"""Run every task of CogView v1 with its command line; without --generation-task, generate images.

text2image: prompts come from a file, one per line, or are asked for. The images of a prompt go to
OUTPUT_PATH/PROMPT/0.png, 1.png, …; with --with-id a line is ID<TAB>PROMPT and they go to OUTPUT_PATH/ID/. --debug adds
concat.png, all images of the prompt side by side. No other file is overwritten: a name that another image has
continues with _2, _3, … The other tasks: see the help of caption_images.py, super_resolution.py and rerank.py.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import caption_images
import numpy as np
import rerank
import super_resolution
import v1_flags

from cogview.cli.session import GenerationSession, ImageOutput
from cogview.errors import ExitStatus
from cogview.image_io.contact_sheet import contact_sheet
from cogview.image_io.png import safe_name


def main(argv: Sequence[str] | None = None) -> int:
    """Run; return the exit status."""
    tasks = {"text2image": run} | caption_images.TASKS | super_resolution.TASKS | rerank.TASKS
    return v1_flags.main(argv, program="generate_samples.py", description=__doc__, tasks=tasks)


def run(flags: v1_flags.V1Flags, lines: list[str] | None) -> int:
    """Generate the images of every prompt that can be used; return the exit status, 1 if a line was skipped."""
    samples = SampleWriter(v1_flags.open_session(flags, "generate"), flags)
    return v1_flags.process_lines(lines, "What shall I generate?", samples.generate)


class SampleWriter:
    """Generate the images of input lines into folders, one for each prompt or id."""

    def __init__(self, session: GenerationSession, flags: v1_flags.V1Flags) -> None:
        """Generate with ``session``."""
        self.session = session
        self.flags = flags
        self._num_files: Counter[Path] = Counter()  # in each folder, so far

    def generate(self, lines: Sequence[str]) -> int:
        """Generate the images of all lines that can be used; return the exit status, 1 if a line was skipped."""
        count = self.flags.batch_size
        queries = [query for line in lines if (query := self.parse(line)) is not None]
        outputs = [output for folder, prompt in queries for output in self.outputs(folder, prompt)]
        images = []
        for output, image in self.session.generate([outputs], "generating", len(outputs), self.session.grid**2):
            self.session.save(output.path, image)
            if not self.flags.debug:
                continue
            images.append(image)
            if len(images) % count == 0:
                folder, _ = queries[len(images) // count - 1]
                group = images[-count:]
                sheet = contact_sheet([np.asarray(one) for one in group], columns=count)
                self.session.save_sheet(folder / "concat.png", sheet, group, n=str(count))
        return ExitStatus.of(len(queries), len(lines) - len(queries))

    def parse(self, line: str) -> tuple[Path, str] | None:
        """Return the folder and the prompt of a line; None, with a message on stderr, if it cannot be used."""
        parts = v1_flags.split_id(self.flags, line)
        if parts is None or not self.session.check_prompt(parts[1]):
            return None
        name, prompt = parts
        return self.flags.output_path / safe_name(prompt if name is None else name), prompt

    def outputs(self, folder: Path, prompt: str) -> Iterator[ImageOutput]:
        """Yield the outputs of a prompt; numbers of files continue where a folder is used again."""
        for request in self.session.requests(prompt, self.flags.batch_size):
            yield ImageOutput(request=request, path=folder / f"{self._num_files[folder]}.png")
            self._num_files[folder] += 1


if __name__ == "__main__":
    sys.exit(main())
