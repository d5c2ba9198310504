"""The transformer: configuration, layers, cache, quantization."""
