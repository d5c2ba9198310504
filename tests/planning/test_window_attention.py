"""Estimates of models with window attention: keys that are read, operations, and bytes at the peak."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from cogview.generation.decode import decode
from cogview.generation.requests import DecodingRequest
from cogview.kernels.window_mask import WindowMask
from cogview.modeling.config import AttentionConfig, Sampling
from cogview.modeling.pivots import count_keys, fixed_pivots
from cogview.modeling.transformer import Transformer
from cogview.planning.model_memory import position_bytes
from cogview.planning.training_time import flops_per_token
from cogview.tokenizers.batching import pad_right
from tests.planning.factories import SHAPE, PeakMemory, sequence_of, small_config, small_estimate

SPARSE = AttentionConfig(pattern="window", window=13, pivots=9)


def sparse_config(attention=SPARSE, **settings):
    """Return the small config with window attention."""
    dense = small_config(**settings)
    return replace(dense, transformer=replace(dense.transformer, attention=attention))


@pytest.mark.parametrize("task", ["generate", "caption", "upscale"])
def test_count_keys_counts_the_visible_keys_of_the_mask(task):
    config = sparse_config()
    sequence = sequence_of(config, task)
    pivots = fixed_pivots(SPARSE, pad_right([sequence], 0), torch.device("cpu"))
    mask = WindowMask.of_sequences(SPARSE.window, pivots, len(sequence))
    seen = mask.to_bias(len(sequence), torch.float32)[0, 0] > -torch.inf
    assert count_keys(SPARSE, sequence.image_sizes).tolist() == seen.sum(dim=1).tolist()
    assert count_keys(AttentionConfig(), sequence.image_sizes).tolist() == [*range(1, len(sequence) + 1)]


def test_estimate_of_a_window_reads_only_its_keys():
    config, dense = sparse_config(), small_estimate()
    found = small_estimate(config)
    step, dense_step = found.forward_passes[-1], dense.forward_passes[-1]
    assert dense_step.num_keys == 20 + 3 + 63
    assert step.num_keys == 13 + 20 + 3 + np.sum(np.isfinite(image_pivots(config)[: 63 - 13]))
    saved = (dense_step.num_keys - step.num_keys) * position_bytes(SHAPE, "float32")
    assert dense.traffic(dense_step) - found.traffic(step) == saved
    assert dense.flops(dense_step) - found.flops(step) == 4 * 64 * 3 * (dense_step.num_keys - step.num_keys)
    assert found.kv_cache == dense.kv_cache


def image_pivots(config):
    """Return the bias of the codes of an image as pivots."""
    sequence = sequence_of(config, "generate")
    pivots = fixed_pivots(config.transformer.attention, pad_right([sequence], 0), torch.device("cpu"))
    return pivots.to_bias(len(sequence))[0, sequence.spans["image"]].numpy()


def test_estimate_of_a_window_as_long_as_the_sequence_is_that_of_dense_attention():
    wide = small_estimate(sparse_config(AttentionConfig(pattern="window", window=128, pivots=1)))
    dense = small_estimate()
    for one, other in zip(wide.forward_passes, dense.forward_passes, strict=True):
        assert (one.num_keys, one.num_pairs) == (other.num_keys, other.num_pairs)


@pytest.mark.slow
@pytest.mark.usefixtures("plain_cpu")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("attention", [SPARSE, AttentionConfig(pattern="window", window=60, pivots=30)])
def test_estimate_of_a_window_predicts_the_peak_of_decoding(attention, dtype):
    config, rows = sparse_config(attention, sampling=Sampling(top_k=0)), 4
    transformer = Transformer(config.transformer).eval().to(getattr(torch, dtype))
    requests = [
        DecodingRequest(
            sequence=sequence_of(config, "generate", number, text=19 + number % 2), seed=0, sampling=Sampling()
        )
        for number in range(rows)
    ]
    with PeakMemory(transformer.parameters()) as memory:
        decode(transformer, config.vocabulary, requests)
    found = small_estimate(config, rows=rows, dtype=dtype)
    predicted = found.workspace + rows * (found.kv_cache + max(found.activations, found.logits))
    assert predicted == pytest.approx(memory.peak, rel=0.15)


def test_flops_per_token_of_a_window_count_its_keys():
    """At 1,000 positions: 500 keys on average if dense; 100, and less than 100 pivots, with a window."""
    sparse = replace(SHAPE, attention=AttentionConfig(pattern="window", window=100, pivots=100))
    saved = flops_per_token(SHAPE, 1000) - flops_per_token(sparse, 1000)
    keys = saved / (3 * 4 * SHAPE.num_layers * SHAPE.width)
    assert keys == pytest.approx(500 - (0.1 * 50 + 0.9 * 150))
    assert flops_per_token(sparse, 100) == flops_per_token(SHAPE, 100)
