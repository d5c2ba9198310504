"""A toy of long sequences, whose lower half can only be predicted from far before it: see ``long_sequences.py``.

A picture is a grid of codes in bands of four rows. A band has a texture: four codes of 64, in random order. The four
textures of the upper half return in the lower half in the same order, 16 rows further on. Who remembers a texture knows
the four codes of its second band before the first of them; who does not has to guess each. The order of the codes
cannot be learnt, so that no loss is below log 4.
"""

# G codes on a side of a picture
from __future__ import annotations

import sys
import time
from dataclasses import dataclass

import numpy as np
import torch

from cogview.modeling.config import AttentionConfig, ModelConfig, TransformerConfig
from cogview.modeling.transformer import Transformer
from cogview.tokenizers.layouts import layouts
from cogview.tokenizers.vocabulary import Vocabulary
from cogview.training.engines.base import DeviceMicroBatch, TransformerWithLoss, make_optimizer
from cogview.training.example_builder import ExampleBuilder
from cogview.training.examples import RowPlan, Rows, TargetKind
from cogview.training.settings import TransformerTraining
from cogview.training.target_weighting import TargetWeighting

GRID = 32
NUM_CODES, TEXTURE = 64, 4  # codes in all, and those of a texture
BAND = 4  # rows of a band
VOCABULARY = Vocabulary(num_image_codes=NUM_CODES, num_text_pieces=2)
HELD_OUT = 1 << 40  # number of the first held-out picture
CODES = ("generate", TargetKind.IMAGE)  # the loss that is minimized
CPU = torch.device("cpu")


def picture(number: int) -> np.ndarray:
    """Return the codes (G, G) of a picture."""
    random, bands = np.random.default_rng([7, number]), GRID // BAND
    textures = np.stack([random.permutation(NUM_CODES)[:TEXTURE] for _ in range(bands // 2)])
    of_row = np.repeat(np.concatenate([textures, textures]), BAND, axis=0)
    return np.take_along_axis(of_row, random.integers(TEXTURE, size=(GRID, GRID)), axis=1)


def rows_of(numbers: range) -> Rows:
    """Return pictures as rows of a store, all with the same text."""
    codes = np.stack([picture(number).reshape(-1) for number in numbers])
    return {"text": np.zeros((len(codes), 1), dtype=np.uint16), "image": codes.astype(np.uint16)}


@dataclass(frozen=True, kw_only=True)
class ToyTraining:
    """Shape and training of the toy."""

    steps: int = 300
    batch_size: int = 6
    layers: int = 2
    width: int = 96
    learning_rate: float = 3e-3
    held_out: int = 48
    seed: int = 0

    def config(self, attention: AttentionConfig) -> ModelConfig:
        """Return the config of a model with a pattern of attention."""
        longest = layouts(GRID)["generate"].max_position(1)
        transformer = TransformerConfig(
            num_layers=self.layers,
            width=self.width,
            num_heads=4,
            vocabulary_size=VOCABULARY.padded_size,
            max_positions=longest,
            dropout=0.0,
            branch_norm_init=0.05,
            sinusoidal_positions=True,
            attention=attention,
        )
        return ModelConfig(transformer=transformer, vocabulary=VOCABULARY, grid=GRID, tasks=("generate",), max_text=1)


class ToyTrainer:
    """A toy with a pattern of attention, and what it learns from.

    Attributes:
        network: The transformer with its loss.
        seconds: CPU time of the training.
    """

    def __init__(self, toy: ToyTraining, attention: AttentionConfig) -> None:
        self.toy = toy
        self.settings = TransformerTraining(
            steps=toy.steps,
            batch_size=toy.batch_size,
            learning_rate=toy.learning_rate,
            warmup_steps=min(50, max(1, toy.steps // 4)),
            caption_dropout=0.0,
            seed=toy.seed,
        )
        torch.manual_seed(toy.seed)
        config = toy.config(attention)
        self.network = TransformerWithLoss(Transformer(config.transformer), None)
        self.builder = ExampleBuilder(config, self.settings)
        self.weighting = TargetWeighting(VOCABULARY, self.settings, CPU)
        self.seconds = 0.0

    def train(self) -> None:
        """Train for all steps; the pivots of a picture are sampled anew."""
        toy, settings = self.toy, self.settings
        optimizer = make_optimizer(self.network, settings)
        started = time.process_time()
        for step in range(toy.steps):
            rows = rows_of(range(step * toy.batch_size, (step + 1) * toy.batch_size))
            (part,) = self._parts(rows, self.builder.plan_rows(step, *rows["image"].shape))
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate_at(step)
            loss, _ = self.network(part)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
            optimizer.step()
            if (step + 1) % max(toy.steps // 10, 1) == 0:
                print(f"  step {step + 1}: {loss.item():.3f}", file=sys.stderr, flush=True)
        self.seconds = time.process_time() - started

    @torch.no_grad()
    def losses(self) -> dict[str, float]:
        """Return held-out losses in nats per code, with the pivots of generation: of all codes, and the lower half."""
        self.network.eval()
        toy, losses = self.toy, []
        for first in range(HELD_OUT, HELD_OUT + toy.held_out, toy.batch_size):
            rows = rows_of(range(first, min(first + toy.batch_size, HELD_OUT + toy.held_out)))
            count, codes = rows["image"].shape
            plan = RowPlan(
                tasks=["generate"] * count,
                keep_caption=np.ones(count, dtype=bool),
                mask_codes=np.zeros((count, codes), dtype=bool),
                num_targets=np.full(count, codes),
                target_priority=np.ones((count, codes)),
                window=np.zeros(count, dtype=np.int64),
                unknown_source=np.zeros((count, codes), dtype=bool),
                pivot_keys=np.full(count, -1),
            )
            for part in self._parts(rows, plan):
                _, (losses_M,) = self.network.loss(self.network.transformer, part)
                losses.append(losses_M.view(-1, codes))
        losses_NC = torch.cat(losses).double()
        return {"all": float(losses_NC.mean()), "lower": float(losses_NC[:, codes // 2 :].mean())}

    def _parts(self, rows: Rows, plan: RowPlan) -> list[DeviceMicroBatch]:
        """Return the micro-batches of a batch on the CPU, with codes as their only targets."""
        batch = self.builder.build_batch(0, rows, plan)
        weights = {CODES: 1 / int(batch.target_counts[batch.keys.index(CODES)])}
        return [part for shard in self.weighting.to_device(batch, weights) for part in shard]
