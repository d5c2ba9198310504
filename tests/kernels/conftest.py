"""What the tests of kernels share."""

import pytest
import torch


@pytest.fixture
def device():
    """Where kernels are tested."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
