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

from cogview.data.store import ABSENT, TokenStore
from cogview.signals import worker_init
from cogview.tokenizers.layouts import Arranged, upscale_windows
from cogview.tokenizers.vocabulary import Kind
from cogview.training.distributed import World
from cogview.training.settings import TransformerTraining

if TYPE_CHECKING:
    from cogview.checkpoints.checkpoint import ModelConfig
    from cogview.data.mixture import MixedStore, Mixture

# Of a store, uint16: "text" (B, W) and "image" (B, G * G), and for upscaling "large" (B, 4 * G * G) or "small"
# (B, G * G / 4), codes of the same scene at twice or half the side. "named" (B, G * G) is the piece of the text that
# names the thing at each code, or ABSENT.
Rows = Mapping[str, np.ndarray]

START_METHOD = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"  # of workers
SPREAD = 1.5  # how many times as long as the shortest row the longest may be that is computed with it


class Told(Enum):
    """What can be told at a place of a row: the next code or piece, or the piece that names the thing at that code."""

    IMAGE = "image"
    TEXT = "text"
    NAME = "name"


Key: TypeAlias = tuple[str, Told]  # a task and what is told in it


@dataclass(frozen=True, kw_only=True, eq=False)
class Choices:
    """What chance decides about the rows of a step."""

    tasks: Sequence[str]  # (B,)
    keep: np.ndarray  # (B,) bool: whose caption is kept
    hide: np.ndarray  # (B, G * G) bool: which codes of the image the input holds [MASK] for
    ask: np.ndarray  # (B,) int: how many codes are asked for; others are left out, where every code is hidden
    lots: np.ndarray  # (B, G * G) float above 0, exponential: decide which codes those are
    windows: np.ndarray  # (B,) int: which of the nine windows is drawn in upscaling

    def of(self, rows: slice) -> Choices:
        """Those of some of the rows."""
        return Choices(**{setting.name: getattr(self, setting.name)[rows] for setting in fields(self)})


@dataclass(frozen=True, kw_only=True, eq=False)
class Lesson:
    """One row of a step. Arrays are (T,), one entry per place that the model reads."""

    task: str
    inputs: np.ndarray  # int64 ids, some of them hidden
    positions: np.ndarray  # int64
    targets: np.ndarray  # int64 ids: what follows
    kinds: np.ndarray  # Kind of the targets
    learnt: np.ndarray  # bool: targets that are learnt
    names: np.ndarray  # int64 ids of the names of things told at each place, -1 where there is none to tell

    @classmethod
    def of(cls, task: str, row: Arranged, seen: np.ndarray, read: np.ndarray, names: np.ndarray) -> Lesson:
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
            learnt=row.loss[1:][keep],
            names=names[1:][keep],
        )

    def __len__(self) -> int:
        return len(self.inputs)

    def counted(self, told: Told) -> np.ndarray:
        """(T,) bool: the places where ``told`` is learnt."""
        if told == Told.NAME:
            return self.names >= 0
        return self.learnt & (self.kinds == (Kind.IMAGE if told == Told.IMAGE else Kind.TEXT))


@dataclass(frozen=True, kw_only=True, eq=False)
class Part:
    """Rows that are computed together, padded on the right, where no place looks at it."""

    inputs: np.ndarray  # (B, T) int64 ids
    positions: np.ndarray  # (B, T) int64
    told: Mapping[Key, tuple[np.ndarray, np.ndarray]]  # (M,) int64 places among the B * T, and the ids that are right

    @classmethod
    def of(cls, lessons: Sequence[Lesson], keys: Sequence[Key], pad: int) -> Part:
        """``lessons``, of which the last is the longest."""
        shape = (len(lessons), len(lessons[-1]))
        inputs, positions = np.full(shape, pad, dtype=np.int64), np.zeros(shape, dtype=np.int64)
        wanted = {key: np.full(shape, -1, dtype=np.int64) for key in keys}
        for index, lesson in enumerate(lessons):
            own = (index, slice(len(lesson)))
            inputs[own], positions[own] = lesson.inputs, lesson.positions
            for told in Told:
                ids = lesson.names if told == Told.NAME else lesson.targets
                if (lesson.task, told) in wanted:
                    wanted[lesson.task, told][own] = np.where(lesson.counted(told), ids, -1)
        places = {key: np.flatnonzero(ids >= 0) for key, ids in wanted.items()}
        told_ids = {key: (places[key], ids.reshape(-1)[places[key]]) for key, ids in wanted.items()}
        return cls(inputs=inputs, positions=positions, told=told_ids)

    def without_targets(self) -> Part:
        """The same rows, of which nothing is told."""
        nothing = np.empty(0, dtype=np.int64)
        return Part(inputs=self.inputs, positions=self.positions, told=dict.fromkeys(self.told, (nothing, nothing)))


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """What a process does in a step."""

    step: int
    rows: Rows  # as the store has them
    samples: np.ndarray  # (B, 3) int64: number of the sample in the run, of its store, and of its row there
    keys: Sequence[Key]
    shares: Sequence[Sequence[Part]]  # for threads that work at once; most often there is one
    places: np.ndarray  # (keys,) int64: places where each is told
    tasks: np.ndarray  # (tasks,) int64: rows of each task
    tokens: int  # places that are read, without padding

    @classmethod
    def of(cls, step: int, rows: Rows, samples: np.ndarray, keys: Sequence[Key]) -> Batch:
        """``rows`` before they are arranged."""
        nothing = np.zeros(0, dtype=np.int64)
        return cls(step=step, rows=rows, samples=samples, shares=(), keys=keys, places=nothing, tasks=nothing, tokens=0)

    def idle(self) -> Batch:
        """The same to compute, of which nothing counts: for a process that has no rows where others have some."""
        return replace(
            self,
            shares=[[part.without_targets() for part in share] for share in self.shares],
            places=np.zeros_like(self.places),
            tasks=np.zeros_like(self.tasks),
            tokens=0,
        )


class LessonMaker:
    """Arranges the rows of a store for training the model of ``config``. It can be sent to another process."""

    def __init__(self, config: ModelConfig, settings: TransformerTraining) -> None:
        self.settings = settings
        self.vocabulary = config.vocabulary
        self.grid = config.grid
        self.layouts = config.layouts
        self.windows = upscale_windows(config.grid)
        self.keys: tuple[Key, ...] = tuple((task, told) for task in settings.tasks for told in Told)

    def batch(
        self,
        step: int,
        rows: Rows,
        choices: Choices,
        *,
        shares: int = 1,
        micro_batch: int = 0,
        samples: np.ndarray | None = None,
    ) -> Batch:
        """``rows``, arranged as ``choices`` say, in ``shares`` of parts of at most ``micro_batch`` rows (0: all).

        How the rows are divided does not matter for what is learnt. ``samples`` say where they come from.
        """
        lessons = self.arrange(rows, choices)
        if samples is None:
            samples = np.full((len(lessons), 3), -1)
        return self.divided(Batch.of(step, rows, samples, self.keys), lessons, shares, micro_batch)

    def divided(self, batch: Batch, lessons: Sequence[Lesson], shares: int = 1, micro_batch: int = 0) -> Batch:
        """``batch`` with ``lessons`` to compute."""
        order = sorted(lessons, key=len)
        dealt = [order[first::shares] for first in range(min(shares, len(order)))]
        return replace(
            batch,
            shares=[
                [Part.of(part, self.keys, self.vocabulary.pad) for part in _parts(own, micro_batch or len(own))]
                for own in dealt
            ],
            places=np.array(
                [sum(int(one.counted(told).sum()) for one in order if one.task == task) for task, told in self.keys]
            ),
            tasks=np.array([sum(one.task == task for one in order) for task in self.settings.tasks]),
            tokens=sum(map(len, order)),
        )

    def held_out(self, store: TokenStore, task: str, numbers: np.ndarray, *, hidden: bool = False) -> Batch:
        """Rows ``numbers`` of ``store``, all for ``task`` and with their captions.

        With ``hidden`` every code of the image that is drawn is told without having seen another.
        """
        rows = store.read(numbers)
        codes = rows["image"].shape
        choices = Choices(
            tasks=[task] * len(numbers),
            keep=np.ones(len(numbers), dtype=bool),
            hide=np.full(codes, hidden),
            ask=np.full(len(numbers), codes[1]),
            lots=np.ones(codes),
            windows=numbers % len(self.windows),
        )
        return self.batch(0, rows, choices, micro_batch=self.settings.micro_batch)

    def choices(self, step: int, num_rows: int, num_codes: int) -> Choices:
        """What a step does with each of its rows, as the settings have it."""
        settings = self.settings
        random = np.random.default_rng([settings.seed, step])
        shares = np.array(list(settings.tasks.values()))
        tasks = random.choice(list(settings.tasks), size=num_rows, p=shares / shares.sum()).tolist()
        described = np.array([task == "caption" for task in tasks])
        keep = (random.random(num_rows) >= settings.caption_drop) | described
        lot = np.where(keep & ~described, random.random(num_rows), 1.0)
        hidden = lot < settings.hidden_rows
        masked = ~hidden & (lot < settings.hidden_rows + settings.masked_rows)
        share = np.where(hidden, 1.0, random.random(num_rows) * masked)
        return Choices(
            tasks=tasks,
            keep=keep,
            hide=random.random((num_rows, num_codes)) < share[:, None],
            ask=np.where(hidden & (settings.hidden_places > 0), settings.hidden_places, num_codes),
            lots=random.exponential(size=(num_rows, num_codes)),
            windows=random.integers(len(self.windows), size=num_rows),
        )

    def arrange(self, rows: Rows, choices: Choices) -> list[Lesson]:
        """Rows of the store as sequences, each for its task; a caption that is not kept is empty."""
        lessons = []
        for index, task in enumerate(choices.tasks):
            own = {name: values[index] for name, values in rows.items()}
            text = own["text"][own["text"] != ABSENT] if choices.keep[index] else own["text"][:0]
            row = self.layout_row(task, text, own, int(choices.windows[index]))
            image, names = row.spans["image"], np.full(len(row), -1)
            seen, read = row.ids.copy(), np.ones(len(row), dtype=bool)
            if task != "caption":
                seen[image][choices.hide[index]] = self.vocabulary.command("[MASK]")
                # A code is told at the place before it, the first one behind the image's command, which all rows have.
                read[image] = np.append(_asked(row.ids[image], choices.lots[index], choices.ask[index])[1:], False)
            names_known = task in ("generate", "caption") and choices.keep[index] and "named" in own
            if names_known and self.settings.name_loss_weight:
                named = own["named"].astype(np.int64)
                # A drawing tells the name before its code is there, a description once it has seen the code.
                late = int(task == "caption")
                names[image.start + late : image.stop + late] = np.where(
                    named == ABSENT, -1, self.vocabulary.text.start + named
                )
            lessons.append(Lesson.of(task, row, seen, read, names))
        return lessons

    def layout_row(self, task: str, text: np.ndarray, row: Rows, window: int) -> Arranged:
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


def _asked(codes: np.ndarray, lots: np.ndarray, count: int) -> np.ndarray:
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


def _parts(lessons: Sequence[Lesson], most: int) -> Iterator[Sequence[Lesson]]:
    """Runs of at most ``most`` lessons, given by length, of which none is much longer than another of its run."""
    first = 0
    for end in range(1, len(lessons) + 1):
        if end == len(lessons) or end - first == most or len(lessons[end]) > SPREAD * len(lessons[first]):
            yield lessons[first:end]
            first = end


class Lectures(Dataset[Batch]):
    """Item s is what this process of ``world`` does in step s: a function of (seed, phases of the stores, s).

    ``shares`` are for threads that work at once, ``micro_batch`` is the most rows of a part (0: all).
    """

    def __init__(
        self,
        store: MixedStore,
        mixture: Mixture,
        maker: LessonMaker,
        world: World,
        *,
        shares: int = 1,
        micro_batch: int = 0,
    ) -> None:
        self.store = store
        self.mixture = mixture
        self.maker = maker
        self.world = world
        self.shares = shares
        self.micro_batch = micro_batch

    def __getitem__(self, step: int) -> Batch:
        size = self.maker.settings.batch_size
        own = self.world.share(size)
        samples = np.arange(step * size, (step + 1) * size)[own]
        stores, numbers = self.mixture.locate(samples)
        rows = self.store.read(stores, numbers)
        # What chance decides is drawn for all rows of the step, so that it is the same for any number of processes.
        choices = self.maker.choices(step, size, rows["image"].shape[1]).of(own)
        return self.maker.batch(
            step,
            rows,
            choices,
            shares=self.shares,
            micro_batch=self.micro_batch,
            samples=np.stack([samples, stores, numbers], axis=1),
        )

    def from_step(self, step: int) -> Iterator[Batch]:
        """The batches of ``step`` and all after it, made ahead of time where ``workers`` do it."""
        workers = self.maker.settings.workers
        return iter(
            DataLoader[Batch](
                self,
                sampler=cast(Any, range(step, self.maker.settings.steps)),
                batch_size=None,
                collate_fn=cast(Any, _as_it_is),
                num_workers=workers,
                prefetch_factor=4 if workers else None,
                # Forked from this process they would keep all of its memory, as it was then, and its connections.
                multiprocessing_context=START_METHOD if workers else None,
                worker_init_fn=worker_init,
            )
        )


def _as_it_is(batch: Batch) -> Batch:
    return batch
