"""What a recipe names: its tokenizers, its stores, and the model with its initial weights."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from cogview.checkpoints.adapter import Adapter, BaseModelInfo, save_adapter
from cogview.checkpoints.checkpoint import Model, NamedThing, load_model
from cogview.checkpoints.image_tokenizer import codebook_hash
from cogview.checkpoints.registry import resolve_checkpoint
from cogview.config_io import to_mapping
from cogview.data.store import TokenStore
from cogview.data.store_watcher import StoreWatcher
from cogview.data.v1_datasets import open_dataset
from cogview.errors import InputError
from cogview.formatting import format_list
from cogview.modeling.config import AttentionConfig, ModelConfig
from cogview.modeling.initialization import load_weights
from cogview.modeling.lora import add_lora
from cogview.modeling.transformer import Transformer
from cogview.tokenizers.layouts import layouts
from cogview.tokenizers.store_tasks import feeds
from cogview.tokenizers.tasks import INSTRUCTION_FIELD, TASKS, check_grid
from cogview.tokenizers.text import TextTokenizer
from cogview.tokenizers.vocabulary import Vocabulary
from cogview.training.data_loader import TrainingStores
from cogview.training.recipe import Recipe
from cogview.training.settings import TransformerSettings
from cogview.training.trainer_state import AdapterFiles, StateMismatchError
from cogview.vqvae.model import VQVAE


@dataclass(frozen=True, kw_only=True, eq=False)
class Tokenizers:
    """The image and the text tokenizer of a recipe."""

    image: VQVAE
    text: TextTokenizer

    @cached_property
    def codebook_sha256(self) -> str:
        """Hash of the codebook, which identifies the image tokenizer."""
        return codebook_hash(self.image)

    @cached_property
    def text_sha256(self) -> str:
        """Hash of the text tokenizer."""
        return hashlib.sha256(self.text.model_bytes).hexdigest()

    def open_store(self, path: Path | str) -> TokenStore:
        """Open a token store, or a dataset of CogView v1 that these tokenizers are taken to have made."""
        return open_dataset(
            path,
            num_image_codes=self.image.config.num_codes,
            num_text_pieces=self.text.size,
            codebook_sha256=self.codebook_sha256,
            text_sha256=self.text_sha256,
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class RecipeStores:
    """The stores of a recipe: those to train on, and that of the evaluation."""

    training: TrainingStores
    validation: TokenStore


def open_all(
    recipe: Recipe, settings: TransformerSettings, things: Sequence[NamedThing] = ()
) -> tuple[Model, RecipeStores]:
    """Return the model with its initial weights, and the stores.

    Args:
        recipe: The recipe.
        settings: Its section ``transformer``.
        things: Objects of a closed world, for the checkpoints.

    Raises:
        InputError: Something that the recipe names is missing or does not fit.
    """
    if settings.validation_store is None:
        recipe.require_held_out_store()
    torch.manual_seed(settings.training.seed)  # random weights follow, in an order that must not change
    tokenizers = open_tokenizers(recipe, settings)
    stores = open_stores(recipe, settings, tokenizers)
    first = next(iter(stores.training.stores.values()))
    try:
        config = model_config(settings, first, tokenizers)
    except ValueError as error:
        raise InputError(f"section transformer of {recipe.path}: {error}") from None
    model = Model(
        config=config,
        transformer=Transformer(config.transformer),
        image_tokenizer=tokenizers.image,
        text_tokenizer=tokenizers.text,
        things=tuple(things),
    )
    initialize(model, settings)
    return model, stores


def open_tokenizers(recipe: Recipe, settings: TransformerSettings) -> Tokenizers:
    """Return the tokenizers of the model ``settings.tokenizers``, or those that the recipe has trained.

    Args:
        recipe: The recipe.
        settings: Its section ``transformer``.

    Raises:
        InputError: They are missing.
    """
    if settings.tokenizers is None:
        return Tokenizers(image=recipe.open_image_tokenizer(), text=recipe.open_text_tokenizer())
    model = load_model(resolve_checkpoint(settings.tokenizers), torch.device("cpu"), torch.float32, meta_only=True)
    return Tokenizers(image=model.image_tokenizer, text=model.text_tokenizer)


def open_stores(recipe: Recipe, settings: TransformerSettings, tokenizers: Tokenizers) -> RecipeStores:
    """Return the stores that the settings name, or those that the recipe has encoded.

    Args:
        recipe: The recipe.
        settings: Its section ``transformer``.
        tokenizers: The tokenizers of the model.

    Raises:
        InputError: A store is missing, or does not fit the tokenizers, the tasks or the other stores.
    """
    training = settings.training
    paths = list(map(Path, settings.stores)) if settings.stores is not None else [settings.store or recipe.store]
    stores = {str(path): tokenizers.open_store(path) for path in paths}
    validation = tokenizers.open_store(settings.validation_store or recipe.held_out_store)
    first = next(iter(stores.values()))
    for store in (*stores.values(), validation):
        store.check_compatible(
            codebook_sha256=tokenizers.codebook_sha256, text_sha256=tokenizers.text_sha256, grid=first.header.grid
        )
        if training.name_loss_weight and "named" not in store.header.fields:
            raise InputError(
                f"{store.path} does not say which name stands where, but name_loss_weight is "
                f"{training.name_loss_weight}: encode the store with named: true, or pictures with a "
                "column of boxes, or set the weight to 0"
            )
    for task in training.tasks:
        validation.check_compatible(layout=task)
        if not any(feeds(store.header.layouts, task) for store in stores.values()):
            first.check_compatible(layout=task)  # raises InputError
    for store in (*stores.values(), validation):
        room = store.header.fields["text"]
        if (longest := store.header.fields.get(INSTRUCTION_FIELD, 0)) > room:
            raise InputError(
                f"{store.path} has instructions of up to {longest} pieces, and texts of up to {room}: make it with as "
                "much room for text"
            )
    if (longest := validation.header.fields["text"]) > (room := first.header.fields["text"]):
        raise InputError(
            f"{validation.path} has texts of up to {longest} pieces, {first.path} of up to {room}: make both stores "
            "with the same room for text"
        )
    watcher = None
    if settings.watch_folder is not None:
        watcher = StoreWatcher(settings.watch_folder, first.header, training.tasks)
    sources = TrainingStores(stores=stores, weights=settings.stores, watcher=watcher, open_store=tokenizers.open_store)
    return RecipeStores(training=sources, validation=validation)


def model_config(settings: TransformerSettings, store: TokenStore, tokenizers: Tokenizers) -> ModelConfig:
    """Return the configuration of a new model for the rows of ``store``.

    Args:
        settings: The section ``transformer`` of the recipe.
        store: The first store.
        tokenizers: The tokenizers of the model.

    Raises:
        ValueError: A setting is outside its range, or there are fewer positions than the rows need.
    """
    vocabulary = Vocabulary(num_image_codes=tokenizers.image.config.num_codes, num_text_pieces=tokenizers.text.size)
    transformer = settings.transformer_config(vocabulary.padded_size)
    header, max_text = store.header, store.header.fields["text"]
    tasks = tuple(settings.training.tasks)
    check_grid(tasks, header.grid)
    table = layouts(header.grid, text_positions=max_text)
    edits = any(TASKS[task].masked_image is not None and not TASKS[task].fills for task in tasks)
    if (needed := max(table[task].max_position(max_text) for task in tasks)) > settings.max_positions:
        raise ValueError(f"max_positions {settings.max_positions} are too few for the rows of {store.path}: {needed}")
    return ModelConfig(
        transformer=transformer,
        vocabulary=vocabulary,
        grid=header.grid,
        tasks=tasks,
        max_text=max_text,
        text_positions=max_text,
        caption_dropout=settings.training.caption_dropout,
        source_dropout=settings.training.source_dropout if edits else 0.0,
        full_mask_rate=settings.training.full_mask_rate,
        codebook_sha256=header.codebook_sha256,
        sampling=settings.sampling,
        fit=header.provenance.get("pictures", {}).get("fit", "crop"),
    )


def initialize(model: Model, settings: TransformerSettings) -> None:
    """Load the weights of ``settings.init_from`` into a new model, and inject LoRA layers, if the settings say so.

    Args:
        model: The new model.
        settings: The section ``transformer`` of the recipe.

    Raises:
        InputError: The model ``init_from`` is unknown or has another shape.
    """
    if settings.init_from is not None:
        source = load_model(resolve_checkpoint(settings.init_from), torch.device("cpu"), torch.float32)
        load_weights(model, source, settings.init_from)
        _compare_attention(settings, source.config.transformer.attention)
        if model.config.codebook_sha256 != source.config.codebook_sha256:
            print(
                f"note: {settings.init_from} was trained on another codebook; the image codes are learned anew",
                file=sys.stderr,
            )
    if settings.lora is not None:
        add_lora(model.transformer, settings.lora, word_ids(model, settings.lora.words))


def _compare_attention(settings: TransformerSettings, found: AttentionConfig) -> None:
    """Print a note if the model ``init_from`` has another pattern of attention; raise InputError for an adapter."""
    if settings.attention == found:
        return
    expected, other = (json.dumps(to_mapping(pattern)) for pattern in (settings.attention, found))
    if settings.lora is not None:
        raise InputError(
            f"an adapter has the attention of its base model: {settings.init_from} has {other}, this recipe "
            f"{expected}; set attention in the section transformer to that of the model"
        )
    print(
        f"note: {settings.init_from} was trained with the attention {other}; this recipe has {expected}, which the "
        "weights have to learn",
        file=sys.stderr,
    )


def word_ids(model: Model, words: Sequence[str]) -> list[int]:
    """Return the ids of words: of their pieces, or of their bytes where the text tokenizer has no piece.

    Args:
        model: The model.
        words: The words.

    Raises:
        InputError: A word is nothing but spaces to the text tokenizer.
    """
    ids: set[int] = set()
    for word in words:
        pieces = model.text_tokenizer.encode(word)
        if not pieces:
            raise InputError(f"lora.words: {word!r} has no pieces; expected a text")
        ids.update(model.config.vocabulary.text[piece] for piece in pieces)
    if ids:
        print(f"embeddings of {len(ids)} pieces are learnt: those of {format_list(words, joint='、')}", file=sys.stderr)
    return sorted(ids)


def adapter_files(model: Model, settings: TransformerSettings) -> AdapterFiles | None:
    """Return how to write and read the adapter that is trained; None if the whole model is trained.

    Args:
        model: The model.
        settings: The section ``transformer`` of the recipe.
    """
    lora, init_from = settings.lora, settings.init_from
    if lora is None or init_from is None:
        return None
    base = BaseModelInfo.of(init_from, model.config)

    def write(folder: Path, weights: Mapping[str, Tensor]) -> None:
        save_adapter(folder, model.transformer, lora, base, weights)

    def read(folder: Path) -> dict[str, Tensor]:
        adapter = Adapter(folder)
        try:
            adapter.check_model(model.config, init_from)
        except InputError as error:
            raise StateMismatchError(str(error)) from None
        return adapter.weights()

    return AdapterFiles(write=write, read=read)
