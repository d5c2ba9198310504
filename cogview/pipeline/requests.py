"""Generation requests, and the functions that build them from prompts, images and codes."""

# B images, G codes on a side of an image
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from cogview.errors import InputError
from cogview.formatting import shorten
from cogview.generation.sampling import MAX_SEED
from cogview.modeling.config import Sampling
from cogview.pipeline.inputs import ImageLike, describe, require_int, require_share
from cogview.tokenizers.tasks import TASKS
from cogview.tokenizers.text import TextTokenizer

EMPTY_PROMPT = "the prompt is empty; describe an image, for example 一个红苹果"
MAX_SHOWN = 20  # characters of a prompt in a message


@dataclass(frozen=True)
class Prompt:
    """A text and its piece ids, which are computed once."""

    text: str
    ids: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class GenerationRequest:
    """One image to generate or caption to write.

    Examples:
        >>> requests = [GenerationRequest(prompt="一只猫", seed=seed) for seed in (1, 2)]
        >>> [image.seed for image in model.run(requests)]
        [1, 2]

    Attributes:
        prompt: The text; empty for a caption.
        seed: Seed of the noise, from 0 to 2**63 - 1. Noise is keyed by (seed, index).
        index: Number of the image among those of its prompt, or of the caption among those of its image.
        task: Name of a task (``tokenizers/tasks.py``).
        codes: Codes that are given. To ``generate``: the first rows (R, G) of the image, if any. To ``upscale`` and
            ``caption``: those (G, G) of the image. To ``low_level``: those (G/2, G/2) of the small image. To ``edit``,
            ``fill`` and ``vary``: those (G, G) of the image to start from.
        mask: Of the last three: codes that may change, (G, G) bool, while the others are given. None: all.
        strength: Share of these codes that changes, from 0 to 1, chosen by noise keyed by (seed, index)
            (``masks.sample_changes``).
        sampling: None: the settings of the model for the task.
        prompt_ids: Piece ids of the prompt; None: the prompt is tokenized when the request runs.
        negative: To ``generate``: a text that guidance leads away from; empty: guidance leads away from no text.
        negative_ids: Its piece ids, likewise.

    Raises:
        InputError: If a prompt is no text, the seed, index or strength is out of range, or ``sampling`` is no
            ``Sampling``.
    """

    prompt: str = ""
    seed: int
    index: int = 0
    task: str = "generate"
    codes: np.ndarray | None = field(default=None, repr=False)
    mask: np.ndarray | None = field(default=None, repr=False)
    strength: float = 1.0
    sampling: Sampling | None = None
    prompt_ids: tuple[int, ...] | None = field(default=None, repr=False)
    negative: str = ""
    negative_ids: tuple[int, ...] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.prompt, str):
            raise InputError(f"the prompt must be a text, got {describe(self.prompt)}")
        if not isinstance(self.negative, str):
            raise InputError(f"the negative prompt must be a text, got {describe(self.negative)}")
        require_int(self.seed, "the seed", 0, MAX_SEED)
        require_int(self.index, "the index of the image", 0, MAX_SEED)
        require_share(self.strength, "strength")
        if self.sampling is not None and not isinstance(self.sampling, Sampling):
            raise InputError(f"sampling must be a Sampling, got {describe(self.sampling)}")


def check_changes(request: GenerationRequest, grid: int, name: str) -> None:
    """Check the mask and the strength of a request.

    Args:
        request: The request, of a known task.
        grid: G, codes on a side.
        name: Name of the request, for messages.

    Raises:
        InputError: If its task has none of them, or the mask is no bool array (G, G).
    """
    mask = request.mask
    if (mask is not None or request.strength != 1) and TASKS[request.task].masked_image is None:
        users = ", ".join(task for task, row in TASKS.items() if row.masked_image is not None)
        raise InputError(
            f"{name}: mask and strength mean nothing for the task {request.task!r}; they belong to: {users}"
        )
    if mask is not None and not (isinstance(mask, np.ndarray) and mask.shape == (grid, grid) and mask.dtype == bool):
        raise InputError(f"{name}.mask must be a bool array {(grid, grid)} of codes, got {describe(mask)}")


def tokenize_prompt(text: str, tokenizer: TextTokenizer, max_text: int, convert: Callable[[str], str]) -> Prompt:
    """Return a prompt with its piece ids.

    Args:
        text: The prompt.
        tokenizer: Splits it.
        max_text: Pieces that fit.
        convert: Returns the text in the characters of the model.

    Raises:
        InputError: If it is no text, empty, not UTF-8 or too long.
    """
    if not isinstance(text, str):
        raise InputError(f"the prompt must be a text, got {describe(text)}")
    if not text.strip():
        raise InputError(EMPTY_PROMPT)
    try:
        ids = tokenizer.encode(convert(text))
    except ValueError as error:
        raise InputError(str(error)) from None
    if len(ids) > max_text:
        raise InputError(
            f"the prompt “{shorten(text, MAX_SHOWN)}” is {len(ids)} pieces long, {max_text} fit; shorten it"
        )
    return Prompt(text, tuple(ids))


def text_to_image_requests(
    prompts: Sequence[Prompt],
    *,
    n: int,
    seeds: Sequence[int],
    sampling: Sampling | None,
    negative: Prompt | None = None,
) -> list[GenerationRequest]:
    """Return requests for ``n`` images of each prompt, prompt by prompt.

    Args:
        prompts: Checked prompts.
        n: Images per prompt.
        seeds: Seed of each prompt; the index of an image keys its noise.
        sampling: Sampling settings; None takes those of the model.
        negative: Checked negative prompt of all; None: none.
    """
    away, away_ids = ("", None) if negative is None else (negative.text, negative.ids)
    return [
        GenerationRequest(
            prompt=prompt.text,
            prompt_ids=prompt.ids,
            seed=seed,
            index=index,
            sampling=sampling,
            negative=away,
            negative_ids=away_ids,
        )
        for prompt, seed in zip(prompts, seeds, strict=True)
        for index in range(n)
    ]


def completion_requests(
    prompts: Sequence[Prompt], codes_BGG: np.ndarray, *, rows: int, n: int, seeds: Sequence[int], sampling: Sampling
) -> list[GenerationRequest]:
    """Return requests for ``n`` completions of each image, of which the first ``rows`` rows of codes are kept.

    Args:
        prompts: A checked prompt for each image.
        codes_BGG: Codes of the images, (B, G, G).
        rows: Rows of codes to keep.
        n: Completions per image.
        seeds: Seed of each image.
        sampling: Sampling settings.
    """
    return [
        GenerationRequest(
            prompt=prompt.text, prompt_ids=prompt.ids, seed=seed, index=index, codes=codes[:rows], sampling=sampling
        )
        for prompt, codes, seed in zip(prompts, codes_BGG, seeds, strict=True)
        for index in range(n)
    ]


def upscale_requests(
    prompts: Sequence[Prompt],
    images: Sequence[ImageLike],
    codes_BGG: np.ndarray,
    *,
    task: str,
    seeds: Sequence[int],
    sampling: Sampling,
) -> list[GenerationRequest]:
    """Return a request to upscale each image.

    A ``GeneratedImage`` keeps its index, so that several images of one prompt do not share their noise.

    Args:
        prompts: A checked prompt for each image.
        images: The images.
        codes_BGG: Their codes, (B, G, G).
        task: ``upscale`` or ``low_level``.
        seeds: Seed of each image.
        sampling: Sampling settings.
    """
    return [
        GenerationRequest(
            prompt=prompt.text,
            prompt_ids=prompt.ids,
            seed=seed,
            index=getattr(image, "index", 0) if isinstance(image, Image.Image) else 0,  # paths have a method "index"
            task=task,
            codes=codes,
            sampling=sampling,
        )
        for prompt, image, codes, seed in zip(prompts, images, codes_BGG, seeds, strict=True)
    ]


def edit_requests(
    task: str,
    prompts: Sequence[Prompt],
    codes_BGG: np.ndarray,
    masks: Sequence[np.ndarray | None],
    *,
    strength: float = 1.0,
    n: int,
    seeds: Sequence[int],
    sampling: Sampling,
) -> list[GenerationRequest]:
    """Return requests for ``n`` edits of each image, image by image.

    Args:
        task: ``edit``, ``fill`` or ``vary``.
        prompts: A checked text for each image.
        codes_BGG: Codes of the images, (B, G, G).
        masks: Codes that may change of each image, (G, G) bool; None: all.
        strength: Share of them that changes.
        n: Edits per image.
        seeds: Seed of each image.
        sampling: Sampling settings.
    """
    return [
        GenerationRequest(
            prompt=prompt.text,
            prompt_ids=prompt.ids,
            seed=seed,
            index=index,
            task=task,
            codes=codes,
            mask=mask,
            strength=strength,
            sampling=sampling,
        )
        for prompt, codes, mask, seed in zip(prompts, codes_BGG, masks, seeds, strict=True)
        for index in range(n)
    ]


def caption_requests(
    codes_BGG: np.ndarray, *, n: int, seeds: Sequence[int], sampling: Sampling
) -> list[GenerationRequest]:
    """Return requests for ``n`` captions of each image, image by image.

    Args:
        codes_BGG: Codes of the images, (B, G, G).
        n: Captions per image.
        seeds: Seed of each image.
        sampling: Sampling settings.
    """
    return [
        GenerationRequest(seed=seed, index=index, task="caption", codes=codes, sampling=sampling)
        for codes, seed in zip(codes_BGG, seeds, strict=True)
        for index in range(n)
    ]
