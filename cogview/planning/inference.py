"""Estimates of the memory and time of inference, by formulas: nothing is loaded, generated or tried.

``estimate_inference`` returns an ``InferenceEstimate``. Its memory has a constant part and a part of each sequence:

    total    = layers + embedding + prepacked + image_tokenizer + workspace + overhead + rows x per_row
    per_row  = max(kv_cache + max(activations, logits), images)

The VQ-VAE runs before or after decoding, when the KV cache is freed; hence the outer maximum.

The time is a roofline: each forward pass takes the longer of its products and of the bytes it moves, plus the launch
of its kernels where these do not overlap.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from cogview.errors import InputError
from cogview.generation.token_sampler import candidate_ids
from cogview.kernels.linear import MANY_ROWS_HALF, MANY_ROWS_INT8, has_quantized_kernels
from cogview.modeling.config import ModelConfig, Sampling, TransformerConfig
from cogview.modeling.pivots import count_keys
from cogview.planning.batch_memory import SCORING_BYTES
from cogview.planning.hardware import OVERHEAD, HardwareSpeed
from cogview.planning.model_memory import (
    ACTIVATION_BYTES,
    CONVERSION_PASSES,
    UNPACKING_BYTES,
    ForwardPass,
    converted_weight_bytes,
    embedding_bytes,
    forward_bytes,
    image_bytes,
    image_tokenizer_bytes,
    layer_bytes,
    matrix_bytes,
    may_convert_weights,
    position_bytes,
    prepacked_bytes,
    sampling_bytes,
    uses_native,
    uses_prepacking,
    workspace_bytes,
)
from cogview.tokenizers.layouts import TokenSequence
from cogview.tokenizers.tasks import TASKS, ImageElement, Task, planned_tasks
from cogview.tokenizers.vocabulary import TokenKind
from cogview.tokenizers.windows import upscale_windows
from cogview.vqvae.model import VQVAE, VQVAEConfig

# Constants of the time model, assumed. Decoding reaches this fraction of the bandwidth of a plain sum over memory; 0.5
# to 0.7 is usual.
BANDWIDTH_EFFICIENCY = 0.6
OPERATIONS_PER_LAYER = 50  # kernels that PyTorch launches for a layer, the majority in the four norms
SECONDS_PER_OPERATION = 8e-6  # to launch one from Python
SAMPLING_TRAFFIC = 400  # bytes moved per candidate id and sequence: about 25 passes over int64 and float64 noise


@dataclass(frozen=True, kw_only=True)
class TimeBreakdown:
    """Seconds of a job by stage."""

    prefill: float  # forward passes over several positions
    decoding: float  # forward passes over one position
    images: float  # the VQ-VAE

    @property
    def total(self) -> float:
        """Seconds of all stages."""
        return self.prefill + self.decoding + self.images


@dataclass(frozen=True, kw_only=True)
class InferenceEstimate:
    """Memory of a job in bytes, and the forward passes that make up its time."""

    transformer: TransformerConfig
    image_config: VQVAEConfig
    task: str
    dtype: str  # weight format
    keep_halves: bool  # matrices of a float32 model remain in 16 bits
    device_type: str  # cpu, cuda or mps
    rows: int  # sequences at once
    guidance_rows: int  # sequences that classifier-free guidance computes beside each one
    forward_passes: tuple[ForwardPass, ...]
    sequence_length: int  # positions up to the last blank
    image_side: int  # codes on a side of the image in the VQ-VAE
    decodes: bool  # whether the VQ-VAE decodes, rather than encodes

    # Bytes that do not depend on the number of sequences:
    layers: int
    embedding: int  # with positions and the last norm
    prepacked: int  # copies of weights packed for MKL
    image_tokenizer: int
    workspace: int  # weights converted for a product
    overhead: int
    # Bytes of one sequence:
    kv_cache: int
    activations: int  # peak of a layer over all forward passes
    logits: int  # of one position, with its noise
    images: int  # in the VQ-VAE

    @property
    def constant(self) -> int:
        """Bytes that do not depend on the number of sequences."""
        return self.layers + self.embedding + self.prepacked + self.image_tokenizer + self.workspace + self.overhead

    @property
    def per_row(self) -> int:
        """Bytes that each sequence adds to the peak."""
        return max(self.kv_cache + max(self.activations, self.logits), self.images)

    @property
    def total(self) -> int:
        """Bytes at the peak."""
        return self.constant + self.rows * self.per_row

    @property
    def conversion_traffic(self) -> int:
        """Bytes moved for each weight that is dequantized or cast before its product."""
        passes = CONVERSION_PASSES[self.dtype] * converted_weight_bytes(self.device_type)
        return UNPACKING_BYTES.get(self.dtype, 0) + passes

    def max_rows(self, free_bytes: float) -> int:
        """Return the maximum number of sequences for ``free_bytes``, weights included; 0 if one does not fit."""
        return max(0, int((free_bytes - self.constant) // self.per_row))

    def flops(self, forward_pass: ForwardPass) -> float:
        """Return the floating-point operations of a forward pass; a multiplication and its addition count as two."""
        width, new = self.transformer.width, forward_pass.new_positions
        layers = self.transformer.num_layers * (24 * width**2 * new + 4 * width * forward_pass.num_pairs)
        logits = 2 * width * forward_pass.output_ids * forward_pass.output_positions
        return self.rows * (1 + self.guidance_rows) * (layers + logits)

    def converts_weights(self, forward_pass: ForwardPass) -> bool:
        """Return whether a forward pass dequantizes or casts weights, by the rules of ``kernels/linear.py``.

        A CPU is assumed to have no 16-bit products.
        """
        if not may_convert_weights(self.dtype, self.device_type):
            return False
        product_rows = self.rows * (1 + self.guidance_rows) * forward_pass.new_positions
        if self.dtype in ("bfloat16", "float16"):
            return product_rows >= MANY_ROWS_HALF
        return product_rows >= MANY_ROWS_INT8 or not has_quantized_kernels(torch.device(self.device_type))

    def traffic(self, forward_pass: ForwardPass) -> int:
        """Return the bytes that a forward pass moves: weights, KV cache, and the noise of sampling."""
        weights = self.layers + forward_pass.output_ids * self.transformer.width * matrix_bytes(
            self.dtype, keep_halves=self.keep_halves
        )
        if self.converts_weights(forward_pass):
            weights += self.conversion_traffic * self.transformer.num_layers * 12 * self.transformer.width**2
        cached = (1 + self.guidance_rows) * forward_pass.num_keys * position_bytes(self.transformer, self.dtype)
        sampling = 0 if is_scoring(TASKS[self.task]) else SAMPLING_TRAFFIC * forward_pass.output_ids
        return weights + self.rows * (cached + sampling)

    def forward_seconds(self, forward_pass: ForwardPass, speed: HardwareSpeed) -> float:
        """Return the seconds of a forward pass on a device without other work.

        Args:
            forward_pass: The forward pass.
            speed: Rates of the hardware.
        """
        computing = self.flops(forward_pass) / speed.flops
        moving = self.traffic(forward_pass) / (BANDWIDTH_EFFICIENCY * speed.bandwidth)
        native = uses_native(self.dtype, self.device_type)  # all layers are one operation
        launching = 0.0 if native else OPERATIONS_PER_LAYER * self.transformer.num_layers * SECONDS_PER_OPERATION
        busy = max(computing, moving)
        return max(busy, launching) if speed.starts_ahead else busy + launching

    def seconds(self, speed: HardwareSpeed) -> TimeBreakdown:
        """Return the seconds of all sequences together."""
        image = image_flops(self.image_config, self.image_side, decoding=self.decodes)
        passes = self.forward_passes
        return TimeBreakdown(
            prefill=sum(self.forward_seconds(one, speed) for one in passes if one.new_positions > 1),
            decoding=sum(self.forward_seconds(one, speed) for one in passes if one.new_positions == 1),
            images=self.rows * image / speed.flops,
        )


def estimate_inference(
    config: ModelConfig,
    image_config: VQVAEConfig,
    *,
    task: str,
    rows: int,
    dtype: str = "float32",
    keep_halves: bool = False,
    device_type: str = "cpu",
    guidance_rows: int = 0,
) -> InferenceEstimate:
    """Estimate a batch of a task with texts of the maximum length.

    Args:
        config: Settings of the model.
        image_config: Settings of its VQ-VAE.
        task: A task with a layout, such as ``generate`` or ``score``. Captions are sampled; a beam search holds a
            sequence for each beam.
        rows: Sequences at once, 1 or more.
        dtype: Weight format, a key of ``ACTIVATION_BYTES``.
        keep_halves: Whether the matrices of a float32 model remain in 16 bits (``device.keeps_halves``).
        device_type: cpu, cuda or mps.
        guidance_rows: Sequences that classifier-free guidance computes beside each one.

    Returns:
        The estimate.

    Raises:
        InputError: The task or dtype is unknown, the model was not trained for the task, ``rows`` is below 1, or
            guidance is asked for a task that generates no image.
    """
    _check(config, task, rows, dtype, guidance_rows)
    row, shape = TASKS[task], config.transformer
    generates_image, scores = row.output == "image", is_scoring(row)
    passes, length = _forward_passes(config, row)
    copies, padded = 1 + guidance_rows, not scores
    side = round((row.output_scale or row.input_scale) * config.grid)
    sampling = config.sampling if generates_image else Sampling(top_k=0)  # captions may be sampled from all ids
    return InferenceEstimate(
        transformer=shape,
        image_config=image_config,
        task=task,
        dtype=dtype,
        keep_halves=keep_halves,
        device_type=device_type,
        rows=rows,
        guidance_rows=guidance_rows,
        forward_passes=passes,
        sequence_length=length,
        image_side=side,
        decodes=generates_image,
        layers=layer_bytes(shape, dtype, keep_halves=keep_halves),
        embedding=embedding_bytes(shape, dtype, keep_halves=keep_halves),
        image_tokenizer=image_tokenizer_bytes(image_config),
        workspace=workspace_bytes(shape, dtype, device_type),
        overhead=OVERHEAD[device_type],
        prepacked=prepacked_bytes(shape, config.vocabulary, task) if uses_prepacking(dtype, device_type) else 0,
        kv_cache=0 if scores else copies * length * position_bytes(shape, dtype),
        activations=copies * max(forward_bytes(shape, dtype, device_type, one, padded=padded) for one in passes),
        logits=max(
            SCORING_BYTES * one.output_ids * one.output_positions
            if scores
            else sampling_bytes(sampling, one.output_ids, dtype, device_type, guidance_rows)
            for one in passes
        ),
        images=image_bytes(image_config, side, decoding=generates_image),
    )


def is_scoring(task: Task) -> bool:
    """Return whether a task has no blank: its text is given, and its log-probability is the result."""
    return not task.blank_name


@functools.cache
def image_flops(config: VQVAEConfig, side: int, *, decoding: bool) -> int:
    """Return the floating-point operations of an image in a VQ-VAE.

    Args:
        config: Settings of the VQ-VAE.
        side: Codes on a side of the image.
        decoding: Whether the image is decoded, rather than encoded.
    """
    with torch.device("meta"), torch.inference_mode(), FlopCounterMode(display=False) as counter:
        model = VQVAE(config)
        if decoding:
            model.decode_vectors(torch.empty(1, side, side, config.code_width))
        else:
            model.encode_vectors(torch.empty(1, 3, config.downsampling * side, config.downsampling * side))
    distances = 0 if decoding else 2 * side**2 * config.num_codes * config.code_width
    return int(counter.get_total_flops()) + distances


def _check(config: ModelConfig, task: str, rows: int, dtype: str, guidance_rows: int) -> None:
    """Raise InputError for settings that ``estimate_inference`` refuses."""
    known = planned_tasks()
    if task not in known:
        raise InputError(f"task {task!r} is unknown; known: {', '.join(known)}")
    if TASKS[task].weights not in config.tasks:
        raise InputError(f"the model was not trained for the task {task!r}; its tasks are: {', '.join(config.tasks)}")
    if dtype not in ACTIVATION_BYTES:
        raise InputError(f"dtype {dtype!r} is unknown; known: {', '.join(ACTIVATION_BYTES)}")
    if rows < 1:
        raise InputError(f"the number of rows must be at least 1, got {rows}")
    if guidance_rows and TASKS[task].output != "image":
        raise InputError(f"the task {task!r} generates no images, so guidance does not apply: it must be 1")


def _forward_passes(config: ModelConfig, task: Task) -> tuple[tuple[ForwardPass, ...], int]:
    """Return the forward passes of one sequence, or of all windows of an image, and the length of a sequence."""
    if is_scoring(task):
        sequence = config.layouts[task.name].arrange(config.vocabulary, **_given_values(config, task))
        output_ids = config.vocabulary.padded_size - config.vocabulary.text.start
        scored = sequence.spans["text"]
        length = len(sequence)
        only = ForwardPass(
            new_positions=length,
            total_positions=length,
            output_ids=output_ids,
            output_positions=scored.stop - scored.start,
            attended=_attended(config, sequence),
        )
        return (only,), length
    sequences = _window_sequences(config, task) if task.windowed else [_whole_sequence(config, task)]
    passes = tuple(one for sequence in sequences for one in _decoding_passes(config, sequence))
    return passes, 1 + max(one.total_positions for one in passes)  # the last token passes through no layer


def _given_values(config: ModelConfig, task: Task) -> dict[str, Any]:
    """Return texts and codes of zeros for the known elements: only their number matters."""
    return {
        name: np.zeros(content.side(config.grid) ** 2, dtype=np.int64)
        if isinstance(content, ImageElement)
        else [0] * config.max_text
        for name, content in task.contents.items()
        if name != task.blank_name
    }


def _whole_sequence(config: ModelConfig, task: Task) -> TokenSequence:
    """Return the sequence of one image or caption."""
    max_text = config.caption_positions if task.output == "text" else None
    layout = config.layouts[task.name]
    return layout.arrange(config.vocabulary, **_given_values(config, task), max_text=max_text)


def _window_sequences(config: ModelConfig, task: Task) -> list[TokenSequence]:
    """Return the sequences of the nine windows of an upscaled image, each up to its last code."""
    grid, sequences = config.grid, []
    shape = (2 * grid, 2 * grid)
    # Masked until a window has generated them.
    codes = np.ma.masked_array(np.zeros(shape, dtype=np.int64), mask=np.ones(shape, dtype=bool))
    for window in upscale_windows(grid):
        values = {**_given_values(config, task), task.blank_name: codes[window.area]}
        sequence = config.layouts[task.name].arrange(config.vocabulary, **values)
        sequences.append(sequence.truncate(sequence.spans[task.blank_name].start + window.lines * grid))
        codes[window.target] = 0
    return sequences


def _decoding_passes(config: ModelConfig, sequence: TokenSequence) -> list[ForwardPass]:
    """Return the forward passes of ``generation.decode.decode``, one before each blank of a sequence."""
    passes, done, attended = [], 0, _attended(config, sequence)
    for column in np.flatnonzero(sequence.blanks).tolist():
        num_ids = len(candidate_ids(config.vocabulary, TokenKind(sequence.kinds[column]), sequence.stop))
        passes.append(
            ForwardPass(
                new_positions=column - done,
                total_positions=column,
                output_ids=num_ids,
                attended=attended[done:column],
            )
        )
        done = column
    return passes


def _attended(config: ModelConfig, sequence: TokenSequence) -> tuple[int, ...]:
    """Return the keys that each position attends to; nothing for dense attention."""
    attention = config.transformer.attention
    return () if attention.is_dense else tuple(count_keys(attention, sequence.image_sizes).tolist())
