"""A program of several processes that train a VQ-VAE together in tests: runs of ``cogview train-image``.

    RANK=0 WORLD_SIZE=2 MASTER_ADDR=… MASTER_PORT=… python vqvae_program.py RECIPE JOBS

Each job of the JSON list holds ``arguments`` of the command, ``die``, a step in which process 1 kills itself, and
``touch``, a step in which process 1 changes the pictures of a folder. The statuses are printed as a JSON list.
"""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from cogview.cli.main import main as cogview
from cogview.training import distributed
from cogview.training.vqvae_trainer import VQVAETrainer

STEP = VQVAETrainer.step


def run_job(recipe: str, job: dict[str, Any]) -> int:
    """Run one training and return its status."""

    def step(self: VQVAETrainer, number: int, batch: Any) -> dict[str, float]:
        if self.context.rank == 1 and number == job.get("die"):
            os.kill(os.getpid(), signal.SIGKILL)
        if self.context.rank == 1 and number == job.get("touch"):
            for path in Path(job["folder"]).iterdir():
                os.utime(path, ns=(1, 1))
        return STEP(self, number, batch)

    VQVAETrainer.step = step  # type: ignore[method-assign]
    return cogview(["train-image", recipe, "--device", "cpu", *job["arguments"]])


def main() -> None:
    """Run all jobs in one process group."""
    recipe, jobs = sys.argv[1], json.loads(sys.argv[2])
    distributed.exit_process = lambda status: None
    distributed.destroy_distributed = lambda: None
    print(json.dumps([run_job(recipe, job) for job in jobs]), flush=True)
    sys.stderr.flush()
    os._exit(0)  # threads of gloo may wait for a process that is gone


if __name__ == "__main__":
    main()
