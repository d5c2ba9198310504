"""Every task of the released CogView v1, with its command line; without --generation-task it draws pictures.

text2image: prompts come from a file, one per line, or are asked for. The pictures of a prompt go to
OUTPUT_PATH/PROMPT/0.png, 1.png, …; with --with-id a line is ID<TAB>PROMPT and they go to OUTPUT_PATH/ID/. --debug adds
concat.png, all pictures of the prompt side by side. Nothing else is overwritten: a name that another picture has
continues with _2, _3, … The other tasks: see the help of caption_images.py, super_resolution.py and rerank.py.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import caption_images
import rerank
import super_resolution
import v1_flags

from cogview.cli.session import GenerationSession, ImageOutput
from cogview.image_io.png import safe_name


def main(argv: Sequence[str] | None = None) -> int:
    """Run; returns the exit status."""
    tasks = {"text2image": run} | caption_images.TASKS | super_resolution.TASKS | rerank.TASKS
    return v1_flags.main(argv, program="generate_samples.py", description=__doc__, tasks=tasks)


def run(args: argparse.Namespace, lines: list[str] | None) -> int:
    """Draw every prompt that can be drawn; status 2 if there was one that cannot."""
    samples = Samples(v1_flags.open_easel(args, "generate"), args)
    return v1_flags.answer(lines, "What shall I draw?", samples.draw)


class Samples:
    """Draws lines of input into folders, one for each prompt or id."""

    def __init__(self, easel: GenerationSession, args: argparse.Namespace) -> None:
        self.easel = easel
        self.args = args
        self._files: Counter[Path] = Counter()  # in each folder, so far

    def draw(self, lines: Sequence[str]) -> int:
        """Draw all that can be drawn; 2 if there was a line that cannot, else 0."""
        count = self.args.batch_size
        queries = [query for line in lines if (query := self.parse(line)) is not None]
        orders = [order for folder, prompt in queries for order in self.orders(folder, prompt)]
        pictures = []
        for order, picture in self.easel.generate([orders], "drawing", len(orders), self.easel.grid**2):
            self.easel.save(order.path, picture)
            if not self.args.debug:
                continue
            pictures.append(picture)
            if len(pictures) % count == 0:
                folder, _ = queries[len(pictures) // count - 1]
                self.easel.save_sheet(folder / "concat.png", pictures[-count:], columns=count)
        return 0 if len(queries) == len(lines) else 2

    def parse(self, line: str) -> tuple[Path, str] | None:
        """The folder and the prompt of a line, or None and a word on stderr."""
        parts = v1_flags.split_id(self.args, line)
        if parts is None or not self.easel.check_prompt(parts[1]):
            return None
        name, prompt = parts
        return self.args.output_path / safe_name(prompt if name is None else name), prompt

    def orders(self, folder: Path, prompt: str) -> Iterator[ImageOutput]:
        """The pictures of a prompt; a folder that comes again goes on counting."""
        for wish in self.easel.requests(prompt, self.args.batch_size):
            yield ImageOutput(request=wish, path=folder / f"{self._files[folder]}.png")
            self._files[folder] += 1


if __name__ == "__main__":
    sys.exit(main())
