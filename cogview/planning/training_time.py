"""Floating-point operations and time of training, and presets of training runs."""

# L layers, T positions of a sequence, D width of the transformer
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from cogview.errors import InputError
from cogview.modeling.checkpointing import Checkpointing
from cogview.modeling.config import TransformerConfig, preset
from cogview.planning.training import TrainingJob
from cogview.tokenizers.vocabulary import Vocabulary

MFU = 0.4  # model FLOP/s utilization that training is assumed to reach; 0.35 to 0.5 are reported for such models


@dataclass(frozen=True, kw_only=True)
class TrainingPreset:
    """Initial settings for a model size: customary values, not measured. Those of 4b are from arXiv:2105.13290."""

    batch: int  # sequences of a step
    learning_rate: float  # at its peak
    tokens: float  # positions of all sequences of the run
    card: str  # the smallest GPU that trains one sequence at once, as ``--device`` takes it
    checkpointing: Checkpointing  # on that GPU

    def steps(self, length: int) -> int:
        """Return the steps of the run with sequences of ``length`` positions."""
        return round(self.tokens / (self.batch * length))


# About 20 tokens per parameter (arXiv:2203.15556), the embedding's included. For 4b: 144,000 steps of 6,144 sequences
# of 1,089 positions (arXiv:2105.13290). Learning rates decrease with size, as is customary for GPTs, to that of 4b.
TRAINING_PRESETS: Mapping[str, TrainingPreset] = {
    "20m": TrainingPreset(batch=128, learning_rate=1e-3, tokens=0.9e9, card="cuda:4GB", checkpointing="none"),
    "100m": TrainingPreset(batch=256, learning_rate=8e-4, tokens=3e9, card="cuda:6GB", checkpointing="none"),
    "300m": TrainingPreset(batch=512, learning_rate=6e-4, tokens=7.3e9, card="cuda:12GB", checkpointing="none"),
    "1b": TrainingPreset(batch=1024, learning_rate=4e-4, tokens=21e9, card="cuda:24GB", checkpointing="selective"),
    "4b": TrainingPreset(
        batch=6144, learning_rate=3e-4, tokens=144_000 * 6144 * 1089, card="cuda:80GB", checkpointing="full"
    ),
}


def preset_job(name: str, *, world_size: int = 1) -> TrainingJob:
    """Return the job of a preset on its smallest GPU: engine torch, a micro-batch of one sequence.

    Args:
        name: A key of ``TRAINING_PRESETS``.
        world_size: Number of processes.

    Raises:
        InputError: The preset is unknown.
    """
    if name not in TRAINING_PRESETS:
        raise InputError(f"there are no training settings for {name!r}; known: {', '.join(TRAINING_PRESETS)}")
    settings = TRAINING_PRESETS[name]
    shape = preset(name, Vocabulary().padded_size)
    return TrainingJob(
        transformer=shape,
        length=shape.max_positions,
        micro_batch_size=1,
        batch_size=settings.batch,
        world_size=world_size,
        checkpointing=settings.checkpointing,
    )


def flops_per_token(shape: TransformerConfig, length: int) -> float:
    """Return the operations of forward and backward per position, by the customary count.

    It is 6 per multiplied parameter, the whole output embedding included, and 6 L D T for causal attention over T / 2
    positions on average (PaLM, arXiv:2204.02311, appendix B, halved for the causal mask). Model FLOP/s utilization
    (MFU) is based on it; recomputation does not count. 24.35e9 for 4b at 1,089 positions.

    Args:
        shape: Shape of the transformer.
        length: Positions of a sequence.
    """
    return _flops_per_token(shape, length, shape.vocabulary_size, recomputed=False)


def multiplied_flops_per_token(
    shape: TransformerConfig,
    length: int,
    competing: int = Vocabulary().num_image_codes,
    checkpointing: Checkpointing = "none",
) -> float:
    """Return the operations that are executed per position.

    Args:
        shape: Shape of the transformer.
        length: Positions of a sequence.
        competing: Candidate ids of the target. The loss multiplies their rows of the embedding only
            (``kernels/fused_linear_cross_entropy.py``).
        checkpointing: ``full`` computes every layer a second time, ``selective`` no product.
    """
    return _flops_per_token(shape, length, competing, recomputed=checkpointing == "full")


def _flops_per_token(shape: TransformerConfig, length: int, head_rows: int, *, recomputed: bool) -> float:
    """Return the operations per position with ``head_rows`` rows of the output embedding."""
    forward = shape.num_layers * (24.0 * shape.width**2 + 4.0 * shape.width * _mean_keys(shape, length))
    return (4 if recomputed else 3) * forward + 6.0 * head_rows * shape.width


def _mean_keys(shape: TransformerConfig, length: int) -> float:
    """Return the keys that a position attends to on average, without those of texts before a window."""
    attention = shape.attention
    recent = min(attention.window, length)
    if attention.is_dense or recent == length:
        return length / 2
    # A row grows by one key for each of its positions, then by one pivot for each few of them.
    later = length - recent
    return (recent * recent / 2 + later * (recent + min(attention.pivots, later) / 2)) / length


def training_time(job: TrainingJob, tokens: float, flops_per_second: float, mfu: float = MFU) -> float:
    """Return the seconds of training.

    Args:
        job: The job. ``full`` checkpointing adds the time of the second forward.
        tokens: Positions of all sequences of the run.
        flops_per_second: Peak FLOP/s of each device.
        mfu: Model FLOP/s utilization of a step without recomputation, in (0, 1].

    Raises:
        InputError: ``mfu`` is outside its range.
    """
    if not 0 < mfu <= 1:
        raise InputError(f"mfu must be above 0 and at most 1, got {mfu:g}")
    customary, executed = (
        _flops_per_token(job.transformer, job.length, job.transformer.vocabulary_size, recomputed=recomputed)
        for recomputed in (False, job.checkpointing == "full")
    )
    return (
        tokens
        * flops_per_token(job.transformer, job.length)
        * (executed / customary)
        / (job.world_size * flops_per_second * mfu)
    )
