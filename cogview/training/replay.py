"""Replay of a step that was not finite, from the dump that its run has written (``nonfinite.write_dump``)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from cogview.checkpoints.checkpoint import load_model
from cogview.config_io import from_mapping
from cogview.device import DTYPES, choose_placement
from cogview.errors import InputError
from cogview.input_files import read_arrays
from cogview.plain_data import read_json
from cogview.training.distributed import DistributedContext
from cogview.training.engines import open_engine
from cogview.training.engines.base import TransformerWithLoss
from cogview.training.nonfinite import first_nonfinite
from cogview.training.settings import EngineSettings, TransformerTraining
from cogview.training.trainer import TransformerTrainer


@dataclass(frozen=True, kw_only=True)
class _DumpSettings:
    """Content of ``settings.json``."""

    training: TransformerTraining
    dtype: Literal["float32", "bfloat16", "float16"]


def replay_dump(folder: Path, device: str) -> Iterator[tuple[str, str, str]]:
    """Compute the step of a dump again, with the rows of one process after another.

    Weights, rows and random decisions are those of the run; the engine is plain torch in one process.

    Args:
        folder: The dump, such as ``RUN/nonfinite/step-00000017``.
        device: Device to compute on, as for ``--device``.

    Yields:
        Status (``ok`` or ``problem``), subject and text of each finding.

    Raises:
        InputError: The folder is no dump, or a file of it is damaged.
    """
    reports = sorted(folder.glob("report-*.json"))
    if not reports or not (folder / "settings.json").is_file():
        raise InputError(f"{folder} is no dump of a step: expected RUN/nonfinite/step-…, with report-0000.json in it")
    placement = choose_placement(device, "float32")
    stored = from_mapping(_DumpSettings, read_json(folder / "settings.json"), where=str(folder / "settings.json"))
    settings = stored.training
    model = load_model(folder / "model", torch.device("cpu"), torch.float32, allow_nonfinite=True)
    dtype = None if stored.dtype == "float32" else DTYPES[stored.dtype]
    network = TransformerWithLoss(model.transformer, dtype)
    engine = open_engine(network, settings, EngineSettings(), DistributedContext(placement.device), num_threads=1)
    trainer = TransformerTrainer(model, settings, engine)
    trainer.transformer.train()
    for path in reports:
        report = _read_report(path)
        rank, size = report["rank"], report["processes"]
        rows = read_arrays(folder / f"rows-{rank:04}.npz")
        if any(array.ndim != 2 for array in rows.values()) or not {"text", "image"} <= rows.keys():
            raise InputError(f"{folder / f'rows-{rank:04}.npz'} is damaged: expected tables of text and image ids")
        local = DistributedContext(placement.device, rank, size).local_slice(settings.batch_size)
        plan = trainer.builder.plan_rows(report["step"], settings.batch_size, rows["image"].shape[1]).select(local)
        batch = trainer.builder.build_batch(report["step"], rows, plan)
        finding = first_nonfinite(engine, trainer.targets.evenly_weighted(batch), report["seed"])
        yield ("ok", "kept", f"step {report['step']}, process {rank}: {report['found'] or 'nothing was found there'}")
        found = f"first not finite in {finding}" if finding is not None else "everything is finite"
        text = f"in {stored.dtype} on {placement.device}: {found}"
        yield ("problem" if finding is not None else "ok", "now", text)


def _read_report(path: Path) -> dict[str, Any]:
    """Return the report of one process in a dump; raise InputError if a number is missing or damaged."""
    report = read_json(path)
    for name in ("step", "rank", "processes", "seed"):
        value = report.get(name) if isinstance(report, dict) else None
        if type(value) is not int or not 0 <= value < 1 << 63:
            raise InputError(f"{path} is damaged: {name} must be a whole number from 0 on")
    if not report["rank"] < report["processes"]:
        raise InputError(f"{path} is damaged: process {report['rank']} of {report['processes']}")
    return {"found": None, **report}
