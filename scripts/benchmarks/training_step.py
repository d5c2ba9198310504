"""Compare each choice of the trainer on a CPU with its alternative, by seconds of a step.

``denormals``: numbers below 1e-38 flushed to zero, or kept. ``threads``: each thread computes a share of the rows, or
all threads share every product. The embedded model continues training on images that it generates. Each method runs in
a separate process, since threads adopt settings when they start; the two take turns, and medians are compared.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time

import arguments

RUNS, ROWS = 5, 24
WAYS = {
    "denormals": ("denormals kept", "denormals flushed"),
    "threads": ("all threads on every product", "a share of the rows for each thread"),
}


def measure(way: str, steps: int) -> None:
    """Print the median seconds of a step and the last loss."""
    import numpy as np
    import torch

    from cogview.data.store_writer import pad_text
    from cogview.device import flush_denormals, training_dtype
    from cogview.pipeline.cogview import CogView
    from cogview.training.distributed import DistributedContext
    from cogview.training.engines import open_engine
    from cogview.training.engines.base import TransformerWithLoss
    from cogview.training.settings import EngineSettings, TransformerTraining
    from cogview.training.trainer import TransformerTrainer

    if way != "denormals kept":
        flush_denormals()
    model = CogView.from_pretrained("cogview-emoji", device="cpu")
    prompts = [thing.name for thing in model.things[:ROWS]]
    images = model.generate(prompts, seed=0)
    rows = {
        "text": pad_text([model.text_tokenizer.encode(prompt) for prompt in prompts], model.config.max_text),
        "image": np.stack([image.codes.reshape(-1) for image in images]).astype(np.uint16),
    }
    settings = TransformerTraining(
        steps=1000, batch_size=ROWS, warmup_steps=999, full_mask_rate=0.6, full_mask_targets=8
    )
    cpu, num_threads = torch.device("cpu"), 1 if way == "all threads on every product" else None
    network = TransformerWithLoss(model.model.transformer, training_dtype(cpu))
    engine = open_engine(network, settings, EngineSettings(), DistributedContext(cpu), num_threads)
    trainer = TransformerTrainer(model.model, settings, engine)
    times = []
    for step in range(steps):
        start = time.perf_counter()
        metrics = trainer.step(step, trainer.batch(step, rows))
        times.append(time.perf_counter() - start)
    print(statistics.median(times[1:]), metrics["loss"])


def main() -> int:
    """Run both methods in turn and print a table."""
    parser = arguments.Parser(__doc__)
    parser.add_argument("choice", choices=list(WAYS))
    parser.add_argument("--steps", type=arguments.count, default=8, help="steps of a run (default: 8)")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measure(args.measure, args.steps)
        return 0
    ways = WAYS[args.choice]
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    losses: dict[str, set[str]] = {way: set() for way in ways}
    for _ in range(RUNS):
        for way in ways:
            command = [sys.executable, __file__, args.choice, "--measure", way, "--steps", str(args.steps)]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
            seconds[way].append(float(output[0]))
            losses[way].add(f"{float(output[1]):.4f}")
    for way in ways:
        print(f"{way}: {statistics.median(seconds[way]):.3f} s a step, loss {', '.join(sorted(losses[way]))}")
    before, after = (statistics.median(seconds[way]) for way in ways)
    print(f"first / second: {before / after:.2f}")
    return 0


if __name__ == "__main__":
    arguments.run_script(main)
