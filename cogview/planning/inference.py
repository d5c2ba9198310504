"""How much memory and time a job takes, by formulas: nothing is loaded, drawn or tried.

``estimate`` gives a ``Plan``. Its memory is a part that is there whatever the rows, and a part that each row adds:

    total    = layers + embedding + packed + image_tokenizer + workspace + overhead + rows x per_row
    per_row  = the larger of  kv_cache + the larger of activations and logits,  while the rows are read and filled,
               and  pictures,  in the VQ-VAE before or after that, when the cache is not there

``fill_bytes``, ``search_bytes`` and ``score_bytes`` say by the same formulas what given rows take: they know which rows
begin alike, and how long each is.

Its time is that of all reads of new columns, each the larger of its products and of the bytes that it moves, and the
time that PyTorch takes to start its operations.
"""

# R rows, D width of the transformer, H heads, T columns read at one go, S columns so far, C those of a beginning
from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from cogview.device import DTYPE_BYTES
from cogview.errors import InputError
from cogview.generation.decoding_state import group_by_prefix, worth_sharing_prefix
from cogview.generation.requests import DecodingRequest
from cogview.generation.sampling import TIE_MARGIN
from cogview.generation.token_sampler import candidate_ids
from cogview.kernels.linear import (
    DENSE_BLOCK,
    MANY_ROWS_HALF,
    MANY_ROWS_INT8,
    PACKED_AT_ONCE,
    can_prepack,
    group_of,
    has_native_kernels,
    linear,
)
from cogview.modeling.config import PROJECTIONS, ModelConfig, Sampling, TransformerConfig
from cogview.tokenizers.batching import pad_left
from cogview.tokenizers.layouts import TokenSequence
from cogview.tokenizers.tasks import TASKS, ImageElement, planned_tasks
from cogview.tokenizers.vocabulary import TokenKind, Vocabulary
from cogview.tokenizers.windows import upscale_windows
from cogview.vqvae.model import PIXELS_PER_CODE, VQVAE, VQVAEConfig

# Bytes of an activation. Where only the weights of the layers are quantized, all else is in half precision.
ACTIVATION_BYTES = {**DTYPE_BYTES, "int8": 2, "int4": 2}
SMALLER_FORMATS = ("bfloat16", "int8", "int4")  # what else to offer where something does not fit

# Bytes besides tensors: Python, PyTorch and what it loads while it works. On a CPU the peak of `cogview generate -n 1`
# (resident memory, PyTorch 2.13 for CPUs on Linux) less its tensors. On a GPU the context, its kernels and the
# workspace of matrix products: assumed, from what is common, and not measured.
OVERHEAD = {"cpu": 350_000_000, "cuda": 600_000_000, "mps": 600_000_000}

# Tensors of R x T x D that are there at once where a layer has most of them, in the MLP: the layer's input, what the
# attention added, their sum, its norm, and the inner layer (4 D) before and after GELU.
LAYER_WIDTHS = 12
# Where weights are unpacked, a CPU multiplies in float32, and the inner layer is there so without its bias and with it,
# as the blocks that it came in, if they are several, and in half precision.
UNPACKED_LAYER_WIDTHS = 4 + 4 * (2 + 2 + 1)
UNPACKED_LAYER_WIDTHS_IN_BLOCKS = UNPACKED_LAYER_WIDTHS + 4 * 2
# In the attention: the layer's input, its norm, queries, keys and values, the queries once more, and the mixed values.
ATTENTION_WIDTHS = 7
# Copies of the scores (R x H x T x S) in float32, where keys and values are shared or rounded: with the bias, without
# the maximum, times alpha, and after the softmax.
RELAXED_SCORES = 4
# Bytes of each place of a batch: ids, positions and keys of its noise as int64, and what is kept of it in numpy.
POSITION_BYTES = 40
# Bytes for each id that a blank may take. Among the few that top-k keeps, on a CPU: the logit, and that over the
# temperature or its logarithm of probability. Among all: those two, and the four int64 temporaries of the noise, which
# is more than top-p takes. Guidance keeps the logits without the text, and those of both together.
TOP_K_BYTES = 8
FILTERED_BYTES = 12  # for each that is kept: its logit and its number
SAMPLING_BYTES = 40
GUIDANCE_BYTES = 8
BEAM_SEARCH_BYTES = 20  # a logit, its logarithm of probability in float64, and the sum with that of what stands before
SCORING_BYTES = 8  # logits and their logarithms of probability
# Copies of a block of weights while it is unpacked or converted to be multiplied (kernels/linear.py), and how often a
# number of such a copy is written or read until it is multiplied. int4 is taken apart in bytes before that.
UNPACKED_COPIES = {"int8": 2, "int4": 3, "bfloat16": 1, "float16": 1}
UNPACKED_PASSES = {"int8": 4, "int4": 8, "bfloat16": 2, "float16": 2}
UNPACKED_BYTES_BEFORE = {"int4": 9}
# Float32 maps of its widest stage that a VQ-VAE has at once: both sides of a ReLU, or the input of a residual block and
# both sides of a step in it.
FEATURE_MAP_COPIES = {"released": 2, "residual": 3}
PIXEL_COPIES = 3  # pictures as float32 that are there while they are brought to their range

# Of the time. A step of decoding reads at this share of what a plain sum over memory reads (0.5 to 0.7 is usual).
BANDWIDTH_EFFICIENCY = 0.6
OPERATIONS_PER_LAYER = 50  # kernels that PyTorch starts for one layer, most of them in the four norms
SECONDS_PER_OPERATION = 8e-6  # to start one from Python
SAMPLING_TRAFFIC = 400  # bytes moved per id and row to make noise and to draw: about 25 passes over int64 and float64


@dataclass(frozen=True, kw_only=True)
class ForwardPass:
    """New columns that go through the layers at one go, and what is told from them."""

    new_positions: int
    total_positions: int  # columns, the new ones included
    output_ids: int  # that may stand in the next place
    output_positions: int = 1  # for which logits are computed


@dataclass(frozen=True, kw_only=True)
class InferenceEstimate:
    """The memory of a job in bytes, and the reads that make up its time."""

    transformer: TransformerConfig
    image_config: VQVAEConfig
    task: str
    dtype: str
    device_type: str  # cpu, cuda or mps
    rows: int  # held at once
    guided: bool  # every row goes through the layers twice, with its text and without
    forward_passes: tuple[ForwardPass, ...]
    sequence_length: int  # of a row, up to its last blank
    image_side: int  # codes on a side of what goes through the VQ-VAE
    decodes: bool  # it goes through the decoder, and not the encoder

    # Whatever the rows:
    layers: int
    embedding: int  # with positions and the last norm
    packed: int  # what is multiplied once more, in the order of MKL
    image_tokenizer: int
    workspace: int  # a block of weights that is unpacked or converted to be multiplied
    overhead: int
    # Of one row:
    kv_cache: int
    activations: int  # where most columns are read at one go
    logits: int  # of one column, with the noise
    images: int  # decoding or encoding in the VQ-VAE

    @property
    def constant(self) -> int:
        """Bytes that are needed whatever the rows."""
        return self.layers + self.embedding + self.packed + self.image_tokenizer + self.workspace + self.overhead

    @property
    def per_row(self) -> int:
        """Bytes that each row adds at the peak."""
        return max(self.kv_cache + max(self.activations, self.logits), self.images)

    @property
    def total(self) -> int:
        """Bytes at the peak."""
        return self.constant + self.rows * self.per_row

    def largest_rows(self, free_bytes: float) -> int:
        """How many rows fit in ``free_bytes``, which hold the weights too; 0 where not even one does."""
        return max(0, int((free_bytes - self.constant) // self.per_row))

    def flops(self, read: ForwardPass) -> float:
        """Floating-point operations of a read; a product and its addition are two."""
        width = self.transformer.width
        pairs = read.new_positions * (
            read.total_positions - (read.new_positions - 1) / 2
        )  # of a query and a key that it may look at
        layers = self.transformer.num_layers * (24 * width**2 * read.new_positions + 4 * width * pairs)
        return self.rows * (1 + self.guided) * (layers + 2 * width * read.output_ids * read.output_positions)

    def unpacks(self, read: ForwardPass) -> bool:
        """Whether weights are unpacked or converted before they are multiplied, as ``kernels/linear.py`` decides.

        A CPU is taken for one that has no products in 16 bits.
        """
        if not _may_unpack(self.dtype, self.device_type):
            return False
        sharing = self.rows * (1 + self.guided) * read.new_positions
        if self.dtype in ("bfloat16", "float16"):
            return sharing >= MANY_ROWS_HALF
        return sharing >= MANY_ROWS_INT8 or not has_native_kernels(torch.device(self.device_type))

    @property
    def unpacking_traffic(self) -> int:
        """Bytes moved for each weight that is unpacked, and to read it again."""
        passes = UNPACKED_PASSES[self.dtype] * _multiplied_size(self.device_type)
        return UNPACKED_BYTES_BEFORE.get(self.dtype, 0) + passes

    def traffic(self, read: ForwardPass) -> int:
        """Bytes that a read moves: weights, keys and values so far, and what drawing makes."""
        copies = 1 + self.guided
        weights = self.layers + read.output_ids * self.transformer.width * ACTIVATION_BYTES[self.dtype]
        if self.unpacks(read):
            weights += self.unpacking_traffic * self.transformer.num_layers * 12 * self.transformer.width**2
        kept = copies * read.total_positions * position_bytes(self.transformer, self.dtype)
        drawing = 0 if self.task == "score" else SAMPLING_TRAFFIC * read.output_ids
        return weights + self.rows * (kept + drawing)

    def forward_seconds(self, read: ForwardPass, speed: HardwareSpeed) -> float:
        """How long a read takes, where nothing else is at work."""
        busy = max(self.flops(read) / speed.flops, self.traffic(read) / (BANDWIDTH_EFFICIENCY * speed.bandwidth))
        starting = OPERATIONS_PER_LAYER * self.transformer.num_layers * SECONDS_PER_OPERATION
        return max(busy, starting) if speed.starts_ahead else busy + starting

    def seconds(self, speed: HardwareSpeed) -> TimeBreakdown:
        """How long all rows take together."""
        picture = image_flops(self.image_config, self.image_side, decoding=self.decodes)
        return TimeBreakdown(
            given=sum(self.forward_seconds(read, speed) for read in self.forward_passes if read.new_positions > 1),
            steps=sum(self.forward_seconds(read, speed) for read in self.forward_passes if read.new_positions == 1),
            pictures=self.rows * picture / speed.flops,
        )


@dataclass(frozen=True, kw_only=True)
class HardwareSpeed:
    """What a device reads and multiplies."""

    bandwidth: float  # bytes a second
    flops: float  # dense floating-point operations a second, in the dtype of the activations
    starts_ahead: bool  # whether operations are started while earlier ones run, as on a GPU


@dataclass(frozen=True, kw_only=True)
class TimeBreakdown:
    """The time of a plan by what it goes into."""

    given: float  # reading columns that are given, many at one go
    steps: float  # reading drawn columns, one after another
    pictures: float  # in the VQ-VAE

    @property
    def total(self) -> float:
        """All of it."""
        return self.given + self.steps + self.pictures


def estimate(
    config: ModelConfig,
    image_config: VQVAEConfig,
    *,
    task: str,
    rows: int,
    dtype: str = "float32",
    device_type: str = "cpu",
    guided: bool = False,
) -> InferenceEstimate:
    """The plan of ``rows`` rows of a task at once, each with the longest text that there is space for.

    ``dtype`` is one of ``ACTIVATION_BYTES``, ``device_type`` one of ``OVERHEAD``. Captions are drawn or greedy ones; a
    search holds a row for each beam. Raises InputError for an unknown task or dtype, a task that the model was not
    trained for, less than one row, and guidance where no picture is drawn.
    """
    if task not in planned_tasks():
        raise InputError(f"task {task!r} is unknown; known: {', '.join(planned_tasks())}")
    draws = TASKS[task].output == "image"
    if TASKS[task].weights not in config.tasks:
        raise InputError(f"the model was not trained for the task {task!r}; its tasks are: {', '.join(config.tasks)}")
    if dtype not in ACTIVATION_BYTES:
        raise InputError(f"dtype {dtype!r} is unknown; known: {', '.join(ACTIVATION_BYTES)}")
    if rows < 1:
        raise InputError(f"the number of rows must be at least 1, got {rows}")
    if guided and not draws:
        raise InputError(f"the task {task!r} draws no pictures, so there is nothing to guide: guidance must be 1")

    shape = config.transformer
    scores = task == "score"
    if scores:
        row = _scored_row(config)
        words = range(config.vocabulary.text.start, config.vocabulary.padded_size)
        span = row.spans["text"]
        reads = [
            ForwardPass(
                new_positions=len(row),
                total_positions=len(row),
                output_ids=len(words),
                output_positions=span.stop - span.start,
            )
        ]
        columns = len(row)
    else:
        rows_to_fill = _sequences_to_decode(config, task)
        reads = [read for row in rows_to_fill for read in _forward_passes(config.vocabulary, row)]
        columns = 1 + max(read.total_positions for read in reads)  # the last one is drawn and not read
    copies = 1 + guided
    sampling = _sampling_of(config, task)
    side = round((TASKS[task].output_scale or TASKS[task].input_scale) * config.grid)
    return InferenceEstimate(
        transformer=shape,
        image_config=image_config,
        task=task,
        dtype=dtype,
        device_type=device_type,
        rows=rows,
        guided=guided,
        forward_passes=tuple(reads),
        sequence_length=columns,
        image_side=side,
        decodes=draws,
        layers=layer_bytes(shape, dtype),
        embedding=embedding_bytes(shape, dtype),
        image_tokenizer=image_tokenizer_bytes(image_config),
        workspace=workspace_bytes(shape, dtype, device_type),
        overhead=OVERHEAD[device_type],
        packed=prepacked_bytes(shape, config.vocabulary, task) if uses_prepacking(dtype, device_type) else 0,
        kv_cache=0 if scores else copies * columns * position_bytes(shape, dtype),
        activations=copies * max(_forward_bytes(shape, dtype, device_type, read, padded=not scores) for read in reads),
        logits=max(
            SCORING_BYTES * read.output_ids * read.output_positions
            if scores
            else sampling_bytes(sampling, read.output_ids, dtype, device_type, guided)
            for read in reads
        ),
        images=image_bytes(image_config, side, decoding=draws),
    )


def decode_bytes(
    config: TransformerConfig,
    vocabulary: Vocabulary,
    jobs: Sequence[DecodingRequest],
    *,
    dtype: str,
    device_type: str,
    int8_cache: bool = False,
    parallel: int | None = None,
) -> int:
    """What ``engine.fill`` takes at its peak for ``jobs``, besides the weights and their packed copy.

    ``parallel`` is the most codes of a picture that are told at one go, in windows (``parallel.py``); None where no
    windows are used.
    """
    guided = [job for job in jobs if job.sampling.guidance != 1 and job.unconditional is not None]
    rows = [job.sequence for job in jobs] + [job.unconditional for job in guided if job.unconditional is not None]
    attentions = [job.sampling.text_attention for job in jobs] + [1.0] * len(guided)
    if any(job.sequence.blanks[job.sequence.kinds == TokenKind.TEXT].any() for job in jobs):
        parallel = None
    held, reading, told = _decoding_bytes(
        config, vocabulary, rows, attentions, dtype, device_type, int8_cache, parallel
    )
    together: dict[tuple[Sampling, int], int] = {}
    for job in jobs:
        kind = TokenKind(job.sequence.kinds[job.sequence.blanks][-1])
        key = job.sampling, len(candidate_ids(vocabulary, kind, job.sequence.stop))
        together[key] = together.get(key, 0) + 1
    drawing = 0
    for (sampling, ids), count in together.items():
        each = sampling_bytes(sampling, ids, dtype, device_type, guided=sampling.guidance != 1)
        drawing = max(drawing, (parallel or 1) * count * each)
    return held + max(reading, told + drawing)


def beam_search_bytes(
    config: TransformerConfig,
    vocabulary: Vocabulary,
    rows: Sequence[TokenSequence],
    beams: int,
    *,
    dtype: str,
    device_type: str,
    int8_cache: bool = False,
) -> int:
    """What ``engine.search`` takes at its peak for ``rows``, besides the weights and their packed copy."""
    many = [row for row in rows for _ in range(beams)]
    held, reading, _ = _decoding_bytes(config, vocabulary, many, [1.0] * len(many), dtype, device_type, int8_cache)
    return held + max(reading, BEAM_SEARCH_BYTES * len(many) * (vocabulary.size - vocabulary.text.start))


def score_bytes(
    config: TransformerConfig, vocabulary: Vocabulary, rows: Sequence[TokenSequence], *, dtype: str, device_type: str
) -> int:
    """What ``engine.score`` takes at its peak for ``rows``, besides the weights and their packed copy."""
    longest, width = max(map(len, rows)), config.width * ACTIVATION_BYTES[dtype]
    read = ForwardPass(new_positions=longest, total_positions=longest, output_ids=0)
    pieces = sum(row.spans["text"].stop - row.spans["text"].start for row in rows)
    reading = _forward_bytes(config, dtype, device_type, read, rows=len(rows), padded=False)
    logits = SCORING_BYTES * pieces * (vocabulary.padded_size - vocabulary.text.start)
    told = (len(rows) * longest + pieces) * width + logits  # from hidden states of all, and those that tell a piece
    return workspace_bytes(config, dtype, device_type) + len(rows) * longest * POSITION_BYTES + max(reading, told)


def smaller_formats(
    config: TransformerConfig, vocabulary: Vocabulary, dtype: str, device_type: str, missing: float
) -> list[str]:
    """Options with which the weights, and what is made of them, take ``missing`` bytes less than in ``dtype``."""

    def held(other: str) -> int:
        packed = prepacked_bytes(config, vocabulary, "generate") if uses_prepacking(other, device_type) else 0
        embedding = embedding_bytes(config, other)
        return layer_bytes(config, other) + embedding + packed + workspace_bytes(config, other, device_type)

    found = []
    for other in SMALLER_FORMATS[SMALLER_FORMATS.index(dtype) + 1 if dtype in SMALLER_FORMATS else 0 :]:
        with suppress(InputError):  # not every width can be held in int4
            if held(dtype) - held(other) > missing:
                found.append(f"--dtype {other}")
    return found


def sampling_bytes(sampling: Sampling, ids: int, dtype: str, device_type: str, guided: bool) -> int:
    """Bytes while one of so many ``ids`` is drawn."""
    # In half precision many logits are equal, and top-p looks at all of them to know which comes first.
    few = device_type == "cpu" and sampling.top_k > 0 and (sampling.top_p == 1 or dtype == "float32")
    kept = FILTERED_BYTES * (sampling.top_k + TIE_MARGIN) if few else 0
    return ids * ((TOP_K_BYTES if few else SAMPLING_BYTES) + GUIDANCE_BYTES * guided) + kept


def uses_prepacking(dtype: str, device_type: str) -> bool:
    """Whether weights are kept a second time, in MKL's order (``Transformer.pack``)."""
    return device_type == "cpu" and can_prepack(
        torch.empty(0, dtype=torch.float32 if dtype == "float32" else torch.bfloat16)
    )


def prepacked_bytes(config: TransformerConfig, vocabulary: Vocabulary, task: str) -> int:
    """Bytes of all that ``task`` multiplies, in the order of MKL: the projections, and the ids that are told."""
    told = (
        vocabulary.image
        if TASKS[task].output == "image"
        else range(vocabulary.text.start, vocabulary.padded_size)
    )
    return 4 * config.width * (12 * config.width * config.num_layers + len(told))


def layer_bytes(config: TransformerConfig, dtype: str) -> int:
    """Bytes of all layers. Of few bits are the weights of the four projections of each, and nothing else.

    int8 has a scale of two bytes for each output; int4 a scale and a zero, two bytes each, for each group of inputs.
    InputError for widths that int4 cannot group.
    """
    width = config.width
    weights = 12 * width**2
    if dtype == "int8":
        held = weights + 2 * sum(outputs for outputs, _ in _projections(width))
    elif dtype == "int4":
        try:
            groups = sum(inputs // group_of(inputs) * outputs for outputs, inputs in _projections(width))
        except ValueError as error:
            raise InputError(str(error)) from None
        held = weights // 2 + 4 * groups
    else:
        held = weights * ACTIVATION_BYTES[dtype]
    return config.num_layers * (held + 17 * width * ACTIVATION_BYTES[dtype])  # biases and norms


def embedding_bytes(config: TransformerConfig, dtype: str) -> int:
    """Bytes of the embedding, positions and the last norm."""
    return (config.vocabulary_size + config.max_positions + 2) * config.width * ACTIVATION_BYTES[dtype]


def workspace_bytes(config: TransformerConfig, dtype: str, device_type: str) -> int:
    """Bytes of weights on their way to be multiplied, at the peak: a block at a time on a CPU, elsewhere a projection.

    While a block is made, the one before it is still there.
    """
    if uses_prepacking(dtype, device_type):
        return PACKED_AT_ONCE * 4 * config.width * 4  # a copy of the widest input
    if not _may_unpack(dtype, device_type):
        return 0
    copies, most = UNPACKED_COPIES[dtype], 0
    for outputs, inputs in _projections(config.width):
        block = min(outputs, DENSE_BLOCK) if device_type == "cpu" else outputs
        next_block = min(block, outputs - block)
        most = max(most, copies * block * inputs, (block + copies * next_block) * inputs)
    return most * _multiplied_size(device_type)


def position_bytes(config: TransformerConfig, dtype: str, *, int8_cache: bool = False) -> int:
    """Bytes of the keys and values of one position of one row, in all layers; rounded, each head has a scale."""
    if int8_cache:
        return 2 * config.num_layers * (config.width + config.num_heads * ACTIVATION_BYTES[dtype])
    return 2 * config.num_layers * config.width * ACTIVATION_BYTES[dtype]


@functools.cache
def image_tokenizer_bytes(config: VQVAEConfig) -> int:
    """Bytes of a VQ-VAE, which is float32 everywhere, with the averages of its codebook."""
    with torch.device("meta"):
        model = VQVAE(config)
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def image_bytes(config: VQVAEConfig, side: int, *, decoding: bool) -> int:
    """Bytes that a picture of ``side`` x ``side`` codes takes in the decoder or the encoder, at the peak."""
    half, quarter, eighth = config.channels
    # The released decoder has twice the sides of its encoder: half stands for the full side, and so on.
    scale = 2 if decoding and config.architecture == "released" else 1
    largest = max(half * 4**2, quarter * 2**2, eighth) * (scale * side) ** 2
    return 4 * max(FEATURE_MAP_COPIES[config.architecture] * largest, PIXEL_COPIES * 3 * (PIXELS_PER_CODE * side) ** 2)


@functools.cache
def image_flops(config: VQVAEConfig, side: int, *, decoding: bool) -> int:
    """Floating-point operations that decode or encode a picture of ``side`` x ``side`` codes."""
    with torch.device("meta"), torch.inference_mode(), FlopCounterMode(display=False) as counter:
        model = VQVAE(config)
        if decoding:
            model.decode_vectors(torch.empty(1, side, side, config.code_width))
        else:
            model.encode_vectors(torch.empty(1, 3, PIXELS_PER_CODE * side, PIXELS_PER_CODE * side))
    compared = 0 if decoding else 2 * side**2 * config.num_codes * config.code_width
    return counter.get_total_flops() + compared


@torch.inference_mode()
def measure_hardware(device: torch.device, dtype: torch.dtype) -> HardwareSpeed:
    """Bandwidth of a sum over 256 MB, and the rate of a linear layer in ``dtype``; takes about a second.

    The best of several tries: whatever else the machine does can only make them slower.
    """
    numbers = torch.ones(64 * 2**20, device=device)
    bandwidth = numbers.nbytes / min(_timed(lambda: numbers.sum()) for _ in range(8))
    flops, size, elapsed = 0.0, 512, 0.0
    while elapsed < 0.02 and size < 8192:  # larger products are faster, until they take too long for a probe
        size *= 2
        matrix = torch.ones(size, size, device=device, dtype=dtype)
        elapsed = min(_timed(functools.partial(linear, matrix, matrix, matrix[0])) for _ in range(3))
        flops = max(flops, 2 * size**3 / elapsed)
    return HardwareSpeed(bandwidth=bandwidth, flops=flops, starts_ahead=device.type != "cpu")


def _timed(work: Callable[[], torch.Tensor]) -> float:
    """Seconds until the result is there: reading one number of it waits for the device."""
    start = time.perf_counter()
    work().flatten()[0].item()
    return time.perf_counter() - start


def _sequences_to_decode(config: ModelConfig, task: str) -> list[TokenSequence]:
    """The rows that one picture or caption takes, one after another: nine windows of an upscaled picture, else one.

    Texts and codes are zeros: only what is given and what is blank matters.
    """
    task_row, layout, vocabulary, grid = TASKS[task], config.layouts[task], config.vocabulary, config.grid
    given: dict[str, Any] = {}
    for name, content in task_row.contents.items():
        if name != task_row.blank_name:
            size = content.side(grid) ** 2 if isinstance(content, ImageElement) else config.max_text
            given[name] = np.zeros(size, dtype=np.int64)
    if not task_row.windowed:
        max_text = config.caption_positions if task_row.output == "text" else None
        return [layout.arrange(vocabulary, max_text=max_text, **given)]
    rows = []
    codes = np.ma.array(np.zeros((2 * grid, 2 * grid), dtype=np.int64), mask=True)  # until a window generates them
    for window in upscale_windows(grid):
        row = layout.arrange(vocabulary, **given, **{task_row.blank_name: codes[window.area]})
        rows.append(row.truncate(row.spans[task_row.blank_name].start + window.lines * grid))
        codes[window.target] = 0
    return rows


def _scored_row(config: ModelConfig) -> TokenSequence:
    image = np.zeros(config.grid**2, dtype=np.int64)
    return config.layouts["score"].arrange(config.vocabulary, image=image, text=[0] * config.max_text)


def _forward_passes(vocabulary: Vocabulary, row: TokenSequence) -> list[ForwardPass]:
    """What ``engine.fill`` reads before each blank of a row."""
    reads, done = [], 0
    for column in np.flatnonzero(row.blanks).tolist():
        ids = vocabulary.permitted(TokenKind(row.kinds[column]))
        if row.stop is not None:  # a text: commands, of which the stop is one, have logits too
            ids = range(ids.start, vocabulary.size)
        reads.append(ForwardPass(new_positions=column - done, total_positions=column, output_ids=len(ids)))
        done = column
    return reads


def _sampling_of(config: ModelConfig, task: str) -> Sampling:
    """How a task draws where nothing is said; captions may be drawn from all there is."""
    return config.sampling if TASKS[task].output == "image" else Sampling(top_k=0)


def _decoding_bytes(
    config: TransformerConfig,
    vocabulary: Vocabulary,
    rows: Sequence[TokenSequence],
    attentions: Sequence[float],
    dtype: str,
    device_type: str,
    int8_cache: bool,
    parallel: int | None = None,
) -> tuple[int, int, int]:
    """What is there while rows are filled: from first to last, besides while they are read, and while they are told."""
    batch = pad_left([row.until_last_blank() for row in rows], vocabulary.pad)
    num_rows, num_columns = batch.ids.shape
    blank_columns = np.flatnonzero(batch.blanks.any(axis=0)).tolist()
    first, beginnings = group_by_prefix(batch, attentions)
    num_firsts = 1 + max(beginnings)
    saved = first * (num_rows - num_firsts)
    shared = parallel is None and worth_sharing_prefix(batch, first, num_firsts)
    padded = bool(batch.starts.any()) or any(weight != 1 for weight in attentions)

    positions = num_rows * num_columns - shared * saved
    held = positions * position_bytes(config, dtype, int8_cache=int8_cache) + num_rows * num_columns * POSITION_BYTES

    def reading(rows_read: int, new: int, so_far: int, shared: bool) -> int:
        read = ForwardPass(new_positions=new, total_positions=so_far, output_ids=0)
        return _forward_bytes(
            config,
            dtype,
            device_type,
            read,
            rows=rows_read,
            padded=padded,
            int8_cache=int8_cache,
            beginning=(num_firsts, first) if shared else None,
        )

    most = reading(num_firsts, first, first, False)
    if num_firsts < num_rows and not shared:  # every row gets its copy of keys and values, one layer after another
        copied = 2 * num_rows * (1 if int8_cache else ACTIVATION_BYTES[dtype])
        most = max(most, (num_firsts * ACTIVATION_BYTES[dtype] + copied) * first * config.width)
    # Of reads of as many columns the last one takes most.
    later = {column - before: column for before, column in itertools.pairwise(blank_columns)}
    if parallel is not None:
        later[min(parallel, num_columns - first)] = num_columns
    for new, so_far in later.items():
        most = max(most, reading(num_rows, new, so_far, shared))
    # Of the first read.
    told = num_rows * first * config.width * ACTIVATION_BYTES[dtype] if num_firsts == num_rows else 0
    return workspace_bytes(config, dtype, device_type) + held, most, told


def _forward_bytes(
    config: TransformerConfig,
    dtype: str,
    device_type: str,
    read: ForwardPass,
    *,
    padded: bool,
    rows: int = 1,
    int8_cache: bool = False,
    beginning: tuple[int, int] | None = None,
) -> int:
    """Bytes of the layer that has most of them while ``read.new`` columns of ``rows`` rows are read.

    ``padded``: what may be looked at differs between rows. ``beginning`` says how many beginnings rows share, and how
    long they are.
    """
    size = ACTIVATION_BYTES[dtype]
    width = rows * config.width * size * read.new_positions  # of a tensor as wide as the model
    widths = LAYER_WIDTHS - uses_prepacking(dtype, device_type)  # lean layers do not keep what they were given
    if device_type == "cpu" and _may_unpack(dtype, device_type):
        in_blocks = 4 * config.width > DENSE_BLOCK
        widths = UNPACKED_LAYER_WIDTHS_IN_BLOCKS if in_blocks else UNPACKED_LAYER_WIDTHS

    scores = 4 * rows * config.num_heads * read.new_positions * read.total_positions
    attending = ATTENTION_WIDTHS * width
    if int8_cache or beginning is not None:
        copied = 0
        if int8_cache:  # keys, and after them values, as numbers: those of beginnings, then those of the rows
            num_beginnings, length = beginning or (0, 0)
            copied = max(num_beginnings * length, rows * (read.total_positions - length)) * config.width * size
        attending += max(RELAXED_SCORES * scores, 2 * scores + copied)

    bias = (rows if padded else 1) * read.new_positions * read.total_positions
    alone = bias * max(size + 3, 2 * size + 1)  # while it is made: three times as booleans, or twice as numbers
    if read.new_positions == 1 or (read.new_positions == read.total_positions and not padded):
        bias = alone = 0
    return max(alone, bias * size + max(widths * width, attending))


def _projections(width: int) -> list[tuple[int, int]]:
    """(outputs, inputs) of the four of a layer."""
    return [(outputs * width, inputs * width) for outputs, inputs in PROJECTIONS.values()]


def _may_unpack(dtype: str, device_type: str) -> bool:
    """Whether weights are unpacked or converted to be multiplied, at least where many rows share a reading."""
    if dtype == "int4":
        return not has_native_kernels(torch.device(device_type))
    return dtype == "int8" or (device_type == "cpu" and dtype in UNPACKED_COPIES)


def _multiplied_size(device_type: str) -> int:
    """Bytes of an unpacked weight: a CPU multiplies in float32."""
    return 4 if device_type == "cpu" else 2
