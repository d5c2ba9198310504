"""Steps that are not finite: their diagnosis, skipping and stopping, dumps and replays; activation maxima."""

import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from cogview.errors import InputError
from cogview.training import nonfinite
from cogview.training.nonfinite import EARLY_STEPS, NonFiniteError, nonfinite_advice
from cogview.training.replay import replay_dump
from cogview.training.trainer import MonitorSettings, TransformerTrainer
from tests.training.factories import (
    make_trainer,
    new_model,
    open_trainer,
    store_rows,
    train_step,
    training_settings,
)


def overflowing_trainer(**changes) -> TransformerTrainer:
    """Return a trainer whose second layer overflows, by a weight of 1e38."""
    trainer = make_trainer(**changes)
    with torch.no_grad():
        trainer.transformer.layers[1].mlp.input.weight[3] = 1e38
        trainer.transformer.layers[1].mlp_norm.weight.fill_(1e3)
    return trainer


def test_step_stops_before_the_update_when_the_loss_is_not_finite():
    trainer = overflowing_trainer()
    before = {name: tensor.clone() for name, tensor in trainer.transformer.state_dict().items()}
    with pytest.raises(NonFiniteError) as caught:
        train_step(trainer, 3, store_rows())
    assert str(caught.value).startswith(
        "step 3: the loss is not finite, first in layers.1.mlp.input, output (forward; "
    )
    assert str(caught.value).endswith(
        "; that early, the likely cause is the learning rate: start again in an empty run folder with less than "
        f"training.learning_rate {trainer.settings.learning_rate:g}; or go on without such steps: nonfinite: skip"
    )
    for name, tensor in trainer.transformer.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_nonfinite_advice_depends_on_the_step():
    def advice(step):
        return nonfinite_advice(step, learning_rate=1e20, warmup_steps=100)

    assert advice(0).startswith("no weight has changed yet: ")
    assert advice(1) == advice(100)
    assert "start again in an empty run folder with less than training.learning_rate 1e+20" in advice(1)
    assert advice(101) == "lower the learning rate, or resume earlier"
    assert "the likely cause is the learning rate" in nonfinite_advice(EARLY_STEPS, 1e20, warmup_steps=0)


def test_step_names_the_first_weight_that_is_not_finite():
    trainer = make_trainer()
    with torch.no_grad():
        trainer.transformer.layers[0].attention.output.bias[2:4] = torch.nan
    with pytest.raises(NonFiniteError, match=r"first in layers\.0\.attention\.output, bias \(weights; 6\.25% of it"):
        train_step(trainer, 3, store_rows())


def test_step_names_the_first_gradient_that_is_not_finite():
    trainer = make_trainer()

    def overflow(module: torch.nn.Module, inputs: object, output: torch.Tensor) -> None:
        if output.requires_grad:
            output.register_hook(lambda gradient: gradient * torch.inf)

    trainer.transformer.layers[1].register_forward_hook(overflow)
    with pytest.raises(
        NonFiniteError, match=r"step 3: the gradient is not finite, first in layers\.1, gradient of the output"
    ):
        train_step(trainer, 3, store_rows())


def test_step_is_skipped_and_counted_when_not_finite(capsys):
    trainer = overflowing_trainer(nonfinite="skip")
    for number in range(2):
        metrics = train_step(trainer, number, store_rows())
        assert metrics["skipped_steps"] == number + 1
        assert all(map(math.isfinite, metrics.values()))
        assert "loss" not in metrics
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("step 0: the loss is not finite, first in layers.1.mlp.input, output")
    assert second == "step 1: the loss is not finite; skipped"  # only the first is diagnosed
    with torch.no_grad():
        trainer.transformer.layers[1].mlp.input.weight[3] = 0
    metrics = train_step(trainer, 2, store_rows())
    assert metrics["skipped_steps"] == 2
    assert math.isfinite(metrics["loss"])


def test_step_stops_when_too_many_in_a_row_are_skipped(monkeypatch):
    monkeypatch.setattr(nonfinite, "MAX_SKIPPED_IN_A_ROW", 2)
    trainer = overflowing_trainer(nonfinite="skip")
    for number in range(2):
        train_step(trainer, number, store_rows())
    with pytest.raises(
        NonFiniteError, match="step 2: no gradient was finite in the last 3 steps; no weight has changed yet"
    ):
        train_step(trainer, 2, store_rows())


def test_replay_dump_opens_weights_that_are_not_finite(tmp_path):
    """Elsewhere a model with such weights is refused; here they are what is looked for."""
    model = new_model()
    with torch.no_grad():
        model.transformer.final_norm.bias[3] = torch.nan
    trainer = open_trainer(model, training_settings(), monitor=MonitorSettings(dumps=tmp_path), num_threads=1)
    with pytest.raises(NonFiniteError, match=r"first in final_norm, bias \(weights; "):
        train_step(trainer, 17, store_rows())
    _, now = replay_dump(tmp_path / "step-00000017", "cpu")
    assert "first not finite in final_norm, bias (weights; " in now[2]


def test_replay_dump_finds_what_the_run_has_found(tmp_path):
    trainer = open_trainer(
        overflowing_trainer().model, training_settings(), monitor=MonitorSettings(dumps=tmp_path), num_threads=1
    )
    with pytest.raises(NonFiniteError, match="replay the step with: cogview doctor --dump"):
        train_step(trainer, 3, store_rows())
    folder = tmp_path / "step-00000003"
    report = json.loads((folder / "report-0000.json").read_text())
    assert report["step"] == 3
    assert report["found"].startswith("layers.1.mlp.input, output (forward; ")
    with np.load(folder / "rows-0000.npz") as kept:
        assert all(np.array_equal(kept[name], values) for name, values in store_rows().items())
    weights = load_file(folder / "model" / "model.safetensors")
    assert torch.equal(weights["layers.1.mlp.input.weight"][3], torch.full((32,), 1e38))
    kept, now = replay_dump(folder, "cpu")
    assert kept == ("ok", "kept", f"step 3, process 0: {report['found']}")
    assert now == ("problem", "now", f"in float32 on cpu: first not finite in {report['found']}")

    # Dumps of earlier versions name settings differently.
    settings = json.loads((folder / "settings.json").read_text())
    for former, present in (("caption_drop", "caption_dropout"), ("hidden_rows", "full_mask_rate")):
        settings["training"][former] = settings["training"].pop(present)
    (folder / "settings.json").write_text(json.dumps(settings))
    assert list(replay_dump(folder, "cpu")) == [kept, now]

    for path in folder.glob("report-*"):
        path.unlink()
    with pytest.raises(InputError, match="is no dump of a step: expected RUN/nonfinite/step-"):
        list(replay_dump(folder, "cpu"))


def test_step_records_activation_maxima_of_each_layer():
    trainer = open_trainer(new_model(), training_settings(), monitor=MonitorSettings(every=3))
    seen = []
    trainer.transformer.layers[1].register_forward_hook(lambda module, inputs, output: seen.append(output.abs().max()))
    metrics = [train_step(trainer, number, store_rows()) for number in range(3)]
    names = ["activation_max_embedding", "activation_max_layer_00", "activation_max_layer_01"]
    assert not any(name in metrics[1] for name in names)
    assert [name for name in metrics[2] if name.startswith("activation")] == names
    parts = len(seen) // 3
    assert metrics[2]["activation_max_layer_01"] == pytest.approx(max(seen[2 * parts :]).item())


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("settings.json", "{}", r"settings\.json: training, dtype must be given"),
        ("settings.json", "[]", r"settings\.json must be settings with names"),
        ("report-0000.json", "[]", r"report-0000\.json is damaged: step must be a whole number from 0 on"),
        ("report-0000.json", '{"step": 1, "rank": 3, "processes": 2, "seed": 0}', "is damaged: process 3 of 2"),
        ("rows-0000.npz", "", r"rows-0000\.npz is damaged"),
    ],
)
def test_replay_dump_refuses_damaged_files(tmp_path, name, content, message):
    """Damage to a dump was a KeyError or a BadZipFile in `cogview doctor --dump`."""
    trainer = open_trainer(
        overflowing_trainer().model, training_settings(), monitor=MonitorSettings(dumps=tmp_path), num_threads=1
    )
    with pytest.raises(NonFiniteError):
        train_step(trainer, 3, store_rows())
    (tmp_path / "step-00000003" / name).write_text(content)
    with pytest.raises(InputError, match=message):
        list(replay_dump(tmp_path / "step-00000003", "cpu"))
