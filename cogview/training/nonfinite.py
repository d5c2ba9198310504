"""What is watched in training: activations by depth, and where the first number came from that is not finite."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cogview.files import write_json
from cogview.modeling.transformer import Transformer
from cogview.training.engines.torch_engine import DeviceMicroBatch, Engine
from cogview.training.examples import TrainingBatch


@contextmanager
def activation_maxima(transformer: Transformer) -> Iterator[dict[str, float]]:
    """Afterwards the result has the largest |x| behind the embedding and behind each layer, by depth."""
    seen: defaultdict[str, list[Tensor]] = defaultdict(list)
    names = {layer: f"activation_max_layer_{number:02}" for number, layer in enumerate(transformer.layers)}
    names[transformer.dropout] = "activation_max_embedding"

    def watch(module: nn.Module, _: Any, output: Tensor) -> None:
        seen[names[module]].append(output.detach().abs().amax())

    handles = [module.register_forward_hook(watch) for module in names]
    result: dict[str, float] = {}
    try:
        yield result
    finally:
        for handle in handles:
            handle.remove()
    result |= {name: torch.stack(seen[name]).max().item() for name in sorted(seen)}


@dataclass(frozen=True, kw_only=True)
class NonFiniteReport:
    """The first tensor with a number that is not finite: in the weights, going forward or going back."""

    phase: str  # weights, forward or backward
    module: str  # its name in the transformer; empty: the loss
    tensor: str  # weight, bias, output, or gradient of the output
    share: float  # of its numbers that are not finite
    largest: float  # |x| of those that are

    def __str__(self) -> str:
        where = self.module or "the loss"
        return f"{where}, {self.tensor} ({self.phase}; {self.share:.2%} of it, the rest is up to {self.largest:.3g})"


def first_nonfinite(engine: Engine, shares: Sequence[Sequence[DeviceMicroBatch]], seed: int) -> NonFiniteReport | None:
    """Where a step with ``seed`` meets its first number that is not finite, or None: for all processes at once.

    Weights are looked at first, then the way forward, then (but in ZeRO stage 3, where gradients are not there to be
    looked at) the way back. The gradients that an engine adds up are left as they are.
    """
    transformer = engine.model.transformer
    found: list[NonFiniteReport] = []
    for name, parameter in transformer.named_parameters():
        if parameter.numel() and not found:
            module, _, tensor = name.rpartition(".")
            _check_finite("weights", module, tensor, parameter.detach(), found)
    names = {module: name for name, module in transformer.named_modules() if name}

    def forward(module: nn.Module, _: Any, output: Any) -> None:
        if isinstance(output, Tensor) and not found:
            _check_finite("forward", names[module], "output", output.detach(), found)

    with _hooks(names, forward):
        torch.manual_seed(seed)
        engine.accumulate_gradients(shares, learn=False)
    if not found and all(parameter.numel() for parameter in transformer.parameters()):
        _check_backward(engine, shares, names, seed, found)
    return found[0] if found else None


def _check_backward(
    engine: Engine,
    shares: Sequence[Sequence[DeviceMicroBatch]],
    names: dict[nn.Module, str],
    seed: int,
    found: list[NonFiniteReport],
) -> None:
    """Look at the gradients of the outputs of all modules, from the loss on."""

    def watch(module: nn.Module, _: Any, output: Any) -> None:
        def look(gradient: Tensor) -> None:
            if not found:
                _check_finite("backward", names[module], "gradient of the output", gradient, found)

        if isinstance(output, Tensor) and output.requires_grad:
            output.register_hook(look)

    parameters = [parameter for parameter in engine.model.parameters() if parameter.requires_grad]
    with _hooks(names, watch):
        torch.manual_seed(seed)
        for part in (part for share in shares for part in share):
            with torch.enable_grad():
                total, _ = engine.model(part.ids, part.positions, part.targets)
                if not found:
                    _check_finite("forward", "", "value", total.detach(), found)
                gradients = torch.autograd.grad(total * engine.loss_scale, parameters, allow_unused=True)
            own = {id(parameter): name for name, parameter in engine.model.transformer.named_parameters()}
            for parameter, gradient in zip(parameters, gradients, strict=True):
                if gradient is not None and not found:
                    module, _, tensor = own[id(parameter)].rpartition(".")
                    _check_finite("backward", module, f"gradient of the {tensor}", gradient, found)


@contextmanager
def _hooks(modules: dict[nn.Module, str], hook: Callable[[nn.Module, Any, Any], None]) -> Iterator[None]:
    handles = [module.register_forward_hook(hook) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _check_finite(phase: str, module: str, tensor: str, values: Tensor, found: list[NonFiniteReport]) -> None:
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
    folder: Path, batch: TrainingBatch, finding: NonFiniteReport | None, *, rank: int, processes: int, seed: int
) -> None:
    """Keep in ``folder`` what process ``rank`` did in a step: its rows, their numbers, and what was found there."""
    folder.mkdir(parents=True, exist_ok=True)
    rows: Any = {name: np.asarray(values) for name, values in batch.rows.items()}
    np.savez_compressed(folder / f"rows-{rank:04}.npz", **rows)
    report = {
        "step": batch.step,
        "rank": rank,
        "processes": processes,
        "seed": seed,
        "found": None if finding is None else str(finding),
        "samples": [{"sample": sample, "store": store, "row": row} for sample, store, row in batch.samples.tolist()],
    }
    write_json(folder / f"report-{rank:04}.json", report, indent=1)
