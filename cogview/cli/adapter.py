"""``cogview adapter``: merge LoRA adapters into a model, remove them again, or describe one."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cogview.cli.options import FILE, Command, Decorator, Group, argument, combine
from cogview.formatting import format_bytes

if TYPE_CHECKING:  # torch takes seconds to import: --help does without
    from cogview.checkpoints.adapter import Adapter


@click.group(cls=Group, no_args_is_help=False)
def command() -> None:
    """Merge LoRA adapters into a model, or remove them again.

    Adapters have PEFT's format: adapter_config.json and adapter_model.safetensors. To try one, pass it to cogview
    generate and the other commands by --adapter. A folder with merged adapters needs no option.
    """


def merge_options() -> Decorator:
    """Add MODEL, ADAPTER and ``-o``."""
    return combine(
        argument("model", metavar="MODEL", help="name or folder of a model"),
        argument(
            "adapters",
            nargs=-1,
            required=True,
            metavar="ADAPTER[:SCALE]",
            help="folder of an adapter, and the factor of its changes, 1 if left out; several are added together",
        ),
        click.option(
            "-o", "--output", type=FILE, required=True, metavar="FOLDER", help="new checkpoint folder; must not exist"
        ),
    )


@command.command(cls=Command)
@merge_options()
def merge(model: str, adapters: tuple[str, ...], output: Path) -> int:
    """Write a model with adapters merged into its weights, which keep their format, and print the folder."""
    return write_merged(model, adapters, output, sign=1)


@command.command(cls=Command)
@merge_options()
def unmerge(model: str, adapters: tuple[str, ...], output: Path) -> int:
    """Write a model with adapters removed from its weights, which equal the original ones up to rounding."""
    return write_merged(model, adapters, output, sign=-1)


@command.command(cls=Command)
@argument("adapter", type=FILE, metavar="ADAPTER", help="folder of an adapter")
def info(adapter: Path) -> int:
    """Print the settings of an adapter and its base model."""
    from cogview.checkpoints.adapter import Adapter

    print("\n".join(adapter_lines(Adapter(adapter))))
    return 0


def write_merged(model: str, adapters: Sequence[str], output: Path, *, sign: int) -> int:
    """Merge adapters into a model (``sign`` 1) or remove them (-1); print the new folder and return the status."""
    from cogview.checkpoints.adapter import Adapter
    from cogview.checkpoints.adapter_choice import AdapterChoice
    from cogview.checkpoints.adapter_merge import merge_folder
    from cogview.checkpoints.registry import resolve_checkpoint

    choices = map(AdapterChoice.parse, adapters)
    opened = [Adapter(choice.name, scale=choice.scale) for choice in choices]
    for note in merge_folder(resolve_checkpoint(model), opened, output, name=model, sign=sign):
        print(f"note: {note}", file=sys.stderr)
    print(output)
    return 0


def adapter_lines(adapter: Adapter) -> list[str]:
    """Return the facts of an adapter as lines ``name: value``."""
    settings, base = adapter.settings, adapter.base
    facts = {
        "base model": (base.name if base is not None else adapter.base_name) or "unknown",
        "rank": f"{settings.rank}",
        "alpha": f"{settings.alpha:g}, which scales by {settings.scale:g}",
        "targets": ", ".join(settings.targets),
        "projections": f"{len(adapter.projections)}",
        **({"embeddings": f"{len(adapter.token_ids)} rows of words"} if adapter.token_ids else {}),
        "parameters": f"{adapter.num_parameters:,} ({format_bytes(adapter.num_bytes)})",
    }
    if base is not None:
        facts["shape"] = (
            f"{base.num_layers} layers, width {base.width}, {base.num_heads} heads, {base.vocabulary_size} ids"
        )
        facts["codebook"] = base.codebook_sha256
    return [f"{name}: {value}" for name, value in facts.items()]
