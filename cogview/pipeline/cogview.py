"""``CogView``: a model of one checkpoint folder, and what it does for people."""

# B pictures of a batch, G codes on a side
from __future__ import annotations

import secrets
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeVar

import numpy as np
import torch
from PIL import Image

from cogview.checkpoints.adapter import Adapter, merge_adapter
from cogview.checkpoints.checkpoint import Model, check_folder, load_model
from cogview.checkpoints.precision import stored_quantization
from cogview.checkpoints.registry import load_registry, resolve_bundle, resolve_checkpoint
from cogview.checkpoints.safetensors_io import WeightsFile
from cogview.device import DevicePlacement, choose_placement
from cogview.errors import InputError
from cogview.formatting import shorten
from cogview.generation.beam_search import beam_search
from cogview.generation.decode import decode
from cogview.generation.requests import DecodingProgress, DecodingRequest, DecodingResult, DecodingStopped
from cogview.generation.sampling import MAX_SEED
from cogview.generation.scoring import score
from cogview.generation.speculative import max_window, uses_cuda_graphs
from cogview.generation.token_sampler import candidate_ids
from cogview.image_io.reading import fit
from cogview.modeling.config import GREEDY, ModelConfig, Sampling
from cogview.modeling.lora import QUANTIZED_MESSAGE, has_adapter
from cogview.modeling.transformer import Transformer
from cogview.pipeline.bundle import Bundle
from cogview.planning.batches import BatchPlanner
from cogview.planning.inference import beam_search_bytes, decode_bytes, image_bytes, score_bytes, smaller_formats
from cogview.tokenizers.layouts import Layout, TokenSequence
from cogview.tokenizers.text import TextTokenizer
from cogview.tokenizers.vocabulary import TokenKind, Vocabulary
from cogview.tokenizers.windows import Window, upscale_steps
from cogview.vqvae.codec import to_float, to_uint8
from cogview.vqvae.model import PIXELS_PER_CODE, VQVAE

MIN_BEAMS = 4
KV_DTYPES = ("auto", "int8")
SHOWN = 20  # characters of a prompt in a message
BYTE_FALLBACK_WARNING = 0.3  # share of a prompt spelt in bytes from which on a model hardly knows its characters

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


@dataclass(frozen=True, kw_only=True, eq=False)
class GenerationRequest:
    """One picture to draw or caption to write. ``index`` is its number among those of a prompt or an image: noise is
    keyed by (seed, index).

    ``codes`` are what is given: to "generate" the first rows (R, G) of the picture, to "upscale" its (G, G) codes, to
    "low_level" those (G/2, G/2) of the small one, to "caption" those (G, G) of the image.
    """

    prompt: str = ""
    seed: int
    index: int = 0
    task: str = "generate"
    codes: np.ndarray | None = None
    sampling: Sampling | None = None  # None: the model's own for the task


@dataclass(frozen=True, kw_only=True)
class GenerationProgress:
    """Where the drawing of some wishes stands, for who watches it: after every line of codes or so."""

    requests: tuple[GenerationRequest, ...]  # that are being done at this time
    num_new: int  # codes or pieces since the last time, of all of them together
    done: int  # of the blanks of the longest
    total: int
    codes: Callable[[], list[np.ma.MaskedArray]]  # (G, G) of each picture so far, masked where nothing is drawn


ProgressCallback: TypeAlias = Callable[[GenerationProgress], object]


class GeneratedImage(Image.Image):
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
        cls,
        pixels: np.ndarray,
        *,
        wish: GenerationRequest,
        codes: np.ndarray,
        log_probability: float,
        sampling: Sampling,
    ) -> GeneratedImage:
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

    def __init__(self, model: Model, placement: DevicePlacement, name: str, bundle: Bundle | None = None) -> None:
        """With a ``bundle``, the transformer of ``model`` is a shape: each task has one of its own."""
        self.model = model
        self.placement = placement
        self.name = name
        self.bundle = bundle
        self.folder: Path | None = None  # the checkpoint folder, unless it is a bundle
        self.adapter: Path | None = None  # the folder of that which was merged when the model was opened
        self.int8_cache = False  # whether keys and values are kept in int8
        self.parallel: int | None = None  # the most codes to guess at one go, 1 for none, None for what pays
        # An adapter that is being learnt stands in front of weights, which packed ones would not see.
        if bundle is None and placement.quantization is None and not has_adapter(model.transformer):
            model.transformer.prepack()

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path = "cogview-emoji",
        *,
        device: str = "auto",
        dtype: str = "auto",
        kv_dtype: str = "auto",
        adapter: str | Path | None = None,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
    ) -> CogView:
        """Open a model.

        Args:
            name: A checkpoint folder, a model or bundle that ``cogview models`` lists, or owner/name of a model on the
                Hugging Face Hub; the first that exists.
            device: auto, cpu, cuda, cuda:N or mps.
            dtype: auto, float32, bfloat16, float16, int8 or int4.
            kv_dtype: The format of keys and values: auto (as ``dtype`` computes) or int8.
            adapter: A LoRA adapter to merge into the weights: its folder, or owner/name on the Hub.
            revision: Of a model on the Hub: a branch, a tag or a commit.
            cache_dir: For models of the Hub; the cache of ``huggingface_hub`` by default.

        Returns:
            The model, ready to generate.

        Raises:
            InputError: The name is unknown, the model cannot be fetched, its folder is incomplete or damaged, or the
                adapter belongs to another model.
        """
        if kv_dtype not in KV_DTYPES:
            raise InputError(f"kv-dtype {kv_dtype!r} is unknown; known: {', '.join(KV_DTYPES)}")
        parts = resolve_bundle(str(name)) if revision is None else {}
        if parts:
            folder = next(iter(parts.values()))
        else:
            folder = resolve_checkpoint(str(name), revision=revision, cache_dir=cache_dir)
        count = check_folder(folder).transformer.num_parameters
        stored = stored_quantization(WeightsFile(folder / "model.safetensors").specs)
        placement = choose_placement(device, dtype, stored=stored, num_parameters=count)
        if adapter is not None:  # before the weights are read, which may take minutes
            if parts:
                rows = ", ".join(load_registry()[str(name)].models)
                raise InputError(f"{name} stands for several models, an adapter belongs to one: name one of {rows}")
            Adapter(adapter).check_model(check_folder(folder), str(name))
            if placement.quantization is not None:
                raise InputError(QUANTIZED_MESSAGE)
        if parts:
            bundle = Bundle(parts, placement)
            opened = cls(bundle.model, placement, str(name), bundle)
        else:
            model = load_model(folder, placement.device, placement.dtype, placement.quantization)
            if adapter is not None:
                merge_adapter(model.transformer, adapter)
            opened = cls(model, placement, str(name))
            opened.adapter = None if adapter is None else Path(adapter)
            opened.folder = folder
        opened.int8_cache = kv_dtype == "int8"
        return opened

    @property
    def label(self) -> str:
        """What to call the weights: the model's name, and the adapter's folder if there is one."""
        return self.name if self.adapter is None else f"{self.name} + {self.adapter}"

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
            if self.bundle is not None and (part := load_registry()[self.name].parts.get(task)):
                raise InputError(
                    f"the task {task!r} of {self.name} needs {part}, which is not on this machine: "
                    f"cogview download {part}"
                )
            known = ", ".join(self.model.config.tasks)
            raise InputError(f"{self.name} was not trained for the task {task!r}; its tasks are: {known}")

    def prompt_problem(self, prompt: str) -> str | None:
        """Why ``prompt`` cannot be drawn, in one line, or None if it can."""
        if not prompt.strip():
            return "the prompt is empty; say what to draw, for example 一个红苹果"
        try:
            length = len(self.text_tokenizer.encode(prompt))
        except ValueError as error:
            return str(error)
        if length > self.model.config.max_text:
            return (
                f"the prompt “{shorten(prompt, SHOWN)}” is {length} pieces long, {self.model.config.max_text} fit; "
                "shorten it"
            )
        return None

    def prompt_warning(self, prompt: str) -> str | None:
        """A line about a prompt with characters that the model hardly knows, or None."""
        share = self.text_tokenizer.byte_share(prompt)
        if share < BYTE_FALLBACK_WARNING:
            return None
        return (
            f"{share:.0%} of the prompt “{shorten(prompt, SHOWN)}” is spelt in bytes: the model hardly knows its "
            "characters"
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
        batch_size: int | None = None,
    ) -> list[GeneratedImage]:
        """Draw ``n`` pictures of each prompt, prompt by prompt; see ``iterate``.

        With ``keep`` only so many of each prompt come back, those whose captions the prompt is most likely to be
        (``rerank``), the best first.
        """
        sampling = self.sampling(temperature, top_k, top_p, guidance, text_attention)
        if keep is not None and not 1 <= keep <= n:
            raise InputError(f"of {n} pictures of a prompt 1 to {n} can be kept, got {keep}")
        if keep is not None:
            self.require_task("caption")
        pictures = list(self.generate_iter(prompts, n=n, seed=seed, sampling=sampling, batch_size=batch_size))
        if keep is None:
            return pictures
        groups = [pictures[first : first + n] for first in range(0, len(pictures), n)]
        return [picture for group in groups for picture in self.rerank(group, batch_size=batch_size)[:keep]]

    def generate_iter(
        self,
        prompts: str | Sequence[str],
        *,
        n: int = 1,
        seed: int | None = None,
        sampling: Sampling | None = None,
        batch_size: int | None = None,
        callback: ProgressCallback | None = None,
    ) -> Iterator[GeneratedImage]:
        """Like ``generate``, but yields pictures as batches are done.

        Picture i of a prompt depends on the prompt, the seed, i and the sampling settings, and not on the batch.
        Without a ``seed`` one is chosen; the pictures carry it. ``batch_size`` is the most pictures at a time, by
        default as many as memory holds and pay. ``watch`` is called after every line of codes; where it returns False,
        no more pictures come. Raises InputError for a prompt that cannot be drawn.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        _require_positive(n, "the number of pictures")
        self._check_prompts(prompts)
        seed = resolve_seed(seed)
        wishes = [
            GenerationRequest(prompt=prompt, seed=seed, index=index, sampling=sampling)
            for prompt in prompts
            for index in range(n)
        ]
        for picture in self.run(wishes, batch_size=batch_size, callback=callback):
            assert isinstance(picture, GeneratedImage)
            yield picture

    def draw(
        self,
        requests: Sequence[GenerationRequest],
        sampling: Sampling | None = None,
        callback: ProgressCallback | None = None,
    ) -> list[GeneratedImage]:
        """Draw pictures, each with a prompt, seed and number of its own; ``sampling`` is for those without."""
        requests = [wish if wish.sampling else replace(wish, sampling=sampling) for wish in requests]
        return [picture for picture in self.run(requests, callback=callback) if isinstance(picture, GeneratedImage)]

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
        batch_size: int | None = None,
        callback: ProgressCallback | None = None,
    ) -> list[GeneratedImage]:
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
        seed = resolve_seed(seed)
        wishes = [
            GenerationRequest(prompt=text, seed=seed, index=index, codes=codes[:rows], sampling=sampling)
            for text, codes in zip(texts, self.encode_images(images), strict=True)
            for index in range(n)
        ]
        return [
            made
            for made in self.run(wishes, batch_size=batch_size, callback=callback)
            if isinstance(made, GeneratedImage)
        ]

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
        batch_size: int | None = None,
        callback: ProgressCallback | None = None,
    ) -> list[GeneratedImage]:
        """Draw each image at twice its side, in the space of codes: 2G x 2G from G x G, in nine windows.

        ``texts`` is one text for all images or one for each. ``low_level`` draws G x G codes from an image of half
        the model's side in a single window. Windows of several images, and those of one that are free of each other,
        are drawn side by side.
        """
        task = "low_level" if low_level else "upscale"
        self.require_task(task)
        texts = _one_each(texts, images, "text")
        self._check_prompts(texts)
        sampling = self.sampling(temperature, top_k, top_p, guidance, text_attention, task)
        seed = resolve_seed(seed)
        grid = self.model.config.grid
        # A picture of ours keeps its number, so that several of one prompt do not share their noise.
        wishes = [
            GenerationRequest(
                prompt=text, seed=seed, index=getattr(image, "index", 0), task=task, codes=codes, sampling=sampling
            )
            for text, image, codes in zip(
                texts, images, self.encode_images(images, grid // 2 if low_level else grid), strict=True
            )
        ]
        return [
            made
            for made in self.run(wishes, batch_size=batch_size, callback=callback)
            if isinstance(made, GeneratedImage)
        ]

    def run(
        self,
        requests: Sequence[GenerationRequest],
        *,
        batch_size: int | None = None,
        callback: ProgressCallback | None = None,
    ) -> Iterator[GeneratedImage | Caption]:
        """What is wished for, in order, as batches are done; different tasks share them.

        Prompts are taken to be checked. See ``iterate`` for ``batch_size`` and ``watch``.
        """
        requests = self._resolve_requests(requests)
        planner = self._planner(batch_size)
        with suppress(DecodingStopped):
            yield from planner.run(
                requests,
                self._requests_bytes,
                lambda chunk: self._run_batch(chunk, planner, callback),
                _named(requests),
            )

    def batch_sizes(self, requests: Sequence[GenerationRequest], *, batch_size: int | None = None) -> list[int]:
        """How many of ``wishes`` ``make`` would do at a time now: even parts, in order."""
        requests = self._resolve_requests(requests)
        return self._planner(batch_size).chunks(requests, self._requests_bytes, _named(requests))

    def _resolve_requests(self, wishes: Sequence[GenerationRequest]) -> list[GenerationRequest]:
        """The same, each with its sampling; InputError for what the weights were not trained for."""
        for task in dict.fromkeys(wish.task for wish in wishes):
            self.require_task(task)
        own = {wish.task: self._config(wish.task).sampling for wish in wishes}
        ready = [wish if wish.sampling else replace(wish, sampling=own[wish.task]) for wish in wishes]
        for task, sampling in {(wish.task, wish.sampling) for wish in ready}:
            assert sampling is not None
            self._check_guidance(sampling, task)
        return ready

    def _planner(self, batch_size: int | None) -> BatchPlanner:
        config, place = self.model.config, self.placement
        remedies = partial(
            smaller_formats, config.transformer, config.vocabulary, place.weight_format, place.device.type
        )
        return BatchPlanner(place.device, batch_size, remedies)

    def _requests_bytes(self, wishes: Sequence[GenerationRequest]) -> int:
        return self._decode_bytes([next(self._single_step_program(wish))[0] for wish in wishes])

    def _run_batch(
        self, wishes: Sequence[GenerationRequest], planner: BatchPlanner, watch: ProgressCallback | None
    ) -> list[GeneratedImage | Caption]:
        """All of ``wishes`` side by side, window by window where they take several."""
        steps = [self._single_step_program(wish) for wish in wishes]
        waiting = {index: next(one) for index, one in enumerate(steps)}
        done: dict[int, tuple[np.ndarray, float]] = {}
        while waiting:
            filled: dict[int, list[DecodingResult]] = {index: [] for index in waiting}
            transformers = [self._transformer(wishes[index].task) for index in waiting]
            for transformer in dict.fromkeys(transformers):
                jobs = [
                    (index, job)
                    for (index, own), needed in zip(waiting.items(), transformers, strict=True)
                    if needed is transformer
                    for job in own
                ]
                found = planner.run(
                    jobs,
                    lambda some: self._decode_bytes([job for _, job in some]),
                    partial(self._decode, transformer, wishes, watch),
                    _named([wishes[index] for index, _ in jobs]),
                )
                for (index, _), one in zip(jobs, found, strict=True):
                    filled[index].append(one)
            for index, found_of in filled.items():
                try:
                    waiting[index] = steps[index].send(found_of)
                except StopIteration as end:
                    del waiting[index]
                    done[index] = end.value
        return self._build_results(wishes, [done[index] for index in range(len(wishes))], planner)

    def _decode(
        self,
        transformer: Transformer,
        wishes: Sequence[GenerationRequest],
        watch: ProgressCallback | None,
        jobs: Sequence[tuple[int, DecodingRequest]],
    ) -> list[DecodingResult]:
        counted = 0

        def look(moment: DecodingProgress) -> object:
            nonlocal counted
            grid = self.model.config.grid
            if moment.done // grid == counted // grid and moment.done < moment.total:
                return True
            drawn, counted = moment.done - counted, moment.done
            assert watch is not None
            return watch(
                GenerationProgress(
                    requests=tuple(wishes[index] for index, _ in jobs),
                    num_new=drawn * len(jobs),
                    done=moment.done,
                    total=moment.total,
                    codes=lambda: [
                        self._codes_so_far(job.sequence, ids)
                        for (_, job), ids in zip(jobs, moment.sequences(), strict=True)
                    ],
                )
            )

        return decode(
            transformer,
            self.vocabulary,
            [job for _, job in jobs],
            look if watch is not None else None,
            int8_cache=self.int8_cache,
            speculative=self.parallel,
        )

    def _codes_so_far(self, row: TokenSequence, ids: np.ndarray) -> np.ma.MaskedArray:
        """(G, G) codes of the image of a row, masked where nothing is drawn yet."""
        grid, span = self.model.config.grid, row.spans["image"]
        codes = np.ma.masked_all(grid * grid, dtype=np.int64)
        codes[: span.stop - span.start] = np.ma.masked_equal(ids[span], self.vocabulary.pad)
        return codes.reshape(grid, grid)

    def _build_results(
        self, wishes: Sequence[GenerationRequest], done: Sequence[tuple[np.ndarray, float]], planner: BatchPlanner
    ) -> list[GeneratedImage | Caption]:
        """Pictures from codes, in as large parts as memory holds, and captions from pieces."""
        made: list[GeneratedImage | Caption | None] = [None] * len(wishes)
        sides = {index: len(ids) for index, (ids, _) in enumerate(done) if wishes[index].task != "caption"}
        for side in dict.fromkeys(sides.values()):
            members = [index for index, own in sides.items() if own == side]
            each = image_bytes(self.image_tokenizer.config, side, decoding=True)
            pixels = planner.run(
                members,
                partial(_times, each),
                lambda some: list(self.decode_images(np.stack([done[index][0] for index in some]))),
                "decoding pixels",
            )
            for index, own in zip(members, pixels, strict=True):
                codes, log_probability = done[index]
                wish = wishes[index]
                assert wish.sampling is not None
                made[index] = GeneratedImage.of(
                    own, wish=wish, codes=codes, log_probability=log_probability, sampling=wish.sampling
                )
        for index, (ids, log_probability) in enumerate(done):
            if wishes[index].task == "caption":
                made[index] = self._caption(ids, log_probability, wishes[index])
        return [one for one in made if one is not None]

    def _single_step_program(
        self, wish: GenerationRequest
    ) -> Generator[list[DecodingRequest], list[DecodingResult], tuple[np.ndarray, float]]:
        """The jobs of a wish, those that are free of each other together.

        It is sent what they were filled with, and returns the codes of the picture or the ids of the caption, and their
        log-probability.
        """
        config, layout = self.model.config, self.model.config.layouts[wish.task]
        if wish.task == "caption":
            assert wish.codes is not None
            row = layout.arrange(self.vocabulary, image=wish.codes, max_text=config.caption_positions)
            (filled,) = yield [self._job(wish, row)]
            return filled.ids[row.spans["text"]], filled.log_probability
        text, grid = self.text_tokenizer.encode(wish.prompt), config.grid
        if wish.task == "upscale":
            return (yield from self._windowed_upscale_program(wish, text))
        given = np.empty((0, grid), dtype=np.int64) if wish.codes is None else wish.codes
        name = "small" if wish.task == "low_level" else "image"

        def arrange(text: Sequence[int]) -> TokenSequence:
            return layout.arrange(self.vocabulary, **{"text": text, name: given})  # type: ignore[arg-type]

        row = arrange(text)
        (filled,) = yield [self._job(wish, row, unconditional=arrange(()) if _guided(wish) else None)]
        return filled.ids[row.spans["image"]].reshape(grid, grid), filled.log_probability

    def _windowed_upscale_program(
        self, wish: GenerationRequest, text: Sequence[int]
    ) -> Generator[list[DecodingRequest], list[DecodingResult], tuple[np.ndarray, float]]:
        """Codes (2G, 2G) of the image whose codes are given, and their log-probability."""
        small = wish.codes
        assert small is not None
        layout, grid = self.model.config.layouts["upscale"], self.model.config.grid
        side = 2 * grid
        codes = np.ma.masked_all((side, side), dtype=np.int64)
        # Where a code lies in the whole picture; behind the places of the small one, whose noise is not used again.
        places = grid * grid + np.arange(side * side).reshape(side, side)
        total = 0.0
        for together in upscale_steps(grid):
            jobs = []
            for window in together:
                rows, columns = window.target
                whole = (slice(rows.start, rows.start + grid), columns)

                def arrange(text: Sequence[int], window: Window = window, whole: Any = whole) -> TokenSequence:
                    row = layout.arrange(self.vocabulary, text=text, small=small[window.source], image=codes[whole])
                    return row.truncate(row.spans["image"].start + window.lines * grid)

                row = arrange(text)
                keys = np.zeros(len(row), dtype=np.int64)
                keys[row.spans["image"]] = places[whole][: window.lines].reshape(-1)
                jobs.append(
                    self._job(wish, row, noise_positions=keys, unconditional=arrange(()) if _guided(wish) else None)
                )
            filled = yield jobs
            for window, job, one in zip(together, jobs, filled, strict=True):
                codes[window.target] = one.ids[job.sequence.spans["image"]].reshape(window.lines, grid)
                total += one.log_probability
        return codes.filled(), total

    def _job(self, wish: GenerationRequest, row: TokenSequence, **rest: Any) -> DecodingRequest:
        assert wish.sampling is not None
        return DecodingRequest(sequence=row, seed=wish.seed, image=wish.index, sampling=wish.sampling, **rest)

    def _candidate_ids(self, row: TokenSequence) -> range:
        """The ids that the last blank of a row may take."""
        return candidate_ids(self.vocabulary, TokenKind(row.kinds[row.blanks][-1]), row.stop)

    def _decode_bytes(self, jobs: Sequence[DecodingRequest]) -> int:
        transformer, device = self.model.transformer, self.placement.device
        most = self.parallel or max_window(device, len(jobs), packed=transformer.packed_layers is not None)
        told = {self._candidate_ids(job.sequence) for job in jobs}
        return transformer.prepack_bytes(*told) + decode_bytes(
            self.model.config.transformer,
            self.vocabulary,
            jobs,
            dtype=self.placement.weight_format,
            device_type=device.type,
            int8_cache=self.int8_cache,
            parallel=most if most > 1 or uses_cuda_graphs(device) else None,
        )

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
        batch_size: int | None = None,
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
        seed = resolve_seed(seed)
        wishes = [
            GenerationRequest(seed=seed, index=index, task="caption", codes=codes, sampling=sampling)
            for codes in self.encode_images(images)
            for index in range(n)
        ]
        if method == "beam":
            return self._search_captions(wishes[::n], n, batch_size)
        made = [made for made in self.run(wishes, batch_size=batch_size) if isinstance(made, Caption)]
        return [made[first : first + n] for first in range(0, len(made), n)]

    def _search_captions(
        self, wishes: Sequence[GenerationRequest], n: int, batch_size: int | None
    ) -> list[list[Caption]]:
        """The ``n`` most probable captions of each image."""
        beams = max(n, MIN_BEAMS)
        planner = self._planner(batch_size)
        rows = [job.sequence for wish in wishes for job in next(self._single_step_program(wish))]
        transformer = self._transformer("caption")

        def beams_bytes(some: Sequence[TokenSequence]) -> int:
            place = self.placement
            return transformer.prepack_bytes(self._candidate_ids(some[0])) + beam_search_bytes(
                self.model.config.transformer,
                self.vocabulary,
                some,
                beams,
                dtype=place.weight_format,
                device_type=place.device.type,
            )

        found = planner.run(
            rows,
            beams_bytes,
            lambda some: beam_search(transformer, self.vocabulary, some, beams),
            f"captions by {beams} beams",
        )
        return [
            [
                self._caption(one.ids[row.spans["text"]], one.log_probability, replace(wish, index=index))
                for index, one in enumerate(ones[:n])
            ]
            for wish, row, ones in zip(wishes, rows, found, strict=True)
        ]

    def _caption(self, text: np.ndarray, log_probability: float, wish: GenerationRequest) -> Caption:
        ends = np.flatnonzero(~np.isin(text, self.vocabulary.text))
        pieces = text[: ends[0] if len(ends) else None] - self.vocabulary.text.start
        return Caption(
            text=self.text_tokenizer.decode(pieces.tolist()),
            log_probability=log_probability,
            num_pieces=len(pieces),
            seed=wish.seed,
            index=wish.index,
        )

    def score(
        self, images: Sequence[Image.Image], texts: str | Sequence[str], *, batch_size: int | None = None
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
            for codes, text in zip(self.encode_images(images), texts, strict=True)
        ]
        transformer = self._transformer("caption")

        def rows_bytes(some: Sequence[TokenSequence]) -> int:
            told = range(self.vocabulary.text.start, self.vocabulary.padded_size)
            return transformer.prepack_bytes(told) + score_bytes(
                self.model.config.transformer,
                self.vocabulary,
                some,
                dtype=self.placement.weight_format,
                device_type=self.placement.device.type,
            )

        sums = self._planner(batch_size).run(
            rows, rows_bytes, lambda some: score(transformer, self.vocabulary, some), "scoring"
        )
        lengths = [row.spans["text"].stop - row.spans["text"].start for row in rows]
        return [Score(log_probability=total, num_pieces=length) for total, length in zip(sums, lengths, strict=True)]

    def rerank(self, pictures: Sequence[GeneratedImage], *, batch_size: int | None = None) -> list[GeneratedImage]:
        """``pictures`` by how probable their prompts are as captions of them, the best first; they carry the scores."""
        scores = self.score(pictures, [picture.prompt for picture in pictures], batch_size=batch_size)
        for picture, own in zip(pictures, scores, strict=True):
            picture.score = own
        return sorted(pictures, key=lambda picture: -picture.score.log_probability if picture.score else 0.0)

    def encode_images(
        self, images: Sequence[Image.Image], grid: int | None = None, batch_size: int | None = None
    ) -> np.ndarray:
        """(B, grid, grid) int64 codes of images; ``grid`` is the model's own where it is not given.

        A ``Picture`` gives the codes it was drawn with. Any other image is fitted to the size (``images.fit``) and
        encoded.
        """
        side = grid or self.model.config.grid
        codes = np.empty((len(images), side, side), dtype=np.int64)
        others = []
        for index, image in enumerate(images):
            own = getattr(image, "codes", None)
            if own is not None and own.shape == (side, side):
                codes[index] = own
            else:
                others.append((index, fit(image, side * PIXELS_PER_CODE)[0]))

        def encode(some: Sequence[tuple[int, np.ndarray]]) -> list[np.ndarray]:
            images_N3HW = to_float(np.stack([pixels for _, pixels in some]), self.placement.device)
            with torch.inference_mode():
                return list(self.image_tokenizer.encode(images_N3HW).cpu().numpy())

        each = image_bytes(self.image_tokenizer.config, side, decoding=False)
        found = self._planner(batch_size).run(
            others,
            partial(_times, each),
            encode,
            "encoding images",
        )
        for (index, _), own in zip(others, found, strict=True):
            codes[index] = own
        return codes

    def decode_images(self, codes: np.ndarray) -> np.ndarray:
        """(B, 8G, 8G, 3) uint8 pictures of (B, G, G) codes, for any G."""
        return to_uint8(self.image_tokenizer.decode(torch.from_numpy(codes).to(self.placement.device)))

    def _transformer(self, task: str) -> Transformer:
        return self.model.transformer if self.bundle is None else self.bundle.transformer(task)

    def _config(self, task: str) -> ModelConfig:
        """The config of the weights that do ``task``."""
        return self.model.config if self.bundle is None else self.bundle.configs.get(task, self.model.config)

    def _check_prompts(self, prompts: Sequence[str]) -> None:
        for prompt in prompts:
            if (problem := self.prompt_problem(prompt)) is not None:
                raise InputError(problem)

    def _check_guidance(self, sampling: Sampling, task: str) -> None:
        if sampling.guidance != 1 and not self._config(task).caption_dropout:
            raise InputError(
                f"{self.name} was trained without leaving captions out, so it cannot be guided: guidance must be 1, "
                f"got {sampling.guidance:g}; try text attention instead"
            )


def resolve_seed(seed: int | None) -> int:
    """``seed``, or a new one; InputError outside 0 … 2**63 - 1."""
    if seed is None:
        return secrets.randbelow(2**31)
    if not 0 <= seed <= MAX_SEED:
        raise InputError(f"the seed must be from 0 to {MAX_SEED}, got {seed}")
    return seed


def _times(each: int, some: Sequence[object]) -> int:
    return each * len(some)


def _guided(wish: GenerationRequest) -> bool:
    return wish.sampling is not None and wish.sampling.guidance != 1


def _named(wishes: Sequence[GenerationRequest]) -> str:
    """What a batch of wishes is, in words."""
    names = {"generate": "drawing", "caption": "captions", "upscale": "upscaling", "low_level": "upscaling"}
    return " and ".join(dict.fromkeys(names[wish.task] for wish in wishes))


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
