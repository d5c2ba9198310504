"""The runner: requests in, images, captions and scores out, as many at a time as memory holds.

Each stage is planned by itself: decoding programs, their steps, and the images of their codes.
"""

# B sequences of a batch, T tokens of a sequence, G codes on a side of an image
from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import TypeVar

import numpy as np

from cogview.generation.beam_search import beam_search
from cogview.generation.decode import decode
from cogview.generation.requests import DecodingProgress, DecodingRequest, DecodingResult, DecodingStopped
from cogview.generation.speculative import uses_cuda_graphs, window_limits
from cogview.generation.token_sampler import candidate_ids
from cogview.modeling.transformer import Transformer
from cogview.pipeline.context import PipelineContext
from cogview.pipeline.image_codes import decode_all_images
from cogview.pipeline.programs import DecodingProgram, ProgramBuilder
from cogview.pipeline.ranking import score_requests
from cogview.pipeline.requests import GenerationRequest
from cogview.pipeline.results import Caption, GeneratedImage, GenerationProgress, ProgressCallback, Score
from cogview.planning.batch_memory import beam_search_bytes, decode_bytes
from cogview.planning.batches import BatchPlanner
from cogview.tokenizers.layouts import TokenSequence
from cogview.tokenizers.tasks import TASKS, ImageElement
from cogview.tokenizers.text import chinese_punctuation
from cogview.tokenizers.vocabulary import TokenKind

MIN_BEAMS = 4
Result = TypeVar("Result")


class RequestQueue:
    """Requests and their programs, which are built when they are first needed and kept until they are taken.

    Args:
        requests: Requests with their sampling settings.
        context: The model.
    """

    def __init__(self, requests: Sequence[GenerationRequest], context: PipelineContext) -> None:
        self._requests = requests
        self._context = context
        self._builder = ProgramBuilder(context)
        self._programs: dict[int, DecodingProgram] = {}

    def split(self, planner: BatchPlanner) -> Iterator[tuple[list[DecodingProgram], float]]:
        """Yield the programs in batches, each with the bytes that were free when it was planned."""
        for batch, free_bytes in planner.split(range(len(self._requests)), self._first_bytes, self._activity):
            programs = [self._program(index) for index in batch]
            for index in batch:
                del self._programs[index]
            yield programs, free_bytes

    def batch_sizes(self, planner: BatchPlanner) -> list[int]:
        """Return the sizes of the batches that ``split`` would yield now."""
        return planner.chunks(range(len(self._requests)), self._first_bytes, self._activity)

    @property
    def _activity(self) -> str:
        return describe_activity(self._requests)

    def _program(self, index: int) -> DecodingProgram:
        if index not in self._programs:
            self._programs[index] = self._builder.build(self._requests[index])
        return self._programs[index]

    def _first_bytes(self, indices: Sequence[int]) -> int:
        """Return the bytes that the first sequences of some programs take."""
        return _decoding_bytes(
            [step for index in indices for step in self._program(index).pending()[:1]], self._context
        )


def run_requests(
    requests: Sequence[GenerationRequest],
    context: PipelineContext,
    planner: BatchPlanner,
    callback: ProgressCallback | None = None,
) -> Iterator[GeneratedImage | Caption]:
    """Generate what is requested; different tasks share batches.

    Args:
        requests: Requests with their sampling settings.
        context: The model.
        planner: Splits requests, decoding steps and images into batches that fit in memory.
        callback: Called after every line of codes; where it returns False, generation ends.

    Yields:
        Images and captions in the order of the requests, as batches are finished.
    """
    with suppress(DecodingStopped):
        for programs, free_bytes in RequestQueue(requests, context).split(planner):
            _decode_programs(programs, context, planner, free_bytes, callback)
            yield from _build_results(programs, context, planner, free_bytes)


def search_captions(
    requests: Sequence[GenerationRequest],
    n: int,
    context: PipelineContext,
    planner: BatchPlanner,
    callback: ProgressCallback | None = None,
) -> list[list[Caption]]:
    """Return the ``n`` most probable captions of each request, found by beam search, the best first.

    Args:
        requests: One request per image.
        n: Captions of each. The search keeps ``n`` sequences, but at least ``MIN_BEAMS``.
        context: The model.
        planner: Splits the images into batches that fit in memory.
        callback: Called after every image; where it returns False, the search ends with the captions so far.
    """
    beams = max(n, MIN_BEAMS)
    builder = ProgramBuilder(context)
    sequences = [builder.build(request).pending()[0].sequence for request in requests]
    transformer, vocabulary = context.transformer_for("caption"), context.vocabulary

    def bytes_of(batch: Sequence[TokenSequence]) -> int:
        return transformer.prepack_bytes(_blank_ids(batch[0], context)) + beam_search_bytes(
            context.config.transformer,
            vocabulary,
            batch,
            beams,
            dtype=context.placement.weight_format,
            device_type=context.placement.device.type,
        )

    found = planner.run(
        sequences,
        bytes_of,
        lambda batch: beam_search(transformer, vocabulary, batch, beams),
        f"captions by {beams} beams",
    )
    captions = (
        [
            _caption(one.ids[sequence.spans["text"]], one.log_probability, replace(request, index=index), context)
            for index, one in enumerate(texts[:n])
        ]
        for request, sequence, texts in zip(requests, sequences, found, strict=True)
    )
    return _collect(captions, requests, lambda best: sum(caption.num_pieces for caption in best), callback)


def score_images(
    requests: Sequence[GenerationRequest],
    rule: str,
    context: PipelineContext,
    planner: BatchPlanner,
    callback: ProgressCallback | None = None,
) -> list[Score]:
    """Return the score of the image of each request with its prompt.

    Args:
        requests: Requests of the task ``score``, with the piece ids of the text and the codes of the image.
        rule: Name of a ranking rule.
        context: The model.
        planner: Splits the images into batches that fit in memory.
        callback: Called after every image; where it returns False, the scores so far are returned.
    """
    scores = score_requests(requests, rule, context, planner)
    return _collect(scores, requests, lambda score: score.num_pieces, callback)


def _collect(
    results: Iterable[Result],
    requests: Sequence[GenerationRequest],
    pieces_of: Callable[[Result], int],
    callback: ProgressCallback | None,
) -> list[Result]:
    """Return the result of each request; where ``callback`` returns False, those so far."""
    collected: list[Result] = []
    for request, result in zip(requests, results, strict=True):
        collected.append(result)
        if callback is None:
            continue
        codes: np.ma.MaskedArray = np.ma.array(request.codes, mask=False)
        progress = GenerationProgress(
            requests=(request,),
            num_new=pieces_of(result),
            done=len(collected),
            total=len(requests),
            codes=partial(list, (codes,)),
        )
        if callback(progress) is False:
            break
    return collected


def describe_activity(requests: Sequence[GenerationRequest]) -> str:
    """Return what a batch of requests does, in words, such as "generating, captioning"."""
    return ", ".join(dict.fromkeys(TASKS[request.task].activity for request in requests))


def _decode_programs(
    programs: Sequence[DecodingProgram],
    context: PipelineContext,
    planner: BatchPlanner,
    free_bytes: float,
    callback: ProgressCallback | None,
) -> None:
    """Advance programs side by side until nothing is pending."""
    active = [program for program in programs if program.pending()]
    while active:
        transformers = [context.transformer_for(TASKS[program.request.task].weights) for program in active]
        results: dict[DecodingProgram, list[DecodingResult]] = {program: [] for program in active}
        for transformer in dict.fromkeys(transformers):
            steps = [
                (program, step)
                for program, needed in zip(active, transformers, strict=True)
                if needed is transformer
                for step in program.pending()
            ]
            decoded = planner.run(
                steps,
                lambda batch: _decoding_bytes([step for _, step in batch], context),
                partial(_decode_steps, transformer, context, callback),
                describe_activity([program.request for program, _ in steps]),
                free_bytes=free_bytes,
            )
            for (program, _), result in zip(steps, decoded, strict=True):
                results[program].append(result)
        for program in active:
            program.advance(results[program])
        active = [program for program in active if program.pending()]


def _decode_steps(
    transformer: Transformer,
    context: PipelineContext,
    callback: ProgressCallback | None,
    steps: Sequence[tuple[DecodingProgram, DecodingRequest]],
) -> list[DecodingResult]:
    """Decode one batch."""
    return decode(
        transformer,
        context.vocabulary,
        [step for _, step in steps],
        None if callback is None else _line_callback(callback, context, steps),
        int8_cache=context.int8_cache,
        speculative=context.speculative,
    )


def _line_callback(
    callback: ProgressCallback, context: PipelineContext, steps: Sequence[tuple[DecodingProgram, DecodingRequest]]
) -> Callable[[DecodingProgress], object]:
    """Return a callback of ``decode`` that calls ``callback`` after every line of codes."""
    last, counted, grid = 0, 0, context.config.grid
    num_blanks = sum(int(step.sequence.blanks.sum()) for _, step in steps)

    def on_progress(progress: DecodingProgress) -> object:
        nonlocal last, counted
        if progress.done // grid == last // grid and progress.done < progress.total:
            return True
        before, last, counted = counted, progress.done, num_blanks * progress.done // progress.total
        return callback(
            GenerationProgress(
                requests=tuple(program.request for program, _ in steps),
                num_new=counted - before,
                done=progress.done,
                total=progress.total,
                codes=lambda: [
                    _partial_codes(program.request, step.sequence, ids, context)
                    for (program, step), ids in zip(steps, progress.sequences(), strict=True)
                ],
            )
        )

    return on_progress


def _partial_codes(
    request: GenerationRequest, sequence: TokenSequence, ids: np.ndarray, context: PipelineContext
) -> np.ma.MaskedArray:
    """Return the codes (G, G) of the image of a sequence, masked where none is sampled yet."""
    task = TASKS[request.task]
    image = task.contents[task.blank_name] if task.output == "image" else task.given_image
    assert isinstance(image, ImageElement)
    side, span = image.side(context.config.grid), sequence.spans[image.name]
    codes = np.full(side * side, context.vocabulary.pad)
    codes[: span.stop - span.start] = ids[span]
    return np.ma.array(codes, mask=codes == context.vocabulary.pad).reshape(side, side)


def _build_results(
    programs: Sequence[DecodingProgram], context: PipelineContext, planner: BatchPlanner, free_bytes: float
) -> list[GeneratedImage | Caption]:
    """Return images of codes and captions of pieces, in the order of the programs."""
    generated = [program for program in programs if TASKS[program.request.task].output == "image"]
    pixels = decode_all_images([program.output for program in generated], context, planner, free_bytes)
    images = {
        program: GeneratedImage.from_pixels(own, program.request, program.output, program.log_probability)
        for program, own in zip(generated, pixels, strict=True)
    }
    for image in images.values():
        image.model_prompt = context.convert_prompt(image.prompt)
        image.codebook_sha256 = context.config.codebook_sha256
    return [
        images[program]
        if program in images
        else _caption(program.output, program.log_probability, program.request, context)
        for program in programs
    ]


def _caption(ids: np.ndarray, log_probability: float, request: GenerationRequest, context: PipelineContext) -> Caption:
    """Return the caption of the ids (T,) of a text, which ends before the first id that is no piece."""
    vocabulary = context.vocabulary
    ends = np.flatnonzero(~np.isin(ids, vocabulary.text))
    pieces = ids[: ends[0] if len(ends) else None] - vocabulary.text.start
    return Caption(
        text=chinese_punctuation(context.text_tokenizer.decode(pieces.tolist())),
        log_probability=log_probability,
        num_pieces=len(pieces),
        seed=request.seed,
        index=request.index,
    )


def _blank_ids(sequence: TokenSequence, context: PipelineContext) -> range:
    """Return the ids that the last blank of a sequence may take."""
    return candidate_ids(context.vocabulary, TokenKind(sequence.kinds[sequence.blanks][-1]), sequence.stop)


def _decoding_bytes(steps: Sequence[DecodingRequest], context: PipelineContext) -> int:
    """Return the bytes that decoding a batch takes beside the weights."""
    if not steps:
        return 0
    transformer, device = context.planned_transformer, context.placement.device
    window = window_limits(device, transformer.cpu_layers, context.speculative).width(len(steps))
    num_blanks = max(int(step.sequence.blanks.sum()) for step in steps)  # a window is never wider
    output_ids = {_blank_ids(step.sequence, context) for step in steps}
    return transformer.prepack_bytes(*output_ids) + decode_bytes(
        context.config.transformer,
        context.vocabulary,
        steps,
        dtype=context.placement.weight_format,
        device_type=context.placement.device.type,
        int8_cache=context.int8_cache,
        max_window=min(window, num_blanks) if window > 1 or uses_cuda_graphs(device) else None,
    )
