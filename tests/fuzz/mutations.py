"""Damage to files, as a function of a random generator: bytes, texts, plain values, and members of containers."""

from __future__ import annotations

import copy
import io
import json
import os
import random
import re
import shutil
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

Damage = Callable[[bytes, random.Random], bytes]

NUMBERS = (
    *(
        "0",
        "1",
        "-1",
        "-0.0",
        "0.5",
        "1e308",
        "-1e308",
        "1e-320",
        "1e999",
        "NaN",
        "Infinity",
        "-Infinity",
        ".nan",
        ".inf",
    ),
    *(
        "255",
        "65535",
        "65536",
        "2147483648",
        "4294967296",
        "-9223372036854775809",
        "18446744073709551616",
        "1" + "0" * 30,
    ),
    *("1" + "0" * 400, "9" * 5000, "true", "null", '"7"', "0x10", "1_000"),
)
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 7, 0.5, -0.0, 1e308, -1e308, 1e-320, float("nan"), float("inf"), -float("inf")),
    *(10**6, 2**31, 2**32, 2**63, 2**64, 10**18, 10**30, -(10**30), 10**400),
    *("", " ", "\n", "a", "一", "\0", "\x1b[31m", "\u202e", "\ufeff", "\ud800", "7", "nan", "../../../x", "/dev/zero"),
    *("x" * 5000, [], {}, [[]], [{}], {"": None}, [1, 2, 3], ["a", "a"], {"a": {"b": 1}}, list(range(3000))),
)
TEXTS = (
    *(
        "\0",
        "\r",
        "\r\n",
        "\n\n",
        "\t",
        '"',
        "'",
        ",",
        "{",
        "[",
        "}",
        "]",
        ":",
        "#",
        "&a",
        "*a",
        "!!python/name:os.system ",
    ),
    *("\ufeff", "\u2028", "\x1b[2J", "\x85", "%", "\\", "\\u0000", "\\ud800", "- ", "? ", "<<: *a", "---\n", "...\n"),
    *("x" * 200_000, "一" * 40_000, '"' * 999, "[" * 100_000, '{"a":' * 30_000, "- " * 5000, "\n" * 5000, "," * 5000),
)
BYTES = (
    b"\0",
    b"\xff",
    b"\x7f",
    b"\x80",
    b"\xfe\xff",
    b"\xb9\xfb",
    b"\0" * 300,
    b"\xff" * 300,
    b"PK\x03\x04",
    b"\x89PNG",
)
WORDS = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 2**32, 2**40, 2**63 - 1, 2**64 - 1)


def bend_bytes(content: bytes, rng: random.Random) -> bytes:
    """Return ``content`` with a few bytes, numbers or stretches changed."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        at, length = _place(data, rng), min(len(data), 2 ** rng.randrange(12))
        kind = rng.randrange(10)
        if kind <= 1 and data:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 2 and data:
            data[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
        elif kind <= 4:
            size = rng.choice((2, 4, 8))
            word = rng.choice(WORDS) % 2 ** (8 * size)
            data[at : at + size] = word.to_bytes(size, rng.choice(("little", "big")))
        elif kind == 5:
            del data[rng.choice((at, rng.randrange(len(data) + 1))) :]
        elif kind == 6:
            data[at:at] = data[at : at + length]
        elif kind == 7:
            del data[at : at + length]
        elif kind == 8:
            data[at : at + length] = bytes(len(data[at : at + length]))
        else:
            data[at:at] = rng.choice((*BYTES, data[:length]))
    return bytes(data)


def bend_text(content: bytes, rng: random.Random) -> bytes:
    """Return a text with numbers, lines, characters or its encoding changed; sometimes with bent bytes."""
    text = content.decode("utf-8", "replace")
    for _ in range(rng.choice((1, 1, 2, 3))):
        kind, lines = rng.randrange(10), text.splitlines(keepends=True)
        if kind <= 2 and (found := list(re.finditer(r"-?\d+(\.\d+)?([eE][-+]?\d+)?", text))):
            match = rng.choice(found)
            text = text[: match.start()] + rng.choice(NUMBERS) + text[match.end() :]
        elif kind == 3:
            at = rng.randrange(len(text) + 1)
            text = text[:at] + rng.choice(TEXTS) + text[at:]
        elif kind == 4 and lines:
            lines.insert(rng.randrange(len(lines) + 1), rng.choice(lines))
            text = "".join(lines)
        elif kind == 5 and lines:
            del lines[rng.randrange(len(lines))]
            text = "".join(lines)
        elif kind == 6:
            text = text[: rng.randrange(len(text) + 1)]
        elif kind == 7 and (found := list(re.finditer(r"\w+|[^\w\s]", text))):
            one, other = rng.choice(found), rng.choice(found)
            text = text[: one.start()] + other[0] + text[one.end() :]
        elif kind == 8:
            encoding = rng.choice(("gb18030", "utf-16", "utf-8-sig", "latin-1", "utf-32-le"))
            return text.encode(encoding, "replace")
        else:
            return bend_bytes(text.encode("utf-8", "replace"), rng)
    return text.encode("utf-8", "surrogatepass")


def bend_value(value: Any, rng: random.Random) -> Any:
    """Return a copy of plain data with one value replaced, removed, renamed, repeated or wrapped."""
    root = [copy.deepcopy(value)]
    places: list[tuple[Any, Any]] = []

    def collect(inner: Any) -> None:
        for key in inner if isinstance(inner, dict) else range(len(inner)):
            places.append((inner, key))
            if isinstance(inner[key], (dict, list)):
                collect(inner[key])

    collect(root)
    holder, key = rng.choice(places)
    kind = rng.randrange(12)
    if kind <= 6:
        holder[key] = copy.deepcopy(rng.choice(VALUES))
    elif kind == 7 and holder is not root:
        del holder[key]
    elif kind == 8 and isinstance(holder, dict):
        holder[rng.choice((f"{key}_", "", "a", str(key).upper(), "__class__", "self"))] = holder.pop(key)
    elif kind == 9:
        other, at = rng.choice(places)
        holder[key] = copy.deepcopy(other[at])
    elif kind == 10:
        for _ in range(rng.choice((1, 2, 70, 900))):
            holder[key] = rng.choice(([holder[key]], {"a": holder[key]}))
    elif isinstance(holder, list):
        holder[key:key] = [holder[key]] * rng.choice((1, 2, 200))
    else:
        holder[key] = [holder[key]] * 2
    return root[0]


def bend_json(content: bytes, rng: random.Random) -> bytes:
    """Return JSON with a changed value, or bent as a text."""
    try:
        if rng.random() < 0.3:
            raise ValueError
        bent = bend_value(json.loads(content), rng)
        if rng.random() < 0.3:
            bent = bend_value(bent, rng)
        return json.dumps(bent, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")
    except (ValueError, RecursionError):
        return bend_text(content, rng)


def bend_json_lines(content: bytes, rng: random.Random) -> bytes:
    """Return lines of JSON with one of them changed, or bent as a text."""
    lines = content.splitlines(keepends=True)
    if not lines or rng.random() < 0.3:
        return bend_text(content, rng)
    number = rng.randrange(len(lines))
    lines[number] = bend_json(lines[number], rng) + b"\n"
    return b"".join(lines)


def bend_yaml(content: bytes, rng: random.Random) -> bytes:
    """Return YAML with a changed value, or bent as a text."""
    try:
        if rng.random() < 0.3:
            raise ValueError
        return yaml.safe_dump(bend_value(yaml.safe_load(content), rng), allow_unicode=True, sort_keys=False).encode()
    except (ValueError, RecursionError, yaml.YAMLError):
        return bend_text(content, rng)


def bend_safetensors(content: bytes, rng: random.Random) -> bytes:
    """Return a safetensors file with a changed header whose length is right, or with bent bytes."""
    size = int.from_bytes(content[:8], "little")
    if rng.random() < 0.4:
        return bend_bytes(content[: 8 + size], rng) + content[8 + size :]
    header = bend_json(content[8 : 8 + size], rng)
    return struct.pack("<Q", len(header)) + header + content[8 + size :]


def bend_png(content: bytes, rng: random.Random) -> bytes:
    """Return a PNG file with a chunk changed, removed, repeated or added, and right checksums; or with bent bytes."""
    if rng.random() < 0.3 or not content.startswith(b"\x89PNG"):
        return bend_bytes(content, rng)
    chunks, at = [], 8
    while at < len(content):
        (length,) = struct.unpack(">I", content[at : at + 4])
        chunks.append((content[at + 4 : at + 8], content[at + 8 : at + 8 + length]))
        at += 12 + length
    number, kind = rng.randrange(len(chunks)), rng.randrange(6)
    name, data = chunks[number]
    if kind <= 2:
        chunks[number] = name, bend_bytes(data, rng)
    elif kind == 3:
        del chunks[number]
    elif kind == 4:
        chunks.insert(rng.randrange(len(chunks) + 1), chunks[number])
    else:
        bomb = zlib.compress(bytes(rng.choice((0, 100, 10**6, 5 * 10**7))))
        texts = {b"zTXt": b"a\0\0" + bomb, b"iTXt": b"codes\0\1\0\0\0" + bomb, b"iCCP": b"a\0\0" + bomb}
        texts |= {
            b"tEXt": b"seed\0x",
            b"tRNS": b"\0",
            b"PLTE": b"\0\0\0",
            b"eXIf": b"Exif\0\0MM\0*",
            b"acTL": b"\xff" * 8,
        }
        chunks.insert(rng.randrange(1, len(chunks) + 1), rng.choice(list(texts.items())))
    parts = [content[:8]]
    for name, data in chunks:
        parts += [struct.pack(">I", len(data)), name, data, struct.pack(">I", zlib.crc32(name + data))]
    return b"".join(parts)


def bend_zip(content: bytes, rng: random.Random) -> bytes:
    """Return a zip archive with one member changed under a right checksum; or with bent bytes."""
    if rng.random() < 0.5 or not content.startswith(b"PK"):
        return bend_bytes(content, rng)
    packed = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(packed, "w") as new:
        entries = old.infolist()
        pickles = [entry for entry in entries if entry.filename.endswith(".pkl")]
        bent = rng.choice(pickles) if pickles and rng.random() < 0.7 else rng.choice(entries)
        for entry in entries:
            data = old.read(entry)
            if entry is bent:
                data = bend_bytes(data, rng)
            new.writestr(
                entry.filename, data, compress_type=rng.choice((entry.compress_type,) * 9 + (zipfile.ZIP_DEFLATED,))
            )
    return packed.getvalue()


def bend_pages(content: bytes, rng: random.Random) -> bytes:
    """Return an LMDB file with numbers in the headers of its 4 kB pages changed; or with bent bytes."""
    if rng.random() < 0.3 or len(content) < 8192:
        return bend_bytes(content, rng)
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 4))):
        page = 4096 * rng.randrange(len(data) // 4096)
        at = page + rng.choice((2 * rng.randrange(40), 2 * rng.randrange(40), rng.randrange(4096)))
        if rng.random() < 0.5:
            at = _place(data, rng)
        size = rng.choice((1, 2, 2, 4, 8))
        word = rng.choice((*WORDS, rng.randrange(2**16), int.from_bytes(data[at : at + size], "little") + 1))
        data[at : at + size] = (word % 2 ** (8 * size)).to_bytes(size, "little")
    return bytes(data[: len(content)])


DAMAGES: dict[str, Damage] = {
    ".json": bend_json,
    ".jsonl": bend_json_lines,
    ".yaml": bend_yaml,
    ".csv": bend_text,
    ".tsv": bend_text,
    ".txt": bend_text,
    ".md": bend_text,
    ".sha256": bend_text,
    ".png": bend_png,
    ".pt": bend_zip,
    ".npz": bend_zip,
    ".mdb": bend_pages,
    ".safetensors": bend_safetensors,
}


def replace_file(path: Path, rng: random.Random) -> str:
    """Put something else in the place of a file; return what it is."""
    kind = rng.choice(("missing", "empty", "folder", "pipe", "loop", "dangling link", "device", "holes", "zeros"))
    size = path.stat().st_size
    if kind in ("holes", "zeros"):
        with path.open("r+b") as file:
            file.truncate(0 if kind == "zeros" else size)
            file.truncate(size if kind == "zeros" else size + (550 << 20 if path.suffix == ".mdb" else 1100 << 20))
        return kind
    path.unlink()
    if kind == "empty":
        path.touch()
    elif kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "loop":
        path.symlink_to(path.name)
    elif kind == "dangling link":
        path.symlink_to("nowhere")
    elif kind == "device":
        path.symlink_to("/dev/zero")
    return kind


def damage_copy(seed: Path, case: Path, name: str) -> str:
    """Copy a folder of valid files and damage one or two of them.

    Args:
        seed: The valid files.
        case: The new folder.
        name: Determines the damage.

    Returns:
        The damaged files, for messages.
    """
    rng = random.Random(name)
    shutil.copytree(seed, case, symlinks=True)
    files = sorted(path for path in case.rglob("*") if path.is_file())
    done = []
    for path in rng.sample(files, min(len(files), rng.choice((1, 1, 1, 1, 2)))):
        if rng.random() < 0.06:
            done.append(f"{path.relative_to(case)}: {replace_file(path, rng)}")
        else:
            content = path.read_bytes()
            path.write_bytes(DAMAGES.get(path.suffix, bend_bytes)(content, rng))
            done.append(f"{path.relative_to(case)}: bent")
    return ", ".join(done)


def _place(data: bytearray, rng: random.Random) -> int:
    """Return an index into ``data``, more often near the beginning or the end, where headers are."""
    if not data:
        return 0
    near = min(len(data), 2 ** rng.randrange(1, 16))
    return rng.choice((rng.randrange(len(data)), rng.randrange(near), len(data) - 1 - rng.randrange(near)))
