"""What commands do with a model: open it, check prompts, draw, and write the files of pictures."""

from __future__ import annotations

import argparse
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cogview.cli.inputs import READ_AT_A_TIME, batches
from cogview.cli.options import parse_max_batch_size, parse_speculative, sampling_settings
from cogview.cli.progress import Previews, ProgressBar

if TYPE_CHECKING:  # torch takes seconds to import: --help does without
    from PIL import Image

    from cogview.pipeline.cogview import CogView
    from cogview.pipeline.requests import GenerationRequest
    from cogview.pipeline.results import GeneratedImage


def open_model(
    name: str,
    *,
    tasks: Sequence[str],
    device: str,
    dtype: str = "auto",
    kv_dtype: str = "auto",
    adapter: Path | None = None,
    revision: str | None = None,
) -> CogView:
    """A model by name or folder, with an adapter or without; InputError unless it was trained for ``tasks``."""
    from cogview.pipeline.cogview import CogView

    model = CogView.from_pretrained(
        name, device=device, dtype=dtype, kv_dtype=kv_dtype, adapter=adapter, revision=revision
    )
    for task in tasks:
        model.require_task(task)
    return model


def check_prompt(model: CogView, prompt: str) -> bool:
    """Whether ``model`` can do anything with ``prompt``; tells on stderr why not, or what to expect of it."""
    if (problem := model.prompt_problem(prompt)) is not None:
        print(f"skipped: {problem}", file=sys.stderr)
        return False
    for remark in (model.prompt_warning(prompt), unknown_things(model, prompt)):
        if remark is not None:
            print(f"note: {remark}", file=sys.stderr)
    return True


def unknown_things(model: CogView, prompt: str) -> str | None:
    """A line about a prompt that names nothing a model of a closed world can draw, or None."""
    from cogview.emoji.name_search import find_names, nearest_names

    text = unicodedata.normalize("NFKC", prompt)
    names = [name for thing in model.things for name in (thing.name, *thing.synonyms)]
    if not names or find_names(text, names):
        return None
    near = nearest_names(text, names)
    return (
        f"{model.name} knows nothing that “{prompt}” names; "
        + (f"the nearest names: {'、'.join(near)}; " if near else "")
        + f"all of them: cogview info {model.name} --things"
    )


@dataclass(frozen=True, kw_only=True)
class ImageOutput:
    """A picture to draw, with its sampling, the file it is meant for, and what else its text chunks say."""

    request: GenerationRequest
    path: Path
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class UpscaleInput:
    """An image to upscale, the text that it shows, its name, and the file that the result is meant for."""

    image: Image.Image
    prompt: str
    source: str
    path: Path


class GenerationSession:
    """One model, one seed and one set of settings: draws, writes the files, prints their paths.

    ``ceiling`` is the most pictures at a time, None for as many as memory holds and pay. ``sampling`` has, by task, how
    to draw.
    """

    def __init__(
        self,
        model: CogView,
        settings: Mapping[str, Any],
        seed: int,
        *,
        tasks: Sequence[str],
        ceiling: int | None = None,
        preview: bool = False,
    ) -> None:
        self.model = model
        self.settings = settings
        self.sampling = {task: model.sampling(**settings, task=task) for task in tasks if task != "caption"}
        self.seed = seed
        self.ceiling = ceiling
        self.preview = preview
        self._wished: Counter[str] = Counter()

    @classmethod
    def open(
        cls,
        model: str,
        *,
        tasks: Sequence[str],
        settings: Mapping[str, Any],
        seed: int | None,
        ceiling: int | None,
        device: str,
        dtype: str = "auto",
        kv_dtype: str = "auto",
        adapter: Path | None = None,
        revision: str | None = None,
        preview: bool = False,
    ) -> GenerationSession:
        """Load a model that was trained for ``tasks``; ``settings`` go before its own sampling."""
        from cogview.pipeline.cogview import resolve_seed

        seed = resolve_seed(seed)
        opened = open_model(
            model, tasks=tasks, device=device, dtype=dtype, kv_dtype=kv_dtype, adapter=adapter, revision=revision
        )
        return cls(opened, settings, seed, tasks=tasks, ceiling=ceiling, preview=preview)

    def print_header(self) -> None:
        """Say on stderr where the model runs, and the seed."""
        print(f"{self.model.label} on {self.model.placement}, seed {self.seed}", file=sys.stderr)

    @property
    def grid(self) -> int:
        """Codes on a side of the model's pictures."""
        return self.model.config.grid

    @property
    def read_at_a_time(self) -> int:
        """Images to read before they are worked at."""
        return self.ceiling or READ_AT_A_TIME

    def check_prompt(self, prompt: str) -> bool:
        """Whether ``prompt`` can be drawn; tells on stderr why not, or what to expect of it."""
        return check_prompt(self.model, prompt)

    def requests(self, prompt: str, n: int) -> list[GenerationRequest]:
        """The next ``n`` pictures of ``prompt``: asked again, it goes on counting."""
        from cogview.pipeline.requests import GenerationRequest

        first = self._wished[prompt]
        self._wished[prompt] += n
        sampling = self.sampling["generate"]
        return [
            GenerationRequest(prompt=prompt, seed=self.seed, index=index, sampling=sampling)
            for index in range(first, first + n)
        ]

    def bar(self, what: str, count: int, codes: int, **noun: str) -> ProgressBar:
        """What shows how far the drawing of ``count`` pictures with ``codes`` in all is."""
        return ProgressBar(what, count, codes, previews=Previews(self.model) if self.preview else None, **noun)

    def generate(
        self, parts: Iterable[Sequence[ImageOutput]], what: str, count: int, codes: int
    ) -> Iterator[tuple[ImageOutput, GeneratedImage]]:
        """Draw ``parts``, in all up to ``count`` pictures of ``codes`` each, as many at a time as fit.

        What comes out can be saved before more is drawn.
        """
        with self.bar(what, count, count * codes) as bar:
            for orders in parts:
                bar.expect({order.request: order.path for order in orders})
                wishes = [order.request for order in orders]
                made = self.model.run(wishes, batch_size=self.ceiling, callback=bar.watch)
                for order, picture in zip(orders, made, strict=True):
                    yield order, picture  # type: ignore[misc]  # no order is for a caption
                    bar.finished(order.request)

    def best(
        self, drawn: Iterator[tuple[ImageOutput, GeneratedImage]], n: int, keep: int
    ) -> Iterator[tuple[ImageOutput, GeneratedImage]]:
        """Of each ``n`` pictures in turn, which have one prompt, the ``keep`` whose captions it is likeliest to be.

        The best comes first; they carry their scores.
        """
        while group := list(islice(drawn, n)):
            orders = {picture.index: order for order, picture in group}
            pictures = self.model.rerank([picture for _, picture in group], batch_size=self.ceiling)
            yield from ((orders[picture.index], picture) for picture in pictures[:keep])

    def upscale(self, enlargements: Iterable[UpscaleInput], count: int, *, low_level: bool = False) -> int:
        """Draw up to ``count`` images at twice their side and save them; returns how many there were."""
        from cogview.pipeline.requests import GenerationRequest

        task, side = ("low_level", self.grid // 2) if low_level else ("upscale", self.grid)

        def parts() -> Iterator[list[ImageOutput]]:
            for some in batches(enlargements, self.read_at_a_time):
                codes = self.model.encode_images([one.image for one in some], task=task)
                yield [
                    ImageOutput(
                        # A picture of ours keeps its number, so that several of one prompt do not share their noise.
                        request=GenerationRequest(
                            prompt=one.prompt,
                            seed=self.seed,
                            index=getattr(one.image, "index", 0),
                            task=task,
                            codes=own,
                            sampling=self.sampling[task],
                        ),
                        path=one.path,
                        metadata={"task": "upscale", "source": one.source},
                    )
                    for one, own in zip(some, codes, strict=True)
                ]

        done = 0
        for order, picture in self.generate(parts(), "upscaling", count, (2 * side) ** 2):
            self.save(order.path, picture, **order.metadata)
            done += 1
        return done

    def save(self, path: Path, picture: GeneratedImage, **about: str) -> Path:
        """Write a picture, with ``about`` among its text chunks, and print its path, which it returns."""
        from tqdm import tqdm

        from cogview.image_io.png import save_png

        path.parent.mkdir(parents=True, exist_ok=True)
        path = save_png(path, picture, picture.metadata(self.model.label) | about)
        tqdm.write(str(path), file=sys.stdout)  # beside a progress bar, if there is one
        return path

    def save_sheet(self, path: Path, pictures: Sequence[GeneratedImage], columns: int) -> None:
        """Write a contact sheet and print its path."""
        import numpy as np

        from cogview.image_io.contact_sheet import contact_sheet
        from cogview.image_io.png import save_png, sheet_metadata

        sheet = contact_sheet([np.asarray(picture) for picture in pictures], columns=columns)
        texts = sheet_metadata([picture.metadata(self.model.label) for picture in pictures])
        print(save_png(path, sheet, texts))


def open_session(args: argparse.Namespace, tasks: Sequence[str]) -> GenerationSession:
    """The easel that the arguments of a command ask for: those of the model, of sampling, and the seed."""
    most = parse_speculative(args)  # before the model is loaded
    easel = GenerationSession.open(
        args.model,
        tasks=tasks,
        settings=sampling_settings(args),
        seed=args.seed,
        ceiling=parse_max_batch_size(args),
        device=args.device,
        dtype=args.dtype,
        kv_dtype=args.kv_dtype,
        adapter=args.adapter,
        revision=args.revision,
        preview=getattr(args, "preview", False),
    )
    easel.model.speculative = most
    return easel
