"""Training examples, micro-batches and batches, in numpy; ``example_builder.py`` makes them from rows of a store."""

# B rows, T positions of a row, G codes on a side of an image, M targets of a kind
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from enum import Enum
from typing import TypeAlias

import numpy as np

from cogview.tokenizers.layouts import TokenSequence
from cogview.tokenizers.vocabulary import TokenKind

# Rows of a store by field, uint16: "text" (B, W) and "image" (B, G * G). For upscaling "large" (B, 4 * G * G) or
# "small" (B, G * G / 4) hold codes of the same image at twice or half the side. For edits "source" (B, G * G) holds the
# image before, and "instruction" (B, W) the text if "text" is a caption. "named" (B, G * G) is the text token
# that names the object at each code, or NO_TOKEN.
Rows: TypeAlias = Mapping[str, np.ndarray]


class TargetKind(Enum):
    """Kind of a target: the next image code, the next text token, or the text token that names the object at a code."""

    IMAGE = "image"
    TEXT = "text"
    NAME = "name"


LossKey: TypeAlias = tuple[str, TargetKind]  # task and kind, each with a separate loss in the metrics


@dataclass(frozen=True, kw_only=True, eq=False)
class RowPlan:
    """Random decisions about the rows of a step.

    Attributes:
        tasks: Task of each row (B,).
        keep_caption: Rows that keep their caption (B,), bool.
        mask_codes: Codes of the image that the input replaces by [MASK] (B, G * G), bool.
        num_targets: Number of codes that are predicted (B,), int.
        target_priority: Exponential random numbers that select those codes (B, G * G), float above 0.
        window: Which of the nine windows upscaling generates (B,), int.
        unknown_source: Codes of the given image that are unknown where it is ``maskable`` (B, G * G), bool; all of them
            stand for an edit without its source.
        pivot_keys: Keys of the random pivots of window attention (B,), int64; -1 for the fixed ones of generation.
    """

    tasks: Sequence[str]
    keep_caption: np.ndarray
    mask_codes: np.ndarray
    num_targets: np.ndarray
    target_priority: np.ndarray
    window: np.ndarray
    unknown_source: np.ndarray
    pivot_keys: np.ndarray

    def select(self, rows: slice) -> RowPlan:
        """Return the plan of some of the rows."""
        return RowPlan(**{setting.name: getattr(self, setting.name)[rows] for setting in fields(self)})


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainingExample:
    """A row of a step as a sequence; arrays are (T,).

    Attributes:
        task: The task.
        inputs: Input ids, some of them [MASK], int64.
        positions: Positions, int64.
        targets: The next id at each position, int64.
        kinds: ``TokenKind`` of the targets.
        trained: Positions whose target counts in the loss, bool.
        names: The id that names an object at each position, -1 without a name target, int64.
        pivot_bias: Bias of each position as a pivot of window attention, -inf for none, float32; None for dense
            attention.
    """

    task: str
    inputs: np.ndarray
    positions: np.ndarray
    targets: np.ndarray
    kinds: np.ndarray
    trained: np.ndarray
    names: np.ndarray
    pivot_bias: np.ndarray | None = None

    @classmethod
    def of(
        cls,
        task: str,
        row: TokenSequence,
        seen: np.ndarray,
        read: np.ndarray,
        names: np.ndarray,
        pivot_bias: np.ndarray | None = None,
    ) -> TrainingExample:
        """Build next-token targets of a sequence.

        Args:
            task: The task.
            row: The sequence.
            seen: Input ids in place of those of ``row`` (T,).
            read: Positions to keep (T,), bool.
            names: Name targets, aligned with the ids that are predicted (T,).
            pivot_bias: Bias of each position as a pivot (T,), or None for dense attention.

        Returns:
            The example.
        """
        keep = read[:-1]
        return cls(
            task=task,
            inputs=seen[:-1][keep],
            positions=row.positions[:-1][keep],
            targets=row.ids[1:][keep],
            kinds=row.kinds[1:][keep],
            trained=row.loss[1:][keep],
            names=names[1:][keep],
            pivot_bias=None if pivot_bias is None else pivot_bias[:-1][keep],
        )

    def __len__(self) -> int:
        return len(self.inputs)

    def target_mask(self, kind: TargetKind) -> np.ndarray:
        """Return the positions with a target of ``kind`` (T,), bool."""
        if kind == TargetKind.NAME:
            return self.names >= 0
        wanted = TokenKind.IMAGE if kind == TargetKind.IMAGE else TokenKind.TEXT
        mask: np.ndarray = self.trained & (self.kinds == wanted)
        return mask


@dataclass(frozen=True, kw_only=True, eq=False)
class MicroBatch:
    """Rows that are computed together, padded on the right, where causal attention never looks.

    Attributes:
        inputs: Input ids (B, T), int64.
        positions: Positions (B, T), int64.
        targets: For each key, indices (M,) into the B * T positions, and the correct ids (M,), int64.
        lengths: Positions of each row without its padding, in ascending order, if rows may be packed; else None.
        pivot_bias: Bias of the positions as pivots (B, T), float32, -inf in padding; None for dense attention.
    """

    inputs: np.ndarray
    positions: np.ndarray
    targets: Mapping[LossKey, tuple[np.ndarray, np.ndarray]]
    lengths: tuple[int, ...] | None = None
    pivot_bias: np.ndarray | None = None

    @classmethod
    def of(
        cls, examples: Sequence[TrainingExample], keys: Sequence[LossKey], pad: int, *, pack: bool = False
    ) -> MicroBatch:
        """Pad examples to a micro-batch.

        Args:
            examples: The rows, in the order of their lengths.
            keys: Keys of the targets.
            pad: Id of the padding.
            pack: Whether the rows may be packed.

        Returns:
            The micro-batch.
        """
        shape = (len(examples), len(examples[-1]))
        inputs, positions = np.full(shape, pad, dtype=np.int64), np.zeros(shape, dtype=np.int64)
        targets = {key: np.full(shape, -1, dtype=np.int64) for key in keys}
        pivot_bias = None if examples[-1].pivot_bias is None else np.full(shape, -np.inf, dtype=np.float32)
        for index, example in enumerate(examples):
            filled = (index, slice(len(example)))
            inputs[filled], positions[filled] = example.inputs, example.positions
            if pivot_bias is not None:
                pivot_bias[filled] = example.pivot_bias
            for kind in TargetKind:
                ids = example.names if kind == TargetKind.NAME else example.targets
                if (example.task, kind) in targets:
                    targets[example.task, kind][filled] = np.where(example.target_mask(kind), ids, -1)
        indices = {key: np.flatnonzero(ids >= 0) for key, ids in targets.items()}
        return cls(
            inputs=inputs,
            positions=positions,
            targets={key: (indices[key], ids.reshape(-1)[indices[key]]) for key, ids in targets.items()},
            lengths=tuple(map(len, examples)) if pack else None,
            pivot_bias=pivot_bias,
        )

    def without_targets(self) -> MicroBatch:
        """Return a copy without targets."""
        empty = np.empty(0, dtype=np.int64)
        return replace(self, targets=dict.fromkeys(self.targets, (empty, empty)))


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainingBatch:
    """The rows of a step in one process.

    Attributes:
        step: Index of the step.
        rows: The rows of the store.
        samples: For each row the index of its sample in the run, of its store, and of its row there (B, 3), int64.
        keys: Keys of the losses.
        thread_shards: Micro-batches for each thread; usually there is one.
        target_counts: Number of targets for each key, int64.
        rows_by_task: Number of rows for each task, int64.
        num_tokens: Number of input tokens, without padding.
    """

    step: int
    rows: Rows
    samples: np.ndarray
    keys: Sequence[LossKey]
    thread_shards: Sequence[Sequence[MicroBatch]]
    target_counts: np.ndarray
    rows_by_task: np.ndarray
    num_tokens: int

    @classmethod
    def of(cls, step: int, rows: Rows, samples: np.ndarray, keys: Sequence[LossKey]) -> TrainingBatch:
        """Return a batch of rows that are not split into micro-batches yet.

        Args:
            step: The step.
            rows: Rows as the store has them.
            samples: (B, 3) int64: sample of the run, store, row of the store.
            keys: Task and kind of each loss.
        """
        empty = np.zeros(0, dtype=np.int64)
        return cls(
            step=step,
            rows=rows,
            samples=samples,
            thread_shards=(),
            keys=keys,
            target_counts=empty,
            rows_by_task=empty,
            num_tokens=0,
        )

    def as_padding(self) -> TrainingBatch:
        """Return a copy with zero loss weight, so that a process without rows still joins the collectives."""
        return replace(
            self,
            thread_shards=[[part.without_targets() for part in shard] for shard in self.thread_shards],
            target_counts=np.zeros_like(self.target_counts),
            rows_by_task=np.zeros_like(self.rows_by_task),
            num_tokens=0,
        )
