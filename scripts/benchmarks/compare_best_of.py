"""Compare generating and ranking 16 images of a prompt in one batch with doing so one by one, scored as in v1.

    python scripts/benchmarks/compare_best_of.py [-n 16] [--model random --layers 8 --width 512] [--json FILE]

Our side generates all images in one batch, and scores the prompt as the caption of each image from the logits of its
pieces only. The other sides generate with our decoding as well, but in 16 runs. They score as v1 does: logits of all
ids at every position, and a softmax over all of them, for as many images at a time as memory allows. For a single image
speculative decoding is used where it saves time; one of the other sides decodes sequentially. Pixels are not decoded.

Before that, all sides generate and score a few images in float32, which must agree.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial

import arguments
import numpy as np
import torch
from compare_v1 import (
    PROMPT,
    RANDOM,
    SEED,
    VOCABULARY,
    Parts,
    add_shape_arguments,
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
from cogview.cli.options import DEFAULT_MODEL
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

CHECKED = 4  # images for which all sides must agree
MAX_LOGITS_BYTES = 1 << 30  # logits computed at a time


def main(argv: Sequence[str] | None = None) -> int:
    """Check, measure and print; return the exit status."""
    parser = make_parser(__doc__)
    add_weights_arguments(parser)
    parser.add_argument(
        "-n", type=arguments.count, default=16, metavar="IMAGES", help="images of the prompt (default: 16)"
    )
    args = parser.parse_args(argv)
    return run_safely(lambda: run(args, parser), "compare_best_of.py")


def run(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Run the whole comparison."""
    exact = open_model(args, parser, "caption", "float32")
    requests = requests_of(exact, args.n)
    check_same_scores(exact, requests[:CHECKED])
    model = open_model(args, parser, "caption", args.dtype)
    placement = model.placement

    def measure(generate: Callable[[], np.ndarray], rank: Callable[[np.ndarray], object]) -> Parts:
        codes: list[np.ndarray] = []
        generation = seconds_of(placement, lambda: codes.append(generate()))
        return {"generate": generation, "score": seconds_of(placement, partial(rank, codes[0]))}

    def one_by_one(speculative: int | None) -> Callable[[], Parts]:
        generate = partial(generate_one_by_one, model, requests, speculative)
        return partial(measure, generate, partial(score_all_ids, model))

    sides = {"one by one, sequential": one_by_one(1)}
    if model.name != RANDOM:
        sides["one by one"] = one_by_one(None)
    sides["ours"] = partial(measure, partial(generate_together, model, requests), partial(score_pieces, model))
    times = in_turn(sides, args.repeats)
    medians, totals = {}, {}
    for side, parts in times.items():
        medians[side] = {part: statistics.median(seconds) for part, seconds in parts.items()}
        totals[side] = statistics.median(map(sum, zip(*parts.values(), strict=True)))
    ratios = {side: total / totals["ours"] for side, total in totals.items() if side != "ours"}
    share = medians["ours"]["score"] / totals["ours"]
    rows = []
    for side, parts in medians.items():
        seconds = [f"{each:.3f}" for each in (parts["generate"], parts["score"], totals[side])]
        rows.append([side, *seconds, f"{ratios[side]:.1f}" if side in ratios else ""])
    lines = [
        f"weights {model.name}: {describe(model.config.transformer, model.config.grid)}; "
        f"{describe_placement(placement)}; medians of {args.repeats} runs",
        f"best of {args.n}; scoring takes {share:.1%} of our time",
    ]
    found = {"n": args.n, "ratios": ratios, "score_share": share, "totals": totals, "seconds": times}
    report(
        args,
        lines,
        ["side", "generate, s", "score, s", "both, s", "speedup of ours"],
        rows,
        {"comparison": "best of", **found, **facts(placement)},
    )
    return 0


def requests_of(model: CogView, count: int) -> list[DecodingRequest]:
    """Return requests of ``count`` images of the prompt with the model's default sampling."""
    config = model.config
    row = config.layouts["generate"].arrange(model.vocabulary, text=model.text_tokenizer.encode(PROMPT))
    return [DecodingRequest(sequence=row, seed=SEED, image=image, sampling=config.sampling) for image in range(count)]


def generate_together(
    model: CogView, requests: Sequence[DecodingRequest], speculative: int | None = None
) -> np.ndarray:
    """Return the codes (B, G * G) of all requests, decoded in one batch."""
    if model.name == RANDOM:
        speculative = 1  # sequential; compare_v1.py gives the reason
    results = decode(model.transformer, model.vocabulary, requests, speculative=speculative)
    spans = [request.sequence.spans["image"] for request in requests]
    return np.stack([result.ids[span] for result, span in zip(results, spans, strict=True)])


def generate_one_by_one(model: CogView, requests: Sequence[DecodingRequest], speculative: int | None) -> np.ndarray:
    """Return the codes (B, G * G) of all requests, decoded in one run each."""
    return np.concatenate([generate_together(model, [request], speculative) for request in requests])


def score_pieces(model: CogView, codes: np.ndarray) -> list[float]:
    """Return log p of the prompt given each of the images (B, G * G), by our scoring."""
    return score(model.transformer, model.vocabulary, scored_rows(model, codes))


@torch.inference_mode()
def score_all_ids(model: CogView, codes: np.ndarray) -> list[float]:
    """Return log p of the prompt as v1 computes it: a softmax over all ids at every position, image codes masked."""
    vocabulary, weight = model.vocabulary, model.transformer.embedding.weight
    rows = scored_rows(model, codes)
    text = rows[0].spans["text"]
    size = max(1, MAX_LOGITS_BYTES // (4 * len(rows[0]) * len(weight)))
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
    """Return the sequence of each image followed by the prompt."""
    layout, pieces = model.config.layouts["score"], model.text_tokenizer.encode(PROMPT)
    return [layout.arrange(model.vocabulary, image=own, text=pieces) for own in codes]


def check_same_scores(model: CogView, requests: Sequence[DecodingRequest]) -> None:
    """Check that both sides generate the same images and score them equally."""
    codes = generate_together(model, requests)
    for speculative in (1, None):
        assert np.array_equal(codes, generate_one_by_one(model, requests, speculative)), "single runs differ"
    scores = score_pieces(model, codes), score_all_ids(model, codes)
    assert np.allclose(*scores, rtol=1e-4, atol=1e-3), f"both sides score differently: {scores}"


# Shared with compare_upscale.py


def add_weights_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --model and the shape of random weights."""
    parser.add_argument(
        "--model",
        default=DEFAULT_MODEL,
        metavar="NAME_OR_FOLDER",
        help=f"or {RANDOM}: weights of the shape below, with the vocabulary of v1 (default: {DEFAULT_MODEL})",
    )
    add_shape_arguments(parser)


def open_model(args: argparse.Namespace, parser: argparse.ArgumentParser, task: str, dtype: str) -> CogView:
    """Open the requested model, which must generate images and have the task ``task``."""
    if args.model == RANDOM:
        return random_model(args, dtype)
    return trained_model(args, parser, dtype, "generate", task)


def random_model(args: argparse.Namespace, dtype: str) -> CogView:
    """Return random weights of the requested shape."""
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
