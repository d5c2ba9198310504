"""Ranges and defaults that the command line, the files of jobs and the Python API share."""

from __future__ import annotations

MAX_RESULTS = 100_000  # images of a prompt, or captions of an image, in one call: their requests are held in memory
DEFAULT_KEEP = 0.5  # share of the codes that a variation keeps
