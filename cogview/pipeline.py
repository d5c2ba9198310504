"""``CogView``: a model of one checkpoint folder, and what it does for people."""

# B pictures of a batch, G codes on a side
from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from cogview.checkpoints.folder import Model, load_model
from cogview.checkpoints.registry import find_checkpoint
from cogview.device import Placement, choose_placement
from cogview.engine import Job, fill
from cogview.errors import InputError
from cogview.sampling import MAX_SEED, Sampling
from cogview.tokenizers.text import TextTokenizer
from cogview.tokenizers.vocabulary import Vocabulary
from cogview.transformer import Transformer
from cogview.vqvae.model import VQVAE

DEFAULT_BATCH_SIZE = 16
MANY_BYTES = 0.3  # share of a prompt spelt in bytes from which on a model hardly knows its characters


@dataclass(frozen=True, kw_only=True)
class Wish:
    """One picture to draw. ``index`` is its number among those of a prompt: noise is keyed by (seed, index)."""

    prompt: str
    seed: int
    index: int = 0


class Picture(Image.Image):
    """A PIL image that carries how it was drawn."""

    prompt: str
    seed: int
    index: int  # number of the picture among those of its prompt: noise is keyed by (seed, index)
    codes: np.ndarray  # (G, G) int64
    log_probability: float  # of the codes, in nats, before any filter
    sampling: Sampling

    @classmethod
    def of(
        cls, pixels: np.ndarray, *, wish: Wish, codes: np.ndarray, log_probability: float, sampling: Sampling
    ) -> Picture:
        """A picture from (H, W, 3) uint8 ``pixels``."""
        picture = Image.fromarray(pixels)
        picture.__class__ = cls  # Pillow has no constructor for subclasses
        assert isinstance(picture, cls)
        picture.prompt, picture.seed, picture.index = wish.prompt, wish.seed, wish.index
        picture.codes, picture.log_probability, picture.sampling = codes, log_probability, sampling
        return picture


class CogView:
    """One set of weights and its tokenizers.

    For research: ``transformer(ids, positions=None)`` gives logits, ``image_tokenizer`` encodes and decodes images,
    ``text_tokenizer`` text, and ``vocabulary`` has the offsets and command ids.
    """

    def __init__(self, model: Model, placement: Placement, name: str) -> None:
        self.model = model
        self.placement = placement
        self.name = name

    @classmethod
    def from_pretrained(
        cls, name: str | Path = "cogview-emoji", *, device: str = "auto", dtype: str = "auto"
    ) -> CogView:
        """Open a model of checkpoints.yaml by name, or a checkpoint folder by path.

        ``device`` is auto, cpu, cuda, cuda:N or mps, ``dtype`` auto, float32, bfloat16 or float16. Raises InputError
        for an unknown name, and for a folder that is incomplete or damaged.
        """
        placement = choose_placement(device, dtype)
        folder = find_checkpoint(str(name))
        return cls(load_model(folder, placement.device, placement.dtype), placement, str(name))

    @property
    def transformer(self) -> Transformer:
        """The transformer."""
        return self.model.transformer

    @property
    def image_tokenizer(self) -> VQVAE:
        """Images <-> codes."""
        return self.model.image_tokenizer

    @property
    def text_tokenizer(self) -> TextTokenizer:
        """Text <-> piece ids, counted from 0."""
        return self.model.text_tokenizer

    @property
    def vocabulary(self) -> Vocabulary:
        """Where codes, pieces and commands lie among the ids."""
        return self.model.config.vocabulary

    def sampling(
        self, temperature: float | None = None, top_k: int | None = None, top_p: float | None = None
    ) -> Sampling:
        """This model's own settings, with those that are given in their place."""
        given: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
        try:
            return replace(self.model.config.sampling, **{k: v for k, v in given.items() if v is not None})
        except ValueError as error:
            raise InputError(str(error)) from None

    def problem_with(self, prompt: str) -> str | None:
        """Why ``prompt`` cannot be drawn, in one line, or None if it can."""
        if not prompt.strip():
            return "the prompt is empty; say what to draw, for example 一个红苹果"
        try:
            length = len(self.text_tokenizer.encode(prompt))
        except ValueError as error:
            return str(error)
        if length > self.model.config.max_text:
            return (
                f"the prompt {_shortened(prompt)} is {length} pieces long, {self.model.config.max_text} fit; shorten it"
            )
        return None

    def warning_about(self, prompt: str) -> str | None:
        """A line about a prompt with characters that the model hardly knows, or None."""
        share = self.text_tokenizer.byte_share(prompt)
        if share < MANY_BYTES:
            return None
        return (
            f"{share:.0%} of the prompt {_shortened(prompt)} is spelt in bytes: the model hardly knows its characters"
        )

    def generate(
        self,
        prompts: str | Sequence[str],
        *,
        n: int = 1,
        seed: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        batch_size: int = DEFAULT_BATCH_SIZE,
    ) -> list[Picture]:
        """Draw ``n`` pictures of each prompt, prompt by prompt; see ``iterate``."""
        sampling = self.sampling(temperature, top_k, top_p)
        return list(self.iterate(prompts, n=n, seed=seed, sampling=sampling, batch_size=batch_size))

    def iterate(
        self,
        prompts: str | Sequence[str],
        *,
        n: int = 1,
        seed: int | None = None,
        sampling: Sampling | None = None,
        batch_size: int = DEFAULT_BATCH_SIZE,
        on_code: Callable[[int, int], None] | None = None,
    ) -> Iterator[Picture]:
        """Like ``generate``, but yields pictures as batches of ``batch_size`` are done.

        Picture i of a prompt depends on the prompt, the seed, i and the sampling settings, and not on the batch.
        Without a ``seed`` one is chosen; the pictures carry it. ``on_code(done, total)`` counts the codes of the
        current batch. Raises InputError for a prompt that cannot be drawn.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if n < 1:
            raise InputError(f"the number of pictures must be at least 1, got {n}")
        if batch_size < 1:
            raise InputError(f"the batch size must be at least 1, got {batch_size}")
        for prompt in prompts:
            if (problem := self.problem_with(prompt)) is not None:
                raise InputError(problem)
        seed = checked_seed(seed)
        sampling = sampling or self.model.config.sampling

        wanted = [(prompt, index) for prompt in prompts for index in range(n)]
        for first in range(0, len(wanted), batch_size):
            chunk = [
                Wish(prompt=prompt, seed=seed, index=index) for prompt, index in wanted[first : first + batch_size]
            ]
            yield from self.draw(chunk, sampling, on_code)

    def draw(
        self, wishes: Sequence[Wish], sampling: Sampling, on_code: Callable[[int, int], None] | None = None
    ) -> list[Picture]:
        """Draw a batch of pictures, each with a prompt, seed and number of its own."""
        if "generate" not in self.model.config.tasks:
            raise InputError(
                f"{self.name} was not trained to draw; its tasks are: {', '.join(self.model.config.tasks)}"
            )
        layout, grid = self.model.config.layouts["generate"], self.model.config.grid
        jobs = [
            Job(
                row=layout.arrange(self.vocabulary, text=self.text_tokenizer.encode(wish.prompt)),
                seed=wish.seed,
                image=wish.index,
            )
            for wish in wishes
        ]
        filled = fill(self.transformer, self.vocabulary, jobs, sampling, on_code)
        codes = np.stack([row.ids[job.row.spans["image"]] for row, job in zip(filled, jobs, strict=True)])
        codes = codes.reshape(-1, grid, grid)
        return [
            Picture.of(pixels, wish=wish, codes=own_codes, log_probability=row.log_probability, sampling=sampling)
            for pixels, wish, own_codes, row in zip(self.pixels(codes), wishes, codes, filled, strict=True)
        ]

    def pixels(self, codes: np.ndarray) -> np.ndarray:
        """(B, 8G, 8G, 3) uint8 pictures of (B, G, G) codes."""
        images = self.image_tokenizer.decode(torch.from_numpy(codes).to(self.placement.device))
        return (images * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def checked_seed(seed: int | None) -> int:
    """``seed``, or a new one; InputError outside 0 … 2**63 - 1."""
    if seed is None:
        return secrets.randbelow(2**31)
    if not 0 <= seed <= MAX_SEED:
        raise InputError(f"the seed must be from 0 to {MAX_SEED}, got {seed}")
    return seed


def _shortened(prompt: str, length: int = 20) -> str:
    return f"“{prompt}”" if len(prompt) <= length else f"“{prompt[:length]}…”"
