"""``cogview estimate --train``: the memory and time of training a model, and the table of sizes to begin with."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from cogview.cli.estimate import ASSUMED, TRAINING_OPTIONS, TargetDevice, find_target, open_configs
from cogview.errors import InputError
from cogview.formatting import format_bytes, format_duration, plural
from cogview.planning import ESTIMATE_MARGIN

if TYPE_CHECKING:
    from cogview.planning.training import Precision, TrainingJob, TrainingMemory

# The card that a GPU is taken for in training where only its size is given: at least so many bytes, the name.
ASSUMED_CARDS = ((60e9, "H100"), (30e9, "A100"), (0, "RTX 3090"))
TABLE_CARD, TABLE_BYTES, TABLE_GPUS = "H100", 80e9, (1, 8)  # of the table of sizes
ADAPTER_RANK = 16  # what is offered where training all weights does not fit
USUAL_BATCH, TOKENS_PER_PARAMETER = 32, 20  # where there are no settings for the size


def run_training(args: argparse.Namespace) -> int:
    """Print the estimate of training a model, or the table of sizes."""
    from cogview.planning.training import MFU

    mfu = MFU if args.mfu is None else args.mfu
    if not 0 < mfu <= 1:
        raise InputError(f"--mfu must be above 0 and at most 1, got {mfu:g}")
    if args.model is None:
        for option in ("device", *TRAINING_OPTIONS):
            if option != "mfu" and getattr(args, option) not in (None, False):
                raise InputError(f"--{option} is about one model: name it with --model, such as --model 4b")
        sizes = training_sizes(args.flops, mfu)
        print(json.dumps(sizes, indent=2) if args.json else "\n".join(sizes_as_text(sizes)))
        return 0
    report = training_report(args, mfu)
    print(json.dumps(report.as_json(), ensure_ascii=False, indent=2) if args.json else "\n".join(report.as_text()))
    return 0


def training_report(args: argparse.Namespace, mfu: float) -> TrainingReport:
    """What is asked for, and what is chosen where nothing is: the settings of the size, and the rows that fit."""
    from cogview.modeling.config import PRESETS
    from cogview.planning.training import (
        CHECKPOINTING_MODES,
        TRAINING_PRESETS,
        TrainingJob,
        choose_micro_batch,
        lora_parameters,
    )

    for option in ("gpus", "rows", "batch", "length", "lora", "tokens"):
        if getattr(args, option) is not None and not 1 <= getattr(args, option) < float("inf"):
            raise InputError(f"--{option} must be at least 1, got {getattr(args, option):g}")
    if args.zero not in (None, 0, 1, 2, 3):
        raise InputError(f"--zero must be 0, 1, 2 or 3, got {args.zero}")
    config, _, _ = open_configs(args.model)
    shape, own = config.transformer, TRAINING_PRESETS.get(args.model)
    target = find_target(args.device or "auto", "float32", config, None)
    world, zero = args.gpus or 1, args.zero or 0
    engine: Any = args.engine or ("deepspeed" if zero or args.offload else "torch")
    if engine == "deepspeed" and args.zero is None:
        zero = 2 if args.offload else 1
    batch = args.batch or (own.batch if own is not None else USUAL_BATCH)
    if batch % world:
        raise InputError(f"--batch {batch} does not divide among {world} GPUs")
    if args.rows is not None and batch // world % args.rows:
        raise InputError(
            f"--rows {args.rows} does not divide the {batch // world} rows of each of {plural(world, 'GPU')}, in a "
            f"batch of {batch}"
        )
    tasks = ("generate",) if args.model in PRESETS else config.tasks  # a size is taken to generate, as in the paper
    job = TrainingJob(
        transformer=shape,
        length=args.length or config.longest_row(tasks),
        micro_batch_size=args.rows or 1,
        batch_size=batch,
        precision=args.precision or training_precision(target),
        engine=engine,
        zero=zero,
        world_size=world,
        offload=args.offload,
        checkpointing=args.checkpointing or CHECKPOINTING_MODES[0],
        trainable=None if args.lora is None else lora_parameters(shape, args.lora),
        device_type=target.type,
    )
    if args.rows is None or args.checkpointing is None:
        try:
            rows, mode = choose_micro_batch(job, target.memory, args.checkpointing, args.rows)
        except InputError:  # an answer here
            rows, mode = args.rows or 1, args.checkpointing or CHECKPOINTING_MODES[-1]
        job = replace(job, micro_batch_size=rows, checkpointing=mode)
    peak, source = find_peak(target, job.precision, args.flops)
    tokens = args.tokens or (own.tokens if own is not None else TOKENS_PER_PARAMETER * shape.num_parameters)
    return TrainingReport(
        model=args.model,
        job=job,
        codes=config.vocabulary.num_image_codes,
        target=target,
        peak=peak,
        source=source,
        mfu=mfu,
        mfu_is="assumed" if args.mfu is None else "given",
        tokens=tokens,
        lora=args.lora,
    )


def training_precision(target: TargetDevice) -> Precision:
    """What training would choose on a device that is here; bfloat16 on a GPU of which only the size is known."""
    from cogview.device import training_dtype

    if target.placement is None:
        return "float32" if target.type == "cpu" else "bfloat16"
    known: dict[str, Precision] = {"torch.bfloat16": "bfloat16", "torch.float16": "float16"}
    return known.get(str(training_dtype(target.placement.device)), "float32")


def find_peak(target: TargetDevice, precision: str, flops: float | None) -> tuple[float, str]:
    """FLOP/s of one device in training, and where they are from: given, its data sheet, measured, or assumed."""
    import torch

    from cogview.planning.inference import ACTIVATION_BYTES, measure_hardware
    from cogview.planning.training import GPU_PEAK_FLOPS, peak_flops

    if flops is not None:
        return flops * 1e12, "given"
    if target.placement is None:
        if target.type == "cpu":
            return ASSUMED["cpu", ACTIVATION_BYTES[precision]][1], "assumed"
        card = next(name for least, name in ASSUMED_CARDS if target.memory >= least)
        return GPU_PEAK_FLOPS[card][precision], f"assumed: {card}"
    device = target.placement.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    if (peak := peak_flops(name, precision)) is not None:
        return peak, f"data sheet of {name}"
    print(f"measuring {device} for a moment; --flops spares that", file=sys.stderr)
    return measure_hardware(device, getattr(torch, precision)).flops, "measured"


@dataclass(frozen=True, kw_only=True)
class TrainingReport:
    """A training job against the memory of its devices, and its time."""

    model: str
    job: TrainingJob
    codes: int  # that an image can have
    target: TargetDevice
    peak: float  # FLOP/s of one device
    source: str  # of the peak
    mfu: float
    mfu_is: str  # given or assumed
    tokens: float
    lora: int | None

    @property
    def memory(self) -> TrainingMemory:
        """Bytes of one process."""
        from cogview.planning.training import training_memory

        return training_memory(self.job)

    @property
    def fits(self) -> bool:
        """Whether the job does."""
        from cogview.planning.training import fits

        return fits(self.job, self.target.memory)

    @property
    def largest(self) -> int:
        """The largest --rows that fits, 0 for none."""
        from cogview.planning.training import max_micro_batch

        return max_micro_batch(self.job, self.target.memory)

    @property
    def seconds(self) -> float:
        """Of the run."""
        from cogview.planning.training import training_time

        return training_time(self.job, self.tokens, self.peak, self.mfu)

    @property
    def steps(self) -> int:
        """Of the run."""
        return max(1, round(self.tokens / (self.job.batch_size * self.job.length)))

    def remedies(self) -> list[str]:
        """Options with which it would fit; two changes at once only where no single one does."""
        from cogview.planning.training import max_micro_batch

        changes = self._changes()
        most_again = [change for change in changes if "checkpointing" in change[1]][-1:]
        others = [change for change in changes if change[1] and "checkpointing" not in change[1]]
        pairs = [(f"{again} {option}", {**first, **second}) for again, first in most_again for option, second in others]
        found: list[str] = []
        for candidates in (changes, pairs):
            for option, settings in candidates if not found else ():
                most = min(
                    self.job.micro_batch_size, max_micro_batch(replace(self.job, **settings), self.target.memory)
                )
                if most:
                    rows = f"--rows {most}" if most < self.job.micro_batch_size else ""
                    found.append(f"{option} {rows}".strip())
        return found

    def _changes(self) -> list[tuple[str, dict[str, Any]]]:
        """Options and what they change of the job: fewer rows, more recomputation, ZeRO, the host, an adapter."""
        from cogview.planning.training import CHECKPOINTING_MODES, lora_parameters

        job = self.job
        changes: list[tuple[str, dict[str, Any]]] = [("", {})]
        for mode in CHECKPOINTING_MODES[CHECKPOINTING_MODES.index(job.checkpointing) + 1 :]:
            changes.append((f"--checkpointing {mode}", {"checkpointing": mode}))
        for stage in range(job.zero + 1, 4):
            if job.world_size > 1 or job.offload:
                changes.append((f"--zero {stage}", {"engine": "deepspeed", "zero": stage}))
        for stage in range(max(job.zero, 2), 4) if not job.offload and job.device_type != "cpu" else ():
            option = "--offload" if stage == job.zero else f"--zero {stage} --offload"
            changes.append((option, {"engine": "deepspeed", "zero": stage, "offload": True}))
        if job.trainable is None:
            trainable = lora_parameters(job.transformer, ADAPTER_RANK)
            changes.append((f"--lora {ADAPTER_RANK}", {"trainable": trainable}))
        return changes

    def parts(self) -> list[tuple[str, str, int, str]]:
        """Of each part of a device's memory: its key, its name, its bytes and how they come about."""
        job, memory = self.job, self.memory
        size, share = job.number_bytes, f" / {job.world_size} GPUs" if job.world_size > 1 else ""
        count = f"{job.parameters:,} parameters"
        trained = count if job.trainable is None else f"{job.trained:,} trained parameters"
        if job.engine == "torch":
            weights = f"4 bytes x {count}" + (f", and {size} for each that the layers multiply" if size < 4 else "")
            gradients, optimizer = f"4 bytes x {trained}", f"8 bytes x {trained}"
        else:
            weights = f"{size} bytes x {count}" + (share if job.zero == 3 else "")
            each = memory.gradients // job.trained if job.zero == 1 else 4
            gradients = f"{each} bytes x {trained}" + (share if job.zero > 1 else ", whole in stage 1")
            optimizer = f"12 bytes x {trained}{share}"
        kept = {
            "none": "all that autograd keeps",
            "selective": "results of products, the rest computed again",
            "full": "inputs of layers, the rest computed again",
        }[job.checkpointing]
        kept += (
            f": {job.transformer.num_layers} layers x {plural(job.micro_batch_size, 'row')} x {job.length:,} positions"
        )
        overhead = "Python and PyTorch, measured" if job.device_type == "cpu" else "context and kernels, assumed"
        parts = [
            ("weights", "weights", memory.weights, weights),
            ("gradients", "gradients", memory.gradients, gradients),
            ("optimizer", "optimizer", memory.optimizer, optimizer),
            ("buffers", "buffers", memory.buffers, "gradients that are sent, weights that are gathered"),
            ("activations", "activations", memory.activations, kept),
            ("logits", "logits", memory.logits, "a chunk of them, and the gradients that the loss makes"),
            ("overhead", "overhead", memory.overhead, overhead),
        ]
        return [part for part in parts if part[2]]

    def as_text(self) -> list[str]:
        """Lines to read."""
        job, memory = self.job, self.memory
        each = " of each device" if job.world_size > 1 else ""
        engine = job.engine + (f" ZeRO {job.zero}" if job.zero else "") + (", offloaded" if job.offload else "")
        adapter = "" if self.lora is None else f"an adapter of rank {self.lora}, "
        lines = [
            f"{self.model}: training, {adapter}{plural(job.micro_batch_size, 'row')} of {job.length:,} positions at once, "
            f"{job.batch_size:,} rows a step, {job.precision}, {engine}, checkpointing {job.checkpointing}, on "
            f"{f'{job.world_size} x ' if each else ''}{self.target}",
            "",
            f"memory{each}",
        ]
        lines += [f"  {name:<22}{format_bytes(count):>8}  {how}" for _, name, count, how in self.parts()]
        lines.append(f"  {'total':<22}{format_bytes(memory.total):>8}")
        if memory.host:
            numbers = f"{memory.host * job.world_size / job.trained:.0f} bytes x {job.trained:,} parameters"
            share = f" / {job.world_size} GPUs; as often as a host has GPUs" if each else ""
            lines.append(f"  {'on the host':<22}{format_bytes(memory.host):>8}  {numbers}{share}")
        usable = format_bytes(int((1 - ESTIMATE_MARGIN) * self.target.memory))
        room = f"{usable} may be taken: {ESTIMATE_MARGIN:.0%} of {format_bytes(self.target.memory)} stay free"
        if self.fits:
            lines.append(f"fits: {room}; the largest --rows that fits is {self.largest}")
        else:
            would = ", or ".join(self.remedies()) or "nothing here; larger devices, or more of them"
            lines.append(f"does not fit: {room}; what would: {would}")
        time = format_duration(self.seconds)
        lines += ["", f"time: about {time} for {self.tokens:.3g} positions in {self.steps:,} steps"]
        lines += [f"  {line}" for line in (*self._time_formula(), *self._numbers())]
        return lines

    def as_json(self) -> dict[str, Any]:
        """The same for programs: bytes, seconds and FLOP/s."""
        from cogview.planning.training import flops_per_token, multiplied_flops_per_token

        job, memory = self.job, self.memory
        settings = asdict(job)
        shape = settings.pop("transformer")
        usable = int((1 - ESTIMATE_MARGIN) * self.target.memory)
        return {
            "model": self.model,
            "transformer": shape,
            "parameters": job.parameters,
            "trained": job.trained,
            "job": settings,
            "device": {"type": self.target.type, "memory": self.target.memory, "usable": usable},
            "memory": {**asdict(memory), "total": memory.total},
            "fits": self.fits,
            "largest_rows": self.largest,
            "would_fit": [] if self.fits else self.remedies(),
            "tokens": self.tokens,
            "steps": self.steps,
            "seconds": self.seconds,
            "flops_per_token": flops_per_token(job.transformer, job.length),
            "multiplied_flops_per_token": multiplied_flops_per_token(
                job.transformer, job.length, self.codes, job.checkpointing
            ),
            "formulas": {"time": self._time_formula()},
            "assumed": {
                "flops": {"value": self.peak, "is": self.source},
                "mfu": {"value": self.mfu, "is": self.mfu_is},
                "spare": ESTIMATE_MARGIN,
            },
        }

    def _time_formula(self) -> list[str]:
        again = ", those of layers x 4/3, since they are computed twice," if self.job.checkpointing == "full" else ""
        return [
            f"positions x operations of a position{again} / (devices x flops x mfu)",
            "operations of a position: 6 x parameters that are multiplied + 6 x layers x width x positions of a row",
        ]

    def _numbers(self) -> list[str]:
        from cogview.planning.training import flops_per_token, multiplied_flops_per_token

        job = self.job
        usual = flops_per_token(job.transformer, job.length)
        done = multiplied_flops_per_token(job.transformer, job.length, self.codes, job.checkpointing)
        return [
            f"that is {usual / 1e9:.4g}e9, as is usual; {done / 1e9:.4g}e9 are done where one of {self.codes:,} codes "
            "is told",
            f"flops: {self.peak / 1e12:.4g} TFLOP/s ({self.source})",
            f"mfu: {self.mfu:g} of these ({self.mfu_is})",
        ]


def training_sizes(flops: float | None, mfu: float) -> dict[str, Any]:
    """The table of sizes: settings to begin with, the memory of a row on the smallest card, and times on large ones.

    ``flops`` (TFLOP/s) takes the place of the large card's own. On several of these the engine is DeepSpeed, stage 2.
    """
    from cogview.planning.training import (
        GPU_PEAK_FLOPS,
        TRAINING_PRESETS,
        choose_micro_batch,
        preset_job,
        training_memory,
        training_time,
    )

    peak = GPU_PEAK_FLOPS[TABLE_CARD]["bfloat16"] if flops is None else flops * 1e12
    sizes = []
    for name, own in TRAINING_PRESETS.items():
        job = preset_job(name)
        times = []
        for world in TABLE_GPUS:
            many = replace(
                job, world_size=world, engine="torch" if world == 1 else "deepspeed", zero=0 if world == 1 else 2
            )
            rows, mode = choose_micro_batch(many, TABLE_BYTES)
            seconds = training_time(replace(many, checkpointing=mode), own.tokens, peak, mfu)
            times.append({"gpus": world, "rows": rows, "checkpointing": mode, "seconds": seconds})
        sizes.append(
            {
                "size": name,
                "parameters": job.parameters,
                **asdict(own),
                "steps": own.steps(job.length),
                "memory": training_memory(job).total,
                "times": times,
            }
        )
    return {"card": TABLE_CARD, "flops": peak, "mfu": mfu, "length": job.length, "sizes": sizes}


def sizes_as_text(table: dict[str, Any]) -> list[str]:
    """Lines to read."""
    columns = "".join(f"{f'{world} x {TABLE_CARD}':>12}" for world in TABLE_GPUS)
    lines = [
        f"{'size':<6}{'parameters':>14}{'batch':>7}{'rate':>8}{'positions':>11}{'steps':>9}{'memory':>9}  "
        f"{'smallest card':<23}{columns}"
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
        f"memory: one row of {table['length']:,} positions at once, bfloat16, torch, on the smallest card with that "
        "activation checkpointing",
        f"time: at {table['mfu']:g} of {table['flops'] / 1e12:.4g} TFLOP/s of each {TABLE_CARD}; several by DeepSpeed, "
        "ZeRO 2",
        "batch (rows a step), rate (learning rate at its peak) and positions (about 20 a parameter; 4b: the paper's "
        "run) are",
        "starting points and not measured, and neither is the time",
    ]
