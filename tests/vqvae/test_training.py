"""Training the VQ-VAE: the schedule of the codebook, exact resuming, losses by hand, figures of a known model."""

# B batch, H W pixels

import io
import math

import pytest
import torch

from cogview.vqvae.model import VQVAE, VQVAEConfig
from cogview.vqvae.quantizer import RENAMED_AVERAGES
from cogview.vqvae.training import VQVAETrainer, VQVAETrainingSettings, evaluate_vqvae, reconstruction_loss

CONFIG = VQVAEConfig(
    channels=(8, 16, 16), encoder_blocks=(0, 0, 1), decoder_blocks=(0, 1, 1), num_codes=32, code_width=4
)
SETTINGS = VQVAETrainingSettings(steps=12, batch_size=4, warmup_steps=4, revive_every=3, revive_below=0.2, decay=0.5)
CPU = torch.device("cpu")


def pictures(step: int, size: int = 4) -> torch.Tensor:
    """Coloured squares on coloured grounds, a function of the step."""
    generator = torch.Generator().manual_seed(step)
    images = torch.rand(size, 3, 1, 1, generator=generator).expand(size, 3, 32, 32).clone()
    images[:, :, 8:24, 8:24] = torch.rand(size, 3, 1, 1, generator=generator)
    return images


def run(trainer: VQVAETrainer, first: int, last: int) -> list[dict[str, float]]:
    return [trainer.step(step, pictures(step)) for step in range(first, last)]


@pytest.mark.parametrize("half", [3, 4, 7], ids=["in the warm-up", "where the codebook starts", "after it"])
def test_steps_equal_half_of_them_and_the_rest_after_a_restart(half):
    whole = VQVAETrainer(CONFIG, SETTINGS, CPU)
    figures = run(whole, 0, 12)
    assert sum(step["revived"] for step in figures) > 0  # randomness took part

    first = VQVAETrainer(CONFIG, SETTINGS, CPU)
    run(first, 0, half)
    file = io.BytesIO()
    torch.save(first.state(), file)
    file.seek(0)
    torch.manual_seed(99)
    second = VQVAETrainer(
        CONFIG, VQVAETrainingSettings(**{**vars(SETTINGS), "seed": 5}), CPU
    )  # other weights to begin with
    second.settings = SETTINGS
    second.load(torch.load(file, weights_only=True))
    assert run(second, half, 12) == figures[half:]
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, second.model.state_dict()[name]), name
    assert torch.equal(whole.model.quantizer.ema_cluster_size, second.model.quantizer.ema_cluster_size)
    assert torch.equal(whole.model.quantizer.ema_sum, second.model.quantizer.ema_sum)


def test_vqvae_trainer_loads_former_names_of_the_averages():
    """The state of a run that an earlier version began."""
    first, second = VQVAETrainer(CONFIG, SETTINGS, CPU), VQVAETrainer(CONFIG, SETTINGS, CPU)
    run(first, 0, 6)
    state = first.state()
    for old, name in RENAMED_AVERAGES.items():
        state[old] = state.pop(name)
    second.load(state)
    assert first.model.quantizer.ema_sum.any()
    for name in RENAMED_AVERAGES.values():
        assert torch.equal(second.model.quantizer.get_buffer(name), first.model.quantizer.get_buffer(name)), name


def test_the_codebook_starts_after_the_warm_up_from_its_last_outputs():
    trainer = VQVAETrainer(CONFIG, SETTINGS, CPU)
    noise = trainer.model.quantizer.codebook.clone()
    assert [figures["commitment"] for figures in run(trainer, 0, 3)] == [0, 0, 0]
    assert torch.equal(trainer.model.quantizer.codebook, noise)
    run(trainer, 3, 4)
    codebook = trainer.model.quantizer.codebook
    assert not torch.isclose(codebook, noise).all(dim=1).any()
    torch.testing.assert_close(codebook.norm(dim=1), torch.ones(32))
    assert trainer.state()["recent"] == []
    assert run(trainer, 4, 5)[0]["commitment"] > 0


def test_training_learns_the_pictures_and_uses_the_codes():
    config = VQVAEConfig(
        channels=(16, 32, 32), encoder_blocks=(0, 0, 1), decoder_blocks=(0, 1, 1), num_codes=32, code_width=8
    )
    settings = VQVAETrainingSettings(
        steps=200, batch_size=8, warmup_steps=75, revive_every=5, learning_rate=5e-3, decay=0.9
    )
    trainer = VQVAETrainer(config, settings, CPU)
    for step in range(200):
        trainer.step(step, pictures(0, 8))
    judged = evaluate_vqvae(trainer.model, [pictures(0, 8)])
    assert judged["psnr"] > 25  # 10 at the start
    assert judged["codes_used"] > 0.9


def test_the_learning_rate_rises_then_falls_to_its_end():
    trainer = VQVAETrainer(CONFIG, SETTINGS, CPU)
    rates = [trainer.learning_rate(step) for step in range(13)]
    assert rates[0] == pytest.approx(1e-3 / 4)
    assert rates[3] == rates[4] == pytest.approx(1e-3)
    assert rates[8] == pytest.approx((1e-3 + 1e-5) / 2)
    assert rates[12] == pytest.approx(1e-5)
    trainer.step(2, pictures(0))
    assert {group["lr"] for group in trainer.optimizer.param_groups} == {rates[2]}


def test_reconstruction_loss_by_hand():
    images, targets = torch.zeros(1, 3, 2, 2), torch.zeros(1, 3, 2, 2)
    images[..., 0, 0] = 0.5  # one pixel of four is off by 0.5
    absolute, squared = 0.5 / 4, 0.25 / 4
    differences = 2 * (0.5 / 2)  # one of two differences, in each direction
    assert reconstruction_loss(images, targets, 0.0).item() == pytest.approx(absolute + 4 * squared)
    assert reconstruction_loss(images, targets, 2.0).item() == pytest.approx(absolute + 4 * squared + 2 * differences)


def test_a_gradient_that_is_not_finite_stops_the_run_with_the_weights_as_they_were():
    trainer = VQVAETrainer(CONFIG, SETTINGS, CPU)
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    images = pictures(0)
    images[0, 0, 0, 0] = math.inf
    with pytest.raises(FloatingPointError, match="gradient of step 7 is not finite; lower the learning rate"):
        trainer.step(7, images)
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


class HalfRight(VQVAE):
    """Gives every picture the codes 0 and 1 in halves, and decodes to grey."""

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        codes = torch.zeros(len(images), images.shape[2] // 8, images.shape[3] // 8, dtype=torch.long)
        codes[:, : codes.shape[1] // 2] = 1
        return codes

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        return torch.full((len(codes), 3, 8 * codes.shape[1], 8 * codes.shape[2]), 0.5)


def test_figures_of_a_known_model():
    batches = [torch.zeros(3, 3, 16, 16), torch.full((1, 3, 16, 16), 0.5)]  # of unequal size
    figures = evaluate_vqvae(HalfRight(CONFIG), batches)
    assert figures["psnr"] == pytest.approx(-10 * math.log10(0.75 * 0.25))
    assert figures["codes_used"] == pytest.approx(2 / 32)
    assert figures["perplexity"] == pytest.approx(2)
    assert figures["images"] == 4


def test_figures_of_no_pictures():
    with pytest.raises(ValueError, match="no images to evaluate on"):
        evaluate_vqvae(VQVAE(CONFIG), [])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 300}, r"warmup_steps must be from 1 to steps - 1 \(299\), got 300"),
        ({"steps": 10, "warmup_steps": 0}, "warmup_steps must be from 1"),
        ({"steps": 1000, "batch_size": 0}, "batch_size and revive_every must be at least 1, got 0 and 10"),
        ({"steps": 1000, "revive_every": 0}, "must be at least 1, got 32 and 0"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        VQVAETrainingSettings(**settings)


def test_a_model_to_start_from_is_trained_with_its_codebook_from_the_first_step():
    first = VQVAETrainer(CONFIG, SETTINGS, CPU)
    run(first, 0, 12)
    codebook, codes = first.model.quantizer.codebook.clone(), first.model.encode(pictures(0))
    settings = VQVAETrainingSettings(
        **{**vars(SETTINGS), "learning_rate": 0.0, "final_learning_rate": 0.0, "decay": 1.0}
    )
    second = VQVAETrainer(CONFIG, settings, CPU, init_from=first.model)
    assert torch.equal(second.model.quantizer.codebook, codebook)
    figures = run(second, 0, 2)
    assert figures[0]["commitment"] > 0
    assert figures[0]["alive"] == 1  # none is revived before it had a chance
    assert torch.equal(second.model.encode(pictures(0)), codes)
