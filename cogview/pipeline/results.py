"""What generation returns: images, captions, scores and rankings, and the progress on the way."""

# G codes on a side of an image
from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from PIL import Image

from cogview import __version__
from cogview.config_io import to_mapping
from cogview.formatting import shorten
from cogview.modeling.config import Sampling
from cogview.pipeline.requests import MAX_SHOWN, GenerationRequest
from cogview.tokenizers.tasks import TASKS

MIN_DIFFERENT = 0.75  # fraction of the images of a prompt; with fewer different ones their number is noted


@dataclass(frozen=True, kw_only=True)
class Caption:
    """A text that the model wrote about an image.

    Attributes:
        text: The caption.
        log_probability: Log-probability of the whole text and its stop, in nats.
        num_pieces: Pieces of the text, without the stop.
        seed: Seed of the noise.
        index: Number of the caption among those of its image.
    """

    text: str
    log_probability: float
    num_pieces: int
    seed: int
    index: int


@dataclass(frozen=True, kw_only=True)
class Score:
    """How well a text and an image fit each other.

    Attributes:
        log_probability: The score in nats: by default log p(text | image), the sum over the pieces of
            log p(piece | image, pieces before).
        num_pieces: Tokens that are scored: pieces of the text or codes of the image; 1 of ``both``, which is a sum of
            means per token.
        ranked_by: Name of the score, a key of ``cogview.pipeline.ranking_rules.RANKING_RULES``.
    """

    log_probability: float
    num_pieces: int
    ranked_by: str = "caption"

    @property
    def per_piece(self) -> float:
        """Mean score of a token, in nats."""
        return self.log_probability / self.num_pieces


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """The scores of one text for several image files, in the given order.

    Attributes:
        prompt: The text.
        files: The image files.
        scores: Their scores; None for a file without one.
        errors: Why a file has no score; None for the others.
        ranked_by: Name of the score.
    """

    prompt: str
    files: Sequence[Path]
    scores: Sequence[Score | None]
    errors: Sequence[str | None]
    ranked_by: str = "caption"

    @property
    def order(self) -> list[int]:
        """Indices of the files with a score, best first; equal scores keep the given order."""
        scored = [(-score.log_probability, number) for number, score in enumerate(self.scores) if score is not None]
        return [number for _, number in sorted(scored)]

    def as_json(self) -> dict[str, object]:
        """Return the prompt and its images, in the given order, as plain data."""
        ranks = {number: rank for rank, number in enumerate(self.order, start=1)}
        images = []
        for number, (path, score, error) in enumerate(zip(self.files, self.scores, self.errors, strict=True)):
            image: dict[str, object] = {
                "file": str(path),
                "score": None if score is None else score.log_probability,
                "per_piece": None if score is None else score.per_piece,
                "rank": ranks.get(number),
            }
            images.append(image if error is None else image | {"error": error})
        return {"prompt": self.prompt, "ranked_by": self.ranked_by, "images": images}

    def as_text(self) -> list[str]:
        """Return lines for a reader: the prompt, then its images from best to worst."""
        lines = [self.prompt]
        for rank, number in enumerate(self.order, start=1):
            score = self.scores[number]
            assert score is not None
            file = self.files[number]
            lines.append(f"{rank:3}. {score.log_probability:9.2f} ({score.per_piece:.2f} per piece)  {file}")
        return lines


class GeneratedImage(Image.Image):
    """A PIL image that carries how it was generated.

    Pickling and ``copy.deepcopy`` keep all of it. Methods of PIL that return a new image, such as ``resize`` and
    ``copy``, return a plain PIL image.

    Examples:
        >>> image = model.generate("一个红苹果", seed=7)[0]
        >>> image
        <GeneratedImage 64 x 64 “一个红苹果” seed=7 index=0>
        >>> image.codes.shape
        (8, 8)
        >>> image.resize((512, 512)).save("apple.png")

    Attributes:
        prompt: The text.
        seed: Seed of the noise, which is keyed by (seed, index).
        index: Number of the image among those of its prompt.
        codes: (G, G) int64 codes of the image, (2G, 2G) after upscaling, or (N, 2G, 2G) after upscaling N tiles.
        log_probability: Log-probability of the sampled codes before guidance and filters, in nats.
        sampling: Settings that it was sampled with.
        task: Task of its request, such as ``edit``.
        mask: Of an edited, filled or varied image: the codes that might change, (G, G) bool; None: all.
        strength: Share of these that changed.
        negative: The text that guidance led away from; empty for none.
        model_prompt: The prompt as the model was given it, such as 三只狐狸 for 三只🦊.
        codebook_sha256: Hash of the codebook that gives the codes their meaning.
        score: Score by which it was ranked, once it was computed.
    """

    prompt: str
    model_prompt: str
    seed: int
    index: int
    codes: np.ndarray
    log_probability: float
    sampling: Sampling
    task: str = "generate"
    mask: np.ndarray | None = None
    strength: float = 1.0
    negative: str = ""
    codebook_sha256: str = ""
    score: Score | None = None
    _checksum: int = 0

    @classmethod
    def from_pixels(
        cls, pixels: np.ndarray, request: GenerationRequest, codes: np.ndarray, log_probability: float
    ) -> GeneratedImage:
        """Return an image of (H, W, 3) uint8 RGB ``pixels`` with the facts of its request.

        Args:
            pixels: The decoded codes.
            request: What was asked for, with its sampling settings.
            codes: The codes.
            log_probability: Their log-probability, in nats.
        """
        assert request.sampling is not None
        image = Image.fromarray(pixels)
        image.__class__ = cls  # Pillow has no constructor for subclasses
        assert isinstance(image, cls)
        image.prompt, image.seed, image.index = request.prompt, request.seed, request.index
        image.model_prompt = request.prompt
        image.codes, image.log_probability, image.sampling = codes, log_probability, request.sampling
        image.task, image.mask, image.strength = request.task, request.mask, request.strength
        image.negative = request.negative
        image._checksum = zlib.crc32(pixels.tobytes())
        return image

    @property
    def is_edited(self) -> bool:
        """Whether the pixels were changed in place since ``codes`` were decoded to them."""
        return zlib.crc32(self.tobytes()) != self._checksum

    def codes_of(self, codebook_sha256: str) -> np.ndarray | None:
        """Return the codes of the pixels; None if they belong to another codebook, or the pixels were edited.

        Args:
            codebook_sha256: Hash of the codebook that is meant.
        """
        return None if self.is_edited or self.codebook_sha256 != codebook_sha256 else self.codes

    def __repr__(self) -> str:
        width, height = self.size
        facts = f"“{shorten(self.prompt, MAX_SHOWN)}” seed={self.seed} index={self.index}"
        return f"<{type(self).__name__} {width} x {height} {facts}>"

    def __getstate__(self) -> Any:
        own = vars(self)
        return super().__getstate__(), {name: own[name] for name in GeneratedImage.__annotations__ if name in own}

    def __setstate__(self, state: Any) -> None:
        pixels, facts = state
        super().__setstate__(pixels)
        vars(self).update(facts)

    def metadata(self, model: str) -> dict[str, str]:
        """Return the text chunks of its PNG file: all that is needed to generate it again, its codes and its score.

        Args:
            model: Name of the weights.
        """
        texts = {
            "prompt": self.prompt,
            "seed": str(self.seed),
            "index": str(self.index),
            "model": model,
            **{name: str(value) for name, value in to_mapping(self.sampling).items()},
            "codes": " ".join(map(str, self.codes.flat)),  # in raster order
            "log_probability": str(self.log_probability),
            "cogview": __version__,
        }
        if TASKS[self.task].masked_image is not None:
            texts |= self._edit_metadata()
        if self.negative:
            texts["negative"] = self.negative
        if self.model_prompt != self.prompt:
            texts["model_prompt"] = self.model_prompt
        if self.score is not None:
            texts |= {
                "score": str(self.score.log_probability),
                "score_per_piece": str(self.score.per_piece),
                "ranked_by": self.score.ranked_by,
            }
        return texts

    def _edit_metadata(self) -> dict[str, str]:
        """Return the text chunks that say which codes of another image might change."""
        texts = {"task": self.task}
        if self.mask is not None:
            texts["mask_codes"] = " ".join("".join(map(str, line)) for line in self.mask.astype(int))
        share = {"keep": 1 - self.strength} if self.task == "vary" else {"strength": self.strength}
        return texts | {name: f"{value:.12g}" for name, value in share.items()}


def source_metadata(image: object, task: str = "generate") -> dict[str, str]:
    """Return the text chunks of an upscaled image that say how the small image was generated.

    Args:
        image: The small image; one that was read from a file has no such chunks.
        task: Its task.
    """
    if not isinstance(image, GeneratedImage):
        return {}
    negative = {"negative": image.negative} if image.negative else {}
    return {"source_task": task, "source_sampling": json.dumps(to_mapping(image.sampling)), **negative}


def only_images(results: Iterable[GeneratedImage | Caption]) -> Iterator[GeneratedImage]:
    """Yield ``results``, all of which are images.

    Raises:
        TypeError: If one is a caption.
    """
    for result in results:
        if not isinstance(result, GeneratedImage):
            raise TypeError(f"expected images only, got the caption {result.text!r}")
        yield result


@dataclass(frozen=True, kw_only=True)
class GenerationProgress:
    """Progress, passed to the callback after every line of codes of a batch.

    Scores and beam searches have no lines: their callback is called after every image, and counts images.

    Attributes:
        requests: Requests of the batch; of a score or a beam search, that of the image.
        num_new: Codes and pieces sampled or scored since the last call, summed over the batch.
        done: Blanks filled in the request that has the largest number of them, or images finished.
        total: Blanks of that request, or all images.
        codes: Returns the (G, G) codes of each image so far, masked where none is sampled yet.
    """

    requests: tuple[GenerationRequest, ...]
    num_new: int
    done: int
    total: int
    codes: Callable[[], list[np.ma.MaskedArray]] = field(repr=False)


ProgressCallback: TypeAlias = Callable[[GenerationProgress], object]  # returns False to stop


def repetition_notes(images: Iterable[tuple[str, bytes]]) -> list[str]:
    """Return a note for each prompt of whose images many are equal to an earlier one.

    Args:
        images: The prompt and the codes, as bytes, of each image.

    Returns:
        A line for each prompt with fewer than three quarters of different images.
    """
    codes: dict[str, list[bytes]] = {}
    for prompt, content in images:
        codes.setdefault(prompt, []).append(content)
    return [
        f"“{shorten(prompt, MAX_SHOWN)}”: only {len(set(group))} of {len(group)} images differ; "
        "a higher temperature or a lower min-p gives more variety"
        for prompt, group in codes.items()
        if len(set(group)) < MIN_DIFFERENT * len(group)
    ]
