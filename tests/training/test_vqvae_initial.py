"""The start of a VQ-VAE from another one: what is taken, what starts anew, and what is refused."""

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch

from cogview.checkpoints.checkpoint import read_config
from cogview.checkpoints.image_tokenizer import codebook_hash, load_image_tokenizer, save_image_tokenizer
from cogview.errors import InputError
from cogview.pipeline.cogview import CogView
from cogview.training.distributed import DistributedContext
from cogview.training.recipe import Recipe
from cogview.training.vqvae_export import copy_with_image_tokenizer
from cogview.training.vqvae_initial import image_folder, image_settings, load_initial_vqvae
from cogview.training.vqvae_trainer import VQVAETrainer
from cogview.vqvae.model import VQVAE, VQVAEConfig
from cogview.vqvae.training import VQVAETrainingSettings
from tests.training.test_vqvae_trainer import PlainColours

CONFIG = VQVAEConfig(channels=(4, 8, 8), encoder_blocks=(0, 0, 1), decoder_blocks=(0, 0, 1), num_codes=16, code_width=4)
V1 = dataclasses.replace(VQVAEConfig.released(), channels=(8, 8, 8), num_codes=16, code_width=4)
CPU = DistributedContext(torch.device("cpu"))


def images(count: int = 4) -> torch.Tensor:
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def tokenizer(tmp_path):
    """Return a function that saves a tokenizer of a shape: its folder and the model."""

    def save(config: VQVAEConfig) -> tuple[str, VQVAE]:
        torch.manual_seed(7)
        model = VQVAE(config).eval()
        save_image_tokenizer(tmp_path / "image", model)
        return str(tmp_path / "image"), model

    return save


@pytest.mark.parametrize("config", [CONFIG, V1], ids=["ours", "v1"])
def test_load_initial_vqvae_takes_everything_of_the_same_shape(tokenizer, config):
    name, source = tokenizer(config)
    initial = load_initial_vqvae(name, config, 0)
    assert initial.keeps_codebook
    assert initial.description == f"begins with encoder, decoder and codebook of {name}"
    assert torch.equal(initial.model.encode(images()), source.encode(images()))


@pytest.mark.parametrize(
    ("config", "changes", "new"),
    [
        (CONFIG, {"num_codes": 24}, "a codebook of 24 codes of width 4"),
        (CONFIG, {"code_width": 6}, "the two convolutions beside the codebook and a codebook of 16 codes of width 6"),
        (V1, {"num_codes": 8, "normalize_codes": True}, "a codebook of 8 codes of width 4"),
    ],
)
def test_load_initial_vqvae_copies_the_convolutions_for_another_codebook(tokenizer, config, changes, new):
    name, source = tokenizer(config)
    config = dataclasses.replace(config, **changes)
    initial = load_initial_vqvae(name, config, 0)
    assert initial.description == f"begins with the convolutions of {name}; anew: {new}, which starts from the images"
    before, after = source.state_dict(), initial.model.state_dict()
    differing = {key for key in after if not torch.equal(after[key], before[key])}
    beside = {"encoder.6.weight", "encoder.6.bias", "decoder.0.weight"}
    assert differing - {"quantizer.codebook"} == (beside if "code_width" in changes else set())

    settings = VQVAETrainingSettings(steps=6, batch_size=4, warmup_steps=2)
    trainer = VQVAETrainer(config, settings, CPU, initial=initial)
    assert trainer.step(0, images())["commitment"] == 0
    trainer.step(1, images())
    vectors = trainer.model.encode_vectors(images())
    assert trainer.step(2, images())["commitment"] >= 0
    assert torch.cdist(trainer.model.codebook, vectors.reshape(-1, config.code_width)).amin() < 0.5


@pytest.mark.parametrize(
    ("config", "key"),
    [
        (dataclasses.replace(CONFIG, channels=(4, 8, 16)), "channels"),
        (VQVAEConfig(downsampling=16, num_codes=16, code_width=4), "downsampling"),
        (dataclasses.replace(CONFIG, decoder_blocks=(1, 0, 0)), "decoder_blocks"),
        (dataclasses.replace(V1, channels=(4, 8, 8)), "architecture"),
        (dataclasses.replace(CONFIG, std=(0.25, 0.25, 0.25)), "std"),
    ],
)
def test_load_initial_vqvae_refuses_other_networks(tokenizer, config, key):
    name, _ = tokenizer(CONFIG)
    with pytest.raises(InputError, match=f"^init_from keeps the networks of {name}, whose {key} is .*; remove"):
        load_initial_vqvae(name, config, 0)


def test_load_initial_vqvae_adds_residual_blocks_as_identities(tokenizer):
    name, source = tokenizer(CONFIG)
    config = dataclasses.replace(CONFIG, encoder_blocks=(0, 1, 2), decoder_blocks=(1, 0, 3))
    initial = load_initial_vqvae(name, config, 0)
    assert initial.description.endswith(f"codebook of {name}, and with 5 more residual blocks that begin as identities")
    assert initial.model.config == config
    assert initial.keeps_codebook
    codes = source.encode(images())
    assert torch.equal(initial.model.encode(images()), codes)
    torch.testing.assert_close(initial.model.decode(codes), source.decode(codes))

    trainer = VQVAETrainer(config, VQVAETrainingSettings(steps=6, batch_size=4, warmup_steps=2), CPU, initial=initial)
    before = {key: tensor.clone() for key, tensor in trainer.model.state_dict().items()}
    for step in range(3):
        trainer.step(step, images())
    assert all(
        not torch.equal(tensor, before[key])
        for key, tensor in trainer.model.state_dict().items()
        if key.endswith((".first.weight", ".second.weight"))
    )


def test_load_initial_vqvae_adds_residual_blocks_for_another_codebook(tokenizer):
    name, _ = tokenizer(CONFIG)
    initial = load_initial_vqvae(name, dataclasses.replace(CONFIG, decoder_blocks=(0, 0, 2), num_codes=24), 0)
    assert "with 1 more residual block that begin as identities; anew: a codebook of 24 codes" in initial.description
    with pytest.raises(InputError, match="whose decoder_blocks is"):
        load_initial_vqvae(name, dataclasses.replace(CONFIG, decoder_blocks=(0, 0, 2)), 0, decoder_only=True)


def test_image_settings_take_the_shape_of_init_from(tokenizer):
    name, _ = tokenizer(CONFIG)
    section = {"init_from": name, "training": {"steps": 2, "warmup_steps": 1}, "model": {"num_codes": 24}}
    recipe = Recipe(path=Path("own.yaml"), sections={"image": section}, overrides=(), work=Path("work"))
    assert image_settings(recipe).model == dataclasses.replace(CONFIG, num_codes=24)
    recipe = dataclasses.replace(recipe, overrides=("model.downsampling=16",))
    with pytest.raises(InputError, match=r"whose downsampling is 8; remove downsampling from .*; got 16"):
        image_settings(recipe)


def test_load_initial_vqvae_refuses_another_codebook_for_the_decoder_alone(tokenizer):
    name, _ = tokenizer(CONFIG)
    with pytest.raises(InputError, match=r"train: decoder keeps the codebook of .*; remove num_codes, code_width, "):
        load_initial_vqvae(name, dataclasses.replace(CONFIG, num_codes=24), 0, decoder_only=True)


def test_vqvae_trainer_of_the_decoder_keeps_every_code(tokenizer):
    name, source = tokenizer(CONFIG)
    expected = source.encode(images(16))
    initial = load_initial_vqvae(name, CONFIG, 0, decoder_only=True)
    settings = VQVAETrainingSettings(
        steps=8, batch_size=4, warmup_steps=2, revive_every=1, revive_below=0.9, weight_decay=0.1
    )
    trainer = VQVAETrainer(CONFIG, settings, CPU, initial=initial)
    losses = [trainer.step(step, images())["loss"] for step in range(8)]
    assert losses[-1] < losses[0]
    assert torch.equal(trainer.model.eval().encode(images(16)), expected)
    assert codebook_hash(trainer.model) == codebook_hash(source)
    for key, tensor in source.state_dict().items():
        assert torch.equal(trainer.model.state_dict()[key], tensor) == (not key.startswith("decoder")), key


def test_copy_with_image_tokenizer_gives_a_model_another_decoder(tiny_checkpoint, tmp_path):
    image = load_image_tokenizer(image_folder(str(tiny_checkpoint)))
    with torch.no_grad():
        image.decoder[-2].bias.add_(0.3)
    save_image_tokenizer(tmp_path / "image", image)
    copy_with_image_tokenizer(tiny_checkpoint, tmp_path / "image", PlainColours(), tmp_path / "model")
    assert read_config(tmp_path / "model").reconstruction_psnr is not None
    models = [CogView.from_pretrained(folder, device="cpu") for folder in (tiny_checkpoint, tmp_path / "model")]
    before, after = (model.generate("一只狐狸", seed=1)[0] for model in models)
    assert (before.codes == after.codes).all()
    assert before.tobytes() != after.tobytes()


def test_copy_with_image_tokenizer_says_that_measurements_are_of_the_former_decoder(tiny_checkpoint, tmp_path):
    """The card went on to show the images and the PSNR of a decoder that the folder no longer has."""
    source = tmp_path / "source"
    shutil.copytree(tiny_checkpoint, source)
    (source / "samples.png").write_bytes(b"images of the former decoder")
    (source / "README.md").write_text("# Model\n\n![samples](samples.png)\n\nPSNR 31.25 dB\n")
    copy_with_image_tokenizer(source, source / "image", PlainColours(), tmp_path / "model")
    card = (tmp_path / "model" / "README.md").read_text()
    measured = read_config(tmp_path / "model").reconstruction_psnr.median
    assert card.startswith("# Model\n\n## Image decoder\n")
    assert card.index(f"PSNR of {measured:.2f} dB") < card.index("PSNR 31.25 dB")
    assert "measurements below are of the former decoder" in card
    assert "![" not in card
    assert not (tmp_path / "model" / "samples.png").exists()
    assert (source / "samples.png").exists()


def test_copy_with_image_tokenizer_refuses_another_codebook(tiny_checkpoint, tokenizer, tmp_path):
    tokenizer(CONFIG)
    with pytest.raises(InputError, match=r"image has another codebook than .*, whose transformer was trained with its"):
        copy_with_image_tokenizer(tiny_checkpoint, tmp_path / "image", PlainColours(), tmp_path / "model")
    assert not (tmp_path / "model").exists()
