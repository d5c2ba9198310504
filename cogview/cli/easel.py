"""What commands do with a model: open it, check prompts, draw, and write the files of pictures."""

from __future__ import annotations

import argparse
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from cogview.cli.options import require_positive, sampling_settings
from cogview.cli.sources import batches

if TYPE_CHECKING:  # torch takes seconds to import: --help does without
    from PIL import Image

    from cogview.pipeline import CogView, Picture, Wish


def open_model(name: str, *, tasks: Sequence[str], device: str, dtype: str) -> CogView:
    """A model by name or folder; InputError unless it was trained for ``tasks``."""
    from cogview.pipeline import CogView

    model = CogView.from_pretrained(name, device=device, dtype=dtype)
    for task in tasks:
        model.require_task(task)
    return model


def accepts(model: CogView, prompt: str) -> bool:
    """Whether ``model`` can do anything with ``prompt``; tells on stderr why not, or what to expect of it."""
    if (problem := model.problem_with(prompt)) is not None:
        print(f"skipped: {problem}", file=sys.stderr)
        return False
    for remark in (model.warning_about(prompt), unknown_things(model, prompt)):
        if remark is not None:
            print(f"note: {remark}", file=sys.stderr)
    return True


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


@dataclass(frozen=True, kw_only=True)
class Order:
    """A picture to draw, and the file it is meant for."""

    wish: Wish
    path: Path


@dataclass(frozen=True, kw_only=True)
class Enlargement:
    """An image to upscale, the text that it shows, its name, and the file that the result is meant for."""

    image: Image.Image
    prompt: str
    source: str
    path: Path


class Easel:
    """One model, one seed and one set of settings: draws, writes the files, prints their paths."""

    def __init__(self, model: CogView, settings: Mapping[str, Any], seed: int, batch_size: int) -> None:
        self.model = model
        self.settings = settings
        self.sampling = model.sampling(**settings)
        self.seed = seed
        self.batch_size = batch_size
        self._wished: Counter[str] = Counter()

    @classmethod
    def open(
        cls,
        model: str,
        *,
        tasks: Sequence[str],
        settings: Mapping[str, Any],
        seed: int | None,
        batch_size: int,
        device: str,
        dtype: str = "auto",
    ) -> Easel:
        """Load a model that was trained for ``tasks``; ``settings`` go before its own sampling."""
        from cogview.pipeline import checked_seed

        require_positive("the batch size", batch_size)
        seed = checked_seed(seed)
        opened = open_model(model, tasks=tasks, device=device, dtype=dtype)
        return cls(opened, settings, seed, batch_size)

    def announce(self) -> None:
        """Say on stderr where the model runs, and the seed."""
        print(f"{self.model.name} on {self.model.placement}, seed {self.seed}", file=sys.stderr)

    @property
    def grid(self) -> int:
        """Codes on a side of the model's pictures."""
        return self.model.model.config.grid

    def accepts(self, prompt: str) -> bool:
        """Whether ``prompt`` can be drawn; tells on stderr why not, or what to expect of it."""
        return accepts(self.model, prompt)

    def wishes(self, prompt: str, n: int) -> list[Wish]:
        """The next ``n`` pictures of ``prompt``: asked again, it goes on counting."""
        from cogview.pipeline import Wish

        first = self._wished[prompt]
        self._wished[prompt] += n
        return [Wish(prompt=prompt, seed=self.seed, index=index) for index in range(first, first + n)]

    def draw(self, orders: Sequence[Order]) -> Iterator[tuple[Order, Picture]]:
        """Draw batch by batch; what comes out of a batch can be saved before the next one begins."""
        with Progress("drawing", len(orders), self.grid**2) as progress:
            for batch in batches(orders, self.batch_size):
                wishes = [order.wish for order in batch]
                pictures = self.model.draw(wishes, self.sampling, progress.of(len(batch), self.batch_size))
                yield from zip(batch, pictures, strict=True)

    def best(self, drawn: Iterator[tuple[Order, Picture]], n: int, keep: int) -> Iterator[tuple[Order, Picture]]:
        """Of each ``n`` pictures in turn, which have one prompt, the ``keep`` whose captions it is likeliest to be.

        The best comes first; they carry their scores.
        """
        while group := list(islice(drawn, n)):
            orders = {picture.index: order for order, picture in group}
            pictures = self.model.rerank([picture for _, picture in group], batch_size=self.batch_size)
            yield from ((orders[picture.index], picture) for picture in pictures[:keep])

    def upscale(self, enlargements: Iterable[Enlargement], count: int, *, low_level: bool = False) -> int:
        """Draw up to ``count`` images at twice their side, save them batch by batch; returns how many there were."""
        done = 0
        side = self.grid if low_level else 2 * self.grid
        with Progress("upscaling", count, side**2) as progress:
            for batch in batches(enlargements, self.batch_size):
                pictures = self.model.upscale(
                    [enlargement.image for enlargement in batch],
                    [enlargement.prompt for enlargement in batch],
                    seed=self.seed,
                    low_level=low_level,
                    batch_size=self.batch_size,
                    on_code=progress.of(len(batch), self.batch_size),
                    **self.settings,
                )
                for enlargement, picture in zip(batch, pictures, strict=True):
                    self.save(enlargement.path, picture, task="upscale", source=enlargement.source)
                done += len(batch)
        return done

    def save(self, path: Path, picture: Picture, **about: str) -> Path:
        """Write a picture, with ``about`` among its text chunks, and print its path, which it returns."""
        from tqdm import tqdm

        from cogview.pictures import picture_texts, save_png

        path.parent.mkdir(parents=True, exist_ok=True)
        path = save_png(path, picture, picture_texts(picture, self.model.name) | about)
        tqdm.write(str(path), file=sys.stdout)  # beside a progress bar, if there is one
        return path

    def save_sheet(self, path: Path, pictures: Sequence[Picture], columns: int) -> None:
        """Write a contact sheet and print its path."""
        import numpy as np

        from cogview.pictures import picture_texts, save_png, sheet_texts
        from cogview.sheets import contact_sheet

        sheet = contact_sheet([np.asarray(picture) for picture in pictures], columns=columns)
        texts = sheet_texts([picture_texts(picture, self.model.name) for picture in pictures])
        print(save_png(path, sheet, texts))


def easel_of(args: argparse.Namespace, tasks: Sequence[str]) -> Easel:
    """The easel that the arguments of a command ask for: those of the model, of sampling, and the seed."""
    return Easel.open(
        args.model,
        tasks=tasks,
        settings=sampling_settings(args),
        seed=args.seed,
        batch_size=args.batch_size,
        device=args.device,
        dtype=args.dtype,
    )


class Progress:
    """A bar on a terminal over the codes of ``count`` pictures; a line where there is no terminal."""

    def __init__(self, what: str, count: int, codes: int) -> None:
        from tqdm import tqdm

        if count and not sys.stderr.isatty():
            print(f"{what} {count} picture{'s' if count > 1 else ''}", file=sys.stderr)
        # Without the number done, which may be no whole one.
        form = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}, {rate_fmt}"
        self._bar = tqdm(total=count * codes, unit="code", desc=what, disable=None, leave=False, bar_format=form)

    def of(self, pictures: int, batch_size: int) -> Callable[[int, int], None]:
        """``on_code`` for ``pictures`` that are drawn in batches, each of which calls it once per code."""
        step = pictures / -(-pictures // batch_size)

        def show(done: int, total: int) -> None:
            self._bar.update(step)

        return show

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
