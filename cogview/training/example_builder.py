"""From rows of a store to training batches: layouts, masks, targets, and the split into micro-batches.

A step sorts its examples by length and splits them into micro-batches, each padded to its longest example. Where the
layers pack rows, padding costs nothing, and a micro-batch has rows of any lengths; elsewhere its rows have similar
lengths. Everything is a function of the seed and the step, so that any process can prepare its part ahead of time.
"""

# B rows, N codes of an image
from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from cogview.data.fill_masks import sample_fill_masks
from cogview.data.row_layout import arrange_row, text_of_row
from cogview.data.store import NO_TOKEN, TokenStore
from cogview.modeling.config import ModelConfig
from cogview.modeling.pivots import pivot_bias
from cogview.tokenizers.layouts import TokenSequence
from cogview.tokenizers.tasks import TASKS
from cogview.tokenizers.windows import NUM_WINDOWS
from cogview.training.examples import LossKey, MicroBatch, RowPlan, Rows, TargetKind, TrainingBatch, TrainingExample
from cogview.training.settings import TransformerTraining

MAX_LENGTH_RATIO = 1.5  # of the longest and the shortest example of a micro-batch
NAMED_TASKS = ("generate", "caption")  # tasks that also predict the names of objects


class ExampleBuilder:
    """Builds training examples and batches from rows of a store. It can be sent to another process."""

    def __init__(self, config: ModelConfig, settings: TransformerTraining, *, pack: bool = False) -> None:
        """Build examples for the model of ``config``.

        Args:
            config: The model.
            settings: Settings of training.
            pack: Whether the layers pack rows, so that a micro-batch may have rows of any lengths.
        """
        self.settings = settings
        self.pack = pack
        self.vocabulary = config.vocabulary
        self.grid = config.grid
        self.layouts = config.layouts
        self.attention = config.transformer.attention
        self.tasks = dict(TASKS)  # a worker process does not know the tasks that were registered in this one
        self.keys: tuple[LossKey, ...] = tuple((task, kind) for task in settings.tasks for kind in TargetKind)

    def build_batch(
        self, step: int, rows: Rows, plan: RowPlan, *, num_shards: int = 1, samples: np.ndarray | None = None
    ) -> TrainingBatch:
        """Build the batch of a step.

        Args:
            step: Index of the step.
            rows: Rows of the store.
            plan: Random decisions about them.
            num_shards: Number of threads that share the batch; the split does not change the result.
            samples: Where the rows come from; see ``TrainingBatch``.

        Returns:
            The batch, split into shards and micro-batches.
        """
        examples = self.build(rows, plan)
        if samples is None:
            samples = np.full((len(examples), 3), -1)
        return self.split_into_micro_batches(TrainingBatch.of(step, rows, samples, self.keys), examples, num_shards)

    def split_into_micro_batches(
        self, batch: TrainingBatch, examples: Sequence[TrainingExample], num_shards: int = 1
    ) -> TrainingBatch:
        """Return ``batch`` with ``examples`` split into shards and micro-batches.

        Args:
            batch: The batch.
            examples: Its examples.
            num_shards: Number of threads that compute at once.
        """
        order, limit = sorted(examples, key=len), self.settings.micro_batch_size
        shards = [order[first::num_shards] for first in range(min(num_shards, len(order)))]
        return replace(
            batch,
            thread_shards=[
                [
                    MicroBatch.of(part, self.keys, self.vocabulary.pad, pack=self.pack)
                    for part in _split(shard, limit or len(shard), math.inf if self.pack else MAX_LENGTH_RATIO)
                ]
                for shard in shards
            ],
            target_counts=np.array(
                [sum(int(one.target_mask(kind).sum()) for one in order if one.task == task) for task, kind in self.keys]
            ),
            rows_by_task=np.array([sum(one.task == task for one in order) for task in self.settings.tasks]),
            num_tokens=sum(map(len, order)),
        )

    def validation_batch(
        self, store: TokenStore, task: str, numbers: np.ndarray, *, mask_all: bool = False
    ) -> TrainingBatch:
        """Build a batch of validation rows, all of one task and with their captions.

        Args:
            store: The store.
            task: The task.
            numbers: Numbers of the rows.
            mask_all: Mask every input code of the generated image.

        Returns:
            The batch.
        """
        rows = store.read(numbers)
        codes = rows["image"].shape
        unknown = np.zeros(codes, dtype=bool)
        if self.tasks[task].fills:  # a function of the number of a row
            unknown[:] = [
                sample_fill_masks(self.settings.fill_masks, 1, self.grid, np.random.default_rng(int(number)))[0]
                for number in numbers
            ]
        plan = RowPlan(
            tasks=[task] * len(numbers),
            keep_caption=np.ones(len(numbers), dtype=bool),
            mask_codes=np.full(codes, mask_all),
            num_targets=np.full(len(numbers), codes[1]),
            target_priority=np.ones(codes),
            window=numbers % NUM_WINDOWS,
            unknown_source=unknown,
            pivot_keys=np.full(len(numbers), -1),
        )
        return self.build_batch(0, rows, plan)

    def plan_rows(self, step: int, num_rows: int, num_codes: int) -> RowPlan:
        """Draw the random decisions of a step: a function of the seed and the step.

        Args:
            step: Index of the step.
            num_rows: Rows of the step, over all processes.
            num_codes: Codes of an image.

        Returns:
            The decisions for each row.
        """
        settings = self.settings
        random = np.random.default_rng([settings.seed, step])
        shares = np.array(list(settings.tasks.values()))
        tasks = random.choice(list(settings.tasks), size=num_rows, p=shares / shares.sum()).tolist()
        writes_text = np.array([self.tasks[task].output == "text" for task in tasks])
        keep = (random.random(num_rows) >= settings.caption_dropout) | writes_text
        draw = np.where(keep & ~writes_text, random.random(num_rows), 1.0)
        full = draw < settings.full_mask_rate
        partial = ~full & (draw < settings.full_mask_rate + settings.partial_mask_rate)
        mask_rate = np.where(full, 1.0, random.random(num_rows) * partial)
        plan = RowPlan(
            tasks=tasks,
            keep_caption=keep,
            mask_codes=random.random((num_rows, num_codes)) < mask_rate[:, None],
            num_targets=np.where(full & (settings.full_mask_targets > 0), settings.full_mask_targets, num_codes),
            target_priority=random.exponential(size=(num_rows, num_codes)),
            window=random.integers(NUM_WINDOWS, size=num_rows),
            unknown_source=np.zeros((num_rows, num_codes), dtype=bool),
            pivot_keys=random.integers(2**63, size=num_rows),
        )
        self._plan_sources(plan, random)
        return plan

    def _plan_sources(self, plan: RowPlan, random: np.random.Generator) -> None:
        """Sample the unknown codes of the given images, after all other decisions, which they leave as they are.

        Args:
            plan: The plan, changed in place. An edit without its source has no text either, since guidance never asks
                for a text alone, and nothing else of it is masked.
            random: Generator of the step.
        """
        num_rows, num_codes = plan.unknown_source.shape
        fills = np.array([self.tasks[task].fills for task in plan.tasks])
        if fills.any():
            plan.unknown_source[fills] = sample_fill_masks(
                self.settings.fill_masks, int(fills.sum()), self.grid, random
            )
        edits = np.array([self.tasks[task].masked_image is not None for task in plan.tasks]) & ~fills
        if edits.any() and self.settings.source_dropout:
            dropped = edits & (random.random(num_rows) < self.settings.source_dropout)
            plan.unknown_source[dropped] = True
            plan.keep_caption[dropped] = False
            plan.mask_codes[dropped] = False
            plan.num_targets[dropped] = num_codes

    def build(self, rows: Rows, plan: RowPlan) -> list[TrainingExample]:
        """Build an example of each row; a caption that is not kept becomes empty.

        Args:
            rows: Rows of the store.
            plan: Random decisions about them.

        Returns:
            The examples, in the order of the rows.
        """
        mask = self.vocabulary.command("[MASK]")
        examples = []
        for index, task in enumerate(plan.tasks):
            row = {name: values[index] for name, values in rows.items()}
            text = text_of_row(self.tasks[task], row)[: None if plan.keep_caption[index] else 0]
            sequence = self.layout_row(task, text, row, int(plan.window[index]), plan.unknown_source[index])
            image, names = sequence.spans["image"], np.full(len(sequence), -1)
            seen, read = sequence.ids.copy(), np.ones(len(sequence), dtype=bool)
            if self.tasks[task].output == "image":
                seen[image][plan.mask_codes[index]] = mask
                # A code is predicted one position earlier. That of the first code is the image's command, which every
                # row keeps, so the selection is shifted by one.
                priority = plan.target_priority[index]
                if self.tasks[task].fills:  # known codes are no targets
                    priority = np.where(plan.unknown_source[index], priority, np.inf)
                selected = _select_targets(sequence.ids[image], priority, int(plan.num_targets[index]))
                read[image] = np.append(selected[1:], False)
            names_known = task in NAMED_TASKS and plan.keep_caption[index] and "named" in row
            if names_known and self.settings.name_loss_weight:
                named = row["named"].astype(np.int64)
                # Generation predicts a name before it sees the code, captioning after it has seen the code.
                shift = int(self.tasks[task].output == "text")
                names[image.start + shift : image.stop + shift] = np.where(
                    named == NO_TOKEN, -1, self.vocabulary.text.start + named
                )
            pivots = self._pivot_bias(sequence, int(plan.pivot_keys[index]))
            examples.append(TrainingExample.of(task, sequence, seen, read, names, pivots))
        return examples

    def _pivot_bias(self, sequence: TokenSequence, key: int) -> np.ndarray | None:
        """Return the bias of each position as a pivot (T,), or None for dense attention."""
        if self.attention.is_dense:
            return None
        random = None if key < 0 else np.random.default_rng(key)
        return pivot_bias(sequence.image_sizes, self.attention.pivots, random)

    def layout_row(
        self, task: str, text: np.ndarray, row: Rows, window: int, unknown: np.ndarray | None = None
    ) -> TokenSequence:
        """Arrange one row of the store in the layout of a task.

        Args:
            task: The task.
            text: Text tokens without padding.
            row: The other fields of the row.
            window: Index of the window, for windowed tasks.
            unknown: Unknown codes of the given image (G * G,), bool; see ``arrange_row``.

        Returns:
            The sequence.
        """
        return arrange_row(self.tasks[task], self.layouts[task], self.vocabulary, text, row, window, unknown)


def _select_targets(codes: np.ndarray, priority: np.ndarray, count: int) -> np.ndarray:
    """Select ``count`` of the codes (N,) to predict: (N,) bool.

    Each distinct code is equally likely to be selected first, however often it occurs. A plain background, which is
    learned soon, therefore does not take half of the targets. For codes 8 8 8 3, the selection of one target is the 3
    with probability 1/2.
    """
    if count >= len(codes):
        return np.ones(len(codes), dtype=bool)
    _, distinct, occurrences = np.unique(codes, return_inverse=True, return_counts=True)
    selected = np.zeros(len(codes), dtype=bool)
    selected[np.argsort(priority * occurrences[distinct], kind="stable")[:count]] = True
    return selected


def _split(examples: Sequence[TrainingExample], limit: int, ratio: float) -> Iterator[Sequence[TrainingExample]]:
    """Yield runs of at most ``limit`` examples, sorted by length, whose lengths differ by at most ``ratio``."""
    first = 0
    for end in range(1, len(examples) + 1):
        if end == len(examples) or end - first == limit or len(examples[end]) > ratio * len(examples[first]):
            yield examples[first:end]
            first = end
