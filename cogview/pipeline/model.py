"""A loaded model: opening it, and checking prompts and settings."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from cogview.checkpoints.adapted_weights import open_adapters
from cogview.checkpoints.adapter_choice import AdapterChoice
from cogview.checkpoints.checkpoint import Model, NamedThing, check_folder, load_model
from cogview.checkpoints.fingerprint import fingerprint
from cogview.checkpoints.precision import stored_matrix_dtype, stored_quantization
from cogview.checkpoints.registry import load_registry, resolve_bundle, resolve_checkpoint
from cogview.checkpoints.safetensors_io import WeightsFile
from cogview.device import DevicePlacement, choose_placement, compute_after_forks
from cogview.errors import InputError
from cogview.files import file_sha256
from cogview.modeling.config import GUIDANCE_SETTINGS, ModelConfig, Sampling, guidance_settings
from cogview.modeling.lora import has_adapter
from cogview.modeling.transformer import Transformer
from cogview.pipeline.bundle import Bundle
from cogview.pipeline.context import PipelineContext
from cogview.pipeline.inputs import (
    AdaptersLike,
    describe,
    list_adapters,
    option_text,
    override_sampling,
    require_known_task,
)
from cogview.pipeline.prompt_checks import PromptChecks
from cogview.pipeline.ranking_rules import RankingRule, ranking_rule
from cogview.pipeline.requests import Prompt, tokenize_prompt
from cogview.pipeline.results import GeneratedImage
from cogview.tokenizers.tasks import TASKS
from cogview.tokenizers.text import TextTokenizer
from cogview.tokenizers.vocabulary import Vocabulary
from cogview.vqvae.model import VQVAE

if TYPE_CHECKING:
    from typing_extensions import Self

log = logging.getLogger(__name__)

KV_DTYPES = ("auto", "int8")
FINGERPRINT_DIGITS = 12  # of a fingerprint in the metadata of files
CPU = DevicePlacement(torch.device("cpu"), torch.float32, "by default")


class LoadedModel:
    """One set of weights, or a bundle of several, with its tokenizers.

    Args:
        model: What a checkpoint holds.
        placement: Device and number format.
        name: Name of the weights, for messages and metadata.
        bundle: Transformers by task. The one of ``model`` then has no weights.

    Attributes:
        folder: Checkpoint folder, or None for a bundle.
        adapters: Adapters that were added when the model was opened, with their scales.
        int8_cache: Whether keys and values are kept in int8.
        speculative: Codes to draft per forward pass; 1: none, None: as many as pay.
        prompt_checks: Conversion and checks of prompts.
    """

    def __init__(
        self, model: Model, placement: DevicePlacement = CPU, name: str = "", bundle: Bundle | None = None
    ) -> None:
        if not isinstance(model, Model):
            raise InputError(f"{type(self).__name__}.from_pretrained(name) opens a model, got {describe(model)}")
        compute_after_forks()
        self.model = model
        self.placement = placement
        self.name = name
        self.bundle = bundle
        self.folder: Path | None = None
        self.adapters: tuple[AdapterChoice, ...] = ()
        self.revision: str | None = None
        self.int8_cache = False
        self.speculative: int | None = None
        self.prompt_checks = PromptChecks(model, name)
        # An adapter in training stands in front of the weights, which the layers of a CPU would hide from it.
        if bundle is None and not has_adapter(model.transformer):
            model.transformer.prepare_cpu()

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike[str] = "cogview-emoji",
        *,
        device: str | int | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        kv_dtype: str = "auto",
        adapter: AdaptersLike = None,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
    ) -> Self:
        """Open a model.

        Args:
            name: A checkpoint folder, a model or bundle that ``cogview models`` lists, or owner/name of a model on the
                Hugging Face Hub; the first that exists.
            device: auto, cpu, cuda, cuda:N or mps, the number of a GPU, or a ``torch.device``.
            dtype: auto, float32, bfloat16, float16, int8 or int4, or a ``torch.dtype``.
            kv_dtype: The format of keys and values: auto (as ``dtype`` computes) or int8.
            adapter: LoRA adapters to add to the weights: ``NAME`` or ``NAME:SCALE`` with a folder or owner/name on the
                Hub, a list of these, or a mapping from names to scales. Scale 1 is that of training, 0 is off.
            revision: Of a model on the Hub: a branch, a tag or a commit.
            cache_dir: For models of the Hub; the cache of ``huggingface_hub`` by default.

        Returns:
            The model, ready to generate.

        Raises:
            InputError: If the name is unknown, the model cannot be fetched, its folder is incomplete or damaged, or
                an adapter belongs to another model.

        Examples:
            >>> model = CogView.from_pretrained("cogview-emoji", device="cpu", dtype="bfloat16")
            >>> model.placement.dtype
            torch.bfloat16
            >>> model = CogView.from_pretrained("cogview-emoji", adapter={"my-style": 0.7, "my-things": 1})
        """
        name, kv_dtype = option_text(name, "name", os.PathLike), option_text(kv_dtype, "kv_dtype")
        device, dtype = option_text(device, "device", torch.device, int), option_text(dtype, "dtype", torch.dtype)
        choices = list_adapters(adapter)
        if kv_dtype not in KV_DTYPES:
            raise InputError(f"kv_dtype {kv_dtype!r} is unknown; known: {', '.join(KV_DTYPES)}")
        parts = resolve_bundle(str(name)) if revision is None else {}
        if parts:
            folder = next(iter(parts.values()))
        else:
            folder = resolve_checkpoint(str(name), revision=revision, cache_dir=cache_dir)
        count = check_folder(folder).transformer.num_parameters
        specs = WeightsFile(folder / "model.safetensors").specs
        stored, matrices = stored_quantization(specs), stored_matrix_dtype(specs)
        placement = choose_placement(device, dtype, stored=stored, stored_dtype=matrices, num_parameters=count)
        if parts and choices:
            rows = ", ".join(load_registry()[str(name)].models)
            raise InputError(f"{name} is a bundle of models, an adapter belongs to one: name one of {rows}")
        if parts:
            bundle = Bundle(parts, placement)
            opened = cls(bundle.model, placement, str(name), bundle)
        else:
            adapters = open_adapters(choices, check_folder(folder), str(name))  # before the weights are read
            model = load_model(
                *(folder, placement.device, placement.dtype, placement.quantization),
                adapters=adapters,
                keep_halves=True,
            )
            placement = replace(placement, matrices=model.transformer.embedding.weight.dtype)
            if adapters:
                model.grammar = None  # an adapter may have learnt other words
            if adapters and stored is not None and placement.quantization is not None:
                log.warning(
                    "%s is stored in %s: it is quantized again with the adapter, which adds as large an error; a "
                    "folder of float weights with --dtype %s has one alone",
                    *(name, stored, stored),
                )
            opened = cls(model, placement, str(name))
            opened.adapters, opened.folder = choices, folder
        opened.revision, opened.int8_cache = revision, kv_dtype == "int8"
        return opened

    def __repr__(self) -> str:
        pixels, tasks = self.config.grid * self.image_tokenizer.downsampling, ", ".join(self.config.tasks)
        millions = self.config.transformer.num_parameters / 1e6
        return (
            f"<{type(self).__name__} {self.label}, {millions:,.1f} million parameters, {pixels} x {pixels} pixels, "
            f"tasks {tasks}, {self.placement.device}, {self.placement.weight_format}>"
        )

    @property
    def label(self) -> str:
        """Name of the weights, with the adapters and their scales."""
        return " + ".join([self.name, *map(str, self.adapters)])

    @cached_property
    def file_label(self) -> str:
        """Name of the weights for the metadata of files, without paths of this machine.

        A folder is named by its last part and its fingerprint, so that it can be recognized elsewhere. The scale of an
        adapter follows, unless it is 1, as in "tiny (0123456789ab) + style (ba9876543210):0.5".
        """
        parts = [self.name]
        if self.folder is not None and Path(self.name).is_dir():
            parts = [f"{self.folder.resolve().name} ({fingerprint(self.folder)[:FINGERPRINT_DIGITS]})"]
        for choice in self.adapters:
            weights = Path(choice.name) / "adapter_model.safetensors"
            name = choice.name
            if weights.is_file():
                name = f"{weights.resolve().parent.name} ({file_sha256(weights)[:FINGERPRINT_DIGITS]})"
            parts.append(str(AdapterChoice(name, choice.scale)))
        return " + ".join(parts)

    def file_metadata(self, image: GeneratedImage) -> dict[str, str]:
        """Return the text chunks of the file of an image: what it was generated from, with which weights and formats.

        Args:
            image: An image of this model.

        Returns:
            Texts by key, such as prompt, seed, model, codes, the sampling settings and dtype.

        Examples:
            >>> texts = model.file_metadata(model.generate("一个红苹果", seed=7)[0])
            >>> texts["prompt"], texts["seed"], texts["dtype"]
            ('一个红苹果', '7', 'float32')
        """
        facts = {"dtype": self.placement.weight_format}
        if self.int8_cache:
            facts["kv_dtype"] = "int8"
        if self.revision is not None:
            facts["revision"] = self.revision
        return image.metadata(self.file_label) | facts

    @property
    def config(self) -> ModelConfig:
        """Config of the model; that of a bundle has all its tasks."""
        return self.model.config

    @property
    def transformer(self) -> Transformer:
        """The transformer; in a bundle that of its first task."""
        return self.transformer_for(self.config.tasks[0])

    @property
    def image_tokenizer(self) -> VQVAE:
        """The VQ-VAE: images to codes and back."""
        return self.model.image_tokenizer

    @property
    def text_tokenizer(self) -> TextTokenizer:
        """The SentencePiece model: text to piece ids, counted from 0, and back."""
        return self.model.text_tokenizer

    @property
    def vocabulary(self) -> Vocabulary:
        """Offsets of codes, pieces and commands among the ids."""
        return self.config.vocabulary

    @property
    def things(self) -> tuple[NamedThing, ...]:
        """Objects that a model of a closed world can draw; empty for any other."""
        return self.model.things

    def transformer_for(self, task: str) -> Transformer:
        """Return the transformer for ``task``, loaded if it was not.

        Args:
            task: Name of a task.

        Raises:
            InputError: If the task is unknown, or no part of a bundle does it.
        """
        if self.bundle is None:
            require_known_task(task)
            return self.model.transformer
        self.require_task(task)
        return self.bundle.transformer(TASKS[task].weights)

    @property
    def context(self) -> PipelineContext:
        """The model and its settings as they are now, for the functions of the pipeline."""
        return PipelineContext(
            config=self.config,
            text_tokenizer=self.text_tokenizer,
            image_tokenizer=self.image_tokenizer,
            transformer_for=self.transformer_for,
            planned_transformer=self.model.transformer,
            placement=self.placement,
            int8_cache=self.int8_cache,
            speculative=self.speculative,
            convert_prompt=self.prompt_checks.convert,
        )

    def require_task(self, task: str) -> None:
        """Check that the weights were trained for a task.

        Args:
            task: Name of a task, for example ``upscale``.

        Raises:
            InputError: If they were not, or the part of a bundle that does it is not on this machine.
        """
        weights = TASKS[task].weights if task in TASKS else task
        if weights in self.config.tasks:
            return
        if self.bundle is not None and (part := load_registry()[self.name].parts.get(weights)):
            raise InputError(
                f"the task {task!r} of {self.name} needs {part}, which is not on this machine: cogview download {part}"
            )
        needed = f"{weights!r}" if task == weights else f"{weights!r}, which {task!r} needs"
        known = ", ".join(self.config.tasks)
        raise InputError(f"{self.name} was not trained for the task {needed}; its tasks are: {known}")

    def require_ranking(self, by: str) -> None:
        """Check that the weights can compute a score.

        Args:
            by: Name of the score, such as ``picture``.

        Raises:
            InputError: It is unknown, or the weights were not trained for what it needs.

        Examples:
            >>> model.require_ranking("caption")
        """
        for task in self.ranking_rule(by).tasks:
            self.require_task(task)

    def ranking_rule(self, by: str) -> RankingRule:
        """Return the definition of a score for these weights.

        Args:
            by: Name of the score, such as ``both``.

        Raises:
            InputError: It is unknown.

        Examples:
            >>> list(model.ranking_rule("picture").weights)
            ['picture']
        """
        return ranking_rule(by, masked_codes=self.config.full_mask_rate > 0)

    def sampling(self, base: Sampling | None = None, *, task: str = "generate", **overrides: float | None) -> Sampling:
        """Return sampling settings, completed by those of the model and checked.

        Args:
            base: Settings to start from; None: those of the model for ``task``.
            task: Task that they are for.
            **overrides: Fields of ``Sampling`` to replace; None is ignored.

        Raises:
            InputError: If a value is out of range, or guidance is wanted of weights that cannot be guided.
            TypeError: If ``Sampling`` has no such field.

        Examples:
            >>> model.sampling(temperature=0.8).temperature
            0.8
        """
        return self._resolve_sampling(base, overrides, task)

    def prompt_problem(self, prompt: str) -> str | None:
        """Return why ``prompt`` cannot be used, in one line, or None if it can."""
        try:
            self.tokenize([prompt])
        except InputError as error:
            return str(error)
        return None

    def prompt_warning(self, prompt: str) -> str | None:
        """Return a line on what is converted in ``prompt``, and on what the model does not understand, or None.

        Examples:
            >>> model.prompt_warning("六个红苹果")
            '“六个红苹果”: the model counts to 4 (一、两、三、四), not 六'
        """
        return self.prompt_checks.warning(prompt)

    def tokenize(self, prompts: Sequence[str]) -> list[Prompt]:
        """Return prompts with the piece ids that the model is given.

        Raises:
            InputError: If one is empty, not UTF-8 or too long.
        """
        tokenizer, max_text = self.text_tokenizer, self.config.max_text
        return [tokenize_prompt(prompt, tokenizer, max_text, self.prompt_checks.convert) for prompt in prompts]

    def _config(self, task: str) -> ModelConfig:
        """Return the config of the weights that do ``task``; InputError for an unknown task."""
        require_known_task(task)
        return self.config if self.bundle is None else self.bundle.configs.get(TASKS[task].weights, self.config)

    def _resolve_sampling(self, base: Sampling | None, overrides: dict[str, float | None], task: str) -> Sampling:
        """Return sampling settings as ``sampling`` does."""
        sampling = override_sampling(base or self._config(task).sampling_of(task), overrides)
        self._check_guidance(sampling, task)
        return sampling

    def _check_guidance(self, sampling: Sampling, task: str) -> None:
        """Raise InputError for guidance that the task does not have, or that the weights were not trained for."""
        config = self._config(task)
        for name in GUIDANCE_SETTINGS:
            if (scale := getattr(sampling, name)) == 1:
                continue
            if name not in guidance_settings(TASKS[task]):
                if name == "guidance":
                    raise InputError(
                        f"the task {task!r} has no text that could guide it: guidance must be 1, got {scale:g}"
                    )
                raise InputError(
                    f"the task {task!r} has no source that could guide it: image_guidance must be 1, got {scale:g}"
                )
            if not config.caption_dropout:
                raise InputError(
                    f"{self.name} was trained without caption dropout, so it cannot be guided: {name} must be 1, "
                    f"got {scale:g}; try text attention instead"
                )
            if name == "image_guidance" and not config.source_dropout:
                raise InputError(
                    f"{self.name} was trained without source dropout, so a source cannot guide it: {name} must be 1, "
                    f"got {scale:g}"
                )
