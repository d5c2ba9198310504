"""Known models: the rows of ``checkpoints.yaml``."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import yaml

from cogview.checkpoints.folder import verify_files
from cogview.config_files import build
from cogview.errors import InputError


@dataclass(frozen=True, kw_only=True)
class KnownModel:
    """One row: where the model lies in the package, what its files must hash to, its licence."""

    embedded: str  # folder, relative to the package
    about: str
    licence: str
    sha256: dict[str, str]


def known_models() -> dict[str, KnownModel]:
    """The rows of checkpoints.yaml by name."""
    text = (_package() / "checkpoints.yaml").read_text(encoding="utf-8")
    rows = yaml.safe_load(text) or {}
    return {name: build(KnownModel, row, where=f"checkpoints.yaml, {name}") for name, row in rows.items()}


def find_checkpoint(name: str) -> Path:
    """The folder of a known model, its files verified, or ``name`` itself where that is a checkpoint folder."""
    known = known_models()
    if name in known:
        folder = _package() / known[name].embedded
        verify_files(folder, list(known[name].sha256.items()))
        return folder
    folder = Path(name)
    if folder.is_dir():
        return folder
    raise InputError(f'checkpoint "{name}" is unknown; known: {", ".join(known)}, or the path of a checkpoint folder')


def _package() -> Path:
    return Path(str(resources.files("cogview")))
