"""Measures of the images that a model generates of prompts, as rows of a result."""

# C prompts, N images of each
from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from cogview.config_io import to_mapping
from cogview.errors import InputError
from cogview.evaluation.diversity import (
    choice_sizes,
    code_entropy,
    different_share,
    expected_best,
    expected_choice,
    pairwise_distance,
)
from cogview.evaluation.manifest import Manifest, ResultCurve, SeedsRecord, SelectionRecord, hash_prompts
from cogview.evaluation.metrics import bootstrap
from cogview.evaluation.model_record import describe_hardware, describe_model, describe_versions
from cogview.evaluation.model_report import ResultTable
from cogview.modeling.config import Sampling
from cogview.pipeline.cogview import CogView
from cogview.pipeline.ranking_rules import RANKING_RULES
from cogview.pipeline.requests import GenerationRequest
from cogview.pipeline.results import GeneratedImage, only_images

IMAGES_AT_A_TIME = 256
# The log-probability that judges a choice by another one. Both are of one model, but share no term.
JUDGES = {"caption": "picture", "picture": "caption"}


@dataclass(frozen=True, kw_only=True)
class ImageJudge:
    """What judges the images that a score chooses.

    Attributes:
        name: Its name in results.
        label: What it measures, in words.
        unit: Unit of its values.
        values_of: Returns the values of images of a prompt; larger is better.
    """

    name: str
    label: str
    unit: str
    values_of: Callable[[Sequence[GeneratedImage]], list[float]]


@dataclass(frozen=True, kw_only=True)
class PromptSettings:
    """How the images of prompts are generated and chosen.

    Attributes:
        images: Images of each prompt, at least 2.
        seed: Seed of all images; their numbers distinguish their noise.
        sampling: Sampling settings.
        rank_by: Score that chooses among the images of a prompt; None: no choice is measured.
        judge: Judge of the choice; None: the score that ``JUDGES`` names.
        batch_size: Maximum number of images in a batch; None: as many as memory holds and pay.
    """

    images: int
    seed: int
    sampling: Sampling
    rank_by: str | None = None
    judge: ImageJudge | None = None
    batch_size: int | None = None


def require_judge(model: CogView, rank_by: str, batch_size: int | None = None) -> ImageJudge:
    """Return the judge of a choice by a score: another score of the model.

    Args:
        model: The model, which computes both.
        rank_by: The score that chooses.
        batch_size: Maximum number of images in a batch; None: as many as memory holds and pay.

    Raises:
        InputError: No score is independent of it, or the weights were not trained for one of the two.
    """
    if rank_by not in JUDGES:
        raise InputError(
            f"a choice by {rank_by} has no independent judge, since it takes in every score; choose by one of: "
            f"{', '.join(JUDGES)}, or let the grader of the emoji world judge: --judge emoji-cpu"
        )
    name = JUDGES[rank_by]
    for each in (rank_by, name):
        model.require_ranking(each)

    def values_of(images: Sequence[GeneratedImage]) -> list[float]:
        return [score.per_piece for score in model.score(images, by=name, batch_size=batch_size)]

    return ImageJudge(name=name, label=RANKING_RULES[name].formula, unit="nats per token", values_of=values_of)


def require_usable(model: CogView, prompts: Mapping[int, str], path: Path) -> list[str]:
    """Return the prompts of a file, each of which the model can use.

    Args:
        model: The model.
        prompts: The prompts by the numbers of their lines.
        path: The file, for messages.

    Raises:
        InputError: One is too long for the model.
    """
    for number, prompt in prompts.items():
        if (problem := model.prompt_problem(prompt)) is not None:
            raise InputError(f"{path}, line {number}: {problem}")
    return list(prompts.values())


def measure_prompts(table: ResultTable, model: CogView, prompts: Sequence[str], settings: PromptSettings) -> Manifest:
    """Generate images of prompts and measure how much those of a prompt differ.

    Args:
        table: Receives the results, with a value of each prompt.
        model: The model.
        prompts: Different prompts that it can use.
        settings: How their images are generated and chosen.

    Returns:
        How the results were measured.

    Raises:
        InputError: No score is independent of the one that chooses, or the model cannot compute them.
    """
    judge = settings.judge
    if settings.rank_by is not None:
        model.require_ranking(settings.rank_by)
        judge = judge or require_judge(model, settings.rank_by, settings.batch_size)
    differences: list[tuple[float, float, float]] = []
    scores: list[list[float]] = []
    judged: list[list[float]] = []
    for images in generate_groups(model, prompts, settings):
        pixels = np.stack([np.asarray(image) for image in images])
        codes = np.stack([image.codes.reshape(-1) for image in images])
        differences.append((different_share(pixels), pairwise_distance(pixels), code_entropy(codes)))
        if settings.rank_by is not None and judge is not None:
            row = model.score(images, by=settings.rank_by, batch_size=settings.batch_size)
            scores.append([score.per_piece for score in row])
            judged.append(judge.values_of(images))
    units = {
        "different_images": "fraction",
        "pairwise_distance": "RMS of RGB in [0, 1]",
        "code_entropy": "nats per code",
    }
    for (name, unit), values in zip(units.items(), np.array(differences).T, strict=True):
        better = True if name == "different_images" else None
        add_prompt_values(table, name, (prompts, values), unit, higher_is_better=better)
    if settings.rank_by is not None and judge is not None:
        add_choice(table, prompts, np.array(scores), np.array(judged), settings.rank_by, judge)
        table.settings["judge"] = judge.label
    chosen = "none" if settings.rank_by is None else model.ranking_rule(settings.rank_by).formula
    return Manifest(
        measure="model prompts",
        prompts=hash_prompts(prompts),
        selection=SelectionRecord(candidates=settings.images, by=chosen),
        seeds=SeedsRecord(first=settings.seed, count=1),
        sampling=to_mapping(settings.sampling),
        model=describe_model(model),
        settings=table.settings,
        versions=describe_versions(),
        hardware=describe_hardware(model.placement.device),
    )


def generate_groups(model: CogView, prompts: Sequence[str], settings: PromptSettings) -> Iterator[list[GeneratedImage]]:
    """Yield the images of each prompt; image i has the seed and the number i, as those of ``cogview generate``.

    Args:
        model: The model.
        prompts: The prompts.
        settings: How their images are generated.
    """
    count = settings.images
    at_a_time = max(1, IMAGES_AT_A_TIME // count)
    total = len(prompts) * count
    with tqdm(total=total, unit="image", desc="generating", disable=None) as bar:
        for first in range(0, len(prompts), at_a_time):
            requests = [
                GenerationRequest(prompt=prompt, seed=settings.seed, index=index, sampling=settings.sampling)
                for prompt in prompts[first : first + at_a_time]
                for index in range(count)
            ]
            group: list[GeneratedImage] = []
            for image in only_images(model.run(requests, batch_size=settings.batch_size)):
                bar.update()
                group.append(image)
                if len(group) == count:
                    yield group
                    group = []


def add_prompt_values(
    table: ResultTable,
    name: str,
    items: tuple[Sequence[str], NDArray[np.float64]],
    unit: str,
    *,
    higher_is_better: bool | None = None,
) -> None:
    """Add a mean over prompts with its bootstrap interval, and the value of each prompt.

    Args:
        table: The table.
        name: Name of the value.
        items: The prompts, and their values (C,). A single one has no interval.
        unit: Unit of the values.
        higher_is_better: Whether a larger value is better; None where neither is.
    """
    prompts, values = items
    interval = {"value": float(values.mean())}
    if len(values) > 1:
        interval = bootstrap(lambda rows: np.asarray(values[rows].mean(axis=-1)), len(values))
    table.add(name, interval, len(values), unit, higher_is_better=higher_is_better)
    table.items[name] = dict(zip(prompts, map(float, values), strict=True))


def add_choice(
    table: ResultTable,
    prompts: Sequence[str],
    scores_CN: NDArray[np.float64],
    judged_CN: NDArray[np.float64],
    by: str,
    judge: ImageJudge,
) -> None:
    """Add what a choice by a score gains in the eyes of a judge, and what the best choice would gain.

    Args:
        table: The table.
        prompts: The prompts.
        scores_CN: Score by which an image is chosen.
        judged_CN: Its value by the judge.
        by: Name of the score.
        judge: The judge.
    """
    sizes = choice_sizes(scores_CN.shape[1])
    curves = {
        f"{judge.name}_of_best_by_{by}": expected_choice(judged_CN, scores_CN, sizes),
        f"{judge.name}_of_best_possible": expected_best(judged_CN, sizes),
    }
    for curve, found_CS in curves.items():
        names_of_sizes = [f"{curve}_of_{size}" for size in sizes]
        for name, values in zip(names_of_sizes, found_CS.T, strict=True):
            add_prompt_values(table, name, (prompts, values), judge.unit, higher_is_better=True)
        rows = [table.values[name] for name in names_of_sizes]
        table.curves[curve] = ResultCurve(
            x=[float(size) for size in sizes],
            y=[row.value for row in rows],
            low=[row.low for row in rows if row.low is not None],
            high=[row.high for row in rows if row.high is not None],
            x_label="images to choose from",
            y_label=f"{judge.label}, {judge.unit}",
        )
