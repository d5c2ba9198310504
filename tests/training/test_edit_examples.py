"""Training examples of edits and of images that are filled: sources, unknown codes, and what is learnt."""

from dataclasses import replace

import numpy as np
import pytest

from cogview.data.fill_masks import FILL_MASKS, sample_fill_masks
from cogview.data.store import NO_TOKEN
from tests.training.factories import (
    CODES,
    EDITS,
    GRID,
    edit_rows,
    make_trainer,
    priority_of,
    row_plan,
    train_step,
    wide_rows,
)


def pieces(rows: dict[str, np.ndarray], field: str, index: int) -> list[int]:
    """Return the ids of a text of a row."""
    return [CODES + int(piece) for piece in rows[field][index] if piece != NO_TOKEN]


def test_build_arranges_an_edit_of_each_row():
    """The instruction, or the text of a store without instructions, and the source; then the result."""
    trainer, rows = make_trainer(tasks=EDITS), edit_rows(size=4)
    command = trainer.model.config.vocabulary.command
    plain = {name: rows[name] for name in ("text", "source", "image")}
    for given, field in ((rows, "instruction"), (plain, "text")):
        for index, example in enumerate(trainer.builder.build(given, row_plan(4, task="edit"))):
            source, image = rows["source"][index].tolist(), rows["image"][index].tolist()
            text = pieces(rows, field, index)
            first = [command("[ROI1]"), *text, command("[TINY]"), command("[BOI1]"), *source, command("[EOI1]")]
            sequence = [*first, command("[ROI2]"), command("[TINY]"), command("[BOI2]"), *image]
            assert example.inputs.tolist() == sequence[:-1]
            assert example.targets.tolist() == sequence[1:]
            assert example.positions.tolist() == [*range(len(first)), *range(3 + 63)]
            assert example.targets[example.trained].tolist() == image


def test_build_fills_unknown_codes_from_known_ones():
    """The source is the image itself; the loss counts the unknown codes, whose predecessors are given."""
    trainer, rows = make_trainer(tasks=EDITS), edit_rows(size=2)
    mask = trainer.model.config.vocabulary.command("[MASK]")
    unknown = np.arange(2 * GRID**2).reshape(2, -1) % 3 == 1
    plan = replace(row_plan(2, task="fill"), unknown_source=unknown)
    for index, example in enumerate(trainer.builder.build(rows, plan)):
        image, text = rows["image"][index], pieces(rows, "text", index)
        start = 1 + len(text) + 2
        assert example.inputs[1 : 1 + len(text)].tolist() == text
        assert example.inputs[start : start + 64].tolist() == np.where(unknown[index], mask, image).tolist()
        assert example.inputs[-63:].tolist() == image[:-1].tolist()
        assert example.targets[example.trained].tolist() == image[unknown[index]].tolist()


def test_build_selects_targets_of_fill_among_unknown_codes():
    trainer, rows = make_trainer(tasks=EDITS), edit_rows(size=3)
    unknown = np.zeros((3, GRID**2), dtype=bool)
    unknown[:, 20:40] = True
    plan = replace(
        row_plan(3, task="fill", mask_all=True),
        unknown_source=unknown,
        num_targets=np.full(3, 4),
        target_priority=priority_of([0, 1, 2, 22, 25, 30, 39]),
    )
    for example, image in zip(trainer.builder.build(rows, plan), rows["image"], strict=True):
        assert example.targets[example.trained].tolist() == image[[22, 25, 30, 39]].tolist()


def test_build_leaves_out_the_source_of_an_edit():
    """Neither source nor instruction is seen; every code of the result is learnt."""
    trainer, rows = make_trainer(tasks=EDITS), edit_rows(size=1)
    plan = replace(row_plan(1, task="edit", keep_caption=False), unknown_source=np.ones((1, 64), dtype=bool))
    (example,) = trainer.builder.build(rows, plan)
    command = trainer.model.config.vocabulary.command
    head = [command("[ROI1]"), command("[TINY]"), command("[BOI1]"), *[command("[MASK]")] * 64, command("[EOI1]")]
    assert example.inputs[: len(head)].tolist() == head
    assert example.targets[example.trained].tolist() == rows["image"][0].tolist()


def test_plan_rows_drops_sources_and_instructions_at_their_rates():
    """A row without its source keeps nothing of the instruction, and no other code of it is masked."""
    changes = {"caption_dropout": 0.2, "source_dropout": 0.1, "full_mask_rate": 0.5, "full_mask_targets": 9}
    builder = make_trainer(tasks=EDITS, **changes).builder
    plan = builder.plan_rows(3, 6000, 64)
    tasks, unknown = np.array(plan.tasks), plan.unknown_source
    edits, fills = tasks == "edit", tasks == "fill"
    bare = edits & unknown.all(axis=1)
    assert bare[edits].mean() == pytest.approx(0.1, abs=0.02)
    assert not unknown[edits & ~bare].any()
    assert not plan.keep_caption[bare].any()
    assert not plan.mask_codes[bare].any()
    assert (plan.num_targets[bare] == 64).all()
    assert 1 - plan.keep_caption[edits & ~bare].mean() == pytest.approx(0.2, abs=0.03)
    assert unknown[fills].any(axis=1).all()
    assert 0.2 < unknown[fills].mean() < 0.8
    assert 1 - plan.keep_caption[fills].mean() == pytest.approx(0.2, abs=0.04)
    assert not unknown[tasks == "generate"].any()
    again = builder.plan_rows(3, 6000, 64)
    assert (again.unknown_source == unknown).all()
    assert (builder.plan_rows(4, 6000, 64).unknown_source != unknown).any()


def test_plan_rows_of_other_tasks_is_as_without_sources():
    """The decisions about sources are sampled last: those of former versions stay."""
    former = make_trainer(caption_dropout=0.3, full_mask_rate=0.4, source_dropout=0.0).builder.plan_rows(2, 50, 64)
    plan = make_trainer(caption_dropout=0.3, full_mask_rate=0.4, source_dropout=0.5).builder.plan_rows(2, 50, 64)
    random = np.random.default_rng([0, 2])
    random.choice(["generate"], size=50, p=[1.0])
    assert (plan.keep_caption == (random.random(50) >= 0.3)).all()
    for name in ("keep_caption", "mask_codes", "target_priority", "pivot_keys", "unknown_source"):
        assert (getattr(plan, name) == getattr(former, name)).all()


@pytest.mark.parametrize("kind", FILL_MASKS)
def test_sample_fill_masks_has_shapes_of_its_kind(kind):
    for grid in (1, 2, 8):
        masks = sample_fill_masks({kind: 1.0}, 300, grid, np.random.default_rng(0)).reshape(-1, grid, grid)
        assert masks.any(axis=(1, 2)).all()
        rows, columns = masks.any(axis=2), masks.any(axis=1)
        filled = rows.sum(axis=1) * columns.sum(axis=1) == masks.sum(axis=(1, 2))
        if kind != "random":
            assert filled.all()  # of a rectangle
        if kind == "all" or grid == 1:
            assert masks.all()
            continue
        shares = masks.mean(axis=(1, 2))
        assert len(set(shares.tolist())) > 1 or grid == 2
        assert masks.any(axis=0).all()  # every code is unknown at times
        assert not masks.all(axis=0).any()
        if kind == "side":
            assert (rows.all(axis=1) != columns.all(axis=1)).all()


def test_validation_batch_of_fill_is_a_function_of_the_rows():
    """Whatever batch a row is in."""
    trainer, rows = make_trainer(tasks=EDITS), edit_rows(size=8)

    class Store:
        def read(self, numbers):
            return {name: values[numbers] for name, values in rows.items()}

    whole = trainer.builder.validation_batch(Store(), "fill", np.arange(8))
    parts = [trainer.builder.validation_batch(Store(), "fill", np.arange(8)[part]) for part in (slice(3), slice(3, 8))]
    assert 0 < whole.target_counts.sum() < 8 * 64
    assert (sum(part.target_counts for part in parts) == whole.target_counts).all()


def test_trainer_step_learns_edits_and_fills():
    """Images of four codes alone: twenty steps lower the loss of each task from about ln 32 to about ln 4."""
    trainer, rows = make_trainer(tasks=EDITS, batch_size=16, learning_rate=3e-3, steps=20), edit_rows(size=16)
    rows["image"] %= 4
    losses = [train_step(trainer, step, rows) for step in range(20)]
    assert {"edit_image_loss", "fill_image_loss", "generate_image_loss"} <= set(losses[0])
    assert losses[-1]["edit_image_loss"] < losses[0]["edit_image_loss"] - 1
    assert losses[-1]["fill_image_loss"] < losses[0]["fill_image_loss"] - 1


def test_build_rejects_rows_without_source():
    trainer = make_trainer(tasks=EDITS)
    with pytest.raises(KeyError, match="source"):
        trainer.builder.build(wide_rows(size=2), row_plan(2, task="edit"))
