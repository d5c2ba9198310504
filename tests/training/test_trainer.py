"""Training the transformer: exact resuming, losses by hand, accumulation, left-out captions, the order of rows."""

# B rows, T places of a row, V ids of a kind

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from cogview.checkpoints.checkpoint import Model
from cogview.checkpoints.image_tokenizer import codebook_hash
from cogview.data.mixture import MixedStore, Mixture
from cogview.data.phases import Phase
from cogview.data.sampling_order import sample_index
from cogview.data.store import NO_TOKEN, StoreHeader, TokenStore
from cogview.data.store_writer import StoreWriter, pad_text
from cogview.errors import InputError
from cogview.modeling.config import ModelConfig
from cogview.tokenizers.text import TextTokenizer
from cogview.training import nonfinite
from cogview.training.data_loader import StepDataset, TrainingDataLoader, TrainingStores
from cogview.training.distributed import DistributedContext
from cogview.training.engines import open_engine
from cogview.training.engines.base import TransformerWithLoss
from cogview.training.example_builder import ExampleBuilder, _select_targets
from cogview.training.examples import RowPlan, TrainingBatch
from cogview.training.nonfinite import NonFiniteError
from cogview.training.replay import replay_dump
from cogview.training.settings import EngineSettings, TransformerTraining
from cogview.training.trainer import MonitorSettings, TransformerTrainer
from cogview.vqvae.model import VQVAEConfig
from tests.factories import tiny_model, tiny_text_tokenizer

ALONE = DistributedContext(torch.device("cpu"))
CODES, GRID = 32, 8
CAPTIONS = ("一个红苹果", "蓝色背景上的三只狐狸", "汽车的左边是一条鱼", "打开的书上面有两只狗")


def text_tokenizer() -> TextTokenizer:
    return tiny_text_tokenizer(CAPTIONS, 400, coverage=1.0)


def new_model(seed: int = 0, dropout: float = 0.0) -> Model:
    """Return a tiny model; models of every seed share the image tokenizer."""
    vqvae = VQVAEConfig(channels=(4, 4, 8), encoder_blocks=(0, 0, 0), num_codes=CODES, code_width=4)
    shape = {"max_positions": 100, "dropout": dropout}
    return tiny_model(text_tokenizer(), vqvae=vqvae, shape=shape, seed=seed, vqvae_seed=1, max_text=30)


def settings(**changes) -> TransformerTraining:
    return TransformerTraining(**{"steps": 100, "batch_size": 8, "warmup_steps": 2, "caption_dropout": 0.0, **changes})


def trainer(model: Model | None = None, **changes) -> TransformerTrainer:
    return open_trainer(model or new_model(), settings(**changes))


def open_trainer(
    model: Model,
    chosen: TransformerTraining,
    dtype: torch.dtype | None = None,
    *,
    engine: EngineSettings | None = None,
    num_threads: int | None = None,
    **changes,
) -> TransformerTrainer:
    network = TransformerWithLoss(model.transformer, dtype)
    opened = open_engine(network, chosen, engine or EngineSettings(), ALONE, num_threads)
    return TransformerTrainer(model, chosen, opened, **changes)


def take(subject: TransformerTrainer, number: int, given: dict[str, np.ndarray]) -> dict[str, float]:
    """One step on rows as a store gives them; without how many tokens that were."""
    figures = subject.step(number, subject.batch(number, given))
    assert figures.pop("tokens") > 0
    return figures


def rows(step: int = 0, size: int = 8, *, equal: bool = False) -> dict[str, np.ndarray]:
    """Rows as a store gives them, a function of the step; with ``equal`` all texts are as long."""
    random = np.random.default_rng(step)
    texts = [text_tokenizer().encode(CAPTIONS[0 if equal else i]) for i in random.integers(len(CAPTIONS), size=size)]
    return {
        "text": pad_text(texts, 20),
        "image": random.integers(CODES, size=(size, GRID**2)).astype(np.uint16),
    }


def plan(count: int = 8, *, task: str = "generate", keep: bool | np.ndarray = True, hide: bool = False) -> RowPlan:
    """Every row for one task, every code hidden or none; windows in their order."""
    return RowPlan(
        tasks=[task] * count,
        keep_caption=np.broadcast_to(keep, count),
        mask_codes=np.full((count, GRID**2), hide),
        num_targets=np.full(count, GRID**2),
        target_priority=np.ones((count, GRID**2)),
        window=np.arange(count) % 9,
    )


def only(places: Sequence[int]) -> np.ndarray:
    """Lots by which these places of each of three rows are asked first."""
    lots = np.ones((3, GRID**2))
    lots[:, list(places)] = 1e-3
    return lots


def losses(
    subject: TransformerTrainer, given: dict[str, np.ndarray], choices: RowPlan | None = None
) -> dict[str, float]:
    batch = subject.builder.build_batch(0, given, choices or plan(len(given["image"])))
    figures = subject.losses(batch)
    assert figures.pop("tokens") == batch.num_tokens
    return figures


def test_steps_equal_half_of_them_and_the_rest_after_a_restart(tmp_path):
    changes = {"caption_dropout": 0.5, "full_mask_rate": 0.5, "micro_batch_size": 4, "steps": 6, "tasks": MIXTURE}
    whole = trainer(new_model(dropout=0.2), **changes)
    figures = [take(whole, step, wide_rows(step)) for step in range(6)]

    first = trainer(new_model(dropout=0.2), **changes)
    for step in range(3):
        take(first, step, wide_rows(step))
    first.snapshot()(tmp_path)
    torch.rand(5)  # a process that starts anew has another state
    second = trainer(new_model(seed=4, dropout=0.2), **changes)
    second.load(tmp_path)
    assert [take(second, step, wide_rows(step)) for step in range(3, 6)] == figures[3:]
    for name, tensor in whole.transformer.state_dict().items():
        assert torch.equal(tensor, second.transformer.state_dict()[name]), name

    without = trainer(new_model(dropout=0.0), **changes)
    assert take(without, 0, wide_rows(0))["loss"] != figures[0]["loss"]  # dropout did take part


def test_losses_are_the_cross_entropy_of_each_kind_of_id_among_its_own(tmp_path):
    subject = trainer()
    subject.transformer.eval()
    vocabulary = subject.model.config.vocabulary
    given = rows(size=3)
    image_losses, text_losses = [], []
    for text, image in zip(given["text"], given["image"], strict=True):
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
            logits_TV = subject.transformer(torch.tensor([sequence[:-1]]))[0]
        for place, target in enumerate(sequence[1:]):
            if 0 < place + 1 <= len(pieces):
                wanted = logits_TV[place, CODES : vocabulary.size].log_softmax(dim=0)[target - CODES]
                text_losses.append(-wanted.item())
            elif len(pieces) + 3 <= place + 1 < len(pieces) + 3 + GRID**2:
                image_losses.append(-logits_TV[place, :CODES].log_softmax(dim=0)[target].item())
    assert len(image_losses) == 3 * GRID**2
    assert len(text_losses) == (given["text"] != NO_TOKEN).sum()
    figures = losses(subject, given)
    assert figures["generate_image_loss"] == pytest.approx(np.mean(image_losses), abs=1e-5)
    assert figures["generate_text_loss"] == pytest.approx(np.mean(text_losses), abs=1e-5)


@pytest.mark.parametrize("weight", [0.0, 0.1, 2.0])
def test_the_loss_is_that_of_the_image_and_a_share_of_that_of_the_text(weight):
    figures = take(trainer(text_loss_weight=weight), 0, rows())
    image, text = figures["generate_image_loss"], figures["generate_text_loss"]
    assert figures["loss"] == pytest.approx(image + weight * text)
    assert image == pytest.approx(math.log(CODES), abs=0.2)  # nothing is learnt yet


def gradients(subject: TransformerTrainer, given: dict[str, np.ndarray], monkeypatch) -> dict[str, torch.Tensor]:
    """What one step would update with, before it does."""
    monkeypatch.setattr(subject.engine.optimizer, "step", lambda: None)
    monkeypatch.setattr(subject.engine.optimizer, "zero_grad", lambda set_to_none: None)
    take(subject, 0, given)
    return {name: parameter.grad for name, parameter in subject.transformer.named_parameters()}


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulation_gives_the_gradient_of_the_whole_batch(parts, monkeypatch):
    """Whatever the lengths and tasks of its rows."""
    given, changes = (
        wide_rows(),
        {"tasks": MIXTURE, "caption_dropout": 0.3, "full_mask_rate": 0.5, "full_mask_targets": 9},
    )
    whole = gradients(trainer(**changes), given, monkeypatch)
    in_parts = gradients(trainer(micro_batch_size=16 // parts, **changes), given, monkeypatch)
    assert max(gradient.abs().max() for gradient in whole.values()) > 1e-3
    for name, gradient in whole.items():
        torch.testing.assert_close(in_parts[name], gradient, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("threads", [2, 3, 20])
def test_threads_share_the_rows_of_a_step(threads, monkeypatch):
    given, changes = (
        wide_rows(),
        {"tasks": MIXTURE, "caption_dropout": 0.3, "full_mask_rate": 0.5, "micro_batch_size": 4},
    )

    def subject(num_threads: int) -> TransformerTrainer:
        return open_trainer(new_model(), settings(**changes), num_threads=num_threads)

    alone = gradients(subject(1), given, monkeypatch)
    for name, gradient in gradients(subject(threads), given, monkeypatch).items():
        torch.testing.assert_close(alone[name], gradient, atol=1e-6, rtol=1e-4)

    first, second = subject(threads), subject(threads)
    for step in range(3):
        assert take(first, step, wide_rows(step)) == take(second, step, wide_rows(step))
    for name, tensor in first.transformer.state_dict().items():
        assert torch.equal(tensor, second.transformer.state_dict()[name]), name


def test_training_memorises_eight_rows():
    subject = trainer(steps=100, learning_rate=1e-2, warmup_steps=10)
    first = take(subject, 0, rows())
    for step in range(1, 100):
        last = take(subject, step, rows())
    for name in ("generate_image_loss", "generate_text_loss"):
        assert last[name] < 0.25 * first[name]


def test_a_caption_that_is_left_out_is_an_empty_text():
    subject, given = trainer(caption_dropout=1.0), rows(size=2)
    first, second = subject.builder.build(given, plan(2, keep=np.array([False, True])))
    command = subject.model.config.vocabulary.command
    bare = [command("[ROI1]"), command("[TINY]"), command("[BOI1]"), *given["image"][0].tolist()]
    assert first.inputs.tolist() == bare[:-1]
    assert first.targets.tolist() == bare[1:]
    assert len(second) == len(bare) - 1 + (given["text"][1] != NO_TOKEN).sum()

    figures = take(subject, 0, given)  # drops both
    assert "generate_text_loss" not in figures
    assert figures["loss"] == pytest.approx(figures["generate_image_loss"])
    assert figures["loss"] > 0


def test_left_out_captions_are_a_share_that_seed_and_step_decide():
    subject, other = trainer(caption_dropout=0.25), trainer(caption_dropout=0.25, seed=1)
    kept = [subject.builder.plan_rows(step, 400, 64).keep_caption for step in (0, 1, 0)] + [
        other.builder.plan_rows(0, 400, 64).keep_caption
    ]
    assert all(0.18 < 1 - keep.mean() < 0.32 for keep in kept)
    assert (kept[0] == kept[2]).all()
    assert (kept[0] != kept[1]).any()
    assert (kept[0] != kept[3]).any()


def test_hidden_codes_are_a_share_that_seed_and_step_decide():
    """Rows of one share hide every code, those of another some of them; captions left out hide none."""
    subject = trainer(full_mask_rate=0.3, partial_mask_rate=0.2, full_mask_targets=5, caption_dropout=0.2)
    choices, again = subject.builder.plan_rows(3, 4000, 64), subject.builder.plan_rows(3, 4000, 64)
    for name in ("keep_caption", "mask_codes", "num_targets", "target_priority"):
        assert (getattr(again, name) == getattr(choices, name)).all()
        assert (getattr(subject.builder.plan_rows(4, 4000, 64), name) != getattr(choices, name)).any()
    share = choices.mask_codes.mean(axis=1)
    assert not choices.mask_codes[~choices.keep_caption].any()
    asked = choices.num_targets
    assert (asked[choices.keep_caption] == 5).mean() == pytest.approx(0.3, abs=0.03)
    some = (share > 0) & (asked == 64)
    assert some[choices.keep_caption].mean() == pytest.approx(0.2, abs=0.03)
    assert share[some].mean() == pytest.approx(0.5, abs=0.05)
    assert set(asked.tolist()) == {5, 64}
    assert (share[asked == 5] == 1).all()
    assert not trainer(caption_dropout=0.2).builder.plan_rows(3, 4000, 64).mask_codes.any()


def test_a_hidden_code_is_told_as_well_without_its_neighbours():
    """Rows that leave out places ask for the same codes at the same positions as rows that do not."""
    subject, given = trainer(), rows(size=3)
    whole = plan(3, hide=True)
    few = replace(whole, num_targets=np.full(3, 4), target_priority=only([0, 7, 8, 63]))
    mask = subject.model.config.vocabulary.command("[MASK]")
    for long, short, image in zip(
        subject.builder.build(given, whole), subject.builder.build(given, few), given["image"], strict=True
    ):
        start = len(long) - 63  # the place that tells the first code
        kept = [*range(start), *(start - 1 + place for place in (7, 8, 63))]
        for name in ("inputs", "positions", "targets", "kinds", "trained"):
            assert getattr(short, name).tolist() == getattr(long, name)[kept].tolist()
        assert short.targets[-4:].tolist() == image[[0, 7, 8, 63]].tolist()
        assert short.inputs[-3:].tolist() == [mask] * 3


def test_places_of_a_plain_background_are_asked_less_often():
    """Sixty places hold one code, four another each: the first to be asked for is each of the five equally often."""
    random, codes = np.random.default_rng(0), np.full(64, 8)
    codes[[3, 20, 41, 63]] = [1, 2, 3, 4]
    first = [int(codes[_select_targets(codes, random.exponential(size=64), 1)].item()) for _ in range(4000)]
    assert sorted(set(first)) == [1, 2, 3, 4, 8]
    assert all(first.count(code) / 4000 == pytest.approx(0.2, abs=0.03) for code in set(first))
    places = np.array([_select_targets(codes, random.exponential(size=64), 10) for _ in range(4000)])
    assert (places.sum(axis=1) == 10).all()
    background = places.mean(axis=0)[codes == 8]
    assert background.max() - background.min() < 0.05  # every place of it has its turn
    assert _select_targets(codes, random.exponential(size=64), 64).all()


def test_a_hidden_code_is_learnt_but_not_seen():
    """With every code hidden, the loss at a place follows from text and place: other codes before it change nothing."""
    subject, given = trainer(), rows()
    changed = {**given, "image": given["image"].copy()}
    changed["image"][:, 0] = (changed["image"][:, 0] + 1) % CODES  # the first code is also a target: compare the others

    def loss_of_the_rest(content: dict[str, np.ndarray], *, hide: bool) -> float:
        lessons = subject.builder.build(content, plan(hide=hide))
        for lesson in lessons:
            lesson.trained[-(GRID**2)] = False
        empty = TrainingBatch.of(0, content, np.empty((8, 3)), subject.builder.keys)
        return subject.losses(subject.builder.split_into_micro_batches(empty, lessons))["generate_image_loss"]

    subject.transformer.eval()
    hidden = [loss_of_the_rest(content, hide=True) for content in (given, changed)]
    seen = [loss_of_the_rest(content, hide=False) for content in (given, changed)]
    assert hidden[0] == hidden[1]
    assert seen[0] != seen[1]
    assert hidden[0] != seen[0]


# A mixture of tasks


MIXTURE = {"generate": 2.0, "caption": 1.0, "upscale": 1.0, "low_level": 1.0}


@pytest.mark.parametrize("task", ["generate", "caption"])
def test_the_name_of_the_thing_at_a_code_is_told_where_the_store_has_it(task):
    subject = trainer(name_loss_weight=0.25, tasks={task: 1.0})
    subject.transformer.eval()
    given = rows(size=3)
    assert losses(subject, given, plan(3, task=task)) == losses(
        trainer(tasks={task: 1.0}), given, plan(3, task=task)
    )  # there are no names yet
    named = np.full((3, GRID**2), NO_TOKEN, dtype=np.uint16)
    named[0, :10], named[1, 30:] = 7, 9
    named[2] = 3  # a row whose caption is left out
    given["named"] = named
    unasked = losses(trainer(tasks={task: 1.0}), given, plan(3, task=task))
    assert unasked == losses(trainer(tasks={task: 1.0}), rows(size=3), plan(3, task=task))  # nor are they asked for

    choices = plan(3, task=task, keep=np.array([True, True, False]))
    figures = losses(subject, given, choices)
    told, vocabulary = [], subject.model.config.vocabulary
    for index, lesson in enumerate(subject.builder.build(given, choices)):
        with torch.no_grad():
            logits_TV = subject.transformer(
                torch.from_numpy(lesson.inputs)[None], torch.from_numpy(lesson.positions)[None]
            )[0]
        # A drawing tells the name with the code, a description once it has seen the code.
        image = np.flatnonzero((lesson.inputs if task == "caption" else lesson.targets) < CODES)
        for place, name in zip(image, named[index].tolist(), strict=True):
            if name != NO_TOKEN and choices.keep_caption[index]:
                among = logits_TV[place, vocabulary.text.start : vocabulary.text.stop]
                told.append(-among.log_softmax(dim=0)[name].item())
    assert len(told) == 10 + 34
    assert figures[f"{task}_name_loss"] == pytest.approx(np.mean(told), abs=1e-5)
    without = losses(trainer(tasks={task: 1.0}), given, choices)
    assert figures["loss"] == pytest.approx(without["loss"] + 0.25 * np.mean(told), abs=1e-5)


def test_names_are_told_at_the_places_that_are_asked_alone():
    subject, given = trainer(name_loss_weight=0.25), rows(size=3)
    given["named"] = np.full((3, GRID**2), NO_TOKEN, dtype=np.uint16)
    given["named"][0, :10], given["named"][1, 30:], given["named"][2] = 7, 9, 3
    asked = replace(plan(3, hide=True), num_targets=np.full(3, 22), target_priority=only(range(0, GRID**2, 3)))
    for lesson, expected in zip(subject.builder.build(given, asked), (4, 12, 22), strict=True):
        assert (lesson.names >= 0).sum() == expected


def wide_rows(step: int = 0, size: int = 16) -> dict[str, np.ndarray]:
    """Rows with codes at twice and at half the side as well."""
    random = np.random.default_rng([step, 1])
    extra = {
        name: random.integers(CODES, size=(size, count)).astype(np.uint16)
        for name, count in (("large", 4 * GRID**2), ("small", GRID**2 // 4))
    }
    return {**rows(step, size), **extra}


def test_the_tasks_of_a_step_are_shares_that_seed_and_step_decide():
    subject = trainer(tasks=MIXTURE, caption_dropout=0.5, full_mask_rate=1.0)
    choices = subject.builder.plan_rows(3, 5000, 64)
    tasks = np.array(choices.tasks)
    for task, share in MIXTURE.items():
        assert (tasks == task).mean() == pytest.approx(share / 5, abs=0.03)
    assert choices.keep_caption[tasks == "caption"].all()  # there is nothing to leave out
    assert choices.keep_caption[tasks == "upscale"].mean() == pytest.approx(0.5, abs=0.06)
    assert not choices.mask_codes[tasks == "caption"].any()
    assert choices.mask_codes[(tasks != "caption") & choices.keep_caption].all()
    assert set(choices.window.tolist()) == set(range(9))
    again = subject.builder.plan_rows(3, 5000, 64)
    assert again.tasks == choices.tasks
    assert (again.window == choices.window).all()
    assert subject.builder.plan_rows(4, 5000, 64).tasks != choices.tasks


def test_a_row_of_each_task():
    """Sequences written out by hand; ids of codes are the codes, of pieces the pieces + CODES."""
    subject, given = trainer(tasks=MIXTURE), wide_rows(size=9)
    command = subject.model.config.vocabulary.command
    for index in range(9):
        text = [CODES + int(piece) for piece in given["text"][index] if piece != NO_TOKEN]
        image, large = given["image"][index].reshape(8, 8), given["large"][index].reshape(16, 16)

        lesson = subject.builder.build(given, plan(9, task="caption"))[index]
        before = [command("[TINY]"), command("[BOI1]"), *image.flat, command("[EOI1]"), command("[ROI1]")]
        sequence = [*before, *text, command("[SEP]")]
        assert lesson.inputs.tolist() == sequence[:-1]
        assert lesson.targets.tolist() == sequence[1:]
        assert lesson.positions.tolist() == list(range(len(sequence) - 1))
        assert lesson.trained.tolist() == [False] * (len(before) - 1) + [True] * (len(text) + 1)

        # Window ``index`` of the released order, and the crop that it covers.
        row, column = [(0, 0), (0, 1), (0, 2), (1, 1), (1, 0), (1, 2), (2, 0), (2, 1), (2, 2)][index]
        crop = image[2 * row : 2 * row + 4, 2 * column : 2 * column + 4]
        window = large[4 * row : 4 * row + 8, 4 * column : 4 * column + 8]
        small = given["small"][index].reshape(4, 4)
        for task, condition, target in (("upscale", crop, window), ("low_level", small, image)):
            lesson = subject.builder.build(given, plan(9, task=task))[index]
            first = [command("[ROI1]"), *text, command("[TINY]"), command("[BOI1]"), *condition.flat, command("[EOI1]")]
            start = [command(name) for name in ("[ROI2]", "[POS0]", "[TINY]", "[BOI2]")]
            sequence = [*first, *start, *target.flat]
            assert lesson.inputs.tolist() == sequence[:-1]
            assert lesson.targets.tolist() == sequence[1:]
            assert lesson.positions.tolist() == [*range(len(first)), *range(4 + 63)]
            assert lesson.targets[lesson.trained].tolist() == target.reshape(-1).tolist()

            hidden = subject.builder.build(given, plan(9, task=task, hide=True))[index]  # but for the small picture
            assert hidden.inputs.tolist() == [*first, *start, *[command("[MASK]")] * 63]
            assert hidden.targets.tolist() == sequence[1:]


def test_a_task_counts_as_its_share_of_the_rows():
    subject, given = trainer(tasks=MIXTURE, text_loss_weight=0.25), wide_rows()
    subject.transformer.eval()
    choices = subject.builder.plan_rows(5, 16, 64)
    assert set(choices.tasks) == set(MIXTURE)
    figures = losses(subject, given, choices)
    expected = 0.0
    for task in MIXTURE:
        members = [index for index, other in enumerate(choices.tasks) if other == task]
        own = {name: values[members] for name, values in given.items()}
        part = RowPlan(
            tasks=[task] * len(members),
            keep_caption=choices.keep_caption[members],
            mask_codes=choices.mask_codes[members],
            num_targets=choices.num_targets[members],
            target_priority=choices.target_priority[members],
            window=choices.window[members],
        )
        alone = losses(subject, own, part)  # rows of one task, without the padding that longer ones ask for
        for name, value in alone.items():
            if name != "loss":
                assert figures[name] == pytest.approx(value, abs=1e-5)
        expected += len(members) / 16 * alone["loss"]
    assert figures["loss"] == pytest.approx(expected, abs=1e-5)
    assert set(figures) == {
        *("loss", "generate_image_loss", "generate_text_loss", "caption_text_loss", "upscale_image_loss"),
        "low_level_image_loss",
    }


def test_the_learning_rate_rises_then_falls_to_its_end():
    chosen = settings(steps=20, warmup_steps=4, learning_rate=1e-2, final_learning_rate=1e-4)
    rates = [chosen.learning_rate_at(step) for step in range(21)]
    assert rates[0] == pytest.approx(1e-2 / 4)
    assert rates[3] == rates[4] == pytest.approx(1e-2)
    assert rates[12] == pytest.approx((1e-2 + 1e-4) / 2)
    assert rates[20] == pytest.approx(1e-4)
    subject = open_trainer(new_model(), chosen)
    assert take(subject, 1, rows())["learning_rate"] == rates[1]
    assert {group["lr"] for group in subject.engine.optimizer.param_groups} == {rates[1]}


def test_biases_and_norms_do_not_decay():
    decays = {
        group["weight_decay"]: group["params"] for group in trainer(weight_decay=0.3).engine.optimizer.param_groups
    }
    assert {parameter.dim() for parameter in decays[0.3]} == {2}
    assert {parameter.dim() for parameter in decays[0.0]} == {1}
    assert sum(map(len, decays.values())) == len(list(new_model().transformer.parameters()))


# What is not finite


def spoilt(**changes) -> TransformerTrainer:
    """Whose second layer overflows: a weight of 1e38 there meets another."""
    subject = trainer(**changes)
    with torch.no_grad():
        subject.transformer.layers[1].mlp.input.weight[3] = 1e38
        subject.transformer.layers[1].mlp_norm.weight.fill_(1e3)
    return subject


def test_a_loss_that_is_not_finite_stops_the_run_with_the_weights_as_they_were():
    subject = spoilt()
    before = {name: tensor.clone() for name, tensor in subject.transformer.state_dict().items()}
    with pytest.raises(NonFiniteError) as caught:
        take(subject, 3, rows())
    assert str(caught.value).startswith(
        "step 3: the loss is not finite, first in layers.1.mlp.input, output (forward; "
    )
    assert str(caught.value).endswith(
        "; lower the learning rate, resume earlier, or go on without such steps: nonfinite: skip"
    )
    for name, tensor in subject.transformer.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_the_first_weight_that_is_not_finite_is_named():
    subject = trainer()
    with torch.no_grad():
        subject.transformer.layers[0].attention.output.bias[2:4] = torch.nan
    with pytest.raises(NonFiniteError, match=r"first in layers\.0\.attention\.output, bias \(weights; 6\.25% of it"):
        take(subject, 3, rows())


def test_a_gradient_that_is_not_finite_is_found_on_the_way_back():
    subject = trainer()

    def overflow(module: torch.nn.Module, given: object, output: torch.Tensor) -> None:
        if output.requires_grad:
            output.register_hook(lambda gradient: gradient * torch.inf)

    subject.transformer.layers[1].register_forward_hook(overflow)
    with pytest.raises(
        NonFiniteError, match=r"step 3: the gradient is not finite, first in layers\.1, gradient of the output"
    ):
        take(subject, 3, rows())


def test_steps_that_are_not_finite_are_left_out_and_counted(capsys):
    subject = spoilt(nonfinite="skip")
    for number in range(2):
        figures = take(subject, number, rows())
        assert figures["skipped_steps"] == number + 1
        assert all(map(math.isfinite, figures.values()))
        assert "loss" not in figures
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("step 0: the loss is not finite, first in layers.1.mlp.input, output")
    assert second == "step 1: the loss is not finite; skipped"  # looked into once
    with torch.no_grad():
        subject.transformer.layers[1].mlp.input.weight[3] = 0
    figures = take(subject, 2, rows())
    assert figures["skipped_steps"] == 2
    assert math.isfinite(figures["loss"])


def test_a_run_of_steps_that_are_not_finite_ends(monkeypatch):
    monkeypatch.setattr(nonfinite, "MAX_SKIPPED_IN_A_ROW", 2)
    subject = spoilt(nonfinite="skip")
    for number in range(2):
        take(subject, number, rows())
    with pytest.raises(
        NonFiniteError, match="step 2: no gradient was finite in the last 3 steps; lower the learning rate"
    ):
        take(subject, 2, rows())


def test_what_is_needed_to_see_it_again_is_kept(tmp_path):
    subject = open_trainer(spoilt().model, settings(), monitor=MonitorSettings(dumps=tmp_path), num_threads=1)
    with pytest.raises(NonFiniteError, match="look again with: cogview doctor --dump"):
        take(subject, 3, rows())
    folder = tmp_path / "step-00000003"
    report = json.loads((folder / "report-0000.json").read_text())
    assert report["step"] == 3
    assert report["found"].startswith("layers.1.mlp.input, output (forward; ")
    with np.load(folder / "rows-0000.npz") as kept:
        assert all(np.array_equal(kept[name], values) for name, values in rows().items())
    weights = load_file(folder / "model" / "model.safetensors")
    assert torch.equal(weights["layers.1.mlp.input.weight"][3], torch.full((32,), 1e38))
    kept, now = replay_dump(folder, "cpu")
    assert kept == ("ok", "kept", f"step 3, process 0: {report['found']}")
    assert now == ("problem", "now", f"in float32 on cpu: first not finite in {report['found']}")
    for path in folder.glob("report-*"):
        path.unlink()
    with pytest.raises(InputError, match="is no dump of a step: expected RUN/nonfinite/step-"):
        list(replay_dump(folder, "cpu"))


def test_float16_scales_the_loss_and_leaves_out_what_overflows():
    """A loss scale that overflows halves until it does not; what is learnt then is what float32 learns."""
    halved, exact = open_trainer(new_model(), settings(), torch.float16, num_threads=1), trainer()
    halved.engine.load_state(replace(halved.engine.export_state(), loss_scale=2.0**40))
    scales, skipped = [], []
    for number in range(40):
        figures = take(halved, number, rows())
        scales.append(figures["loss_scale"])
        skipped.append(figures.get("skipped_steps", 0))
        if skipped[-1] != len(skipped):
            break
    first = int(skipped[-1])
    assert 5 < first < 40
    assert scales == [2.0 ** (40 - number) for number in range(first + 1)]
    for number in range(first, first + 3):
        expected = take(exact, number, rows())
        if number > first:
            figures = take(halved, number, rows())
        assert figures["loss"] == pytest.approx(expected["loss"], rel=2e-3)
        assert figures["gradient_norm"] == pytest.approx(expected["gradient_norm"], rel=0.02)


def test_float16_goes_on_with_its_loss_scale(tmp_path):
    def subject() -> TransformerTrainer:
        return open_trainer(new_model(), settings(), torch.float16)

    whole, first, second = subject(), subject(), subject()
    for each in (whole, first):
        each.engine.load_state(replace(each.engine.export_state(), loss_scale=2.0**30))
    figures = [take(whole, number, rows(number)) for number in range(16)]
    assert figures[7]["skipped_steps"] > 0
    for number in range(8):
        take(first, number, rows(number))
    first.snapshot()(tmp_path)
    second.load(tmp_path)
    assert [take(second, number, rows(number)) for number in range(8, 16)] == figures[8:]


def test_activations_are_looked_at_by_depth():
    subject = open_trainer(new_model(), settings(), monitor=MonitorSettings(every=3))
    seen = []
    subject.transformer.layers[1].register_forward_hook(lambda module, given, output: seen.append(output.abs().max()))
    figures = [take(subject, number, rows()) for number in range(3)]
    names = ["activation_max_embedding", "activation_max_layer_00", "activation_max_layer_01"]
    assert not any(name in figures[1] for name in names)
    assert [name for name in figures[2] if name.startswith("activation")] == names
    parts = len(seen) // 3
    assert figures[2]["activation_max_layer_01"] == pytest.approx(max(seen[2 * parts :]).item())


@pytest.mark.parametrize("checkpointing", ["selective", "full"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_recomputation_changes_nothing(checkpointing, dtype):
    kept, again = (
        open_trainer(new_model(dropout=0.1), settings(), dtype, engine=EngineSettings(checkpointing=choice))
        for choice in ("none", checkpointing)
    )
    for number in range(2):
        assert take(again, number, rows(number)) == take(kept, number, rows(number))


def test_bfloat16_autocast_stays_near_float32():
    plain = trainer()
    halved = open_trainer(new_model(), settings(), torch.bfloat16)
    exact, rounded = losses(plain, rows()), losses(halved, rows())
    for name, value in exact.items():
        assert value != rounded[name]
        assert value == pytest.approx(rounded[name], rel=0.02)


def test_weights_of_another_codebook_are_not_taken_up(tmp_path):
    first = trainer()
    first.snapshot()(tmp_path)
    other = new_model()
    other.image_tokenizer.quantizer.codebook.mul_(-1)
    other.config = ModelConfig(**{**vars(other.config), "codebook_sha256": codebook_hash(other.image_tokenizer)})
    with pytest.raises(InputError, match="trained on the codes of another image tokenizer"):
        trainer(other).load(tmp_path)


def write_store(path: Path, count: int) -> TokenStore:
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
        writer.append(rows(9, count))
    return TokenStore(path)


def supply(store: TokenStore, chosen: TransformerTraining, ledger: Path) -> TrainingDataLoader:
    stores = TrainingStores(stores={str(store.path): store})
    return TrainingDataLoader(stores, ledger, ExampleBuilder(new_model().config, chosen), ALONE)


@pytest.mark.parametrize("workers", [0, 1])
def test_the_rows_of_a_step_are_a_function_of_seed_and_step(tmp_path, workers):
    store = write_store(tmp_path, 21)
    chosen = settings(steps=7, seed=3, num_workers=workers)
    given = list(supply(store, chosen, tmp_path / "stores.jsonl").batches(0))
    assert len(given) == 7
    for number, batch in enumerate(given):
        samples = np.arange(8 * number, 8 * number + 8)
        places = sample_index(3, samples, 21)
        assert batch.samples.tolist() == [[k, 0, row] for k, row in zip(samples, places, strict=True)]
        assert set(batch.rows) == {"text", "image"}
        for name, values in store.read(places).items():
            assert np.array_equal(batch.rows[name], values)
    resumed = list(supply(store, chosen, tmp_path / "stores.jsonl").batches(5))
    assert len(resumed) == 2
    assert all(np.array_equal(a.rows["image"], b.rows["image"]) for a, b in zip(resumed, given[5:], strict=True))


@pytest.mark.parametrize("size", [2, 4])
def test_processes_share_the_rows_of_a_step_and_what_chance_decides(tmp_path, size):
    store = write_store(tmp_path, 21)
    chosen = settings(steps=3, seed=3, caption_dropout=0.5, full_mask_rate=0.5)
    mixture = Mixture([Phase(first_sample=0, names=("store",), weights=(1.0,), sizes=(21,))], 3)
    maker = ExampleBuilder(new_model().config, chosen)

    def share(rank: int, world_size: int) -> list[TrainingBatch]:
        return list(
            StepDataset(
                MixedStore([store]), mixture, maker, DistributedContext(ALONE.device, rank, world_size)
            ).from_step(1)
        )

    whole, shares = share(0, 1), [share(rank, size) for rank in range(size)]
    for number, batch in enumerate(whole):
        own = [share[number] for share in shares]
        assert np.array_equal(np.concatenate([part.samples for part in own]), batch.samples)
        assert np.array_equal(sum(part.target_counts for part in own), batch.target_counts)
        assert sum(part.num_tokens for part in own) == batch.num_tokens
        assert read_of(own) == read_of([batch])


def read_of(batches: Sequence[TrainingBatch]) -> list[list[int]]:
    """All rows that are read, without their padding, in one order."""
    pad = new_model().config.vocabulary.pad
    lines = [line.tolist() for each in batches for part in each.thread_shards[0] for line in part.inputs]
    return sorted([code for code in line if code != pad] for line in lines)


def test_evaluation_gives_the_losses_of_the_held_out_rows_and_a_sheet(tmp_path):
    store = write_store(tmp_path / "store", 16)
    sheets = []
    subject = open_trainer(
        new_model(dropout=0.5),
        settings(caption_dropout=0.9),
        validation_store=store,
        draw_sheet=lambda model, path: sheets.append((model, path)),
    )
    take(subject, 0, rows())  # leaves it in training mode, with dropout
    figures = subject.evaluate(7, tmp_path)
    assert figures == subject.evaluate(7, tmp_path)
    halves = [losses(subject, store.read(range(first, first + 8))) for first in (0, 8)]
    assert figures == {
        f"validation_{name}": pytest.approx(sum(half[name] for half in halves) / 2)
        for name in ("loss", "generate_image_loss", "generate_text_loss")
    }
    assert sheets == [(subject.model, tmp_path / "step-00000007.png")] * 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"warmup_steps": 100}, r"warmup_steps must be from 1 to steps - 1 \(99\), got 100"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"micro_batch_size": -1}, "micro_batch_size and num_workers must not be negative, got -1 and 0"),
        ({"full_mask_rate": 0.7, "partial_mask_rate": 0.4}, "are shares of all rows: their sum must not be above 1"),
        ({"full_mask_targets": -1}, "full_mask_targets must be 0"),
        ({"caption_dropout": 1.5}, r"caption_dropout must be in \[0, 1\], got 1.5"),
        ({"tasks": {"draw": 1.0}}, "task 'draw' is unknown; known: generate, caption, upscale, low_level"),
        ({"tasks": {"generate": 0}}, "the share of task 'generate' must be above 0, got 0"),
        ({"tasks": {}}, "there must be a task to train for"),
        ({"text_loss_weight": -1.0}, "text_loss_weight must not be negative, got -1.0"),
        ({"name_loss_weight": -0.5}, "name_loss_weight must not be negative, got -0.5"),
    ],
)
def test_wrong_settings(changes, message):
    with pytest.raises(ValueError, match=message):
        settings(**changes)
