"""Train a model from scratch on captioned images of a folder: text tokenizer, VQ-VAE, token store, transformer.

Each image NAME.png has its captions in NAME.txt, one per line. Without a folder the program draws landscapes, such as
黄色天空下的绿色山, and trains on these.

python examples/train_on_images.py pictures --steps 2000 -o runs/pictures
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from cogview import CogView, InputError
from cogview.data.builders.encode import EncodeSettings, encode_dataset
from cogview.data.image_dataset import ImageDataset, ImageExample, texts
from cogview.image_io.reading import fit, read_image
from cogview.training.distributed import init_distributed
from cogview.training.recipe import Recipe
from cogview.training.run_folder import RunFolder
from cogview.training.settings import TransformerSettings
from cogview.training.setup import train
from cogview.training.text_tokenizer import TextTokenizerRecipe, train_text_model
from cogview.training.vqvae_recipe import VQVAERecipe
from cogview.training.vqvae_trainer import export_image_tokenizer, train_vqvae

SIDE = 64  # pixels: 8 x 8 codes
COLOURS = {"红色": "crimson", "黄色": "gold", "绿色": "seagreen", "蓝色": "royalblue", "白色": "white"}


class CaptionedFolder:
    """Images of a folder as an ``ImageDataset``; every eighth image is held out."""

    names: Sequence[str] = ()
    side = SIDE
    is_shuffled = False

    def __init__(self, folder: Path, *, held_out: bool) -> None:
        paths = sorted(folder.glob("*.png"))
        if len(paths) < 2:
            raise InputError(
                f"{folder} has {len(paths)} images NAME.png, expected at least one to train on and one held out"
            )
        for path in paths:
            if not path.with_suffix(".txt").is_file():
                raise InputError(f"{path} has no captions: expected {path.with_suffix('.txt').name} beside it")
        self.paths = [path for number, path in enumerate(paths) if (number % 8 == 0) == held_out]
        self.provenance: Mapping[str, Any] = {"folder": str(folder), "held_out": held_out}

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> ImageExample:
        path = self.paths[index]
        pixels, _ = fit(read_image(path), SIDE)
        lines = read_captions(path.with_suffix(".txt"))
        return ImageExample.from_pixels(pixels, side=SIDE, identity=path.name, captions=tuple(lines))


def read_captions(path: Path) -> list[str]:
    """Return the captions of a file, one per line; InputError for a file without any."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8: {error}") from None
    if not lines:
        raise InputError(f"{path} is empty, expected a caption on each line")
    return lines


def draw_landscapes(folder: Path) -> None:
    """Draw a mountain for each pair of colours and each of four shapes, and write its caption beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    for (sky, mountain), peak in itertools.product(itertools.permutations(COLOURS, 2), range(4)):
        image = Image.new("RGB", (SIDE, SIDE), COLOURS[sky])
        left = 4 + 8 * peak
        ImageDraw.Draw(image).polygon([(left, 56), (left + 16, 16), (left + 32, 56)], fill=COLOURS[mountain])
        path = folder / f"{sky}-{mountain}-{peak}.png"
        image.save(path)
        path.with_suffix(".txt").write_text(f"{sky}天空下的{mountain}山\n{mountain}的山，{sky}的天\n", encoding="utf-8")


def train_tokenizers(recipe: Recipe, training: ImageDataset, held_out: ImageDataset) -> None:
    """Train the text tokenizer and the VQ-VAE, and encode both splits into stores."""
    train_text_model(recipe.text_model, recipe.settings(TextTokenizerRecipe, "text"), texts(training))
    run, context = RunFolder(recipe.image_run), init_distributed("cpu")
    train_vqvae(recipe.settings(VQVAERecipe, "image"), training, held_out, run, context)
    export_image_tokenizer(run, recipe.image_tokenizer)
    tokenizers = recipe.open_text_tokenizer(), recipe.open_image_tokenizer()
    for path, split in ((recipe.held_out_store, held_out), (recipe.store, training)):
        encode_dataset(path, split, *tokenizers, EncodeSettings(text_width=24), rows=2 * len(split))


def make_recipe(work: Path, steps: int) -> Recipe:
    """Return the settings of all steps, as a YAML recipe would hold them."""
    small = {"channels": [16, 32, 64], "encoder_blocks": [0, 0, 1], "decoder_blocks": [0, 0, 1], "num_codes": 256}
    schedule = {"steps": steps, "batch_size": 16, "warmup_steps": max(1, steps // 20)}
    transformer = {
        "num_layers": 2,
        "max_positions": 128,
        "dropout": 0.0,
        "branch_norm_init": 0.05,
        "training": {**schedule, "tasks": {"generate": 2, "caption": 1}},
        "sampling": {"temperature": 0.5, "top_k": 5},
    }
    sections = {"text": {"size": 300}, "image": {"training": schedule, "model": small}, "transformer": transformer}
    return Recipe(path=Path(__file__), sections=sections, overrides=(), work=work)


def run(folder: Path | None, steps: int, output: Path) -> None:
    """Train all parts and generate an image."""
    if folder is None:
        folder = output / "landscapes"
        draw_landscapes(folder)
    training, held_out = CaptionedFolder(folder, held_out=False), CaptionedFolder(folder, held_out=True)
    recipe = make_recipe(output, steps)
    train_tokenizers(recipe, training, held_out)
    train(recipe, recipe.settings(TransformerSettings, "transformer"), init_distributed("cpu"), resume=False)

    model = CogView.from_pretrained(recipe.transformer_run / "checkpoints" / f"step-{steps:08d}")
    prompt = held_out[0].captions[0]
    model.generate(prompt, seed=0)[0].save(output / "generated.png")
    print(f"{output / 'generated.png'}: {prompt}")


def main(argv: Sequence[str] | None = None) -> int:
    """Train all parts and generate an image; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="images with captions (default: drawn landscapes)")
    parser.add_argument("--steps", type=int, default=400, help="training steps of each part (default: 400)")
    parser.add_argument("-o", "--output", type=Path, default=Path("runs/images"), help="folder (default: runs/images)")
    args = parser.parse_args(argv)
    try:
        run(args.folder, args.steps, args.output)
    except (InputError, OSError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
