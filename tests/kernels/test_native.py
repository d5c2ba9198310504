"""Native kernels: equal to the reference, the same bits in any batch, and one line where they cannot run."""

from __future__ import annotations

import errno
import logging
import platform
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from cogview.generation.sampling import filter_logits, keyed_gumbel, noise_keys, sample
from cogview.kernels import native, native_library
from cogview.kernels.attention import attention_bias
from cogview.kernels.dispatch import ForcedKernelsError
from cogview.kernels.layer_norm import pb_relax_layer_norm_reference
from cogview.kernels.linear import dequantize_int4, dequantize_int8, quantize_int4, quantize_int8
from cogview.kernels.native import (
    expects_native_kernels,
    linear_native,
    sample_native,
    uses_native_kernels,
)
from cogview.kernels.native_library import CompileError, compiled_library, find_compiler
from cogview.modeling.config import Sampling, TransformerConfig
from cogview.modeling.kv_cache import KVCache
from cogview.modeling.transformer import Transformer

CPU = torch.device("cpu")
FORMATS = ("float32", "float16", "bfloat16", "int8", "int4")
WIDE = TransformerConfig(num_layers=2, width=80, num_heads=4, vocabulary_size=64, max_positions=96)  # heads of 20

needs_compiler = pytest.mark.skipif(not expects_native_kernels(CPU, torch.float32), reason="there is no C compiler")


def stored(weight, weights):
    """Return a weight in a format, its scales, and the same weight in float32."""
    if weights == "int8":
        values, scales = quantize_int8(weight)
        return values, scales, dequantize_int8(values, scales)
    if weights == "int4":
        values, scales = quantize_int4(weight)
        return values, scales, dequantize_int4(values, scales)
    values = weight.to(getattr(torch, weights))
    return values, None, values.float()


def random_transformer(config=WIDE, dtype=torch.float32):
    """Return a transformer with random weights, biases and norms."""
    torch.manual_seed(3)
    transformer = Transformer(config).eval()
    with torch.no_grad():
        for parameter in transformer.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return transformer.to(dtype)


def prepared(transformer, monkeypatch):
    """Prepare a transformer to run native kernels."""
    monkeypatch.setenv("COGVIEW_KERNELS", "native")
    transformer.prepare_cpu()
    return transformer


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    """Forget the loaded library, and look for it in an empty folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native._loaded.clear()
    native._note_once.cache_clear()
    native._decide.cache_clear()
    yield tmp_path / "cogview" / "native"
    native._loaded.clear()
    native._decide.cache_clear()


# --- linear layers ------------------------------------------------------------------------------------------------


@needs_compiler
@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize(("outputs", "inputs"), [(96, 64), (7, 32), (130, 160), (33, 96)])
def test_linear_native_equals_product_in_float32(weights, outputs, inputs):
    generator = torch.Generator().manual_seed(outputs)
    weight, bias = torch.randn(outputs, inputs, generator=generator), torch.randn(outputs, generator=generator)
    values, scales, dense = stored(weight, weights)
    x = torch.randn(3, 23, inputs, generator=generator)
    product = linear_native(x, values, scales, bias)
    torch.testing.assert_close(product, x @ dense.T + bias, atol=2e-4, rtol=1e-5)
    torch.testing.assert_close(linear_native(x, values, scales), x @ dense.T, atol=2e-4, rtol=1e-5)


@needs_compiler
@pytest.mark.parametrize("weights", ["float32", "float16", "bfloat16"])
def test_linear_native_accepts_numbers_of_inputs_that_fill_no_register(weights):
    weight, x = torch.randn(9, 37), torch.randn(5, 37)
    values, _, dense = stored(weight, weights)
    torch.testing.assert_close(linear_native(x, values), x @ dense.T, atol=1e-4, rtol=1e-5)


@needs_compiler
@pytest.mark.parametrize("weights", FORMATS)
def test_linear_native_gives_a_row_the_same_bits_in_any_batch(weights):
    values, scales, _ = stored(torch.randn(72, 128), weights)
    x = torch.randn(150, 128)
    together = linear_native(x, values, scales)
    for count in (1, 2, 3, 4, 5, 6, 7, 12, 13, 64, 65):
        assert torch.equal(linear_native(x[:count], values, scales), together[:count])
        assert torch.equal(linear_native(x[-count:], values, scales), together[-count:])


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_linear_native_multiplies_16_bits_as_float32(dtype):
    finite = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    finite = finite[finite.isfinite()]  # each number, subnormal ones too
    weight = finite[: len(finite) // 63 * 63].view(-1, 63)[:, torch.randperm(63)].contiguous()
    for x in (torch.eye(63)[:3] * 2.0**-9, torch.randn(5, 63) * 2.0**-9):
        assert torch.equal(linear_native(x, weight), linear_native(x, weight.float()))


@needs_compiler
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="compiles for x86")
@pytest.mark.parametrize("processor", ["haswell", "x86-64"])
def test_kernels_for_older_processors_equal_the_reference(processor, empty_cache, monkeypatch):
    """Compile for processors with AVX2 and with SSE2 alone, whatever this one has."""
    monkeypatch.setattr(native_library, "FLAGS", ("-O1", f"-march={processor}", "-fopenmp", "-fPIC", "-std=gnu11"))
    torch.manual_seed(0)
    for weights in FORMATS:
        values, scales, dense = stored(torch.randn(70, 96), weights)
        x = torch.randn(7, 96)
        product = linear_native(x, values, scales)
        torch.testing.assert_close(product, x @ dense.T, atol=2e-4, rtol=1e-5)
        assert torch.equal(linear_native(x[2:3], values, scales), product[2:3])
    test_linear_native_multiplies_16_bits_as_float32(torch.float16)
    transformer, ids = random_transformer(), torch.randint(0, 64, (2, 20))
    with torch.inference_mode():
        expected = transformer.hidden(ids)
        torch.testing.assert_close(prepared(transformer, monkeypatch).hidden(ids), expected, atol=2e-5, rtol=1e-5)
    test_native_layers_embed_weights_of_16_bits_as_float32(torch.float16, 76, monkeypatch)
    test_native_layers_end_with_the_final_norm(torch.float32, monkeypatch)
    for num_ids in (7, 224):
        test_sample_native_scores_as_log_softmax_in_float64(num_ids)


@needs_compiler
def test_linear_native_gives_the_same_bits_with_any_number_of_threads():
    weight, x = torch.randn(200, 64), torch.randn(9, 64)
    before, products = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            products.append(linear_native(x, weight))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(products[0], products[1])
    assert torch.equal(products[0], products[2])


# --- layers -------------------------------------------------------------------------------------------------------


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("int8", [False, True])
def test_native_layers_equal_modules(dtype, int8, monkeypatch):
    """With padding on the left, in steps of several sizes, with plain and with int8 keys and values."""
    plain, ids = random_transformer(dtype=dtype), torch.randint(0, 64, (3, 21))
    fast = prepared(random_transformer(dtype=dtype), monkeypatch)
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    with torch.inference_mode():
        fast_cache, plain_cache = (KVCache(WIDE, 3, 21, CPU, dtype, int8=int8) for _ in range(2))
        for part in ids.split([9, 1, 1, 6, 4], dim=1):
            found, expected = fast.hidden(part, cache=fast_cache), plain.hidden(part, cache=plain_cache)
            torch.testing.assert_close(found.float(), expected.float(), atol=tolerance, rtol=1e-3)
        logits = fast.head(fast.hidden(ids), range(10, 50))
        expected = plain.head(plain.hidden(ids), range(10, 50))
        torch.testing.assert_close(logits, expected, atol=20 * tolerance, rtol=1e-3)


@needs_compiler
def test_native_layers_give_the_same_bits_in_any_steps_and_any_batch(monkeypatch):
    fast, ids = prepared(random_transformer(), monkeypatch), torch.randint(0, 64, (5, 90))
    with torch.inference_mode():
        whole = fast.hidden(ids)
        assert torch.equal(fast.hidden(ids[1:2]), whole[1:2])
        cache = KVCache(WIDE, 5, 90, CPU, torch.float32)
        parts = [fast.hidden(part, cache=cache) for part in ids.split([70, 1, 1, 3, 15], dim=1)]
        assert torch.equal(torch.cat(parts, dim=1), whole)


@needs_compiler
def test_native_layers_give_a_padded_row_the_bits_of_the_row_alone(monkeypatch):
    fast, ids = prepared(random_transformer(), monkeypatch), torch.randint(0, 64, (2, 30))
    positions = torch.stack([torch.arange(30), (torch.arange(30) - 7).clamp(min=0)])
    keys = torch.zeros(2, 30)
    keys[1, :7] = -torch.inf
    bias = attention_bias(keys, torch.arange(30).expand(2, -1))
    with torch.inference_mode():
        padded = fast.hidden(ids, positions, bias_B1TS=bias)
        assert torch.equal(padded[1:, 7:], fast.hidden(ids[1:, 7:]))
        assert torch.equal(padded[:1], fast.hidden(ids[:1]))


@needs_compiler
@pytest.mark.parametrize("int8", [False, True])
def test_native_layers_read_shared_prefixes_as_copies(int8, monkeypatch):
    """Rows that continue shared prefixes have the bits of rows with copies."""
    fast, prefixes = prepared(random_transformer(), monkeypatch), torch.tensor([1, 0, 1, 1])
    first, ids = torch.randint(0, 64, (2, 12)), torch.randint(0, 64, (4, 8))
    with torch.inference_mode():
        shared = KVCache(WIDE, 4, 20, CPU, torch.float32, int8=int8, prefixes=prefixes, prefix_length=12)
        fast.hidden(first, cache=shared)
        copied = KVCache(WIDE, 4, 20, CPU, torch.float32, int8=int8)
        fast.hidden(first[prefixes], cache=copied)
        for part in ids.split([1, 1, 6], dim=1):
            assert torch.equal(fast.hidden(part, cache=shared), fast.hidden(part, cache=copied))


@needs_compiler
@pytest.mark.parametrize("halves", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("width", [80, 76, 9])
def test_native_layers_embed_weights_of_16_bits_as_float32(halves, width, monkeypatch):
    """The sums of token and position have the bits of those in float32, also where they fill no register."""
    config = TransformerConfig(num_layers=1, width=width, num_heads=1, vocabulary_size=64, max_positions=96)
    fast = prepared(random_transformer(config), monkeypatch)
    ids, positions = torch.randint(0, 64, (3, 7)), torch.randint(0, 96, (3, 7))
    with torch.no_grad():
        for embedding in (fast.embedding, fast.positions):
            embedding.weight.data = embedding.weight.to(halves).float()
        expected = fast.hidden(ids, positions)
        fast.embedding.weight.data = fast.embedding.weight.to(halves)
        assert torch.equal(fast.hidden(ids, positions), expected)
        fast.positions.weight.data = fast.positions.weight.to(halves)
        assert torch.equal(fast.hidden(ids.int(), positions.T.contiguous().T), expected)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_native_layers_end_with_the_final_norm(dtype, monkeypatch):
    """Layers whose branches are zero leave the norm of the embeddings."""
    plain = random_transformer(dtype=dtype)
    with torch.inference_mode():
        for layer in plain.layers:
            for norm in (layer.attention_output_norm, layer.mlp_output_norm):
                norm.weight.zero_()
                norm.bias.zero_()
        ids = torch.randint(0, 64, (2, 70))  # more rows than a chunk
        stream = plain.embedding(ids).float() + plain.positions(torch.arange(70)).float()
        expected = pb_relax_layer_norm_reference(stream, plain.final_norm.weight.float(), plain.final_norm.bias.float())
        torch.testing.assert_close(prepared(plain, monkeypatch).hidden(ids), expected, atol=2e-6, rtol=2e-6)


@needs_compiler
@pytest.mark.parametrize(("token", "position", "name"), [(64, 0, "ids"), (-1, 0, "ids"), (0, 96, "positions")])
def test_native_layers_refuse_indices_without_an_embedding(token, position, name, monkeypatch):
    fast = prepared(random_transformer(), monkeypatch)
    with torch.inference_mode(), pytest.raises(IndexError, match=f"{name} must be from 0 to"):
        fast.hidden(torch.tensor([[3, token]]), torch.tensor([[0, position]]))


@needs_compiler
def test_native_head_follows_a_replaced_embedding(monkeypatch):
    fast, hidden = prepared(random_transformer(), monkeypatch), torch.randn(3, 80)
    with torch.inference_mode():
        for weight in (fast.embedding.weight, torch.randn(64, 80), torch.randn(64, 80).bfloat16()):
            fast.embedding.weight = torch.nn.Parameter(weight, requires_grad=False)
            for ids in (range(64), range(5, 31)):
                expected = linear_native(hidden, weight[ids.start : ids.stop])
                assert torch.equal(fast.head(hidden, ids), expected)


@needs_compiler
def test_native_layers_of_one_transformer_run_in_several_threads(monkeypatch):
    """Calls share no memory that they write to."""
    fast, ids = prepared(random_transformer(), monkeypatch), torch.randint(0, 64, (6, 40))
    with torch.inference_mode():
        expected = [fast.hidden(row) for row in ids.split(1)]

    def repeated(number):
        with torch.inference_mode():
            return all(torch.equal(fast.hidden(ids[number : number + 1]), expected[number]) for _ in range(30))

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(repeated, range(6)))


# --- sampling -----------------------------------------------------------------------------------------------------


@needs_compiler
@pytest.mark.parametrize("num_ids", [7, 224, 3001])
@pytest.mark.parametrize("ties", [False, True])
def test_sample_native_equals_filters_and_noise_of_all_ids(num_ids, ties, monkeypatch):
    """Also with equal logits, excluded ids, more top-k than ids, and none of the filters."""
    monkeypatch.setenv("COGVIEW_KERNELS", "native")
    generator, ids = torch.Generator().manual_seed(num_ids), range(40, 40 + num_ids)
    logits = torch.randn(9, num_ids, generator=generator) * 3
    logits[:, ::3] = -torch.inf
    logits = logits.round() if ties else logits
    keys = noise_keys(torch.arange(9), torch.tensor(2), torch.tensor(5))
    for sampling in (
        Sampling(),
        Sampling(top_k=0),
        Sampling(top_k=1),
        Sampling(top_k=5, min_p=0.2),
        Sampling(temperature=0.7, top_k=0, min_p=0.05),
    ):
        expected = (filter_logits(logits, sampling) + keyed_gumbel(keys, ids)).argmax(dim=-1)
        assert torch.equal(sample(logits, keys, ids, sampling)[0], expected)


@needs_compiler
@pytest.mark.parametrize("num_ids", [1, 7, 224, 8192])
def test_sample_native_scores_as_log_softmax_in_float64(num_ids):
    """Also with excluded ids and logits that overflow without the maximum; a row has the same bits in any batch."""
    generator = torch.Generator().manual_seed(num_ids)
    logits, scored = torch.randn(2, 9, num_ids, generator=generator) * 5
    scored[3:, 1::3] = -torch.inf
    scored[5] += 2000
    keys, mixed = torch.arange(9) * 77, torch.arange(num_ids) * 1234567
    settings = {"temperature": 1.3, "top_k": 100, "min_p": 0.0}
    for given in (scored, None):
        chosen, log_p = sample_native(logits, keys, mixed, given, **settings)
        expected = (logits if given is None else given).double().log_softmax(dim=-1).gather(1, chosen[:, None])[:, 0]
        torch.testing.assert_close(log_p.double(), expected, atol=2e-6, rtol=1e-6)
        for row in range(9):
            one = slice(row, row + 1)
            alone = sample_native(logits[one], keys[one], mixed, None if given is None else given[one], **settings)
            assert torch.equal(alone[0], chosen[one])
            assert torch.equal(alone[1], log_p[one])


# --- the library --------------------------------------------------------------------------------------------------


@needs_compiler
@pytest.mark.slow
def test_compiled_library_is_kept_and_repaired(empty_cache, monkeypatch, caplog):
    monkeypatch.setattr(native_library, "FLAGS", ("-O0", *native_library.FLAGS[1:]))  # which compile sooner
    monkeypatch.delenv("COGVIEW_KERNELS", raising=False)
    with caplog.at_level(logging.WARNING):
        path = compiled_library()
        assert path.parent == empty_cache
        assert "once" in caplog.text
        caplog.clear()
        assert compiled_library() == path
        assert not caplog.text
        whole = path.read_bytes()
        for damaged in (
            b"of another time",
            b"",
            whole[:4096],
            whole[:-1],
            whole[: len(whole) // 2] + whole[len(whole) // 2 + 1 :],
        ):
            path.write_bytes(damaged)
            assert not native_library._is_sealed(path)
        assert uses_native_kernels(CPU, torch.float32)
    assert native_library._is_sealed(path)


def test_uses_native_kernels_says_once_that_there_is_no_compiler(empty_cache, monkeypatch, caplog):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.delenv("COGVIEW_KERNELS", raising=False)
    with caplog.at_level(logging.WARNING):
        assert not uses_native_kernels(CPU, torch.float32)
        assert not uses_native_kernels(CPU, torch.float32)
    assert caplog.text.count("there is no C compiler (on Debian: apt install gcc)") == 1
    assert not expects_native_kernels(CPU, torch.float32)
    monkeypatch.setenv("COGVIEW_KERNELS", "native")
    with pytest.raises(ForcedKernelsError, match="COGVIEW_KERNELS=native, but there is no C compiler"):
        uses_native_kernels(CPU, torch.float32)


@pytest.mark.parametrize("given", ["nonsense", "/none/gcc -m64", "'gcc"])
def test_find_compiler_refuses_a_variable_that_names_no_program(monkeypatch, given):
    monkeypatch.setenv("CC", given)
    with pytest.raises(CompileError, match="which names no program; set it to a C compiler, or unset it"):
        find_compiler()


@needs_compiler
def test_find_compiler_keeps_the_options_of_the_variable(monkeypatch, tmp_path):
    monkeypatch.setenv("CC", "gcc -m64")
    assert find_compiler() == (shutil.which("gcc"), "-m64")
    spaced = tmp_path / "my compiler"
    spaced.symlink_to(shutil.which("gcc"))
    monkeypatch.setenv("CC", str(spaced))
    assert find_compiler() == (str(spaced),)


def test_uses_native_kernels_tries_once_where_nothing_is_kept(monkeypatch, tmp_path, caplog):
    """Two libraries count separately, and an unknown home folder is reported as an unwritable one is."""
    monkeypatch.setenv("XDG_CACHE_HOME", "~nobody-of-this-name/cache")
    monkeypatch.delenv("COGVIEW_KERNELS", raising=False)
    calls = []
    monkeypatch.setattr(native, "_loaded", {})
    monkeypatch.setattr(native_library, "find_compiler", lambda: (shutil.which("true"),))
    monkeypatch.setattr(native_library, "temporary_folder", lambda: SimpleNamespace(name=str(tmp_path)))
    monkeypatch.setattr(
        native_library, "_compile", lambda compiler, source, path: calls.append(path) or path.write_bytes(b"")
    )
    native._decide.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert not uses_native_kernels(CPU, torch.float32)
        assert not expects_native_kernels(CPU, torch.float32)
        assert not uses_native_kernels(CPU, torch.bfloat16)
    native._decide.cache_clear()
    assert len(calls) == 1
    assert "cannot be written" in caplog.text


def test_uses_native_kernels_reports_a_compiler_that_fails(empty_cache, monkeypatch, tmp_path):
    compiler = tmp_path / "broken-cc"
    compiler.write_text("#!/bin/sh\necho 'layers.c:1: error: no such flag' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    monkeypatch.setenv("COGVIEW_KERNELS", "native")
    with pytest.raises(ForcedKernelsError, match=r"the compiler .*broken-cc failed: layers\.c:1: error: no such flag"):
        uses_native_kernels(CPU, torch.float32)


def test_compiled_library_works_without_a_cache_folder(monkeypatch, tmp_path, caplog):
    """An unwritable folder is reported, and the library is made for this process."""
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(native_library, "find_compiler", lambda: (shutil.which("true"),))
    monkeypatch.setattr(native_library, "_compile", lambda compiler, source, path: path.write_bytes(b"library"))
    with caplog.at_level(logging.WARNING):
        path = compiled_library()
    assert path.read_bytes() == b"library"
    assert "cannot be written" in caplog.text


def test_compiled_library_is_temporary_where_the_cache_folder_is_full(empty_cache, monkeypatch, caplog):
    def fill(path, kept):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(native_library, "find_compiler", lambda: (shutil.which("true"),))
    monkeypatch.setattr(native_library, "_compile", lambda compiler, source, path: path.write_bytes(b"library"))
    monkeypatch.setattr(native_library.shutil, "copyfile", fill)
    with caplog.at_level(logging.WARNING):
        path = compiled_library()
    assert path.read_bytes() == b"library"
    assert "No space left" in caplog.text
    assert [file.name for file in empty_cache.iterdir()] == ["lock"]


@needs_compiler
def test_load_library_copies_one_whose_folder_forbids_programs(empty_cache, monkeypatch, caplog):
    load = native.ctypes.CDLL

    def refuse(path):
        if Path(path).parent == empty_cache:
            raise OSError(f"{path}: failed to map segment from shared object")
        return load(path)

    monkeypatch.setattr(native.ctypes, "CDLL", refuse)
    with caplog.at_level(logging.WARNING):
        assert native.load_library().cogview_interface() == native.INTERFACE
    assert "cannot be loaded: failed to map segment from shared object; a temporary copy is loaded" in caplog.text


@needs_compiler
@pytest.mark.parametrize("forced", [None, "native"])
def test_libraries_report_that_they_cannot_be_compiled(empty_cache, monkeypatch, caplog, forced):
    """The kernels of training are refused or reported as those of generation are, though the others run."""
    native.load_library("layers")
    monkeypatch.setenv("CC", "no-such-compiler")
    if forced is None:
        monkeypatch.delenv("COGVIEW_KERNELS", raising=False)
    else:
        monkeypatch.setenv("COGVIEW_KERNELS", forced)
    assert uses_native_kernels(CPU, torch.float32)
    if forced:
        with pytest.raises(ForcedKernelsError, match="names no program"):
            uses_native_kernels(CPU, torch.float32, "training")
        return
    with caplog.at_level(logging.WARNING):
        assert not uses_native_kernels(CPU, torch.float32, "training")
    assert "native kernels are missing, so each step takes longer: CC is 'no-such-compiler'" in caplog.text


@pytest.mark.parametrize(
    ("device", "dtype", "forced"),
    [("cuda", torch.float32, ""), ("cpu", torch.float16, ""), ("cpu", torch.float32, "torch")],
)
def test_uses_native_kernels_only_where_they_are_meant_to_run(device, dtype, forced, monkeypatch):
    monkeypatch.setenv("COGVIEW_KERNELS", forced)
    assert not uses_native_kernels(torch.device(device), dtype)
    assert not expects_native_kernels(torch.device(device), dtype)


def test_scratch_widths_agree_with_sources():
    """The planner counts the scratch memory of the library by two constants of its sources."""
    source = (native_library.sources_folder() / "layers.c").read_text()
    assert f"INTERFACE = {native.INTERFACE}, CHUNK_ROWS = {native.CHUNK_ROWS}" in source
    if expects_native_kernels(CPU, torch.float32):
        floats = native.load_library().cogview_scratch(10, 1000, 0, 0)
        assert floats == native.CHUNK_ROWS * native.SCRATCH_WIDTHS * 10
