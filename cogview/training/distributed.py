"""The processes that train together: ranks, collectives on small arrays, and errors that stop all of them.

A single process needs none of it. Several are started by torchrun, by DeepSpeed's launcher, or by Slurm around either,
which set ranks in the environment. Small arrays are exchanged by gloo in host memory, so that nothing waits for a GPU;
gradients are exchanged by NCCL where there are GPUs.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from cogview.device import choose_placement, use_local_rank_gpu
from cogview.errors import InputError, ReportedByPeer
from cogview.process_variables import is_first_process, number_variable, rank_and_world_size

T = TypeVar("T")

MAX_PORT = 65535
# Parts of the messages of gloo and NCCL when another process is lost.
PEER_FAILURE_MESSAGES = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Timed out waiting",
    "NCCL",
    "ProcessGroup",
)
TIMEOUT = timedelta(minutes=30)  # of a collective, during which one process may write a large checkpoint


@dataclass(frozen=True)
class DistributedContext:
    """This process among all that train together.

    Attributes:
        device: Device of this process.
        rank: Index of this process.
        size: Number of processes.
    """

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def is_main_process(self) -> bool:
        """Whether this process writes files and logs."""
        return self.rank == 0

    def all_reduce_sum(self, numbers: np.ndarray) -> np.ndarray:
        """Return the sums over all processes, in a new array; they are added in the order of the ranks.

        Args:
            numbers: An array of the same shape and dtype in every process.
        """
        total: np.ndarray = self._gathered(numbers).sum(axis=0)
        return total

    def all_reduce_max(self, number: float) -> float:
        """Return the maximum over all processes."""
        return float(self._gathered(np.array([number], dtype=np.float64)).max())

    def all_reduce_any(self, flag: bool) -> bool:
        """Return whether ``flag`` is true in any process."""
        return self.all_reduce_max(float(flag)) > 0

    def local_slice(self, count: int) -> slice:
        """Return the part of this process of the ``count`` rows of a step.

        Raises:
            InputError: They do not divide among the processes.
        """
        if count % self.size:
            near = count - count % self.size
            raise InputError(
                f"batch_size {count} does not divide among {self.size} processes; {near or self.size} or "
                f"{near + self.size} would"
            )
        local = count // self.size
        return slice(self.rank * local, (self.rank + 1) * local)

    def run_everywhere(self, work: Callable[[], T]) -> T:
        """Run ``work`` in every process; if it fails in any, stop all of them, and one reports.

        Args:
            work: Called without arguments.

        Returns:
            The result of this process.

        Raises:
            InputError: The first process in which ``work`` failed raises its error.
            ReportedByPeer: All other processes raise this.
        """
        error: InputError | OSError | None = None
        try:
            result = work()
        except (InputError, OSError) as caught:
            error = caught
        failed = self._gathered(np.array([error is not None], dtype=np.int64))[:, 0]
        if not failed.any():
            return result
        reporter = int(failed.argmax())
        if error is None or reporter != self.rank:
            raise ReportedByPeer(f"process {reporter} stopped")
        if reporter:
            kind = type(error) if isinstance(error, InputError) else InputError
            raise kind(f"process {reporter} of {self.size}: {error}")
        raise error

    def run_on_main(self, work: Callable[[], T]) -> T:
        """Run ``work`` in the main process and return its result in every process.

        Args:
            work: Called without arguments; its result is pickled.

        Raises:
            InputError: ``work`` failed; raised in the main process.
            ReportedByPeer: ``work`` failed; raised in the others.
        """
        if self.size == 1:
            return work()
        outcome: list[Any] = [None, None]  # result and error
        if self.is_main_process:
            try:
                outcome[0] = work()
            except (InputError, OSError) as error:
                outcome[1] = error
        dist.broadcast_object_list(outcome, src=0, device=torch.device("cpu"))
        if outcome[1] is not None:
            raise outcome[1] if self.is_main_process else ReportedByPeer(str(outcome[1]))
        result: T = outcome[0]
        return result

    def barrier(self) -> None:
        """Wait until all processes have called this."""
        if self.size > 1:
            self.all_reduce_any(False)

    def _gathered(self, numbers: np.ndarray) -> np.ndarray:
        """Return the numbers of all processes (size, …)."""
        if self.size == 1:
            return numbers[None]
        local = torch.from_numpy(np.ascontiguousarray(numbers))
        parts = [torch.empty_like(local) for _ in range(self.size)]
        dist.all_gather(parts, local)  # by gloo, since they are on the CPU
        return torch.stack(parts).numpy()


def init_distributed(
    device: str = "auto", *, needs_group: bool = False, timeout: timedelta = TIMEOUT
) -> DistributedContext:
    """Join the processes that were started together, by the variables RANK, WORLD_SIZE and LOCAL_RANK.

    Args:
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps``.
        needs_group: Create a process group even for one process.
        timeout: How long a process waits in a collective for the others.

    Returns:
        Rank, number of processes and device of this process.

    Raises:
        InputError: The variables contradict each other, there are more processes on this machine than GPUs, or the
            other processes cannot be reached.
    """
    rank, size = rank_and_world_size()
    if size > 1 and device not in ("auto", "cpu", "cuda"):
        raise InputError(
            f"{size} processes were started, so each takes the GPU of its LOCAL_RANK; expected --device auto, cpu or "
            f"cuda, got {device}"
        )
    if device != "cpu" and torch.cuda.is_available():
        local_size, gpus = number_variable("LOCAL_WORLD_SIZE", size), torch.cuda.device_count()
        if local_size > gpus:
            raise InputError(
                f"{local_size} processes were started on this machine, which has {gpus} GPUs; expected one for each: "
                f"torchrun --nproc-per-node {gpus}"
            )
        use_local_rank_gpu()
    chosen = choose_placement(device, "float32").device
    if chosen.type == "cuda" and chosen.index is None:
        chosen = torch.device(chosen.type, torch.cuda.current_device())
    if size > 1 or needs_group:
        _start_group(chosen, rank, size, timeout)
    return DistributedContext(chosen, rank, size)


@contextmanager
def report_once() -> Iterator[None]:
    """Let the main process alone report an InputError that the block raises in every process.

    Raises:
        InputError: In the main process, or where only one process was started.
        ReportedByPeer: In the others.
    """
    try:
        yield
    except InputError as error:
        if not is_first_process():
            raise ReportedByPeer(str(error)) from None
        raise


def destroy_distributed() -> None:
    """Destroy the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def exit_process(status: int) -> None:
    """Exit one of several processes with ``status`` after its work is done; a single process continues.

    Threads of process groups that DeepSpeed and DistributedDataParallel still hold sometimes abort the interpreter at
    its end ("terminate called without an active exception"). A launcher would report that as a failure.
    """
    if rank_and_world_size()[1] > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _start_group(device: torch.device, rank: int, size: int, timeout: timedelta) -> None:
    """Create the process group."""
    if dist.is_initialized():
        return
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if size > 1 and name not in os.environ:
            raise InputError(
                f"WORLD_SIZE is {size}, but {name} is not set; start with torchrun --nproc-per-node {size}"
            )
    if (port := number_variable("MASTER_PORT", 1)) not in range(1, MAX_PORT + 1):
        raise InputError(f"MASTER_PORT is {port}, expected a port from 1 to {MAX_PORT}")
    if size == 1:
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", str(free_port()))
        for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")):
            os.environ.setdefault(name, value)
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=timeout)
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"process {rank} of {size} cannot reach the others at {os.environ['MASTER_ADDR']}:"
            f"{os.environ['MASTER_PORT']}: {reason}; is the port open, and is it the first node's address?"
        ) from None


def free_port() -> int:
    """Return a free TCP port of this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def is_peer_failure(error: BaseException) -> bool:
    """Return whether ``error`` is that of a collective when another process has ended or cannot be reached."""
    return dist.is_initialized() and any(part in str(error) for part in PEER_FAILURE_MESSAGES)


def log_main(message: str, context: DistributedContext) -> None:
    """Print a line on stderr in the main process.

    Args:
        message: The line.
        context: This process among those that train together.
    """
    if context.is_main_process:
        print(message, file=sys.stderr)
