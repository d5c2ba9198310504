"""Measure the stability of three forms of a transformer in half precision: outliers, scores, learning rates.

    python scripts/benchmarks/stability.py [--parts outliers attention rates injected] [--json FILE] [--plot FILE]

``pre-ln`` is x + f(LN(x)), with statistics of the norms in float32 and scores QK^T / sqrt(K) divided after the product.
``released`` is Sandwich-LN as published in CogView v1: every norm divides its input by one max|x| / 8 of the whole
tensor, and queries are divided before the product. ``ours`` is ``cogview.modeling.transformer``. Weights, data,
schedule and loss scaling are the same. Weights and AdamW are float32, results of autocast are stored in float16,
gradients included, and products accumulate in float32, as in tensor cores. The residual stream is float16 in the first
two forms and float32 in ours. Everything runs on a CPU, whose float16 rounds and overflows as that of a GPU.

``outliers``: one channel of the last token grows, before a norm and between layers; no other token may change.
``attention``: the largest |qk| / sqrt(K) whose weights are right. ``rates``: training at growing learning rates.
``injected``: training while one channel of the start token grows between layers. Right is what is finite and within 10%
of float64.
"""

# B batch, H heads, T positions, S keys, D width, K size of a head
from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import math
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import arguments
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from cogview.cli.main import run_safely
from cogview.errors import InputError
from cogview.kernels.attention import attention_reference, causal_bias
from cogview.kernels.layer_norm import pb_relax_layer_norm
from cogview.modeling.config import TransformerConfig
from cogview.modeling.kv_cache import KVCache
from cogview.modeling.transformer import Layer, LayerNorm, Transformer

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FORMS = ("pre-ln", "released", "ours")
ORDERS = ("raw order", "released order", "PB-relax")
PARTS = ("outliers", "attention", "rates", "injected")
HALF_MAX = torch.finfo(torch.float16).max  # 65504
TOLERANCE = 0.1  # of what is right
SEEDS = 3

NORM_TOKENS, NORM_WIDTH, HEAD_SIZE, NUM_KEYS = 64, 2560, 64, 16  # as in the released model, but for few tokens
# Growing outliers, up to the largest power of two in float32.
SIZES = sorted({2.0**k for k in (*range(21), *range(24, 121, 8), 127)} | {HALF_MAX})
SCORES = [2.0**k for k in range(31)]

CODES = 16
BATCH, LENGTH = 16, 16
RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
HEALTHY_RATE = 3e-3  # all forms learn at this rate
CLIP_NORM, WEIGHT_DECAY, BETAS = 1.0, 0.04, (0.9, 0.95)
# Dynamic loss scaling; the window is shorter than usual, for so are the runs.
FIRST_SCALE, LEAST_SCALE, SCALE_WINDOW = 2.0**16, 1.0, 50
DOUBLINGS = 24  # of the outlier in training: from 1 to 2**24
QUIET = 0.4  # of the steps of such a training, before it appears


# The three forms


def norm_as_released(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Apply LayerNorm to x / (max|x| / 8), with the maximum of the whole tensor, in the dtype of ``x``."""
    return norm_in_float32(x / (x.abs().max().detach() / 8), weight, bias)


def norm_in_float32(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Apply LayerNorm with statistics in float32 to the dtype of ``x``; in float64 if ``x`` is float64."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return F.layer_norm(x.to(wide), x.shape[-1:], weight.to(wide), bias.to(wide), 1e-5).to(x.dtype)


NORMS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "pre-ln": norm_in_float32,
    "released": norm_as_released,
    "ours": pb_relax_layer_norm,
}


def plain_attention(q_BHTK: Tensor, k_BHSK: Tensor, v_BHSK: Tensor, *, divide_first: bool) -> Tensor:
    """Compute causal softmax(QK^T / sqrt(K)) V with scores in the dtype of the queries and a float32 softmax."""
    root = math.sqrt(q_BHTK.shape[-1])
    k_BHKS = k_BHSK.transpose(-1, -2)
    scores_BHTS = (q_BHTK / root) @ k_BHKS if divide_first else (q_BHTK @ k_BHKS) / root
    scores_BHTS = scores_BHTS + causal_bias(q_BHTK.shape[2], k_BHSK.shape[2], q_BHTK.device, q_BHTK.dtype)
    wide = torch.promote_types(q_BHTK.dtype, torch.float32)
    return scores_BHTS.to(wide).softmax(dim=-1).to(v_BHSK.dtype) @ v_BHSK


ATTENTIONS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "raw order": partial(plain_attention, divide_first=False),
    "released order": partial(plain_attention, divide_first=True),
    "PB-relax": attention_reference,
}


class OtherNorm(LayerNorm):
    """Norm of one of the other forms, with the weights of ours."""

    def __init__(self, form: str, norm: LayerNorm) -> None:
        super().__init__(norm.weight.numel())
        self.weight, self.bias = norm.weight, norm.bias
        self.form = form

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalized ``x`` in its shape and dtype."""
        return NORMS[self.form](x, self.weight, self.bias)


class OtherLayer(nn.Module):
    """Layer of one of the other forms, with the weights of ours; ``pre-ln`` has no norms on its branches."""

    def __init__(self, form: str, layer: Layer) -> None:
        super().__init__()
        sandwich = form == "released"
        self.attention_norm = OtherNorm(form, layer.attention_norm)
        self.attention_output_norm = OtherNorm(form, layer.attention_output_norm) if sandwich else nn.Identity()
        self.mlp_norm = OtherNorm(form, layer.mlp_norm)
        self.mlp_output_norm = OtherNorm(form, layer.mlp_output_norm) if sandwich else nn.Identity()
        self.attention, self.mlp = layer.attention, layer.mlp
        self.attend = ATTENTIONS["released order" if sandwich else "raw order"]

    def forward(
        self,
        x_BTD: Tensor,
        bias_B1TS: Tensor | None,
        cache: KVCache | None,
        number: int,
        outputs_M: Tensor | None = None,
    ) -> Tensor:
        """Return the output in the shape of ``x_BTD``, in float16 under autocast; no bias, no cache."""
        assert outputs_M is None
        if torch.is_autocast_enabled("cpu"):
            x_BTD = x_BTD.half()
        x_BTD = x_BTD + self.attention_output_norm(self._attention(self.attention_norm(x_BTD)))
        return x_BTD + self.mlp_output_norm(self.mlp(self.mlp_norm(x_BTD)))

    def _attention(self, x_BTD: Tensor) -> Tensor:
        batch, length, width = x_BTD.shape
        heads = self.attention.num_heads
        split = self.attention.query_key_value(x_BTD).view(batch, length, 3, heads, width // heads)
        q_BHTK, k_BHTK, v_BHTK = split.permute(2, 0, 3, 1, 4)
        return self.attention.output(self.attend(q_BHTK, k_BHTK, v_BHTK).transpose(1, 2).reshape(x_BTD.shape))


def make_model(form: str, num_layers: int, width: int, num_heads: int, seed: int) -> Transformer:
    """Return a float32 model; the same seed gives all forms the same weights."""
    config = TransformerConfig(
        num_layers=num_layers,
        width=width,
        num_heads=num_heads,
        vocabulary_size=CODES + 1,  # and the start
        max_positions=LENGTH,
        dropout=0.0,
    )
    torch.manual_seed(seed)
    model = Transformer(config)
    if form != "ours":
        model.layers = nn.ModuleList(OtherLayer(form, cast(Layer, layer)) for layer in model.layers)
        model.final_norm = OtherNorm(form, model.final_norm)
    return model


@contextmanager
def outlier_before(model: Transformer, number: int, token: int, size: float) -> Iterator[None]:
    """Add ``size`` to the first channel of one token of every sequence, in the residual stream before a layer."""

    def grow(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        x_BTD = inputs[0]
        outlier_TD = torch.zeros(x_BTD.shape[1:], dtype=torch.float64)
        outlier_TD[token, 0] = size
        return (x_BTD + outlier_TD.to(x_BTD.dtype), *inputs[1:])

    handle = model.layers[number].register_forward_pre_hook(grow)
    try:
        yield
    finally:
        handle.remove()


# What is still right


@dataclass(frozen=True)
class Limit:
    """Largest size that is right, with all below it; smallest size that is wrong, if any; and the errors between."""

    right: float
    wrong: float | None
    curve: list[tuple[float, float | None]]  # None where something is not finite


def limit_of(error: Callable[[float], float], sizes: Sequence[float]) -> Limit:
    """Try growing ``sizes`` up to the first that is wrong, then bisect between the last two to half a percent."""
    curve, right, wrong = [], 0.0, None
    for size in sizes:
        found = error(size)
        curve.append((size, found if math.isfinite(found) else None))
        if wrong is None and found <= TOLERANCE:
            right = size
        elif wrong is None:
            wrong = size
        if not math.isfinite(found):
            break
    while right and wrong is not None and wrong / right > 1.005:
        middle = math.sqrt(right * wrong)
        if error(middle) <= TOLERANCE:
            right = middle
        else:
            wrong = middle
    return Limit(right, wrong, curve)


def relative_error(found: Tensor, expected: Tensor, whole: Tensor | None = None) -> float:
    """Return |found - expected| / |expected|; infinite if any value of ``found`` or ``whole`` is not finite."""
    if not torch.isfinite(found if whole is None else whole).all():
        return math.inf
    return ((found.double() - expected).norm() / expected.norm()).item()


def norm_limit(form: str, dtype: torch.dtype, seed: int) -> Limit:
    """Find the limit of one norm over normal tokens, the last of which has an outlier."""
    generator = torch.Generator().manual_seed(seed)
    tokens_TD = torch.randn(NORM_TOKENS, NORM_WIDTH, generator=generator)
    weight_D, bias_D = torch.ones(NORM_WIDTH), torch.zeros(NORM_WIDTH)
    expected_TD = norm_in_float32(tokens_TD.double(), weight_D, bias_D)[:-1]

    def error(size: float) -> float:
        grown_TD = tokens_TD.clone()
        grown_TD[-1, 0] = size
        found_TD = NORMS[form](grown_TD.to(dtype), weight_D, bias_D)
        return relative_error(found_TD[:-1], expected_TD, found_TD)

    return limit_of(error, SIZES)


def model_limit(form: str, shape: tuple[int, int, int], before: int, seed: int) -> Limit:
    """Find the limit of a whole model whose last token has an outlier before one of its layers."""
    model = make_model(form, *shape, seed)
    ids_BT = torch.randint(CODES, (2, LENGTH), generator=torch.Generator().manual_seed(seed))
    reference = make_model(form, *shape, seed).double()
    expected_BTD = reference.hidden(ids_BT)[:, :-1].detach().double()

    def error(size: float) -> float:
        # With gradients, as in training: without them PyTorch's fused attention would run in ours, and store no scores.
        with outlier_before(model, before, -1, size), torch.autocast("cpu", torch.float16):
            found_BTD = model.hidden(ids_BT).detach()
        return relative_error(found_BTD[:, :-1], expected_BTD, found_BTD)

    return limit_of(error, SIZES)


def attention_limit(order: str, seed: int) -> Limit:
    """Find the largest |qk| / sqrt(K) of the attended key; the other keys have smaller or negative scores."""
    generator = torch.Generator().manual_seed(seed)
    direction_K = torch.randint(2, (HEAD_SIZE,), generator=generator) * 2.0 - 1
    shares_S1 = torch.rand(NUM_KEYS, 1, generator=generator) * 1.5 - 1  # from -1 to 0.5
    shares_S1[seed % NUM_KEYS] = 1
    v_BHSK = torch.randn(1, 1, NUM_KEYS, HEAD_SIZE, generator=generator).half()

    def error(score: float) -> float:
        entry = math.sqrt(score / math.sqrt(HEAD_SIZE))
        q_BHTK = (entry * direction_K).half().view(1, 1, 1, HEAD_SIZE)
        k_BHSK = (entry * shares_S1 * direction_K).half().view(1, 1, NUM_KEYS, HEAD_SIZE)
        expected = plain_attention(q_BHTK.double(), k_BHSK.double(), v_BHSK.double(), divide_first=True)
        return relative_error(ATTENTIONS[order](q_BHTK, k_BHSK, v_BHSK), expected)

    return limit_of(error, SCORES)


# Training


@dataclass(frozen=True)
class Run:
    """Settings of a training; from the step ``outlier_from`` on the start token has an outlier, of 1 at first."""

    form: str
    shape: tuple[int, int, int]  # layers, width, heads
    seed: int
    steps: int
    rate: float
    outlier_from: int | None = None

    def outlier(self, step: int) -> float:
        """Return the size of the outlier at a step: it doubles up to 2**24 at the end."""
        if self.outlier_from is None or step < self.outlier_from:
            return 0.0
        return 2.0 ** (DOUBLINGS * (step - self.outlier_from) // max(1, self.steps - 1 - self.outlier_from))


@dataclass(frozen=True)
class Outcome:
    """Result of a run."""

    run: Run
    losses: list[float | None]  # nats per code; None where it was not finite
    skipped: int  # steps whose gradients were not finite
    stopped: int | None  # the step at which the loss scale fell below its minimum

    @property
    def last_loss(self) -> float:
        """Return the mean loss of the last tenth, infinite if one of them is not finite."""
        last = self.losses[-max(1, len(self.losses) // 10) :]
        return math.inf if None in last else sum(x for x in last if x is not None) / len(last)

    @property
    def failure(self) -> str | None:
        """Return the reason of a failure, or None."""
        if self.stopped is not None:
            return f"loss scale below {LEAST_SCALE:g} at step {self.stopped + 1}"
        if not math.isfinite(self.last_loss):
            return "the loss is not finite"
        if self.last_loss >= GUESS:
            return "no better than a uniform guess"
        return None

    @property
    def outlier_borne(self) -> tuple[float, float | None]:
        """Return the largest tolerated outlier, and the one that is not tolerated, if any.

        An outlier is tolerated while the loss, averaged over the steps of its size, stays finite and closer to its
        value before than to that of a guess.
        """
        first = self.run.outlier_from or 0
        before = [x for x in self.losses[max(0, first - 10) : first] if x is not None]
        limit = (sum(before) / max(1, len(before)) + GUESS) / 2
        borne = 0.0
        steps = range(first, len(self.losses))
        for size, group in itertools.groupby(steps, key=self.run.outlier):
            losses = [self.losses[step] for step in group]
            if None in losses or sum(x for x in losses if x is not None) / len(losses) > limit:
                return borne, size
            borne = size
        return borne, None

    @property
    def first_not_finite(self) -> int | None:
        """Return the first step whose loss is not finite."""
        return self.losses.index(None) if None in self.losses else None


GUESS = math.log(CODES)


def batch(table_C: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return ids and targets (B, T): the start, two random codes, then translations of the code two positions before.

    The two random codes cannot be predicted, and have the target -100.
    """
    columns = [torch.full((BATCH,), CODES), *torch.randint(CODES, (2, BATCH), generator=generator)]
    while len(columns) < LENGTH + 1:
        columns.append(table_C[columns[-2]])
    ids = torch.stack(columns, dim=1)
    targets = ids[:, 1:].clone()
    targets[:, :2] = -100
    return ids[:, :-1], targets


def train(run: Run) -> Outcome:
    """Train one model until its last step, or until the loss scale falls below the minimum."""
    model = make_model(run.form, *run.shape, run.seed)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, betas=BETAS, weight_decay=WEIGHT_DECAY, fused=True)
    generator = torch.Generator().manual_seed(run.seed)
    table_C = torch.randperm(CODES, generator=generator)
    scale, good, skipped, losses = FIRST_SCALE, 0, 0, list[float | None]()
    for step in range(run.steps):
        ids_BT, targets_BT = batch(table_C, generator)
        middle = len(model.layers) // 2
        with outlier_before(model, middle, 0, run.outlier(step)), torch.autocast("cpu", torch.float16):
            logits_BTV = model(ids_BT)
        loss = F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten())
        losses.append(loss.item() if math.isfinite(loss.item()) else None)
        (loss * scale).backward()
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad /= scale
        if torch.nn.utils.clip_grad_norm_(parameters, CLIP_NORM).isfinite():
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(run, step)
            optimizer.step()
            good += 1
            if good % SCALE_WINDOW == 0:
                scale *= 2
        else:
            skipped, good, scale = skipped + 1, 0, scale / 2
            if scale < LEAST_SCALE:
                return Outcome(run, losses, skipped, step)
        optimizer.zero_grad()
    return Outcome(run, losses, skipped, None)


def learning_rate(run: Run, step: int) -> float:
    """Return the learning rate of a step: it rises for an eighth of the steps, then stays."""
    return run.rate * min(1.0, (step + 1) / max(1, run.steps // 8))


# All parts, their tables and the plot


Key = tuple[str, ...]  # the part, the case, the form, and the seed or the rate
Found = dict[Key, Any]  # Limit or Outcome
ONE_NORM = "one norm"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; return the exit status."""
    parser = arguments.Parser(__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="(default: all)")
    parser.add_argument("--seed", type=arguments.whole, default=0, help="first seed (default: 0)")
    parser.add_argument(
        "--seeds", type=arguments.count, default=SEEDS, metavar="COUNT", help=f"number of seeds (default: {SEEDS})"
    )
    parser.add_argument("--steps", type=arguments.count, default=160, help="training steps (default: 160)")
    for name, default in (("layers", 48), ("width", 64), ("heads", 4)):
        parser.add_argument(
            f"--{name}", type=arguments.count, default=default, help=f"{name} of the models (default: {default})"
        )
    parser.add_argument(
        "--rates", type=arguments.positive, nargs="+", default=list(RATES), metavar="RATE", help="learning rates"
    )
    cores = os.cpu_count() or 1
    parser.add_argument(
        "--processes", type=arguments.count, default=cores, help="parallel processes (default: one per core)"
    )
    parser.add_argument(
        "--json", type=arguments.output_file, metavar="FILE", help="write all metrics and every loss to FILE"
    )
    parser.add_argument(
        "--plot", type=arguments.output_file, metavar="FILE", help="plot the errors and the losses to FILE (PNG)"
    )
    args = parser.parse_args(argv)
    return run_safely(lambda: run(args), "stability.py")


def run(args: argparse.Namespace) -> int:
    """Run the requested parts."""
    check_arguments(args)
    found = measure(jobs_of(args), args.processes)
    shape = f"{args.layers} layers of {args.width}, {args.heads} heads"
    print(f"PyTorch {torch.__version__}, {shape}, seeds {args.seed} to {args.seed + args.seeds - 1}")
    tables = {"outliers": outlier_table, "attention": attention_table, "rates": rate_table, "injected": injected_table}
    for part in args.parts:
        print("\n" + "\n".join(tables[part](select(found, part))))
    if args.json is not None:
        args.json.write_text(json.dumps(as_json(found), indent=1) + "\n")
    if args.plot is not None:
        draw(found, args.plot, args.seed)
    return 0


def check_arguments(args: argparse.Namespace) -> None:
    """Raise InputError early for values that would fail after minutes of work."""
    if args.steps < 10:
        raise InputError(f"--steps must be at least 10, got {args.steps}")
    if args.width % args.heads:
        raise InputError(f"--width {args.width} does not divide into --heads {args.heads}; give a multiple of it")
    if args.plot is None:
        return
    missing = {"outliers", "injected"} - set(args.parts)
    if missing:
        raise InputError(f"--plot shows outliers and injected, --parts leaves out {' and '.join(sorted(missing))}")
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError("--plot needs matplotlib, which is missing: pip install 'cogview[train]' brings it")


def places_of(num_layers: int) -> list[int]:
    """Return the layers before which an outlier appears: the second, the middle and the last."""
    return sorted({min(1, num_layers - 1), num_layers // 2, num_layers - 1})


def jobs_of(args: argparse.Namespace) -> dict[Key, Callable[[], Any]]:
    """Return the jobs, the longest first, so that cores finish together."""
    shape = (args.layers, args.width, args.heads)
    seeds = range(args.seed, args.seed + args.seeds)
    jobs: dict[Key, Callable[[], Any]] = {}
    if "injected" in args.parts:
        start = round(QUIET * args.steps)
        for seed, form in itertools.product(seeds, reversed(FORMS)):
            one = Run(form, shape, seed, args.steps, HEALTHY_RATE, start)
            jobs["injected", "", form, str(seed)] = partial(train, one)
    if "rates" in args.parts:
        for rate, form in itertools.product(sorted(set(args.rates)), FORMS):
            jobs["rates", "", form, f"{rate:g}"] = partial(train, Run(form, shape, args.seed, args.steps, rate))
    for seed in seeds if "outliers" in args.parts else ():
        for form in FORMS:
            for before in places_of(args.layers):
                case = f"before layer {before + 1} of {args.layers}"
                jobs["outliers", case, form, str(seed)] = partial(model_limit, form, shape, before, seed)
            stream = torch.float32 if form == "ours" else torch.float16
            jobs["outliers", ONE_NORM, form, str(seed)] = partial(norm_limit, form, stream, seed)
    for seed in seeds if "attention" in args.parts else ():
        for order in ORDERS:
            jobs["attention", "", order, str(seed)] = partial(attention_limit, order, seed)
    return jobs


def _call(job: tuple[Key, Callable[[], Any]]) -> tuple[Key, Any]:
    return job[0], job[1]()


def measure(jobs: dict[Key, Callable[[], Any]], processes: int) -> Found:
    """Run the jobs in processes of one thread each, or in this one; return results in the order of ``jobs``."""
    progress = partial(tqdm, total=len(jobs), unit="job", file=sys.stderr)
    if processes == 1:
        return dict(progress(map(_call, jobs.items())))
    with multiprocessing.get_context("spawn").Pool(processes, torch.set_num_threads, (1,)) as pool:
        done = dict(progress(pool.imap_unordered(_call, jobs.items())))
    return {key: done[key] for key in jobs}


def as_json(found: Found) -> dict[str, list[dict[str, Any]]]:
    """Return the metrics of each part with their case and form."""
    written: dict[str, list[dict[str, Any]]] = {}
    for (part, case, form, _), value in found.items():
        row = {"form": form, **({"case": case} if case else {}), **asdict(value)}
        if isinstance(value, Outcome):
            row |= {"failure": value.failure, "first_not_finite": value.first_not_finite}
            if value.run.outlier_from is not None:
                row["outlier_borne"], row["outlier_not_borne"] = value.outlier_borne
        written.setdefault(part, []).append(row)
    return written


def select(found: Found, part: str) -> Found:
    """Return the results of one part."""
    return {key: value for key, value in found.items() if key[0] == part}


def by_case(found: Found) -> dict[str, dict[str, list[Any]]]:
    """Group the results of all seeds by case and form."""
    cases: dict[str, dict[str, list[Any]]] = {}
    for (_, case, form, _), value in found.items():
        cases.setdefault(case, {}).setdefault(form, []).append(value)
    return cases


def sized(value: float) -> str:
    """Format with four digits and separators of thousands."""
    return f"{value:,.0f}" if 1000 <= value < 1e7 else f"{value:.3g}"


def span(values: Sequence[float], suffix: str = "") -> str:
    """Format one number if all print alike, else the smallest and the largest."""
    low, high = (sized(value) + suffix for value in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def limit_cell(limits: Sequence[Limit]) -> str:
    """Format the largest correct size over all seeds, or that no size is wrong."""
    never = all(limit.wrong is None for limit in limits)
    return span([limit.right for limit in limits]) + (", the largest tried" if never else "")


def error_cell(limits: Sequence[Limit]) -> str:
    """Format the largest error over all seeds at the largest float16 number."""
    errors = [dict(limit.curve).get(HALF_MAX) for limit in limits]
    return "not finite" if None in errors else f"{100 * max(x for x in errors if x is not None):.2g}%"


def outlier_table(found: Found) -> list[str]:
    """Return a table of the largest tolerated outliers by position and form, and the ratio of ours to ``released``."""
    lines = [
        "| largest outlier that is right | pre-ln | released | ours | ours / released | the same, up to 65,504 "
        "| error at 65,504: pre-ln, released, ours |",
        "|---" * 7 + "|",
    ]
    for case, forms in by_case(found).items():
        ours, released = ([limit.right for limit in forms[form]] for form in ("ours", "released"))
        at_least = "at least " if all(limit.wrong is None for limit in forms["ours"]) else ""
        ratios = [a / b for a, b in zip(ours, released, strict=True)]
        held = [min(a, HALF_MAX) / b for a, b in zip(ours, released, strict=True)]
        errors = [error_cell(forms[form]) for form in FORMS]
        cells = [case, *(limit_cell(forms[form]) for form in FORMS), at_least + span(ratios), span(held)]
        cells.append(", ".join(errors))
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def attention_table(found: Found) -> list[str]:
    """Return a table of the largest scores, and the ratio of PB-relax to the others."""
    (orders,) = by_case(found).values()
    relaxed = [limit.right for limit in orders["PB-relax"]]
    lines = ["| scores in float16 | largest qk / sqrt(K) that is right | PB-relax, times as large |", "|---|---|---|"]
    for order in ORDERS:
        ratios = [a / limit.right for a, limit in zip(relaxed, orders[order], strict=True)]
        lines.append(f"| {order} | {limit_cell(orders[order])} | {span(ratios)} |")
    return lines


def rate_table(found: Found) -> list[str]:
    """Return a table of the last loss and the skipped steps at each learning rate, or the reason of its failure.

    Also list the first rates that do not learn or whose loss is not finite.
    """
    rates = sorted({value.run.rate for value in found.values()})
    lines = [f"| peak learning rate | {' | '.join(FORMS)} |", "|---" * (1 + len(FORMS)) + "|"]
    for rate in rates:
        outcomes = [found["rates", "", form, f"{rate:g}"] for form in FORMS]
        cells = [
            f"{x.failure or f'{x.last_loss:.3f}'}{f', {x.skipped} skipped' if x.skipped else ''}" for x in outcomes
        ]
        lines.append(f"| {rate:g} | {' | '.join(cells)} |")
    ends: dict[str, Callable[[Outcome], bool]] = {
        "first that does not learn": lambda outcome: outcome.failure is not None,
        "first with a loss that is not finite": lambda outcome: outcome.first_not_finite is not None,
    }
    for name, failed in ends.items():
        firsts = [[rate for rate in rates if failed(found["rates", "", form, f"{rate:g}"])] for form in FORMS]
        lines.append(f"| {name} | {' | '.join(f'{first[0]:g}' if first else 'none' for first in firsts)} |")
    return lines


def injected_table(found: Found) -> list[str]:
    """Return a table of the outlier that each training tolerates, and how it ends."""
    (forms,) = by_case(found).values()
    lines = ["| form | outlier borne | loss not finite at | steps skipped | how it ends, loss of the last tenth |"]
    lines.append("|---" * 5 + "|")
    for form in FORMS:
        outcomes: list[Outcome] = forms[form]
        borne = [outcome.outlier_borne[0] for outcome in outcomes]
        held = all(outcome.outlier_borne[1] is None for outcome in outcomes)
        broken = [x.run.outlier(x.first_not_finite) for x in outcomes if x.first_not_finite is not None]
        failures = sorted({x.failure for x in outcomes if x.failure})
        ended = [x.last_loss for x in outcomes if math.isfinite(x.last_loss)]
        cells = [
            form,
            span(borne) + (", the largest tried" if held else ""),
            f"{span(broken)} ({len(broken)} of {len(outcomes)} runs)" if broken else "never",
            span([float(x.skipped) for x in outcomes]),
            "; ".join([*failures, *([span(ended)] if ended else [])]),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


COLOURS = {"pre-ln": "#7a7a7a", "released": "#d1602b", "ours": "#1f6fb2"}
CROSS: dict[str, Any] = {"marker": "x", "markersize": 9, "markeredgewidth": 2.2}
SHOWN = 2.0**DOUBLINGS  # the largest outlier in the plot


def draw(found: Found, file: Path, seed: int) -> None:
    """Plot the error of the other tokens over the outlier, and the losses, averaged over seeds, while it grows.

    A cross is where a form ceases to be finite.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # ignore settings of the user
        matplotlib.rcParams.update({"font.size": 9.5, "axes.spines.top": False, "axes.spines.right": False})
        figure = Figure(figsize=(9, 3.8), dpi=100, layout="constrained")
        left, right = figure.subplots(1, 2)
        _draw_errors(left, found, str(seed))
        _draw_losses(right, found)
        figure.savefig(file, metadata={"Software": None})


def _draw_errors(axes: Axes, found: Found, seed: str) -> None:
    """Plot the position between layers at which ``released`` tolerates the smallest outlier."""
    cases = {case: limits["released"][0].right for case, limits in by_case(select(found, "outliers")).items()}
    case = min((name for name in cases if name != ONE_NORM), key=cases.__getitem__)
    for form in FORMS:
        curve = [point for point in found["outliers", case, form, seed].curve if point[0] <= SHOWN]
        finite = [point for point in curve if point[1] is not None]
        axes.loglog(*zip(*finite, strict=True), color=COLOURS[form], linewidth=1.8, label=form)
        if len(finite) < len(curve):
            axes.plot(*finite[-1], color=COLOURS[form], **CROSS)
    axes.axhline(TOLERANCE, color="black", linewidth=0.7, linestyle=":")
    axes.annotate("10%", (1, TOLERANCE), xytext=(2, 3), textcoords="offset points")
    axes.minorticks_off()
    axes.set(xlabel="outlier in the last token", ylabel="error of the other tokens")
    axes.set_title(f"One outlier, {case}", loc="left", fontsize=10)


def _draw_losses(axes: Axes, found: Found) -> None:
    for form, outcomes in by_case(select(found, "injected"))[""].items():
        steps = zip(*(outcome.losses for outcome in outcomes), strict=False)  # to the end of the shortest
        means = [sum(losses) / len(losses) for losses in itertools.takewhile(lambda losses: None not in losses, steps)]
        axes.plot(means, color=COLOURS[form], linewidth=1.5, label=form)
        if any(outcome.first_not_finite is not None for outcome in outcomes):
            axes.plot(len(means) - 1, means[-1], color=COLOURS[form], **CROSS)
    plan: Run = outcomes[0].run
    first = plan.outlier_from or 0
    beyond = next(step for step in range(first, plan.steps) if plan.outlier(step) > HALF_MAX)
    for step, text in ((first, "outlier\nappears"), (beyond, "it passes\n65,504")):
        axes.axvline(step, color="black", linewidth=0.7, linestyle=":")
        axes.annotate(
            text, (step, 1), (3, -2), xycoords=("data", "axes fraction"), textcoords="offset points", va="top"
        )
    axes.set(xlabel="training step", ylabel="loss, nats per code")
    axes.set_title("Training while an outlier grows", loc="left", fontsize=10)
    axes.legend(frameon=False, loc="lower left")


if __name__ == "__main__":
    sys.exit(main())
