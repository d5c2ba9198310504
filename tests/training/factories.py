"""Tiny models, trainers, rows and plans that the tests of training share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cogview.checkpoints.checkpoint import Model
from cogview.data.store import StoreHeader, TokenStore
from cogview.data.store_writer import StoreWriter, pad_text
from cogview.files import write_json
from cogview.modeling.config import AttentionConfig
from cogview.tokenizers.text import TextTokenizer
from cogview.training.distributed import DistributedContext
from cogview.training.engines import open_engine
from cogview.training.engines.base import TransformerWithLoss
from cogview.training.examples import RowPlan
from cogview.training.run_folder import RunFolder
from cogview.training.settings import EngineSettings, TransformerTraining
from cogview.training.trainer import TransformerTrainer
from cogview.vqvae.model import VQVAEConfig
from tests.factories import tiny_model, tiny_text_tokenizer

SINGLE = DistributedContext(torch.device("cpu"))
CODES, GRID = 32, 8
CAPTIONS = ("一个红苹果", "蓝色背景上的三只狐狸", "汽车的左边是一条鱼", "打开的书上面有两只狗")
RUN_SETTINGS = {
    "preset": "5m",
    "store": None,
    "training": {"steps": 100, "batch_size": 8, "learning_rate": 1e-3, "tasks": {"generate": 2.0, "caption": 1.0}},
}
EDITS = {"edit": 2.0, "fill": 1.0, "generate": 1.0}
MIXTURE = {"generate": 2.0, "caption": 1.0, "upscale": 1.0, "low_level": 1.0}


def text_tokenizer() -> TextTokenizer:
    """Return the text tokenizer of ``CAPTIONS``."""
    return tiny_text_tokenizer(CAPTIONS, 400, coverage=1.0)


def new_model(seed: int = 0, dropout: float = 0.0, attention: AttentionConfig | None = None) -> Model:
    """Return a tiny model; models of every seed share the image tokenizer."""
    vqvae = VQVAEConfig(channels=(4, 4, 8), encoder_blocks=(0, 0, 0), num_codes=CODES, code_width=4)
    shape = {"max_positions": 100, "dropout": dropout, "attention": attention or AttentionConfig()}
    return tiny_model(text_tokenizer(), vqvae=vqvae, shape=shape, seed=seed, vqvae_seed=1, max_text=30)


def training_settings(**changes: Any) -> TransformerTraining:
    """Return settings of 100 steps of 8 rows without caption dropout, with ``changes``."""
    return TransformerTraining(**{"steps": 100, "batch_size": 8, "warmup_steps": 2, "caption_dropout": 0.0, **changes})


def open_trainer(
    model: Model,
    settings: TransformerTraining,
    dtype: torch.dtype | None = None,
    *,
    engine: EngineSettings | None = None,
    num_threads: int | None = None,
    **changes: Any,
) -> TransformerTrainer:
    """Return a trainer of ``model`` on a new engine; ``changes`` are arguments of the trainer."""
    network = TransformerWithLoss(model.transformer, dtype)
    return TransformerTrainer(
        model, settings, open_engine(network, settings, engine or EngineSettings(), SINGLE, num_threads), **changes
    )


def make_trainer(model: Model | None = None, **changes: Any) -> TransformerTrainer:
    """Return a trainer of ``model``, or of a new one, with changed settings."""
    return open_trainer(model or new_model(), training_settings(**changes))


def train_step(trainer: TransformerTrainer, step: int, rows: dict[str, np.ndarray]) -> dict[str, float]:
    """Train one step on rows of a store; return its metrics without the number of tokens."""
    metrics = trainer.step(step, trainer.batch(step, rows))
    assert metrics.pop("tokens") > 0
    return metrics


def store_rows(step: int = 0, size: int = 8, *, equal: bool = False) -> dict[str, np.ndarray]:
    """Return rows of a store, a function of the step; with ``equal``, all texts have the same length."""
    random = np.random.default_rng(step)
    texts = [text_tokenizer().encode(CAPTIONS[0 if equal else i]) for i in random.integers(len(CAPTIONS), size=size)]
    return {"text": pad_text(texts, 20), "image": random.integers(CODES, size=(size, GRID**2)).astype(np.uint16)}


def wide_rows(step: int = 0, size: int = 16) -> dict[str, np.ndarray]:
    """Return rows that also have codes at twice and at half the side."""
    random = np.random.default_rng([step, 1])
    extra = {
        name: random.integers(CODES, size=(size, count)).astype(np.uint16)
        for name, count in (("large", 4 * GRID**2), ("small", GRID**2 // 4))
    }
    return {**store_rows(step, size), **extra}


def edit_rows(step: int = 0, size: int = 8) -> dict[str, np.ndarray]:
    """Return rows that also have the image before an edit, and an instruction beside the caption."""
    random = np.random.default_rng([step, 2])
    texts = [text_tokenizer().encode(CAPTIONS[i]) for i in random.integers(len(CAPTIONS), size=size)]
    source = random.integers(CODES, size=(size, GRID**2)).astype(np.uint16)
    return {**store_rows(step, size), "source": source, "instruction": pad_text(texts, 20)}


def row_plan(
    count: int = 8, *, task: str = "generate", keep_caption: bool | np.ndarray = True, mask_all: bool = False
) -> RowPlan:
    """Return a plan of ``count`` rows of one task, with every input code masked or none, and windows in their order."""
    return RowPlan(
        tasks=[task] * count,
        keep_caption=np.broadcast_to(keep_caption, count),
        mask_codes=np.full((count, GRID**2), mask_all),
        num_targets=np.full(count, GRID**2),
        target_priority=np.ones((count, GRID**2)),
        window=np.arange(count) % 9,
        unknown_source=np.zeros((count, GRID**2), dtype=bool),
        pivot_keys=np.arange(count),
    )


def priority_of(indices: Sequence[int]) -> np.ndarray:
    """Return target priorities that select the codes at ``indices`` of each of three rows first."""
    priority = np.ones((3, GRID**2))
    priority[:, list(indices)] = 1e-3
    return priority


def batch_losses(
    trainer: TransformerTrainer, rows: dict[str, np.ndarray], plan: RowPlan | None = None
) -> dict[str, float]:
    """Return the losses of rows, without the number of tokens."""
    batch = trainer.builder.build_batch(0, rows, plan or row_plan(len(rows["image"])))
    metrics = trainer.losses(batch)
    assert metrics.pop("tokens") == batch.num_tokens
    return metrics


def write_store(path: Path, count: int) -> TokenStore:
    """Write a store of ``count`` rows and return it, open for reading."""
    header = StoreHeader(
        fields={"text": 20, "image": GRID**2},
        grid=GRID,
        num_image_codes=CODES,
        num_text_pieces=text_tokenizer().size,
        layouts=("generate",),
        codebook_sha256="a",
        text_sha256="b",
    )
    with StoreWriter(path, header) as writer:
        writer.append(store_rows(9, count))
    return TokenStore(path)


def write_run(folder: Path, steps: int = 100, **changes: Any) -> Path:
    """Write a run folder as training does: metrics every 10 steps at 4 steps per second, an evaluation every 50."""
    run = RunFolder(folder)
    run._writer = False  # no TensorBoard
    run.start({**RUN_SETTINGS, "training": {**RUN_SETTINGS["training"], **changes}}, resume=True)
    for step in range(10, steps + 1, 10):
        layers = {f"activation_max_layer_{layer:02}": (layer + 1) * step for layer in range(3)}
        metrics = {
            "loss": 5 - 0.02 * step,
            "generate_image_loss": 6 - 0.02 * step,
            "caption_text_loss": 3 - 0.02 * step,
            "gradient_norm": 1 + step % 3,
            "learning_rate": 1e-3 / step,
            **({"skipped_steps": 1.0} if step >= 30 else {}),
            "loss_scale": 2.0**16,
            "activation_max_embedding": 0.5,
            **layers,
            "samples_per_second": 32.0,
            "tokens_per_second": 3200.0,
            "data_wait": 0.02,
        }
        run.log(step, metrics)
        if step % 50 == 0:
            validation = {"validation_loss": 4.5 + 0.01 * (step - 50), "validation_generate_image_loss": 5.0}
            run.log(step, validation)
            run.record_best(step, validation)
            run.save(step, lambda folder: write_json(folder / "trainer.json", {}), keep=5)
    run.close()
    return folder
