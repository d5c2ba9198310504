"""Training examples: dropped captions, masked codes, selected targets, and the sequence of each task."""

from dataclasses import replace

import numpy as np
import pytest

from cogview.data.store import NO_TOKEN
from cogview.training.example_builder import _select_targets
from tests.training.factories import (
    CODES,
    GRID,
    MIXTURE,
    make_trainer,
    priority_of,
    row_plan,
    store_rows,
    train_step,
    wide_rows,
)


def test_build_empties_a_dropped_caption():
    trainer, rows = make_trainer(caption_dropout=1.0), store_rows(size=2)
    first, second = trainer.builder.build(rows, row_plan(2, keep_caption=np.array([False, True])))
    command = trainer.model.config.vocabulary.command
    bare = [command("[ROI1]"), command("[TINY]"), command("[BOI1]"), *rows["image"][0].tolist()]
    assert first.inputs.tolist() == bare[:-1]
    assert first.targets.tolist() == bare[1:]
    assert len(second) == len(bare) - 1 + (rows["text"][1] != NO_TOKEN).sum()

    metrics = train_step(trainer, 0, rows)  # drops both
    assert "generate_text_loss" not in metrics
    assert metrics["loss"] == pytest.approx(metrics["generate_image_loss"])
    assert metrics["loss"] > 0


def test_plan_rows_drops_a_share_of_captions():
    trainer, other = make_trainer(caption_dropout=0.25), make_trainer(caption_dropout=0.25, seed=1)
    kept = [trainer.builder.plan_rows(step, 400, 64).keep_caption for step in (0, 1, 0)] + [
        other.builder.plan_rows(0, 400, 64).keep_caption
    ]
    assert all(0.18 < 1 - keep.mean() < 0.32 for keep in kept)
    assert (kept[0] == kept[2]).all()
    assert (kept[0] != kept[1]).any()
    assert (kept[0] != kept[3]).any()


def test_plan_rows_masks_a_share_of_rows_and_codes():
    """Some rows mask every code, others some codes; rows without a caption mask none."""
    trainer = make_trainer(full_mask_rate=0.3, partial_mask_rate=0.2, full_mask_targets=5, caption_dropout=0.2)
    plan, again = trainer.builder.plan_rows(3, 4000, 64), trainer.builder.plan_rows(3, 4000, 64)
    for name in ("keep_caption", "mask_codes", "num_targets", "target_priority"):
        assert (getattr(again, name) == getattr(plan, name)).all()
        assert (getattr(trainer.builder.plan_rows(4, 4000, 64), name) != getattr(plan, name)).any()
    share = plan.mask_codes.mean(axis=1)
    assert not plan.mask_codes[~plan.keep_caption].any()
    num_targets = plan.num_targets
    assert (num_targets[plan.keep_caption] == 5).mean() == pytest.approx(0.3, abs=0.03)
    some = (share > 0) & (num_targets == 64)
    assert some[plan.keep_caption].mean() == pytest.approx(0.2, abs=0.03)
    assert share[some].mean() == pytest.approx(0.5, abs=0.05)
    assert set(num_targets.tolist()) == {5, 64}
    assert (share[num_targets == 5] == 1).all()
    assert not make_trainer(caption_dropout=0.2).builder.plan_rows(3, 4000, 64).mask_codes.any()


def test_build_keeps_ids_and_positions_of_selected_targets():
    """A row with few targets predicts them at the same positions as a row with all targets."""
    trainer, rows = make_trainer(), store_rows(size=3)
    whole = row_plan(3, mask_all=True)
    few = replace(whole, num_targets=np.full(3, 4), target_priority=priority_of([0, 7, 8, 63]))
    mask = trainer.model.config.vocabulary.command("[MASK]")
    for long, short, image in zip(
        trainer.builder.build(rows, whole), trainer.builder.build(rows, few), rows["image"], strict=True
    ):
        start = len(long) - 63  # the index that predicts the second code
        kept = [*range(start), *(start - 1 + code for code in (7, 8, 63))]
        for name in ("inputs", "positions", "targets", "kinds", "trained"):
            assert getattr(short, name).tolist() == getattr(long, name)[kept].tolist()
        assert short.targets[-4:].tolist() == image[[0, 7, 8, 63]].tolist()
        assert short.inputs[-3:].tolist() == [mask] * 3


def test_select_targets_selects_each_distinct_code_equally_often():
    """One code occurs 60 times and four others once each: each of the five is selected first equally often."""
    random, codes = np.random.default_rng(0), np.full(64, 8)
    codes[[3, 20, 41, 63]] = [1, 2, 3, 4]
    first = [int(codes[_select_targets(codes, random.exponential(size=64), 1)].item()) for _ in range(4000)]
    assert sorted(set(first)) == [1, 2, 3, 4, 8]
    assert all(first.count(code) / 4000 == pytest.approx(0.2, abs=0.03) for code in set(first))
    selected = np.array([_select_targets(codes, random.exponential(size=64), 10) for _ in range(4000)])
    assert (selected.sum(axis=1) == 10).all()
    background = selected.mean(axis=0)[codes == 8]
    assert background.max() - background.min() < 0.05  # no position of it is preferred
    assert _select_targets(codes, random.exponential(size=64), 64).all()


def test_build_keeps_names_of_selected_targets_only():
    trainer, rows = make_trainer(name_loss_weight=0.25), store_rows(size=3)
    rows["named"] = np.full((3, GRID**2), NO_TOKEN, dtype=np.uint16)
    rows["named"][0, :10], rows["named"][1, 30:], rows["named"][2] = 7, 9, 3
    priority = priority_of(range(0, GRID**2, 3))
    plan = replace(row_plan(3, mask_all=True), num_targets=np.full(3, 22), target_priority=priority)
    for example, expected in zip(trainer.builder.build(rows, plan), (4, 12, 22), strict=True):
        assert (example.names >= 0).sum() == expected


def test_plan_rows_draws_tasks_by_their_shares():
    trainer = make_trainer(tasks=MIXTURE, caption_dropout=0.5, full_mask_rate=1.0)
    plan = trainer.builder.plan_rows(3, 5000, 64)
    tasks = np.array(plan.tasks)
    for task, share in MIXTURE.items():
        assert (tasks == task).mean() == pytest.approx(share / 5, abs=0.03)
    assert plan.keep_caption[tasks == "caption"].all()  # a caption that is the target is never dropped
    assert plan.keep_caption[tasks == "upscale"].mean() == pytest.approx(0.5, abs=0.06)
    assert not plan.mask_codes[tasks == "caption"].any()
    assert plan.mask_codes[(tasks != "caption") & plan.keep_caption].all()
    assert set(plan.window.tolist()) == set(range(9))
    again = trainer.builder.plan_rows(3, 5000, 64)
    assert again.tasks == plan.tasks
    assert (again.window == plan.window).all()
    assert trainer.builder.plan_rows(4, 5000, 64).tasks != plan.tasks


def test_build_arranges_a_row_of_each_task():
    """Sequences are written out by hand: ids of codes are the codes, those of text tokens follow from CODES on."""
    trainer, rows = make_trainer(tasks=MIXTURE), wide_rows(size=9)
    command = trainer.model.config.vocabulary.command
    for index in range(9):
        text = [CODES + int(piece) for piece in rows["text"][index] if piece != NO_TOKEN]
        image, large = rows["image"][index].reshape(8, 8), rows["large"][index].reshape(16, 16)

        example = trainer.builder.build(rows, row_plan(9, task="caption"))[index]
        before = [command("[TINY]"), command("[BOI1]"), *image.flat, command("[EOI1]"), command("[ROI1]")]
        sequence = [*before, *text, command("[SEP]")]
        assert example.inputs.tolist() == sequence[:-1]
        assert example.targets.tolist() == sequence[1:]
        assert example.positions.tolist() == list(range(len(sequence) - 1))
        assert example.trained.tolist() == [False] * (len(before) - 1) + [True] * (len(text) + 1)

        # Window ``index`` in the order of CogView v1, and the crop that conditions it.
        row, column = [(0, 0), (0, 1), (0, 2), (1, 1), (1, 0), (1, 2), (2, 0), (2, 1), (2, 2)][index]
        crop = image[2 * row : 2 * row + 4, 2 * column : 2 * column + 4]
        window = large[4 * row : 4 * row + 8, 4 * column : 4 * column + 8]
        small = rows["small"][index].reshape(4, 4)
        for task, condition, target in (("upscale", crop, window), ("low_level", small, image)):
            example = trainer.builder.build(rows, row_plan(9, task=task))[index]
            first = [command("[ROI1]"), *text, command("[TINY]"), command("[BOI1]"), *condition.flat, command("[EOI1]")]
            start = [command(name) for name in ("[ROI2]", "[POS0]", "[TINY]", "[BOI2]")]
            sequence = [*first, *start, *target.flat]
            assert example.inputs.tolist() == sequence[:-1]
            assert example.targets.tolist() == sequence[1:]
            assert example.positions.tolist() == [*range(len(first)), *range(4 + 63)]
            assert example.targets[example.trained].tolist() == target.reshape(-1).tolist()

            masked = trainer.builder.build(rows, row_plan(9, task=task, mask_all=True))[index]
            assert masked.inputs.tolist() == [*first, *start, *[command("[MASK]")] * 63]  # the small image stays
            assert masked.targets.tolist() == sequence[1:]
