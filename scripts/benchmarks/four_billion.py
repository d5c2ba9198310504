"""Measure the full 4-billion-parameter model on one machine: loading, peak memory, and seconds per token.

    python scripts/benchmarks/four_billion.py make FOLDER         # random weights in float16 (7.9 GB), and other forms
    python scripts/benchmarks/four_billion.py measure FOLDER [--device cpu] [--runs 5]

``measure`` opens each form in a fresh process, without its file in the page cache, and samples the first codes of an
image. It prints medians over the runs:

* file to first token: the time from opening the model to the first code, relative to the time to read the file once in
  blocks of 16 MB, also without the page cache;
* peak memory of the process after loading, relative to the size of the weights; it includes Python, torch and the
  tokenizers (``base`` is the process before the transformer is opened);
* seconds per token, and the bytes of weights that a token reads per second, as a share of the rate at which the same
  process sums a large array (``probe``).
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import arguments

FORMS = {
    "float16": None,
    "bfloat16": "bfloat16",
    "int8": "int8",
    "int4": "int4",
}  # stored form, and what converts to it
RUNS = (("bfloat16", "float16"), ("bfloat16", "bfloat16"), ("int8", "float16"), ("int8", "int8"))
RUNS += (("int4", "float16"), ("int4", "int4"))
PROMPT = "一只可爱的小猫坐在窗台上"


def make(folder: Path, preset_name: str) -> int:
    """Write the model in float16 and convert it to the other stored forms."""
    import torch

    from cogview.checkpoints.checkpoint import Model, save_model
    from cogview.checkpoints.image_tokenizer import codebook_hash
    from cogview.checkpoints.precision import Precision
    from cogview.checkpoints.safetensors_io import TensorSpec, WeightsWriter
    from cogview.checkpoints.v1_convert import convert_folder
    from cogview.device import DTYPES, parse_quantization
    from cogview.modeling.config import ModelConfig, preset
    from cogview.modeling.transformer import Transformer
    from cogview.tokenizers.text import TextTokenizer
    from cogview.tokenizers.vocabulary import Vocabulary
    from cogview.vqvae.model import VQVAE, VQVAEConfig

    vocabulary = Vocabulary()
    shape = preset(preset_name, vocabulary.padded_size)
    torch.manual_seed(0)
    image_tokenizer = VQVAE(VQVAEConfig.released()).eval()
    config = ModelConfig(
        transformer=shape,
        vocabulary=vocabulary,
        grid=32,
        tasks=("generate",),
        max_text=61,
        caption_stop=False,
        codebook_sha256=codebook_hash(image_tokenizer),
    )
    with torch.device("meta"):
        transformer = Transformer(shape)
    specs = {name: TensorSpec(torch.float16, tuple(t.shape)) for name, t in transformer.state_dict().items()}
    first = folder / "float16"
    # Save all parts but the transformer as usual, with a tiny transformer.
    tiny = preset("5m", vocabulary.padded_size)
    small = Model(
        config=config,
        transformer=Transformer(tiny),
        image_tokenizer=image_tokenizer,
        text_tokenizer=TextTokenizer(text_model(vocabulary.num_text_pieces)),
    )
    save_model(first, small)
    with WeightsWriter(first / "model.safetensors", specs) as writer:
        for name, spec in specs.items():
            if len(spec.shape) == 1:
                tensor = torch.ones(spec.shape) if name.endswith("norm.weight") else torch.zeros(spec.shape)
            else:
                tensor = torch.empty(spec.shape).normal_(std=0.02)
            writer.write(name, tensor.half())
    for form, dtype in FORMS.items():
        if dtype is not None:
            shutil.rmtree(folder / form, ignore_errors=True)
            convert_folder(first, folder / form, precision=Precision(DTYPES["bfloat16"], parse_quantization(dtype)))
        print(folder / form, flush=True)
    return 0


def text_model(num_pieces: int) -> bytes:
    """Return a SentencePiece model of ``size`` pieces in its wire format: ``<unk>`` and characters."""

    def number(value: int) -> bytes:
        digits = []
        while value > 127:
            digits.append(value & 127 | 128)
            value >>= 7
        return bytes([*digits, value])

    def field(index: int, content: bytes) -> bytes:
        return bytes([index << 3 | 2]) + number(len(content)) + content

    unknown = field(1, field(1, b"<unk>") + bytes([3 << 3, 2]))
    pieces = [field(1, field(1, chr(0x4E00 + i if i < 0x5000 else 0xAC00 + i - 0x5000).encode())) for i in range(27000)]
    pieces += [field(1, field(1, (chr(0x4E00 + i) + chr(0x4E00 + i)).encode())) for i in range(num_pieces - 27001)]
    return unknown + b"".join(pieces) + field(2, bytes([3 << 3, 1]))


def read_once(path: Path) -> float:
    """Return the seconds to read a file that is not in the page cache."""
    forget(path)
    block = bytearray(1 << 24)
    start = time.perf_counter()
    with path.open("rb", buffering=0) as file:
        while file.readinto(block):
            pass
    return time.perf_counter() - start


def forget(path: Path) -> None:
    """Drop a file from the page cache."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def memory() -> dict[str, int]:
    """Return the peak and the present private bytes of this process."""
    text = Path("/proc/self/status").read_text()
    found = {key: int(re.search(rf"{key}:\s+(\d+)", text)[1]) * 1024 for key in ("VmHWM", "RssAnon")}  # type: ignore[index]
    return {"peak": found["VmHWM"], "own": found["RssAnon"]}


def one_run(folder: Path, device: str, dtype: str, tokens: int) -> int:
    """Open a model, sample codes, and print the measurements as JSON."""
    start = time.perf_counter()
    import numpy as np
    import torch

    from cogview.generation.decode import decode
    from cogview.generation.requests import DecodingProgress, DecodingRequest, DecodingStopped
    from cogview.pipeline.cogview import CogView

    imported = time.perf_counter()
    base = memory()
    model = CogView.from_pretrained(folder, device=device, dtype=dtype)
    loaded, after = time.perf_counter(), memory()
    weights = sum(t.numel() * t.element_size() for t in model.transformer.state_dict().values())
    linear = sum(
        t.numel() * t.element_size() for name, t in model.transformer.state_dict().items() if name.startswith("layers.")
    )
    linear += 8192 * model.transformer.config.width * 2  # the head over the image codes
    times: list[float] = []

    def watch(moment: DecodingProgress) -> bool:
        times.append(time.perf_counter())
        return moment.done <= tokens

    text = model.text_tokenizer.encode(PROMPT)
    nothing = np.empty((0, model.config.grid), dtype=np.int64)
    row = model.config.layouts["generate"].arrange(model.vocabulary, text=text, image=nothing)
    with contextlib.suppress(DecodingStopped):
        job = DecodingRequest(sequence=row, seed=1, sampling=model.sampling())
        decode(model.transformer, model.vocabulary, [job], watch, speculative=1)
    steps = [later - earlier for earlier, later in itertools.pairwise(times[1:])]
    at_end = memory()
    probe = read_probe(torch, model.placement.device)
    result = {
        "placement": str(model.placement),
        "import": imported - start,
        "load": loaded - imported,
        "first": times[0] - imported,
        "token": statistics.median(steps),
        "weights": weights,
        "read": linear,
        "probe": probe,
        "base": base["peak"],
        "peak_loaded": after["peak"],
        "peak": at_end["peak"],
    }
    if model.placement.device.type == "cuda":
        result["device_peak"] = torch.cuda.max_memory_allocated()
    print(json.dumps(result))
    return 0


def read_probe(torch, device) -> float:  # type: ignore[no-untyped-def]
    """Return the bytes per second of summing 1 GB of float32: the best of five."""
    array = torch.ones(1 << 28, device=device)
    best = float("inf")
    for _ in range(6):
        start = time.perf_counter()
        array.sum().item()
        best = min(best, time.perf_counter() - start)
    return array.numel() * 4 / best


def measure(folder: Path, device: str, runs: int, tokens: int) -> int:
    """Run every stored form and dtype in turn, ``runs`` times; print a Markdown table of medians."""
    found: dict[tuple[str, str], list[dict[str, float]]] = {}
    reads: dict[str, list[float]] = {}
    for number in range(runs):
        for dtype, form in RUNS:
            path = folder / form / "model.safetensors"
            reads.setdefault(form, []).append(read_once(path))
            forget(path)
            command = [sys.executable, __file__, "one", str(folder / form), "--device", device, "--dtype", dtype]
            done = subprocess.run([*command, "--tokens", str(tokens)], check=True, capture_output=True, text=True)
            result = json.loads(done.stdout.splitlines()[-1])
            found.setdefault((dtype, form), []).append(result)
            print(f"run {number + 1}: {dtype} from {form}: {json.dumps(result)}", file=sys.stderr, flush=True)
    print(
        "| computed in | stored as | weights, GB | peak loaded, GB | of weights | base, GB | load, s "
        "| first token, s | of one reading | s per token | GB/s | of the probe |"
    )
    print("|---" * 12 + "|")
    for (dtype, form), results in found.items():
        m = {key: statistics.median(r[key] for r in results) for key in results[0] if key != "placement"}
        reading = statistics.median(reads[form])
        share = statistics.median(r["read"] / r["token"] / r["probe"] for r in results)
        print(
            f"| {dtype} | {form} | {m['weights'] / 1e9:.2f} | {m['peak_loaded'] / 1e9:.2f} | "
            f"{m['peak_loaded'] / m['weights']:.2f} | {m['base'] / 1e9:.2f} | {m['load']:.1f} | {m['first']:.1f} | "
            f"{m['first'] / reading:.2f} | {m['token']:.3f} | {m['read'] / m['token'] / 1e9:.1f} | {share:.0%} |"
        )
    read = ", ".join(f"{form} {statistics.median(times):.1f} s" for form, times in reads.items())
    print(f"\nReading the file once: {read}. Probe: {m['probe'] / 1e9:.1f} GB/s. {results[0]['placement']}.")
    return 0


def main() -> int:
    """Run a subcommand."""
    parser = arguments.Parser(__doc__)
    parser.add_argument("what", choices=["make", "measure", "one"])
    parser.add_argument("folder", type=arguments.output_folder)
    parser.add_argument("--preset", default="4b", help="of cogview/modeling/config.py (default: 4b)")
    parser.add_argument("--device", default="cpu", help="(default: cpu)")
    parser.add_argument("--dtype", default="auto", help="of one run (default: auto)")
    parser.add_argument("--runs", type=arguments.count, default=5, help="(default: 5)")
    parser.add_argument("--tokens", type=arguments.count, default=8, help="codes to time (default: 8)")
    args = parser.parse_args()
    if args.what == "make":
        return make(args.folder, args.preset)
    if args.what == "one":
        return one_run(args.folder, args.device, args.dtype, args.tokens)
    return measure(args.folder, args.device, args.runs, args.tokens)


if __name__ == "__main__":
    arguments.run_script(main)
