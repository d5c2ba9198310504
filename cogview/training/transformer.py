"""Training the transformer on a store of token rows, for a mixture of tasks.

Each row of a batch is arranged for one task: drawing its text, describing its image, or drawing a larger image from a
smaller one. The rows of a step are put in order of their lengths and computed in parts, each padded to its longest.
"""

# B rows, T places of a row, D width, G codes on a side of an image, M places where a thing is told
from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from cogview.checkpoints.folder import Model, read_config, save_model
from cogview.data.sampler import ResumableBatchSampler
from cogview.data.store import ABSENT, TokenStore
from cogview.errors import InputError
from cogview.kernels.cross_entropy import Targets, sliced_cross_entropy
from cogview.tokenizers.layouts import Arranged, upscale_windows
from cogview.tokenizers.vocabulary import Kind
from cogview.training.run import leave_signals_to_parent

# Of a store, uint16: "text" (B, W) and "image" (B, G * G), and for upscaling "large" (B, 4 * G * G) or "small"
# (B, G * G / 4), codes of the same scene at twice or half the side. "named" (B, G * G) is the piece of the text that
# names the thing at each code, or ABSENT.
Rows = Mapping[str, np.ndarray]

EVALUATED_ROWS = 1024  # of the held-out store, for each task
SPREAD = 1.5  # how many times as long as the shortest row the longest may be that is computed with it


class Told(Enum):
    """What can be told at a place of a row: the next code or piece, or the piece that names the thing at that code."""

    IMAGE = "image"
    TEXT = "text"
    NAME = "name"


# What training can be for. ``upscale`` draws one of the nine windows of the large image from the crop of the image that
# it covers, ``low_level`` the image from the small one.
TASKS = ("generate", "caption", "upscale", "low_level")


@dataclass(frozen=True, kw_only=True)
class TransformerTraining:
    """Settings of a run. A step is one update of the weights with ``batch_size`` rows."""

    steps: int
    batch_size: int = 32
    accumulation: int = 1  # parts that a batch is computed in, one after the other, or more where lengths differ much
    learning_rate: float = 1e-3
    final_learning_rate: float = 1e-5
    warmup_steps: int = 200
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.04
    clip_norm: float = 1.0
    tasks: dict[str, float] = field(default_factory=lambda: {"generate": 1.0})  # and their shares of the rows
    text_loss_weight: float = 0.1  # of the texts that pictures are drawn from; captions count in full
    # Where a text names two things, which of them a place shows is learnt late from codes, which ask for it and for the
    # look of the thing at once. A store that says which name stands where (``named``) lets a drawing tell the name too,
    # and a description while it still reads the codes.
    name_loss_weight: float = 0.0
    caption_drop: float = 0.1  # share of captions left out, so that guidance is possible later
    # Once the first codes of a thing are known the others follow from them, so the text, and in upscaling the small
    # picture, is asked at one or two places alone, and learnt slowly. Two remedies, for rows that draw a picture: a
    # share that sees [MASK] in place of every code, and one that sees it at a share of the places drawn per row. Where
    # every code is hidden each is told from text and place alone, so ``hidden_places`` of them, drawn per row, do for
    # a cheaper row (0: all).
    hidden_rows: float = 0.0
    hidden_places: int = 0
    masked_rows: float = 0.0
    seed: int = 0
    workers: int = 0  # processes that read the store

    def __post_init__(self) -> None:
        if not 0 < self.warmup_steps < self.steps:
            raise ValueError(f"warmup_steps must be from 1 to steps - 1 ({self.steps - 1}), got {self.warmup_steps}")
        if self.batch_size < 1 or self.accumulation < 1 or self.batch_size % self.accumulation:
            raise ValueError(f"batch_size {self.batch_size} does not divide into {self.accumulation} equal parts")
        for name in ("caption_drop", "hidden_rows", "masked_rows"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")
        if self.hidden_rows + self.masked_rows > 1:
            raise ValueError(
                f"hidden_rows {self.hidden_rows} and masked_rows {self.masked_rows} are shares of all rows: their sum "
                "must not be above 1"
            )
        if self.hidden_places < 0:
            raise ValueError(f"hidden_places must be 0 (all) or more, got {self.hidden_places}")
        for task, share in self.tasks.items():
            if task not in TASKS:
                raise ValueError(f"task {task!r} is unknown; known: {', '.join(TASKS)}")
            if not 0 < share < math.inf:
                raise ValueError(f"the share of task {task!r} must be above 0, got {share}")
        if not self.tasks:
            raise ValueError(f"there must be a task to train for; known: {', '.join(TASKS)}")
        for name in ("text_loss_weight", "name_loss_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")

    def learning_rate_at(self, step: int) -> float:
        """Linear warm-up, then a cosine down to ``final_learning_rate``."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / (self.steps - self.warmup_steps)
        swing = (self.learning_rate - self.final_learning_rate) / 2
        return self.final_learning_rate + swing * (1 + math.cos(math.pi * progress))


@dataclass(frozen=True, kw_only=True, eq=False)
class Choices:
    """What chance decides about the rows of a step."""

    tasks: Sequence[str]  # (B,)
    keep: np.ndarray  # (B,) bool: whose caption is kept
    hide: np.ndarray  # (B, G * G) bool: which codes of the image the input holds [MASK] for
    ask: np.ndarray  # (B,) int: how many codes are asked for; others are left out, where every code is hidden
    lots: np.ndarray  # (B, G * G) float above 0, exponential: decide which codes those are
    windows: np.ndarray  # (B,) int: which of the nine windows is drawn in upscaling


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


class TransformerTrainer:
    """The transformer of ``model``, its optimizer, and one step of training.

    What is random in a step is a function of (seed, step): a resumed run repeats it.

    On a CPU ``num_threads`` threads (None: as many as PyTorch would use) compute a share of a step's rows each. They
    wait for each other once a step; threads that share every product wait hundreds of times
    (``scripts/benchmarks/training_step.py threads``).
    """

    def __init__(
        self,
        model: Model,
        settings: TransformerTraining,
        device: torch.device,
        autocast: torch.dtype | None,
        held_out: TokenStore | None = None,
        draw_sheet: Callable[[Model, Path], None] | None = None,
        num_threads: int | None = None,
    ) -> None:
        self.model = model
        self.settings = settings
        self.device = device
        self.autocast = autocast
        self.held_out = held_out
        self.draw_sheet = draw_sheet
        self.vocabulary = model.config.vocabulary
        self.windows = upscale_windows(model.config.grid)
        self.transformer = model.transformer.to(device)
        self._parameters = list(self.transformer.parameters())
        if num_threads is None:
            # Dropout draws from one generator, so its threads must come in one order.
            alone = device.type != "cpu" or model.config.transformer.dropout > 0
            num_threads = 1 if alone else torch.get_num_threads()
        self.num_threads = num_threads
        self._threads = ThreadPoolExecutor(
            num_threads, initializer=partial(torch.set_num_threads, 1) if num_threads > 1 else None
        )
        matrices = [parameter for parameter in self._parameters if parameter.dim() > 1]
        vectors = [parameter for parameter in self._parameters if parameter.dim() == 1]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": settings.weight_decay},
                {"params": vectors, "weight_decay": 0.0},
            ],
            lr=settings.learning_rate,
            betas=settings.betas,
            fused=True,
        )

    def step(self, step: int, batch: Rows) -> dict[str, float]:
        """One update; returns the losses in nats per code and per piece, for each task apart."""
        torch.manual_seed(self.settings.seed * 1_000_003 + step)
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.learning_rate_at(step)
        self.transformer.train()
        lessons = self.arrange(batch, self.choices(step, *batch["image"].shape))
        figures = self.losses(lessons, learn=True)
        norm = torch.nn.utils.clip_grad_norm_(self.transformer.parameters(), self.settings.clip_norm)
        if not torch.isfinite(norm):
            raise InputError(f"the gradient of step {step} is not finite; lower the learning rate, or resume earlier")
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return {**figures, "gradient_norm": norm.item(), "learning_rate": self.settings.learning_rate_at(step)}

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
        table = self.model.config.layouts
        if task in ("generate", "caption"):
            return table[task].arrange(self.vocabulary, text=text, image=row["image"])
        if task == "low_level":
            return table[task].arrange(self.vocabulary, text=text, small=row["small"], image=row["image"])
        grid, place = self.model.config.grid, self.windows[window]
        top, left = (part.start for part in place.target)
        large = row["large"].reshape(2 * grid, 2 * grid)[top : top + grid, left : left + grid]
        small = row["image"].reshape(grid, grid)[place.source]
        return table[task].arrange(self.vocabulary, text=text, small=small, image=large)

    def losses(self, lessons: Sequence[Lesson], *, learn: bool = False) -> dict[str, float]:
        """Mean cross-entropy of each task's image codes, text pieces and names, and ``loss``, the sum that is learnt.

        Each kind of id competes with its own kind alone. A task counts in ``loss`` as its share of the rows has it.
        With ``learn`` gradients are added up. How the rows are divided into parts does not matter.
        """
        counts: Counter[tuple[str, Told]] = Counter()
        for lesson in lessons:
            for told in Told:
                counts[lesson.task, told] += int(lesson.counted(told).sum())
        rows_of = Counter(lesson.task for lesson in lessons)
        means = {key: 0.0 for key, count in counts.items() if count}
        worth = {key: rows_of[key[0]] / rows_of.total() * self._weight(*key) for key in means}
        weights = {key: worth[key] / counts[key] for key in means}  # of one place
        order = sorted(lessons, key=len)
        shares = [order[first :: self.num_threads] for first in range(min(self.num_threads, len(order)))]
        share_losses = partial(self._share_losses, weights=weights, learn=learn)
        for sums, gradients in list(self._threads.map(share_losses, shares)):
            for key, value in sums.items():
                means[key] += value / counts[key]
            # Without ``learn`` there are no gradients.
            for parameter, gradient in zip(self._parameters, gradients, strict=False):
                parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
        loss = sum((worth[key] * mean for key, mean in means.items()), 0.0)
        return {"loss": loss, **{_figure(*key): mean for key, mean in means.items()}}

    def _share_losses(
        self, lessons: Sequence[Lesson], *, weights: Mapping[tuple[str, Told], float], learn: bool
    ) -> tuple[Mapping[tuple[str, Told], float], list[Tensor]]:
        """The sums of the losses of ``lessons``, given by length, and with ``learn`` the gradients of the weighted sum.

        ``weights`` are those of one place, for all that the tasks of a step tell.
        """
        sums: defaultdict[tuple[str, Told], float] = defaultdict(float)
        gradients: list[Tensor] = []
        with torch.set_grad_enabled(learn):
            for part in _parts(lessons, math.ceil(len(lessons) / self.settings.accumulation)):
                total, losses = self._part_losses(part, weights)
                for key, losses_M in zip(weights, losses, strict=True):
                    sums[key] += losses_M.sum().item()
                if learn:
                    own_gradients = torch.autograd.grad(total, self._parameters, materialize_grads=True)
                    gradients = (
                        [first + second for first, second in zip(gradients, own_gradients, strict=True)]
                        if gradients
                        else [gradient.contiguous() for gradient in own_gradients]
                    )
        return sums, gradients

    def _part_losses(
        self, lessons: Sequence[Lesson], weights: Mapping[tuple[str, Told], float]
    ) -> tuple[Tensor, list[Tensor]]:
        """The weighted sum of all losses, and for each of ``weights`` the losses (M,) of the places, if any."""
        shape = (len(lessons), len(lessons[-1]))
        inputs, positions = np.full(shape, self.vocabulary.pad), np.zeros(shape, dtype=np.int64)
        wanted = {key: np.full(shape, -1) for key in weights}
        for index, lesson in enumerate(lessons):  # padded on the right, where no place looks at it
            own = (index, slice(len(lesson)))
            inputs[own], positions[own] = lesson.inputs, lesson.positions
            for told in Told:
                if (lesson.task, told) in wanted:
                    ids = lesson.names if told == Told.NAME else lesson.targets
                    wanted[lesson.task, told][own] = np.where(lesson.counted(told), ids, -1)
        targets = []
        for (task, told), ids in wanted.items():
            places = np.flatnonzero(ids >= 0)
            targets.append(
                Targets(
                    ids=self._rivals(told),
                    places_M=torch.from_numpy(places).to(self.device),
                    targets_M=torch.from_numpy(ids.reshape(-1)[places]).to(self.device),
                    weights_M=torch.full(places.shape, weights[task, told], dtype=torch.float32, device=self.device),
                )
            )
        with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
            hidden_BTD = self.transformer.hidden(
                *(torch.from_numpy(array).to(self.device) for array in (inputs, positions))
            )
            return sliced_cross_entropy(hidden_BTD.flatten(0, 1), self.transformer.embedding.weight, targets)

    def _rivals(self, told: Told) -> range:
        """The ids that compete where ``told`` is learnt."""
        if told == Told.IMAGE:
            return self.vocabulary.image
        # A text may end in a command, so commands compete with the pieces.
        return self.vocabulary.text if told == Told.NAME else range(self.vocabulary.text.start, self.vocabulary.size)

    def _weight(self, task: str, told: Told) -> float:
        if told == Told.NAME:
            return self.settings.name_loss_weight
        return self.settings.text_loss_weight if (task, told) == ("generate", Told.TEXT) else 1.0

    def save(self, folder: Path) -> None:
        """A checkpoint folder that opens by itself, with ``trainer.pt`` (the optimizer) beside it."""
        save_model(folder, self.model)
        torch.save(self.optimizer.state_dict(), folder / "trainer.pt")

    def load(self, folder: Path) -> None:
        """Take up weights and optimizer from ``save``; InputError where they belong to other codes."""
        from safetensors.torch import load_file

        if read_config(folder).codebook_sha256 != self.model.config.codebook_sha256:
            raise InputError("it was trained on the codes of another image tokenizer")

        self.transformer.load_state_dict(load_file(folder / "model.safetensors"))
        self.optimizer.load_state_dict(torch.load(folder / "trainer.pt", map_location="cpu", weights_only=True))

    @torch.no_grad()
    def evaluate(self, step: int, folder: Path) -> dict[str, float]:
        """Losses on the held-out store, and a sheet of pictures."""
        self.transformer.eval()
        figures: dict[str, float] = {}
        if self.held_out is not None:
            for task in self.settings.tasks:
                losses = self.store_losses(self.held_out, task, EVALUATED_ROWS)
                figures |= {f"held_out_{name}": value for name, value in losses.items()}
        if self.draw_sheet is not None:
            self.draw_sheet(self.model, folder / f"step-{step:08d}.png")
        return figures

    def store_losses(self, store: TokenStore, task: str, count: int, *, hidden: bool = False) -> dict[str, float]:
        """Mean losses of the first ``count`` rows of ``store``, all for ``task`` and with their captions.

        With ``hidden`` every code of the image that is drawn is told without having seen another.
        """
        count = min(len(store), count)
        sums: dict[str, float] = {}
        for start in range(0, count, self.settings.batch_size):
            numbers = np.arange(start, min(start + self.settings.batch_size, count))
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
            for name, loss in self.losses(self.arrange(rows, choices)).items():
                sums[name] = sums.get(name, 0.0) + loss * len(numbers) / count
        return {name: loss for name, loss in sums.items() if name != "loss"}


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


def _figure(task: str, told: Told) -> str:
    """The name of a loss in the metrics, such as ``generate_image_loss``."""
    return f"{task}_{told.value}_loss"


def _parts(lessons: Sequence[Lesson], most: int) -> Iterator[Sequence[Lesson]]:
    """Runs of at most ``most`` lessons, given by length, of which none is much longer than another of its run."""
    first = 0
    for end in range(1, len(lessons) + 1):
        if end == len(lessons) or end - first == most or len(lessons[end]) > SPREAD * len(lessons[first]):
            yield lessons[first:end]
            first = end


def store_batches(store: TokenStore, settings: TransformerTraining, start_step: int) -> Iterator[Rows]:
    """The rows of steps ``start_step``, ``start_step`` + 1, …, in an order that is a function of (seed, step)."""
    sampler = ResumableBatchSampler(
        len(store), settings.batch_size, settings.seed, start_step=start_step, steps=settings.steps
    )
    # The store reads a whole batch at once, and there is nothing left to collate.
    return iter(
        DataLoader[Rows](
            cast(Any, store),
            batch_sampler=sampler,
            collate_fn=dict,
            num_workers=settings.workers,
            worker_init_fn=leave_signals_to_parent,
        )
    )
