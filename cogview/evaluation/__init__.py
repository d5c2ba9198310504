"""Measures of what a model draws, and their protocols."""
