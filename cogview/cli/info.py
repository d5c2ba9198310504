"""``cogview info``: what a model is, was trained on and can do."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cogview.cli.options import add_revision_argument
from cogview.errors import InputError
from cogview.formatting import format_bytes
from cogview.tokenizers.tasks import commands_of

if TYPE_CHECKING:  # torch takes seconds to import: --help does without
    from cogview.checkpoints.registry import ModelEntry
    from cogview.checkpoints.safetensors_io import TensorSpec
    from cogview.modeling.config import TransformerConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help="a model's name or folder, or a released transformer (.tar, .pt or its folder), image tokenizer (.pt) or "
        "text model (.model), or owner/name on the Hugging Face Hub; without one, the known models are listed",
    )
    add_revision_argument(parser)
    parser.add_argument(
        "--things", action="store_true", help="list what the model can draw: emoji, name and synonyms, split by tabs"
    )
    parser.add_argument("--hashes", action="store_true", help="add the SHA-256 of each file, which reads all of it")


def run(args: argparse.Namespace) -> int:
    """Print; weights are not loaded."""
    from cogview.checkpoints.registry import is_v1, load_registry, resolve_checkpoint

    known = load_registry()
    if args.model is None:
        for option, given in (("--things", args.things), ("--hashes", args.hashes)):
            if given:
                raise InputError(f"{option} needs a model: cogview info MODEL {option}")
        for name, row in known.items():
            print(f"{name}: {row.about}")
        print("cogview models says which of them are on this machine", file=sys.stderr)
        return 0
    bundle, path = known.get(args.model), Path(args.model)
    if args.things:
        lines = things_lines(resolve_checkpoint(args.model, revision=args.revision))
    elif bundle is not None and bundle.parts and not args.hashes:
        lines = bundle_lines(args.model, bundle)
    elif args.model not in known and (path.is_file() or is_v1(path)):
        lines = table(released_facts(path), path, hashes=args.hashes)
    else:
        folder = resolve_checkpoint(args.model, revision=args.revision)
        lines = table(model_facts(folder, args.model), folder, hashes=args.hashes)
    print("\n".join(lines))
    return 0


def model_facts(folder: Path, name: str) -> dict[str, str]:
    """A checkpoint folder in words."""
    from cogview.checkpoints.checkpoint import read_config, read_things
    from cogview.checkpoints.registry import load_registry
    from cogview.checkpoints.safetensors_io import WeightsFile

    config = read_config(folder)
    vocabulary, sampling = config.vocabulary, config.sampling
    facts = {"model": name}
    if (row := load_registry().get(name)) is not None:
        facts |= {"about": row.about, "licence": row.licence}
    facts |= {
        "tasks": ", ".join(config.tasks),
        "commands": ", ".join(f"cogview {command}" for task in config.tasks for command in commands_of(task)),
        "pictures": f"{8 * config.grid} x {8 * config.grid} pixels from {config.grid} x {config.grid} codes",
        "transformer": _shape(config.transformer),
        "weights": weights_in_words(WeightsFile(folder / "model.safetensors").specs),
        "vocabulary": f"{vocabulary.size} ids: {vocabulary.num_image_codes} image codes, "
        f"{vocabulary.num_text_pieces} text pieces, {len(vocabulary.commands)} commands",
        "longest prompt": f"{config.max_text} pieces",
        "sampling": f"temperature {sampling.temperature:g}, top-k {sampling.top_k or 'off'}, "
        f"top-p {_or_off(sampling.top_p)}, guidance {_or_off(sampling.guidance)}, "
        f"text attention {_or_off(sampling.text_attention)}",
        "guidance": f"possible: {config.caption_dropout:.0%} of the captions were left out in training"
        if config.caption_dropout
        else "not possible: no captions were left out in training",
    }
    if things := read_things(folder):
        facts["things"] = f"{len(things)}, listed by: cogview info {name} --things"
    return facts


def released_facts(path: Path) -> dict[str, str]:
    """A file or a folder of the release in words; InputError for anything else."""
    from cogview.checkpoints.registry import is_v1

    if path.suffix == ".model":
        return text_model_facts(path)
    if not is_v1(path):
        raise InputError(
            f"{path} is no model: expected a name, a checkpoint folder, or a released file (.tar, .pt or .model)"
        )
    from cogview.checkpoints.v1_format import is_v1_vqvae

    if path.suffix == ".pt" and path.is_file() and is_v1_vqvae(path):
        return image_tokenizer_facts(path)
    return transformer_facts(path)


def transformer_facts(path: Path) -> dict[str, str]:
    """A released transformer in words, and how to convert it; none of its tensors is read."""
    from cogview.checkpoints.registry import convert_command, load_registry
    from cogview.checkpoints.v1_convert import tasks_by_name
    from cogview.checkpoints.v1_format import V1Transformer

    row = load_registry().get(path.name.removesuffix(".tar"))
    published = row is not None and bool(row.files)
    command = convert_command({"transformer": path}) + ("" if published else " -o FOLDER")
    tasks = tasks_by_name(path)
    with V1Transformer(path) as transformer:
        shape = transformer.config
        assumed = f", each {shape.head_size} wide, which no weight tells" if transformer.heads_are_assumed else ""
        return {
            "model": str(path),
            "kind": "transformer of the released CogView, to be converted once",
            "tasks": f"{', '.join(tasks)}, as its name says"
            if tasks
            else "neither the weights nor the name tell: cogview convert --tasks says so",
            "transformer": _shape(shape, assumed),
            "weights": weights_in_words(transformer.specs),
            "vocabulary": f"{shape.vocabulary_size} ids",
            "positions": f"{shape.max_positions}",
            "shards": f"{transformer.num_shards}",
            "iteration": transformer.iteration,
            "to convert": command,
        }


def image_tokenizer_facts(path: Path) -> dict[str, str]:
    """A released image tokenizer in words."""
    from cogview.checkpoints.safetensors_io import TensorSpec
    from cogview.checkpoints.v1_format import read_v1_vqvae
    from cogview.vqvae.model import PIXELS_PER_CODE

    config, weights = read_v1_vqvae(path)
    networks = sum(tensor.numel() for name, tensor in weights.items() if not name.startswith("quantizer."))
    return {
        "model": str(path),
        "kind": "image tokenizer of the released CogView: --image-tokenizer of cogview convert",
        "codes": f"{config.num_codes}, each {config.code_width} numbers wide",
        "pictures": f"{PIXELS_PER_CODE} x {PIXELS_PER_CODE} pixels a code",
        "networks": f"{config.architecture}, channels {', '.join(map(str, config.channels))}, {networks:,} parameters",
        "weights": weights_in_words({name: TensorSpec(t.dtype, tuple(t.shape)) for name, t in weights.items()}),
    }


def text_model_facts(path: Path) -> dict[str, str]:
    """A SentencePiece model in words."""
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
    """A bundle in words: its models, and which of them are on this machine."""
    from cogview.checkpoints.registry import converted_folder, is_converted

    parts = []
    for model in row.models:
        tasks = ", ".join(task for task, part in row.parts.items() if part == model)
        there = converted_folder(model) if is_converted(model) else f"not on this machine: cogview download {model}"
        parts.append(f"{model} for {tasks}; {there}")
    facts = {"model": name, "about": row.about, "licence": row.licence, "tasks": ", ".join(row.tasks)}
    return _table(facts | {"parts": parts[0]}, parts[1:])


def table(facts: Mapping[str, str], path: Path, *, hashes: bool) -> list[str]:
    """Lines of ``facts``, and below them the file or folder ``path`` with sizes and, if so asked, SHA-256 sums."""
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    sums = _sha256_of(files) if hashes else {}
    sizes = {file: file.stat().st_size for file in files}
    noted = {file: f"({format_bytes(sizes[file])}" + (f", SHA-256 {sums[file]})" if sums else ")") for file in files}
    if path.is_file():
        return _table({**facts, "file": f"{path} {noted[path]}"})
    total = f"{path} ({format_bytes(sum(sizes.values()))})"
    return _table({**facts, "folder": total}, [f"{file.relative_to(path).as_posix()} {noted[file]}" for file in files])


def things_lines(folder: Path) -> list[str]:
    """A line per thing: emoji, name, synonyms."""
    from cogview.checkpoints.checkpoint import read_config, read_things

    read_config(folder)  # so that a folder that holds no model says so
    things = read_things(folder)
    if not things:
        raise InputError(f"{folder} has no things.json: the model is not one of a closed list of things")
    return [f"{thing.emoji}\t{thing.name}\t{'、'.join(thing.synonyms)}".rstrip() for thing in things]


def weights_in_words(specs: Mapping[str, TensorSpec]) -> str:
    """The dtypes of weights."""
    from cogview.checkpoints.precision import stored_quantization
    from cogview.modeling.quantization import is_quantized, quantized_names

    few_bits = stored_quantization(specs)
    if few_bits is None:
        return _dtypes(specs.values())
    rounded = dict(quantized_names(name, few_bits) for name in specs if is_quantized(name))
    rest = [spec for name, spec in specs.items() if name not in rounded.keys() | rounded.values()]
    scales = [specs[name] for name in rounded.values()]
    return f"{few_bits}, with scales in {_dtypes(scales)}; the rest {_dtypes(rest)}"


def _dtypes(specs: Iterable[TensorSpec]) -> str:
    """Each dtype once, that of the first tensor first."""
    return ", ".join(dict.fromkeys(str(spec.dtype).removeprefix("torch.") for spec in specs))


def _shape(shape: TransformerConfig, about_heads: str = "") -> str:
    return (
        f"{shape.num_layers} layers, width {shape.width}, {shape.num_heads} heads{about_heads}, "
        f"{shape.num_parameters:,} parameters"
    )


def _sha256_of(files: Sequence[Path]) -> dict[Path, str]:
    from tqdm import tqdm

    from cogview.files import file_sha256

    total = sum(file.stat().st_size for file in files)
    with tqdm(total=total, unit="B", unit_scale=True, desc="reading", disable=None, leave=False) as bar:
        return {path: file_sha256(path, bar.update) for path in files}


def _table(facts: Mapping[str, str], more: Sequence[str] = ()) -> list[str]:
    """Names and what belongs to them in two columns; ``more`` goes on in the second."""
    width = max(map(len, facts)) + 2
    return [f"{key + ':':<{width}}{value}" for key, value in facts.items()] + [f"{'':<{width}}{line}" for line in more]


def _or_off(value: float) -> str:
    """A setting that changes nothing where it is 1."""
    return "off" if value == 1 else f"{value:g}"
