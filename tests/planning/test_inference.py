"""What a job takes: the formulas against real tensors, real rows and what is alive while they are filled."""

import weakref
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cogview.device import _available_on_host, available_memory
from cogview.errors import InputError
from cogview.generation.beam_search import beam_search
from cogview.generation.decode import decode
from cogview.generation.requests import DecodingRequest
from cogview.generation.scoring import score
from cogview.kernels.linear import MANY_ROWS_HALF, MANY_ROWS_INT8
from cogview.modeling.config import ModelConfig, Sampling, TransformerConfig, preset
from cogview.modeling.kv_cache import KVCache
from cogview.modeling.quantization import Int4Linear, Int8Linear, swap_quantized_linears
from cogview.modeling.transformer import Transformer
from cogview.planning.batch_memory import beam_search_bytes, decode_bytes, score_bytes
from cogview.planning.hardware import HardwareSpeed, measure_hardware
from cogview.planning.inference import BANDWIDTH_EFFICIENCY, SAMPLING_TRAFFIC, estimate_inference, image_flops
from cogview.planning.model_memory import (
    ForwardPass,
    forward_bytes,
    image_bytes,
    layer_bytes,
    position_bytes,
    smaller_formats,
    workspace_bytes,
)
from cogview.tokenizers.layouts import layouts
from cogview.tokenizers.tasks import planned_tasks
from cogview.tokenizers.vocabulary import Vocabulary
from cogview.tokenizers.windows import upscale_windows
from cogview.vqvae.model import VQVAE, VQVAEConfig

IMAGE = VQVAEConfig(channels=(8, 8, 16), num_codes=300, code_width=4)
SHAPE = TransformerConfig(num_layers=3, width=64, num_heads=4, vocabulary_size=896, max_positions=128)
ALL_TASKS = ("generate", "caption", "upscale", "low_level")


def config_of(num_codes: int = 300, **settings: object) -> ModelConfig:
    """A model of 8 x 8 codes and texts of up to 20 pieces that knows every task."""
    vocabulary = Vocabulary(num_image_codes=num_codes, num_text_pieces=500)
    shape = replace(SHAPE, vocabulary_size=vocabulary.padded_size)
    values = {"transformer": shape, "vocabulary": vocabulary, "grid": 8, "tasks": ALL_TASKS, "max_text": 20}
    return ModelConfig(**{**values, **settings})


def plan_of(config: ModelConfig | None = None, **settings: object):
    """An estimate, of drawing one picture where nothing else is said."""
    return estimate_inference(config or config_of(), IMAGE, **{"task": "generate", "rows": 1, **settings})


class Alive(TorchDispatchMode):
    """The most bytes of tensors that were alive at once, besides those of ``known``."""

    def __init__(self, known) -> None:
        super().__init__()
        self.known = {tensor.untyped_storage()._cdata for tensor in known}
        self.seen: dict[int, weakref.ref] = {}
        self.now = self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                if key not in self.known and key not in self.seen:
                    self.seen[key] = weakref.ref(storage, lambda _, key=key, size=size: self._gone(key, size))
                    self.now += size
                    self.most = max(self.most, self.now)
        return result

    def _gone(self, key: int, size: int) -> None:
        del self.seen[key]
        self.now -= size


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_weights_are_those_of_the_model(dtype):
    transformer = Transformer(SHAPE).to(getattr(torch, dtype))
    plan = plan_of(dtype=dtype)
    assert plan.layers == sum(tensor.nbytes for tensor in transformer.layers.parameters())
    assert plan.layers + plan.embedding == sum(tensor.nbytes for tensor in transformer.parameters())
    image_tokenizer = VQVAE(IMAGE)
    tensors = [*image_tokenizer.parameters(), *image_tokenizer.buffers()]
    assert plan.image_tokenizer == sum(tensor.nbytes for tensor in tensors)


@pytest.mark.parametrize("few_bits", ["int8", "int4"])
@pytest.mark.parametrize("width", [64, 96])  # 96: groups of 32 inputs
def test_weights_in_few_bits_are_those_of_the_model(few_bits, width):
    shape = replace(SHAPE, width=width)
    with torch.device("meta"):
        transformer = Transformer(shape)
        swap_quantized_linears(transformer, few_bits)
    transformer.to(torch.bfloat16)  # biases and norms; integers stay
    rounded = [module for module in transformer.modules() if isinstance(module, Int8Linear | Int4Linear)]
    assert len(rounded) == 4 * shape.num_layers
    layers = transformer.layers
    assert layer_bytes(shape, few_bits) == sum(t.nbytes for t in (*layers.parameters(), *layers.buffers()))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_cache_is_the_engines(dtype):
    plan = plan_of(rows=3, dtype=dtype)
    cache = KVCache(SHAPE, plan.rows, plan.sequence_length, torch.device("cpu"), getattr(torch, dtype))
    assert plan.rows * plan.kv_cache == cache.num_bytes
    assert plan_of(rows=3, dtype=dtype, guided=True).kv_cache == 2 * plan.kv_cache


def test_rows_are_those_of_the_layouts():
    config = config_of()
    table = config.layouts
    assert plan_of(task="generate").sequence_length == table["generate"].length(20) - 1  # [EOI1] is not drawn
    assert plan_of(task="low_level").sequence_length == table["low_level"].length(20) - 1
    assert plan_of(task="upscale").sequence_length == table["upscale"].length(20) - 1
    assert plan_of(task="caption").sequence_length == table["caption"].length(20) - 1  # nor what ends the longest
    assert plan_of(task="score").sequence_length == table["score"].length(20)
    assert plan_of(task="score").kv_cache == 0


def test_captions_have_a_room_of_their_own():
    config = config_of(max_caption=5)
    assert plan_of(config, task="caption").sequence_length == config.layouts["caption"].length(5) - 1


def test_an_upscaled_picture_is_nine_windows():
    drawn = [read for read in plan_of(task="upscale").forward_passes if read.output_ids]
    assert len(drawn) == (2 * 8) ** 2  # every code of the large picture once
    assert sum(read.total_positions == read.new_positions for read in drawn) == len(
        upscale_windows(8)
    )  # each is read from its beginning


@pytest.fixture
def plain_cpu(monkeypatch):
    """A CPU without products in 16 bits, whose MKL makes no copies: what PyTorch allocates is all there is."""
    monkeypatch.setattr("cogview.kernels.linear.cpu_multiplies_bfloat16", lambda: False)
    monkeypatch.setattr("cogview.planning.model_memory.can_prepack", lambda weight: False)


def row_of(config: ModelConfig, task: str, number: int = 0, text: int = 20, known: slice | None = None):
    """A row whose given part is like no other ``number``'s; of the picture, the codes ``known`` are given."""
    numbers = [number] * 64
    values = {"text": [number] * text, "small": numbers[:16], "image": None, "max_text": None}
    if known is not None:
        values["image"] = np.ma.masked_array(np.reshape(numbers, (8, 8)), mask=True)
        values["image"][known] = number
    elif task == "caption":
        values |= {"image": numbers, "max_text": 20}
    names = {"generate": ("text", "image"), "caption": ("image", "max_text")}
    given = {name: values[name] for name in names.get(task, ("text", "small", "image"))}
    return config.layouts[task].arrange(config.vocabulary, **given)


@pytest.mark.usefixtures("plain_cpu")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("task", "guided"),
    [("generate", False), ("generate", True), ("caption", False), ("low_level", False), ("low_level", True)],
)
@pytest.mark.parametrize("num_codes", [300, 8192])  # the layers have most, the noise has
def test_as_much_is_alive_as_the_plan_says(task, guided, dtype, num_codes):
    config, rows = config_of(num_codes, sampling=Sampling(top_k=0)), 4
    transformer = Transformer(config.transformer).eval().to(getattr(torch, dtype))
    sampling = Sampling(top_k=0, guidance=3 if guided else 1)
    arranged = [row_of(config, task, number, text=19 + number % 2) for number in range(2 * rows)]
    twins = zip(arranged[:rows], arranged[rows:], strict=True)
    jobs = [DecodingRequest(sequence=row, seed=0, sampling=sampling, unconditional=twin) for row, twin in twins]
    with Alive(transformer.parameters()) as alive:
        decode(transformer, config.vocabulary, jobs)
    plan = plan_of(config, task=task, rows=rows, dtype=dtype, guided=guided)
    said = plan.workspace + rows * (plan.kv_cache + max(plan.activations, plan.logits))
    assert said == pytest.approx(alive.most, rel=0.14 if guided else 0.12)


@pytest.mark.usefixtures("plain_cpu")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("task", "different", "known", "sampling", "num_codes", "int8_cache"),
    [
        ("generate", 16, None, Sampling(top_k=5), 300, False),  # the layers have most
        ("generate", 16, None, Sampling(top_k=0), 8192, False),  # drawing has
        ("generate", 16, None, Sampling(top_k=0, top_p=0.9), 8192, False),
        ("generate", 16, None, Sampling(top_k=5, guidance=3), 8192, False),
        ("generate", 16, None, Sampling(top_k=5, text_attention=2), 300, False),
        ("generate", 16, None, Sampling(), 300, True),
        ("generate", 1, None, Sampling(), 300, False),  # one beginning for all, kept once
        ("generate", 14, None, Sampling(), 300, False),  # read once and copied
        ("generate", 16, np.s_[:4], Sampling(), 300, False),  # the upper half is known
        ("upscale", 16, np.s_[:, :4], Sampling(), 300, False),  # the left one: known columns stand between blanks
        ("caption", 16, None, Sampling(), 300, False),
        ("caption", 16, None, Sampling(), 300, True),
        ("caption", 8, None, Sampling(), 300, False),
        ("caption", 4, None, Sampling(), 300, True),
    ],
)
def test_as_much_is_alive_as_given_jobs_are_said_to_take(
    task, different, known, sampling, num_codes, int8_cache, dtype
):
    config, rows = config_of(num_codes), 16
    transformer = Transformer(config.transformer).eval().to(getattr(torch, dtype))
    arranged = [row_of(config, task, number % different, known=known) for number in range(rows)]
    jobs = [
        DecodingRequest(sequence=row, seed=0, image=index, sampling=sampling, unconditional=row)
        for index, row in enumerate(arranged)
    ]
    with Alive(transformer.parameters()) as alive:
        decode(transformer, config.vocabulary, jobs, int8_cache=int8_cache)
    settings = {"dtype": dtype, "device_type": "cpu", "int8_cache": int8_cache}
    said = decode_bytes(config.transformer, config.vocabulary, jobs, **settings)
    workspace = workspace_bytes(config.transformer, dtype, "cpu")  # may not be there while the layers have most
    assert 0.95 * alive.most <= said <= 1.1 * alive.most + workspace


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="layers are packed by MKL")
@torch.inference_mode()
def test_lean_layers_hold_no_more_than_the_modules():
    """Their locals once kept what is in between until the next layer: half as much again at the peak."""
    transformer, ids_BT = Transformer(SHAPE).eval(), torch.zeros(4, 64, dtype=torch.int64)
    most = []
    for pack in (False, True):
        if pack:
            transformer.prepack()
            transformer.hidden(ids_BT)  # makes the copies that are kept
        with Alive(transformer.parameters()) as alive:
            transformer.hidden(ids_BT)
        most.append(alive.most)
    assert most[1] <= most[0]


@pytest.mark.usefixtures("plain_cpu")
def test_codes_told_in_windows_take_what_is_said():
    config, rows = config_of(8192), 4
    transformer = Transformer(config.transformer).eval()
    jobs = [
        DecodingRequest(sequence=row_of(config, "generate"), seed=0, image=index, sampling=Sampling())
        for index in range(rows)
    ]
    with Alive(transformer.parameters()) as alive:
        decode(transformer, config.vocabulary, jobs, speculative=16)
    settings = {"dtype": "float32", "device_type": "cpu"}
    said = decode_bytes(config.transformer, config.vocabulary, jobs, max_window=16, **settings)
    assert 0.95 * alive.most <= said <= 1.1 * alive.most
    assert said > 2 * decode_bytes(config.transformer, config.vocabulary, jobs, **settings)


@pytest.mark.usefixtures("plain_cpu")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("images", "beams"), [(3, 4), (1, 8)])
def test_as_much_is_alive_while_captions_are_searched(images, beams, dtype):
    config = config_of()
    transformer = Transformer(config.transformer).eval().to(getattr(torch, dtype))
    rows = [row_of(config, "caption", number) for number in range(images)]
    with Alive(transformer.parameters()) as alive:
        beam_search(transformer, config.vocabulary, rows, beams)
    said = beam_search_bytes(config.transformer, config.vocabulary, rows, beams, dtype=dtype, device_type="cpu")
    assert 0.95 * alive.most <= said <= 1.1 * alive.most + workspace_bytes(config.transformer, dtype, "cpu")


@pytest.mark.usefixtures("plain_cpu")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_as_much_is_alive_while_a_text_is_scored(dtype):
    config, rows = config_of(), 3
    transformer = Transformer(config.transformer).eval().to(getattr(torch, dtype))
    row = config.layouts["score"].arrange(config.vocabulary, image=[0] * 64, text=[0] * 20)
    with Alive(transformer.parameters()) as alive:
        score(transformer, config.vocabulary, [row] * rows)
    plan = plan_of(config, task="score", rows=rows, dtype=dtype)
    assert plan.workspace + rows * max(plan.activations, plan.logits) == pytest.approx(alive.most, rel=0.1)
    said = score_bytes(config.transformer, config.vocabulary, [row] * rows, dtype=dtype, device_type="cpu")
    assert said == pytest.approx(alive.most, rel=0.12)


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="PyTorch comes without MKL here")
def test_what_is_packed_is_counted_until_it_is_there():
    config = config_of()
    transformer, codes = Transformer(config.transformer).eval(), config.vocabulary.image
    assert transformer.prepack_bytes(codes) == 0  # it is not used so
    transformer.prepack()
    plan = plan_of(config)
    assert plan.packed == transformer.prepack_bytes(codes)
    assert plan_of(config, dtype="bfloat16").packed == plan_of(config, device_type="cuda").packed == 0
    decode(
        transformer,
        config.vocabulary,
        [DecodingRequest(sequence=row_of(config, "generate"), seed=0, sampling=Sampling())],
    )
    assert transformer.prepack_bytes(codes) == 0


@pytest.mark.usefixtures("plain_cpu")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "int4"])
def test_wide_layers_are_multiplied_a_block_of_weights_at_a_time(dtype):
    """One layer of which every projection has several blocks, and enough columns for all of them to be unpacked."""
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
    with Alive([*layers.parameters(), *layers.buffers(), x]) as alive, torch.inference_mode():
        layers[0](x, None, None, 0)
    read = ForwardPass(new_positions=50, total_positions=50, output_ids=1)
    activations = forward_bytes(shape, dtype, "cpu", read, padded=False)
    workspace = workspace_bytes(shape, dtype, "cpu")
    assert max(activations, workspace) <= x.nbytes + alive.most <= activations + workspace


@pytest.mark.parametrize("image", [VQVAEConfig(num_codes=64), replace(VQVAEConfig.released(), num_codes=64)])
@pytest.mark.parametrize("decoding", [True, False])
def test_pictures_take_what_the_vqvae_has_alive(image, decoding):
    model = VQVAE(image).eval()
    with Alive([*model.parameters(), *model.buffers()]) as alive:
        if decoding:
            model.decode(torch.zeros(2, 8, 8, dtype=torch.int64))
        else:
            model.encode(torch.zeros(2, 3, 64, 64))
    assert 2 * image_bytes(image, 8, decoding=decoding) == pytest.approx(alive.most, rel=0.05)


def test_the_four_billion_parameters():
    shape = preset("4b", Vocabulary().padded_size)
    vocabulary = Vocabulary()
    table = layouts(32, caption_stop=False)
    text = table["generate"].longest_text(1089)
    config = ModelConfig(transformer=shape, vocabulary=vocabulary, grid=32, tasks=("generate",), max_text=text)
    plan = estimate_inference(
        config, VQVAEConfig.released(), task="generate", rows=1, dtype="float16", device_type="cuda"
    )
    assert plan.layers + plan.embedding == 2 * 3_928_849_920
    assert position_bytes(shape, "float16") == 491_520
    assert plan.sequence_length == 1088
    step = plan.forward_passes[-1]
    assert (step.new_positions, step.total_positions, step.output_ids) == (1, 1087, 8192)
    weights = plan.traffic(step) - 1087 * 491_520 - 8192 * SAMPLING_TRAFFIC
    assert weights / 1e9 == pytest.approx(7.60, abs=0.005)
    without_context = plan.flops(step) - 4 * 48 * 2560 * 1087
    assert without_context / 1e9 == pytest.approx(2 * 3.776_5 + 0.0419, abs=0.01)


@pytest.mark.parametrize("task", planned_tasks())
def test_more_rows_take_more(task):
    plans = [plan_of(task=task, rows=rows) for rows in (1, 2, 7)]
    assert plans[0].total < plans[1].total < plans[2].total
    assert plans[2].total == plans[0].constant + 7 * plans[0].per_row
    speed = HardwareSpeed(bandwidth=1e9, flops=1e9, starts_ahead=False)
    seconds = [plan.seconds(speed).total for plan in plans]
    assert seconds[0] < seconds[1] < seconds[2]
    assert plans[2].seconds(speed).total < 7 * seconds[0]  # weights are read once for all rows


@pytest.mark.parametrize("task", planned_tasks())
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_the_max_rows_fit_and_one_more_does_not(task, dtype):
    plan = plan_of(task=task, dtype=dtype)
    for free in (plan.constant + 3 * plan.per_row, plan.constant + 4 * plan.per_row - 1, 10**9):
        rows = plan.max_rows(free)
        assert plan_of(task=task, dtype=dtype, rows=rows).total <= free
        assert plan_of(task=task, dtype=dtype, rows=rows + 1).total > free
    assert plan.max_rows(plan.total - 1) == plan.max_rows(0) == 0


def test_fewer_bits_take_less():
    totals = [plan_of(dtype=dtype, device_type="cuda").layers for dtype in ("float32", "float16", "int8", "int4")]
    assert totals == sorted(totals, reverse=True)
    assert len(set(totals)) == 4


def test_a_step_takes_the_longest_of_what_it_does():
    plan = plan_of()
    step = plan.forward_passes[-1]
    slow_memory = HardwareSpeed(bandwidth=1e6, flops=1e15, starts_ahead=True)
    assert plan.forward_seconds(step, slow_memory) == pytest.approx(plan.traffic(step) / (BANDWIDTH_EFFICIENCY * 1e6))
    slow_products = HardwareSpeed(bandwidth=1e15, flops=1e6, starts_ahead=True)
    assert plan.forward_seconds(step, slow_products) == pytest.approx(plan.flops(step) / 1e6)
    fast = HardwareSpeed(bandwidth=1e18, flops=1e18, starts_ahead=True)
    starting = plan.forward_seconds(step, fast)
    assert starting > 0
    assert plan.forward_seconds(step, replace(slow_products, starts_ahead=False)) == pytest.approx(
        plan.flops(step) / 1e6 + starting
    )


def test_weights_that_are_unpacked_at_every_step_take_their_time():
    on_cpu, on_card = (plan_of(dtype="int4", device_type=device) for device in ("cpu", "cuda"))
    step = on_cpu.forward_passes[-1]
    assert not on_cpu.converts_weights(step)
    assert on_card.converts_weights(step)
    assert on_card.traffic(step) > on_cpu.traffic(step)
    for dtype, many in (("int8", MANY_ROWS_INT8), ("bfloat16", MANY_ROWS_HALF)):
        assert [plan_of(dtype=dtype, rows=rows).converts_weights(step) for rows in (many - 1, many)] == [False, True]
        assert plan_of(dtype=dtype).converts_weights(replace(step, new_positions=many))  # as many columns of one row do
        fewer, many_rows = (plan_of(dtype=dtype, rows=rows) for rows in (many - 1, many))
        assert many_rows.traffic(step) > 1.2 * fewer.traffic(step)
    assert not plan_of(dtype="float32", rows=100).converts_weights(step)


def test_operations_of_the_vqvae():
    config = replace(VQVAEConfig.released(), channels=(6, 5, 4), code_width=3)
    taps = 2 * 16 * (3 * 4 * 8**2 + 4 * 5 * 16**2 + 5 * 6 * 32**2) + 2 * 6 * 3 * 64**2
    assert image_flops(config, 8, decoding=True) == taps
    assert image_flops(config, 16, decoding=True) == 4 * taps
    taps = 2 * 16 * (3 * 6 * 32**2 + 6 * 5 * 16**2 + 5 * 4 * 8**2) + 2 * 4 * 3 * 8**2
    assert image_flops(config, 8, decoding=False) == taps + 2 * 8192 * 3 * 8**2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task": "draw"}, "task 'draw' is unknown; known: generate, caption, upscale, low_level, score"),
        ({"dtype": "int7"}, "dtype 'int7' is unknown; known: float32, bfloat16, float16, int8, int4"),
        ({"rows": 0}, "the number of rows must be at least 1, got 0"),
        ({"task": "caption", "guided": True}, "the task 'caption' generates no images"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(InputError, match=message):
        plan_of(**settings)


def test_tasks_that_the_model_does_not_know():
    with pytest.raises(InputError, match="not trained for the task 'score'; its tasks are: generate"):
        plan_of(config_of(tasks=("generate",)), task="score")


def test_widths_that_int4_cannot_group():
    with pytest.raises(InputError, match="multiple of 32, got 48"):
        layer_bytes(replace(SHAPE, width=48), "int4")


def test_this_machine_is_measured():
    speed = measure_hardware(torch.device("cpu"), torch.float32)
    assert speed.bandwidth > 0
    assert speed.flops > 0
    assert not speed.starts_ahead
    assert available_memory(torch.device("cpu")) > 0


def test_free_memory_is_what_the_tightest_group_leaves(tmp_path):
    def write(path: str, text: str) -> None:
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    write("proc/meminfo", "MemTotal: 9000 kB\nMemAvailable: 4000 kB\n")
    assert _available_on_host(tmp_path) == 4000 * 1024
    write("proc/self/status", "VmSize: 5000 kB\nVmData: 1000 kB\n")
    write(
        "proc/self/limits",
        "Max data size   unlimited  unlimited  bytes\nMax address space  unlimited  unlimited  bytes\n",
    )
    assert _available_on_host(tmp_path) == 4000 * 1024
    write(
        "proc/self/limits",
        "Max data size   4096000  unlimited  bytes\nMax address space  unlimited  unlimited  bytes\n",
    )
    assert _available_on_host(tmp_path) == 3000 * 1024
    write("proc/self/limits", "Max data size   4096000  unlimited  bytes\nMax address space  7168000  7168000  bytes\n")
    assert _available_on_host(tmp_path) == 2000 * 1024
    write("proc/self/limits", "Max data size   100  100  bytes\n")
    assert _available_on_host(tmp_path) == 0  # more is taken than the limit allows
    (tmp_path / "proc/self/limits").unlink()
    write("proc/self/cgroup", "5:cpu:/\n4:memory:/a\n0::/a/b\n")
    assert _available_on_host(tmp_path) == 4000 * 1024  # a group whose files are not to be seen says nothing
    write("sys/fs/cgroup/a/b/memory.max", "max\n")
    write("sys/fs/cgroup/a/memory.max", "2000000\n")
    write("sys/fs/cgroup/a/memory.current", "700000\n")
    write("sys/fs/cgroup/a/memory.stat", "anon 5\ninactive_file 300000\n")
    assert _available_on_host(tmp_path) == 2000000 - 700000 + 300000
    write("sys/fs/cgroup/memory/a/memory.limit_in_bytes", "900000\n")
    write("sys/fs/cgroup/memory/a/memory.usage_in_bytes", "1000000\n")
    write("sys/fs/cgroup/memory/a/memory.stat", "inactive_file 5\ntotal_inactive_file 200000\n")
    assert _available_on_host(tmp_path) == 100000


def test_all_there_is_where_a_system_does_not_say_what_is_free(tmp_path):
    everything = _available_on_host(tmp_path / "no-such-root")
    assert everything >= available_memory(torch.device("cpu"))
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9000 kB\n")
    assert _available_on_host(tmp_path) == everything


def test_options_that_save_enough():
    shape, vocabulary = config_of().transformer, config_of().vocabulary
    saved = {dtype: layer_bytes(shape, "float32") - layer_bytes(shape, dtype) for dtype in ("bfloat16", "int8", "int4")}
    offered = partial(smaller_formats, shape, vocabulary, "float32", "cuda")
    assert offered(0) == ["--dtype bfloat16", "--dtype int8", "--dtype int4"]
    assert offered(2 * saved["int4"]) == []
    assert smaller_formats(shape, vocabulary, "int8", "cuda", 0) == ["--dtype int4"]
    narrow = replace(shape, width=48)  # that int4 cannot group
    assert smaller_formats(narrow, vocabulary, "float32", "cuda", 0) == ["--dtype bfloat16", "--dtype int8"]
