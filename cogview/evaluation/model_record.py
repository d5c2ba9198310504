"""Describe a model, packages and the machine for the manifest of a result."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
from pathlib import Path

import torch

from cogview import __version__
from cogview.checkpoints.adapter import Adapter
from cogview.checkpoints.fingerprint import hashed_config
from cogview.device import cpu_name
from cogview.evaluation.manifest import AdapterRecord, ModelRecord
from cogview.files import file_sha256
from cogview.pipeline.cogview import CogView

HASHED_FILES = ("config.json", "text.model", "model.safetensors", "image/model.safetensors")


def describe_model(model: CogView, *, guidance: float | None = None) -> ModelRecord:
    """Return the record of an opened model.

    Args:
        model: The model.
        guidance: Guidance of what was generated; None where nothing was, or where the manifest has the sampling.
    """
    folders = [model.folder] if model.folder is not None else []
    if model.bundle is not None:
        folders = [model.bundle.folders[task] for task in sorted(model.bundle.folders)]
    return ModelRecord(
        name=_name_of(model.name),
        sha256=hash_weights(folders) if folders else None,
        adapters=tuple(
            AdapterRecord(name=_name_of(each.name), sha256=_hash_adapter(each.name), scale=each.scale)
            for each in model.adapters
        ),
        weights=model.placement.weight_format,
        dtype=str(model.placement.dtype).removeprefix("torch."),
        kv_dtype="int8" if model.int8_cache else "auto",
        guidance=guidance,
        speculative=model.speculative,
    )


def describe_image_tokenizer(name: str, folder: Path) -> ModelRecord:
    """Return the record of an image tokenizer without a transformer.

    Args:
        name: The name that it was opened by.
        folder: Its folder.
    """
    digests = [f"{file} {file_sha256(folder / file)}\n" for file in ("config.json", "model.safetensors")]
    return ModelRecord(name=_name_of(name), sha256=hashlib.sha256("".join(digests).encode()).hexdigest())


def hash_weights(folders: list[Path]) -> str:
    """Return the SHA-256 of config, tokenizers and weights of checkpoint folders.

    Unlike ``checkpoints.fingerprint`` it covers every byte of the weights, so that one damaged number is noticed. It
    takes a second for a gigabyte or two.

    Args:
        folders: Checkpoint folders, in an order that does not depend on the machine.
    """
    digest = hashlib.sha256()
    for folder in folders:
        for name in HASHED_FILES:
            path = folder / name
            found = hashlib.sha256(hashed_config(path)).hexdigest() if name == "config.json" else file_sha256(path)
            digest.update(f"{name} {found}\n".encode())
    return digest.hexdigest()


def describe_versions(*packages: str) -> dict[str, str]:
    """Return versions of cogview, Python, PyTorch, NumPy and further installed packages.

    Args:
        packages: Names on the package index; those that are not installed are left out.
    """
    found = {"cogview": __version__, "python": platform.python_version()}
    for name in ("torch", "numpy", *packages):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def describe_hardware(device: torch.device | str = "cpu") -> dict[str, str | int]:
    """Return the processor, the number of threads and the device.

    Args:
        device: The device that measured.
    """
    device = torch.device(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {"cpu": cpu_name(), "threads": torch.get_num_threads(), "device": name}


def _name_of(name: str) -> str:
    """Return a name without the folders of this machine."""
    return Path(name).resolve().name if Path(name).is_dir() else name


def _hash_adapter(name: str) -> str:
    return Adapter(name).sha256()
