"""Diagnostics of a machine and of a training run on it: each check yields findings with a remedy.

Versions are checked before PyTorch is imported, since it may be what is missing or broken.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import math
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from cogview.errors import InputError
from cogview.formatting import format_bytes
from cogview.process_variables import rank_and_world_size

if TYPE_CHECKING:
    import torch


class SupportedVersions(NamedTuple):
    """Versions of a package that this project is tested with, and the extra that installs it."""

    extra: str = ""
    lowest: tuple[int, ...] = ()
    below: tuple[int, ...] = ()


PACKAGES = {
    "torch": SupportedVersions("", (2, 6), (2, 14)),
    "numpy": SupportedVersions(),
    "lmdb": SupportedVersions(),
    "sentencepiece": SupportedVersions(),
    "safetensors": SupportedVersions(),
    "tensorboard": SupportedVersions("train"),
    "matplotlib": SupportedVersions("train"),
    "deepspeed": SupportedVersions("deepspeed", (0, 19, 8), (0, 20)),
    "peft": SupportedVersions("lora", (0, 17)),
    "triton": SupportedVersions(),
}
OPTIONAL_PACKAGES = ("triton",)  # without an extra
ALL_REDUCE_SIZE = 1 << 20  # float32 numbers in the check of processes
BUSY_GPU = 0.8  # fraction of free memory below which another program uses the GPU


@dataclass(frozen=True)
class Diagnosis:
    """A finding.

    Attributes:
        status: ``ok``, ``note`` or ``problem``.
        subject: The package, device or part that was checked.
        text: The finding.
        remedy: What to do, or empty.
    """

    status: str
    subject: str
    text: str
    remedy: str = ""

    def __str__(self) -> str:
        """Return the finding as a line of a table."""
        line = f"{self.status:<9}{self.subject:<14}{self.text}"
        return f"{line}; {self.remedy}" if self.remedy else line


def guarded(subject: str, check: Callable[[], Iterator[Diagnosis]]) -> Iterator[Diagnosis]:
    """Yield the findings of ``check``, and its InputError or OSError as a problem.

    Args:
        subject: Subject of the problem.
        check: The check.
    """
    try:
        yield from check()
    except (InputError, OSError) as error:
        yield Diagnosis("problem", subject, " ".join(str(error).split()))


def check_versions(needed: Collection[str] = ()) -> Iterator[Diagnosis]:
    """Check the versions of Python and of packages.

    Args:
        needed: Optional packages that a recipe needs.
    """
    import cogview

    where, python = Path(cogview.__file__).parent, platform.python_version()
    yield Diagnosis("ok", "cogview", f"{cogview.__version__} in {where}, Python {python}")
    for name, tested in PACKAGES.items():
        yield check_package(name, tested, is_needed=name in needed)


def check_package(name: str, tested: SupportedVersions, *, is_needed: bool) -> Diagnosis:
    """Check the version of one package.

    Args:
        name: Name of its distribution.
        tested: Versions that it may have.
        is_needed: Whether a recipe needs it, although it is optional.

    Returns:
        The finding.
    """
    install = f"pip install 'cogview[{tested.extra}]'" if tested.extra else f"pip install {name}"
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        if is_needed:
            return Diagnosis("problem", name, "is not installed", install)
        if tested.extra or name in OPTIONAL_PACKAGES:
            return Diagnosis("note", name, "is not installed; it is optional", install)
        return Diagnosis("problem", name, "is not installed", install)
    numbers = tuple(int(part) for part in version.split("+")[0].split(".")[:3] if part.isdecimal())
    if (tested.lowest and numbers < tested.lowest) or (tested.below and numbers >= tested.below):
        span = " to below ".join(".".join(map(str, end)) for end in (tested.lowest, tested.below) if end)
        package = f"cogview[{tested.extra}]" if tested.extra else "cogview"
        return Diagnosis("problem", name, version, f"tested with {span}: pip install '{package}'")
    return Diagnosis("ok", name, version)


def check_extensions() -> Iterator[Diagnosis]:
    """Check that no killed compilation has left a lock for which DeepSpeed would wait."""
    if importlib.util.find_spec("deepspeed") is None:
        return
    from cogview.training.engines.deepspeed_extensions import stale_locks

    for lock in stale_locks():
        text = f"{lock} was left by a compilation that was killed; no process holds it"
        yield Diagnosis("note", "deepspeed", text, "cogview train removes it")


def check_devices() -> Iterator[Diagnosis]:
    """Check the processor, the memory and the GPUs, and the precision of training on each."""
    import torch

    from cogview.device import available_memory, cpu_quota, precision_name, training_dtype, use_cpu_quota

    use_cpu_quota()
    quota = cpu_quota()
    limit = "" if quota is None else f", a quota of {quota:.3g} processors"
    cpu = torch.device("cpu")
    yield Diagnosis(
        "ok",
        "cpu",
        f"{os.cpu_count()} processors{limit}, {torch.get_num_threads()} threads, "
        f"{format_bytes(available_memory(cpu))} of memory available, trains in {precision_name(training_dtype(cpu))}",
    )
    if not torch.cuda.is_available():
        build = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built for CPUs"
        text = f"PyTorch ({build}) finds none"
        if shutil.which("nvidia-smi") is None:
            yield Diagnosis("note", "gpu", text)
        else:
            yield Diagnosis("problem", "gpu", text, "there is an NVIDIA driver: install PyTorch for CUDA")
    for number in range(torch.cuda.device_count()):
        yield check_gpu(number)


def check_kernels() -> Iterator[Diagnosis]:
    """Check the kernels that ``COGVIEW_KERNELS`` forces, and the C compiler that native kernels need."""
    from cogview.kernels.dispatch import ForcedKernelsError, forced_backend
    from cogview.kernels.native_library import CompileError, find_compiler

    try:
        forced = forced_backend("cpu")
    except ForcedKernelsError as error:
        yield Diagnosis("problem", "kernels", str(error), "unset COGVIEW_KERNELS")
        return
    if forced not in (None, "native"):
        yield Diagnosis("note", "kernels", f"COGVIEW_KERNELS={forced}", "native kernels generate faster on a CPU")
        return
    try:
        compiler = " ".join(find_compiler())
    except CompileError as error:
        yield Diagnosis("note" if forced is None else "problem", "kernels", f"no native kernels of a CPU: {error}")
    else:
        yield Diagnosis("ok", "kernels", f"those of a CPU are compiled at first use by {compiler}")


def check_gpu(number: int) -> Diagnosis:
    """Check the free memory of a CUDA GPU, and the precision of training on it."""
    import torch

    from cogview.device import choose_placement, precision_name, training_dtype

    device = choose_placement(f"cuda:{number}").device
    properties = torch.cuda.get_device_properties(device)
    free, total = torch.cuda.mem_get_info(device)
    precision = precision_name(training_dtype(device))
    reason = "" if precision == "bfloat16" else " with loss scaling and PB-relax, since it has no bfloat16"
    text = (
        f"{properties.name}, compute capability {properties.major}.{properties.minor}, {format_bytes(free)} of "
        f"{format_bytes(total)} free, trains in {precision}{reason}"
    )
    if free > BUSY_GPU * total:
        return Diagnosis("ok", f"cuda:{number}", text)
    return Diagnosis("note", f"cuda:{number}", text, "another program uses it: nvidia-smi shows which")


def check_processes(device: str, count: int | None) -> Iterator[Diagnosis]:
    """Check an all-reduce over processes: its sums and its speed.

    Args:
        device: auto, cpu, cuda, cuda:N or mps.
        count: Processes to start; None for one per GPU, or two. Processes that torchrun has started are used instead.

    Yields:
        The finding.
    """
    import torch

    uses_cuda = torch.cuda.is_available() and device != "cpu"
    size = count or (torch.cuda.device_count() if uses_cuda else 2)
    if rank_and_world_size()[1] > 1:
        size, seconds = _all_reduce_with_peers(device)
        where = f"{size} processes that were started together"
    else:
        where = f"{size} processes on this machine"
        try:
            seconds = _all_reduce_in_subprocesses(size, uses_cuda)
        except Exception as error:  # of any kind: of a process, of NCCL, of the system
            yield Diagnosis(
                "problem",
                "processes",
                f"an all-reduce over {where} failed: {str(error).strip().splitlines()[-1]}",
                "check that no firewall closes ports of 127.0.0.1 and no GPU is in exclusive mode; NCCL_DEBUG=INFO "
                "prints details",
            )
            return
    if math.isnan(seconds):
        text = f"an all-reduce over {where} returned wrong sums"
        yield Diagnosis("problem", "processes", text, "update the driver and PyTorch")
        return
    rate, backend = 4 * ALL_REDUCE_SIZE / seconds / 1e9, "NCCL" if uses_cuda else "gloo"
    yield Diagnosis("ok", "processes", f"all-reduce over {where} by {backend}: {rate:.2f} GB/s each")


def _all_reduce_with_peers(device: str) -> tuple[int, float]:
    """Return the number of processes that torchrun has started, and the seconds of an all-reduce."""
    from cogview.training.distributed import destroy_distributed, init_distributed

    context = init_distributed(device)
    try:
        return context.size, time_all_reduce(context.device, context.rank, context.size)
    finally:
        destroy_distributed()


def _all_reduce_in_subprocesses(size: int, uses_cuda: bool) -> float:
    """Return the seconds of an all-reduce over ``size`` new processes."""
    from torch.multiprocessing.spawn import start_processes

    from cogview.training.distributed import free_port

    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "seconds"
        arguments = (size, free_port(), uses_cuda, str(result))
        start_processes(_all_reduce_process, arguments, nprocs=size, start_method="spawn")
        return float(result.read_text())


def _all_reduce_process(rank: int, size: int, port: int, uses_cuda: bool, result: str) -> None:
    """Take part in an all-reduce as process ``rank``; the first process writes the seconds to ``result``."""
    import torch
    import torch.distributed as dist

    from cogview.device import choose_placement

    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    device = choose_placement(f"cuda:{rank}" if uses_cuda else "cpu").device
    if uses_cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if uses_cuda else "gloo", rank=rank, world_size=size)
    seconds = time_all_reduce(device, rank, size)
    if rank == 0:
        Path(result).write_text(str(seconds))
    dist.destroy_process_group()


def time_all_reduce(device: torch.device, rank: int, size: int) -> float:
    """Return the median seconds of an all-reduce of ``ALL_REDUCE_SIZE`` float32 numbers, or NaN for wrong sums.

    Args:
        device: Device of the numbers.
        rank: Rank of this process.
        size: Number of processes.
    """
    import torch
    import torch.distributed as dist

    numbers = torch.full((ALL_REDUCE_SIZE,), float(rank + 1), device=device)
    dist.all_reduce(numbers)
    is_correct = bool((numbers == size * (size + 1) / 2).all())
    times = []
    for _ in range(5):
        dist.barrier()
        start = time.perf_counter()
        dist.all_reduce(numbers)
        if numbers.is_cuda:
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return sorted(times)[2] if is_correct else math.nan


def check_disk(folder: Path, checkpoint_bytes: int = 0, kept: int = 0) -> Iterator[Diagnosis]:
    """Check that a folder can be written and has space for the checkpoints of a run.

    Args:
        folder: The folder; it need not exist.
        checkpoint_bytes: Bytes of a checkpoint.
        kept: Checkpoints that the run keeps, besides the best one and one that is being written.

    Yields:
        The finding.
    """
    existing = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
    free, needed = shutil.disk_usage(existing).free, checkpoint_bytes * (kept + 2)
    text = f"{format_bytes(free)} free at {existing}"
    if needed:
        text += f", {kept} checkpoints, the best one and one being written take {format_bytes(needed)}"
    if free < needed:
        yield Diagnosis("problem", "disk", text, "free some space, or set a smaller run.keep")
    else:
        yield Diagnosis("ok", "disk", text)
    if not os.access(existing, os.W_OK):
        yield Diagnosis("problem", "disk", f"{existing} cannot be written", "choose another --work")
