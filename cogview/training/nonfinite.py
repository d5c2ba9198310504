"""Monitoring of training: activation maxima per layer, and the origin and handling of values that are not finite."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from cogview.config_io import to_mapping
from cogview.device import precision_name
from cogview.errors import InputError, reason_of
from cogview.files import write_json
from cogview.modeling.transformer import Transformer
from cogview.training.distributed import DistributedContext, log_main
from cogview.training.engines.base import MIN_LOSS_SCALE, DeviceMicroBatch, Engine, StepResult
from cogview.training.examples import TrainingBatch
from cogview.training.run_folder import Writer
from cogview.training.settings import TransformerTraining

EARLY_STEPS = 20  # up to here, or to the end of the warmup, the learning rate is the likely cause
MAX_SKIPPED_IN_A_ROW = 50  # with more skipped steps in a row, nothing is learned
REPORT_BYTES = 512  # of a report that one process sends to the others


class NonFiniteError(InputError):
    """Raised where training stops at a value that is not finite; the weights are those of the step before."""


def nonfinite_advice(step: int, learning_rate: float, warmup_steps: int) -> str:
    """Return the likely cause of a loss or gradient that is not finite, and the remedy.

    Args:
        step: The step, from 0.
        learning_rate: The peak of the learning rate.
        warmup_steps: Steps in which the learning rate rises to its peak.
    """
    if step == 0:
        return "no weight has changed yet: choose precision: float32, or other weights to start from"
    if step <= max(EARLY_STEPS, warmup_steps):
        return (
            "that early, the likely cause is the learning rate: start again in an empty run folder with less than "
            f"training.learning_rate {learning_rate:g}"
        )
    return "lower the learning rate, or resume earlier"


@contextmanager
def activation_maxima(transformer: Transformer) -> Iterator[dict[str, float]]:
    """Record the largest |x| of the embedding's output and of each layer's within the block.

    Yields:
        A mapping that is filled when the block ends, with keys such as ``activation_max_layer_00``.
    """
    seen: defaultdict[str, list[Tensor]] = defaultdict(list)
    names = {layer: f"activation_max_layer_{number:02}" for number, layer in enumerate(transformer.layers)}
    names[transformer.dropout] = "activation_max_embedding"

    def record(module: nn.Module, _: Any, output: Tensor) -> None:
        seen[names[module]].append(output.detach().abs().amax())

    handles = [module.register_forward_hook(record) for module in names]
    result: dict[str, float] = {}
    try:
        yield result
    finally:
        for handle in handles:
            handle.remove()
    result |= {name: torch.stack(seen[name]).max().item() for name in sorted(seen)}


@dataclass(frozen=True, kw_only=True)
class NonFiniteReport:
    """The first tensor that holds a value that is not finite.

    Attributes:
        phase: ``weights``, ``forward`` or ``backward``.
        module: Name of the module in the transformer; empty for the loss.
        tensor: ``weight``, ``bias``, ``output``, or a gradient.
        share: Fraction of its values that are not finite.
        largest: Largest |x| of its finite values.
    """

    phase: str
    module: str
    tensor: str
    share: float
    largest: float

    def __str__(self) -> str:
        where = self.module or "the loss"
        return f"{where}, {self.tensor} ({self.phase}; {self.share:.2%} of it, the rest is up to {self.largest:.3g})"


class NonFiniteGuard:
    """Counts skipped steps, diagnoses the first one that is not finite, and stops the run where the settings say so.

    Attributes:
        skipped: Number of steps skipped so far.
    """

    def __init__(
        self,
        engine: Engine,
        settings: TransformerTraining,
        *,
        to_device: Callable[[TrainingBatch], Sequence[Sequence[DeviceMicroBatch]]],
        snapshot: Callable[[], Writer | None],
        dumps: Path | None,
        can_replay: bool,
    ) -> None:
        """Guard the steps of an engine.

        Args:
            engine: The engine.
            settings: Whether to stop or to skip.
            to_device: Moves a batch to the device, to compute it again.
            snapshot: Captures the state for a dump, as ``Trainer.snapshot`` does.
            dumps: Folder of dumps, from which a step can be replayed; None writes none.
            can_replay: Whether ``cogview doctor --dump`` can replay the dump.
        """
        self.engine = engine
        self.settings = settings
        self.to_device = to_device
        self.snapshot = snapshot
        self.dumps = dumps
        self.can_replay = can_replay
        self.skipped = 0
        self._skipped_in_a_row = 0
        self._diagnosed = False

    @property
    def context(self) -> DistributedContext:
        """The processes that train together."""
        return self.engine.context

    def check(self, result: StepResult, batch: TrainingBatch, seed: int, metrics: dict[str, float]) -> None:
        """Count a step, and handle it if it was skipped.

        Args:
            result: What the engine did.
            batch: The batch of the step.
            seed: Seed of its dropout.
            metrics: Its metrics; those that are not finite are removed.

        Raises:
            NonFiniteError: The settings say to stop, or too many steps in a row were skipped.
        """
        self.skipped += result.skipped
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if result.skipped else 0
        if result.skipped:
            self._handle_skipped_step(result.loss_scale, batch, seed, metrics)

    def _handle_skipped_step(
        self, loss_scale: float, batch: TrainingBatch, seed: int, metrics: dict[str, float]
    ) -> None:
        """Diagnose the first skipped step, then stop or log it."""
        step, is_loss_finite = batch.step, math.isfinite(metrics["loss"])
        if self._skipped_in_a_row > MAX_SKIPPED_IN_A_ROW:
            raise NonFiniteError(
                f"step {step}: no gradient was finite in the last {self._skipped_in_a_row} steps; "
                f"{self._advice(step - self._skipped_in_a_row + 1)}"
            )
        if self.engine.model.dtype == torch.float16 and is_loss_finite and loss_scale > MIN_LOSS_SCALE:
            return  # the loss scale was too large, and is smaller now
        message = f"step {step}: the {'gradient' if is_loss_finite else 'loss'} is not finite"
        if not self._diagnosed:
            self._diagnosed = True
            message += self._diagnose(batch, seed)
        if self.settings.nonfinite == "stop":
            raise NonFiniteError(f"{message}; {self._advice(step)}; or go on without such steps: nonfinite: skip")
        log_main(f"{message}; skipped", self.context)
        for name in [name for name, value in metrics.items() if not math.isfinite(value)]:
            del metrics[name]

    def _advice(self, step: int) -> str:
        """Return the remedy for a run whose values are not finite since ``step``."""
        return nonfinite_advice(step, self.settings.learning_rate, self.settings.warmup_steps)

    def _diagnose(self, batch: TrainingBatch, seed: int) -> str:
        """Find the origin over all processes, write a dump, and return both as the end of a message."""
        report = first_nonfinite(self.engine, self.to_device(batch), seed)
        rank, size = self.context.rank, self.context.size
        first = size - int(self.context.all_reduce_max(-1.0 if report is None else size - rank))
        message = ""
        if first < size:
            origin = self._from_rank(str(report) if rank == first else "", first)
            message = (f" in process {first}" if size > 1 else "") + f", first in {origin}"
        if self.dumps is not None:
            message += self._write_dump(batch, seed, report, self.dumps / f"step-{batch.step:08d}")
        return message

    def _write_dump(self, batch: TrainingBatch, seed: int, report: NonFiniteReport | None, folder: Path) -> str:
        """Write a dump of the step; return a note on it."""
        write = self.snapshot()
        try:
            write_dump(folder, batch, report, context=self.context, seed=seed)
            if write is not None:
                write(folder / "model")
                settings = {"training": to_mapping(self.settings), "dtype": precision_name(self.engine.model.dtype)}
                write_json(folder / "settings.json", settings)
        except (OSError, SafetensorError) as error:  # such as a full disk
            return f" (it could not be kept in {folder}: {reason_of(error)})"
        replay = f", replay the step with: cogview doctor --dump {folder}" if self.can_replay else ""
        return f"; the batch and the weights are kept in {folder}{replay}"

    def _from_rank(self, text: str, rank: int) -> str:
        """Return ``text`` of process ``rank`` in every process."""
        local = np.zeros(REPORT_BYTES, dtype=np.int64)
        if self.context.rank == rank:
            encoded = text.encode()[:REPORT_BYTES]
            local[: len(encoded)] = list(encoded)
        return bytes(self.context.all_reduce_sum(local).tolist()).rstrip(b"\0").decode(errors="replace")


def first_nonfinite(engine: Engine, shards: Sequence[Sequence[DeviceMicroBatch]], seed: int) -> NonFiniteReport | None:
    """Find the first value of a step that is not finite; all processes call it together.

    Weights are checked first, then the forward pass, then the backward pass, except in ZeRO stage 3, where gradients
    cannot be read. Accumulated gradients stay as they are.

    Args:
        engine: The engine, in the state before the step.
        shards: The batch on the device.
        seed: Seed of the step's dropout.

    Returns:
        The first tensor in the order of computation, or None if everything is finite in this process.
    """
    transformer = engine.model.transformer
    found: list[NonFiniteReport] = []
    for name, parameter in transformer.named_parameters():
        if parameter.numel() and not found:
            module, _, tensor = name.rpartition(".")
            _check_finite("weights", module, tensor, parameter.detach(), found)
    names = {module: name for name, module in transformer.named_modules() if name}

    def check(module: nn.Module, _: Any, output: Any) -> None:
        if isinstance(output, Tensor) and not found:
            _check_finite("forward", names[module], "output", output.detach(), found)

    with _hooks(names, check):
        torch.manual_seed(seed)
        engine.accumulate_gradients(shards, learn=False)
    if not found and all(parameter.numel() for parameter in transformer.parameters()):
        _check_backward(engine, shards, names, seed, found)
    return found[0] if found else None


def _check_backward(
    engine: Engine,
    shards: Sequence[Sequence[DeviceMicroBatch]],
    names: dict[nn.Module, str],
    seed: int,
    found: list[NonFiniteReport],
) -> None:
    """Check the gradients of all outputs and parameters, starting at the loss."""

    def watch(module: nn.Module, _: Any, output: Any) -> None:
        def check(gradient: Tensor) -> None:
            if not found:
                _check_finite("backward", names[module], "gradient of the output", gradient, found)

        if isinstance(output, Tensor) and output.requires_grad:
            output.register_hook(check)

    name_of = {id(parameter): name for name, parameter in engine.model.transformer.named_parameters()}
    parameters = [parameter for parameter in engine.model.parameters() if parameter.requires_grad]
    with _hooks(names, watch):
        torch.manual_seed(seed)
        for part in (part for shard in shards for part in shard):
            with torch.enable_grad():
                total, _ = engine.model(part)
                if not found:
                    _check_finite("forward", "", "value", total.detach(), found)
                gradients = torch.autograd.grad(total * engine.loss_scale, parameters, allow_unused=True)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                if gradient is not None and not found:
                    module, _, tensor = name_of[id(parameter)].rpartition(".")
                    _check_finite("backward", module, f"gradient of the {tensor}", gradient, found)


@contextmanager
def _hooks(modules: dict[nn.Module, str], hook: Callable[[nn.Module, Any, Any], None]) -> Iterator[None]:
    """Register a forward hook on ``modules`` within the block."""
    handles = [module.register_forward_hook(hook) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _check_finite(phase: str, module: str, tensor: str, values: Tensor, found: list[NonFiniteReport]) -> None:
    """Append a report to ``found`` if a value is not finite."""
    finite = torch.isfinite(values)
    if finite.all():
        return
    rest = values[finite].abs().float()
    found.append(
        NonFiniteReport(
            phase=phase,
            module=module,
            tensor=tensor,
            share=1 - finite.float().mean().item(),
            largest=rest.max().item() if rest.numel() else 0.0,
        )
    )


def write_dump(
    folder: Path, batch: TrainingBatch, report: NonFiniteReport | None, *, context: DistributedContext, seed: int
) -> None:
    """Write the rows of a step of this process, where they come from, and its report.

    Args:
        folder: Folder of the dump, shared by all processes.
        batch: The batch of this process.
        report: The first value that is not finite; None if there is none.
        context: This process among all.
        seed: Seed of the step's dropout.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows: Any = {name: np.asarray(values) for name, values in batch.rows.items()}
    np.savez_compressed(folder / f"rows-{context.rank:04}.npz", **rows)
    content = {
        "step": batch.step,
        "rank": context.rank,
        "processes": context.size,
        "seed": seed,
        "found": None if report is None else str(report),
        "samples": [{"sample": sample, "store": store, "row": row} for sample, store, row in batch.samples.tolist()],
    }
    write_json(folder / f"report-{context.rank:04}.json", content, indent=1)
