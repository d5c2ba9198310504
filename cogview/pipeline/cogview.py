"""``CogView``: generates, completes, upscales, captions and ranks images."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Literal

from PIL import Image

from cogview.errors import InputError
from cogview.generation.sampling import MAX_SEED
from cogview.limits import MAX_RESULTS
from cogview.modeling.config import GREEDY, Sampling
from cogview.pipeline import runner
from cogview.pipeline.model import LoadedModel, override_sampling
from cogview.pipeline.requests import (
    GenerationRequest,
    caption_requests,
    completion_requests,
    text_to_image_requests,
    upscale_requests,
)
from cogview.pipeline.results import Caption, GeneratedImage, ProgressCallback, Score, only_images

MIN_BEAMS = 4
CAPTION_SAMPLING = Sampling(top_k=0)  # of sampled captions: the distribution of the model as it is


class CogView(LoadedModel):
    """A model and what it does for people.

    ``CogView.from_pretrained`` opens one. Methods that generate take their sampling settings as a ``Sampling``, as
    single keywords (``temperature=0.8``), or as both: a keyword replaces a field. What is not given is the setting of
    the model for the task.

    For research: ``transformer(ids, positions=None)`` returns logits, ``image_tokenizer`` encodes and decodes images,
    ``text_tokenizer`` splits and joins text, and ``vocabulary`` has the offsets of codes, pieces and commands.

    Example:
        >>> model = CogView.from_pretrained()
        >>> image = model.generate("一个红苹果", seed=7)[0]
        >>> image.save("apple.png")
    """

    def generate(
        self,
        prompts: str | Sequence[str],
        *,
        n: int = 1,
        keep: int | None = None,
        seed: int | None = None,
        sampling: Sampling | None = None,
        batch_size: int | None = None,
        callback: ProgressCallback | None = None,
        **overrides: float | None,
    ) -> list[GeneratedImage]:
        """Generate images from text. Image i of a prompt depends on prompt, seed, i and sampling, not on its batch.

        Args:
            prompts: One text or several.
            n: Images of each prompt.
            keep: Images of each prompt to return: those whose captions the prompt most probably is, the best first
                (``rerank``). None: all, in order.
            seed: From 0 to 2**63 - 1; None: a random one, which the images carry.
            sampling: Sampling settings; None: those of the model.
            batch_size: Maximum number of images at a time; None: as many as memory holds and pay.
            callback: Called with a ``GenerationProgress`` after every line of codes; returns False to stop.
            **overrides: Fields of ``Sampling`` to replace.

        Returns:
            Images, prompt by prompt.

        Raises:
            InputError: If a prompt or a setting cannot be used.
        """
        if keep is not None and not 1 <= keep <= n:
            raise InputError(f"keep must be from 1 to {n}, the images of a prompt, got {keep}")
        if keep is not None:
            self.require_task("caption")
        settings = {"n": n, "seed": seed, "sampling": sampling, "batch_size": batch_size, "callback": callback}
        images = list(self.generate_iter(prompts, **settings, **overrides))  # type: ignore[arg-type]
        if keep is None:
            return images
        groups = [images[first : first + n] for first in range(0, len(images), n)]
        return [image for group in groups for image in self.rerank(group, batch_size=batch_size)[:keep]]

    def generate_iter(
        self,
        prompts: str | Sequence[str],
        *,
        n: int = 1,
        seed: int | None = None,
        sampling: Sampling | None = None,
        batch_size: int | None = None,
        callback: ProgressCallback | None = None,
        **overrides: float | None,
    ) -> Iterator[GeneratedImage]:
        """Generate images from text and return an iterator that yields them as batches are finished.

        Arguments and errors are those of ``generate``.

        Args:
            prompts: One prompt or several.
            n: Images per prompt.
            seed: Seed; None chooses one, which the images carry.
            sampling: Sampling settings; None takes those of the model.
            batch_size: Maximum number of images at a time; None plans it by memory.
            callback: Called after every line of codes; where it returns False, generation ends.
            **overrides: Fields of ``Sampling`` to change, such as ``temperature``.

        Returns:
            The iterator over images, prompt by prompt.
        """
        self.require_task("generate")
        _require_count(n, "the number of images")
        checked = self.tokenize([prompts] if isinstance(prompts, str) else prompts)
        settings = self._resolve_sampling(sampling, overrides, "generate")
        requests = text_to_image_requests(checked, n=n, seed=resolve_seed(seed), sampling=settings)
        return only_images(self.run(requests, batch_size=batch_size, callback=callback))

    def complete(
        self,
        images: Sequence[Image.Image],
        prompts: str | Sequence[str],
        *,
        rows: int,
        n: int = 1,
        seed: int | None = None,
        sampling: Sampling | None = None,
        batch_size: int | None = None,
        callback: ProgressCallback | None = None,
        **overrides: float | None,
    ) -> list[GeneratedImage]:
        """Keep the first rows of codes of each image and generate the others.

        Args:
            images: Images of any size; they are fitted.
            prompts: One text for all images, or one for each.
            rows: Rows of codes to keep, from 0 to G - 1.
            n: Completions of each image.
            seed: As for ``generate``.
            sampling: Sampling settings; None: those of the model.
            batch_size: Maximum number of images at a time; None: as many as memory holds and pay.
            callback: As for ``generate``.
            **overrides: Fields of ``Sampling`` to replace.

        Returns:
            Completed images, image by image.

        Raises:
            InputError: If a prompt, ``rows`` or a setting cannot be used.
        """
        grid = self.config.grid
        if not 0 <= rows < grid:
            raise InputError(f"the rows to keep must be from 0 to {grid - 1} of {grid}, got {rows}")
        _require_count(n, "the number of images")
        checked = self.tokenize(_one_each(prompts, images, "prompt"))
        settings = self._resolve_sampling(sampling, overrides, "generate")
        requests = completion_requests(
            checked, self.encode_images(images), rows=rows, n=n, seed=resolve_seed(seed), sampling=settings
        )
        return list(only_images(self.run(requests, batch_size=batch_size, callback=callback)))

    def upscale(
        self,
        images: Sequence[Image.Image],
        texts: str | Sequence[str],
        *,
        seed: int | None = None,
        sampling: Sampling | None = None,
        low_level: bool = False,
        batch_size: int | None = None,
        callback: ProgressCallback | None = None,
        **overrides: float | None,
    ) -> list[GeneratedImage]:
        """Generate each image at twice its side: (2G, 2G) codes from (G, G), in nine overlapping windows.

        Windows of several images, and those of one that are independent of each other, share batches.

        Args:
            images: Images of any size; they are fitted.
            texts: What they show: one text for all images, or one for each.
            seed: As for ``generate``. A generated image keeps its index.
            sampling: Sampling settings; None: those of the model.
            low_level: Generate (G, G) codes from an image of half the model's side instead, in a single window.
            batch_size: Maximum number of images at a time; None: as many as memory holds and pay.
            callback: As for ``generate``.
            **overrides: Fields of ``Sampling`` to replace.

        Returns:
            An image for each image.

        Raises:
            InputError: If a text or a setting cannot be used.
        """
        task = "low_level" if low_level else "upscale"
        self.require_task(task)
        checked = self.tokenize(_one_each(texts, images, "text"))
        settings = self._resolve_sampling(sampling, overrides, task)
        codes = self.encode_images(images, task=task)
        requests = upscale_requests(checked, images, codes, task=task, seed=resolve_seed(seed), sampling=settings)
        return list(only_images(self.run(requests, batch_size=batch_size, callback=callback)))

    def caption(
        self,
        images: Sequence[Image.Image],
        *,
        n: int = 1,
        seed: int | None = None,
        method: Literal["greedy", "sample", "beam"] = "greedy",
        sampling: Sampling | None = None,
        batch_size: int | None = None,
        callback: ProgressCallback | None = None,
        **overrides: float | None,
    ) -> list[list[Caption]]:
        """Write captions of images.

        Args:
            images: Images of any size; they are fitted.
            n: Captions of each image.
            seed: As for ``generate``.
            method: ``greedy`` takes the most probable piece each time and has one caption; ``sample`` samples
                captions, by default from the distribution of the model as it is; ``beam`` finds the ``n`` most
                probable captions, the best first, with ``n`` beams but at least 4.
            sampling: Sampling settings, for ``sample`` only.
            batch_size: Maximum number of images at a time; None: as many as memory holds and pay.
            callback: As for ``generate``; a beam search does not call it.
            **overrides: Fields of ``Sampling`` to replace: temperature, top_k and top_p.

        Returns:
            ``n`` captions of each image.

        Raises:
            InputError: If a setting cannot be used.
        """
        self.require_task("caption")
        _require_count(n, "the number of captions")
        if method not in ("greedy", "sample", "beam"):
            raise InputError(f"the method {method!r} is unknown; known: greedy, sample, beam")
        if method == "greedy" and n > 1:
            raise InputError(f"greedy captions are always the same: {n} were asked for, use sample or beam")
        settings = _caption_sampling(method, sampling, overrides)
        requests = caption_requests(self.encode_images(images), n=n, seed=resolve_seed(seed), sampling=settings)
        if method == "beam":
            planner = self.context.planner(batch_size)
            return runner.search_captions(requests[::n], n, max(n, MIN_BEAMS), self.context, planner)
        results = self.run(requests, batch_size=batch_size, callback=callback)
        captions = [result for result in results if isinstance(result, Caption)]
        return [captions[first : first + n] for first in range(0, len(captions), n)]

    def run(
        self,
        requests: Sequence[GenerationRequest],
        *,
        batch_size: int | None = None,
        callback: ProgressCallback | None = None,
    ) -> Iterator[GeneratedImage | Caption]:
        """Generate what is requested; different tasks share batches.

        Args:
            requests: Requests, whose prompts were validated (``prompt_problem``).
            batch_size: Maximum number of requests at a time; None: as many as memory holds and pay.
            callback: As for ``generate``.

        Returns:
            An iterator over images and captions in the order of the requests, as batches are finished.

        Raises:
            InputError: If the weights were not trained for a task, or a sampling setting cannot be used.
        """
        resolved, context = self._resolve(requests), self.context
        return runner.run_requests(resolved, context, context.planner(batch_size), callback)

    def batch_sizes(self, requests: Sequence[GenerationRequest], *, batch_size: int | None = None) -> list[int]:
        """Return the sizes of the batches in which ``run`` would take the requests now, in order.

        Args:
            requests: The requests.
            batch_size: Maximum number of requests at a time; None plans it by memory.

        Raises:
            InputError: As ``run`` does.
        """
        resolved, context = self._resolve(requests), self.context
        return runner.RequestQueue(resolved, context).batch_sizes(context.planner(batch_size))

    def score(
        self, images: Sequence[Image.Image], texts: str | Sequence[str], *, batch_size: int | None = None
    ) -> list[Score]:
        """Return how probable a text is as the caption of each image, among text ids alone.

        Args:
            images: Images of any size; they are fitted.
            texts: One text for all images, or one for each.
            batch_size: Maximum number of images at a time; None: as many as memory holds and pay.

        Returns:
            A score for each image.

        Raises:
            InputError: If a text cannot be used.
        """
        self.require_task("caption")
        prompts = self.tokenize(_one_each(texts, images, "text"))
        codes, context = self.encode_images(images), self.context
        return runner.score_texts(codes, [prompt.ids for prompt in prompts], context, context.planner(batch_size))

    def rerank(self, images: Sequence[GeneratedImage], *, batch_size: int | None = None) -> list[GeneratedImage]:
        """Return images by how probable their prompts are as captions of them, the best first.

        Args:
            images: Generated images. Each gets its ``score``.
            batch_size: Maximum number of images at a time; None: as many as memory holds and pay.
        """
        scores = self.score(images, [image.prompt for image in images], batch_size=batch_size)
        for image, score in zip(images, scores, strict=True):
            image.score = score
        return sorted(images, key=lambda image: -image.score.log_probability if image.score else 0.0)

    def _resolve(self, requests: Sequence[GenerationRequest]) -> list[GenerationRequest]:
        """Return requests, each with sampling settings; InputError for what the weights were not trained for."""
        for task in dict.fromkeys(request.task for request in requests):
            self.require_task(task)
        own = {request.task: self._config(request.task).sampling for request in requests}
        resolved = [one if one.sampling else replace(one, sampling=own[one.task]) for one in requests]
        for task, sampling in {(one.task, one.sampling) for one in resolved}:
            assert sampling is not None
            self._check_guidance(sampling, task)
        return resolved


def resolve_seed(seed: int | None) -> int:
    """Return ``seed``, or a random one for None.

    Raises:
        InputError: If it is outside 0 to 2**63 - 1.
    """
    if seed is None:
        return secrets.randbelow(2**31)
    if not 0 <= seed <= MAX_SEED:
        raise InputError(f"the seed must be from 0 to {MAX_SEED}, got {seed}")
    return seed


def _caption_sampling(method: str, base: Sampling | None, overrides: dict[str, float | None]) -> Sampling:
    """Return how captions are sampled; InputError for settings that the method ignores."""
    given = [name for name, value in overrides.items() if value is not None] + ["sampling"] * (base is not None)
    sampling = override_sampling(base or CAPTION_SAMPLING, overrides)
    if given and method != "sample":
        raise InputError(f"{' and '.join(given)} can be set for sampled captions alone: use the method sample")
    if sampling.guidance != 1 or sampling.text_attention != 1:
        raise InputError("guidance and text_attention cannot be set for captions: leave them at 1")
    return GREEDY if method == "greedy" else sampling


def _one_each(texts: str | Sequence[str], images: Sequence[Image.Image], noun: str) -> list[str]:
    """Return a text for each image: the same for all, or the given ones."""
    if isinstance(texts, str):
        return [texts] * len(images)
    if len(texts) != len(images):
        raise InputError(f"{len(images)} images need one {noun} or {len(images)}, got {len(texts)}")
    return list(texts)


def _require_count(value: int, noun: str) -> None:
    """Raise InputError unless a value is from 1 to ``MAX_RESULTS``."""
    if not 1 <= value <= MAX_RESULTS:
        raise InputError(f"{noun} must be from 1 to {MAX_RESULTS}, got {value}")
