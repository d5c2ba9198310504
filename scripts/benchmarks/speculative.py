"""Compare speculative with sequential decoding: forward passes and time.

    python scripts/benchmarks/speculative.py [--batches 1,2,4,8,16] [--windows 8,16,32,64,auto] [--upscale]

Both sides generate the same images in turn, in one process, and their codes are compared. A line is a batch size and
the maximal window, the number of codes of a row drafted per forward pass; "auto" is the default. Prompts name objects
of the emoji world; with --upscale their images are upscaled as well. Times are from prompts to pixels; the ratio is the
median over the batches.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from cogview.pipeline.cogview import CogView
from cogview.pipeline.requests import GenerationRequest
from cogview.pipeline.results import GeneratedImage, only_images

THINGS = ("狐狸", "红苹果", "足球", "猫", "企鹅", "蓝色汽车")
COLOURS = ("蓝色", "黄色", "紫色", "绿色", "粉色")
NUMBERS = ("一只", "两只", "三只")
PROMPTS = [
    *(f"{colour}背景上的{number}{thing}" for colour in COLOURS for number, thing in zip(NUMBERS, THINGS, strict=False)),
    *(f"左边是{one}，右边是{two}，{c}背景" for c, one, two in zip(COLOURS, THINGS, THINGS[1:], strict=False)),
]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="cogview-emoji", help="(default: cogview-emoji)")
    parser.add_argument("--device", default="auto", help="(default: auto)")
    parser.add_argument("--dtype", default="auto", help="(default: auto)")
    parser.add_argument("--batches", default="1,2,4,8,16", help="(default: 1,2,4,8,16)")
    parser.add_argument("--windows", default="8,16,32,64,auto", help="codes drafted per row (default: 8,16,32,64,auto)")
    parser.add_argument("--repeats", type=int, default=10, help="batches of each kind (default: 10)")
    parser.add_argument("--upscale", action="store_true", help="measure upscaling as well")
    parser.add_argument("--json", type=Path, help="write all metrics to FILE")
    args = parser.parse_args(argv)

    model = CogView.from_pretrained(args.model, device=args.device, dtype=args.dtype)
    print(f"{model.name} on {model.placement}, {torch.get_num_threads()} threads, PyTorch {torch.__version__}")
    print("| task | batch | window | forwards per image | fewer | time, ratio | codes that differ |")
    print("|---|---|---|---|---|---|---|")
    metrics = []
    for task in ["generate"] + ["upscale"] * args.upscale:
        for batch in map(int, args.batches.split(",")):
            for window in args.windows.split(","):
                found = compare(model, task, batch, None if window == "auto" else int(window), args.repeats)
                print(
                    f"| {task} | {batch} | {window} | {found['forwards']:.1f} of {found['sequential']:.0f} | "
                    f"{found['sequential'] / found['forwards']:.2f} | {found['ratio']:.2f} | {found['different']} of "
                    f"{found['codes']} |",
                    flush=True,
                )
                metrics.append({"task": task, "batch": batch, "window": window, **found})
    if args.json:
        args.json.write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    return 0


def compare(model: CogView, task: str, batch: int, window: int | None, repeats: int) -> dict[str, float]:
    """Generate ``repeats`` batches with both methods."""
    ratios, forwards, sequential, different, codes = [], 0, 0, 0, 0
    for repeat in range(repeats + 1):  # the first warms up
        requests = [
            GenerationRequest(prompt=PROMPTS[(repeat * batch + number) % len(PROMPTS)], seed=repeat, index=number)
            for number in range(batch)
        ]
        if task == "upscale":
            small = list(only_images(model.run(requests)))
            requests = [
                replace(request, task=task, codes=image.codes) for request, image in zip(requests, small, strict=True)
            ]
        plain, plain_forwards, plain_seconds = generated(model, requests, 1)
        drafted, drafted_forwards, drafted_seconds = generated(model, requests, window)
        different += int((plain != drafted).sum())
        codes += plain.size
        if repeat:
            ratios.append(plain_seconds / drafted_seconds)
            forwards += drafted_forwards
            sequential += plain_forwards
    return {
        "ratio": statistics.median(ratios),
        "forwards": forwards / repeats,
        "sequential": sequential / repeats,
        "different": different,
        "codes": codes,
    }


def generated(
    model: CogView, requests: Sequence[GenerationRequest], window: int | None
) -> tuple[np.ndarray, int, float]:
    """Return the codes, the number of forward passes through the transformer, and the seconds."""
    count = 0
    transformer = model.transformer_for(requests[0].task)

    def counted(*_: object) -> None:
        nonlocal count
        count += 1

    hook = transformer.final_norm.register_forward_hook(counted)
    model.speculative = window
    start = time.perf_counter()
    results = [result for result in model.run(requests, batch_size=10_000) if isinstance(result, GeneratedImage)]
    seconds = time.perf_counter() - start
    hook.remove()
    return np.stack([result.codes for result in results]), count, seconds


if __name__ == "__main__":
    sys.exit(main())
