"""Every Triton kernel on a GPU: is it right, and how near does it come to what the card can do.

    python scripts/benchmarks/gpu_kernels.py [--dtype bfloat16] [--only attention] [--json kernels.json]

In the shapes of the 4B model (40 heads of 64, width 2,560) each operation is compared with the reference in float32,
which it may miss by twice what PyTorch misses it by in the same dtype, and timed beside PyTorch's own operations (fused
attention, FlexAttention compiled, separate operations). The limit is what the card copied, or multiplied, in a probe
before. Medians; forward, or forward and backward. Exit status 1 if a result is wrong. On a CPU, where kernels are
interpreted (TRITON_INTERPRET=1), shapes are tiny and times mean nothing: that only shows that the script runs.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import arguments
import torch
from torch import Tensor
from torch.nn import functional as F

from cogview.device import DTYPES
from cogview.kernels.attention import attention_reference
from cogview.kernels.decode_attention import SharedPrefix, decode_attention_reference, quantize_per_position
from cogview.kernels.fused_linear_cross_entropy import LossTargets, fused_linear_cross_entropy
from cogview.kernels.gelu import bias_gelu_reference
from cogview.kernels.layer_norm import sandwich_layer_norm_reference
from cogview.kernels.window_attention import window_attention_reference, window_attention_torch

HEADS, SIZE, WIDTH = 40, 64, 2560
SLACK = 1e-5  # of an error, where PyTorch's own is nothing
GOALS = {"attention": 0.85, "decode_attention": 0.8, "sandwich_layer_norm": 0.8}


@dataclass(kw_only=True)
class Case:
    """One operation on one shape."""

    name: str
    shape: str
    inputs: list[Tensor]  # float32
    ours: Callable[..., Any]
    reference: Callable[..., Any]
    learns: bool = False  # forward and backward
    flops: float = 0.0
    moved: float = 0.0  # bytes
    others: dict[str, Callable[..., Any]] = field(default_factory=dict)  # PyTorch's first
    checked: bool = True  # large ones are checked in a smaller shape


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = arguments.Parser(__doc__)
    parser.add_argument("--device", default="cuda", help="(default: cuda)")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="(default: bfloat16)")
    parser.add_argument("--only", default="", metavar="TEXT", help="operations whose name holds this")
    parser.add_argument("--json", type=arguments.output_file, metavar="FILE", help="write all metrics to FILE")
    args = parser.parse_args(argv)
    device, dtype = torch.device(args.device), DTYPES[args.dtype]
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("no GPU was found; --device cpu with TRITON_INTERPRET=1 shows that the script runs")
    torch.manual_seed(0)
    bandwidth, rate = probe(device, dtype)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"# {name}, {args.dtype}, PyTorch {torch.__version__}: copies {bandwidth / 1e9:.0f} GB/s, ", end="")
    print(f"multiplies {rate / 1e12:.1f} TFLOP/s\n")
    print("| operation | shape | ms | of the limit | PyTorch's time / ours | others / ours | error / PyTorch's |")
    print("|---" * 7 + "|", flush=True)
    metrics, wrong = [], []
    for case in cases(device, dtype):
        if args.only not in case.name:
            continue
        found = measured(case, dtype, device, bandwidth, rate)
        metrics.append(found)
        others = ", ".join(f"{other} {ratio:.2f}" for other, ratio in found["others"].items())
        error = "" if found["error"] is None else f"{found['error']:.2f}{'' if found['right'] else ' WRONG'}"
        cells = f"{found['ms']:.3f} | {found['of_limit']:.2f} | {found['against_torch']:.2f} | {others} | {error}"
        print(f"| {case.name}{' and gradients' * case.learns} | {case.shape} | {cells} |", flush=True)
        if not found["right"]:
            wrong.append(f"{case.name} {case.shape}")
    if args.json:
        probed = {"device": name, "dtype": args.dtype, "bytes_per_second": bandwidth, "flops": rate}
        args.json.write_text(json.dumps({**probed, "kernels": metrics}, indent=1))
    print(f"\ngoals: {', '.join(f'{name} {goal}' for name, goal in GOALS.items())}")
    if wrong:
        print(f"wrong: {', '.join(wrong)}")
    return int(bool(wrong))


def measured(case: Case, dtype: torch.dtype, device: torch.device, bandwidth: float, rate: float) -> dict[str, Any]:
    """Return the metrics of a case."""
    inputs = [tensor.to(dtype) if tensor.is_floating_point() else tensor for tensor in case.inputs]
    seconds = timed(step(case.ours, inputs, case.learns), device)
    others = {
        name: timed(step(other, inputs, case.learns), device) / seconds for name, other in list(case.others.items())
    }
    limit = max(case.flops / rate, case.moved / bandwidth)
    found = {
        "name": case.name,
        "shape": case.shape,
        "gradients": case.learns,
        "ms": 1e3 * seconds,
        "of_limit": limit / seconds,
        "against_torch": next(iter(others.values())),
        "others": dict(list(others.items())[1:]),
        "error": None,
        "right": True,
    }
    if case.checked:
        exact = step(case.reference, [x.float() if x.is_floating_point() else x for x in inputs], case.learns)()
        own = step(case.ours, inputs, case.learns)()
        same = step(next(iter(case.others.values())), inputs, case.learns)()
        pairs = [
            (worst(a, c), worst(b, c), c.float().abs().max().item()) for a, b, c in zip(own, same, exact, strict=True)
        ]
        found["error"] = max(mine / (theirs + SLACK * scale) for mine, theirs, scale in pairs)
        found["right"] = all(mine <= 2 * theirs + SLACK * scale for mine, theirs, scale in pairs)
    return found


def step(run: Callable[..., Any], inputs: Sequence[Tensor], learns: bool) -> Callable[[], list[Tensor]]:
    """Return a function that runs forward and returns results, or forward and backward and returns gradients."""
    if not learns:

        def forward() -> list[Tensor]:
            with torch.no_grad():
                return [out for out in _tuple(run(*inputs)) if out is not None]

        return forward
    leaves = [x.detach().requires_grad_() if x.is_floating_point() else x for x in inputs]
    trainable = [x for x in leaves if x.requires_grad]
    upstream: list[Tensor] = []

    def both() -> list[Tensor]:
        outs = [out for out in _tuple(run(*leaves)) if out is not None]
        if not upstream:
            generator = torch.Generator(device=outs[0].device).manual_seed(0)
            upstream.extend(torch.randn(out.shape, generator=generator, device=out.device) for out in outs)
        return list(
            torch.autograd.grad(outs, trainable, [x.to(out.dtype) for x, out in zip(upstream, outs, strict=True)])
        )

    return both


def _tuple(outs: Any) -> tuple[Any, ...]:
    return outs if isinstance(outs, tuple) else (outs,)


def worst(found: Tensor, exact: Tensor) -> float:
    """The largest difference; that of a NaN is infinite."""
    difference = (found.float() - exact.float()).abs().nan_to_num(nan=torch.inf)
    return difference.max().item()


def timed(run: Callable[[], Any], device: torch.device) -> float:
    """Seconds, the median of many."""
    if device.type == "cuda":
        from triton.testing import do_bench

        return 1e-3 * do_bench(run, warmup=20, rep=80, return_mode="median")
    times = []
    for _ in range(2):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def probe(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """Bytes a second of a copy, and floating-point operations a second of a product."""
    large, side = (2**28, 8192) if device.type == "cuda" else (2**20, 256)
    source = torch.zeros(large, device=device)
    target = torch.empty_like(source)
    matrix = torch.randn(side, side, device=device).to(dtype)
    copying = timed(lambda: target.copy_(source), device)
    return 2 * source.nbytes / copying, 2 * side**3 / timed(lambda: matrix @ matrix, device)


def cases(device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """All operations in all shapes."""
    from cogview.kernels.attention_triton import attention_triton
    from cogview.kernels.decode_attention_triton import decode_attention_triton
    from cogview.kernels.gelu_triton import bias_gelu_triton
    from cogview.kernels.layer_norm_triton import sandwich_layer_norm_triton
    from cogview.kernels.window_attention_triton import window_attention_triton

    real = device.type == "cuda"
    heads, width = (HEADS, WIDTH) if real else (1, 64)
    item = dtype.itemsize

    def numbers(*shape: int) -> Tensor:
        return torch.randn(shape, device=device)

    def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    training = [(1, 1089), (8, 1089), (32, 1089), (1, 1345), (16, 1345)] if real else [(1, 33)]
    for rows, length in training:
        for learns in (False, True):
            others: dict[str, Callable[..., Any]] = {"PyTorch": causal}
            if real:
                others["FlexAttention"] = flexible(length, device)
            if rows == 1:
                others["reference"] = attention_reference
            yield Case(
                name="attention",
                shape=f"{rows} x {heads} x {length} x {SIZE}",
                inputs=[numbers(rows, heads, length, SIZE) for _ in range(3)],
                ours=attention_triton,
                reference=attention_reference,
                learns=learns,
                flops=2 * rows * heads * length**2 * SIZE * (3.5 if learns else 1),  # half of all pairs
                others=others,
                checked=rows == 1,
            )
            if dtype == torch.float16:
                yield Case(
                    name="attention, float16 accumulators",
                    shape=f"{rows} x {heads} x {length} x {SIZE}",
                    inputs=[numbers(rows, heads, length, SIZE) for _ in range(3)],
                    ours=lambda q, k, v: attention_triton(q, k, v, accumulate_dtype="float16"),
                    reference=attention_reference,
                    learns=learns,
                    flops=2 * rows * heads * length**2 * SIZE * (3.5 if learns else 1),
                    others={"PyTorch": causal},
                    checked=False,  # it is less exact: tests say how much
                )

    length = 1089 if real else 33
    for rows in (1, 8, 32, 128) if real else (2,):
        for new in (1, 16):
            yield Case(
                name="decode_attention",
                shape=f"{rows} x {heads} x {new} of {length}",
                inputs=[numbers(rows, heads, count, SIZE) for count in (new, length, length)],
                ours=decode_attention_triton,
                reference=decode_attention_reference,
                moved=2 * rows * heads * length * SIZE * item,
                others={"PyTorch": decoded_by_torch, "reference": decode_attention_reference},
            )
        keys, values = (quantize_per_position(numbers(rows, heads, length, SIZE).to(dtype)) for _ in range(2))
        rounded = {"scales": (keys[1], values[1])}

        def plain(q: Tensor, k: Tensor, v: Tensor, scales: tuple[Tensor, Tensor] = rounded["scales"]) -> Tensor:
            k_scale, v_scale = (scale.to(q.dtype) for scale in scales)
            return decoded_by_torch(q, k.to(q.dtype) * k_scale, v.to(q.dtype) * v_scale)

        def exactly(q: Tensor, k: Tensor, v: Tensor, scales: tuple[Tensor, Tensor] = rounded["scales"]) -> Tensor:
            return decoded_by_torch(q, k.float() * scales[0].float(), v.float() * scales[1].float())

        yield Case(
            name="decode_attention, int8",
            shape=f"{rows} x {heads} x 1 of {length}",
            inputs=[numbers(rows, heads, 1, SIZE), keys[0], values[0]],
            ours=lambda q, k, v, scales=rounded["scales"]: decode_attention_triton(q, k, v, scales=scales),
            reference=exactly,
            moved=2 * rows * heads * length * (SIZE + item),
            others={"PyTorch": plain},
        )
    rows, first = (32, 1024) if real else (2, 16)
    members = torch.arange(rows, device=device)
    kept = [numbers(1, heads, first, SIZE).to(dtype) for _ in range(2)]

    def after_one(run: Callable[..., Any]) -> Callable[..., Any]:
        def decode(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            beginning = SharedPrefix(*(x.to(q.dtype) for x in kept), members.view(1, rows), members)
            return run(q, k, v, prefix=beginning)

        return decode

    def copied(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        whole = (
            torch.cat([x.to(q.dtype).expand(rows, -1, -1, -1), own], dim=2) for x, own in zip(kept, (k, v), strict=True)
        )
        return decoded_by_torch(q, *whole)

    yield Case(
        name="decode_attention, shared beginning",
        shape=f"{rows} x {heads} x 1 of {first} + 64",
        inputs=[numbers(rows, heads, count, SIZE) for count in (1, 64, 64)],
        ours=after_one(decode_attention_triton),
        reference=after_one(decode_attention_reference),
        moved=2 * heads * (first + 64 * rows) * SIZE * item,
        others={"PyTorch, copied": copied},
    )

    window = 768 if real else 16
    for length in (1345, 5380, 10760) if real else (49,):
        pivots = torch.arange(0, length - window, max(1, (length - window) // (320 if real else 8)), device=device)
        settings = {"window": window, "pivots_BN": pivots.view(1, -1)}
        for learns in (False, True):
            yield Case(
                name="window_attention",
                shape=f"1 x {heads} x {length} x {SIZE}, window {window}, {len(pivots)} pivots",
                inputs=[numbers(1, heads, length, SIZE) for _ in range(3)],
                ours=lambda q, k, v, settings=settings: window_attention_triton(q, k, v, **settings),
                reference=lambda q, k, v, settings=settings: window_attention_reference(q, k, v, **settings),
                learns=learns,
                flops=4 * heads * length * (window + len(pivots)) * SIZE * (3.5 if learns else 1),
                others={
                    "PyTorch in blocks": lambda q, k, v, settings=settings: window_attention_torch(q, k, v, **settings),
                    "dense": causal,
                },
                checked=length < 2000,
            )

    tokens = 32 * 1089 if real else 9
    for learns in (False, True):
        yield Case(
            name="sandwich_layer_norm",
            shape=f"{tokens} x {width}",
            inputs=[numbers(tokens, width), numbers(tokens, width), *(numbers(width) for _ in range(4))],
            ours=sandwich_layer_norm_triton,
            reference=sandwich_layer_norm_reference,
            learns=learns,
            moved=tokens * width * item * (10 if learns else 4),
            others={"PyTorch": sandwich_layer_norm_reference},
        )
        inner = tokens // 4
        yield Case(
            name="bias_gelu",
            shape=f"{inner} x {4 * width}",
            inputs=[numbers(inner, 4 * width), numbers(4 * width)],
            ours=bias_gelu_triton,
            reference=bias_gelu_reference,
            learns=learns,
            moved=inner * 4 * width * item * (5 if learns else 2),
            others={"PyTorch": bias_gelu_reference},
        )

    positions, ids, rows_of_all = (8 * 1088, 8192, 58_240) if real else (9, 32, 96)
    targets = torch.randint(0, ids, (positions,), device=device)
    loss_targets = LossTargets(
        range(ids), torch.arange(positions, device=device), targets, torch.ones(positions, device=device) / positions
    )

    def by_slice(hidden: Tensor, embedding: Tensor) -> Tensor:
        return F.cross_entropy((hidden @ embedding[:ids].T).float(), targets)

    yield Case(
        name="fused_linear_cross_entropy",
        shape=f"{positions} x {width}, {ids} of {rows_of_all}",
        inputs=[numbers(positions, width), 0.02 * numbers(rows_of_all, width)],
        ours=lambda hidden, embedding: fused_linear_cross_entropy(hidden, embedding, [loss_targets])[0],
        reference=by_slice,
        learns=True,
        flops=6 * positions * width * ids,
        others={"PyTorch on the slice": by_slice},
    )


def decoded_by_torch(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's fused attention of the last T of S positions."""
    new, length = q.shape[2], k.shape[2]
    seen = None
    if new > 1:
        seen = torch.ones(new, length, dtype=torch.bool, device=q.device).tril(length - new)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen)


def flexible(length: int, device: torch.device) -> Callable[..., Any]:
    """FlexAttention, compiled, with a causal mask."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    mask = create_block_mask(lambda b, h, q, k: q >= k, None, None, length, length, device=str(device))
    run = torch.compile(flex_attention)
    return lambda q, k, v: run(q, k, v, block_mask=mask)


if __name__ == "__main__":
    arguments.run_script(main)
