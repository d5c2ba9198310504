"""``cogview estimate``: estimate the memory and time of inference or training; no weights are loaded."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import click

from cogview.cli.finite_range import FiniteRange
from cogview.cli.options import (
    DEFAULT_MODEL,
    DTYPES,
    Command,
    device_option,
    model_option,
    option_group,
)

POSITIVE = click.IntRange(min=1)
TASK_NAMES = {"rerank": "score"}  # of commands that are named unlike their task


ABOVE_0 = FiniteRange(min=0, min_open=True)


@dataclass(frozen=True, kw_only=True)
class InferenceOptions:
    """Options of an inference estimate; None stands for a default."""

    task: str | None
    n: int | None
    dtype: str | None
    guidance: float | None
    bandwidth: float | None  # GB/s


def inference_options() -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Add the options of ``InferenceOptions``, passed as ``inference``."""
    return option_group(
        InferenceOptions,
        "inference",
        ("task", "n", "dtype", "guidance", "bandwidth"),
        click.option(
            "--task",
            metavar="TASK",
            show_default="generate",
            help="generate, caption, upscale, low_level (upscaling of one window) or score (= rerank)",
        ),
        click.option("-n", type=POSITIVE, metavar="COUNT", show_default="1", help="sequences at once"),
        click.option("--dtype", type=click.Choice(DTYPES), show_default="auto", help="format of the weights"),
        click.option(
            "--guidance",
            type=FiniteRange(min=0),
            metavar="S",
            show_default="set by the model",
            help="scale of classifier-free guidance; values other than 1 double the sequences",
        ),
        click.option(
            "--bandwidth",
            type=ABOVE_0,
            metavar="GB/s",
            show_default="measured, or assumed for a size",
            help="memory bandwidth of the device",
        ),
    )


# By the fields of ``planning.training_reports.TrainingOptions``.
TRAINING_OPTIONS = {
    "gpus": click.option("--gpus", type=POSITIVE, metavar="COUNT", show_default="1", help="processes, one GPU each"),
    "engine": click.option(
        "--engine",
        type=click.Choice(["torch", "deepspeed"]),
        show_default="deepspeed with --zero or --offload, else torch",
        help="training engine",
    ),
    "zero": click.option(
        "--zero",
        type=click.IntRange(0, 3),
        metavar="STAGE",
        help="ZeRO stage, sharded over GPUs: 0 nothing, 1 the optimizer, 2 gradients too, 3 weights too",
    ),
    "offload": click.option("--offload", is_flag=True, help="keep the optimizer in the memory of the host"),
    "micro_batch_size": click.option(
        "--micro-batch-size",
        "--rows",
        "micro_batch_size",
        type=POSITIVE,
        metavar="COUNT",
        show_default="maximum that fits",
        help="sequences that a GPU computes at once",
    ),
    "batch_size": click.option(
        "--batch-size",
        "--batch",
        "batch_size",
        type=POSITIVE,
        metavar="COUNT",
        show_default="by size, see the table",
        help="sequences of a step, over all GPUs",
    ),
    "length": click.option(
        "--length",
        type=POSITIVE,
        metavar="COUNT",
        show_default="maximum of the model",
        help="positions of a sequence",
    ),
    "precision": click.option(
        "--precision",
        type=click.Choice(["float32", "bfloat16", "float16"]),
        show_default="as in training",
        help="dtype of products",
    ),
    "checkpointing": click.option(
        "--checkpointing",
        type=click.Choice(["none", "selective", "full"]),
        show_default="minimum that fits",
        help="activations that the backward recomputes",
    ),
    "lora": click.option(
        "--lora", type=POSITIVE, metavar="RANK", help="train an adapter of this rank instead of all weights"
    ),
    "mfu": click.option(
        "--mfu",
        type=FiniteRange(min=0, max=1, min_open=True),
        metavar="FRACTION",
        show_default="0.4, assumed",
        help="model FLOP/s utilization: fraction of --flops that training reaches",
    ),
    "tokens": click.option(
        "--tokens",
        type=FiniteRange(min=1),
        metavar="COUNT",
        show_default="20 per parameter",
        help="positions of all sequences of the run",
    ),
}


def training_options() -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Add ``TRAINING_OPTIONS``, passed as a mapping ``training``."""
    return option_group(dict, "training", tuple(TRAINING_OPTIONS), *TRAINING_OPTIONS.values())


@click.command(cls=Command)
@model_option(
    default=None,
    show_default=DEFAULT_MODEL,
    help="a name listed by cogview models, a checkpoint folder, or a size (5m, 20m, 100m, 300m, 1b, 4b) with the "
    "vocabulary and VQ-VAE of CogView v1",
)
@device_option(
    default=None,
    show_default="auto",
    help="auto, cpu, cuda, cuda:N or mps of this machine, or a size such as cpu:16GB or cuda:24GB",
)
@click.option(
    "--flops",
    type=ABOVE_0,
    metavar="TFLOP/s",
    show_default="measured, or assumed for a size",
    help="dense peak of the device in the dtype of products",
)
@click.option("--json", "as_json", is_flag=True, help="print one JSON object")
@inference_options()
@click.option("--train", is_flag=True, help="estimate training; the options below need it")
@training_options()
def command(
    model: str | None,
    device: str | None,
    flops: float | None,
    as_json: bool,
    inference: InferenceOptions,
    train: bool,
    training: Mapping[str, Any],
) -> int:
    """Estimate the memory and time of a job, part by part and with the formulas.

    No weights are loaded. Sequences have the maximum length. A job that does not fit is reported with the options that
    fit. With --train the job is training; --train without --model prints a table of sizes with settings to start from.
    """
    if train:
        _refuse(vars(inference), "does not go with --train")
        report = _training_report(model, device, flops, training)
    else:
        _refuse(training, "needs --train")
        report = _inference_report(model or DEFAULT_MODEL, device or "auto", flops, inference)
    content, lines = report
    click.echo(json.dumps(content(), ensure_ascii=False, indent=2) if as_json else "\n".join(lines()))
    return 0


Report = tuple[Callable[[], dict[str, Any]], Callable[[], list[str]]]


def _refuse(options: Mapping[str, Any], reason: str) -> None:
    """Raise UsageError if an option is given."""
    for name, value in options.items():
        if value not in (None, False):
            flag = f"-{name}" if len(name) == 1 else f"--{name.replace('_', '-')}"
            raise click.UsageError(f"{flag} {reason}", click.get_current_context())


def _inference_report(name: str, device: str, flops: float | None, options: InferenceOptions) -> Report:
    """Return the report of an inference estimate, as functions for JSON content and lines."""
    from cogview.planning.reports import report_inference
    from cogview.planning.target import find_speed, find_target, load_target_model

    model = load_target_model(name)
    target = find_target(device, options.dtype or "auto", model)
    task = options.task or "generate"
    report = report_inference(
        name,
        model,
        target,
        find_speed(
            target,
            _scaled(options.bandwidth, 1e9),
            _scaled(flops, 1e12),
            lambda device: click.echo(f"measuring {device} briefly; --bandwidth and --flops avoid it", err=True),
        ),
        task=TASK_NAMES.get(task, task),
        rows=options.n or 1,
        guidance=options.guidance,
    )
    return report.as_json, report.as_text


def _training_report(name: str | None, device: str | None, flops: float | None, options: Mapping[str, Any]) -> Report:
    """Return the report of a training estimate, or the table of sizes, as functions for JSON content and lines."""
    from cogview.planning.target import find_target, load_target_model
    from cogview.planning.training_reports import TrainingOptions, report_training, size_table, size_table_text

    if name is None:
        of_model = {option: value for option, value in options.items() if option != "mfu"}
        _refuse({"device": device, **of_model}, "is about one model: name it with --model, such as --model 4b")
        table = size_table(_scaled(flops, 1e12), options["mfu"])
        return lambda: table, lambda: size_table_text(table)
    model = load_target_model(name)
    target = find_target(device or "auto", "float32", model)
    report = report_training(
        name,
        model,
        target,
        TrainingOptions(**options),
        flops=_scaled(flops, 1e12),
        on_measure=lambda device: click.echo(f"measuring {device} briefly; --flops avoids it", err=True),
    )
    return report.as_json, report.as_text


def _scaled(value: float | None, unit: float) -> float | None:
    """Return ``value`` in the base unit; None stays None."""
    return None if value is None else value * unit
