"""Decoding programs: a request as one or several decoding steps, which share batches with those of other requests.

A program says which sequences are pending and is advanced by their results. Its first pending sequences also serve
memory planning, so that a prompt is tokenized and arranged once.
"""

# G codes on a side of an image, T tokens of a sequence
from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from cogview.errors import InputError
from cogview.generation.requests import DecodingRequest, DecodingResult
from cogview.generation.sampling import noise_stream
from cogview.modeling.config import guidance_settings
from cogview.pipeline.context import PipelineContext
from cogview.pipeline.masks import sample_changes
from cogview.pipeline.requests import GenerationRequest
from cogview.tokenizers.layouts import TokenSequence
from cogview.tokenizers.tasks import TASKS, Task
from cogview.tokenizers.windows import Window, upscale_steps


class DecodingProgram(Protocol):
    """A request as a sequence of decoding steps.

    Attributes:
        request: The request, with its sampling settings.
        output: Once nothing is pending: the codes (H, W) of an image, or the ids (T,) of a text with its stop.
        log_probability: Log-probability of all that was sampled, in nats.
    """

    request: GenerationRequest
    output: np.ndarray
    log_probability: float

    def pending(self) -> Sequence[DecodingRequest]:
        """Return the decoding requests of the next step, which are independent of each other; none at the end."""
        ...

    def advance(self, results: Sequence[DecodingResult]) -> None:
        """Take the results of the pending requests, in their order, and go on to the next step."""
        ...


class SingleStepProgram:
    """A request whose blanks are filled in one step; a ``DecodingProgram``."""

    output: np.ndarray

    def __init__(
        self,
        request: GenerationRequest,
        sequence: TokenSequence,
        unconditional: tuple[TokenSequence, ...],
        output_shape: tuple[int, ...],
        prompt_ids: Sequence[int],
    ) -> None:
        """Start with the arranged sequence.

        Args:
            request: The request, with its sampling settings.
            sequence: Its sequence, with blanks.
            unconditional: The same with less given, for guidance (``DecodingRequest``).
            output_shape: Shape of what comes out: two sides of an image, or (-1,) for a text.
            prompt_ids: Piece ids of the prompt, on which the noise depends.
        """
        self.request = request
        self.log_probability = 0.0
        self._shape = output_shape
        self._pending = [_decoding_request(request, prompt_ids, sequence, unconditional)]

    def pending(self) -> Sequence[DecodingRequest]:
        """Return the one decoding request, or none once it is done."""
        return self._pending

    def advance(self, results: Sequence[DecodingResult]) -> None:
        """Take the result of the decoding request."""
        (step,), (result,) = self._pending, results
        span = step.sequence.spans[TASKS[self.request.task].blank_name]
        self.log_probability = result.log_probability
        self.output = result.ids[span].reshape(self._shape)
        self._pending = []


class FinishedProgram:
    """A request that changes nothing of its image; a ``DecodingProgram``.

    Args:
        request: The request, with the codes of the image.
    """

    def __init__(self, request: GenerationRequest) -> None:
        assert request.codes is not None
        self.request = request
        self.output: np.ndarray = request.codes.copy()
        self.log_probability = 0.0

    def pending(self) -> Sequence[DecodingRequest]:
        """Return nothing."""
        return ()

    def advance(self, results: Sequence[DecodingResult]) -> None:
        """Do nothing."""


class WindowedUpscaleProgram:
    """Upscaling of (G, G) codes to (2G, 2G) in nine windows; a ``DecodingProgram``.

    A window is generated from the crop of the small image that it covers, and from the codes that earlier windows have
    generated in it. Two pairs of windows are pending together.
    """

    output: np.ndarray

    def __init__(self, request: GenerationRequest, context: PipelineContext, prompt_ids: Sequence[int]) -> None:
        """Start with the first window.

        Args:
            request: The request, with its sampling settings and the (G, G) codes.
            context: The model.
            prompt_ids: Piece ids of the prompt.
        """
        if request.codes is None:
            raise InputError(f"a request of the task {request.task!r} needs the codes of an image")
        self.request = request
        self.log_probability = 0.0
        self._codes = request.codes
        self._prompt_ids = prompt_ids
        self._task = TASKS[request.task]
        self._layout, self._vocabulary = context.config.layouts[self._task.weights], context.vocabulary
        self._grid = grid = context.config.grid
        self._large = np.ma.array(np.zeros((2 * grid, 2 * grid), dtype=np.int64), mask=True)
        # Index of a code in the large image, behind those of the small one, whose noise is not used again.
        self._noise_positions = grid**2 + np.arange(4 * grid**2).reshape(2 * grid, 2 * grid)
        self._steps = upscale_steps(grid)
        self._pending = self._arrange_step()

    def pending(self) -> Sequence[DecodingRequest]:
        """Return the decoding requests of the windows that come next."""
        return self._pending

    def advance(self, results: Sequence[DecodingResult]) -> None:
        """Take the codes of the windows that were pending."""
        for window, step, result in zip(self._steps.pop(0), self._pending, results, strict=True):
            codes = result.ids[step.sequence.spans[self._task.blank_name]]
            self._large[window.target] = codes.reshape(window.lines, self._grid)
            self.log_probability += result.log_probability
        self._pending = self._arrange_step()
        if not self._steps:
            self.output = self._large.filled()

    def _arrange_step(self) -> list[DecodingRequest]:
        """Return the decoding requests of the first windows of ``self._steps``."""
        if not self._steps:
            return []
        requests = []
        for window in self._steps[0]:
            sequence = self._arrange(window, self._prompt_ids)
            positions = np.zeros(len(sequence), dtype=np.int64)
            positions[sequence.spans[self._task.blank_name]] = self._noise_positions[window.target].reshape(-1)
            rows = unconditional_inputs(self.request)
            unconditional = tuple(self._arrange(window, prompt_ids) for prompt_ids, _ in rows)
            requests.append(_decoding_request(self.request, self._prompt_ids, sequence, unconditional, positions))
        return requests

    def _arrange(self, window: Window, prompt_ids: Sequence[int]) -> TokenSequence:
        """Return the sequence of a window up to its last line."""
        blank = self._task.blank_name
        values = given_values(self._task, prompt_ids, self._codes[window.source]) | {blank: self._large[window.area]}
        sequence = self._layout.arrange(self._vocabulary, **values)
        return sequence.truncate(sequence.spans[blank].start + window.lines * self._grid)


class ProgramBuilder:
    """Builds the programs of requests; what consecutive requests share is tokenized and arranged once.

    Args:
        context: The model.
    """

    def __init__(self, context: PipelineContext) -> None:
        self._context = context
        self._layouts = context.config.layouts
        self._prompt: tuple[str, Sequence[int]] = ("", ())
        self._arranged: tuple[object, tuple[TokenSequence, tuple[TokenSequence, ...]]] | None = None

    def build(self, request: GenerationRequest) -> DecodingProgram:
        """Return the program of ``request``.

        Raises:
            InputError: If the request lacks codes that its task needs, or brings others.
        """
        task = TASKS[request.task]
        prompt_ids = self._prompt_ids(request) if "prompt" in task.inputs else ()
        if task.windowed:
            return WindowedUpscaleProgram(request, self._context, prompt_ids)
        changes = self._changes(request, task)
        if changes is not None and not changes.any():
            return FinishedProgram(request)
        where = None if changes is None else changes.tobytes()
        key = (task.name, prompt_ids, id(request.codes), where, is_guided(request), request.negative_ids)
        if self._arranged is None or self._arranged[0] != key:
            rows = [(prompt_ids, request.codes), *unconditional_inputs(request)]
            sequence, *unconditional = (self._arrange(task, *row, request.codes, changes) for row in rows)
            self._arranged = key, (sequence, tuple(unconditional))
        side = round(task.output_scale * self._context.config.grid)
        shape = (side, side) if task.output == "image" else (-1,)
        return SingleStepProgram(request, *self._arranged[1], shape, prompt_ids)

    def _changes(self, request: GenerationRequest, task: Task) -> NDArray[np.bool_] | None:
        """Return the codes (G, G) that a request changes; None for a task that gives no codes of the image."""
        if task.masked_image is None:
            return None
        grid = self._context.config.grid
        if request.codes is None or request.codes.shape != (grid, grid):
            raise InputError(f"a request of the task {request.task!r} needs the {grid} x {grid} codes of an image")
        mask = np.ones((grid, grid), dtype=bool) if request.mask is None else request.mask
        return sample_changes(mask, request.strength, seed=request.seed, index=request.index)

    def _prompt_ids(self, request: GenerationRequest) -> Sequence[int]:
        """Return the piece ids of the prompt; consecutive requests of one prompt are tokenized once."""
        if request.prompt_ids is not None:
            return request.prompt_ids
        if self._prompt[0] != request.prompt:
            self._prompt = request.prompt, tuple(self._context.text_tokenizer.encode(request.prompt))
        return self._prompt[1]

    def _arrange(
        self,
        task: Task,
        prompt_ids: Sequence[int],
        source: np.ndarray | None,
        codes: np.ndarray | None,
        changes: NDArray[np.bool_] | None,
    ) -> TokenSequence:
        """Return the sequence of a task with what is given.

        Args:
            task: The task.
            prompt_ids: Piece ids of the text.
            source: Codes of the given image, all of them masked for none, or None.
            codes: Codes that the result keeps where they do not change.
            changes: Codes to generate; None for all.
        """
        max_text = self._context.config.caption_positions if task.output == "text" else None
        values = given_values(task, prompt_ids, source)
        if changes is not None and task.masked_image is not None:
            kept: np.ma.MaskedArray = np.ma.array(codes, mask=changes)
            values |= {task.blank_name: kept} | ({task.masked_image.name: kept} if task.fills else {})
        try:
            return self._layouts[task.weights].arrange(self._context.vocabulary, max_text=max_text, **values)
        except ValueError as error:
            raise InputError(str(error)) from None


def given_values(
    task: Task, prompt_ids: Sequence[int] | NDArray[np.integer], codes: np.ndarray | None
) -> dict[str, Any]:
    """Return what a request gives, by the elements of the layout: piece ids for its texts, codes for its image.

    Args:
        task: The task.
        prompt_ids: Piece ids of the prompt.
        codes: Codes of the given image, or None.
    """
    values: dict[str, Any] = dict.fromkeys(task.given_texts, prompt_ids)
    return values if codes is None or task.given_image is None else values | {task.given_image.name: codes}


def is_guided(request: GenerationRequest) -> bool:
    """Return whether a request uses classifier-free guidance, which decodes its sequence with less given as well."""
    return any(getattr(request.sampling, name) != 1 for name in guidance_settings(TASKS[request.task]))


def unconditional_inputs(request: GenerationRequest) -> list[tuple[Sequence[int], np.ndarray | None]]:
    """Return the piece ids and the given codes of the unconditional rows of a request; none without guidance.

    Args:
        request: The request, with its sampling settings.
    """
    if not is_guided(request):
        return []
    assert request.negative_ids is not None or not request.negative
    without_text: tuple[Sequence[int], np.ndarray | None] = (request.negative_ids or (), request.codes)
    if "image_guidance" not in guidance_settings(TASKS[request.task]) or request.codes is None:
        return [without_text]
    return [((), np.ma.array(request.codes, mask=True)), without_text]


def _decoding_request(
    request: GenerationRequest,
    prompt_ids: Sequence[int],
    sequence: TokenSequence,
    unconditional: tuple[TokenSequence, ...],
    noise_positions: np.ndarray | None = None,
) -> DecodingRequest:
    """Return one decoding step of ``request``."""
    assert request.sampling is not None
    if not sequence.blanks.any():
        raise InputError(f"a request of the task {request.task!r} gives all codes, so that none are left to generate")
    return DecodingRequest(
        sequence=sequence,
        unconditional=unconditional,
        seed=request.seed,
        image=noise_stream(request.index, prompt_ids, request.sampling.noise_version),
        noise_positions=noise_positions,
        sampling=request.sampling,
    )
