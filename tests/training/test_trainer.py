"""The trainer of the transformer: exact resumption, losses, gradients of a batch in parts, evaluation."""

# T positions of a row, V ids of a kind

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from cogview.data.store import NO_TOKEN
from cogview.modeling.config import GREEDY
from cogview.training.examples import RowPlan, TrainingBatch
from cogview.training.setup import sheet_writer
from cogview.training.trainer import TransformerTrainer
from tests.training.factories import (
    CODES,
    GRID,
    MIXTURE,
    SINGLE,
    batch_losses,
    make_trainer,
    new_model,
    open_trainer,
    row_plan,
    store_rows,
    train_step,
    training_settings,
    wide_rows,
    write_store,
)


@pytest.mark.slow
def test_trainer_resumes_exactly(tmp_path):
    changes = {"caption_dropout": 0.5, "full_mask_rate": 0.5, "micro_batch_size": 4, "steps": 6, "tasks": MIXTURE}
    whole = make_trainer(new_model(dropout=0.2), **changes)
    metrics = [train_step(whole, step, wide_rows(step)) for step in range(6)]

    first = make_trainer(new_model(dropout=0.2), **changes)
    for step in range(3):
        train_step(first, step, wide_rows(step))
    first.snapshot()(tmp_path)
    torch.rand(5)  # a new process has another state of the generator
    second = make_trainer(new_model(seed=4, dropout=0.2), **changes)
    second.load(tmp_path)
    assert [train_step(second, step, wide_rows(step)) for step in range(3, 6)] == metrics[3:]
    for name, tensor in whole.transformer.state_dict().items():
        assert torch.equal(tensor, second.transformer.state_dict()[name]), name

    without = make_trainer(new_model(dropout=0.0), **changes)
    assert train_step(without, 0, wide_rows(0))["loss"] != metrics[0]["loss"]  # dropout takes part


def test_losses_equal_the_cross_entropy_among_ids_of_the_same_kind(tmp_path):
    trainer = make_trainer()
    trainer.transformer.eval()
    vocabulary = trainer.model.config.vocabulary
    rows = store_rows(size=3)
    image_losses, text_losses = [], []
    for text, image in zip(rows["text"], rows["image"], strict=True):
        pieces = [int(piece) for piece in text if piece != NO_TOKEN]
        command = vocabulary.command
        sequence = [
            command("[ROI1]"),
            *(CODES + piece for piece in pieces),
            *(command("[TINY]"), command("[BOI1]")),
            *map(int, image),
            command("[EOI1]"),
        ]
        with torch.no_grad():
            logits_TV = trainer.transformer(torch.tensor([sequence[:-1]]))[0]
        for index, target in enumerate(sequence[1:]):
            if 0 < index + 1 <= len(pieces):
                log_prob = logits_TV[index, CODES : vocabulary.size].log_softmax(dim=0)[target - CODES]
                text_losses.append(-log_prob.item())
            elif len(pieces) + 3 <= index + 1 < len(pieces) + 3 + GRID**2:
                image_losses.append(-logits_TV[index, :CODES].log_softmax(dim=0)[target].item())
    assert len(image_losses) == 3 * GRID**2
    assert len(text_losses) == (rows["text"] != NO_TOKEN).sum()
    metrics = batch_losses(trainer, rows)
    assert metrics["generate_image_loss"] == pytest.approx(np.mean(image_losses), abs=1e-5)
    assert metrics["generate_text_loss"] == pytest.approx(np.mean(text_losses), abs=1e-5)


@pytest.mark.parametrize("weight", [0.0, 0.1, 2.0])
def test_loss_weighs_the_text_of_a_prompt(weight):
    metrics = train_step(make_trainer(text_loss_weight=weight), 0, store_rows())
    image, text = metrics["generate_image_loss"], metrics["generate_text_loss"]
    assert metrics["loss"] == pytest.approx(image + weight * text)
    assert image == pytest.approx(math.log(CODES), abs=0.2)  # of an untrained model


def gradients(trainer: TransformerTrainer, rows: dict[str, np.ndarray], monkeypatch) -> dict[str, torch.Tensor]:
    """Return the clipped gradients of one step, without the update."""
    monkeypatch.setattr(trainer.engine.optimizer, "step", lambda: None)
    monkeypatch.setattr(trainer.engine.optimizer, "zero_grad", lambda set_to_none: None)
    train_step(trainer, 0, rows)
    return {name: parameter.grad for name, parameter in trainer.transformer.named_parameters()}


@pytest.mark.parametrize("parts", [2, 4])
def test_step_has_the_same_gradient_in_micro_batches(parts, monkeypatch):
    """The rows differ in length and task."""
    rows, changes = (
        wide_rows(),
        {"tasks": MIXTURE, "caption_dropout": 0.3, "full_mask_rate": 0.5, "full_mask_targets": 9},
    )
    whole = gradients(make_trainer(**changes), rows, monkeypatch)
    in_parts = gradients(make_trainer(micro_batch_size=16 // parts, **changes), rows, monkeypatch)
    assert max(gradient.abs().max() for gradient in whole.values()) > 1e-3
    for name, gradient in whole.items():
        torch.testing.assert_close(in_parts[name], gradient, atol=1e-6, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("threads", [2, 3, 20])
def test_step_has_the_same_gradient_with_threads(threads, monkeypatch):
    rows, changes = (
        wide_rows(),
        {"tasks": MIXTURE, "caption_dropout": 0.3, "full_mask_rate": 0.5, "micro_batch_size": 4},
    )

    def trainer(num_threads: int) -> TransformerTrainer:
        return open_trainer(new_model(), training_settings(**changes), num_threads=num_threads)

    alone = gradients(trainer(1), rows, monkeypatch)
    for name, gradient in gradients(trainer(threads), rows, monkeypatch).items():
        torch.testing.assert_close(alone[name], gradient, atol=1e-6, rtol=1e-4)

    first, second = trainer(threads), trainer(threads)
    for step in range(3):
        assert train_step(first, step, wide_rows(step)) == train_step(second, step, wide_rows(step))
    for name, tensor in first.transformer.state_dict().items():
        assert torch.equal(tensor, second.transformer.state_dict()[name]), name


@pytest.mark.slow
def test_trainer_memorizes_eight_rows():
    trainer = make_trainer(steps=100, learning_rate=1e-2, warmup_steps=10)
    first = train_step(trainer, 0, store_rows())
    for step in range(1, 100):
        last = train_step(trainer, step, store_rows())
    for name in ("generate_image_loss", "generate_text_loss"):
        assert last[name] < 0.25 * first[name]


def test_losses_do_not_depend_on_masked_codes():
    """With every code masked, the loss of a code depends on text and position, not on the codes before it."""
    trainer, rows = make_trainer(), store_rows()
    changed = {**rows, "image": rows["image"].copy()}
    changed["image"][:, 0] = (changed["image"][:, 0] + 1) % CODES  # a target too; the others are compared

    def loss_of_the_rest(content: dict[str, np.ndarray], *, mask_all: bool) -> float:
        examples = trainer.builder.build(content, row_plan(mask_all=mask_all))
        for example in examples:
            example.trained[-(GRID**2)] = False
        empty = TrainingBatch.of(0, content, np.empty((8, 3)), trainer.builder.keys)
        return trainer.losses(trainer.builder.split_into_micro_batches(empty, examples))["generate_image_loss"]

    trainer.transformer.eval()
    masked = [loss_of_the_rest(content, mask_all=True) for content in (rows, changed)]
    seen = [loss_of_the_rest(content, mask_all=False) for content in (rows, changed)]
    assert masked[0] == masked[1]
    assert seen[0] != seen[1]
    assert masked[0] != seen[0]


@pytest.mark.parametrize("task", ["generate", "caption"])
def test_losses_add_names_when_the_store_has_them(task):
    trainer = make_trainer(name_loss_weight=0.25, tasks={task: 1.0})
    trainer.transformer.eval()
    rows = store_rows(size=3)
    assert batch_losses(trainer, rows, row_plan(3, task=task)) == batch_losses(
        make_trainer(tasks={task: 1.0}), rows, row_plan(3, task=task)
    )  # there are no names yet
    named = np.full((3, GRID**2), NO_TOKEN, dtype=np.uint16)
    named[0, :10], named[1, 30:] = 7, 9
    named[2] = 3  # a row whose caption is dropped
    rows["named"] = named
    unweighted = batch_losses(make_trainer(tasks={task: 1.0}), rows, row_plan(3, task=task))
    assert unweighted == batch_losses(
        make_trainer(tasks={task: 1.0}), store_rows(size=3), row_plan(3, task=task)
    )  # without a weight they are no targets

    plan = row_plan(3, task=task, keep_caption=np.array([True, True, False]))
    metrics = batch_losses(trainer, rows, plan)
    name_losses, vocabulary = [], trainer.model.config.vocabulary
    for index, example in enumerate(trainer.builder.build(rows, plan)):
        with torch.no_grad():
            logits_TV = trainer.transformer(
                torch.from_numpy(example.inputs)[None], torch.from_numpy(example.positions)[None]
            )[0]
        # Generation predicts the name with the code, captioning after the code.
        image = np.flatnonzero((example.inputs if task == "caption" else example.targets) < CODES)
        for position, name in zip(image, named[index].tolist(), strict=True):
            if name != NO_TOKEN and plan.keep_caption[index]:
                candidates = logits_TV[position, vocabulary.text.start : vocabulary.text.stop]
                name_losses.append(-candidates.log_softmax(dim=0)[name].item())
    assert len(name_losses) == 10 + 34
    assert metrics[f"{task}_name_loss"] == pytest.approx(np.mean(name_losses), abs=1e-5)
    without = batch_losses(make_trainer(tasks={task: 1.0}), rows, plan)
    assert metrics["loss"] == pytest.approx(without["loss"] + 0.25 * np.mean(name_losses), abs=1e-5)


def test_loss_weighs_a_task_by_its_share_of_the_rows():
    trainer, rows = make_trainer(tasks=MIXTURE, text_loss_weight=0.25), wide_rows()
    trainer.transformer.eval()
    plan = trainer.builder.plan_rows(5, 16, 64)
    assert set(plan.tasks) == set(MIXTURE)
    metrics = batch_losses(trainer, rows, plan)
    expected = 0.0
    for task in MIXTURE:
        members = [index for index, other in enumerate(plan.tasks) if other == task]
        members_rows = {name: values[members] for name, values in rows.items()}
        part = RowPlan(
            tasks=[task] * len(members),
            keep_caption=plan.keep_caption[members],
            mask_codes=plan.mask_codes[members],
            num_targets=plan.num_targets[members],
            target_priority=plan.target_priority[members],
            window=plan.window[members],
            unknown_source=plan.unknown_source[members],
            pivot_keys=plan.pivot_keys[members],
        )
        alone = batch_losses(trainer, members_rows, part)  # without the padding of longer tasks
        for name, value in alone.items():
            if name != "loss":
                assert metrics[name] == pytest.approx(value, abs=1e-5)
        expected += len(members) / 16 * alone["loss"]
    assert metrics["loss"] == pytest.approx(expected, abs=1e-5)
    assert set(metrics) == {
        *("loss", "generate_image_loss", "generate_text_loss", "caption_text_loss", "upscale_image_loss"),
        "low_level_image_loss",
    }


def test_evaluate_returns_validation_losses_and_writes_a_sheet(tmp_path):
    store = write_store(tmp_path / "store", 16)
    sheets = []
    trainer = open_trainer(
        new_model(dropout=0.5),
        training_settings(caption_dropout=0.9),
        validation_store=store,
        draw_sheet=lambda model, path: sheets.append((model, path)),
    )
    train_step(trainer, 0, store_rows())  # leaves the model in training mode, with dropout
    metrics = trainer.evaluate(7, tmp_path)
    assert metrics == trainer.evaluate(7, tmp_path)
    halves = [batch_losses(trainer, store.read(range(first, first + 8))) for first in (0, 8)]
    assert metrics == {
        f"validation_{name}": pytest.approx(sum(half[name] for half in halves) / 2)
        for name in ("loss", "generate_image_loss", "generate_text_loss")
    }
    assert sheets == [(trainer.model, tmp_path / "step-00000007.png")] * 2


def test_sheet_writer_notes_no_repeated_images(tmp_path, caplog):
    """A new model repeats itself, and each sheet of a training came with the advice to sample at higher temperature."""
    model = new_model()
    model = replace(model, config=replace(model.config, sampling=GREEDY))
    sheet_writer(write_store(tmp_path / "store", 12), SINGLE)(model, tmp_path / "sheet.png")
    captions = (tmp_path / "sheet.txt").read_text(encoding="utf-8").splitlines()
    assert len(set(captions)) < len(captions) == 12
    assert caplog.text == ""
