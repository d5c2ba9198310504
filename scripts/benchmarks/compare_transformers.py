"""Compare our codes per second with the tokens per second of Hugging Face transformers, on models of one shape.

    pip install transformers
    python scripts/benchmarks/compare_transformers.py [--batch 1] [--tokens 256] [--json FILE]

The other side is a GPT-2 of the same layers, width, heads, vocabulary and positions. Its ``generate`` samples with
top-k 200 in every suitable mode: eager attention or PyTorch's fused attention (sdpa), each with a growing cache, with a
static cache, and with a static cache and a compiled step. Both sides have random weights, process 80 given tokens, and
then sample the same number of tokens. The models differ in two ways: a layer of ours has two more norms, and we sample
among 8192 image codes, where GPT-2 multiplies by its whole vocabulary. Ours decodes sequentially (compare_v1.py gives
the reason).
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from compare_v1 import (
    SAMPLING,
    SEED,
    VOCABULARY,
    Parts,
    Subject,
    add_shape_arguments,
    check_arguments,
    describe,
    describe_placement,
    facts,
    in_turn,
    make_parser,
    ours_whole,
    random_transformer,
    report,
    seconds_of,
    shape_of,
)
from torch._dynamo.exc import TorchDynamoException

from cogview.cli.main import run_safely
from cogview.cli.options import require_positive
from cogview.device import DevicePlacement, choose_placement
from cogview.errors import InputError
from cogview.modeling.config import TransformerConfig
from cogview.tokenizers.layouts import layouts

NUM_PIECES = 77  # with three commands, 80 given tokens
MODES = {
    f"{attention}, {cache}": (attention, cache)
    for attention in ("eager", "sdpa")
    for cache in ("dynamic", "static", "compiled")
}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; return the exit status."""
    parser = make_parser(__doc__)
    add_shape_arguments(parser)
    parser.add_argument("--batch", type=int, default=1, metavar="ROWS", help="(default: 1)")
    parser.add_argument("--tokens", type=int, help="tokens to sample per row (default: 256 on a CPU, 1000 elsewhere)")
    parser.add_argument("--modes", nargs="+", choices=list(MODES), default=list(MODES), help="(default: all)")
    args = parser.parse_args(argv)
    return run_safely(lambda: run(args), "compare_transformers.py")


def run(args: argparse.Namespace) -> int:
    """Run the whole comparison."""
    check_arguments(args)
    require_positive("--batch", args.batch)
    config = shape_of(args)
    placement = choose_placement(args.device, args.dtype, num_parameters=config.num_parameters)
    pieces = np.random.default_rng(SEED).integers(0, VOCABULARY.num_text_pieces, NUM_PIECES)
    row = layouts(args.grid)["generate"].arrange(VOCABULARY, text=pieces)
    first = row.spans["image"].start
    limit = min(args.grid**2, config.max_positions - first)
    wanted = 256 if placement.device.type == "cpu" else 1000
    count = min(wanted, limit) if args.tokens is None else args.tokens
    if not 1 <= count <= limit:
        raise InputError(
            f"--tokens must be from 1 to {limit}, the codes of an image that fit the positions; got {count}"
        )
    row = row.truncate(first + count)

    gpt2 = make_gpt2(config, placement)
    prompt_BT = torch.from_numpy(row.ids[:first]).to(placement.device).expand(args.batch, -1)
    transformer = random_transformer(config, placement.device).to(placement.dtype)
    transformer.prepack()

    def theirs(mode: str) -> Parts:
        try:
            return {"all": seconds_of(placement, partial(generate, gpt2, prompt_BT, count, *MODES[mode]))}
        except TorchDynamoException as error:
            reason = str(error).strip().split("\n")[0]
            raise InputError(f"{mode}: nothing can be compiled here ({reason}); name the other --modes") from None

    ours = partial(ours_whole, Subject(transformer=transformer, placement=placement, row=row), args.batch)
    sides: dict[str, Callable[[], Parts]] = {mode: partial(theirs, mode) for mode in args.modes}
    times = {side: parts["all"] for side, parts in in_turn({"ours": ours, **sides}, args.repeats).items()}
    medians = {side: statistics.median(seconds) for side, seconds in times.items()}
    own = medians.pop("ours")
    best = min(medians, key=lambda mode: medians[mode])

    tokens = args.batch * count
    rows: list[Sequence[object]] = [["ours", f"{own:.3f}", f"{tokens / own:.1f}", ""]]
    rows += [
        [
            f"transformers: {mode}{' (its best)' if mode == best else ''}",
            f"{s:.3f}",
            f"{tokens / s:.1f}",
            f"{s / own:.2f}",
        ]
        for mode, s in medians.items()
    ]
    import transformers

    lines = [
        f"{describe(config, args.grid)}; {describe_placement(placement)}; medians of {args.repeats} runs",
        f"{args.batch} rows, {first} tokens given and {count} sampled; transformers {transformers.__version__}",
    ]
    found = {
        "given": first,
        "sampled": count,
        "transformers": transformers.__version__,
        "best": best,
        "ratio": medians[best] / own,
        "seconds": times,
    }
    columns = ["side", "seconds", "tokens/s", "speedup of ours"]
    report(args, lines, columns, rows, {"comparison": "transformers", **found, **facts(placement)})
    return 0


def make_gpt2(config: TransformerConfig, placement: DevicePlacement) -> Any:
    """Return a GPT-2 of the same shape with random weights; raise InputError without transformers."""
    try:
        from transformers import GPT2Config, GPT2LMHeadModel
    except ImportError:
        raise InputError(
            "Hugging Face transformers is missing, the other side of this comparison: pip install transformers"
        ) from None
    torch.manual_seed(SEED)
    shape = GPT2Config(
        n_layer=config.num_layers,
        n_embd=config.width,
        n_head=config.num_heads,
        n_positions=config.max_positions,
        vocab_size=config.vocabulary_size,
        bos_token_id=None,
        eos_token_id=None,  # nothing stops a row early
        pad_token_id=VOCABULARY.pad,
    )
    return GPT2LMHeadModel(shape).eval().to(placement.device, placement.dtype)


@torch.inference_mode()
def generate(model: Any, prompt_BT: torch.Tensor, count: int, attention: str, cache: str) -> torch.Tensor:
    """Return the prompts, each followed by ``count`` sampled tokens, in one of the ``MODES``."""
    from transformers import CompileConfig

    compiling: dict[str, Any] = {"disable_compile": True}
    if cache == "compiled":
        compiling = {"compile_config": CompileConfig()}
        compiling["compile_config"]._compile_all_devices = True  # a CPU would be skipped
    model.set_attn_implementation(attention)
    ids_BT = model.generate(
        prompt_BT,
        attention_mask=torch.ones_like(prompt_BT),
        max_new_tokens=count,
        do_sample=True,
        temperature=SAMPLING.temperature,
        top_k=SAMPLING.top_k,
        cache_implementation="dynamic" if cache == "dynamic" else "static",
        **compiling,
    )
    assert ids_BT.shape[1] == prompt_BT.shape[1] + count, "generate stopped early"
    return ids_BT


if __name__ == "__main__":
    sys.exit(main())
