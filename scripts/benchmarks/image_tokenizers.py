"""Train the image tokenizer of CogView v1 and ours on the same pictures for the same steps, and compare them.

Three trainings see the same batches in the same order:

* ``released``: the networks of CogView v1 trained its way. The codebook starts from Xavier noise and follows moving
  averages of decay 0.99 whose sizes are smoothed by 1e-5; codes out of use are left alone (``vqvae/vqvae_zc.py`` of
  THUDM/CogView at 169a023). The training program was not published: the loss is that of arXiv:1711.00937, the squared
  error with a commitment of 0.25, under our optimizer and learning rate.
* ``networks``: the networks of CogView v1 trained our way.
* ``ours``: our networks, trained our way.

PSNR is that of held-out pictures. Codes in use and perplexity are counted on crops of the pictures trained on, since
few held-out pictures cannot have all codes. Every training is a run folder below ``-o``; the same command continues
one that was stopped.

    python scripts/real_pictures.py photos --photos
    python scripts/benchmarks/image_tokenizers.py photos -o runs/tokenizers --steps 300 --batch-size 8
    python scripts/benchmarks/image_tokenizers.py photos -o runs/narrow --steps 3000 --channels 64
"""

# B batch, N vectors, D width of a code, K number of codes
from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import arguments
import torch
from torch import Tensor
from torch.nn import functional as F

from cogview.config_io import to_mapping
from cogview.data.picture_images import PictureImages
from cogview.device import flush_denormals
from cogview.files import read_json_lines
from cogview.training.distributed import DistributedContext
from cogview.training.loop import BatchSource, run_loop
from cogview.training.run_folder import RunFolder
from cogview.training.settings import RunSettings
from cogview.training.vqvae_images import TrainingImages, held_out_batches, training_batches
from cogview.training.vqvae_pictures import indexed_pictures
from cogview.training.vqvae_recipe import VQVAERecipe
from cogview.training.vqvae_trainer import VQVAETrainer
from cogview.vqvae.model import Reconstruction, VQVAEConfig
from cogview.vqvae.quantizer import Quantizer
from cogview.vqvae.training import VQVAETrainingSettings, evaluate_vqvae

CPU = DistributedContext(torch.device("cpu"))
NAMES = {
    "released": "networks of v1, trained its way",
    "networks": "networks of v1, trained our way",
    "ours": "ours",
}
COUNTED_IMAGES = 1024  # crops on which codes are counted


class ReleasedQuantizer(Quantizer):
    """The codebook of CogView v1 in training: Xavier noise, smoothed averages, no restarts."""

    SMOOTHING = 1e-5

    @torch.no_grad()
    def initialize_released(self) -> None:
        """Start the codebook as CogView v1 does; the sums start from it, the sizes from 0."""
        torch.nn.init.xavier_uniform_(self.codebook.T, gain=torch.nn.init.calculate_gain("tanh"))
        self.ema_sum.copy_(self.codebook)
        self.ema_cluster_size.zero_()

    @torch.no_grad()
    def update(self, vectors: Tensor, codes: Tensor, decay: float) -> None:
        """Move every code to its average; one without vectors flies off, since its smoothed size is near 0."""
        flat_ND, codes_N = vectors.reshape(-1, vectors.shape[-1]).float(), codes.reshape(-1)
        self.ema_cluster_size.lerp_(torch.bincount(codes_N, minlength=len(self.codebook)).float(), 1 - decay)
        self.ema_sum.mul_(decay).index_add_(0, codes_N, flat_ND, alpha=1 - decay)
        total = self.ema_cluster_size.sum()
        share = total / (total + len(self.codebook) * self.SMOOTHING)
        self.codebook.copy_(self.ema_sum / ((self.ema_cluster_size + self.SMOOTHING) * share).unsqueeze(1))


class ReleasedTrainer(VQVAETrainer):
    """Trains the networks of CogView v1 the released way."""

    def __init__(self, config: VQVAEConfig, settings: VQVAETrainingSettings) -> None:
        """Train from random weights, quantized from the first step on."""
        super().__init__(config, replace(settings, decay=0.99, commitment=0.25), CPU)
        self.model.quantizer = ReleasedQuantizer(config.num_codes, config.code_width, normalize=False)
        self.model.quantizer.initialize_released()
        self.is_initialized = True

    def objective(self, images: Tensor, output: Reconstruction) -> tuple[Tensor, Tensor]:
        """Return the squared error of the images, and that of the vectors."""
        return F.mse_loss(output.images, images), F.mse_loss(output.vectors, output.quantized)

    def _update_codebook(self, step: int, vectors: Tensor, codes: Tensor | None, generator: torch.Generator) -> int:
        assert codes is not None
        self.model.quantizer.update(vectors, codes, self.settings.decay)
        return 0


def trainer_of(name: str, settings: VQVAETrainingSettings, channels: int) -> VQVAETrainer:
    """Return the trainer of a row of the table.

    Args:
        name: ``released``, ``networks`` or ``ours``.
        settings: Settings of the steps.
        channels: Channels of the networks of v1, which has 512.
    """
    if name == "ours":
        return VQVAETrainer(VQVAEConfig(), settings, CPU)
    config = replace(VQVAEConfig.released(), channels=(channels,) * 3)
    return ReleasedTrainer(config, settings) if name == "released" else VQVAETrainer(config, settings, CPU)


def train(
    name: str,
    settings: VQVAETrainingSettings,
    images: TrainingImages,
    held_out: PictureImages,
    out: Path,
    channels: int,
) -> dict[str, float] | None:
    """Train one row of the table and measure it; None if it was stopped.

    Args:
        name: ``released``, ``networks`` or ``ours``.
        settings: Settings of the steps.
        images: Images to train on.
        held_out: Pictures that PSNR is measured on.
        out: Folder of the runs.
        channels: Channels of the networks of v1.
    """
    trainer, run = trainer_of(name, settings, channels), RunFolder(out / name)
    trainer.held_out = held_out
    source = BatchSource(
        batches=lambda step: training_batches(images, settings.batch_size, step, settings.steps),
        steps=settings.steps,
        batch_size=settings.batch_size,
    )
    every = max(1, settings.steps // 20)
    run_settings = RunSettings(log_every=every, save_every=every, evaluate_every=settings.steps, keep=1)
    facts = {"training": to_mapping(settings), "model": to_mapping(trainer.model.config)}
    if run_loop(trainer, source, run, run_settings, recipe=facts, resume=True):
        return None
    model = trainer.model.eval()
    psnr = evaluate_vqvae(model, held_out_batches(held_out, model.downsampling))
    last = settings.steps * settings.batch_size
    crops = torch.utils.data.DataLoader(images, batch_size=32, sampler=range(last, last + COUNTED_IMAGES))
    used = evaluate_vqvae(model, crops)
    rates = [line["samples_per_second"] for line in read_json_lines(run.metrics) if "samples_per_second" in line]
    return {
        "psnr": psnr["psnr"],
        "held_out": psnr["images"],
        "training_psnr": used["psnr"],
        "codes": round(used["codes_used"] * model.config.num_codes),
        "perplexity": used["perplexity"],
        "parameters": sum(map(torch.numel, model.parameters())),
        "images_per_second": statistics.median(rates) if rates else math.nan,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark.

    Args:
        argv: The command line without the program's name; that of the process by default.

    Returns:
        The exit status.
    """
    parser = arguments.Parser(__doc__)
    parser.add_argument("pictures", nargs="+", type=Path, help="pictures, folders or other sources of pictures")
    parser.add_argument(
        "-o", "--output", type=arguments.output_folder, required=True, metavar="FOLDER", help="folder of the runs"
    )
    parser.add_argument("--steps", type=arguments.count, default=300, help="steps of each training (default 300)")
    parser.add_argument("--batch-size", type=arguments.count, default=8, help="pictures of a step (default 8)")
    parser.add_argument("--channels", type=arguments.count, default=512, help="channels of v1's networks (default 512)")
    parser.add_argument("--side", type=arguments.count, default=64, help="side of the images in pixels (default 64)")
    parser.add_argument(
        "--scales", type=arguments.count, nargs="+", default=[1, 2], help="scales of the crops (default 1 2)"
    )
    parser.add_argument("--fit", default="crop", choices=["crop", "pad", "stretch"], help="how pictures become squares")
    parser.add_argument(
        "--held-out", type=arguments.fraction, default=0.15, help="share of held-out pictures (default 0.15)"
    )
    parser.add_argument(
        "--learning-rate", type=arguments.positive, default=1e-3, help="peak learning rate (default 1e-3)"
    )
    parser.add_argument(
        "--warmup-steps", type=arguments.count, help="steps of the warm-up (default a fifth, at most 300)"
    )
    parser.add_argument("--seed", type=arguments.whole, default=0, help="seed of weights, order and crops (default 0)")
    parser.add_argument("--rows", nargs="+", choices=NAMES, default=list(NAMES), help="trainings (default all)")
    options = parser.parse_args(argv)
    flush_denormals()
    settings = VQVAETrainingSettings(
        steps=options.steps,
        batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        warmup_steps=options.warmup_steps or max(1, min(300, options.steps // 5)),
        seed=options.seed,
    )
    recipe = VQVAERecipe(
        pictures=tuple(options.pictures),
        side=options.side,
        fit=options.fit,
        held_out=options.held_out,
        scales=tuple(options.scales),
        flip=True,
        training=settings,
    )
    index = indexed_pictures(options.output / "pictures.jsonl", recipe, resumes=True, on_note=lambda note: None)
    index.check(recipe.held_out)
    training, held_out = (
        PictureImages(pictures=pictures, side=recipe.side, fit=recipe.fit)
        for pictures in (index.training, index.held_out)
    )
    images = TrainingImages(training, VQVAEConfig().downsampling, recipe.scales, settings.seed, flip=recipe.flip)
    print(f"{len(training)} pictures to train on, {len(held_out)} held out", file=sys.stderr)
    print("| tokenizer | parameters | PSNR, dB | codes in use | perplexity | PSNR on crops trained on | images/s |")
    print("|---|---|---|---|---|---|---|")
    for name in options.rows:
        found = train(name, settings, images, held_out, options.output, options.channels)
        if found is None:
            return 1
        (options.output / f"{name}.json").write_text(json.dumps(found) + "\n")
        print(
            f"| {NAMES[name]} | {found['parameters'] / 1e6:.1f}M | {found['psnr']:.2f} | {found['codes']} | "
            f"{found['perplexity']:.0f} | {found['training_psnr']:.2f} | {found['images_per_second']:.1f} |",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    arguments.run_script(main)
