"""The best of 16 pictures of a prompt: drawn and scored together, or one by one and as the released CogView scores.

    python scripts/benchmarks/compare_best_of.py [-n 16] [--model random --layers 8 --width 512] [--json FILE]

Our side draws all pictures in one batch, and scores the prompt as the caption of each from the logits of its pieces
alone. The others draw them by our engine too, but in 16 runs, and score them as the release does: logits of all ids at
every place, and a softmax over all of them, for as many pictures at a time as memory allows. Of a single picture our
engine guesses several codes at one go where it pays; one of the others does without. Pixels are not decoded.

Before that, all sides draw and score a few pictures in float32, which must come out the same.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from compare_released import (
    PROMPT,
    RANDOM,
    SEED,
    VOCABULARY,
    Parts,
    add_shape_arguments,
    check_arguments,
    describe,
    describe_placement,
    facts,
    in_turn,
    make_parser,
    random_transformer,
    report,
    seconds_of,
    shape_of,
    trained_model,
)
from four_billion import text_model

from cogview.checkpoints.checkpoint import Model
from cogview.cli.main import run_safely
from cogview.cli.options import DEFAULT_MODEL, require_positive
from cogview.device import choose_placement
from cogview.generation.decode import decode
from cogview.generation.requests import DecodingRequest
from cogview.generation.scoring import score
from cogview.modeling.config import ModelConfig
from cogview.pipeline.cogview import CogView
from cogview.tokenizers.batching import pad_right
from cogview.tokenizers.layouts import TokenSequence
from cogview.tokenizers.text import TextTokenizer
from cogview.vqvae.model import VQVAE, VQVAEConfig

CHECKED = 4  # pictures that are drawn to see that both sides agree
MOST_LOGITS = 1 << 30  # bytes of the logits that are made at a time


def main(argv: Sequence[str] | None = None) -> int:
    """Check, measure and print; returns the exit status."""
    parser = make_parser(__doc__)
    add_weights_arguments(parser)
    parser.add_argument("-n", type=int, default=16, metavar="PICTURES", help="of the prompt (default: 16)")
    args = parser.parse_args(argv)
    return run_safely(lambda: run(args, parser), "compare_best_of.py")


def run(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """The whole comparison."""
    check_arguments(args)
    require_positive("-n", args.n)
    exact = open_model(args, parser, "caption", "float32")
    jobs = jobs_of(exact, args.n)
    check_same_scores(exact, jobs[:CHECKED])
    model = open_model(args, parser, "caption", args.dtype)
    place = model.placement

    def measure(draw: Callable[[], np.ndarray], rank: Callable[[np.ndarray], object]) -> Parts:
        drawn: list[np.ndarray] = []
        drawing = seconds_of(place, lambda: drawn.append(draw()))
        return {"draw": drawing, "score": seconds_of(place, partial(rank, drawn[0]))}

    def one_by_one(parallel: int | None) -> Callable[[], Parts]:
        return partial(measure, partial(draw_one_by_one, model, jobs, parallel), partial(score_everything, model))

    sides = {"one by one, nothing guessed": one_by_one(1)}
    if model.name != RANDOM:
        sides["one by one"] = one_by_one(None)
    sides["ours"] = partial(measure, partial(draw_together, model, jobs), partial(score_pieces, model))
    times = in_turn(sides, args.repeats)
    medians, totals = {}, {}
    for side, parts in times.items():
        medians[side] = {part: statistics.median(seconds) for part, seconds in parts.items()}
        totals[side] = statistics.median(map(sum, zip(*parts.values(), strict=True)))
    ratios = {side: total / totals["ours"] for side, total in totals.items() if side != "ours"}
    share = medians["ours"]["score"] / totals["ours"]
    rows = []
    for side, parts in medians.items():
        seconds = [f"{each:.3f}" for each in (parts["draw"], parts["score"], totals[side])]
        rows.append([side, *seconds, f"{ratios[side]:.1f}" if side in ratios else ""])
    lines = [
        f"weights {model.name}: {describe(model.config.transformer, model.config.grid)}; "
        f"{describe_placement(place)}; medians of {args.repeats} runs",
        f"best of {args.n}; scoring takes {share:.1%} of our time",
    ]
    found = {"n": args.n, "ratios": ratios, "score_share": share, "totals": totals, "seconds": times}
    report(
        args,
        lines,
        ["side", "draw, s", "score, s", "both, s", "ours is so many times as fast"],
        rows,
        {"comparison": "best of", **found, **facts(place)},
    )
    return 0


def jobs_of(model: CogView, count: int) -> list[DecodingRequest]:
    """So many pictures of the prompt, drawn in the model's own way."""
    config = model.config
    row = config.layouts["generate"].arrange(model.vocabulary, text=model.text_tokenizer.encode(PROMPT))
    return [DecodingRequest(sequence=row, seed=SEED, image=image, sampling=config.sampling) for image in range(count)]


def draw_together(model: CogView, jobs: Sequence[DecodingRequest], parallel: int | None = None) -> np.ndarray:
    """Codes (B, G * G) of all jobs, drawn in one batch."""
    if model.name == RANDOM:
        parallel = 1  # one code after the other; compare_released.py says why
    filled = decode(model.transformer, model.vocabulary, jobs, speculative=parallel)
    return np.stack([one.ids[job.sequence.spans["image"]] for one, job in zip(filled, jobs, strict=True)])


def draw_one_by_one(model: CogView, jobs: Sequence[DecodingRequest], parallel: int | None) -> np.ndarray:
    """The same in a run for each."""
    return np.concatenate([draw_together(model, [job], parallel) for job in jobs])


def score_pieces(model: CogView, codes: np.ndarray) -> list[float]:
    """log p of the prompt given each of the pictures (B, G * G), by our engine."""
    return score(model.transformer, model.vocabulary, scored_rows(model, codes))


@torch.inference_mode()
def score_everything(model: CogView, codes: np.ndarray) -> list[float]:
    """The same in the release's way: logits and softmax of all ids at every place, image codes masked."""
    vocabulary, weight = model.vocabulary, model.transformer.embedding.weight
    rows = scored_rows(model, codes)
    text = rows[0].spans["text"]
    size = max(1, MOST_LOGITS // (4 * len(rows[0]) * len(weight)))
    totals: list[float] = []
    for start in range(0, len(rows), size):
        batch = pad_right(rows[start : start + size], vocabulary.pad)
        ids_BT = torch.from_numpy(batch.ids).to(weight.device)
        logits_BTV = model.transformer(ids_BT, torch.from_numpy(batch.positions).to(weight.device))
        logits_BTV[..., vocabulary.image.start : vocabulary.image.stop] = -torch.inf
        log_p_BTV = logits_BTV.log_softmax(dim=-1)
        log_p_BT = log_p_BTV[:, :-1].gather(2, ids_BT[:, 1:].unsqueeze(2)).squeeze(2)
        totals += log_p_BT[:, text.start - 1 : text.stop - 1].sum(dim=1).tolist()
    return totals


def scored_rows(model: CogView, codes: np.ndarray) -> list[TokenSequence]:
    """Each picture with the prompt behind it."""
    layout, pieces = model.config.layouts["score"], model.text_tokenizer.encode(PROMPT)
    return [layout.arrange(model.vocabulary, image=own, text=pieces) for own in codes]


def check_same_scores(model: CogView, jobs: Sequence[DecodingRequest]) -> None:
    """Both sides draw the same pictures and score them alike."""
    codes = draw_together(model, jobs)
    for parallel in (1, None):
        assert np.array_equal(codes, draw_one_by_one(model, jobs, parallel)), "single runs gave other pictures"
    scores = score_pieces(model, codes), score_everything(model, codes)
    assert np.allclose(*scores, rtol=1e-4, atol=1e-3), f"both sides score differently: {scores}"


# What is shared with compare_upscale.py


def add_weights_arguments(parser: argparse.ArgumentParser) -> None:
    """--model, and the shape of random weights."""
    parser.add_argument(
        "--model",
        default=DEFAULT_MODEL,
        metavar="NAME_OR_FOLDER",
        help=f"or {RANDOM}: weights of the shape below, with the released vocabulary (default: {DEFAULT_MODEL})",
    )
    add_shape_arguments(parser)


def open_model(args: argparse.Namespace, parser: argparse.ArgumentParser, task: str, dtype: str) -> CogView:
    """The model asked for, which draws pictures and does ``task``."""
    if args.model == RANDOM:
        return random_model(args, dtype)
    return trained_model(args, parser, dtype, "generate", task)


def random_model(args: argparse.Namespace, dtype: str) -> CogView:
    """Random weights of the shape that ``args`` ask for."""
    config = shape_of(args)
    placement = choose_placement(args.device, dtype, num_parameters=config.num_parameters)
    model = Model(
        config=ModelConfig(
            transformer=config,
            vocabulary=VOCABULARY,
            grid=args.grid,
            tasks=("generate", "caption", "upscale"),
            max_text=2 * len(PROMPT),
        ),
        transformer=random_transformer(config, placement.device).to(placement.dtype),
        image_tokenizer=VQVAE(VQVAEConfig()).eval().to(placement.device),
        text_tokenizer=TextTokenizer(text_model(VOCABULARY.num_text_pieces)),
    )
    return CogView(model, placement, RANDOM)


if __name__ == "__main__":
    sys.exit(main())
