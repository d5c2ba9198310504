"""The process of the command ``cogview`` and of ``python -m cogview``."""

import gc
import sys

# Importing PyTorch allocates hundreds of thousands of objects and frees hardly any: with Python's threshold of 700,
# garbage collection takes a tenth of the time to the first image.
COLLECTION_THRESHOLD = 50_000


def run() -> int:
    """Run one command and return its exit status; neither imports nor the exit wait for garbage collection."""
    gc.set_threshold(COLLECTION_THRESHOLD)
    from cogview.cli.main import main

    status = main()
    gc.freeze()  # otherwise the interpreter collects all objects once more before it exits
    return status


if __name__ == "__main__":
    sys.exit(run())
