"""Time of single training steps on this machine, for the estimate of a new recipe."""

# B rows, T positions of a row
from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch

from cogview.device import training_dtype
from cogview.kernels.fused_linear_cross_entropy import LossTargets
from cogview.modeling.config import TransformerConfig
from cogview.modeling.transformer import Transformer
from cogview.tokenizers.vocabulary import Vocabulary
from cogview.training.distributed import DistributedContext
from cogview.training.engines import open_engine
from cogview.training.engines.base import DeviceMicroBatch, TransformerWithLoss
from cogview.training.settings import EngineSettings, TransformerTraining
from cogview.training.vqvae_initial import InitialVQVAE
from cogview.training.vqvae_trainer import VQVAETrainer
from cogview.vqvae.codec import to_float
from cogview.vqvae.model import VQVAEConfig
from cogview.vqvae.training import VQVAETrainingSettings

TIMED_STEPS = 2
MAX_SPREAD = 1.5  # of the times of equal steps, longest to shortest
MAX_LOAD = 0.75  # of the cores, by other processes
TRIAL_BATCH = 4  # images or rows, to compare precisions
MAX_FLOPS = 2e12  # of a timed step on a CPU


class StepTimer:
    """Times steps, reports what it times, and notices whether the times can be relied upon.

    Attributes:
        doubts: Why they cannot be relied upon, one text for each reason.
    """

    def __init__(self, trainings: int, device: torch.device, on_line: Callable[[str], object]) -> None:
        """Prepare to time steps.

        Args:
            trainings: Number of trainings whose steps are timed, each in every precision and then in its batch size.
            device: Device of the trainings.
            on_line: Called with a line before each timing.
        """
        self.device = device
        self.doubts: list[str] = []
        self._on_line = on_line
        precisions = precisions_of(device)
        self._total = trainings * (len(precisions) + 1 if len(precisions) > 1 else 1)
        self._done = 0
        cores = os.cpu_count() or 1  # the load is that of the whole machine, whatever this process may use
        load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
        if load > MAX_LOAD * cores:
            self.doubts.append(f"the machine was busy: load {load:.1f}, cores {cores}")

    def seconds_of(self, step: Callable[[], object], what: str, *, is_trial: bool = False) -> float:
        """Return the median seconds of a step after a first one, which allocates what the others use.

        Args:
            step: Computes a step.
            what: What is timed, for the line about it.
            is_trial: Whether the time is only compared with another one, and no part of the estimate.
        """
        self._done += 1
        self._on_line(f"timing {self._done} of {self._total}, {1 + TIMED_STEPS} steps each: {what}")
        times = []
        for _ in range(1 + TIMED_STEPS):
            began = time.perf_counter()
            step()
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            times.append(time.perf_counter() - began)
        spread = max(times[1:]) / max(min(times[1:]), 1e-9)
        if spread > MAX_SPREAD and not is_trial:
            self.doubts.append(f"equal steps differed by a factor of {spread:.1f}: {what}")
        return statistics.median(times[1:])

    def faster_precision(self, steps: Callable[[str], Callable[[], object]], what: str) -> str:
        """Return the precision that computes steps faster: ``float32``, or what the hardware has, if it is timed so.

        Args:
            steps: Returns the step of a precision.
            what: What is timed.
        """
        names = precisions_of(self.device)
        if len(names) == 1:
            return names[0]
        return min(names, key=lambda name: self.seconds_of(steps(name), f"{what}, {name}", is_trial=True))


def precisions_of(device: torch.device) -> tuple[str, ...]:
    """Return the precisions of a device that are compared; a GPU takes the one that it has."""
    native = training_dtype(device)
    if native is None:
        return ("float32",)
    return ("auto",) if device.type != "cpu" else ("float32", str(native).removeprefix("torch."))


def image_step_seconds(
    initial: InitialVQVAE | None, config: VQVAEConfig, pixels: np.ndarray, batch_size: int, timer: StepTimer
) -> tuple[float, str]:
    """Return the seconds of a training step of an image tokenizer, and the faster precision.

    Args:
        initial: Tokenizer to start from; None for random weights.
        config: Shape of the tokenizer.
        pixels: Pictures, uint8 (N, side, side, 3).
        batch_size: Pictures of a step.
        timer: Times the steps, on its device.
    """
    device = timer.device
    images = to_float(np.resize(pixels, (batch_size, *pixels.shape[1:])))

    def steps(precision: str, count: int) -> Callable[[], object]:
        settings = VQVAETrainingSettings(steps=100, batch_size=count, warmup_steps=1)
        trainer = VQVAETrainer(config, settings, DistributedContext(device), training_dtype(device, precision), initial)
        return lambda: trainer.step(50, images[:count])

    def what(count: int) -> str:
        return f"steps of the image tokenizer with a batch of {count}"

    precision = timer.faster_precision(lambda name: steps(name, TRIAL_BATCH), what(TRIAL_BATCH))
    return timer.seconds_of(steps(precision, batch_size), f"{what(batch_size)}, {precision}"), precision


def transformer_step_seconds(
    config: TransformerConfig, vocabulary: Vocabulary, length: int, batch_size: int, timer: StepTimer
) -> tuple[float, str]:
    """Return the seconds of a training step of a transformer, and the faster precision.

    Args:
        config: Shape of the transformer.
        vocabulary: Its ids.
        length: Positions of a row.
        batch_size: Rows of a step. If they are many on a CPU, fewer are computed and their time is scaled.
        timer: Times the steps, on its device.
    """
    device = timer.device
    affordable = int(MAX_FLOPS / (6 * config.num_parameters * length)) if device.type == "cpu" else batch_size
    rows = max(1, min(batch_size, affordable))

    def steps(precision: str) -> Callable[[], object]:
        torch.manual_seed(0)
        training = TransformerTraining(steps=100, batch_size=rows, warmup_steps=1)
        network = TransformerWithLoss(Transformer(config).train(), training_dtype(device, precision))
        context = DistributedContext(device)
        engine = open_engine(network, training, EngineSettings(checkpointing="none"), context)
        shards = min(rows, engine.num_threads)
        counts = [rows // shards + (number < rows % shards) for number in range(shards)]
        parts = [[_random_rows(vocabulary, count, length, device)] for count in counts]

        def step() -> None:
            engine.accumulate_gradients(parts, learn=True)
            engine.optimizer_step(1e-4)

        return step

    what = f"steps of the transformer with a batch of {rows}"
    precision = timer.faster_precision(steps, what)
    return timer.seconds_of(steps(precision), f"{what}, {precision}") * batch_size / rows, precision


def _random_rows(vocabulary: Vocabulary, count: int, length: int, device: torch.device) -> DeviceMicroBatch:
    """Return rows of random codes, (B, T), each of which is a target."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary.image.start, vocabulary.image.stop, (count, length + 1), generator=generator)
    ids = ids.to(device)
    targets = LossTargets(
        ids=vocabulary.image,
        positions_M=torch.arange(count * length, device=device),
        targets_M=ids[:, 1:].reshape(-1),
        weights_M=torch.full((count * length,), 1 / (count * length), device=device),
    )
    positions = torch.arange(length, device=device).expand(count, length)
    return DeviceMicroBatch(ids=ids[:, :-1].contiguous(), positions=positions, targets=[targets])
