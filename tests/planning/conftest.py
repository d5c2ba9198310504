"""Fixtures of the tests of estimates."""

import pytest


@pytest.fixture
def plain_cpu(monkeypatch):
    """Simulate a CPU without 16-bit products, native kernels and MKL's copies: PyTorch allocates every byte."""
    monkeypatch.setattr("cogview.kernels.linear.cpu_multiplies_bfloat16", lambda: False)
    monkeypatch.setenv("COGVIEW_KERNELS", "torch")
    monkeypatch.setattr("cogview.planning.model_memory.can_prepack", lambda device, dtype: False)
