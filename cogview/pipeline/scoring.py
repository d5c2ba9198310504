"""A model that scores and ranks images by how well texts fit them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar, overload

from cogview.generation.requests import DecodingStopped
from cogview.pipeline import runner
from cogview.pipeline.captioning import CaptioningModel, only_result
from cogview.pipeline.inputs import (
    ImageArray,
    ImageFile,
    ImageLike,
    ImagesLike,
    TextsLike,
    list_images,
    require_callback,
    texts_of_images,
)
from cogview.pipeline.requests import GenerationRequest
from cogview.pipeline.results import GeneratedImage, ProgressCallback, Score

Item = TypeVar("Item")


class ScoringModel(CaptioningModel):
    """A loaded model that also scores and ranks images; its methods are those of ``CogView``."""

    @overload
    def score(  # type: ignore[overload-overlap]  # a str is a sequence of str, and stands for one image
        self, images: ImageFile, texts: TextsLike | None = None, *, by: str = ..., batch_size: int | None = None
    ) -> Score: ...
    @overload
    def score(
        self, images: ImageArray, texts: TextsLike | None = None, *, by: str = ..., batch_size: int | None = None
    ) -> Any: ...
    @overload
    def score(
        self,
        images: Sequence[ImageLike],
        texts: TextsLike | None = None,
        *,
        by: str = ...,
        batch_size: int | None = None,
        callback: ProgressCallback | None = None,
    ) -> list[Score]: ...

    def score(
        self,
        images: ImagesLike,
        texts: TextsLike | None = None,
        *,
        by: str = "caption",
        batch_size: int | None = None,
        callback: ProgressCallback | None = None,
    ) -> Score | list[Score]:
        """Return how well a text and each image fit each other: by default log p(text | image), among text ids alone.

        Args:
            images: An image or a list of images, of any size and form, as for ``caption``.
            texts: One text for all images, or one for each; None: the prompts of generated images.
            by: ``caption``: log p(text | image); ``picture``: log p(image | text); ``both``: their sum, each per token,
                with log p(code | text) of masked codes for weights that were trained with them.
            batch_size: Maximum number of images at a time, from 1; None: as many as memory holds and pay.
            callback: Called with a ``GenerationProgress`` after every image. Where it returns False, the scores so far
                are returned.

        Returns:
            The score of one image; for a list of images, a list of scores.

        Raises:
            InputError: If an image or a text cannot be used, or the weights lack what the score needs.

        Examples:
            >>> image = model.generate("一个红苹果", seed=7)[0]
            >>> fitting, other = (model.score(image, text) for text in ("一个红苹果", "一只猫"))
            >>> fitting.per_piece > other.per_piece
            True
        """
        self.require_ranking(by)
        require_callback(callback)
        items, is_single = list_images(images)
        prompts = self.tokenize(texts_of_images(texts, items, "text"))
        context = self.context
        planner = context.planner(batch_size)
        self.log_image_warnings(items)
        requests = [
            GenerationRequest(prompt=prompt.text, prompt_ids=prompt.ids, seed=0, task="score", codes=codes)
            for prompt, codes in zip(prompts, self.encode_images(items), strict=True)
        ]
        scores = runner.score_images(requests, by, context, planner, callback)
        return only_result(scores, callback) if is_single else scores

    def rerank(
        self,
        images: Sequence[Item],
        texts: TextsLike | None = None,
        *,
        by: str = "caption",
        batch_size: int | None = None,
        callback: ProgressCallback | None = None,
    ) -> list[Item]:
        """Return images by how well they fit a text, the best first.

        The default compares what any images show; ``both`` also notices damage, in images of one prompt.

        Args:
            images: Images of any size and form, as for ``caption``. A ``GeneratedImage`` gets its ``score``; ``score``
                returns those of other images.
            texts: One text for all images, or one for each; None: the prompts of generated images.
            by: The score: ``caption``, ``picture`` or ``both``, as for ``score``.
            batch_size: Maximum number of images at a time, from 1; None: as many as memory holds and pay.
            callback: Called with a ``GenerationProgress`` after every image.

        Returns:
            The images as they were given, the best first.

        Raises:
            InputError: If an image or a text cannot be used.
            DecodingStopped: The callback returned False, so that not all images have a score.

        Examples:
            >>> images = model.generate("一只狐狸", n=4, seed=7)
            >>> best = model.rerank(images)[0]
            >>> best.score == max((image.score for image in images), key=lambda score: score.log_probability)
            True
            >>> images[0].save("a.png"), images[1].save("b.png")
            (None, None)
            >>> sorted(model.rerank(["a.png", "b.png"], "一只狐狸"))
            ['a.png', 'b.png']
        """
        items, _ = list_images(images)  # type: ignore[arg-type]  # checked there
        scores = self.score(items, texts, by=by, batch_size=batch_size, callback=callback)
        if len(scores) < len(items):
            raise DecodingStopped(f"the callback stopped after {len(scores)} of {len(items)} images: none are ranked")
        for image, score in zip(items, scores, strict=True):
            if isinstance(image, GeneratedImage):
                image.score = score
        order = sorted(range(len(items)), key=lambda index: -scores[index].log_probability)
        return [items[index] for index in order]  # type: ignore[misc]
