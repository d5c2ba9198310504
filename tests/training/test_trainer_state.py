"""The state of a trainer in a checkpoint: what is read, and what is refused."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from cogview.checkpoints.finite import NonFiniteWeightsError
from cogview.checkpoints.image_tokenizer import codebook_hash
from cogview.errors import InputError
from cogview.modeling.config import ModelConfig
from cogview.training.trainer import TransformerTrainer
from cogview.training.trainer_state import StateMismatchError, StoredTensors
from tests.training.factories import make_trainer, new_model, open_trainer, store_rows, train_step, training_settings


@pytest.mark.slow
def test_loss_scale_resumes_in_float16(tmp_path):
    def trainer() -> TransformerTrainer:
        return open_trainer(new_model(), training_settings(), torch.float16)

    whole, first, second = trainer(), trainer(), trainer()
    for each in (whole, first):
        each.engine.load_state(replace(each.engine.export_state(), loss_scale=2.0**30))
    metrics = [train_step(whole, number, store_rows(number)) for number in range(16)]
    assert metrics[7]["skipped_steps"] > 0
    for number in range(8):
        train_step(first, number, store_rows(number))
    first.snapshot()(tmp_path)
    second.load(tmp_path)
    assert [train_step(second, number, store_rows(number)) for number in range(8, 16)] == metrics[8:]


def test_load_refuses_weights_of_another_codebook(tmp_path):
    first = make_trainer()
    first.snapshot()(tmp_path)
    other = new_model()
    other.image_tokenizer.quantizer.codebook.mul_(-1)
    other.config = ModelConfig(**{**vars(other.config), "codebook_sha256": codebook_hash(other.image_tokenizer)})
    with pytest.raises(InputError, match="trained on the codes of another image tokenizer"):
        make_trainer(other).load(tmp_path)


def test_load_reads_the_state_of_earlier_versions(tmp_path):
    """The names in ``trainer.json`` and ``trainer.safetensors`` have been the same since the first version."""
    trainer = make_trainer()
    train_step(trainer, 0, store_rows())
    trainer.snapshot()(tmp_path)
    names = list(dict(trainer.transformer.named_parameters()))
    stored = StoredTensors(tmp_path / "trainer.safetensors")
    assert set(stored) == {f"{moment}.{name}" for moment in ("exp_avg", "exp_avg_sq") for name in names}
    numbers = {"engine": "torch", "processes": 2, "updates": 7, "loss_scale": 4.0, "good_steps": 3, "skipped_steps": 5}
    assert set(json.loads((tmp_path / "trainer.json").read_text())) == set(numbers)
    (tmp_path / "trainer.json").write_text(json.dumps(numbers))
    resumed = make_trainer()
    resumed.load(tmp_path)
    state = resumed.engine.export_state()
    assert (state.updates, resumed.guard.skipped) == (7, 5)
    assert torch.equal(state.moments["exp_avg"][names[0]], stored[f"exp_avg.{names[0]}"])


def test_load_refuses_a_model_without_a_state(tmp_path):
    make_trainer().snapshot()(tmp_path)
    (tmp_path / "trainer.json").unlink()
    with pytest.raises(InputError, match=r"no state of a training to go on with \(trainer.json is missing\): begin"):
        make_trainer().load(tmp_path)


def test_load_refuses_tensors_of_other_shapes(tmp_path):
    make_trainer().snapshot()(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["final_norm.bias"] = torch.zeros(3)
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(StateMismatchError, match=r"final_norm.bias has the shape \[3\], expected \[32\]"):
        make_trainer().load(tmp_path)


def test_stored_tensors_refuse_a_damaged_file(tmp_path):
    (tmp_path / "trainer.safetensors").write_bytes(b"damaged")
    with pytest.raises(InputError, match=r"trainer.safetensors is damaged: "):
        StoredTensors(tmp_path / "trainer.safetensors")


@pytest.mark.parametrize(
    ("file", "name"),
    [("model", "final_norm.bias"), ("trainer", "exp_avg.final_norm.bias"), ("trainer", "exp_avg_sq.final_norm.bias")],
)
def test_load_refuses_numbers_that_are_not_finite(tmp_path, file, name):
    """A resumed run computed one step more, and blamed the learning rate."""
    trainer = make_trainer()
    train_step(trainer, 0, store_rows())
    trainer.snapshot()(tmp_path)
    path = tmp_path / f"{file}.safetensors"
    tensors = load_file(path)
    tensors[name][5] = torch.nan
    save_file(tensors, path)
    with pytest.raises(NonFiniteWeightsError, match=f"^{path}: {name} has 1 of 32 numbers that are NaN or infinite: "):
        make_trainer().load(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"updates": None}, "updates must be a number from 0 on, got None"),
        ({"good_steps": -1}, "good_steps must be a number from 0 on, got -1"),
        ({"loss_scale": float("nan")}, "loss_scale must be a number from 0 on, got nan"),
    ],
)
def test_load_refuses_a_state_with_damaged_numbers(tmp_path, changes, message):
    make_trainer().snapshot()(tmp_path)
    path = tmp_path / "trainer.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(InputError, match=rf"trainer\.json is damaged: {message}"):
        make_trainer().load(tmp_path)
