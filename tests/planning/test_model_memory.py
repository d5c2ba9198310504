"""Bytes of weights, caches and activations against modules and tensors that are alive at the peak."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from cogview.errors import InputError
from cogview.generation.decode import decode
from cogview.generation.requests import DecodingRequest
from cogview.generation.sampling import TIE_MARGIN
from cogview.kernels.native import expects_native_kernels
from cogview.modeling.config import Sampling
from cogview.modeling.kv_cache import KVCache
from cogview.modeling.quantization import Int4Linear, Int8Linear, swap_quantized_linears
from cogview.modeling.transformer import Transformer
from cogview.planning.model_memory import (
    ForwardPass,
    forward_bytes,
    image_bytes,
    layer_bytes,
    sampling_bytes,
    smaller_formats,
    workspace_bytes,
)
from cogview.vqvae.model import VQVAE, VQVAEConfig
from tests.planning.factories import IMAGE, SHAPE, PeakMemory, sequence_of, small_config, small_estimate


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_layer_embedding_and_vqvae_bytes_equal_those_of_modules(dtype):
    transformer = Transformer(SHAPE).to(getattr(torch, dtype))
    found = small_estimate(dtype=dtype)
    assert found.layers == sum(tensor.nbytes for tensor in transformer.layers.parameters())
    assert found.layers + found.embedding == sum(tensor.nbytes for tensor in transformer.parameters())
    image_tokenizer = VQVAE(IMAGE)
    tensors = [*image_tokenizer.parameters(), *image_tokenizer.buffers()]
    assert found.image_tokenizer == sum(tensor.nbytes for tensor in tensors)


@pytest.mark.parametrize("quantization", ["int8", "int4"])
@pytest.mark.parametrize("width", [64, 96])  # 96: groups of 32 inputs
def test_layer_bytes_equal_those_of_quantized_modules(quantization, width):
    shape = replace(SHAPE, width=width)
    with torch.device("meta"):
        transformer = Transformer(shape)
        swap_quantized_linears(transformer, quantization)
    transformer.to(torch.bfloat16)  # biases and norms; integers stay
    quantized = [module for module in transformer.modules() if isinstance(module, Int8Linear | Int4Linear)]
    assert len(quantized) == 4 * shape.num_layers
    layers = transformer.layers
    assert layer_bytes(shape, quantization) == sum(t.nbytes for t in (*layers.parameters(), *layers.buffers()))


def test_layer_bytes_reject_width_that_int4_cannot_group():
    with pytest.raises(InputError, match="multiple of 32, got 48"):
        layer_bytes(replace(SHAPE, width=48), "int4")


def test_layer_bytes_decrease_with_bits():
    totals = [layer_bytes(SHAPE, dtype) for dtype in ("float32", "float16", "int8", "int4")]
    assert totals == sorted(totals, reverse=True)
    assert len(set(totals)) == 4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_position_bytes_equal_those_of_kv_cache(dtype):
    found = small_estimate(rows=3, dtype=dtype)
    cache = KVCache(SHAPE, found.rows, found.sequence_length, torch.device("cpu"), getattr(torch, dtype))
    assert found.rows * found.kv_cache == cache.num_bytes
    assert small_estimate(rows=3, dtype=dtype, guidance_rows=1).kv_cache == 2 * found.kv_cache


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="needs MKL")
def test_prepacked_bytes_equal_those_of_transformer():
    config = small_config()
    transformer, codes = Transformer(config.transformer).eval(), config.vocabulary.image
    assert transformer.prepack_bytes(codes) == 0  # packing is off
    transformer.prepare_cpu()
    found = small_estimate(config)
    assert found.prepacked == transformer.prepack_bytes(codes)
    assert (
        small_estimate(config, dtype="bfloat16").prepacked == small_estimate(config, device_type="cuda").prepacked == 0
    )
    request = DecodingRequest(sequence=sequence_of(config, "generate"), seed=0, sampling=Sampling())
    decode(transformer, config.vocabulary, [request])
    assert transformer.prepack_bytes(codes) == 0


@pytest.mark.usefixtures("plain_cpu")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "int4"])
def test_workspace_bytes_cover_blocks_of_wide_layers(dtype):
    """Every projection of the layer has several blocks, and the columns suffice to convert all of them."""
    shape = replace(SHAPE, width=1088, num_layers=1)
    held = torch.float32 if dtype == "float32" else torch.bfloat16
    with torch.device("meta"):
        layers = Transformer(shape).layers
        if dtype in ("int8", "int4"):
            swap_quantized_linears(layers, dtype)
    layers.to_empty(device="cpu").to(held)
    for module in layers.modules():
        if isinstance(module, Int4Linear):
            module.cpu_packed = True
    x = torch.zeros(1, 50, shape.width, dtype=held)
    with PeakMemory([*layers.parameters(), *layers.buffers(), x]) as memory, torch.inference_mode():
        layers[0](x, None, None, 0)
    forward_pass = ForwardPass(new_positions=50, total_positions=50, output_ids=1)
    activations = forward_bytes(shape, dtype, "cpu", forward_pass, padded=False)
    workspace = workspace_bytes(shape, dtype, "cpu")
    assert max(activations, workspace) <= x.nbytes + memory.peak <= activations + workspace


@pytest.mark.skipif(not expects_native_kernels(torch.device("cpu"), torch.float32), reason="needs a C compiler")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@torch.inference_mode()
def test_forward_bytes_predict_peak_of_native_layers(dtype):
    transformer, ids_BT = Transformer(SHAPE).eval().to(getattr(torch, dtype)), torch.zeros(5, 50, dtype=torch.int64)
    transformer.prepare_cpu()
    with PeakMemory(transformer.parameters()) as memory:
        transformer.hidden(ids_BT)
    forward_pass = ForwardPass(new_positions=50, total_positions=50, output_ids=1)
    predicted = forward_bytes(SHAPE, dtype, "cpu", forward_pass, padded=False, rows=5)
    predicted += workspace_bytes(SHAPE, dtype, "cpu")
    assert 0.75 * predicted <= memory.peak <= 1.02 * predicted  # without the scores of a few queries


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="needs MKL")
@torch.inference_mode()
def test_packed_layers_have_no_higher_peak_than_modules(monkeypatch):
    """Local variables once kept intermediate tensors until the next layer, which raised the peak by half."""
    monkeypatch.setenv("COGVIEW_KERNELS", "torch")
    transformer, ids_BT = Transformer(SHAPE).eval(), torch.zeros(4, 64, dtype=torch.int64)
    peaks = []
    for prepack in (False, True):
        if prepack:
            transformer.prepare_cpu()
            transformer.hidden(ids_BT)  # creates the packed copies
        with PeakMemory(transformer.parameters()) as memory:
            transformer.hidden(ids_BT)
        peaks.append(memory.peak)
    assert peaks[1] <= peaks[0]


@pytest.mark.parametrize(
    "image",
    [
        *(VQVAEConfig(downsampling=side, num_codes=64) for side in (4, 8, 16)),
        replace(VQVAEConfig.released(), num_codes=64),
    ],
)
@pytest.mark.parametrize("decoding", [True, False])
def test_image_bytes_predict_peak_of_vqvae(image, decoding):
    model = VQVAE(image).eval()
    with PeakMemory([*model.parameters(), *model.buffers()]) as memory:
        if decoding:
            model.decode(torch.zeros(2, 8, 8, dtype=torch.int64))
        else:
            model.encode(torch.zeros(2, 3, 8 * image.downsampling, 8 * image.downsampling))
    assert 2 * image_bytes(image, 8, decoding=decoding) == pytest.approx(memory.peak, rel=0.05)


def test_smaller_formats_save_missing_bytes():
    shape, vocabulary = small_config().transformer, small_config().vocabulary
    saved = {dtype: layer_bytes(shape, "float32") - layer_bytes(shape, dtype) for dtype in ("bfloat16", "int8", "int4")}
    options = partial(smaller_formats, shape, vocabulary, "float32", "cuda")
    assert options(0) == ['dtype="bfloat16"', 'dtype="int8"', 'dtype="int4"']
    assert options(2 * saved["int4"]) == []
    assert smaller_formats(shape, vocabulary, "int8", "cuda", 0) == ['dtype="int4"']
    narrow = replace(shape, width=48)  # does not divide into groups of int4
    assert smaller_formats(narrow, vocabulary, "float32", "cuda", 0) == ['dtype="bfloat16"', 'dtype="int8"']


@pytest.mark.parametrize("top_k", [8192 - TIE_MARGIN, 8192, 10**12])
def test_sampling_bytes_of_a_top_k_of_all_candidates_are_those_of_all(top_k):
    """An absurd --top-k was planned with terabytes; sampling sorts the candidates that there are."""
    measure = partial(sampling_bytes, num_ids=8192, dtype="float32", device_type="cpu", guidance_rows=0)
    assert measure(Sampling(top_k=top_k)) == measure(Sampling(top_k=0))
    assert measure(Sampling(top_k=200)) < measure(Sampling(top_k=0))
