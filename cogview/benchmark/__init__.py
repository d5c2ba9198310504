"""Benchmark of generation against the limits of the hardware."""
