"""``cogview info``: what a model is, was trained on and can do."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from cogview.errors import InputError

# The commands that ask for each task.
COMMANDS_OF_TASKS = {
    "generate": ("generate", "complete"),
    "caption": ("caption", "rerank"),
    "upscale": ("upscale",),
    "low_level": ("upscale --low-level",),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument(
        "model", nargs="?", metavar="MODEL", help="a model's name or folder; without one, the known models are listed"
    )
    parser.add_argument(
        "--things", action="store_true", help="list what the model can draw: emoji, name and synonyms, split by tabs"
    )


def run(args: argparse.Namespace) -> int:
    """Print; weights are not loaded."""
    from cogview.checkpoints.registry import find_checkpoint, known_models

    if args.model is None:
        if args.things:
            raise InputError("--things needs a model: cogview info MODEL --things")
        known = known_models()
        for name, row in known.items():
            print(f"{name}: {row.about} ({row.licence})")
        if not known:
            print("checkpoints.yaml names no models", file=sys.stderr)
        return 0
    folder = find_checkpoint(args.model)
    for line in things_lines(folder) if args.things else model_lines(folder, args.model):
        print(line)
    return 0


def model_lines(folder: Path, name: str) -> list[str]:
    """A model's config, files and sizes, in words."""
    from cogview.checkpoints.folder import read_config, read_things
    from cogview.checkpoints.registry import known_models

    config = read_config(folder)
    shape, vocabulary, sampling = config.transformer, config.vocabulary, config.sampling
    facts = {"model": name}
    if (row := known_models().get(name)) is not None:
        facts |= {"about": row.about, "licence": row.licence}
    facts |= {
        "tasks": ", ".join(config.tasks),
        "commands": ", ".join(
            f"cogview {command}" for task in config.tasks for command in COMMANDS_OF_TASKS.get(task, ())
        ),
        "pictures": f"{8 * config.grid} x {8 * config.grid} pixels from {config.grid} x {config.grid} codes",
        "transformer": f"{shape.num_layers} layers, width {shape.width}, {shape.num_heads} heads, "
        f"{shape.num_parameters:,} parameters",
        "vocabulary": f"{vocabulary.size} ids: {vocabulary.num_image_codes} image codes, "
        f"{vocabulary.num_text_pieces} text pieces, {len(vocabulary.commands)} commands",
        "longest prompt": f"{config.max_text} pieces",
        "sampling": f"temperature {sampling.temperature:g}, top-k {sampling.top_k or 'off'}, "
        f"top-p {_or_off(sampling.top_p)}, guidance {_or_off(sampling.guidance)}, "
        f"text attention {_or_off(sampling.text_attention)}",
        "guidance": f"possible: {config.caption_drop:.0%} of the captions were left out in training"
        if config.caption_drop
        else "not possible: no captions were left out in training",
    }
    if things := read_things(folder):
        facts["things"] = f"{len(things)}, listed by: cogview info {name} --things"
    files = {path.relative_to(folder): path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()}
    facts["folder"] = f"{folder} ({_size(sum(files.values()))})"
    width = max(map(len, facts)) + 2
    lines = [f"{key + ':':<{width}}{value}" for key, value in facts.items()]
    return lines + [f"{'':<{width}}{path.as_posix()} ({_size(size)})" for path, size in files.items()]


def things_lines(folder: Path) -> list[str]:
    """A line per thing: emoji, name, synonyms."""
    from cogview.checkpoints.folder import read_config, read_things

    read_config(folder)  # so that a folder that holds no model says so
    things = read_things(folder)
    if not things:
        raise InputError(f"{folder} has no things.json: the model is not one of a closed list of things")
    return [f"{thing.emoji}\t{thing.name}\t{'、'.join(thing.synonyms)}".rstrip() for thing in things]


def _or_off(value: float) -> str:
    """A setting that changes nothing where it is 1."""
    return "off" if value == 1 else f"{value:g}"


def _size(count: int) -> str:
    """Bytes in words."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"
