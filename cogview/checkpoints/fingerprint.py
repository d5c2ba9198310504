"""Fingerprints of checkpoint folders: which weights made a result."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from cogview.plain_data import parse_json

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
BLOCK = 1 << 16  # bytes of a block of weights in a fingerprint
NUM_BLOCKS = 64  # blocks of weights in a fingerprint, evenly spread over the file
# Keys of a config on which no generated image depends: measured quality, and a fact that ranking needs.
UNHASHED_KEYS = ("reconstruction_psnr", "full_mask_rate")


def fingerprint(folder: Path) -> str:
    """Return a SHA-256 that identifies the weights of a checkpoint folder, quickly for files of any size.

    It covers the configuration without ``UNHASHED_KEYS`` and the text model, and of each weights file its size, header
    and 64 blocks.
    """
    sha256 = hashlib.sha256()
    for name in ("config.json", "text.model"):
        path = folder / name
        content = hashed_config(path) if name == "config.json" else path.read_bytes()
        sha256.update(f"{name} {len(content)}\n".encode() + content)
    for name in ("model.safetensors", "image/model.safetensors"):
        with (folder / name).open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            sha256.update(f"{name} {size}\n".encode())
            file.seek(0)
            header = int.from_bytes(file.read(8), "little")  # its length, in a safetensors file
            sha256.update(file.read(min(header, MAX_HEADER_BYTES)))
            for number in range(NUM_BLOCKS):
                file.seek(max(0, size - BLOCK) * number // (NUM_BLOCKS - 1))
                sha256.update(file.read(BLOCK))
    return sha256.hexdigest()


def hashed_config(path: Path) -> bytes:
    """Return the content of a config without ``UNHASHED_KEYS``.

    Args:
        path: ``config.json`` of a checkpoint folder.
    """
    content = path.read_bytes()
    if not any(f'"{key}"'.encode() in content for key in UNHASHED_KEYS):
        return content
    config = parse_json(content)
    for key in UNHASHED_KEYS:
        config.pop(key, None)
    return (json.dumps(config, ensure_ascii=False, indent=2) + "\n").encode()
