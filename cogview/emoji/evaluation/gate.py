"""Protocol of ``cogview eval gate``: notice in some minutes that a model of the emoji world became worse.

Every row is the mean of values of single items: of images of held-out captions, of images of prompts that leave the
background open, of captions of true scenes. A row fell if a permutation test finds such a fall, or a larger one,
improbable without a change.
"""

# N images of a prompt
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any

import numpy as np

from cogview.config_io import to_mapping
from cogview.emoji.evaluation.captions import generate_captions
from cogview.emoji.evaluation.edits import held_out_edits, kept_codes, measures_edits, run_edits
from cogview.emoji.evaluation.images import images_without_notes
from cogview.emoji.evaluation.rich_captions import make_caption_grader
from cogview.emoji.evaluation.scenes import check_world, held_out_scenes, parts_of_grades
from cogview.emoji.evaluation.similar_captions import similar_captions
from cogview.emoji.rich_grades import AnyGrade, AnyGrader, RichGrader, make_grader
from cogview.emoji.rich_reader import make_reader
from cogview.emoji.scene import Scene
from cogview.emoji.world import EmojiWorld
from cogview.errors import InputError
from cogview.evaluation.diversity import different_share
from cogview.evaluation.harness import generate_images, grade_images
from cogview.evaluation.manifest import flatten, hash_prompts
from cogview.evaluation.metrics import bootstrap, wilson_interval
from cogview.evaluation.model_record import describe_hardware, describe_model, describe_versions
from cogview.evaluation.permutation import fall_probability
from cogview.evaluation.records import Manifest, Result, ResultItems, ResultValue, SeedsRecord
from cogview.modeling.config import Sampling
from cogview.pipeline.cogview import CogView
from cogview.vqvae.codec import reconstruct

MEASURE = "gate"
# Of one row, chosen before the runs of scripts/benchmarks/gate_faults.py. Ten rows fall by chance in at most 2% of the
# runs of an unchanged model, so that 19 or 20 of 20 independent runs pass with a probability of at least 94%; at 0.005
# it would be 74%. A loss of 5 points of 500 images, from 99.8% right, falls in 99.7% of the runs in `everything` alone;
# at 0.001 in 99.3%. (Against 500 right ones, 9 wrong ones fall.) The permutation test returns at least 0.0001.
SIGNIFICANCE = 0.002
OPEN_PROMPTS = 24  # at most, which name no background
OPEN_IMAGES = 8  # of each
CAPTIONED = 200  # scenes at most
CLEAN_QUANTILE = 0.99  # of the errors of reconstructions of true scenes ...
CLEAN_SCENES = 400  # ... of this number ...
CLEAN_SEED = 2_000_003  # ... and seed, whatever captions are asked
CLEAN_LIMIT = "clean limit"  # key of the settings in a manifest
MIN_PROMPTS = 20


@dataclass(frozen=True, kw_only=True)
class GateSettings:
    """Settings of a gate.

    Attributes:
        prompts: Number of held-out captions, at least ``MIN_PROMPTS``. Those of a smaller number come first in a
            larger one.
        seed: Seed of captions and images.
        batch_size: Images in a batch.
    """

    prompts: int
    seed: int = 0
    batch_size: int = 32


@dataclass(frozen=True, kw_only=True)
class GateChange:
    """Change of a row against an earlier result.

    Attributes:
        name: Name of the row.
        before: Mean of the earlier items; None if the row is new.
        after: Mean of the present items; None if the row is missing.
        probability: Probability of such a fall without a change; None without a comparison.
    """

    name: str
    before: float | None
    after: float | None
    probability: float | None

    @property
    def fell(self) -> bool:
        """Whether the row is significantly lower, or missing."""
        if self.before is None:
            return False
        return self.after is None or (self.probability is not None and self.probability <= SIGNIFICANCE)


def run_gate(
    model: CogView, world: EmojiWorld, sampling: Sampling, settings: GateSettings, before: Result | None = None
) -> tuple[Manifest, dict[str, ResultValue], ResultItems]:
    """Measure a model on held-out captions; return what a result file holds.

    Args:
        model: The model.
        world: The world of the model.
        sampling: Sampling settings.
        settings: Counts and seed.
        before: The result that the rows will be compared with. Its limit of clean images is used, so that also a worse
            image tokenizer is noticed.

    Raises:
        InputError: There are too few prompts, the model does not fit the world, or the earlier result is of another
            measure or world.
    """
    limit = None if before is None else earlier_limit(before, world)
    check_world(model, world)
    asked = ask(world, settings)
    grader = make_grader(world)
    if limit is None:
        limit = clean_limit(model, grader, settings.batch_size)
    rows: dict[str, dict[str, float]] = {}
    for group in gate_groups(model, world):
        rows |= measure_group(group, model, grader, sampling, settings, limit)
    manifest = Manifest(
        measure=MEASURE,
        prompts=hash_prompts([caption for _, caption in asked]),
        seeds=SeedsRecord(first=settings.seed, count=len(asked)),
        sampling=to_mapping(sampling),
        model=describe_model(model),
        settings=_fixed_settings(world, limit),
        versions=describe_versions(),
        hardware=describe_hardware(model.placement.device),
    )
    return manifest, _summaries(rows), as_items(rows)


def gate_groups(model: CogView, world: EmojiWorld | None = None) -> tuple[str, ...]:
    """Return the names of the groups of rows that a model can be measured on.

    Args:
        model: The model.
        world: The world of the model; None for a plain one.
    """
    groups = ("images", "diversity", "captions") if "caption" in model.config.tasks else ("images", "diversity")
    return (*groups, "edits") if world is not None and measures_edits(model, world) else groups


def measure_group(
    group: str, model: CogView, grader: AnyGrader, sampling: Sampling, settings: GateSettings, limit: float
) -> dict[str, dict[str, float]]:
    """Return the rows of a group by name: for each row, a value in [0, 1] of each item by its caption.

    Args:
        group: One of ``gate_groups``.
        model: The model.
        grader: Grader of the world of the model, for all groups.
        sampling: Sampling settings.
        settings: Counts and seed.
        limit: Largest error of a clean image (`clean_limit`).

    Raises:
        InputError: There are too few prompts, or too few held-out scenes.
    """
    asked = ask(grader.world, settings)
    if group == "images":
        return _drawing_rows(model, grader, asked, sampling, settings, limit)
    if group == "diversity":
        return _diversity_rows(model, grader, _open_prompts(grader.world, asked), sampling, settings)
    if group == "edits":
        return _edit_rows(model, grader, sampling, settings)
    return _caption_rows(model, grader.world, asked[:CAPTIONED], settings)


def ask(world: EmojiWorld, settings: GateSettings) -> list[tuple[Scene, str]]:
    """Return the held-out scenes of a gate with their captions.

    Args:
        world: The world of the scenes.
        settings: Counts and seed.

    Raises:
        InputError: There are too few prompts, or too few held-out scenes.
    """
    if settings.prompts < MIN_PROMPTS:
        raise InputError(f"a gate needs at least {MIN_PROMPTS} prompts, got {settings.prompts}")
    return held_out_scenes(world, settings.prompts, settings.seed)


def clean_limit(model: CogView, grader: AnyGrader, batch_size: int) -> float:
    """Return the largest error of a clean image: the ``CLEAN_QUANTILE`` of those of reconstructions of true scenes.

    Args:
        model: The model, whose image tokenizer reconstructs.
        grader: Grader of the world of the model.
        batch_size: Images in a batch.

    Returns:
        A mean squared difference of RGB bytes, as ``Explanation.error``.
    """
    world = grader.world
    scenes = [world.sample_scene(CLEAN_SEED, index, held_out=True) for index in range(CLEAN_SCENES)]
    true = np.stack([world.render(scene, number) for number, scene in enumerate(scenes)])
    restored = reconstruct(model.image_tokenizer, true, batch_size)
    return float(np.quantile([grader.explain(image).error for image in restored], CLEAN_QUANTILE))


def earlier_limit(before: Result, world: EmojiWorld) -> float:
    """Return the limit of clean images of an earlier result, after checking that rows can be compared with it.

    Args:
        before: The earlier result.
        world: The present world.

    Raises:
        InputError: It is of another measure or world, or has no limit.
    """
    _check_measure(before)
    settings = before.manifest.settings
    limit = settings.get(CLEAN_LIMIT)
    if not isinstance(limit, float):
        raise InputError(f"the earlier result has no {CLEAN_LIMIT}: remove it, and write it again with -o")
    old, new = flatten(settings), flatten(_fixed_settings(world, limit))
    for name in (*new, *old):
        if old.get(name) != new.get(name):
            raise InputError(
                f"the earlier result has {name} {old.get(name)}, expected {new.get(name)}: give the --recipe of its "
                "world, or another --against"
            )
    return limit


def _check_measure(before: Result) -> None:
    if before.manifest.measure != MEASURE or before.items is None:
        raise InputError(
            f"the earlier result has the measure {before.manifest.measure}, expected {MEASURE}: give --against a file "
            "that cogview eval gate wrote"
        )


def _fixed_settings(world: EmojiWorld, limit: float) -> dict[str, Any]:
    """Settings in a manifest, which must be equal in a comparison."""
    return {"world": to_mapping(world.settings), "images of open prompts": OPEN_IMAGES, CLEAN_LIMIT: limit}


def compare_rows(before: Result, items: ResultItems) -> tuple[list[GateChange], bool]:
    """Compare the rows of an earlier result with present ones.

    Args:
        before: The earlier result.
        items: The present items.

    Returns:
        The changes in the order of the present rows, then the missing ones; and whether items were paired: they are if
        all ids of one side are among those of the other.

    Raises:
        InputError: The earlier result is of another measure.
    """
    _check_measure(before)
    assert before.items is not None
    old, new = _by_id(before.items), _by_id(items)
    paired = set(items.ids) <= set(before.items.ids) or set(before.items.ids) <= set(items.ids)
    changes = []
    for name in (*new, *(name for name in old if name not in new)):
        left, right = old.get(name, {}), new.get(name, {})
        if paired and left and right:
            shared = [each for each in right if each in left]
            left, right = {each: left[each] for each in shared}, {each: right[each] for each in shared}
        probability = (
            fall_probability(list(left.values()), list(right.values()), paired=paired) if left and right else None
        )
        changes.append(GateChange(name=name, before=_mean(left), after=_mean(right), probability=probability))
    return changes, paired


def _drawing_rows(
    model: CogView,
    grader: AnyGrader,
    asked: Sequence[tuple[Scene, str]],
    sampling: Sampling,
    settings: GateSettings,
    limit: float,
) -> dict[str, dict[str, float]]:
    """Verdicts on an image of each caption."""
    scenes, captions = [scene for scene, _ in asked], [caption for _, caption in asked]
    images = generate_images(model, captions, settings.seed, sampling, settings.batch_size, "generating")
    grades: Sequence[AnyGrade] = grade_images(grader, images, scenes, "grading")
    rows: dict[str, dict[str, float]] = {part: {} for part in parts_of_grades(grades)}
    for caption, grade in zip(captions, grades, strict=True):
        for part in rows:
            verdict = getattr(grade, part)
            if verdict is not None:
                rows[part][caption] = float(verdict)
    rows["clean"] = {
        caption: float(grade.explanation.error <= limit) for caption, grade in zip(captions, grades, strict=True)
    }
    return rows


def _open_prompts(world: EmojiWorld, asked: Sequence[tuple[Scene, str]]) -> list[str]:
    """Captions of the first scenes that name no background."""
    if world.settings.is_rich and not world.settings.caption_rates.open_colour:
        return []
    reader = make_reader(world)
    prompts: dict[str, None] = {}
    for scene, _ in asked[:OPEN_PROMPTS]:
        captions = (world.caption(scene, seed) for seed in count())
        prompts[next(text for text in captions if all(each.colour is None for each in reader.parses(text)))] = None
    return list(prompts)


def _diversity_rows(
    model: CogView, grader: AnyGrader, prompts: Sequence[str], sampling: Sampling, settings: GateSettings
) -> dict[str, dict[str, float]]:
    """Shares of different images and of different backgrounds among the images of each prompt."""
    repeated = [prompt for prompt in prompts for _ in range(OPEN_IMAGES)]
    images = generate_images(model, repeated, settings.seed, sampling, settings.batch_size, "varying")
    rows: dict[str, dict[str, float]] = {"different images": {}, "different backgrounds": {}}
    for number, prompt in enumerate(prompts):
        group = images[number * OPEN_IMAGES : (number + 1) * OPEN_IMAGES]
        rows["different images"][prompt] = different_share(np.stack(group))
        colours = {grader.explain(image).colour.name for image in group}
        rows["different backgrounds"][prompt] = len(colours) / OPEN_IMAGES
    return rows


def _caption_rows(
    model: CogView, world: EmojiWorld, asked: Sequence[tuple[Scene, str]], settings: GateSettings
) -> dict[str, dict[str, float]]:
    """Verdicts on a caption of each scene, and on the choice of its caption among similar ones."""
    true = np.stack([world.render(scene, number) for number, (scene, _) in enumerate(asked)])
    grader = make_caption_grader(world)
    texts = [each.text for each in generate_captions(model, true, settings.batch_size, "captioning")]
    rows: dict[str, dict[str, float]] = {"captioning": {}, "ranking": {}}
    choices = [similar_captions(world, scene, settings.seed) for scene, _ in asked]
    pairs = [(image, text) for image, options in zip(true, choices, strict=True) for text in options]
    repeated = images_without_notes([image for image, _ in pairs])
    scores = model.score(repeated, [text for _, text in pairs], batch_size=settings.batch_size)
    first = 0
    for (scene, caption), text, options in zip(asked, texts, choices, strict=True):
        rows["captioning"][caption] = float(grader.grade(text, scene).everything)
        right, *others = (score.log_probability for score in scores[first : first + len(options)])
        rows["ranking"][caption] = float(right > max(others))
        first += len(options)
    return rows


def _edit_rows(
    model: CogView, grader: AnyGrader, sampling: Sampling, settings: GateSettings
) -> dict[str, dict[str, float]]:
    """Verdicts on results of edits, and the shares of kept codes; the items are named by both scenes."""
    assert isinstance(grader, RichGrader)
    asked = held_out_edits(grader.world, settings.prompts, settings.seed)
    codes, results = run_edits(model, grader.world, asked, settings.seed, sampling, settings.batch_size)
    rows: dict[str, dict[str, float]] = {"edits": {}, "kept codes": {}}
    for (edit, _), before, image in zip(asked, codes, results, strict=True):
        rows["edits"][edit.meaning] = float(grader.grade_edit(np.asarray(image), edit).everything)
        rows["kept codes"][edit.meaning] = kept_codes(grader.world, edit, before, image.codes)
    return rows


def _summaries(rows: Mapping[str, Mapping[str, float]]) -> dict[str, ResultValue]:
    """Means with 95% intervals: by Wilson of verdicts, by the bootstrap of shares."""
    summaries = {}
    for name, row in rows.items():
        if not row:
            continue
        values = np.array(list(row.values()))
        if np.isin(values, (0, 1)).all():
            low, high = wilson_interval(int(values.sum()), len(values))
        else:
            interval = bootstrap(partial(_means, values), len(values))
            low, high = interval["low"], interval["high"]
        summaries[name] = ResultValue(
            value=float(values.mean()), low=low, high=high, n=len(values), unit="fraction", higher_is_better=True
        )
    return summaries


def _means(values: np.ndarray, indices: np.ndarray) -> np.ndarray:
    means: np.ndarray = values[indices].mean(axis=-1)
    return means


def as_items(rows: Mapping[str, Mapping[str, float]]) -> ResultItems:
    """Return rows as the items of a result file.

    Args:
        rows: Values of each row by caption.
    """
    ids = list(dict.fromkeys(each for row in rows.values() for each in row))
    values: dict[str, list[float | None]] = {name: [row.get(each) for each in ids] for name, row in rows.items() if row}
    return ResultItems(ids=ids, values=values)


def _by_id(items: ResultItems) -> dict[str, dict[str, float]]:
    return {
        name: {each: value for each, value in zip(items.ids, values, strict=True) if value is not None}
        for name, values in items.values.items()
    }


def _mean(row: Mapping[Any, float]) -> float | None:
    return sum(row.values()) / len(row) if row else None
