"""Reports of inference estimates as text and as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

from cogview.errors import InputError
from cogview.formatting import format_bytes, format_duration, plural
from cogview.generation.guidance import necessary_rows
from cogview.modeling.config import ModelConfig, guidance_settings
from cogview.planning import ESTIMATE_MARGIN
from cogview.planning.inference import (
    BANDWIDTH_EFFICIENCY,
    OPERATIONS_PER_LAYER,
    SAMPLING_TRAFFIC,
    SECONDS_PER_OPERATION,
    InferenceEstimate,
    estimate_inference,
    is_scoring,
)
from cogview.planning.model_memory import ACTIVATION_BYTES, formats_below
from cogview.planning.target import TargetDevice, TargetModel, TargetSpeed
from cogview.tokenizers.tasks import TASKS

MEMORY_FORMULA = "constant parts + the larger of images and (KV cache + the larger of activations and logits)"


@dataclass(frozen=True, kw_only=True)
class MemoryPart:
    """A line of a memory report."""

    key: str  # in JSON
    name: str
    num_bytes: int
    formula: str

    def __str__(self) -> str:
        """Return the line."""
        return f"  {self.name:<22}{format_bytes(self.num_bytes):>8}  {self.formula}"


def usable_bytes(memory: int) -> int:
    """Return the bytes of a device that a job may take, ``ESTIMATE_MARGIN`` left free."""
    return int(memory * (1 - ESTIMATE_MARGIN))


def describe_limit(memory: int) -> str:
    """Return a phrase with the usable bytes of a device."""
    return (
        f"{format_bytes(usable_bytes(memory))} are usable; {ESTIMATE_MARGIN:.0%} of {format_bytes(memory)} stays free"
    )


def report_inference(
    name: str,
    model: TargetModel,
    target: TargetDevice,
    speed: TargetSpeed,
    *,
    task: str,
    rows: int,
    guidance: float | None = None,
    image_guidance: float | None = None,
) -> InferenceReport:
    """Estimate a job on a device, in its weight format and in all smaller ones.

    Args:
        name: Name of the model.
        model: Its settings.
        target: The device.
        speed: The rates of the device.
        task: A task with a layout, such as ``generate``.
        rows: Sequences at once.
        guidance: Scale of classifier-free guidance; None for that of the model.
        image_guidance: Scale of the guidance by a source; None for that of the model.

    Returns:
        The report, as text or JSON.

    Raises:
        InputError: ``estimate_inference`` refuses the settings.
    """
    guidance_rows = _guidance_rows(model.config, task, {"guidance": guidance, "image_guidance": image_guidance})

    def estimate(dtype: str) -> InferenceEstimate:
        return estimate_inference(
            model.config,
            model.image_config,
            task=task,
            rows=rows,
            dtype=dtype,
            keep_halves=model.keeps_halves(target.type, dtype),
            device_type=target.type,
            guidance_rows=guidance_rows,
        )

    chosen, smaller = estimate(target.dtype), []
    for dtype in formats_below(target.dtype):
        with suppress(InputError):  # the width may not divide into groups of int4
            smaller.append(estimate(dtype))
    return InferenceReport(model=name, estimate=chosen, smaller=smaller, target=target, speed=speed)


def _guidance_rows(config: ModelConfig, task: str, given: Mapping[str, float | None]) -> int:
    """Return the sequences that guidance computes beside each one; InputError for guidance that the task lacks."""
    if task not in TASKS:
        return 0
    used, sampling = guidance_settings(TASKS[task]), config.sampling_of(task)
    for name, scale in given.items():
        if scale not in (None, 1) and name not in used:
            raise InputError(f"{name} does not apply to the task {task!r}: it must be 1, got {scale:g}")
    scales = [getattr(sampling, name) if (scale := given[name]) is None else scale for name in used]
    return len(necessary_rows(scales)[0]) - 1


@dataclass(frozen=True, kw_only=True)
class InferenceReport:
    """An estimate of inference against the memory and the rates of a device."""

    model: str
    estimate: InferenceEstimate
    smaller: Sequence[InferenceEstimate]  # the same job in smaller weight formats
    target: TargetDevice
    speed: TargetSpeed

    @property
    def usable(self) -> int:
        """Bytes of the device that the job may take."""
        return usable_bytes(self.target.memory)

    @property
    def fits(self) -> bool:
        """Whether the job fits."""
        return self.estimate.total <= self.usable

    def suggestions(self) -> list[str]:
        """Return options with which the job would fit."""
        max_rows = self.estimate.max_rows(self.usable)
        options = [f"-n {max_rows}"] if max_rows else []
        fitting = [(estimate, min(estimate.rows, estimate.max_rows(self.usable))) for estimate in self.smaller]
        return options + [
            f"--dtype {estimate.dtype}" + ("" if rows == estimate.rows else f" -n {rows}")
            for estimate, rows in fitting
            if rows
        ]

    def memory_parts(self) -> list[MemoryPart]:
        """Return the parts of the memory that are not empty."""
        parts = [*self._constant_parts(), *self._row_parts()]
        return [
            MemoryPart(key=key, name=name, num_bytes=count, formula=how) for key, name, count, how in parts if count
        ]

    def _constant_parts(self) -> list[tuple[str, str, int, str]]:
        """Return key, name, bytes and formula of the parts that do not depend on the number of sequences."""
        estimate, shape = self.estimate, self.estimate.transformer
        size = ACTIVATION_BYTES[estimate.dtype]
        layers = f"{shape.num_layers} layers x (12 x {shape.width}² + 17 x {shape.width}) numbers"
        if estimate.dtype in ("int8", "int4"):
            layers += f", the 12 in {estimate.dtype} with their scales, the 17 in 16 bits"
        rows = f"({shape.vocabulary_size:,} ids + {shape.max_positions:,} positions + 2) x {shape.width} x {size} bytes"
        overhead = "Python and PyTorch, measured" if estimate.device_type == "cpu" else "context and kernels, assumed"
        return [
            ("layers", "transformer layers", estimate.layers, layers),
            ("embedding", "embedding, positions", estimate.embedding, rows),
            ("prepacked", "packed for MKL", estimate.prepacked, "copies of the layers and of the output embedding"),
            ("image_tokenizer", "VQ-VAE", estimate.image_tokenizer, "float32"),
            ("workspace", "workspace", estimate.workspace, "weights that are converted for a product"),
            ("overhead", "overhead", estimate.overhead, overhead),
        ]

    def _row_parts(self) -> list[tuple[str, str, int, str]]:
        """Return key, name, bytes and formula of the parts of all sequences."""
        estimate, shape = self.estimate, self.estimate.transformer
        size = ACTIVATION_BYTES[estimate.dtype]
        count, images = plural(estimate.rows, "sequence"), plural(estimate.rows, "image")
        copies = count + (f" x {1 + estimate.guidance_rows} for guidance" if estimate.guidance_rows else "")
        widest = max(estimate.forward_passes, key=lambda one: one.new_positions)
        per_id = estimate.logits // max(one.output_ids * one.output_positions for one in estimate.forward_passes)
        ids = f"{widest.output_ids:,} ids" + (
            f" x {widest.output_positions} pieces" if widest.output_positions > 1 else ""
        )
        cache = f"2 x {shape.num_layers} layers x {shape.width} x {size} bytes x {estimate.sequence_length:,} positions"
        pixels = estimate.image_config.downsampling * estimate.image_side
        peak = f"peak of a layer in a forward pass over {widest.new_positions:,} positions x {copies}"
        return [
            ("kv_cache", "KV cache", estimate.rows * estimate.kv_cache, f"{cache} x {copies}"),
            ("activations", "activations", estimate.rows * estimate.activations, peak),
            ("logits", "logits and noise", estimate.rows * estimate.logits, f"{per_id} bytes x {ids} x {count}"),
            ("images", "images", estimate.rows * estimate.images, f"VQ-VAE, {pixels} x {pixels} pixels x {images}"),
        ]

    def as_text(self) -> list[str]:
        """Return the lines of the report."""
        estimate, count = self.estimate, plural(self.estimate.rows, "sequence")
        limit = describe_limit(self.target.memory)
        lines = [
            f"{self.model}: {estimate.task}, {count} of up to {estimate.sequence_length:,} positions, "
            f"{estimate.dtype}, on {self.target}",
            "",
            "memory",
            *map(str, self.memory_parts()),
            str(MemoryPart(key="total", name="total", num_bytes=estimate.total, formula=MEMORY_FORMULA)),
        ]
        if self.fits:
            lines.append(f"fits: {limit}; maximum -n: {estimate.max_rows(self.usable)}")
        else:
            one_row = min(one.constant + one.per_row for one in (estimate, *self.smaller))
            options = ", or ".join(self.suggestions()) or f"none; one sequence takes {format_bytes(one_row)}"
            lines.append(f"does not fit: {limit}; options that fit: {options}")
        return [*lines, "", *self._time_lines()]

    def _time_lines(self) -> list[str]:
        """Return the lines on time, its formula and its constants."""
        estimate, speed = self.estimate, self.speed.speed
        seconds, count = estimate.seconds(speed), plural(estimate.rows, "sequence")
        total, each = format_duration(seconds.total), format_duration(seconds.total / estimate.rows)
        lines = [
            f"time: about {total} for {count}, {each} each",
            f"  {'prefill':<22}{format_duration(seconds.prefill):>8}",
        ]
        steps = [estimate.forward_seconds(one, speed) for one in estimate.forward_passes if one.new_positions == 1]
        if steps:
            span = f"{len(steps):,} steps of {1000 * min(steps):.3g} to {1000 * max(steps):.3g} ms"
            lines.append(f"  {'decoding':<22}{format_duration(seconds.decoding):>8}  {span}")
        lines.append(f"  {'images':<22}{format_duration(seconds.images):>8}  operations of the VQ-VAE / flops")
        return [
            *lines,
            *(f"  {line}" for line in self._time_formula()),
            f"  bandwidth: {speed.bandwidth / 1e9:.4g} GB/s ({self.speed.bandwidth_source})",
            f"  flops: {speed.flops / 1e12:.4g} TFLOP/s ({self.speed.flops_source})",
            f"  efficiency: {BANDWIDTH_EFFICIENCY:g} of the bandwidth (assumed)",
            f"  kernels: {OPERATIONS_PER_LAYER} a layer, {1e6 * SECONDS_PER_OPERATION:g} µs each to launch (assumed)",
        ]

    def _time_formula(self) -> list[str]:
        """Return the formula of the time."""
        estimate = self.estimate
        launches = "or their launches, if longer" if self.speed.speed.starts_ahead else "plus their launches"
        noise = "" if is_scoring(TASKS[estimate.task]) else f" + {SAMPLING_TRAFFIC} x candidate ids"
        lines = [
            f"a forward pass takes the larger of operations / flops and bytes / (efficiency x bandwidth), {launches}",
            "operations: sequences x (2 x weights of the layers x new positions + attention + logits)",
            f"bytes: weights + sequences x (KV cache{noise})",
        ]
        if converting := sum(estimate.converts_weights(one) for one in estimate.forward_passes):
            lines.append(
                f"{estimate.dtype} weights are converted in {converting:,} of {len(estimate.forward_passes):,} forward "
                f"passes, which moves {estimate.conversion_traffic} more bytes for each weight"
            )
        return lines

    def as_json(self) -> dict[str, Any]:
        """Return the report in bytes, seconds, bytes/s and FLOP/s."""
        estimate, speed = self.estimate, self.speed
        seconds = estimate.seconds(speed.speed)
        return {
            "model": self.model,
            "task": estimate.task,
            "rows": estimate.rows,
            "positions": estimate.sequence_length,
            "dtype": estimate.dtype,
            "guided": estimate.guidance_rows > 0,
            "device": {"type": self.target.type, "memory": self.target.memory, "usable": self.usable},
            "memory": {
                **{part.key: part.num_bytes for part in self.memory_parts()},
                "constant": estimate.constant,
                "per_row": estimate.per_row,
                "total": estimate.total,
            },
            "fits": self.fits,
            "max_rows": estimate.max_rows(self.usable),
            "suggestions": [] if self.fits else self.suggestions(),
            "seconds": {**asdict(seconds), "total": seconds.total},
            "formulas": {"memory": MEMORY_FORMULA, "time": self._time_formula()},
            "assumed": {
                "bandwidth": {"value": speed.speed.bandwidth, "is": speed.bandwidth_source},
                "flops": {"value": speed.speed.flops, "is": speed.flops_source},
                "bandwidth_efficiency": BANDWIDTH_EFFICIENCY,
                "operations_per_layer": OPERATIONS_PER_LAYER,
                "seconds_per_operation": SECONDS_PER_OPERATION,
                "margin": ESTIMATE_MARGIN,
            },
        }
