"""Train a VQ-VAE on an image dataset.

The schedule: a short warm-up as a plain autoencoder. The codebook then starts from the encoder outputs of the last
batches. All later steps use straight-through gradients and moving averages, and restart codes out of use.
"""

# B batch, C channels, H W pixels, N vectors, D width of a code
from __future__ import annotations

import copy
import math
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from cogview.checkpoints.image_tokenizer import save_image_tokenizer
from cogview.config_io import to_mapping
from cogview.data.image_dataset import ImageDataset, check_dataset, render
from cogview.device import training_dtype
from cogview.errors import InputError, is_out_of_memory, reason_of
from cogview.files import atomic_folder
from cogview.image_io.contact_sheet import contact_sheet
from cogview.training.distributed import DistributedContext, log_main
from cogview.training.loop import BatchSource, Trainer, run_loop
from cogview.training.nonfinite import nonfinite_advice
from cogview.training.run_folder import RunFolder, Writer, warn_if_unwritten
from cogview.training.run_record import VALIDATION
from cogview.training.trainer_state import StateMismatchError, read_pickled_state
from cogview.training.vqvae_images import VALIDATION_IMAGES, TrainingImages, held_out_batches, training_batches
from cogview.training.vqvae_initial import InitialVQVAE, load_initial_vqvae
from cogview.training.vqvae_recipe import VQVAERecipe
from cogview.vqvae.codec import reconstruct
from cogview.vqvae.lr_schedule import warmup_cosine
from cogview.vqvae.model import VQVAE, Reconstruction, VQVAEConfig
from cogview.vqvae.quantizer import RENAMED_AVERAGES, gather_rows
from cogview.vqvae.training import (
    VQVAETrainingSettings,
    reconstruction_loss,
    reconstruction_metrics,
    reconstruction_totals,
)

SHEET_IMAGES = 12


class VQVAETrainer(Trainer[Tensor]):
    """Trainer of a VQ-VAE: the model, its optimizer and the schedule of the codebook.

    ``step`` is a function of the state, the batch and the number of the step.

    Args:
        config: Shape of the model.
        settings: Settings of the training steps.
        context: The processes that train together.
        autocast: The dtype of autocast; None trains in float32.
        initial: Weights to continue with; None starts from random ones. Where its codebook is kept, only the learning
            rate warms up.
        held_out: Held-out images, which ``evaluate`` needs.
        scales: Scales of the held-out images.
        validation_images: Maximum number of held-out images of an evaluation.
    """

    def __init__(
        self,
        config: VQVAEConfig,
        settings: VQVAETrainingSettings,
        context: DistributedContext,
        autocast: torch.dtype | None = None,
        initial: InitialVQVAE | None = None,
        *,
        held_out: ImageDataset | None = None,
        scales: Sequence[int] = (1,),
        validation_images: int = VALIDATION_IMAGES,
    ) -> None:
        torch.manual_seed(settings.seed)
        self.is_initialized = initial is not None and initial.keeps_codebook
        self.settings = settings
        self.context = context
        self.device = context.device
        self.autocast = autocast
        self.decoder_only = initial is not None and initial.decoder_only
        self.held_out = held_out
        self.scales = scales
        self.validation_images = validation_images
        self.model = (initial.model if initial is not None else VQVAE(config)).to(self.device)
        if self.is_initialized:
            self.model.quantizer.reset_codebook(self.model.codebook.clone())
        self.model.encoder.requires_grad_(not self.decoder_only)
        self._module: nn.Module = self.model
        if context.size > 1:
            devices = [self.device] if self.device.type == "cuda" else None
            self._module = DistributedDataParallel(
                self.model, device_ids=devices, broadcast_buffers=False, gradient_as_bucket_view=True
            )
        self._parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self._parameters,
            lr=settings.learning_rate,
            betas=settings.betas,
            weight_decay=settings.weight_decay,
            fused=True,
        )
        self._recent: list[Tensor] = []  # encoder outputs of the last warm-up batches

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of a step: a linear warm-up, then a cosine down to ``final_learning_rate``."""
        return warmup_cosine(
            step,
            peak=self.settings.learning_rate,
            final=self.settings.final_learning_rate,
            warmup_steps=self.settings.warmup_steps,
            steps=self.settings.steps,
        )

    def step(self, step: int, batch: Tensor) -> dict[str, float]:
        """Train on one batch.

        Args:
            step: Number of the step, from 0.
            batch: Images (B, 3, H, W) in [0, 1].

        Returns:
            The metrics to log.

        Raises:
            InputError: The gradient is not finite; the weights are unchanged.
        """
        settings, quantizer = self.settings, self.model.quantizer
        # Everything random in a step depends on its number alone, so a resumed run repeats it.
        generator = torch.Generator().manual_seed((settings.seed * 1_000_003 + step) % 2**64)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(step)
        self.model.train()
        images = batch.to(self.device, non_blocking=True)
        quantize = self.is_initialized or step >= settings.warmup_steps
        with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
            output: Reconstruction = self._module(images, quantize=quantize)
        loss, commitment = self.objective(images, output)
        (loss + settings.commitment * commitment).backward()  # averages the gradients of all processes
        norm = torch.nn.utils.clip_grad_norm_(self._parameters, settings.clip_norm or math.inf)
        if not torch.isfinite(norm):
            advice = nonfinite_advice(step, settings.learning_rate, settings.warmup_steps)
            raise InputError(f"the gradient of step {step} is not finite; {advice}")
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        vectors, codes = output.vectors.detach(), output.codes if quantize else None
        revived = 0 if self.decoder_only else self._update_codebook(step, vectors, codes, generator)
        mse = F.mse_loss(output.images.detach().clamp(0, 1), images)
        means = self._means(loss, commitment, mse)
        in_use = quantizer.ema_cluster_size > settings.revive_below
        return {
            "loss": means[0],
            "commitment": means[1],
            "psnr": -10 * math.log10(max(means[2], 1e-10)),
            "alive": in_use.float().mean().item() if quantize else 0.0,
            "revived": float(revived),
            "gradient_norm": norm.item(),
            "learning_rate": self.learning_rate(step),
        }

    def _means(self, *values: Tensor) -> list[float]:
        """Return the means of scalars over all processes."""
        local = np.array([value.item() for value in values])
        means: list[float] = (self.context.all_reduce_sum(local) / self.context.size).tolist()
        return means

    def objective(self, images: Tensor, output: Reconstruction) -> tuple[Tensor, Tensor]:
        """Return the reconstruction loss and the commitment loss, which ``commitment`` of the settings weights.

        Args:
            images: Images (B, 3, H, W) in [0, 1].
            output: Outputs of the model for them.
        """
        loss = reconstruction_loss(output.images, images, self.settings.gradient_difference_weight)
        return loss, F.mse_loss(output.vectors, output.quantized) * output.vectors.shape[-1]

    def _update_codebook(self, step: int, vectors: Tensor, codes: Tensor | None, generator: torch.Generator) -> int:
        """Update the codebook, or collect vectors (B, h, w, D) to start it from; return the number of restarts."""
        settings, quantizer = self.settings, self.model.quantizer
        if codes is not None:
            quantizer.update(vectors, codes, settings.decay)
            if step % settings.revive_every == 0:
                return quantizer.restart_dead_codes(vectors, settings.revive_below, generator)
            return 0
        self._recent.append(gather_rows(vectors.reshape(-1, vectors.shape[-1])))
        enough = 4 * len(quantizer.codebook)
        while sum(map(len, self._recent[1:])) >= enough:
            self._recent.pop(0)
        if step == settings.warmup_steps - 1:
            uses = max(len(self._recent[-1]) / len(quantizer.codebook), 2 * settings.revive_below)
            quantizer.initialize_from(torch.cat(self._recent), generator, uses)
            self._recent.clear()
        return 0

    def state(self) -> dict[str, Any]:
        """Return everything that a resumed run needs, as tensors and plain values."""
        quantizer = self.model.quantizer
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            **{name: quantizer.get_buffer(name) for name in RENAMED_AVERAGES.values()},
            "recent": list(self._recent),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore a state, also one with the former names of the averages."""
        try:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
        except (RuntimeError, ValueError) as error:  # tensors of other names or sizes, with a line for each
            if is_out_of_memory(error):
                raise
            raise StateMismatchError(" ".join(str(error).split())) from None
        for old, name in RENAMED_AVERAGES.items():
            self.model.quantizer.get_buffer(name).copy_(state[name] if name in state else state[old])
        self._recent = [tensor.to(self.device) for tensor in state["recent"]]

    def snapshot(self) -> Writer | None:
        """Return a function that writes the image tokenizer and ``trainer.pt``; None in all but the main process."""
        if not self.context.is_main_process:
            return None
        model, state = copy.deepcopy((self.model, self.state()))

        def write(folder: Path) -> None:
            save_image_tokenizer(folder / "image", model)
            torch.save(state, folder / "trainer.pt")

        return write

    def load(self, folder: Path) -> None:
        """Restore ``trainer.pt`` of a checkpoint.

        Raises:
            StateMismatchError: It belongs to another architecture.
            InputError: It is damaged or holds numbers that are NaN.
        """
        path = folder / "trainer.pt"
        state = self.context.run_everywhere(lambda: read_pickled_state(path))
        try:
            self.load_state(state)
        except (AttributeError, KeyError, TypeError) as error:  # it has another structure
            raise InputError(f"{path} is damaged: {reason_of(error)} is missing or wrong") from None

    def evaluate(self, step: int, folder: Path) -> dict[str, float]:
        """Return PSNR, usage and perplexity on held-out images; write a sheet of images and reconstructions.

        Args:
            step: Number of finished steps.
            folder: Folder of the sheet.
        """
        if self.held_out is None:
            raise ValueError("evaluation needs held-out images; give held_out to the trainer")
        held_out, path = self.held_out, folder / f"step-{step:08d}.png"
        own = slice(self.context.rank, None, self.context.size)
        batches = held_out_batches(held_out, self.model.downsampling, self.scales, self.validation_images, part=own)
        totals = self.context.run_everywhere(lambda: reconstruction_totals(self.model, batches))
        metrics = reconstruction_metrics(self.context.all_reduce_sum(totals))
        self.context.run_on_main(lambda: self._write_sheet(held_out, path))
        return {f"{VALIDATION}{name}": value for name, value in metrics.items()}

    def _write_sheet(self, held_out: ImageDataset, path: Path) -> None:
        """Write the sheet of an evaluation; a full disk is a warning."""
        step = int(path.stem.removeprefix("step-"))
        with warn_if_unwritten(f"the sheet of step {step}"):
            reconstruction_sheet(self.model, held_out).save(path)


def reconstruction_sheet(model: VQVAE, dataset: ImageDataset, count: int = SHEET_IMAGES) -> Image.Image:
    """Return a sheet of images in the upper row and their reconstructions in the lower, at twice their size.

    Args:
        model: The VQ-VAE.
        dataset: The dataset.
        count: Number of images.
    """
    pixels = [render(dataset[index], dataset.side) for index in range(min(count, len(dataset)))]
    return contact_sheet([*pixels, *reconstruct(model, np.stack(pixels))], columns=len(pixels), scale=2)


def train_vqvae(
    recipe: VQVAERecipe,
    training: ImageDataset,
    held_out: ImageDataset,
    run: RunFolder,
    context: DistributedContext,
    *,
    resume: bool = False,
) -> int:
    """Train a VQ-VAE, with checkpoints and metrics in a run folder.

    Args:
        recipe: Settings of the run.
        training: Images to train on.
        held_out: Images to evaluate on.
        run: Folder of the run.
        context: The processes that train together.
        resume: Continue from the last checkpoint, if there is one.

    Returns:
        0, or the exit status of a run that was stopped.

    Raises:
        InputError: The datasets do not suit the model, or the run cannot begin or continue as the recipe requires.
    """
    settings, downsampling = recipe.training, recipe.model.downsampling

    def check() -> slice:
        for dataset in (training, held_out):
            check_dataset(dataset, downsampling)
        return context.local_slice(settings.batch_size)

    part = context.run_everywhere(check)
    initial = None
    if (name := recipe.init_from) is not None:
        decoder_only = recipe.train == "decoder"
        initial = context.run_everywhere(
            lambda: load_initial_vqvae(name, recipe.model, settings.seed, decoder_only=decoder_only)
        )
    images = TrainingImages(training, downsampling, recipe.scales, settings.seed, flip=recipe.flip)

    def batches(step: int) -> Iterator[Tensor]:
        own = training_batches(images, settings.batch_size, step, settings.steps, recipe.num_workers, part)
        for _ in range(step, settings.steps):
            yield context.run_everywhere(lambda: next(own))

    def on_start(checkpoint: Path | None) -> None:
        if checkpoint is None and initial is not None:
            log_main(initial.description, context)

    return run_loop(
        VQVAETrainer(
            recipe.model,
            settings,
            context,
            training_dtype(context.device, recipe.precision),
            initial,
            held_out=held_out,
            scales=recipe.scales,
            validation_images=recipe.validation_images,
        ),
        BatchSource(batches=batches, steps=settings.steps, batch_size=settings.batch_size),
        run,
        recipe.run,
        recipe=to_mapping(recipe),
        resume=resume,
        context=context,
        on_start=on_start,
    )


def export_image_tokenizer(run: RunFolder, target: Path) -> None:
    """Copy the image tokenizer of the last checkpoint of a run to ``target``, replacing an older one.

    Args:
        run: The run.
        target: Folder of the image tokenizer.
    """
    with atomic_folder(target, overwrite=True) as folder:
        shutil.copytree(run.checkpoints()[-1] / "image", folder, dirs_exist_ok=True)
