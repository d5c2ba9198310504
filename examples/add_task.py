"""Add a task as one row: ``mirror`` generates the mirror image of a given image.

The program registers the row, writes a token store for it, trains a tiny transformer and generates with the checkpoint.
Settings, layout, loss mask, training examples, memory plan and decoding are derived from the row.

python examples/add_task.py --steps 300 -o runs/mirror
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cogview import CogView, GeneratedImage, GenerationRequest, InputError, Task, register_task
from cogview.data.store import StoreHeader
from cogview.data.store_writer import StoreWriter, pad_text
from cogview.tokenizers.tasks import GRID, RESTART_POSITIONS, TASKS, Blank, ImageElement, TextElement
from cogview.training.distributed import init_distributed
from cogview.training.recipe import Recipe
from cogview.training.settings import TransformerSettings
from cogview.training.setup import train
from cogview.vqvae.codec import codebook_sha256

MIRROR = Task(
    name="mirror",
    layout=(
        *("[ROI1]", TextElement("text"), GRID, "[BOI1]", ImageElement("before"), "[EOI1]", RESTART_POSITIONS),
        *("[ROI2]", "[POS0]", GRID, "[BOI2]", Blank(ImageElement("image", loss=True)), "[EOI2]"),
    ),
    inputs=("prompt", "image"),
    output="image",
    activity="mirroring",
)
PROMPT = "左右"
TEXT_WIDTH = 8


def write_store(path: Path, model: CogView, codes: np.ndarray) -> None:
    """Write a row for each image: the prompt, its codes (N, G, G) and those of the mirrored image."""
    grid = model.config.grid
    header = StoreHeader(
        fields={"text": TEXT_WIDTH, "before": grid**2, "image": grid**2},
        grid=grid,
        num_image_codes=model.vocabulary.num_image_codes,
        num_text_pieces=model.text_tokenizer.size,
        layouts=(MIRROR.name,),
        codebook_sha256=codebook_sha256(model.image_tokenizer.codebook),
        text_sha256=hashlib.sha256(model.text_tokenizer.model_bytes).hexdigest(),
    )
    text = pad_text([model.text_tokenizer.encode(PROMPT)] * len(codes), TEXT_WIDTH)
    with StoreWriter(path, header) as writer:
        before, after = codes.reshape(len(codes), -1), codes[:, :, ::-1].reshape(len(codes), -1)
        writer.append({"text": text, "before": before, "image": after})


def train_mirror(work: Path, steps: int) -> Path:
    """Train a transformer of one layer for the task; return its checkpoint."""
    section = {
        "num_layers": 1,
        "max_positions": 128,
        "dropout": 0.0,
        "branch_norm_init": 0.05,
        "sinusoidal_positions": True,
        "tokenizers": "cogview-emoji",
        "store": str(work / "store"),
        "validation_store": str(work / "held-out-store"),
        "training": {"steps": steps, "batch_size": 8, "warmup_steps": 1, "tasks": {MIRROR.name: 1.0}},
        "run": {"log_every": 10},
        "sampling": {"top_k": 1},
    }
    recipe = Recipe(path=Path(__file__), sections={"transformer": section}, overrides=(), work=work)
    settings = recipe.settings(TransformerSettings, "transformer")
    train(recipe, settings, init_distributed("cpu"), resume=False)
    return work / "transformer-run" / "checkpoints" / f"step-{steps:08d}"


def run(steps: int, output: Path) -> None:
    """Register the task, train for it, and generate the mirror image of a held-out one."""
    if MIRROR.name not in TASKS:
        register_task(MIRROR)
    tokenizers = CogView.from_pretrained("cogview-emoji")
    grid = tokenizers.config.grid
    codes = np.random.default_rng(0).integers(0, 8, (512, grid, grid))  # random images of eight codes
    write_store(output / "store", tokenizers, codes[16:])
    write_store(output / "held-out-store", tokenizers, codes[:16])

    model = CogView.from_pretrained(train_mirror(output, steps))
    request = GenerationRequest(task=MIRROR.name, prompt=PROMPT, seed=0, codes=codes[0])
    (image,) = model.run([request])
    assert isinstance(image, GeneratedImage)
    right = float((image.codes == codes[0][:, ::-1]).mean())
    image.save(output / "mirrored.png")
    print(f"{output / 'mirrored.png'}: {right:.0%} of the codes are right; chance is 12%")


def main(argv: Sequence[str] | None = None) -> int:
    """Register the task, train for it and generate; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300, help="training steps (default: 300)")
    parser.add_argument("-o", "--output", type=Path, default=Path("runs/mirror"), help="folder (default: runs/mirror)")
    args = parser.parse_args(argv)
    try:
        run(args.steps, args.output)
    except (InputError, OSError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
