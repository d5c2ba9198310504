"""Compare a training step on a CPU with peers on equal terms: one shape, one vocabulary, the same rows and dtype.

    pip install transformers accelerate
    python scripts/benchmarks/compare_training.py [--shapes 6x256 8x512] [--dtypes bfloat16 float32] [--output FILE]
    python scripts/benchmarks/compare_training.py --read FILE

Rows are those of the recipe emoji-cpu: text-to-image, captions and super-resolution of several lengths, with its masks
(``recipe``), or text-to-image alone, all of one length (``equal``). Every side learns from the same rows. The peers are
a plain PyTorch loop in the style of nanoGPT, with batches that are padded to their longest row, or one stream of all
rows that is cut into blocks without padding, eager and compiled; and the Trainer of transformers with a GPT-2, whose
collator pads, with and without group_by_length, eager and compiled. Both predict the whole vocabulary at all positions.
Everyone has AdamW's fused form, clipping, autocast in bfloat16, and flushes denormal numbers. A layer of ours has two
more norms. Ours uses ``TransformerTrainer``; a step of it reports its losses and checks that they are finite.

Batches of ours and of the plain loop are ready before the clock starts, as with workers that build them ahead. Every
mode runs with each number of threads, once to warm up and once for a trial; those within 1.1 of the best of their side
are repeated, in turn. Tokens are inputs without padding. The ratio is our rate over that of the peer's best mode, and
larger than 1 where ours is faster. ``--clock cpu`` counts processor time instead, for one thread beside other work.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import arguments
import torch
from torch._dynamo.exc import TorchDynamoException
from training_peers import CLOCKS, PLAIN_MODES, TRAINER_MODES, PlainLoop, SideLoop, TrainerLoop, import_transformers
from training_rows import (
    SEED,
    TrainingCase,
    model_config,
    opened_model,
    plain_rows,
    settings_of,
    step_rows,
    store_rows,
)

from cogview.cli.main import run_safely
from cogview.device import DTYPES, flush_denormals
from cogview.errors import InputError
from cogview.evaluation.manifest import Manifest, ResultValue, SeedsRecord, read_result, write_result
from cogview.evaluation.model_record import describe_hardware, describe_versions
from cogview.modeling.transformer import Transformer
from cogview.training.distributed import DistributedContext
from cogview.training.engines import open_engine
from cogview.training.engines.base import TransformerWithLoss
from cogview.training.settings import EngineSettings
from cogview.training.trainer import TransformerTrainer

HEADS = 8
REPEATED = 1.1  # times the trial of the best mode of a side
OURS = {"ours, the threads share each product": 1, "ours, each thread has a share of the rows": None}
KINDS = ("recipe", "equal")
Side = Callable[[], float]  # trains all steps, and returns seconds


class OurLoop(SideLoop):
    """Our trainer; every run repeats the same steps."""

    def __init__(self, case: TrainingCase, mode: str) -> None:
        """Prepare trainer and batches in one of the modes ``OURS``."""
        torch.manual_seed(SEED)
        model = replace(opened_model().model, config=case.config, transformer=Transformer(case.config.transformer))
        context = DistributedContext(torch.device("cpu"))
        network = TransformerWithLoss(model.transformer, case.dtype)
        engine = open_engine(network, case.settings, EngineSettings(), context, OURS[mode])
        self.trainer = TransformerTrainer(model, case.settings, engine)
        self.batches = [self.trainer.batch(step, rows) for step, rows in enumerate(case.steps)]
        self.clock = CLOCKS[case.clock]

    def run(self) -> float:
        """Train all steps; return the seconds."""
        start = self.clock()
        for step, batch in enumerate(self.batches):
            self.trainer.step(step, batch)
        return self.clock() - start


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; return the exit status."""
    parser = arguments.Parser(__doc__)
    add = parser.add_argument
    add("--shapes", nargs="+", default=["6x256", "8x512"], metavar="LAYERSxWIDTH", help="(default: 6x256 8x512)")
    add("--dtypes", nargs="+", choices=["bfloat16", "float32"], default=["bfloat16", "float32"], help="(default: both)")
    add("--rows", nargs="+", choices=KINDS, default=list(KINDS), help="rows of the recipe, of equal length, or both")
    add("--sides", nargs="+", choices=["plain", "trainer"], default=["plain", "trainer"], help="peers (default: both)")
    add(
        "--batch",
        type=arguments.count,
        default=24,
        metavar="ROWS",
        help="rows of a step (default: 24, as in the recipe)",
    )
    add("--steps", type=arguments.count, default=6, help="steps of a run (default: 6)")
    add("--repeats", type=arguments.count, default=5, metavar="COUNT", help="runs of each repeated mode (default: 5)")
    add("--threads", type=arguments.count, nargs="+", metavar="COUNT", help="(default: 1 and the number of processors)")
    add("--modes", default="", metavar="TEXT", help="only the modes of peers whose names have this text")
    add("--clock", choices=list(CLOCKS), default="wall", help="wall or processor time (default: wall)")
    add("--output", type=arguments.output_file, metavar="FILE", help="result file to write")
    add("--read", type=arguments.file, metavar="FILE", help="print the table of a result file")
    args = parser.parse_args(argv)
    return run_safely(lambda: run(args), "compare_training.py")


def run(args: argparse.Namespace) -> int:
    """Run the whole comparison."""
    if args.read is not None:
        result = read_result(args.read)
        print_tables(result.results, result.manifest.settings)
        return 0
    shapes = [shape_of(text) for text in args.shapes]
    threads = args.threads or sorted({1, os.cpu_count() or 1})
    if args.clock == "cpu" and max(threads) > 1:
        raise InputError(f"--clock cpu counts the time of all threads: give --threads 1 as well, got {threads}")
    if TrainerLoop.side in args.sides:
        import_transformers("accelerate")
    flush_denormals()
    values: dict[str, ResultValue] = {}
    for kind in args.rows:
        rows = store_rows(kind, args.batch * args.steps)
        for layers, width in shapes:
            for dtype in args.dtypes:
                print(f"rows {kind}, {layers}x{width}, {dtype}", file=sys.stderr, flush=True)
                config, settings = model_config(layers, width, HEADS), settings_of(kind, args.batch)
                steps = step_rows(rows, args.batch)
                case = TrainingCase(
                    config=config,
                    settings=settings,
                    dtype=None if dtype == "float32" else DTYPES[dtype],
                    steps=steps,
                    rows=plain_rows(config, settings, steps),
                    clock=args.clock,
                )
                makers = sides_of(case, args.sides, threads)
                chosen = {name: make for name, make in makers.items() if name.startswith("ours") or args.modes in name}
                found = in_turn_of_best(chosen, args.repeats)
                values |= values_of(f"{kind}.{layers}x{width}.{dtype}", case, found)
    named = ("batch", "steps", "repeats", "clock", "modes")
    described = {name: getattr(args, name) for name in named} | {"threads": list(threads)}
    if args.output is not None:
        manifest = Manifest(
            measure="training step",
            seeds=SeedsRecord(first=SEED, count=1),
            settings=described,
            versions=describe_versions("transformers", "accelerate"),
            hardware=describe_hardware(),
        )
        write_result(args.output, manifest, values)
    print_tables(values, described)
    return 0


def shape_of(text: str) -> tuple[int, int]:
    """Return layers and width of LAYERSxWIDTH."""
    match = re.fullmatch(r"([1-9][0-9]?)x([1-9][0-9]{1,3})", text)
    if match is None or int(match[2]) % (HEADS * 16):
        raise InputError(f"--shapes {text}: expected LAYERSxWIDTH with a width that {HEADS * 16} divides, as 6x256")
    return int(match[1]), int(match[2])


def sides_of(case: TrainingCase, peers: Sequence[str], threads: Sequence[int]) -> dict[str, Callable[[], Side]]:
    """Return for each mode and number of threads, by its name, the function that prepares it."""
    kinds: dict[type[SideLoop], Iterable[str]] = {PlainLoop: PLAIN_MODES, TrainerLoop: TRAINER_MODES}
    chosen = {kind: modes for kind, modes in kinds.items() if kind.side in peers}
    makers: dict[str, Callable[[], Side]] = {}
    for count in threads:
        for loop, modes in {OurLoop: OURS if count > 1 else list(OURS)[:1], **chosen}.items():
            for mode in modes:
                makers[_named(mode, count)] = partial(_prepared, loop, case, mode)
    return makers


def _prepared(loop: type[SideLoop], case: TrainingCase, mode: str) -> Side:
    return loop(case, mode).run


def _named(mode: str, threads: int) -> str:
    return f"{mode}, {threads} thread{'s' if threads > 1 else ''}"


def _threads_of(name: str) -> int:
    return int(name.rsplit(", ", 1)[1].split()[0])


def in_turn_of_best(makers: Mapping[str, Callable[[], Side]], repeats: int) -> dict[str, list[float]]:
    """Return the seconds of the best modes of each side, run in turn."""
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = 1000  # every mode and number of threads has a compiled step
    trials: dict[str, float] = {}
    sides: dict[str, Side] = {}
    for name, make in makers.items():
        torch.set_num_threads(_threads_of(name))
        try:
            side = make()
            side()
        except TorchDynamoException as error:
            reason = str(error).strip().split("\n")[0]
            print(f"  left out: {name}: nothing can be compiled here ({reason})", file=sys.stderr, flush=True)
            continue
        trials[name], sides[name] = side(), side
        print(f"  {name}: {trials[name]:.2f} s", file=sys.stderr, flush=True)
        # The modes that cannot be among the best free their memory.
        sides = {other: each for other, each in sides.items() if trials[other] <= REPEATED * best_trial(trials, other)}
        del side
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, side in sides.items():
            torch.set_num_threads(_threads_of(name))
            times[name].append(side())
    return times


def best_trial(trials: Mapping[str, float], name: str) -> float:
    """Return the seconds of the best trial of the side that ``name`` is a mode of."""
    return min(seconds for other, seconds in trials.items() if other.split(",")[0] == name.split(",")[0])


def values_of(case_name: str, case: TrainingCase, times: Mapping[str, Sequence[float]]) -> dict[str, ResultValue]:
    """Return the rate of each repeated mode, and the ratio of ours to the best mode of each peer."""
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    values = {
        f"{case_name}.{name}": ResultValue(
            value=case.num_tokens / medians[name],
            low=case.num_tokens / max(seconds),
            high=case.num_tokens / min(seconds),
            n=len(seconds),
            unit="tokens/s",
            higher_is_better=True,
        )
        for name, seconds in times.items()
    }
    own = min(seconds for name, seconds in medians.items() if name.startswith("ours"))
    for peer in dict.fromkeys(name.split(",")[0] for name in medians if not name.startswith("ours")):
        best = min(seconds for name, seconds in medians.items() if name.startswith(peer))
        values[f"{case_name}.ours over {peer}"] = ResultValue(
            value=best / own, n=len(next(iter(times.values()))), higher_is_better=True
        )
    return values


def print_tables(values: Mapping[str, ResultValue], settings: Mapping[str, object]) -> None:
    """Print the ratios, and the rates of the repeated modes relative to the best of ours."""
    print(
        f"{settings['batch']} rows a step, runs of {settings['steps']} steps, medians of {settings['repeats']} by "
        f"{settings['clock']} time, threads {settings['threads']}, torch {torch.__version__}\n"
    )
    print("| rows | shape | dtype | side | tokens/s | ours over it |\n|---|---|---|---|---|---|")
    for case in dict.fromkeys(".".join(name.split(".")[:3]) for name in values):
        kind, shape, dtype = case.split(".")
        rates = {
            name.removeprefix(f"{case}."): value.value
            for name, value in values.items()
            if name.startswith(f"{case}.") and value.unit == "tokens/s"
        }
        own = max(rate for name, rate in rates.items() if name.startswith("ours"))
        for name, rate in sorted(rates.items(), key=lambda each: (each[0].split(",")[0], -each[1])):
            print(f"| {kind} | {shape} | {dtype} | {name} | {rate:,.0f} | {own / rate:.2f} |")


if __name__ == "__main__":
    sys.exit(main())
