"""Compare super-resolution of 16 images in one batch by our pipeline with one at a time by the algorithm of v1.

    python scripts/benchmarks/compare_upscale.py [--images 16] [--json FILE]

Both sides generate the same nine windows of each image, 2G x 2G codes from G x G, and decode them to pixels. The
algorithm of v1 (v1_algorithm.py) processes each window anew, and projects all positions at every step.

Before that, both generate greedily in float32, which must give the same codes.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from functools import partial

import arguments
import numpy as np
import torch
from compare_best_of import add_weights_arguments, open_model
from compare_v1 import (
    SEED,
    Parts,
    describe,
    describe_placement,
    facts,
    in_turn,
    make_parser,
    report,
    seconds_of,
)
from v1_algorithm import generate

from cogview.checkpoints.checkpoint import load_transformer
from cogview.cli.main import run_safely
from cogview.modeling.config import GREEDY, Sampling
from cogview.modeling.transformer import Transformer
from cogview.pipeline.cogview import CogView
from cogview.pipeline.requests import GenerationRequest
from cogview.pipeline.results import GeneratedImage, only_images
from cogview.tokenizers.windows import upscale_windows

PROMPTS = ("一个红苹果", "蓝色背景上的三只狐狸", "一辆汽车", "狗在猫的左边")
# Of images generated greedily. Where two codes are equally probable up to rounding, the images may differ.
MIN_SAME = 0.9


def main(argv: Sequence[str] | None = None) -> int:
    """Check, measure and print; return the exit status."""
    parser = make_parser(__doc__)
    add_weights_arguments(parser)
    parser.add_argument("--images", type=arguments.count, default=16, metavar="COUNT", help="(default: 16)")
    args = parser.parse_args(argv)
    return run_safely(lambda: run(args, parser), "compare_upscale.py")


def run(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Run the whole comparison."""
    exact = open_model(args, parser, "upscale", "float32")
    requests = [GenerationRequest(prompt=PROMPTS[i % len(PROMPTS)], seed=SEED, index=i) for i in range(args.images)]
    images = list(only_images(exact.run(requests)))
    same = count_same(exact, images)
    assert same >= MIN_SAME * len(images), f"greedily, {same} of {len(images)} images had the same codes"

    model = open_model(args, parser, "upscale", args.dtype)
    placement, config = model.placement, model.config
    transformer = plain_transformer(model)

    def ours() -> Parts:
        return {"all": seconds_of(placement, partial(upscale_together, model, images, config.sampling))}

    def v1() -> Parts:
        return {"all": seconds_of(placement, partial(upscale_one_by_one, model, images, config.sampling, transformer))}

    times = {side: parts["all"] for side, parts in in_turn({"v1": v1, "ours": ours}, args.repeats).items()}
    medians = {side: statistics.median(seconds) for side, seconds in times.items()}
    ratio = medians["v1"] / medians["ours"]
    num_codes = (2 * config.grid) ** 2
    rows = [
        [
            name,
            f"{medians[side]:.3f}",
            f"{medians[side] / args.images:.4f}",
            f"{args.images * num_codes / medians[side]:.1f}",
        ]
        for side, name in (("v1", "algorithm of v1, one at a time"), ("ours", "ours, in one batch"))
    ]
    lines = [
        f"weights {model.name}: {describe(config.transformer, config.grid)}; {describe_placement(placement)}; "
        f"medians of {args.repeats} runs",
        f"greedily in float32: {same} of {args.images} images with the same {num_codes} codes on both sides",
        f"ours is {ratio:.1f} times as fast",
    ]
    found = {"images": args.images, "same": same, "ratio": ratio, "medians": medians, "seconds": times}
    columns = [f"{args.images} images", "s", "s per image", "codes/s"]
    report(args, lines, columns, rows, {"comparison": "upscale", **found, **facts(placement)})
    return 0


def upscale_together(model: CogView, images: Sequence[GeneratedImage], sampling: Sampling) -> list[np.ndarray]:
    """Return the codes (2G, 2G) of each image by our pipeline, all in one batch."""
    enlarged = model.upscale(
        images,
        [image.prompt for image in images],
        seed=SEED,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=1.0,  # v1 has neither this nor the next two
        guidance=1.0,
        text_attention=1.0,
        batch_size=len(images),
    )
    return [image.codes for image in enlarged]


def plain_transformer(model: CogView) -> Transformer:
    """Return the transformer with weights in the dtype of its computation, the only one of the algorithm of v1."""
    if model.folder is None:
        return model.transformer
    return load_transformer(model.folder, model.placement.device, model.placement.dtype)


def upscale_one_by_one(
    model: CogView, images: Sequence[GeneratedImage], sampling: Sampling, transformer: Transformer
) -> list[np.ndarray]:
    """Return the codes (2G, 2G) of each image by the algorithm of v1, window by window."""
    grid, layout = model.config.grid, model.config.layouts["upscale"]
    noise = torch.Generator(model.placement.device).manual_seed(SEED)
    found = []
    for source in images:
        pieces = model.text_tokenizer.encode(source.prompt)
        codes = np.ma.masked_all((2 * grid, 2 * grid), dtype=np.int64)
        for window in upscale_windows(grid):
            rows, columns = window.target
            known = codes[rows.start : rows.start + grid, columns]
            row = layout.arrange(model.vocabulary, text=pieces, small=source.codes[window.source], image=known)
            image = row.spans["image"]
            row = row.truncate(image.start + window.lines * grid)
            (ids,) = generate(transformer, model.vocabulary, row, 1, sampling, noise)
            codes[rows, columns] = ids[image].reshape(window.lines, grid)
        model.decode_images(codes.filled()[None])
        found.append(codes.filled())
    return found


def count_same(model: CogView, images: Sequence[GeneratedImage]) -> int:
    """Count the images that both sides upscale to the same codes when they decode greedily."""
    ours = upscale_together(model, images, GREEDY)
    theirs = upscale_one_by_one(model, images, GREEDY, plain_transformer(model))
    return sum(np.array_equal(own, other) for own, other in zip(ours, theirs, strict=True))


if __name__ == "__main__":
    sys.exit(main())
