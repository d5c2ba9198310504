"""``cogview estimate``: how much memory and time a job takes, without doing it."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from cogview.cli.options import DEFAULT_MODEL, require_positive
from cogview.errors import InputError
from cogview.formatting import format_bytes, format_duration, plural
from cogview.planning import ESTIMATE_MARGIN

if TYPE_CHECKING:
    from cogview.device import DevicePlacement
    from cogview.modeling.config import ModelConfig
    from cogview.modeling.quantization import Quantization
    from cogview.planning.inference import HardwareSpeed, InferenceEstimate
    from cogview.vqvae.model import VQVAEConfig

OTHER_NAMES = {"rerank": "score"}  # of tasks
UNITS = {"MB": 10**6, "GB": 10**9, "MiB": 2**20, "GiB": 2**30}
# What a device that is given as a size alone is taken for: a gaming card whose memory does 900 GB/s and whose tensor
# cores 60 TFLOP/s in half precision (half of that in float32), or a desktop with two channels of memory.
ASSUMED = {
    ("cuda", 2): (900e9, 60e12),
    ("cuda", 4): (900e9, 30e12),
    ("cpu", 2): (50e9, 0.5e12),
    ("cpu", 4): (50e9, 0.5e12),
}

# Options by what they are for: as argparse names them, and their defaults.
DRAWING_OPTIONS: dict[str, Any] = {"task": "generate", "n": 1, "dtype": "auto", "guidance": None, "bandwidth": None}
TRAINING_OPTIONS = (
    *("gpus", "engine", "zero", "offload", "rows", "batch", "length", "precision", "checkpointing", "lora"),
    *("mfu", "tokens"),
)

MEMORY_FORMULA = (
    "what is there whatever -n + the larger of pictures and (KV cache + the larger of activations and logits)"
)


@dataclass(frozen=True, kw_only=True)
class TargetDevice:
    """Where the job would run: a device of this machine, or one of which the memory is all that is known."""

    type: str  # cpu, cuda or mps
    memory: int  # bytes that are free there
    dtype: str  # never auto
    placement: DevicePlacement | None = None  # None: only a size was given

    def __str__(self) -> str:
        return f"{self.type} with {format_bytes(self.memory)}" + (" free" if self.placement is not None else "")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.description = (
        "Say how much memory and time a job takes, part by part and with the formulas, without loading any weights. "
        "Rows are as long as the longest text makes them. Not fitting is an answer, with what would fit instead. With "
        "--train the job is training; without --model that prints a table of sizes and settings to begin with."
    )
    parser.add_argument(
        "--model",
        metavar="NAME_OR_FOLDER",
        help="a model, or one of the sizes 5m, 20m, 100m, 300m, 1b and 4b with the released vocabulary and VQ-VAE "
        f"(default: {DEFAULT_MODEL})",
    )
    parser.add_argument("--task", help="generate (default), caption, upscale, low_level or score (= rerank)")
    parser.add_argument("-n", type=int, metavar="COUNT", help="rows at once (default: 1)")
    parser.add_argument("--dtype", help="auto (default), float32, bfloat16, float16, int8 or int4")
    parser.add_argument(
        "--device",
        help="auto (default), cpu, cuda, cuda:N or mps of this machine, or a size such as cpu:16GB or cuda:24GB",
    )
    parser.add_argument(
        "--guidance", type=float, metavar="S", help="other than 1 doubles the rows (default: the model's own)"
    )
    parser.add_argument("--bandwidth", type=float, metavar="GB/s", help="what the device reads (default: see output)")
    parser.add_argument(
        "--flops", type=float, metavar="TFLOP/s", help="what it multiplies, dense, in that dtype (default: see output)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_training_arguments(parser.add_argument_group("training"))


def add_training_arguments(group: argparse._ArgumentGroup) -> None:
    """Those that go with --train."""
    group.add_argument("--train", action="store_true", help="the job is training; options below go with this one")
    group.add_argument("--gpus", type=int, metavar="COUNT", help="processes, one GPU each (default: 1)")
    group.add_argument("--engine", help="torch or deepspeed (default: deepspeed with --zero or --offload, else torch)")
    group.add_argument(
        "--zero",
        type=int,
        metavar="STAGE",
        help="what is divided among GPUs: 0 nothing, 1 the optimizer, 2 gradients too, 3 weights too",
    )
    group.add_argument("--offload", action="store_true", help="keep the optimizer in the memory of the host")
    group.add_argument(
        "--rows", type=int, metavar="COUNT", help="rows that a GPU computes at once (default: as many as fit)"
    )
    group.add_argument("--batch", type=int, metavar="COUNT", help="rows of a step, all GPUs (default: see the table)")
    group.add_argument("--length", type=int, metavar="COUNT", help="positions of a row (default: the model's longest)")
    group.add_argument(
        "--precision", help="of products: float32, bfloat16 or float16 (default: what training would choose)"
    )
    group.add_argument(
        "--checkpointing",
        help="what the backward computes again: none, selective or full (default: the least that fits)",
    )
    group.add_argument("--lora", type=int, metavar="RANK", help="train an adapter of this rank in place of all weights")
    group.add_argument("--mfu", type=float, metavar="SHARE", help="of --flops that is reached (default: 0.4, assumed)")
    group.add_argument(
        "--tokens", type=float, metavar="COUNT", help="positions of all rows of the run (default: 20 a parameter)"
    )


def run(args: argparse.Namespace) -> int:
    """Print the estimate; nothing is loaded."""
    for name, value in (("--bandwidth", args.bandwidth), ("--flops", args.flops)):
        if value is not None and not 0 < value < float("inf"):
            raise InputError(f"{name} must be a number above 0, got {value:g}")
    other = DRAWING_OPTIONS if args.train else TRAINING_OPTIONS
    for option in other:
        if getattr(args, option) not in (None, False):
            name = f"-{option}" if len(option) == 1 else f"--{option}"
            raise InputError(f"{name} does not go with --train" if args.train else f"{name} needs --train")
    if args.train:
        from cogview.cli.estimate_training import run_training

        return run_training(args)
    return run_drawing(args)


def run_drawing(args: argparse.Namespace) -> int:
    """Print the estimate of a job that draws or reads."""
    from cogview.planning.inference import SMALLER_FORMATS, estimate

    defaults = {"model": DEFAULT_MODEL, "device": "auto", **DRAWING_OPTIONS}
    given = {option: value for option, value in vars(args).items() if value is not None}
    args = argparse.Namespace(**{**vars(args), **defaults, **given})
    require_positive("-n", args.n)
    if args.guidance is not None and not 0 <= args.guidance < float("inf"):
        raise InputError(f"--guidance must be a number from 0 on (1: none), got {args.guidance:g}")
    task = OTHER_NAMES.get(args.task, args.task)
    config, image_config, stored = open_configs(args.model)
    target = find_target(args.device, args.dtype, config, stored)
    draws = task not in ("caption", "score")
    guidance = args.guidance if args.guidance is not None else config.sampling.guidance if draws else 1.0

    def planned(dtype: str) -> InferenceEstimate:
        return estimate(
            config,
            image_config,
            task=task,
            rows=args.n,
            dtype=dtype,
            device_type=target.type,
            guided=guidance != 1,
        )

    plan = planned(target.dtype)
    smaller = []
    for dtype in SMALLER_FORMATS[SMALLER_FORMATS.index(target.dtype) + 1 if target.dtype in SMALLER_FORMATS else 0 :]:
        with suppress(InputError):  # not every width can be held in int4
            smaller.append(planned(dtype))
    speed, source = find_speed(target, args.bandwidth, args.flops)
    report = Report(model=args.model, plan=plan, smaller=smaller, target=target, speed=speed, source=source)
    print(json.dumps(report.as_json(), ensure_ascii=False, indent=2) if args.json else "\n".join(report.as_text()))
    return 0


def open_configs(name: str) -> tuple[ModelConfig, VQVAEConfig, Quantization | None]:
    """The settings of a preset or a model, those of its VQ-VAE, and how few bits its weights are stored in, if so."""
    from pathlib import Path

    from cogview.checkpoints.checkpoint import read_config
    from cogview.checkpoints.image_tokenizer import read_image_config
    from cogview.checkpoints.precision import stored_quantization
    from cogview.checkpoints.registry import load_registry, resolve_checkpoint
    from cogview.checkpoints.safetensors_io import WeightsFile
    from cogview.modeling.config import PRESETS
    from cogview.vqvae.model import VQVAEConfig

    if name in PRESETS:
        return preset_config(name), VQVAEConfig.released(), None
    known = load_registry()
    if name not in known and not Path(name).exists():
        raise InputError(
            f'model "{name}" is unknown; known: {", ".join(known)}, the sizes {", ".join(PRESETS)}, or the path of a '
            "checkpoint folder"
        )
    folder = resolve_checkpoint(name)
    config = read_config(folder)
    weights = WeightsFile(folder / "model.safetensors")
    return config, read_image_config(folder / "image"), stored_quantization(weights.specs)


def preset_config(name: str) -> ModelConfig:
    """A preset of ``cogview/modeling/config.py`` with what the released models have."""
    from cogview.checkpoints.v1_convert import ALL_TASKS, V1_CAPTION, V1_GRID
    from cogview.modeling.config import ModelConfig, preset
    from cogview.tokenizers.layouts import layouts
    from cogview.tokenizers.vocabulary import Vocabulary

    vocabulary = Vocabulary()
    shape = preset(name, vocabulary.padded_size)
    table = layouts(V1_GRID, caption_stop=False)
    return ModelConfig(
        transformer=shape,
        vocabulary=vocabulary,
        grid=V1_GRID,
        tasks=ALL_TASKS,
        max_text=min(layout.longest_text(shape.max_positions) for layout in table.values()),
        caption_stop=False,
        max_caption=V1_CAPTION,
    )


def find_target(name: str, dtype: str, config: ModelConfig, stored: Quantization | None) -> TargetDevice:
    """A device by its name, which must be here, or by its size; and the dtype that ``auto`` is there."""
    from cogview.device import available_memory, choose_placement

    parameters = config.transformer.num_parameters
    size = re.fullmatch(rf"(cpu|cuda):(\d+(?:\.\d+)?)({'|'.join(UNITS)})", name)
    if size is None:
        if not re.fullmatch(r"auto|\d{1,2}|cpu|cuda(:\d{1,2})?|mps", name):
            raise InputError(
                f"device {name!r} is unknown; expected auto, cpu, cuda, cuda:N or mps, or a size such as cpu:16GB or "
                "cuda:24GB"
            )
        placement = choose_placement(name, dtype, stored=stored, num_parameters=parameters)
        return TargetDevice(
            type=placement.device.type,
            memory=available_memory(placement.device),
            dtype=placement.quantization or str(placement.dtype).removeprefix("torch."),
            placement=placement,
        )
    memory = int(float(size[2]) * UNITS[size[3]])
    if memory < 1:
        raise InputError(f"the size of the device must be above 0, got {name}")
    if dtype == "auto":  # as ``choose_placement`` would choose on a recent device of this size
        half = size[1] == "cuda" or 4 * parameters > memory / 2
        dtype = stored or ("bfloat16" if half else "float32")
    return TargetDevice(type=size[1], memory=memory, dtype=dtype)


def find_speed(
    target: TargetDevice, bandwidth: float | None, flops: float | None
) -> tuple[HardwareSpeed, dict[str, str]]:
    """What is given (GB/s, TFLOP/s), measured on a device that is here, or assumed; and which of these each is."""
    from cogview.planning.inference import ACTIVATION_BYTES, HardwareSpeed, measure_hardware

    speed, origin = HardwareSpeed(bandwidth=1, flops=1, starts_ahead=target.type != "cpu"), "given"
    if bandwidth is None or flops is None:
        if target.placement is None:
            assumed = ASSUMED[target.type, ACTIVATION_BYTES[target.dtype]]
            speed, origin = replace(speed, bandwidth=assumed[0], flops=assumed[1]), "assumed"
        else:
            device = target.placement.device
            print(f"measuring {device} for a moment; --bandwidth and --flops spare that", file=sys.stderr)
            speed, origin = measure_hardware(device, target.placement.dtype), "measured"
    source = {"bandwidth": origin, "flops": origin}
    if bandwidth is not None:
        speed, source["bandwidth"] = replace(speed, bandwidth=bandwidth * 1e9), "given"
    if flops is not None:
        speed, source["flops"] = replace(speed, flops=flops * 1e12), "given"
    return speed, source


@dataclass(frozen=True, kw_only=True)
class Report:
    """A plan against the memory and the speed of a device."""

    model: str
    plan: InferenceEstimate
    smaller: Sequence[InferenceEstimate]  # the same in fewer bits
    target: TargetDevice
    speed: HardwareSpeed
    source: dict[str, str]  # whether bandwidth and flops are given, measured or assumed

    @property
    def usable(self) -> int:
        """Bytes of the device that may be taken."""
        return int(self.target.memory * (1 - ESTIMATE_MARGIN))

    @property
    def fits(self) -> bool:
        """Whether the plan does."""
        return self.plan.total <= self.usable

    def remedies(self) -> list[str]:
        """Options with which it would fit."""
        found = [f"-n {most}"] if (most := self.plan.largest_rows(self.usable)) else []
        for plan in self.smaller:
            if most := min(plan.rows, plan.largest_rows(self.usable)):
                found.append(f"--dtype {plan.dtype}" + ("" if most == plan.rows else f" -n {most}"))
        return found

    def parts(self) -> list[tuple[str, str, int, str]]:
        """Of each part of the memory: its key, its name, its bytes and how they come about."""
        from cogview.planning.inference import ACTIVATION_BYTES

        plan, shape, size = self.plan, self.plan.transformer, ACTIVATION_BYTES[self.plan.dtype]
        rows = plural(plan.rows, "row") + (" x 2 for guidance" if plan.guided else "")
        layers = f"{shape.num_layers} layers x (12 x {shape.width}² + 17 x {shape.width}) numbers"
        if plan.dtype in ("int8", "int4"):
            layers += f", the 12 in {plan.dtype} with their scales, the 17 in 16 bits"
        entries = f"{shape.vocabulary_size:,} ids + {shape.max_positions:,} positions + 2"
        most = max(plan.forward_passes, key=lambda read: read.new_positions)
        per_id = plan.logits // max(read.output_ids * read.output_positions for read in plan.forward_passes)
        ids = f"{most.output_ids:,} ids" + (f" x {most.output_positions} pieces" if most.output_positions > 1 else "")
        kept = f"{size} bytes x {plan.sequence_length:,} positions x {rows}"
        pixels = 8 * plan.image_side
        overhead = "Python and PyTorch, measured" if plan.device_type == "cpu" else "context and kernels, assumed"
        parts = [
            ("layers", "transformer layers", plan.layers, layers),
            ("embedding", "embedding, positions", plan.embedding, f"({entries}) x {shape.width} x {size} bytes"),
            ("packed", "packed for MKL", plan.packed, "layers and what tells ids once more, in its own order"),
            ("image_tokenizer", "VQ-VAE", plan.image_tokenizer, "float32"),
            ("workspace", "workspace", plan.workspace, "what is on its way to be multiplied"),
            ("overhead", "overhead", plan.overhead, overhead),
            (
                *("kv_cache", "KV cache", plan.rows * plan.kv_cache),
                f"2 x {shape.num_layers} layers x {shape.width} x {kept}",
            ),
            (
                *("activations", "activations", plan.rows * plan.activations),
                f"the most that a layer has, reading {most.new_positions:,} positions at one go, x {rows}",
            ),
            (
                *("logits", "logits and noise", plan.rows * plan.logits),
                f"{per_id} bytes x {ids} x {plural(plan.rows, 'row')}",
            ),
            (
                *("pictures", "pictures", plan.rows * plan.images),
                f"in the VQ-VAE, {pixels} x {pixels} pixels x {plural(plan.rows, 'row')}",
            ),
        ]
        return [part for part in parts if part[2]]

    def as_text(self) -> list[str]:
        """Lines to read."""
        plan, seconds = self.plan, self.plan.seconds(self.speed)
        rows = plural(plan.rows, "row")
        lines = [
            f"{self.model}: {plan.task}, {rows} of up to {plan.sequence_length:,} positions, {plan.dtype}, on {self.target}",
            "",
            "memory",
        ]
        lines += [f"  {name:<22}{format_bytes(count):>8}  {how}" for _, name, count, how in self.parts()]
        lines.append(f"  {'total':<22}{format_bytes(plan.total):>8}  {MEMORY_FORMULA}")
        usable, memory = format_bytes(self.usable), format_bytes(self.target.memory)
        room = f"{usable} may be taken: {ESTIMATE_MARGIN:.0%} of {memory} stay free"
        if self.fits:
            lines.append(f"fits: {room}; the largest -n that fits is {plan.largest_rows(self.usable)}")
        else:
            would = ", or ".join(self.remedies()) or f"nothing smaller; one row takes {format_bytes(self._least())}"
            lines.append(f"does not fit: {room}; what would: {would}")
        steps = [plan.forward_seconds(read, self.speed) for read in plan.forward_passes if read.new_positions == 1]
        lines += [
            "",
            f"time: about {format_duration(seconds.total)} for {rows}, "
            f"{format_duration(seconds.total / plan.rows)} each",
            f"  {'given positions':<22}{format_duration(seconds.given):>8}",
        ]
        if steps:
            each = f"{len(steps):,} steps of {1000 * min(steps):.3g} to {1000 * max(steps):.3g} ms"
            lines.append(f"  {'drawn positions':<22}{format_duration(seconds.steps):>8}  {each}")
        lines.append(f"  {'pictures':<22}{format_duration(seconds.pictures):>8}  operations of the VQ-VAE / flops")
        lines += [f"  {line}" for line in self._time_formula()]
        lines += [f"  {name}: {value}" for name, value in self._numbers().items()]
        return lines

    def as_json(self) -> dict[str, Any]:
        """The same for programs: bytes, seconds, bytes/s and FLOP/s."""
        from cogview.planning.inference import BANDWIDTH_EFFICIENCY, OPERATIONS_PER_LAYER, SECONDS_PER_OPERATION

        plan, seconds = self.plan, self.plan.seconds(self.speed)
        return {
            "model": self.model,
            "task": plan.task,
            "rows": plan.rows,
            "positions": plan.sequence_length,
            "dtype": plan.dtype,
            "guided": plan.guided,
            "device": {"type": self.target.type, "memory": self.target.memory, "usable": self.usable},
            "memory": {
                **{key: count for key, _, count, _ in self.parts()},
                "constant": plan.constant,
                "per_row": plan.per_row,
                "total": plan.total,
            },
            "fits": self.fits,
            "largest_rows": plan.largest_rows(self.usable),
            "would_fit": [] if self.fits else self.remedies(),
            "seconds": {**asdict(seconds), "total": seconds.total},
            "formulas": {"memory": MEMORY_FORMULA, "time": self._time_formula()},
            "assumed": {
                "bandwidth": {"value": self.speed.bandwidth, "is": self.source["bandwidth"]},
                "flops": {"value": self.speed.flops, "is": self.source["flops"]},
                "share": BANDWIDTH_EFFICIENCY,
                "operations_per_layer": OPERATIONS_PER_LAYER,
                "seconds_per_operation": SECONDS_PER_OPERATION,
                "spare": ESTIMATE_MARGIN,
            },
        }

    def _least(self) -> int:
        """Bytes of one row in the fewest bits."""
        return min(plan.constant + plan.per_row for plan in (self.plan, *self.smaller))

    def _time_formula(self) -> list[str]:
        from cogview.planning.inference import SAMPLING_TRAFFIC

        plan = self.plan
        joined = "or what it takes to start them, if that is longer" if self.speed.starts_ahead else "plus their start"
        lines = [
            f"a read takes the larger of operations / flops and bytes / (share x bandwidth), {joined}",
            "operations: rows x (2 x weights of the layers x positions read + attention + logits)",
            "bytes: weights + rows x (KV cache so far"
            + (f" + {SAMPLING_TRAFFIC} x ids to draw from)" if plan.task != "score" else ")"),
        ]
        if unpacking := sum(plan.unpacks(read) for read in plan.forward_passes):
            lines.append(
                f"{plan.dtype} weights are unpacked or converted in {unpacking:,} of {len(plan.forward_passes):,} reads, which "
                f"moves {plan.unpacking_traffic} bytes more for each"
            )
        return lines

    def _numbers(self) -> dict[str, str]:
        from cogview.planning.inference import BANDWIDTH_EFFICIENCY, OPERATIONS_PER_LAYER, SECONDS_PER_OPERATION

        return {
            "bandwidth": f"{self.speed.bandwidth / 1e9:.4g} GB/s ({self.source['bandwidth']})",
            "flops": f"{self.speed.flops / 1e12:.4g} TFLOP/s ({self.source['flops']})",
            "share": f"{BANDWIDTH_EFFICIENCY:g} of the bandwidth (assumed)",
            "operations": f"{OPERATIONS_PER_LAYER} a layer, {1e6 * SECONDS_PER_OPERATION:g} µs to start each (assumed)",
        }
