"""``CogView``: a model of one checkpoint folder, and what it does for people."""

# B pictures of a batch, G codes on a side
from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from PIL import Image

from cogview.bundle import Bundle
from cogview.checkpoints.folder import Model, ModelConfig, check_folder, load_model
from cogview.checkpoints.precision import stored_few_bits
from cogview.checkpoints.registry import find_checkpoint, find_parts, known_models
from cogview.checkpoints.weights import WeightsFile
from cogview.device import Placement, choose_placement
from cogview.engine import Filled, Job, fill, score, search
from cogview.errors import InputError
from cogview.images import fit
from cogview.sampling import GREEDY, MAX_SEED, Sampling
from cogview.tokenizers.layouts import Arranged, Layout, upscale_windows
from cogview.tokenizers.text import TextTokenizer
from cogview.tokenizers.vocabulary import Vocabulary
from cogview.transformer import Transformer
from cogview.vqvae.model import PIXELS_PER_CODE, VQVAE

DEFAULT_BATCH_SIZE = 16
LEAST_BEAMS = 4
MANY_BYTES = 0.3  # share of a prompt spelt in bytes from which on a model hardly knows its characters

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Caption:
    """A text that the model wrote of an image. ``index`` is its number among the captions of that image."""

    text: str
    log_probability: float  # of the whole text and its stop, in nats
    num_pieces: int
    seed: int
    index: int


@dataclass(frozen=True, kw_only=True)
class Score:
    """How probable a text is given an image."""

    log_probability: float  # in nats, summed over its pieces
    num_pieces: int

    @property
    def per_piece(self) -> float:
        """The mean over the pieces."""
        return self.log_probability / self.num_pieces


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
    score: Score | None = None  # of its prompt given the picture, where it was asked for

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

    def __init__(self, model: Model, placement: Placement, name: str, bundle: Bundle | None = None) -> None:
        """With a ``bundle``, the transformer of ``model`` is a shape: each task has one of its own."""
        self.model = model
        self.placement = placement
        self.name = name
        self.bundle = bundle

    @classmethod
    def from_pretrained(
        cls, name: str | Path = "cogview-emoji", *, device: str = "auto", dtype: str = "auto"
    ) -> CogView:
        """Open a model or a bundle of checkpoints.yaml by name, or a checkpoint folder by path.

        ``device`` is auto, cpu, cuda, cuda:N or mps, ``dtype`` auto, float32, bfloat16, float16, int8 or int4. Raises
        InputError for an unknown name, and for a folder that is incomplete or damaged.
        """
        parts = find_parts(str(name))
        folder = next(iter(parts.values())) if parts else find_checkpoint(str(name))
        count = check_folder(folder).transformer.num_parameters
        stored = stored_few_bits(WeightsFile(folder / "model.safetensors").specs)
        placement = choose_placement(device, dtype, stored=stored, num_parameters=count)
        if parts:
            bundle = Bundle(parts, placement)
            return cls(bundle.model, placement, str(name), bundle)
        model = load_model(folder, placement.device, placement.dtype, placement.few_bits)
        return cls(model, placement, str(name))

    @property
    def transformer(self) -> Transformer:
        """The transformer; in a bundle that of the first of its tasks."""
        return self._transformer(self.model.config.tasks[0])

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
        self,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        guidance: float | None = None,
        text_attention: float | None = None,
        task: str = "generate",
    ) -> Sampling:
        """The model's own settings for ``task``, with those that are given in their place.

        InputError where they mean nothing.
        """
        given: dict[str, Any] = {
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "guidance": guidance,
            "text_attention": text_attention,
        }
        try:
            sampling = replace(self._config(task).sampling, **{k: v for k, v in given.items() if v is not None})
        except ValueError as error:
            raise InputError(str(error)) from None
        self._check_guidance(sampling, task)
        return sampling

    def require_task(self, task: str) -> None:
        """InputError unless the weights were trained for ``task``: "generate", "caption", "upscale" or "low_level"."""
        if task not in self.model.config.tasks:
            if self.bundle is not None and (part := known_models()[self.name].parts.get(task)):
                raise InputError(
                    f"the task {task!r} of {self.name} needs {part}, which is not on this machine: "
                    f"cogview download {part}"
                )
            known = ", ".join(self.model.config.tasks)
            raise InputError(f"{self.name} was not trained for the task {task!r}; its tasks are: {known}")

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
        keep: int | None = None,
        seed: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        guidance: float | None = None,
        text_attention: float | None = None,
        batch_size: int = DEFAULT_BATCH_SIZE,
    ) -> list[Picture]:
        """Draw ``n`` pictures of each prompt, prompt by prompt; see ``iterate``.

        With ``keep`` only so many of each prompt come back, those whose captions the prompt is most likely to be
        (``rerank``), the best first.
        """
        sampling = self.sampling(temperature, top_k, top_p, guidance, text_attention)
        if keep is not None and not 1 <= keep <= n:
            raise InputError(f"of {n} pictures of a prompt 1 to {n} can be kept, got {keep}")
        if keep is not None:
            self.require_task("caption")
        pictures = list(self.iterate(prompts, n=n, seed=seed, sampling=sampling, batch_size=batch_size))
        if keep is None:
            return pictures
        groups = [pictures[first : first + n] for first in range(0, len(pictures), n)]
        return [picture for group in groups for picture in self.rerank(group, batch_size=batch_size)[:keep]]

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
        _require_positive(n, "the number of pictures")
        self._check_prompts(prompts)
        seed = checked_seed(seed)
        wishes = [Wish(prompt=prompt, seed=seed, index=index) for prompt in prompts for index in range(n)]
        for chunk in _chunks(wishes, batch_size):
            yield from self.draw(chunk, sampling or self._config("generate").sampling, on_code)

    def draw(
        self, wishes: Sequence[Wish], sampling: Sampling, on_code: Callable[[int, int], None] | None = None
    ) -> list[Picture]:
        """Draw a batch of pictures, each with a prompt, seed and number of its own."""
        grid = self.model.config.grid
        return self._draw(wishes, np.empty((len(wishes), 0, grid), dtype=np.int64), sampling, on_code)

    def complete(
        self,
        images: Sequence[Image.Image],
        prompts: str | Sequence[str],
        *,
        rows: int,
        n: int = 1,
        seed: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        guidance: float | None = None,
        text_attention: float | None = None,
        batch_size: int = DEFAULT_BATCH_SIZE,
        on_code: Callable[[int, int], None] | None = None,
    ) -> list[Picture]:
        """Keep the first ``rows`` rows of codes of each image and draw the others, ``n`` times each, image by image.

        ``prompts`` is one text for all images or one for each. Raises InputError for ``rows`` outside 0 to G - 1.
        """
        grid = self.model.config.grid
        if not 0 <= rows < grid:
            raise InputError(f"the rows to keep must be from 0 to {grid - 1} of {grid}, got {rows}")
        _require_positive(n, "the number of pictures")
        texts = _one_each(prompts, images, "prompt")
        self._check_prompts(texts)
        sampling = self.sampling(temperature, top_k, top_p, guidance, text_attention)
        seed = checked_seed(seed)
        known = self.codes_of(images)[:, :rows]
        orders = [
            (Wish(prompt=text, seed=seed, index=index), top)
            for text, top in zip(texts, known, strict=True)
            for index in range(n)
        ]
        return [
            picture
            for chunk in _chunks(orders, batch_size)
            for picture in self._draw(
                [wish for wish, _ in chunk], np.stack([top for _, top in chunk]), sampling, on_code
            )
        ]

    def _draw(
        self,
        wishes: Sequence[Wish],
        known: np.ndarray,
        sampling: Sampling,
        on_code: Callable[[int, int], None] | None,
    ) -> list[Picture]:
        """Draw pictures whose first rows of codes are ``known`` (B, rows, G)."""
        self.require_task("generate")
        self._check_guidance(sampling, "generate")
        layout = self.model.config.layouts["generate"]
        jobs = [
            Job(
                row=layout.arrange(self.vocabulary, text=self.text_tokenizer.encode(wish.prompt), image=top),
                seed=wish.seed,
                image=wish.index,
                sampling=sampling,
                unguided=None if sampling.guidance == 1 else layout.arrange(self.vocabulary, text=(), image=top),
            )
            for wish, top in zip(wishes, known, strict=True)
        ]
        filled = fill(self._transformer("generate"), self.vocabulary, jobs, on_code)
        codes = np.stack([row.ids[job.row.spans["image"]] for row, job in zip(filled, jobs, strict=True)])
        return self._pictures(
            codes.reshape(-1, self.model.config.grid, self.model.config.grid),
            wishes,
            [row.log_probability for row in filled],
            sampling,
        )

    def upscale(
        self,
        images: Sequence[Image.Image],
        texts: str | Sequence[str],
        *,
        seed: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        guidance: float | None = None,
        text_attention: float | None = None,
        low_level: bool = False,
        batch_size: int = DEFAULT_BATCH_SIZE,
        on_code: Callable[[int, int], None] | None = None,
    ) -> list[Picture]:
        """Draw each image at twice its side, in the space of codes: 2G x 2G from G x G, in nine windows.

        ``texts`` is one text for all images or one for each. ``low_level`` draws G x G codes from an image of half
        the model's side in a single window. ``on_code(done, total)`` counts the codes of the current window.
        """
        task = "low_level" if low_level else "upscale"
        self.require_task(task)
        texts = _one_each(texts, images, "text")
        self._check_prompts(texts)
        sampling = self.sampling(temperature, top_k, top_p, guidance, text_attention, task)
        seed = checked_seed(seed)
        grid = self.model.config.grid
        small = self.codes_of(images, grid // 2 if low_level else grid)
        draw = self._one_window if low_level else self._nine_windows
        # A picture of ours keeps its number, so that several of one prompt do not share their noise.
        orders = [
            (Wish(prompt=text, seed=seed, index=getattr(image, "index", 0)), codes)
            for text, image, codes in zip(texts, images, small, strict=True)
        ]
        pictures: list[Picture] = []
        for chunk in _chunks(orders, batch_size):
            wishes = [wish for wish, _ in chunk]
            codes, log_probabilities = draw(np.stack([own for _, own in chunk]), wishes, sampling, on_code)
            pictures += self._pictures(codes, wishes, log_probabilities, sampling)
        return pictures

    def _nine_windows(
        self,
        small: np.ndarray,
        wishes: Sequence[Wish],
        sampling: Sampling,
        on_code: Callable[[int, int], None] | None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Codes (B, 2G, 2G) of the images whose codes are ``small`` (B, G, G), and their log-probabilities (B,)."""
        grid = self.model.config.grid
        side = 2 * grid
        codes = np.ma.masked_all((len(small), side, side), dtype=np.int64)
        # Where a code lies in the whole picture; behind the places of the small one, whose noise is not used again.
        places = grid * grid + np.arange(side * side).reshape(side, side)
        log_probabilities = np.zeros(len(small))
        for window in upscale_windows(grid):
            rows, columns = window.target
            whole = (slice(rows.start, rows.start + grid), columns)
            seen = small[:, window.source[0], window.source[1]]
            known = codes[:, whole[0], whole[1]]
            filled = self._window("upscale", seen, known, places[whole], window.lines, wishes, sampling, on_code)
            codes[:, rows, columns] = np.stack([lines for lines, _ in filled])
            log_probabilities += [log_probability for _, log_probability in filled]
        return codes.filled(), log_probabilities

    def _one_window(
        self,
        small: np.ndarray,
        wishes: Sequence[Wish],
        sampling: Sampling,
        on_code: Callable[[int, int], None] | None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Codes (B, G, G) of the images whose codes are ``small`` (B, G/2, G/2), and their log-probabilities (B,)."""
        grid = self.model.config.grid
        unknown = np.ma.masked_all((len(small), grid, grid), dtype=np.int64)
        places = np.arange(grid * grid).reshape(grid, grid)
        filled = self._window("low_level", small, unknown, places, grid, wishes, sampling, on_code)
        return np.stack([lines for lines, _ in filled]), np.array([log_probability for _, log_probability in filled])

    def _window(
        self,
        task: str,
        small: np.ndarray,
        known: np.ma.MaskedArray,
        places: np.ndarray,
        lines: int,
        wishes: Sequence[Wish],
        sampling: Sampling,
        on_code: Callable[[int, int], None] | None,
    ) -> list[tuple[np.ndarray, float]]:
        """The first ``lines`` lines of one window of each image, (lines, G), and the log p of what was drawn of them.

        ``small`` (B, G/2, G/2) is what they see, ``known`` (B, G, G) masks what is still to be drawn, ``places``
        (G, G) keys the noise.
        """
        layout, grid = self.model.config.layouts[task], self.model.config.grid

        def arrange(text: Sequence[int], index: int) -> Arranged:
            row = layout.arrange(self.vocabulary, text=text, small=small[index], image=known[index])
            return row.cut(row.spans["image"].start + lines * grid)

        jobs = []
        for index, wish in enumerate(wishes):
            row = arrange(self.text_tokenizer.encode(wish.prompt), index)
            keys = np.zeros(len(row), dtype=np.int64)
            keys[row.spans["image"]] = places[:lines].reshape(-1)
            jobs.append(
                Job(
                    row=row,
                    seed=wish.seed,
                    image=wish.index,
                    places=keys,
                    sampling=sampling,
                    unguided=None if sampling.guidance == 1 else arrange((), index),
                )
            )
        filled = fill(self._transformer(task), self.vocabulary, jobs, on_code)
        return [
            (row.ids[job.row.spans["image"]].reshape(lines, grid), row.log_probability)
            for row, job in zip(filled, jobs, strict=True)
        ]

    def caption(
        self,
        images: Sequence[Image.Image],
        *,
        n: int = 1,
        seed: int | None = None,
        method: Literal["greedy", "sample", "beam"] = "greedy",
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        batch_size: int = DEFAULT_BATCH_SIZE,
    ) -> list[list[Caption]]:
        """Write ``n`` captions of each image.

        ``greedy`` takes the most probable piece each time and has one caption to give, ``sample`` draws them
        (by default from the model's distribution as it is), ``beam`` finds the ``n`` most probable captions, the
        best first, with n beams but at least 4.
        """
        self.require_task("caption")
        _require_positive(n, "the number of captions")
        if method not in ("greedy", "sample", "beam"):
            raise InputError(f"the method {method!r} is unknown; known: greedy, sample, beam")
        if method == "greedy" and n > 1:
            raise InputError(f"greedy captions are always the same: {n} were asked for, use sample or beam")
        given = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
        given = {name: value for name, value in given.items() if value is not None}
        if given and method != "sample":
            raise InputError(f"{' and '.join(given)} can be set for drawn captions alone: use the method sample")
        try:
            sampling = GREEDY if method == "greedy" else Sampling(**{"top_k": 0, **given})  # type: ignore[arg-type]
        except ValueError as error:
            raise InputError(str(error)) from None
        seed = checked_seed(seed)
        config, layout = self.model.config, self.model.config.layouts["caption"]
        transformer = self._transformer("caption")
        rows = [
            layout.arrange(self.vocabulary, image=codes, max_text=config.caption_space)
            for codes in self.codes_of(images)
        ]
        captions: list[list[Caption]] = []
        for chunk in _chunks(rows, batch_size):
            if method == "beam":
                found = search(transformer, self.vocabulary, chunk, max(n, LEAST_BEAMS))
            else:
                jobs = [Job(row=row, seed=seed, image=index, sampling=sampling) for row in chunk for index in range(n)]
                filled = [one for some in _chunks(jobs, batch_size) for one in fill(transformer, self.vocabulary, some)]
                found = [filled[first : first + n] for first in range(0, len(filled), n)]
            captions += [
                [self._caption(row, one, seed, index) for index, one in enumerate(ones[:n])]
                for row, ones in zip(chunk, found, strict=True)
            ]
        return captions

    def _caption(self, row: Arranged, filled: Filled, seed: int, index: int) -> Caption:
        text = filled.ids[row.spans["text"]]
        ends = np.flatnonzero(~np.isin(text, self.vocabulary.text))
        pieces = text[: ends[0] if len(ends) else None] - self.vocabulary.text.start
        return Caption(
            text=self.text_tokenizer.decode(pieces.tolist()),
            log_probability=filled.log_probability,
            num_pieces=len(pieces),
            seed=seed,
            index=index,
        )

    def score(
        self, images: Sequence[Image.Image], texts: str | Sequence[str], *, batch_size: int = DEFAULT_BATCH_SIZE
    ) -> list[Score]:
        """How probable a text is as the caption of each image; ``texts`` is one for all or one for each.

        The sum of log p(piece | image, pieces before) over the pieces of the text, among text ids alone.
        """
        self.require_task("caption")
        texts = _one_each(texts, images, "text")
        self._check_prompts(texts)
        layout: Layout = self.model.config.layouts["score"]
        rows = [
            layout.arrange(self.vocabulary, image=codes, text=self.text_tokenizer.encode(text))
            for codes, text in zip(self.codes_of(images), texts, strict=True)
        ]
        transformer = self._transformer("caption")
        sums = [total for chunk in _chunks(rows, batch_size) for total in score(transformer, self.vocabulary, chunk)]
        lengths = [row.spans["text"].stop - row.spans["text"].start for row in rows]
        return [Score(log_probability=total, num_pieces=length) for total, length in zip(sums, lengths, strict=True)]

    def rerank(self, pictures: Sequence[Picture], *, batch_size: int = DEFAULT_BATCH_SIZE) -> list[Picture]:
        """``pictures`` by how probable their prompts are as captions of them, the best first; they carry the scores."""
        scores = self.score(pictures, [picture.prompt for picture in pictures], batch_size=batch_size)
        for picture, own in zip(pictures, scores, strict=True):
            picture.score = own
        return sorted(pictures, key=lambda picture: -picture.score.log_probability if picture.score else 0.0)

    def codes_of(
        self, images: Sequence[Image.Image], grid: int | None = None, batch_size: int = DEFAULT_BATCH_SIZE
    ) -> np.ndarray:
        """(B, grid, grid) int64 codes of images; ``grid`` is the model's own where it is not given.

        A ``Picture`` gives the codes it was drawn with. Any other image is fitted to the size (``images.fit``) and
        encoded.
        """
        grid = grid or self.model.config.grid
        codes = np.empty((len(images), grid, grid), dtype=np.int64)
        others = []
        for index, image in enumerate(images):
            own = getattr(image, "codes", None)
            if own is not None and own.shape == (grid, grid):
                codes[index] = own
            else:
                others.append((index, fit(image, grid * PIXELS_PER_CODE)[0]))
        for chunk in _chunks(others, batch_size):
            pixels = torch.from_numpy(np.stack([pixels for _, pixels in chunk])).to(self.placement.device)
            with torch.inference_mode():
                found = self.image_tokenizer.encode(pixels.permute(0, 3, 1, 2).float() / 255)
            codes[[index for index, _ in chunk]] = found.cpu().numpy()
        return codes

    def _pictures(
        self,
        codes: np.ndarray,
        wishes: Sequence[Wish],
        log_probabilities: Sequence[float] | np.ndarray,
        sampling: Sampling,
    ) -> list[Picture]:
        return [
            Picture.of(pixels, wish=wish, codes=own, log_probability=float(log_probability), sampling=sampling)
            for pixels, wish, own, log_probability in zip(
                self.pixels(codes), wishes, codes, log_probabilities, strict=True
            )
        ]

    def pixels(self, codes: np.ndarray) -> np.ndarray:
        """(B, 8G, 8G, 3) uint8 pictures of (B, G, G) codes, for any G."""
        images = self.image_tokenizer.decode(torch.from_numpy(codes).to(self.placement.device))
        return (images * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()

    def _transformer(self, task: str) -> Transformer:
        return self.model.transformer if self.bundle is None else self.bundle.transformer(task)

    def _config(self, task: str) -> ModelConfig:
        """The config of the weights that do ``task``."""
        return self.model.config if self.bundle is None else self.bundle.configs.get(task, self.model.config)

    def _check_prompts(self, prompts: Sequence[str]) -> None:
        for prompt in prompts:
            if (problem := self.problem_with(prompt)) is not None:
                raise InputError(problem)

    def _check_guidance(self, sampling: Sampling, task: str) -> None:
        if sampling.guidance != 1 and not self._config(task).caption_drop:
            raise InputError(
                f"{self.name} was trained without leaving captions out, so it cannot be guided: guidance must be 1, "
                f"got {sampling.guidance:g}; try text attention instead"
            )


def checked_seed(seed: int | None) -> int:
    """``seed``, or a new one; InputError outside 0 … 2**63 - 1."""
    if seed is None:
        return secrets.randbelow(2**31)
    if not 0 <= seed <= MAX_SEED:
        raise InputError(f"the seed must be from 0 to {MAX_SEED}, got {seed}")
    return seed


def _chunks(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    _require_positive(size, "the batch size")
    return (items[first : first + size] for first in range(0, len(items), size))


def _one_each(texts: str | Sequence[str], images: Sequence[Image.Image], what: str) -> list[str]:
    """A text for each image: the same for all, or the given ones."""
    if isinstance(texts, str):
        return [texts] * len(images)
    if len(texts) != len(images):
        raise InputError(f"{len(images)} images need one {what} or {len(images)}, got {len(texts)}")
    return list(texts)


def _require_positive(value: int, what: str) -> None:
    if value < 1:
        raise InputError(f"{what} must be at least 1, got {value}")


def _shortened(prompt: str, length: int = 20) -> str:
    return f"“{prompt}”" if len(prompt) <= length else f"“{prompt[:length]}…”"
