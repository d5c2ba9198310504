"""``cogview doctor``: what is wrong with this machine, or with a recipe on it, before hours are spent."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cogview.errors import InputError
from cogview.formatting import format_bytes

if TYPE_CHECKING:
    from cogview.training.recipe import Recipe
    from cogview.training.settings import TransformerSettings

# Packages, what brings them, and the versions that this was tried with.
PACKAGES = {
    "torch": ("", (2, 6), (2, 14)),
    "numpy": ("", None, None),
    "lmdb": ("", None, None),
    "sentencepiece": ("", None, None),
    "safetensors": ("", None, None),
    "tensorboard": ("train", None, None),
    "matplotlib": ("train", None, None),
    "deepspeed": ("deepspeed", (0, 19, 8), (0, 20)),
    "peft": ("lora", (0, 17), None),
    "triton": ("", None, None),
}
STATE_BYTES = 12  # of a parameter in a checkpoint: float32 weight and two moments
EXCHANGED = 1 << 20  # numbers, in the check of processes


@dataclass(frozen=True)
class Diagnosis:
    """A finding: whether it is ``ok``, a ``note`` or a ``problem``, what it is about, and what to do."""

    status: str
    subject: str
    text: str
    remedy: str = ""

    def __str__(self) -> str:
        line = f"{self.status:<9}{self.subject:<14}{self.text}"
        return f"{line}; {self.remedy}" if self.remedy else line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.description = (
        "Check versions, devices, how processes exchange numbers, and the disk; with a RECIPE its stores, too, and one "
        "training step with its shapes, with the memory that was predicted and seen. Status 1 where there is a problem."
    )
    parser.add_argument("recipe", nargs="?", type=Path, metavar="RECIPE", help="a YAML file with a transformer section")
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="changes to the section transformer of the recipe"
    )
    parser.add_argument("--work", type=Path, help="folder of the results (default: the recipe's)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    parser.add_argument(
        "--processes",
        type=int,
        metavar="N",
        help="that exchange numbers in the check (default: one for each GPU, or 2)",
    )
    parser.add_argument(
        "--dump", type=Path, metavar="FOLDER", help="instead: look again at a step that was not finite, kept by a run"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object a line")


def run(args: argparse.Namespace) -> int:
    """Print what was found; 1 where there is a problem."""
    if args.processes is not None and args.processes < 1:
        raise InputError(f"--processes must be at least 1, got {args.processes}")
    if args.dump is not None:
        if args.recipe is not None:
            raise InputError("--dump holds the model and the rows it needs: give it without a RECIPE")
        lines = replay_nonfinite(args.dump, args.device)
    else:
        lines = examine(args)
    problems = 0
    for line in lines:
        problems += line.status == "problem"
        print(json.dumps(vars(line), ensure_ascii=False) if args.json else line, flush=True)
    return 1 if problems else 0


def examine(args: argparse.Namespace) -> Iterator[Diagnosis]:
    """All checks, one after the other."""
    from cogview.cli.recipes import open_recipe
    from cogview.training.settings import TransformerSettings

    recipe, settings = None, None
    if args.recipe is not None:
        recipe = open_recipe(args)
        settings = recipe.settings(TransformerSettings, "transformer")  # a mistake in it is a line of its own
    yield from check_versions(settings)
    yield from check_devices()
    yield from guarded("processes", lambda: check_processes(args.device, args.processes))
    if recipe is None or settings is None:
        yield from check_disk(Path.cwd(), 0)
        return
    yield from guarded("training", lambda: check_training(recipe, settings, args.device))


def guarded(subject: str, check: Callable[[], Iterator[Diagnosis]]) -> Iterator[Diagnosis]:
    """What ``check`` finds; where it fails, that is the finding."""
    try:
        yield from check()
    except (InputError, OSError) as error:
        yield Diagnosis("problem", subject, " ".join(str(error).split()))


def check_versions(settings: TransformerSettings | None) -> Iterator[Diagnosis]:
    """Python and packages, against what this version was tried with and what the recipe needs."""
    from cogview import __version__

    yield Diagnosis(
        "ok", "cogview", f"{__version__} in {Path(__file__).parents[1]}, Python {platform.python_version()}"
    )
    needed = {"deepspeed"} if settings is not None and settings.engine.name == "deepspeed" else set()
    if settings is not None and settings.lora is not None:
        needed.add("peft")
    for name, (extra, lowest, below) in PACKAGES.items():
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            what = f"pip install 'cogview[{extra}]'" if extra else f"pip install {name}"
            missing = "problem" if name in needed or not (extra or name == "triton") else "note"
            yield Diagnosis(
                missing, name, "is not installed" + ("" if name in needed else ", which not all need"), what
            )
            continue
        numbers = tuple(int(part) for part in version.split("+")[0].split(".")[:3] if part.isdecimal())
        outside = (lowest and numbers < lowest) or (below and numbers >= below)
        span = " to below ".join(".".join(map(str, end)) for end in (lowest, below) if end)
        remedy = f"tried with {span}: pip install 'cogview{f'[{extra}]' if extra else ''}'" if outside else ""
        yield Diagnosis("problem" if outside else "ok", name, version, remedy)


def check_devices() -> Iterator[Diagnosis]:
    """Processors, memory and GPUs, and what is computed in there."""
    import torch

    from cogview.device import available_memory, choose_placement, precision_name, training_dtype

    cpu = torch.device("cpu")
    half = training_dtype(cpu)
    yield Diagnosis(
        "ok",
        "cpu",
        f"{os.cpu_count()} processors, {torch.get_num_threads()} threads, {format_bytes(available_memory(cpu))} of "
        f"memory available, trains in {precision_name(half)}",
    )
    if not torch.cuda.is_available():
        build = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built for CPUs"
        found = shutil.which("nvidia-smi") is not None
        yield Diagnosis(
            "problem" if found else "note",
            "gpu",
            f"PyTorch ({build}) sees none",
            "there is an NVIDIA driver: install PyTorch for CUDA" if found else "",
        )
        return
    for number in range(torch.cuda.device_count()):
        device = choose_placement(f"cuda:{number}").device
        properties = torch.cuda.get_device_properties(device)
        free, whole = torch.cuda.mem_get_info(device)
        precision = precision_name(training_dtype(device))
        why = "" if precision == "bfloat16" else " with loss scaling and PB-relax: it has no bfloat16 of its own"
        yield Diagnosis(
            "ok" if free > 0.8 * whole else "note",
            f"cuda:{number}",
            f"{properties.name}, compute capability {properties.major}.{properties.minor}, {format_bytes(free)} of "
            f"{format_bytes(whole)} free, trains in {precision}{why}",
            "" if free > 0.8 * whole else "another program uses it: nvidia-smi shows which",
        )


def check_processes(device: str, count: int | None) -> Iterator[Diagnosis]:
    """Whether processes on this machine add up numbers rightly, and how fast; or those that torchrun has started."""
    import torch
    import torch.multiprocessing as processes

    from cogview.training.distributed import free_port

    cuda = torch.cuda.is_available() and device != "cpu"
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from cogview.training.distributed import destroy_distributed, init_distributed

        world = init_distributed(device)
        rank, size = world.rank, world.size
        seconds = exchange(world.device, rank, size)
        destroy_distributed()
        where = f"{size} processes that were started together"
    else:
        size = count or (torch.cuda.device_count() if cuda else 2)
        with tempfile.TemporaryDirectory() as folder:
            result = Path(folder) / "seconds"
            try:
                processes.start_processes(
                    _exchange_alone, (size, free_port(), cuda, str(result)), nprocs=size, start_method="spawn"
                )
            except Exception as error:
                reason = str(error).strip().splitlines()[-1]
                yield Diagnosis(
                    "problem",
                    "processes",
                    f"{size} of them could not exchange numbers: {reason}",
                    "does a firewall close ports of 127.0.0.1, is a GPU in exclusive mode? NCCL_DEBUG=INFO says more",
                )
                return
            seconds = float(result.read_text())
        where = f"{size} processes on this machine"
    if math.isnan(seconds):
        yield Diagnosis("problem", "processes", f"{where} add up numbers wrongly", "update the driver and PyTorch")
        return
    rate = 4 * EXCHANGED / seconds / 1e9
    yield Diagnosis("ok", "processes", f"{where} add up numbers by {'NCCL' if cuda else 'gloo'}, {rate:.2f} GB/s each")


def exchange(device: Any, rank: int, size: int) -> float:
    """Seconds of an all-reduce of float32 numbers, or NaN where the sums are wrong."""
    import torch
    import torch.distributed as dist

    numbers = torch.full((EXCHANGED,), float(rank + 1), device=device)
    dist.all_reduce(numbers)
    right = bool((numbers == size * (size + 1) / 2).all())
    times = []
    for _ in range(5):
        dist.barrier()
        began = time.perf_counter()
        dist.all_reduce(numbers)
        if numbers.is_cuda:
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began)
    return sorted(times)[2] if right else math.nan


def _exchange_alone(rank: int, size: int, port: int, cuda: bool, result: str) -> None:
    """``exchange`` as process ``rank`` of ``size``; the first writes down how long it took."""
    import torch
    import torch.distributed as dist

    from cogview.device import choose_placement

    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    device = choose_placement(f"cuda:{rank}" if cuda else "cpu").device
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo", rank=rank, world_size=size)
    seconds = exchange(device, rank, size)
    if rank == 0:
        Path(result).write_text(str(seconds))
    dist.destroy_process_group()


def check_disk(folder: Path, checkpoint_bytes: int, kept: int = 0) -> Iterator[Diagnosis]:
    """Whether there is room for the checkpoints of a run; one more is there while it is written, and the best."""
    place = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
    free, needed = shutil.disk_usage(place).free, checkpoint_bytes * (kept + 2)
    text = f"{format_bytes(free)} free at {place}"
    if needed:
        text += f", {kept} checkpoints, the best and one being written take {format_bytes(needed)}"
    short = free < needed
    yield Diagnosis("problem" if short else "ok", "disk", text, "make room, or set a smaller run.keep" if short else "")
    if not os.access(place, os.W_OK):
        yield Diagnosis("problem", "disk", f"{place} cannot be written to", "choose another --work")


def check_training(recipe: Recipe, settings: TransformerSettings, device: str) -> Iterator[Diagnosis]:
    """The stores, and two steps with the recipe's shapes in a folder that is thrown away."""
    import torch

    from cogview.device import peak_memory
    from cogview.training.distributed import destroy_distributed, init_distributed
    from cogview.training.setup import prepare

    world = init_distributed(device, needs_group=settings.engine.name == "deepspeed")
    try:
        with tempfile.TemporaryDirectory() as folder:
            aside = replace(recipe, work=Path(folder))
            prepared = prepare(recipe, settings, world, run_folder=aside.transformer_run)
            trainer, supply = prepared.trainer, prepared.data_loader
            rows, training = supply.num_rows, settings.training
            yield Diagnosis(
                "ok",
                "stores",
                f"{rows:,} rows in {len(supply.names)}, {training.steps * training.batch_size / rows:.1f} epochs",
            )
            parameters = trainer.transformer.config.num_parameters
            yield from check_disk(recipe.transformer_run, STATE_BYTES * parameters, settings.run.keep)
            (aside.transformer_run).mkdir(parents=True)
            if world.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(world.device)
            stream = supply.batches(0)
            figures, seconds, waited = {}, 0.0, 0.0
            for step in range(2):  # the first one makes what stays
                began = time.perf_counter()
                batch = next(stream)
                waited = time.perf_counter() - began
                figures = trainer.step(step, batch)
                seconds = time.perf_counter() - began
            seen = peak_memory(world.device)
            trainer.close()
            tokens = figures["tokens"] / seconds
            hours = training.steps * seconds / 3600
            yield Diagnosis(
                "ok",
                "step",
                f"{seconds:.3g} s for {training.batch_size} rows of up to {trainer.model.config.longest_row()}, "
                f"{tokens:,.0f} tokens/s, loss {figures['loss']:.4g}; {training.steps:,} steps take about "
                f"{hours:.3g} hours",
            )
            share = waited / seconds
            yield Diagnosis(
                "ok" if share <= 0.01 else "note",
                "rows",
                f"waited {share:.1%} of the step for them",
                "" if share <= 0.01 else "set training.num_workers, the processes that read ahead, to 1 or more",
            )
            yield memory_line(prepared.memory.total, seen, world.device.type)
    finally:
        destroy_distributed()


def memory_line(predicted: int, seen: float, device_type: str) -> Diagnosis:
    """The memory that was predicted beside what was seen."""
    text = f"{format_bytes(predicted)} predicted, {format_bytes(int(seen))} seen"
    if device_type == "cpu":
        return Diagnosis("ok", "memory", f"{text} (resident, with Python and PyTorch, since this command began)")
    off = abs(predicted / max(seen, 1) - 1)
    return Diagnosis(
        "ok" if off < 0.2 else "note", "memory", text, "" if off < 0.2 else "the estimate is off by more than a fifth"
    )


def replay_nonfinite(folder: Path, device: str) -> Iterator[Diagnosis]:
    """The step that a run has kept because it was not finite, once more, from the first process's rows."""
    from cogview.training.replay import replay_dump

    yield from (Diagnosis(*found) for found in replay_dump(folder, device))
