"""Benchmarks of the field: the layout of their pictures, and scorers of detections or answers from files."""
