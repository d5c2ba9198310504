"""Measure when boxes of objects pay: two things in one picture, learnt from captions alone and with a column of boxes.

    python scripts/benchmarks/boxes.py FOLDER [--arm NAME …] [--steps 1200]

The emoji world serves as files: pictures of two things, left and right or above each other, in a table with captions
and boxes. ``cogview train-text`` and ``cogview encode`` make two stores of it, with and without ``boxes_column``. The
image tokenizer is that of cogview-emoji. A small transformer is trained for each arm by ``cogview train``, alike but
for the settings of the arm, and its checkpoints draw scenes that are in no file; the grader of the emoji world judges.
A line for each checkpoint is printed and kept in ``FOLDER/arm-ARM/graded.jsonl``. What is done is not done again.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import arguments
import yaml
from PIL import Image

from cogview import CogView, Sampling
from cogview.checkpoints.registry import resolve_checkpoint
from cogview.cli.main import main as cogview
from cogview.emoji.grader import SceneGrader
from cogview.emoji.scene import Scene, SceneWeights, cells_of
from cogview.emoji.settings import WorldSettings
from cogview.emoji.world import EmojiWorld
from cogview.evaluation.harness import generate_images, grade_images
from cogview.modeling.config import PRESETS

PAIRS = SceneWeights(one=0, many=0, pair=1)
SIDE = 128  # pixels of the pictures; the model's have 64
CAPTIONS = 4  # of a picture
COLOURS = 4  # of grounds
MASKS = {"full_mask_rate": 0.7, "full_mask_targets": 24, "partial_mask_rate": 0.15}  # of the embedded model
ARMS: Mapping[str, Mapping[str, Any]] = {
    "captions": {},
    "boxes": {"name_loss_weight": 0.5},
    "captions-masks": MASKS,
    "boxes-masks": {**MASKS, "name_loss_weight": 0.5},
}
SAMPLING = Sampling(temperature=0.3, top_k=5)
BATCH = 24


def main(argv: Sequence[str] | None = None) -> int:
    """Make the data, and train and grade the arms."""
    parser = arguments.Parser(__doc__)
    parser.add_argument("folder", type=arguments.output_folder, help="folder of data and runs")
    parser.add_argument("--arm", action="append", choices=ARMS, help="may be repeated (default: all)")
    parser.add_argument("--steps", type=arguments.count, default=1200, help="steps of an arm (default: 1200)")
    parser.add_argument(
        "--grade-every", type=arguments.count, default=200, help="steps between two grades (default: 200)"
    )
    parser.add_argument("--things", type=arguments.count, default=10, help="things of the world (default: 10)")
    parser.add_argument("--shape", type=arguments.count, nargs=3, default=(3, 128, 4), help="layers, width and heads")
    args = parser.parse_args(argv)
    PRESETS["boxes"] = tuple(args.shape)
    world = EmojiWorld.create(WorldSettings(things=args.things))
    world = EmojiWorld(world.settings, world.candidates, world.sprites, world.colours[2 : 2 + COLOURS])
    args.folder.mkdir(parents=True, exist_ok=True)
    write_table(args.folder / "data", world)
    for column in (None, "boxes"):
        encode(args.folder, column)
    for arm in ARMS if args.arm is None else args.arm:
        measure(args, arm, world)
    return 0


def write_table(folder: Path, world: EmojiWorld) -> None:
    """Write every scene of two things that is not held out as a picture, and a table with captions and boxes."""
    if (folder / "list.csv").exists():
        return
    folder.mkdir(exist_ok=True)
    scale = SIDE // world.settings.canvas
    rows = [("image", "caption", "boxes")]
    for number, scene in enumerate(all_pairs(world, held_out=False)):
        Image.fromarray(world.render(scene, number, scale)).save(folder / f"{number:05d}.png")
        for each in range(CAPTIONS):
            caption = world.caption(scene, number * CAPTIONS + each)
            boxes = json.dumps(boxes_of(scene, caption), ensure_ascii=False)
            rows.append((f"{number:05d}.png", caption, boxes))
    with (folder / "unfinished.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)
    (folder / "unfinished.csv").rename(folder / "list.csv")


def all_pairs(world: EmojiWorld, *, held_out: bool) -> list[Scene]:
    """Return all scenes of two things, in an order that mixes them."""
    found = {}
    for index in range(200 * len(world.things) ** 2):
        scene = world.sample_scene(0, index, held_out, PAIRS)
        found.setdefault(scene.meaning, scene)
    return list(found.values())


def boxes_of(scene: Scene, caption: str) -> list[dict[str, Any]]:
    """Return the boxes of a scene by the names of its caption: the areas in which no other thing is."""
    eighth = SIDE // 8
    boxes = []
    for thing, cell in zip(scene.shown, cells_of(scene), strict=True):
        left, top, right, bottom = (edge * eighth for edge in cell.area)
        name = max((name for name in thing.names if name in caption), key=len)
        boxes.append({"text": name, "box": [left, top, right - left, bottom - top]})
    return boxes


def recipe(folder: Path, column: str | None, path: Path, **sections: Any) -> str:
    """Write a recipe of the stores with or without boxes, with further sections, to ``path`` and return it."""
    work = folder / (column or "plain")
    source = {"pictures": [str(folder / "data" / "list.csv")], "table": {"boxes_column": column}}
    columns = {"image_column": "image", "caption_columns": ["caption"]}
    source["table"] |= columns
    content = {
        "work": str(work),
        "text": {**source, "size": 4000, "max_piece_length": 1},
        "encode": {**source, "side": 64, "held_out": 0.02, "text_width": 40, "num_workers": 0},
        **sections,
    }
    path.write_text(yaml.safe_dump(content, allow_unicode=True), encoding="utf-8")
    return str(path)


def encode(folder: Path, column: str | None) -> None:
    """Make the tokenizers and the stores of a table, with or without its column of boxes."""
    work = folder / (column or "plain")
    path = recipe(folder, column, folder / f"{work.name}.yaml")
    if not work.exists():
        run("train-text", path)
        shutil.copytree(resolve_checkpoint("cogview-emoji") / "image", work / "image")
    if not (work / "store").exists():
        run("encode", path, "--device", "cpu")
        run("data", "stats", str(work / "store"))


def measure(args: argparse.Namespace, arm: str, world: EmojiWorld) -> None:
    """Train an arm, and grade its checkpoints."""
    settings = ARMS[arm]
    column = "boxes" if "name_loss_weight" in settings else None
    work = args.folder / (column or "plain")
    training = {
        "steps": args.steps,
        "batch_size": BATCH,
        "learning_rate": 1e-3,
        "final_learning_rate": 1e-3,  # so that more steps continue a run
        "betas": [0.9, 0.99],
        "warmup_steps": 100,
        **settings,
    }
    section = {
        "preset": "boxes",
        "max_positions": 128,
        "dropout": 0.0,
        "branch_norm_init": 0.05,
        "sinusoidal_positions": True,
        "precision": "float32",
        "store": str(work / "store"),
        "validation_store": str(work / "held-out-store"),
        "training": training,
        "run": {"save_every": args.grade_every, "evaluate_every": args.grade_every, "keep": 1000},
    }
    own = args.folder / f"arm-{arm}"
    own.mkdir(exist_ok=True)
    path = recipe(args.folder, column, own / "recipe.yaml", transformer=section)
    for name in ("image", "text.model"):
        if not (own / name).exists():
            (own / name).symlink_to((work / name).resolve())
    start = time.process_time()
    run("train", path, "--work", str(own), "--resume", "auto", "--device", "cpu")
    seconds = time.process_time() - start
    grade(args, arm, world)
    print(f"{arm}: trained in {seconds:.0f} s of CPU", flush=True)


def grade(args: argparse.Namespace, arm: str, world: EmojiWorld) -> None:
    """Print what the checkpoints of an arm draw right of scenes that are in no file."""
    own = args.folder / f"arm-{arm}"
    report = own / "graded.jsonl"
    lines = report.read_text(encoding="utf-8").splitlines() if report.exists() else []
    known = {json.loads(line)["step"] for line in lines}
    scenes = 2 * all_pairs(world, held_out=True)
    captions = [world.caption(scene, number, complete=True) for number, scene in enumerate(scenes)]
    for folder in sorted((own / "transformer-run" / "checkpoints").glob("step-*")):
        step = int(folder.name.rpartition("-")[2])
        if step in known:
            continue
        model = CogView.from_pretrained(str(folder), device="cpu")
        images = generate_images(model, captions, 0, SAMPLING, 50, "generating")
        grades = grade_images(SceneGrader(world), images, scenes, "grading")
        found = {name: sum(bool(getattr(each, name)) for each in grades) for name in ("object", "relation", "colour")}
        with report.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"arm": arm, "step": step, "of": len(scenes), **found}) + "\n")
        shares = ", ".join(f"{name} {count / len(scenes):.0%}" for name, count in found.items())
        print(f"{arm}, step {step}: {shares} of {len(scenes)}", flush=True)


def run(*arguments: str) -> None:
    """Run a command of cogview; SystemExit if it fails."""
    if status := cogview(list(arguments)):
        raise SystemExit(f"cogview {' '.join(arguments)} ended with status {status}")


if __name__ == "__main__":
    arguments.run_script(main)
