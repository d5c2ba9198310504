"""Settings of training: ranges, and the learning rate."""

import math
from dataclasses import replace
from pathlib import Path

import pytest

from cogview.config_io import from_mapping, to_mapping
from cogview.modeling.config import AttentionConfig, preset
from cogview.modeling.lora import LoraSettings
from cogview.training.settings import EngineSettings, RunSettings, TransformerSettings
from tests.training.factories import new_model, open_trainer, store_rows, train_step, training_settings


def test_learning_rate_at_rises_then_decays():
    settings = training_settings(steps=20, warmup_steps=4, learning_rate=1e-2, final_learning_rate=1e-4)
    rates = [settings.learning_rate_at(step) for step in range(21)]
    assert rates[0] == pytest.approx(1e-2 / 4)
    assert rates[3] == rates[4] == pytest.approx(1e-2)
    assert rates[12] == pytest.approx((1e-2 + 1e-4) / 2)
    assert rates[20] == pytest.approx(1e-4)
    trainer = open_trainer(new_model(), settings)
    assert train_step(trainer, 1, store_rows())["learning_rate"] == rates[1]
    assert {group["lr"] for group in trainer.engine.optimizer.param_groups} == {rates[1]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"warmup_steps": 100}, r"warmup_steps must be from 1 to steps - 1 \(99\), got 100"),
        ({"steps": -1}, r"steps must be in \[2, 1000000000\], got -1"),
        ({"steps": 10**30}, r"steps must be in \[2, 1000000000\], got 1"),
        ({"batch_size": 0}, r"batch_size must be in \[1, 1048576\], got 0"),
        ({"micro_batch_size": -1}, r"micro_batch_size must be in \[0, 1048576\], got -1"),
        ({"num_workers": -1}, r"num_workers must be in \[0, 1024\], got -1"),
        ({"clip_norm": 0.0}, "clip_norm must be above 0 and finite, or null for no clipping, got 0.0"),
        ({"clip_norm": -1.0}, "clip_norm must be above 0 and finite, or null for no clipping, got -1.0"),
        ({"clip_norm": math.nan}, "clip_norm must be above 0 and finite, or null for no clipping, got nan"),
        ({"learning_rate": -1e-3}, "learning_rate must be at least 0 and finite, got -0.001"),
        ({"learning_rate": math.nan}, "learning_rate must be at least 0 and finite, got nan"),
        ({"final_learning_rate": -1e-5}, "final_learning_rate must be at least 0 and finite, got -1e-05"),
        ({"weight_decay": math.inf}, "weight_decay must be at least 0 and finite, got inf"),
        ({"betas": (0.9, 1.0)}, r"betas must be in \[0, 1\), got \[0.9, 1.0\]"),
        ({"seed": -1}, r"seed must be in \[0, 9223372036854775807\], got -1"),
        ({"seed": 2**64 - 1}, r"seed must be in \[0, 9223372036854775807\], got 18446744073709551615"),
        ({"full_mask_rate": 0.7, "partial_mask_rate": 0.4}, "are shares of all rows: their sum must not be above 1"),
        ({"full_mask_targets": -1}, r"full_mask_targets must be in \[0, 1048576\], got -1"),
        ({"caption_dropout": 1.5}, r"caption_dropout must be in \[0, 1\], got 1.5"),
        ({"tasks": {"draw": 1.0}}, "task 'draw' is unknown; known: generate, caption, upscale, low_level"),
        ({"tasks": {"generate": 0}}, "the share of task 'generate' must be above 0 and finite, got 0"),
        ({"tasks": {}}, "there must be a task to train for"),
        ({"text_loss_weight": -1.0}, "text_loss_weight must be at least 0 and finite, got -1.0"),
        ({"name_loss_weight": -0.5}, "name_loss_weight must be at least 0 and finite, got -0.5"),
    ],
)
def test_transformer_training_refuses_values_out_of_range(changes, message):
    with pytest.raises(ValueError, match=message):
        training_settings(**changes)


FORMER_SECTION = {
    "preset": "20m",
    "num_layers": 2,
    "branch_gain": 0.05,
    "start_from": "cogview-emoji",
    "store": "a",
    "held_out_store": "b",
    "new_stores": "c",
    "training": {
        "steps": 10,
        "warmup_steps": 2,
        "micro_batch": 3,
        "caption_drop": 0.2,
        "hidden_rows": 0.5,
        "hidden_places": 9,
        "masked_rows": 0.25,
        "workers": 1,
    },
}


def test_transformer_settings_read_former_keys():
    settings = from_mapping(TransformerSettings, FORMER_SECTION, where="a recipe")
    assert (settings.branch_norm_init, settings.init_from) == (0.05, "cogview-emoji")
    assert (settings.validation_store, settings.watch_folder) == (Path("b"), Path("c"))
    training = settings.training
    assert (training.micro_batch_size, training.caption_dropout, training.num_workers) == (3, 0.2, 1)
    assert (training.full_mask_rate, training.full_mask_targets, training.partial_mask_rate) == (0.5, 9, 0.25)
    assert from_mapping(TransformerSettings, to_mapping(settings), where="a run") == settings


def test_transformer_settings_read_the_pattern_of_attention():
    section = {"preset": "5m", "training": {"steps": 10, "warmup_steps": 2}}
    assert from_mapping(TransformerSettings, section, where="recipe").transformer_config(896).attention.is_dense
    section["attention"] = {"pattern": "window", "window": 64, "pivots": 32}
    found = from_mapping(TransformerSettings, section, where="recipe")
    assert found.transformer_config(896).attention == AttentionConfig(pattern="window", window=64, pivots=32)
    assert from_mapping(TransformerSettings, to_mapping(found), where="recipe") == found


def test_transformer_config_changes_a_preset():
    settings = from_mapping(TransformerSettings, FORMER_SECTION, where="a recipe")
    expected = replace(preset("20m", 512), num_layers=2, branch_norm_init=0.05)
    assert settings.transformer_config(512) == expected
    assert TransformerSettings(training=training_settings()).transformer_config(512) == preset("5m", 512)
    with pytest.raises(ValueError, match="preset '7m' is unknown; known: 5m"):
        TransformerSettings(training=training_settings(), preset="7m").transformer_config(512)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"store": Path("a"), "stores": {"b": 1.0}}, "store is one store and stores are several: give either"),
        ({"stores": {}, "validation_store": Path("c")}, "stores must name at least one store"),
        ({"stores": {"b": 1.0}}, "stores and validation_store belong together"),
        (
            {"stores": {"b": 0.0}, "validation_store": Path("c")},
            "the share of the store b must be above 0 and finite, got 0.0",
        ),
        ({"lora": LoraSettings()}, "lora trains an adapter of a model: name it in init_from"),
    ],
)
def test_transformer_settings_refuse_contradictions(changes, message):
    with pytest.raises(ValueError, match=message):
        TransformerSettings(training=training_settings(), **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"offload": True}, "offload and config are DeepSpeed's: set name: deepspeed"),
        ({"name": "deepspeed", "zero": 0}, "zero: 0 partitions nothing"),
        ({"name": "deepspeed", "zero": 4}, "zero must be 1, 2 or 3, got 4"),
        ({"name": "deepspeed", "config": {"gradient_clipping": 0.0}}, "set clip_norm in training"),
        ({"name": "deepspeed", "zero": 3, "compile": True}, "compile does not go with zero: 3"),
    ],
)
def test_engine_settings_refuse_contradictions(changes, message):
    with pytest.raises(ValueError, match=message):
        EngineSettings(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"log_every": 0}, r"log_every must be in \[1, 1000000000\], got 0"),
        ({"keep": 0}, r"keep must be in \[1, 1000000000\], got 0"),
        ({"save_every": -1}, r"save_every must be in \[0, 1000000000\], got -1"),
    ],
)
def test_run_settings_refuse_values_out_of_range(changes, message):
    with pytest.raises(ValueError, match=message):
        RunSettings(**changes)
