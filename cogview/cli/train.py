"""``cogview train``: train the transformer on a store, or on several."""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cogview.checkpoints.adapter import Adapter, BaseModelInfo, save_adapter
from cogview.checkpoints.checkpoint import Model, NamedThing, load_model
from cogview.checkpoints.image_tokenizer import codebook_hash
from cogview.checkpoints.registry import resolve_checkpoint
from cogview.cli.recipes import Recipe, add_recipe_arguments, add_training_arguments, open_recipe
from cogview.config_io import to_mapping
from cogview.data.phases import PHASES_FILE
from cogview.data.store import NO_TOKEN, TokenStore
from cogview.data.store_watcher import StoreWatcher
from cogview.data.v1_datasets import open_dataset
from cogview.device import DevicePlacement, available_memory, flush_denormals, precision_name, training_dtype
from cogview.emoji.world import EmojiWorld as EmojiWorld
from cogview.errors import InputError, ReportedByPeer
from cogview.image_io.contact_sheet import contact_sheet
from cogview.modeling.config import ModelConfig, Sampling, preset
from cogview.modeling.initialization import load_weights
from cogview.modeling.lora import LoraSettings, add_lora
from cogview.modeling.transformer import Transformer
from cogview.pipeline.cogview import CogView
from cogview.planning.gpus import peak_flops
from cogview.planning.hardware import measure_hardware
from cogview.planning.training import (
    TrainingJob,
    TrainingMemory,
    choose_micro_batch,
    training_memory,
)
from cogview.planning.training_time import flops_per_token
from cogview.tokenizers.layouts import layouts
from cogview.tokenizers.text import TextTokenizer
from cogview.tokenizers.vocabulary import Vocabulary
from cogview.training.data_loader import TrainingDataLoader
from cogview.training.distributed import (
    DistributedContext,
    destroy_distributed,
    exit_process,
    init_distributed,
    log_main,
)
from cogview.training.loop import RunFolder, RunSettings, run_loop
from cogview.training.plots import save_run_plots
from cogview.training.run_record import write_environment
from cogview.training.settings import EngineSettings, TransformerTraining
from cogview.training.trainer import AdapterFiles, MonitorSettings, TransformerTrainer
from cogview.vqvae.model import VQVAE

SHEET_PICTURES = 24


@dataclass(frozen=True, kw_only=True)
class TransformerSettings:
    """The ``transformer`` section of a recipe."""

    training: TransformerTraining
    preset: str = "5m"
    num_layers: int | None = None  # others than the preset's: few, to try out a recipe for a large model
    max_positions: int = 1089
    dropout: float = 0.1
    branch_norm_init: float = 1.0
    sinusoidal_positions: bool = False
    tokenizers: str | None = None  # a model whose tokenizers to use, by name or folder; None: those below ``work``
    init_from: str | None = None  # a model whose weights to begin with, by name or folder; None: fresh ones
    lora: LoraSettings | None = None  # learn an adapter of ``init_from``, whose weights stay as they are
    engine: EngineSettings = field(default_factory=EngineSettings)
    sampling: Sampling = field(default_factory=Sampling)  # of the sample sheets, and of the model until it is packaged
    run: RunSettings = field(default_factory=RunSettings)
    precision: str = "auto"
    # Token stores, or released datasets of the recipe's tokenizers; None: what ``cogview encode`` left below ``work``.
    # ``stores`` are several, each with its share of the rows, instead of one. Every store that comes to the folder
    # ``watch_folder`` while training goes on is mixed in from then on, each of its rows as likely as one of the others.
    store: Path | None = None
    stores: dict[str, float] | None = None
    watch_folder: Path | None = None
    validation_store: Path | None = None

    def __post_init__(self) -> None:
        if self.store is not None and self.stores is not None:
            raise ValueError("store is one store and stores are several: give either")
        if (self.store is None and self.stores is None) != (self.validation_store is None):
            given = "store" if self.stores is None else "stores"
            raise ValueError(f"{given} and validation_store belong together: give both, or neither")
        for path, share in (self.stores or {}).items():
            if not 0 < share < float("inf"):
                raise ValueError(f"the share of the store {path} must be above 0, got {share}")
        if self.lora is not None and self.init_from is None:
            raise ValueError("lora learns an adapter of a model: name it in init_from")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.description = (
        "Train the transformer. One process as it stands; several with torchrun --nproc-per-node N --no-python cogview "
        "train RECIPE, or deepspeed --module cogview train RECIPE, which share the batch of the recipe."
    )
    add_recipe_arguments(parser, "transformer")
    add_training_arguments(parser)
    parser.add_argument(
        "--init-from",
        metavar="NAME_OR_FOLDER",
        help="begin with the weights of this model or checkpoint, with a new optimizer at step 0 (the recipe's "
        "init_from)",
    )


def run(args: argparse.Namespace) -> int:
    """Train; every checkpoint is a folder that ``cogview generate --model`` opens."""
    flush_denormals()
    try:
        recipe = open_recipe(args)
        settings = recipe.settings(TransformerSettings, "transformer")
        if args.init_from is not None:
            settings = replace(settings, init_from=args.init_from)
        world = init_distributed(args.device, needs_group=settings.engine.name == "deepspeed")
    except InputError as error:
        if os.environ.get("RANK", "0") != "0":  # the first process says the same
            raise ReportedByPeer(str(error)) from None
        raise
    try:
        status = train(recipe, settings, world, resume=args.resume == "auto")
    finally:
        destroy_distributed()
    exit_process(status)
    return status


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainingSetup:
    """A recipe's transformer, ready to be trained."""

    trainer: TransformerTrainer
    data_loader: TrainingDataLoader
    run: RunFolder
    memory: TrainingMemory  # of a process, as it is predicted


def train(recipe: Recipe, settings: TransformerSettings, world: DistributedContext, *, resume: bool) -> int:
    """The run of a recipe, in this process of ``world``."""
    prepared = prepare(recipe, settings, world)
    run, trainer = prepared.run, prepared.trainer

    def started(checkpoint: Path | None) -> None:
        if checkpoint is None and settings.init_from is not None:
            log_main(f"begins with the weights of {settings.init_from}, and a new optimizer", world)
        write_environment(
            run.folder,
            recipe_path=recipe.path,
            world_size=world.size,
            engine=settings.engine.name,
            device=world.device,
            resumed_from=checkpoint,
        )

    try:
        return run_loop(
            trainer,
            prepared.data_loader.batches,
            run,
            settings.run,
            recipe=to_mapping(settings),
            steps=settings.training.steps,
            batch_size=settings.training.batch_size,
            resume=resume,
            world=world,
            renew=prepared.data_loader.refresh,
            started=started,
        )
    finally:
        trainer.close()
        prepared.data_loader.close()
        if world.is_main_process and run.metrics.is_file():
            save_run_plots(run.folder)


def prepare(
    recipe: Recipe, settings: TransformerSettings, world: DistributedContext, run_folder: Path | None = None
) -> TrainingSetup:
    """Open what the recipe names and make its trainer; InputError in one process of all where something is wrong.

    ``run_folder``: another than the recipe's.
    """
    run = RunFolder(run_folder or recipe.transformer_run, world.is_main_process)
    dtype = world.run_everywhere(lambda: training_dtype(world.device, settings.precision))
    model, stores, held_out = world.run_everywhere(lambda: open_all(recipe, settings))
    settings, memory = world.run_everywhere(lambda: planned(settings, model, world, dtype))
    model.image_tokenizer.to(world.device)  # it draws the sample sheets
    trainer = TransformerTrainer(
        model,
        settings.training,
        world,
        dtype,
        engine=settings.engine,
        validation_store=held_out,
        adapter=adapter_files(model, settings),
        draw_sheet=sheet_drawer(held_out, world) if "generate" in model.config.tasks else None,
        monitor=MonitorSettings(
            every=settings.run.log_every,
            peak_flops=peak_of(world, dtype),
            flops_per_token=flops_per_token(model.config.transformer, model.config.longest_row()),
            dumps=run.folder / "nonfinite",
        ),
    )
    shares = [(settings.stores or {}).get(name, 1.0) for name in stores]
    header = next(iter(stores.values())).header
    supply = world.run_everywhere(
        lambda: TrainingDataLoader(
            stores,
            shares,
            run.folder / PHASES_FILE,
            trainer.builder,
            world,
            watcher=None
            if settings.watch_folder is None
            else StoreWatcher(settings.watch_folder, header, settings.training.tasks),
            open_store=lambda name: open_store(Path(name), model),
            num_threads=trainer.num_threads,
            micro_batch_size=settings.training.micro_batch_size,
        )
    )
    return TrainingSetup(trainer=trainer, data_loader=supply, run=run, memory=memory)


def open_all(recipe: Recipe, settings: TransformerSettings) -> tuple[Model, dict[str, TokenStore], TokenStore]:
    """The model to train, with the weights that it begins with; the stores by name; and the one held out."""
    torch.manual_seed(settings.training.seed)
    image_tokenizer, text_tokenizer = open_tokenizers(recipe, settings)
    stores, held_out = open_stores(recipe, settings, image_tokenizer, text_tokenizer)
    model = new_model(recipe, settings, next(iter(stores.values())), image_tokenizer, text_tokenizer)
    if settings.init_from is not None:
        source = load_model(resolve_checkpoint(settings.init_from), torch.device("cpu"), torch.float32)
        load_weights(model, source, settings.init_from)
        if model.config.codebook_sha256 != source.config.codebook_sha256:
            print(
                f"note: {settings.init_from} was trained on another codebook; what the codes look like is learnt anew",
                file=sys.stderr,
            )
    if settings.lora is not None:
        add_lora(model.transformer, settings.lora)
    return model, stores, held_out


def adapter_files(model: Model, settings: TransformerSettings) -> AdapterFiles | None:
    """How the adapter that is learnt goes into checkpoints and out of them; None where the whole model is learnt."""
    lora, init_from = settings.lora, settings.init_from
    if lora is None or init_from is None:
        return None
    base = BaseModelInfo.of(init_from, model.config)

    def read(folder: Path) -> dict[str, Tensor]:
        adapter = Adapter(folder)
        adapter.check_model(model.config, init_from)
        return adapter.weights()

    return AdapterFiles(
        write=lambda folder, weights: save_adapter(folder, model.transformer, lora, base, weights), read=read
    )


def open_tokenizers(recipe: Recipe, settings: TransformerSettings) -> tuple[VQVAE, TextTokenizer]:
    """Those of the model ``tokenizers``, or what the earlier steps of the recipe left."""
    if settings.tokenizers is None:
        return recipe.open_image_tokenizer(), recipe.open_text_tokenizer()
    model = load_model(resolve_checkpoint(settings.tokenizers), torch.device("cpu"), torch.float32, meta_only=True)
    return model.image_tokenizer, model.text_tokenizer


def planned(
    settings: TransformerSettings, model: Model, world: DistributedContext, dtype: torch.dtype | None
) -> tuple[TransformerSettings, TrainingMemory]:
    """``settings`` with the rows that are computed at once, and what is computed again, decided by what fits.

    And the memory that a process then takes.
    """
    training, engine = settings.training, settings.engine
    own_rows = max(1, training.batch_size // world.size)
    trained = sum(parameter.numel() for parameter in model.transformer.parameters() if parameter.requires_grad)
    job = TrainingJob(
        transformer=model.config.transformer,
        length=model.config.longest_row(),
        micro_batch_size=min(training.micro_batch_size or own_rows, own_rows),
        batch_size=own_rows * world.size,
        precision=precision_name(dtype),  # type: ignore[arg-type]
        trainable=trained if settings.lora is not None else None,
        engine=engine.name,
        zero=engine.zero if engine.name == "deepspeed" else 0,
        world_size=world.size,
        offload=engine.offload,
        checkpointing="none" if engine.checkpointing == "auto" else engine.checkpointing,
        device_type=world.device.type,
    )
    on_cpu = world.device.type == "cpu"
    free = -world.all_reduce_max(-available_memory(world.device)) / (world.size if on_cpu else 1)
    rows, mode = choose_micro_batch(
        job,
        free,
        None if engine.checkpointing == "auto" else engine.checkpointing,
        job.micro_batch_size
        if training.micro_batch_size or on_cpu
        else None,  # on a CPU more rows at once are no faster
    )
    job = replace(job, micro_batch_size=rows, checkpointing=mode)
    if job.micro_batch_size < own_rows or job.checkpointing != "none":
        told = f"{job.micro_batch_size} of {own_rows} rows at once in each process, activation checkpointing: {job.checkpointing}"
        log_main(told, world)
    return (
        replace(
            settings,
            training=replace(training, micro_batch_size=job.micro_batch_size),
            engine=replace(engine, checkpointing=job.checkpointing),
        ),
        training_memory(job),
    )


def peak_of(world: DistributedContext, dtype: torch.dtype | None) -> float:
    """FLOP/s of this process's device in what products are computed in: of the data sheet, or measured."""
    name = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else world.device.type
    return peak_flops(name, precision_name(dtype)) or measure_hardware(world.device, dtype or torch.float32).flops


def sheet_drawer(held_out: TokenStore, world: DistributedContext) -> Callable[[Model, Path], None]:
    """What draws the captions of the first held-out rows as a sheet, and writes them beside it."""
    texts = held_out.read(range(min(SHEET_PICTURES, len(held_out))))["text"]

    def draw_sheet(model: Model, path: Path) -> None:
        captions = [model.text_tokenizer.decode(text[text != NO_TOKEN].tolist()) for text in texts]
        placement = DevicePlacement(world.device, model.transformer.embedding.weight.dtype, "training")
        pictures = CogView(model, placement, "training").generate(captions, seed=0, batch_size=SHEET_PICTURES)
        contact_sheet([np.asarray(picture) for picture in pictures], scale=2).save(path)
        path.with_suffix(".txt").write_text("\n".join(captions) + "\n", encoding="utf-8")

    return draw_sheet


def open_store(path: Path, model: Model) -> TokenStore:
    """A store, or a released dataset that the tokenizers of ``model`` made."""
    return open_dataset(
        path,
        num_image_codes=model.config.vocabulary.num_image_codes,
        num_text_pieces=model.config.vocabulary.num_text_pieces,
        codebook_sha256=model.config.codebook_sha256,
        text_sha256=hashlib.sha256(model.text_tokenizer.model_bytes).hexdigest(),
    )


def open_stores(
    recipe: Recipe, settings: TransformerSettings, image_tokenizer: VQVAE, text_tokenizer: TextTokenizer
) -> tuple[dict[str, TokenStore], TokenStore]:
    """The stores to train on by their names in the recipe, and the one held out.

    InputError unless they suit the tokenizers, the tasks and each other.
    """
    codebook, text = codebook_hash(image_tokenizer), hashlib.sha256(text_tokenizer.model_bytes).hexdigest()

    def opened(path: Path) -> TokenStore:
        return open_dataset(
            path,
            num_image_codes=image_tokenizer.config.num_codes,
            num_text_pieces=text_tokenizer.size,
            codebook_sha256=codebook,
            text_sha256=text,
        )

    paths = list(map(Path, settings.stores)) if settings.stores is not None else [settings.store or recipe.store]
    stores = {str(path): opened(path) for path in paths}
    held_out = opened(settings.validation_store or recipe.held_out_store)
    first = next(iter(stores.values()))
    for rows in (*stores.values(), held_out):
        rows.check_compatible(codebook_sha256=codebook, text_sha256=text, grid=first.header.grid)
        for task in settings.training.tasks:
            rows.check_compatible(layout=task)
        if settings.training.name_loss_weight and "named" not in rows.header.fields:
            raise InputError(
                f"{rows.path} does not say which name stands where, but name_loss_weight is "
                f"{settings.training.name_loss_weight}: encode the store with named: true, or set the weight to 0"
            )
    if (longest := held_out.header.fields["text"]) > (room := first.header.fields["text"]):
        raise InputError(
            f"{held_out.path} has texts of up to {longest} pieces, {first.path} of up to {room}: make both stores with "
            "the same room for text"
        )
    return stores, held_out


def new_model(
    recipe: Recipe,
    settings: TransformerSettings,
    store: TokenStore,
    image_tokenizer: VQVAE,
    text_tokenizer: TextTokenizer,
) -> Model:
    """A transformer with fresh weights for the rows of ``store``, and the tokenizers that made them."""
    vocabulary = Vocabulary(num_image_codes=image_tokenizer.config.num_codes, num_text_pieces=text_tokenizer.size)
    try:
        shape = preset(
            settings.preset,
            vocabulary.padded_size,
            max_positions=settings.max_positions,
            dropout=settings.dropout,
            branch_norm_init=settings.branch_norm_init,
            sinusoidal_positions=settings.sinusoidal_positions,
        )
        if settings.num_layers is not None:
            shape = replace(shape, num_layers=settings.num_layers)
        max_text = store.header.fields["text"]
        table = layouts(store.header.grid, text_positions=max_text)
        tasks = tuple(settings.training.tasks)
        if (needed := max(table[task].max_position(max_text) for task in tasks)) > settings.max_positions:
            raise ValueError(
                f"max_positions {settings.max_positions} are too few for the rows of {store.path}: {needed}"
            )
        config = ModelConfig(
            transformer=shape,
            vocabulary=vocabulary,
            grid=store.header.grid,
            tasks=tasks,
            max_text=max_text,
            text_positions=max_text,
            caption_dropout=settings.training.caption_dropout,
            codebook_sha256=store.header.codebook_sha256,
            sampling=settings.sampling,
        )
    except ValueError as error:
        raise InputError(f"section transformer of {recipe.path}: {error}") from None
    return Model(
        config=config,
        transformer=Transformer(shape),
        image_tokenizer=image_tokenizer,
        text_tokenizer=text_tokenizer,
        things=named_things(recipe.world),
    )


def named_things(world: Path) -> tuple[NamedThing, ...]:
    """The things of the emoji world in ``world``; none where there is no such world."""
    if not world.is_dir():
        return ()
    return tuple(
        NamedThing(name=thing.name, emoji=thing.emoji, synonyms=thing.synonyms)
        for thing in EmojiWorld.load(world).things
    )
