"""Merge adapters into the weights of a model in memory or on disk, and remove them again."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from cogview.checkpoints.adapter import Adapter
from cogview.checkpoints.checkpoint import check_sizes, read_model_card
from cogview.checkpoints.precision import Precision, convert, stored_quantization
from cogview.checkpoints.safetensors_io import WeightsFile, WeightsWriter
from cogview.errors import InputError
from cogview.files import new_folder
from cogview.modeling.lora import (
    has_adapter,
    require_float_weights,
)
from cogview.modeling.transformer import Transformer


def merge_adapter(transformer: Transformer, folder: str | Path) -> None:
    """Add an adapter into the weights of a transformer in place: W += scale * B A, computed in float32.

    Weights that are mapped from a file leave the file unchanged.

    Args:
        transformer: the transformer.
        folder: the adapter.

    Raises:
        InputError: if adapter and transformer do not match, or the weights are quantized.
    """
    _add(transformer, Adapter(folder), 1)


def unmerge_adapter(transformer: Transformer, folder: str | Path) -> None:
    """Remove a merged adapter from the weights of a transformer in place: W -= scale * B A.

    The weights equal those before the merge up to the rounding of their dtype, not bit for bit.

    Args:
        transformer: the transformer.
        folder: the adapter.

    Raises:
        InputError: if adapter and transformer do not match, or the weights are quantized.
    """
    _add(transformer, Adapter(folder), -1)


@torch.no_grad()
def _add(transformer: Transformer, adapter: Adapter, sign: int) -> None:
    if has_adapter(transformer):
        raise InputError("the transformer has an adapter in training: save it, and merge it into a fresh one")
    adapter.check(transformer.config)
    require_float_weights(transformer)
    if transformer.get_parameter(f"{adapter.projections[0]}.weight").dtype == torch.float16:
        for name in adapter.projections:  # whose sums may overflow; a merge must not stop halfway
            adapter.apply_to(name, transformer.get_parameter(f"{name}.weight"), sign)
    for name in adapter.projections:
        weight = transformer.get_parameter(f"{name}.weight")
        weight.copy_(adapter.apply_to(name, weight, sign))  # in place, so that prepacked copies are renewed


def merge_folder(source: Path, adapter: Adapter, output: Path, *, name: str, sign: int = 1) -> str | None:
    """Write a copy of a checkpoint folder with an adapter merged or removed.

    The weights keep their dtype and are read one at a time. The output appears completely or not at all. The model card
    gains or loses a line.

    Args:
        source: the checkpoint folder.
        adapter: the adapter.
        output: the new folder; it must not exist.
        name: name of the model, for messages and checks.
        sign: 1 to merge the adapter, -1 to remove it.

    Returns:
        A note if the model card contradicts the operation, or None.

    Raises:
        InputError: if adapter and model do not match, or the weights are quantized.
    """
    config = check_sizes(source)
    adapter.check_model(config, name)
    weights = WeightsFile(source / "model.safetensors")
    if (stored := stored_quantization(weights.specs)) is not None:
        raise InputError(
            f"{source} is stored in {stored}, to which nothing can be added: merge into the model that it was made of, "
            f"then cogview convert FOLDER --dtype {stored} -o OUT"
        )
    others = [path for path in sorted(source.rglob("*")) if path.is_file() and path != weights.path]
    card, note = _update_model_card(source, adapter, sign)
    with new_folder(output) as folder:
        with WeightsWriter(folder / "model.safetensors", weights.specs) as writer:
            for weight, tensor in convert(weights, Precision()):
                projection = weight.removesuffix(".weight")
                if projection in adapter.projections and projection != weight:
                    tensor = adapter.apply_to(projection, tensor, sign)
                writer.write(weight, tensor)
        for path in others:
            target = folder / path.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
        (folder / "README.md").write_text(card, encoding="utf-8")
    return note


def _update_model_card(folder: Path, adapter: Adapter, sign: int) -> tuple[str, str | None]:
    """Return the model card after the operation, and a note if it contradicts the operation."""
    card = read_model_card(folder)
    own = adapter.settings
    called = f"the LoRA adapter `{adapter.folder.resolve().name}` (rank {own.rank}, scale {own.scale:g}, SHA-256 "
    called += f"{adapter.sha256()[:12]})"
    line = f"\nMerged with {called}.\n"
    if sign > 0:
        note = f"the card says that {called} was merged before: now it counts twice" if line in card else None
        return f"{card}{line}", note
    if line in card:
        return card.replace(line, "", 1), None
    return (
        f"{card}\nWithout {called}, which was taken out.\n",
        f"the card does not say that {called} was ever merged into this model",
    )
