"""How much is done at a time: as much as memory holds, planned before the work, and less where that was too much.

On Linux a CPU has no failed allocation to catch: who takes too much is killed. So what a batch takes is computed
(``memory.py``) and compared with what is free. Where a device runs out in spite of that, what failed is let go and done
again in smaller parts; what is finished is kept, and the same pictures come out, for no row depends on its batch.
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

from cogview.device import available_memory, is_out_of_memory
from cogview.errors import InputError
from cogview.formatting import format_gigabytes

# With more rows at a time the first one comes later, for little; where that begins is assumed.
MAX_ROWS = {"cpu": 64, "cuda": 256, "mps": 64}
# What is left free: of what there is, and at least so many bytes: scratch of a CPU's matrix products, and on a GPU what
# its allocator rounds up.
BATCH_MARGIN = 0.02
MIN_FREE_BYTES = {"cpu": 8_000_000, "cuda": 256_000_000, "mps": 256_000_000}
# glibc leaves gaps in its heap where larger and larger tensors come and go, up to half of what they take
# (scripts/benchmarks/planned_batch.py). From so many bytes on they get pages of their own, and beyond so many free ones
# at its end the heap shrinks. Where less than SCARCE is there, still smaller ones get theirs: that takes a tenth more
# time, but the gaps differ from run to run by no more than a megabyte then, and not by ten.
MMAP_THRESHOLD = 4 << 20
MMAP_THRESHOLD_LOW_MEMORY = 1 << 20
TRIM_THRESHOLD = 4 << 20
LOW_MEMORY = 1_000_000_000
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
log = logging.getLogger(__name__)

Item = TypeVar("Item")
Result = TypeVar("Result")


class BatchPlanner:
    """Splits work for one device.

    ``ceiling`` is the most items at a time, None for as many as pay. ``remedies`` says, for a message, with which
    options so many bytes less would be taken.
    """

    def __init__(
        self,
        device: torch.device,
        max_batch_size: int | None = None,
        suggestions: Callable[[float], Sequence[str]] = lambda missing: (),
    ) -> None:
        if max_batch_size is not None and max_batch_size < 1:
            raise InputError(f"the batch size must be at least 1, got {max_batch_size}")
        self.device = device
        self.max_batch_size = MAX_ROWS[device.type] if max_batch_size is None else max_batch_size
        self.suggestions = suggestions
        if device.type == "cpu":
            scarce = available_memory(device) < LOW_MEMORY
            _glibc("mallopt", M_MMAP_THRESHOLD, MMAP_THRESHOLD_LOW_MEMORY if scarce else MMAP_THRESHOLD)
            _glibc("mallopt", M_TRIM_THRESHOLD, TRIM_THRESHOLD)
        self._failed: dict[str, int] = {}  # how many at a time were too many, for each kind of work
        self._logged: set[tuple[str, int]] = set()

    def free(self) -> float:
        """Bytes that work may take."""
        release_cached_memory(self.device)
        there = available_memory(self.device)
        return there - max(BATCH_MARGIN * there, MIN_FREE_BYTES[self.device.type])

    def chunks(self, items: Sequence[Item], bytes_of: Callable[[Sequence[Item]], int], what: str) -> list[int]:
        """Sizes of even parts of ``items``, of which the first fits; ``bytes_of`` a part must not fall as it grows.

        InputError if not even one item fits.
        """
        return self._chunks(items, bytes_of, what, self.free())

    def split(
        self, items: Sequence[Item], bytes_of: Callable[[Sequence[Item]], int], what: str
    ) -> Iterator[tuple[Sequence[Item], float]]:
        """Yield consecutive parts of ``items`` that fit in memory, for work in several stages.

        Args:
            items: What is to be done, in order.
            bytes_of: Bytes that a part takes; must not fall as the part grows.
            what: Name of the work in messages.

        Yields:
            Each part with the bytes that were free when it was planned. A stage passes them to ``run``, which then
            leaves whole what was planned as a whole.

        Raises:
            InputError: If not even one item fits.
        """
        done, free = 0, self.free()
        while done < len(items):
            for number, size in enumerate(self._chunks(items[done:], bytes_of, what, free)):
                part = items[done : done + size]
                if number and bytes_of(part) > free:  # its items are larger than the first ones
                    break
                yield part, free
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
        """Do ``work`` on even parts of ``items`` that fit, one after another.

        Args:
            items: What is to be done, in order.
            bytes_of: Bytes that a part takes; must not fall as the part grows.
            work: Returns a result for each item of a part.
            what: Name of the work in messages.
            free_bytes: Bytes that a part may take, by default what is free now.

        Yields:
            The results of all items in order.

        Raises:
            InputError: If not even one item fits, or the device runs out of memory with one.
        """
        done, free = 0, self.free() if free_bytes is None else free_bytes
        while done < len(items):
            for number, size in enumerate(self._chunks(items[done:], bytes_of, what, free)):
                part = items[done : done + size]
                if number and bytes_of(part) > free:  # its items are larger than the first ones
                    break
                results = self._attempt(part, work)
                if results is None:  # the error's traceback is gone by now, and what it held with it
                    gc.collect()
                    free = self.free()
                    if size == 1:
                        needed = bytes_of(part)
                        raise InputError(
                            f"{what}: {self.device} ran out of memory with one at a time, which takes "
                            f"{format_gigabytes(needed, 2)} of {format_gigabytes(free, 2)} free; what would help: "
                            f"{self._suggest(needed - free)}"
                        )
                    self._failed[what] = size
                    log.warning("%s: out of memory with %d at a time; going on with less", what, size)
                    break
                yield from results
                done += size

    def _chunks(
        self, items: Sequence[Item], bytes_of: Callable[[Sequence[Item]], int], what: str, free: float
    ) -> list[int]:
        ceiling = min(self.max_batch_size, self._failed.get(what, 2 * self.max_batch_size) // 2)
        most = min(len(items), ceiling)
        fits, too_many = 0, most + 1
        while too_many - fits > 1:
            middle = most if too_many > most else (fits + too_many) // 2
            if bytes_of(items[:middle]) <= free:
                fits = middle
            else:
                too_many = middle
        if not fits:
            needed = bytes_of(items[:1])
            raise InputError(
                f"{what}: one at a time takes {format_gigabytes(needed, 2)} and {self.device} has "
                f"{format_gigabytes(max(free, 0), 2)} free; what would help: {self._suggest(needed - free)}"
            )
        parts = -(-len(items) // fits)
        sizes = [len(items) // parts + (number < len(items) % parts) for number in range(parts)]
        if (what, sizes[0]) not in self._logged:
            self._logged.add((what, sizes[0]))
            why = "memory" if fits < most else "the ceiling" if most < len(items) else "all at once"
            needed, told = bytes_of(items[: sizes[0]]), "%s: %d at a time of %d (%s); %s of %s free"
            log.info(told, what, sizes[0], len(items), why, format_gigabytes(needed, 2), format_gigabytes(free, 2))
        return sizes

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
        return " or ".join([*self.suggestions(max(missing, 0)), "closing other programs"])


def release_cached_memory(device: torch.device) -> None:
    """Give back what nobody uses: to the system on a CPU, where glibc keeps it, or to the device."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "cpu":
        _glibc("malloc_trim", 0)


def _glibc(function: str, *numbers: int) -> None:
    """Call it; nothing where the C library is another."""
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            getattr(ctypes.CDLL(None), function)(*numbers)
