"""Weights that remain in 16 bits: the results of float32 weights, in half of their memory."""

import pytest
import torch

from cogview.checkpoints.checkpoint import load_model, save_model
from cogview.device import choose_placement
from cogview.kernels.native import expects_native_kernels
from cogview.pipeline.cogview import CogView

CPU = torch.device("cpu")
FOX = "蓝色背景上的一只狐狸"

needs_compiler = pytest.mark.skipif(not expects_native_kernels(CPU, torch.float32), reason="there is no C compiler")


@pytest.fixture(scope="module")
def half_checkpoint(tiny_checkpoint, tmp_path_factory):
    """Return the tiny checkpoint stored in float16."""
    folder = tmp_path_factory.mktemp("halves") / "tiny"
    save_model(folder, load_model(tiny_checkpoint, CPU, torch.float32), dtype=torch.float16)
    return folder


@needs_compiler
def test_float32_model_keeps_weights_of_16_bits_and_generates_the_same(half_checkpoint):
    kept = CogView.from_pretrained(half_checkpoint, device="cpu")
    converted = CogView(load_model(half_checkpoint, CPU, torch.float32))
    dtypes = {name: tensor.dtype for name, tensor in kept.transformer.state_dict().items()}
    assert {dtype for name, dtype in dtypes.items() if "norm" in name or name.endswith("bias")} == {torch.float32}
    assert {dtype for name, dtype in dtypes.items() if name.endswith(("input.weight", "g.weight"))} == {torch.float16}
    assert "float32 with weights in float16" in str(kept.placement)
    images, expected = (model.generate([FOX, "一个红苹果"], seed=7, n=2) for model in (kept, converted))
    assert [image.codes.tolist() for image in images] == [image.codes.tolist() for image in expected]
    assert [image.log_probability for image in images] == [image.log_probability for image in expected]
    assert kept.score(images, FOX) == converted.score(expected, FOX)
    assert kept.caption(images[0], seed=1) == converted.caption(expected[0], seed=1)


@needs_compiler
@pytest.mark.parametrize("form", ["native", "torch", "reference"])
def test_transformer_with_weights_of_16_bits_computes_in_float32(half_checkpoint, monkeypatch, form):
    kept = CogView.from_pretrained(half_checkpoint, device="cpu").transformer
    converted = load_model(half_checkpoint, CPU, torch.float32).transformer
    ids = torch.randint(0, 300, (2, 9), generator=torch.Generator().manual_seed(0))
    monkeypatch.setenv("COGVIEW_KERNELS", form)
    logits, expected = kept(ids), converted(ids)  # with gradients enabled, as a user may call it
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    assert logits.dtype == torch.float32


def test_model_without_native_kernels_converts_weights_of_16_bits(half_checkpoint, monkeypatch):
    monkeypatch.setenv("COGVIEW_KERNELS", "torch")
    model = CogView.from_pretrained(half_checkpoint, device="cpu")
    assert {parameter.dtype for parameter in model.transformer.parameters()} == {torch.float32}
    assert str(model.placement) == "cpu, float32 (no GPU is used)"


@pytest.mark.parametrize(("stored", "free", "expected"), [("float16", 3, "float32"), ("float32", 3, "bfloat16")])
@needs_compiler
def test_choose_placement_counts_weights_of_16_bits(monkeypatch, stored, free, expected):
    monkeypatch.setattr("cogview.device.available_memory", lambda device: free * 2 * 1000 + 1)
    placement = choose_placement("cpu", stored_dtype=getattr(torch, stored), num_parameters=1000)
    assert str(placement.dtype) == f"torch.{expected}"
