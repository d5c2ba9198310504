"""``cogview generate``: draw pictures from text."""

from __future__ import annotations

import argparse
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cogview.errors import InputError

if TYPE_CHECKING:  # torch takes seconds to import: --help does without
    from cogview.pipeline import CogView, Picture, Wish
    from cogview.sampling import Sampling

DEFAULT_MODEL = "cogview-emoji"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.description = (
        "Draw pictures from text and print the paths of their PNG files. Without a prompt, on a terminal, it asks. "
        "A file is named PROMPT-seedSEED-NUMBER.png; a name that another picture has continues with _2, _3, …, and no "
        "other picture is overwritten. Text chunks of the file hold prompt, seed, number, model, settings and codes. "
        "A prompt given twice gets further pictures, as with a larger -n."
    )
    parser.add_argument("prompts", nargs="*", metavar="PROMPT", help="what to draw, such as 蓝色背景上的三只狐狸")
    parser.add_argument("--input", metavar="FILE", help="more prompts, one per line in UTF-8; - is standard input")
    parser.add_argument("-n", type=int, default=1, metavar="COUNT", help="pictures per prompt")
    parser.add_argument(
        "--seed", type=int, help="the same seed, prompt and number give the same picture (default: a new one, told)"
    )
    parser.add_argument("-o", "--output", type=Path, default=Path("outputs"), metavar="FOLDER", help="where files go")
    parser.add_argument("--grid", action="store_true", help="one contact sheet as well: a row per prompt")
    parser.add_argument("--model", default=DEFAULT_MODEL, metavar="NAME_OR_FOLDER", help="cogview info lists the names")
    parser.add_argument("--temperature", type=float, help="lower is surer, higher wilder (default: the model's own)")
    parser.add_argument("--top-k", type=int, help="choose among so many codes, 0: all (default: the model's own)")
    parser.add_argument(
        "--top-p", type=float, help="choose among the likeliest codes of this share, 1: all (default: the model's own)"
    )
    parser.add_argument("--batch-size", type=int, default=16, metavar="COUNT", help="pictures drawn at a time")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    parser.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16")


def run(args: argparse.Namespace) -> int:
    """Draw every prompt that can be drawn; status 2 if there was one that cannot."""
    from cogview.pictures import prepare_folder

    require_positive("-n", args.n)
    prompts = list(args.prompts) + (read_lines(args.input) if args.input is not None else [])
    asking = not prompts
    if asking and not sys.stdin.isatty():
        raise InputError('no prompt was given; write it behind the command: cogview generate "一个红苹果"')
    prepare_folder(args.output)
    easel = Easel.open(
        args.model,
        seed=args.seed,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        batch_size=args.batch_size,
        device=args.device,
        dtype=args.dtype,
    )
    if not asking:
        return draw_prompts(easel, prompts, args)
    for prompt in ask_prompts("What shall I draw? (an empty line ends)"):
        draw_prompts(easel, [prompt], args)
    return 0


def draw_prompts(easel: Easel, prompts: Sequence[str], args: argparse.Namespace) -> int:
    """Draw ``args.n`` pictures of each prompt into ``args.output``, and the contact sheet."""
    from cogview.pictures import safe_name

    good = [prompt for prompt in prompts if easel.accepts(prompt)]
    orders = [
        Order(wish=wish, path=args.output / f"{safe_name(prompt)}-seed{wish.seed}-{wish.index}.png")
        for prompt in good
        for wish in easel.wishes(prompt, args.n)
    ]
    sheet = []
    for picture in easel.draw(orders):
        if args.grid:
            sheet.append(picture)
    if sheet:
        easel.save_sheet(args.output / f"grid-seed{easel.seed}.png", sheet, columns=args.n)
    return 0 if len(good) == len(prompts) else 2


@dataclass(frozen=True, kw_only=True)
class Order:
    """A picture to draw, and the file it is meant for."""

    wish: Wish
    path: Path


class Easel:
    """One model, one seed and one set of settings: draws orders, writes their files, prints their paths."""

    def __init__(self, model: CogView, sampling: Sampling, seed: int, batch_size: int) -> None:
        self.model = model
        self.sampling = sampling
        self.seed = seed
        self.batch_size = batch_size
        self._wished: Counter[str] = Counter()

    @classmethod
    def open(
        cls,
        model: str,
        *,
        seed: int | None,
        temperature: float | None,
        top_k: int | None,
        top_p: float | None,
        batch_size: int,
        device: str,
        dtype: str = "auto",
    ) -> Easel:
        """Load a model; settings that are None are the model's own. Says on stderr where it runs."""
        from cogview.pipeline import CogView, checked_seed

        require_positive("the batch size", batch_size)
        seed = checked_seed(seed)
        opened = CogView.from_pretrained(model, device=device, dtype=dtype)
        sampling = opened.sampling(temperature, top_k, top_p)
        print(f"{opened.name} on {opened.placement}, seed {seed}", file=sys.stderr)
        return cls(opened, sampling, seed, batch_size)

    def accepts(self, prompt: str) -> bool:
        """Whether ``prompt`` can be drawn; tells on stderr why not, or what to expect of it."""
        if (problem := self.model.problem_with(prompt)) is not None:
            print(f"skipped: {problem}", file=sys.stderr)
            return False
        for remark in (self.model.warning_about(prompt), unknown_things(self.model, prompt)):
            if remark is not None:
                print(f"note: {remark}", file=sys.stderr)
        return True

    def wishes(self, prompt: str, n: int) -> list[Wish]:
        """The next ``n`` pictures of ``prompt``: asked again, it goes on counting."""
        from cogview.pipeline import Wish

        first = self._wished[prompt]
        self._wished[prompt] += n
        return [Wish(prompt=prompt, seed=self.seed, index=index) for index in range(first, first + n)]

    def draw(self, orders: Sequence[Order]) -> Iterator[Picture]:
        """Draw batch by batch; the files of a batch are there before the next one begins."""
        from tqdm import tqdm

        from cogview.pictures import picture_texts, save_png

        if orders and not sys.stderr.isatty():  # where there is no bar
            print(f"drawing {len(orders)} picture{'s' if len(orders) > 1 else ''}", file=sys.stderr)
        codes = len(orders) * self.model.model.config.grid**2
        with tqdm(total=codes, unit="code", desc="drawing", disable=None, leave=False) as bar:
            for first in range(0, len(orders), self.batch_size):
                batch = orders[first : first + self.batch_size]

                def show(done: int, total: int, size: int = len(batch)) -> None:
                    bar.update(size)

                pictures = self.model.draw([order.wish for order in batch], self.sampling, show)
                for order, picture in zip(batch, pictures, strict=True):
                    order.path.parent.mkdir(parents=True, exist_ok=True)
                    path = save_png(order.path, picture, picture_texts(picture, self.model.name))
                    tqdm.write(str(path), file=sys.stdout)
                yield from pictures

    def save_sheet(self, path: Path, pictures: Sequence[Picture], columns: int) -> None:
        """Write a contact sheet and print its path."""
        import numpy as np

        from cogview.pictures import picture_texts, save_png, sheet_texts
        from cogview.sheets import contact_sheet

        sheet = contact_sheet([np.asarray(picture) for picture in pictures], columns=columns)
        texts = sheet_texts([picture_texts(picture, self.model.name) for picture in pictures])
        print(save_png(path, sheet, texts))


def unknown_things(model: CogView, prompt: str) -> str | None:
    """A line about a prompt that names nothing a model of a closed world can draw, or None."""
    from cogview.data.emoji.names import find_names, nearest_names

    text = unicodedata.normalize("NFKC", prompt)
    names = [name for thing in model.model.things for name in (thing.name, *thing.synonyms)]
    if not names or find_names(text, names):
        return None
    near = nearest_names(text, names)
    return (
        f"{model.name} knows nothing that “{prompt}” names; "
        + (f"the nearest names: {'、'.join(near)}; " if near else "")
        + f"all of them: cogview info {model.name} --things"
    )


def read_lines(source: str) -> list[str]:
    """The lines of a UTF-8 file, or of standard input for ``-``, without blank ones."""
    where = "standard input" if source == "-" else source
    try:
        content = sys.stdin.buffer.read() if source == "-" else Path(source).read_bytes()
    except OSError as error:
        raise InputError(f"cannot read prompts from {where}: {error.strerror or error}") from None
    try:
        text = content.decode("utf-8-sig")  # Windows editors begin files with a mark
    except UnicodeDecodeError as error:
        raise InputError(f"{where} is not UTF-8: byte {error.start} is 0x{content[error.start]:02x}") from None
    lines = [line.strip() for line in text.replace("\r", "\n").split("\n") if line.strip()]
    if not lines:
        raise InputError(f"{where} holds no prompt: expected one per line")
    return lines


def ask_prompts(question: str) -> Iterator[str]:
    """What is typed, line by line, until an empty line or the end of the input."""
    with suppress(ImportError):  # not on Windows
        import readline  # noqa: F401  lets input() edit wide characters
    print(question, file=sys.stderr)
    while True:
        try:
            line = input("> " if sys.stdin.isatty() and sys.stdout.isatty() else "").strip()
        except EOFError:
            return
        if not line:
            return
        yield line


def require_positive(name: str, value: int) -> None:
    """InputError unless ``value`` is at least 1."""
    if value < 1:
        raise InputError(f"{name} must be at least 1, got {value}")
