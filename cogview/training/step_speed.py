"""Time of single training steps on this machine, for the estimate of a new recipe."""

# B rows, T positions of a row
from __future__ import annotations

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
TRIAL_BATCH = 4  # images or rows, to compare precisions
MAX_FLOPS = 2e12  # of a timed step on a CPU


def image_step_seconds(
    initial: InitialVQVAE | None, config: VQVAEConfig, pixels: np.ndarray, batch_size: int, device: torch.device
) -> tuple[float, str]:
    """Return the seconds of a training step of an image tokenizer, and the faster precision.

    Args:
        initial: Tokenizer to start from; None for random weights.
        config: Shape of the tokenizer.
        pixels: Pictures, uint8 (N, side, side, 3).
        batch_size: Pictures of a step.
        device: Device of the training.
    """
    images = to_float(np.resize(pixels, (batch_size, *pixels.shape[1:])))

    def steps(precision: str, count: int) -> Callable[[], object]:
        settings = VQVAETrainingSettings(steps=100, batch_size=count, warmup_steps=1)
        trainer = VQVAETrainer(config, settings, DistributedContext(device), training_dtype(device, precision), initial)
        return lambda: trainer.step(50, images[:count])

    precision = faster_precision(device, lambda name: steps(name, TRIAL_BATCH))
    return seconds_of(steps(precision, batch_size), device), precision


def transformer_step_seconds(
    config: TransformerConfig, vocabulary: Vocabulary, length: int, batch_size: int, device: torch.device
) -> tuple[float, str]:
    """Return the seconds of a training step of a transformer, and the faster precision.

    Args:
        config: Shape of the transformer.
        vocabulary: Its ids.
        length: Positions of a row.
        batch_size: Rows of a step. If they are many on a CPU, fewer are computed and their time is scaled.
        device: Device of the training.
    """
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

    precision = faster_precision(device, steps)
    return seconds_of(steps(precision), device) * batch_size / rows, precision


def faster_precision(device: torch.device, steps: Callable[[str], Callable[[], object]]) -> str:
    """Return the precision that computes steps faster: ``float32``, or what the hardware has, if it is measured so.

    Args:
        device: The device.
        steps: Returns the step of a precision.
    """
    native = training_dtype(device)
    if native is None:
        return "float32"
    if device.type != "cpu":
        return "auto"
    names = ("float32", str(native).removeprefix("torch."))
    return min(names, key=lambda name: seconds_of(steps(name), device))


def seconds_of(step: Callable[[], object], device: torch.device) -> float:
    """Return the median seconds of a step after a first one, which allocates what the others use.

    Args:
        step: Computes a step.
        device: The device, which is waited for.
    """
    times = []
    for _ in range(1 + TIMED_STEPS):
        began = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


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
