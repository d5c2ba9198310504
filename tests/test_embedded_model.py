"""The model inside the package: its files, size and card, and each of its tasks."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cogview.checkpoints.checkpoint import read_things
from cogview.checkpoints.registry import load_registry, resolve_checkpoint
from cogview.files import file_sha256
from cogview.pipeline.cogview import CogView

NAME = "cogview-emoji"
MEBIBYTE = 2**20
SHEETS = ("captions", "reranking", "upscaling", "completion")


@pytest.fixture(scope="module")
def folder() -> Path:
    return resolve_checkpoint(NAME)


@pytest.fixture(scope="module")
def model() -> CogView:
    return CogView.from_pretrained(NAME, device="cpu")


def test_embedded_model_lists_every_file_with_its_checksum(folder):
    described = {"README.md", "gate.json", "samples.png", *(f"{task}.png" for task in SHEETS)}  # for people
    assert all((folder / name).is_file() for name in described)
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} - described
    listed = load_registry()[NAME].sha256
    assert files == set(listed)
    for name, expected in listed.items():
        assert file_sha256(folder / name) == expected, name


def test_embedded_model_fits_the_package(folder):
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 40 * MEBIBYTE


def test_embedded_model_card_names_every_object(folder):
    card = (folder / "README.md").read_text(encoding="utf-8")
    things = read_things(folder)
    assert len(things) >= 120
    assert not [thing.name for thing in things if thing.emoji + thing.name not in card]
    for word in ("grammar.json", "SIL Open Font License", "Unicode License", "Apache-2.0", "emoji-cpu.yaml", "95%"):
        assert word in card


@pytest.mark.parametrize(
    ("colour", "rgb"), [("蓝色", (78, 128, 220)), ("黄色", (250, 216, 92)), ("黑色", (42, 44, 50))]
)
def test_embedded_model_generates_the_requested_background(model, colour, rgb):
    (picture,) = model.generate(f"{colour}背景上的三只狐狸", seed=7)
    assert picture.size == (64, 64)
    corners = np.asarray(picture)[[-1, -1], [0, -1]].astype(float)  # three things leave the lower corners free
    assert np.abs(corners - rgb).max() < 30


def test_embedded_model_generates_the_same_in_a_mixed_batch(model):
    prompts = ["狐狸", "左边是一只狐狸，右边是一个红苹果，背景是绿色的"]
    together = model.generate(prompts, n=2, seed=3)
    alone = [picture for prompt in prompts for picture in model.generate(prompt, n=2, seed=3, batch_size=1)]
    for one, other in zip(together, alone, strict=True):
        assert np.array_equal(one.codes, other.codes)
        assert one.log_probability == pytest.approx(other.log_probability, abs=1e-3)


def test_embedded_model_generates_the_same_from_a_converted_prompt(model, caplog):
    """An emoji and a traditional character are the names and characters that the model was trained on."""
    plain, *converted = model.generate(["三只狐狸", "三只🦊", "三隻狐狸"], seed=7)
    assert all(np.array_equal(image.codes, plain.codes) for image in converted)
    assert [record.getMessage() for record in caplog.records] == [
        "“三只🦊”: 🦊 is read as 狐狸",
        "“三隻狐狸”: 隻 is read as 只",
    ]
    assert "model_prompt" not in plain.metadata(NAME)
    for image, prompt in zip(converted, ("三只🦊", "三隻狐狸"), strict=True):
        assert image.prompt == prompt
        metadata = image.metadata(NAME)
        assert (metadata["prompt"], metadata["model_prompt"]) == (prompt, "三只狐狸")


def test_embedded_model_captions_its_own_images(model):
    pictures = model.generate(["蓝色背景上的三只狐狸", "一个红苹果，黄色背景"], seed=7)
    foxes, apple = (captions[0].text for captions in model.caption(pictures))
    assert "狐狸" in foxes
    assert "三" in foxes
    assert "蓝" in foxes
    assert "苹果" in apple
    assert "黄" in apple
    assert "," not in foxes + apple  # Chinese writes ，
    assert foxes == "三只狐狸，背景是蓝色的"


def test_embedded_model_scores_the_right_text_highest(model):
    pictures = model.generate("左边是狐狸，右边是红苹果，绿色背景", n=2, seed=7)
    texts = [
        "左边是狐狸，右边是红苹果，绿色背景",
        "左边是红苹果，右边是狐狸，绿色背景",
        "左边是狐狸，右边是红苹果，蓝色背景",
    ]
    right, *wrong = ([score.log_probability for score in model.score(pictures, text)] for text in texts)
    assert all(good > other for others in wrong for good, other in zip(right, others, strict=True))


def test_embedded_model_upscale_preserves_the_image(model):
    (small,) = model.generate("蓝色背景上的一只狐狸", seed=7)
    (large,) = model.upscale([small], small.prompt, seed=7)
    assert large.size == (128, 128)
    reduced = np.asarray(large.resize(small.size, Image.Resampling.BOX)).astype(float)
    assert np.sqrt(np.square(reduced - np.asarray(small)).mean()) < 20  # of 255: PSNR above 22 dB


def test_embedded_model_completes_the_kept_rows(model):
    (picture,) = model.generate("蓝色背景上的一只狐狸", seed=7)
    (completed,) = model.complete([picture], "蓝色背景上的一只狐狸", rows=4, seed=8)
    assert np.array_equal(completed.codes[:4], picture.codes[:4])
    lower = [np.asarray(image)[40:].astype(float) for image in (picture, completed)]
    assert np.sqrt(np.square(lower[0] - lower[1]).mean()) < 40  # the lower half of the same object, on the same blue


def test_embedded_model_knows_which_images_it_cannot_see(model):
    """An image from its world passes, also one that was saved; a photo, noise and a foreign colour do not."""
    (own,) = model.generate("蓝色背景上的一只狐狸", seed=7)
    assert model.image_warning(own) is None
    assert model.image_warning(Image.fromarray(np.asarray(own))) is None
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8))
    waves = Image.radial_gradient("L").rotate(30).convert("RGB")  # dark, light and smooth, as a photo
    for image in (noise, waves, Image.new("RGB", (1, 1), "red")):
        warning = model.image_warning(image)
        assert warning.startswith("unlike the images that cogview-emoji was trained on: its reconstruction has ")
        assert warning.endswith(" dB, 99% of theirs at least 24.5 dB")


def test_embedded_model_logs_an_image_that_it_cannot_see(model, caplog):
    """The Python methods log the line that the commands print, once for each image."""
    image = Image.new("RGB", (64, 64), "red")
    model.caption(image)
    model.score(image, "一个红苹果")
    [record] = [record for record in caplog.records if "unlike" in record.getMessage()]
    assert record.levelname == "WARNING"
    assert record.getMessage().startswith("images[0]: unlike the images that cogview-emoji was trained on: ")


def test_tasks_on_a_cpu_import_no_compiler():
    """Hold the start-up time: torch._dynamo takes a second to import, and random numbers on meta import it."""
    lines = (
        "import sys",
        "from cogview import CogView",
        f"model = CogView.from_pretrained({NAME!r}, device='cpu')",
        "(image,) = model.generate('一个红苹果', seed=1)",
        "model.caption(image, seed=1)",
        "model.rerank([image], '一个红苹果')",
        "model.upscale(image, seed=1)",
        "print(sorted({'torch._dynamo', 'torch._inductor', 'sympy'} & set(sys.modules)))",
    )
    process = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert process.stdout.strip() == "[]"
