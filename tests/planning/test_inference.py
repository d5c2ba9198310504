"""Estimates of memory and time against layouts, published numbers and the peak of decoding."""

import math
from dataclasses import replace

import pytest
import torch

from cogview.checkpoints.sizes import vqvae_shapes
from cogview.errors import InputError
from cogview.generation.decode import decode
from cogview.generation.requests import DecodingRequest
from cogview.kernels.linear import MANY_ROWS_HALF, MANY_ROWS_INT8
from cogview.modeling.config import ModelConfig, Sampling, preset
from cogview.modeling.transformer import Transformer
from cogview.planning.hardware import HardwareSpeed
from cogview.planning.inference import BANDWIDTH_EFFICIENCY, SAMPLING_TRAFFIC, estimate_inference, image_flops
from cogview.planning.model_memory import position_bytes
from cogview.tokenizers.layouts import layouts
from cogview.tokenizers.tasks import planned_tasks
from cogview.tokenizers.vocabulary import Vocabulary
from cogview.tokenizers.windows import upscale_windows
from cogview.vqvae.model import VQVAEConfig
from tests.planning.factories import PeakMemory, sequence_of, small_config, small_estimate


def test_estimate_has_sequence_length_of_layout():
    """The last token, [EOI1] or the stop of a text of maximum length, is not generated."""
    table = small_config().layouts
    for task in ("generate", "low_level", "upscale", "caption"):
        assert small_estimate(task=task).sequence_length == table[task].length(20) - 1
    assert small_estimate(task="score").sequence_length == table["score"].length(20)
    assert small_estimate(task="score").kv_cache == 0


def test_estimate_limits_captions_by_max_caption():
    config = small_config(max_caption=5)
    assert small_estimate(config, task="caption").sequence_length == config.layouts["caption"].length(5) - 1


def test_estimate_upscales_image_in_nine_windows():
    steps = [one for one in small_estimate(task="upscale").forward_passes if one.output_ids]
    assert len(steps) == (2 * 8) ** 2  # every code of the large image once
    assert sum(one.total_positions == one.new_positions for one in steps) == len(upscale_windows(8))  # prefills


@pytest.mark.slow
@pytest.mark.usefixtures("plain_cpu")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("task", "guidance_rows"),
    [("generate", 0), ("generate", 1), ("caption", 0), ("low_level", 0), ("low_level", 1)],
)
@pytest.mark.parametrize("num_codes", [300, 8192])  # the peak is in the layers, or in the noise
def test_estimate_predicts_peak_of_decoding(task, guidance_rows, dtype, num_codes):
    config, rows = small_config(num_codes, sampling=Sampling(top_k=0)), 4
    transformer = Transformer(config.transformer).eval().to(getattr(torch, dtype))
    sampling = Sampling(top_k=0, guidance=3 if guidance_rows else 1)
    arranged = [sequence_of(config, task, number, text=19 + number % 2) for number in range(2 * rows)]
    pairs = zip(arranged[:rows], arranged[rows:], strict=True)
    requests = [
        DecodingRequest(sequence=row, seed=0, sampling=sampling, unconditional=(other,)) for row, other in pairs
    ]
    with PeakMemory(transformer.parameters()) as memory:
        decode(transformer, config.vocabulary, requests)
    found = small_estimate(config, task=task, rows=rows, dtype=dtype, guidance_rows=guidance_rows)
    predicted = found.workspace + rows * (found.kv_cache + max(found.activations, found.logits))
    assert predicted == pytest.approx(memory.peak, rel=0.14 if guidance_rows else 0.12)


def test_estimate_of_4b_matches_published_numbers():
    shape = preset("4b", Vocabulary().padded_size)
    vocabulary = Vocabulary()
    table = layouts(32, caption_stop=False)
    text = table["generate"].longest_text(1089)
    config = ModelConfig(transformer=shape, vocabulary=vocabulary, grid=32, tasks=("generate",), max_text=text)
    settings = {"task": "generate", "rows": 1, "dtype": "float16", "device_type": "cuda"}
    found = estimate_inference(config, VQVAEConfig.released(), **settings)
    assert found.layers + found.embedding == 2 * 3_928_849_920
    assert position_bytes(shape, "float16") == 491_520
    assert found.sequence_length == 1088
    step = found.forward_passes[-1]
    assert (step.new_positions, step.total_positions, step.output_ids) == (1, 1087, 8192)
    weights = found.traffic(step) - 1087 * 491_520 - 8192 * SAMPLING_TRAFFIC
    assert weights / 1e9 == pytest.approx(7.60, abs=0.005)
    without_context = found.flops(step) - 4 * 48 * 2560 * 1087
    assert without_context / 1e9 == pytest.approx(2 * 3.776_5 + 0.0419, abs=0.01)


@pytest.mark.parametrize("task", planned_tasks())
def test_memory_is_linear_and_time_is_sublinear_in_rows(task):
    estimates = [small_estimate(task=task, rows=rows) for rows in (1, 2, 7)]
    assert estimates[0].total < estimates[1].total < estimates[2].total
    assert estimates[2].total == estimates[0].constant + 7 * estimates[0].per_row
    speed = HardwareSpeed(bandwidth=1e9, flops=1e9, starts_ahead=False)
    seconds = [found.seconds(speed).total for found in estimates]
    assert seconds[0] < seconds[1] < seconds[2]
    once = 1 + 1e-9 if task == "score" else 1  # weights are moved once for all sequences; scoring is bound by products
    assert estimates[2].seconds(speed).total < 7 * seconds[0] * once


@pytest.mark.parametrize("task", planned_tasks())
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_max_rows_fit_and_one_more_does_not(task, dtype):
    found = small_estimate(task=task, dtype=dtype)
    for free in (found.constant + 3 * found.per_row, found.constant + 4 * found.per_row - 1, 10**9):
        rows = found.max_rows(free)
        assert small_estimate(task=task, dtype=dtype, rows=rows).total <= free
        assert small_estimate(task=task, dtype=dtype, rows=rows + 1).total > free
    assert found.max_rows(found.total - 1) == found.max_rows(0) == 0


def test_forward_seconds_is_maximum_of_products_traffic_and_launches():
    found = small_estimate()
    step = found.forward_passes[-1]
    slow_memory = HardwareSpeed(bandwidth=1e6, flops=1e15, starts_ahead=True)
    assert found.forward_seconds(step, slow_memory) == pytest.approx(found.traffic(step) / (BANDWIDTH_EFFICIENCY * 1e6))
    slow_products = HardwareSpeed(bandwidth=1e15, flops=1e6, starts_ahead=True)
    assert found.forward_seconds(step, slow_products) == pytest.approx(found.flops(step) / 1e6)
    fast = HardwareSpeed(bandwidth=1e18, flops=1e18, starts_ahead=True)
    launching = found.forward_seconds(step, fast)
    assert launching > 0
    assert found.forward_seconds(step, replace(slow_products, starts_ahead=False)) == pytest.approx(
        found.flops(step) / 1e6 + launching
    )


def test_traffic_includes_conversion_of_weights(plain_cpu):
    on_cpu, on_gpu = (small_estimate(dtype="int4", device_type=device) for device in ("cpu", "cuda"))
    step = on_cpu.forward_passes[-1]
    assert not on_cpu.converts_weights(step)
    assert on_gpu.converts_weights(step)
    assert on_gpu.traffic(step) > on_cpu.traffic(step)
    for dtype, many in (("int8", MANY_ROWS_INT8), ("bfloat16", MANY_ROWS_HALF)):
        fewer_rows, many_rows = (small_estimate(dtype=dtype, rows=rows) for rows in (many - 1, many))
        assert not fewer_rows.converts_weights(step)
        assert many_rows.converts_weights(step)
        one_row = small_estimate(dtype=dtype)
        assert one_row.converts_weights(replace(step, new_positions=many))  # new positions count as rows do
        assert many_rows.traffic(step) > 1.2 * fewer_rows.traffic(step)
    assert not small_estimate(dtype="float32", rows=100).converts_weights(step)


def test_image_flops_equal_those_of_convolutions():
    config = replace(VQVAEConfig.released(), channels=(6, 5, 4), code_width=3)
    taps = 2 * 16 * (3 * 4 * 8**2 + 4 * 5 * 16**2 + 5 * 6 * 32**2) + 2 * 6 * 3 * 64**2
    assert image_flops(config, 8, decoding=True) == taps
    assert image_flops(config, 16, decoding=True) == 4 * taps
    taps = 2 * 16 * (3 * 6 * 32**2 + 6 * 5 * 16**2 + 5 * 4 * 8**2) + 2 * 4 * 3 * 8**2
    assert image_flops(config, 8, decoding=False) == taps + 2 * 8192 * 3 * 8**2


@pytest.mark.parametrize(
    ("downsampling", "parameters", "encoding", "decoding"),
    [(4, 0.8e6, 0.5e9, 1.5e9), (8, 3.4e6, 0.4e9, 2.1e9), (16, 14.0e6, 0.4e9, 2.8e9)],
)
def test_costs_of_default_image_tokenizers_are_those_of_the_guide(downsampling, parameters, encoding, decoding):
    """The table of docs/data.md, for images of 128 pixels a side."""
    config = VQVAEConfig(downsampling=downsampling)
    shapes = {name: shape for name, shape in vqvae_shapes(config).items() if not name.startswith("quantizer.")}
    assert sum(map(math.prod, shapes.values())) == pytest.approx(parameters, abs=0.05e6)
    for expected, decodes in ((encoding, False), (decoding, True)):
        assert image_flops(config, 128 // downsampling, decoding=decodes) == pytest.approx(expected, abs=0.05e9)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task": "draw"}, "task 'draw' is unknown; known: generate, caption, upscale, low_level, edit, fill, score"),
        ({"dtype": "int7"}, "dtype 'int7' is unknown; known: float32, bfloat16, float16, int8, int4"),
        ({"rows": 0}, "the number of rows must be at least 1, got 0"),
        ({"task": "caption", "guidance_rows": 1}, "the task 'caption' generates no images"),
    ],
)
def test_estimate_rejects_invalid_settings(settings, message):
    with pytest.raises(InputError, match=message):
        small_estimate(**settings)


def test_estimate_rejects_task_that_model_is_not_trained_for():
    with pytest.raises(InputError, match="not trained for the task 'score'; its tasks are: generate"):
        small_estimate(small_config(tasks=("generate",)), task="score")
