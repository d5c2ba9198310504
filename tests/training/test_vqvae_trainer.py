"""The VQ-VAE's run on the scenes of a world: its batches, its folder, exact resuming, its figures."""

# B batch, H W pixels

import math
from functools import partial

import pytest
import torch
from PIL import Image

from cogview.checkpoints.image_tokenizer import load_image_tokenizer
from cogview.errors import InputError
from cogview.training import vqvae_trainer as module
from cogview.training.loop import RunFolder, RunSettings, run_loop
from cogview.training.vqvae_trainer import (
    SceneImages,
    VQVAERun,
    held_out_batches,
    scene_batches,
)
from cogview.vqvae.codec import to_float
from cogview.vqvae.model import VQVAEConfig
from cogview.vqvae.training import VQVAETrainingSettings

CONFIG = VQVAEConfig(channels=(4, 8, 8), encoder_blocks=(0, 0, 1), decoder_blocks=(0, 0, 1), num_codes=16, code_width=4)
TRAINING = VQVAETrainingSettings(steps=8, batch_size=2, warmup_steps=3, revive_every=2, revive_below=0.3, decay=0.5)
CPU = torch.device("cpu")


@pytest.fixture
def few_held_out(monkeypatch):
    """Judge on few pictures."""
    monkeypatch.setattr(module, "held_out_batches", partial(held_out_batches, count=6, batch_size=4))


def test_batches_are_the_worlds_scenes_in_order_from_any_step(make_tiny_world):
    world = make_tiny_world(jitter=3)
    batches = list(scene_batches(world, seed=5, batch_size=3, first=0, last=4, workers=0))
    assert [tuple(batch.shape) for batch in batches] == [(3, 3, 64, 64)] * 4
    for number, image in enumerate(torch.cat(batches)):
        assert torch.equal(image, to_float(world.render(world.sample(5, number), number)))
    resumed = list(scene_batches(world, seed=5, batch_size=3, first=2, last=4, workers=1))
    assert torch.equal(torch.cat(resumed), torch.cat(batches[2:]))


def test_held_out_pictures_are_of_held_out_scenes(make_tiny_world):
    world = make_tiny_world()
    images = torch.cat(list(held_out_batches(world, count=5, batch_size=2)))
    assert len(images) == 5
    for number, image in enumerate(images):
        scene = world.sample(1, number, held_out=True)
        assert scene.held_out
        assert torch.equal(image, to_float(world.render(scene, number)))
    assert torch.equal(SceneImages(world, 1, held_out=True)[3], images[3])


def train(world, folder, last: int, resume: bool = False) -> VQVAERun:
    subject = VQVAERun(world, CONFIG, TRAINING, CPU, None)
    status = run_loop(
        subject,
        lambda step: scene_batches(world, 0, TRAINING.batch_size, step, TRAINING.steps, 0),
        RunFolder(folder),
        RunSettings(log_every=1, save_every=2, evaluate_every=4),
        recipe={},
        steps=last,
        batch_size=TRAINING.batch_size,
        resume=resume,
    )
    assert status == 0
    return subject


@pytest.mark.parametrize("half", [2, 5])
def test_a_resumed_run_equals_one_that_never_stopped(make_tiny_world, tmp_path, few_held_out, half):
    world = make_tiny_world()
    whole = train(world, tmp_path / "whole", 8)
    train(world, tmp_path / "halves", half)
    second = train(world, tmp_path / "halves", 8, resume=True)
    for name, tensor in whole.trainer.model.state_dict().items():
        assert torch.equal(tensor, second.trainer.model.state_dict()[name]), name
    assert torch.equal(whole.trainer.model.quantizer.ema_cluster_size, second.trainer.model.quantizer.ema_cluster_size)

    stored = load_image_tokenizer(RunFolder(tmp_path / "halves").checkpoints()[-1] / "image")
    images = next(held_out_batches(world, count=4))
    assert torch.equal(stored.encode(images), whole.trainer.model.eval().encode(images))
    assert stored.config == CONFIG


def test_evaluation_gives_held_out_figures_and_a_sheet(make_tiny_world, tmp_path, few_held_out):
    subject = VQVAERun(make_tiny_world(), CONFIG, TRAINING, CPU, None)
    figures = subject.evaluate(3, tmp_path)
    assert set(figures) == {f"held_out_{name}" for name in ("psnr", "codes_used", "perplexity", "images")}
    assert figures["held_out_images"] == 6
    with Image.open(tmp_path / "step-00000003.png") as sheet:
        assert sheet.size == (12 * 132 + 4, 2 * 132 + 4)  # scenes above, reconstructions below


def test_a_gradient_that_is_not_finite_is_one_line_for_the_user(make_tiny_world):
    subject = VQVAERun(make_tiny_world(), CONFIG, TRAINING, CPU, None)
    with pytest.raises(InputError, match="gradient of step 2 is not finite"):
        subject.step(2, torch.full((1, 3, 64, 64), math.nan))


def test_larger_scenes_are_shown_in_parts_on_the_grid_of_codes(make_tiny_world):
    world = make_tiny_world()
    images = SceneImages(world, 3, scales=(1, 2))
    corners = set()
    for number in range(24):
        scene, image = world.sample(3, number), images[number]
        assert image.shape == (3, 64, 64)
        if number % 2 == 0:
            assert torch.equal(image, to_float(world.render(scene, number)))
            continue
        whole = to_float(world.render(scene, number, scale=2))
        found = {
            (top, left)
            for top in range(0, 65, 8)
            for left in range(0, 65, 8)
            if torch.equal(image, whole[:, top : top + 64, left : left + 64])
        }
        assert found
        corners |= found
    assert len(corners) > 9
    assert torch.equal(next(scene_batches(world, 3, 24, 0, 1, 0, (1, 2)))[5], images[5])
