"""Estimates of memory and time, and batches that fit."""

# Fraction of a device's memory that estimates leave free, since formulas are not exact and heaps are fragmented.
ESTIMATE_MARGIN = 0.05
