"""The recipe of the 4-billion-parameter model with two of its layers, trained by DeepSpeed on one machine's processors.

Width, heads, vocabulary and rows of 1,088 positions are those of the full size, so a step, a checkpoint and going on
from it are computed by what a cluster runs. Two processes train some steps in bfloat16 with each ZeRO stage; then one
process goes on from a checkpoint of two, by another stage.

    python scripts/benchmarks/four_billion_training.py FOLDER          # needs 20 GB of memory
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import arguments
from four_billion import text_model

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "scripts" / "recipes" / "4b-8-gpus.yaml"
ROWS, STEPS = 16, 3


def make(folder: Path) -> None:
    """Write the tokenizers as a checkpoint folder, and two stores of random rows."""
    import numpy as np
    import torch

    from cogview.checkpoints.checkpoint import Model, save_model
    from cogview.checkpoints.image_tokenizer import codebook_hash
    from cogview.data.store import StoreHeader
    from cogview.data.store_writer import StoreWriter
    from cogview.modeling.config import ModelConfig, TransformerConfig
    from cogview.modeling.transformer import Transformer
    from cogview.tokenizers.text import TextTokenizer
    from cogview.tokenizers.vocabulary import Vocabulary
    from cogview.vqvae.model import VQVAE, VQVAEConfig

    torch.manual_seed(0)
    vocabulary, image_tokenizer = Vocabulary(), VQVAE(VQVAEConfig.released()).eval()
    text_tokenizer = TextTokenizer(text_model(vocabulary.num_text_pieces))
    config = ModelConfig(
        transformer=TransformerConfig(
            num_layers=1, width=32, num_heads=1, vocabulary_size=vocabulary.padded_size, max_positions=1089
        ),
        vocabulary=vocabulary,
        grid=32,
        tasks=("generate",),
        max_text=61,
        codebook_sha256=codebook_hash(image_tokenizer),
    )
    save_model(
        folder / "tokenizers",
        Model(
            config=config,
            transformer=Transformer(config.transformer),
            image_tokenizer=image_tokenizer,
            text_tokenizer=text_tokenizer,
        ),
    )
    random = np.random.default_rng(0)
    for name, count in (("store", ROWS), ("held-out", 2)):
        header = StoreHeader(
            fields={"text": 60, "image": 1024},
            grid=32,
            num_image_codes=vocabulary.num_image_codes,
            num_text_pieces=vocabulary.num_text_pieces,
            layouts=("generate",),
            codebook_sha256=config.codebook_sha256,
            text_sha256=hashlib.sha256(text_tokenizer.model_bytes).hexdigest(),
        )
        with StoreWriter(folder / name, header) as writer:
            writer.append(
                {
                    "text": random.integers(vocabulary.num_text_pieces, size=(count, 60)).astype(np.uint16),
                    "image": random.integers(vocabulary.num_image_codes, size=(count, 1024)).astype(np.uint16),
                }
            )


def train(folder: Path, work: Path, processes: int, stage: int, steps: int) -> None:
    """Train with the recipe and overrides for this machine; print a line of its cost."""
    settings = {
        "num_layers": "2",
        "tokenizers": folder / "tokenizers",
        "store": folder / "store",
        "validation_store": folder / "held-out",
        "precision": "bfloat16",
        "training.batch_size": "2",
        "training.micro_batch_size": "1",
        "training.steps": str(2 * STEPS),
        "training.warmup_steps": "1",
        "training.num_workers": "1",
        "engine": f"{{name: deepspeed, zero: {stage}, checkpointing: full, "
        "config: {zero_optimization: {reduce_bucket_size: 50000000}}}",
        "run.log_every": "1",
        "run.save_every": str(STEPS),
        "run.evaluate_every": "0",
        "run.keep": "1",
    }
    command = ["torchrun", "--nproc-per-node", str(processes), "--no-python", sys.executable, "-m", "cogview", "train"]
    command += [str(RECIPE), "--work", str(work), "--device", "cpu", "--resume", "auto"]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "PYTHONWARNINGS": "ignore", "PYTHONPATH": str(ROOT)}
    environment["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = "300"
    environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // processes))
    began = time.perf_counter()
    with (folder / "log.txt").open("a") as log:
        process = subprocess.Popen(
            command + [f"{key}={value}" for key, value in settings.items()], env=environment, stdout=log, stderr=log
        )
        metrics = work / "transformer-run" / "metrics.jsonl"
        while process.poll() is None:  # generating images of 1,024 codes is not measured: stop after the checkpoint
            time.sleep(0.5)
            done = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.is_file() else []
            if any(record["step"] == steps for record in done):
                process.terminate()
                process.wait()
    if not metrics.is_file():
        sys.exit(f"{work}: nothing was trained; {folder / 'log.txt'} says why")
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    own = [record for record in records if record["step"] > steps - STEPS and "loss" in record]
    losses = ", ".join(f"{record['loss']:.4f}" for record in own)
    seconds = min(2 / record["samples_per_second"] for record in own)
    memory = max(record["memory_bytes"] for record in own) / 1e9
    print(
        f"| {processes} | {stage} | {own[0]['step']} to {own[-1]['step']} | {losses} | {seconds:.1f} s "
        f"| {memory:.1f} GB | {time.perf_counter() - began:.0f} s |",
        flush=True,
    )


def main() -> int:
    """Write the inputs and train with each stage."""
    parser = arguments.Parser(__doc__)
    parser.add_argument("folder", type=arguments.output_folder)
    args = parser.parse_args()
    folder = args.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "tokenizers").is_dir():
        make(folder)
    print("| processes | ZeRO | steps | loss | s/step | memory of a process | in all |\n|---|---|---|---|---|---|---|")
    for stage in (1, 2, 3):
        shutil.rmtree(folder / f"zero{stage}", ignore_errors=True)
        train(folder, folder / f"zero{stage}", 2, stage, STEPS)
    train(folder, folder / "zero2", 1, 1, 2 * STEPS)
    return 0


if __name__ == "__main__":
    arguments.run_script(main)
