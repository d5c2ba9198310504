"""What a conversion cannot verify: sources without checksums, and files of which no checksum is published."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from cogview.checkpoints.pickles import read_pickle, tensors_of
from cogview.checkpoints.registry import load_registry
from cogview.checkpoints.v1_format import V1Transformer, unwrapped
from cogview.files import file_sha256
from cogview.input_files import open_regular

_NO_CHECKSUMS = "so damage that happened before the conversion does not show"


def unverified_in_folder(folder: Path) -> Iterator[str]:
    """Yield what a conversion of a checkpoint folder cannot verify.

    Args:
        folder: The checkpoint folder.
    """
    yield f"{folder / 'model.safetensors'} carries no checksums, {_NO_CHECKSUMS}"


def unverified_in_v1(source: Path, image_tokenizer: Path, text_model: Path) -> Iterator[str]:
    """Yield what a conversion of a checkpoint of CogView v1 cannot verify. Headers are read, not tensors.

    Args:
        source: The transformer: a folder, a ``.tar`` or a ``.pt`` file.
        image_tokenizer: The ``.pt`` file of the VQ-VAE.
        text_model: The SentencePiece model.

    Yields:
        Facts of one line each.

    Raises:
        InputError: A file is missing or damaged.
    """
    with V1Transformer(source, num_heads=1) as transformer:
        legacy = transformer.files_without_checksums
        copies = transformer.files[1:]
    with open_regular(image_tokenizer) as file:
        tensors = tensors_of(unwrapped(read_pickle(file, str(image_tokenizer))))
        legacy += [str(image_tokenizer)] if any(not tensor.has_checksum for tensor in tensors.values()) else []
    for name in [*legacy, str(text_model)]:
        yield f"{name} carries no checksums, {_NO_CHECKSUMS}"
    for name in copies:
        yield f"{name} holds copies of tensors that were read from {transformer.files[0]}; the copies were not read"
    published = {file.name: file for row in load_registry().values() for file in row.files.values()}
    for path in (source, image_tokenizer, text_model):
        expected = published[path.name].sha256 if path.name in published else None
        if expected is None:
            yield f"no published checksum is known for {path.name}"
        elif file_sha256(path) != expected:
            yield f"{path} differs from the published file of that name"
