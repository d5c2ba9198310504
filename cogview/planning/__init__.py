"""Estimates of memory and time, and batches that fit."""
