"""Protocol of ``cogview eval scenes``: grade generated images of held-out captions, beside two upper bounds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from itertools import permutations
from typing import Any

import numpy as np

from cogview.config_io import to_mapping
from cogview.emoji.datasets import HELD_OUT_SEED, SceneDataset
from cogview.emoji.evaluation.edits import evaluate_edits, format_edits, measures_edits
from cogview.emoji.evaluation.groups import format_groups, group_accuracies
from cogview.emoji.grader import SceneGrade
from cogview.emoji.rich_grades import RichGrader, make_grader
from cogview.emoji.scene import COUNTS, Scene, SceneKind
from cogview.emoji.things import EmojiObject
from cogview.emoji.world import EmojiWorld
from cogview.errors import InputError
from cogview.evaluation.harness import TUNING_SEED, choose_sampling, describe_protocol, generate_images, grade_images
from cogview.evaluation.metrics import accuracy, format_accuracy, reconstruction_quality
from cogview.modeling.config import Sampling
from cogview.pipeline.cogview import CogView
from cogview.training.vqvae_images import held_out_batches
from cogview.vqvae.codec import reconstruct
from cogview.vqvae.training import evaluate_vqvae

PARTS = ("colour", "object", "count", "relation", "everything")
RICH_PARTS = ("colour", "object", "count", "relation", "style", "characters", "everything")
COLUMNS = {
    "drawn": "generated images",
    "ceiling_reconstructions": "VQ-VAE's reconstructions",
    "ceiling_true_scenes": "true scenes",
}
MAX_CONFUSIONS = 10
FEW_SCENES = 1000  # from here on, a world's held-out scenes are counted before they are chosen
# Held-out images on which the image tokenizer is measured.
TOKENIZER_IMAGES = 2048
TOKENIZER_IMAGES_PER_CAPTION = 5  # at most, so that a report on few captions takes little time


def held_out_scenes(world: EmojiWorld, count: int, seed: int = 0) -> list[tuple[Scene, str]]:
    """Return scenes whose meanings are never trained on, each with a caption of all its parts.

    Args:
        world: The world of the scenes.
        count: Number of scenes, all different.
        seed: Seed of the scenes and captions.

    Raises:
        InputError: The world has too few held-out scenes.
    """
    is_counted = count > FEW_SCENES and not world.settings.is_rich
    if is_counted and (available := num_held_out_scenes(world)) < count:
        raise InputError(
            f"a world of {len(world.things)} objects has {available} held-out scenes, {count} requested; ask for fewer"
        )
    chosen: dict[str, Scene] = {}
    for index in range(20 * count):
        scene = world.sample_scene(seed, index, held_out=True)
        chosen.setdefault(scene.meaning, scene)
        if len(chosen) == count:
            return [(scene, world.caption(scene, seed, complete=True)) for scene in chosen.values()]
    raise InputError(
        f"a world of {len(world.things)} objects has too few held-out scenes: {count} requested, {len(chosen)} found"
    )


def num_held_out_scenes(world: EmojiWorld) -> int:
    """Return how many different held-out scenes a world has; it takes a second or two with 120 objects.

    Args:
        world: The world of the scenes.
    """
    weights, things = world.settings.weights, world.things
    contents: list[tuple[SceneKind, tuple[EmojiObject, ...], int]] = []
    if weights.one:
        contents += [("one", (thing,), 1) for thing in things]
    if weights.many:
        contents += [("many", (thing,), count) for thing in things for count in COUNTS]
    if weights.pair:
        kinds: tuple[SceneKind, SceneKind] = ("beside", "above")
        contents += [(kind, pair, 1) for kind in kinds for pair in permutations(things, 2)]
    return sum(
        Scene(colour=colour, kind=kind, things=shown, count=number).held_out
        for colour in world.colours
        for kind, shown, number in contents
    )


def check_world(model: CogView, world: EmojiWorld) -> None:
    """Check that a model knows exactly the objects of a world and generates images of its size.

    Args:
        model: The model.
        world: The emoji world.

    Raises:
        InputError: The size or the objects differ.
    """
    side = model.config.grid * model.image_tokenizer.downsampling
    if side != world.settings.canvas:
        raise InputError(
            f"{model.name} generates {side} pixels, the world has {world.settings.canvas}: use the recipe of the model"
        )
    known = {thing.name for thing in model.things}
    if known and known != {thing.name for thing in world.things}:
        raise InputError(
            f"{model.name} knows {len(known)} objects, not the {len(world.things)} of this world: "
            "use the recipe of the model"
        )


def describe(
    model: CogView, world: EmojiWorld, captions: Sequence[str], seed: int, **settings: object
) -> dict[str, Any]:
    """Return how a report on a world was made; arguments are those of ``describe_protocol``.

    Args:
        model: The model.
        world: The emoji world.
        captions: The captions.
        seed: Seed of the images.
        **settings: Further entries of the report.
    """
    data = {
        "things": len(world.things),
        "candidates": len(world.candidates),
        "world": to_mapping(world.settings),
    }
    return describe_protocol(model, captions, seed, data=data, **settings)


def evaluate_scenes(
    model: CogView,
    world: EmojiWorld,
    *,
    count: int,
    seed: int,
    sampling: Sampling,
    batch_size: int,
    image_scales: Sequence[int] = (1,),
) -> tuple[dict[str, Any], list[np.ndarray]]:
    """Grade one generated image of each of several held-out captions.

    The report also has two upper bounds by the same grader: on the VQ-VAE's reconstructions of the true scenes, and on
    the true scenes.

    Args:
        model: The model.
        world: The world of the model.
        count: Number of captions.
        seed: Seed of captions and images.
        sampling: Sampling settings.
        batch_size: Captions in a batch.
        image_scales: Scales of the scenes on which the VQ-VAE is measured, as in its training.

    Returns:
        The report as plain data, with ``items`` as ``ResultItems`` has them, and the generated images. Of a rich world,
        it has groups of scenes too; of a model that edits such a world, results of edits, which follow the images.
    """
    check_world(model, world)
    asked = held_out_scenes(world, count, seed)
    scenes, captions = [scene for scene, _ in asked], [caption for _, caption in asked]
    grader, tokenizer = make_grader(world), model.image_tokenizer
    true = np.stack([world.render(scene, number) for number, scene in enumerate(scenes)])
    restored = reconstruct(tokenizer, true, batch_size)
    generated = generate_images(model, captions, seed, sampling, batch_size, "generating")
    held_out = SceneDataset(world, HELD_OUT_SEED, held_out=True)
    num_images = min(TOKENIZER_IMAGES, TOKENIZER_IMAGES_PER_CAPTION * count)
    batches = held_out_batches(held_out, tokenizer.downsampling, image_scales, num_images)

    sets = {"drawn": generated, "ceiling_reconstructions": list(restored), "ceiling_true_scenes": list(true)}
    grades: dict[str, list[SceneGrade]] = {
        key: list(grade_images(grader, images, scenes, f"grading {COLUMNS[key]}")) for key, images in sets.items()
    }
    report = {
        "protocol": describe(model, world, captions, seed, sampling=to_mapping(sampling)),
        **{key: summarize_images(found) for key, found in grades.items()},
        "reconstruction_psnr": to_mapping(reconstruction_quality(list(true), list(restored))),
        "image_tokenizer": {
            "scales": list(image_scales),
            **evaluate_vqvae(tokenizer, batches),
        },
        "items": grade_items(asked, {"generated": grades["drawn"]}),
    }
    if isinstance(grader, RichGrader):
        report["groups"] = {key: group_accuracies(scenes, found) for key, found in grades.items()}
        if measures_edits(model, world):
            edits, results = evaluate_edits(
                model, world, grader, count=count, seed=seed, sampling=sampling, batch_size=batch_size
            )
            report["items"] = _join_items(report["items"], edits.pop("items"))
            report["edits"] = edits
            generated = [*generated, *results]
    return report, generated


def _join_items(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Items of two sets, which have no value in common."""
    blank = [[None] * len(items["ids"]) for items in (first, second)]
    values = {name: [*found, *blank[1]] for name, found in first["values"].items()}
    values |= {name: [*blank[0], *found] for name, found in second["values"].items()}
    joined = {key: [*first[key], *second[key]] for key in ("ids", "labels")}
    return {**joined, "values": values}


def tune_sampling(
    model: CogView, world: EmojiWorld, settings: Sequence[Sampling], *, count: int, batch_size: int
) -> list[tuple[Sampling, dict[str, Any]]]:
    """Order sampling settings by their grades on tuning captions, as ``choose_sampling`` does.

    The tuning captions are held out from training, and have a seed that no report uses.

    Args:
        model: The model.
        world: The world of the model.
        settings: The sampling settings to try.
        count: Number of tuning captions.
        batch_size: Captions in a batch.

    Returns:
        The settings with the summaries of their grades, the best first.
    """
    check_world(model, world)
    asked = held_out_scenes(world, count, TUNING_SEED)
    grade = partial(grade_images, make_grader(world), references=[scene for scene, _ in asked], label="grading")
    captions = [caption for _, caption in asked]
    return choose_sampling(
        model, captions, settings, lambda images: summarize_images(grade(images)), batch_size=batch_size
    )


def summarize_images(grades: Sequence[SceneGrade], max_confusions: int = MAX_CONFUSIONS) -> dict[str, Any]:
    """Return the accuracy of each part and the most frequent confusions, as plain data.

    Args:
        grades: Grades of the images.
        max_confusions: Number of confusions to return.
    """
    return {
        "pictures": len(grades),
        **part_accuracies(grades),
        "confusions": count_confusions(grades, ("asked", "seen"), max_confusions),
    }


def parts_of_grades(grades: Sequence[SceneGrade]) -> tuple[str, ...]:
    """Return the names of the verdicts of grades: ``PARTS`` or ``RICH_PARTS``.

    Args:
        grades: Grades of one world.
    """
    return (*grades[0].parts, "everything") if grades else PARTS


def part_accuracies(grades: Sequence[SceneGrade]) -> dict[str, dict[str, Any]]:
    """Return an ``accuracy`` for each part, over the scenes that ask for it."""
    verdicts = {part: [getattr(grade, part) for grade in grades] for part in parts_of_grades(grades)}
    asked = {part: [verdict for verdict in found if verdict is not None] for part, found in verdicts.items()}
    return {part: accuracy(sum(found), len(found)) for part, found in asked.items()}


def grade_items(asked: Sequence[tuple[Scene, str]], grades: Mapping[str, Sequence[SceneGrade]]) -> dict[str, Any]:
    """Return the verdicts on single scenes, with the fields of ``ResultItems``.

    Args:
        asked: Scenes with their captions.
        grades: Grades by a name for the result, such as "generated": one for each scene.

    Returns:
        1 for right, 0 for wrong, None for a part that a scene does not ask for.
    """

    def plain(verdict: bool | None) -> float | None:
        return None if verdict is None else float(verdict)

    values = {
        f"{name}.{part}": [plain(getattr(grade, part)) for grade in found]
        for name, found in grades.items()
        for part in parts_of_grades(found)
    }
    return {
        "ids": [scene.meaning for scene, _ in asked],
        "labels": [caption for _, caption in asked],
        "values": values,
    }


def count_confusions(
    grades: Iterable[SceneGrade], keys: tuple[str, str], max_confusions: int = MAX_CONFUSIONS
) -> list[dict[str, Any]]:
    """Return the most frequent confusions as rows of the two ``keys`` and ``times``.

    Args:
        grades: Grades of images or captions.
        keys: Names of the expected and the found object in the result.
        max_confusions: Number of confusions to return.
    """
    counts = Counter(pair for grade in grades for pair in grade.confusions())
    return [
        {**dict(zip(keys, pair, strict=True)), "times": times} for pair, times in counts.most_common(max_confusions)
    ]


def format_parts(report: Mapping[str, Any], columns: Mapping[str, str]) -> list[str]:
    """Return the lines of a Markdown table: accuracies in percent with their 95% intervals.

    Args:
        report: The report.
        columns: Titles of the columns by key of the report.
    """
    lines = ["| right | " + " | ".join(columns.values()) + " |", "|---|" + "---|" * len(columns)]
    for part in RICH_PARTS:
        if part not in report[next(iter(columns))]:
            continue
        results = [report[key][part] for key in columns]
        lines.append(f"| {part} (of {results[0]['of']}) | " + " | ".join(map(format_accuracy, results)) + " |")
    return lines


def format_report(report: Mapping[str, Any]) -> str:
    """Return the report of ``evaluate_scenes`` as Markdown: a table, and the metrics of the image tokenizer."""
    tokenizer = report["image_tokenizer"]
    scales = " and ".join(map(str, tokenizer["scales"]))
    return "\n".join(
        [
            *format_parts(report, COLUMNS),
            "",
            *(format_groups(report["groups"], COLUMNS) if "groups" in report else ()),
            *(format_edits(report["edits"]) if "edits" in report else ()),
            f"Image tokenizer on {tokenizer['images']:.0f} held-out scenes at scale {scales}: "
            f"PSNR {tokenizer['psnr']:.2f} dB, "
            f"{tokenizer['codes_used']:.1%} of the codes used, perplexity {tokenizer['perplexity']:.0f}.",
        ]
    )
