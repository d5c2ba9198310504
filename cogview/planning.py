"""How much is done at a time: as much as memory holds, planned before the work, and less where that was too much.

On Linux a CPU has no failed allocation to catch: who takes too much is killed. So what a batch takes is computed
(``memory.py``) and compared with what is free. Where a device runs out in spite of that, what failed is let go and done
again in smaller parts; what is finished is kept, and the same pictures come out, for no row depends on its batch.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch

from cogview.device import available_memory
from cogview.errors import InputError

# More rows at a time do not draw faster, and the first one would come later.
MOST_ROWS = {"cpu": 64, "cuda": 256, "mps": 64}
# What is left free: of what there is, and at least so many bytes on a GPU, whose allocator rounds up.
SPARE = 0.02
LEAST_SPARE = {"cpu": 16_000_000, "cuda": 256_000_000, "mps": 256_000_000}
log = logging.getLogger(__name__)

Item = TypeVar("Item")
Result = TypeVar("Result")


class Planner:
    """Splits work for one device.

    ``ceiling`` is the most items at a time, None for as many as pay. ``dtypes`` are what else the model could be
    computed in, for a message that says what would fit.
    """

    def __init__(self, device: torch.device, ceiling: int | None = None) -> None:
        if ceiling is not None and ceiling < 1:
            raise InputError(f"the batch size must be at least 1, got {ceiling}")
        self.device = device
        self.ceiling = MOST_ROWS[device.type] if ceiling is None else ceiling
        self._told: set[tuple[str, int]] = set()

    def free(self) -> float:
        """Bytes that work may take."""
        there = available_memory(self.device)
        return there - max(SPARE * there, LEAST_SPARE[self.device.type])

    def chunks(self, items: Sequence[Item], bytes_of: Callable[[Sequence[Item]], int], what: str) -> list[int]:
        """Sizes of even parts of ``items`` that fit; ``bytes_of`` a part must not fall as it grows.

        InputError if not even one item fits.
        """
        free = self.free()
        most = min(len(items), self.ceiling)
        fits, too_many = 0, most + 1
        while too_many - fits > 1:
            middle = too_many - 1 if fits == 0 and too_many == most + 1 else (fits + too_many) // 2
            if bytes_of(items[:middle]) <= free:
                fits = middle
            else:
                too_many = middle
        if not fits:
            raise InputError(
                f"{what}: one at a time takes {_gigabytes(bytes_of(items[:1]))} and {self.device} has "
                f"{_gigabytes(free)} free; close other programs, or try a smaller --dtype (bfloat16, int8, int4) or "
                "--kv-dtype int8"
            )
        parts = -(-len(items) // fits)
        sizes = [len(items) // parts + (number < len(items) % parts) for number in range(parts)]
        self._tell(what, len(items), sizes, most, bytes_of(items[: sizes[0]]), free)
        return sizes

    def run(
        self,
        items: Sequence[Item],
        bytes_of: Callable[[Sequence[Item]], int],
        work: Callable[[Sequence[Item]], Sequence[Result]],
        what: str,
    ) -> Iterator[Result]:
        """``work`` on even parts of ``items`` that fit, one after another; the results of all items in order."""
        done = 0
        while done < len(items):
            for size in self.chunks(items[done:], bytes_of, what):
                results = self._try(items[done : done + size], work)
                if results is None:  # the allocator's traceback is gone by now, and what it held with it
                    gc.collect()
                    if self.device.type == "cuda":
                        torch.cuda.empty_cache()
                    if size == 1:
                        raise InputError(
                            f"{what}: {self.device} ran out of memory with one at a time; close other programs, or try "
                            "a smaller --dtype (bfloat16, int8, int4) or --kv-dtype int8"
                        )
                    self.ceiling = size // 2
                    log.warning("%s: out of memory with %d at a time; going on with %d", what, size, self.ceiling)
                    break
                yield from results
                done += size

    def _try(
        self, items: Sequence[Item], work: Callable[[Sequence[Item]], Sequence[Result]]
    ) -> Sequence[Result] | None:
        try:
            return work(items)
        except (MemoryError, RuntimeError) as error:  # of which are those of CUDA and of PyTorch's allocator for CPUs
            if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "allocate memory" not in str(error):
                raise
        return None

    def _tell(self, what: str, count: int, sizes: Sequence[int], most: int, needed: int, free: float) -> None:
        if (what, sizes[0]) in self._told:
            return
        self._told.add((what, sizes[0]))
        why = "memory" if -(-count // most) < len(sizes) else "the ceiling" if count > most else "all at once"
        log.info(
            "%s: %d at a time of %d (%s); %s of %s free",
            what,
            sizes[0],
            count,
            why,
            _gigabytes(needed),
            _gigabytes(free),
        )


def _gigabytes(count: float) -> str:
    return f"{count / 1e9:.2f} GB"
