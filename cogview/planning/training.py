"""How much memory and time training takes, by formulas: nothing is loaded or tried.

``training_memory`` gives the bytes of one process by part. With P parameters of which A are trained, N processes and s
bytes of a number in the products' precision:

    part        torch                              DeepSpeed, ZeRO stage
    weights     4 P, and s per weight of a layer   s P (stage 3: s P / N)
    gradients   4 A                                1: 4 A, and s A in bfloat16; 2: 4 A / N; 3: 4 A / N
    optimizer   8 A: Adam's two moments            12 A / N: the float32 masters and both moments

DeepSpeed adds gradients up in float32, as our configuration asks it to, since the parts of a large batch are many. Its
stage 1 divides the optimizer alone and keeps whole gradients: in bfloat16 those of the parts' products as well, until
all are there. Offloaded, the optimizer and a float32 gradient to update from are on the host, with room for the half
weights on their way back: 18 A / N (stage 3, which adds gradients up there: 20 A / N). That is what two processes of
DeepSpeed 0.19.8 hold (``scripts/benchmarks/training_memory.py held``).

DeepSpeed's own estimators (``estimate_zero2_model_states_mem_needs`` and that of stage 3) know no stage 1 and no
activations. What both estimate is alike; for the rest (``scripts/benchmarks/training_memory.py deepspeed``):

* In stage 2 they count 2 A / N of half gradients on top, which stay where gradients are added up in half precision;
  ours pass through buckets. Offloaded, theirs leave the GPU at once; float32 ones are added up there: 4 A / N.
* In stage 3 they count the largest layer, gathered, and no buckets; ``buffers`` has what DeepSpeed's settings allow.
* On the host they count a whole node, 16 A / N for each of its processes, without the half weights and the second
  gradient; they multiply by ``additional_buffer_factor`` (1.5: slack for what they leave out), and in stage 2 take at
  least 4 P for every process of all nodes, as if each had loaded the weights in float32 there.
"""

# R rows, T positions of a row, D width of the transformer, H heads, V vocabulary
from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from cogview.device import DTYPE_BYTES
from cogview.errors import InputError
from cogview.formatting import format_gigabytes
from cogview.kernels.attention import SHORT_KEYS
from cogview.kernels.fused_linear_cross_entropy import CHUNK_BYTES, CHUNK_BYTES_GPU
from cogview.modeling.config import PROJECTIONS, TransformerConfig, preset
from cogview.modeling.transformer import Checkpointing
from cogview.planning import ESTIMATE_MARGIN
from cogview.planning.inference import OVERHEAD
from cogview.tokenizers.vocabulary import Vocabulary

Precision = Literal["float32", "bfloat16", "float16"]
CHECKPOINTING_MODES: Sequence[Checkpointing] = get_args(Checkpointing)  # the least recomputation first
ENGINES = ("torch", "deepspeed")

# Numbers of the residual stream (R x T x D) that keep a GPU at work: the inner projection of a layer then has as many
# tiles (128 x 256) as fill some 130 processors twice. With fewer, rows are worth recomputing for.
MIN_GPU_WORK = 2_000_000
MFU = 0.4  # share of a card's peak that training is taken to reach: assumed; 0.35 to 0.5 are reported of such models

# Bytes of what autograd keeps of one layer, for each of R x T x D. Float32: what goes into the LayerNorms, scaled.
NORMS = 4 * 4
# In the products' precision: the inputs of the first projections of both branches, q, k and v, what the attention
# gives, and the inner layer (4 D) before and after GELU.
PRODUCT_WIDTHS = 2 + 3 + 1 + 4 + 4
# Of these, what `selective` keeps: q, k and v, what the attention gives, and the results of the other projections.
RESULT_WIDTHS = 3 + 1 + 1 + 4 + 1
DROPOUTS = 2  # of a layer; one mask each
# For each of R x T, float32: what each of four norms divided by, its mean and its deviation; and for each head the sum
# of the attention's weights.
STATISTICS, HEAD_STATISTICS = 4 * 3 * 4, 4
# Of each score of the attention's reference, which short rows take on a CPU: without its maximum and after the softmax
# in float32, and once more in half precision.
SCORE_BYTES = {4: 8, 2: 10}
# What a layer's backward has besides, by the bytes of a number: for each of R x T x D its gradients on their way (seen
# on a CPU), and for each of D x D the gradient of its largest projection in float32.
BACKWARD = {4: 8, 2: 16}
GRADIENT = 4 * 4
# Around the layers: the norm of the last layer's output, scaled and as it is.
ENDS = 2 * 4
# A chunk of logits is there once more in float32 while its losses are computed; a CPU that rounds the gradients to half
# precision has them so, too.
LOGIT_COPIES = {4: 1, 2: 2}

# DeepSpeed's settings, where a recipe leaves them as they are (numbers, not bytes).
REDUCE_BUCKET = 500_000_000  # gradients that are sent at a time, if there are so many; allocated whole
MAX_LIVE = 1_000_000_000  # gathered weights of stage 3

# Of each card its dense peak, in FLOP/s: of tensor cores that add up in float32, and for float32 of its other cores,
# since PyTorch does not use TF32 unless it is told to. From the vendors' data sheets and architecture papers. A key is
# part of the name that PyTorch tells.
GPU_PEAK_FLOPS: Mapping[str, Mapping[str, float]] = {
    "V100-SXM2": {"float16": 125e12, "float32": 15.7e12},
    "V100-PCIE": {"float16": 112e12, "float32": 14e12},
    "T4": {"float16": 65e12, "float32": 8.1e12},
    "RTX 2080 Ti": {"float16": 53.8e12, "float32": 13.4e12},
    "RTX 3090": {"float16": 71e12, "bfloat16": 71e12, "float32": 35.6e12},
    "RTX 3090 Ti": {"float16": 80e12, "bfloat16": 80e12, "float32": 40e12},
    "RTX 4090": {"float16": 165.2e12, "bfloat16": 165.2e12, "float32": 82.6e12},
    "RTX A6000": {"float16": 154.8e12, "bfloat16": 154.8e12, "float32": 38.7e12},
    "A10": {"float16": 125e12, "bfloat16": 125e12, "float32": 31.2e12},
    "A30": {"float16": 165e12, "bfloat16": 165e12, "float32": 10.3e12},
    "A40": {"float16": 149.7e12, "bfloat16": 149.7e12, "float32": 37.4e12},
    "A100": {"float16": 312e12, "bfloat16": 312e12, "float32": 19.5e12},
    "A800": {"float16": 312e12, "bfloat16": 312e12, "float32": 19.5e12},
    "L4": {"float16": 121e12, "bfloat16": 121e12, "float32": 30.3e12},
    "L40S": {"float16": 362e12, "bfloat16": 362e12, "float32": 91.6e12},
    "H100": {"float16": 989e12, "bfloat16": 989e12, "float32": 67e12},
    "H100 PCIe": {"float16": 756e12, "bfloat16": 756e12, "float32": 51e12},
    "H100 NVL": {"float16": 835e12, "bfloat16": 835e12, "float32": 60e12},
    "H200": {"float16": 989e12, "bfloat16": 989e12, "float32": 67e12},
    "H200 NVL": {"float16": 835e12, "bfloat16": 835e12, "float32": 60e12},
    "MI300X": {"float16": 1307e12, "bfloat16": 1307e12, "float32": 163.4e12},
}
# What makes another card of a name that goes on so, or a part of a card.
OTHER_GPU_NAMES = r"(?! (Ti|SUPER|D|Ada|Laptop)\b)(?!.*\bMIG\b)"


def peak_flops(name: str, precision: str) -> float | None:
    """Dense FLOP/s of the card that PyTorch calls ``name``; None for an unknown card, or one without that precision."""
    known = [key for key in GPU_PEAK_FLOPS if re.search(rf"\b{key}\b{OTHER_GPU_NAMES}", name, re.IGNORECASE)]
    return GPU_PEAK_FLOPS[max(known, key=len)].get(precision) if known else None


@dataclass(frozen=True, kw_only=True)
class TrainingJob:
    """What is trained, and how; InputError where that cannot be.

    Gradients of ``batch`` rows make a step. Each of ``world`` processes computes its share of them, ``rows`` at once.
    """

    transformer: TransformerConfig
    length: int  # positions of a row
    micro_batch_size: int  # of one process at once
    batch_size: int  # rows of a step, of all processes
    precision: Precision = "bfloat16"
    engine: Literal["torch", "deepspeed"] = "torch"
    zero: int = 0  # stage, DeepSpeed's
    world_size: int = 1  # processes, one GPU each
    offload: bool = False  # the optimizer's numbers are on the host
    checkpointing: Checkpointing = "none"
    trainable: int | None = None  # trained parameters; None: all
    device_type: str = "cuda"

    def __post_init__(self) -> None:
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
                f"{self.micro_batch_size} rows at once are more than the {self.local_batch_size} of a process in a batch of {self.batch_size}"
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
        """Rows of a step that one process computes."""
        return self.batch_size // self.world_size

    @property
    def num_micro_batches(self) -> int:
        """How many times a process computes ``rows`` for a step."""
        return -(-self.local_batch_size // self.micro_batch_size)

    @property
    def number_bytes(self) -> int:
        """Bytes of a number in the precision of products."""
        return DTYPE_BYTES[self.precision]

    @property
    def parameters(self) -> int:
        """All of them; an adapter's come on top of the model's."""
        return self.transformer.num_parameters + (self.trainable or 0)

    @property
    def trained(self) -> int:
        """Those that are learnt."""
        return self.parameters if self.trainable is None else self.trainable


@dataclass(frozen=True, kw_only=True)
class TrainingMemory:
    """Bytes of one process by part, at the peak of a step: on its device, and ``host`` on the CPU where offloaded."""

    weights: int
    gradients: int
    optimizer: int
    buffers: int  # of DeepSpeed: gradients that are sent, and gathered weights
    activations: int  # kept for the backward, and those of the layer that is at work there
    logits: int  # a chunk of them, and the gradients that the loss makes with it
    overhead: int  # Python and PyTorch, a GPU's context
    host: int

    @property
    def states(self) -> int:
        """Weights, gradients and optimizer: what is divided among processes."""
        return self.weights + self.gradients + self.optimizer

    @property
    def total(self) -> int:
        """Bytes on the device."""
        return self.states + self.buffers + self.activations + self.logits + self.overhead


def training_memory(job: TrainingJob) -> TrainingMemory:
    """The memory of one process of ``job``; see the top of this file for what it holds.

    Activations are those of dense rows. Gradients are counted as if they were there from the start, as they are for all
    parts of a step but the first.
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
    """Bytes of weights, gradients, optimizer, and of what is on the host."""
    shape, size, trained = job.transformer, job.number_bytes, job.trained
    if job.engine == "torch":
        return 4 * job.parameters + shape.num_layers * _converted(job), 4 * trained, 8 * trained, 0
    share = -(-trained // job.world_size)
    weights = size * (job.parameters if job.zero < 3 else -(-job.parameters // job.world_size))
    gradients = 4 * (share if job.zero > 1 else trained) + (size * trained if _keeps_half_gradients(job) else 0)
    if not job.offload:
        return weights, gradients, 12 * share, 0
    if job.zero == 3:
        return weights, 0, 0, (12 + 4 + 4) * share
    return weights, gradients, 0, (12 + 4 + size) * share


def _converted(job: TrainingJob) -> int:
    """Bytes of what autocast makes of the weights of one layer.

    It keeps them for the whole forward, and where nothing is computed again the backward keeps them, too.
    """
    shape, size = job.transformer, job.number_bytes
    return size * (12 * shape.width**2 + 9 * shape.width) if job.engine == "torch" and size < 4 else 0


def _keeps_half_gradients(job: TrainingJob) -> bool:
    """Whether DeepSpeed has an optimizer of its own for bfloat16, which sums up gradients when all are there."""
    return job.precision == "bfloat16" and job.zero == 1 and not job.offload


def _buffers(job: TrainingJob) -> int:
    """Bytes of what travels in DeepSpeed; in DistributedDataParallel gradients lie in what is sent."""
    size = job.number_bytes
    largest = job.transformer.vocabulary_size * job.transformer.width if job.trainable is None else 0
    if job.engine == "torch" or _keeps_half_gradients(job):
        return 0
    two = 2 if job.device_type == "cuda" else 1  # one is filled while the other is sent
    bucket = min(job.trained, REDUCE_BUCKET)
    if job.zero < 3:
        return two * bucket * (4 if job.zero == 1 else size) + (size * largest if job.offload else 0)
    gathered = size * min(job.parameters, MAX_LIVE)
    return gathered + 2 * size * bucket  # once more, in the order of the processes


def layer_activations(
    shape: TransformerConfig, length: int, precision: str, device_type: str, checkpointing: Checkpointing = "none"
) -> int:
    """Bytes that one layer keeps of one row for its backward.

    ``none``: all that autograd keeps. ``full``: the layer's input, float32. ``selective``: that, and the results of
    products and of attention. On a CPU rows of up to 128 positions keep their scores as well.
    """
    size = DTYPE_BYTES[precision]
    scores = shape.num_heads * length if device_type == "cpu" and length <= SHORT_KEYS else 0  # of each position
    if checkpointing == "full":
        each = 4 * shape.width
    elif checkpointing == "selective":
        each = (4 + RESULT_WIDTHS * size) * shape.width + HEAD_STATISTICS * shape.num_heads + size * scores
    else:
        each = (NORMS + PRODUCT_WIDTHS * size) * shape.width + STATISTICS + HEAD_STATISTICS * shape.num_heads
        if shape.dropout:  # a CPU keeps what it multiplied with, a GPU a byte
            each += DROPOUTS * (size if device_type == "cpu" else 1) * shape.width
        each += SCORE_BYTES[size] * scores
    return length * each


def _activations(job: TrainingJob) -> int:
    """Bytes that are kept, and what the backward of a layer has at work, as far as it is more than what went before it.

    The two moments at which memory may peak are that of the loss, and the backward of the last layer.
    """
    shape, size = job.transformer, job.number_bytes
    place = shape.width * job.length

    def kept(mode: Checkpointing) -> int:
        return layer_activations(shape, job.length, job.precision, job.device_type, mode)

    at_work = job.micro_batch_size * BACKWARD[size] * place + GRADIENT * shape.width**2
    gone = _loss_at_work(job)
    if job.checkpointing != "none":
        recomputed = kept("none") - (kept(job.checkpointing) - 4 * place)
        at_work += job.micro_batch_size * recomputed
        gone += (shape.num_layers - 1) * _converted(job)
    held = job.micro_batch_size * (shape.num_layers * kept(job.checkpointing) + ENDS * place)
    return held + max(0, at_work - gone)


def _logits(job: TrainingJob) -> int:
    """Bytes of the sliced loss: what it has at work, and the gradients of hidden states and embedding, float32."""
    shape = job.transformer
    embedding = 4 * shape.vocabulary_size * shape.width if job.trainable is None else 0
    return 4 * job.micro_batch_size * job.length * shape.width + embedding + _loss_at_work(job)


def _loss_at_work(job: TrainingJob) -> int:
    """Bytes that the fused loss gives back (``kernels/fused_linear_cross_entropy.py``), as if all ids competed.

    A chunk of logits and what is made of it; and in half precision the rows of the embedding, if they are float32, and
    the product that becomes their gradient.
    """
    shape, size = job.transformer, job.number_bytes
    most = CHUNK_BYTES.get(job.device_type, CHUNK_BYTES_GPU)
    chunk = min(most, size * job.micro_batch_size * job.length * shape.vocabulary_size)
    copies = LOGIT_COPIES[size] if job.device_type == "cpu" else 1
    rows = size * shape.vocabulary_size * shape.width if size < 4 else 0
    product = rows if job.trainable is None else 0
    return chunk + (rows if job.engine == "torch" else 0) + max(copies * chunk * 4 // size, product)


def choose_micro_batch(
    job: TrainingJob, free_bytes: float, checkpointing: Checkpointing | None = None, rows: int | None = None
) -> tuple[int, Checkpointing]:
    """How many rows to compute at once, and what to recompute, so that ``job`` fits in ``free_bytes``.

    The rows are the largest divisor of a process's share of the batch that fits with the least recomputation which
    leaves ``ENOUGH`` to do at once, or all rows; where none does, with the least that fits at all. ``checkpointing``
    and ``rows`` are taken where they are given; those of ``job`` do not count. InputError where weights and what
    belongs to them do not fit by themselves; where they do, but no row, the most recomputation is worth a try.
    """
    modes = CHECKPOINTING_MODES if checkpointing is None else (checkpointing,)
    found: list[tuple[int, Checkpointing]] = []
    for mode in modes:
        own = replace(job, micro_batch_size=rows or 1, checkpointing=mode)
        if rows is not None:
            most, enough = rows if fits(own, free_bytes) else 0, True
        else:
            most = max_micro_batch(own, free_bytes)
            enough = most == job.local_batch_size or most * job.length * job.transformer.width >= MIN_GPU_WORK
        if most and enough:
            return most, mode
        found += [(most, mode)] if most else []
    if found:
        return found[0]
    states = training_memory(job).states
    if states > free_bytes:
        raise InputError(
            f"training takes {format_gigabytes(states)} for weights, gradients and optimizer, of which "
            f"{format_gigabytes(free_bytes)} are free: divide them among more GPUs (engine deepspeed, zero 2 or 3), "
            "keep the optimizer on the host (offload), or train an adapter (lora)"
        )
    return rows or 1, modes[-1]


def fits(job: TrainingJob, free_bytes: float) -> bool:
    """Whether ``job`` fits in ``free_bytes`` of a device, of which ``ESTIMATE_MARGIN`` stays free."""
    return training_memory(job).total <= (1 - ESTIMATE_MARGIN) * free_bytes


def max_micro_batch(job: TrainingJob, free_bytes: float) -> int:
    """The largest divisor of a process's share of the batch that fits at once; 0 where not even 1 does."""
    return next(
        (
            rows
            for rows in divisors(job.local_batch_size)[::-1]
            if fits(replace(job, micro_batch_size=rows), free_bytes)
        ),
        0,
    )


def divisors(count: int) -> list[int]:
    """All whole numbers that divide ``count``, in order."""
    small = [number for number in range(1, int(count**0.5) + 1) if count % number == 0]
    return sorted({*small, *(count // number for number in small)})


def lora_parameters(shape: TransformerConfig, rank: int) -> int:
    """Parameters of an adapter of ``rank`` on the four projections of every layer: rank x (inputs + outputs) each."""
    return shape.num_layers * rank * shape.width * sum(map(sum, PROJECTIONS.values()))


def flops_per_token(shape: TransformerConfig, length: int) -> float:
    """Operations of forward and backward for one position of a row of ``length``, counted as is usual.

    6 for each parameter that is multiplied, the whole output embedding among them, and 6 L D T for causal attention,
    which looks at T / 2 positions on average. It is the figure behind model FLOP/s utilisation (MFU), to compare with
    others; what is recomputed does not count. 24.35e9 for the 4b at 1,089 positions.
    """
    return _flops_per_token(shape, length, shape.vocabulary_size, recomputed=False)


def multiplied_flops_per_token(
    shape: TransformerConfig,
    length: int,
    competing: int = Vocabulary().num_image_codes,
    checkpointing: Checkpointing = "none",
) -> float:
    """Operations that are really done for a position where ``competing`` ids are told apart, as an image code is.

    The loss multiplies no other rows of the embedding (``kernels/fused_linear_cross_entropy.py``).
    ``full`` checkpointing computes every layer a second time; ``selective`` no product.
    """
    return _flops_per_token(shape, length, competing, recomputed=checkpointing == "full")


def _flops_per_token(shape: TransformerConfig, length: int, head_rows: int, *, recomputed: bool) -> float:
    forward = shape.num_layers * (24.0 * shape.width**2 + 2.0 * shape.width * length)
    return (4 if recomputed else 3) * forward + 6.0 * head_rows * shape.width


def training_time(job: TrainingJob, tokens: float, flops_per_second: float, mfu: float = MFU) -> float:
    """Seconds for ``tokens`` positions on GPUs of ``flops_per_second`` each.

    ``mfu`` is the share of these that a step without recomputation reaches; with ``full`` checkpointing it takes longer
    by what is computed twice.
    """
    if not 0 < mfu <= 1:
        raise InputError(f"mfu must be above 0 and at most 1, got {mfu:g}")
    once, done = (
        _flops_per_token(job.transformer, job.length, job.transformer.vocabulary_size, recomputed=recomputed)
        for recomputed in (False, job.checkpointing == "full")
    )
    return (
        tokens
        * flops_per_token(job.transformer, job.length)
        * (done / once)
        / (job.world_size * flops_per_second * mfu)
    )


@dataclass(frozen=True, kw_only=True)
class TrainingPreset:
    """Settings to begin with: usual ones for the size, not measured. Those of the 4b are the paper's."""

    batch: int  # rows of a step
    learning_rate: float  # at the peak
    tokens: float  # positions of all rows of the run
    card: str  # the smallest that one row of the model trains on, as ``--device`` takes it
    checkpointing: Checkpointing  # there

    def steps(self, length: int) -> int:
        """Steps of the run, with rows of ``length`` positions."""
        return round(self.tokens / (self.batch * length))


# About 20 tokens for each parameter (arXiv:2203.15556), the embedding's included, but for the 4b: 144,000 steps of
# 6,144 rows of 1,089 positions (arXiv:2105.13290). Learning rates fall with size, as is usual for GPTs, to the 4b's.
TRAINING_PRESETS: Mapping[str, TrainingPreset] = {
    "20m": TrainingPreset(batch=128, learning_rate=1e-3, tokens=0.9e9, card="cuda:4GB", checkpointing="none"),
    "100m": TrainingPreset(batch=256, learning_rate=8e-4, tokens=3e9, card="cuda:6GB", checkpointing="none"),
    "300m": TrainingPreset(batch=512, learning_rate=6e-4, tokens=7.3e9, card="cuda:12GB", checkpointing="none"),
    "1b": TrainingPreset(batch=1024, learning_rate=4e-4, tokens=21e9, card="cuda:24GB", checkpointing="selective"),
    "4b": TrainingPreset(
        batch=6144, learning_rate=3e-4, tokens=144_000 * 6144 * 1089, card="cuda:80GB", checkpointing="full"
    ),
}


def preset_job(name: str, *, world: int = 1) -> TrainingJob:
    """The job of a preset in plain PyTorch, a row at once, as on its smallest card; InputError for an unknown one."""
    if name not in TRAINING_PRESETS:
        raise InputError(f"there are no training settings for {name!r}; known: {', '.join(TRAINING_PRESETS)}")
    own = TRAINING_PRESETS[name]
    shape = preset(name, Vocabulary().padded_size)
    return TrainingJob(
        transformer=shape,
        length=shape.max_positions,
        micro_batch_size=1,
        batch_size=own.batch,
        world_size=world,
        checkpointing=own.checkpointing,
    )
