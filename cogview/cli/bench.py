"""``cogview bench``: benchmark generation against the limits of the hardware."""

from __future__ import annotations

import re
from pathlib import Path

import click

from cogview.cli.options import (
    DEFAULT_MODEL,
    DTYPES,
    FILE,
    Command,
    adapter_option,
    device_option,
    model_option,
    speculative_option,
)
from cogview.cli.result_file import check_result_path
from cogview.files import write_json

EPILOG = """
Columns: batch: images generated at once; first image, s: seconds from the request until the images of the batch are
finished, median (minimum..maximum); s/image: that for each image; images/s: its inverse; tokens/s:
codes of all images except the first ones; roofline: minimum time of these codes on the hardware over the time they
took, where the minimum is the longer of moving weights and KV cache at the measured bandwidth, one code after another,
and of computing the products (a small model in the cache of a processor can exceed it, and so can speculative
decoding); predicted: peak memory by cogview estimate; peak: peak memory of the process, on a CPU resident memory with
mapped files.
""".strip().replace("\n", " ")


class BatchSizes(click.ParamType):  # type: ignore[type-arg]  # generic since click 8.5
    """Batch sizes from 1 on, separated by commas."""

    name = "counts"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> list[int]:
        """Return the numbers."""
        text = str(value)
        if not re.fullmatch(r"0*[1-9]\d{0,8}(,0*[1-9]\d{0,8})*", text, re.ASCII):
            self.fail(f'"{text}" is not a list of whole numbers from 1 on, such as 1,8,32', param, ctx)
        return [int(part) for part in text.split(",")]


@click.command(cls=Command, epilog=EPILOG, keeps_results=False)
@model_option(default=None, show_default=DEFAULT_MODEL)
@adapter_option()
@click.option(
    "--random",
    "random_shape",
    metavar="SHAPE",
    help="random weights instead of --model: LAYERSxWIDTHxHEADS or a size such as 4b (see cogview estimate), with the "
    "vocabulary, the VQ-VAE and the 32 x 32 codes of CogView v1; without speculative decoding unless --speculative is "
    "a number",
)
@device_option()
@click.option("--dtype", type=click.Choice(DTYPES), default="auto", help="format of the weights")
@speculative_option()
@click.option(
    "--codes",
    "num_codes",
    type=int,
    metavar="COUNT",
    show_default="all",
    help="codes of each image to generate, 2 or more; the time is extrapolated to whole images",
)
@click.option(
    "--batch", "batches", type=BatchSizes(), default="1,8,32", metavar="COUNTS", help="batch sizes, separated by commas"
)
@click.option(
    "--repeats", type=click.IntRange(min=1), default=5, metavar="COUNT", help="timed requests of each batch size"
)
@click.option("--json", "json_path", type=FILE, metavar="FILE", help="also write all results to this file")
def command(
    model: str | None,
    adapter: tuple[str, ...],
    random_shape: str | None,
    device: str,
    dtype: str,
    speculative: int | None,
    num_codes: int | None,
    batches: list[int],
    repeats: int,
    json_path: Path | None,
) -> int:
    """Measure the time and memory of generation, and compare them with the limits of the hardware.

    Each batch size runs in a process, with one request to warm up and --repeats timed requests. Texts have the maximum
    length. A batch that does not fit in the free memory is skipped. The status is 1 if a batch fits by the estimate but
    fails.
    """
    from cogview.benchmark.report import BenchmarkReport, find_benchmark_target
    from cogview.checkpoints.adapter_choice import AdapterChoice
    from cogview.image_io.png import prepared_folder

    if model is not None and random_shape is not None:
        raise click.UsageError("--random replaces --model: give either", click.get_current_context())
    if adapter and random_shape is not None:
        raise click.UsageError("--adapter needs a trained model, not --random", click.get_current_context())
    if json_path is not None:
        check_result_path(json_path, is_bench=True)
    name = model or DEFAULT_MODEL
    choices = tuple(map(AdapterChoice.parse, adapter))
    target = find_benchmark_target(
        name, random_shape, device=device, dtype=dtype, speculative=speculative, adapters=choices
    )
    report = BenchmarkReport(
        " + ".join([name, *map(str, choices)]) if random_shape is None else f"random {random_shape}",
        target,
        num_codes=num_codes,
        repeats=repeats,
        notify=lambda line: click.echo(line, err=True),
    )
    estimates = [report.estimate(rows) for rows in batches]  # first, since this may refuse the model
    for line in report.header():
        click.echo(line)
    rows = []
    for estimate in estimates:
        rows.append(report.measure(estimate))
        click.echo(report.line(rows[-1]))
    if json_path is not None:
        with prepared_folder(json_path.parent):
            write_json(json_path, {**report.settings_as_json(), "rows": rows})
    return 1 if any("failed" in row for row in rows) else 0
