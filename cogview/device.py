"""The one place that decides where the model runs and in which numbers."""

from __future__ import annotations

import os
import re
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from cogview.errors import InputError
from cogview.kernels.linear import cpu_multiplies_bfloat16
from cogview.modeling.quantization import QUANTIZATIONS, Quantization, parse_quantization

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DTYPE_BYTES = {name: dtype.itemsize for name, dtype in DTYPES.items()}
TRAINING_PRECISIONS = tuple(DTYPES)


@dataclass(frozen=True)
class DevicePlacement:
    """A device, the dtype of weights and activations there, and why."""

    device: torch.device
    dtype: torch.dtype
    reason: str
    quantization: Quantization | None = None  # how the projections of the transformer are held, if not as ``dtype``

    @property
    def weight_format(self) -> str:
        """The name of how weights are held: of a dtype, or of few bits."""
        return self.quantization or str(self.dtype).removeprefix("torch.")

    def __str__(self) -> str:
        name = str(self.dtype).removeprefix("torch.")
        return f"{self.device}, {f'{self.quantization} with ' if self.quantization else ''}{name} ({self.reason})"


def choose_placement(
    device: str = "auto", dtype: str = "auto", *, stored: Quantization | None = None, num_parameters: int = 0
) -> DevicePlacement:
    """Choose a device and dtype; ``auto`` takes the best there is.

    CUDA runs in bfloat16 where the card has it in hardware (compute capability 8.0; ``is_bf16_supported`` also
    says yes to cards that emulate it several times slower) and in float16 elsewhere, MPS in float16, a CPU in float32,
    unless ``num_parameters`` would then take more than half of the memory there is: in bfloat16. Weights that are
    ``stored`` in few bits stay so. int8 and int4 compute in a dtype of 16 bits.
    """
    chosen = _choose_device(device)
    few_bits = stored if dtype == "auto" else parse_quantization(dtype)
    if few_bits is not None:
        half = torch.bfloat16 if chosen.type == "cpu" else _choose_dtype(chosen, 0).dtype
        return DevicePlacement(chosen, half, "as stored" if dtype == "auto" else "as asked", few_bits)
    if dtype == "auto":
        return _choose_dtype(chosen, num_parameters)
    if dtype not in DTYPES:
        raise InputError(f"dtype {dtype!r} is unknown; known: auto, {', '.join([*DTYPES, *QUANTIZATIONS])}")
    return DevicePlacement(chosen, DTYPES[dtype], "as asked")


def use_local_rank_gpu() -> None:
    """Have ``auto`` and ``cuda`` mean a GPU of its own in each process that torchrun starts: that of its LOCAL_RANK."""
    local = os.environ.get("LOCAL_RANK", "")
    if local.isdecimal() and torch.cuda.is_available():
        torch.cuda.set_device(int(local) % torch.cuda.device_count())


def available_memory(device: torch.device) -> int:
    """Bytes that a process may still take on a device.

    On a CPU the least of what the system has available and what control groups and the limits of the process (``ulimit
    -d``, ``ulimit -v``) leave; all there is, where the system says none of these.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    return _available_on_host(Path("/"))


def peak_memory(device: torch.device) -> float:
    """Return the peak of the bytes in tensors on a GPU; on other devices that of the process's resident memory.

    A number of training's metrics: 0 where the system does not know it.
    """
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    return float(_peak_resident_memory() or 0)


def peak_process_memory(device: torch.device, free_before: int) -> int | None:
    """Return the peak of the bytes that this process had of a device, all that it needs there included.

    Args:
        device: The device to look at. On a CPU, resident memory counts, mapped files included.
        free_before: Bytes that were free there before the process used the device. The context of a GPU, which
            PyTorch does not count, is the difference to the bytes free now.

    Returns:
        The bytes, or None where the system does not know them.
    """
    if device.type == "cuda":
        context = free_before - torch.cuda.mem_get_info(device)[0] - torch.cuda.memory_reserved(device)
        return torch.cuda.max_memory_reserved(device) + max(0, context)
    if device.type == "mps":  # which keeps no peak, and seldom gives back what it has
        return torch.mps.driver_allocated_memory()
    return _peak_resident_memory()


def float64_of(device: torch.device) -> torch.dtype:
    """Return float64, or float32 on MPS, which has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` says that a device has no memory left; PyTorch's allocator for CPUs has no type for it."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "allocate memory" in str(error)


def _peak_resident_memory() -> int | None:
    """Return the peak of the bytes that this process had in memory; None where the system does not know it."""
    with suppress(OSError):  # on Linux ru_maxrss begins with the peak of the parent
        if found := re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text()):
            return 1024 * int(found[1])
    with suppress(ImportError):  # not on Windows
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return None


def _available_on_host(root: Path) -> int:
    """``root`` is where proc and sys are."""
    with suppress(OSError):  # not Linux
        free = []
        if found := re.search(r"MemAvailable:\s*(\d+) kB", (root / "proc/meminfo").read_text()):
            free.append(1024 * int(found[1]))
        free += _ulimit_headroom(root / "proc/self")
        groups = root / "proc/self/cgroup"
        for line in groups.read_text().splitlines() if groups.is_file() else []:
            _, controllers, path = line.split(":", 2)
            if not controllers:
                free += _cgroup_headroom(root / "sys/fs/cgroup", path, "memory.max", "memory.current", "inactive_file")
            elif controllers == "memory":
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
    """Bytes that a process may still take for data and in all, where it is limited."""
    left = []
    with suppress(OSError):
        limits, taken = (process / "limits").read_text(), (process / "status").read_text()
        for limit, count in (("Max data size", "VmData"), ("Max address space", "VmSize")):
            most, now = re.search(rf"{limit} +(\d+)", limits), re.search(rf"{count}:\s*(\d+) kB", taken)
            if most and now:
                left.append(int(most[1]) - 1024 * int(now[1]))
    return left


def _cgroup_headroom(mount: Path, path: str, limit: str, usage: str, reclaimable: str) -> list[int]:
    """Bytes that a control group and those above it leave, where they have a limit and it is to be seen."""
    own = mount / path.lstrip("/")
    left = []
    for folder in (own, *own.parents):
        if folder != mount and mount not in folder.parents:
            break
        with suppress(OSError, ValueError):  # no such file, or a limit of "max"
            most = int((folder / limit).read_text())
            # Files that were read and are not in use count as used, and give way.
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            left.append(most - int((folder / usage).read_text()) + int(stat.get(reclaimable, 0)))
    return left


def _choose_dtype(chosen: torch.device, num_parameters: int) -> DevicePlacement:
    if chosen.type == "cuda":
        if torch.cuda.get_device_capability(chosen)[0] >= 8:
            return DevicePlacement(chosen, torch.bfloat16, "the card has bfloat16")
        return DevicePlacement(chosen, torch.float16, "the card has no bfloat16")
    if chosen.type == "mps":
        return DevicePlacement(chosen, torch.float16, "Apple GPU")
    needed, there = 4 * num_parameters, available_memory(chosen)
    if needed > there / 2:
        reason = f"float32 would take {needed / 1e9:.1f} GB of the {there / 1e9:.1f} GB there are"
        return DevicePlacement(chosen, torch.bfloat16, reason)
    return DevicePlacement(chosen, torch.float32, "no GPU is used")


def _choose_device(name: str) -> torch.device:
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    if name.isdigit():  # the released scripts number their GPUs
        name = f"cuda:{name}"
    if not re.fullmatch(r"cpu|cuda(:\d{1,2})?|mps", name):
        raise InputError(f"device {name!r} is unknown; expected auto, cpu, cuda, cuda:N or mps")
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device {name} was asked for, but no CUDA device is to be seen; use --device cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"device {name} was asked for, but there are only {torch.cuda.device_count()} CUDA devices")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise InputError("device mps was asked for, but this machine has none; use --device cpu")
    return device


def training_dtype(device: torch.device, precision: str = "auto") -> torch.dtype | None:
    """What products are computed in during training, or None for plain float32.

    ``auto`` is bfloat16 where the hardware has it (of CUDA cards those of compute capability 8.0 and above;
    ``is_bf16_supported`` says yes to others, which emulate it several times slower), float16 on CUDA cards that have
    not, and float32 on a CPU that would have to emulate it.
    """
    if precision != "auto":
        if precision not in TRAINING_PRECISIONS:
            raise InputError(f"precision {precision!r} is unknown; known: auto, {', '.join(TRAINING_PRECISIONS)}")
        return None if precision == "float32" else DTYPES[precision]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float16
    return torch.bfloat16 if device.type == "cpu" and cpu_multiplies_bfloat16() else None


def precision_name(dtype: torch.dtype | None) -> str:
    """What ``training_dtype`` chose, as recipes name it."""
    return "float32" if dtype is None else str(dtype).removeprefix("torch.")


def flush_denormals() -> None:
    """Have this process treat numbers below 1e-38 as zero on a CPU. Call it before the first tensor is made.

    A model that has learnt something meets many, in softmaxes and their gradients, and a CPU takes far longer for each
    (``scripts/benchmarks/training_step.py denormals``). The threads that share the work take the setting over when they
    are started, which is why it comes first.
    """
    torch.set_flush_denormal(True)
