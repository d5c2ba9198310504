"""``cogview info``: describe a model: its tasks, its training and its files."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cogview.cli.journal_info import journal_facts
from cogview.cli.options import Command, argument, revision_option
from cogview.cli.picture_info import describe_png, is_png
from cogview.errors import InputError
from cogview.formatting import format_bytes
from cogview.input_files import looked_at

if TYPE_CHECKING:  # torch takes seconds to import: --help does without
    from cogview.checkpoints.registry import ModelEntry
    from cogview.checkpoints.safetensors_io import TensorSpec
    from cogview.modeling.config import TransformerConfig
    from cogview.vqvae.model import VQVAEConfig


FILE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".pt", ".tar", ".model", ".safetensors", ".jsonl", ".json", ".yaml")


@click.command(cls=Command)
@argument(
    "model",
    required=False,
    metavar="MODEL",
    help="name or folder of a model, folder of an image tokenizer, owner/name on the Hugging Face Hub, or a "
    "transformer (.tar, .pt or its folder), image tokenizer (.pt) or text model (.model) of CogView v1, or a PNG "
    "image, for its metadata, or the journal of a job (.ledger.jsonl); without it, the known models are listed",
)
@revision_option()
@click.option(
    "--things", is_flag=True, help="list the objects that the model knows: emoji, name and synonyms, separated by tabs"
)
@click.option("--hashes", is_flag=True, help="add the SHA-256 of each file, which reads all of it")
def command(model: str | None, revision: str | None, things: bool, hashes: bool) -> int:
    """Describe a model: its tasks, its training and its files. No weights are loaded."""
    from cogview.checkpoints.registry import is_v1, load_registry, resolve_checkpoint
    from cogview.jobs.journal import is_journal

    known = load_registry()
    if model is None:
        for option, given in (("--things", things), ("--hashes", hashes)):
            if given:
                raise InputError(f"{option} needs a model: cogview info MODEL {option}")
        for name, row in known.items():
            print(f"{name}: {row.about}")
        print("cogview models shows which of them are on this machine", file=sys.stderr)
        return 0
    bundle, path = known.get(model), Path(model)
    if model not in known and path.suffix.lower() in FILE_SUFFIXES and not path.exists():  # owner/name may fit as well
        raise InputError(f"there is no file {model}{looked_at(path)}")
    if model not in known and (path / "adapter_config.json").is_file():
        raise InputError(f"{path} is an adapter, not a model; it is described by: cogview adapter info {path}")
    if things:
        lines = things_lines(resolve_checkpoint(model, revision=revision))
    elif bundle is not None and bundle.parts and not hashes:
        lines = bundle_lines(model, bundle)
    elif model not in known and is_png(path):
        lines = lines_with_files(describe_png(path), path, hashes=hashes)
    elif model not in known and is_journal(path):
        lines = _columns(*journal_facts(path))
    elif model not in known and (path.is_file() or is_v1(path)):
        lines = lines_with_files(describe_v1_file(path), path, hashes=hashes)
    else:
        folder = resolve_checkpoint(model, revision=revision)
        facts = describe_image_tokenizer(folder) if is_image_tokenizer(folder) else describe_checkpoint(folder, model)
        lines = lines_with_files(facts, folder, hashes=hashes)
    print("\n".join(lines))
    return 0


def describe_checkpoint(folder: Path, name: str) -> dict[str, str]:
    """Return the facts of a checkpoint folder, by name."""
    from cogview.checkpoints.checkpoint import check_sizes, read_things
    from cogview.checkpoints.image_tokenizer import read_image_config
    from cogview.checkpoints.registry import load_registry
    from cogview.checkpoints.safetensors_io import WeightsFile
    from cogview.tokenizers.tasks import trained_tasks

    config = check_sizes(folder)
    vocabulary, sampling = config.vocabulary, config.sampling
    side = read_image_config(folder / "image").downsampling * config.grid
    facts = {"model": name}
    if (row := load_registry().get(name)) is not None:
        facts |= {"about": row.about, "licence": row.licence}
    facts |= {
        "tasks": ", ".join(config.tasks),
        "commands": _commands(config.tasks),
        "not trained for": _commands(task for task in trained_tasks() if task not in config.tasks) or "nothing",
        "images": f"{side} x {side} pixels from {config.grid} x {config.grid} codes",
        "transformer": _shape(config.transformer),
        "weights": describe_weights(WeightsFile(folder / "model.safetensors").specs),
        "vocabulary": f"{vocabulary.size} ids: {vocabulary.num_image_codes} image codes, "
        f"{vocabulary.num_text_pieces} text pieces, {len(vocabulary.commands)} commands",
        "maximum prompt": f"{config.max_text} pieces",
        "sampling": f"temperature {sampling.temperature:g}, top-k {sampling.top_k or 'off'}, "
        f"top-p {_or_off(sampling.top_p)}, min-p {sampling.min_p or 'off'}, guidance {_or_off(sampling.guidance)}, "
        f"text attention {_or_off(sampling.text_attention)}",
        "guidance": f"possible: trained with {config.caption_dropout:.0%} caption dropout"
        if config.caption_dropout
        else "not possible: trained without caption dropout",
    }
    if known := config.reconstruction_psnr:
        facts["reconstructions"] = f"PSNR {known.median:g} dB (median), 99% at least {known.p01:g} dB, held-out images"
    if things := read_things(folder):
        facts["things"] = f"{len(things)}, listed by: cogview info {name} --things"
    return facts


def describe_v1_file(path: Path) -> dict[str, str]:
    """Return the facts of a file or folder of CogView v1, by name; raise InputError for anything else."""
    from cogview.checkpoints.registry import is_v1

    if path.suffix == ".model":
        return describe_text_model(path)
    if not is_v1(path):
        raise InputError(
            f"{path} is not a model: expected a name, a checkpoint folder, or a CogView v1 file (.tar, .pt or .model)"
        )
    from cogview.checkpoints.v1_vqvae import is_v1_vqvae

    if path.suffix == ".pt" and path.is_file() and is_v1_vqvae(path):
        return describe_v1_image_tokenizer(path)
    return describe_v1_transformer(path)


def describe_v1_transformer(path: Path) -> dict[str, str]:
    """Return the facts of a transformer of CogView v1 and the command to convert it; no tensor is read."""
    from cogview.checkpoints.registry import convert_command, load_registry
    from cogview.checkpoints.v1_convert import tasks_by_name
    from cogview.checkpoints.v1_format import V1Transformer

    row = load_registry().get(path.name.removesuffix(".tar"))
    published = row is not None and bool(row.files)
    command = convert_command({"transformer": path}) + ("" if published else " -o FOLDER")
    tasks = tasks_by_name(path)
    with V1Transformer(path) as transformer:
        shape = transformer.config
        assumed = f", each {shape.head_size} wide (assumed)" if transformer.heads_are_assumed else ""
        return {
            "model": str(path),
            "kind": "transformer of CogView v1, to be converted once",
            "tasks": f"{', '.join(tasks)}, by its name"
            if tasks
            else "unknown: neither the weights nor the name imply them; cogview convert --tasks sets them",
            "transformer": _shape(shape, assumed),
            "weights": describe_weights(transformer.specs),
            "vocabulary": f"{shape.vocabulary_size} ids",
            "positions": f"{shape.max_positions}",
            "shards": f"{transformer.num_shards}",
            "iteration": transformer.iteration,
            "to convert": command,
        }


def describe_v1_image_tokenizer(path: Path) -> dict[str, str]:
    """Return the facts of an image tokenizer of CogView v1."""
    from cogview.checkpoints.safetensors_io import TensorSpec
    from cogview.checkpoints.v1_vqvae import read_v1_vqvae

    config, weights = read_v1_vqvae(path)
    specs = {name: TensorSpec(tensor.dtype, tuple(tensor.shape)) for name, tensor in weights.items()}
    kind = "image tokenizer of CogView v1: --image-tokenizer of cogview convert"
    return {"model": str(path), "kind": kind, **_vqvae_facts(config, specs)}


def is_image_tokenizer(folder: Path) -> bool:
    """Return whether a folder holds an image tokenizer alone, such as the folder ``image`` of a model."""
    from cogview.plain_data import read_json

    try:
        config = read_json(folder / "config.json")
    except (InputError, OSError):  # described as a model, whose error says what is wrong
        return False
    return isinstance(config, dict) and "code_width" in config


def describe_image_tokenizer(folder: Path) -> dict[str, str]:
    """Return the facts of an image tokenizer's folder, by name."""
    from cogview.checkpoints.image_tokenizer import read_image_config
    from cogview.checkpoints.safetensors_io import WeightsFile

    config = read_image_config(folder)
    specs = WeightsFile(folder / "model.safetensors").specs
    return {"model": str(folder), "kind": "image tokenizer", **_vqvae_facts(config, specs)}


def _vqvae_facts(config: VQVAEConfig, specs: Mapping[str, TensorSpec]) -> dict[str, str]:
    """Return the facts of the config and the tensors of an image tokenizer."""
    networks = sum(math.prod(spec.shape) for name, spec in specs.items() if not name.startswith("quantizer."))
    return {
        "codes": f"{config.num_codes}, each {config.code_width} numbers wide",
        "pixels": f"{config.downsampling} x {config.downsampling} per code",
        "networks": f"{config.architecture}, channels {', '.join(map(str, config.channels))}, {networks:,} parameters",
        "weights": describe_weights(specs),
    }


def describe_text_model(path: Path) -> dict[str, str]:
    """Return the facts of a SentencePiece model."""
    from cogview.tokenizers.text import TextTokenizer

    try:
        size = TextTokenizer.load(path).size
    except ValueError as error:
        raise InputError(str(error)) from None
    return {
        "model": str(path),
        "kind": "text model (SentencePiece): --text-model of cogview convert",
        "pieces": f"{size}",
    }


def bundle_lines(name: str, row: ModelEntry) -> list[str]:
    """Return lines about a bundle: its models, and which of them are on this machine."""
    from cogview.checkpoints.registry import converted_folder, is_converted

    parts = []
    for model in row.models:
        tasks = ", ".join(task for task, part in row.parts.items() if part == model)
        there = converted_folder(model) if is_converted(model) else f"not on this machine: cogview download {model}"
        parts.append(f"{model} for {tasks}; {there}")
    facts = {"model": name, "about": row.about, "licence": row.licence, "tasks": ", ".join(row.tasks)}
    return _columns(facts | {"parts": parts[0]}, parts[1:])


def lines_with_files(facts: Mapping[str, str], path: Path, *, hashes: bool) -> list[str]:
    """Return lines of ``facts``, and below them the files of ``path`` with sizes and, optionally, SHA-256 sums."""
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    sums = _sha256_of(files) if hashes else {}
    sizes = {file: file.stat().st_size for file in files}
    noted = {file: f"({format_bytes(sizes[file])}" + (f", SHA-256 {sums[file]})" if sums else ")") for file in files}
    if path.is_file():
        return _columns({**facts, "file": f"{path} {noted[path]}"})
    total = f"{path} ({format_bytes(sum(sizes.values()))})"
    return _columns(
        {**facts, "folder": total}, [f"{file.relative_to(path).as_posix()} {noted[file]}" for file in files]
    )


def things_lines(folder: Path) -> list[str]:
    """Return a line for each object: emoji, name and synonyms, separated by tabs."""
    from cogview.checkpoints.checkpoint import read_config, read_things

    read_config(folder)  # raises the error of a folder without a model
    things = read_things(folder)
    if not things:
        raise InputError(f"{folder} has no things.json: the model was not trained on a closed list of objects")
    return [f"{thing.emoji}\t{thing.name}\t{'、'.join(thing.synonyms)}".rstrip() for thing in things]


def describe_weights(specs: Mapping[str, TensorSpec]) -> str:
    """Return the dtypes of weights, and their quantization."""
    from cogview.checkpoints.precision import stored_quantization
    from cogview.modeling.quantization import is_quantized, quantized_names

    quantization = stored_quantization(specs)
    if quantization is None:
        return _dtypes(specs.values())
    quantized = dict(quantized_names(name, quantization) for name in specs if is_quantized(name))
    rest = [spec for name, spec in specs.items() if name not in quantized.keys() | quantized.values()]
    scales = [specs[name] for name in quantized.values()]
    return f"{quantization}, with scales in {_dtypes(scales)}; the rest {_dtypes(rest)}"


def _commands(tasks: Iterable[str]) -> str:
    """Return the commands of tasks, as they are typed."""
    from cogview.tokenizers.tasks import commands_of

    return ", ".join(f"cogview {command}" for task in tasks for command in commands_of(task))


def _dtypes(specs: Iterable[TensorSpec]) -> str:
    """Return each dtype once, in the order of the tensors."""
    return ", ".join(dict.fromkeys(str(spec.dtype).removeprefix("torch.") for spec in specs))


def _shape(shape: TransformerConfig, about_heads: str = "") -> str:
    """Return the shape of a transformer in words."""
    attention = shape.attention
    about_attention = ""
    if not attention.is_dense:
        about_attention = (
            f", attention to a window of {attention.window} positions and {attention.pivots} codes of each image"
        )
    return (
        f"{shape.num_layers} layers, width {shape.width}, {shape.num_heads} heads{about_heads}, "
        f"{shape.num_parameters:,} parameters{about_attention}"
    )


def _sha256_of(files: Sequence[Path]) -> dict[Path, str]:
    """Return the SHA-256 of each file; shows a progress bar."""
    from tqdm import tqdm

    from cogview.files import file_sha256

    total = sum(file.stat().st_size for file in files)
    with tqdm(total=total, unit="B", unit_scale=True, desc="reading", disable=None, leave=False) as bar:
        return {path: file_sha256(path, bar.update) for path in files}


def _columns(facts: Mapping[str, str], more: Sequence[str] = ()) -> list[str]:
    """Return names and values in two columns; ``more`` continues the second column."""
    width = max(map(len, facts)) + 2
    return [f"{key + ':':<{width}}{value}" for key, value in facts.items()] + [f"{'':<{width}}{line}" for line in more]


def _or_off(value: float) -> str:
    """Return a setting that 1 disables."""
    return "off" if value == 1 else f"{value:g}"
