"""Reports of training estimates, and the table of model sizes, as text and as JSON."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch

from cogview.config_io import to_mapping
from cogview.errors import InputError
from cogview.formatting import format_bytes, format_duration, plural
from cogview.modeling.checkpointing import Checkpointing
from cogview.modeling.config import PRESETS
from cogview.planning import ESTIMATE_MARGIN
from cogview.planning.gpus import GPU_PEAK_FLOPS
from cogview.planning.reports import MemoryPart, describe_limit, usable_bytes
from cogview.planning.target import TargetDevice, TargetModel, find_training_peak, training_precision
from cogview.planning.training import (
    CHECKPOINTING_MODES,
    Precision,
    TrainingJob,
    TrainingMemory,
    choose_micro_batch,
    fits,
    lora_parameters,
    max_micro_batch,
    training_memory,
)
from cogview.planning.training_time import (
    MFU,
    TRAINING_PRESETS,
    TrainingPreset,
    flops_per_token,
    multiplied_flops_per_token,
    preset_job,
    training_time,
)

TABLE_GPU, TABLE_BYTES, TABLE_WORLD_SIZES = "H100", 80e9, (1, 8)  # of the table of sizes
SUGGESTED_RANK = 16  # of the adapter that is suggested if training all weights does not fit
DEFAULT_BATCH_SIZE, TOKENS_PER_PARAMETER = 32, 20  # for a model without a preset (arXiv:2203.15556)


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """Options of a training estimate; None stands for a value that is chosen."""

    gpus: int | None = None  # processes, one GPU each
    engine: Literal["torch", "deepspeed"] | None = None
    zero: int | None = None  # DeepSpeed's ZeRO stage
    offload: bool = False  # keep the optimizer on the host
    micro_batch_size: int | None = None  # sequences that a process computes at once
    batch_size: int | None = None  # sequences of a step, over all processes
    length: int | None = None  # positions of a sequence
    precision: Precision | None = None  # of products
    checkpointing: Checkpointing | None = None
    lora: int | None = None  # rank of an adapter to train
    mfu: float | None = None  # model FLOP/s utilization, in (0, 1]
    tokens: float | None = None  # positions of all sequences of the run


def report_training(
    name: str,
    model: TargetModel,
    target: TargetDevice,
    options: TrainingOptions,
    *,
    flops: float | None = None,
    on_measure: Callable[[torch.device], None] = lambda device: None,
) -> TrainingReport:
    """Estimate the training of a model.

    Args:
        name: Name of the model. Its preset, if there is one, gives the batch and the length of the run.
        model: Settings of the model.
        target: The device of each process.
        options: Options of the run.
        flops: Given FLOP/s of the device, or None.
        on_measure: Called with the device before a measurement, which takes about a second.

    Returns:
        The report, as text or JSON.

    Raises:
        InputError: The options contradict each other.
    """
    shape, settings = model.config.transformer, TRAINING_PRESETS.get(name)
    job = _choose_rows(_build_job(name, model, target, options, settings), target, options)
    peak, source = find_training_peak(target, job.precision, flops, on_measure)
    tokens = settings.tokens if settings is not None else TOKENS_PER_PARAMETER * shape.num_parameters
    return TrainingReport(
        model=name,
        job=job,
        num_codes=model.config.vocabulary.num_image_codes,
        target=target,
        peak=peak,
        peak_source=source,
        mfu=options.mfu or MFU,
        mfu_source="assumed" if options.mfu is None else "given",
        tokens=options.tokens or tokens,
        lora=options.lora,
    )


def _build_job(
    name: str, model: TargetModel, target: TargetDevice, options: TrainingOptions, settings: TrainingPreset | None
) -> TrainingJob:
    """Return the job of ``options``, with a micro-batch of one sequence unless it is given."""
    world_size, zero = options.gpus or 1, options.zero or 0
    engine = options.engine or ("deepspeed" if zero or options.offload else "torch")
    if engine == "deepspeed" and options.zero is None:
        zero = 2 if options.offload else 1
    batch_size = options.batch_size or (settings.batch if settings is not None else DEFAULT_BATCH_SIZE)
    if batch_size % world_size:
        raise InputError(f"--batch-size {batch_size} does not divide among {world_size} GPUs")
    if options.micro_batch_size is not None and batch_size // world_size % options.micro_batch_size:
        raise InputError(
            f"--micro-batch-size {options.micro_batch_size} does not divide the {batch_size // world_size} rows of "
            f"each of {plural(world_size, 'GPU')}, in a batch of {batch_size}"
        )
    shape = model.config.transformer
    tasks = ("generate",) if name in PRESETS else model.config.tasks  # a preset generates, as in arXiv:2105.13290
    return TrainingJob(
        transformer=shape,
        length=options.length or model.config.longest_row(tasks),
        micro_batch_size=options.micro_batch_size or 1,
        batch_size=batch_size,
        precision=options.precision or training_precision(target),
        engine=engine,
        zero=zero,
        world_size=world_size,
        offload=options.offload,
        checkpointing=options.checkpointing or CHECKPOINTING_MODES[0],
        trainable=None if options.lora is None else lora_parameters(shape, options.lora),
        device_type=target.type,
    )


def _choose_rows(job: TrainingJob, target: TargetDevice, options: TrainingOptions) -> TrainingJob:
    """Return ``job`` with the micro-batch and the checkpointing that fit, unless they are given."""
    if options.micro_batch_size is not None and options.checkpointing is not None:
        return job
    try:
        size, mode = choose_micro_batch(job, target.memory, options.checkpointing, options.micro_batch_size)
    except InputError:  # the report then says that the job does not fit
        size, mode = options.micro_batch_size or 1, options.checkpointing or CHECKPOINTING_MODES[-1]
    return replace(job, micro_batch_size=size, checkpointing=mode)


@dataclass(frozen=True, kw_only=True)
class TrainingReport:
    """An estimate of training against the memory of its devices, and its time."""

    model: str
    job: TrainingJob
    num_codes: int  # of the vocabulary
    target: TargetDevice
    peak: float  # FLOP/s of one device
    peak_source: str
    mfu: float
    mfu_source: str  # given or assumed
    tokens: float
    lora: int | None

    @property
    def memory(self) -> TrainingMemory:
        """Bytes of one process."""
        return training_memory(self.job)

    @property
    def fits(self) -> bool:
        """Whether the job fits."""
        return fits(self.job, self.target.memory)

    @property
    def max_micro_batch(self) -> int:
        """Maximum micro-batch that fits, 0 if none does."""
        return max_micro_batch(self.job, self.target.memory)

    @property
    def seconds(self) -> float:
        """Seconds of the run."""
        return training_time(self.job, self.tokens, self.peak, self.mfu)

    @property
    def steps(self) -> int:
        """Steps of the run."""
        return max(1, round(self.tokens / (self.job.batch_size * self.job.length)))

    def suggestions(self) -> list[str]:
        """Return options with which the job would fit; two changes are combined only if no single one helps."""
        changes = self._changes()
        recompute = [change for change in changes if "checkpointing" in change[1]][-1:]
        others = [change for change in changes if change[1] and "checkpointing" not in change[1]]
        pairs = [(f"{first} {second}", {**one, **two}) for first, one in recompute for second, two in others]
        options: list[str] = []
        for candidates in (changes, pairs):
            for option, settings in candidates if not options else ():
                changed = replace(self.job, **settings)
                size = min(self.job.micro_batch_size, max_micro_batch(changed, self.target.memory))
                if size:
                    rows = f"--micro-batch-size {size}" if size < self.job.micro_batch_size else ""
                    options.append(f"{option} {rows}".strip())
        return options

    def _changes(self) -> list[tuple[str, dict[str, Any]]]:
        """Return options with their changes of the job: none, recomputation, ZeRO, offloading, an adapter."""
        job = self.job
        changes: list[tuple[str, dict[str, Any]]] = [("", {})]
        stronger = CHECKPOINTING_MODES[CHECKPOINTING_MODES.index(job.checkpointing) + 1 :]
        changes += [(f"--checkpointing {mode}", {"checkpointing": mode}) for mode in stronger]
        if job.world_size > 1 or job.offload:
            stages = range(job.zero + 1, 4)
            changes += [(f"--zero {stage}", {"engine": "deepspeed", "zero": stage}) for stage in stages]
        for stage in range(max(job.zero, 2), 4) if not job.offload and job.device_type != "cpu" else ():
            option = "--offload" if stage == job.zero else f"--zero {stage} --offload"
            changes.append((option, {"engine": "deepspeed", "zero": stage, "offload": True}))
        if job.trainable is None:
            trainable = lora_parameters(job.transformer, SUGGESTED_RANK)
            changes.append((f"--lora {SUGGESTED_RANK}", {"trainable": trainable}))
        return changes

    def memory_parts(self) -> list[MemoryPart]:
        """Return the parts of a device's memory that are not empty."""
        job, memory = self.job, self.memory
        weights, gradients, optimizer = self._state_formulas()
        kept = {
            "none": "all tensors that autograd saves",
            "selective": "outputs of products; the rest is recomputed",
            "full": "inputs of layers; the rest is recomputed",
        }[job.checkpointing]
        batch = f"{plural(job.micro_batch_size, 'sequence')} x {job.length:,} positions"
        activations = f"{kept}: {job.transformer.num_layers} layers x {batch}"
        overhead = "Python and PyTorch, measured" if job.device_type == "cpu" else "context and kernels, assumed"
        parts = [
            ("weights", memory.weights, weights),
            ("gradients", memory.gradients, gradients),
            ("optimizer", memory.optimizer, optimizer),
            ("buffers", memory.buffers, "gradients to reduce, gathered weights"),
            ("activations", memory.activations, activations),
            ("logits", memory.logits, "a chunk of logits, and the gradients of the loss"),
            ("overhead", memory.overhead, overhead),
        ]
        return [MemoryPart(key=name, name=name, num_bytes=count, formula=how) for name, count, how in parts if count]

    def _state_formulas(self) -> tuple[str, str, str]:
        """Return the formulas of weights, gradients and optimizer."""
        job, size = self.job, self.job.number_bytes
        divided = f" / {job.world_size} GPUs" if job.world_size > 1 else ""
        count = f"{job.parameters:,} parameters"
        trained = count if job.trainable is None else f"{job.trained:,} trained parameters"
        if job.engine == "torch":
            cast = f", and {size} for each that the layers multiply" if size < 4 else ""
            return f"4 bytes x {count}{cast}", f"4 bytes x {trained}", f"8 bytes x {trained}"
        each = self.memory.gradients // job.trained if job.zero == 1 else 4
        return (
            f"{size} bytes x {count}" + (divided if job.zero == 3 else ""),
            f"{each} bytes x {trained}" + (divided if job.zero > 1 else ", whole in stage 1"),
            f"12 bytes x {trained}{divided}",
        )

    def as_text(self) -> list[str]:
        """Return the lines of the report."""
        job, memory = self.job, self.memory
        several = job.world_size > 1
        engine = job.engine + (f" ZeRO {job.zero}" if job.zero else "") + (", offloaded" if job.offload else "")
        adapter = "" if self.lora is None else f"an adapter of rank {self.lora}, "
        lines = [
            f"{self.model}: training, {adapter}{plural(job.micro_batch_size, 'sequence')} of {job.length:,} positions "
            f"at once, {job.batch_size:,} per step, {job.precision}, {engine}, checkpointing {job.checkpointing}, on "
            f"{f'{job.world_size} x ' if several else ''}{self.target}",
            "",
            "memory" + (" of each device" if several else ""),
            *map(str, self.memory_parts()),
            f"  {'total':<22}{format_bytes(memory.total):>8}",
        ]
        if memory.host:
            formula = f"{memory.host * job.world_size / job.trained:.0f} bytes x {job.trained:,} parameters"
            formula += f" / {job.world_size} GPUs; for each GPU of a host" if several else ""
            lines.append(str(MemoryPart(key="host", name="on the host", num_bytes=memory.host, formula=formula)))
        limit = describe_limit(self.target.memory)
        if self.fits:
            lines.append(f"fits: {limit}; maximum --micro-batch-size: {self.max_micro_batch}")
        else:
            options = ", or ".join(self.suggestions()) or "none; use larger devices, or more of them"
            lines.append(f"does not fit: {limit}; options that fit: {options}")
        time = format_duration(self.seconds)
        lines += ["", f"time: about {time} for {self.tokens:.3g} positions in {self.steps:,} steps"]
        return [*lines, *(f"  {line}" for line in (*self._time_formula(), *self._time_constants()))]

    def _time_formula(self) -> list[str]:
        """Return the formula of the time."""
        again = " (layers x 4/3, since they are computed twice)" if self.job.checkpointing == "full" else ""
        return [
            f"positions x operations per position{again} / (devices x flops x mfu)",
            "operations per position: 6 x multiplied parameters + 6 x layers x width x positions of a sequence",
        ]

    def _time_constants(self) -> list[str]:
        """Return the lines on operations, FLOP/s and utilization."""
        job = self.job
        customary = flops_per_token(job.transformer, job.length)
        executed = multiplied_flops_per_token(job.transformer, job.length, self.num_codes, job.checkpointing)
        return [
            f"that is {customary / 1e9:.4g}e9, as customary; {executed / 1e9:.4g}e9 are executed where the target is "
            f"one of {self.num_codes:,} codes",
            f"flops: {self.peak / 1e12:.4g} TFLOP/s ({self.peak_source})",
            f"mfu: {self.mfu:g} of flops ({self.mfu_source})",
        ]

    def as_json(self) -> dict[str, Any]:
        """Return the report in bytes, seconds and FLOP/s."""
        job, memory = self.job, self.memory
        settings = to_mapping(job)
        shape = settings.pop("transformer")
        executed = multiplied_flops_per_token(job.transformer, job.length, self.num_codes, job.checkpointing)
        return {
            "model": self.model,
            "transformer": shape,
            "parameters": job.parameters,
            "trained": job.trained,
            "job": settings,
            "device": {
                "type": self.target.type,
                "memory": self.target.memory,
                "usable": usable_bytes(self.target.memory),
            },
            "memory": {**asdict(memory), "total": memory.total},
            "fits": self.fits,
            "max_micro_batch_size": self.max_micro_batch,
            "suggestions": [] if self.fits else self.suggestions(),
            "tokens": self.tokens,
            "steps": self.steps,
            "seconds": self.seconds,
            "flops_per_token": flops_per_token(job.transformer, job.length),
            "multiplied_flops_per_token": executed,
            "formulas": {"time": self._time_formula()},
            "assumed": {
                "flops": {"value": self.peak, "is": self.peak_source},
                "mfu": {"value": self.mfu, "is": self.mfu_source},
                "margin": ESTIMATE_MARGIN,
            },
        }


def size_table(flops: float | None, mfu: float | None) -> dict[str, Any]:
    """Return the table of model sizes: presets, memory on the smallest GPU, and times on large ones.

    Args:
        flops: Given FLOP/s of the large GPU, or None for its data sheet.
        mfu: Model FLOP/s utilization, in (0, 1]; None for ``MFU``.

    Returns:
        JSON content. Several GPUs use DeepSpeed with ZeRO stage 2.
    """
    peak, utilization = GPU_PEAK_FLOPS[TABLE_GPU]["bfloat16"] if flops is None else flops, mfu or MFU
    sizes = []
    for name, settings in TRAINING_PRESETS.items():
        job = preset_job(name)
        times = []
        for gpus in TABLE_WORLD_SIZES:
            engine: Literal["torch", "deepspeed"] = "torch" if gpus == 1 else "deepspeed"
            parallel = replace(job, world_size=gpus, engine=engine, zero=0 if gpus == 1 else 2)
            rows, mode = choose_micro_batch(parallel, TABLE_BYTES)
            seconds = training_time(replace(parallel, checkpointing=mode), settings.tokens, peak, utilization)
            times.append({"gpus": gpus, "micro_batch_size": rows, "checkpointing": mode, "seconds": seconds})
        sizes.append(
            {
                "size": name,
                "parameters": job.parameters,
                **asdict(settings),
                "steps": settings.steps(job.length),
                "memory": training_memory(job).total,
                "times": times,
            }
        )
    return {"card": TABLE_GPU, "flops": peak, "mfu": utilization, "length": job.length, "sizes": sizes}


def size_table_text(table: dict[str, Any]) -> list[str]:
    """Return the lines of the table that ``size_table`` returns."""
    columns = "".join(f"{f'{gpus} x {TABLE_GPU}':>12}" for gpus in TABLE_WORLD_SIZES)
    lines = [
        f"{'size':<6}{'parameters':>14}{'batch':>7}{'rate':>8}{'positions':>11}{'steps':>9}{'memory':>9}  "
        f"{'smallest GPU':<23}{columns}"
    ]
    for size in table["sizes"]:
        card = f"{size['card']}, {size['checkpointing']}"
        times = "".join(f"{format_duration(time['seconds']):>12}" for time in size["times"])
        lines.append(
            f"{size['size']:<6}{size['parameters']:>14,}{size['batch']:>7,}{size['learning_rate']:>8.0e}"
            f"{size['tokens']:>11.2e}{size['steps']:>9,}{format_bytes(size['memory']):>9}  {card:<23}{times}"
        )
    return [
        *lines,
        "",
        f"memory: one sequence of {table['length']:,} positions at once, bfloat16, engine torch, on the smallest GPU "
        "with that activation checkpointing",
        f"time: at {table['mfu']:g} of {table['flops'] / 1e12:.4g} TFLOP/s of each {TABLE_GPU}; several with "
        "DeepSpeed, ZeRO stage 2",
        "batch (sequences of a step), rate (peak learning rate) and positions (about 20 per parameter; 4b: the run of",
        "arXiv:2105.13290) are starting points, not measured; neither is the time",
    ]
