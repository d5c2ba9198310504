"""Fitting a training into memory: micro-batch size, activation checkpointing, and the peak of the device."""

from __future__ import annotations

from dataclasses import replace

import torch

from cogview.checkpoints.checkpoint import Model
from cogview.device import available_memory, precision_name
from cogview.errors import is_out_of_memory
from cogview.planning.gpus import peak_flops
from cogview.planning.hardware import measure_hardware
from cogview.planning.training import TrainingJob, TrainingMemory, choose_micro_batch, training_memory
from cogview.training.distributed import DistributedContext, log_main
from cogview.training.settings import TransformerSettings


def plan_memory(
    settings: TransformerSettings, model: Model, context: DistributedContext, dtype: torch.dtype | None
) -> tuple[TransformerSettings, TrainingMemory]:
    """Choose the micro-batch size and the activation checkpointing that fit into memory.

    Args:
        settings: The section ``transformer`` of the recipe.
        model: The model.
        context: The processes that train together.
        dtype: Dtype of matrix products; None for float32.

    Returns:
        The settings with both choices filled in, and the predicted memory of a process.

    Raises:
        InputError: Nothing fits.
    """
    training, engine = settings.training, settings.engine
    on_cpu = context.device.type == "cpu"
    job = training_job(settings, model, context, dtype)
    local_rows = job.batch_size // context.size
    free = -context.all_reduce_max(-available_memory(context.device)) / (context.size if on_cpu else 1)
    fixed_mode = None if engine.checkpointing == "auto" else engine.checkpointing
    # On a CPU larger micro-batches are not faster, so there is nothing to choose.
    fixed_rows = job.micro_batch_size if training.micro_batch_size or on_cpu else None
    rows, mode = choose_micro_batch(job, free, fixed_mode, fixed_rows)
    if rows < local_rows or mode != "none":
        log_main(
            f"{rows} of {local_rows} rows at once in each process, activation checkpointing: {mode}",
            context,
        )
    planned = replace(
        settings, training=replace(training, micro_batch_size=rows), engine=replace(engine, checkpointing=mode)
    )
    return planned, training_memory(replace(job, micro_batch_size=rows, checkpointing=mode))


def training_job(
    settings: TransformerSettings, model: Model, context: DistributedContext, dtype: torch.dtype | None
) -> TrainingJob:
    """Return what the memory plan needs to know of a training, before micro-batches are chosen.

    Args:
        settings: The section ``transformer`` of the recipe.
        model: The model.
        context: This process among those that train together.
        dtype: Dtype of the products, None for float32.
    """
    training, engine = settings.training, settings.engine
    local_rows = max(1, training.batch_size // context.size)
    trained = sum(parameter.numel() for parameter in model.transformer.parameters() if parameter.requires_grad)
    return TrainingJob(
        transformer=model.config.transformer,
        length=model.config.longest_row(),
        micro_batch_size=min(training.micro_batch_size or local_rows, local_rows),
        batch_size=local_rows * context.size,
        precision=precision_name(dtype),  # type: ignore[arg-type]
        trainable=trained if settings.lora is not None else None,
        engine=engine.name,
        zero=engine.zero if engine.name == "deepspeed" else 0,
        world_size=context.size,
        offload=engine.offload,
        checkpointing="none" if engine.checkpointing == "auto" else engine.checkpointing,
        device_type=context.device.type,
    )


def device_peak_flops(context: DistributedContext, dtype: torch.dtype | None) -> float | None:
    """Return the peak FLOP/s of this process's device in a dtype: from its data sheet, or measured.

    Args:
        context: This process among those that train together.
        dtype: Dtype of the products, None for float32.

    Returns:
        The peak, or None where the memory for its measurement is missing.
    """
    name = torch.cuda.get_device_name(context.device) if context.device.type == "cuda" else context.device.type
    try:
        return peak_flops(name, precision_name(dtype)) or measure_hardware(context.device, dtype or torch.float32).flops
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        log_main("MFU is not logged: the memory to measure the peak FLOP/s is missing", context)
        return None
