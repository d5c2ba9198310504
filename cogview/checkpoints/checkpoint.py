"""A checkpoint is a folder that needs nothing else.

``config.json`` and ``model.safetensors`` (the transformer), ``text.model`` (SentencePiece), ``image/`` (the VQ-VAE),
``README.md`` (the model card), and, for a model that knows a closed world of things, ``things.json`` and
``grammar.json``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from cogview.checkpoints.adapted_weights import AdaptedWeights
from cogview.checkpoints.adapter import Adapter
from cogview.checkpoints.finite import rounded
from cogview.checkpoints.grammar import GRAMMAR_FILE, PromptGrammar, read_grammar
from cogview.checkpoints.image_tokenizer import (
    codebook_hash,
    load_image_tokenizer,
    read_image_config,
    save_image_tokenizer,
    write_weights,
)
from cogview.checkpoints.precision import Precision, TensorArena, convert, converted_specs
from cogview.checkpoints.safetensors_io import WeightsFile
from cogview.checkpoints.sizes import check_transformer_sizes
from cogview.config_io import from_mapping, to_mapping
from cogview.device import Quantization
from cogview.errors import InputError
from cogview.files import file_sha256, write_json
from cogview.input_files import missing_file, read_regular
from cogview.kernels.linear import has_quantized_kernels, pack_int4_for_cpu
from cogview.kernels.native import uses_native_kernels
from cogview.modeling.config import FORMAT_VERSION, ModelConfig
from cogview.modeling.quantization import Int4Linear, Int8Linear, is_quantized, swap_quantized_linears
from cogview.modeling.transformer import Transformer
from cogview.plain_data import read_json
from cogview.tokenizers.text import TextTokenizer
from cogview.vqvae.model import VQVAE

MAX_CARD_BYTES = 1 << 24
LARGE = 10**9  # bytes of weights from which loading shows a progress bar


@dataclass(frozen=True, kw_only=True)
class NamedThing:
    """An object that a model of a closed world can draw: its name and synonyms."""

    name: str
    emoji: str = ""
    synonyms: tuple[str, ...] = ()


@dataclass(kw_only=True, eq=False)
class Model:
    """Contents of a checkpoint folder in memory."""

    config: ModelConfig
    transformer: Transformer
    image_tokenizer: VQVAE
    text_tokenizer: TextTokenizer
    things: tuple[NamedThing, ...] = ()
    grammar: PromptGrammar | None = None
    card: str = ""


def save_model(
    folder: Path, model: Model, dtype: torch.dtype = torch.float32, weights: Mapping[str, torch.Tensor] | None = None
) -> None:
    """Write a model as a checkpoint folder.

    Args:
        folder: the folder; it may exist.
        model: the model.
        dtype: dtype to store weights in; the codebook stays float32.
        weights: tensors to store instead of the transformer's, by the same names.

    Raises:
        InputError: if the model's weights are quantized, or one is beyond the range of the dtype.
    """
    if any(isinstance(module, Int8Linear | Int4Linear) for module in model.transformer.modules()):
        raise InputError("quantized weights cannot be saved: copy or convert the folder they came from")
    folder.mkdir(parents=True, exist_ok=True)
    weights = model.transformer.state_dict() if weights is None else weights
    stored = {name: rounded(name, tensor, dtype) for name, tensor in weights.items()}
    write_weights(folder / "model.safetensors", stored)
    save_image_tokenizer(folder / "image", model.image_tokenizer, dtype)
    (folder / "text.model").write_bytes(model.text_tokenizer.model_bytes)
    if model.things:
        write_json(folder / "things.json", [to_mapping(thing) for thing in model.things])
    if model.grammar is not None:
        write_json(folder / GRAMMAR_FILE, to_mapping(model.grammar))
    if model.card:
        (folder / "README.md").write_text(model.card, encoding="utf-8")
    text_sha256 = sha256(model.text_tokenizer.model_bytes).hexdigest()
    write_json(folder / "config.json", config_mapping(replace(model.config, text_sha256=text_sha256)))


def config_mapping(config: ModelConfig) -> dict[str, Any]:
    """Return the content of ``config.json``; what is unknown is left out, as in older files.

    Args:
        config: The config.
    """
    plain: dict[str, Any] = to_mapping(config)
    if plain["reconstruction_psnr"] is None:
        del plain["reconstruction_psnr"]
    if plain["fit"] == "crop":
        del plain["fit"]
    if not plain["text_sha256"]:
        del plain["text_sha256"]
    return plain


def read_config(folder: Path) -> ModelConfig:
    """Read the config of a checkpoint folder without its weights.

    Raises:
        InputError: if the config is missing, invalid or of a newer format.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(f"{folder} is no checkpoint folder: {missing_file(folder, 'config.json')}")
    plain = read_json(path)
    version = plain.get("format_version") if isinstance(plain, dict) else None
    if not isinstance(version, int) or version < 1:
        raise InputError(f"{path} is no config of a checkpoint: it has no format_version")
    if version > FORMAT_VERSION:  # before anything else: it may have settings that this version does not know
        raise InputError(
            f"{path} has format version {version}, this version reads up to {FORMAT_VERSION}; update cogview"
        )
    return from_mapping(ModelConfig, plain, where=str(path))


def read_things(folder: Path) -> tuple[NamedThing, ...]:
    """Read the objects that a model of a closed world knows; return nothing for other models."""
    path = folder / "things.json"
    if not path.is_file():
        return ()
    entries = read_json(path)
    if not isinstance(entries, list):
        raise InputError(f"{path} must be a list of things")
    return tuple(from_mapping(NamedThing, entry, where=str(path)) for entry in entries)


def read_model_card(folder: Path) -> str:
    """Return the model card of a checkpoint folder; nothing if it has none.

    Bytes that are not UTF-8 become U+FFFD: a damaged card keeps no model from being opened.

    Raises:
        InputError: if the card has more than ``MAX_CARD_BYTES``.
    """
    path = folder / "README.md"
    return read_regular(path, MAX_CARD_BYTES).decode("utf-8", "replace") if path.is_file() else ""


def load_model(
    folder: Path,
    device: torch.device,
    dtype: torch.dtype,
    quantization: Quantization | None = None,
    *,
    adapters: Sequence[Adapter] = (),
    meta_only: bool = False,
    keep_halves: bool = False,
    allow_nonfinite: bool = False,
) -> Model:
    """Load a checkpoint folder.

    Args:
        folder: the folder.
        device: device of the transformer and the VQ-VAE.
        dtype: dtype of the transformer; the VQ-VAE is float32.
        quantization: quantize the projections while they are read.
        adapters: adapters to add while the weights are read, checked against the model.
        meta_only: leave the transformer on the meta device, without weights.
        keep_halves: as in ``load_transformer``.
        allow_nonfinite: accept weights of the transformer that are NaN or infinite, to examine them.

    Returns:
        The model.

    Raises:
        InputError: if a part is missing, damaged or does not belong to the others, or a weight is not finite.
    """
    config = check_sizes(folder)
    image_tokenizer = load_image_tokenizer(folder / "image")
    found = codebook_hash(image_tokenizer)
    if found != config.codebook_sha256:
        raise InputError(
            f"the image tokenizer in {folder / 'image'} has another codebook ({found[:12]}…) than the transformer was "
            f"trained with ({config.codebook_sha256[:12]}…); restore the folder's own"
        )
    try:
        text_tokenizer = TextTokenizer.load(folder / "text.model")
    except ValueError as error:
        raise InputError(str(error)) from None
    if text_tokenizer.size != config.vocabulary.num_text_pieces:
        raise InputError(
            f"{folder / 'text.model'} has {text_tokenizer.size} pieces, the config says "
            f"{config.vocabulary.num_text_pieces}; restore the folder's own"
        )
    if config.text_sha256 and (found := sha256(text_tokenizer.model_bytes).hexdigest()) != config.text_sha256:
        raise InputError(
            f"{folder / 'text.model'} is another text tokenizer ({found[:12]}…) than the transformer was trained with "
            f"({config.text_sha256[:12]}…); restore the folder's own"
        )
    if meta_only:
        with torch.device("meta"):
            transformer = Transformer(config.transformer)
    else:
        transformer = load_transformer(
            *(folder, device, dtype, quantization),
            adapters=adapters,
            keep_halves=keep_halves,
            allow_nonfinite=allow_nonfinite,
        )
    return Model(
        config=config,
        transformer=transformer,
        image_tokenizer=image_tokenizer.to(device),
        text_tokenizer=text_tokenizer,
        things=read_things(folder),
        grammar=read_grammar(folder),
        card=read_model_card(folder),
    )


def check_folder(folder: Path) -> ModelConfig:
    """Return the config of a checkpoint folder; raise InputError if a file is missing. No weight is read."""
    config = read_config(folder)
    for name in ("model.safetensors", "text.model"):
        if not (folder / name).is_file():
            raise InputError(f"the checkpoint {folder} is incomplete: {name} is missing")
    return config


def check_sizes(folder: Path) -> ModelConfig:
    """Compare the sizes in the configs of a checkpoint folder with the headers of its weights. No weight is read.

    Args:
        folder: the folder.

    Returns:
        The config.

    Raises:
        InputError: if a file is missing or damaged, or the weights are not those that the configs describe.
    """
    config = check_folder(folder)
    weights = WeightsFile(folder / "model.safetensors")
    check_transformer_sizes(weights.path, converted_specs(weights, Precision()), config.transformer)
    codes = read_image_config(folder / "image").num_codes
    if codes != config.vocabulary.num_image_codes:
        raise InputError(
            f"{folder / 'config.json'}: num_image_codes is {config.vocabulary.num_image_codes}, the image tokenizer in "
            f"{folder / 'image'} has {codes} codes; restore the folder's own"
        )
    return config


def load_transformer(
    folder: Path,
    device: torch.device,
    dtype: torch.dtype,
    quantization: Quantization | None = None,
    *,
    adapters: Sequence[Adapter] = (),
    keep_halves: bool = False,
    allow_nonfinite: bool = False,
) -> Transformer:
    """Load the transformer of a checkpoint folder tensor by tensor, so that no second copy is held.

    On a CPU, weights that need no conversion stay in the file, mapped into memory.

    Args:
        folder: the folder.
        device: device of the weights.
        dtype: dtype of the weights.
        quantization: quantize the projections while they are read.
        adapters: adapters to add while the weights are read, checked against the model.
        keep_halves: leave matrices of 16 bits as they are stored where native kernels multiply them as float32; the
            model can then not be trained.
        allow_nonfinite: accept weights that are NaN or infinite.

    Returns:
        The transformer in evaluation mode.

    Raises:
        InputError: if the file does not match the config, or a weight is not finite.
    """
    config = check_sizes(folder)
    file = WeightsFile(folder / "model.safetensors")
    native = uses_native_kernels(device, dtype)
    keep_halves = keep_halves and native and dtype == torch.float32 and quantization is None
    precision = Precision(dtype, quantization, keep_halves)
    specs = converted_specs(file, precision)
    source = AdaptedWeights(file, adapters) if adapters else file
    with torch.device("meta"):  # no memory, and no random numbers, for weights that are replaced at once
        transformer = Transformer(config.transformer)
        if quantization is not None:
            swap_quantized_linears(transformer, quantization)
    file.prefetch()
    on_cpu = device.type == "cpu"
    ordering = quantization == "int4" and has_quantized_kernels(device) and not native
    memory = TensorArena() if on_cpu else None
    keep = on_cpu and not ordering
    bar = tqdm(
        convert(source, precision, device=device, keep=keep, memory=memory, allow_nonfinite=allow_nonfinite),
        total=len(specs),
        desc=f"loading {folder.name}",
        unit="tensor",
        leave=False,
        disable=None if file.num_bytes >= LARGE else True,
    )
    weights = {}
    for name, tensor in bar:
        weights[name] = tensor.copy_(pack_int4_for_cpu(tensor)) if ordering and is_quantized(name) else tensor
    transformer.load_state_dict(weights, strict=True, assign=True)
    for module in transformer.modules():
        if isinstance(module, Int4Linear):
            module.cpu_packed = ordering
    kept = any(tensor.dim() > 1 and tensor.dtype != dtype for tensor in transformer.parameters())
    return transformer.requires_grad_(not (keep_halves and kept)).eval()


def verify_files(folder: Path, expected: Sequence[tuple[str, str]]) -> None:
    """Compare files of a folder with their SHA-256 checksums.

    Args:
        folder: the folder.
        expected: pairs of file name and checksum.

    Raises:
        InputError: for the first file that is missing or differs.
    """
    for name, wanted in expected:
        path = folder / name
        if not path.is_file():
            raise InputError(f"the checkpoint {folder} is incomplete: {name} is missing")
        found = file_sha256(path)
        if found != wanted:
            raise InputError(
                f"{path} is damaged or was changed: its SHA-256 is {found[:12]}…, expected {wanted[:12]}…; "
                "install cogview again"
            )
