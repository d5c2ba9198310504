"""Engines in one process: configuration, optimizer, loss scale, checkpointing (several: ``test_processes``)."""

import sys
from dataclasses import replace

import pytest
import torch

from cogview.errors import InputError
from cogview.modeling.config import TransformerConfig
from cogview.modeling.lora import LoraSettings, add_lora, lora_parameters
from cogview.modeling.transformer import Transformer
from cogview.training.distributed import DistributedContext
from cogview.training.engines import open_engine
from cogview.training.engines.base import DeviceMicroBatch, TransformerWithLoss, parameter_groups
from cogview.training.engines.deepspeed_engine import configuration
from cogview.training.settings import EngineSettings, TransformerTraining
from tests.training.factories import (
    SINGLE,
    batch_losses,
    make_trainer,
    new_model,
    open_trainer,
    store_rows,
    train_step,
    training_settings,
)

SETTINGS = TransformerTraining(steps=10, warmup_steps=1, clip_norm=0.7)


def small_model(dtype: torch.dtype | None = None) -> TransformerWithLoss:
    shape = TransformerConfig(num_layers=1, width=16, num_heads=2, vocabulary_size=64, max_positions=8)
    return TransformerWithLoss(Transformer(shape), dtype)


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize(("dtype", "section"), [(None, None), (torch.bfloat16, "bf16"), (torch.float16, "fp16")])
def test_configuration_sets_what_deepspeed_would_decide_itself(stage, dtype, section):
    """Its defaults of clipping and of overflowing gradients have changed between versions."""
    config = configuration(
        SETTINGS, EngineSettings(name="deepspeed", zero=stage), DistributedContext(SINGLE.device, 1, 4), dtype
    )
    assert config["gradient_clipping"] == 0.7
    assert config["managed_gradient_accumulation"] is False
    assert config["zero_optimization"]["stage"] == stage
    assert config["train_batch_size"] == 4
    assert {name for name in ("bf16", "fp16") if name in config} == ({section} if section else set())
    if section == "bf16":
        assert config["bf16"]["check_grad_overflow"] is True
    if section == "fp16":
        assert config["fp16"]["initial_scale_power"] == 16
        assert config["fp16"]["min_loss_scale"] == 1
    assert (config.get("data_types") == {"grad_accum_dtype": "fp32"}) == (section is not None)
    assert "offload_optimizer" not in config["zero_optimization"]


def test_engines_clip_nothing_without_a_clip_norm():
    """None turns clipping off in every engine; 0 would stop all learning in one and turn clipping off in another."""
    settings = replace(SETTINGS, clip_norm=None)
    assert configuration(settings, EngineSettings(name="deepspeed"), SINGLE, None)["gradient_clipping"] == 0
    unclipped, loose, tight = (make_trainer(clip_norm=norm) for norm in (None, 1e30, 1e-9))
    for trainer in (unclipped, loose, tight):
        assert train_step(trainer, 0, store_rows())["gradient_norm"] > 1e-3
    weights = [
        dict(trainer.transformer.named_parameters())["embedding.weight"] for trainer in (unclipped, loose, tight)
    ]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_configuration_takes_sections_of_the_recipe():
    engine = EngineSettings(
        name="deepspeed",
        zero=2,
        offload=True,
        config={"zero_optimization": {"reduce_bucket_size": 7}, "wall_clock": True},
    )
    config = configuration(SETTINGS, engine, SINGLE, None)
    assert config["zero_optimization"]["reduce_bucket_size"] == 7
    assert config["zero_optimization"]["stage"] == 2
    assert config["zero_optimization"]["offload_optimizer"]["device"] == "cpu"
    assert config["wall_clock"] is True


def test_open_engine_names_the_extra_when_deepspeed_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(
        InputError, match=r"cannot be imported .*: pip install 'cogview\[deepspeed\]', or set name: torch"
    ):
        open_engine(small_model(), SETTINGS, EngineSettings(name="deepspeed"), SINGLE)


def test_open_engine_refuses_float16_of_deepspeed_on_a_cpu():
    with pytest.raises(
        InputError, match="DeepSpeed has no float16 on a CPU: set precision: bfloat16 or float32, or name: to"
    ):
        open_engine(small_model(torch.float16), SETTINGS, EngineSettings(name="deepspeed"), SINGLE)


def test_parameter_groups_hold_trained_parameters_only():
    model = small_model()
    model.transformer.embedding.weight.requires_grad_(False)
    groups = parameter_groups(model, 0.3)
    assert [group["weight_decay"] for group in groups] == [0.3, 0.0]
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters())) - 1
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.dim() == 1)
    assert [group["weight_decay"] for group in parameter_groups(model, 0.3)] == [0.0]


@pytest.mark.slow
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_torch_engine_repeats_the_dropout_of_an_adapter_on_two_threads(dropout, monkeypatch):
    """Threads that shared the generator would drop other inputs in every run of the same seed."""
    pytest.importorskip("peft")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)

    def train() -> dict[str, torch.Tensor]:
        model = new_model()
        torch.manual_seed(0)
        add_lora(model.transformer, LoraSettings(rank=2, dropout=dropout))
        trainer = open_trainer(model, training_settings())
        assert trainer.engine.num_threads == (1 if dropout else 2)
        for number in range(3):
            train_step(trainer, number, store_rows(number))
        return {name: value.detach() for name, value in lora_parameters(model.transformer).items()}

    first, second = train(), train()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(value.any() for name, value in first.items() if "lora_B" in name)


def test_torch_engine_decays_matrices_only():
    decays = {
        group["weight_decay"]: group["params"] for group in make_trainer(weight_decay=0.3).engine.optimizer.param_groups
    }
    assert {parameter.dim() for parameter in decays[0.3]} == {2}
    assert {parameter.dim() for parameter in decays[0.0]} == {1}
    assert sum(map(len, decays.values())) == len(list(new_model().transformer.parameters()))


def test_float16_halves_the_loss_scale_until_gradients_are_finite():
    """A loss scale that overflows is halved at each step; the steps after that are those of float32."""
    halved, exact = open_trainer(new_model(), training_settings(), torch.float16, num_threads=1), make_trainer()
    halved.engine.load_state(replace(halved.engine.export_state(), loss_scale=2.0**40))
    scales, skipped = [], []
    for number in range(40):
        metrics = train_step(halved, number, store_rows())
        scales.append(metrics["loss_scale"])
        skipped.append(metrics.get("skipped_steps", 0))
        if skipped[-1] != len(skipped):
            break
    first = int(skipped[-1])
    assert 5 < first < 40
    assert scales == [2.0 ** (40 - number) for number in range(first + 1)]
    for number in range(first, first + 3):
        expected = train_step(exact, number, store_rows())
        if number > first:
            metrics = train_step(halved, number, store_rows())
        assert metrics["loss"] == pytest.approx(expected["loss"], rel=2e-3)
        assert metrics["gradient_norm"] == pytest.approx(expected["gradient_norm"], rel=0.02)


@pytest.mark.parametrize("checkpointing", ["selective", "full"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_checkpointing_changes_no_result(checkpointing, dtype):
    kept, again = (
        open_trainer(new_model(dropout=0.1), training_settings(), dtype, engine=EngineSettings(checkpointing=choice))
        for choice in ("none", checkpointing)
    )
    for number in range(2):
        assert train_step(again, number, store_rows(number)) == train_step(kept, number, store_rows(number))


def test_bfloat16_autocast_is_close_to_float32():
    plain = make_trainer()
    halved = open_trainer(new_model(), training_settings(), torch.bfloat16)
    exact, rounded = batch_losses(plain, store_rows()), batch_losses(halved, store_rows())
    for name, value in exact.items():
        assert value != rounded[name]
        assert value == pytest.approx(rounded[name], rel=0.02)


def test_accumulate_gradients_minimizes_another_loss():
    """A loss is an object: the engine computes the gradients of any other one."""

    class MeanExponential:
        def __call__(self, transformer, batch):
            hidden_BTD = transformer.hidden(batch.ids, batch.positions)
            return hidden_BTD.exp().mean(), [hidden_BTD.detach().exp().mean(dim=-1).flatten()]

    model = small_model().eval()  # without dropout
    model.loss = MeanExponential()
    engine = open_engine(model, SETTINGS, EngineSettings(), SINGLE, num_threads=1)
    ids = torch.arange(8)[None]
    batch = DeviceMicroBatch(ids=ids, positions=ids, targets=[])
    sums = engine.accumulate_gradients([[batch]], learn=True)
    hidden_BTD = model.transformer.hidden(ids, ids)
    assert sums.tolist() == pytest.approx([8 * hidden_BTD.exp().mean().item()])
    parameters = list(model.transformer.parameters())
    expected = torch.autograd.grad(hidden_BTD.exp().mean(), parameters, allow_unused=True)
    for parameter, gradient in zip(parameters, expected, strict=True):
        if gradient is not None:
            torch.testing.assert_close(parameter.grad, gradient)
    assert engine.optimizer_step(1e-3).gradient_norm > 0
    engine.close()
