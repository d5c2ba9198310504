"""Pictures with several codes guessed and told at one go, against one code after another: forwards and time.

    python scripts/benchmarks/parallel.py [--batches 1,2,4,8,16] [--most 8,16,32,64,auto] [--upscale] [--json FILE]

Both sides draw the same pictures in turn, in one process, and their codes are compared. A line is a batch size and the
most codes guessed of a row; "auto" is what the engine chooses. Prompts name things of the emoji world; with --upscale
the pictures of these are enlarged as well. Times are from prompts to pixels; the ratio is the median over the batches.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
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
    parser.add_argument("--most", default="8,16,32,64,auto", help="codes guessed of a row (default: 8,16,32,64,auto)")
    parser.add_argument("--repeats", type=int, default=10, help="batches of each kind (default: 10)")
    parser.add_argument("--upscale", action="store_true", help="enlarge pictures too")
    parser.add_argument("--json", type=Path, help="write all figures there as well")
    args = parser.parse_args(argv)

    model = CogView.from_pretrained(args.model, device=args.device, dtype=args.dtype)
    print(f"{model.name} on {model.placement}, {torch.get_num_threads()} threads, PyTorch {torch.__version__}")
    print("| task | batch | most guessed | forwards per picture | fewer | time, ratio | codes that differ |")
    print("|---|---|---|---|---|---|---|")
    figures = []
    for task in ["generate"] + ["upscale"] * args.upscale:
        for batch in map(int, args.batches.split(",")):
            for most in args.most.split(","):
                found = compare(model, task, batch, None if most == "auto" else int(most), args.repeats)
                print(
                    f"| {task} | {batch} | {most} | {found['forwards']:.1f} of {found['one_by_one']:.0f} | "
                    f"{found['one_by_one'] / found['forwards']:.2f} | {found['ratio']:.2f} | {found['different']} of "
                    f"{found['codes']} |",
                    flush=True,
                )
                figures.append({"task": task, "batch": batch, "most": most, **found})
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return 0


def compare(model: CogView, task: str, batch: int, most: int | None, repeats: int) -> dict[str, float]:
    """Draw ``repeats`` batches both ways."""
    ratios, forwards, one_by_one, different, codes = [], 0, 0, 0, 0
    for repeat in range(repeats + 1):  # the first warms up
        wishes = [
            GenerationRequest(prompt=PROMPTS[(repeat * batch + number) % len(PROMPTS)], seed=repeat, index=number)
            for number in range(batch)
        ]
        if task == "upscale":
            small = list(only_images(model.run(wishes)))
            wishes = [
                GenerationRequest(prompt=wish.prompt, seed=wish.seed, index=wish.index, task=task, codes=picture.codes)
                for wish, picture in zip(wishes, small, strict=True)
            ]
        plain, plain_forwards, plain_seconds = drawn(model, wishes, 1)
        guessed, guessed_forwards, guessed_seconds = drawn(model, wishes, most)
        different += int((plain != guessed).sum())
        codes += plain.size
        if repeat:
            ratios.append(plain_seconds / guessed_seconds)
            forwards += guessed_forwards
            one_by_one += plain_forwards
    return {
        "ratio": statistics.median(ratios),
        "forwards": forwards / repeats,
        "one_by_one": one_by_one / repeats,
        "different": different,
        "codes": codes,
    }


def drawn(model: CogView, wishes: Sequence[GenerationRequest], most: int | None) -> tuple[np.ndarray, int, float]:
    """Codes, forwards through the transformer, and seconds."""
    count = 0
    transformer = model.transformer_for(wishes[0].task)

    def counted(*_: object) -> None:
        nonlocal count
        count += 1

    hook = transformer.final_norm.register_forward_hook(counted)
    model.speculative = most
    start = time.perf_counter()
    pictures = [made for made in model.run(wishes, batch_size=10_000) if isinstance(made, GeneratedImage)]
    seconds = time.perf_counter() - start
    hook.remove()
    return np.stack([picture.codes for picture in pictures]), count, seconds


if __name__ == "__main__":
    sys.exit(main())
