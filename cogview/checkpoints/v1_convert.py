"""Convert CogView v1 files to a checkpoint folder and back, and weights between precisions.

Outputs are written completely or not at all, and one tensor at a time is in memory.
"""

from __future__ import annotations

import filecmp
import hashlib
import itertools
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from tqdm import tqdm

from cogview.checkpoints.checkpoint import check_sizes, config_mapping
from cogview.checkpoints.image_tokenizer import read_image_config, read_image_weights
from cogview.checkpoints.pickles import write_pickle
from cogview.checkpoints.precision import Precision, TensorSource, convert, converted_specs, stored_quantization
from cogview.checkpoints.registry import V1_FILES
from cogview.checkpoints.safetensors_io import TensorSpec, WeightsFile, WeightsWriter
from cogview.checkpoints.v1_format import V1Transformer, write_v1_transformer
from cogview.checkpoints.v1_vqvae import read_v1_vqvae, v1_vqvae_tensors
from cogview.config_io import to_mapping
from cogview.errors import InputError
from cogview.files import new_folder, write_json
from cogview.modeling.config import ModelConfig, Sampling
from cogview.tokenizers.layouts import layouts
from cogview.tokenizers.tasks import TASKS
from cogview.tokenizers.text import TextTokenizer
from cogview.tokenizers.vocabulary import Vocabulary
from cogview.vqvae.codec import codebook_sha256

V1_GRID = 32
V1_CAPTION = 20  # pieces: captions of CogView v1 have no stop token; its code samples this many
# Tasks of the published models, by the names of the models.
V1_TASKS = {
    model: tuple(name for name, task in TASKS.items() if task.v1_model == model) for model in ("base", "caption", "sr")
}
ALL_TASKS = tuple(itertools.chain.from_iterable(V1_TASKS.values()))


def tasks_by_name(source: Path) -> tuple[str, ...] | None:
    """Return the tasks of weights with a published name (``cogview-base``, …), or None for other names."""
    found = re.findall(r"cogview-(base|caption|sr)(?![a-z])", "/".join(source.absolute().parts[-3:]))
    return V1_TASKS[found[-1]] if found else None


def import_v1(
    source: Path,
    image_tokenizer: Path,
    text_model: Path,
    output: Path,
    *,
    tasks: Sequence[str],
    precision: Precision,
    num_heads: int | None = None,
    verify: bool = False,
) -> ModelConfig:
    """Convert CogView v1 files into a checkpoint folder.

    Args:
        source: the transformer: a folder, a ``.tar`` or a ``.pt`` file.
        image_tokenizer: the ``.pt`` file of the VQ-VAE.
        text_model: the SentencePiece model.
        output: the new folder; it must not exist.
        tasks: tasks that the weights were trained for.
        precision: precision to store the transformer in.
        num_heads: attention heads; None derives them.
        verify: read everything back and compare bit for bit.

    Returns:
        The config of the new folder.

    Raises:
        InputError: if files are damaged, incomplete, refused or do not match, or the disk is too small. ``output`` does
            not exist then.
    """
    try:
        text_tokenizer = TextTokenizer.load(text_model)
    except (FileNotFoundError, ValueError) as error:
        raise InputError(str(error)) from None
    image_config, image_weights = read_v1_vqvae(image_tokenizer)
    vocabulary = Vocabulary(num_image_codes=image_config.num_codes, num_text_pieces=text_tokenizer.size)
    with V1Transformer(source, num_heads) as transformer:
        transformer.set_vocabulary(vocabulary)
        table = layouts(V1_GRID, caption_stop=False)
        try:
            config = ModelConfig(
                transformer=transformer.config,
                vocabulary=vocabulary,
                grid=V1_GRID,
                tasks=tuple(tasks),
                max_text=min(layout.longest_text(transformer.config.max_positions) for layout in table.values()),
                caption_stop=False,
                max_caption=V1_CAPTION,
                codebook_sha256=codebook_sha256(image_weights["quantizer.codebook"]),
                text_sha256=hashlib.sha256(text_tokenizer.model_bytes).hexdigest(),
                sampling=Sampling(temperature=1.0 if "generate" in tasks or "caption" in tasks else 1.02),
            )
        except ValueError as error:
            raise InputError(f"{source}: {error}") from None
        with new_folder(output) as folder:
            _write_weights(transformer, precision, folder / "model.safetensors", verify)
            (folder / "image").mkdir()
            specs = {name: TensorSpec(tensor.dtype, tuple(tensor.shape)) for name, tensor in image_weights.items()}
            with WeightsWriter(folder / "image" / "model.safetensors", specs) as writer:
                for name, tensor in image_weights.items():
                    writer.write(name, tensor)
            write_json(folder / "image" / "config.json", to_mapping(image_config))
            (folder / "text.model").write_bytes(text_tokenizer.model_bytes)
            (folder / "README.md").write_text(_card(source, config), encoding="utf-8")
            write_json(folder / "config.json", config_mapping(config))
            if verify:
                _compare(image_weights, load_file(folder / "image" / "model.safetensors"), output / "image")
    return config


def convert_folder(source: Path, output: Path, *, precision: Precision, verify: bool = False) -> None:
    """Copy a checkpoint folder with its transformer in another precision.

    Args:
        source: a checkpoint folder.
        output: the new folder; it must not exist.
        precision: precision to store the transformer in.
        verify: read everything back and compare bit for bit.

    Raises:
        InputError: if the source is damaged, the conversion is impossible or the copy differs.
    """
    check_sizes(source)
    weights = WeightsFile(source / "model.safetensors")
    others = [path for path in sorted(source.rglob("*")) if path.is_file() and path != weights.path]
    with new_folder(output) as folder:
        _write_weights(weights, precision, folder / "model.safetensors", verify)
        for path in others:
            target = folder / path.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
            if verify and not filecmp.cmp(path, target, shallow=False):
                raise InputError(f"{output} does not hold what was written: {target.name} differs; is the disk sound?")


def export_v1(source: Path, output: Path, *, shards: int = 1, verify: bool = False) -> None:
    """Write a checkpoint folder in the layout of CogView v1: the transformer's folder and one file per tokenizer.

    Args:
        source: a checkpoint folder without quantized weights.
        output: the new folder; it must not exist.
        shards: number of model-parallel files.
        verify: read everything back and compare bit for bit.

    Raises:
        InputError: if the weights are quantized, do not divide into ``shards``, or v1 lacks their architecture or
            their pattern of attention.
    """
    config = check_sizes(source)
    weights = WeightsFile(source / "model.safetensors")
    if (quantization := stored_quantization(weights.specs)) is not None:
        raise InputError(
            f"{source} holds {quantization} weights, which CogView v1 cannot read: export the folder they came from"
        )
    shape = config.transformer
    if not shape.attention.is_dense:
        raise InputError(
            f"{source} has window attention, whose pivots CogView v1 samples anew in every layer: only a model with "
            "dense attention can be exported"
        )
    for count, what in ((shape.num_heads, "heads"), (shape.vocabulary_size, "word embeddings")):
        if shards < 1 or count % shards:
            raise InputError(f"{count} {what} do not divide into {shards} shards")
    image_config = read_image_config(source / "image")
    image_weights = read_image_weights(source / "image")
    try:
        image = v1_vqvae_tensors(image_config, image_weights)
    except InputError as error:
        raise InputError(f"{source} cannot be written in the layout of CogView v1: {error}") from None
    with new_folder(output) as folder:
        mapped = dict(convert(weights, Precision(), keep=True))
        write_v1_transformer(folder, mapped, shards)
        write_pickle(image, folder / V1_FILES["image_tokenizer"])
        shutil.copyfile(source / "text.model", folder / V1_FILES["text_model"])
        if verify:
            with V1Transformer(folder, config.transformer.num_heads) as transformer:
                for name in tqdm(weights.specs, desc="verifying", unit="tensor", leave=False, disable=None):
                    _compare({name: mapped[name]}, {name: transformer.read(name)}, output)
            _compare(image_weights, read_v1_vqvae(folder / V1_FILES["image_tokenizer"])[1], output)


def _write_weights(weights: TensorSource, precision: Precision, path: Path, verify: bool) -> None:
    specs = converted_specs(weights, precision)
    with WeightsWriter(path, specs) as writer:
        for name, tensor in tqdm(
            convert(weights, precision), total=len(specs), desc="converting", unit="tensor", leave=False, disable=None
        ):
            writer.write(name, tensor)
    if verify:
        written = WeightsFile(path)
        for name, tensor in tqdm(
            convert(weights, precision), total=len(specs), desc="verifying", unit="tensor", leave=False, disable=None
        ):
            _compare({name: tensor}, {name: written.read(name)}, path)


def _compare(expected: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor], where: Path) -> None:
    """Raise InputError unless all tensors are equal bit for bit (-0 differs from 0, NaN equals itself)."""
    for name, tensor in expected.items():
        other = found[name]
        if (other.dtype, other.shape) != (tensor.dtype, tensor.shape) or not torch.equal(_bytes(other), _bytes(tensor)):
            raise InputError(f"{where} does not hold what was written: {name} differs; is the disk sound?")


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _card(source: Path, config: ModelConfig) -> str:
    return (
        f"# {source.name.removesuffix('.tar')}\n\n"
        "Weights of CogView v1 (Ding et al., arXiv:2105.13290), converted by `cogview convert`.\n\n"
        f"Tasks: {', '.join(config.tasks)}. Licence: that of the published weights, see their publisher's page.\n"
    )
