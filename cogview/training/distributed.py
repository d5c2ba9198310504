"""The processes that train together: who this one is, what they agree on, and what they add up.

One process alone needs none of it. Several are started by torchrun, by DeepSpeed's launcher or by Slurm around either,
which say in the environment who each is. Small numbers are exchanged by gloo, through the memory of the host, so that
nothing waits for a GPU; gradients go by NCCL where there are GPUs.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from cogview.device import choose_placement, use_local_rank_gpu
from cogview.errors import InputError, ReportedByPeer

T = TypeVar("T")

# What gloo and NCCL say of it.
PEER_FAILURE_MESSAGES = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Timed out waiting",
    "NCCL",
    "ProcessGroup",
)
TIMEOUT = timedelta(minutes=30)  # of a collective: one process may write a large checkpoint meanwhile


@dataclass(frozen=True)
class DistributedContext:
    """This process among all that train together, and its device."""

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def is_main_process(self) -> bool:
        """Whether this is the process that writes files and speaks."""
        return self.rank == 0

    def all_reduce_sum(self, numbers: np.ndarray) -> np.ndarray:
        """The sums over all processes, in the order of their ranks; the input stays as it is."""
        return self._gathered(numbers).sum(axis=0)

    def all_reduce_max(self, number: float) -> float:
        """The largest of all processes."""
        return float(self._gathered(np.array([number], dtype=np.float64)).max())

    def all_reduce_any(self, flag: bool) -> bool:
        """Whether it is so for any process."""
        return self.all_reduce_max(float(flag)) > 0

    def local_slice(self, count: int) -> slice:
        """Which of ``count`` rows, that divide among all, are this process's."""
        own = count // self.size
        return slice(self.rank * own, (self.rank + 1) * own)

    def run_everywhere(self, work: Callable[[], T]) -> T:
        """What ``work`` returns in this process; where any fails with InputError, all stop and one of them tells."""
        error: InputError | OSError | None = None
        try:
            result = work()
        except (InputError, OSError) as caught:
            error = caught
        failed = self._gathered(np.array([error is not None], dtype=np.int64))[:, 0]
        if not failed.any():
            return result
        teller = int(failed.argmax())
        if error is None or teller != self.rank:
            raise ReportedByPeer(f"process {teller} stopped")
        if teller:
            raise InputError(f"process {teller} of {self.size}: {error}")
        raise error

    def run_on_main(self, work: Callable[[], T]) -> T:
        """What ``work`` returns in the first process, for all; where it fails there with InputError, all stop."""
        if self.size == 1:
            return work()
        said: list[Any] = [None, None]
        if self.is_main_process:
            try:
                said[0] = work()
            except (InputError, OSError) as error:
                said[1] = error
        dist.broadcast_object_list(said, src=0, device=torch.device("cpu"))
        if said[1] is not None:
            raise said[1] if self.is_main_process else ReportedByPeer(str(said[1]))
        result: T = said[0]
        return result

    def barrier(self) -> None:
        """Until all processes are here."""
        if self.size > 1:
            self.all_reduce_any(False)

    def _gathered(self, numbers: np.ndarray) -> np.ndarray:
        """(size, …): the numbers of each process."""
        if self.size == 1:
            return numbers[None]
        own = torch.from_numpy(np.ascontiguousarray(numbers))
        parts = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(parts, own)  # by gloo: they are on the CPU
        return torch.stack(parts).numpy()


def init_distributed(device: str = "auto", *, needs_group: bool = False) -> DistributedContext:
    """Take this process's place among those that were started together, by the variables RANK, WORLD_SIZE, LOCAL_RANK.

    ``needs_group``: an engine wants a process group even for one process. InputError where the variables do not fit
    each other, or there are more processes on this machine than GPUs.
    """
    rank, size = _number("RANK", 0), _number("WORLD_SIZE", 1)
    if not 0 <= rank < max(size, 1):
        raise InputError(
            f"RANK is {rank} and WORLD_SIZE {size}: expected a rank from 0 to {size - 1}; start with torchrun"
        )
    if size > 1 and device not in ("auto", "cpu", "cuda"):
        raise InputError(
            f"{size} processes were started, so each takes the GPU of its LOCAL_RANK; expected --device auto, cpu or "
            f"cuda, got {device}"
        )
    if device != "cpu" and torch.cuda.is_available():
        here, gpus = _number("LOCAL_WORLD_SIZE", size), torch.cuda.device_count()
        if here > gpus:
            raise InputError(
                f"{here} processes were started on this machine, which has {gpus} GPUs; expected one for each: "
                f"torchrun --nproc-per-node {gpus}"
            )
        use_local_rank_gpu()
    chosen = choose_placement(device, "float32").device
    if chosen.type == "cuda" and chosen.index is None:
        chosen = torch.device(chosen.type, torch.cuda.current_device())
    if size > 1 or needs_group:
        _start_group(chosen, rank, size)
    return DistributedContext(chosen, rank, size)


def destroy_distributed() -> None:
    """Close the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def exit_process(status: int) -> None:
    """End one of several processes with ``status``, all its work done; a process that is alone just goes on.

    Threads of process groups that DeepSpeed and DistributedDataParallel still hold at the interpreter's end abort it
    now and then ("terminate called without an active exception"), and a launcher would take that for a failure.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _start_group(device: torch.device, rank: int, size: int) -> None:
    if dist.is_initialized():
        return
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if size > 1 and name not in os.environ:
            raise InputError(
                f"WORLD_SIZE is {size}, but {name} is not set; start with torchrun --nproc-per-node {size}"
            )
    if size == 1:
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", str(free_port()))
        for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")):
            os.environ.setdefault(name, value)
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"process {rank} of {size} cannot reach the others at {os.environ['MASTER_ADDR']}:"
            f"{os.environ['MASTER_PORT']}: {reason}; is the port open, and is it the first node's address?"
        ) from None


def free_port() -> int:
    """A port of this machine that nobody listens at."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _number(name: str, default: int) -> int:
    given = os.environ.get(name, str(default))
    if not given.isdecimal():
        raise InputError(f"{name} is {given!r}, expected a whole number; start with torchrun")
    return int(given)


def is_peer_failure(error: RuntimeError) -> bool:
    """Whether ``error`` is what a collective says when another process has ended or cannot be reached."""
    said = str(error)
    return dist.is_initialized() and any(word in said for word in PEER_FAILURE_MESSAGES)


def log_main(message: str, world: DistributedContext) -> None:
    """A line on stderr, from the first process alone."""
    if world.is_main_process:
        print(message, file=sys.stderr)
