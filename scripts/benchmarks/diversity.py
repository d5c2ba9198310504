"""Measure how much the images of a prompt differ, beside how many are right, for several sampling settings.

What a prompt leaves open shall vary: the background of 三只狐狸 is one of twelve. For each setting the script generates
one image of each of many held-out captions, the images that ``cogview eval scenes`` grades, and 16 images of each of 20
prompts that name no background. It writes a result file after each setting and continues from it, and prints a table.
Without WORLD it measures nothing, and shows what the file has.

python scripts/benchmarks/diversity.py WORLD --result FILE [--captions 500] [--setting min_p=0.2 …] [--sheet FILE]
python scripts/benchmarks/diversity.py --result FILE --plot FILE
"""

# C prompts, N images of each, K backgrounds
from __future__ import annotations

import argparse
import hashlib
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import arguments
import numpy as np
from PIL import Image

from cogview import CogView, Sampling
from cogview.emoji.captions import CaptionReader
from cogview.emoji.evaluation.scenes import held_out_scenes, part_accuracies
from cogview.emoji.grader import Explanation, SceneGrader, grade_explanation
from cogview.emoji.scene import Scene
from cogview.emoji.world import EmojiWorld
from cogview.errors import InputError
from cogview.evaluation.harness import generate_images, grade_images
from cogview.evaluation.manifest import (
    Manifest,
    Result,
    ResultValue,
    SeedsRecord,
    hash_prompts,
    read_result,
    unlike_fields,
    write_result,
)
from cogview.evaluation.metrics import bootstrap
from cogview.evaluation.model_record import describe_hardware, describe_model, describe_versions
from cogview.vqvae.codec import reconstruct

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PROMPTS = (
    *("一个红苹果", "一只猫", "一只狗", "一朵玫瑰", "一辆出租车", "一个足球"),
    *("两只企鹅", "两只狐狸", "两个生日蛋糕", "三只狐狸", "三个西瓜", "三只兔子", "四个足球", "四只螃蟹"),
    *("左边是狐狸，右边是苹果", "左边是狗，右边是猫", "左边是足球，右边是蝴蝶"),
    *("上面是狗，下面是房子", "上面是猫，下面是西瓜", "上面是企鹅，下面是生日蛋糕"),
)
PAIR = PROMPTS.index("左边是狐狸，右边是苹果")  # has values of its own in the result
SHOWN = (0, 1, 9, 12, 14)  # prompts on the sheet
DEFAULT, BEFORE = "default", "before_0.3"  # names of settings
BASE = Sampling(temperature=1.0, top_k=200, top_p=1.0, min_p=0.0)  # shared by the four series of settings
SERIES = {
    "temperature": (0.3, 0.5, 0.7, 1.0, 1.2, 1.5),
    "top_k": (5, 20, 200),
    "top_p": (0.7, 0.9, 0.95, 1.0),
    "min_p": (0.0, 0.05, 0.1, 0.15, 0.2, 0.3),
}
COLOURS = ("#1f6fb2", "#d1602b", "#3c8d40", "#7a4fa3")  # of the series in the plot
AXES = {
    "entropy": "entropy of the backgrounds, of 1",
    "different": "different images of 16",
    "everything": "everything right, % of the captions",
    "clean": "clean images, %",
}
PANELS = (("entropy", "everything"), ("different", "everything"), ("different", "clean"))
IMAGES = 16
ENOUGH = 14  # different images of a prompt
MAX_RECONSTRUCTIONS = 200  # of true scenes; 99% of them are clean by definition
CAPTION_SEED = 0  # of captions and their images, as in ``cogview eval scenes``
SEED = 3  # of the images of the prompts
PARTS = ("everything", "object", "count", "relation")
COLUMNS = {
    **{part: part for part in PARTS},
    "different": "different of 16",
    "enough": f"{ENOUGH} or more",
    "entropy": "entropy",
    "open_right": "right of 16",
    "clean": "clean",
    "pair_different": "different, fox and apple",
    "pair_right": "right, fox and apple",
}


@dataclass(frozen=True, kw_only=True)
class Workbench:
    """What all settings are measured with.

    Attributes:
        model: The model.
        world: Its world.
        grader: The grader of the world.
        asked: Held-out scenes with their captions.
        requested: The scene of each prompt; its background is any.
        limit: Largest error of the grader's explanation of a clean image.
    """

    model: CogView
    world: EmojiWorld
    grader: SceneGrader
    asked: Sequence[tuple[Scene, str]]
    requested: Sequence[Scene]
    limit: float

    @classmethod
    def open(cls, name: str, folder: Path, captions: int) -> Workbench:
        """Return the workbench of a model and of a folder that ``cogview scenes`` made."""
        model, world = CogView.from_pretrained(name, device="cpu"), EmojiWorld.load(folder)
        if warnings := [warning for prompt in PROMPTS if (warning := model.prompt_warning(prompt)) is not None]:
            raise InputError(f"prompts beyond the world of the model: {'; '.join(warnings)}")
        grader, asked = SceneGrader(world), held_out_scenes(world, captions, CAPTION_SEED)
        true = np.stack([world.render(scene, number) for number, (scene, _) in enumerate(asked[:MAX_RECONSTRUCTIONS])])
        restored = reconstruct(model.image_tokenizer, true, 64)
        limit = float(np.quantile([grader.explain(image).error for image in restored], 0.99))
        requested = [requested_scene(prompt, world) for prompt in PROMPTS]
        return cls(model=model, world=world, grader=grader, asked=asked, requested=requested, limit=limit)

    def manifest(self, samplings: Mapping[str, Sampling]) -> Manifest:
        """Return how the settings are measured.

        Args:
            samplings: Sampling settings by name.
        """
        return Manifest(
            measure="diversity",
            prompts=hash_prompts([caption for _, caption in self.asked] + list(PROMPTS)),
            seeds=SeedsRecord(first=CAPTION_SEED, count=len(self.asked)),
            model=describe_model(self.model),
            settings={
                "images": IMAGES,
                "seed_of_prompts": SEED,
                "sprites_sha256": hashlib.sha256(self.world.sprites.tobytes()).hexdigest(),
                "samplings": {name: asdict(sampling) for name, sampling in samplings.items()},
            },
            versions=describe_versions("pillow"),
            hardware=describe_hardware("cpu"),
        )


def requested_scene(prompt: str, world: EmojiWorld) -> Scene:
    """Return the scene that a prompt without background describes, on the first background of the world."""
    parsed = CaptionReader(world.things, world.colours).read(prompt)
    if parsed is None or parsed.colour is not None:
        raise InputError(f"expected a prompt of the emoji world that names no background, got {prompt}")
    things = tuple(next(thing for thing in world.things if thing.emoji in meant) for meant in parsed.things)
    return Scene(colour=world.colours[0], kind=parsed.kind, things=things, count=parsed.count)


def parse_setting(text: str, model: CogView) -> Sampling:
    """Return the sampling settings of ``name=value,…``; what is not named is set by the model."""
    pairs = [part.partition("=")[::2] for part in text.split(",") if part]
    try:
        return model.sampling(**{name: float(value) if "." in value else int(value) for name, value in pairs})
    except ValueError:
        raise InputError(f"expected a setting such as temperature=0.3,top_k=5, got {text}") from None


def series_settings(model: CogView) -> dict[str, Sampling]:
    """Return the default of the model, that of versions before 0.3, and the settings of the four series, by name."""
    found = {
        DEFAULT: model.sampling(),
        BEFORE: model.sampling(temperature=0.3, top_k=5, min_p=0.0, noise_version=1),
    }
    for name, values in SERIES.items():
        for value in values:
            sampling = replace(BASE, **{name: value})
            if sampling not in found.values():
                found[f"{name}_{value:g}"] = sampling
    return found


def measure_setting(bench: Workbench, sampling: Sampling) -> tuple[dict[str, ResultValue], list[list[Image.Image]]]:
    """Generate and grade images with one setting.

    Args:
        bench: The model and its grader.
        sampling: The setting.

    Returns:
        The values by the names of ``COLUMNS``, and the images of each prompt.
    """
    scenes, captions = [scene for scene, _ in bench.asked], [caption for _, caption in bench.asked]
    images = generate_images(bench.model, captions, CAPTION_SEED, sampling, 64, "generating")
    right = part_accuracies(grade_images(bench.grader, images, scenes, "grading"))
    values = {
        part: ResultValue(value=found["accuracy"], low=found["low"], high=found["high"], n=found["of"], unit="fraction")
        for part in PARTS
        if (found := right[part])["of"]
    }
    generate = partial(bench.model.generate, n=IMAGES, seed=SEED, sampling=sampling)
    rows = [list[Image.Image](generate(prompt)) for prompt in PROMPTS]
    explained = [[bench.grader.explain(np.asarray(image)) for image in row] for row in rows]
    distinct = np.array([len({image.tobytes() for image in row}) for row in rows])
    return values | prompt_values(bench, distinct, explained), rows


def prompt_values(
    bench: Workbench, distinct_C: np.ndarray, explained: Sequence[Sequence[Explanation]]
) -> dict[str, ResultValue]:
    """Return what the images of the prompts have; intervals are of a bootstrap over prompts.

    Args:
        bench: The scenes of the prompts.
        distinct_C: Number of different images of each prompt.
        explained: What the grader finds in the images of each prompt.
    """
    names = [colour.name for colour in bench.world.colours]
    counts_CK = np.array([[[each.colour.name for each in row].count(name) for name in names] for row in explained])
    right_CN = np.array(
        [
            [grade_explanation(each, replace(scene, colour=each.colour)).everything for each in row]
            for row, scene in zip(explained, bench.requested, strict=True)
        ]
    )
    clean_CN = np.array([[each.error <= bench.limit for each in row] for row in explained])

    def value(statistic: Any, unit: str) -> ResultValue:
        return ResultValue(**bootstrap(statistic, len(distinct_C)), n=len(distinct_C), unit=unit)

    def mean_of(values_C: np.ndarray) -> Any:
        return lambda rows: np.asarray(values_C[rows].mean(axis=-1))

    return {
        "different": value(mean_of(distinct_C), "images"),
        "enough": ResultValue(value=float((distinct_C >= ENOUGH).sum()), n=len(distinct_C), unit="prompts"),
        "entropy": value(partial(background_entropy, counts_CK), ""),
        "open_right": value(mean_of(right_CN.mean(axis=1)), "fraction"),
        "clean": value(mean_of(clean_CN.mean(axis=1)), "fraction"),
        "pair_different": ResultValue(value=float(distinct_C[PAIR]), n=IMAGES, unit="images"),
        "pair_right": ResultValue(value=float(right_CN[PAIR].sum()), n=IMAGES, unit="images"),
    }


def background_entropy(counts_CK: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Return the entropy of the backgrounds of some prompts as a fraction of that of equal numbers.

    Args:
        counts_CK: Number of images of each prompt with each background.
        rows: Indices of prompts, (C,) or (R, C) for R resamples.

    Returns:
        From 0, where all are equal, to 1: a scalar or (R,).
    """
    counts = counts_CK[rows].sum(axis=-2)
    shares = counts / counts.sum(axis=-1, keepdims=True)
    terms = shares * np.log(np.where(shares > 0, shares, 1))
    return np.asarray(-terms.sum(axis=-1) / math.log(counts.shape[-1]))


def known_values(path: Path, manifest: Manifest) -> tuple[dict[str, Any], dict[str, ResultValue]]:
    """Return the settings and values that a file has already.

    Args:
        path: The file; nothing is known if there is none.
        manifest: How others are measured now.

    Raises:
        InputError: The file has values of another model or protocol.
    """
    if not path.exists():
        return {}, {}
    result = read_result(path)
    unlike = unlike_fields(manifest, result.manifest, allow=("settings.samplings",))
    if manifest.model != result.manifest.model:
        unlike.append("model")
    if unlike:
        raise InputError(f"{path} was measured otherwise ({', '.join(unlike)}): remove it, or give another --result")
    return dict(result.manifest.settings["samplings"]), dict(result.results)


def table_lines(result: Result) -> list[str]:
    """Return a Markdown table with a row per setting; a part that no caption asks for has a dash."""
    lines = [f"| setting | {' | '.join(COLUMNS.values())} |", "|---" * (len(COLUMNS) + 1) + "|"]
    for name in result.manifest.settings["samplings"]:
        found = [result.results.get(f"{name}.{column}") for column in COLUMNS]
        lines.append(f"| {name} | {' | '.join('–' if each is None else format_value(each) for each in found)} |")
    return lines


def format_value(value: ResultValue) -> str:
    """Return a value with its interval."""
    style = {"fraction": ".1%", "prompts": ".0f", "images": ".1f"}.get(value.unit, ".2f")
    interval = "" if value.low is None else f" ({value.low:{style}}–{value.high:{style}})"
    return f"{value.value:{style}}{interval}"


def plot_result(result: Result, path: Path) -> None:
    """Plot right and clean images over the variety of images: a line for each series of settings.

    Args:
        result: The result.
        path: The PNG file.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # ignore settings of the user
        matplotlib.rcParams.update({"font.size": 9.5, "axes.spines.top": False, "axes.spines.right": False})
        canvas = Figure(figsize=(11, 3.8), dpi=100, layout="constrained")
        for axes, (x, y) in zip(canvas.subplots(1, len(PANELS)), PANELS, strict=True):
            _plot_panel(axes, result, x, y)
            axes.set(xlabel=AXES[x], ylabel=AXES[y])
        canvas.axes[0].legend(frameon=False, loc="lower left")
        canvas.savefig(path, metadata={"Software": None})


def _plot_panel(axes: Axes, result: Result, x: str, y: str) -> None:
    """Plot one column of the table over another one, with the intervals of the former."""
    names = {tuple(each.items()): name for name, each in result.manifest.settings["samplings"].items()}
    for (series, values), colour in zip(SERIES.items(), COLOURS, strict=True):
        settings = [(value, names.get(tuple(asdict(replace(BASE, **{series: value})).items()))) for value in values]
        known = [
            (value, result.results[f"{name}.{x}"], result.results[f"{name}.{y}"]) for value, name in settings if name
        ]
        if not known:
            continue
        heights = np.array([[up.value, up.low, up.high] for _, _, up in known]).T * 100
        bars = np.maximum([heights[0] - heights[1], heights[2] - heights[0]], 0)
        across = [along.value for _, along, _ in known]
        axes.errorbar(
            across, heights[0], yerr=bars, color=colour, marker="o", markersize=4, linewidth=1.3, elinewidth=0.6,
            label=series.replace("_", "-"),
        )  # fmt: skip
        for index in {0, len(known) - 1}:
            if known[index][0] != getattr(BASE, series):  # where all series meet
                at = (across[index], heights[0][index])
                axes.annotate(
                    f"{known[index][0]:g}", at, (3, -11), textcoords="offset points", fontsize=8, color=colour
                )
    for name, marker, label in ((DEFAULT, "*", "default"), (BEFORE, "s", "default before 0.3")):
        if f"{name}.{x}" in result.results:
            at = (result.results[f"{name}.{x}"].value, 100 * result.results[f"{name}.{y}"].value)
            axes.plot(*at, color="black", marker=marker, markersize=9, linestyle="", label=label, zorder=5)


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


def measure_settings(options: argparse.Namespace) -> None:
    """Measure the settings that the result file does not have, and write it after each."""
    bench = Workbench.open(options.model, options.world, options.captions)
    chosen = series_settings(bench.model)
    if options.setting:
        chosen = {
            text.replace("=", "_").replace(",", "-"): parse_setting(text, bench.model) for text in options.setting
        }
    samplings, results = known_values(options.result, bench.manifest({}))
    groups = []
    for name, sampling in chosen.items():
        if samplings.get(name) == asdict(sampling) and not options.sheet:
            continue
        values, images = measure_setting(bench, sampling)
        groups.append(images)
        samplings[name] = asdict(sampling)
        results |= {f"{name}.{column}": value for column, value in values.items()}
        manifest = bench.manifest({each: Sampling(**fields) for each, fields in samplings.items()})
        write_result(options.result, manifest, results)
    if options.sheet:
        write_sheet(options.sheet, groups)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure the settings, if there is a world, and print the table of the result file."""
    parser = arguments.Parser(__doc__)
    parser.add_argument(
        "world", type=arguments.folder, nargs="?", help="folder that cogview scenes made; none: measure nothing"
    )
    parser.add_argument(
        "--result", type=arguments.output_file, required=True, help="result file to write and to continue"
    )
    parser.add_argument("--model", default="cogview-emoji", help="name or folder of a model (default: %(default)s)")
    parser.add_argument(
        "--captions", type=arguments.count, default=500, help="held-out captions (default: %(default)s)"
    )
    parser.add_argument(
        "--setting",
        nargs="*",
        help="sampling settings as NAME=VALUE,… (default: series of temperature, top-k, top-p and min-p)",
    )
    parser.add_argument(
        "--sheet", type=arguments.output_file, help="write a contact sheet of five prompts for each setting"
    )
    parser.add_argument("--plot", type=arguments.output_file, help="write a PNG plot of the default settings")
    options = parser.parse_args(argv)
    try:
        if options.world is not None:
            measure_settings(options)
        result = read_result(options.result)
        if options.plot is not None:
            plot_result(result, options.plot)
    except InputError as error:
        print(f"diversity.py: {error}", file=sys.stderr)
        return 2
    print("\n".join(table_lines(result)))
    return 0


if __name__ == "__main__":
    arguments.run_script(main)
