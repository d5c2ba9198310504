"""A new recipe for an adapter: a few pictures of one's own, learnt by a model whose weights stay as they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch

from cogview.checkpoints.checkpoint import Model, load_model
from cogview.checkpoints.registry import resolve_checkpoint
from cogview.config_io import to_mapping
from cogview.errors import InputError
from cogview.formatting import format_duration
from cogview.modeling.config import PRESETS, Sampling, TransformerConfig, preset
from cogview.training.new_model import NewRecipe, StepTime, describe_machine, run_lines
from cogview.training.new_recipe import RecipeLine, choose_fit, choose_held_out, line, steps_for
from cogview.training.settings import ArchitectureSettings
from cogview.training.step_speed import StepTimer, transformer_step_seconds
from cogview.training.survey import PictureSurvey
from cogview.vqvae.codec import psnr, reconstruct

FEW = 50  # pictures, for which a lower rank suffices
MANY = 2000  # pictures, from which on a whole model is worth its time
VIEWS = 60  # of each caption
STEPS = (200, 2000)
BATCH = 16
GOOD_PSNR = 23.0  # dB
MAX_BYTE_SHARE = 0.05  # of the characters
SHOWN_CHARACTERS = 12


@dataclass(frozen=True, kw_only=True)
class BaseFit:
    """How well the tokenizers of a model suit some pictures and captions.

    Attributes:
        psnr: Median PSNR of the reconstructions of the pictures, in dB.
        byte_share: Share of the characters of the captions that are spelt in bytes.
        foreign: The most frequent of these characters.
        too_long: Captions of the sample that have more pieces than the model takes.
    """

    psnr: float
    byte_share: float
    foreign: tuple[str, ...]
    too_long: int

    def notes(self, name: str) -> list[str]:
        """Return what is likely to disappoint, with the remedy."""
        remedy = "a whole model learns tokenizers of its own: leave out --adapter-for"
        found = []
        if self.psnr < GOOD_PSNR:
            found.append(f"the image tokenizer of {name} keeps these pictures at {self.psnr:.1f} dB only; {remedy}")
        if self.byte_share > MAX_BYTE_SHARE:
            shown = " ".join(self.foreign)
            found.append(f"{self.byte_share:.0%} of the characters are no pieces of {name}, such as {shown}; {remedy}")
        if self.too_long:
            found.append(f"captions that are too long for {name} and will be left out: {self.too_long} of the sample")
        return found


def new_adapter_recipe(
    survey: PictureSurvey,
    pictures: Sequence[RecipeLine],
    name: str,
    folder: Path,
    *,
    device: torch.device,
    seed: int,
    on_note: Callable[[str], object],
    on_line: Callable[[str], object],
) -> NewRecipe:
    """Return a recipe for an adapter of a model; steps of its training are timed.

    Args:
        survey: The survey of the pictures.
        pictures: The keys that name the sources, by ``picture_lines``.
        name: Name or folder of the model.
        folder: Folder of the results.
        device: Device of the training.
        seed: Seed of the training.
        on_note: Called with a line about what is likely to disappoint.
        on_line: Called with a line about what is timed.

    Raises:
        InputError: The model is unknown, cannot generate images, or has a shape that no recipe can name.
    """
    model = load_model(resolve_checkpoint(name), torch.device("cpu"), torch.float32, meta_only=True)
    if "generate" not in model.config.tasks:
        raise InputError(f"{name} was not trained to generate images, expected a model with the task generate")
    side, fit = model.config.grid * model.image_tokenizer.downsampling, choose_fit(survey)
    suits = measure_base(model, survey, side, fit[0])
    for note in suits.notes(name):
        on_note(note)
    if survey.pictures > MANY:
        on_note(f"a whole model may be worth its time: {survey.pictures} pictures are many for an adapter")
    shape, max_text = model.config.transformer, model.config.max_text
    steps = steps_for(survey.rows, VIEWS, BATCH, STEPS)
    length = model.config.longest_row(["generate"])
    timer = StepTimer(1, device, on_line)
    speed = transformer_step_seconds(shape, model.config.vocabulary, length, BATCH, timer)
    square = [
        line("side", side, f"pixels, as {name} has it"),
        line("fit", *fit),
        line("held_out", *choose_held_out(survey)),
    ]
    encode = [
        *pictures,
        *square,
        line("text_width", max_text, f"pieces, as {name} has it"),
        line("batch_size", 64, "pictures encoded together"),
    ]
    psnr_reason = f"its image tokenizer keeps these pictures at {suits.psnr:.1f} dB"
    transformer = [
        *architecture_lines(shape, name),
        line("tokenizers", name, psnr_reason),
        line("init_from", name),
        line("lora", {"rank": 8 if survey.pictures < FEW else 16, "alpha": 32.0}, rank_reason(survey.pictures)),
        line("precision", speed[1], f"measured here: a step takes {format_duration(speed[0])}"),
        line("training", training_lines(survey, steps, seed)),
        line("sampling", own_sampling(model.config.sampling), f"as {name} has it"),
        line("run", run_lines(steps)),
    ]
    lines = (
        line("work", str(folder)),
        line("encode", encode, f"with the tokenizers of {name}"),
        line("transformer", transformer),
        line("package", {}, "licence: and data: go into the model card"),
    )
    seconds = steps * speed[0]
    times = (StepTime(name="train", seconds=seconds, section="transformer", steps=steps, warmup=warmup_of(steps)),)
    return NewRecipe(lines=lines, machine=describe_machine(device), times=times, doubts=tuple(timer.doubts))


def own_sampling(sampling: Sampling) -> dict[str, float]:
    """Return the settings of a model's sampling that are not the usual ones."""
    usual = to_mapping(Sampling())
    return {key: value for key, value in to_mapping(sampling).items() if value != usual[key]}


def rank_reason(pictures: int) -> str:
    """Return why an adapter for some pictures has its rank."""
    if pictures < FEW:
        return f"a low rank: {pictures} pictures are few, and it forgets less"
    return "the usual rank of a style"


def warmup_of(steps: int) -> int:
    """Return the steps of the warm-up of a training."""
    return max(10, steps // 20)


def training_lines(survey: PictureSurvey, steps: int, seed: int) -> list[RecipeLine]:
    """Return the keys of the training of an adapter."""
    return [
        line("steps", steps, f"images of each caption are learnt {steps * BATCH / survey.rows:.3g} times"),
        line("batch_size", BATCH),
        line("learning_rate", 1e-3, "as the recipe lora-style has it: an adapter starts from nothing"),
        line("final_learning_rate", 1e-4),
        line("warmup_steps", warmup_of(steps)),
        line("tasks", {"generate": 1}),
        line("num_workers", 1, "arranges rows ahead of time"),
        line("seed", seed),
    ]


def architecture_lines(shape: TransformerConfig, name: str) -> list[RecipeLine]:
    """Return the keys that give a transformer the shape of another.

    Args:
        shape: The shape.
        name: Name of the model, for messages.

    Raises:
        InputError: No preset has its width and heads.
    """
    for known, (layers, width, heads) in PRESETS.items():
        if (width, heads) == (shape.width, shape.num_heads):
            changed = replace(preset(known, shape.vocabulary_size), num_layers=shape.num_layers)
            names = {each.name for each in fields(ArchitectureSettings)} - {"preset", "num_layers", "dropout"}
            own = [
                line(key, to_mapping(getattr(shape, key)))
                for key in sorted(names)
                if hasattr(changed, key) and getattr(changed, key) != getattr(shape, key)
            ]
            few = [line("num_layers", shape.num_layers)] if layers != shape.num_layers else []
            return [line("preset", known, f"the shape of {name}"), *few, *own, line("dropout", 0.0)]
    raise InputError(
        f"no preset has the width {shape.width} and {shape.num_heads} heads of {name}: write a recipe by hand"
    )


def measure_base(model: Model, survey: PictureSurvey, side: int, fit: str) -> BaseFit:
    """Return how well the tokenizers of a model suit the pictures and captions of a survey.

    Args:
        model: The model.
        survey: The survey.
        side: Side of the images in pixels.
        fit: How pictures become squares.
    """
    pixels = survey.pixels(side, fit)  # type: ignore[arg-type]  # a FitRule
    restored = reconstruct(model.image_tokenizer, pixels, 32)
    found = [psnr(image, other) for image, other in zip(pixels, restored, strict=True)]
    text = model.text_tokenizer
    foreign = {each: count for each, count in survey.characters.items() if text.byte_share(each)}
    frequent = sorted(foreign, key=lambda each: -foreign[each])[:SHOWN_CHARACTERS]
    return BaseFit(
        psnr=float(np.median(found)),
        byte_share=sum(foreign.values()) / max(1, survey.characters.total()),
        foreign=tuple(frequent),
        too_long=sum(len(text.encode(caption)) > model.config.max_text for caption in survey.texts),
    )
