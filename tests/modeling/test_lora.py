"""The arithmetic of merging an adapter, against float64; injection is tested with the adapter files."""

# N outputs, K inputs, R rank

import pytest
import torch

from cogview.modeling import lora
from cogview.modeling.lora import LoraSettings, LowRankChange, merged_weight


def random_parts(num_outputs, dtype=torch.float32):
    generator = torch.Generator().manual_seed(num_outputs)
    weight_NK, a_RK, b_NR = (
        torch.randn(shape, generator=generator) for shape in ((num_outputs, 24), (4, 24), (num_outputs, 4))
    )
    return weight_NK.to(dtype), a_RK, b_NR


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_outputs", [1, 7, 16, 33])
def test_merged_weight_matches_float64(monkeypatch, num_outputs, dtype):
    """The rows are within one step, a whole number of steps, and more."""
    monkeypatch.setattr(lora, "ROWS_PER_STEP", 8)
    weight_NK, a_RK, b_NR = random_parts(num_outputs, dtype)
    before = weight_NK.clone()
    merged_NK = merged_weight(weight_NK, [LowRankChange(a_RK, b_NR, 1.5), LowRankChange(a_RK[:2], b_NR[:, 2:], -0.5)])
    expected = weight_NK.double() + 1.5 * b_NR.double() @ a_RK.double() - 0.5 * b_NR[:, 2:].double() @ a_RK[:2].double()
    assert merged_NK.dtype == torch.float32
    torch.testing.assert_close(merged_NK.double(), expected, atol=1e-5, rtol=0)
    assert torch.equal(weight_NK, before)


def test_merged_weight_is_undone_by_the_negative_factor():
    weight_NK, a_RK, b_NR = random_parts(12)
    merged_NK = merged_weight(weight_NK, [LowRankChange(a_RK, b_NR, 2.0)])
    assert (merged_NK - weight_NK).abs().max() > 1
    undone_NK = merged_weight(merged_NK, [LowRankChange(a_RK, b_NR, -2.0)])
    torch.testing.assert_close(undone_NK, weight_NK, atol=1e-5, rtol=0)


def test_lora_settings_scale_is_alpha_over_rank():
    assert LoraSettings(rank=8, alpha=20.0).scale == 2.5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 10**12}, "the rank of an adapter must be at most 65536, got 1"),
        ({"rank": 0}, "the rank of an adapter must be at least 1, got 0"),
        ({"alpha": 0.0}, "alpha must be above 0, got 0.0"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"targets": ()}, "targets must name at least one of attention.query_key_value"),
        ({"targets": ("mlp.inputs",)}, 'the target "mlp.inputs" is unknown; did you mean "mlp.input"?'),
    ],
)
def test_lora_settings_raise_value_error_when_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        LoraSettings(**settings)
