"""From images of one's own to a model: tokenizers, stores and a transformer, trained through the protocols alone.

The images are shapes that Pillow draws, with two Chinese captions each. Nothing of the emoji world takes part.
"""

# H, W image in pixels

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from cogview.checkpoints.image_tokenizer import load_image_tokenizer
from cogview.data.builders.encode import EncodeSettings, encode_dataset
from cogview.data.image_dataset import ImageDataset, ImageExample, NamedRegion, texts
from cogview.data.store import TokenStore
from cogview.evaluation.harness import Grader, generate_images, grade_images
from cogview.modeling import config
from cogview.modeling.config import Sampling
from cogview.pipeline.cogview import CogView
from cogview.training.distributed import init_distributed
from cogview.training.recipe import Recipe
from cogview.training.run_folder import RunFolder
from cogview.training.settings import RunSettings, TransformerSettings
from cogview.training.setup import train
from cogview.training.text_tokenizer import TextTokenizerRecipe, train_text_model
from cogview.training.vqvae_recipe import VQVAERecipe
from cogview.training.vqvae_trainer import export_image_tokenizer, train_vqvae
from cogview.vqvae.model import VQVAEConfig
from cogview.vqvae.training import VQVAETrainingSettings

pytestmark = pytest.mark.slow

SHAPES = {"圆形": "ellipse", "方块": "rectangle"}
COLOURS = {"红色": (210, 40, 40), "绿色": (40, 160, 60), "蓝色": (40, 70, 200), "黄色": (240, 210, 60)}
MEANINGS = [(shape, colour) for shape in SHAPES for colour in COLOURS]
HELD_OUT = [("圆形", "蓝色"), ("方块", "黄色")]


@dataclass(frozen=True)
class DrawnShapes:
    """Every shape in every colour: an ``ImageDataset`` in memory."""

    held_out: bool = False
    side: int = 64
    is_shuffled: bool = False

    @property
    def meanings(self):
        return [meaning for meaning in MEANINGS if (meaning in HELD_OUT) == self.held_out]

    @property
    def names(self):
        return tuple(SHAPES)

    @property
    def provenance(self):
        return {"dataset": "drawn shapes", "held_out": self.held_out}

    def __len__(self):
        return len(self.meanings)

    def __getitem__(self, index):
        shape, colour = self.meanings[index]

        def render(scale: float) -> np.ndarray:
            size = round(self.side * scale)
            image = Image.new("RGB", (size, size), "white")
            draw = getattr(ImageDraw.Draw(image), SHAPES[shape])
            draw((size // 4, size // 4, 3 * size // 4 - 1, 3 * size // 4 - 1), fill=COLOURS[colour])
            return np.asarray(image)

        return ImageExample(
            identity=f"{colour}{shape}",
            captions=(f"白色背景上的{colour}{shape}", f"一个{colour}的{shape}，背景是白色的"),
            render=render,
            regions=(NamedRegion(names=(shape,), box=(0.25, 0.25, 0.75, 0.75)),),
        )


@dataclass(frozen=True)
class ColourGrade:
    everything: bool


class ColourGrader:
    """Grades an image right if its centre is nearest to the colour asked for: a ``Grader``."""

    def grade(self, image: np.ndarray, reference: str, /) -> ColourGrade:
        centre = image[28:36, 28:36].reshape(-1, 3).mean(axis=0)
        nearest = min(COLOURS, key=lambda name: np.abs(centre - COLOURS[name]).sum())
        return ColourGrade(everything=nearest == reference)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a text tokenizer, an image tokenizer and stores of drawn shapes."""
    folder = tmp_path_factory.mktemp("shapes")
    training: ImageDataset = DrawnShapes()
    held_out: ImageDataset = DrawnShapes(held_out=True)
    text_recipe = TextTokenizerRecipe(size=400, whole_names=True)
    text_tokenizer = train_text_model(folder / "text.model", text_recipe, texts(training), training.names)

    recipe = VQVAERecipe(
        training=VQVAETrainingSettings(
            steps=120, batch_size=6, warmup_steps=60, learning_rate=1e-2, revive_every=5, decay=0.9
        ),
        model=VQVAEConfig(
            channels=(16, 32, 32), encoder_blocks=(0, 0, 1), decoder_blocks=(0, 0, 1), num_codes=64, code_width=8
        ),
        run=RunSettings(save_every=0, evaluate_every=0),
    )
    run = RunFolder(folder / "image-run")
    assert train_vqvae(recipe, training, held_out, run, init_distributed("cpu")) == 0
    export_image_tokenizer(run, folder / "image")

    image_tokenizer = load_image_tokenizer(folder / "image")
    settings = EncodeSettings(text_width=24, large=True, named=True)
    for name, dataset, rows in (("store", training, 12), ("held-out-store", held_out, 4)):
        encode_dataset(folder / name, dataset, text_tokenizer, image_tokenizer, settings, rows=rows)
    return folder


def test_image_run_of_own_dataset_learns_the_shapes(work):
    lines = (work / "image-run" / "metrics.jsonl").read_text().splitlines()
    last = json.loads(lines[-1])
    assert last["validation_psnr"] > 15
    assert last["validation_images"] == 2
    with Image.open(next((work / "image-run" / "samples").glob("*.png"))) as sheet:
        assert sheet.size == (2 * 132 + 4, 2 * 132 + 4)  # two held-out shapes above their reconstructions


def test_store_of_own_dataset_has_a_row_for_each_caption_and_names_the_objects(work):
    store, held_out = TokenStore(work / "store"), TokenStore(work / "held-out-store")
    assert (len(store), len(held_out)) == (12, 4)
    assert store.header.fields == {"text": 24, "image": 64, "large": 256, "named": 64}
    assert store.header.layouts == ("generate", "caption", "upscale")
    assert store.header.provenance == {"dataset": "drawn shapes", "held_out": False}
    rows = store.read(range(12))
    assert len({row.tobytes() for row in rows["text"]}) == 12
    assert np.array_equal(rows["image"][:6], rows["image"][6:])
    named = rows["named"][0].reshape(8, 8)
    assert len(set(named[2:6, 2:6].ravel().tolist())) == 1
    assert named[2, 2] in rows["text"][0]
    assert (named[:2] == 0xFFFF).all()


def test_transformer_of_own_dataset_is_trained_graded_and_used(work, monkeypatch):
    monkeypatch.setitem(config.PRESETS, "tiny", (1, 64, 2))
    training = {"steps": 200, "batch_size": 6, "warmup_steps": 5, "learning_rate": 3e-3, "tasks": {"generate": 1}}
    sections = {
        "transformer": {
            "preset": "tiny",
            "max_positions": 96,
            "dropout": 0.0,
            "sinusoidal_positions": True,
            "training": {**training, "name_loss_weight": 0.1},
            "run": {"save_every": 0, "evaluate_every": 0},
            "precision": "float32",
        },
    }
    recipe = Recipe(path=work / "shapes.yaml", sections=sections, overrides=(), work=work)
    settings = recipe.settings(TransformerSettings, "transformer")
    assert train(recipe, settings, init_distributed("cpu"), resume=False) == 0

    run = RunFolder(work / "transformer-run")
    losses = [record["loss"] for record in map(json.loads, run.metrics.read_text().splitlines()) if "loss" in record]
    assert losses[-1] < 0.3 < 1 < losses[0]
    model = CogView.from_pretrained(run.checkpoints()[-1], device="cpu")
    asked = [(DrawnShapes()[index].captions[0], colour) for index, (_, colour) in enumerate(DrawnShapes().meanings)]
    images = generate_images(model, [text for text, _ in asked], 0, Sampling(temperature=0.1, top_k=1), 6, "shapes")
    assert [image.shape for image in images] == [(64, 64, 3)] * 6
    grader: Grader[str, ColourGrade] = ColourGrader()
    grades = grade_images(grader, images, [colour for _, colour in asked], "grading")
    assert sum(grade.everything for grade in grades) >= 3  # 1.5 by chance
