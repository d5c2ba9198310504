"""Estimates of memory and time, and batches that fit."""

# Share of a device's memory that estimates leave free: formulas are not exact, and allocators leave gaps.
ESTIMATE_MARGIN = 0.05
