"""Devices: where a model runs, in which dtype or quantization, and how much memory is free there."""

from __future__ import annotations

import functools
import math
import os
import platform
import re
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias, get_args

import torch

from cogview.errors import InputError
from cogview.kernels.linear import cpu_multiplies_bfloat16
from cogview.kernels.native import expects_native_kernels
from cogview.process_variables import number_variable, threads_variable

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DTYPE_BYTES = {name: dtype.itemsize for name, dtype in DTYPES.items()}
TRAINING_PRECISIONS = tuple(DTYPES)
Quantization: TypeAlias = Literal["int8", "int4"]  # of the weights of a transformer
QUANTIZATIONS: tuple[Quantization, ...] = get_args(Quantization)


@dataclass(frozen=True)
class DevicePlacement:
    """A device, the dtype of weights and activations on it, and the reason for the choice."""

    device: torch.device
    dtype: torch.dtype
    reason: str
    quantization: Quantization | None = None  # of the projections of the transformer; None: they have ``dtype``
    matrices: torch.dtype | None = None  # their dtype, where 16 bits are multiplied as float32; None: ``dtype``

    @property
    def weight_format(self) -> str:
        """Name of the quantization of the weights, or of their dtype."""
        return self.quantization or str(self.dtype).removeprefix("torch.")

    def __str__(self) -> str:
        """Return device, format and reason."""
        name = str(self.dtype).removeprefix("torch.")
        stored = self.quantization or str(self.matrices or self.dtype).removeprefix("torch.")
        if stored != name:
            return f"{self.device}, {name} with weights in {stored} ({self.reason})"
        return f"{self.device}, {name} ({self.reason})"


def choose_placement(
    device: str = "auto",
    dtype: str = "auto",
    *,
    stored: Quantization | None = None,
    stored_dtype: torch.dtype | None = None,
    num_parameters: int = 0,
) -> DevicePlacement:
    """Choose a device and a dtype.

    CUDA uses bfloat16 if the GPU has it in hardware (compute capability 8.0 and above; ``is_bf16_supported`` is also
    true for GPUs that emulate it several times slower), and float16 otherwise. MPS uses float16. A CPU uses float32, or
    bfloat16 if the weights of a float32 model would take more than half of the free memory; native kernels leave those
    that are stored in 16 bits as they are.

    Args:
        device: auto, cpu, cuda, cuda:N, mps, or the number of a GPU. auto prefers CUDA to MPS to a CPU.
        dtype: auto, float32, bfloat16, float16, int8 or int4. auto keeps the quantization of the checkpoint.
        stored: Quantization of the checkpoint's weights.
        stored_dtype: Dtype of its matrices, if they are not quantized; None if unknown.
        num_parameters: Parameters of the transformer; 0 if unknown.

    Returns:
        The placement. int8 and int4 compute in 16 bits.

    Raises:
        InputError: The device or dtype is unknown, or this machine has no such device.
    """
    use_cpu_quota()
    chosen = _choose_device(device)
    quantization = stored if dtype == "auto" else parse_quantization(dtype)
    if quantization is not None:
        half = torch.bfloat16 if chosen.type == "cpu" else _choose_dtype(chosen, 0).dtype
        return DevicePlacement(chosen, half, "as stored" if dtype == "auto" else "as requested", quantization)
    if dtype == "auto":
        return _choose_dtype(chosen, num_parameters, stored_dtype)
    if dtype not in DTYPES:
        raise InputError(f"dtype {dtype!r} is unknown; known: auto, {', '.join([*DTYPES, *QUANTIZATIONS])}")
    return DevicePlacement(chosen, DTYPES[dtype], "as requested")


def parse_quantization(name: str | None) -> Quantization | None:
    """Return ``name`` if it is a quantization, else None."""
    return next((known for known in QUANTIZATIONS if known == name), None)


def use_local_rank_gpu() -> None:
    """Select the GPU with the number LOCAL_RANK for ``auto`` and ``cuda``, in a process started by torchrun."""
    if "LOCAL_RANK" in os.environ and torch.cuda.is_available():
        torch.cuda.set_device(number_variable("LOCAL_RANK", 0) % torch.cuda.device_count())


def cpu_quota(root: Path = Path("/")) -> float | None:
    """Return the number of CPUs whose time the control groups of this process allow it, as in a container.

    Args:
        root: The folder that holds proc and sys.

    Returns:
        The minimum over the group and its ancestors, such as 1.5; None without a quota.
    """
    quotas = []
    with suppress(OSError):  # not Linux
        for controllers, path in _control_groups(root):
            mounts = [""] if controllers == [""] else ["cpu", "cpu,cpuacct"] if "cpu" in controllers else []
            for mount in mounts:
                for group in _visible_groups(root / "sys/fs/cgroup" / mount, path):
                    quotas += _quotas_of(group)
    return min(quotas, default=None)


def cpu_name() -> str:
    """Return the name of the processor's model, or of its architecture if that is unknown."""
    cpu = Path("/proc/cpuinfo")
    named = re.search(r"^model name\s*:\s*(.+)$", cpu.read_text(), re.MULTILINE) if cpu.is_file() else None
    return named[1].strip() if named else platform.processor() or platform.machine()


def usable_cpus() -> int:
    """Return the number of CPUs that this process may use, by its affinity and its quota; at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, math.ceil(cpu_quota() or cores)))


@functools.cache
def use_cpu_quota() -> None:
    """Let PyTorch use as many threads as ``cpu_quota`` allows CPUs, unless OMP_NUM_THREADS chooses their number.

    PyTorch starts one thread for each core of the machine. With a quota they take turns, which slows all of them.
    """
    if threads_variable() is None and (quota := cpu_quota()) is not None:
        torch.set_num_threads(min(torch.get_num_threads(), math.ceil(quota)))


def available_memory(device: torch.device) -> int:
    """Return the bytes that this process can still allocate on a device.

    On a CPU it is the minimum of the memory available in the system and the headroom of control groups and process
    limits (``ulimit -d``, ``ulimit -v``); the physical memory, if the system reports none of them.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    return _available_on_host(Path("/"))


def peak_memory(device: torch.device) -> float:
    """Return the peak of the bytes in tensors on a GPU, and of resident memory on other devices.

    Training logs it as a metric. It is 0 if the system does not report it.
    """
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    return float(_peak_resident_memory() or 0)


def peak_process_memory(device: torch.device, free_before: int) -> int | None:
    """Return the peak of the bytes that this process held on a device, allocator and context included.

    Args:
        device: The device. On a CPU, resident memory counts, mapped files included.
        free_before: Bytes that were free before the process used the device. The context of a GPU, which PyTorch does
            not count, is computed from them and the bytes that are free now.

    Returns:
        The bytes, or None if the system does not report them.
    """
    if device.type == "cuda":
        context = free_before - torch.cuda.mem_get_info(device)[0] - torch.cuda.memory_reserved(device)
        return torch.cuda.max_memory_reserved(device) + max(0, context)
    if device.type == "mps":  # MPS records no peak, and rarely returns memory
        return torch.mps.driver_allocated_memory()
    return _peak_resident_memory()


def float64_of(device: torch.device) -> torch.dtype:
    """Return float64, or float32 on MPS, which has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def _peak_resident_memory() -> int | None:
    """Return the peak of this process's resident memory in bytes; None if the system does not report it."""
    with suppress(OSError):  # on Linux ru_maxrss is inherited from the parent
        if found := re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text()):
            return 1024 * int(found[1])
    with suppress(ImportError):  # not on Windows
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return None


def _available_on_host(root: Path) -> int:
    """Return the bytes available on the host; ``root`` holds proc and sys."""
    with suppress(OSError):  # not Linux
        free = []
        if found := re.search(r"MemAvailable:\s*(\d+) kB", (root / "proc/meminfo").read_text()):
            free.append(1024 * int(found[1]))
        free += _ulimit_headroom(root / "proc/self")
        for controllers, path in _control_groups(root):
            if controllers == [""]:
                free += _cgroup_headroom(root / "sys/fs/cgroup", path, "memory.max", "memory.current", "inactive_file")
            elif "memory" in controllers:
                names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
                free += _cgroup_headroom(root / "sys/fs/cgroup/memory", path, *names)
        if free:
            return max(0, min(free))
    if sys.platform == "win32":
        import ctypes

        kilobytes = ctypes.c_ulonglong()
        ctypes.windll.kernel32.GetPhysicallyInstalledSystemMemory(ctypes.byref(kilobytes))
        return 1024 * kilobytes.value
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _ulimit_headroom(process: Path) -> list[int]:
    """Return the bytes left below each limit of a process, on data and on address space."""
    headroom = []
    with suppress(OSError):
        limits, taken = (process / "limits").read_text(), (process / "status").read_text()
        for limit, count in (("Max data size", "VmData"), ("Max address space", "VmSize")):
            maximum, now = re.search(rf"{limit} +(\d+)", limits), re.search(rf"{count}:\s*(\d+) kB", taken)
            if maximum and now:
                headroom.append(int(maximum[1]) - 1024 * int(now[1]))
    return headroom


def _control_groups(root: Path) -> list[tuple[list[str], str]]:
    """Return the controllers and the path of each control group of this process; version 2 has the controller ""."""
    file = root / "proc/self/cgroup"
    lines = [line.split(":", 2) for line in file.read_text().splitlines()] if file.is_file() else []
    return [(controllers.split(","), path) for _, controllers, path in lines]


def _visible_groups(mount: Path, path: str) -> list[Path]:
    """Return the folders of a control group and of its ancestors below ``mount``, which is the last one."""
    group = mount / path.lstrip("/")
    return [folder for folder in (group, *group.parents) if folder == mount or mount in folder.parents]


def _quotas_of(group: Path) -> list[float]:
    """Return the quota of a control group in CPUs; nothing without one."""
    with suppress(OSError, ValueError):  # no such file, or a quota of "max"
        if (group / "cpu.max").is_file():  # version 2
            quota, period = map(int, (group / "cpu.max").read_text().split())
        else:
            quota = int((group / "cpu.cfs_quota_us").read_text())
            period = int((group / "cpu.cfs_period_us").read_text())
        return [quota / period] if quota > 0 and period > 0 else []
    return []


def _cgroup_headroom(mount: Path, path: str, limit: str, usage: str, reclaimable: str) -> list[int]:
    """Return the bytes left below the limits of a control group and its ancestors, as far as they are visible."""
    headroom = []
    for folder in _visible_groups(mount, path):
        with suppress(OSError, ValueError):  # no such file, or a limit of "max"
            maximum = int((folder / limit).read_text())
            # The page cache of inactive files counts as used, but can be reclaimed.
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            headroom.append(maximum - int((folder / usage).read_text()) + int(stat.get(reclaimable, 0)))
    return headroom


def keeps_halves(device: torch.device, dtype: torch.dtype, stored_dtype: torch.dtype | None) -> bool:
    """Return whether matrices of a model of ``dtype`` remain in the 16 bits in which they are stored.

    Native kernels multiply them as float32, with the results of float32 weights, in half of the time and memory.

    Args:
        device: Device of the model.
        dtype: Dtype of its activations.
        stored_dtype: Dtype of the matrices in the file.
    """
    halves = (torch.float16, torch.bfloat16)
    return dtype == torch.float32 and stored_dtype in halves and expects_native_kernels(device, dtype)


def _choose_dtype(
    chosen: torch.device, num_parameters: int, stored_dtype: torch.dtype | None = None
) -> DevicePlacement:
    """Return the placement of dtype auto."""
    if chosen.type == "cuda":
        if torch.cuda.get_device_capability(chosen)[0] >= 8:
            return DevicePlacement(chosen, torch.bfloat16, "the GPU has bfloat16")
        return DevicePlacement(chosen, torch.float16, "the GPU has no bfloat16")
    if chosen.type == "mps":
        return DevicePlacement(chosen, torch.float16, "Apple GPU")
    size = 2 if keeps_halves(chosen, torch.float32, stored_dtype) else 4
    needed, free = size * num_parameters, available_memory(chosen)
    if needed > free / 2:
        reason = f"float32 would take {needed / 1e9:.1f} GB of {free / 1e9:.1f} GB of free memory"
        return DevicePlacement(chosen, torch.bfloat16, reason)
    return DevicePlacement(chosen, torch.float32, "no GPU is used")


def _choose_device(name: str) -> torch.device:
    """Return the device ``name``; raise InputError if it is unknown or absent."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    if name.isdigit():  # the scripts of CogView v1 number their GPUs
        name = f"cuda:{name}"
    if not re.fullmatch(r"cpu|cuda(:\d{1,2})?|mps", name):
        raise InputError(f"device {name!r} is unknown; expected auto, cpu, cuda, cuda:N or mps")
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f'device {name} was requested, but PyTorch finds no CUDA device; use device="cpu"')
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise InputError(f"device {name} was requested, but this machine has {count} CUDA devices, numbered from 0")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise InputError('device mps was requested, but this machine has no MPS device; use device="cpu"')
    return device


def training_dtype(device: torch.device, precision: str = "auto") -> torch.dtype | None:
    """Return the dtype of products in training.

    Args:
        device: The device. Its hardware decides ``auto``: bfloat16 if it has it (CUDA from compute capability 8.0;
            ``is_bf16_supported`` is also true for GPUs that emulate it several times slower), otherwise float16 on
            CUDA and float32 on a CPU.
        precision: auto, float32, bfloat16 or float16.

    Returns:
        The dtype, or None for plain float32.

    Raises:
        InputError: The precision is unknown.
    """
    if precision != "auto":
        if precision not in TRAINING_PRECISIONS:
            raise InputError(f"precision {precision!r} is unknown; known: auto, {', '.join(TRAINING_PRECISIONS)}")
        return None if precision == "float32" else DTYPES[precision]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float16
    return torch.bfloat16 if device.type == "cpu" and cpu_multiplies_bfloat16() else None


def precision_name(dtype: torch.dtype | None) -> str:
    """Return the name of a dtype of ``training_dtype`` in recipes."""
    return "float32" if dtype is None else str(dtype).removeprefix("torch.")


def flush_denormals() -> None:
    """Make this process treat numbers below 1e-38 as zero on a CPU. Call it before the first tensor is created.

    Trained models meet many denormals in softmaxes and their gradients, and a CPU is far slower on them
    (``scripts/benchmarks/training_step.py denormals``). Worker threads inherit the setting when they start.
    """
    torch.set_flush_denormal(True)


@functools.cache
def compute_after_forks() -> None:
    """Let forked children of this process compute on one thread.

    A child has none of the threads that OpenMP has started in its parent, and waits for them for ever when it computes
    on several. Children that are spawned keep all threads.
    """
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=functools.partial(torch.set_num_threads, 1))
