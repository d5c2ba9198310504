"""``cogview eval MEASURE``: evaluate a model on held-out scenes, or an image tokenizer on pictures."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cogview.cli.evaluate_benchmark import benchmark
from cogview.cli.evaluate_compare import compare
from cogview.cli.evaluate_gate import gate
from cogview.cli.evaluate_image_tokenizer import image_tokenizer
from cogview.cli.evaluate_images import images
from cogview.cli.evaluate_model import model as model_measure
from cogview.cli.evaluate_reading import text_in_pictures
from cogview.cli.evaluate_samples import SAMPLES_FILE, samples
from cogview.cli.evaluate_text import text
from cogview.cli.options import (
    MODEL_HELP,
    Command,
    Decorator,
    Group,
    adapter_option,
    device_option,
    model_option,
    option_group,
    output_option,
    precision_options,
    sampling_options,
)
from cogview.cli.recipes import recipe_options
from cogview.errors import InputError
from cogview.training.recipe import Recipe

if TYPE_CHECKING:
    from cogview.modeling.config import Sampling

MEASURE_NAMES = ("scenes", "captions", "rerank", "upscale")
GENERATING = ("scenes", "rerank", "upscale")
# Options that apply to some measures only, with these measures.
PARTIAL_OPTIONS = {
    "temperature": GENERATING,
    "top_k": GENERATING,
    "top_p": GENERATING,
    "min_p": GENERATING,
    "guidance": GENERATING,
    "text_attention": GENERATING,
    "noise_version": GENERATING,
    "tune": ("scenes",),
    "candidates": ("rerank",),
}
CAPTIONS = 500
CANDIDATES = 16


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """Options of the measurement."""

    captions: int | None
    candidates: int | None
    seed: int
    tune: bool
    batch_size: int


def _evaluation_options() -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Options of ``EvaluationOptions``, passed as ``options``."""
    count = click.IntRange(min=1)
    return option_group(
        EvaluationOptions,
        "options",
        ("captions", "candidates", "seed", "tune", "batch_size"),
        click.option(
            "-n",
            "--captions",
            type=count,
            metavar="COUNT",
            show_default=str(CAPTIONS),
            help="number of held-out captions",
        ),
        click.option(
            "--candidates",
            type=count,
            metavar="COUNT",
            show_default=str(CANDIDATES),
            help="rerank: number of images of each caption",
        ),
        click.option("--seed", type=int, default=0, help="random seed of captions and images"),
        click.option(
            "--tune", is_flag=True, help="scenes: first choose temperature and top-k, on captions that no report uses"
        ),
        click.option("--batch-size", type=count, default=32, metavar="COUNT", help="number of images in a batch"),
    )


def _evaluate(
    measure: str,
    recipe: Recipe,
    model: str | None,
    adapter: tuple[str, ...],
    options: EvaluationOptions,
    settings: dict[str, Any],
    device: str,
    dtype: str,
    output: Path | None,
) -> int:
    """Evaluate a model by one measure: print a table, write the report and its companion files."""
    refuse_unused(measure, {**vars(options), **settings})
    if adapter and model is None:
        raise InputError(f"--adapter {adapter[0]} is added to its base model: name that with --model")
    from cogview.emoji.evaluation.reports import MEASURES, EvaluationSettings, tune
    from cogview.emoji.evaluation.results import write_emoji_result
    from cogview.emoji.world import EmojiWorld
    from cogview.files import write_json
    from cogview.pipeline.cogview import CogView
    from cogview.pipeline.inputs import resolve_seed
    from cogview.training.step_records import record_step

    measurement = EvaluationSettings(
        captions=options.captions or CAPTIONS,
        candidates=options.candidates or CANDIDATES,
        seed=resolve_seed(options.seed),
        batch_size=options.batch_size,
        image_scales=tuple((recipe.sections.get("image") or {}).get("scales", [1])),
    )
    world = EmojiWorld.load(recipe.world)
    opened = CogView.from_pretrained(model or last_checkpoint(recipe), device=device, dtype=dtype, adapter=adapter)
    sampling = opened.sampling(task="upscale" if measure == "upscale" else "generate", **settings)
    folder = output or recipe.work / "report"
    folder.mkdir(parents=True, exist_ok=True)
    if options.tune:
        sampling = _best_sampling(tune(opened, world, measurement, folder))
    report = MEASURES[measure].run(opened, world, sampling, measurement, folder)
    report["protocol"] |= {"weights": opened.placement.weight_format, "adapters": list(adapter)}
    write_emoji_result(folder / MEASURES[measure].result_file, measure, report, opened, world)
    write_json(folder / MEASURES[measure].file, report)
    if model is None and output is None:
        record_step(recipe, f"eval {measure}", {})
    print(MEASURES[measure].format(report))
    print(f"written to {folder}", file=sys.stderr)
    return 0


@click.group(cls=Group, no_args_is_help=False)
def command() -> None:
    """Evaluate a model on captions, held-out scenes or a benchmark, an image tokenizer on pictures, or texts."""


def _measure_options(function: Callable[..., int]) -> Callable[..., Any]:
    """Add the options that all measures share."""
    decorators: tuple[Decorator, ...] = (
        recipe_options(None),
        model_option(default=None, show_default="last checkpoint of the recipe's run", help=MODEL_HELP),
        adapter_option(),
        _evaluation_options(),
        sampling_options("codes", image_options=True),
        device_option(),
        precision_options()[0],
        output_option(default=None, show_default="WORK/report", help="folder for the report"),
    )
    decorated: Callable[..., Any] = function
    for decorate in reversed(decorators):
        decorated = decorate(decorated)
    return decorated


@click.command(cls=Command, keeps_results=False)
@_measure_options
def scenes(**values: Any) -> int:
    """Grade generated images.

    The captions are of held-out scenes; object, count, relation and colour are graded. In a rich world, style and
    characters are graded too, and so are edits by a model that was trained for them. Prints a table, and writes the
    report and its companion files.
    """
    return _evaluate("scenes", **values)


@click.command(cls=Command, keeps_results=False)
@_measure_options
def captions(**values: Any) -> int:
    """Grade generated captions.

    The images are of held-out scenes. Prints a table, and writes the report and its companion files.
    """
    return _evaluate("captions", **values)


@click.command(cls=Command, keeps_results=False)
@_measure_options
def rerank(**values: Any) -> int:
    """Grade images that are chosen by score.

    Of several images of a caption the best one is chosen. Prints a table, and writes the report.
    """
    return _evaluate("rerank", **values)


@click.command(cls=Command, keeps_results=False)
@_measure_options
def upscale(**values: Any) -> int:
    """Compare upscaled images with true ones.

    The images are of held-out scenes. Prints a table, and writes the report and its companion files.
    """
    return _evaluate("upscale", **values)


for _action in (
    samples,
    scenes,
    captions,
    rerank,
    upscale,
    image_tokenizer,
    text,
    text_in_pictures,
    benchmark,
    compare,
    gate,
):
    command.add_command(_action)
command.add_command(model_measure)
command.add_command(images)


def refuse_unused(measure: str, values: Mapping[str, Any]) -> None:
    """Raise InputError for an option that does not apply to a measure."""
    for name, measures in PARTIAL_OPTIONS.items():
        value = values.get(name)
        if value is not None and value is not False and measure not in measures:
            option = "--" + name.replace("_", "-")
            raise InputError(f"{option} has no effect on {measure}, only on {', '.join(measures)}; leave it out")


def _best_sampling(rows: list[dict[str, Any]]) -> Sampling:
    """Print the accuracies of a tuned grid; the setting of its first row."""
    from cogview.config_io import from_mapping
    from cogview.modeling.config import Sampling

    for row in rows:
        print(f"{row['sampling']}: everything right {row['everything']['accuracy']:.1%}", file=sys.stderr)
    return from_mapping(Sampling, rows[0]["sampling"], where="the tuned sampling settings")


def read_report(recipe: Recipe, measure: str) -> dict[str, Any] | None:
    """Return the report of a measure below the recipe's work folder; None if it was not measured.

    Raises:
        InputError: The report is damaged, or of another checkpoint than the last.
    """
    from cogview.emoji.evaluation.reports import MEASURES
    from cogview.plain_data import read_json

    file = SAMPLES_FILE if measure == "samples" else MEASURES[measure].file
    path, checkpoint = recipe.work / "report" / file, last_checkpoint(recipe)
    if not path.is_file():
        return None
    report = read_json(path)
    protocol = report.get("protocol") if isinstance(report, dict) else None
    model = protocol.get("model") if isinstance(protocol, dict) else None
    if not isinstance(model, str):
        raise InputError(f"{path} is no report of a model; evaluate again: cogview eval {measure} {recipe.path}")
    if Path(model).name != checkpoint.name:
        raise InputError(
            f"{path} is a report on {model}, not on {checkpoint}; "
            f"evaluate that first: cogview eval {measure} {recipe.path}"
        )
    return dict(report)


def last_checkpoint(recipe: Recipe) -> Path:
    """Return the newest checkpoint of the recipe's transformer; InputError if there is none."""
    from cogview.training.run_folder import RunFolder

    found = RunFolder(recipe.transformer_run).checkpoints()
    if not found:
        raise InputError(f"{recipe.transformer_run} holds no checkpoint; train with: cogview train {recipe.path}")
    return found[-1]
