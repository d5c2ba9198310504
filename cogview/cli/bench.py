"""``cogview bench``: how fast a model draws here, and how fast it could."""

from __future__ import annotations

import argparse
import re
import sys
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from cogview.cli.estimate import open_configs, preset_config
from cogview.cli.options import DEFAULT_MODEL, add_parallel_argument, parse_speculative, require_positive
from cogview.errors import InputError
from cogview.files import write_json
from cogview.formatting import format_bytes
from cogview.planning import ESTIMATE_MARGIN

if TYPE_CHECKING:
    from cogview.benchmark.measure import BenchmarkResult, BenchmarkTarget
    from cogview.modeling.config import ModelConfig
    from cogview.planning.inference import HardwareSpeed, InferenceEstimate

# Columns of the table, their widths, and what --help says of them.
COLUMNS = {
    "batch": (5, "pictures drawn at once"),
    "first picture, s": (24, "from request to pixels, which a batch has all at the same time; median (least..most)"),
    "s/picture": (9, "that for each picture"),
    "pictures/s": (10, "its inverse"),
    "tokens/s": (8, "codes of all pictures behind the first ones"),
    "roofline": (
        8,
        "the least time of those codes over the time they took; least is what the probe's bandwidth needs to move "
        "weights, keys and values one code after another, or its matrix rate for the products, if that is longer (a "
        "small model in a processor's cache can beat it, and so can guesses: --parallel)",
    ),
    "predicted": (9, "peak memory by cogview estimate"),
    "seen": (9, "peak memory of the process: on a CPU resident memory, mapped files included"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.description = (
        "Draw pictures and say how fast that was, against what the machine could do. Each batch size has a process of "
        "its own, draws once to warm up and then --repeats times; texts are as long as they may be. A batch that would "
        "not fit in the free memory is not tried."
    )
    parser.epilog = "Columns: " + "; ".join(f"{name}: {words}" for name, (_, words) in COLUMNS.items()) + "."
    models = parser.add_mutually_exclusive_group()
    models.add_argument(
        "--model", default=DEFAULT_MODEL, metavar="NAME_OR_FOLDER", help="cogview models lists the names"
    )
    models.add_argument(
        "--random",
        metavar="SHAPE",
        help="instead: random weights of LAYERSxWIDTHxHEADS or of a size such as 4b (see cogview estimate), with the "
        "released vocabulary and VQ-VAE and 32 x 32 codes, drawn one after another unless --parallel is a number",
    )
    parser.add_argument(
        "--codes",
        type=int,
        metavar="COUNT",
        help="draw only so many codes of each picture, and extrapolate to whole ones (default: all)",
    )
    parser.add_argument("--batch", default="1,8,32", metavar="COUNTS", help="how many pictures at once, with commas")
    parser.add_argument("--repeats", type=int, default=5, metavar="COUNT", help="timed requests of each batch size")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    parser.add_argument("--dtype", default="auto", help="auto, float32, bfloat16, float16, int8 or int4")
    add_parallel_argument(parser)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there too, every time included")


def run(args: argparse.Namespace) -> int:
    """Print a row for each batch size; status 1 if one fitted by the plan and failed all the same."""
    batches = read_batches(args.batch)
    require_positive("--repeats", args.repeats)
    if args.json is not None:
        check_output(args.json)
    subject = open_subject(args)
    whole = subject.config.grid**2
    codes = whole if args.codes is None else args.codes
    if not 2 <= codes <= whole:  # what is told of codes is told of those behind the first
        raise InputError(f"--codes must be from 2 to {whole}, the codes of a picture, got {codes}")
    bench = BenchmarkReport(
        f"random {args.random}" if args.random is not None else args.model, subject, codes, args.repeats
    )
    plans = [bench.plan(rows) for rows in batches]  # before anything is measured: this may refuse the model
    for line in bench.head():
        print(line, flush=True)
    rows = []
    for plan in plans:
        rows.append(bench.row(plan))
        print(bench.line(rows[-1]), flush=True)
    if args.json is not None:
        write_json(args.json, {**bench.about(), "rows": rows})
    return 1 if any("failed" in row for row in rows) else 0


def read_batches(text: str) -> list[int]:
    """The numbers of --batch; InputError for any other text."""
    if not re.fullmatch(r"0*[1-9]\d{0,8}(,0*[1-9]\d{0,8})*", text, re.ASCII):
        raise InputError(f"--batch must be whole numbers above 0 with commas between, such as 1,8,32, got {text!r}")
    return [int(part) for part in text.split(",")]


def check_output(path: Path) -> None:
    """InputError unless a file can be written at ``path``: after minutes would be late to say so."""
    from cogview.image_io.png import prepare_folder

    if path.is_dir():
        raise InputError(f"--json {path} is a folder; expected the name of a file")
    if not path.parent.is_dir():
        raise InputError(f"--json {path}: there is no folder {path.parent}; make it first, or choose another name")
    prepare_folder(path.parent)


def open_subject(args: argparse.Namespace) -> BenchmarkTarget:
    """What to measure, without any weights yet."""
    from cogview.benchmark.measure import BenchmarkTarget
    from cogview.checkpoints.registry import resolve_checkpoint
    from cogview.device import choose_placement
    from cogview.vqvae.model import VQVAEConfig

    if args.random is not None:
        config, image_config, stored, folder = random_config(args.random), VQVAEConfig.released(), None, None
    else:
        config, image_config, stored = open_configs(args.model)
        folder = resolve_checkpoint(args.model)
    placement = choose_placement(
        args.device, args.dtype, stored=stored, num_parameters=config.transformer.num_parameters
    )
    return BenchmarkTarget(
        config=config,
        image_config=image_config,
        placement=placement,
        folder=folder,
        # What random weights expect depends little on what was drawn: guesses would hold more often than of any others.
        speculative=1 if folder is None and args.parallel == "auto" else parse_speculative(args),
    )


def random_config(shape: str) -> ModelConfig:
    """The settings of a preset, or of LAYERSxWIDTHxHEADS in its place, with what the released models have."""
    from cogview.modeling.config import PRESETS

    if shape in PRESETS:
        return preset_config(shape)
    found = re.fullmatch(r"(\d{1,9})x(\d{1,9})x(\d{1,9})", shape, re.ASCII)
    if found is None:
        raise InputError(
            f"--random must be LAYERSxWIDTHxHEADS such as 12x832x13, or one of {', '.join(PRESETS)}, got {shape!r}"
        )
    like = preset_config(next(iter(PRESETS)))
    layers, width, heads = map(int, found.groups())
    try:
        transformer = replace(like.transformer, num_layers=layers, width=width, num_heads=heads)
    except ValueError as error:
        raise InputError(f"--random {shape}: {error}") from None
    return replace(like, transformer=transformer)


class BenchmarkReport:
    """A model on a device: what is measured, in words and as JSON."""

    def __init__(self, name: str, subject: BenchmarkTarget, codes: int, repeats: int) -> None:
        self.name, self.subject, self.codes, self.repeats = name, subject, codes, repeats
        self.whole = subject.config.grid**2
        self.speed: HardwareSpeed | None = None

    def plan(self, rows: int) -> InferenceEstimate:
        """Of one batch size, by ``cogview estimate``."""
        from cogview.planning.inference import estimate

        place, config = self.subject.placement, self.subject.config
        return estimate(
            config,
            self.subject.image_config,
            task="generate",
            rows=rows,
            dtype=place.quantization or str(place.dtype).removeprefix("torch."),
            device_type=place.device.type,
            guided=config.sampling.guidance != 1,
        )

    def head(self) -> list[str]:
        """Lines above the rows; takes a second, for the probe."""
        import torch

        speed, shape = self.probed(), self.subject.config.transformer
        lines = [
            f"{self.name}: {shape.num_layers} layers, width {shape.width}, {shape.num_heads} heads; "
            f"{self.whole:,} codes a picture",
            f"{self.subject.placement}; PyTorch {torch.__version__}, {torch.get_num_threads()} threads",
            f"probe: {speed.bandwidth / 1e9:.4g} GB/s, {speed.flops / 1e12:.4g} TFLOP/s",
        ]
        if self.subject.speculative == 1:
            lines.append("drawn: one code after another")
        if self.codes < self.whole:
            lines += [
                f"drawn: the first {self.codes:,} codes of each picture; ~ is extrapolated to whole pictures, and",
                "predicted is for whole ones; tokens/s, roofline and seen are those of the codes drawn",
            ]
        return [*lines, "", "  ".join(name.rjust(width) for name, (width, _) in COLUMNS.items())]

    def probed(self) -> HardwareSpeed:
        """What the device reads and multiplies."""
        import torch

        from cogview.planning.inference import measure_hardware

        if self.speed is None:
            place = self.subject.placement
            print(f"measuring {place.device} for a moment", file=sys.stderr)
            self.speed = measure_hardware(place.device, place.dtype)
            if place.device.type == "cuda":
                torch.cuda.empty_cache()  # the processes that follow need it
        return self.speed

    def row(self, plan: InferenceEstimate) -> dict[str, Any]:
        """All that is found of a batch size; ``left_out`` or ``failed`` say why there is nothing."""
        from cogview.benchmark.measure import BenchmarkResult, Failed, measure_in_subprocess
        from cogview.device import available_memory

        free = available_memory(self.subject.placement.device)
        row = {"batch": plan.rows, "predicted_bytes": plan.total, "free_bytes": free}
        if plan.total > (1 - ESTIMATE_MARGIN) * free:
            return {**row, "left_out": "does not fit"}
        drawn = replace(plan, forward_passes=plan.forward_passes[: self.codes])
        seconds = (1 + self.repeats) * drawn.seconds(self.probed()).total
        print(f"batch {plan.rows}: 1 + {self.repeats} requests, about {_number(seconds)} s", file=sys.stderr)
        try:
            measured = measure_in_subprocess(self.subject, plan.rows, codes=self.codes, repeats=self.repeats, free=free)
        except Failed as error:
            return {**row, "failed": str(error)}
        return row | results_as_json(
            BenchmarkResult(plan=plan, speed=self.probed(), codes=self.codes, measured=measured)
        )

    def line(self, row: dict[str, Any]) -> str:
        """A row of the table."""
        batch, predicted = str(row["batch"]).rjust(COLUMNS["batch"][0]), format_bytes(row["predicted_bytes"])
        if problem := row.get("left_out"):
            free = format_bytes(row["free_bytes"])
            return f"{batch}  {problem}: {predicted} predicted, {free} free, of which {ESTIMATE_MARGIN:.0%} stay free"
        if problem := row.get("failed"):
            return f"{batch}  failed: {problem}; {predicted} predicted"
        about = "~" if self.codes < self.whole else ""
        first, seen = row["first_picture_s"], row["seen_bytes"]
        span = f"({_number(first['min'])}..{_number(first['max'])})"
        cells = {
            "batch": batch,
            "first picture, s": f"{about}{_number(first['median'])} {span}",
            "s/picture": about + _number(1 / row["pictures_per_s"]),
            "pictures/s": about + _number(row["pictures_per_s"]),
            "tokens/s": _number(row["tokens_per_s"]),
            "roofline": f"{row['roofline']:.0%}",
            "predicted": predicted,
            "seen": "unknown" if seen is None else format_bytes(seen),
        }
        return "  ".join(cells[name].rjust(width) for name, (width, _) in COLUMNS.items())

    def about(self) -> dict[str, Any]:
        """What all rows have in common, for programs: bytes/s and FLOP/s."""
        import torch

        from cogview import __version__

        subject, place, speed = self.subject, self.subject.placement, self.probed()
        shape = subject.config.transformer
        return {
            "cogview": __version__,
            "model": self.name,
            "layers": shape.num_layers,
            "width": shape.width,
            "heads": shape.num_heads,
            "device": str(place.device),
            "dtype": place.quantization or str(place.dtype).removeprefix("torch."),
            "pytorch": torch.__version__,
            "threads": torch.get_num_threads(),
            "probe": {"bandwidth": speed.bandwidth, "flops": speed.flops},
            "codes_of_a_picture": self.whole,
            "codes_drawn": self.codes,
            "text_pieces": subject.config.max_text,
            "repeats": self.repeats,
        }


def results_as_json(figures: BenchmarkResult) -> dict[str, Any]:
    """A batch size that was measured: bytes, seconds, and the seconds of every request as they were."""
    seconds = figures.first_image
    return {
        "seen_bytes": figures.measured.peak,
        "first_picture_s": {"median": median(seconds), "min": min(seconds), "max": max(seconds)},
        "pictures_per_s": figures.images_per_second,
        "tokens_per_s": figures.tokens_per_second,
        "roofline": figures.share,
        "requests": [asdict(request) for request in figures.measured.requests],
    }


def _number(value: float) -> str:
    """Three digits at least, and no exponent where there are more."""
    return f"{value:.3g}" if value < 999.5 else f"{value:,.0f}"
