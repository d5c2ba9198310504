"""From rows of a store to what a step computes: each row arranged for one task, and the rows put into parts.

A row is for drawing its text, describing its image, or drawing a larger image from a smaller one. The rows of a step
are put in order of their lengths and computed in parts, each padded to its longest. All of it is numpy and a function
of the seed and the step, so that any process of any number of them can do its share beforehand.
"""

# B rows, T places of a row, G codes on a side of an image, M places where a thing is told
from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from enum import Enum
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import numpy as np
from torch.utils.data import DataLoader, Dataset

from cogview.data.store import NO_TOKEN, TokenStore
from cogview.signals import worker_init
from cogview.tokenizers.layouts import TokenSequence
from cogview.tokenizers.vocabulary import TokenKind
from cogview.tokenizers.windows import upscale_windows
from cogview.training.distributed import DistributedContext
from cogview.training.settings import TransformerTraining

if TYPE_CHECKING:
    from cogview.data.mixture import MixedStore, Mixture
    from cogview.modeling.config import ModelConfig

# Of a store, uint16: "text" (B, W) and "image" (B, G * G), and for upscaling "large" (B, 4 * G * G) or "small"
# (B, G * G / 4), codes of the same scene at twice or half the side. "named" (B, G * G) is the piece of the text that
# names the thing at each code, or ABSENT.
Rows = Mapping[str, np.ndarray]

START_METHOD = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"  # of workers
MAX_LENGTH_RATIO = 1.5  # how many times as long as the shortest row the longest may be that is computed with it


class TargetKind(Enum):
    """What can be told at a place of a row: the next code or piece, or the piece that names the thing at that code."""

    IMAGE = "image"
    TEXT = "text"
    NAME = "name"


LossKey: TypeAlias = tuple[str, TargetKind]  # a task and what is told in it


@dataclass(frozen=True, kw_only=True, eq=False)
class RowPlan:
    """What chance decides about the rows of a step."""

    tasks: Sequence[str]  # (B,)
    keep_caption: np.ndarray  # (B,) bool: whose caption is kept
    mask_codes: np.ndarray  # (B, G * G) bool: which codes of the image the input holds [MASK] for
    num_targets: np.ndarray  # (B,) int: how many codes are asked for; others are left out, where every code is hidden
    target_priority: np.ndarray  # (B, G * G) float above 0, exponential: decide which codes those are
    window: np.ndarray  # (B,) int: which of the nine windows is drawn in upscaling

    def select(self, rows: slice) -> RowPlan:
        """Those of some of the rows."""
        return RowPlan(**{setting.name: getattr(self, setting.name)[rows] for setting in fields(self)})


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainingExample:
    """One row of a step. Arrays are (T,), one entry per place that the model reads."""

    task: str
    inputs: np.ndarray  # int64 ids, some of them hidden
    positions: np.ndarray  # int64
    targets: np.ndarray  # int64 ids: what follows
    kinds: np.ndarray  # Kind of the targets
    trained: np.ndarray  # bool: targets that are learnt
    names: np.ndarray  # int64 ids of the names of things told at each place, -1 where there is none to tell

    @classmethod
    def of(
        cls, task: str, row: TokenSequence, seen: np.ndarray, read: np.ndarray, names: np.ndarray
    ) -> TrainingExample:
        """To tell each place of ``row`` from ``seen`` before it, at those places that are ``read`` (T,) bool.

        ``names`` (T,) are those of the places that are told.
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
        )

    def __len__(self) -> int:
        return len(self.inputs)

    def target_mask(self, told: TargetKind) -> np.ndarray:
        """(T,) bool: the places where ``told`` is learnt."""
        if told == TargetKind.NAME:
            return self.names >= 0
        return self.trained & (self.kinds == (TokenKind.IMAGE if told == TargetKind.IMAGE else TokenKind.TEXT))


@dataclass(frozen=True, kw_only=True, eq=False)
class MicroBatch:
    """Rows that are computed together, padded on the right, where no place looks at it."""

    inputs: np.ndarray  # (B, T) int64 ids
    positions: np.ndarray  # (B, T) int64
    targets: Mapping[
        LossKey, tuple[np.ndarray, np.ndarray]
    ]  # (M,) int64 places among the B * T, and the ids that are right

    @classmethod
    def of(cls, lessons: Sequence[TrainingExample], keys: Sequence[LossKey], pad: int) -> MicroBatch:
        """``lessons``, of which the last is the longest."""
        shape = (len(lessons), len(lessons[-1]))
        inputs, positions = np.full(shape, pad, dtype=np.int64), np.zeros(shape, dtype=np.int64)
        wanted = {key: np.full(shape, -1, dtype=np.int64) for key in keys}
        for index, lesson in enumerate(lessons):
            own = (index, slice(len(lesson)))
            inputs[own], positions[own] = lesson.inputs, lesson.positions
            for told in TargetKind:
                ids = lesson.names if told == TargetKind.NAME else lesson.targets
                if (lesson.task, told) in wanted:
                    wanted[lesson.task, told][own] = np.where(lesson.target_mask(told), ids, -1)
        places = {key: np.flatnonzero(ids >= 0) for key, ids in wanted.items()}
        told_ids = {key: (places[key], ids.reshape(-1)[places[key]]) for key, ids in wanted.items()}
        return cls(inputs=inputs, positions=positions, targets=told_ids)

    def without_targets(self) -> MicroBatch:
        """The same rows, of which nothing is told."""
        nothing = np.empty(0, dtype=np.int64)
        return MicroBatch(
            inputs=self.inputs, positions=self.positions, targets=dict.fromkeys(self.targets, (nothing, nothing))
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainingBatch:
    """What a process does in a step."""

    step: int
    rows: Rows  # as the store has them
    samples: np.ndarray  # (B, 3) int64: number of the sample in the run, of its store, and of its row there
    keys: Sequence[LossKey]
    thread_shards: Sequence[Sequence[MicroBatch]]  # for threads that work at once; most often there is one
    target_counts: np.ndarray  # (keys,) int64: places where each is told
    rows_by_task: np.ndarray  # (tasks,) int64: rows of each task
    num_tokens: int  # places that are read, without padding

    @classmethod
    def of(cls, step: int, rows: Rows, samples: np.ndarray, keys: Sequence[LossKey]) -> TrainingBatch:
        """``rows`` before they are arranged."""
        nothing = np.zeros(0, dtype=np.int64)
        return cls(
            step=step,
            rows=rows,
            samples=samples,
            thread_shards=(),
            keys=keys,
            target_counts=nothing,
            rows_by_task=nothing,
            num_tokens=0,
        )

    def as_padding(self) -> TrainingBatch:
        """The same to compute, of which nothing counts: for a process that has no rows where others have some."""
        return replace(
            self,
            thread_shards=[[part.without_targets() for part in share] for share in self.thread_shards],
            target_counts=np.zeros_like(self.target_counts),
            rows_by_task=np.zeros_like(self.rows_by_task),
            num_tokens=0,
        )


class ExampleBuilder:
    """Arranges the rows of a store for training the model of ``config``. It can be sent to another process."""

    def __init__(self, config: ModelConfig, settings: TransformerTraining) -> None:
        self.settings = settings
        self.vocabulary = config.vocabulary
        self.grid = config.grid
        self.layouts = config.layouts
        self.windows = upscale_windows(config.grid)
        self.keys: tuple[LossKey, ...] = tuple((task, told) for task in settings.tasks for told in TargetKind)

    def build_batch(
        self,
        step: int,
        rows: Rows,
        plan: RowPlan,
        *,
        num_shards: int = 1,
        micro_batch_size: int = 0,
        samples: np.ndarray | None = None,
    ) -> TrainingBatch:
        """``rows``, arranged as ``choices`` say, in ``shares`` of parts of at most ``micro_batch_size`` rows (0: all).

        How the rows are divided does not matter for what is learnt. ``samples`` say where they come from.
        """
        lessons = self.build(rows, plan)
        if samples is None:
            samples = np.full((len(lessons), 3), -1)
        return self.split_into_micro_batches(
            TrainingBatch.of(step, rows, samples, self.keys), lessons, num_shards, micro_batch_size
        )

    def split_into_micro_batches(
        self, batch: TrainingBatch, examples: Sequence[TrainingExample], num_shards: int = 1, micro_batch_size: int = 0
    ) -> TrainingBatch:
        """``batch`` with ``lessons`` to compute."""
        order = sorted(examples, key=len)
        dealt = [order[first::num_shards] for first in range(min(num_shards, len(order)))]
        return replace(
            batch,
            thread_shards=[
                [
                    MicroBatch.of(part, self.keys, self.vocabulary.pad)
                    for part in _micro_batches(own, micro_batch_size or len(own))
                ]
                for own in dealt
            ],
            target_counts=np.array(
                [sum(int(one.target_mask(told).sum()) for one in order if one.task == task) for task, told in self.keys]
            ),
            rows_by_task=np.array([sum(one.task == task for one in order) for task in self.settings.tasks]),
            num_tokens=sum(map(len, order)),
        )

    def validation_batch(
        self, store: TokenStore, task: str, numbers: np.ndarray, *, hidden: bool = False
    ) -> TrainingBatch:
        """Rows ``numbers`` of ``store``, all for ``task`` and with their captions.

        With ``hidden`` every code of the image that is drawn is told without having seen another.
        """
        rows = store.read(numbers)
        codes = rows["image"].shape
        choices = RowPlan(
            tasks=[task] * len(numbers),
            keep_caption=np.ones(len(numbers), dtype=bool),
            mask_codes=np.full(codes, hidden),
            num_targets=np.full(len(numbers), codes[1]),
            target_priority=np.ones(codes),
            window=numbers % len(self.windows),
        )
        return self.build_batch(0, rows, choices, micro_batch_size=self.settings.micro_batch_size)

    def plan_rows(self, step: int, num_rows: int, num_codes: int) -> RowPlan:
        """What a step does with each of its rows, as the settings have it."""
        settings = self.settings
        random = np.random.default_rng([settings.seed, step])
        shares = np.array(list(settings.tasks.values()))
        tasks = random.choice(list(settings.tasks), size=num_rows, p=shares / shares.sum()).tolist()
        described = np.array([task == "caption" for task in tasks])
        keep = (random.random(num_rows) >= settings.caption_dropout) | described
        lot = np.where(keep & ~described, random.random(num_rows), 1.0)
        hidden = lot < settings.full_mask_rate
        masked = ~hidden & (lot < settings.full_mask_rate + settings.partial_mask_rate)
        share = np.where(hidden, 1.0, random.random(num_rows) * masked)
        return RowPlan(
            tasks=tasks,
            keep_caption=keep,
            mask_codes=random.random((num_rows, num_codes)) < share[:, None],
            num_targets=np.where(hidden & (settings.full_mask_targets > 0), settings.full_mask_targets, num_codes),
            target_priority=random.exponential(size=(num_rows, num_codes)),
            window=random.integers(len(self.windows), size=num_rows),
        )

    def build(self, rows: Rows, plan: RowPlan) -> list[TrainingExample]:
        """Rows of the store as sequences, each for its task; a caption that is not kept is empty."""
        lessons = []
        for index, task in enumerate(plan.tasks):
            own = {name: values[index] for name, values in rows.items()}
            text = own["text"][own["text"] != NO_TOKEN] if plan.keep_caption[index] else own["text"][:0]
            row = self.layout_row(task, text, own, int(plan.window[index]))
            image, names = row.spans["image"], np.full(len(row), -1)
            seen, read = row.ids.copy(), np.ones(len(row), dtype=bool)
            if task != "caption":
                seen[image][plan.mask_codes[index]] = self.vocabulary.command("[MASK]")
                # A code is told at the place before it, the first one behind the image's command, which all rows have.
                read[image] = np.append(
                    _select_targets(row.ids[image], plan.target_priority[index], plan.num_targets[index])[1:], False
                )
            names_known = task in ("generate", "caption") and plan.keep_caption[index] and "named" in own
            if names_known and self.settings.name_loss_weight:
                named = own["named"].astype(np.int64)
                # A drawing tells the name before its code is there, a description once it has seen the code.
                late = int(task == "caption")
                names[image.start + late : image.stop + late] = np.where(
                    named == NO_TOKEN, -1, self.vocabulary.text.start + named
                )
            lessons.append(TrainingExample.of(task, row, seen, read, names))
        return lessons

    def layout_row(self, task: str, text: np.ndarray, row: Rows, window: int) -> TokenSequence:
        """One row of the store arranged for ``task``."""
        table = self.layouts
        if task in ("generate", "caption"):
            return table[task].arrange(self.vocabulary, text=text, image=row["image"])
        if task == "low_level":
            return table[task].arrange(self.vocabulary, text=text, small=row["small"], image=row["image"])
        grid, place = self.grid, self.windows[window]
        top, left = (part.start for part in place.target)
        large = row["large"].reshape(2 * grid, 2 * grid)[top : top + grid, left : left + grid]
        small = row["image"].reshape(grid, grid)[place.source]
        return table[task].arrange(self.vocabulary, text=text, small=small, image=large)


def _select_targets(codes: np.ndarray, lots: np.ndarray, count: int) -> np.ndarray:
    """Which ``count`` of ``codes`` (N,) are asked for: (N,) bool.

    Every code that is there is as likely to be the first as any other, however many places it fills: a plain
    background, soon learnt, is not asked at half of the places.
    """
    if count >= len(codes):
        return np.ones(len(codes), dtype=bool)
    _, which, places = np.unique(codes, return_inverse=True, return_counts=True)
    asked = np.zeros(len(codes), dtype=bool)
    asked[np.argsort(lots * places[which], kind="stable")[:count]] = True
    return asked


def _micro_batches(lessons: Sequence[TrainingExample], most: int) -> Iterator[Sequence[TrainingExample]]:
    """Runs of at most ``most`` lessons, given by length, of which none is much longer than another of its run."""
    first = 0
    for end in range(1, len(lessons) + 1):
        if end == len(lessons) or end - first == most or len(lessons[end]) > MAX_LENGTH_RATIO * len(lessons[first]):
            yield lessons[first:end]
            first = end


class StepDataset(Dataset[TrainingBatch]):
    """Item s is what this process of ``world`` does in step s: a function of (seed, phases of the stores, s).

    ``shares`` are for threads that work at once, ``micro_batch_size`` is the most rows of a part (0: all).
    """

    def __init__(
        self,
        store: MixedStore,
        mixture: Mixture,
        builder: ExampleBuilder,
        world: DistributedContext,
        *,
        num_shards: int = 1,
        micro_batch_size: int = 0,
    ) -> None:
        self.store = store
        self.mixture = mixture
        self.builder = builder
        self.world = world
        self.num_shards = num_shards
        self.micro_batch_size = micro_batch_size

    def __getitem__(self, step: int) -> TrainingBatch:
        size = self.builder.settings.batch_size
        own = self.world.local_slice(size)
        samples = np.arange(step * size, (step + 1) * size)[own]
        stores, numbers = self.mixture.locate(samples)
        rows = self.store.read(stores, numbers)
        # What chance decides is drawn for all rows of the step, so that it is the same for any number of processes.
        choices = self.builder.plan_rows(step, size, rows["image"].shape[1]).select(own)
        return self.builder.build_batch(
            step,
            rows,
            choices,
            num_shards=self.num_shards,
            micro_batch_size=self.micro_batch_size,
            samples=np.stack([samples, stores, numbers], axis=1),
        )

    def from_step(self, step: int) -> Iterator[TrainingBatch]:
        """The batches of ``step`` and all after it, made ahead of time where ``workers`` do it."""
        workers = self.builder.settings.num_workers
        return iter(
            DataLoader[TrainingBatch](
                self,
                sampler=cast(Any, range(step, self.builder.settings.steps)),
                batch_size=None,
                collate_fn=cast(Any, _identity),
                num_workers=workers,
                prefetch_factor=4 if workers else None,
                # Forked from this process they would keep all of its memory, as it was then, and its connections.
                multiprocessing_context=START_METHOD if workers else None,
                worker_init_fn=worker_init,
            )
        )


def _identity(batch: TrainingBatch) -> TrainingBatch:
    return batch
