"""The session of a generating command: its model, seed and sampling settings, and the image files it writes."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from cogview.cli.inputs import READ_AT_A_TIME, batches
from cogview.cli.messages import print_message, print_note, print_result
from cogview.cli.options import ModelOptions, SessionOptions
from cogview.cli.progress import Previews, ProgressBar
from cogview.formatting import plural

if TYPE_CHECKING:  # torch takes seconds to import: --help does without
    from PIL import Image

    from cogview.pipeline.cogview import CogView
    from cogview.pipeline.requests import GenerationRequest
    from cogview.pipeline.results import GeneratedImage


def open_model(options: ModelOptions, tasks: Sequence[str]) -> CogView:
    """Load the model of a command.

    Raises:
        InputError: The model cannot be loaded, or was not trained for one of ``tasks``.
    """
    from cogview.pipeline.cogview import CogView

    model = CogView.from_pretrained(
        options.model,
        revision=options.revision,
        adapter=options.adapter,
        device=options.device,
        dtype=options.dtype,
        kv_dtype=options.kv_dtype,
    )
    for task in tasks:
        model.require_task(task)
    return model


def check_prompt(model: CogView, prompt: str) -> bool:
    """Return whether ``model`` can use ``prompt``; print on stderr why not, or what to expect of it."""
    if (problem := model.prompt_problem(prompt)) is not None:
        print_message("skipped", problem, prompt=prompt)
        return False
    if (warning := model.prompt_warning(prompt)) is not None:
        print_message("note", warning, prompt=prompt)
    return True


@dataclass(frozen=True, kw_only=True)
class ImageOutput:
    """A request and the file of its image, with metadata beyond what the image itself carries."""

    request: GenerationRequest
    path: Path
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class UpscaleInput:
    """An image to upscale, its prompt, the name of its file, and the file of the result."""

    image: Image.Image
    prompt: str
    source: str
    path: Path


def note_unknown_words(model: CogView, prompts: Sequence[str]) -> None:
    """Print one note if some prompts ask for what a model may not know.

    Args:
        model: The model.
        prompts: Prompts of a measurement.
    """
    warnings = [warning for prompt in prompts if (warning := model.prompt_warning(prompt)) is not None]
    if warnings:
        count = plural(len(prompts), "prompt")
        print_note(f"{len(warnings)} of {count} ask for what the model may not know, first: {warnings[0]}")


def result_line(path: Path, score: float | None) -> str:
    """Return the line on stdout for an image: its path and, of a ranked one, its score after a tab."""
    return str(path) if score is None else f"{path}\t{score:.3f}"


class GenerationSession:
    """One model, one seed and one set of sampling settings; generates images, saves them and prints their paths.

    Attributes:
        model: The loaded model.
        options: The options of the command.
        sampling: Sampling settings by task.
        seed: The seed of all images.
    """

    def __init__(self, model: CogView, options: SessionOptions, tasks: Sequence[str]) -> None:
        """Resolve the seed and the sampling settings of ``tasks``.

        Raises:
            InputError: A setting or the seed is out of range, or the model cannot be guided.
        """
        from cogview.pipeline.inputs import resolve_seed

        self.model = model
        self.options = options
        self.sampling = {task: model.sampling(**options.settings, task=task) for task in tasks if task != "caption"}
        self.seed = resolve_seed(options.seed)
        self._num_requested: Counter[str] = Counter()

    @classmethod
    def open(cls, options: SessionOptions, tasks: Sequence[str]) -> GenerationSession:
        """Load a model that was trained for ``tasks``, and start a session with it; errors as in ``open_model``."""
        from cogview.pipeline.inputs import resolve_seed

        resolve_seed(options.seed)  # a wrong one is reported before the model is loaded
        session = cls(open_model(options.model, tasks), options, tasks)
        session.model.speculative = options.speculative
        return session

    def print_header(self) -> None:
        """Print the model, its device and the seed on stderr."""
        print(f"{self.model.label} on {self.model.placement}, seed {self.seed}", file=sys.stderr)

    @property
    def max_batch_size(self) -> int | None:
        """Maximum number of images in a batch; None for as many as fit into memory."""
        return self.options.model.max_batch_size

    @property
    def grid(self) -> int:
        """Number of codes on a side of an image."""
        return self.model.config.grid

    @property
    def read_at_a_time(self) -> int:
        """Number of images to read before they are processed."""
        return self.max_batch_size or READ_AT_A_TIME

    def check_prompt(self, prompt: str) -> bool:
        """Return whether ``prompt`` can be used; print on stderr why not, or what to expect of it."""
        return check_prompt(self.model, prompt)

    def requests(
        self, prompt: str, n: int, *, task: str = "generate", negative: str | None = None
    ) -> list[GenerationRequest]:
        """Return requests for the next ``n`` images of ``prompt``; repeated calls continue their numbers."""
        from cogview.pipeline.requests import GenerationRequest

        first = self._num_requested[prompt]
        self._num_requested[prompt] += n
        sampling = self.sampling[task]
        return [
            GenerationRequest(
                prompt=prompt, seed=self.seed, index=index, task=task, sampling=sampling, negative=negative or ""
            )
            for index in range(first, first + n)
        ]

    def progress_bar(self, activity: str, count: int, codes: int, *, noun: str = "image") -> ProgressBar:
        """Return a progress bar over ``count`` results with ``codes`` tokens in all."""
        previews = Previews(self.model) if self.options.preview else None
        return ProgressBar(activity, count, codes, noun=noun, previews=previews)

    def generate(
        self, parts: Iterable[Sequence[ImageOutput]], activity: str, count: int, codes: int
    ) -> Iterator[tuple[ImageOutput, GeneratedImage]]:
        """Generate images in batches as large as fit, and yield each as soon as its batch is done.

        Args:
            parts: Outputs in parts; the images of a part are generated together.
            activity: The verb that the progress bar starts with.
            count: Maximum number of images of all parts.
            codes: Number of codes of one image.
        """
        with self.progress_bar(activity, count, count * codes) as bar:
            for outputs in parts:
                bar.expect({output.request: output.path for output in outputs})
                requests = [output.request for output in outputs]
                images = self.model.run(requests, batch_size=self.max_batch_size, callback=bar.update)
                for output, image in zip(outputs, images, strict=True):
                    yield output, image  # type: ignore[misc]  # no request is for a caption
                    bar.finished(output.request)
                    bar.catch_up()

    def best(
        self, generated: Iterator[tuple[ImageOutput, GeneratedImage]], n: int, keep: int, *, by: str
    ) -> Iterator[tuple[ImageOutput, GeneratedImage]]:
        """Yield the ``keep`` best of each ``n`` images, which share a prompt.

        Images are ranked by a score, the best first, and carry it; their files name the rank.

        Args:
            generated: The images.
            n: Images of each prompt.
            keep: Images of each prompt to yield.
            by: Name of the score.
        """
        from cogview.image_io.png import ranked_path

        while group := list(islice(generated, n)):
            outputs = {image.index: output for output, image in group}
            images = self.model.rerank([image for _, image in group], by=by, batch_size=self.max_batch_size)
            for rank, image in enumerate(images[:keep], start=1):
                output = outputs[image.index]
                path = ranked_path(output.path, rank, keep)
                yield replace(output, path=path, metadata={**output.metadata, "rank": str(rank)}), image

    def upscale(self, inputs: Iterable[UpscaleInput], count: int, *, task: str = "upscale") -> int:
        """Generate images at twice their side and save them.

        Args:
            inputs: The images.
            count: Maximum number of images.
            task: ``upscale``, or ``low_level`` for inputs of half the side of the model's images.

        Returns:
            The number of images.
        """
        from cogview.pipeline.requests import GenerationRequest
        from cogview.pipeline.results import source_metadata
        from cogview.tokenizers.tasks import TASKS

        def parts() -> Iterator[list[ImageOutput]]:
            for part in batches(inputs, self.read_at_a_time):
                codes = self.model.encode_images([each.image for each in part], task=task)
                yield [
                    ImageOutput(
                        # A generated image keeps its index, so that images of one prompt do not share their noise.
                        request=GenerationRequest(
                            prompt=each.prompt,
                            seed=self.seed,
                            index=getattr(each.image, "index", 0),
                            task=task,
                            codes=given,
                            sampling=self.sampling[task],
                        ),
                        path=each.path,
                        metadata={"task": task, "source": each.source, **source_metadata(each.image)},
                    )
                    for each, given in zip(part, codes, strict=True)
                ]

        done, codes = 0, round(TASKS[task].output_scale * self.grid) ** 2
        for output, image in self.generate(parts(), "upscaling", count, codes):
            self.save(output.path, image, **output.metadata)
            done += 1
        return done

    def upscale_tiles(self, inputs: Iterable[UpscaleInput], task: str) -> int:
        """Upscale images in tiles, one image after the other, and save them.

        Args:
            inputs: The images.
            task: ``upscale`` or ``low_level``.

        Returns:
            The number of images.
        """
        from cogview.pipeline.tiles import TileGrid, upscale_tiles
        from cogview.tokenizers.tasks import TASKS

        done, codes = 0, round(TASKS[task].output_scale * self.grid) ** 2
        for each in inputs:
            width, height = each.image.size
            grid = TileGrid(width=width, height=height, side=self.model.image_size(task))
            with self.progress_bar("upscaling", len(grid), len(grid) * codes, noun="tile") as bar:
                (image,) = upscale_tiles(
                    [each.image],
                    self.model.tokenize([each.prompt]),
                    seeds=[self.seed],
                    task=task,
                    sampling=self.sampling[task],
                    side=grid.side,
                    encode=partial(self.model.encode_images, task=task),
                    run=partial(self.model.run, batch_size=self.max_batch_size, callback=bar.update),
                )
            self.save(each.path, image, task=task, source=each.source, tiles=str(grid))
            done += 1
        return done

    def save(self, path: Path, image: GeneratedImage, **metadata: str) -> Path:
        """Save an image with its settings as text chunks, print its path, and return the path.

        Args:
            path: The file; a name that another image has is continued with _2, _3, ….
            image: The image.
            **metadata: Further text chunks.
        """
        from cogview.image_io.png import save_png

        path.parent.mkdir(parents=True, exist_ok=True)
        path = save_png(path, image, self.model.file_metadata(image) | metadata)
        score = None if image.score is None else image.score.log_probability
        facts = {
            "file": str(path),
            "task": metadata.get("task", "generate"),
            "source": metadata.get("source"),
            "prompt": image.prompt,
            "seed": image.seed,
            "index": image.index,
            "log_probability": image.log_probability,
            "score": score,
            "ranked_by": None if image.score is None else image.score.ranked_by,
            "rank": int(metadata["rank"]) if "rank" in metadata else None,
        }
        print_result(result_line(path, score), facts)
        return path

    def save_sheet(self, path: Path, sheet: Image.Image, images: Sequence[GeneratedImage], **metadata: str) -> None:
        """Save a contact sheet and print its path.

        Args:
            path: The file; a name that another image has is continued with _2, _3, ….
            sheet: The contact sheet.
            images: The images on it.
            **metadata: Further text chunks.
        """
        from cogview.image_io.png import save_png, sheet_metadata

        path = save_png(path, sheet, sheet_metadata(list(map(self.model.file_metadata, images)), **metadata))
        print_result(str(path), {"file": str(path), "task": "sheet"})
