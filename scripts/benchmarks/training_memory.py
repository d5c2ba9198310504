"""Compare the memory of training by our formulas with other estimates and with measurements.

``deepspeed``: the states of the 4b per GPU and on the host, beside the estimators of DeepSpeed. ``held``: the bytes of
all tensors in two processes of our DeepSpeed engine on this CPU, after a step and while gradients accumulate, beside
the predicted states; buckets have 100,000 elements, since larger ones would dominate. ``saved``: the tensors that
autograd saves for one layer, counted by its hooks, beside the formula. ``step``: small models train two steps on this
CPU; the bytes that PyTorch has allocated at the peak of the second step stand beside the predicted bytes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import arguments

if TYPE_CHECKING:
    import torch

    from cogview.modeling.config import TransformerConfig
    from cogview.planning.training import TrainingJob

GPUS = (1, 8, 64, 512)
PER_NODE = 8
# layers, width, heads, length and rows: on both sides of where the attention's reference ends. The share of a layer's
# backward in the formula was found on the first three; the others were not looked at for it.
SHAPES = {
    "short rows": (6, 256, 4, 64, 8),
    "long rows": (6, 256, 4, 320, 4),
    "wide": (4, 512, 8, 320, 2),
    "deep": (14, 192, 6, 200, 3),
    "short and deep": (10, 320, 5, 100, 6),
}
VOCABULARY = 4096


def deepspeed_rows() -> Iterator[dict[str, Any]]:
    """The 4b on 1 to 512 GPUs in each stage."""
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs as third
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs as second

    from cogview.planning.training import training_memory
    from cogview.planning.training_time import preset_job

    base = preset_job("4b")
    for world, zero, offload in itertools.product(GPUS, (1, 2, 3), (False, True)):
        job = replace(base, engine="deepspeed", zero=zero, offload=offload, world_size=world)
        memory, count = training_memory(job), job.parameters
        on_node = min(world, PER_NODE)
        row: dict[str, Any] = {
            "gpus": world,
            "zero": zero,
            "offload": offload,
            "states": memory.states,
            "buffers": memory.buffers,
            "host of a node": on_node * memory.host,
        }
        node = {"num_gpus_per_node": on_node, "num_nodes": world // on_node, "additional_buffer_factor": 1}
        if zero == 2:
            host, gpu = second(count, cpu_offload=offload, **node)
        elif zero == 3:  # without its largest layer, which is gathered: ours are in the buffers
            host, gpu, _ = third(count, 0, cpu_offload=offload, cpu_offload_params=False, **node)
        else:
            yield row
            continue
        # In stage 2 they count half gradients besides ours in float32; offloaded, none.
        others = 0 if zero == 3 else -4 * count // world if offload else 2 * count // world
        row |= {
            "DeepSpeed": gpu,
            "percent": 100 * (memory.states / gpu - 1),
            "percent, of the same": 100 * ((memory.states + others) / gpu - 1),
        }
        if offload:
            row["DeepSpeed's host"] = host
        yield row


def saved_by_layer(shape: TransformerConfig, rows: int, length: int, dtype: torch.dtype | None) -> float:
    """Bytes of one row that autograd's hooks see kept of one layer: of distinct storages, parameters left out.

    Autocast's copies of the weights belong to the weights, so they are left out too.
    """
    import torch

    from cogview.modeling.transformer import Transformer

    def kept(num_layers: int) -> int:
        transformer = Transformer(replace(shape, num_layers=num_layers)).train()
        own = {parameter.untyped_storage().data_ptr() for parameter in transformer.parameters()}
        weights = {tuple(parameter.shape) for parameter in transformer.parameters()}
        seen: dict[int, int] = {}
        held = []  # so that no storage is taken twice

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            converted = tensor.dim() == 2 and ({tuple(tensor.shape), tuple(tensor.shape[::-1])} & weights)
            if storage.data_ptr() not in own and not converted:
                seen[storage.data_ptr()] = storage.nbytes()
                held.append(tensor)
            return tensor

        ids = torch.randint(0, shape.vocabulary_size, (rows, length))
        autocast = torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), autocast:
            transformer.hidden(ids)
        return sum(seen.values())

    return (kept(3) - kept(2)) / rows


def saved_rows() -> Iterator[dict[str, Any]]:
    """One layer of every shape, in both precisions, with dropout and without."""
    import torch

    from cogview.modeling.config import TransformerConfig
    from cogview.planning.training import layer_activations

    for (name, (_, width, heads, length, rows)), dtype, dropout in itertools.product(
        SHAPES.items(), (torch.bfloat16, None), (0.0, 0.1)
    ):
        shape = TransformerConfig(
            num_layers=1, width=width, num_heads=heads, vocabulary_size=128, max_positions=length, dropout=dropout
        )
        precision = "float32" if dtype is None else "bfloat16"
        predicted = layer_activations(shape, length, precision, "cpu")
        seen = saved_by_layer(shape, rows, length, dtype)
        yield {
            "shape": name,
            "precision": precision,
            "dropout": str(dropout),
            "predicted": predicted,
            "seen": seen,
            "percent": 100 * (predicted / seen - 1),
        }


def allocated_peak(work: Callable[[], None]) -> int:
    """Return the peak bytes that ``work`` allocates, as PyTorch's allocator reports."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    now = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


def step_rows() -> Iterator[dict[str, Any]]:
    """A step of every shape, in both precisions and each way of checkpointing."""
    import torch

    from cogview.modeling.config import TransformerConfig
    from cogview.planning.training import CHECKPOINTING_MODES, TrainingJob, training_memory

    for (name, (layers, width, heads, length, rows)), dtype, mode in itertools.product(
        SHAPES.items(), (torch.bfloat16, None), CHECKPOINTING_MODES
    ):
        shape = TransformerConfig(
            num_layers=layers, width=width, num_heads=heads, vocabulary_size=VOCABULARY, max_positions=length
        )
        job = TrainingJob(
            transformer=shape,
            length=length,
            micro_batch_size=rows,
            batch_size=rows,
            precision="float32" if dtype is None else "bfloat16",
            checkpointing=mode,
            device_type="cpu",
        )
        memory = training_memory(job)
        predicted = memory.total - memory.overhead
        states, seen = step_bytes(job, dtype)
        yield {
            "shape": name,
            "precision": job.precision,
            "checkpointing": mode,
            "states": states,
            "predicted": predicted,
            "seen": seen,
            "percent": 100 * (predicted / seen - 1),
        }


def step_bytes(job: TrainingJob, dtype: torch.dtype | None) -> tuple[int, int]:
    """Bytes of weights, gradients and optimizer after a step of ``job``, and at the peak of the one that follows."""
    import torch

    from cogview.kernels.fused_linear_cross_entropy import LossTargets
    from cogview.modeling.transformer import Transformer
    from cogview.training.engines.base import DeviceMicroBatch, TransformerWithLoss

    torch.manual_seed(0)
    transformer = Transformer(job.transformer).train()
    transformer.checkpointing = job.checkpointing
    learner = TransformerWithLoss(transformer, dtype)
    optimizer = torch.optim.AdamW(transformer.parameters(), fused=True)
    ids = torch.randint(0, VOCABULARY, (job.micro_batch_size, job.length))
    positions = torch.arange(ids.numel())
    weights = torch.full(positions.shape, 1 / len(positions))
    targets = [LossTargets(ids=range(VOCABULARY), positions_M=positions, targets_M=ids.flatten(), weights_M=weights)]
    positions = torch.arange(job.length).expand_as(ids)

    def step() -> None:
        learner(DeviceMicroBatch(ids=ids, positions=positions, targets=targets))[0].backward()
        optimizer.step()

    step()  # whose gradients stay: the next one is as a later part of a step
    parameters = list(transformer.parameters())
    there: list[torch.Tensor] = [*parameters, *(each.grad for each in parameters if each.grad is not None)]
    there += [tensor for state in optimizer.state.values() for tensor in state.values()]
    held = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in there}
    states = sum(held.values())
    return states, states + allocated_peak(step)


def held_rows() -> Iterator[dict[str, Any]]:
    """Each stage on two processes, with the optimizer on the host and not: both are this CPU's memory here."""
    for zero, offload in itertools.product((1, 2, 3), (False, True)):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [sys.executable, __file__, "--held", f"{zero}{'+' if offload else ''}"]
        world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "DS_ACCELERATOR": "cpu"}
        processes = [
            subprocess.Popen(
                command,
                env={**os.environ, **world, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
            for rank in range(2)
        ]
        outputs = [process.communicate()[0] for process in processes]
        yield json.loads(outputs[0].splitlines()[-1])


def held_row(stage: str) -> dict[str, Any]:
    """What this process of two holds, in bytes for each parameter."""
    import torch

    from cogview.kernels.fused_linear_cross_entropy import LossTargets
    from cogview.modeling.config import TransformerConfig
    from cogview.modeling.transformer import Transformer
    from cogview.planning.training import TrainingJob, training_memory
    from cogview.training.distributed import init_distributed
    from cogview.training.engines import open_engine
    from cogview.training.engines.base import DeviceMicroBatch, TransformerWithLoss
    from cogview.training.settings import EngineSettings, TransformerTraining

    zero, offload, length = int(stage[0]), stage.endswith("+"), 16
    world = init_distributed("cpu")
    shape = TransformerConfig(
        num_layers=4, width=512, num_heads=8, vocabulary_size=VOCABULARY, max_positions=length, dropout=0
    )
    settings = TransformerTraining(steps=10, warmup_steps=1)
    learner = TransformerWithLoss(Transformer(shape), torch.bfloat16)
    config = {"zero_optimization": {"reduce_bucket_size": 100_000}}
    own = EngineSettings(name="deepspeed", zero=zero, offload=offload, config=config)
    engine = open_engine(learner, settings, own, world)
    ids = torch.zeros(1, length, dtype=torch.int64)
    loss_targets = LossTargets(
        ids=range(VOCABULARY), positions_M=torch.arange(length), targets_M=ids[0], weights_M=torch.ones(length)
    )
    part = DeviceMicroBatch(ids=ids, positions=torch.arange(length).unsqueeze(0), targets=[loss_targets])

    engine.accumulate_gradients([[part]], learn=True)
    engine.optimizer_step(1e-3)
    after = bytes_of_tensors()
    engine.accumulate_gradients([[part]], learn=True)
    adding = bytes_of_tensors()
    engine.optimizer_step(1e-3)
    job = TrainingJob(
        transformer=shape,
        length=length,
        micro_batch_size=1,
        batch_size=2,
        engine="deepspeed",
        zero=zero,
        world_size=2,
        offload=offload,
        device_type="cpu",
    )
    memory, count = training_memory(job), job.parameters
    predicted = (memory.states + memory.host) / count
    return {
        "zero": zero,
        "offload": offload,
        "bytes a parameter after a step": f"{after / count:.2f}",
        "while gradients are added up": f"{adding / count:.2f}",
        "predicted states, host included": f"{predicted:.2f}",
        "percent": 100 * (predicted * count / adding - 1),
    }


def bytes_of_tensors() -> int:
    """Bytes of all distinct storages that Python knows, and of gradients and parts that hang on parameters."""
    import gc

    import torch

    gc.collect()
    seen = {}
    for thing in gc.get_objects():
        if not issubclass(type(thing), torch.Tensor):
            continue
        tensors = [thing, thing.grad if thing.is_leaf else None]
        tensors += [getattr(thing, name, None) for name in ("grad_accum", "ds_tensor")]
        for tensor in tensors:
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                seen[storage.data_ptr()] = storage.nbytes()
    return sum(seen.values())


TABLES = {"deepspeed": deepspeed_rows, "held": held_rows, "saved": saved_rows, "step": step_rows}


def in_words(value: Any) -> str:
    """A cell of a table."""
    from cogview.formatting import format_bytes

    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float) and abs(value) <= 1000:
        return f"{value:+.1f}%"
    return format_bytes(int(value)) if isinstance(value, (int, float)) and value > 1000 else str(value)


def main() -> int:
    """Print the tables that are asked for."""
    parser = arguments.Parser(__doc__)
    parser.add_argument("tables", nargs="*", metavar="TABLE", help=f"of {', '.join(TABLES)} (default: all)")
    parser.add_argument("--json", action="store_true", help="print one JSON object, bytes and percent")
    parser.add_argument("--held", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.held:
        print(json.dumps(held_row(args.held)))
        return 0
    if unknown := [name for name in args.tables if name not in TABLES]:
        parser.error(f"table {unknown[0]!r} is unknown; known: {', '.join(TABLES)}")
    found = {name: list(TABLES[name]()) for name in args.tables or TABLES}
    if args.json:
        print(json.dumps(found, indent=2))
        return 0
    for name, rows in found.items():
        columns = list(dict.fromkeys(key for row in rows for key in row))
        print(f"\n{name}\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
        for row in rows:
            print(f"| {' | '.join(in_words(row[key]) if key in row else '' for key in columns)} |")
    return 0


if __name__ == "__main__":
    arguments.run_script(main)
