"""Values that ``frozen.py`` records: readers of the files that the toolkit writes, and their comparison."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

ROUNDING = 1e-4  # largest relative difference that counts as rounding
SHOWN = 3  # values of a differing item that are printed

# Present name -> name at the time of the baseline, for keys of JSON output and files, and for parts of tensor names.
# PARENT/KEY is a key within the value of another one, where the key alone means something else elsewhere.
FORMER_NAMES = {
    "branch_norm_init": "branch_gain",
    "caption_dropout": "caption_drop",
    "text_positions": "text_space",
    "scales_and_zeros": "scale_zero",
    "cpu_packed": "ordered",
    "ema_cluster_size": "use",
    "ema_sum": "total",
    "job/micro_batch_size": "rows",
    "job/batch_size": "batch",
    "job/world_size": "world",
    "assumed/bandwidth_efficiency": "share",
    "assumed/margin": "spare",
    "max_micro_batch_size": "largest_rows",
    "max_rows": "largest_rows",
    "memory/images": "pictures",
    "memory/prepacked": "packed",
    "seconds/decoding": "steps",
    "seconds/images": "pictures",
    "seconds/prefill": "given",
    "suggestions": "would_fit",
}
FORMER_PREFIXES = {"validation_": "held_out_"}  # of metrics

# Metrics that no two runs share.
_MEASURED = re.compile(r"per_second|wait|memory|mfu|seconds|time|utili[sz]ation|flops")


# Readers of what the toolkit writes


# With the values that are as before there were such settings; a hash in the header stood for the adapters before.
LATER_SETTINGS = (("min_p", 0.0), ("noise_version", 1), ("adapters", []))
FORMER_VALUES = {("cogview_job", 2): 1}  # the format of journals, to which version 2 added errors


def former(content: Any, parent: str = "") -> Any:
    """Return JSON content, the value of the key ``parent``, with former names of keys and former values."""
    if isinstance(content, dict):
        kept = {key: value for key, value in content.items() if (key, value) not in LATER_SETTINGS}
        return {former_name(key, parent): former(value, key) for key, value in kept.items()}
    if isinstance(content, list):
        return [former(value, parent) for value in content]
    return FORMER_VALUES.get((parent, content), content)


def former_name(name: str, parent: str = "") -> str:
    """Return the former name of a key within the value of ``parent``, of a metric or of a tensor."""
    if f"{parent}/{name}" in FORMER_NAMES:
        return FORMER_NAMES[f"{parent}/{name}"]
    for prefix, before in FORMER_PREFIXES.items():
        if name.startswith(prefix):
            name = before + name[len(prefix) :]
    return ".".join(FORMER_NAMES.get(part, part) for part in name.split("."))


def digest(content: bytes) -> str:
    """Return the first 16 digits of the SHA-256 of ``content``."""
    return hashlib.sha256(content).hexdigest()[:16]


def file_hash(path: Path) -> str:
    """Return the digest of a file."""
    return digest(path.read_bytes())


def read_image(path: Path) -> dict[str, Any]:
    """Return digests of the pixels and codes of a PNG file, and the other text chunks."""
    from PIL import Image

    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB"))
        texts = {former_name(key): value for key, value in image.info.items() if isinstance(value, str)}
    found: dict[str, Any] = {"pixels": digest(repr(pixels.shape).encode() + pixels.tobytes())}
    for key, value in sorted(texts.items()):
        if key == "codes":
            value = digest(" ".join(value.split()).encode())
        elif key in ("cogview", "parameters") or (key, number(value)) in LATER_SETTINGS:  # the version, and later keys
            continue
        found[key] = number(value)
    return found


def number(text: str) -> Any:
    """Return the number or the list of numbers that ``text`` holds, or else ``text``."""
    with contextlib.suppress(ValueError):
        numbers = [float(word) for word in text.split()]
        return numbers[0] if len(numbers) == 1 else numbers
    return text


def image_of(image: Any) -> list[Any]:
    """Return digests of the pixels and codes of a generated image, with its seed, number and log-probability."""
    pixels = digest(np.asarray(image.convert("RGB")).tobytes())
    codes = digest(np.asarray(image.codes).astype("<i8").tobytes())
    return [pixels, codes, image.seed, image.index, image.log_probability]


def read_store(path: Path) -> dict[str, Any]:
    """Return the header of a token store, its number of rows, and a digest of each field of all rows."""
    import lmdb

    with lmdb.open(str(path), max_dbs=1, readonly=True, lock=False) as environment:
        table = environment.open_db(b"rows", create=False)
        with environment.begin() as reader:
            header, count = former(json.loads(reader.get(b"header", b""))), int(reader.get(b"count", b""))
            rows = [(key, value) for key, value in reader.cursor(db=table)]
    widths = list(header["fields"].values())
    ids = np.frombuffer(b"".join(value for _, value in rows), "<u2").reshape(-1, sum(widths))
    if header.pop("rows_per_value", 1) > 1:  # as if each row had a value of its own, which long rows once had
        rows = [(number.to_bytes(8, "big"), b"") for number in range(len(ids))]
        header["format_version"] = 1
    ends = np.cumsum(widths)[:-1]
    parts = np.split(ids, ends, axis=1)
    header.pop("provenance")  # it may name paths
    return {
        "header": header,
        "count": count,
        "keys": digest(b"".join(key for key, _ in rows)),
        "fields": {name: digest(part.tobytes()) for name, part in zip(header["fields"], parts, strict=True)},
    }


def read_tensors(path: Path) -> dict[str, str]:
    """Return dtype, shape and digest of every tensor of a safetensors file."""
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    found = {}
    for name, tensor in json.loads(content[8:start]).items():
        if name != "__metadata__":
            first, last = tensor["data_offsets"]
            shape = "x".join(map(str, tensor["shape"]))
            found[former_name(name)] = f"{tensor['dtype']} {shape} {digest(content[start + first : start + last])}"
    return dict(sorted(found.items()))


def read_checkpoint(folder: Path) -> dict[str, Any]:
    """Return the tensors, the settings and the text model of a checkpoint folder."""
    found: dict[str, Any] = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        if path.suffix == ".safetensors":
            found[name] = read_tensors(path)
        elif path.suffix == ".json":
            found[name] = former(json.loads(path.read_text("utf-8")))
        elif path.suffix == ".model":
            found[name] = file_hash(path)
    return found


def read_metrics(run: Path) -> dict[str, dict[str, float]]:
    """Return each metric of a run by step, without speed and memory."""
    found: dict[str, dict[str, float]] = {}
    for line in (run / "metrics.jsonl").read_text("utf-8").splitlines():
        record = former(json.loads(line))
        for name, value in record.items():
            if name != "step" and not _MEASURED.search(name):
                found.setdefault(name, {})[str(record["step"])] = value
    return dict(sorted(found.items()))


def read_run(run: Path) -> dict[str, Any]:
    """Return metrics, sample sheets and checkpoints of a run."""
    checkpoints = sorted((run / "checkpoints").glob("step-*"))
    return {
        "metrics": read_metrics(run),
        "samples": {path.name: read_image(path)["pixels"] for path in sorted((run / "samples").glob("*.png"))},
        "captions": {path.name: file_hash(path) for path in sorted((run / "samples").glob("*.txt"))},
        "best": former(json.loads((run / "checkpoints" / "best.json").read_text("utf-8"))),
        "checkpoints": {path.name: read_checkpoint(path) for path in checkpoints},
    }


# Comparison


def leaves(content: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every value within JSON content with its path."""
    if isinstance(content, dict | list) and content:
        pairs = content.items() if isinstance(content, dict) else enumerate(content)
        for key, value in pairs:
            yield from leaves(value, f"{path}/{key}" if path else str(key))
    else:
        yield path, content


def difference(expected: Any, found: Any) -> str | None:
    """Describe in one line how ``found`` differs from ``expected``; None if they are equal."""
    before, now = dict(leaves(expected)), dict(leaves(found))
    missing, new = [key for key in before if key not in now], [key for key in now if key not in before]
    changed = [key for key in before if key in now and not equal(before[key], now[key])]
    if not (missing or new or changed):
        return None
    words = [f"{len(changed)} of {len(before)} values changed"] if changed else []
    words += [f"{len(keys)} {word}" for keys, word in ((missing, "missing"), (new, "new")) if keys]
    errors = [relative_error(before[key], now[key]) for key in changed]
    if changed and not (missing or new) and max(errors) <= ROUNDING:
        words.append(f"by rounding alone, at most {max(errors):.1e} relative")
    shown = [f"{key}: {before[key]} -> {now[key]}" for key in changed[:SHOWN]]
    shown += [f"missing {key}" for key in missing[:SHOWN]] + [f"new {key}" for key in new[:SHOWN]]
    return f"{', '.join(words)}; {'; '.join(shown)}"


def equal(one: Any, other: Any) -> bool:
    """Compare two values exactly; NaN equals NaN, and 1 is not True."""
    if isinstance(one, float) and isinstance(other, float) and math.isnan(one) and math.isnan(other):
        return True
    return one == other and isinstance(one, bool) == isinstance(other, bool)


def relative_error(one: Any, other: Any) -> float:
    """Return the relative difference of two numbers; infinity for other values."""
    if isinstance(one, int | float) and isinstance(other, int | float) and not isinstance(one, bool):
        return abs(one - other) / max(abs(one), abs(other), 1e-300)
    return math.inf


def compare(expected: Mapping[str, Any], found: Mapping[str, Any]) -> int:
    """Print one line for every item of ``found`` that differs from ``expected``; return how many there are."""
    kinds = Counter(now["kind"] for now in found["items"].values())
    if expected["machine"] != found["machine"] and kinds["machine"]:
        print("note: recorded on another machine or with other versions, where machine items may differ rightly:")
        print(f"      {json.dumps(expected['machine'])} -> {json.dumps(found['machine'])}")
    count = 0
    for name, now in found["items"].items():
        before = expected["items"].get(name)
        line = "not in the baseline" if before is None else difference(before["values"], now["values"])
        if line is not None:
            count += 1
            print(f"differs  {name} [{now['kind']}]: {line}")
    total = len(found["items"])
    print(f"{total - count} of {total} items equal ({kinds['machine']} machine, {kinds['portable']} portable)")
    return count
