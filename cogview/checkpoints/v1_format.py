"""Read and write the files of CogView v1.

A transformer is a folder, a ``.tar`` of it or one of its files: ``latest_checkpointed_iteration.txt`` with a number N
(or ``release``), and ``N/mp_rank_00_model_states.pt``, one file per model-parallel shard. The image tokenizer is one
``.pt`` file, the text tokenizer a SentencePiece model. Names and shapes of CogView v1 appear only in this file.
"""

from __future__ import annotations

import errno
import re
import tarfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import torch
from torch import Tensor

from cogview.checkpoints.pickles import StoredTensor, read_pickle, tensors_of, write_pickle
from cogview.checkpoints.safetensors_io import TensorSpec, describe_mismatch
from cogview.errors import InputError
from cogview.formatting import printable
from cogview.input_files import open_regular
from cogview.modeling.config import TransformerConfig
from cogview.tokenizers.vocabulary import COMMANDS, Vocabulary

TRACKER = "latest_checkpointed_iteration.txt"
HEAD_SIZE = 64  # of all CogView v1 models; the weights do not show the number of heads
ITERATION = 1  # our folders do not count steps; the scripts of CogView v1 want a number above 0
_SHARD = re.compile(r"mp_rank_(\d+)_model_states\.pt")

# Our name of each module of the transformer, and the name in CogView v1.
_OUTER = {
    "embedding": "word_embeddings",
    "positions": "transformer.position_embeddings",
    "final_norm": "transformer.final_layernorm",
}
_INNER = {
    "attention_norm": "input_layernorm",
    "attention.query_key_value": "attention.query_key_value",
    "attention.output": "attention.dense",
    "attention_output_norm": "third_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "mlp.input": "mlp.dense_h_to_4h",
    "mlp.output": "mlp.dense_4h_to_h",
    "mlp_output_norm": "fourth_layernorm",
}


def v1_name(name: str) -> str:
    """Return the CogView v1 name of a tensor of our transformer."""
    module, _, kind = name.rpartition(".")
    if module in _OUTER:
        return f"{_OUTER[module]}.{kind}"
    _, number, inner = module.split(".", 2)
    return f"transformer.layers.{number}.{_INNER[inner]}.{kind}"


def split_of(name: str) -> str:
    """Return how model-parallel shards divide the tensor of a v1 name: thirds, rows, columns or whole."""
    if ".attention.query_key_value." in name:
        return "thirds"
    if name.startswith("word_embeddings") or ".mlp.dense_h_to_4h." in name:
        return "rows"
    if name.endswith((".attention.dense.weight", ".mlp.dense_4h_to_h.weight")):
        return "columns"
    return "whole"


def split(name: str, tensor: Tensor, shards: int) -> list[Tensor]:
    """Split a tensor for model-parallel ranks.

    Args:
        name: v1 name of the tensor, which decides the kind of split.
        tensor: the whole tensor.
        shards: number of ranks; it must divide the split dimension.

    Returns:
        One tensor per rank; the same tensor for each rank if the name is not split.
    """
    kind = split_of(name)
    if kind == "whole":
        return [tensor] * shards
    if kind == "thirds":
        thirds = [third.chunk(shards) for third in tensor.chunk(3)]
        return [torch.cat([third[rank] for third in thirds]) for rank in range(shards)]
    return list(tensor.chunk(shards, dim=1 if kind == "columns" else 0))


def merge(name: str, pieces: list[Tensor]) -> Tensor:
    """Merge the tensors of all ranks into one; the inverse of ``split``.

    Args:
        name: v1 name of the tensor.
        pieces: one tensor per rank.

    Returns:
        The whole tensor.
    """
    kind = split_of(name)
    if len(pieces) == 1 or kind == "whole":
        return pieces[0]
    if kind == "thirds":
        return torch.cat([third for thirds in zip(*(p.chunk(3) for p in pieces), strict=True) for third in thirds])
    return torch.cat(pieces, dim=1 if kind == "columns" else 0)


class V1Transformer:
    """Transformer of a CogView v1 checkpoint under our names; a context manager that keeps its files open.

    ``specs`` and ``config`` follow from the shapes without reading a tensor; ``read`` reads one tensor.

    Args:
        source: a folder, a ``.tar`` or one ``.pt`` file.
        num_heads: attention heads; None takes the checkpoint's own number, or heads of width 64.

    Raises:
        InputError: if the source is not such a checkpoint, is damaged or incomplete, or its shards do not match.
    """

    def __init__(self, source: Path, num_heads: int | None = None) -> None:
        self.path = source
        self._stack = ExitStack()
        try:
            found = _find_shards(source, self._stack)
            self.iteration, self.files = found.iteration, [name for name, _ in found.shards]  # names for messages
            self._shards: list[dict[str, StoredTensor]] = []
            heads = None
            for name, file in found.shards:
                content = read_pickle(file, name)
                heads = heads or _heads_in(content)
                self._shards.append(_module_of(content, name))
            self.files_without_checksums = [
                name
                for name, shard in zip(self.files, self._shards, strict=True)
                if not all(tensor.has_checksum for tensor in shard.values())
            ]
            self._check_shards()
            self.heads_are_assumed = num_heads is None and heads is None
            self.config = self._config(heads if num_heads is None else num_heads)
            self.specs = self._specs()
        except BaseException:
            self._stack.close()
            raise

    @property
    def num_shards(self) -> int:
        """Number of model-parallel shards."""
        return len(self._shards)

    def read(self, name: str, *, keep: bool = False) -> Tensor:
        """Read a tensor.

        Args:
            name: our name of the tensor.
            keep: ignored; the tensor is always in new memory.

        Returns:
            The tensor, merged from all shards.

        Raises:
            InputError: if the file is damaged or cut short.
        """
        theirs = v1_name(name)
        try:
            if split_of(theirs) == "whole":
                return self._shards[0][theirs].read()
            merged = merge(theirs, [shard[theirs].read() for shard in self._shards])
        except InputError as error:
            raise InputError(f"{self.path}: {theirs}: {error}") from None
        return merged[: self.config.vocabulary_size] if name == "embedding.weight" else merged

    def set_vocabulary(self, vocabulary: Vocabulary) -> None:
        """Drop rows of the embedding beyond ``vocabulary``, which pad it for several shards.

        Raises:
            InputError: if the embedding belongs to another vocabulary.
        """
        found, multiple = self.config.vocabulary_size, 128 * self.num_shards
        if found not in (vocabulary.padded_size, -(-vocabulary.size // multiple) * multiple):
            raise InputError(
                f"{self.path} has {found} word embeddings, but the {vocabulary.num_image_codes} codes of the image "
                f"tokenizer, the {vocabulary.num_text_pieces} pieces of the text model and {len(COMMANDS)} commands "
                f"take {vocabulary.padded_size}: one of the two files belongs to another model"
            )
        self.config = replace(self.config, vocabulary_size=vocabulary.padded_size)
        self.specs = self._specs()

    def __enter__(self) -> V1Transformer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def _check_shards(self) -> None:
        first = self._shards[0]
        for name, shard in zip(self.files[1:], self._shards[1:], strict=True):
            if shard.keys() != first.keys():
                other = next(iter(shard.keys() ^ first.keys()))
                raise InputError(f"{name} does not belong to {self.files[0]}: only one of them has {other}")
            for key, tensor in shard.items():
                if (tensor.shape, tensor.dtype) != (first[key].shape, first[key].dtype):
                    raise InputError(
                        f"{name} does not belong to {self.files[0]}: {key} has the shape {list(tensor.shape)}, "
                        f"there it is {list(first[key].shape)}"
                    )

    def _config(self, num_heads: int | None) -> TransformerConfig:
        first = self._shards[0]
        layers = {int(found[1]) for name in first if (found := re.match(r"transformer\.layers\.(\d+)\.", name))}
        words = first["word_embeddings.weight"].shape
        projection = first.get("transformer.layers.0.attention.query_key_value.weight")
        positions = first.get("transformer.position_embeddings.weight")
        if projection is None or positions is None or {len(words), len(projection.shape), len(positions.shape)} != {2}:
            raise InputError(
                f"{self.files[0]} holds no transformer of CogView: layers or position embeddings are missing"
            )
        width = words[1]
        needed = 3 * width // max(projection.shape[0], 1)
        if needed != self.num_shards:
            raise InputError(
                f"{self.path} is incomplete: its weights are split over {needed} shards, and only "
                f"mp_rank_00 to mp_rank_{self.num_shards - 1:02d} are there"
            )
        if num_heads is None and width % HEAD_SIZE:
            raise InputError(f"{self.path}: a width of {width} does not determine the number of heads: give --heads")
        try:
            return TransformerConfig(
                num_layers=len(layers),
                width=width,
                num_heads=width // HEAD_SIZE if num_heads is None else num_heads,
                vocabulary_size=words[0] * self.num_shards,
                max_positions=positions.shape[0],
            )
        except ValueError as error:
            raise InputError(f"{self.path}: {error}") from None

    def _specs(self) -> dict[str, TensorSpec]:
        """Return the specs of all tensors under our names; raise InputError if they do not match ``config``."""
        wanted = self.config.tensor_shapes
        first = self._shards[0]
        found = {name: self._whole_shape(name, first[name].shape) for name in first}
        theirs = {v1_name(name): shape for name, shape in wanted.items()}
        found["word_embeddings.weight"] = theirs["word_embeddings.weight"]
        if problem := describe_mismatch(theirs, found):
            raise InputError(f"{self.files[0]} holds no transformer of CogView: {problem}")
        return {name: TensorSpec(first[v1_name(name)].dtype, shape) for name, shape in wanted.items()}

    def _whole_shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        kind = split_of(name)
        if kind == "whole" or not shape:
            return shape
        if kind == "columns":
            return (*shape[:-1], shape[-1] * self.num_shards)
        return (shape[0] * self.num_shards, *shape[1:])


def write_v1_transformer(folder: Path, weights: Mapping[str, Tensor], shards: int) -> None:
    """Write a CogView v1 checkpoint.

    Args:
        folder: a new folder.
        weights: tensors under our names.
        shards: number of model-parallel files.
    """
    inner = folder / str(ITERATION)
    inner.mkdir(parents=True)
    for rank in range(shards):
        module = {}
        for ours, tensor in weights.items():
            name = v1_name(ours)
            module[name] = split(name, tensor, shards)[rank].clone() if shards > 1 else tensor
        write_pickle({"module": module, "iteration": ITERATION}, inner / f"mp_rank_{rank:02d}_model_states.pt")
    (folder / TRACKER).write_text(f"{ITERATION}", encoding="utf-8")


@dataclass
class _Found:
    """Shards of a source, in order, with names for messages."""

    iteration: str
    shards: list[tuple[str, IO[bytes]]] = field(default_factory=list)


def _find_shards(source: Path, stack: ExitStack) -> _Found:
    """Open the shards that the tracker file names; ``stack`` closes them."""
    entries, opened = _entries(source, stack)
    trackers = [name for name in entries if Path(name).name == TRACKER]
    if len(trackers) > 1:
        raise InputError(
            f"{source} holds several checkpoints ({printable(', '.join(trackers))}): give the folder of one of them"
        )
    if trackers:
        iteration = opened(trackers[0]).read(100).decode("utf-8", "replace").strip()
        if not re.fullmatch(r"\d+|release", iteration):
            raise InputError(f"{source}: {trackers[0]} holds {iteration[:40]!r}; expected a number or release")
        folder = Path(trackers[0]).parent / iteration
    else:
        folders = {Path(name).parent for name in entries if _SHARD.fullmatch(Path(name).name)}
        if len(folders) != 1:
            raise InputError(
                f"{source} is no CogView v1 checkpoint: expected {TRACKER} and mp_rank_00_model_states.pt below it"
            )
        folder = folders.pop()
        iteration = folder.name or "unknown"
    ranks = {
        int(found[1]): name
        for name in entries
        if Path(name).parent == folder and (found := _SHARD.fullmatch(Path(name).name))
    }
    if not ranks:
        raise InputError(f"{source} is incomplete: {folder}/mp_rank_00_model_states.pt is missing")
    missing = [rank for rank in range(max(ranks) + 1) if rank not in ranks]
    if missing:
        raise InputError(f"{source} is incomplete: {folder}/mp_rank_{missing[0]:02d}_model_states.pt is missing")
    return _Found(iteration, [(_called(source, ranks[rank]), opened(ranks[rank])) for rank in range(len(ranks))])


def _called(source: Path, name: str) -> str:
    """Return the name of an entry of ``source`` for messages."""
    inside = printable(name)
    return (
        str(source / inside) if source.is_dir() else f"{inside} in {source}" if source.suffix == ".tar" else str(source)
    )


def _entries(source: Path, stack: ExitStack) -> tuple[list[str], Callable[[str], IO[bytes]]]:
    """Return the names of all files in a folder, a tar or a single file, and a function that opens one of them."""
    if source.is_dir():
        names = [path.relative_to(source).as_posix() for path in sorted(source.rglob("*")) if path.is_file()]
        return names, lambda name: stack.enter_context(open_regular(source / name))
    if not source.is_file():
        raise InputError(f"there is no CogView v1 checkpoint at {source}: expected a folder, a .tar or a .pt file")
    if source.suffix != ".tar" and not tarfile.is_tarfile(source):
        name = source.name if _SHARD.fullmatch(source.name) else "mp_rank_00_model_states.pt"
        return [name], lambda _: stack.enter_context(open_regular(source))
    try:
        archive = stack.enter_context(tarfile.open(source, "r:"))  # noqa: SIM115  the caller closes it
        members = {}
        for member in archive:
            if member.size < 0:  # it would lead back, for ever
                raise EOFError("a member has a negative size")
            if member.isreg():
                members[member.name.removeprefix("./")] = member
        if any(member.issparse() for member in members.values()):
            raise InputError(f"{source} has members with holes, which checkpoints have not: the file is refused")
        end = source.stat().st_size
        if any(member.offset_data + member.size > end for member in members.values()):
            raise EOFError("a member reaches beyond its end")
    except InputError:
        raise
    except (tarfile.TarError, ValueError, ArithmeticError, EOFError, MemoryError, OSError) as error:
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # that of a position that no file has
            raise
        raise InputError(f"{source} is no tar archive, or is cut short ({error}): download it again") from None

    def opened(name: str) -> IO[bytes]:
        file = archive.extractfile(members[name])
        assert file is not None
        return stack.enter_context(file)

    return list(members), opened


def unwrapped(content: Any) -> Any:
    """Return the mapping that holds the tensors; some files nest it under a name."""
    for name in ("module", "model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(name), dict):
            return content[name]
    return content


def _module_of(content: Any, name: str) -> dict[str, StoredTensor]:
    tensors = tensors_of(unwrapped(content))
    if "quantize_t.embed" in tensors:
        raise InputError(f"{name} is an image tokenizer; it belongs behind --image-tokenizer, expected a transformer")
    if "word_embeddings.weight" not in tensors:
        raise InputError(f"{name} holds no transformer of CogView: word_embeddings.weight is missing")
    return tensors


def _heads_in(content: Any) -> int | None:
    """Return the number of heads from the settings that some checkpoints carry, or None."""
    settings = content.get("args") if isinstance(content, dict) else None
    heads = getattr(settings, "num_attention_heads", None)
    return heads if isinstance(heads, int) and heads > 0 else None
