"""Write checkpoint folders with adapters in their weights, and remove them again."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from cogview.checkpoints.adapted_weights import AdaptedWeights
from cogview.checkpoints.adapter import Adapter
from cogview.checkpoints.checkpoint import check_sizes, read_model_card
from cogview.checkpoints.finite import require_range
from cogview.checkpoints.precision import Precision, cast, convert, stored_quantization
from cogview.checkpoints.safetensors_io import WeightsFile, WeightsWriter
from cogview.files import new_folder


def merge_folder(source: Path, adapters: Sequence[Adapter], output: Path, *, name: str, sign: int = 1) -> list[str]:
    """Write a copy of a checkpoint folder with adapters merged or removed.

    The weights keep their format and are read one at a time; quantized ones are restored, changed and quantized again.
    The output appears completely or not at all. The model card gains or loses a line for each adapter.

    Args:
        source: the checkpoint folder.
        adapters: the adapters, each with its scale.
        output: the new folder; it must not exist.
        name: name of the model, for messages and checks.
        sign: 1 to merge the adapters, -1 to remove them.

    Returns:
        Notes on what contradicts the model card.

    Raises:
        InputError: if an adapter and the model do not match.
    """
    config = check_sizes(source)
    for adapter in adapters:
        adapter.check_model(config, name)
    weights = WeightsFile(source / "model.safetensors")
    adapted = AdaptedWeights(weights, adapters, sign)
    precision = Precision(quantization=stored_quantization(weights.specs))
    others = [path for path in sorted(source.rglob("*")) if path.is_file() and path != weights.path]
    card, notes = read_model_card(source), []
    for adapter in adapters:
        card, note = _update_model_card(card, adapter, sign)
        notes += [] if note is None else [note]
    with new_folder(output) as folder:
        with WeightsWriter(folder / "model.safetensors", weights.specs) as writer:
            for weight, tensor in convert(adapted, precision):
                stored = cast(tensor, weights.specs[weight].dtype)
                require_range(f"{weights.path}: {weight} with the adapter", tensor, stored)
                writer.write(weight, stored)
        for path in others:
            target = folder / path.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
        (folder / "README.md").write_text(card, encoding="utf-8")
    return notes


def _update_model_card(card: str, adapter: Adapter, sign: int) -> tuple[str, str | None]:
    """Return the model card after the operation, and a note if it contradicts the operation."""
    rank, scale = adapter.settings.rank, adapter.scale * adapter.settings.scale
    called = f"the LoRA adapter `{adapter.folder.resolve().name}` (rank {rank}, scale {scale:g}, SHA-256 "
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
