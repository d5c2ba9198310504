"""The model inside the package: whole, small, described, and able to draw."""

from pathlib import Path

import numpy as np
import pytest

from cogview.checkpoints.folder import file_sha256, read_things
from cogview.checkpoints.registry import find_checkpoint, known_models
from cogview.pipeline import CogView

NAME = "cogview-emoji"
MEBIBYTE = 2**20


@pytest.fixture(scope="module")
def folder() -> Path:
    return find_checkpoint(NAME)


@pytest.fixture(scope="module")
def model() -> CogView:
    return CogView.from_pretrained(NAME, device="cpu")


def test_every_file_is_listed_with_its_sum(folder):
    described = {"README.md", "samples.png"}  # for people
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} - described
    listed = known_models()[NAME].sha256
    assert files == set(listed)
    for name, expected in listed.items():
        assert file_sha256(folder / name) == expected, name


def test_it_fits_the_package(folder):
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 40 * MEBIBYTE


def test_the_card_names_everything_it_knows(folder):
    card = (folder / "README.md").read_text(encoding="utf-8")
    things = read_things(folder)
    assert len(things) >= 120
    assert not [thing.name for thing in things if thing.emoji + thing.name not in card]
    for word in ("SIL Open Font License", "Unicode License", "Apache-2.0", "emoji-cpu.yaml", "95%"):
        assert word in card


@pytest.mark.parametrize(
    ("colour", "rgb"), [("蓝色", (78, 128, 220)), ("黄色", (250, 216, 92)), ("黑色", (42, 44, 50))]
)
def test_it_draws_on_the_background_that_was_asked_for(model, colour, rgb):
    (picture,) = model.generate(f"{colour}背景上的三只狐狸", seed=7)
    assert picture.size == (64, 64)
    corners = np.asarray(picture)[[-1, -1], [0, -1]].astype(float)  # three things leave the lower corners free
    assert np.abs(corners - rgb).max() < 30


def test_prompts_of_any_length_share_a_batch(model):
    prompts = ["狐狸", "左边是一只狐狸，右边是一个红苹果，背景是绿色的"]
    together = model.generate(prompts, n=2, seed=3)
    alone = [picture for prompt in prompts for picture in model.generate(prompt, n=2, seed=3, batch_size=1)]
    for one, other in zip(together, alone, strict=True):
        assert np.array_equal(one.codes, other.codes)
        assert one.log_probability == pytest.approx(other.log_probability, abs=1e-3)
