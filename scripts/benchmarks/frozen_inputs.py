"""Inputs of ``frozen.py``: prompts, recipes, jobs, an emoji world and datasets, which depend on no other file."""

from __future__ import annotations

import csv
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np

PROMPTS = (
    "一个红苹果",
    "蓝色背景上的三只狐狸",
    "黄色背景上的四个足球",
    "紫色背景，一只猫",
    "左边是狐狸，右边是红苹果，绿色背景",
    "粉色背景上有两只企鹅",
    "一辆汽车",
    "白色背景上的两辆汽车",
    "上面是香蕉，下面是狗，灰色背景",
    "黑色背景上的一只兔子",
    "红色背景，三个西瓜",
    "橙色背景上有一只大象",
    "左边是熊猫，右边是公交车",
    "青色背景上的四只螃蟹",
    "一把吉他，棕色背景",
    "绿色背景上的两棵松树",
    "上面是月亮，下面是房子，蓝色背景",
    "三个蛋糕",
    "左边是玫瑰，右边是蝴蝶，黄色背景",
    "灰色背景上的一架钢琴",
)
SEEDS = (7, 11, 2021, 65537)
CPU = ("--device", "cpu")
MODEL = "cogview-emoji"

TRAINING = {
    "preset": "5m",
    "num_layers": 1,
    "max_positions": 128,
    "dropout": 0.1,
    "branch_gain": 0.05,
    "tokenizers": MODEL,
    "precision": "float32",
    "training": {
        "steps": 20,
        "batch_size": 4,
        "warmup_steps": 3,
        "tasks": {"generate": 2, "caption": 1, "upscale": 1, "low_level": 1},
        "hidden_rows": 0.3,
        "hidden_places": 24,
        "masked_rows": 0.2,
        "name_loss_weight": 0.5,
        "seed": 3,
    },
    "sampling": {"temperature": 0.7, "top_k": 20},
    "run": {"log_every": 1, "save_every": 10, "evaluate_every": 10},
}
ADAPTER = {
    "preset": "5m",
    "max_positions": 128,
    "dropout": 0.0,
    "tokenizers": MODEL,
    "start_from": MODEL,
    "precision": "float32",
    "lora": {"rank": 4, "alpha": 8.0},
    "stores": {"lora-work/store": 3.0, "lora-work/second-store": 1.0},
    "held_out_store": "lora-work/held-out-store",
    "training": {
        "steps": 20,
        "batch_size": 4,
        "warmup_steps": 3,
        "tasks": {"generate": 3, "caption": 1},
        "learning_rate": 1e-3,
    },
    "run": {"log_every": 1, "save_every": 10, "evaluate_every": 20},
}
SECTIONS = {
    "work": "work",
    "scenes": {"things": 6, "canvas": 64},
    "text": {"captions": 300, "size": 400, "max_piece_length": 1},
    "image": {
        "model": {"channels": [4, 8, 8], "encoder_blocks": [0, 0, 1], "num_codes": 40, "code_width": 4},
        "training": {"steps": 10, "batch_size": 4, "warmup_steps": 2},
        "run": {"log_every": 1, "save_every": 5, "evaluate_every": 0},
        "precision": "float32",
    },
    "encode": {
        "rows": 60,
        "held_out_rows": 16,
        "text_width": 24,
        "batch_size": 16,
        "shares": {"one": 2, "many": 1, "pair": 4},
        "named": True,
        "large": True,
        "small": True,
    },
}


def write_world(folder: Path) -> None:
    """Write an emoji world of six drawn shapes as ``cogview scenes`` stores it; no font is needed."""
    things = {"🍎": "红苹果 苹果", "🍌": "香蕉", "🐕": "狗 小狗", "🐈": "猫 小猫", "🦊": "狐狸", "🚗": "汽车 轿车"}
    measures = {"🍌": "根 个", "🐕": "只 条 个", "🐈": "只 个", "🦊": "只 个", "🚗": "辆 个"}
    colours = {
        "红色": (222, 76, 70),
        "黄色": (250, 216, 92),
        "绿色": (108, 186, 104),
        "蓝色": (78, 128, 220),
        "粉色 粉红色": (250, 178, 204),
        "白色": (250, 250, 248),
    }
    candidates = []
    for emoji, names in things.items():
        name, *synonyms = names.split()
        known = measures.get(emoji, "个").split()
        candidates.append({"emoji": emoji, "name": name, "synonyms": synonyms, "measures": known})
    world = {
        "format_version": 1,
        "settings": {"things": 6, "canvas": 64, "jitter": 0, "sizes": [1.0]},
        "colours": [{"names": names.split(), "rgb": rgb} for names, rgb in colours.items()],
        "candidates": candidates,
    }
    y, x = np.mgrid[0:128, 0:128]
    disc = (x - 64) ** 2 + (y - 64) ** 2
    shapes = (
        disc < 56**2,
        abs(x - y) < 30,
        (abs(x - 64) < 44) & (abs(y - 64) < 44),
        (abs(x - 64) < 20) | (abs(y - 64) < 20),
        2 * abs(x - 64) < y,
        (disc < 56**2) & (disc > 30**2),
    )
    paints = ((200, 20, 60), (240, 220, 40), (120, 70, 30), (90, 90, 100), (230, 120, 10), (20, 60, 200))
    sprites = np.zeros((6, 128, 128, 4), dtype=np.uint8)
    for sprite, shape, paint in zip(sprites, shapes, paints, strict=True):
        sprite[shape] = (*paint, 255)
    folder.mkdir(parents=True)
    (folder / "world.json").write_text(json.dumps(world, ensure_ascii=False), encoding="utf-8")
    np.savez_compressed(folder / "sprites.npz", sprites=sprites)


def write_v1_datasets(folder: Path) -> None:
    """Write ``v1.bin`` and ``v1-lmdb``: datasets of CogView v1 for the vocabulary of the embedded model."""
    import lmdb

    count, codes, pieces = 23, 8192, 506
    numbers = np.arange(count * 1088).reshape(count, 1088) * 7919
    rows = numbers % codes
    rows[:, :64] = codes + numbers[:, :64] % pieces
    rows[:, :64][np.arange(64) >= np.arange(1, count + 1)[:, None]] = -1
    rows.astype("<i4").tofile(folder / "v1.bin")
    with lmdb.open(str(folder / "v1-lmdb"), map_size=2**24) as environment, environment.begin(write=True) as writer:
        writer.put(b"length", str(count).encode())
        for number, row in enumerate(rows):
            text, image = row[:64], row[64 : 64 + 256]
            pair = (text[text >= 0], image) if number != 5 else (text, "damaged")
            writer.put(str(number).encode(), pickle.dumps(pair, protocol=4))


def write_jsonl_job(path: Path, image: str) -> None:
    """Write a job of all tasks, with settings of single lines."""
    lines: list[dict[str, Any]] = [
        {"id": "fox", "prompt": PROMPTS[1], "n": 3, "seed": 7},
        {"prompt": PROMPTS[0], "guidance": 2, "top_k": 20},
        {"prompt": PROMPTS[0]},
        {"task": "upscale", "image": image, "prompt": PROMPTS[0]},
        {"task": "caption", "image": image, "n": 2, "temperature": 0.8},
        {"task": "complete", "image": image, "prompt": PROMPTS[2], "rows": 3, "text_attention": 1.5},
        {"prompt": PROMPTS[0], "temperature": 0.9, "top_p": 0.8},
    ]
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")


def write_csv_job(path: Path, image: str) -> None:
    """Write a job in columns."""
    with path.open("w", encoding="utf-8-sig", newline="") as file:
        csv.writer(file).writerows(
            [
                ["id", "prompt", "n", "seed", "task", "image"],
                ["一", PROMPTS[3], "2", "", "", ""],
                ["", "", "", "4", "caption", image],
                ["b/c", PROMPTS[5], "", "12", "generate", ""],
            ]
        )


def write_text_job(path: Path, image: str) -> None:
    """Write a job of one prompt per line, one of them twice."""
    path.write_text("\n".join([*PROMPTS[:3], "", PROMPTS[0]]) + "\n", encoding="utf-8")


JOBS = {"jsonl": write_jsonl_job, "csv": write_csv_job, "txt": write_text_job}
