"""Fixtures of the tests of estimates."""

import pytest


@pytest.fixture
def plain_cpu(monkeypatch):
    """Simulate a CPU without 16-bit products and without copies of MKL, so that PyTorch allocates every byte."""
    monkeypatch.setattr("cogview.kernels.linear.cpu_multiplies_bfloat16", lambda: False)
    monkeypatch.setattr("cogview.planning.model_memory.can_prepack", lambda weight: False)
