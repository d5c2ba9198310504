"""Fixtures of the kernel tests."""

import pytest
import torch


@pytest.fixture
def device():
    """Device of the tests: a GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
