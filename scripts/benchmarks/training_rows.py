"""Rows for comparisons of training: lengths of the recipe emoji-cpu, captions of its world, and random codes."""

# B rows of a step, T positions of a row
from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
import torch

from cogview.data.store_writer import pad_text
from cogview.emoji.datasets import SceneDataset
from cogview.emoji.scene import SceneWeights
from cogview.emoji.settings import WorldSettings
from cogview.emoji.world import EmojiWorld
from cogview.modeling.config import ModelConfig
from cogview.pipeline.cogview import CogView
from cogview.training.example_builder import ExampleBuilder
from cogview.training.settings import TransformerTraining

SEED = 0
MODEL = "cogview-emoji"  # its tokenizers and layouts
# Training of scripts/recipes/emoji-cpu.yaml, without the names of objects, which the peers cannot learn.
RECIPE = {
    "tasks": {"generate": 5, "caption": 2, "upscale": 3},
    "betas": (0.9, 0.99),
    "warmup_steps": 1,
    "full_mask_rate": 0.7,
    "full_mask_targets": 24,
    "partial_mask_rate": 0.15,
}
EQUAL = {"tasks": {"generate": 1}, "betas": (0.9, 0.99), "warmup_steps": 1, "caption_dropout": 0.0}
EQUAL_PIECES = 16
NO_LOSS = -100  # PyTorch's id of a position without loss
Rows: TypeAlias = Mapping[str, np.ndarray]  # of a store, by field
PlainRow: TypeAlias = tuple[np.ndarray, np.ndarray]  # inputs (T,) and targets (T,), NO_LOSS where none counts


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainingCase:
    """What all sides train.

    Attributes:
        config: The model.
        settings: Our settings of training.
        dtype: Dtype of autocast; None for float32.
        steps: Rows of each step, as a store has them.
        rows: The same as inputs and targets.
        clock: wall or cpu.
    """

    config: ModelConfig
    settings: TransformerTraining
    dtype: torch.dtype | None
    steps: Sequence[Rows]
    rows: Sequence[Sequence[PlainRow]]
    clock: str = "wall"

    @property
    def num_tokens(self) -> int:
        """Number of input tokens of all steps."""
        return sum(len(inputs) for step in self.rows for inputs, _ in step)


@functools.cache
def opened_model() -> CogView:
    """Return the embedded model, opened once."""
    return CogView.from_pretrained(MODEL, device="cpu")


def settings_of(kind: str, batch: int) -> TransformerTraining:
    """Return the settings of training for rows of the recipe or of equal length.

    Args:
        kind: recipe or equal.
        batch: Rows of a step.
    """
    return TransformerTraining(steps=1_000_000, batch_size=batch, **(RECIPE if kind == "recipe" else EQUAL))


def model_config(num_layers: int, width: int, num_heads: int) -> ModelConfig:
    """Return the configuration of the embedded model in another shape.

    Args:
        num_layers: Layers.
        width: Width.
        num_heads: Heads.
    """
    config = opened_model().config
    shape = replace(config.transformer, num_layers=num_layers, width=width, num_heads=num_heads)
    return replace(config, transformer=shape)


def store_rows(kind: str, count: int) -> Rows:
    """Return rows as a store has them: captions of scenes, and random codes.

    Args:
        kind: recipe, or equal for captions of ``EQUAL_PIECES`` pieces.
        count: Number of rows.
    """
    random = np.random.default_rng(SEED)
    model = opened_model()
    codes, grid = model.config.vocabulary.num_image_codes, model.config.grid
    if kind == "equal":
        texts = random.integers(0, model.config.vocabulary.num_text_pieces, (count, EQUAL_PIECES)).tolist()
    else:
        world = EmojiWorld.create(WorldSettings(things=120))
        scenes = SceneDataset(world, SEED, weights=SceneWeights(one=2, many=1, pair=4))
        texts = [model.text_tokenizer.encode(world.caption(scenes.scene(index), index)) for index in range(count)]
    return {
        "text": pad_text(texts, model.config.max_text),
        "image": random.integers(0, codes, (count, grid**2)).astype(np.uint16),
        "large": random.integers(0, codes, (count, 4 * grid**2)).astype(np.uint16),
    }


def step_rows(rows: Rows, batch: int) -> list[Rows]:
    """Return the rows of each step.

    Args:
        rows: All rows.
        batch: Rows of a step.
    """
    count = len(rows["text"]) // batch
    return [{name: field[step * batch : (step + 1) * batch] for name, field in rows.items()} for step in range(count)]


def plain_rows(config: ModelConfig, settings: TransformerTraining, steps: Sequence[Rows]) -> list[list[PlainRow]]:
    """Return inputs and targets of each row of each step, as our training has them after its random decisions.

    Args:
        config: The model.
        settings: The settings of training.
        steps: Rows of each step.
    """
    builder = ExampleBuilder(config, settings)
    return [
        [
            (example.inputs, np.where(example.trained, example.targets, NO_LOSS))
            for example in builder.build(rows, builder.plan_rows(step, *rows["image"].shape))
        ]
        for step, rows in enumerate(steps)
    ]
