"""Draw pictures with the command line of the released CogView v1.

Prompts come from a file, one per line, or are asked for. The pictures of a prompt go to OUTPUT_PATH/PROMPT/0.png,
1.png, …; with --with-id a line is ID<TAB>PROMPT and they go to OUTPUT_PATH/ID/. --debug adds concat.png, all pictures
of the prompt side by side. Nothing else is overwritten: a name that another picture has continues with _2, _3, …
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import takewhile
from pathlib import Path

from cogview.cli.generate import DEFAULT_MODEL, Easel, Order, ask_prompts, read_lines, require_positive
from cogview.cli.main import HelpFormatter, Parser, run_safely
from cogview.errors import InputError
from cogview.pictures import prepare_folder, safe_name

TASKS = ("text2image", "image2text", "low-level super-resolution", "super-resolution", "post-selection")
# Flags of the released scripts that say what a checkpoint folder says by itself. 0: they take no value.
NEEDLESS = {
    "--deepspeed": 0,
    "--fp16": 0,
    "--model-parallel-size": 1,
    "--num-layers": 1,
    "--hidden-size": 1,
    "--num-attention-heads": 1,
    "--max-position-embeddings": 1,
    "--max-position-embeddings-finetune": 1,
    "--query-window": 1,
    "--key-window-times": 1,
    "--num-pivot": 1,
    "--is-sparse": 1,
}


def build_parser() -> argparse.ArgumentParser:
    """The released flags."""
    parser = Parser(
        prog="generate_samples.py",
        description=__doc__,
        formatter_class=HelpFormatter,
        epilog=f"Accepted and not needed, for a checkpoint folder knows its own shape: {', '.join(NEEDLESS)}.",
    )
    parser.add_argument("--generation-task", default="text2image", metavar="TASK", help="only text2image so far")
    parser.add_argument(
        "--input-source",
        default="interactive",
        metavar="PATH",
        help="a file with one prompt per line, or interactive: asks until an empty line or “stop”",
    )
    parser.add_argument("--output-path", type=Path, default=Path("samples"), metavar="PATH", help="where folders go")
    parser.add_argument("--batch-size", type=int, default=4, metavar="COUNT", help="pictures per prompt")
    parser.add_argument(
        "--max-inference-batch-size", type=int, default=12, metavar="COUNT", help="pictures drawn at a time"
    )
    parser.add_argument("--with-id", action="store_true", help="lines of the file are ID<TAB>PROMPT")
    parser.add_argument("--debug", action="store_true", help="one concatenated picture per prompt as well")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, mps, or the number of a GPU")
    parser.add_argument("--temperature", type=float, help="(default: the model's own)")
    parser.add_argument("--top_k", type=int, help="0 keeps every code (default: the model's own)")
    parser.add_argument("--top_p", type=float, help="0 or 1 keeps every code (default: the model's own)")
    parser.add_argument("--seed", type=int, default=1234, help="the same seed gives the same pictures")
    parser.add_argument(
        "--load", default=DEFAULT_MODEL, metavar="MODEL", help="a model's name (cogview info lists them) or its folder"
    )
    parser.add_argument(
        "--img-tokenizer-path", type=Path, metavar="PATH", help="ignored: a model's folder holds its image tokenizer"
    )
    for flag, values in NEEDLESS.items():
        parser.add_argument(flag, nargs="?" if values else 0, dest="needless", action=Needless, help=argparse.SUPPRESS)
    return parser


class Needless(argparse.Action):
    """Collects the flags that were given, whatever their values."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: object, option: str | None = None
    ) -> None:
        namespace.needless = [*(namespace.needless or []), option]


def main(argv: Sequence[str] | None = None) -> int:
    """Run; returns the exit status."""
    args = build_parser().parse_args(argv)
    return run_safely(lambda: run(args), "generate_samples.py")


def run(args: argparse.Namespace) -> int:
    """Draw every prompt that can be drawn; status 2 if there was one that cannot."""
    interactive = args.input_source == "interactive"
    if args.generation_task not in TASKS:
        raise InputError(f"--generation-task {args.generation_task} is unknown; known: {', '.join(TASKS)}")
    if args.generation_task != "text2image":
        raise InputError(f"--generation-task {args.generation_task} is not in this version; it has: text2image")
    if interactive and args.with_id:
        raise InputError("--with-id needs a file of lines ID<TAB>PROMPT: give it with --input-source")
    require_positive("--batch-size", args.batch_size)
    require_positive("--max-inference-batch-size", args.max_inference_batch_size)
    lines = [] if interactive else read_lines(args.input_source)
    prepare_folder(args.output_path)
    if args.needless:
        print(f"note: not needed, and ignored: {', '.join(args.needless)}", file=sys.stderr)
    given = args.img_tokenizer_path
    if given is not None and given.resolve() != Path(args.load, "image").resolve():
        print(f"note: {given} is ignored: {args.load} has an image tokenizer of its own", file=sys.stderr)
    easel = Easel.open(
        args.load,
        seed=args.seed,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p or (None if args.top_p is None else 1.0),
        batch_size=args.max_inference_batch_size,
        device=args.device,
    )
    samples = Samples(easel, args)
    if not interactive:
        return samples.draw(lines)
    for prompt in takewhile(lambda line: line != "stop", ask_prompts("What shall I draw? (“stop” ends)")):
        samples.draw([prompt])
    return 0


class Samples:
    """Draws lines of input into folders, one for each prompt or id."""

    def __init__(self, easel: Easel, args: argparse.Namespace) -> None:
        self.easel = easel
        self.args = args
        self._files: Counter[Path] = Counter()  # in each folder, so far

    def draw(self, lines: Sequence[str]) -> int:
        """Draw all that can be drawn; 2 if there was a line that cannot, else 0."""
        count = self.args.batch_size
        queries = [query for line in lines if (query := self.parse(line)) is not None]
        orders = [order for folder, prompt in queries for order in self.orders(folder, prompt)]
        pictures = []
        for picture in self.easel.draw(orders):
            if not self.args.debug:
                continue
            pictures.append(picture)
            if len(pictures) % count == 0:
                folder, _ = queries[len(pictures) // count - 1]
                self.easel.save_sheet(folder / "concat.png", pictures[-count:], columns=count)
        return 0 if len(queries) == len(lines) else 2

    def parse(self, line: str) -> tuple[Path, str] | None:
        """The folder and the prompt of a line, or None and a word on stderr."""
        name, tab, prompt = line.partition("\t") if self.args.with_id else (line, "\t", line)
        if not tab:
            print(f"skipped: the line “{line}” has no id; expected ID<TAB>PROMPT", file=sys.stderr)
            return None
        if not self.easel.accepts(prompt):
            return None
        return self.args.output_path / safe_name(name), prompt

    def orders(self, folder: Path, prompt: str) -> Iterator[Order]:
        """The pictures of a prompt; a folder that comes again goes on counting."""
        for wish in self.easel.wishes(prompt, self.args.batch_size):
            yield Order(wish=wish, path=folder / f"{self._files[folder]}.png")
            self._files[folder] += 1


if __name__ == "__main__":
    sys.exit(main())
