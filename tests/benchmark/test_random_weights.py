"""Models with random weights: their formats, and that they can be decoded."""

import pytest
import torch

from cogview.benchmark.measure import make_requests
from cogview.benchmark.random_weights import random_transformer
from cogview.device import choose_placement
from cogview.generation.decode import decode
from cogview.planning.model_memory import layer_bytes
from cogview.planning.target import random_config


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "int4"])
def test_random_transformer_has_requested_format_and_decodes(dtype):
    config = random_config("2x64x4")
    transformer = random_transformer(config.transformer, choose_placement("cpu", dtype))
    weights = transformer.state_dict()
    layers = {name: tensor for name, tensor in weights.items() if name.startswith("layers.")}
    assert sum(tensor.nbytes for tensor in layers.values()) == layer_bytes(config.transformer, dtype)
    assert len({tensor.data_ptr() for tensor in layers.values()}) == len(layers)  # shared memory would be moved once
    requests = make_requests(config, rows=2, num_codes=3)
    for result in decode(transformer, config.vocabulary, requests):
        assert torch.isfinite(torch.tensor(result.log_probability))


def test_random_int4_weights_have_initial_std():
    """The scales of a group are set from the standard deviation of uniform 4-bit integers."""
    config = random_config("2x64x4").transformer
    transformer = random_transformer(config, choose_placement("cpu", "int4"))
    scales = [tensor for tensor in transformer.state_dict().values() if tensor.dim() == 3]
    assert len(scales) == 4 * config.num_layers
    assert all((tensor[..., 1] == 0).all() for tensor in scales)
    assert all(tensor[..., 0].unique().numel() == 1 for tensor in scales)
