"""What engines are told, and what they refuse. What they compute is in test_transformer_training and test_processes."""

import sys

import pytest
import torch

from cogview.errors import InputError
from cogview.modeling.config import TransformerConfig
from cogview.modeling.transformer import Transformer
from cogview.training.distributed import DistributedContext
from cogview.training.engines import open_engine
from cogview.training.engines.base import TransformerWithLoss, parameter_groups
from cogview.training.engines.deepspeed_engine import configuration
from cogview.training.settings import EngineSettings, TransformerTraining

ALONE = DistributedContext(torch.device("cpu"))
SETTINGS = TransformerTraining(steps=10, warmup_steps=1, clip_norm=0.7)


def learner(dtype: torch.dtype | None = None) -> TransformerWithLoss:
    shape = TransformerConfig(num_layers=1, width=16, num_heads=2, vocabulary_size=64, max_positions=8)
    return TransformerWithLoss(Transformer(shape), dtype)


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize(("dtype", "section"), [(None, None), (torch.bfloat16, "bf16"), (torch.float16, "fp16")])
def test_deepspeed_is_told_what_it_would_decide_by_itself(stage, dtype, section):
    """Its defaults of clipping and of overflowing gradients have changed between versions."""
    config = configuration(
        SETTINGS, EngineSettings(name="deepspeed", zero=stage), DistributedContext(ALONE.device, 1, 4), dtype
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


def test_a_recipe_may_say_more_to_deepspeed():
    engine = EngineSettings(
        name="deepspeed",
        zero=2,
        offload=True,
        config={"zero_optimization": {"reduce_bucket_size": 7}, "wall_clock": True},
    )
    config = configuration(SETTINGS, engine, ALONE, None)
    assert config["zero_optimization"]["reduce_bucket_size"] == 7
    assert config["zero_optimization"]["stage"] == 2
    assert config["zero_optimization"]["offload_optimizer"]["device"] == "cpu"
    assert config["wall_clock"] is True


def test_a_missing_deepspeed_names_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(
        InputError, match=r"cannot be imported .*: pip install 'cogview\[deepspeed\]', or set name: torch"
    ):
        open_engine(learner(), SETTINGS, EngineSettings(name="deepspeed"), ALONE)


def test_deepspeed_has_no_float16_on_a_cpu():
    with pytest.raises(
        InputError, match="DeepSpeed has no float16 on a CPU: set precision: bfloat16 or float32, or name: to"
    ):
        open_engine(learner(torch.float16), SETTINGS, EngineSettings(name="deepspeed"), ALONE)


def test_what_is_not_learnt_has_no_optimizer():
    subject = learner()
    subject.transformer.embedding.weight.requires_grad_(False)
    groups = parameter_groups(subject, 0.3)
    assert [group["weight_decay"] for group in groups] == [0.3, 0.0]
    assert sum(len(group["params"]) for group in groups) == len(list(subject.parameters())) - 1
    for parameter in subject.parameters():
        parameter.requires_grad_(parameter.dim() == 1)
    assert [group["weight_decay"] for group in parameter_groups(subject, 0.3)] == [0.0]
