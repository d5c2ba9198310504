"""Rows packed for the layers: the same hidden states and gradients as padded rows."""

from __future__ import annotations

import pytest
import torch

from cogview.kernels.dispatch import select_backend
from cogview.modeling.config import TransformerConfig
from cogview.modeling.packed_rows import PackedRows
from cogview.modeling.transformer import Transformer
from tests.factories import random_transformer

LENGTHS = [3, 3, 7, 8, 20]


@pytest.fixture
def forget_choices(monkeypatch):
    """Choices of implementations are made again, before and after the test."""
    select_backend.cache_clear()
    yield monkeypatch
    select_backend.cache_clear()


def hidden_and_gradients(transformer, lengths):
    ids_BT = torch.randint(0, 128, (5, 20), generator=torch.Generator().manual_seed(1))
    hidden_BTD = transformer.hidden(ids_BT, lengths=lengths)
    counted = torch.cat([row[:length] for row, length in zip(hidden_BTD, LENGTHS, strict=True)])
    transformer.zero_grad()
    (counted * torch.linspace(-1, 1, counted.numel()).view_as(counted)).sum().backward()
    return counted.detach(), [parameter.grad.clone() for parameter in transformer.parameters()]


@pytest.mark.parametrize("kernels", ["torch", "native"])
@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_hidden_of_packed_rows_equals_that_of_padded_rows(forget_choices, kernels, checkpointing):
    """Attention stays within each row, also with activation checkpointing."""
    torch.manual_seed(0)
    transformer = Transformer(
        TransformerConfig(num_layers=2, width=64, num_heads=4, vocabulary_size=128, max_positions=32, dropout=0.0)
    )
    forget_choices.setenv("COGVIEW_KERNELS", "torch")
    expected, expected_gradients = hidden_and_gradients(transformer, None)
    forget_choices.setenv("COGVIEW_KERNELS", kernels)
    select_backend.cache_clear()
    transformer.checkpointing = checkpointing
    found, found_gradients = hidden_and_gradients(transformer, LENGTHS)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)
    for gradient, wanted in zip(found_gradients, expected_gradients, strict=True):
        assert (gradient - wanted).norm() <= 1e-5 * wanted.norm().clamp(min=1e-6)


@pytest.mark.parametrize("kernels", ["reference", "native"])
@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
@pytest.mark.parametrize("lengths", [None, LENGTHS])
@pytest.mark.parametrize("outputs", [[], [2, 21, 46, 80, 99]])
def test_hidden_of_chosen_outputs_equals_all_hidden(forget_choices, kernels, checkpointing, lengths, outputs):
    """Behind its attention, the last layer computes the chosen positions alone; their loss misses nothing."""
    torch.manual_seed(0)
    transformer = random_transformer()
    forget_choices.setenv("COGVIEW_KERNELS", kernels)
    transformer.checkpointing = checkpointing
    ids_BT = torch.randint(0, transformer.config.vocabulary_size, (5, 20))
    outputs_M = torch.tensor(outputs, dtype=torch.int64)
    expected_MD = transformer.hidden(ids_BT, lengths=lengths).flatten(0, 1)[outputs_M]
    found_MD = transformer.hidden(ids_BT, lengths=lengths, outputs_M=outputs_M)
    torch.testing.assert_close(found_MD, expected_MD, atol=2e-5, rtol=0)
    parameters = list(transformer.parameters())
    weights_MD = torch.randn_like(expected_MD)
    wanted = torch.autograd.grad((expected_MD * weights_MD).sum(), parameters)
    gradients = torch.autograd.grad((found_MD * weights_MD).sum(), parameters)
    for gradient, each in zip(gradients, wanted, strict=True):
        assert (gradient - each).norm() <= 1e-5 * each.norm().clamp(min=1e-6)


def test_hidden_of_chosen_outputs_without_gradients_equals_all_hidden():
    """Layers prepared for a CPU compute all positions."""
    transformer = random_transformer()
    ids_BT = torch.randint(0, transformer.config.vocabulary_size, (3, 9))
    outputs_M = torch.tensor([0, 5, 17, 26])
    with torch.no_grad():
        transformer.prepare_cpu()
        expected_MD = transformer.hidden(ids_BT).flatten(0, 1)[outputs_M]
        assert torch.equal(transformer.hidden(ids_BT, outputs_M=outputs_M), expected_MD)


@pytest.mark.parametrize(
    ("pad", "blocks"), [(False, ((2, 3), (1, 7), (1, 8), (1, 20))), (True, ((2, 3), (2, 8), (1, 20)))]
)
def test_packed_rows_pad_only_rows_of_similar_length(pad, blocks):
    packed = PackedRows.of(LENGTHS, 20, torch.device("cpu"), pad=pad)
    assert packed.blocks == blocks
    values_BT = torch.arange(100).view(5, 20)
    unpacked_BTD = packed.unpack(packed.pack(values_BT).unsqueeze(-1))
    for row, length in enumerate(LENGTHS):
        assert torch.equal(unpacked_BTD[row, :length, 0], values_BT[row, :length])
    assert packed.pack(values_BT).shape == (1, sum(rows * length for rows, length in blocks))


def test_hidden_of_layers_prepared_for_a_cpu_keeps_rows_apart():
    """A trainer measures losses, without gradients, of a model that may also generate."""
    transformer = random_transformer()
    ids_BT = torch.randint(0, transformer.config.vocabulary_size, (3, 9))
    with torch.no_grad():
        expected = transformer.hidden(ids_BT)
        transformer.prepare_cpu()
        hidden_BTD = transformer.hidden(ids_BT, lengths=[4, 7, 9])
    for row, length in enumerate((4, 7, 9)):
        torch.testing.assert_close(hidden_BTD[row, :length], expected[row, :length], atol=1e-4, rtol=1e-4)
