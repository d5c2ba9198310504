"""A note on a processor that other programs use, before a training."""

from __future__ import annotations

import functools
import os

from cogview.cli.messages import print_note


def note_busy_processor(device: str) -> None:
    """Print a note if other programs use the processor that a training computes on with several threads.

    Args:
        device: ``auto``, or a device that a training is given.

    Raises:
        InputError: The device is not there.
    """
    from cogview.device import choose_placement

    if choose_placement(device).device.type == "cpu":
        _note_once()


@functools.cache  # later, the load is that of this process itself
def _note_once() -> None:
    import torch

    cores = os.cpu_count() or 1  # the load is that of the whole machine, whatever this process may use
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    threads = torch.get_num_threads()
    if load > cores and threads > 1:
        print_note(
            "other programs are using the processor, and threads wait for each other: with OMP_NUM_THREADS=1 before "
            f"the command, a step can be several times faster (load {load:.1f}, cores {cores}, threads {threads})"
        )
