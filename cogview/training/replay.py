"""Replay of a step that was not finite, from the dump that its run has written (``nonfinite.write_dump``)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from cogview.checkpoints.checkpoint import load_model
from cogview.config_io import from_mapping, read_recipe
from cogview.device import DTYPES, choose_placement
from cogview.errors import InputError
from cogview.plain_data import read_json
from cogview.training.distributed import DistributedContext
from cogview.training.engines import open_engine
from cogview.training.engines.base import TransformerWithLoss
from cogview.training.nonfinite import first_nonfinite
from cogview.training.settings import EngineSettings, TransformerTraining
from cogview.training.trainer import TransformerTrainer


def replay_dump(folder: Path, device: str) -> Iterator[tuple[str, str, str]]:
    """Compute the step of a dump again, with the rows of one process after another.

    Weights, rows and random decisions are those of the run; the engine is plain torch in one process.

    Args:
        folder: The dump, such as ``RUN/nonfinite/step-00000017``.
        device: Device to compute on, as for ``--device``.

    Yields:
        Status (``ok`` or ``problem``), subject and text of each finding.

    Raises:
        InputError: The folder is no dump.
    """
    reports = sorted(folder.glob("report-*.json"))
    if not reports or not (folder / "settings.json").is_file():
        raise InputError(f"{folder} is no dump of a step: expected RUN/nonfinite/step-…, with report-0000.json in it")
    placement = choose_placement(device, "float32")
    stored = read_recipe(folder / "settings.json")
    settings = from_mapping(TransformerTraining, stored["training"], where=str(folder / "settings.json"))
    model = load_model(folder / "model", torch.device("cpu"), torch.float32, allow_nonfinite=True)
    dtype = None if stored["dtype"] == "float32" else DTYPES[stored["dtype"]]
    network = TransformerWithLoss(model.transformer, dtype)
    engine = open_engine(network, settings, EngineSettings(), DistributedContext(placement.device), num_threads=1)
    trainer = TransformerTrainer(model, settings, engine)
    trainer.transformer.train()
    for path in reports:
        report = read_json(path)
        rank, size = report["rank"], report["processes"]
        with np.load(folder / f"rows-{rank:04}.npz") as arrays:
            rows = {name: arrays[name] for name in arrays.files}
        local = DistributedContext(placement.device, rank, size).local_slice(settings.batch_size)
        plan = trainer.builder.plan_rows(report["step"], settings.batch_size, rows["image"].shape[1]).select(local)
        batch = trainer.builder.build_batch(report["step"], rows, plan)
        finding = first_nonfinite(engine, trainer.targets.evenly_weighted(batch), report["seed"])
        yield ("ok", "kept", f"step {report['step']}, process {rank}: {report['found'] or 'nothing was found there'}")
        found = f"first not finite in {finding}" if finding is not None else "everything is finite"
        text = f"in {stored['dtype']} on {placement.device}: {found}"
        yield ("problem" if finding is not None else "ok", "now", text)
