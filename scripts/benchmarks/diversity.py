"""Measure how much the images of a prompt differ, beside how many are right, for several sampling settings.

What a prompt leaves open shall vary: the background of 三只狐狸 is one of twelve. For each setting the script generates
one image of each of many held-out captions, graded by the grader of the emoji world, and 16 images of each of 20
prompts that name no background. It prints a table, and writes a contact sheet of some of these prompts.

python scripts/benchmarks/diversity.py WORLD [--captions 500] [--setting temperature=0.3,top_k=5 …] [--sheet FILE]
"""

from __future__ import annotations

import argparse
import math
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from cogview import CogView, Sampling
from cogview.emoji.evaluation.scenes import held_out_scenes, part_accuracies
from cogview.emoji.grader import SceneGrader
from cogview.emoji.world import EmojiWorld
from cogview.evaluation.harness import generate_images, grade_images
from cogview.evaluation.metrics import format_accuracy
from cogview.vqvae.codec import reconstruct

PROMPTS = (
    *("一个红苹果", "一只猫", "一只狗", "一朵玫瑰", "一辆出租车", "一个足球"),
    *("两只企鹅", "两只狐狸", "两个生日蛋糕", "三只狐狸", "三个西瓜", "三只兔子", "四个足球", "四只螃蟹"),
    *("左边是狐狸，右边是苹果", "左边是狗，右边是猫", "左边是足球，右边是蝴蝶"),
    *("上面是狗，下面是房子", "上面是猫，下面是西瓜", "上面是企鹅，下面是生日蛋糕"),
)
SHOWN = (0, 1, 9, 12, 14)  # prompts on the sheet
SETTINGS = ("temperature=0.3,top_k=5,min_p=0.0,noise_version=1", "min_p=0.2", "")
IMAGES = 16
MAX_RECONSTRUCTIONS = 200  # of true scenes; 99% of them are clean by definition
CAPTION_SEED = 0  # the captions of the report on the model
SEED = 3


@dataclass(frozen=True)
class Diversity:
    """How much the images of the prompts differ.

    Attributes:
        distinct: Number of different images of each prompt.
        colours: Number of images with each background, over all prompts.
        errors: Squared error of the grader's explanation of each image; smears raise it.
    """

    distinct: Sequence[int]
    colours: Counter[str]
    errors: Sequence[float]

    def entropy(self, num_colours: int) -> float:
        """Return the entropy of the backgrounds as a fraction of that of equal numbers."""
        shares = np.array(list(self.colours.values())) / sum(self.colours.values())
        return float(-(shares * np.log(shares)).sum() / math.log(num_colours))


def parse_setting(text: str, model: CogView) -> Sampling:
    """Return the sampling settings of ``name=value,…``; what is not named is set by the model."""
    pairs = (part.split("=") for part in text.split(",") if part)
    return model.sampling(**{name: float(value) if "." in value else int(value) for name, value in pairs})


def measure_diversity(
    model: CogView, grader: SceneGrader, sampling: Sampling
) -> tuple[Diversity, list[list[Image.Image]]]:
    """Generate images of prompts that leave the background open.

    Args:
        model: The model.
        grader: The grader of its world.
        sampling: The settings.

    Returns:
        The measurement, and the images of each prompt.
    """
    rows = [list[Image.Image](model.generate(prompt, n=IMAGES, seed=SEED, sampling=sampling)) for prompt in PROMPTS]
    explained = [grader.explain(np.asarray(image)) for row in rows for image in row]
    colours = Counter(explanation.colour.name for explanation in explained)
    distinct = [len({image.tobytes() for image in row}) for row in rows]
    return Diversity(distinct, colours, [explanation.error for explanation in explained]), rows


def write_sheet(path: Path, groups: Sequence[Sequence[Sequence[Image.Image]]]) -> None:
    """Write a sheet with a row per prompt, the rows of one setting below those of another.

    Args:
        path: The PNG file.
        groups: For each setting the images of each prompt.
    """
    side, gap = groups[0][0][0].width, 4
    shown = [[group[index] for index in SHOWN] for group in groups]
    height = sum(len(group) * side + gap for group in shown)
    sheet = Image.new("RGB", (IMAGES * side, height), "white")
    top = 0
    for group in shown:
        for row in group:
            for column, image in enumerate(row):
                sheet.paste(image, (column * side, top))
            top += side
        top += gap
    sheet.save(path)


def main() -> int:
    """Print a row of the table for each setting."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("world", type=Path, help="folder that cogview scenes made")
    parser.add_argument("--model", default="cogview-emoji", help="name or folder of a model (default: %(default)s)")
    parser.add_argument("--captions", type=int, default=500, help="held-out captions (default: %(default)s)")
    parser.add_argument(
        "--setting",
        nargs="*",
        default=SETTINGS,
        help="sampling settings as NAME=VALUE,… (default: those before version 0.3, and those of the model)",
    )
    parser.add_argument("--sheet", type=Path, help="write a contact sheet of five prompts for each setting")
    options = parser.parse_args()
    model, world = CogView.from_pretrained(options.model, device="cpu"), EmojiWorld.load(options.world)
    if warnings := [warning for prompt in PROMPTS if (warning := model.prompt_warning(prompt)) is not None]:
        parser.error(f"prompts beyond the world of the model: {'; '.join(warnings)}")
    grader = SceneGrader(world)
    scenes, captions = zip(*held_out_scenes(world, options.captions, CAPTION_SEED), strict=True)
    true = np.stack([world.render(scene, number) for number, scene in enumerate(scenes[:MAX_RECONSTRUCTIONS])])
    restored = reconstruct(model.image_tokenizer, true, 64)
    limit = np.quantile([grader.explain(image).error for image in restored], 0.99)
    print("| setting | everything right | object | count | relation | different of 16 | 14 or more | entropy | clean |")
    print("|---|---|---|---|---|---|---|---|---|")
    groups = []
    for setting in options.setting:
        sampling = parse_setting(setting, model)
        images = generate_images(model, captions, SEED, sampling, 64, "generating")
        right = part_accuracies(grade_images(grader, images, scenes, "grading"))
        diversity, rows = measure_diversity(model, grader, sampling)
        groups.append(rows)
        parts = [format_accuracy(right[part]) for part in ("everything", "object", "count", "relation")]
        enough = sum(count >= 14 for count in diversity.distinct)
        print(
            f"| {setting or 'of the model'} | {' | '.join(parts)} | {np.mean(diversity.distinct):.1f} | {enough} of "
            f"{len(PROMPTS)} | {diversity.entropy(len(world.colours)):.2f} | "
            f"{np.mean(np.array(diversity.errors) <= limit):.1%} |",
            flush=True,
        )
    if options.sheet:
        write_sheet(options.sheet, groups)
    return 0


if __name__ == "__main__":
    sys.exit(main())
