"""Memory of training, by formulas: nothing is loaded or tried.

``training_memory`` returns the bytes of one process by part. With P parameters of which A are trained, N processes and
s bytes of a number in the precision of products:

    part        torch                              DeepSpeed, ZeRO stage
    weights     4 P, and s per weight of a layer   s P (stage 3: s P / N)
    gradients   4 A                                1: 4 A, and s A in bfloat16; 2: 4 A / N; 3: 4 A / N
    optimizer   8 A: Adam's two moments            12 A / N: float32 master weights and both moments

Activations are those of PyTorch's operations; the native kernels of a CPU keep as much, or up to a tenth less.

DeepSpeed accumulates gradients in float32, as this project configures it, since a large batch has many micro-batches.
Stage 1 shards the optimizer alone and keeps whole gradients; in bfloat16 it also keeps those of the micro-batch in
bfloat16 until all are computed. With offloading, the optimizer and a float32 gradient are on the host, with a buffer
for the updated 16-bit weights: 18 A / N. Stage 3 accumulates gradients there: 20 A / N. Two processes of DeepSpeed
0.19.8 hold these amounts (``scripts/benchmarks/training_memory.py held``).

DeepSpeed's estimators (``estimate_zero2_model_states_mem_needs`` and the one of stage 3) cover neither stage 1 nor
activations. They agree with these formulas except as follows (``scripts/benchmarks/training_memory.py deepspeed``):

* In stage 2 they add 2 A / N of 16-bit gradients, which stay if gradients are accumulated in 16 bits; here they pass
  through buckets. With offloading, their gradients leave the GPU at once; here float32 ones accumulate on it: 4 A / N.
* In stage 3 they add the largest layer, gathered, and no buckets; ``buffers`` follows DeepSpeed's settings.
* On the host they count a node, 16 A / N for each of its processes, without the 16-bit weights and the second gradient.
  They multiply by ``additional_buffer_factor`` (1.5, a reserve for the rest). In stage 2 they take at least 4 P for
  every process of all nodes, as if each had loaded float32 weights there.
"""

# R sequences, T positions of a sequence, D width of the transformer, H heads, V vocabulary
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from cogview.device import DTYPE_BYTES
from cogview.errors import InputError
from cogview.formatting import format_gigabytes
from cogview.kernels.attention import SHORT_KEYS
from cogview.kernels.fused_linear_cross_entropy import CHUNK_BYTES, CHUNK_BYTES_GPU
from cogview.modeling.checkpointing import Checkpointing
from cogview.modeling.config import PROJECTIONS, TransformerConfig
from cogview.planning import ESTIMATE_MARGIN
from cogview.planning.hardware import OVERHEAD

Precision = Literal["float32", "bfloat16", "float16"]
CHECKPOINTING_MODES: Sequence[Checkpointing] = get_args(Checkpointing)  # in the order of increasing recomputation
ENGINES = ("torch", "deepspeed")

# Numbers of the residual stream (R x T x D) that keep a GPU busy: the inner projection of a layer then has enough tiles
# (128 x 256) for about 130 multiprocessors twice over. Below it, a larger batch is worth recomputation.
MIN_GPU_WORK = 2_000_000

# Bytes that autograd keeps of one layer, for each of R x T x D. Float32: the inputs of the LayerNorms, scaled.
NORMS = 4 * 4
# Tensors in the precision of products: the inputs of the first projections of both branches, q, k and v, the output of
# the attention, and the inner layer (4 D) before and after GELU.
PRODUCT_WIDTHS = 2 + 3 + 1 + 4 + 4
# Those that `selective` keeps: q, k and v, the output of the attention, and the outputs of the other projections.
RESULT_WIDTHS = 3 + 1 + 1 + 4 + 1
DROPOUTS = 2  # of a layer; one mask each
# Bytes for each of R x T, float32: divisor, mean and deviation of four norms; and for each head the log-sum-exp of its
# scores.
STATISTICS, HEAD_STATISTICS = 4 * 3 * 4, 4
# Bytes of each score of the reference attention, which short sequences use on a CPU: minus the maximum and after the
# softmax in float32, and once more in 16 bits.
SCORE_BYTES = {4: 8, 2: 10}
# Temporaries of a layer's backward, by the bytes of a number: for each of R x T x D the gradients in flight (measured
# on a CPU), and for each of D x D the float32 gradient of the largest projection.
BACKWARD = {4: 8, 2: 16}
GRADIENT = 4 * 4
# Outside the layers: the norm of the last layer's output, scaled and unscaled.
ENDS = 2 * 4
# Float32 copies of a chunk of logits during the loss; a CPU that rounds the gradients to 16 bits has one more.
LOGIT_COPIES = {4: 1, 2: 2}

# DeepSpeed's settings, unless a recipe changes them (numbers, not bytes).
REDUCE_BUCKET = 500_000_000  # maximum of the gradients in one message; allocated whole
MAX_LIVE = 1_000_000_000  # gathered weights of stage 3


@dataclass(frozen=True, kw_only=True)
class TrainingJob:
    """Model, batch and engine of a training run.

    A step computes the gradients of ``batch_size`` sequences. Each of ``world_size`` processes computes an equal part
    of them, ``micro_batch_size`` at once.

    Raises:
        InputError: A setting is unknown or below 1, or two settings contradict each other.
    """

    transformer: TransformerConfig
    length: int  # positions of a sequence
    micro_batch_size: int  # sequences that a process computes at once
    batch_size: int  # sequences of a step, over all processes
    precision: Precision = "bfloat16"  # of products
    engine: Literal["torch", "deepspeed"] = "torch"
    zero: int = 0  # DeepSpeed's ZeRO stage
    world_size: int = 1  # processes, one GPU each
    offload: bool = False  # whether the optimizer is on the host
    checkpointing: Checkpointing = "none"
    trainable: int | None = None  # trained parameters; None: all
    device_type: str = "cuda"

    def __post_init__(self) -> None:
        """Check the settings."""
        for name, known in (("precision", DTYPE_BYTES), ("engine", ENGINES), ("checkpointing", CHECKPOINTING_MODES)):
            if getattr(self, name) not in known:
                raise InputError(f"{name} {getattr(self, name)!r} is unknown; known: {', '.join(known)}")
        if self.device_type not in OVERHEAD:
            raise InputError(f"device type {self.device_type!r} is unknown; known: {', '.join(OVERHEAD)}")
        for name in ("length", "micro_batch_size", "batch_size", "world_size"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.batch_size % self.world_size:
            raise InputError(f"a batch of {self.batch_size} rows does not divide among {self.world_size} processes")
        if self.micro_batch_size > self.local_batch_size:
            raise InputError(
                f"micro_batch_size must be at most {self.local_batch_size}, the rows of a process in a batch of "
                f"{self.batch_size}, got {self.micro_batch_size}"
            )
        if self.engine == "torch" and (self.zero or self.offload):
            what = f"ZeRO stage {self.zero}" if self.zero else "offloading the optimizer"
            raise InputError(f"{what} needs the engine deepspeed, got torch")
        if self.engine == "deepspeed" and self.zero not in (1, 2, 3):
            raise InputError(f"zero must be 1, 2 or 3 with the engine deepspeed, got {self.zero}")
        if self.trainable is not None and self.trainable < 1:
            raise InputError(f"the trained parameters must be at least 1, got {self.trainable}")

    @property
    def local_batch_size(self) -> int:
        """Sequences of a step that one process computes."""
        return self.batch_size // self.world_size

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches of a process in a step."""
        return -(-self.local_batch_size // self.micro_batch_size)

    @property
    def number_bytes(self) -> int:
        """Bytes of a number in the precision of products."""
        return DTYPE_BYTES[self.precision]

    @property
    def parameters(self) -> int:
        """Parameters of the model, and of an adapter if there is one."""
        return self.transformer.num_parameters + (self.trainable or 0)

    @property
    def trained(self) -> int:
        """Trained parameters."""
        return self.parameters if self.trainable is None else self.trainable


@dataclass(frozen=True, kw_only=True)
class TrainingMemory:
    """Bytes of one process at the peak of a step: on its device, and ``host`` on the CPU with offloading."""

    weights: int
    gradients: int
    optimizer: int
    buffers: int  # of DeepSpeed: gradients to reduce, and gathered weights
    activations: int  # kept for the backward, and temporaries of the layer that runs there
    logits: int  # a chunk of them, and the gradients of the loss
    overhead: int  # Python and PyTorch, the context of a GPU
    host: int

    @property
    def states(self) -> int:
        """Weights, gradients and optimizer: the parts that ZeRO shards."""
        return self.weights + self.gradients + self.optimizer

    @property
    def total(self) -> int:
        """Bytes on the device."""
        return self.states + self.buffers + self.activations + self.logits + self.overhead


def training_memory(job: TrainingJob) -> TrainingMemory:
    """Return the memory of one process of ``job``, by the formulas at the top of this file.

    Sequences are assumed to have no padding. Gradients count from the start, as in every micro-batch but the first.
    """
    weights, gradients, optimizer, host = _states(job)
    return TrainingMemory(
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        buffers=_buffers(job),
        activations=_activations(job),
        logits=_logits(job),
        overhead=OVERHEAD[job.device_type],
        host=host,
    )


def _states(job: TrainingJob) -> tuple[int, int, int, int]:
    """Return the bytes of weights, gradients and optimizer on the device, and those on the host."""
    shape, size, trained = job.transformer, job.number_bytes, job.trained
    if job.engine == "torch":
        return 4 * job.parameters + shape.num_layers * _autocast_copy(job), 4 * trained, 8 * trained, 0
    shard = -(-trained // job.world_size)
    weights = size * (job.parameters if job.zero < 3 else -(-job.parameters // job.world_size))
    gradients = 4 * (shard if job.zero > 1 else trained) + (size * trained if _keeps_bfloat16_gradients(job) else 0)
    if not job.offload:
        return weights, gradients, 12 * shard, 0
    if job.zero == 3:
        return weights, 0, 0, (12 + 4 + 4) * shard
    return weights, gradients, 0, (12 + 4 + size) * shard


def _autocast_copy(job: TrainingJob) -> int:
    """Return the bytes of autocast's copy of the weights of one layer.

    Autocast caches it for the whole forward; without checkpointing the backward keeps it, too.
    """
    shape, size = job.transformer, job.number_bytes
    return size * (12 * shape.width**2 + 9 * shape.width) if job.engine == "torch" and size < 4 else 0


def _keeps_bfloat16_gradients(job: TrainingJob) -> bool:
    """Return whether DeepSpeed uses its bfloat16 optimizer, which accumulates after all gradients are computed."""
    return job.precision == "bfloat16" and job.zero == 1 and not job.offload


def _buffers(job: TrainingJob) -> int:
    """Return the bytes of DeepSpeed's buckets; gradients of DistributedDataParallel are views of its buckets."""
    size = job.number_bytes
    largest = job.transformer.vocabulary_size * job.transformer.width if job.trainable is None else 0
    if job.engine == "torch" or _keeps_bfloat16_gradients(job):
        return 0
    num_buckets = 2 if job.device_type == "cuda" else 1  # one is filled while the other is reduced
    bucket = min(job.trained, REDUCE_BUCKET)
    if job.zero < 3:
        return num_buckets * bucket * (4 if job.zero == 1 else size) + (size * largest if job.offload else 0)
    gathered = size * min(job.parameters, MAX_LIVE)
    return gathered + 2 * size * bucket  # and a copy in the order of the processes


def layer_activations(
    shape: TransformerConfig, length: int, precision: str, device_type: str, checkpointing: Checkpointing = "none"
) -> int:
    """Return the bytes that one layer keeps of one sequence for its backward.

    Args:
        shape: Shape of the transformer.
        length: Positions of the sequence. On a CPU, up to 128 positions keep their attention scores as well.
        precision: float32, bfloat16 or float16.
        device_type: cpu, cuda or mps.
        checkpointing: ``none`` keeps all that autograd saves, ``full`` the layer's input in float32, and
            ``selective`` also the outputs of projections and attention.
    """
    size = DTYPE_BYTES[precision]
    scores = shape.num_heads * length if device_type == "cpu" and length <= SHORT_KEYS else 0  # of each position
    # Window attention keeps copies of the keys and values of pivots.
    pivots = min(shape.attention.pivots, length) if checkpointing == "none" else 0
    if checkpointing == "full":
        each = 4 * shape.width
    elif checkpointing == "selective":
        each = (4 + RESULT_WIDTHS * size) * shape.width + HEAD_STATISTICS * shape.num_heads + size * scores
    else:
        each = (NORMS + PRODUCT_WIDTHS * size) * shape.width + STATISTICS + HEAD_STATISTICS * shape.num_heads
        if shape.dropout:  # a CPU keeps the factors, a GPU a byte for each
            each += DROPOUTS * (size if device_type == "cpu" else 1) * shape.width
        each += SCORE_BYTES[size] * scores
    return length * each + 2 * size * pivots * shape.width


def _activations(job: TrainingJob) -> int:
    """Return the bytes kept for the backward, and the excess of its temporaries over those freed before.

    Memory peaks either in the loss or in the backward of the last layer.
    """
    shape, size = job.transformer, job.number_bytes
    sequence = shape.width * job.length

    def kept(mode: Checkpointing) -> int:
        return layer_activations(shape, job.length, job.precision, job.device_type, mode)

    backward = job.micro_batch_size * BACKWARD[size] * sequence + GRADIENT * shape.width**2
    freed = _loss_temporaries(job)
    if job.checkpointing != "none":
        recomputed = kept("none") - (kept(job.checkpointing) - 4 * sequence)
        backward += job.micro_batch_size * recomputed
        freed += (shape.num_layers - 1) * _autocast_copy(job)
    held = job.micro_batch_size * (shape.num_layers * kept(job.checkpointing) + ENDS * sequence)
    return held + max(0, backward - freed)


def _logits(job: TrainingJob) -> int:
    """Return the bytes of the loss: its temporaries, and float32 gradients of hidden states and embedding."""
    shape = job.transformer
    embedding = 4 * shape.vocabulary_size * shape.width if job.trainable is None else 0
    return 4 * job.micro_batch_size * job.length * shape.width + embedding + _loss_temporaries(job)


def _loss_temporaries(job: TrainingJob) -> int:
    """Return the bytes that the fused loss frees at its end (``kernels/fused_linear_cross_entropy.py``).

    They are a chunk of logits over the whole vocabulary and its derivatives; in 16 bits also the embedding, cast from
    float32, and the product that becomes its gradient.
    """
    shape, size = job.transformer, job.number_bytes
    max_chunk = CHUNK_BYTES.get(job.device_type, CHUNK_BYTES_GPU)
    chunk = min(max_chunk, size * job.micro_batch_size * job.length * shape.vocabulary_size)
    copies = LOGIT_COPIES[size] if job.device_type == "cpu" else 1
    embedding = size * shape.vocabulary_size * shape.width if size < 4 else 0
    product = embedding if job.trainable is None else 0
    cast = embedding if job.engine == "torch" else 0
    return chunk + cast + max(copies * chunk * 4 // size, product)


def choose_micro_batch(
    job: TrainingJob,
    free_bytes: float,
    checkpointing: Checkpointing | None = None,
    micro_batch_size: int | None = None,
) -> tuple[int, Checkpointing]:
    """Choose a micro-batch and checkpointing so that ``job`` fits in ``free_bytes``.

    The micro-batch is the largest divisor of a process's sequences that fits. Checkpointing is the mode of minimum
    recomputation whose micro-batch reaches ``MIN_GPU_WORK`` or holds all sequences; failing that, the first mode that
    fits.

    Args:
        job: The job; its micro-batch and checkpointing are ignored.
        free_bytes: Bytes that are free on the device.
        checkpointing: A given mode, or None to choose it.
        micro_batch_size: A given size, or None to choose it.

    Returns:
        The sequences of a micro-batch, and the checkpointing mode. If the states fit but not one sequence, the maximum
        of recomputation, which is worth a try.

    Raises:
        InputError: Weights, gradients and optimizer do not fit by themselves.
    """
    modes = CHECKPOINTING_MODES if checkpointing is None else (checkpointing,)
    found: list[tuple[int, Checkpointing]] = []
    for mode in modes:
        candidate = replace(job, micro_batch_size=micro_batch_size or 1, checkpointing=mode)
        if micro_batch_size is not None:
            size, is_enough = micro_batch_size if fits(candidate, free_bytes) else 0, True
        else:
            size = max_micro_batch(candidate, free_bytes)
            work = size * job.length * job.transformer.width
            is_enough = size == job.local_batch_size or work >= MIN_GPU_WORK
        if size and is_enough:
            return size, mode
        found += [(size, mode)] if size else []
    if found:
        return found[0]
    states = training_memory(job).states
    if states > free_bytes:
        raise InputError(
            f"training takes {format_gigabytes(states)} for weights, gradients and optimizer, but only "
            f"{format_gigabytes(free_bytes)} are free: shard them over more GPUs (engine deepspeed, zero 2 or 3), "
            "keep the optimizer on the host (offload), or train an adapter (lora)"
        )
    return micro_batch_size or 1, modes[-1]


def fits(job: TrainingJob, free_bytes: float) -> bool:
    """Return whether ``job`` fits in ``free_bytes`` of a device, less ``ESTIMATE_MARGIN``.

    Args:
        job: The training job.
        free_bytes: Free bytes of a device.
    """
    return training_memory(job).total <= (1 - ESTIMATE_MARGIN) * free_bytes


def max_micro_batch(job: TrainingJob, free_bytes: float) -> int:
    """Return the largest divisor of a process's sequences that fits as a micro-batch, 0 if none does.

    Args:
        job: The training job.
        free_bytes: Free bytes of a device.
    """
    sizes = divisors(job.local_batch_size)[::-1]
    return next((size for size in sizes if fits(replace(job, micro_batch_size=size), free_bytes)), 0)


def divisors(count: int) -> list[int]:
    """Return the divisors of ``count`` in ascending order."""
    small = [number for number in range(1, int(count**0.5) + 1) if count % number == 0]
    return sorted({*small, *(count // number for number in small)})


def lora_parameters(shape: TransformerConfig, rank: int) -> int:
    """Return the parameters of a LoRA adapter on all projections of a layer: rank x (inputs + outputs) each.

    Args:
        shape: Config of the transformer.
        rank: Rank of the adapter.
    """
    return shape.num_layers * rank * shape.width * sum(map(sum, PROJECTIONS.values()))
