"""From a recipe to a running training: each function takes one section and returns one object.

``prepare`` is the order of the steps: tokenizers, stores and model (``model_setup``), memory plan (``memory_plan``),
engine, trainer, data loader.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cogview.checkpoints.checkpoint import Model, NamedThing
from cogview.config_io import to_mapping
from cogview.data.phases import PHASES_FILE
from cogview.data.store import NO_TOKEN, TokenStore
from cogview.device import DevicePlacement, training_dtype
from cogview.errors import RetryLaterError, is_out_of_memory
from cogview.image_io.contact_sheet import contact_sheet
from cogview.pipeline.cogview import CogView
from cogview.planning.training import TrainingMemory
from cogview.planning.training_time import flops_per_token
from cogview.training.data_loader import TrainingDataLoader
from cogview.training.distributed import DistributedContext, log_main
from cogview.training.engines import open_engine
from cogview.training.engines.base import TransformerWithLoss
from cogview.training.environment import write_environment
from cogview.training.examples import TrainingBatch
from cogview.training.loop import BatchSource, run_loop
from cogview.training.memory_plan import device_peak_flops, plan_memory
from cogview.training.model_setup import adapter_files, open_all
from cogview.training.plots import save_run_plots
from cogview.training.recipe import Recipe
from cogview.training.run_folder import RunFolder
from cogview.training.settings import TransformerSettings
from cogview.training.trainer import MonitorSettings, TransformerTrainer

SHEET_IMAGES = 24  # images of a sample sheet


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainingSetup:
    """Everything that a training needs, ready to run.

    Attributes:
        settings: The section of the recipe, with the memory plan filled in.
        trainer: The trainer.
        data_loader: Its batches.
        run: The folder of the run.
        memory: Predicted memory of a process.
    """

    settings: TransformerSettings
    trainer: TransformerTrainer
    data_loader: TrainingDataLoader
    run: RunFolder
    memory: TrainingMemory

    @property
    def source(self) -> BatchSource[TrainingBatch]:
        """The batches as the loop wants them."""
        training = self.settings.training
        return BatchSource(
            batches=self.data_loader.batches,
            steps=training.steps,
            batch_size=training.batch_size,
            refresh=self.data_loader.refresh,
        )

    def close(self) -> None:
        """Close the engine and all stores."""
        self.trainer.close()
        self.data_loader.close()


def train(
    recipe: Recipe,
    settings: TransformerSettings,
    context: DistributedContext,
    *,
    resume: bool,
    things: Sequence[NamedThing] = (),
) -> int:
    """Train the transformer of a recipe, in this process of ``context``.

    Args:
        recipe: The recipe.
        settings: Its section ``transformer``.
        context: The processes that train together.
        resume: Whether to resume from the last checkpoint, if there is one.
        things: Objects of a closed world, for the checkpoints.

    Returns:
        The exit status of ``run_loop``.

    Raises:
        InputError: The recipe cannot be trained.
    """
    try:
        setup = prepare(recipe, settings, context, things=things)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise RetryLaterError(
            "the model and its optimizer do not fit into memory; cogview estimate --train --device shows which presets "
            f"and engines do ({(str(error).splitlines() or [type(error).__name__])[0][:200]})"
        ) from None
    started = False

    def on_start(checkpoint: Path | None) -> None:
        nonlocal started
        started = True
        if checkpoint is None and settings.init_from is not None:
            log_main(f"begins with the weights of {settings.init_from}, and a new optimizer", context)
        write_environment(
            setup.run.folder,
            recipe_path=recipe.path,
            world_size=context.size,
            engine=settings.engine.name,
            device=context.device,
            resumed_from=checkpoint,
        )

    try:
        return run_loop(
            setup.trainer,
            setup.source,
            setup.run,
            settings.run,
            recipe=to_mapping(settings),
            resume=resume,
            context=context,
            on_start=on_start,
        )
    finally:
        setup.close()
        if started and setup.run.metrics.is_file():  # in the main process, and in no other training's folder
            save_run_plots(setup.run.folder)


def prepare(
    recipe: Recipe,
    settings: TransformerSettings,
    context: DistributedContext,
    *,
    things: Sequence[NamedThing] = (),
    run_folder: Path | None = None,
) -> TrainingSetup:
    """Open the tokenizers, stores and model of a recipe and build its trainer.

    If a process fails, all stop and one reports.

    Args:
        recipe: The recipe.
        settings: Its section ``transformer``.
        context: The processes that train together.
        things: Objects of a closed world, for the checkpoints.
        run_folder: Folder of the run; that of the recipe if None.

    Returns:
        Trainer, data loader, run folder and memory estimate.

    Raises:
        InputError: Something that the recipe names is missing or does not fit.
    """
    run = RunFolder(run_folder or recipe.transformer_run, context.is_main_process)
    dtype = context.run_everywhere(lambda: training_dtype(context.device, settings.precision))
    model, stores = context.run_everywhere(lambda: open_all(recipe, settings, things))
    settings, memory = context.run_everywhere(lambda: plan_memory(settings, model, context, dtype))
    training = settings.training
    model.image_tokenizer.to(context.device)  # it decodes the sample sheets
    network = TransformerWithLoss(model.transformer, dtype)
    engine = open_engine(network, training, settings.engine, context)
    trainer = TransformerTrainer(
        model,
        training,
        engine,
        validation_store=stores.validation,
        draw_sheet=sheet_writer(stores.validation, context) if "generate" in model.config.tasks else None,
        adapter=adapter_files(model, settings),
        monitor=MonitorSettings(
            every=settings.run.log_every,
            peak_flops=device_peak_flops(context, dtype),
            flops_per_token=flops_per_token(model.config.transformer, model.config.longest_row()),
            dumps=run.folder / "nonfinite",
        ),
    )
    data_loader = context.run_everywhere(
        lambda: TrainingDataLoader(
            stores.training, run.folder / PHASES_FILE, trainer.builder, context, num_threads=engine.num_threads
        )
    )
    return TrainingSetup(settings=settings, trainer=trainer, data_loader=data_loader, run=run, memory=memory)


def sheet_writer(validation: TokenStore, context: DistributedContext) -> Callable[[Model, Path], None]:
    """Return a function that generates images for the first validation captions and writes them as a sheet.

    Args:
        validation: The validation store.
        context: The process whose device generates the images.

    Returns:
        A function of the model and the path of the sheet; the captions go into a text file beside it.
    """
    texts = validation.read(range(min(SHEET_IMAGES, len(validation))))["text"]

    def write_sheet(model: Model, path: Path) -> None:
        captions = [model.text_tokenizer.decode(text[text != NO_TOKEN].tolist()) for text in texts]
        placement = DevicePlacement(context.device, model.transformer.embedding.weight.dtype, "training")
        # Not generate, whose notes on repeated images would stand among the lines of the training.
        images = list(CogView(model, placement, "training").generate_iter(captions, seed=0, batch_size=SHEET_IMAGES))
        contact_sheet([np.asarray(image) for image in images], scale=2).save(path)
        path.with_suffix(".txt").write_text("\n".join(captions) + "\n", encoding="utf-8")

    return write_sheet
