"""Check the training of a recipe on this machine, and replay a step that was not finite."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from cogview.diagnostics.machine import (
    Diagnosis,
    check_devices,
    check_disk,
    check_extensions,
    check_kernels,
    check_processes,
    check_versions,
    guarded,
)
from cogview.formatting import format_bytes

if TYPE_CHECKING:
    from cogview.training.distributed import DistributedContext
    from cogview.training.recipe import Recipe
    from cogview.training.settings import TransformerSettings


STATE_BYTES = 12  # of a parameter in a checkpoint: float32 weight and two moments of Adam


TRIAL_STEPS = 2  # the first one allocates what the others reuse


MAX_WAIT = 0.01  # acceptable fraction of a step that waits for rows


MEMORY_TOLERANCE = 0.2  # relative error of an estimate of GPU memory


def examine(recipe: Recipe | None, device: str, processes: int | None) -> Iterator[Diagnosis]:
    """Yield the findings of all checks.

    Args:
        recipe: A recipe with a section ``transformer``, or None to check the machine alone.
        device: auto, cpu, cuda, cuda:N or mps.
        processes: Processes of the all-reduce; None for one per GPU, or two.

    Raises:
        InputError: The section of the recipe has mistakes, or the device is unknown or absent.
    """
    settings = None
    if recipe is not None:
        from cogview.training.settings import TransformerSettings

        settings = recipe.settings(TransformerSettings, "transformer")
    yield from check_versions(() if settings is None else needed_packages(settings))
    if importlib.util.find_spec("torch") is None:
        return  # nothing else can be checked
    from cogview.device import choose_placement

    choose_placement(device)  # raises for a device that is unknown or absent
    yield from guarded("deepspeed", check_extensions)
    yield from check_devices()
    yield from guarded("kernels", check_kernels)
    yield from guarded("processes", lambda: check_processes(device, processes))
    if recipe is None or settings is None:
        yield from check_disk(Path.cwd())
        return
    yield from guarded("training", lambda: check_training(recipe, settings, device))


def needed_packages(settings: TransformerSettings) -> set[str]:
    """Return the optional packages that a recipe needs."""
    needed = {"deepspeed": settings.engine.name == "deepspeed", "peft": settings.lora is not None}
    return {name for name, is_needed in needed.items() if is_needed}


def check_training(recipe: Recipe, settings: TransformerSettings, device: str) -> Iterator[Diagnosis]:
    """Check the stores of a recipe, its disk, and the time and memory of two steps in a temporary folder.

    Args:
        recipe: The recipe.
        settings: Its section ``transformer``.
        device: auto, cpu, cuda, cuda:N or mps.

    Yields:
        The findings.

    Raises:
        InputError: The recipe cannot be trained.
    """
    from cogview.training.distributed import destroy_distributed, init_distributed

    context = init_distributed(device, needs_group=settings.engine.name == "deepspeed")
    try:
        with tempfile.TemporaryDirectory() as folder:
            yield from _try_steps(recipe, settings, context, Path(folder) / "run")
    finally:
        destroy_distributed()


def _try_steps(
    recipe: Recipe, settings: TransformerSettings, context: DistributedContext, run_folder: Path
) -> Iterator[Diagnosis]:
    """Prepare a run in ``run_folder`` and compute its first steps."""
    import torch

    from cogview.device import peak_memory
    from cogview.training.setup import prepare

    prepared = prepare(recipe, settings, context, run_folder=run_folder)
    trainer, loader, training = prepared.trainer, prepared.data_loader, settings.training
    epochs = training.steps * training.batch_size / loader.num_rows
    yield Diagnosis("ok", "stores", f"{loader.num_rows:,} rows in {len(loader.names)}, {epochs:.1f} epochs")
    checkpoint_bytes = STATE_BYTES * trainer.transformer.config.num_parameters
    yield from check_disk(recipe.transformer_run, checkpoint_bytes, settings.run.keep)
    run_folder.mkdir(parents=True)
    if context.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(context.device)
    batches = loader.batches(0)
    metrics, seconds, waited = {}, 0.0, 0.0
    for step in range(TRIAL_STEPS):
        start = time.perf_counter()
        batch = next(batches)
        waited = time.perf_counter() - start
        metrics = trainer.step(step, batch)
        seconds = time.perf_counter() - start
    peak = peak_memory(context.device)
    trainer.close()
    yield Diagnosis(
        "ok",
        "step",
        f"{seconds:.3g} s for {training.batch_size} rows of up to {trainer.model.config.longest_row()} tokens, "
        f"{metrics['tokens'] / seconds:,.0f} tokens/s, loss {metrics['loss']:.4g}; {training.steps:,} steps take about "
        f"{training.steps * seconds / 3600:.3g} hours",
    )
    yield check_data_wait(waited / seconds)
    yield check_memory(prepared.memory.total, peak, context.device.type)


def check_data_wait(fraction: float) -> Diagnosis:
    """Check the fraction of a step that waits for rows."""
    text = f"waiting for rows takes {fraction:.1%} of a step"
    if fraction <= MAX_WAIT:
        return Diagnosis("ok", "rows", text)
    return Diagnosis("note", "rows", text, "set training.num_workers, the processes that read ahead, to 1 or more")


def check_memory(predicted: int, peak: float, device_type: str) -> Diagnosis:
    """Compare the predicted memory of training with the peak.

    Args:
        predicted: Bytes of the estimate.
        peak: Bytes at the peak of the trial.
        device_type: cpu, cuda or mps. On a CPU the peak includes what the process held before.

    Returns:
        The finding.
    """
    text = f"{format_bytes(predicted)} predicted, peak {format_bytes(int(peak))}"
    if device_type == "cpu":
        return Diagnosis("ok", "memory", f"{text} (resident, of the whole process since its start)")
    if abs(predicted / max(peak, 1) - 1) < MEMORY_TOLERANCE:
        return Diagnosis("ok", "memory", text)
    return Diagnosis("note", "memory", text, f"the estimate is off by more than {MEMORY_TOLERANCE:.0%}")


def replay_nonfinite_step(folder: Path, device: str) -> Iterator[Diagnosis]:
    """Compute a step again whose loss or gradients were not finite.

    Args:
        folder: The dump that a run has written below ``nonfinite``.
        device: auto, cpu, cuda, cuda:N or mps.

    Yields:
        The findings.
    """
    from cogview.training.replay import replay_dump

    yield from (Diagnosis(*finding) for finding in replay_dump(folder, device))
