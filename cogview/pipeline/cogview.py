"""``CogView``: generates, completes, upscales, captions and ranks images."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any, overload

from cogview.modeling.config import Sampling
from cogview.pipeline.captioning import only_result
from cogview.pipeline.editing import EditingModel
from cogview.pipeline.inputs import (
    ImageArray,
    ImageFile,
    ImageLike,
    ImagesLike,
    SeedsLike,
    TextsLike,
    list_images,
    list_texts,
    require_count,
    require_int,
    resolve_seeds,
    texts_of_images,
)
from cogview.pipeline.ranking_rules import DEFAULT_RULE
from cogview.pipeline.requests import (
    completion_requests,
    text_to_image_requests,
    upscale_requests,
)
from cogview.pipeline.results import (
    GeneratedImage,
    ProgressCallback,
    only_images,
    repetition_notes,
)
from cogview.pipeline.tiles import upscale_tiles

log = logging.getLogger(__name__)


class CogView(EditingModel):
    """A model and what it does for people. ``CogView.from_pretrained`` opens one.

    * Images are given as paths, PIL images, arrays (H, W, 3), (H, W, 4) or (H, W), or tensors (3, H, W). Arrays and
      tensors are uint8, or floats in [0, 1]. A batch is an array (B, H, W, 3) or a tensor (B, 3, H, W). A text given
      as ``images`` is a path.
    * A list of images has a list of results. One image has one result: ``upscale`` returns an image, ``score`` a score,
      ``caption`` the list of its ``n`` captions. ``generate`` and ``complete`` return a flat list in every case, since
      a prompt may have several images.
    * Sampling settings are given as a ``Sampling``, as single keywords (``temperature=0.8``), or as both: a keyword
      replaces a field. What is not given is the setting of the model for the task.
    * Every method that takes time has a ``callback``. It is called with a ``GenerationProgress`` and stops the work by
      returning False; what is finished by then is returned. If nothing is, ``DecodingStopped`` is raised.
    * Whatever cannot be used raises ``InputError``, a ``ValueError``.

    For research: ``transformer(ids, positions=None)`` returns logits, ``image_tokenizer`` encodes and decodes tensors,
    ``text_tokenizer`` splits and joins text, and ``vocabulary`` has the offsets of codes, pieces and commands.

    Examples:
        >>> model = CogView.from_pretrained("cogview-emoji", device="cpu")
        >>> model
        <CogView cogview-emoji, 7.0 million parameters, 64 x 64 pixels, tasks generate, caption, upscale, cpu, float32>
        >>> image = model.generate("一个红苹果", seed=7)[0]
        >>> image.save("apple.png")
        >>> "苹果" in model.caption("apple.png")[0].text
        True
    """

    def generate(
        self,
        prompts: TextsLike,
        *,
        n: int = 1,
        keep: int | None = None,
        rank_by: str = DEFAULT_RULE,
        negative: str | None = None,
        seed: SeedsLike = None,
        sampling: Sampling | None = None,
        batch_size: int | None = None,
        callback: ProgressCallback | None = None,
        **overrides: float | None,
    ) -> list[GeneratedImage]:
        """Generate images from text. Image i of a prompt depends on prompt, seed, i and sampling, not on its batch.

        Args:
            prompts: One text or a list of texts.
            n: Images of each prompt, from 1 to 100,000.
            keep: Images of each prompt to return, from 1 to ``n``: those with the best scores, the best first
                (``rerank``). None: all, in order.
            rank_by: The score of ``keep``, as ``by`` of ``score``.
            negative: A text that guidance leads away from, for all prompts; it needs ``guidance`` other than 1. None:
                guidance leads away from images of any text.
            seed: From 0 to 2**63 - 1, or a list with one for each prompt; None: a random one, which the images carry.
            sampling: Sampling settings; None: those of the model.
            batch_size: Maximum number of images at a time, from 1; None: as many as memory holds and pay.
            callback: Called with a ``GenerationProgress`` after every line of codes. Where it returns False, the images
                so far are returned.
            **overrides: Fields of ``Sampling`` to replace: temperature (above 0), top_k (0: all ids), top_p (above 0,
                up to 1), min_p (0: none), guidance (1: none), text_attention (1: none) and noise_version (2, or 1).

        Returns:
            Images, prompt by prompt.

        Raises:
            InputError: If a prompt or a setting cannot be used.

        Examples:
            >>> images = model.generate(["一个红苹果", "一只猫"], n=2, seed=7, temperature=0.5)
            >>> [(image.prompt, image.seed, image.index) for image in images]
            [('一个红苹果', 7, 0), ('一个红苹果', 7, 1), ('一只猫', 7, 0), ('一只猫', 7, 1)]
            >>> best = model.generate("一只狐狸", n=4, keep=1, seed=7)[0]
        """
        require_count(n, "the number of images")
        if keep is not None:
            require_int(keep, "keep", 1, n)
            self.require_ranking(rank_by)
        settings: dict[str, Any] = {"sampling": sampling, "batch_size": batch_size, "callback": callback, **overrides}
        images = list(self.generate_iter(prompts, n=n, negative=negative, seed=seed, **settings))
        for note in repetition_notes((image.prompt, image.codes.tobytes()) for image in images):
            log.warning("%s", note)
        if keep is None:
            return images
        groups = [images[first : first + n] for first in range(0, len(images), n)]
        return [image for group in groups for image in self.rerank(group, by=rank_by, batch_size=batch_size)[:keep]]

    def generate_iter(
        self,
        prompts: TextsLike,
        *,
        n: int = 1,
        negative: str | None = None,
        seed: SeedsLike = None,
        sampling: Sampling | None = None,
        batch_size: int | None = None,
        callback: ProgressCallback | None = None,
        **overrides: float | None,
    ) -> Iterator[GeneratedImage]:
        """Generate images from text and return an iterator that yields them as batches are finished.

        Arguments are checked at once; the work starts with the first image that is taken.

        Args:
            prompts: One text or a list of texts.
            n: Images of each prompt, from 1 to 100,000.
            negative: A text that guidance leads away from, as for ``generate``.
            seed: From 0 to 2**63 - 1, or a list with one for each prompt; None: a random one, which the images carry.
            sampling: Sampling settings; None: those of the model.
            batch_size: Maximum number of images at a time; 1 yields every image by itself, None as many as pay.
            callback: Called with a ``GenerationProgress`` after every line of codes; where it returns False, the
                iterator ends.
            **overrides: Fields of ``Sampling`` to replace, such as ``temperature=0.8``.

        Returns:
            The iterator over images, prompt by prompt.

        Raises:
            InputError: As ``generate`` does.

        Examples:
            >>> for image in model.generate_iter("一只狐狸", n=2, seed=7, batch_size=1):
            ...     image.save(f"fox{image.index}.png")
        """
        self.require_task("generate")
        require_count(n, "the number of images")
        checked = self.tokenize(list_texts(prompts, "prompt"))
        self.prompt_checks.log_warnings(checked)
        settings = self._resolve_sampling(sampling, overrides, "generate")
        seeds = resolve_seeds(seed, len(checked), "prompts")
        away = None if negative is None else self.tokenize_negative(negative, settings)
        requests = text_to_image_requests(checked, n=n, seeds=seeds, sampling=settings, negative=away)
        return only_images(self.run(requests, batch_size=batch_size, callback=callback))

    def complete(
        self,
        images: ImagesLike,
        prompts: TextsLike | None = None,
        *,
        rows: int,
        n: int = 1,
        seed: SeedsLike = None,
        sampling: Sampling | None = None,
        batch_size: int | None = None,
        callback: ProgressCallback | None = None,
        **overrides: float | None,
    ) -> list[GeneratedImage]:
        """Keep the first rows of codes of each image and generate the others.

        Args:
            images: An image or a list of images, of any size: paths, PIL images, arrays (H, W, 3) or tensors (3, H, W).
            prompts: One text for all images, or one for each; None: the prompts of generated images.
            rows: Rows of codes to keep, from 0 to G - 1.
            n: Completions of each image, from 1 to 100,000.
            seed: From 0 to 2**63 - 1, or a list with one for each image; None: a random one, which the images carry.
            sampling: Sampling settings; None: those of the model.
            batch_size: Maximum number of images at a time, from 1; None: as many as memory holds and pay.
            callback: Called with a ``GenerationProgress`` after every line of codes; returns False to stop.
            **overrides: Fields of ``Sampling`` to replace, such as ``temperature=0.8``.

        Returns:
            Completed images, image by image: a flat list, also for one image.

        Raises:
            InputError: If an image, a prompt, ``rows`` or a setting cannot be used.

        Examples:
            >>> image = model.generate("一只狐狸", seed=7)[0]
            >>> completed = model.complete(image, "蓝色背景上的一只狐狸", rows=4, n=2, seed=8)
            >>> [bool((one.codes[:4] == image.codes[:4]).all()) for one in completed]
            [True, True]
        """
        rows = require_int(rows, "the rows to keep", 0, self.config.grid - 1)
        self.require_task("generate")
        require_count(n, "the number of images")
        items, _ = list_images(images)
        checked = self.tokenize(texts_of_images(prompts, items, "prompt"))
        self.prompt_checks.log_warnings(checked)
        settings = self._resolve_sampling(sampling, overrides, "generate")
        seeds = resolve_seeds(seed, len(items), "images")
        self.log_image_warnings(items)
        codes = self.encode_images(items)
        requests = completion_requests(checked, codes, rows=rows, n=n, seeds=seeds, sampling=settings)
        return list(only_images(self.run(requests, batch_size=batch_size, callback=callback)))

    @overload
    def upscale(self, images: ImageFile, texts: TextsLike | None = None, **settings: Any) -> GeneratedImage: ...
    @overload
    def upscale(self, images: ImageArray, texts: TextsLike | None = None, **settings: Any) -> Any: ...
    @overload
    def upscale(
        self, images: Iterable[ImageLike], texts: TextsLike | None = None, **settings: Any
    ) -> list[GeneratedImage]: ...

    def upscale(
        self,
        images: ImagesLike,
        texts: TextsLike | None = None,
        *,
        seed: SeedsLike = None,
        sampling: Sampling | None = None,
        low_level: bool = False,
        tiles: bool = False,
        batch_size: int | None = None,
        callback: ProgressCallback | None = None,
        **overrides: float | None,
    ) -> GeneratedImage | list[GeneratedImage]:
        """Generate each image at twice its side: (2G, 2G) codes from (G, G), in nine overlapping windows.

        Windows of several images, and those of one that are independent of each other, share batches.

        Args:
            images: An image or a list of images, of any size: paths, PIL images, arrays (H, W, 3) or tensors (3, H, W).
                Without ``tiles`` they are fitted to the model's size first, so that a large photograph becomes
                smaller; a warning is logged then.
            texts: What they show: one text for all images, or one for each; None: the prompts of generated images.
            seed: From 0 to 2**63 - 1, or a list with one for each image; None: a random one. A generated image keeps
                its index.
            sampling: Sampling settings; None: those of the model.
            low_level: Generate (G, G) codes from an image of half the model's side instead, in a single window. The
                weights must have been trained for the task ``low_level``, as those of CogView v1 and unlike those of
                ``cogview-emoji``.
            tiles: Upscale images of another size in overlapping tiles of the model's size, to twice their own sides.
                Tile k has the noise of the image's index plus k. ``codes`` of the result are (N, 2G, 2G).
            batch_size: Maximum number of images at a time, from 1; None: as many as memory holds and pay.
            callback: Called with a ``GenerationProgress`` after every line of codes; returns False to stop.
            **overrides: Fields of ``Sampling`` to replace, such as ``temperature=0.8``.

        Returns:
            An image for one image; for a list of images, a list.

        Raises:
            InputError: If an image, a text or a setting cannot be used.
            DecodingStopped: The callback returned False before the one image was finished.

        Examples:
            >>> image = model.generate("一个红苹果", seed=7)[0]
            >>> model.upscale(image, "一个红苹果", seed=7).size
            (128, 128)
        """
        task = "low_level" if low_level else "upscale"
        self.require_task(task)
        items, is_single = list_images(images)
        checked = self.tokenize(texts_of_images(texts, items, "text"))
        self.prompt_checks.log_warnings(checked)
        settings = self._resolve_sampling(sampling, overrides, task)
        seeds = resolve_seeds(seed, len(items), "images")
        self.log_image_warnings(items, task=task, tiles=tiles)
        if tiles:
            upscaled = upscale_tiles(
                items,
                checked,
                seeds=seeds,
                task=task,
                sampling=settings,
                side=self.image_size(task),
                encode=partial(self.encode_images, task=task),
                run=partial(self.run, batch_size=batch_size, callback=callback),
            )
            return only_result(upscaled, callback) if is_single else upscaled
        side = 2 * self.image_size(task)
        codes = self.encode_images(
            items,
            task=task,
            on_note=lambda index, note: log.warning(
                "images[%d]: %s, the model's size; the upscaled image is %d x %d", index, note, side, side
            ),
        )
        requests = upscale_requests(checked, items, codes, task=task, seeds=seeds, sampling=settings)
        upscaled = list(only_images(self.run(requests, batch_size=batch_size, callback=callback)))
        return only_result(upscaled, callback) if is_single else upscaled
