"""The VQ-VAE trainer: its images, the schedule of the codebook, exact resuming, its checkpoints and metrics."""

# B batch, H W pixels

import io
import math
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from cogview.checkpoints.finite import NonFiniteWeightsError
from cogview.checkpoints.image_tokenizer import load_image_tokenizer
from cogview.data.image_dataset import ImageExample
from cogview.emoji.datasets import SceneDataset
from cogview.errors import InputError
from cogview.training.distributed import DistributedContext
from cogview.training.loop import BatchSource, run_loop
from cogview.training.run_folder import RunFolder
from cogview.training.settings import RunSettings
from cogview.training.trainer_state import StateMismatchError
from cogview.training.vqvae_images import TrainingImages, held_out_batches, training_batches
from cogview.training.vqvae_initial import InitialVQVAE
from cogview.training.vqvae_recipe import VQVAERecipe
from cogview.training.vqvae_trainer import VQVAETrainer, export_image_tokenizer, train_vqvae
from cogview.vqvae.codec import to_float
from cogview.vqvae.model import VQVAEConfig
from cogview.vqvae.quantizer import RENAMED_AVERAGES
from cogview.vqvae.training import VQVAETrainingSettings, evaluate_vqvae

CONFIG = VQVAEConfig(channels=(4, 8, 8), encoder_blocks=(0, 0, 1), decoder_blocks=(0, 0, 1), num_codes=16, code_width=4)
TRAINING = VQVAETrainingSettings(steps=8, batch_size=2, warmup_steps=3, revive_every=2, revive_below=0.3, decay=0.5)
CPU = DistributedContext(torch.device("cpu"))
STEP_CONFIG = VQVAEConfig(
    channels=(8, 16, 16), encoder_blocks=(0, 0, 1), decoder_blocks=(0, 1, 1), num_codes=32, code_width=4
)
STEP_SETTINGS = VQVAETrainingSettings(
    steps=12, batch_size=4, warmup_steps=4, revive_every=3, revive_below=0.2, decay=0.5
)


def squares(step: int, size: int = 4) -> torch.Tensor:
    """Coloured squares on coloured grounds, a function of the step."""
    generator = torch.Generator().manual_seed(step)
    images = torch.rand(size, 3, 1, 1, generator=generator).expand(size, 3, 32, 32).clone()
    images[:, :, 8:24, 8:24] = torch.rand(size, 3, 1, 1, generator=generator)
    return images


def run(trainer: VQVAETrainer, first: int, last: int) -> list[dict[str, float]]:
    return [trainer.step(step, squares(step)) for step in range(first, last)]


@pytest.mark.parametrize("half", [3, 4, 7], ids=["in the warm-up", "where the codebook starts", "after it"])
def test_vqvae_trainer_resumes_exactly(half):
    whole = VQVAETrainer(STEP_CONFIG, STEP_SETTINGS, CPU)
    metrics = run(whole, 0, 12)
    assert sum(step["revived"] for step in metrics) > 0  # randomness took part

    first = VQVAETrainer(STEP_CONFIG, STEP_SETTINGS, CPU)
    run(first, 0, half)
    file = io.BytesIO()
    torch.save(first.state(), file)
    file.seek(0)
    torch.manual_seed(99)
    second = VQVAETrainer(
        STEP_CONFIG, VQVAETrainingSettings(**{**vars(STEP_SETTINGS), "seed": 5}), CPU
    )  # other weights to begin with
    second.settings = STEP_SETTINGS
    second.load_state(torch.load(file, weights_only=True))
    assert run(second, half, 12) == metrics[half:]
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, second.model.state_dict()[name]), name
    assert torch.equal(whole.model.quantizer.ema_cluster_size, second.model.quantizer.ema_cluster_size)
    assert torch.equal(whole.model.quantizer.ema_sum, second.model.quantizer.ema_sum)


def test_vqvae_trainer_load_names_the_tensor_that_is_not_finite(tmp_path):
    """A resumed run stopped one step later, at a gradient that was not finite."""
    trainer = VQVAETrainer(STEP_CONFIG, STEP_SETTINGS, CPU)
    run(trainer, 0, 4)
    state = trainer.state()
    state["optimizer"]["state"][3]["exp_avg"][0] = torch.inf
    path = tmp_path / "trainer.pt"
    torch.save(state, path)
    with pytest.raises(NonFiniteWeightsError, match=rf"^{path}: optimizer\.state\.3\.exp_avg has \d+ of "):
        trainer.load(tmp_path)
    path.write_bytes(b"\x80\x02.")
    with pytest.raises(InputError, match=f"^{path} is damaged: "):
        trainer.load(tmp_path)


def test_vqvae_trainer_load_distinguishes_damage_from_another_architecture(tmp_path):
    trainer = VQVAETrainer(STEP_CONFIG, STEP_SETTINGS, CPU)
    path = tmp_path / "trainer.pt"
    torch.save({**trainer.state(), "model": {}}, path)
    with pytest.raises(StateMismatchError, match="Missing key"):
        trainer.load(tmp_path)
    torch.save({"model": trainer.model.state_dict()}, path)
    with pytest.raises(InputError, match=f"^{path} is damaged: .*optimizer.* is missing or wrong$"):
        trainer.load(tmp_path)


def test_vqvae_trainer_loads_former_names_of_the_averages():
    """The state of a run that an earlier version began."""
    first, second = VQVAETrainer(STEP_CONFIG, STEP_SETTINGS, CPU), VQVAETrainer(STEP_CONFIG, STEP_SETTINGS, CPU)
    run(first, 0, 6)
    state = first.state()
    for old, name in RENAMED_AVERAGES.items():
        state[old] = state.pop(name)
    second.load_state(state)
    assert first.model.quantizer.ema_sum.any()
    for name in RENAMED_AVERAGES.values():
        assert torch.equal(second.model.quantizer.get_buffer(name), first.model.quantizer.get_buffer(name)), name


def test_vqvae_trainer_initializes_the_codebook_after_the_warm_up():
    trainer = VQVAETrainer(STEP_CONFIG, STEP_SETTINGS, CPU)
    noise = trainer.model.quantizer.codebook.clone()
    assert [metrics["commitment"] for metrics in run(trainer, 0, 3)] == [0, 0, 0]
    assert torch.equal(trainer.model.quantizer.codebook, noise)
    run(trainer, 3, 4)
    codebook = trainer.model.quantizer.codebook
    assert not torch.isclose(codebook, noise).all(dim=1).any()
    torch.testing.assert_close(codebook.norm(dim=1), torch.ones(32))
    assert trainer.state()["recent"] == []
    assert run(trainer, 4, 5)[0]["commitment"] > 0


@pytest.mark.slow
def test_vqvae_trainer_learns_the_images_and_uses_the_codes():
    config = VQVAEConfig(
        channels=(16, 32, 32), encoder_blocks=(0, 0, 1), decoder_blocks=(0, 1, 1), num_codes=32, code_width=8
    )
    settings = VQVAETrainingSettings(
        steps=200, batch_size=8, warmup_steps=75, revive_every=5, learning_rate=5e-3, decay=0.9
    )
    trainer = VQVAETrainer(config, settings, CPU)
    for step in range(200):
        trainer.step(step, squares(0, 8))
    measured = evaluate_vqvae(trainer.model, [squares(0, 8)])
    assert measured["psnr"] > 25  # 10 at the start
    assert measured["codes_used"] > 0.9


def test_vqvae_trainer_learning_rate_warms_up_and_decays():
    trainer = VQVAETrainer(STEP_CONFIG, STEP_SETTINGS, CPU)
    rates = [trainer.learning_rate(step) for step in range(13)]
    assert rates[0] == pytest.approx(1e-3 / 4)
    assert rates[3] == rates[4] == pytest.approx(1e-3)
    assert rates[8] == pytest.approx((1e-3 + 1e-5) / 2)
    assert rates[12] == pytest.approx(1e-5)
    trainer.step(2, squares(0))
    assert {group["lr"] for group in trainer.optimizer.param_groups} == {rates[2]}


def test_vqvae_trainer_keeps_the_weights_when_the_gradient_is_not_finite():
    trainer = VQVAETrainer(STEP_CONFIG, STEP_SETTINGS, CPU)
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    images = squares(0)
    images[0, 0, 0, 0] = math.inf
    with pytest.raises(InputError, match="gradient of step 7 is not finite; that early, the likely cause"):
        trainer.step(7, images)
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_vqvae_trainer_keeps_the_codebook_when_initialized_from_a_model():
    first = VQVAETrainer(STEP_CONFIG, STEP_SETTINGS, CPU)
    run(first, 0, 12)
    codebook, codes = first.model.quantizer.codebook.clone(), first.model.encode(squares(0))
    settings = VQVAETrainingSettings(
        **{**vars(STEP_SETTINGS), "learning_rate": 0.0, "final_learning_rate": 0.0, "decay": 1.0}
    )
    second = VQVAETrainer(STEP_CONFIG, settings, CPU, initial=InitialVQVAE(model=first.model))
    assert torch.equal(second.model.quantizer.codebook, codebook)
    metrics = run(second, 0, 2)
    assert metrics[0]["commitment"] > 0
    assert metrics[0]["alive"] == 1  # none is revived before it had a chance
    assert torch.equal(second.model.encode(squares(0)), codes)


class PlainColours:
    """Nine images of one colour each, of which the larger renditions have another colour in every code."""

    side, names, is_shuffled, provenance = 16, (), False, {}

    def __len__(self):
        return 9

    def __getitem__(self, index):
        return ImageExample(identity=f"colour-{index}", captions=("颜色",), render=partial(self.render, index))

    def render(self, index, scale):
        pixels = np.full((round(16 * scale), round(16 * scale), 3), 20 * index, dtype=np.uint8)
        if scale > 1:
            blocks = np.arange((2 * scale) ** 2, dtype=np.uint8).reshape(2 * scale, 2 * scale)
            pixels[:, :, 1] = blocks.repeat(8, axis=0).repeat(8, axis=1)
        return pixels


def test_training_images_are_a_generators_examples_in_order_from_any_step(make_tiny_world):
    world = make_tiny_world(jitter=3)
    images = TrainingImages(SceneDataset(world, 5), 8, seed=5)
    batches = list(training_batches(images, 3, 0, 4))
    assert [tuple(batch.shape) for batch in batches] == [(3, 3, 64, 64)] * 4
    for number, image in enumerate(torch.cat(batches)):
        assert torch.equal(image, to_float(world.render(world.sample_scene(5, number), number)))
    resumed = list(training_batches(images, 3, 2, 4, num_workers=1))
    assert torch.equal(torch.cat(resumed), torch.cat(batches[2:]))


def test_training_images_shuffle_a_stored_dataset_anew_in_every_epoch():
    images = TrainingImages(PlainColours(), 8, seed=3)
    epochs = [[round(images[9 * epoch + i][0, 0, 0].item() * 255) // 20 for i in range(9)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(9)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    in_order = TrainingImages(PlainColours(), 8)
    assert [round(in_order[i][0, 0, 0].item() * 255) // 20 for i in range(11)] == [*range(9), 0, 1]


def test_training_images_crop_an_example_differently_in_another_epoch():
    images = TrainingImages(PlainColours(), 8, scales=(2,))
    corners = {round(images[9 * epoch + 4][1, 0, 0].item() * 255) for epoch in range(8)}
    assert len(corners) > 3
    assert all(corner % 4 < 3 and corner < 12 for corner in corners)  # a crop of two codes of the four on a side


def test_training_images_mirror_every_other_image_when_flip_is_set():
    """The choice belongs to the image and the epoch, so a resumed run repeats it."""
    plain, flipped = (TrainingImages(PlainColours(), 8, scales=(2,), flip=flip) for flip in (False, True))
    mirrored = []
    for position in range(36):
        image, other = plain[position], flipped[position]
        assert torch.equal(other, flipped[position])
        mirrored.append(not torch.equal(image, other))
        assert torch.equal(other, image.flip(-1) if mirrored[-1] else image)
    assert 9 <= sum(mirrored) <= 27
    assert mirrored[:9] != mirrored[9:18]


def test_held_out_batches_are_of_held_out_scenes(make_tiny_world):
    world = make_tiny_world()
    scenes = SceneDataset(world, 1, held_out=True)
    images = torch.cat(list(held_out_batches(scenes, 8, count=5, batch_size=2)))
    assert len(images) == 5
    for number, image in enumerate(images):
        scene = world.sample_scene(1, number, held_out=True)
        assert scene.held_out
        assert torch.equal(image, to_float(world.render(scene, number)))
    assert torch.equal(TrainingImages(scenes, 8)[3], images[3])


def test_held_out_batches_are_fewer_when_the_dataset_is_smaller():
    assert [len(batch) for batch in held_out_batches(PlainColours(), 8, batch_size=6)] == [6, 3]


def train(world, folder, last: int, resume: bool = False) -> VQVAETrainer:
    held_out = SceneDataset(world, 1, held_out=True)
    trainer = VQVAETrainer(CONFIG, TRAINING, CPU, held_out=held_out, validation_images=6)
    images = TrainingImages(SceneDataset(world, 0), 8)
    status = run_loop(
        trainer,
        BatchSource(
            batches=lambda step: training_batches(images, TRAINING.batch_size, step, TRAINING.steps),
            steps=last,
            batch_size=TRAINING.batch_size,
        ),
        RunFolder(folder),
        RunSettings(log_every=1, save_every=2, evaluate_every=4),
        recipe={},
        resume=resume,
    )
    assert status == 0
    return trainer


@pytest.mark.parametrize("half", [2, 5])
def test_vqvae_run_resumes_exactly(make_tiny_world, tmp_path, half):
    world = make_tiny_world()
    whole = train(world, tmp_path / "whole", 8)
    train(world, tmp_path / "halves", half)
    second = train(world, tmp_path / "halves", 8, resume=True)
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, second.model.state_dict()[name]), name
    assert torch.equal(whole.model.quantizer.ema_cluster_size, second.model.quantizer.ema_cluster_size)

    stored = load_image_tokenizer(RunFolder(tmp_path / "halves").checkpoints()[-1] / "image")
    images = next(held_out_batches(SceneDataset(world, 1, held_out=True), 8, count=4))
    assert torch.equal(stored.encode(images), whole.model.eval().encode(images))
    assert stored.config == CONFIG


def test_train_vqvae_exports_the_trained_tokenizer(make_tiny_world, tmp_path):
    world = make_tiny_world()
    recipe = VQVAERecipe(
        training=TRAINING, model=CONFIG, scales=(1, 2), run=RunSettings(log_every=4), validation_images=6
    )
    run = RunFolder(tmp_path / "run")
    scenes, held_out = SceneDataset(world, 0), SceneDataset(world, 1, held_out=True)
    assert train_vqvae(recipe, scenes, held_out, run, CPU) == 0
    export_image_tokenizer(run, tmp_path / "image")
    (checkpoint,) = run.checkpoints()
    trained = load_image_tokenizer(checkpoint / "image")
    assert torch.equal(load_image_tokenizer(tmp_path / "image").codebook, trained.codebook)


def test_vqvae_trainer_evaluates_on_held_out_images_and_writes_a_sheet(make_tiny_world, tmp_path):
    trainer = VQVAETrainer(
        CONFIG, TRAINING, CPU, held_out=SceneDataset(make_tiny_world(), 1, held_out=True), validation_images=6
    )
    metrics = trainer.evaluate(3, tmp_path)
    assert set(metrics) == {f"validation_{name}" for name in ("psnr", "codes_used", "perplexity", "images")}
    assert metrics["validation_images"] == 6
    with Image.open(tmp_path / "step-00000003.png") as sheet:
        assert sheet.size == (12 * 132 + 4, 2 * 132 + 4)  # scenes above, reconstructions below


def test_vqvae_trainer_evaluates_when_the_sheet_cannot_be_written(make_tiny_world, tmp_path, capsys):
    held_out = SceneDataset(make_tiny_world(), 1, held_out=True)
    trainer = VQVAETrainer(CONFIG, TRAINING, CPU, held_out=held_out, validation_images=2)
    assert trainer.evaluate(3, tmp_path / "absent")["validation_images"] == 2
    assert capsys.readouterr().err.startswith("warning: the sheet of step 3 could not be written: No such file")


def test_vqvae_trainer_evaluates_nothing_without_held_out_images(tmp_path):
    with pytest.raises(ValueError, match="evaluation needs held-out images"):
        VQVAETrainer(CONFIG, TRAINING, CPU).evaluate(3, tmp_path)


def test_training_images_are_cropped_on_the_grid_of_codes_at_larger_scales(make_tiny_world):
    world = make_tiny_world()
    images = TrainingImages(SceneDataset(world, 3), 8, scales=(1, 2))
    corners = set()
    for number in range(24):
        scene, image = world.sample_scene(3, number), images[number]
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
    assert torch.equal(next(training_batches(images, 24, 0, 1))[5], images[5])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scales": ()}, "scales must hold at least one number"),
        ({"scales": (0, 1)}, r"scales must be in \[1, 16\], got \[0, 1\]"),
        (
            {"model": VQVAEConfig(num_codes=65537)},
            "num_codes must be at most 65536, which token stores hold",
        ),
        ({"num_workers": -1}, r"num_workers must be in \[0, 1024\], got -1"),
        ({"validation_images": 0}, r"validation_images must be in \[1, 1000000000\], got 0"),
    ],
)
def test_vqvae_recipe_refuses_numbers_out_of_range(changes, message):
    with pytest.raises(ValueError, match=message):
        VQVAERecipe(training=TRAINING, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"side": 20},
            "images of 20 pixels do not divide into codes of 8 x 8 pixels; the nearest sides that fit: 16 and 24",
        ),
        ({"__len__": lambda self: 0}, "the dataset has no images, expected at least 1"),
        (
            {"render": lambda self, index, scale: np.zeros((16, 15, 3), dtype=np.uint8)},
            r"image colour-\d at scale 1 must be uint8 \(16, 16, 3\), got uint8 \(16, 15, 3\)",
        ),
    ],
)
def test_train_vqvae_refuses_datasets_that_do_not_suit_the_model(tmp_path, changes, message):
    dataset = type("Unsuitable", (PlainColours,), changes)()
    recipe = VQVAERecipe(training=TRAINING, model=CONFIG)
    with pytest.raises(InputError, match=message):
        train_vqvae(recipe, dataset, PlainColours(), RunFolder(tmp_path), CPU)
