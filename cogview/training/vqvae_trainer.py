"""Training the VQ-VAE on the scenes of a world."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from cogview.checkpoints.image_tokenizer import save_image_tokenizer
from cogview.emoji.keyed_random import KeyedRandom
from cogview.emoji.world import EmojiWorld
from cogview.errors import InputError
from cogview.image_io.contact_sheet import contact_sheet
from cogview.signals import worker_init
from cogview.training.loop import Trainer, Writer
from cogview.vqvae.codec import reconstruct, to_float
from cogview.vqvae.model import PIXELS_PER_CODE, VQVAE, VQVAEConfig
from cogview.vqvae.training import VQVAETrainer, VQVAETrainingSettings, evaluate_vqvae

HELD_OUT_IMAGES = 2048


class SceneImages(Dataset[Tensor]):
    """Picture number i of a world as (3, H, W) float32 in [0, 1]; a function of (seed, i).

    The pictures take the ``scales`` in turn. Of a scene drawn larger than the canvas a part of the canvas's size is
    shown, cut out on the grid of codes.
    """

    def __init__(self, world: EmojiWorld, seed: int, *, scales: Sequence[int] = (1,), held_out: bool = False) -> None:
        self.world = world
        self.seed = seed
        self.scales = scales
        self.held_out = held_out

    def __getitem__(self, index: int) -> Tensor:
        scene = self.world.sample(self.seed, index, held_out=self.held_out)
        scale, canvas = self.scales[index % len(self.scales)], self.world.settings.canvas
        draws = KeyedRandom("part", self.seed, index, self.held_out)
        top, left = (PIXELS_PER_CODE * draws.randbelow((scale - 1) * canvas // PIXELS_PER_CODE + 1) for _ in range(2))
        return to_float(self.world.render(scene, index, scale)[top : top + canvas, left : left + canvas])


def scene_batches(
    world: EmojiWorld, seed: int, batch_size: int, first: int, last: int, workers: int, scales: Sequence[int] = (1,)
) -> Iterator[Tensor]:
    """Batches number ``first`` to ``last`` of a world's pictures, (B, 3, H, W)."""
    loader = DataLoader(
        SceneImages(world, seed, scales=scales),
        batch_size=batch_size,
        sampler=range(first * batch_size, last * batch_size),
        num_workers=workers,
        worker_init_fn=worker_init,
    )
    return iter(loader)


def held_out_batches(
    world: EmojiWorld, scales: Sequence[int] = (1,), count: int = HELD_OUT_IMAGES, batch_size: int = 64
) -> Iterator[Tensor]:
    """Pictures of held-out scenes, which no training ever sees."""
    images = SceneImages(world, seed=1, scales=scales, held_out=True)
    return iter(DataLoader(images, batch_size=batch_size, sampler=range(count)))


class VQVAERun(Trainer[Tensor]):
    """The VQ-VAE's trainer as the shared loop wants it."""

    def __init__(
        self,
        world: EmojiWorld,
        config: VQVAEConfig,
        settings: VQVAETrainingSettings,
        device: torch.device,
        autocast: torch.dtype | None,
        scales: Sequence[int] = (1,),
        init_from: VQVAE | None = None,
    ) -> None:
        self.world = world
        self.scales = scales
        self.trainer = VQVAETrainer(config, settings, device, autocast, init_from)

    def step(self, step: int, batch: Tensor) -> dict[str, float]:
        """One training step."""
        try:
            return self.trainer.step(step, batch)
        except FloatingPointError as error:
            raise InputError(str(error)) from None

    def snapshot(self) -> Writer:
        """What writes the model folder, and ``trainer.pt``."""
        model, state = copy.deepcopy((self.trainer.model, self.trainer.state()))

        def write(folder: Path) -> None:
            save_image_tokenizer(folder / "image", model)
            torch.save(state, folder / "trainer.pt")

        return write

    def load(self, folder: Path) -> None:
        """Take up ``trainer.pt``."""
        self.trainer.load(torch.load(folder / "trainer.pt", map_location="cpu", weights_only=True))

    def evaluate(self, step: int, folder: Path) -> dict[str, float]:
        """PSNR, usage and perplexity on held-out scenes, and a sheet of scenes above their reconstructions."""
        model = self.trainer.model
        figures = evaluate_vqvae(model, held_out_batches(self.world, self.scales))
        reconstruction_sheet(model, self.world).save(folder / f"step-{step:08d}.png")
        return {f"held_out_{name}": value for name, value in figures.items()}


def reconstruction_sheet(model: VQVAE, world: EmojiWorld, count: int = 12) -> Image.Image:
    """Held-out scenes in the upper row, what the VQ-VAE makes of them in the lower, at twice their size."""
    pixels = [world.render(world.sample(1, index, held_out=True), index) for index in range(count)]
    return contact_sheet([*pixels, *reconstruct(model, np.stack(pixels))], columns=count, scale=2)
