"""Run the commands that a new user tries, in two checkouts, and print both answers side by side.

Each case is a line of shell, or a call of Python, in a folder of small files. An answer is the exit status, the last
lines of stderr and the last lines of stdout. The folder of a checkout is put on PYTHONPATH; nothing is installed.

python scripts/benchmarks/trial.py --old CHECKOUT [--only WORD] [--old-answers FILE.json] [--output trial.md]
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import arguments
import numpy as np
from PIL import Image

ROOT = Path(__file__).parents[2]
SECONDS = 400  # after which a case is ended
WIDTH = 160  # characters of an answer

PROMPTS = (
    "六个红苹果",
    "十个气球",
    "五个星星",
    "四只粉色的猫",
    "一只黑色的猫",
    "一个蓝苹果",
    "狐狸和苹果和足球",
    "一只狐狸坐在苹果上",
    "没有狐狸",
    "一个大苹果",
    "藍色背景上的三隻狐狸",
    "兩朵玫瑰花",
    "“”，？！……",
    "一只在月球上的宇航员",
    "🍎",
    "三只🦊",
    "日落时的山",
)
PYTHON = "from cogview import CogView; import numpy as np, torch; model = CogView.from_pretrained('cogview-emoji'); "
CALLS = (
    "print(model.caption(model.generate('一个红苹果', seed=1)[0]))",
    "print(model.caption('broken.png'))",
    "print(model.upscale('a.png', '一个红苹果'))",
    "print(model.complete('a.png', '一个红苹果', rows=4))",
    "print(model.rerank(['a.png', 'b.png'], '一个红苹果'))",
    "print(len(model.generate(['一个红苹果', '一只猫'], seed=[7, 8])))",
    "model.generate('一个红苹果', seed=torch.Generator())",
    "model.generate(None)",
    "model.generate('六个红苹果', seed=1)",
    "print(model.image_tokenizer.encode(torch.zeros(1, 3, 64, 64, dtype=torch.uint8)).shape)",
    "model.image_tokenizer.encode(np.zeros((64, 64, 3), dtype=np.uint8))",
    "model.transformer([1, 2])",
    "model.transformer(torch.full((1, 4), 10**6))",
    "print(model)",
    "import cogview; print(cogview.__all__)",
)
APPLE = "cogview generate 一个红苹果 --seed 3"
TRAIN = "cogview train tiny.yaml --device cpu"
RESUME = f"{TRAIN} --resume auto training.steps=5"
LAST = "work/transformer-run/checkpoints/step-00000004"
CASES: dict[str, tuple[str, ...]] = {
    "images that repeat": tuple(
        f"cogview generate {prompt} -n 16 --seed 3 -o many" for prompt in ("三只狐狸", "一个红苹果")
    ),
    "prompts beyond the world": tuple(f"cogview generate {prompt} --seed 1" for prompt in PROMPTS),
    "photographs": ("cogview upscale photo.jpg --prompt 一个红苹果", "cogview caption photo.jpg"),
    "Python": tuple(f"python:{call}" for call in CALLS),
    "statuses": (
        "cogview caption pictures",
        "cogview caption broken.png",
        "cogview caption fifo",
        "cogview caption moving",
        "cogview generate --input partly.jsonl -o job",
        "cogview generate --input partly.jsonl -o job > out 2> err; grep -h error job/*.jsonl",
        "cogview generate --input missing.jsonl -o job",
        "cogview generate --input columns.csv -o job",
        "cogview generate --input gbk.txt -o job",
        "cogview generate --input floats.csv -o job",
        "cogview generate --input floats.jsonl -o job",
        "timeout -s TERM --preserve-status 40 cogview generate --input long.jsonl --max-inference-batch-size 1 -o job",
        f"ulimit -f 1; {APPLE} -n 16",
        "ulimit -f 1; cogview generate --input floats.csv -o job",
        f"{APPLE} --temperature 0",
        f"{APPLE} --text-attention 0",
        "cogview genrate 一个红苹果",
        "cogview 一个红苹果",
        "cogview generate -5度的红苹果 --seed 1",
    ),
    "streams": (
        f"{APPLE} -n 6 --max-inference-batch-size 1 -o head | head -1; ls head | wc -l",
        f"{APPLE} -o quiet 2>&-; ls quiet",
        "cogview generate <&-",
        "cogview generate --input - -o job <&-",
        "cogview info cogview-emoji | head -3",
        "COGVIEW_LOG=nonsense cogview models",
        f"LC_ALL=C PYTHONUTF8=0 PYTHONCOERCECLOCALE=0 {APPLE} -o c-locale",
    ),
    "files": (
        f"{APPLE} --top-k 3 -o same 2> a & {APPLE} --top-k 4 -o same 2> b; wait; ls same | wc -l",
        f"{APPLE} 一只猫 三只狐狸 -n 4 --grid -o sheet; python -c 'import sys; from PIL import Image; "
        "[print(Image.open(path).size) for path in sys.argv[1:]]' sheet/grid*.png",
        f"{APPLE} -n 4 --keep 2 -o kept",
        "cogview info a.png",
        "cogview data build own/captions.csv --model cogview-emoji -o store-of-own --held-out 0",
        "cogview recipes",
        "_COGVIEW_COMPLETE=bash_source cogview | head -3",
    ),
    "training": (
        "cogview train emoji-cpu training.steps=100",
        f"{TRAIN}; ls work/transformer-run/checkpoints",
        *(
            f"{TRAIN} 'training.{setting}'"
            for setting in (
                "clip_norm=0",
                "clip_norm=-1",
                "clip_norm=.nan",
                "weight_decay=-1",
                "learning_rate=-1e-3",
                "learning_rate=.nan",
                "betas=[0.9,1.0]",
                "seed=-1",
                "seed=18446744073709551615",
            )
        ),
        *(
            f"{TRAIN} 2> err; {damage}; {RESUME}"
            for damage in (
                f": > {LAST}/model.safetensors",
                f": > {LAST}/trainer.json",
                ": > work/transformer-run/checkpoints/best.json",
                r"printf '\377\376' >> work/transformer-run/metrics.jsonl",
            )
        ),
        "for run in one two; do OMP_NUM_THREADS=2 cogview train lora.yaml --work $run --device cpu 2> err; done; "
        "cmp {one,two}/transformer-run/checkpoints/step-00000004/adapter_model.safetensors && echo equal",
        f"timeout -s KILL 40 {TRAIN} training.steps=100000; cogview runs work",
        "cogview doctor",
        "mkdir -p cache/any; : > cache/any/lock; TORCH_EXTENSIONS_DIR=$PWD/cache cogview doctor | grep lock",
    ),
    "Chinese": (
        "LANG=zh_CN.UTF-8 cogview generate --help | head -8",
        "LANG=zh_CN.UTF-8 cogview generate < /dev/null",
        "cogview generate 蓝色背景上的三只狐狸 --seed 7 -o blue 2> err; cogview caption blue",
    ),
}

# Makes ``store``, ``held`` (random codes, captions of two lengths), ``tiny.yaml`` and ``lora.yaml``, under the names
# of both checkouts.
STORES = """
import hashlib
import numpy as np
from cogview import CogView
try:
    from cogview.checkpoints.image_tokenizer import codebook_hash
    from cogview.data.store_writer import StoreWriter, pad_text
except ImportError:
    from cogview.checkpoints.image import codebook_hash
    from cogview.data.store import StoreWriter, pad_text
from cogview.data.store import StoreHeader
model = CogView.from_pretrained("cogview-emoji", device="cpu")
tokenizer, random = model.text_tokenizer, np.random.default_rng(0)
header = StoreHeader(
    fields={"text": 48, "image": 64}, grid=8, num_image_codes=8192, num_text_pieces=tokenizer.size,
    layouts=("generate", "caption"), codebook_sha256=codebook_hash(model.image_tokenizer),
    text_sha256=hashlib.sha256(tokenizer.model_bytes).hexdigest(),
)
for name, count in (("store", 24), ("held", 6)):
    texts = [tokenizer.encode("左边是狐狸，右边是三只足球和两只企鹅" if row % 3 else "红苹果") for row in range(count)]
    with StoreWriter(name, header) as writer:
        writer.append({"text": pad_text(texts, 48), "image": random.integers(0, 8192, (count, 64)).astype(np.uint16)})
recipe = '''work: work
transformer:
  preset: 5m
  num_layers: 1
  max_positions: 128
  dropout: 0.0
  tokenizers: cogview-emoji
  store: store
  held_out_store: held
  training: {steps: 4, batch_size: 4, warmup_steps: 1, tasks: {generate: 1, caption: 1}}
  run: {log_every: 1, save_every: 2, evaluate_every: 0}
  precision: float32
'''
adapter = "start_from: cogview-emoji\\n  lora: {rank: 4, alpha: 8.0, dropout: 0.1}"
for name, text in (("tiny", recipe), ("lora", recipe.replace("num_layers: 1", adapter))):
    with open(f"{name}.yaml", "w", encoding="utf-8") as file:
        file.write(text)
"""


def prepare(folder: Path, checkout: Path) -> None:
    """Write the files that the cases read.

    Args:
        folder: An empty folder.
        checkout: The folder with the package ``cogview``, which writes the token stores.
    """
    y, x = np.mgrid[0:512, 0:512] / 512
    waves = [np.sin(40 * x * y + 9 * channel) + np.cos(50 * (x - y) ** 2 * (channel + 1)) for channel in range(3)]
    noise = np.random.default_rng(0).normal(0, 12, (512, 512, 3))
    Image.fromarray(np.clip(np.stack(waves, -1) * 60 + 120 + noise, 0, 255).astype(np.uint8)).save(folder / "photo.jpg")
    drawings = ("a.png", "b.png", "pictures/good.png", "moving/good.png", "moving/good.gif", "own/a.png", "own/b.png")
    for name in drawings:
        (folder / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (64, 64), (220, 30, 40)).save(folder / name)
    for name in ("broken.png", "pictures/bad.png"):
        (folder / name).write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    for name, text in {
        "own/captions.csv": "file,caption\na.png,一个红苹果\nb.png,一只狐狸\n",
        "partly.jsonl": '{"prompt": "一个红苹果"}\n{"prompt": ""}\n',
        "missing.jsonl": '{"prompt": "一个红苹果"}\n{"task": "caption", "image": "missing.png"}\n',
        "columns.csv": "prompt,cout\n一个红苹果,2\n",
        "floats.csv": "\ufeffprompt,seed,n\n一个红苹果,7.0,2.0\n一只猫,,\n",
        "floats.jsonl": '{"prompt": "一个红苹果", "seed": 7.0, "n": null}\n',
        "long.jsonl": '{"prompt": "一个红苹果", "n": 5000}\n',
    }.items():
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "gbk.txt").write_bytes("一个红苹果\n一只猫\n".encode("gbk"))
    os.mkfifo(folder / "fifo")
    subprocess.run([sys.executable, "-c", STORES], cwd=folder, env=environment(checkout), check=True)


def environment(checkout: Path) -> dict[str, str]:
    """Return the environment in which ``python`` and ``cogview`` are those of a checkout."""
    program = Path(tempfile.gettempdir()) / f"trial-{os.getuid()}" / "cogview"
    program.parent.mkdir(exist_ok=True)
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m cogview "$@"\n', encoding="utf-8")
    program.chmod(0o755)
    folders = (str(program.parent), str(Path(sys.executable).parent), os.environ["PATH"])
    return {**os.environ, "PYTHONPATH": str(checkout), "LANG": "C.UTF-8", "PATH": os.pathsep.join(folders)}


def answer(line: str, checkout: Path, folder: Path) -> str:
    """Run a case with the code of a checkout.

    Args:
        line: The line of shell, or Python after ``python:``.
        checkout: The folder with the package ``cogview``.
        folder: The folder in which the line runs.

    Returns:
        The exit status and the end of what was printed, on one line.
    """
    call = line.removeprefix("python:")
    command = [sys.executable, "-c", PYTHON + call] if call != line else ["bash", "-c", f"set -o pipefail; {line}"]
    try:
        run = subprocess.run(
            command, cwd=folder, env=environment(checkout), capture_output=True, timeout=SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return f"no end within {SECONDS} s"
    out, err = (stream.decode("utf-8", errors="replace").split("\n") for stream in (run.stdout, run.stderr))
    lines = [part for part in (text.split("\r")[-1].strip() for text in err) if part and "%|" not in part]
    plain = [
        text for text in lines if not re.search(r" at a time of | on cpu, |^(drawing|generating) \d+ |^[\^~]+$", text)
    ]
    said = " / ".join([*plain[-2:], *[text.strip() for text in out if text.strip()][-2:]])
    return f"{run.returncode}: {shortened(said)}{num_different(folder / 'many')}"


def num_different(folder: Path) -> str:
    """Return how many images of a case with 16 differ, as the end of its answer."""
    pixels = {np.asarray(Image.open(path)).tobytes() for path in folder.glob("*.png")}
    return f" ({len(pixels)} different images of 16)" if pixels else ""


def shortened(text: str) -> str:
    """Return the end of a text as a cell of a Markdown table."""
    clean = re.sub(r"/tmp/\S+/", "", text.replace(f"{ROOT}/", ""))
    clean = clean if len(clean) <= WIDTH else f"…{clean[-WIDTH:]}"
    return clean.replace("|", "\\|").replace("<", "&lt;").replace("[", "&#91;")


def main() -> int:
    """Run all cases in both checkouts and print a table."""
    parser = arguments.Parser(__doc__)
    parser.add_argument("--old", type=arguments.folder, required=True, help="the checkout to compare with")
    parser.add_argument("--only", default="", help="run the cases whose group or line has this text")
    parser.add_argument(
        "--old-answers", type=arguments.output_file, help="take the old answers from this file, and add those it lacks"
    )
    parser.add_argument("--output", type=arguments.output_file, help="write the table here as well")
    options = parser.parse_args()
    kept = options.old_answers
    old = json.loads(kept.read_text("utf-8")) if kept and kept.is_file() else {}
    table = ["| | tried | before | now |", "|---|---|---|---|"]
    print("\n".join(table))
    with tempfile.TemporaryDirectory() as parent:
        checkouts = {"old": options.old.resolve(), "new": ROOT}
        for name, checkout in checkouts.items():
            (Path(parent) / name).mkdir()
            prepare(Path(parent) / name, checkout)

        def try_line(line: str, name: str) -> str:
            place = Path(parent) / "case"
            shutil.copytree(Path(parent) / name, place, ignore=shutil.ignore_patterns("fifo"))
            os.mkfifo(place / "fifo")
            try:
                return answer(line, checkouts[name], place)
            finally:
                shutil.rmtree(place)

        for group, lines in CASES.items():
            for line in lines:
                if options.only not in f"{group} {line}":
                    continue
                if line not in old:
                    old[line] = try_line(line, "old")
                    if kept:
                        kept.write_text(json.dumps(old, ensure_ascii=False, indent=1), encoding="utf-8")
                tried = line.removeprefix("python:").replace("|", "\\|")
                table.append(f"| {group} | `{tried}` | {old[line]} | {try_line(line, 'new')} |")
                print(table[-1], flush=True)
    if options.output:
        options.output.write_text("\n".join(table) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    arguments.run_script(main)
