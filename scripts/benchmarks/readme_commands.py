"""Time the two commands of the README in a fresh clone and a fresh virtual environment.

python scripts/benchmarks/readme_commands.py [--runs 3]
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import arguments

COMMANDS = (
    'pip install . && cogview generate "蓝色背景上的三只狐狸"',
    'pip install ".[test]" && pytest -n auto --dist loadfile',
)


def run_once(root: Path, folder: Path) -> list[float]:
    """Return the seconds of each command; print the output of one that fails."""
    clone, venv = folder / "cogview", folder / "venv"
    subprocess.run(["git", "clone", "--quiet", str(root), str(clone)], check=True)
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["PATH"] = f"{venv / 'bin'}{os.pathsep}{environment['PATH']}"
    seconds = []
    for command in COMMANDS:
        start = time.perf_counter()
        done = subprocess.run(command, shell=True, cwd=clone, env=environment, capture_output=True, text=True)
        seconds.append(time.perf_counter() - start)
        if done.returncode:
            print(done.stdout[-3000:], done.stderr[-3000:], file=sys.stderr)
            raise SystemExit(f"{command} ended with status {done.returncode}")
        print(f"{seconds[-1]:6.0f} s  {command}: {done.stdout.strip().splitlines()[-1]}", flush=True)
    return seconds


def main() -> int:
    """Print the seconds of every run."""
    parser = arguments.Parser(__doc__)
    parser.add_argument("--runs", type=arguments.count, default=3, help="(default: 3)")
    args = parser.parse_args()
    root = Path(__file__).resolve().parents[2]
    for number in range(args.runs):
        print(f"run {number + 1} of {args.runs}, {os.cpu_count()} cores", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            run_once(root, Path(folder))
    return 0


if __name__ == "__main__":
    arguments.run_script(main)
