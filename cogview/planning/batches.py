"""Batch sizes that fit in memory, planned before the work and halved after an out-of-memory error.

On Linux an allocation on a CPU rarely fails; the system kills the process instead. The bytes of a batch are therefore
computed (``batch_memory.py``) and compared with the free memory. If a device runs out of memory nevertheless, the batch
is freed and repeated in smaller ones. Finished results are kept. All results are the same, since no sequence depends on
its batch.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import TypeVar

import torch

from cogview.device import available_memory
from cogview.errors import InputError, RetryLaterError, is_out_of_memory
from cogview.formatting import format_gigabytes

# Larger batches delay the first result and gain little; the limits are assumptions, not measured.
MAX_BATCH_SIZE = {"cpu": 64, "cuda": 256, "mps": 64}
# Memory that stays free: this fraction, and at least these bytes, for the workspace of matrix products on a CPU and the
# rounding of the allocator on a GPU.
BATCH_MARGIN = 0.02
MIN_FREE_BYTES = {"cpu": 8_000_000, "cuda": 256_000_000, "mps": 256_000_000}
# The heap of glibc becomes fragmented by tensors of increasing size, by up to half of their bytes
# (scripts/benchmarks/planned_batch.py). Allocations from MMAP_THRESHOLD bytes on are therefore mapped separately, and
# the heap shrinks if more than TRIM_THRESHOLD bytes at its end are free. Below LOW_MEMORY the threshold is lower: that
# costs a tenth of the time, but the fragmentation then varies between runs by 1 MB and not by 10 MB.
MMAP_THRESHOLD = 4 << 20
MMAP_THRESHOLD_LOW_MEMORY = 1 << 20
TRIM_THRESHOLD = 4 << 20
LOW_MEMORY = 1_000_000_000
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
log = logging.getLogger(__name__)

Item = TypeVar("Item")
Result = TypeVar("Result")


class BatchPlanner:
    """Splits work for one device into batches."""

    def __init__(
        self,
        device: torch.device,
        max_batch_size: int | None = None,
        suggestions: Callable[[float], Sequence[str]] = lambda missing: (),
    ) -> None:
        """Set the limits, and the thresholds of glibc's allocator for a CPU.

        Args:
            device: The device.
            max_batch_size: Maximum of the items in a batch; None for ``MAX_BATCH_SIZE``.
            suggestions: Function of the missing bytes that returns options which save them, for error messages.

        Raises:
            InputError: ``max_batch_size`` is below 1.
        """
        if max_batch_size is not None and max_batch_size < 1:
            raise InputError(f"the batch size must be at least 1, got {max_batch_size}")
        self.device = device
        self.max_batch_size = MAX_BATCH_SIZE[device.type] if max_batch_size is None else max_batch_size
        self.suggestions = suggestions
        if device.type == "cpu":
            is_low = available_memory(device) < LOW_MEMORY
            _glibc("mallopt", M_MMAP_THRESHOLD, MMAP_THRESHOLD_LOW_MEMORY if is_low else MMAP_THRESHOLD)
            _glibc("mallopt", M_TRIM_THRESHOLD, TRIM_THRESHOLD)
        self._failed: dict[str, int] = {}  # batch size of the last failure, by kind of work
        self._logged: set[tuple[str, int]] = set()

    def free(self) -> float:
        """Return the bytes that a batch may take."""
        release_cached_memory(self.device)
        available = available_memory(self.device)
        return available - max(BATCH_MARGIN * available, MIN_FREE_BYTES[self.device.type])

    def chunks(self, items: Sequence[Item], bytes_of: Callable[[Sequence[Item]], int], what: str) -> list[int]:
        """Return the sizes of batches of almost equal size, of which the first fits; nothing is logged.

        Args:
            items: The items to process, in order.
            bytes_of: Bytes that a batch takes; must not decrease as the batch grows.
            what: Name of the work in messages.

        Raises:
            RetryLaterError: Not even one item fits.
        """
        return self._sizes(items, bytes_of, what, self.free())[0]

    def split(
        self, items: Sequence[Item], bytes_of: Callable[[Sequence[Item]], int], what: str
    ) -> Iterator[tuple[Sequence[Item], float]]:
        """Yield consecutive batches of ``items`` that fit in memory, for work in several stages.

        Args:
            items: The items to process, in order.
            bytes_of: Bytes that a batch takes; must not decrease as the batch grows.
            what: Name of the work in messages.

        Yields:
            Each batch with the bytes that were free when it was planned. A stage passes them to ``run``, which then
            does not split the batch again.

        Raises:
            RetryLaterError: Not even one item fits.
        """
        done, free = 0, self.free()
        while done < len(items):
            for number, size in enumerate(self._chunks(items[done:], bytes_of, what, free)):
                batch = items[done : done + size]
                if number and bytes_of(batch) > free:  # its items are larger than the first ones
                    break
                yield batch, free
                done += size

    def run(
        self,
        items: Sequence[Item],
        bytes_of: Callable[[Sequence[Item]], int],
        work: Callable[[Sequence[Item]], Sequence[Result]],
        what: str,
        *,
        free_bytes: float | None = None,
    ) -> Iterator[Result]:
        """Call ``work`` with batches of ``items`` that fit, one after another.

        Args:
            items: The items to process, in order.
            bytes_of: Bytes that a batch takes; must not decrease as the batch grows.
            work: Returns a result for each item of a batch.
            what: Name of the work in messages.
            free_bytes: Bytes that a batch may take; None for the bytes that are free now.

        Yields:
            The results of all items in order.

        Raises:
            RetryLaterError: Not even one item fits, or the device runs out of memory with one.
        """
        done, free = 0, self.free() if free_bytes is None else free_bytes
        while done < len(items):
            for number, size in enumerate(self._chunks(items[done:], bytes_of, what, free)):
                batch = items[done : done + size]
                if number and bytes_of(batch) > free:  # its items are larger than the first ones
                    break
                results = self._attempt(batch, work)
                if results is None:  # the traceback is freed by now, with the tensors that it referred to
                    gc.collect()
                    free = self.free()
                    if size == 1:
                        needed = bytes_of(batch)
                        raise RetryLaterError(
                            f"{what}: {self.device} ran out of memory with one at a time, which takes "
                            f"{format_gigabytes(needed, 2)} of {format_gigabytes(max(free, 0), 2)} free; suggestions: "
                            f"{self._suggest(needed - free)}"
                        )
                    self._failed[what] = size
                    log.warning("%s: out of memory with %d at a time; continuing with smaller batches", what, size)
                    break
                yield from results
                done += size

    def _chunks(
        self, items: Sequence[Item], bytes_of: Callable[[Sequence[Item]], int], what: str, free: float
    ) -> list[int]:
        """Return the sizes of batches, and log them for a new kind of work or a new size."""
        sizes, reason = self._sizes(items, bytes_of, what, free)
        if (what, sizes[0]) not in self._logged:
            self._logged.add((what, sizes[0]))
            planned = format_gigabytes(bytes_of(items[: sizes[0]]), 2)
            line = "%s: %d at a time of %d (%s); %s of %s free"
            log.info(line, what, sizes[0], len(items), reason, planned, format_gigabytes(free, 2))
        return sizes

    def _sizes(
        self, items: Sequence[Item], bytes_of: Callable[[Sequence[Item]], int], what: str, free: float
    ) -> tuple[list[int], str]:
        """Return the sizes of batches, and what limits them; the maximum that fits is found by bisection."""
        max_batch_size = min(self.max_batch_size, self._failed.get(what, 2 * self.max_batch_size) // 2)
        limit = min(len(items), max_batch_size)
        fits, too_many = 0, limit + 1
        while too_many - fits > 1:
            middle = limit if too_many > limit else (fits + too_many) // 2
            if bytes_of(items[:middle]) <= free:
                fits = middle
            else:
                too_many = middle
        if not fits:
            needed = bytes_of(items[:1])
            raise RetryLaterError(
                f"{what}: one at a time takes {format_gigabytes(needed, 2)} and {self.device} has "
                f"{format_gigabytes(max(free, 0), 2)} free; suggestions: {self._suggest(needed - free)}"
            )
        count = -(-len(items) // fits)
        sizes = [len(items) // count + (number < len(items) % count) for number in range(count)]
        return sizes, "memory" if fits < limit else "the ceiling" if limit < len(items) else "all at once"

    def _attempt(
        self, items: Sequence[Item], work: Callable[[Sequence[Item]], Sequence[Result]]
    ) -> Sequence[Result] | None:
        """Return the results of ``work``, or None if the device ran out of memory."""
        try:
            return work(items)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
        return None

    def _suggest(self, missing: float) -> str:
        """Return options that save ``missing`` bytes, for error messages."""
        return " or ".join([*self.suggestions(max(missing, 0)), "close other programs"])


def release_cached_memory(device: torch.device) -> None:
    """Release unused memory of PyTorch's cache on a GPU, or of glibc's heap on a CPU."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "cpu":
        _glibc("malloc_trim", 0)


def _glibc(function: str, *numbers: int) -> None:
    """Call a function of glibc; with another C library, do nothing."""
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            getattr(ctypes.CDLL(None), function)(*numbers)
