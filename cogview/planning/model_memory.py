"""Bytes of a model's weights, caches and activations, by formulas.

Nothing is loaded or allocated. ``tests/planning`` compares each formula with real tensors: weights with the modules,
activations with the bytes of the tensors that are alive at the peak.
"""

# D width of the transformer, H heads, R sequences, T new positions, S positions in all
from __future__ import annotations

import functools
from contextlib import suppress
from dataclasses import dataclass

import torch

from cogview.device import DTYPE_BYTES
from cogview.errors import InputError
from cogview.generation.sampling import TIE_MARGIN
from cogview.kernels.linear import DENSE_BLOCK, PACKED_AT_ONCE, can_prepack, group_of, has_quantized_kernels
from cogview.kernels.native import CHUNK_ROWS, SCRATCH_WIDTHS, expects_native_kernels
from cogview.modeling.config import PROJECTIONS, Sampling, TransformerConfig
from cogview.tokenizers.tasks import TASKS
from cogview.tokenizers.vocabulary import Vocabulary
from cogview.vqvae.model import VQVAE, VQVAEConfig

# Bytes of an activation. Quantized layers compute in 16 bits.
ACTIVATION_BYTES = {**DTYPE_BYTES, "int8": 2, "int4": 2}
SMALLER_FORMATS = ("bfloat16", "int8", "int4")  # of weights, to suggest if a job does not fit

# Tensors of R x T x D that are alive in the MLP, where a layer has its peak: the layer's input, the output of the
# attention, their sum, its norm, and the inner layer (4 D) before and after GELU.
LAYER_WIDTHS = 12
# With converted weights a CPU multiplies in float32. The inner layer is then alive in float32 without and with its
# bias, and in 16 bits; a product of several blocks of weights also keeps the blocks' results.
CONVERTED_LAYER_WIDTHS = 4 + 4 * (2 + 2 + 1)
CONVERTED_LAYER_WIDTHS_IN_BLOCKS = CONVERTED_LAYER_WIDTHS + 4 * 2
# In the attention: the layer's input, its norm, queries, keys and values, a copy of the queries, and the output.
ATTENTION_WIDTHS = 7
# With native kernels: the vectors that the layers change, keys and values without a cache, all in float32, and less
# than one more for ids, positions and descriptions.
NATIVE_WIDTHS = 4
# Float32 copies of the scores (R x H x T x S) with a shared prefix or an int8 cache: with the bias, minus the maximum,
# times alpha (PB-relax, arXiv:2105.13290), and after the softmax.
RELAXED_SCORES = 4
# Bytes of each query and key while PyTorch makes the bias of window attention: the distance of both in int64, two
# float32 copies of the bias, and a mask.
WINDOW_BIAS_BYTES = 8 + 2 * 4 + 1
# Bytes of a position of a batch: ids, positions and noise keys as int64, and their copies in numpy.
POSITION_BYTES = 40
# Bytes of each candidate id of a blank. On a CPU with top-k: its logit, and the scaled logit or its log-probability.
# Without: these two, and four int64 temporaries of the noise, which exceed those of top-p.
TOP_K_BYTES = 8
FILTERED_BYTES = 12  # of a candidate that passes top-k: its logit and its id
SAMPLING_BYTES = 40
LOGIT_BYTES = 4  # float32
# Copies of a block of weights during its conversion (kernels/linear.py), accesses of each converted number until it
# is multiplied, and the bytes that int4 moves before, to separate its two numbers.
CONVERSION_COPIES = {"int8": 2, "int4": 3, "bfloat16": 1, "float16": 1}
CONVERSION_PASSES = {"int8": 4, "int4": 8, "bfloat16": 2, "float16": 2}
UNPACKING_BYTES = {"int4": 9}
# Float32 feature maps of the widest stage of a VQ-VAE that are alive at once: input and output of a ReLU, or the input
# of a residual block and input and output of one of its steps.
FEATURE_MAP_COPIES = {"released": 2, "residual": 3}
PIXEL_COPIES = 3  # float32 copies of the images while they are scaled to their range


@dataclass(frozen=True, kw_only=True)
class ForwardPass:
    """One forward pass: the positions it processes and the logits it computes."""

    new_positions: int
    total_positions: int  # new ones included
    output_ids: int  # candidates of the next token
    output_positions: int = 1  # positions with logits
    attended: tuple[int, ...] = ()  # keys that each new position attends to; empty: all up to its own

    @property
    def num_keys(self) -> int:
        """Number of keys that are read."""
        return self.attended[0] if self.attended and self.new_positions == 1 else self.total_positions

    @property
    def num_pairs(self) -> float:
        """Number of pairs of a query and a key that it attends to."""
        if self.attended:
            return sum(self.attended)
        return self.new_positions * (self.total_positions - (self.new_positions - 1) / 2)


def layer_bytes(config: TransformerConfig, dtype: str, *, keep_halves: bool = False) -> int:
    """Return the bytes of the weights of all layers.

    Quantization applies to the four projections of a layer. int8 has a 2-byte scale for each output; int4 has a scale
    and a zero, 2 bytes each, for each group of inputs.

    Args:
        config: Shape of the transformer.
        dtype: Weight format, a key of ``ACTIVATION_BYTES``.
        keep_halves: Whether the matrices of a float32 model remain in 16 bits.

    Raises:
        InputError: The width does not divide into groups of int4.
    """
    width = config.width
    num_weights = 12 * width**2
    if dtype == "int8":
        projections = num_weights + 2 * sum(outputs for outputs, _ in projection_shapes(width))
    elif dtype == "int4":
        try:
            groups = sum(inputs // group_of(inputs) * outputs for outputs, inputs in projection_shapes(width))
        except ValueError as error:
            raise InputError(str(error)) from None
        projections = num_weights // 2 + 4 * groups
    else:
        projections = num_weights * matrix_bytes(dtype, keep_halves=keep_halves)
    biases_and_norms = 17 * width * ACTIVATION_BYTES[dtype]
    return config.num_layers * (projections + biases_and_norms)


def embedding_bytes(config: TransformerConfig, dtype: str, *, keep_halves: bool = False) -> int:
    """Return the bytes of the token embedding, the position embedding and the last norm.

    Args:
        config: Config of the transformer.
        dtype: Weight format.
        keep_halves: Whether the matrices of a float32 model remain in 16 bits.
    """
    embeddings = (config.vocabulary_size + config.max_positions) * matrix_bytes(dtype, keep_halves=keep_halves)
    return config.width * (embeddings + 2 * ACTIVATION_BYTES[dtype])


def matrix_bytes(dtype: str, *, keep_halves: bool) -> int:
    """Return the bytes of a number of a matrix that is not quantized.

    Args:
        dtype: Weight format.
        keep_halves: Whether the matrices of a float32 model remain in 16 bits.
    """
    return 2 if keep_halves else ACTIVATION_BYTES[dtype]


def uses_native(dtype: str, device_type: str) -> bool:
    """Return whether the layers run as native kernels (``kernels/native.py``).

    Args:
        dtype: Weight format.
        device_type: cpu, cuda or mps.
    """
    activations = {"float32": torch.float32, "float16": torch.float16}.get(dtype, torch.bfloat16)
    return expects_native_kernels(torch.device(device_type), activations)


def hidden_bytes(dtype: str, device_type: str) -> int:
    """Return the bytes of each number of a hidden state.

    Args:
        dtype: Weight format.
        device_type: cpu, cuda or mps.
    """
    return 4 if uses_native(dtype, device_type) else ACTIVATION_BYTES[dtype]


def uses_prepacking(dtype: str, device_type: str) -> bool:
    """Return whether weights are kept a second time, packed for MKL (``PackedLayers``).

    Args:
        dtype: Weight format.
        device_type: cpu, cuda or mps.
    """
    weight = torch.float32 if dtype == "float32" else torch.bfloat16
    return not uses_native(dtype, device_type) and can_prepack(torch.device(device_type), weight)


def prepacked_bytes(config: TransformerConfig, vocabulary: Vocabulary, task: str) -> int:
    """Return the bytes of the weights packed for MKL: the projections, and the embedding of the candidate ids.

    Args:
        config: Config of the transformer.
        vocabulary: The vocabulary.
        task: Task, which decides the candidate ids.
    """
    if TASKS[task].output == "text":
        output_ids = range(vocabulary.text.start, vocabulary.padded_size)
    else:
        output_ids = vocabulary.image
    return 4 * config.width * (12 * config.width * config.num_layers + len(output_ids))


def workspace_bytes(config: TransformerConfig, dtype: str, device_type: str) -> int:
    """Return the peak of the bytes of weights that are packed or converted for a product, or of native kernels.

    A CPU converts a block of weights at a time, other devices a whole projection. The previous block is alive while
    the next one is converted.

    Args:
        config: Config of the transformer.
        dtype: Weight format.
        device_type: cpu, cuda or mps.
    """
    if uses_native(dtype, device_type):
        return CHUNK_ROWS * SCRATCH_WIDTHS * config.width * 4
    if uses_prepacking(dtype, device_type):
        return PACKED_AT_ONCE * 4 * config.width * 4  # a copy of the widest input
    if not may_convert_weights(dtype, device_type):
        return 0
    copies, peak = CONVERSION_COPIES[dtype], 0
    for outputs, inputs in projection_shapes(config.width):
        block = min(outputs, DENSE_BLOCK) if device_type == "cpu" else outputs
        next_block = min(block, outputs - block)
        peak = max(peak, copies * block * inputs, (block + copies * next_block) * inputs)
    return peak * converted_weight_bytes(device_type)


def may_convert_weights(dtype: str, device_type: str) -> bool:
    """Return whether products dequantize or cast weights, at least those of many rows.

    Args:
        dtype: Weight format.
        device_type: cpu, cuda or mps.
    """
    if uses_native(dtype, device_type):
        return False
    if dtype == "int4":
        return not has_quantized_kernels(torch.device(device_type))
    return dtype == "int8" or (device_type == "cpu" and dtype in CONVERSION_COPIES)


def converted_weight_bytes(device_type: str) -> int:
    """Return the bytes of a converted weight: float32 on a CPU, 16 bits elsewhere."""
    return 4 if device_type == "cpu" else 2


def projection_shapes(width: int) -> list[tuple[int, int]]:
    """Return (outputs, inputs) of the four projections of a layer."""
    return [(outputs * width, inputs * width) for outputs, inputs in PROJECTIONS.values()]


def position_bytes(config: TransformerConfig, dtype: str, *, int8_cache: bool = False) -> int:
    """Return the bytes of the KV cache for one position of one sequence, in all layers.

    Args:
        config: Shape of the transformer.
        dtype: Weight format, a key of ``ACTIVATION_BYTES``.
        int8_cache: Whether keys and values are int8, with a scale for each head.
    """
    if int8_cache:
        return 2 * config.num_layers * (config.width + config.num_heads * ACTIVATION_BYTES[dtype])
    return 2 * config.num_layers * config.width * ACTIVATION_BYTES[dtype]


def forward_bytes(
    config: TransformerConfig,
    dtype: str,
    device_type: str,
    forward_pass: ForwardPass,
    *,
    padded: bool,
    rows: int = 1,
    int8_cache: bool = False,
    prefixes: tuple[int, int] | None = None,
) -> int:
    """Return the peak of the bytes of one layer's activations during a forward pass.

    Args:
        config: Shape of the transformer.
        dtype: Weight format, a key of ``ACTIVATION_BYTES``.
        device_type: cpu, cuda or mps.
        forward_pass: The new positions of each sequence, and those before.
        padded: Whether sequences differ in the positions that they attend to.
        rows: Number of sequences.
        int8_cache: Whether keys and values are int8.
        prefixes: Number and length of shared prefixes, if the cache keeps them once.
    """
    size = ACTIVATION_BYTES[dtype]
    new, total = forward_pass.new_positions, forward_pass.total_positions
    width_bytes = rows * config.width * size * new  # of a tensor as wide as the model
    widths = LAYER_WIDTHS - uses_prepacking(dtype, device_type)  # packed layers free their input
    if device_type == "cpu" and may_convert_weights(dtype, device_type):
        in_blocks = 4 * config.width > DENSE_BLOCK
        widths = CONVERTED_LAYER_WIDTHS_IN_BLOCKS if in_blocks else CONVERTED_LAYER_WIDTHS

    attention = ATTENTION_WIDTHS * width_bytes
    selected = config.attention.window + config.attention.pivots + new - 1  # keys, besides those of texts
    if not config.attention.is_dense and selected < total:
        # Keys and values are copied, with a shared prefix from both stores and then together.
        attention += 2 * rows * selected * config.width * size * (3 if prefixes is not None else 1)
        total, prefixes = selected, None
    scores = 4 * rows * config.num_heads * new * total
    if int8_cache or prefixes is not None:
        dequantized = 0
        if int8_cache:  # keys, and after them values: those of the prefixes, then those of the sequences
            num_prefixes, length = prefixes or (0, 0)
            dequantized = max(num_prefixes * length, rows * (total - length)) * config.width * size
        attention += max(RELAXED_SCORES * scores, 2 * scores + dequantized)

    if uses_native(dtype, device_type):
        widths, attention, width_bytes = NATIVE_WIDTHS, 0, rows * config.width * 4 * new

    bias = (rows if padded else 1) * new * total
    bias_temporaries = bias * max(size + 3, 2 * size + 1)  # three boolean copies, or two in the dtype
    if not config.attention.is_dense:
        bias = rows * new * total
        bias_temporaries = bias * WINDOW_BIAS_BYTES
        if uses_native(dtype, device_type):
            bias = bias_temporaries = 0
    elif new == 1 or (new == total and not padded):
        bias = bias_temporaries = 0
    return max(bias_temporaries, bias * size + max(widths * width_bytes, attention))


def sampling_bytes(sampling: Sampling, num_ids: int, dtype: str, device_type: str, guidance_rows: int) -> int:
    """Return the peak of the bytes that sampling one of ``num_ids`` candidates takes.

    Args:
        sampling: Sampling settings.
        num_ids: Number of candidates.
        dtype: Weight format.
        device_type: cpu, cuda or mps.
        guidance_rows: Further rows whose logits guidance computes.
    """
    # In 16 bits many logits are equal, and top-p sorts all of them to break the ties.
    few = 0 < sampling.top_k < num_ids - TIE_MARGIN  # as in `sample`: all candidates are sorted otherwise
    top_k = device_type == "cpu" and few and (sampling.top_p == 1 or dtype == "float32")
    filtered = FILTERED_BYTES * (sampling.top_k + TIE_MARGIN) if top_k else 0
    candidate = TOP_K_BYTES if top_k else SAMPLING_BYTES
    if guidance_rows:
        # While rows are combined, the logits of both, their scaled difference, and the sums before and after it are
        # alive, of which the first sum is the logits of a row. While ids are sampled, the last sum is.
        candidate = max(candidate + LOGIT_BYTES, LOGIT_BYTES * (4 + (guidance_rows > 1)))
    return num_ids * candidate + filtered


@functools.cache
def image_tokenizer_bytes(config: VQVAEConfig) -> int:
    """Return the bytes of a VQ-VAE in float32, the averages of its codebook included."""
    with torch.device("meta"):
        model = VQVAE(config)
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def image_bytes(config: VQVAEConfig, side: int, *, decoding: bool) -> int:
    """Return the peak of the bytes of one image in the decoder or the encoder of a VQ-VAE.

    Args:
        config: Settings of the VQ-VAE.
        side: Codes on a side of the image.
        decoding: Whether the decoder is at work, rather than the encoder.
    """
    # The feature maps of the released decoder have twice the side of those of its encoder.
    scale = 2 if decoding and config.architecture == "released" else 1
    # Each scale has four times the positions of the next one, and the last has one position per code.
    last = len(config.channels) - 1
    widths = [channels << 2 * (last - index) for index, channels in enumerate(config.channels)]
    maps = FEATURE_MAP_COPIES[config.architecture] * max(widths) * (scale * side) ** 2
    pixels = PIXEL_COPIES * 3 * (config.downsampling * side) ** 2
    # The encoder keeps the pixels. Where its widest scale has no block, one map fewer is alive, and there is space.
    blocks = zip(widths, config.encoder_blocks, strict=True)
    keeps_pixels = not decoding and any(count and width == max(widths) for width, count in blocks)
    return 4 * (maps + pixels if keeps_pixels else max(maps, pixels))


def smaller_formats(
    config: TransformerConfig, vocabulary: Vocabulary, dtype: str, device_type: str, missing: float
) -> list[str]:
    """Return the arguments of smaller weight formats that save more than ``missing`` bytes against ``dtype``.

    Args:
        config: Config of the transformer.
        vocabulary: The vocabulary.
        dtype: Weight format.
        device_type: cpu, cuda or mps.
        missing: Bytes to save.
    """

    def weight_bytes(other: str) -> int:
        prepacked = prepacked_bytes(config, vocabulary, "generate") if uses_prepacking(other, device_type) else 0
        workspace = workspace_bytes(config, other, device_type)
        return layer_bytes(config, other) + embedding_bytes(config, other) + prepacked + workspace

    options = []
    for other in formats_below(dtype):
        with suppress(InputError):  # the width may not divide into groups of int4
            if weight_bytes(dtype) - weight_bytes(other) > missing:
                options.append(f'dtype="{other}"')
    return options


def formats_below(dtype: str) -> tuple[str, ...]:
    """Return the weight formats that take fewer bytes than ``dtype``, the largest first."""
    return SMALLER_FORMATS[SMALLER_FORMATS.index(dtype) + 1 if dtype in SMALLER_FORMATS else 0 :]
