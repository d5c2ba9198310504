"""Run the commands that a new user tries, in two checkouts, and print both answers side by side.

Each case is a command line and, for some, files that it reads. An answer is the exit status and the last lines of
stderr or stdout. The folder of the old checkout is put on PYTHONPATH; nothing is installed.

python scripts/benchmarks/trial.py --old CHECKOUT [--only WORD] [--output trial.md]
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).parents[2]
SECONDS = 180  # after which a command is ended
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


@dataclass(frozen=True)
class Case:
    """One thing that a user tries."""

    group: str
    command: str  # after `cogview`; or Python, after `python:`
    environment: dict[str, str] = field(default_factory=dict)
    pipe: str = ""  # a shell pipeline behind the command
    stdin: str | None = None


PYTHON = "from cogview import CogView; import numpy as np, torch; model = CogView.from_pretrained('cogview-emoji'); "
CASES = (
    Case("images that repeat", "generate 三只狐狸 -n 16 --seed 3 -o fox"),
    Case("images that repeat", "generate 一个红苹果 -n 16 --seed 3 -o apple"),
    *(Case("prompts beyond the world", f"generate {prompt} --seed 1") for prompt in PROMPTS),
    Case("photographs", "upscale photo.jpg"),
    Case("photographs", "caption photo.jpg"),
    *(
        Case("Python", "python:" + PYTHON + call)
        for call in (
            "print(model.caption(model.generate('一个红苹果', seed=1)[0]).text)",
            "print(model.caption('broken.png'))",
            "print(model.upscale('a.png', '一个红苹果').size)",
            "print(model.rerank(['a.png', 'b.png'], '一个红苹果'))",
            "print(len(model.generate(['一个红苹果', '一只猫'], seed=[7, 8])))",
            "model.generate('一个红苹果', seed=torch.Generator())",
            "model.generate(None)",
            "print(model.image_tokenizer.encode(torch.zeros(1, 3, 64, 64, dtype=torch.uint8)).shape)",
            "model.transformer([1, 2])",
            "model.transformer(torch.full((1, 4), 10**6))",
            "print(model)",
            "import cogview; print(cogview.__all__)",
        )
    ),
    Case("outcomes", "caption pictures"),
    Case("outcomes", "caption broken.png"),
    Case("outcomes", "generate --input partly.jsonl -o job"),
    Case("outcomes", "generate --input gbk.txt -o gbk"),
    Case("outcomes", "generate --input floats.csv -o floats"),
    Case("outcomes", "generate 一个红苹果 -n 6 --max-inference-batch-size 1 --seed 3 -o head", pipe="| head -1"),
    Case("outcomes", "generate 一个红苹果 --seed 3 -o quiet", pipe="2>&-"),
    Case("outcomes", "generate", pipe="<&-"),
    Case("outcomes", "generate -5度的红苹果 --seed 1"),
    Case("outcomes", "models", {"COGVIEW_LOG": "nonsense"}),
    Case(
        "outcomes",
        "generate 一个红苹果 --seed 3 -o c-locale",
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    ),
    Case("outcomes", "genrate 一个红苹果"),
    Case("outcomes", "一个红苹果"),
    Case("outcomes", "generate 一个红苹果 --temperature 0"),
    Case("outcomes", "info cogview-emoji", pipe="| head -3"),
    Case("outcomes", "info a.png"),
    Case("outcomes", "caption fifo"),
    Case("training", "train RECIPES/emoji-cpu.yaml training.steps=100"),
    Case("training", "train RECIPES/emoji-cpu.yaml training.clip_norm=-1"),
    Case("training", "doctor"),
    Case("Chinese", "generate --help", {"LANG": "zh_CN.UTF-8"}, pipe="| head -8"),
    Case("Chinese", "generate", {"LANG": "zh_CN.UTF-8"}, stdin=""),
    Case("Chinese", "caption four.png"),
)


def prepare(folder: Path) -> None:
    """Write the files that the cases read.

    Args:
        folder: An empty folder.
    """
    y, x = np.mgrid[0:512, 0:512] / 512
    waves = [np.sin(40 * x * y + 9 * channel) + np.cos(50 * (x - y) ** 2 * (channel + 1)) for channel in range(3)]
    noise = np.random.default_rng(0).normal(0, 12, (512, 512, 3))
    Image.fromarray(np.clip(np.stack(waves, -1) * 60 + 120 + noise, 0, 255).astype(np.uint8)).save(folder / "photo.jpg")
    for name in ("a.png", "b.png", "four.png", "pictures/good.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (64, 64), (220, 30, 40)).save(folder / name)
    for name in ("broken.png", "pictures/bad.png"):
        (folder / name).write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    (folder / "partly.jsonl").write_text('{"prompt": "一个红苹果"}\n{"prompt": ""}\n', encoding="utf-8")
    (folder / "gbk.txt").write_bytes("一个红苹果\n一只猫\n".encode("gbk"))
    (folder / "floats.csv").write_text("prompt,seed,n\n一个红苹果,7.0,2.0\n一只猫,,\n", encoding="utf-8-sig")
    os.mkfifo(folder / "fifo")


def answer(case: Case, checkout: Path, folder: Path) -> str:
    """Run a case with the code of a checkout.

    Args:
        case: The case.
        checkout: The folder with the package ``cogview``.
        folder: The folder in which the command runs.

    Returns:
        The exit status and the end of what was printed, on one line.
    """
    environment = {**os.environ, "PYTHONPATH": str(checkout), "LANG": "C.UTF-8", **case.environment}
    if case.command.startswith("python:"):
        line = shlex.join([sys.executable, "-c", case.command.removeprefix("python:")])
    else:
        words = case.command.replace("RECIPES", str(checkout / "scripts" / "recipes")).split()
        line = f"{shlex.join([sys.executable, '-m', 'cogview', *words])} {case.pipe}"
    try:
        run = subprocess.run(
            ["bash", "-c", f"set -o pipefail; {line}"],
            cwd=folder,
            env=environment,
            capture_output=True,
            timeout=SECONDS,
            input=None if case.stdin is None else case.stdin.encode(),
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"no end within {SECONDS} s"
    out, err = (stream.decode("utf-8", errors="replace").split("\n") for stream in (run.stdout, run.stderr))
    lines = [part for part in (text.split("\r")[-1].strip() for text in err) if part and "%|" not in part]
    plain = [text for text in lines if " at a time of " not in text and " on cpu, seed " not in text]
    said = " / ".join([*plain[-2:], *[text.strip() for text in out if text.strip()][-2:]])
    return f"{run.returncode}: {shortened(said)}{same_images(folder, case)}"


def same_images(folder: Path, case: Case) -> str:
    """Return how many images of a case with ``-n 16`` differ, as the end of its answer."""
    match = re.search(r"-n 16 .*-o (\w+)", case.command)
    if match is None:
        return ""
    pixels = {np.asarray(Image.open(path)).tobytes() for path in (folder / match[1]).glob("*.png")}
    return f" ({len(pixels)} different images of 16)"


def shortened(text: str) -> str:
    """Return the end of a text as a cell of a Markdown table."""
    clean = re.sub(r"/tmp/\S+/", "", text).replace("|", "\\|")
    return clean if len(clean) <= WIDTH else f"…{clean[-WIDTH:]}"


def main() -> int:
    """Run all cases in both checkouts and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--old", type=Path, required=True, help="the checkout to compare with")
    parser.add_argument("--only", default="", help="run the cases whose group or command has this text")
    parser.add_argument("--output", type=Path, help="write the table here as well")
    options = parser.parse_args()
    lines = ["| tried | before | now |", "|---|---|---|"]
    print("\n".join(lines))
    for case in CASES:
        if options.only not in f"{case.group} {case.command}":
            continue
        answers = []
        for checkout in (options.old.resolve(), ROOT):
            with tempfile.TemporaryDirectory() as folder:
                prepare(Path(folder))
                answers.append(answer(case, checkout, Path(folder)))
        shown = case.command.removeprefix(f"python:{PYTHON}")
        lines.append(
            f"| `{shown} {case.pipe}".rstrip().replace("|", "\\|").replace("\\|", "|", 1)
            + "` | "
            + " | ".join(answers)
            + " |"
        )
        print(lines[-1], flush=True)
    if options.output:
        options.output.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
