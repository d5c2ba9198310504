"""Compare the share of the memory bandwidth that a step reaches with that of llama.cpp, one row at a time.

    pip install gguf && npm install --ignore-scripts node-llama-cpp
    python scripts/benchmarks/llama_cpp.py [--layers 24 --width 1024 --heads 16] [--tokens 64] [--json FILE]

llama.cpp runs a GPT-2 of the same shape and vocabulary in the current folder's ``node_modules``. Weights are random and
larger than the cache of the processor, so that a step should take the time of reading them. Both sides sample tokens
one after the other, in turn; a cell is the median of ``--repeats`` runs. The limit is the time in which this process
sums an array of as many bytes. llama.cpp rounds activations to 8 bits for quantized weights, ours does not.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import arguments
import numpy as np
import torch
from compare_peers import NUM_PIECES, PEER_IDS, ours, prepared_transformer
from compare_v1 import (
    SEED,
    add_shape_arguments,
    describe,
    facts,
    make_parser,
    report,
    seconds_of,
    shape_of,
)

from cogview.cli.main import run_safely
from cogview.device import choose_placement
from cogview.errors import InputError
from cogview.modeling.config import TransformerConfig
from cogview.planning.hardware import measure_hardware

# A weight format of ours, and the nearest one of llama.cpp.
FORMATS = {"float32": "F32", "bfloat16": "BF16", "int8": "Q8_0", "int4": "Q4_0"}
SCRIPT = """
const {getLlama} = await import(process.argv[2] + "/node_modules/node-llama-cpp/dist/index.js");
const [path, threads, given, count] = [process.argv[3], ...process.argv.slice(4).map(Number)];
const llama = await getLlama({gpu: false, build: "never", maxThreads: threads, progressLogs: false, logLevel: "error"});
const model = await llama.loadModel({modelPath: path, useMmap: true});
const context = await model.createContext({contextSize: 256, batchSize: 128, threads});
const sequence = context.getSequence();
for (let run = 0; run < 2; run++) {
    await sequence.clearHistory();
    let number = 0, start = 0;
    const tokens = Array.from({length: given}, (_, index) => 7 * index % 1000 + 1);
    for await (const token of sequence.evaluate(tokens, {temperature: 1, topK: 200, yieldEogToken: true})) {
        if (number++ == 0) start = performance.now();
        if (number > count) break;
    }
    if (run) console.log(JSON.stringify((performance.now() - start) / 1000 / (number - 1)));
}
process.exit(0);
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; return the exit status."""
    parser = make_parser(__doc__)
    add_shape_arguments(parser)
    parser.set_defaults(layers=24, width=1024, heads=16)
    parser.add_argument("--tokens", type=arguments.count, default=64, help="tokens to sample (default: 64)")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS), help="(default: all)")
    args = parser.parse_args(argv)
    return run_safely(lambda: run(args), "llama_cpp.py")


def run(args: argparse.Namespace) -> int:
    """Run the whole comparison."""
    if not Path("node_modules/node-llama-cpp").is_dir():
        raise InputError(f"node-llama-cpp is not in {Path.cwd()}: npm install --ignore-scripts node-llama-cpp")
    config = shape_of(args)
    cpu = torch.device("cpu")
    rows, found = [], {}
    for name in args.formats:
        print(name, file=sys.stderr, flush=True)
        placement = choose_placement("cpu", name, num_parameters=config.num_parameters)
        transformer = prepared_transformer(config, placement)
        first, whole = (ours(transformer, placement, args.grid, 1, count) for count in (1, args.tokens + 1))
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "model.gguf"
            write_gguf(file, config, FORMATS[name])
            theirs = partial(llama_seconds, file, args.tokens)
            times: dict[str, list[float]] = {"ours": [], "llama.cpp": [], "limit": []}
            for _ in range(args.repeats + 1):
                times["ours"].append((seconds_of(placement, whole) - seconds_of(placement, first)) / args.tokens)
                times["llama.cpp"].append(theirs())
                times["limit"].append(1 / measure_hardware(cpu, torch.float32).bandwidth)
        medians = {side: statistics.median(each[1:]) for side, each in times.items()}
        found[name] = times
        for side, weights in (("ours", name), ("llama.cpp", FORMATS[name])):
            size = step_bytes(config, weights)
            share = size * medians["limit"] / medians[side]
            rows.append([side, weights, f"{size / 1e6:.0f}", f"{1 / medians[side]:.1f}", f"{share:.0%}"])
    lines = [
        f"{describe(config, args.grid)}; {torch.get_num_threads()} threads; medians of {args.repeats} runs",
        f"{NUM_PIECES + 3} tokens given and {args.tokens} sampled",
    ]
    columns = ["side", "weights", "MB a step", "tokens/s", "of the limit"]
    placement = choose_placement("cpu", "float32", num_parameters=config.num_parameters)
    report(args, lines, columns, rows, {"comparison": "llama.cpp", "seconds": found, **facts(placement)})
    return 0


def step_bytes(config: TransformerConfig, weights: str) -> float:
    """Return the bytes of the weights that a step reads: the projections, and 8,192 or 8,320 rows of the head."""
    in_layers = {"int8": 1 + 2 / config.width, "int4": 0.5 + 4 / 64, "Q8_0": 1 + 2 / 32, "Q4_0": 0.5 + 2 / 32}
    others = {"float32": 4, "F32": 4}
    head = 2 if weights in ("bfloat16", "BF16", "int8", "int4") else in_layers.get(weights, others.get(weights, 2))
    layers = 12 * config.width**2 * config.num_layers * in_layers.get(weights, others.get(weights, 2))
    return layers + config.width * (8192 if weights in ("float32", "bfloat16", "int8", "int4") else PEER_IDS) * head


def llama_seconds(file: Path, count: int) -> float:
    """Return the seconds of a token of llama.cpp, after a first run to warm up."""
    arguments = [str(Path.cwd()), str(file), str(torch.get_num_threads()), str(NUM_PIECES + 3), str(count)]
    script = file.with_suffix(".mjs")
    script.write_text(SCRIPT)
    done = subprocess.run(["node", str(script), *arguments], capture_output=True, text=True)
    if done.returncode or not done.stdout.strip():
        raise InputError(f"llama.cpp failed: {done.stderr.strip()[-300:]}")
    return float(json.loads(done.stdout.strip().splitlines()[-1]))


def write_gguf(file: Path, config: TransformerConfig, kind: str) -> None:
    """Write a GPT-2 of random weights; all layers are equal."""
    import gguf
    from gguf.quants import quantize

    width, inner = config.width, 4 * config.width
    matrix = gguf.GGMLQuantizationType[kind]
    noise = np.random.default_rng(SEED)
    writer = gguf.GGUFWriter(str(file), "gpt2")
    writer.add_context_length(config.max_positions)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(inner)
    writer.add_block_count(config.num_layers)
    writer.add_head_count(config.num_heads)
    writer.add_layer_norm_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"t{number}" for number in range(PEER_IDS)])
    writer.add_token_types([1] * PEER_IDS)
    writer.add_token_merges(["t 0"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    known: dict[str, np.ndarray] = {}

    def add(name: str, *shape: int) -> None:
        key = name.split(".", 2)[-1] if name.startswith("blk") else name
        if key not in known:
            known[key] = noise.standard_normal(shape, dtype=np.float32) * np.float32(0.02)
            if name.endswith("norm.weight"):
                known[key] = np.ones(shape, dtype=np.float32)
            if len(shape) == 2 and "position" not in name:
                known[key] = quantize(known[key], matrix)
        is_matrix = len(shape) == 2 and "position" not in name
        writer.add_tensor(name, known[key], raw_dtype=matrix if is_matrix else None)

    add("token_embd.weight", PEER_IDS, width)
    add("position_embd.weight", config.max_positions, width)
    for number in range(config.num_layers):
        for norm in ("attn_norm", "ffn_norm"):
            add(f"blk.{number}.{norm}.weight", width)
            add(f"blk.{number}.{norm}.bias", width)
        for part, outputs, inputs in (
            ("attn_qkv", 3 * width, width),
            ("attn_output", width, width),
            ("ffn_up", inner, width),
            ("ffn_down", width, inner),
        ):
            add(f"blk.{number}.{part}.weight", outputs, inputs)
            add(f"blk.{number}.{part}.bias", outputs)
    add("output_norm.weight", width)
    add("output_norm.bias", width)
    add("output.weight", PEER_IDS, width)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    sys.exit(main())
