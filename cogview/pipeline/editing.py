"""A model that edits, fills and varies images."""

# B images, G codes on a side of an image

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from cogview.errors import InputError
from cogview.limits import DEFAULT_KEEP
from cogview.modeling.config import Sampling
from cogview.pipeline.inputs import (
    ImageLike,
    ImagesLike,
    SeedsLike,
    TextsLike,
    list_images,
    load_image,
    require_count,
    require_share,
    resolve_seeds,
    texts_of_images,
)
from cogview.pipeline.masks import Mask, MaskLike, load_mask
from cogview.pipeline.requests import Prompt, edit_requests
from cogview.pipeline.results import GeneratedImage, ProgressCallback, only_images
from cogview.pipeline.running import RunningModel

EMPTY_INSTRUCTION = "the instruction is empty; say what to change, for example 把苹果变成绿色"
FULL_MASK = "mask: it covers the whole image, so nothing would be kept; cogview generate makes new images"
log = logging.getLogger(__name__)


class EditingModel(RunningModel):
    """A loaded model that also edits, fills and varies images; its methods are those of ``CogView``."""

    def edit(
        self,
        images: ImagesLike,
        instructions: TextsLike,
        *,
        mask: MaskLike | list[MaskLike] | None = None,
        strength: float = 1.0,
        n: int = 1,
        seed: SeedsLike = None,
        sampling: Sampling | None = None,
        batch_size: int | None = None,
        callback: ProgressCallback | None = None,
        **overrides: float | None,
    ) -> list[GeneratedImage]:
        """Change images as instructions say. The weights must have been trained for the task ``edit``.

        Args:
            images: An image or a list of images, of any size: paths, PIL images, arrays (H, W, 3) or tensors (3, H, W).
            instructions: One instruction for all images, or one for each.
            mask: Where the images may change; the other codes stay as they are. An image of the size of theirs, in
                which that is white, or opaque if a part of it is transparent; a bool array of pixels (H, W) or codes
                (G, G); or a box "x,y,w,h" in pixels. A list has one for each image. None: everywhere.
            strength: Share of these codes that may change, in (0, 1]. The others are kept, and are chosen by seed and
                index. What is kept at one strength is kept at every lower one.
            n: Edits of each image, from 1 to 100,000.
            seed: From 0 to 2**63 - 1, or a list with one for each image; None: a random one, which the images carry.
            sampling: Sampling settings; None: those of the model.
            batch_size: Maximum number of images at a time, from 1; None: as many as memory holds and pay.
            callback: Called with a ``GenerationProgress`` after every line of codes; returns False to stop.
            **overrides: Fields of ``Sampling`` to replace, such as ``temperature=0.8``.

        Returns:
            Edited images, image by image: a flat list, also for one image.

        Raises:
            InputError: If an image, an instruction, a mask or a setting cannot be used.

        Examples:
            >>> edited = model.edit("apple.png", "把苹果变成绿色", mask="0,0,32,64", n=2, seed=7)
            >>> [image.task for image in edited]
            ['edit', 'edit']
        """
        strength = require_share(strength, "strength", above_zero=True)
        self.require_task("edit")
        require_count(n, "the number of images")
        items, _ = list_images(images)
        texts = texts_of_images(instructions, items, "instruction")
        prompts = self.tokenize_instructions(texts)
        settings = self._resolve_sampling(sampling, overrides, "edit")
        seeds = resolve_seeds(seed, len(items), "images")
        codes, masks = self._sources(items, mask)
        requests = edit_requests("edit", prompts, codes, masks, strength=strength, n=n, seeds=seeds, sampling=settings)
        return list(only_images(self.run(requests, batch_size=batch_size, callback=callback)))

    def fill(
        self,
        images: ImagesLike,
        prompts: TextsLike | None = None,
        *,
        mask: MaskLike | list[MaskLike],
        n: int = 1,
        seed: SeedsLike = None,
        sampling: Sampling | None = None,
        batch_size: int | None = None,
        callback: ProgressCallback | None = None,
        **overrides: float | None,
    ) -> list[GeneratedImage]:
        """Generate a part of images anew. The weights must have been trained for the task ``fill``.

        Args:
            images: An image or a list of images, as for ``edit``.
            prompts: What the whole images show: one text for all, or one for each; None: the prompts of generated
                images.
            mask: What to generate, as for ``edit``. The codes outside of it are given, and are those of the result.
            n: Results for each image, from 1 to 100,000.
            seed: From 0 to 2**63 - 1, or a list with one for each image; None: a random one, which the images carry.
            sampling: Sampling settings; None: those of the model.
            batch_size: Maximum number of images at a time, from 1; None: as many as memory holds and pay.
            callback: Called with a ``GenerationProgress`` after every line of codes; returns False to stop.
            **overrides: Fields of ``Sampling`` to replace, such as ``temperature=0.8``.

        Returns:
            Filled images, image by image: a flat list, also for one image.

        Raises:
            InputError: If an image, a prompt, a mask or a setting cannot be used, or a mask covers a whole image.

        Examples:
            >>> image = model.generate("一个红苹果", seed=7)[0]
            >>> filled = model.fill(image, mask="16,16,32,32", seed=8)[0]
            >>> bool((filled.codes[0] == image.codes[0]).all())
            True
        """
        self.require_task("fill")
        require_count(n, "the number of images")
        items, _ = list_images(images)
        checked = self.tokenize(texts_of_images(prompts, items, "prompt"))
        self.prompt_checks.log_warnings(checked)
        settings = self._resolve_sampling(sampling, overrides, "fill")
        seeds = resolve_seeds(seed, len(items), "images")
        codes, masks = self._sources(items, mask)
        for one in masks:
            require_partial(one)
        requests = edit_requests("fill", checked, codes, masks, n=n, seeds=seeds, sampling=settings)
        return list(only_images(self.run(requests, batch_size=batch_size, callback=callback)))

    def vary(
        self,
        images: ImagesLike,
        *,
        keep: float = DEFAULT_KEEP,
        n: int = 4,
        seed: SeedsLike = None,
        sampling: Sampling | None = None,
        batch_size: int | None = None,
        callback: ProgressCallback | None = None,
        **overrides: float | None,
    ) -> list[GeneratedImage]:
        """Generate variations of images without any text. The weights must have been trained for the task ``fill``.

        Args:
            images: An image or a list of images, as for ``edit``.
            keep: Share of the codes that are kept, from 0 to 1, chosen by seed and index. What is kept at one share is
                kept at every larger one. With 1 nothing is sampled, and all results are the image as its codes show it.
            n: Variations of each image, from 1 to 100,000.
            seed: From 0 to 2**63 - 1, or a list with one for each image; None: a random one, which the images carry.
            sampling: Sampling settings; None: those of the model, without guidance.
            batch_size: Maximum number of images at a time, from 1; None: as many as memory holds and pay.
            callback: Called with a ``GenerationProgress`` after every line of codes; returns False to stop.
            **overrides: Fields of ``Sampling`` to replace, such as ``temperature=0.8``.

        Returns:
            Variations, image by image: a flat list, also for one image.

        Raises:
            InputError: If an image or a setting cannot be used.

        Examples:
            >>> image = model.generate("一个红苹果", seed=7)[0]
            >>> near, far = (model.vary(image, keep=keep, n=1, seed=8)[0] for keep in (0.9, 0.1))
            >>> bool((near.codes == image.codes).sum() > (far.codes == image.codes).sum())
            True
        """
        keep = require_share(keep, "keep")
        self.require_task("vary")
        require_count(n, "the number of images")
        items, _ = list_images(images)
        settings = self._resolve_sampling(sampling, overrides, "vary")
        seeds = resolve_seeds(seed, len(items), "images")
        codes, masks = self._sources(items, None)
        nothing = [Prompt("", ())] * len(items)
        requests = edit_requests("vary", nothing, codes, masks, strength=1 - keep, n=n, seeds=seeds, sampling=settings)
        return list(only_images(self.run(requests, batch_size=batch_size, callback=callback)))

    def fit_mask(self, mask: Mask, size: tuple[int, int], image: str = "the image") -> NDArray[np.bool_]:
        """Return the codes of an image that a mask covers.

        Args:
            mask: The mask.
            size: Width and height of the image in pixels, before it is fitted to the model.
            image: Name of the image, for messages.

        Returns:
            bool (G, G).

        Raises:
            InputError: If the mask has another size than the image, or covers no code of it.

        Examples:
            >>> from cogview.pipeline.masks import load_mask
            >>> model.fit_mask(load_mask("8,0,9,1"), (64, 64))[0].tolist()
            [False, True, True, False, False, False, False, False]
        """
        return mask.fitted(size, self.config.grid, side=self.image_size(), rule=self.config.fit, image=image)

    def tokenize_instructions(self, texts: Sequence[str]) -> list[Prompt]:
        """Return instructions with their piece ids.

        Args:
            texts: The instructions.

        Raises:
            InputError: If one is empty, not UTF-8 or too long.

        Examples:
            >>> [prompt.text for prompt in model.tokenize_instructions(["把苹果变成绿色"])]
            ['把苹果变成绿色']
        """
        if not all(text.strip() for text in texts):
            raise InputError(EMPTY_INSTRUCTION)
        return self.tokenize(texts)

    def _sources(
        self, items: Sequence[ImageLike], mask: MaskLike | list[MaskLike] | None
    ) -> tuple[np.ndarray, list[NDArray[np.bool_] | None]]:
        """Return the codes (B, G, G) of images, and the codes that a mask, or one for each, covers of each."""
        fitted: list[NDArray[np.bool_] | None] = [None] * len(items)
        if mask is not None:
            names = [f"images[{number}]" for number in range(len(items))]
            if isinstance(mask, list):
                if len(mask) != len(items):
                    raise InputError(f"{len(items)} images need one mask or {len(items)}, got {len(mask)}")
                masks = [load_mask(one, f"mask[{number}]") for number, one in enumerate(mask)]
            else:
                masks = [load_mask(mask)] * len(items)
            loaded = [load_image(item, name) for item, name in zip(items, names, strict=True)]
            fitted = [self.fit_mask(one, item.size, name) for one, item, name in zip(masks, loaded, names, strict=True)]
            items = loaded
        self.log_image_warnings(items)
        return self.encode_images(items), fitted


def require_partial(mask: NDArray[np.bool_] | None) -> None:
    """Raise InputError if a mask covers a whole image, of which nothing would be known."""
    if mask is None or mask.all():
        raise InputError(FULL_MASK)
