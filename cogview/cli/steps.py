"""The steps of a recipe: which it has, what each makes, and whether a result exists and is still valid."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any

from cogview.cli.continuation import STEPS_KEYS, UnfinishedTraining, remedies, run_settings
from cogview.errors import InputError
from cogview.formatting import format_list
from cogview.training.recipe import Recipe
from cogview.training.step_records import StepRecord, changes_of

MAX_CHANGES = 3  # that a message names
MAX_CHANGE = 300  # characters of each
SECTIONS = ("work", "scenes", "text", "image", "encode", "transformer", "package")  # of a recipe

# The files that a result cannot be opened without.
TOKENIZER_FILES = ("config.json", "model.safetensors")
MODEL_FILES = (*TOKENIZER_FILES, "text.model", *(f"image/{name}" for name in TOKENIZER_FILES))
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "cogview.json")
MODEL_STEPS = ("scenes", "train-text", "train-image", "encode", "train")  # what a trained model depends on

# Measures of the emoji world, the tasks that they need, and their options; rerank takes 16 images of each caption.
MEASURES = (
    ("scenes", {"generate"}, ("--tune",)),
    ("captions", {"caption"}, ()),
    ("rerank", {"generate", "caption"}, ("-n", "100")),
    ("upscale", {"upscale"}, ()),
)


@dataclass(frozen=True, kw_only=True)
class RecipeStep:
    """A step of a recipe: one command.

    Attributes:
        command: The command, such as ``train-text``.
        done: Returns whether its result is complete.
        needs: Commands of the steps whose results it reads; None for all earlier steps.
        section: Section of the recipe that it reads; empty for a measure of the emoji world.
        others: Further sections that it reads.
        settings: Returns its settings; None for a step without.
        results: Returns the files and folders that it makes, finished or not; None for a step that takes minutes, whose
            stale result is simply made again.
        run_folder: Returns the run folder, of a training.
        options: Options of the command.
        takes_device: Whether it has the option ``--device``.
        free: Keys of its settings that do not change the result.
    """

    command: str
    done: Callable[[Recipe], bool]
    needs: tuple[str, ...] | None = None
    section: str = ""
    others: tuple[str, ...] = ()
    settings: Callable[[Recipe], Any] | None = None
    results: Callable[[Recipe], tuple[Path, ...]] | None = None
    run_folder: Callable[[Recipe], Path] | None = None
    options: tuple[str, ...] = ()
    takes_device: bool = False
    free: tuple[str, ...] = ()

    def existing_results(self, recipe: Recipe) -> list[Path]:
        """Return the files and folders of the step that exist."""
        return [] if self.results is None else [path for path in self.results(recipe) if path.exists()]

    def recorded_settings(self, recipe: Recipe) -> Any:
        """Return the settings for the record of the step."""
        return {} if self.settings is None else self.settings(recipe)

    def changes(self, recipe: Recipe, record: StepRecord | None) -> list[str]:
        """Return what has changed in the settings since the step was done or begun.

        Args:
            recipe: The recipe.
            record: The record of the step; the run folder of a training has its own.
        """
        if self.settings is None:
            return []
        stored: Mapping[str, Any] | None
        if self.run_folder is not None:
            stored = run_settings(self.run_folder(recipe))
        else:
            stored = record.settings if record is not None and self.done(recipe) else None
        free = (*self.free, *STEPS_KEYS) if self.ended_early(recipe) else self.free
        return [] if stored is None else changes_of(stored, self.settings(recipe), free)

    def unfinished(self, recipe: Recipe) -> UnfinishedTraining | None:
        """Return the training of the step if it has a checkpoint, and steps left."""
        return None if self.run_folder is None else UnfinishedTraining.find(self.section, self.run_folder(recipe))

    def ended_early(self, recipe: Recipe) -> UnfinishedTraining | None:
        """Return the training of the step if it has steps left, and the recipe asks for no more than are done."""
        training = self.unfinished(recipe)
        if training is None or self.settings is None or not training.can_end:
            return None
        if self.settings(recipe).training.steps > training.done:
            return None
        return training


def steps_of(recipe: Recipe) -> list[RecipeStep]:
    """Return the steps of a recipe: those whose sections it has, with a measure for each task of an emoji model.

    Args:
        recipe: The recipe.

    Raises:
        InputError: It has no section of a step, or the settings of one are wrong.
    """
    known = [SCENES, TEXT, IMAGE, ENCODE, TRAIN]
    steps = [step for step in known if step.section in recipe.sections]
    if not steps:
        sections = ", ".join(step.section for step in known)
        raise InputError(f"{recipe.path} has no section of a step, expected some of: {sections}")
    tasks = set(transformer_settings(recipe).training.tasks) if TRAIN in steps else set()
    if SCENES in steps:
        steps += [
            RecipeStep(
                command=f"eval {name}",
                done=partial(graded, name),
                needs=MODEL_STEPS,
                options=options,
                takes_device=True,
            )
            for name, needed, options in MEASURES
            if needed <= tasks
        ]
    elif "generate" in tasks and PACKAGE.section in recipe.sections:
        steps.append(
            RecipeStep(
                command="eval samples", section="transformer", done=sampled, needs=MODEL_STEPS, takes_device=True
            )
        )
    if PACKAGE.section in recipe.sections:
        steps.append(PACKAGE)
    return steps


def check_step(recipe: Recipe, steps: Sequence[RecipeStep], number: int, records: Mapping[str, StepRecord]) -> str:
    """Return why the result of a step is stale, if it is made again without asking; nothing for a valid result.

    Args:
        recipe: The recipe.
        steps: All steps of the recipe.
        number: Index of the step.
        records: The records of the steps.

    Raises:
        InputError: The result is stale and took long.
    """
    step = steps[number]
    record = records.get(step.command)
    changes = step.changes(recipe, record)
    if changes:
        named = format_list(changes, MAX_CHANGES, max_entry=MAX_CHANGE)
        reason = f"the settings of step {step.command} have changed: {named}"
    elif record is not None and (earlier := later_done(step, steps, record, records)):
        reason = f"step {step.command} was done before step {earlier} was done again"
    else:
        return ""
    if step.results is None:
        return reason
    paths = " ".join(str(path) for each in _with_dependents(steps, number) for path in each.existing_results(recipe))
    if not paths:
        return ""
    ends = all(change.startswith(STEPS_KEYS) for change in changes)
    kept = remedies(recipe, records, step.unfinished(recipe), ends=ends) if changes else []
    if len(kept) == 2:
        raise InputError(f"{reason}; {kept[0]}; {kept[1]}; or do it and what depends on it anew after: rm -r {paths}")
    if kept:
        raise InputError(f"{reason}; {kept[0]}; or do it and what depends on it anew after: rm -r {paths}")
    back = "change them back, or " if changes else ""
    raise InputError(f"{reason}; {back}do this step and those that depend on it anew after: rm -r {paths}")


def later_done(
    step: RecipeStep, steps: Sequence[RecipeStep], record: StepRecord, records: Mapping[str, StepRecord]
) -> str | None:
    """Return the first step that ``step`` needs and that was done after it; None if there is none.

    Args:
        step: The step.
        steps: All steps of the recipe.
        record: The record of the step.
        records: The records of all steps.
    """
    earlier = (each.command for each in steps[: list(steps).index(step)] if each.command in records)
    needed = (name for name in earlier if step.needs is None or name in step.needs)
    return next((name for name in needed if records[name].order > record.order), None)


def _with_dependents(steps: Sequence[RecipeStep], number: int) -> list[RecipeStep]:
    """Return a step and the later ones that depend on it, directly or not."""
    found = [steps[number]]
    for step in steps[number + 1 :]:
        if step.needs is None or any(each.command in step.needs for each in found):
            found.append(step)
    return found


def check_settings(recipe: Recipe, steps: Sequence[RecipeStep]) -> None:
    """Read the settings of all steps, so that a mistake in the last one is found before the first one runs.

    Args:
        recipe: The recipe.
        steps: Its steps.

    Raises:
        InputError: A section or key is unknown, a key is missing, a value is wrong, PEFT is missing, or the model card
            cannot be read.
    """
    for key in recipe.sections:
        if key not in SECTIONS:  # its step would be left out in silence
            near = get_close_matches(str(key), SECTIONS, n=1)
            advice = f'did you mean "{near[0]}"?' if near else f"known: {', '.join(SECTIONS)}"
            raise InputError(f'{recipe.path}: "{key}" is unknown; {advice}')
    for step in steps:
        step.recorded_settings(recipe)
    if TRAIN in steps and transformer_settings(recipe).lora is not None and not TRAIN.done(recipe):
        from cogview.modeling.lora import require_peft

        require_peft()
    if PACKAGE in steps:
        from cogview.cli.package import PackageSettings, check_sampling, read_card

        check_sampling(recipe)
        card = recipe.settings(PackageSettings, PACKAGE.section).card
        if card is not None:
            read_card(recipe, card)


def world_settings(recipe: Recipe) -> Any:
    """Return the settings of the emoji world and of the scenes that are exported."""
    from cogview.emoji.export import SceneRecipe

    return recipe.settings(SceneRecipe, "scenes")


def world_made(recipe: Recipe) -> bool:
    """Return whether the emoji world is complete, and the exported scenes if the recipe asks for them."""
    paths = (recipe.scene_pictures,) if world_settings(recipe).exported else ()
    return all(path.is_file() for path in (recipe.world / "world.json", *paths))


def text_settings(recipe: Recipe) -> Any:
    """Return the settings of the text tokenizer."""
    from cogview.training.text_tokenizer import TextTokenizerRecipe

    return recipe.settings(TextTokenizerRecipe, "text")


def image_settings(recipe: Recipe) -> Any:
    """Return the settings of the image tokenizer."""
    from cogview.training import vqvae_initial

    return vqvae_initial.image_settings(recipe)


def encode_settings(recipe: Recipe) -> Any:
    """Return the settings of the stores: of pictures, or of scenes."""
    from cogview.emoji.datasets import SceneEncodeSettings
    from cogview.training.picture_encoding import PictureEncodeSettings

    of_pictures = "pictures" in recipe.section("encode")
    return recipe.settings(PictureEncodeSettings if of_pictures else SceneEncodeSettings, "encode")


def transformer_settings(recipe: Recipe) -> Any:
    """Return the settings of the transformer."""
    from cogview.training.settings import TransformerSettings

    return recipe.settings(TransformerSettings, "transformer")


def encoded(recipe: Recipe) -> bool:
    """Return whether the stores are complete."""
    from cogview.data.store import TokenStore

    def has_rows(path: Path, rows: int) -> bool:
        try:
            with TokenStore(path) as store:
                return len(store) >= rows
        except (InputError, OSError):  # it is missing or damaged
            return False

    settings = encode_settings(recipe)
    if "pictures" in recipe.section("encode"):  # the training store is written last
        is_evaluated = "transformer" in recipe.sections and transformer_settings(recipe).validation_store is None
        needs_held_out = is_evaluated or recipe.held_out_store.exists()  # few pictures have none
        return has_rows(recipe.store, 1) and (not needs_held_out or has_rows(recipe.held_out_store, 1))
    return has_rows(recipe.store, settings.rows) and has_rows(recipe.held_out_store, settings.held_out_rows)


def trained(recipe: Recipe) -> bool:
    """Return whether the transformer was trained for all its steps."""
    from cogview.training.run_folder import RunFolder, step_of

    checkpoints = RunFolder(recipe.transformer_run).checkpoints()
    return bool(checkpoints) and step_of(checkpoints[-1]) >= int(transformer_settings(recipe).training.steps)


def graded(measure: str, recipe: Recipe) -> bool:
    """Return whether a report of ``measure`` on the last checkpoint exists."""
    from cogview.cli.evaluate import read_report

    try:
        return read_report(recipe, measure) is not None
    except InputError:  # no checkpoint yet, or a report on an earlier one
        return False


def sampled(recipe: Recipe) -> bool:
    """Return whether a sheet of samples of the last checkpoint exists, with its report."""
    from cogview.cli.evaluate_samples import SHEET_FILE

    return graded("samples", recipe) and (recipe.work / "report" / SHEET_FILE).is_file()


def holds(folder: Path, names: Sequence[str]) -> bool:
    """Return whether a folder has all of some files."""
    return all((folder / name).is_file() for name in names)


def packaged(recipe: Recipe) -> bool:
    """Return whether the package has every file that it cannot be opened without."""
    folder = packaged_folder(recipe)
    return holds(folder, ADAPTER_FILES if folder.name == "adapter" else MODEL_FILES)


def packaged_folder(recipe: Recipe) -> Path:
    """Return the folder of the package: of a model, or of an adapter."""
    return recipe.work / ("adapter" if transformer_settings(recipe).lora is not None else "model")


def package_settings(recipe: Recipe) -> Any:
    """Return what the package depends on besides the checkpoint."""
    from cogview.cli.package import recorded_settings

    return recorded_settings(recipe)


SCENES = RecipeStep(
    command="scenes",
    needs=(),
    section="scenes",
    settings=world_settings,
    done=world_made,
    results=lambda recipe: (recipe.world, recipe.scene_pictures),
)
TEXT = RecipeStep(
    command="train-text",
    needs=("scenes",),
    section="text",
    settings=text_settings,
    done=lambda recipe: recipe.text_model.is_file(),
    results=lambda recipe: (recipe.text_model,),
)
IMAGE = RecipeStep(
    command="train-image",
    needs=("scenes",),  # of which it sees the pictures alone
    section="image",
    settings=image_settings,
    done=lambda recipe: holds(recipe.image_tokenizer, TOKENIZER_FILES),  # written at the end of the training
    results=lambda recipe: (recipe.image_run, recipe.image_tokenizer),
    run_folder=lambda recipe: recipe.image_run,
    options=("--resume", "auto"),
    takes_device=True,
    free=("num_workers", "run", "validation_images"),
)
ENCODE = RecipeStep(
    command="encode",
    needs=("scenes", "train-text", "train-image"),
    section="encode",
    others=("transformer",),
    settings=encode_settings,
    done=encoded,
    results=lambda recipe: (
        recipe.store,
        recipe.held_out_store,
        recipe.work / f"{recipe.store.name}.building",
    ),
    takes_device=True,
    free=("batch_size", "num_workers"),
)
TRAIN = RecipeStep(
    command="train",
    needs=MODEL_STEPS[:-1],
    section="transformer",
    settings=transformer_settings,
    done=trained,
    results=lambda recipe: (recipe.transformer_run,),
    run_folder=lambda recipe: recipe.transformer_run,
    options=("--resume", "auto"),
    takes_device=True,
    free=("training.num_workers", "training.micro_batch_size", "run", "sampling", "engine"),
)
SAMPLES = RecipeStep(
    command="eval samples",
    section="transformer",
    done=sampled,
    needs=MODEL_STEPS,
    takes_device=True,
)
PACKAGE = RecipeStep(
    command="package",
    section="package",
    others=("transformer",),
    settings=package_settings,
    done=packaged,
)
