"""Memory of training against tensors saved by autograd, the peak of a step, and the estimators of DeepSpeed."""

from dataclasses import replace

import pytest
import torch

from cogview.errors import InputError
from cogview.kernels.fused_linear_cross_entropy import LossTargets
from cogview.modeling.config import TransformerConfig, preset
from cogview.modeling.transformer import Transformer
from cogview.planning.training import (
    CHECKPOINTING_MODES,
    TrainingJob,
    choose_micro_batch,
    divisors,
    fits,
    layer_activations,
    lora_parameters,
    max_micro_batch,
    training_memory,
)
from cogview.planning.training_time import (
    preset_job,
)
from cogview.training.engines.base import DeviceMicroBatch, TransformerWithLoss

FOUR_BILLION = preset_job("4b")


def small(length: int, dropout: float = 0.1, num_layers: int = 2) -> TransformerConfig:
    return TransformerConfig(
        num_layers=num_layers,
        width=96,
        num_heads=6,
        vocabulary_size=512,
        max_positions=length,
        dropout=dropout,
    )


def kept_bytes(shape: TransformerConfig, rows: int, dtype: torch.dtype | None) -> int:
    """Return the bytes of the storages that autograd saves, without those of weights and of their autocast copies."""
    transformer = Transformer(shape).train()
    weights = {parameter.untyped_storage().data_ptr() for parameter in transformer.parameters()}
    shapes = {tuple(parameter.shape) for parameter in transformer.parameters()}
    seen, saved = {}, []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        is_weight = tensor.dim() == 2 and ({tuple(tensor.shape), tuple(tensor.shape[::-1])} & shapes)
        if tensor.untyped_storage().data_ptr() not in weights and not is_weight:
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            saved.append(tensor)  # a freed storage could be reused for another tensor
        return tensor

    autocast = torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), autocast:
        transformer.hidden(torch.zeros(rows, shape.max_positions, dtype=torch.int64))
    return sum(seen.values())


NATIVE = "cogview.kernels.native_training.uses_native_kernels"


@pytest.mark.parametrize("length", [20, 150])  # reference and fused attention
@pytest.mark.parametrize("dtype", [torch.bfloat16, None])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_layer_activations_equal_bytes_saved_by_autograd(length, dtype, dropout, monkeypatch):
    """Native kernels save as much or less."""
    shape, rows = small(length, dropout), 2
    precision = "float32" if dtype is None else "bfloat16"
    expected = rows * layer_activations(shape, length, precision, "cpu")
    monkeypatch.delenv("COGVIEW_KERNELS", raising=False)
    one, two = (kept_bytes(replace(shape, num_layers=count), rows, dtype) for count in (1, 2))
    assert 0.9 * expected <= two - one <= expected
    monkeypatch.setattr(NATIVE, lambda *_: False)
    one, two = (kept_bytes(replace(shape, num_layers=count), rows, dtype) for count in (1, 2))
    assert two - one == expected


@pytest.mark.parametrize("checkpointing", CHECKPOINTING_MODES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, None])
def test_training_memory_predicts_peak_of_step(checkpointing, dtype, monkeypatch):
    monkeypatch.setattr(NATIVE, lambda *_: False)
    shape, rows = small(150, num_layers=6), 4
    transformer = Transformer(shape).train()
    transformer.checkpointing = checkpointing
    learner = TransformerWithLoss(transformer, dtype)
    optimizer = torch.optim.AdamW(transformer.parameters())
    ids = torch.zeros(rows, shape.max_positions, dtype=torch.int64)
    positions = torch.arange(ids.numel())
    targets = [
        LossTargets(
            ids=range(512), positions_M=positions, targets_M=ids.flatten(), weights_M=torch.ones(len(positions))
        )
    ]

    def step() -> None:
        learner(DeviceMicroBatch(ids=ids, positions=ids, targets=targets))[0].backward()

    step()
    optimizer.step()
    states = [tensor for parameter in transformer.parameters() for tensor in (parameter, parameter.grad)]
    states += [value for state in optimizer.state.values() for value in state.values() if value.dim()]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    now = peak = 0
    for event in profiler.profiler.kineto_results.events():
        now += event.nbytes() if event.name() == "[memory]" else 0
        peak = max(peak, now)
    memory = training_memory(
        TrainingJob(
            transformer=shape,
            length=shape.max_positions,
            micro_batch_size=rows,
            batch_size=rows,
            precision="float32" if dtype is None else "bfloat16",
            checkpointing=checkpointing,
            device_type="cpu",
        )
    )
    seen = sum(tensor.nbytes for tensor in states) + peak
    assert memory.total - memory.overhead == pytest.approx(seen, rel=0.05)


@pytest.mark.parametrize("world", [1, 8, 64, 512])
@pytest.mark.parametrize("offload", [False, True])
def test_training_memory_agrees_with_deepspeed_estimators(world, offload):
    pytest.importorskip("deepspeed")
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs as third
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs as second

    count = FOUR_BILLION.parameters
    nodes = {"num_gpus_per_node": min(8, world), "num_nodes": -(-world // 8), "additional_buffer_factor": 1}
    job = replace(FOUR_BILLION, engine="deepspeed", world_size=world, offload=offload, zero=3)
    host, gpu, _ = third(count, 0, cpu_offload=offload, cpu_offload_params=False, **nodes)
    assert training_memory(job).states == pytest.approx(gpu, rel=0.001)
    if offload:  # of a node, without the second gradient of each process
        assert min(8, world) * (training_memory(job).host - 4 * count / world) == pytest.approx(host, rel=0.001)

    job = replace(job, zero=2)
    memory = training_memory(job)
    _, gpu = second(count, cpu_offload=offload, **nodes)
    # DeepSpeed adds 16-bit gradients, and with offloading none.
    theirs = memory.weights if offload else memory.states + 2 * count / world
    assert theirs == pytest.approx(gpu, rel=0.001)


def test_training_memory_shards_more_with_each_zero_stage():
    job = replace(FOUR_BILLION, engine="deepspeed", zero=1, world_size=8)
    first, second, third = (training_memory(replace(job, zero=stage)) for stage in (1, 2, 3))
    count = job.parameters
    assert (first.weights, first.gradients, first.optimizer) == (2 * count, 6 * count, 12 * count // 8)
    assert (second.weights, second.gradients, second.optimizer) == (2 * count, 4 * count // 8, 12 * count // 8)
    assert (third.weights, third.gradients, third.optimizer) == (2 * count // 8, 4 * count // 8, 12 * count // 8)
    half = training_memory(replace(job, zero=1, precision="float16"))
    assert half.gradients == 4 * count  # without the copy of the bfloat16 optimizer, but with buckets
    assert half.buffers > first.buffers == 0


def test_training_memory_counts_optimizer_on_host_when_offloading():
    on_gpu = training_memory(replace(FOUR_BILLION, engine="deepspeed", zero=2, world_size=8))
    offloaded = training_memory(replace(FOUR_BILLION, engine="deepspeed", zero=2, world_size=8, offload=True))
    assert (on_gpu.host, offloaded.optimizer) == (0, 0)
    assert offloaded.host > on_gpu.optimizer
    assert offloaded.total < on_gpu.total


def test_training_memory_of_torch_has_float32_states_and_autocast_copy():
    count = FOUR_BILLION.parameters
    for precision, extra in (("float32", 0), ("bfloat16", 2)):
        memory = training_memory(replace(FOUR_BILLION, precision=precision))
        multiplied = 48 * (12 * 2560**2 + 9 * 2560)
        assert memory.states == 16 * count + extra * multiplied
        assert memory.buffers == 0


def test_training_memory_of_adapter_has_few_gradients():
    shape = FOUR_BILLION.transformer
    trained = lora_parameters(shape, 16)
    assert trained == 16 * 48 * (4 + 2 + 5 + 5) * 2560
    memory = training_memory(replace(FOUR_BILLION, trainable=trained))
    assert (memory.gradients, memory.optimizer) == (4 * trained, 8 * trained)
    assert memory.weights > 4 * shape.num_parameters
    assert memory.total < training_memory(FOUR_BILLION).total / 2


def test_training_memory_decreases_with_checkpointing():
    jobs = [replace(FOUR_BILLION, checkpointing=mode, micro_batch_size=4) for mode in CHECKPOINTING_MODES]
    none, selective, full = (training_memory(job).activations for job in jobs)
    assert none > 1.5 * selective > 3 * full
    shape = FOUR_BILLION.transformer
    assert layer_activations(shape, 1089, "bfloat16", "cuda", "full") == 1089 * 2560 * 4


def test_layer_activations_include_scores_of_short_sequences_on_cpu():
    shape = small(128, dropout=0)
    fused = layer_activations(shape, 128, "float32", "cuda")
    assert layer_activations(shape, 128, "float32", "cpu") - fused == 8 * 6 * 128 * 128
    assert layer_activations(shape, 129, "float32", "cpu") == layer_activations(shape, 129, "float32", "cuda")


def test_choose_micro_batch_takes_maximum_that_fits():
    eight = replace(FOUR_BILLION, engine="deepspeed", zero=2, world_size=8)
    assert choose_micro_batch(eight, 80e9) == (8, "none")
    assert choose_micro_batch(eight, 80e9, "full") == (64, "full")
    assert choose_micro_batch(eight, 80e9, micro_batch_size=16) == (16, "selective")
    for free in (21e9, 24e9, 40e9, 80e9):
        rows, mode = choose_micro_batch(eight, free)
        chosen = replace(eight, micro_batch_size=rows, checkpointing=mode)
        assert fits(chosen, free)
        assert eight.local_batch_size % rows == 0
        larger = [number for number in divisors(eight.local_batch_size) if number > rows]
        assert not larger or not fits(replace(chosen, micro_batch_size=larger[0]), free)


def test_choose_micro_batch_recomputes_for_larger_batch_of_narrow_model():
    job = preset_job("100m")
    free = 5.4e9
    rows = [max_micro_batch(replace(job, checkpointing=mode), free) for mode in CHECKPOINTING_MODES]
    assert rows[0] >= 1
    assert rows[0] < rows[1]
    assert choose_micro_batch(job, free) == (rows[1], "selective")


def test_choose_micro_batch_raises_when_states_do_not_fit():
    with pytest.raises(InputError, match=r"training takes 70\.4 GB .* but only 24\.0 GB are free: .*offload") as error:
        choose_micro_batch(FOUR_BILLION, 24e9)
    assert "\n" not in str(error.value)
    assert choose_micro_batch(FOUR_BILLION, 71e9) == (1, "full")  # the states fit


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"precision": "int8"}, "precision 'int8' is unknown; known: float32, bfloat16, float16"),
        ({"engine": "fsdp"}, "engine 'fsdp' is unknown; known: torch, deepspeed"),
        ({"checkpointing": "all"}, "checkpointing 'all' is unknown; known: none, selective, full"),
        ({"device_type": "tpu"}, "device type 'tpu' is unknown"),
        ({"micro_batch_size": 0}, "micro_batch_size must be at least 1, got 0"),
        ({"batch_size": 10, "world_size": 4}, "a batch of 10 rows does not divide among 4 processes"),
        (
            {"batch_size": 8, "world_size": 4, "micro_batch_size": 4},
            "micro_batch_size must be at most 2, the rows of a process in a batch of 8, got 4",
        ),
        ({"zero": 2}, "ZeRO stage 2 needs the engine deepspeed, got torch"),
        ({"offload": True}, "offloading the optimizer needs the engine deepspeed, got torch"),
        ({"engine": "deepspeed", "zero": 4}, "zero must be 1, 2 or 3 with the engine deepspeed, got 4"),
        ({"engine": "deepspeed"}, "zero must be 1, 2 or 3 with the engine deepspeed, got 0"),
        ({"trainable": 0}, "the trained parameters must be at least 1, got 0"),
    ],
)
def test_training_job_rejects_invalid_settings(changes, message):
    job = {"transformer": preset("5m", 512), "length": 64, "micro_batch_size": 1, "batch_size": 8}
    with pytest.raises(InputError, match=message):
        TrainingJob(**{**job, **changes})
