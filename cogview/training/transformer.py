"""Training the transformer on a store of token rows."""

# B rows, T places of a row, D width, N places that carry loss
from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

from cogview.checkpoints.folder import Model, read_config, save_model
from cogview.data.sampler import ResumableBatchSampler
from cogview.data.store import ABSENT, TokenStore
from cogview.errors import InputError
from cogview.tokenizers.layouts import Batch, pad_right
from cogview.tokenizers.vocabulary import Kind
from cogview.training.run import leave_signals_to_parent

Rows = Mapping[str, np.ndarray]  # of a store: "text" (B, W) and "image" (B, G * G), uint16


@dataclass(frozen=True, kw_only=True)
class TransformerTraining:
    """Settings of a run. A step is one update of the weights with ``batch_size`` rows."""

    steps: int
    batch_size: int = 32
    accumulation: int = 1  # parts that a batch is computed in, one after the other
    learning_rate: float = 1e-3
    final_learning_rate: float = 1e-5
    warmup_steps: int = 200
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.04
    clip_norm: float = 1.0
    text_loss_weight: float = 0.1
    caption_drop: float = 0.1  # share of captions left out, so that guidance is possible later
    # Share of rows that see [MASK] in place of codes: half of them at every place, half at a share of places drawn per
    # row. Once the first codes of a thing are known the others follow from them, so without this the text is asked
    # at one or two places of a picture alone, and learnt slowly.
    hidden_rows: float = 0.0
    seed: int = 0
    workers: int = 0  # processes that read the store

    def __post_init__(self) -> None:
        if not 0 < self.warmup_steps < self.steps:
            raise ValueError(f"warmup_steps must be from 1 to steps - 1 ({self.steps - 1}), got {self.warmup_steps}")
        if self.batch_size < 1 or self.accumulation < 1 or self.batch_size % self.accumulation:
            raise ValueError(f"batch_size {self.batch_size} does not divide into {self.accumulation} equal parts")
        for name in ("caption_drop", "hidden_rows"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")
        if self.text_loss_weight < 0:
            raise ValueError(f"text_loss_weight must not be negative, got {self.text_loss_weight}")

    def learning_rate_at(self, step: int) -> float:
        """Linear warm-up, then a cosine down to ``final_learning_rate``."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / (self.steps - self.warmup_steps)
        swing = (self.learning_rate - self.final_learning_rate) / 2
        return self.final_learning_rate + swing * (1 + math.cos(math.pi * progress))


class TransformerTrainer:
    """The transformer of ``model``, its optimizer, and one step of training.

    What is random in a step, dropout and left-out captions, is a function of (seed, step): a resumed run repeats it.
    """

    def __init__(
        self,
        model: Model,
        settings: TransformerTraining,
        device: torch.device,
        autocast: torch.dtype | None,
        held_out: TokenStore | None = None,
        draw_sheet: Callable[[Model, Path], None] | None = None,
    ) -> None:
        self.model = model
        self.settings = settings
        self.device = device
        self.autocast = autocast
        self.held_out = held_out
        self.draw_sheet = draw_sheet
        self.layout = model.config.layouts["generate"]
        self.transformer = model.transformer.to(device)
        matrices = [parameter for parameter in self.transformer.parameters() if parameter.dim() > 1]
        vectors = [parameter for parameter in self.transformer.parameters() if parameter.dim() == 1]
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
        """One update; returns the losses in nats per code and per piece, apart."""
        settings = self.settings
        torch.manual_seed(settings.seed * 1_000_003 + step)
        keep, hide = self.choices(step, *batch["image"].shape)
        for group in self.optimizer.param_groups:
            group["lr"] = settings.learning_rate_at(step)
        self.transformer.train()
        figures = {"loss": 0.0, "image_loss": 0.0, "text_loss": 0.0}
        for part in np.array_split(np.arange(len(keep)), settings.accumulation):
            rows = {name: values[part] for name, values in batch.items()}
            image_loss, text_loss = self.losses(rows, keep[part], hide[part])
            loss = (image_loss + settings.text_loss_weight * text_loss) / settings.accumulation
            loss.backward()
            figures["loss"] += loss.item()
            figures["image_loss"] += image_loss.item() / settings.accumulation
            figures["text_loss"] += text_loss.item() / settings.accumulation
        norm = torch.nn.utils.clip_grad_norm_(self.transformer.parameters(), settings.clip_norm)
        if not torch.isfinite(norm):
            raise InputError(f"the gradient of step {step} is not finite; lower the learning rate, or resume earlier")
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return {**figures, "gradient_norm": norm.item(), "learning_rate": settings.learning_rate_at(step)}

    def choices(self, step: int, num_rows: int, num_codes: int) -> tuple[np.ndarray, np.ndarray]:
        """Which captions a step keeps, (rows,), and which codes it hides from the input, (rows, codes); both bool."""
        random = np.random.default_rng([self.settings.seed, step])
        keep = random.random(num_rows) >= self.settings.caption_drop
        chosen = (random.random(num_rows) < self.settings.hidden_rows) & keep
        share = np.minimum(1, 2 * random.random(num_rows)) * chosen
        return keep, random.random((num_rows, num_codes)) < share[:, None]

    def losses(self, rows: Rows, keep_caption: np.ndarray, hide: np.ndarray | None = None) -> tuple[Tensor, Tensor]:
        """Mean cross-entropy of image codes and of text pieces; each kind of id competes with its own kind alone.

        ``hide`` (B, codes) marks codes that the input holds ``[MASK]`` for; they are learnt all the same.
        """
        batch = self.arrange(rows, keep_caption)
        ids_BT = torch.from_numpy(batch.ids).to(self.device)
        inputs_BT = ids_BT
        if hide is not None and hide.any():
            hidden = np.zeros(batch.ids.shape, dtype=bool)
            hidden[batch.kinds == Kind.IMAGE] = hide.reshape(-1)  # in both, row after row and code after code
            mask = self.model.config.vocabulary.command("[MASK]")
            inputs_BT = ids_BT.masked_fill(torch.from_numpy(hidden).to(self.device), mask)
        positions_BT = torch.from_numpy(batch.positions).to(self.device)
        with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
            hidden_BTD = self.transformer.hidden(inputs_BT[:, :-1], positions_BT[:, :-1])
            vocabulary = self.model.config.vocabulary
            image = self._loss(hidden_BTD, ids_BT, batch, Kind.IMAGE, vocabulary.image)
            # A text may end in a command, so commands compete with the pieces.
            text = self._loss(hidden_BTD, ids_BT, batch, Kind.TEXT, range(vocabulary.text.start, vocabulary.size))
        return image, text

    def arrange(self, rows: Rows, keep_caption: np.ndarray) -> Batch:
        """Rows of the store as sequences padded on the right; a caption that is not kept is empty."""
        arranged = []
        for text, image, keep in zip(rows["text"], rows["image"], keep_caption, strict=True):
            pieces = text[text != ABSENT] if keep else text[:0]
            arranged.append(self.layout.arrange(self.model.config.vocabulary, text=pieces, image=image))
        return pad_right(arranged, self.model.config.vocabulary.pad)

    def _loss(self, hidden_BTD: Tensor, ids_BT: Tensor, batch: Batch, kind: Kind, ids: range) -> Tensor:
        wanted = torch.from_numpy((batch.loss & (batch.kinds == kind))[:, 1:]).to(self.device)
        targets_N = ids_BT[:, 1:][wanted] - ids.start
        if not len(targets_N):  # every caption left out
            return hidden_BTD.new_zeros((), dtype=torch.float32)
        return F.cross_entropy(self.transformer.head(hidden_BTD[wanted], ids), targets_N)

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
            sums = np.zeros(2)
            size = self.settings.batch_size
            starts = range(0, min(len(self.held_out), 1024), size)
            for start in starts:
                rows = self.held_out.read(np.arange(start, min(start + size, len(self.held_out))))
                image, text = self.losses(rows, np.ones(len(rows["image"]), dtype=bool))
                sums += np.array([image.item(), text.item()])
            figures = {
                "held_out_image_loss": float(sums[0] / len(starts)),
                "held_out_text_loss": float(sums[1] / len(starts)),
            }
        if self.draw_sheet is not None:
            self.draw_sheet(self.model, folder / f"step-{step:08d}.png")
        return figures


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
