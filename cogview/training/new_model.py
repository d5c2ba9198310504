"""A new recipe for a whole model of one's own pictures, with the time that its steps take on this machine."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from cogview.config_io import from_mapping
from cogview.device import available_memory, usable_cpus
from cogview.formatting import format_bytes, format_duration
from cogview.modeling.config import preset
from cogview.tokenizers.layouts import layouts
from cogview.tokenizers.vocabulary import Vocabulary
from cogview.training.new_recipe import (
    PictureChoices,
    RecipeLine,
    SizeRules,
    choose_for,
    line,
    steps_for,
)
from cogview.training.step_speed import StepTimer, image_step_seconds, transformer_step_seconds
from cogview.training.survey import PictureSurvey
from cogview.training.vqvae_initial import load_initial_vqvae
from cogview.vqvae.model import VQVAEConfig

START = "cogview-emoji"  # whose image tokenizer a new one of its shape starts from
WIDE = {"channels": [64, 192, 384], "encoder_blocks": [0, 1, 4], "decoder_blocks": [1, 2, 2]}
MAX_WORKERS = 8
LONG = 30 * 60.0  # seconds of a recipe, above which a trial is offered
TRIAL = 20 * 60.0  # seconds of a trial
FORWARD_SHARE = 1 / 3  # of the time of a training step: the backward pass takes about twice as long


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Estimated time of a step of a recipe.

    Attributes:
        name: The command.
        seconds: Its time; None if it was not measured on this machine.
        section: Section of the recipe with the settings of a training; empty for another step.
        steps: Steps of a training.
        warmup: Those of its warm-up.
    """

    name: str
    seconds: float | None
    section: str = ""
    steps: int = 0
    warmup: int = 0


@dataclass(frozen=True, kw_only=True)
class NewRecipe:
    """A new recipe.

    Attributes:
        lines: Its keys.
        machine: Description of the machine.
        times: Estimated times of its steps.
        doubts: Why the estimate cannot be relied upon.
    """

    lines: tuple[RecipeLine, ...]
    machine: str
    times: tuple[StepTime, ...]
    doubts: tuple[str, ...] = ()

    def estimate(self) -> str:
        """Return the times as one line."""
        known = [(each.name, each.seconds) for each in self.times if each.seconds is not None]
        parts = ", ".join(f"{name} {format_duration(seconds)}" for name, seconds in known)
        text = f"about {format_duration(sum(seconds for _, seconds in known))} on this machine ({parts})"
        missing = [each.name for each in self.times if each.seconds is None]
        return text + (f", without {', '.join(missing)}, which needs several GPUs" if missing else "")

    def trial(self) -> list[str]:
        """Return the settings SECTION.KEY=VALUE of a short trial; none if the whole recipe takes little time.

        The steps of all trainings are shortened by one factor, but never below their warm-up.
        """
        if any(each.seconds is None for each in self.times):
            return []
        trainings = [each for each in self.times if each.section]
        total = sum(each.seconds or 0.0 for each in self.times)
        if total <= LONG:
            return []
        training = sum(each.seconds or 0.0 for each in trainings)
        share = max(0.0, TRIAL - (total - training)) / training
        return [
            f"{each.section}.training.steps={min(each.steps, max(each.warmup, math.floor(each.steps * share)))}"
            for each in trainings
        ]


def describe_machine(device: torch.device) -> str:
    """Return what a machine trains with: its cores and memory, and its GPU."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, {format_bytes(available_memory(device))} free"
    memory = format_bytes(available_memory(torch.device("cpu")))
    return f"{usable_cpus()} CPU cores, {memory} of memory free" + (", MPS" if device.type == "mps" else ", no GPU")


def choose_size(survey: PictureSurvey, device: torch.device) -> tuple[str, str]:
    """Return the size of a model, and why."""
    if device.type == "cpu":
        name = "tiny" if survey.pictures < 500 else "small"
        return name, f"{survey.pictures} pictures, and no GPU"
    name = "base" if survey.pictures >= 5000 else "small"
    return name, f"{survey.pictures} pictures, and a GPU"


def new_model_recipe(
    survey: PictureSurvey,
    pictures: Sequence[RecipeLine],
    rules: SizeRules,
    folder: Path,
    *,
    device: torch.device,
    seed: int,
    on_line: Callable[[str], object],
) -> NewRecipe:
    """Return a recipe for a model of the pictures of a survey; steps of its trainings are timed.

    Args:
        survey: The survey.
        pictures: The keys that name the sources, by ``picture_lines``.
        rules: The size of the model.
        folder: Folder of the results.
        device: Device of the trainings.
        seed: Seed of the trainings.
        on_line: Called with a line about what is timed.
    """
    timer = StepTimer(1 if rules.cluster else 2, device, on_line)
    plan = _ModelPlan.of(survey, rules, timer, seed)
    sections = (
        line("text", [*pictures, *plan.text_lines()]),
        line("image", [*pictures, *plan.image_lines()]),
        line("encode", [*pictures, *plan.encode_lines()], "into token stores"),
        line("transformer", plan.transformer_lines()),
        line("package", {}, "licence: and data: go into the model card"),
    )
    return NewRecipe(
        lines=(line("work", str(folder)), *sections),
        machine=describe_machine(device),
        times=plan.times(),
        doubts=tuple(timer.doubts),
    )


@dataclass(frozen=True, kw_only=True)
class _ModelPlan:
    """The numbers of a recipe.

    Attributes:
        survey: The survey.
        rules: The size of the model.
        choices: What follows from the pictures.
        tasks: Shares of the tasks.
        image_steps: Steps of the image tokenizer.
        steps: Steps of the transformer.
        image_speed: Seconds of a step of the image tokenizer, and its precision.
        speed: Those of the transformer; None if it was not measured.
        seed: Seed of the trainings.
    """

    survey: PictureSurvey
    rules: SizeRules
    choices: PictureChoices
    tasks: Mapping[str, int]
    image_steps: int
    steps: int
    image_speed: tuple[float, str]
    speed: tuple[float, str] | None
    seed: int

    @classmethod
    def of(cls, survey: PictureSurvey, rules: SizeRules, timer: StepTimer, seed: int) -> _ModelPlan:
        """Choose the numbers, and time steps."""
        choices = choose_for(survey, rules.side)
        upscale = choices.upscale[0] and not rules.layers
        tasks = {"generate": 5, "caption": 2, "upscale": 3} if upscale else {"generate": 5, "caption": 2}
        generated = tasks["generate"] / sum(tasks.values())
        config = from_mapping(VQVAEConfig, WIDE, "the image tokenizer") if rules.wide else VQVAEConfig()
        initial = None if rules.wide else load_initial_vqvae(START, config, seed)
        pixels = survey.pixels(rules.side, choices.fit[0])  # type: ignore[arg-type]  # a FitRule
        draft = cls(
            survey=survey,
            rules=rules,
            choices=choices,
            tasks=tasks,
            image_steps=steps_for(survey.pictures, 100, rules.image_batch, rules.image_steps),
            steps=steps_for(survey.rows, rules.views / generated, rules.batch, rules.steps),
            image_speed=image_step_seconds(initial, config, pixels, rules.image_batch, timer),
            speed=None,
            seed=seed,
        )
        return draft if rules.cluster else replace_speed(draft, timer)

    @property
    def grid(self) -> int:
        """Codes on a side of an image."""
        return self.rules.side // VQVAEConfig().downsampling

    @property
    def image_warmup(self) -> int:
        """Steps of the warm-up of the image tokenizer."""
        return min(300, max(20, self.image_steps // 20))

    @property
    def warmup(self) -> int:
        """Steps of the warm-up of the transformer."""
        return max(20, self.steps // 30)

    @property
    def num_workers(self) -> int:
        """Processes that decode pictures."""
        return max(1, min(MAX_WORKERS, usable_cpus() - 1))

    @property
    def max_positions(self) -> int:
        """Positions of the longest row, rounded up."""
        width = self.choices.text_width[0]
        table = layouts(self.grid, text_positions=width)
        return 16 * math.ceil(max(table[task].max_position(width) for task in self.tasks) / 16)

    def mean_length(self) -> int:
        """Return the mean number of positions of a row."""
        width = self.choices.text_width[0]
        table, text = layouts(self.grid, text_positions=width), round(sum(self.survey.lengths) / self.survey.captions)
        whole = sum(self.tasks.values())
        return round(sum(share * table[task].length(min(text, width)) for task, share in self.tasks.items()) / whole)

    def times(self) -> tuple[StepTime, ...]:
        """Return the estimated times of the long steps."""
        each = self.image_speed[0] / self.rules.image_batch * FORWARD_SHARE * (5 if "upscale" in self.tasks else 1)
        return (
            StepTime(
                name="train-image",
                seconds=self.image_steps * self.image_speed[0],
                section="image",
                steps=self.image_steps,
                warmup=self.image_warmup,
            ),
            StepTime(name="encode", seconds=self.survey.pictures * each),
            StepTime(
                name="train",
                seconds=self.steps * self.speed[0] if self.speed else None,
                section="transformer",
                steps=self.steps,
                warmup=self.warmup,
            ),
        )

    def text_lines(self) -> list[RecipeLine]:
        """Return the keys of the section ``text``."""
        return [line("size", *self.choices.text_size), line("max_piece_length", *self.choices.piece_length)]

    def image_lines(self) -> list[RecipeLine]:
        """Return the keys of the section ``image``."""
        rules, upscale = self.rules, "upscale" in self.tasks
        count = self.survey.pictures
        views = self.image_steps * rules.image_batch / max(1, count)
        start = (
            line("model", WIDE, "wider than that of cogview-emoji, from random weights; NOT MEASURED ON A GPU YET")
            if rules.wide
            else line("init_from", START, "a start that knows edges and colours, and has seen images at twice the side")
        )
        training = [
            line("steps", self.image_steps, f"each picture is seen {views:.0f} times; more make sharper pictures"),
            line("batch_size", rules.image_batch),
            line(
                "learning_rate", 1e-3 if rules.wide else 5e-4, "" if rules.wide else "half of that from random weights"
            ),
            line("warmup_steps", self.image_warmup),
            line("seed", self.seed),
        ]
        return [
            *self._square_lines(),
            start,
            line(
                "scales",
                [1, 2] if upscale else [1],
                "images at the side, and parts of them at twice the side" * upscale,
            ),
            line(
                "flip",
                count < 10_000,
                "mirror images: few pictures become more" if count < 10_000 else "enough pictures",
            ),
            line("precision", self.image_speed[1], self._precision_reason(self.image_speed)),
            line("num_workers", self.num_workers, "processes that decode pictures"),
            line("training", training),
            line("run", run_lines(self.image_steps)),
        ]

    def encode_lines(self) -> list[RecipeLine]:
        """Return the keys of the section ``encode``."""
        upscale = "upscale" in self.tasks
        why = (
            self.choices.upscale[1] if upscale or not self.choices.upscale[0] else "upscaling is left out of size tiny"
        )
        return [
            *self._square_lines(),
            line("large", upscale, why),
            line("text_width", *self.choices.text_width),
            line("batch_size", 64, "pictures encoded together"),
            line("num_workers", self.num_workers),
        ]

    def transformer_lines(self) -> list[RecipeLine]:
        """Return the keys of the section ``transformer``."""
        rules = self.rules
        seen = self.steps * rules.batch * self.tasks["generate"] / sum(self.tasks.values()) / self.survey.rows
        training = [
            line(
                "steps",
                self.steps,
                f"images of each caption are learnt {seen:.3g} times; of 60 pictures, all were drawn "
                "from their captions after 96",
            ),
            line("batch_size", rules.batch),
            line("tasks", dict(self.tasks), "shares of the rows; caption also ranks images"),
            line("learning_rate", rules.learning_rate),
            line("betas", [0.9, 0.99]),
            line("warmup_steps", self.warmup),
            line("num_workers", 1, "arranges rows ahead of time"),
            line("seed", self.seed),
        ]
        layers = [line("num_layers", rules.layers, "half of the preset, for a short training")] if rules.layers else []
        engine = [line("engine", {"name": "deepspeed", "zero": 2, "checkpointing": "auto"})] if rules.cluster else []
        return [
            line("preset", rules.preset),
            *layers,
            line("max_positions", self.max_positions, f"the longest row: {self.grid} x {self.grid} codes and the text"),
            line("dropout", 0.1 if seen > 8 else 0.0, "few pictures are seen many times" if seen > 8 else ""),
            line("branch_norm_init", 0.05),
            line("sinusoidal_positions", True),
            line("precision", self.speed[1] if self.speed else "auto", self._precision_reason(self.speed)),
            line("training", training),
            *engine,
            line("sampling", {"temperature": 0.5, "top_k": 20}, "also of the packaged model; may be changed later"),
            line("run", run_lines(self.steps)),
        ]

    def _square_lines(self) -> list[RecipeLine]:
        """Return the keys by which both sections make squares."""
        return [
            line("side", self.rules.side, f"pixels: {self.grid} x {self.grid} codes of 8 x 8 pixels"),
            line("fit", *self.choices.fit),
            line("held_out", *self.choices.held_out),
        ]

    def _precision_reason(self, speed: tuple[float, str] | None) -> str:
        return "" if speed is None else f"measured here: a step takes {format_duration(speed[0])}"


def replace_speed(plan: _ModelPlan, timer: StepTimer) -> _ModelPlan:
    """Return a plan with the measured speed of its transformer."""
    rules = plan.rules
    vocabulary = Vocabulary(num_text_pieces=plan.choices.text_size[0])
    config = preset(rules.preset, vocabulary.padded_size, max_positions=plan.max_positions)
    config = replace(config, num_layers=rules.layers or config.num_layers)
    length = min(plan.mean_length(), plan.max_positions)
    return replace(plan, speed=transformer_step_seconds(config, vocabulary, length, rules.batch, timer))


def run_lines(steps: int) -> list[RecipeLine]:
    """Return the intervals of a run."""
    every = max(50, 50 * round(steps / 10 / 50))
    return [
        line("save_every", min(every, 500), "steps; a killed training loses at most as many"),
        line("evaluate_every", every),
    ]
