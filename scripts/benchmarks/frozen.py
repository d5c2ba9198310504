"""Record the results of the toolkit, and compare them with those of another commit.

    PYTHONPATH=$PWD python scripts/benchmarks/frozen.py --write before.json      # in a checkout of the first commit
    PYTHONPATH=$PWD python scripts/benchmarks/frozen.py --compare before.json    # in a checkout of the second one

The library is imported from PYTHONPATH, or else from the checkout of this script. Each item runs one part of the
toolkit through its commands, within this process, and records hashes and numbers of the files that the commands
write. An item marked ``machine`` holds floating-point results: it is comparable on one processor with one version of
PyTorch only. An item marked ``portable`` is equal everywhere. ``--compare`` prints one line per differing item and
returns status 1 if there is one. Numbers that differ by rounding alone are reported as such.

``--text --write FILE.json`` and ``--text --compare FILE.json`` do the same with help texts and messages, as a
separate file; the comparison prints a diff.

Renamed keys of JSON files and renamed tensors are translated to their former names by ``FORMER_NAMES``.
"""

from __future__ import annotations

import difflib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import arguments
import numpy as np
from frozen_inputs import CPU, MODEL, PROMPTS, SEEDS, write_v1_datasets
from frozen_values import compare, file_hash, former, image_of, read_checkpoint, read_metrics, read_run, read_store
from frozen_workbench import Failure, Workbench, run_command

FORMAT_VERSION = 2  # of the recorded file: raised where the inputs of an item change

VARIED = ("--temperature", "0.9", "--top-k", "100")  # more variety than the model's settings

# Sampling settings of the generated images: options, and how many of SEEDS.
VARIANTS: dict[str, tuple[tuple[str, ...], int]] = {
    "plain": ((), 4),
    "guided": (("--guidance", "2", *VARIED), 4),
    "top-p": (("--top-k", "0", "--top-p", "0.9", "--temperature", "1.1"), 4),
    "int8-cache": (("--kv-dtype", "int8", *VARIED), 4),
    "parallel-off": (("--parallel", "off", *VARIED), 4),
    "parallel-auto": (("--parallel", "auto", "--max-inference-batch-size", "3", *VARIED), 4),
    "parallel-8": (("--parallel", "8", "--max-inference-batch-size", "7", *VARIED), 1),
    "text-attention": (("--text-attention", "1.5"), 1),
    "bfloat16": (("--dtype", "bfloat16"), 1),
    "int8-weights": (("--dtype", "int8"), 1),
    "int4-weights": (("--dtype", "int4", "--kv-dtype", "int8"), 1),
}

# Options of `cogview estimate`; each names its device, so that nothing is measured.
ESTIMATES = (
    *(f"--model 4b --task generate -n 8 --dtype {dtype} --device cuda:24GB" for dtype in ("auto", "int8", "int4")),
    *(f"--model 1b --task {task} -n 4 --device cuda:16GB" for task in ("caption", "upscale", "low_level", "score")),
    *(f"--model {size} --device cpu:16GB" for size in ("5m", "20m", "100m", "300m", "1b", "4b")),
    *(f"--task {task} -n 16 --device cpu:2GB" for task in ("generate", "caption", "upscale", "rerank")),
    "--guidance 2 -n 64 --dtype float32 --device cpu:1GB",
    "--model 4b --dtype float16 --device cuda:16GB --bandwidth 400 --flops 20",
    "--model 4b -n 64 --device cuda:12GB",
    "--model 300m -n 2 --dtype int8 --device cpu:8GB --bandwidth 40 --flops 1",
    *(
        f"--train --model 4b --gpus {gpus} --zero {zero} --device cuda:80GB"
        for gpus, zero in ((8, 1), (8, 2), (64, 3), (512, 2))
    ),
    "--train --model 1b --gpus 4 --zero 3 --offload --device cuda:24GB",
    "--train --model 1b --lora 16 --device cuda:16GB",
    "--train --model 4b --lora 16 --zero 2 --checkpointing full --device cuda:24GB",
    "--train --model 300m --precision float16 --checkpointing selective --rows 4 --batch 256 --device cuda:24GB",
    "--train --model 20m --length 200 --tokens 1e9 --mfu 0.3 --flops 100 --device cuda:8GB",
    "--train --model 5m --precision float32 --device cpu:16GB",
    "--train --model 100m --device cuda:40GB",
)


# Items


@dataclass(frozen=True, kw_only=True)
class Item:
    """A part of the toolkit, and the function that records its results as JSON values."""

    name: str
    kind: str  # "machine" or "portable"
    record: Callable[[Workbench], Any]


ITEMS: dict[str, Item] = {}


def item(name: str, kind: str) -> Callable[[Callable[[Workbench], Any]], Callable[[Workbench], Any]]:
    """Register the decorated function as the item ``name``. Items run in the order of their registration."""

    def register(record: Callable[[Workbench], Any]) -> Callable[[Workbench], Any]:
        ITEMS[name] = Item(name=name, kind=kind, record=record)
        return record

    return register


@item("estimate", "portable")
def record_estimates(bench: Workbench) -> Any:
    """Return the numbers of every estimate, without its prose; of PyTorch's kernels, which need no compiler."""
    found = {}
    with mock.patch.dict(os.environ, COGVIEW_KERNELS="torch"):
        for options in ESTIMATES:
            out = bench.run("estimate", *options.split(), "--json")
            found[options] = without_prose(former(json.loads(out)))
    return found


def without_prose(content: Any) -> Any:
    """Return an estimate without its formulas and the origin of its assumptions."""
    if isinstance(content, dict):
        return {key: without_prose(value) for key, value in content.items() if key not in ("formulas", "is")}
    return [without_prose(value) for value in content] if isinstance(content, list) else content


@item("journal.portable", "portable")
def record_portable_journal(bench: Workbench) -> Any:
    """Return the journals of jobs without scores, texts and weights: names, ids, numbers, seeds and settings."""
    return bench.journals(drop=("log_probability", "score", "text"), ranked=False)


@item("stores.imported", "portable")
def record_imported_stores(bench: Workbench) -> Any:
    """Return the rows and headers of stores imported from CogView v1 datasets."""
    write_v1_datasets(bench.folder)
    found = {}
    for name, sources in {"bin": ["v1.bin"], "lmdb": ["v1-lmdb"], "both": ["v1.bin", "v1.bin"]}.items():
        store = f"imported-{name}"
        arguments = (*sources, "--model", MODEL, "-o", store, "--skip-bad")
        found[name] = {"out": bench.run("import-data", *arguments), **read_store(bench.folder / store)}
    return found


@item("stores.encoded-text", "portable")
def record_encoded_text(bench: Workbench) -> Any:
    """Return captions and names of the scenes of the emoji world, as token ids: scenes and captions are in order."""
    return {name: bench.encoded(name, ("text", "named")) for name in ("store", "held-out-store")}


def record_images(bench: Workbench, name: str) -> Any:
    """Return pixels, codes and log-probabilities of the images of one variant."""
    options, num_seeds = VARIANTS[name]
    found: dict[str, Any] = {}
    for seed in SEEDS[:num_seeds]:
        output = f"generated-{name}-{seed}"
        bench.run("generate", *PROMPTS, "--seed", str(seed), *options, "-o", output, *CPU)
        found[f"seed {seed}"] = bench.images(output)
    return found


for _name in VARIANTS:
    item(f"generate.{_name}", "machine")(partial(record_images, name=_name))


@item("generate.best", "machine")
def record_best(bench: Workbench) -> Any:
    """Return images ranked by their scores, upscaled images and a contact sheet."""
    bench.run(
        "generate", *PROMPTS[:3], "-n", "6", "--keep", "2", "--upscale", "--grid", "--seed", "5", "-o", "best", *CPU
    )
    return bench.images("best")


def record_captions(bench: Workbench, options: str) -> Any:
    """Return captions of generated images."""
    lines = bench.run("caption", *bench.pictures, "--seed", "3", *options.split(), *CPU).splitlines()
    return [former(json.loads(line)) for line in lines]


item("caption.greedy", "machine")(partial(record_captions, options="--method greedy"))
item("caption.beam", "machine")(partial(record_captions, options="--method beam -n 3"))
item("caption.sample", "machine")(
    partial(record_captions, options="--method sample -n 3 --temperature 0.9 --top-p 0.95")
)


@item("rerank", "machine")
def record_scores(bench: Workbench) -> Any:
    """Return scores and ranks of generated images for several texts."""
    outs = [bench.run("rerank", "--prompt", text, *bench.pictures, *CPU) for text in PROMPTS[:3]]
    return [former(json.loads(out)) for out in outs]


@item("upscale", "machine")
def record_upscaling(bench: Workbench) -> Any:
    """Return upscaled images, by a text, and by a file of texts with guidance."""
    pictures = bench.pictures
    bench.run("upscale", *pictures[:3], "--prompt", PROMPTS[0], "--seed", "5", "-o", "upscaled", *CPU)
    lines = "".join(f"{prompt}\t{path}\n" for prompt, path in zip(PROMPTS, pictures[::2], strict=False))
    (bench.folder / "queries.tsv").write_text(lines, encoding="utf-8")
    options = ("--input", "queries.tsv", "--guidance", "1.5", "--seed", "6", "-o", "upscaled-guided", *VARIED)
    bench.run("upscale", *options, *CPU)
    return {name: bench.images(name) for name in ("upscaled", "upscaled-guided")}


@item("complete", "machine")
def record_completion(bench: Workbench) -> Any:
    """Return completed images."""
    for rows in ("0", "4", "7"):
        options = ("--rows", rows, "--prompt", PROMPTS[1], "-n", "2", "--seed", "9", "-o", "completed", *VARIED)
        bench.run("complete", *bench.pictures[:2], *options, *CPU)
    return bench.images("completed")


@item("journal.ranked", "machine")
def record_ranked_journal(bench: Workbench) -> Any:
    """Return the journal of a job that ranks and upscales, with scores and texts."""
    return bench.journals(drop=(), ranked=True)


@item("python", "machine")
def record_python(bench: Workbench) -> Any:
    """Return the results of the public Python interface."""
    from cogview import CogView

    model = CogView.from_pretrained(MODEL, device="cpu")
    former = {"min_p": 0.0, "noise_version": 1} if hasattr(model.sampling(), "noise_version") else {}
    images = model.generate(list(PROMPTS[:2]), n=3, seed=7, temperature=0.9, top_k=50, **former)
    kept = model.generate(PROMPTS[4], n=4, keep=2, seed=8, temperature=0.3, top_k=5, **former)
    return {
        "generate": [image_of(image) for image in images],
        "keep": [image_of(image) for image in kept],
        "upscale": [image_of(image) for image in model.upscale(images[:2], PROMPTS[0], seed=1, **former)],
        "complete": [
            image_of(image)
            for image in model.complete(images[:2], PROMPTS[1], rows=3, n=2, seed=1, temperature=0.3, top_k=5, **former)
        ],
        "caption": [
            [[caption.text, caption.log_probability] for caption in captions]
            for method in ("greedy", "beam", "sample")
            for captions in model.caption(images, n=1 if method == "greedy" else 2, method=method, seed=2)
        ],
        "score": [[score.log_probability, score.per_piece] for score in model.score(images, PROMPTS[0])],
    }


@item("stores.encoded-codes", "machine")
def record_encoded_codes(bench: Workbench) -> Any:
    """Return the codes of scenes of the emoji world, at three sizes."""
    return {name: bench.encoded(name, ("image", "large", "small")) for name in ("store", "held-out-store")}


@item("convert", "machine")
def record_conversions(bench: Workbench) -> Any:
    """Return the embedded model, stored in other number formats."""
    source = str(bench.library / "cogview" / "models" / MODEL)
    found = {}
    for dtype in ("float32", "bfloat16", "int8", "int4"):
        bench.run("convert", source, "--dtype", dtype, "-o", f"converted-{dtype}", "--verify")
        found[dtype] = read_checkpoint(bench.folder / f"converted-{dtype}")
    return found


@item("train-text", "machine")
def record_text_training(bench: Workbench) -> Any:
    """Return the text tokenizer of the emoji world."""
    bench.run("train-text", bench.recipe, "--work", bench.fresh_work("text-work", "world"))
    return file_hash(bench.folder / "text-work" / "text.model")


@item("train-image", "machine")
def record_image_training(bench: Workbench) -> Any:
    """Return metrics and weights of a short training of a tiny VQ-VAE."""
    bench.run("train-image", bench.recipe, "--work", bench.fresh_work("image-work", "world"), *CPU)
    work = bench.folder / "image-work"
    return {"metrics": read_metrics(work / "image-run"), "weights": read_checkpoint(work / "image")}


@item("train.one", "machine")
def record_training(bench: Workbench) -> Any:
    """Return metrics, weights and optimizer state of a run in one process."""
    return read_run(bench.folder / bench.trained / "transformer-run")


@item("train.resumed", "machine")
def record_resumed_training(bench: Workbench) -> Any:
    """Return the same of that run after it lost its last checkpoint and was resumed."""
    shutil.rmtree(bench.folder / bench.checkpoint)
    bench.run("train", bench.recipe, "--work", bench.trained, "--resume", "auto", *CPU)
    return read_run(bench.folder / bench.trained / "transformer-run")


@item("train.two", "machine")
def record_training_in_two_processes(bench: Workbench) -> Any:
    """Return the same of a run in two processes that torchrun starts."""
    work = bench.fresh_work("two-work", "store", "held-out-store")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, "--module", "cogview", "train", bench.recipe, "--work", work, *CPU]
    environment = {**os.environ, "PYTHONPATH": str(bench.library)}
    done = subprocess.run(command, env=environment, cwd=bench.folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Failure(f"two processes ended with status {done.returncode}: {done.stderr[-2000:]}")
    return read_run(bench.folder / work / "transformer-run")


@item("train.lora", "machine")
def record_adapter_training(bench: Workbench) -> Any:
    """Return the same of an adapter that learns from a mixture of two stores, merged and used."""
    adapter = f"{bench.adapter_run}/checkpoints/step-00000020"
    bench.run("adapter", "merge", MODEL, adapter, "-o", "merged")
    bench.run("generate", *PROMPTS[:4], "--seed", "7", "--adapter", adapter, "-o", "adapted", *CPU)
    return {
        **read_run(bench.folder / bench.adapter_run),
        "merged": read_checkpoint(bench.folder / "merged"),
        "generated": bench.images("adapted"),
    }


@item("train.phases", "portable")
def record_phases(bench: Workbench) -> Any:
    """Return the phases of the run on two stores: which stores are mixed from which sample on."""
    lines = (bench.folder / bench.adapter_run / "stores.jsonl").read_text("utf-8").splitlines()
    return [former(json.loads(line)) for line in lines]


@item("upscale.low-level", "machine")
def record_low_level(bench: Workbench) -> Any:
    """Return images that a model trained for it made from images of half the size."""
    options = ("--low-level", "--prompt", PROMPTS[0], "--seed", "5", "--model", bench.checkpoint, "-o", "low-level")
    bench.run("upscale", bench.drawing, *options, *CPU)
    return bench.images("low-level")


def record_evaluation(bench: Workbench, measure: str) -> Any:
    """Return the numbers of a report on the trained model."""
    output = f"report-{measure}"
    candidates = ("--candidates", "2") if measure == "rerank" else ()
    options = ("-n", "6", *candidates, "-o", output, "--work", bench.trained)
    bench.run("eval", measure, bench.recipe, *options, *CPU)
    reports = [former(json.loads(path.read_text("utf-8"))) for path in sorted((bench.folder / output).glob("*.json"))]
    for report in reports:
        report.pop("protocol", None)  # it names commits and versions
    return reports


for _name in ("scenes", "captions", "rerank", "upscale"):
    item(f"eval.{_name}", "machine")(partial(record_evaluation, measure=_name))


# Texts


def record_texts(bench: Workbench) -> dict[str, list[str]]:
    """Return the help of every command and a number of messages, line by line."""
    os.environ["COLUMNS"] = "100"
    _, listing, _ = run_command(["--help"])
    names = re.findall(r"^ {2,4}([a-z][a-z-]+) {2,}", listing, re.MULTILINE)
    commands = [["--help"], *([name, "--help"] for name in names), *MESSAGES]
    found = {}
    for command in commands:
        status, out, err = run_command([part.replace("DRAWING", bench.drawing) for part in command])
        lines = f"status {status}\n{out}{err}".replace(str(bench.library), "LIBRARY").splitlines()
        found["cogview " + " ".join(command)] = lines
    return found


MESSAGES = (
    ["--version"],
    ["nonsense"],
    ["generate", "", "--seed", "1", *CPU],
    ["generate", PROMPTS[0], "-n", "0"],
    ["generate", PROMPTS[0], "--keep", "2", "-n", "1"],
    ["generate", PROMPTS[0], "--temperature", "-1", *CPU],
    ["generate", PROMPTS[0], "--top-p", "2", *CPU],
    ["generate", PROMPTS[0], "--parallel", "some"],
    ["generate", PROMPTS[0], "--model", "cogview-bse"],
    ["generate", PROMPTS[0], "--device", "cuda:99"],
    ["generate", PROMPTS[0], "--dtype", "int3"],
    ["generate", PROMPTS[0] * 20, "--seed", "1", *CPU],
    ["generate", "--input", "absent.txt"],
    ["generate", "--input", "absent.xls"],
    ["caption", "absent.png", "--seed", "1"],
    ["caption", "DRAWING", "-n", "2", "--method", "greedy", *CPU],
    ["rerank", "DRAWING"],
    ["upscale", "DRAWING"],
    ["upscale", "DRAWING", "--prompt", PROMPTS[0], "--low-level", *CPU],
    ["complete", "DRAWING", "--rows", "9", "--prompt", PROMPTS[0], *CPU],
    ["estimate", "--device", "cpu:16GB"],
    ["estimate", "--model", "4b", "--task", "generate", "-n", "8", "--dtype", "int8", "--device", "cuda:24GB"],
    ["estimate", "--train", "--device", "cuda:80GB"],
    ["estimate", "--train", "--model", "4b", "--gpus", "8", "--zero", "2", "--device", "cuda:80GB"],
    ["estimate", "--gpus", "2"],
    ["info", MODEL],
    ["info", MODEL, "--things"],
    ["train", "absent.yaml"],
    ["runs", "absent"],
)


def compare_texts(expected: Mapping[str, Any], found: Mapping[str, Any]) -> int:
    """Print a diff of the texts; return how many differ."""
    count = 0
    for name, now in found["texts"].items():
        before = expected["texts"].get(name, [])
        if before != now:
            count += 1
            print("\n".join(difflib.unified_diff(before, now, name, name, lineterm="", n=0)))
    print(f"{len(found['texts']) - count} of {len(found['texts'])} texts equal")
    return count


# Command line


def import_library() -> Path:
    """Import cogview from PYTHONPATH, or else from this checkout; return the folder that holds the package."""
    here = Path(__file__).resolve().parent
    paths = [str(Path(path).absolute()) for path in sys.path]
    sys.path[:] = [path for path in paths if path != str(here)] + [str(here)]  # other scripts hide no module
    try:
        import cogview
    except ImportError:
        sys.path.insert(0, str(here.parents[1]))
        import cogview
    return Path(str(cogview.__file__)).resolve().parents[1]


def describe_machine() -> dict[str, str]:
    """Return what floating-point results depend on."""
    import torch

    return {
        "processor": platform.machine(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }


def commit_of(folder: Path) -> str:
    """Return the commit of a checkout, with ``+changes`` where files differ from it."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=False)
        return done.stdout.strip()

    changes = "+changes" if git("status", "--porcelain", "--untracked-files=no") else ""
    return (git("rev-parse", "HEAD") or "unknown") + changes


def record(names: Sequence[str], library: Path, folder: Path) -> dict[str, Any]:
    """Run the items ``names`` in ``folder``; print their progress on stderr."""
    bench, items = Workbench(folder, library), {}
    for number, name in enumerate(names, start=1):
        start = time.perf_counter()
        print(f"[{number}/{len(names)}] {name} …", end="", file=sys.stderr, flush=True)
        try:
            values = ITEMS[name].record(bench)
        except Failure as error:
            values = {"failed": str(error)}
        except Exception as error:
            values = {"failed": f"{type(error).__name__}: {error}"}
        items[name] = {"kind": ITEMS[name].kind, "values": json.loads(json.dumps(values))}
        failed = " failed" if "failed" in values else ""
        print(f" {time.perf_counter() - start:.1f} s{failed}", file=sys.stderr, flush=True)
    return items


def chosen(only: str | None, portable: bool) -> list[str]:
    """Return the names of the items to run: all, or those that start with one of ``only``."""
    wanted = [word for word in (only or "").split(",") if word]
    for word in wanted:
        if not any(name.startswith(word) for name in ITEMS):
            raise SystemExit(f"frozen.py: no item begins with {word!r}; known: {', '.join(ITEMS)}")
    names = [name for name in ITEMS if not wanted or any(name.startswith(word) for word in wanted)]
    return [name for name in names if not portable or ITEMS[name].kind == "portable"]


def main(argv: Sequence[str] | None = None) -> int:
    """Write or compare; status 1 where an item differs or fails."""
    parser = arguments.Parser(__doc__)
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--write", type=arguments.output_file, metavar="FILE.json", help="record into this file")
    action.add_argument(
        "--compare", type=arguments.file, metavar="FILE.json", help="compare with what --write recorded"
    )
    action.add_argument("--list", action="store_true", help="print the items and their kinds")
    parser.add_argument("--only", metavar="NAME,…", help="only items whose names begin with one of these")
    parser.add_argument("--portable", action="store_true", help="only items that are equal on every machine")
    parser.add_argument("--text", action="store_true", help="help texts and messages instead of results")
    args = parser.parse_args(argv)
    names = chosen(args.only, args.portable)
    if args.list:
        print("\n".join(f"{ITEMS[name].kind:9} {name}" for name in names))
        return 0
    target = (args.write or args.compare).resolve()
    expected = json.loads(target.read_text("utf-8")) if args.compare else {}
    if args.compare and expected.get("format_version") != FORMAT_VERSION:
        parser.error(
            f"{args.compare} has format {expected.get('format_version')}, this script compares {FORMAT_VERSION}: "
            "record it again, or take the script that recorded it"
        )
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):  # the order of floating-point sums depends on them
        os.environ[variable] = "1"
    library, start, home = import_library(), time.perf_counter(), Path.cwd()
    print(f"library: {library} at {commit_of(library)}", file=sys.stderr)
    with tempfile.TemporaryDirectory() as name:
        os.chdir(name)
        try:
            if args.text:
                found: dict[str, Any] = {"texts": record_texts(Workbench(Path(name).resolve(), library))}
            else:
                found = {"items": record(names, library, Path(name).resolve())}
        finally:
            os.chdir(home)
    origin = f"written by scripts/benchmarks/frozen.py {' '.join(argv or sys.argv[1:])}, library {commit_of(library)}"
    found = {"format_version": FORMAT_VERSION, "origin": origin, "machine": describe_machine(), **found}
    print(f"{time.perf_counter() - start:.0f} s", file=sys.stderr)
    if args.compare:
        count = compare_texts(expected, found) if args.text else compare(expected, found)
        return int(count > 0)
    failed = [name for name, one in found.get("items", {}).items() if "failed" in one["values"]]
    for name in failed:
        print(f"failed   {name}: {found['items'][name]['values']['failed']}")
    target.write_text(json.dumps(found, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    return int(bool(failed))


if __name__ == "__main__":
    arguments.run_script(main)
