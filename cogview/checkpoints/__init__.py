"""Checkpoint folders and the registry of known models."""
