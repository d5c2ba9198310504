"""Batches on the device: which ids compete for a target, and how much it weighs in the loss."""

# M targets of a kind
from __future__ import annotations

from collections.abc import Mapping

import torch

from cogview.kernels.fused_linear_cross_entropy import LossTargets
from cogview.kernels.window_mask import Pivots
from cogview.tokenizers.tasks import TASKS
from cogview.tokenizers.vocabulary import Vocabulary
from cogview.training.engines.base import DeviceMicroBatch
from cogview.training.examples import LossKey, MicroBatch, TargetKind, TrainingBatch
from cogview.training.settings import TransformerTraining


class TargetWeighting:
    """Moves batches to a device with weights for their targets."""

    def __init__(self, vocabulary: Vocabulary, settings: TransformerTraining, device: torch.device) -> None:
        """Weigh targets by ``settings``, for ids of ``vocabulary``."""
        self.vocabulary = vocabulary
        self.settings = settings
        self.device = device

    def loss_weight(self, task: str, kind: TargetKind) -> float:
        """Return the weight of a loss within its task.

        Args:
            task: The task.
            kind: Kind of the target.
        """
        if kind == TargetKind.NAME:
            return self.settings.name_loss_weight
        is_prompt = kind == TargetKind.TEXT and TASKS[task].output == "image"
        return self.settings.text_loss_weight if is_prompt else 1.0

    def competing_ids(self, kind: TargetKind) -> range:
        """Return the ids over which the softmax of a kind of target is taken."""
        if kind == TargetKind.IMAGE:
            return self.vocabulary.image
        if kind == TargetKind.NAME:
            return self.vocabulary.text
        return range(self.vocabulary.text.start, self.vocabulary.size)  # a text may end in a command

    def evenly_weighted(self, batch: TrainingBatch) -> list[list[DeviceMicroBatch]]:
        """Return a batch on the device, with the same total weight for each kind of target of this process."""
        counts = zip(batch.keys, batch.target_counts.tolist(), strict=True)
        return self.to_device(batch, {key: 1 / count for key, count in counts if count})

    def to_device(self, batch: TrainingBatch, weights: Mapping[LossKey, float]) -> list[list[DeviceMicroBatch]]:
        """Return a batch on the device.

        Args:
            batch: The batch of this process.
            weights: Weight of a single target, for each key that has targets in any process.
        """
        return [[self._to_device(part, weights) for part in shard] for shard in batch.thread_shards]

    def _to_device(self, part: MicroBatch, weights: Mapping[LossKey, float]) -> DeviceMicroBatch:
        """Return a micro-batch on the device."""
        targets = []
        for (task, kind), weight in weights.items():
            indices_M, ids_M = part.targets[task, kind]
            targets.append(
                LossTargets(
                    ids=self.competing_ids(kind),
                    positions_M=torch.from_numpy(indices_M).to(self.device),
                    targets_M=torch.from_numpy(ids_M).to(self.device),
                    weights_M=torch.full(indices_M.shape, weight, dtype=torch.float32, device=self.device),
                )
            )
        ids, positions = (torch.from_numpy(array).to(self.device) for array in (part.inputs, part.positions))
        pivots = None
        if part.pivot_bias is not None:
            pivots = Pivots.from_bias(torch.from_numpy(part.pivot_bias)).to(self.device)
        return DeviceMicroBatch(ids=ids, positions=positions, targets=targets, lengths=part.lengths, pivots=pivots)
