"""A model that reads images: their codes and captions."""

# B images, G codes on a side of an image

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar, overload

import numpy as np
from PIL import Image
from torch import Tensor

from cogview.errors import InputError
from cogview.generation.requests import DecodingStopped
from cogview.image_io.reading import fit
from cogview.modeling.config import GREEDY, Sampling
from cogview.pipeline import image_codes, runner
from cogview.pipeline.inputs import (
    ImageArray,
    ImageFile,
    ImageLike,
    ImagesLike,
    SeedsLike,
    describe,
    list_images,
    load_image,
    override_sampling,
    require_callback,
    require_count,
    require_known_task,
    resolve_seeds,
)
from cogview.pipeline.model import LoadedModel
from cogview.pipeline.requests import caption_requests
from cogview.pipeline.results import Caption, GeneratedImage, ProgressCallback
from cogview.pipeline.tiles import sample_tiles
from cogview.tokenizers.tasks import TASKS

CAPTION_METHODS = ("greedy", "sample", "beam")
CAPTION_SAMPLING = Sampling(top_k=0)  # of sampled captions: the distribution of the model as it is
Item = TypeVar("Item")
NOTED = "cogview_noted"  # key of ``Image.info``: what is to be said about the image was said
log = logging.getLogger(__name__)


def log_note(index: int, note: str) -> None:
    """Log how an image was read, resized or cropped."""
    log.info("images[%d]: %s", index, note)


class CaptioningModel(LoadedModel):
    """A loaded model that encodes and captions images; its methods are those of ``CogView``."""

    def image_size(self, task: str = "generate") -> int:
        """Return the side in pixels of the images that ``task`` is given.

        Args:
            task: Name of a task.

        Raises:
            InputError: If it is unknown.

        Examples:
            >>> model.image_size(), model.image_size("low_level")
            (64, 32)
        """
        return self._given_side(task) * self.image_tokenizer.downsampling

    def fit_image(self, image: ImageLike, *, task: str = "generate") -> tuple[Image.Image, str | None]:
        """Resize an image to the size that ``task`` is given, and make a square of it as ``config.fit`` says.

        Args:
            image: Image of any size: a path, a PIL image, an array (H, W, 3) or a tensor (3, H, W).
            task: Name of a task.

        Returns:
            The RGB image, and a note such as "resized from 128 x 128 to 64 x 64", or None if it had that size.

        Raises:
            InputError: If the image cannot be used, or the task is unknown.

        Examples:
            >>> model.fit_image(Image.new("RGB", (100, 64)))[1]
            'cropped from 100 x 64 to 64 x 64'
        """
        pixels, note = fit(load_image(image), self.image_size(task), self.config.fit)
        return Image.fromarray(pixels), note

    def image_warning(self, image: ImageLike, *, task: str = "generate", tiles: bool = False) -> str | None:
        """Return a line about an image that is unlike those of the training, or None.

        The measure is the PSNR of the reconstruction from codes, which is all that the model sees of an image. Models
        without ``reconstruction_psnr`` in their config have no warning.

        Args:
            image: Image of any size: a path, a PIL image, an array (H, W, 3) or a tensor (3, H, W).
            task: Name of the task that the image is for.
            tiles: Whether the image is upscaled in tiles; of many, some are measured.

        Raises:
            InputError: If the image cannot be used, or the task is unknown.

        Examples:
            >>> model.image_warning(Image.new("RGB", (64, 64), "red"))
            'unlike the images that cogview-emoji was trained on: its reconstruction has 21.0 dB, 99% of theirs at ...'
        """
        if self.config.reconstruction_psnr is None or isinstance(image, GeneratedImage):
            return None
        if tiles:
            pixels = sample_tiles(image, self.image_size(task))
        else:
            pixels = np.asarray(self.fit_image(image, task=task)[0])[None]
        return image_codes.reconstruction_warning(pixels, self.name, self.context)

    def enlargement_problem(self, image: Image.Image, *, task: str) -> str | None:
        """Return why upscaling an image would make it smaller, in one line, or None if it would not.

        Args:
            image: Image of any size.
            task: Name of a task; one that needs no smaller image than it generates has no such problem.

        Examples:
            >>> model.enlargement_problem(Image.new("RGB", (512, 512)), task="upscale")
            '512 x 512 pixels are more than the 128 x 128 of an upscaled image; upscale it in tiles (cogview ...'
        """
        scale = TASKS[task].output_scale / TASKS[task].input_scale if TASKS[task].input_scale else 0
        given = self.image_size(task)
        side = round(given * scale)
        if scale <= 1 or min(image.size) <= side:
            return None
        return (
            f"{image.width} x {image.height} pixels are more than the {side} x {side} of an upscaled image; "
            f"upscale it in tiles (cogview upscale --tiles) or scale it down to {given} x {given} first"
        )

    def log_image_warnings(self, images: Sequence[ImageLike], *, task: str = "generate", tiles: bool = False) -> None:
        """Log the warning about each image; about a PIL image once in its life.

        Args:
            images: Images of any size and form.
            task: Name of the task that they are for.
            tiles: Whether they are upscaled in tiles.
        """
        for index, image in enumerate(images):
            info = image.info if isinstance(image, Image.Image) else {}
            if not info.get(NOTED) and (warning := self.image_warning(image, task=task, tiles=tiles)) is not None:
                info[NOTED] = True
                log.warning("images[%d]: %s", index, warning)

    def encode_images(
        self,
        images: ImagesLike,
        *,
        task: str = "generate",
        batch_size: int | None = None,
        on_note: Callable[[int, str], object] = log_note,
    ) -> np.ndarray:
        """Return the codes of images, fitted to the size that ``task`` is given.

        A ``GeneratedImage`` of that size, whose pixels are unchanged, gives the codes that it was generated with.

        Args:
            images: An image or a list of images, of any size: paths, PIL images, arrays (H, W, 3) or tensors (3, H, W).
            task: Name of a task.
            batch_size: Maximum number of images at a time, from 1; None: as many as memory holds and pay.
            on_note: Called with the index of an image and the note of ``fit_image``; by default it is logged (INFO).

        Returns:
            (B, G, G) int64 codes; (G, G) of one image.

        Raises:
            InputError: If an image cannot be used, or the task is unknown.

        Examples:
            >>> image = Image.new("RGB", (64, 64), "red")
            >>> model.encode_images(image).shape, model.encode_images([image]).shape
            ((8, 8), (1, 8, 8))
        """
        items, is_single = list_images(images)
        context = self.context
        side = self._given_side(task)
        codes = image_codes.encode_images(items, side, context, context.planner(batch_size), on_note)
        return codes[0] if is_single else codes

    def decode_images(self, codes: np.ndarray | Tensor) -> np.ndarray:
        """Return the images of codes.

        Args:
            codes: Integers from 0 to K - 1, (B, G, G) or (G, G), for any G.

        Returns:
            uint8 RGB images (B, H, W, 3); (H, W, 3) of one grid of codes.

        Raises:
            InputError: If the codes have another shape or type, or one is out of range.

        Examples:
            >>> image = model.generate("一个红苹果", seed=7)[0]
            >>> bool((model.decode_images(image.codes) == np.asarray(image)).all())
            True
        """
        array = image_codes.check_codes(codes, self.vocabulary.num_image_codes)
        if array.ndim not in (2, 3) or 0 in array.shape[-2:]:
            raise InputError(f"codes must be (B, G, G) or (G, G), got {describe(codes)}")
        images = image_codes.decode_images(array[None] if array.ndim == 2 else array, self.context)
        return images[0] if array.ndim == 2 else images

    @overload
    def caption(self, images: ImageFile, **settings: Any) -> list[Caption]: ...
    @overload
    def caption(self, images: ImageArray, **settings: Any) -> Any: ...
    @overload
    def caption(self, images: Sequence[ImageLike], **settings: Any) -> list[list[Caption]]: ...

    def caption(
        self,
        images: ImagesLike,
        *,
        n: int = 1,
        seed: SeedsLike = None,
        method: Literal["greedy", "sample", "beam"] | None = None,
        sampling: Sampling | None = None,
        batch_size: int | None = None,
        callback: ProgressCallback | None = None,
        **overrides: float | None,
    ) -> list[Caption] | list[list[Caption]]:
        """Write captions of images.

        Args:
            images: An image or a list of images, of any size: paths, PIL images, arrays (H, W, 3) or tensors (3, H, W).
            n: Captions of each image, from 1 to 100,000.
            seed: From 0 to 2**63 - 1, or a list with one for each image; None: a random one. Only ``sample`` uses it.
            method: ``greedy`` takes the most probable piece each time and has one caption; ``sample`` samples
                captions, by default from the distribution of the model as it is; ``beam`` finds the ``n`` most
                probable captions, the best first, with ``n`` beams but at least 4. None: greedy for one caption, else
                beam.
            sampling: Sampling settings, for ``sample`` only.
            batch_size: Maximum number of images at a time, from 1; None: as many as memory holds and pay.
            callback: Called with a ``GenerationProgress`` after every few pieces, or after every image of a beam
                search. Where it returns False, the captions so far are returned.
            **overrides: Fields of ``Sampling`` to replace: temperature, top_k and top_p.

        Returns:
            ``n`` captions of one image; for a list of images, a list with ``n`` captions of each.

        Raises:
            InputError: If an image or a setting cannot be used.

        Examples:
            >>> image = model.generate("蓝色背景上的三只狐狸", seed=7)[0]
            >>> "狐狸" in model.caption(image)[0].text
            True
            >>> len(model.caption([image, image], n=2, method="beam"))
            2
        """
        self.require_task("caption")
        require_count(n, "the number of captions")
        require_callback(callback)
        method = method or ("greedy" if n == 1 else "beam")
        if method not in CAPTION_METHODS:
            raise InputError(f"the method {method!r} is unknown; known: {', '.join(CAPTION_METHODS)}")
        if method == "greedy" and n > 1:
            raise InputError(f"greedy captions are always the same: {n} were asked for, use sample or beam")
        settings = _caption_sampling(method, sampling, overrides)
        items, is_single = list_images(images)
        context, seeds = self.context, resolve_seeds(seed, len(items), "images")
        planner = context.planner(batch_size)
        self.log_image_warnings(items)
        requests = caption_requests(self.encode_images(items), n=n, seeds=seeds, sampling=settings)
        if method == "beam":
            found = runner.search_captions(requests[::n], n, context, planner, callback)
        else:
            results = runner.run_requests(requests, context, planner, callback)
            captions = [result for result in results if isinstance(result, Caption)]
            found = [captions[first : first + n] for first in range(0, len(captions), n)]
        return only_result(found, callback) if is_single else found

    def _given_side(self, task: str) -> int:
        """Return the codes on a side of the images that ``task`` is given; InputError for an unknown task."""
        require_known_task(task)
        return round(TASKS[task].input_scale * self.config.grid)


def only_result(results: Sequence[Item], callback: ProgressCallback | None) -> Item:
    """Return the result of a single image.

    Args:
        results: The result, or nothing if the callback returned False.
        callback: The callback, for the assertion that it was the reason.

    Raises:
        DecodingStopped: There is no result.
    """
    if not results:
        assert callback is not None
        raise DecodingStopped("the callback returned False before the image was finished")
    return results[0]


def _caption_sampling(method: str, base: Sampling | None, overrides: dict[str, float | None]) -> Sampling:
    """Return how captions are sampled; InputError for settings that the method ignores."""
    given = [name for name, value in overrides.items() if value is not None] + ["sampling"] * (base is not None)
    sampling = override_sampling(base or CAPTION_SAMPLING, overrides)
    if given and method != "sample":
        raise InputError(f"{' and '.join(given)} can be set for sampled captions alone: use the method sample")
    if sampling.guidance != 1 or sampling.text_attention != 1:
        raise InputError("guidance and text_attention cannot be set for captions: leave them at 1")
    return GREEDY if method == "greedy" else sampling
