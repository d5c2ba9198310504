"""A step that was not finite, looked at again from what its run has kept (``monitor.write_dump``)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from cogview.checkpoints.checkpoint import load_model
from cogview.config_io import from_mapping, read_recipe
from cogview.device import DTYPES, choose_placement
from cogview.errors import InputError
from cogview.files import read_json
from cogview.training.distributed import DistributedContext
from cogview.training.nonfinite import first_nonfinite
from cogview.training.settings import TransformerTraining
from cogview.training.trainer import TransformerTrainer


def replay_dump(folder: Path, device: str) -> Iterator[tuple[str, str, str]]:
    """What the step meets now, by the rows of each process, one after another: (status, subject, text).

    Weights, rows and what chance decides are those of the run; the engine is plain torch, in one process.
    """
    reports = sorted(folder.glob("report-*.json"))
    if not reports or not (folder / "settings.json").is_file():
        raise InputError(f"{folder} is no dump of a step: expected RUN/nonfinite/step-…, with report-0000.json in it")
    placement = choose_placement(device, "float32")
    kept = read_recipe(folder / "settings.json")
    settings = from_mapping(TransformerTraining, kept["training"], where=str(folder / "settings.json"))
    model = load_model(folder / "model", torch.device("cpu"), torch.float32)
    dtype = None if kept["dtype"] == "float32" else DTYPES[kept["dtype"]]
    trainer = TransformerTrainer(model, settings, DistributedContext(placement.device), dtype, num_threads=1)
    trainer.transformer.train()
    for path in reports:
        report = read_json(path)
        rank, size = report["rank"], report["processes"]
        with np.load(folder / f"rows-{rank:04}.npz") as rows:
            given = {name: rows[name] for name in rows.files}
        codes = given["image"].shape[1]
        share = DistributedContext(placement.device, rank, size).local_slice(settings.batch_size)
        choices = trainer.builder.plan_rows(report["step"], settings.batch_size, codes).select(share)
        batch = trainer.builder.build_batch(report["step"], given, choices, micro_batch_size=settings.micro_batch_size)
        finding = first_nonfinite(trainer.engine, trainer.to_device(batch), report["seed"])
        yield ("ok", "kept", f"step {report['step']}, process {rank}: {report['found'] or 'nothing was found there'}")
        found = f"first not finite in {finding}" if finding is not None else "everything is finite"
        yield ("problem" if finding is not None else "ok", "now", f"in {kept['dtype']} on {placement.device}: {found}")
