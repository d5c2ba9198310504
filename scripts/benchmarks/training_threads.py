"""Two ways to train on all cores of a CPU: a share of the rows for each thread, or all threads below every product.

The embedded model goes on learning from pictures of its own. The two ways take turns in processes of their own, and
medians are compared.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time

RUNS = 5
WAYS = {"all threads on every product": 1, "a share of the rows for each thread": None}


def measure(num_threads: int | None, steps: int) -> None:
    """Print the median seconds of a step, and the loss of the last."""
    import numpy as np
    import torch

    from cogview.data.store import pad_text
    from cogview.device import flush_denormals, training_dtype
    from cogview.pipeline import CogView
    from cogview.training.transformer import TransformerTrainer, TransformerTraining

    flush_denormals()
    model = CogView.from_pretrained("cogview-emoji", device="cpu")
    prompts = [thing.name for thing in model.model.things[:24]]
    pictures = model.generate(prompts, seed=0)
    rows = {
        "text": pad_text([model.text_tokenizer.encode(prompt) for prompt in prompts], model.model.config.max_text),
        "image": np.stack([picture.codes.reshape(-1) for picture in pictures]).astype(np.uint16),
    }
    settings = TransformerTraining(steps=1000, batch_size=24, warmup_steps=999, hidden_rows=0.6, hidden_places=8)
    cpu = torch.device("cpu")
    trainer = TransformerTrainer(model.model, settings, cpu, training_dtype(cpu), num_threads=num_threads)
    times = []
    for step in range(steps):
        start = time.perf_counter()
        figures = trainer.step(step, rows)
        times.append(time.perf_counter() - start)
    print(statistics.median(times[1:]), figures["loss"])


def main() -> None:
    """Run both ways in turn, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12, help="steps of a run (default: 12)")
    parser.add_argument("--measure", choices=list(WAYS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measure(WAYS[args.measure], args.steps)
        return
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    losses: dict[str, set[str]] = {way: set() for way in WAYS}
    for _ in range(RUNS):
        for way, own in seconds.items():
            command = [sys.executable, __file__, "--measure", way, "--steps", str(args.steps)]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
            own.append(float(output[0]))
            losses[way].add(f"{float(output[1]):.4f}")
    for way, own in seconds.items():
        print(f"{way}: {statistics.median(own):.3f} s a step, loss {', '.join(sorted(losses[way]))}")
    before, after = (statistics.median(own) for own in seconds.values())
    print(f"first / second: {before / after:.2f}")


if __name__ == "__main__":
    main()
