"""``cogview train``: train the transformer on a store."""

from __future__ import annotations

import argparse
import hashlib
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from cogview.checkpoints.folder import Model, ModelConfig, NamedThing, load_model
from cogview.checkpoints.image import codebook_hash
from cogview.checkpoints.registry import find_checkpoint
from cogview.cli.recipes import Recipe, add_recipe_arguments, add_training_arguments, open_recipe
from cogview.config import preset
from cogview.config_files import to_plain
from cogview.data.emoji.world import World
from cogview.data.released import open_rows
from cogview.data.store import ABSENT, TokenStore
from cogview.device import choose_placement, flush_denormals, training_dtype
from cogview.errors import InputError
from cogview.pipeline import CogView
from cogview.sampling import Sampling
from cogview.sheets import contact_sheet
from cogview.tokenizers.layouts import layouts
from cogview.tokenizers.text import TextTokenizer
from cogview.tokenizers.vocabulary import Vocabulary
from cogview.training.run import Run, RunSettings, run_loop
from cogview.training.transformer import TransformerTrainer, TransformerTraining, store_batches
from cogview.transformer import Transformer
from cogview.vqvae.model import VQVAE

SHEET_PICTURES = 24


@dataclass(frozen=True, kw_only=True)
class TransformerSettings:
    """The ``transformer`` section of a recipe."""

    training: TransformerTraining
    preset: str = "5m"
    max_positions: int = 1089
    dropout: float = 0.1
    branch_gain: float = 1.0
    sinusoidal_positions: bool = False
    start_from: str | None = None  # a model whose weights to begin with, by name or folder; None: fresh ones
    sampling: Sampling = field(default_factory=Sampling)  # of the sample sheets, and of the model until it is packaged
    run: RunSettings = field(default_factory=RunSettings)
    precision: str = "auto"
    # Token stores, or released datasets of the recipe's tokenizers; None: what ``cogview encode`` left below ``work``.
    store: Path | None = None
    held_out_store: Path | None = None

    def __post_init__(self) -> None:
        if (self.store is None) != (self.held_out_store is None):
            raise ValueError("store and held_out_store belong together: give both, or neither")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    add_recipe_arguments(parser, "transformer")
    add_training_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Train; every checkpoint is a folder that ``cogview generate --model`` opens."""
    flush_denormals()
    recipe = open_recipe(args)
    settings = recipe.settings(TransformerSettings, "transformer")
    placement = choose_placement(args.device, "float32")
    torch.manual_seed(settings.training.seed)
    image_tokenizer, text_tokenizer = recipe.open_image_tokenizer(), recipe.open_text_tokenizer()
    store, held_out = open_stores(recipe, settings, image_tokenizer, text_tokenizer)
    model = new_model(recipe, settings, store, image_tokenizer, text_tokenizer)
    if settings.start_from is not None:
        load_weights(model, settings.start_from)
    model.image_tokenizer.to(placement.device)  # it draws the sample sheets
    captions = [
        model.text_tokenizer.decode(text[text != ABSENT].tolist())
        for text in held_out.read(range(min(SHEET_PICTURES, len(held_out))))["text"]
    ]

    def draw_sheet(model: Model, path: Path) -> None:
        pictures = CogView(model, placement, "training").generate(captions, seed=0, batch_size=SHEET_PICTURES)
        contact_sheet([np.asarray(picture) for picture in pictures], scale=2).save(path)
        path.with_suffix(".txt").write_text("\n".join(captions) + "\n", encoding="utf-8")

    trainer = TransformerTrainer(
        model,
        settings.training,
        placement.device,
        training_dtype(placement.device, settings.precision),
        held_out=held_out,
        draw_sheet=draw_sheet if "generate" in model.config.tasks else None,
    )
    return run_loop(
        trainer,
        lambda step: store_batches(store, settings.training, step),
        Run(recipe.transformer_run),
        settings.run,
        recipe=to_plain(settings),
        steps=settings.training.steps,
        batch_size=settings.training.batch_size,
        resume=args.resume == "auto",
    )


def open_stores(
    recipe: Recipe, settings: TransformerSettings, image_tokenizer: VQVAE, text_tokenizer: TextTokenizer
) -> tuple[TokenStore, TokenStore]:
    """The rows to train on and those held out; InputError unless they suit the tokenizers, the tasks and each other."""
    codebook, text = codebook_hash(image_tokenizer), hashlib.sha256(text_tokenizer.model_bytes).hexdigest()
    store, held_out = (
        open_rows(
            path,
            num_image_codes=image_tokenizer.config.num_codes,
            num_text_pieces=text_tokenizer.size,
            codebook_sha256=codebook,
            text_sha256=text,
        )
        for path in (settings.store or recipe.store, settings.held_out_store or recipe.held_out_store)
    )
    for rows in (store, held_out):
        rows.require(codebook_sha256=codebook, text_sha256=text, grid=store.header.grid)
        for task in settings.training.tasks:
            rows.require(layout=task)
        if settings.training.name_loss_weight and "named" not in rows.header.fields:
            raise InputError(
                f"{rows.path} does not say which name stands where, but name_loss_weight is "
                f"{settings.training.name_loss_weight}: encode the store with named: true, or set the weight to 0"
            )
    if (longest := held_out.header.fields["text"]) > (room := store.header.fields["text"]):
        raise InputError(
            f"{held_out.path} has texts of up to {longest} pieces, {store.path} of up to {room}: make both stores with "
            "the same room for text"
        )
    return store, held_out


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
            branch_gain=settings.branch_gain,
            sinusoidal_positions=settings.sinusoidal_positions,
        )
        max_text = store.header.fields["text"]
        table = layouts(store.header.grid, text_space=max_text)
        tasks = tuple(settings.training.tasks)
        if (needed := max(table[task].num_positions(max_text) for task in tasks)) > settings.max_positions:
            raise ValueError(
                f"max_positions {settings.max_positions} are too few for the rows of {store.path}: {needed}"
            )
        config = ModelConfig(
            transformer=shape,
            vocabulary=vocabulary,
            grid=store.header.grid,
            tasks=tasks,
            max_text=max_text,
            text_space=max_text,
            caption_drop=settings.training.caption_drop,
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


def load_weights(model: Model, name: str) -> None:
    """Begin with the weights of the model ``name``: the same layers and number of codes, where tokenizers may differ.

    Pieces that both have keep their embeddings; a new one begins as the mean of the pieces it was spelt in before.
    Codes keep the embeddings of their numbers, which serves where the image tokenizer went on from the other's, too.
    """
    other = load_model(find_checkpoint(name), torch.device("cpu"), torch.float32)
    shape, other_shape = (
        (
            replace(config.transformer, dropout=0.0, branch_gain=1.0, sinusoidal_positions=False, vocabulary_size=1),
            config.vocabulary.num_image_codes,
        )
        for config in (model.config, other.config)
    )
    if shape != other_shape:
        raise InputError(f"start_from: {name} has another shape than this recipe; its weights mean nothing here")
    if model.config.codebook_sha256 != other.config.codebook_sha256:
        print(f"note: {name} was trained on another codebook; what the codes look like is learnt anew", file=sys.stderr)
    weights = other.transformer.state_dict()
    old_rows, rows = weights["embedding.weight"], model.transformer.embedding.weight.detach().clone()
    old, new = other.config.vocabulary, model.config.vocabulary
    for ids, old_ids in ((new.image, old.image), (new.commands, old.commands)):
        rows[ids.start : ids.stop] = old_rows[old_ids.start : old_ids.stop]
    old_pieces = {piece: number for number, piece in enumerate(other.text_tokenizer.pieces)}
    for number, piece in enumerate(model.text_tokenizer.pieces):
        same = old_pieces.get(piece)
        spelt = [same] if same is not None else other.text_tokenizer.encode(piece)
        rows[new.text[number]] = old_rows[[old.text[i] for i in spelt]].mean(dim=0)
    model.transformer.load_state_dict({**weights, "embedding.weight": rows})


def named_things(world: Path) -> tuple[NamedThing, ...]:
    """The things of the emoji world in ``world``; none where there is no such world."""
    if not world.is_dir():
        return ()
    return tuple(
        NamedThing(name=thing.name, emoji=thing.emoji, synonyms=thing.synonyms) for thing in World.load(world).things
    )
