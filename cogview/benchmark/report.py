"""Reports of ``cogview bench`` as a table and as JSON."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from statistics import median
from typing import Any

import torch

from cogview import __version__
from cogview.benchmark.measure import (
    BenchmarkResult,
    BenchmarkTarget,
    MeasurementError,
    measure_in_subprocess,
)
from cogview.checkpoints.adapted_weights import open_adapters
from cogview.checkpoints.adapter_choice import AdapterChoice
from cogview.checkpoints.registry import resolve_checkpoint
from cogview.device import available_memory, choose_placement
from cogview.errors import InputError
from cogview.formatting import format_bytes
from cogview.generation.guidance import necessary_rows
from cogview.planning import ESTIMATE_MARGIN
from cogview.planning.hardware import HardwareSpeed, measure_hardware
from cogview.planning.inference import InferenceEstimate, estimate_inference
from cogview.planning.target import TargetModel, load_target_model, random_config
from cogview.vqvae.model import VQVAEConfig

# Columns of the table with their widths.
COLUMN_WIDTHS = {
    "batch": 5,
    "first image, s": 24,
    "s/image": 9,
    "images/s": 10,
    "tokens/s": 8,
    "roofline": 8,
    "predicted": 9,
    "peak": 9,
}


def find_benchmark_target(
    name: str | None,
    random_shape: str | None,
    *,
    device: str,
    dtype: str,
    speculative: int | None,
    adapters: tuple[AdapterChoice, ...] = (),
) -> BenchmarkTarget:
    """Find the model to measure, without loading weights.

    Args:
        name: A known model, a checkpoint folder or a preset; None with ``random_shape``.
        random_shape: A preset or LAYERSxWIDTHxHEADS for random weights, or None.
        device: auto, cpu, cuda, cuda:N or mps.
        dtype: Weight format, or auto.
        speculative: Maximum of drafted codes per forward pass; None chooses it, 1 disables speculative decoding. With
            random weights None disables it: their predictions depend little on the sampled codes, so that drafts are
            accepted more often than with trained weights.
        adapters: Adapters to add to the weights of a known model.

    Returns:
        The target, whose ``load`` loads or creates the weights.

    Raises:
        InputError: The model or the device is unknown, or an adapter belongs to another model.
    """
    folder = None
    if random_shape is not None:
        model = TargetModel(config=random_config(random_shape), image_config=VQVAEConfig.released())
        speculative = speculative or 1
    else:
        assert name is not None
        model, folder = load_target_model(name), resolve_checkpoint(name)
        open_adapters(adapters, model.config, name)
    placement = choose_placement(
        *(device, dtype),
        stored=model.quantization,
        stored_dtype=model.stored_dtype,
        num_parameters=model.config.transformer.num_parameters,
    )
    if model.keeps_halves(placement.device.type, placement.weight_format):
        placement = replace(placement, matrices=model.stored_dtype)
    return BenchmarkTarget(
        config=model.config,
        image_config=model.image_config,
        placement=placement,
        folder=folder,
        adapters=adapters,
        speculative=speculative,
    )


class BenchmarkReport:
    """Benchmark of one model on one device."""

    def __init__(
        self,
        name: str,
        target: BenchmarkTarget,
        *,
        num_codes: int | None,
        repeats: int,
        notify: Callable[[str], None] = lambda line: None,
    ) -> None:
        """Prepare the benchmark; nothing is measured yet.

        Args:
            name: Name of the model.
            target: The model and its device.
            num_codes: Codes of each image to generate, 2 or more; None for whole images.
            repeats: Timed requests of each batch size.
            notify: Called with a line before each measurement.

        Raises:
            InputError: ``num_codes`` is outside its range.
        """
        self.name, self.target, self.repeats, self.notify = name, target, repeats, notify
        self.codes_per_image = target.config.grid**2
        self.num_codes = self.codes_per_image if num_codes is None else num_codes
        if not 2 <= self.num_codes <= self.codes_per_image:  # the metrics of codes exclude the first one
            raise InputError(
                f"--codes must be from 2 to {self.codes_per_image}, the codes of an image, got {self.num_codes}"
            )
        self._speed: HardwareSpeed | None = None

    @property
    def speed(self) -> HardwareSpeed:
        """Rates of the device, measured at the first access."""
        if self._speed is None:
            placement = self.target.placement
            self.notify(f"measuring {placement.device} briefly")
            self._speed = measure_hardware(placement.device, placement.dtype)
            if placement.device.type == "cuda":
                torch.cuda.empty_cache()  # the subprocesses need the memory
        return self._speed

    def estimate(self, rows: int) -> InferenceEstimate:
        """Return the estimate of a batch size."""
        placement, config = self.target.placement, self.target.config
        return estimate_inference(
            config,
            self.target.image_config,
            task="generate",
            rows=rows,
            dtype=placement.weight_format,
            keep_halves=placement.matrices is not None,
            device_type=placement.device.type,
            guidance_rows=len(necessary_rows([config.sampling.guidance])[0]) - 1,
        )

    def measure(self, estimate: InferenceEstimate) -> dict[str, Any]:
        """Measure a batch size.

        Returns:
            The metrics as JSON content, or ``skipped`` or ``failed`` with the reason.
        """
        free = available_memory(self.target.placement.device)
        row = {"batch": estimate.rows, "predicted_bytes": estimate.total, "free_bytes": free}
        if estimate.total > (1 - ESTIMATE_MARGIN) * free:
            return {**row, "skipped": "does not fit"}
        generated = replace(estimate, forward_passes=estimate.forward_passes[: self.num_codes])
        seconds = (1 + self.repeats) * generated.seconds(self.speed).total
        self.notify(f"batch {estimate.rows}: 1 + {self.repeats} requests, about {_number(seconds)} s")
        try:
            measured = measure_in_subprocess(
                self.target, estimate.rows, num_codes=self.num_codes, repeats=self.repeats, free_bytes=free
            )
        except MeasurementError as error:
            return {**row, "failed": str(error)}
        result = BenchmarkResult(estimate=estimate, speed=self.speed, num_codes=self.num_codes, measured=measured)
        return row | result_as_json(result)

    def header(self) -> list[str]:
        """Return the lines above the rows of the table."""
        shape = self.target.config.transformer
        lines = [
            f"{self.name}: {shape.num_layers} layers, width {shape.width}, {shape.num_heads} heads; "
            f"{self.codes_per_image:,} codes per image",
            f"{self.target.placement}; PyTorch {torch.__version__}, {torch.get_num_threads()} threads",
            f"hardware: {self.speed.bandwidth / 1e9:.4g} GB/s, {self.speed.flops / 1e12:.4g} TFLOP/s",
        ]
        if self.target.speculative == 1:
            lines.append("speculative decoding: off")
        if self.num_codes < self.codes_per_image:
            lines += [
                f"generated: the first {self.num_codes:,} codes of each image; ~ is extrapolated to whole images, and",
                "predicted is for whole ones; tokens/s, roofline and peak are those of the generated codes",
            ]
        return [*lines, "", "  ".join(name.rjust(width) for name, width in COLUMN_WIDTHS.items())]

    def line(self, row: dict[str, Any]) -> str:
        """Return the line of the table for the result of ``measure``."""
        batch, predicted = str(row["batch"]).rjust(COLUMN_WIDTHS["batch"]), format_bytes(row["predicted_bytes"])
        if reason := row.get("skipped"):
            free = format_bytes(row["free_bytes"])
            return f"{batch}  {reason}: {predicted} predicted, {free} free, of which {ESTIMATE_MARGIN:.0%} stays free"
        if reason := row.get("failed"):
            return f"{batch}  failed: {reason}; {predicted} predicted"
        about = "~" if self.num_codes < self.codes_per_image else ""
        first, peak = row["first_image_s"], row["peak_bytes"]
        span = f"({_number(first['min'])}..{_number(first['max'])})"
        cells = {
            "batch": batch,
            "first image, s": f"{about}{_number(first['median'])} {span}",
            "s/image": about + _number(1 / row["images_per_s"]),
            "images/s": about + _number(row["images_per_s"]),
            "tokens/s": _number(row["tokens_per_s"]),
            "roofline": f"{row['roofline']:.0%}",
            "predicted": predicted,
            "peak": "unknown" if peak is None else format_bytes(peak),
        }
        return "  ".join(cells[name].rjust(width) for name, width in COLUMN_WIDTHS.items())

    def settings_as_json(self) -> dict[str, Any]:
        """Return what all rows share, with rates in bytes/s and FLOP/s."""
        target, shape = self.target, self.target.config.transformer
        return {
            "cogview": __version__,
            "model": self.name,
            "layers": shape.num_layers,
            "width": shape.width,
            "heads": shape.num_heads,
            "device": str(target.placement.device),
            "dtype": target.placement.weight_format,
            "pytorch": torch.__version__,
            "threads": torch.get_num_threads(),
            "hardware": {"bandwidth": self.speed.bandwidth, "flops": self.speed.flops},
            "codes_per_image": self.codes_per_image,
            "codes_generated": self.num_codes,
            "text_pieces": target.config.max_text,
            "repeats": self.repeats,
        }


def result_as_json(result: BenchmarkResult) -> dict[str, Any]:
    """Return the metrics of a batch size in bytes and seconds, with the times of every request."""
    seconds = result.first_image
    return {
        "peak_bytes": result.measured.peak,
        "first_image_s": {"median": median(seconds), "min": min(seconds), "max": max(seconds)},
        "images_per_s": result.images_per_second,
        "tokens_per_s": result.tokens_per_second,
        "roofline": result.roofline_fraction,
        "requests": [asdict(request) for request in result.measured.requests],
    }


def _number(value: float) -> str:
    """Return three or more digits, without an exponent for large numbers."""
    return f"{value:.3g}" if value < 999.5 else f"{value:,.0f}"
