"""What denormal numbers cost when a CPU trains from trained weights: steps with and without flushing them to zero.

The embedded model goes on learning from pictures of its own. Each way runs in a process of its own, since threads
take the setting over when they are started; the two take turns, and medians are compared.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time

RUNS = 5


def measure(flush: bool, steps: int) -> None:
    """Print the median seconds of a step, and the loss of the last."""
    import numpy as np
    import torch

    from cogview.data.store import pad_text
    from cogview.device import flush_denormals
    from cogview.pipeline import CogView
    from cogview.training.transformer import TransformerTrainer, TransformerTraining

    if flush:
        flush_denormals()
    model = CogView.from_pretrained("cogview-emoji", device="cpu")
    prompts = [thing.name for thing in model.model.things[:16]]
    pictures = model.generate(prompts, seed=0)
    rows = {
        "text": pad_text([model.text_tokenizer.encode(prompt) for prompt in prompts], model.model.config.max_text),
        "image": np.stack([picture.codes.reshape(-1) for picture in pictures]).astype(np.uint16),
    }
    settings = TransformerTraining(steps=1000, batch_size=16, warmup_steps=999)
    trainer = TransformerTrainer(model.model, settings, torch.device("cpu"), None)
    times = []
    for step in range(steps):
        start = time.perf_counter()
        figures = trainer.step(step, rows)
        times.append(time.perf_counter() - start)
    print(statistics.median(times[1:]), figures["loss"])


def main() -> None:
    """Run both ways in turn, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8, help="steps of a run (default: 8)")
    parser.add_argument("--measure", choices=["kept", "flushed"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measure(args.measure == "flushed", args.steps)
        return
    seconds: dict[str, list[float]] = {"kept": [], "flushed": []}
    losses: dict[str, set[str]] = {"kept": set(), "flushed": set()}
    for _ in range(RUNS):
        for way, own in seconds.items():
            command = [sys.executable, __file__, "--measure", way, "--steps", str(args.steps)]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
            own.append(float(output[0]))
            losses[way].add(f"{float(output[1]):.4f}")
    for way, own in seconds.items():
        print(f"denormals {way}: {statistics.median(own):.3f} s a step, loss {', '.join(sorted(losses[way]))}")
    print(f"kept / flushed: {statistics.median(seconds['kept']) / statistics.median(seconds['flushed']):.2f}")


if __name__ == "__main__":
    main()
