"""A program of several processes that train together in tests: jobs of a JSON list, one after the other.

    RANK=0 WORLD_SIZE=2 MASTER_ADDR=… MASTER_PORT=… python program.py FOLDER JOBS

Each job is a run on a small store: ``name``, ``engine`` (settings), ``dtype``, ``steps`` and ``until`` (where to stop),
``resume``, ``dropout``, ``attention`` (settings), and ``die`` ([rank, step]: that process kills itself there). Beside
the run, ``NAME.RANK`` gets a line of JSON for each step: its number, the loss, the samples and the update.
"""

import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cogview.checkpoints.checkpoint import Model, load_model
from cogview.cli.main import run_safely
from cogview.data.store import TokenStore
from cogview.modeling.config import AttentionConfig
from cogview.modeling.transformer import Transformer
from cogview.training.data_loader import TrainingDataLoader, TrainingStores
from cogview.training.distributed import DistributedContext, destroy_distributed, exit_process, init_distributed
from cogview.training.engines import open_engine
from cogview.training.engines.base import TransformerWithLoss
from cogview.training.examples import TrainingBatch
from cogview.training.loop import BatchSource, run_loop
from cogview.training.run_folder import RunFolder
from cogview.training.settings import EngineSettings, RunSettings, TransformerTraining
from cogview.training.trainer import TransformerTrainer

BATCH = 12  # which 1, 2 and 3 processes share


def run_job(folder: Path, job: dict[str, Any], context: DistributedContext) -> int:
    """Train a run or a part of it."""
    settings = TransformerTraining(
        steps=job["steps"],
        batch_size=BATCH,
        micro_batch_size=job.get("micro_batch_size", 3),
        warmup_steps=3,
        learning_rate=1e-3,
        tasks={"generate": 2.0, "caption": 1.0},
        nonfinite=job.get("nonfinite", "stop"),
    )
    model = new_model(folder / "model", job.get("dropout", 0.0), AttentionConfig(**job.get("attention", {})))
    run = RunFolder(folder / job["name"], context.is_main_process)

    class Recorded(TransformerTrainer):
        def step(self, step: int, batch: TrainingBatch) -> dict[str, float]:
            if job.get("die") == [context.rank, step]:
                os.kill(os.getpid(), signal.SIGKILL)
            metrics = super().step(step, batch)
            line = {"step": step, "samples": batch.samples.tolist(), **metrics}
            with (folder / f"{job['name']}.{context.rank}").open("a") as file:
                file.write(json.dumps(line) + "\n")
            return metrics

    dtype = {"float32": None, "bfloat16": torch.bfloat16}[job.get("dtype", "float32")]
    network = TransformerWithLoss(model.transformer, dtype)
    engine = open_engine(network, settings, EngineSettings(**job.get("engine", {})), context, num_threads=1)
    trainer = Recorded(model, settings, engine, draw_sheet=draw_sheet)
    stores = TrainingStores(stores={"store": TokenStore(folder / "store")})
    loader = TrainingDataLoader(stores, run.folder / "stores.jsonl", trainer.builder, context)
    try:
        return run_loop(
            trainer,
            BatchSource(batches=loader.batches, steps=job.get("until", settings.steps), batch_size=BATCH),
            run,
            RunSettings(log_every=5, save_every=job.get("save_every", 0), evaluate_every=0),
            recipe={},
            resume=job.get("resume", False),
            context=context,
        )
    finally:
        trainer.close()


def draw_sheet(model: Model, path: Path) -> None:
    """Write the logits of three ids in place of a sheet."""
    with torch.no_grad():
        logits = model.transformer(torch.tensor([[1, 2, 3]]))
    path.with_suffix(".json").write_text(json.dumps(logits[0, -1, :20].tolist()))


def new_model(folder: Path, dropout: float, attention: AttentionConfig) -> Model:
    """Return the model in ``folder`` with random weights that are the same in every process."""
    model = load_model(folder, torch.device("cpu"), torch.float32)
    torch.manual_seed(0)
    shape = replace(model.config.transformer, dropout=dropout, attention=attention)
    return replace(model, config=replace(model.config, transformer=shape), transformer=Transformer(shape))


def main() -> int:
    """Run all jobs; return the status of the first that fails, or 0."""
    return run_safely(run_jobs, "program")


def run_jobs() -> int:
    """Run all jobs in one process group."""
    folder, jobs = Path(sys.argv[1]), json.loads(sys.argv[2])
    torch.set_num_threads(1)
    np.seterr(all="ignore")
    context = init_distributed("cpu", needs_group=any(job.get("engine", {}).get("name") == "deepspeed" for job in jobs))
    try:
        status = next(filter(None, (run_job(folder, job, context) for job in jobs)), 0)
    finally:
        destroy_distributed()
    exit_process(status)
    return status


if __name__ == "__main__":
    sys.exit(main())
