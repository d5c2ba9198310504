"""Adapter folders in PEFT's format: reading, checking, writing, and merging into a model.

An adapter is a folder with ``adapter_config.json`` and ``adapter_model.safetensors``, as PEFT writes them, and
``cogview.json``, which identifies the base model. ``cogview.modeling.lora`` has the layers and the arithmetic.
"""

# N outputs, K inputs, R rank
from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cogview.checkpoints.finite import require_finite
from cogview.checkpoints.image_tokenizer import write_weights
from cogview.checkpoints.registry import load_registry, resolve_adapter
from cogview.checkpoints.safetensors_io import WeightsFile
from cogview.config_io import from_mapping, to_mapping
from cogview.errors import InputError
from cogview.files import write_json
from cogview.formatting import shorten
from cogview.modeling.config import PROJECTIONS, ModelConfig, TransformerConfig
from cogview.modeling.lora import (
    MAX_RANK,
    TOKEN_ROWS,
    LoraSettings,
    LowRankChange,
    RowChange,
    add_lora,
    has_adapter,
    lora_parameters,
    trained_token_ids,
)
from cogview.modeling.transformer import Transformer
from cogview.plain_data import read_json

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
BASE_FILE = "cogview.json"
PREFIX = "base_model.model."  # of every name in PEFT's files
STORED_ROWS = PREFIX + TOKEN_ROWS.removesuffix(".default")

# Settings of PEFT's LoRA that do not change the output of a trained adapter, or that are checked below. Any other
# setting would need another formula.
_SUPPORTED_PEFT_KEYS = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "bias",
        "corda_config",
        "ensure_weight_tying",
        "eva_config",
        "exclude_modules",
        "inference_mode",
        "init_lora_weights",
        "layers_pattern",
        "layers_to_transform",
        "loftq_config",
        "lora_alpha",
        "lora_dropout",
        "lora_ga_config",
        "megatron_config",
        "megatron_core",
        "peft_type",
        "peft_version",
        "qalora_group_size",
        "r",
        "revision",
        "runtime_config",
        "target_modules",
        "task_type",
        "trainable_token_indices",
        "use_rslora",
    }
)
# Supported initial values of A and B. Others, such as PiSSA, change the weights of the model itself.
_SUPPORTED_INITS = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True, kw_only=True)
class BaseModelInfo:
    """The model that an adapter was made for: its name or folder, the hash of its codebook, and its shape."""

    name: str
    codebook_sha256: str
    num_layers: int
    width: int
    num_heads: int
    vocabulary_size: int

    @classmethod
    def of(cls, name: str, config: ModelConfig) -> BaseModelInfo:
        """Return the info of a model.

        Args:
            name: name or folder of the model.
            config: its config.
        """
        shape = config.transformer
        return cls(
            name=name,
            codebook_sha256=config.codebook_sha256,
            num_layers=shape.num_layers,
            width=shape.width,
            num_heads=shape.num_heads,
            vocabulary_size=shape.vocabulary_size,
        )

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Layers, width, heads and size of the vocabulary."""
        return self.num_layers, self.width, self.num_heads, self.vocabulary_size


class Adapter:
    """An adapter's folder; its weights stay in their file.

    For rank-stabilised LoRA (arXiv:2312.03732, scale alpha / sqrt(R)), ``settings`` has the alpha of equal scale.
    ``base`` is None if another program wrote the folder. ``projections`` names the changed projections, ``token_ids``
    the ids with embeddings of their own.

    Args:
        folder: a folder, or ``owner/name`` on the Hugging Face Hub.
        scale: factor of its changes, besides alpha / R: 1 as trained, 0 off.

    Raises:
        InputError: if the folder is missing, incomplete or damaged, or its settings are not supported.
    """

    def __init__(self, folder: str | Path, scale: float = 1.0) -> None:
        self.folder, self.scale = resolve_adapter(folder), scale
        if not self.folder.is_dir():
            raise InputError(
                f"there is no adapter at {folder}: expected a folder with {CONFIG_FILE} and {WEIGHTS_FILE}"
            )
        for name in (CONFIG_FILE, WEIGHTS_FILE):
            if not (self.folder / name).is_file():
                raise InputError(f"the adapter {folder} is incomplete: {name} is missing")
        plain = _read_object(self.folder / CONFIG_FILE)
        self.base_name = str(plain.get("base_model_name_or_path") or "")
        self.base: BaseModelInfo | None = None
        if (self.folder / BASE_FILE).is_file():
            self.base = from_mapping(
                BaseModelInfo, _read_object(self.folder / BASE_FILE), where=str(self.folder / BASE_FILE)
            )
        self._file = WeightsFile(self.folder / WEIGHTS_FILE)
        rank, alpha, dropout = self._numbers(plain)
        self.token_ids = self._token_ids(plain.get("trainable_token_indices"))
        self.projections = self._projections(rank)
        targets = tuple(
            target for target in PROJECTIONS if any(name.endswith(f".{target}") for name in self.projections)
        )
        try:
            self.settings = LoraSettings(rank=rank, alpha=alpha, dropout=dropout, targets=targets)
        except ValueError as error:
            raise InputError(f"{self.folder / CONFIG_FILE}: {error}") from None

    def _numbers(self, plain: Mapping[str, Any]) -> tuple[int, float, float]:
        """Return rank, alpha and dropout of PEFT's settings."""
        path = self.folder / CONFIG_FILE
        if (kind := plain.get("peft_type")) != "LORA":
            raise InputError(f"{path}: the adapter is of the type {kind}, and only LORA can be used")
        others = [name for name, value in plain.items() if name not in _SUPPORTED_PEFT_KEYS and value]
        if plain.get("bias", "none") != "none":
            others.append("bias")
        if plain.get("init_lora_weights") not in _SUPPORTED_INITS:
            others.append("init_lora_weights")
        if others:
            raise InputError(f"{path}: {others[0]} is {json.dumps(plain[others[0]])}, which is not supported")
        rank = plain.get("r")
        if type(rank) is not int or not 1 <= rank <= MAX_RANK:
            shown = shorten(json.dumps(rank), 40)
            raise InputError(f"{path}: r must be a whole number from 1 to {MAX_RANK}, got {shown}")
        stabilised = math.sqrt(rank) if plain.get("use_rslora") else 1.0
        alpha, dropout = (_number(plain.get(name, 0.0), f"{path}: {name}") for name in ("lora_alpha", "lora_dropout"))
        return rank, alpha * stabilised, dropout

    def _token_ids(self, plain: Any) -> tuple[int, ...]:
        """Return the ids with embeddings of their own, from PEFT's setting ``trainable_token_indices``."""
        rows = self._file.specs.get(STORED_ROWS)
        if not plain and rows is None:
            return ()
        ids = plain.get("embedding") if isinstance(plain, dict) and len(plain) == 1 else None
        if (
            not isinstance(ids, list)
            or not all(type(one) is int and one >= 0 for one in ids)
            or len(set(ids)) < len(ids)
        ):
            raise InputError(
                f"{self.folder / CONFIG_FILE}: trainable_token_indices must list different ids of the layer embedding, "
                f"got {shorten(json.dumps(plain), 40)}"
            )
        if rows is None or len(rows.shape) != 2 or rows.shape[0] != len(ids):
            found = "nothing" if rows is None else list(rows.shape)
            raise InputError(f"{self.folder / WEIGHTS_FILE} must hold {len(ids)} rows of the embedding, got {found}")
        return tuple(ids)

    def _projections(self, rank: int) -> tuple[str, ...]:
        """Return the names of the changed projections; raise InputError for missing or unknown tensors."""
        path, specs = self.folder / WEIGHTS_FILE, {**self._file.specs}
        specs.pop(STORED_ROWS, None)
        names = dict.fromkeys(name.removeprefix(PREFIX).rpartition(".lora_")[0] for name in specs)
        for name in specs:
            if not name.startswith(PREFIX) or not name.endswith((".lora_A.weight", ".lora_B.weight")):
                raise InputError(f"{path} holds {name}, which does not belong to a LoRA adapter of linear layers")
        if not names:
            raise InputError(f"{path} holds nothing")
        for name in names:
            for part in "AB":
                if (stored := f"{PREFIX}{name}.lora_{part}.weight") not in specs:
                    raise InputError(f"{path} is incomplete: {stored} is missing")
            first, second = (specs[f"{PREFIX}{name}.lora_{part}.weight"].shape for part in "AB")
            if len(first) != 2 or len(second) != 2 or first[0] != rank or second[1] != rank:
                raise InputError(
                    f"{path}: {name} has parts of the shapes {list(first)} and {list(second)}, which are not those of "
                    f"rank {rank}"
                )
        return tuple(names)

    def check(self, shape: TransformerConfig) -> None:
        """Check that the adapter matches a transformer and that its weights are finite.

        Args:
            shape: config of the transformer.

        Raises:
            InputError: if it does not.
        """
        wanted = (shape.num_layers, shape.width, shape.num_heads, shape.vocabulary_size)
        if self.base is not None and self.base.shape != wanted:
            words = "{} layers of width {} with {} heads and {} ids"
            raise InputError(
                f"the adapter {self.folder} belongs to a model of {words.format(*self.base.shape)}"
                f"{f' ({self.base.name})' if self.base.name else ''}, this one has {words.format(*wanted)}"
            )
        there = {
            f"layers.{number}.{target}": (outputs * shape.width, inputs * shape.width)
            for number in range(shape.num_layers)
            for target, (outputs, inputs) in PROJECTIONS.items()
        }
        for name in self.projections:
            if name not in there:
                raise InputError(f"the adapter {self.folder} changes {name}, which this model does not have")
            own = (self._spec(name, "B")[0], self._spec(name, "A")[1])
            if own != there[name]:
                raise InputError(
                    f"the adapter {self.folder} was made for another width: {name} is {own[0]} x {own[1]} there and "
                    f"{there[name][0]} x {there[name][1]} in this model"
                )

        if self.token_ids:
            last, width = max(self.token_ids), self._file.specs[STORED_ROWS].shape[1]
            if last >= shape.vocabulary_size or width != shape.width:
                raise InputError(
                    f"the adapter {self.folder} has embeddings of width {width} for ids up to {last}, this model has "
                    f"{shape.vocabulary_size} ids of width {shape.width}"
                )
        self.check_finite()  # here, because a merge must not stop halfway

    def check_finite(self) -> None:
        """Raise InputError for the first tensor with numbers that are NaN or infinite."""
        for name, tensor in self.weights().items():
            require_finite(f"{self.folder / WEIGHTS_FILE}: {name.replace('.default.', '.')}", tensor)

    def check_model(self, config: ModelConfig, name: str) -> None:
        """Check that the adapter belongs to a model; two known names are two models.

        Args:
            config: config of the model.
            name: name or folder of the model.

        Raises:
            InputError: if shape, codebook or known name differ.
        """
        self.check(config.transformer)
        if self.base is None:
            return
        if self.base.codebook_sha256 != config.codebook_sha256:
            raise InputError(
                f"the adapter {self.folder} was made for the codes of another image tokenizer "
                f"({self.base.codebook_sha256[:12]}…) than that of {name} ({config.codebook_sha256[:12]}…)"
            )
        known = load_registry()
        if self.base.name != name and self.base.name in known and name in known:
            raise InputError(f"the adapter {self.folder} was made for {self.base.name}, not for {name}")

    def weights(self) -> dict[str, Tensor]:
        """Return A, B and rows of the embedding by the parameter names of ``add_lora``, mapped from the file."""
        parts = {
            f"{name}.lora_{part}.default.weight": self._read(name, part) for name in self.projections for part in "AB"
        }
        return parts | ({TOKEN_ROWS: self._file.read(STORED_ROWS, keep=True)} if self.token_ids else {})

    def change(self, name: str, sign: int = 1) -> LowRankChange:
        """Return the change of a projection at the adapter's scale, mapped from the file.

        Args:
            name: name of the projection.
            sign: 1 to add the adapter, -1 to remove it.
        """
        return LowRankChange(self._read(name, "A"), self._read(name, "B"), sign * self.scale * self.settings.scale)

    def row_change(self) -> RowChange:
        """Return the change of rows of the embedding at the adapter's scale, mapped from the file."""
        return RowChange(torch.tensor(self.token_ids), self._file.read(STORED_ROWS, keep=True), self.scale)

    def sha256(self) -> str:
        """Return the SHA-256 of settings and weights."""
        digest = hashlib.sha256()
        for name in (CONFIG_FILE, WEIGHTS_FILE):
            digest.update((self.folder / name).read_bytes())
        return digest.hexdigest()

    @property
    def num_bytes(self) -> int:
        """Size of the weights in bytes."""
        return self._file.num_bytes

    @property
    def num_parameters(self) -> int:
        """Number of elements of A and B."""
        return sum(math.prod(spec.shape) for spec in self._file.specs.values())

    def _spec(self, name: str, part: str) -> tuple[int, ...]:
        return self._file.specs[f"{PREFIX}{name}.lora_{part}.weight"].shape

    def _read(self, name: str, part: str) -> Tensor:
        return self._file.read(f"{PREFIX}{name}.lora_{part}.weight", keep=True)


def save_adapter(
    folder: Path,
    transformer: Transformer,
    settings: LoraSettings,
    base: BaseModelInfo,
    weights: Mapping[str, Tensor] | None = None,
) -> None:
    """Write the adapter of a transformer in PEFT's format.

    Args:
        folder: the folder; it may exist.
        transformer: transformer with LoRA layers.
        settings: settings of the adapter.
        base: the model that it was made for.
        weights: tensors to store instead of the transformer's, by the same names.
    """
    if weights is None:
        weights = lora_parameters(transformer)
    folder.mkdir(parents=True, exist_ok=True)
    stored = {
        PREFIX + name.replace(".default", ""): tensor.detach().cpu().contiguous() for name, tensor in weights.items()
    }
    write_weights(folder / WEIGHTS_FILE, stored)
    write_json(folder / BASE_FILE, to_mapping(base))
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": base.name,
        "r": settings.rank,
        "lora_alpha": settings.alpha,
        "lora_dropout": settings.dropout,
        "target_modules": list(settings.targets),
        "bias": "none",
        "inference_mode": True,
    }
    if token_ids := trained_token_ids(transformer):
        config["trainable_token_indices"] = {"embedding": token_ids}
    write_json(folder / CONFIG_FILE, config)


@torch.no_grad()
def load_adapter(transformer: Transformer, folder: str | Path) -> LoraSettings:
    """Load an adapter into a transformer to continue its training; inject LoRA layers if there are none.

    Args:
        transformer: the transformer.
        folder: the adapter.

    Returns:
        The settings of the adapter.

    Raises:
        InputError: if adapter and transformer do not match.
    """
    adapter = Adapter(folder)
    adapter.check(transformer.config)
    if not has_adapter(transformer):
        add_lora(transformer, adapter.settings, adapter.token_ids)
    own = lora_parameters(transformer)
    weights = adapter.weights()
    for name, parameter in own.items():
        if name not in weights or weights[name].shape != parameter.shape:
            found = list(weights[name].shape) if name in weights else "nothing"
            raise InputError(f"the adapter {folder} has {found} for {name}, expected {list(parameter.shape)}")
    if extra := [name for name in weights if name not in own]:
        raise InputError(f"the adapter {folder} has {extra[0]}, which is not trained here: targets must be the same")
    for name, parameter in own.items():
        parameter.copy_(weights[name])
    return adapter.settings


def _read_object(path: Path) -> dict[str, Any]:
    content = read_json(path)
    if not isinstance(content, dict):
        raise InputError(f"{path} holds no settings")
    return content


def _number(value: object, where: str) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) <= sys.float_info.max:
        raise InputError(f"{where} must be a finite number, got {shorten(json.dumps(value), 40)}")
    return float(value)
