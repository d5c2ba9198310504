"""``cogview adapter``: a LoRA adapter in words, merged into a model, or taken out again."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from cogview.formatting import format_bytes

if TYPE_CHECKING:  # torch takes seconds to import: --help does without
    from cogview.checkpoints.adapter import Adapter

SIGNS = {"merge": 1, "unmerge": -1}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.description = (
        "LoRA adapters, in PEFT's format: adapter_config.json and adapter_model.safetensors. To try one, give it to "
        "cogview generate and its kin by --adapter; merged into a folder it needs no option, and can be rounded to few "
        "bits."
    )
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    lines = {
        "merge": "write a model with an adapter in its weights, which keep their dtype, and print the new folder",
        "unmerge": "the way back: the weights are those from before up to rounding, and not bit for bit",
        "info": "what an adapter changes, how much, and of which model",
    }
    for action, line in lines.items():
        subparser = actions.add_parser(
            action, help=line, description=f"{line[0].upper()}{line[1:]}.", formatter_class=parser.formatter_class
        )
        if action != "info":
            subparser.add_argument("model", metavar="MODEL", help="a model's name or folder")
        subparser.add_argument("adapter", type=Path, metavar="ADAPTER", help="the folder of an adapter")
        if action != "info":
            subparser.add_argument(
                "-o", "--output", type=Path, required=True, metavar="FOLDER", help="must not be there yet"
            )


def run(args: argparse.Namespace) -> int:
    """Do it, and print the new folder, or the facts."""
    from cogview.checkpoints.adapter import Adapter, merge_folder
    from cogview.checkpoints.registry import resolve_checkpoint

    if args.action == "info":
        print("\n".join(facts(Adapter(args.adapter))))
        return 0
    source, adapter = resolve_checkpoint(args.model), Adapter(args.adapter)
    note = merge_folder(source, adapter, args.output, name=args.model, sign=SIGNS[args.action])
    if note is not None:
        print(f"note: {note}", file=sys.stderr)
    print(args.output)
    return 0


def facts(adapter: Adapter) -> list[str]:
    """An adapter in lines ``name: value``."""
    own, base = adapter.settings, adapter.base
    lines = {
        "base model": (base.name if base is not None else adapter.base_name) or "not said",
        "rank": f"{own.rank}",
        "alpha": f"{own.alpha:g}, which scales by {own.scale:g}",
        "targets": ", ".join(own.targets),
        "projections": f"{len(adapter.projections)}",
        "parameters": f"{adapter.num_parameters:,} ({format_bytes(adapter.num_bytes)})",
    }
    if base is not None:
        lines["shape"] = (
            f"{base.num_layers} layers, width {base.width}, {base.num_heads} heads, {base.vocabulary_size} ids"
        )
        lines["codebook"] = base.codebook_sha256
    return [f"{name}: {value}" for name, value in lines.items()]
