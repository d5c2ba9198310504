"""Model and device of an estimate: a checkpoint or a preset, on this machine or on a device given by its size."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from cogview.checkpoints.checkpoint import check_sizes
from cogview.checkpoints.image_tokenizer import read_image_config
from cogview.checkpoints.precision import stored_matrix_dtype, stored_quantization
from cogview.checkpoints.registry import load_registry, resolve_checkpoint
from cogview.checkpoints.safetensors_io import WeightsFile
from cogview.checkpoints.v1_convert import ALL_TASKS, V1_CAPTION, V1_GRID
from cogview.device import (
    DevicePlacement,
    Quantization,
    available_memory,
    choose_placement,
    keeps_halves,
    training_dtype,
)
from cogview.errors import InputError
from cogview.formatting import format_bytes
from cogview.modeling.config import PRESETS, ModelConfig, preset
from cogview.planning.gpus import GPU_PEAK_FLOPS, assumed_gpu, peak_flops
from cogview.planning.hardware import ASSUMED_SPEEDS, HardwareSpeed, measure_hardware
from cogview.planning.model_memory import ACTIVATION_BYTES
from cogview.planning.training import Precision
from cogview.tokenizers.layouts import layouts
from cogview.tokenizers.vocabulary import Vocabulary
from cogview.vqvae.model import VQVAEConfig

UNITS = {"MB": 10**6, "GB": 10**9, "MiB": 2**20, "GiB": 2**30}


@dataclass(frozen=True, kw_only=True)
class TargetDevice:
    """The device of an estimate: one of this machine, or one of which only the memory is known."""

    type: str  # cpu, cuda or mps
    memory: int  # free bytes
    dtype: str  # weight format, never auto
    placement: DevicePlacement | None = None  # None: only a size was given

    def __str__(self) -> str:
        """Return the type and the memory."""
        return f"{self.type} with {format_bytes(self.memory)}" + (" free" if self.placement is not None else "")


@dataclass(frozen=True, kw_only=True)
class TargetModel:
    """Settings of a model; its weights are not loaded."""

    config: ModelConfig
    image_config: VQVAEConfig
    quantization: Quantization | None = None  # of the stored weights
    stored_dtype: torch.dtype | None = None  # of the stored matrices; None without weights

    def keeps_halves(self, device_type: str, dtype: str) -> bool:
        """Return whether the matrices remain in 16 bits on a device, with ``dtype`` as weight format."""
        return dtype == "float32" and keeps_halves(torch.device(device_type), torch.float32, self.stored_dtype)


@dataclass(frozen=True, kw_only=True)
class TargetSpeed:
    """Rates of a device, and the source of each: given, measured or assumed."""

    speed: HardwareSpeed
    bandwidth_source: str
    flops_source: str


def load_target_model(name: str) -> TargetModel:
    """Read the settings of a model.

    Args:
        name: A preset of ``PRESETS``, a known model, or the path of a checkpoint folder.

    Raises:
        InputError: The name is unknown, or the checkpoint cannot be read.
    """
    if name in PRESETS:
        return TargetModel(config=preset_config(name), image_config=VQVAEConfig.released())
    known = load_registry()
    if name not in known and not Path(name).exists():
        raise InputError(
            f'model "{name}" is unknown; known: {", ".join(known)}, the sizes {", ".join(PRESETS)}, or the path of a '
            "checkpoint folder"
        )
    folder = resolve_checkpoint(name)
    config = check_sizes(folder)
    weights = WeightsFile(folder / "model.safetensors")
    return TargetModel(
        config=config,
        image_config=read_image_config(folder / "image"),
        quantization=stored_quantization(weights.specs),
        stored_dtype=stored_matrix_dtype(weights.specs),
    )


def preset_config(name: str) -> ModelConfig:
    """Return the settings of a preset with the vocabulary, grid and tasks of CogView v1."""
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


def random_config(shape: str) -> ModelConfig:
    """Return the settings of a model with random weights.

    Args:
        shape: A preset of ``PRESETS``, or LAYERSxWIDTHxHEADS such as ``12x832x13``.

    Raises:
        InputError: The shape cannot be parsed, or the width does not divide into the heads.
    """
    if shape in PRESETS:
        return preset_config(shape)
    found = re.fullmatch(r"(\d{1,9})x(\d{1,9})x(\d{1,9})", shape, re.ASCII)
    if found is None:
        raise InputError(
            f"--random must be LAYERSxWIDTHxHEADS such as 12x832x13, or one of {', '.join(PRESETS)}, got {shape!r}"
        )
    base = preset_config(next(iter(PRESETS)))
    layers, width, heads = map(int, found.groups())
    try:
        transformer = replace(base.transformer, num_layers=layers, width=width, num_heads=heads)
    except ValueError as error:
        raise InputError(f"--random {shape}: {error}") from None
    return replace(base, transformer=transformer)


def find_target(name: str, dtype: str, model: TargetModel) -> TargetDevice:
    """Find the device of an estimate.

    Args:
        name: A device of this machine (auto, cpu, cuda, cuda:N or mps), or a type with a size such as ``cuda:24GB``.
        dtype: Weight format, or auto.
        model: The model.

    Returns:
        The device with its memory and weight format.

    Raises:
        InputError: The name is unknown, or this machine has no such device.
    """
    parameters, quantization = model.config.transformer.num_parameters, model.quantization
    size = re.fullmatch(rf"(cpu|cuda):(\d+(?:\.\d+)?)({'|'.join(UNITS)})", name)
    if size is None:
        if not re.fullmatch(r"auto|\d{1,2}|cpu|cuda(:\d{1,2})?|mps", name):
            raise InputError(
                f"device {name!r} is unknown; expected auto, cpu, cuda, cuda:N or mps, or a size such as cpu:16GB or "
                "cuda:24GB"
            )
        placement = choose_placement(
            name, dtype, stored=quantization, stored_dtype=model.stored_dtype, num_parameters=parameters
        )
        return TargetDevice(
            type=placement.device.type,
            memory=available_memory(placement.device),
            dtype=placement.weight_format,
            placement=placement,
        )
    memory = int(float(size[2]) * UNITS[size[3]])
    if memory < 1:
        raise InputError(f"the size of the device must be above 0, got {name}")
    if dtype == "auto":  # by the rule of ``choose_placement`` for a recent device
        bytes_per_weight = 2 if model.keeps_halves(size[1], "float32") else 4
        half = size[1] == "cuda" or bytes_per_weight * parameters > memory / 2
        dtype = quantization or ("bfloat16" if half else "float32")
    return TargetDevice(type=size[1], memory=memory, dtype=dtype)


def find_speed(
    target: TargetDevice,
    bandwidth: float | None,
    flops: float | None,
    on_measure: Callable[[torch.device], None] = lambda device: None,
) -> TargetSpeed:
    """Return given rates, or else measured ones of a device that is present, or else assumed ones.

    Args:
        target: The device.
        bandwidth: Given bytes/s, or None.
        flops: Given FLOP/s, or None.
        on_measure: Called with the device before a measurement, which takes about a second.
    """
    speed, source = HardwareSpeed(bandwidth=1, flops=1, starts_ahead=target.type != "cpu"), "given"
    if bandwidth is None or flops is None:
        if target.placement is None:
            assumed = ASSUMED_SPEEDS[target.type, ACTIVATION_BYTES[target.dtype]]
            speed, source = replace(speed, bandwidth=assumed[0], flops=assumed[1]), "assumed"
        else:
            device = target.placement.device
            on_measure(device)
            speed, source = measure_hardware(device, target.placement.dtype), "measured"
    return TargetSpeed(
        speed=replace(
            speed,
            bandwidth=speed.bandwidth if bandwidth is None else bandwidth,
            flops=speed.flops if flops is None else flops,
        ),
        bandwidth_source=source if bandwidth is None else "given",
        flops_source=source if flops is None else "given",
    )


def training_precision(target: TargetDevice) -> Precision:
    """Return the precision that training chooses on a device; bfloat16 on a GPU given by its size."""
    if target.placement is None:
        return "float32" if target.type == "cpu" else "bfloat16"
    known: dict[torch.dtype | None, Precision] = {torch.bfloat16: "bfloat16", torch.float16: "float16"}
    return known.get(training_dtype(target.placement.device), "float32")


def find_training_peak(
    target: TargetDevice,
    precision: str,
    flops: float | None,
    on_measure: Callable[[torch.device], None] = lambda device: None,
) -> tuple[float, str]:
    """Return the peak of a device in training.

    Args:
        target: The device.
        precision: float32, bfloat16 or float16.
        flops: Given FLOP/s, or None.
        on_measure: Called with the device before a measurement, which takes about a second.

    Returns:
        FLOP/s, and their source: given, a data sheet, measured, or assumed.
    """
    if flops is not None:
        return flops, "given"
    if target.placement is None:
        if target.type == "cpu":
            return ASSUMED_SPEEDS["cpu", ACTIVATION_BYTES[precision]][1], "assumed"
        gpu = assumed_gpu(target.memory)
        return GPU_PEAK_FLOPS[gpu][precision], f"assumed: {gpu}"
    device = target.placement.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    if (peak := peak_flops(name, precision)) is not None:
        return peak, f"data sheet of {name}"
    on_measure(device)
    return measure_hardware(device, getattr(torch, precision)).flops, "measured"
