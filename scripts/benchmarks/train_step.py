"""Measure time and memory of a training step by size, precision, engine, checkpointing and compilation.

Rows are random, of the layout that generates images: text, then a grid of codes. Each combination runs in separate
processes, so that its memory is measured alone. Combinations take turns, since a machine's speed drifts, and medians
are printed. MFU counts model FLOPs only (6 per weight and token, causal attention), relative to ``--peak`` or to the
data sheet of the GPU.

    python scripts/benchmarks/train_step.py --presets 20m --precisions float32 bfloat16 --engines torch zero1
    python scripts/benchmarks/train_step.py --data-wait RECIPE --work WORK     # share of a step that waits for rows
"""

# B rows, T positions of a row
from __future__ import annotations

import argparse
import itertools
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import arguments

if TYPE_CHECKING:
    from cogview.modeling.config import TransformerConfig

ENGINES = ("torch", "zero1", "zero2", "zero3", "zero1-offload", "zero2-offload", "zero3-offload")
TEXT = 64  # positions of a row before its codes


def shape_of(job: dict[str, Any]) -> TransformerConfig:
    """Return the shape of a preset, or of the given layers and width, with the vocabulary of v1."""
    from cogview.modeling.config import TransformerConfig, preset
    from cogview.tokenizers.vocabulary import Vocabulary

    rows = Vocabulary().padded_size
    if not job["layers"]:
        return preset(job["preset"], rows, max_positions=job["length"], dropout=job["dropout"])
    return TransformerConfig(
        num_layers=job["layers"],
        width=job["width"],
        num_heads=job["heads"],
        vocabulary_size=rows,
        max_positions=job["length"],
        dropout=job["dropout"],
    )


def measure(job: dict[str, Any]) -> dict[str, float]:
    """Return the median seconds of a step after the warm-up, and the peak memory of this process."""
    import torch

    from cogview.device import DTYPES, peak_memory
    from cogview.kernels.fused_linear_cross_entropy import LossTargets
    from cogview.modeling.transformer import Transformer
    from cogview.tokenizers.vocabulary import Vocabulary
    from cogview.training.distributed import destroy_distributed, init_distributed
    from cogview.training.engines import open_engine
    from cogview.training.engines.base import DeviceMicroBatch, TransformerWithLoss
    from cogview.training.settings import EngineSettings, TransformerTraining

    deepspeed = job["engine"] != "torch"
    world = init_distributed(job["device"], needs_group=deepspeed)
    vocabulary = Vocabulary()
    length, rows = job["length"], job["rows"]
    shape = shape_of(job)
    torch.manual_seed(0)
    transformer = Transformer(shape)
    transformer.train()
    dtype = None if job["precision"] == "float32" else DTYPES[job["precision"]]
    settings = EngineSettings(
        name="deepspeed" if deepspeed else "torch",
        zero=int(job["engine"][4]) if deepspeed else 1,
        offload=job["engine"].endswith("-offload"),
        checkpointing=job["checkpointing"],
        compile=job["compile"],
    )
    training = TransformerTraining(steps=1000, warmup_steps=999, batch_size=rows * world.size)
    threads = 1 if world.size > 1 or world.device.type != "cpu" else None
    engine = open_engine(TransformerWithLoss(transformer, dtype), training, settings, world, num_threads=threads)
    generator = torch.Generator().manual_seed(world.rank)

    def part(count: int) -> DeviceMicroBatch:
        ids = torch.randint(0, vocabulary.num_image_codes, (count, length + 1), generator=generator)
        text = torch.randint(vocabulary.text.start, vocabulary.text.stop, (count, TEXT), generator=generator)
        ids[:, :TEXT] = text
        ids = ids.to(world.device)
        indices = torch.arange(count * length, device=world.device).view(count, length)
        kinds = ((vocabulary.text, indices[:, : TEXT - 1], 0.1), (vocabulary.image, indices[:, TEXT:], 1.0))
        targets = [
            LossTargets(
                ids=kind,
                positions_M=own.reshape(-1),
                targets_M=ids[:, 1:].reshape(-1)[own.reshape(-1)],
                weights_M=torch.full((own.numel(),), weight / own.numel(), device=world.device),
            )
            for kind, own, weight in kinds
        ]
        positions = torch.arange(length, device=world.device).expand(count, length)
        return DeviceMicroBatch(ids=ids[:, :-1].contiguous(), positions=positions, targets=targets)

    shares = min(engine.num_threads, rows)
    counts = [rows // shares + (number < rows % shares) for number in range(shares)]
    if world.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times = []
    for step in range(job["steps"] + job["warmup"]):
        parts = [[part(count)] for count in counts]
        world.barrier()
        began = time.perf_counter()
        engine.accumulate_gradients(parts, learn=True)
        engine.optimizer_step(training.learning_rate_at(step))
        if world.device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    result = {
        "seconds": statistics.median(times[job["warmup"] :]),
        "memory": peak_memory(world.device),
        "parameters": float(shape.num_parameters),
        "rank": float(world.rank),
    }
    engine.close()
    destroy_distributed()
    return result


def run(job: dict[str, Any]) -> dict[str, float]:
    """``measure`` in as many processes as the job says; the slowest and the largest of them."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    size = job["processes"]
    processes = []
    for rank in range(size):
        environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
        if job["device"] == "cpu":
            environment["DS_ACCELERATOR"] = "cpu"
        if size > 1:
            environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // size)))
        command = [sys.executable, __file__, "--measure", json.dumps(job)]
        processes.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        )
    outputs = [process.communicate() for process in processes]
    found_results = []
    for process, (output, errors) in zip(processes, outputs, strict=True):
        if process.returncode:
            raise RuntimeError(errors.strip().splitlines()[-1] if errors.strip() else f"status {process.returncode}")
        found_results.append(json.loads(output.splitlines()[-1]))
    return {name: max(result[name] for result in found_results) for name in ("seconds", "memory", "parameters")}


def data_wait(recipe: str, work: Path, steps: int) -> None:
    """Train for some steps of a recipe and print the share of their time that waited for rows."""
    run_folder = work / "transformer-run"
    command = [sys.executable, "-m", "cogview", "train", recipe, "--work", str(work), f"training.steps={steps}"]
    command += ["training.warmup_steps=2", "run.log_every=10", "run.evaluate_every=0", "run.save_every=0"]
    subprocess.run(command, check=True)
    records = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    shares = [record["data_wait"] for record in records if "data_wait" in record]
    rates = [record["samples_per_second"] for record in records if "data_wait" in record]
    print(f"waiting for rows: median {statistics.median(shares):.3%} of a step, maximum {max(shares):.3%}")
    print(f"samples per second: median {statistics.median(rates):.1f}")


def main() -> int:
    """Run all combinations in turn and print a table."""
    parser = arguments.Parser(__doc__)
    parser.add_argument("--presets", nargs="+", default=["20m"])
    parser.add_argument(
        "--layers", type=arguments.whole, default=0, help="layers, instead of a preset (with --width, --heads)"
    )
    parser.add_argument("--width", type=arguments.count, default=2560)
    parser.add_argument("--heads", type=arguments.count, default=40)
    parser.add_argument("--precisions", nargs="+", default=["float32"], choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--engines", nargs="+", default=["torch"], choices=ENGINES)
    parser.add_argument("--checkpointing", nargs="+", default=["none"], choices=["none", "selective", "full"])
    parser.add_argument("--compile", nargs="+", default=["off"], choices=["off", "on"])
    parser.add_argument("--processes", type=arguments.count, default=1)
    parser.add_argument("--rows", type=arguments.count, default=2, help="rows of each process in a step (default: 2)")
    parser.add_argument("--length", type=arguments.count, default=1088, help="positions of a row (default: 1088)")
    parser.add_argument("--dropout", type=arguments.fraction, default=0.0)
    parser.add_argument("--steps", type=arguments.count, default=3, help="timed steps in each round (default: 3)")
    parser.add_argument("--warmup", type=arguments.whole, default=1)
    parser.add_argument("--rounds", type=arguments.count, default=5)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--peak", type=arguments.positive, help="TFLOP/s of one process, dense, in each precision")
    parser.add_argument("--json", type=arguments.output_file)
    parser.add_argument("--data-wait", metavar="RECIPE")
    parser.add_argument("--work", type=arguments.output_folder)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(json.loads(args.measure))))
        return 0
    if args.data_wait:
        data_wait(args.data_wait, args.work, 100)
        return 0
    import torch

    from cogview.device import DTYPES, choose_placement
    from cogview.planning.gpus import peak_flops
    from cogview.planning.hardware import measure_hardware
    from cogview.planning.training_time import flops_per_token

    shared = {
        name: getattr(args, name) for name in ("processes", "rows", "length", "dropout", "steps", "warmup", "device")
    }
    shared |= {name: getattr(args, name) for name in ("layers", "width", "heads")}
    combinations = list(
        itertools.product(args.presets, args.precisions, args.engines, args.checkpointing, args.compile)
    )
    results: dict[Any, list[dict[str, float]]] = {combination: [] for combination in combinations}
    for _ in range(args.rounds):
        for combination in combinations:
            name, precision, engine, checkpointing, compiled = combination
            job = {**shared, "preset": name, "precision": precision, "engine": engine}
            job |= {"checkpointing": checkpointing, "compile": compiled == "on"}
            try:
                results[combination].append(run(job))
            except RuntimeError as error:
                print(f"{' '.join(combination)}: {error}", file=sys.stderr)
    device = choose_placement(args.device, "float32").device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    print(f"{name}, PyTorch {torch.__version__}, {args.processes} process(es), {args.rows} rows of {args.length} each")
    print("| size | precision | engine | checkpointing | compiled | s/step | tokens/s | MFU | memory |")
    print("|---|---|---|---|---|---|---|---|---|")
    peaks = {
        precision: args.peak * 1e12
        if args.peak
        else peak_flops(name, precision) or measure_hardware(device, DTYPES[precision]).flops
        for precision in args.precisions
    }
    rows = []
    for combination, found in results.items():
        if not found:
            continue
        size, precision, engine, checkpointing, compiled = combination
        seconds = statistics.median(one["seconds"] for one in found)
        tokens = args.processes * args.rows * args.length / seconds
        peak = peaks[precision]
        row: dict[str, Any] = {
            "size": size if not args.layers else f"{args.layers} x {args.width}",
            "precision": precision,
            "engine": engine,
            "checkpointing": checkpointing,
            "compiled": compiled,
            "seconds": seconds,
            "tokens_per_second": tokens,
            "memory": max(one["memory"] for one in found),
            "peak_tflops": peak / 1e12,
        }
        shape = shape_of({**shared, "preset": size})
        row["mfu"] = tokens * flops_per_token(shape, args.length) / (peak * args.processes)
        rows.append(row)
        print(
            f"| {row['size']} | {precision} | {engine} | {checkpointing} | {compiled} | {seconds:.3g} | {tokens:,.0f} "
            f"| {row['mfu']:.1%} | {row['memory'] / 1e9:.2f} GB |"
        )
    if args.json:
        args.json.write_text(json.dumps({"device": name, "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    arguments.run_script(main)
