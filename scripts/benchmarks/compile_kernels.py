"""Compile every Triton kernel as training and generation launch it, without a GPU.

    python scripts/benchmarks/compile_kernels.py [--capability 75 80 90] [--dtype float16 bfloat16 float32]

Operations are called on a CPU with the shapes of the 4B model; each kernel is compiled to machine code for the GPU
instead of being launched. A table lists the registers per thread, the spilled bytes and the shared memory per block of
threads. The exit status is 1 if a kernel does not compile.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import arguments
import torch
from torch import Tensor

CAPABILITIES = (75, 80, 90)
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = arguments.Parser(__doc__)
    parser.add_argument(
        "--capability", type=arguments.count, nargs="+", default=CAPABILITIES, help="(default: 75 80 90)"
    )
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=list(DTYPES), help="(default: all)")
    parser.add_argument("--only", default="", metavar="TEXT", help="operations whose name holds this")
    args = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 interprets kernels; unset it to compile them")
    print(
        "| operation | kernel | dtype | card | registers | spilled, bytes | shared, kB | seconds |\n" + "|---" * 8 + "|"
    )
    failed = False
    for capability in args.capability:
        for dtype in args.dtype:
            if dtype == "bfloat16" and capability < 80:
                continue  # these GPUs have no bfloat16
            for name, call in calls(DTYPES[dtype]):
                if args.only not in name:
                    continue
                where = f"{dtype} | sm_{capability}"
                try:
                    found = compiled(call, capability)
                except Exception as error:  # any error of the compiler is a result
                    failed = True
                    print(f"| {name} | {type(error).__name__}: {error} | {where} | | | | |", flush=True)
                    continue
                for kernel, registers, spilled, shared, seconds in found:
                    needs = f"{registers} | {spilled} | {shared / 1024:.0f} | {seconds:.1f}"
                    print(f"| {name} | {kernel} | {where} | {needs} |", flush=True)
    return int(failed)


def calls(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Every operation in every form that is launched as another kernel, with a backward pass where there is one."""
    from cogview.kernels import triton_utils as launch

    launch.check_floats = lambda name, tensor: None  # type: ignore[assignment]  # nothing will run on this CPU
    from cogview.kernels.attention_triton import attention_triton
    from cogview.kernels.decode_attention import SharedPrefix
    from cogview.kernels.decode_attention_triton import decode_attention_triton
    from cogview.kernels.fused_linear_cross_entropy_triton import losses_in_place
    from cogview.kernels.gelu_triton import bias_gelu_triton
    from cogview.kernels.layer_norm_triton import pb_relax_layer_norm_triton, sandwich_layer_norm_triton
    from cogview.kernels.window_attention_triton import window_attention_triton

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=dtype)

    def leaf(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=dtype, requires_grad=True)

    def backward(out: Tensor) -> None:
        out.backward(torch.zeros_like(out))

    def attend(**settings: Any) -> None:
        length, size = settings.pop("length", 256), settings.pop("size", 64)
        backward(attention_triton(*(leaf(2, 2, length, size) for _ in range(3)), **settings))

    whole = torch.zeros(2, dtype=torch.int64)
    yield "attention", attend
    yield "attention, heads of 128", lambda: attend(size=128)
    yield "attention, odd length", lambda: attend(length=257)
    yield "attention, limits", lambda: attend(left_padding_B=whole)
    yield "attention, bias", lambda: attend(bias_B1TS=zeros(2, 1, 256, 256))
    yield "attention, dropout", lambda: attend(dropout=0.1, seed=1)
    if dtype == torch.float16:
        yield "attention, float16 accumulators", lambda: attend(accumulate_dtype="float16")

    def decode(num_queries: int, rounded: bool, shared: bool) -> None:
        q = zeros(4, 2, num_queries, 64)
        stored = [torch.zeros(4, 2, 256, 64, dtype=torch.int8 if rounded else dtype) for _ in range(2)]
        scales = (zeros(4, 2, 256, 1), zeros(4, 2, 256, 1)) if rounded else None
        prefix = None
        if shared:
            first = [tensor[:1] for tensor in stored]
            members, slots = torch.arange(4).view(1, 4), torch.arange(4)
            prefix = SharedPrefix(
                *first, members, slots, scales=None if scales is None else (scales[0][:1], scales[1][:1])
            )
        decode_attention_triton(q, *stored, scales=scales, prefix=prefix)

    for num_queries in (1, 16):
        for rounded in (False, True):
            for shared in (False, True):
                name = f"decode_attention, {num_queries} new{', int8' * rounded}{', shared prefix' * shared}"
                yield name, lambda args=(num_queries, rounded, shared): decode(*args)  # type: ignore[misc]

    def sparse(**settings: Any) -> None:
        q, k, v = (leaf(1, 2, 512, 64) for _ in range(3))
        backward(window_attention_triton(q, k, v, window=128, pivots_BN=torch.arange(64).view(1, 64), **settings))

    yield "window_attention", sparse
    near = {"grid": 32, "columns": 3, "image_starts_B": torch.tensor([64])}
    yield "window_attention, neighbourhood", lambda: sparse(**near)

    def norm(*, next_norm: bool) -> None:
        x, branch = leaf(8, 2560), leaf(8, 2560)
        weights = [leaf(2560) for _ in range(4 if next_norm else 2)]
        total, normed = sandwich_layer_norm_triton(x, branch, *weights)
        backward(total if normed is None else total + normed)

    yield "sandwich_layer_norm", lambda: norm(next_norm=True)
    yield "sandwich_layer_norm, no next", lambda: norm(next_norm=False)
    parameters = leaf(2560), leaf(2560)
    yield (
        "pb_relax_layer_norm",
        lambda: backward(pb_relax_layer_norm_triton(leaf(8, 2560), *parameters)),
    )
    yield (
        "bias_gelu",
        lambda: backward(bias_gelu_triton(leaf(8, 10240), leaf(10240))),
    )
    yield (
        "cross_entropy",
        lambda: losses_in_place(zeros(8, 8192), torch.zeros(8, dtype=torch.int64), torch.ones(8), True),
    )


def compiled(call: Callable[[], Any], capability: int) -> list[tuple[str, int, int, int, float]]:
    """Return name, registers, spilled and shared bytes and seconds of compilation of each kernel of ``call``."""
    found = []
    with _compiling(capability) as kernels:
        call()
    for name, kernel, seconds in kernels:
        registers, spilled = _assembled(kernel.asm["ptx"], capability)
        found.append((name, registers, spilled, kernel.metadata.shared, seconds))
    return found


@contextmanager
def _compiling(capability: int) -> Iterator[list[tuple[str, Any, float]]]:
    """Compile kernels for a GPU of this capability instead of launching them; yield the list of compiled kernels."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction, KernelInterface

    class Card:
        """The part of a driver that Triton needs to compile."""

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", capability, 32)

        def get_current_device(self) -> int:
            return capability  # compiled kernels are cached per device

        def get_current_stream(self, device: int) -> int:
            return 0

    kernels: list[tuple[str, Any, float]] = []

    def compile_only(kernel: JITFunction, grid: Any) -> Callable[..., None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            start = time.perf_counter()
            made = kernel.run(*args, grid=grid, warmup=True, **kwargs)
            kernels.append((kernel.__name__, made, time.perf_counter() - start))

        return launch

    properties = SimpleNamespace(multi_processor_count=100)
    driver.set_active(Card())
    with (
        patch.object(KernelInterface, "__getitem__", compile_only),
        patch("torch.cuda.get_device_capability", lambda device: divmod(capability, 10)),
        patch("torch.cuda.get_device_properties", lambda device: properties),
    ):
        yield kernels


def _assembled(ptx: str, capability: int) -> tuple[int, int]:
    """Return the registers per thread and the spilled bytes."""
    from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability

    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        architecture = f"--gpu-name={sm_arch_from_capability(capability)}"
        command = [get_ptxas(capability).path, "-v", architecture, str(source), "-o", os.devnull]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers = int(re.findall(r"Used (\d+) registers", log)[-1])
    return registers, sum(int(count) for count in re.findall(r"(\d+) bytes spill", log))


if __name__ == "__main__":
    arguments.run_script(main)
