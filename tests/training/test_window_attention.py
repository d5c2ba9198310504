"""Training with window attention: pivots are a function of seed, step and row, and the loss is that of the mask."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from cogview.checkpoints.checkpoint import save_model
from cogview.config_io import from_mapping
from cogview.errors import InputError
from cogview.kernels.window_mask import Pivots, WindowMask
from cogview.modeling.config import AttentionConfig, preset
from cogview.modeling.lora import LoraSettings
from cogview.modeling.pivots import fixed_sample
from cogview.training.example_builder import ExampleBuilder
from cogview.training.model_setup import initialize
from cogview.training.new_adapter import architecture_lines
from cogview.training.settings import TransformerSettings
from tests.training.factories import (
    CODES,
    GRID,
    MIXTURE,
    make_trainer,
    new_model,
    row_plan,
    store_rows,
    train_step,
    training_settings,
    wide_rows,
)

WINDOW = AttentionConfig(pattern="window", window=9, pivots=8)


def sparse_model(seed=0, dropout=0.0):
    return new_model(seed, dropout, WINDOW)


def pivots_of(example):
    """Return the indices of the pivots of an example."""
    return np.flatnonzero(np.isfinite(example.pivot_bias)).tolist()


def test_plan_rows_samples_other_pivots_for_each_row_and_step():
    builder = ExampleBuilder(sparse_model().config, training_settings())
    rows = store_rows()
    examples = [builder.build(rows, builder.plan_rows(step, 8, 64)) for step in (3, 4, 3)]
    sets = [[tuple(pivots_of(example)) for example in batch] for batch in examples]
    assert sets[0] == sets[2]
    assert len({*sets[0], *sets[1]}) == 16
    plan = builder.plan_rows(3, 8, 64).select(slice(2, None))  # of a process that has the last rows
    part = builder.build({name: values[2:] for name, values in rows.items()}, plan)
    assert [tuple(pivots_of(example)) for example in part] == sets[0][2:]


def test_build_samples_pivots_of_each_image_and_keeps_all_other_tokens():
    builder = ExampleBuilder(sparse_model().config, training_settings(tasks=MIXTURE))
    rows = wide_rows(size=4)
    for task, num_images in (("generate", 1), ("caption", 1), ("upscale", 2)):
        for example in builder.build(rows, row_plan(4, task=task)):
            is_code = example.inputs < CODES
            sampled = np.isfinite(example.pivot_bias) & is_code
            assert (example.pivot_bias[~is_code] == 0).all()
            assert sampled.sum() in range(8 * num_images - 1, 8 * num_images + 1)  # the last code is not read
            sizes = [16, 64] if task == "upscale" else [64]
            assert set(example.pivot_bias[sampled]) <= {np.float32(np.log(size / 8)) for size in sizes}


def test_validation_batch_has_the_pivots_of_generation():
    builder = ExampleBuilder(sparse_model().config, training_settings())
    plan = row_plan(2)
    plan.pivot_keys[:] = -1
    for example in builder.build(store_rows(size=2), plan):
        codes = np.flatnonzero(example.inputs < CODES)
        expected = fixed_sample(64, 8)
        assert [index - codes[0] for index in pivots_of(example) if index in codes] == expected.tolist()


def test_build_without_a_window_has_no_pivots():
    builder = ExampleBuilder(new_model().config, training_settings())
    assert all(example.pivot_bias is None for example in builder.build(store_rows(), row_plan()))


def test_loss_of_a_window_equals_that_of_the_bias_of_all_pairs():
    model = sparse_model()
    trainer = make_trainer(model, text_loss_weight=0.0)
    trainer.transformer.eval()
    rows, plan = store_rows(size=3), row_plan(3)
    metrics = trainer.losses(trainer.builder.build_batch(0, rows, plan))
    dense = new_model(attention=AttentionConfig())
    dense.transformer.load_state_dict(model.transformer.state_dict())
    dense.transformer.eval()
    losses = []
    for example in trainer.builder.build(rows, plan):
        pivots = Pivots.from_bias(torch.from_numpy(example.pivot_bias)[None])
        length = len(example)
        bias = WindowMask.of_sequences(WINDOW.window, pivots, length).to_bias(length, torch.float32)
        ids, positions = (torch.from_numpy(values)[None] for values in (example.inputs, example.positions))
        with torch.no_grad():
            hidden = dense.transformer.hidden(ids, positions, bias_B1TS=bias)
            logits = dense.transformer.head(hidden, range(CODES))[0]
        targets = torch.from_numpy(np.where(example.targets < CODES, example.targets, -100))
        losses.append(F.cross_entropy(logits, targets, reduction="sum"))
    assert metrics["generate_image_loss"] == pytest.approx(float(sum(losses)) / (3 * GRID**2), abs=1e-5)


def test_step_of_a_window_has_the_same_gradient_in_micro_batches():
    found = []
    for micro_batch_size in (0, 3):
        trainer = make_trainer(sparse_model(), micro_batch_size=micro_batch_size, tasks=MIXTURE)
        trainer.engine.accumulate_gradients(trainer.targets.evenly_weighted(trainer.batch(1, wide_rows(1))), learn=True)
        found.append({name: value.grad for name, value in trainer.transformer.named_parameters()})
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, atol=1e-6, rtol=1e-4)


@pytest.mark.slow
def test_trainer_of_a_window_resumes_exactly(tmp_path):
    changes = {"caption_dropout": 0.5, "full_mask_rate": 0.5, "micro_batch_size": 4, "steps": 4, "tasks": MIXTURE}
    whole = make_trainer(sparse_model(dropout=0.2), **changes)
    metrics = [train_step(whole, step, wide_rows(step)) for step in range(4)]
    first = make_trainer(sparse_model(dropout=0.2), **changes)
    for step in range(2):
        train_step(first, step, wide_rows(step))
    first.snapshot()(tmp_path)
    torch.rand(5)
    second = make_trainer(sparse_model(seed=4, dropout=0.2), **changes)
    second.load(tmp_path)
    assert [train_step(second, step, wide_rows(step)) for step in range(2, 4)] == metrics[2:]
    for name, tensor in whole.transformer.state_dict().items():
        assert torch.equal(tensor, second.transformer.state_dict()[name]), name


def test_initialize_notes_another_pattern_of_attention(tmp_path, capsys):
    """Weights of dense attention may learn a window; an adapter has the attention of its base model."""
    save_model(tmp_path / "dense", new_model(seed=3))
    settings = TransformerSettings(training=training_settings(), init_from=str(tmp_path / "dense"), attention=WINDOW)
    model = sparse_model()
    initialize(model, settings)
    assert "dense was trained with the attention" in capsys.readouterr().err
    weights = new_model(seed=3).transformer.state_dict()
    assert torch.equal(
        model.transformer.state_dict()["layers.0.mlp.input.weight"], weights["layers.0.mlp.input.weight"]
    )
    with pytest.raises(InputError, match=r"an adapter has the attention of its base model: .*dense has"):
        initialize(model, replace(settings, lora=LoraSettings(rank=2)))
    initialize(new_model(), replace(settings, attention=AttentionConfig()))
    assert capsys.readouterr().err == ""


def test_architecture_lines_have_the_pattern_of_attention():
    lines = architecture_lines(replace(preset("5m", 896), attention=WINDOW), "model")
    section = {each.key: each.value for each in lines} | {"training": {"steps": 10, "warmup_steps": 2}}
    assert from_mapping(TransformerSettings, section, where="recipe").attention == WINDOW
