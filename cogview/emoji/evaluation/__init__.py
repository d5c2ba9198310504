"""Metrics of the emoji world: generation, captions, reranking, super-resolution."""
