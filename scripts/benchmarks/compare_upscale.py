"""Super-resolution of 16 pictures: all in one batch by our pipeline, or one at a time by the released algorithm.

    python scripts/benchmarks/compare_upscale.py [--images 16] [--json FILE]

Both sides draw the same nine windows of each picture, 2G x 2G codes from G x G, and decode them to pixels. The released
algorithm (released_algorithm.py) reads each window anew and projects all it has read at every step.

Before that, both draw greedily in float32, which must give the same codes.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from compare_best_of import add_weights_arguments, open_model
from compare_released import (
    SEED,
    Parts,
    check_arguments,
    describe,
    describe_placement,
    facts,
    in_turn,
    make_parser,
    report,
    seconds_of,
)
from released_algorithm import draw

from cogview.cli.main import run_safely
from cogview.cli.options import require_positive
from cogview.modeling.config import GREEDY, Sampling
from cogview.pipeline.cogview import CogView
from cogview.pipeline.requests import GenerationRequest
from cogview.pipeline.results import GeneratedImage, only_images
from cogview.tokenizers.windows import upscale_windows

PROMPTS = ("一个红苹果", "蓝色背景上的三只狐狸", "一辆汽车", "狗在猫的左边")
# Of pictures drawn greedily. Where two codes are equally probable up to rounding, a picture may go two ways.
SAME_AT_LEAST = 0.9


def main(argv: Sequence[str] | None = None) -> int:
    """Check, measure and print; returns the exit status."""
    parser = make_parser(__doc__)
    add_weights_arguments(parser)
    parser.add_argument("--images", type=int, default=16, metavar="COUNT", help="(default: 16)")
    args = parser.parse_args(argv)
    return run_safely(lambda: run(args, parser), "compare_upscale.py")


def run(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """The whole comparison."""
    check_arguments(args)
    require_positive("--images", args.images)
    exact = open_model(args, parser, "upscale", "float32")
    wishes = [GenerationRequest(prompt=PROMPTS[i % len(PROMPTS)], seed=SEED, index=i) for i in range(args.images)]
    pictures = list(only_images(exact.run(wishes)))
    same = count_same(exact, pictures)
    assert same >= SAME_AT_LEAST * len(pictures), f"greedily, {same} of {len(pictures)} pictures had the same codes"

    model = open_model(args, parser, "upscale", args.dtype)
    place, config = model.placement, model.config

    def ours() -> Parts:
        return {"all": seconds_of(place, partial(upscale_together, model, pictures, config.sampling))}

    def released() -> Parts:
        return {"all": seconds_of(place, partial(upscale_one_by_one, model, pictures, config.sampling))}

    times = {side: parts["all"] for side, parts in in_turn({"released": released, "ours": ours}, args.repeats).items()}
    medians = {side: statistics.median(seconds) for side, seconds in times.items()}
    ratio = medians["released"] / medians["ours"]
    num_codes = (2 * config.grid) ** 2
    rows = [
        [
            name,
            f"{medians[side]:.3f}",
            f"{medians[side] / args.images:.4f}",
            f"{args.images * num_codes / medians[side]:.1f}",
        ]
        for side, name in (("released", "released algorithm, one at a time"), ("ours", "ours, in one batch"))
    ]
    lines = [
        f"weights {model.name}: {describe(config.transformer, config.grid)}; {describe_placement(place)}; "
        f"medians of {args.repeats} runs",
        f"greedily in float32: {same} of {args.images} pictures with the same {num_codes} codes on both sides",
        f"ours is {ratio:.1f} times as fast",
    ]
    found = {"images": args.images, "same": same, "ratio": ratio, "medians": medians, "seconds": times}
    columns = [f"{args.images} pictures", "s", "s per picture", "codes/s"]
    report(args, lines, columns, rows, {"comparison": "upscale", **found, **facts(place)})
    return 0


def upscale_together(model: CogView, pictures: Sequence[GeneratedImage], sampling: Sampling) -> list[np.ndarray]:
    """Codes (2G, 2G) of each picture by our pipeline, all in one batch."""
    enlarged = model.upscale(
        pictures,
        [picture.prompt for picture in pictures],
        seed=SEED,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=1.0,  # this and the next two the release does not have
        guidance=1.0,
        text_attention=1.0,
        batch_size=len(pictures),
    )
    return [picture.codes for picture in enlarged]


def upscale_one_by_one(model: CogView, pictures: Sequence[GeneratedImage], sampling: Sampling) -> list[np.ndarray]:
    """The same by the released algorithm, picture by picture and window by window."""
    grid, layout = model.config.grid, model.config.layouts["upscale"]
    noise = torch.Generator(model.placement.device).manual_seed(SEED)
    found = []
    for picture in pictures:
        pieces = model.text_tokenizer.encode(picture.prompt)
        codes = np.ma.masked_all((2 * grid, 2 * grid), dtype=np.int64)
        for window in upscale_windows(grid):
            rows, columns = window.target
            known = codes[rows.start : rows.start + grid, columns]
            row = layout.arrange(model.vocabulary, text=pieces, small=picture.codes[window.source], image=known)
            image = row.spans["image"]
            row = row.truncate(image.start + window.lines * grid)
            (ids,) = draw(model.transformer, model.vocabulary, row, 1, sampling, noise)
            codes[rows, columns] = ids[image].reshape(window.lines, grid)
        model.decode_images(codes.filled()[None])
        found.append(codes.filled())
    return found


def count_same(model: CogView, pictures: Sequence[GeneratedImage]) -> int:
    """How many pictures both sides enlarge to the same codes when they draw greedily."""
    ours, theirs = (upscale(model, pictures, GREEDY) for upscale in (upscale_together, upscale_one_by_one))
    return sum(np.array_equal(own, other) for own, other in zip(ours, theirs, strict=True))


if __name__ == "__main__":
    sys.exit(main())
