"""The folder that ``frozen.py`` runs commands in, and what several of its items share."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import shutil
import warnings
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from frozen_inputs import ADAPTER, CPU, JOBS, MODEL, PROMPTS, SECTIONS, TRAINING, write_world
from frozen_values import former, read_image, read_store


class Failure(Exception):
    """A command ended with an unexpected status."""


class Workbench:
    """The folder that commands run in, and what several items share in it, made on first use."""

    def __init__(self, folder: Path, library: Path) -> None:
        self.folder = folder
        self.library = library  # the folder that holds the package

    def run(self, *arguments: str) -> str:
        """Run a command with the settings of the baseline; return its stdout, Failure unless its status is 0."""
        status, out, err = run_command([*arguments, *former_settings(arguments)])
        if status:
            raise Failure(f"cogview {' '.join(arguments[:4])} … ended with status {status}: {err.strip()[-500:]}")
        return out

    def images(self, folder: str) -> dict[str, Any]:
        """Return pixels, codes, settings and log-probabilities of the PNG files in ``folder``, by name."""
        return {path.name: read_image(path) for path in sorted((self.folder / folder).glob("*.png"))}

    @cached_property
    def pictures(self) -> list[str]:
        """Paths of eight generated images, two for each of four prompts."""
        self.run("generate", *PROMPTS[:4], "-n", "2", "--seed", "7", "-o", "pictures", *CPU)
        return [str(path.relative_to(self.folder)) for path in sorted((self.folder / "pictures").glob("*.png"))]

    @cached_property
    def drawing(self) -> str:
        """Path of an image that depends on no model."""
        from PIL import Image

        y, x = np.mgrid[0:96, 0:80]
        pixels = np.stack([x * 3, y * 2, (x * y) // 32 % 256], axis=-1).astype(np.uint8)
        Image.fromarray(pixels).save(self.folder / "drawing.png")
        return "drawing.png"

    @cached_property
    def recipe(self) -> str:
        """Path of the recipe of the tiny emoji world."""
        return self.write_recipe("tiny.yaml", TRAINING)

    def write_recipe(self, name: str, transformer: Mapping[str, Any]) -> str:
        """Write a recipe with ``transformer`` as its section of that name; return its path."""
        import yaml

        content = yaml.safe_dump({**SECTIONS, "transformer": transformer}, allow_unicode=True, sort_keys=False)
        (self.folder / name).write_text(content, encoding="utf-8")
        return name

    @cached_property
    def work(self) -> Path:
        """A work folder with the tiny world, the tokenizers of the embedded model, and stores encoded by these."""
        work, model = self.folder / "work", self.library / "cogview" / "models" / MODEL
        write_world(work / "world")
        shutil.copytree(model / "image", work / "image")
        shutil.copy(model / "text.model", work / "text.model")
        self.run("encode", self.recipe, *CPU)
        return work

    def fresh_work(self, name: str, *parts: str) -> str:
        """Make the work folder ``name`` with copies of some ``parts`` of the shared one; return its path."""
        (self.folder / name).mkdir()
        for part in parts:
            shutil.copytree(self.work / part, self.folder / name / part)
        return name

    @cached_property
    def trained(self) -> str:
        """Path of a work folder in which the tiny transformer has been trained."""
        work = self.fresh_work("trained-work", "world", "store", "held-out-store", "image")
        shutil.copy(self.work / "text.model", self.folder / work / "text.model")
        self.run("train", self.recipe, "--work", work, *CPU)
        return work

    @cached_property
    def checkpoint(self) -> str:
        """Path of the last checkpoint of ``trained``."""
        return f"{self.trained}/transformer-run/checkpoints/step-00000020"

    @cached_property
    def adapter_run(self) -> str:
        """Path of the run folder of an adapter of the embedded model, trained on a mixture of two stores."""
        work = self.fresh_work("lora-work", "store", "held-out-store")
        shutil.copytree(self.work / "held-out-store", self.folder / work / "second-store")
        self.run("train", self.write_recipe("lora.yaml", ADAPTER), "--work", work, *CPU)
        return f"{work}/transformer-run"

    def encoded(self, store: str, names: Sequence[str]) -> dict[str, Any]:
        """Return the fields ``names`` of an encoded store, and its header."""
        content = read_store(self.work / store)
        header = {key: value for key, value in content["header"].items() if key != "codebook_sha256"}
        return {"header": header, "count": content["count"], **{name: content["fields"][name] for name in names}}

    def journals(self, *, drop: Sequence[str], ranked: bool) -> dict[str, Any]:
        """Return the journals of three jobs, and of the first one resumed after it lost its last records.

        Keys in ``drop`` are left out. ``ranked``: keep the best image of each prompt and upscale it, in one job.
        """
        prefix = "ranked" if ranked else "plain"
        options = ("-n", "2", "--keep", "1", "--upscale") if ranked else ("--top-p", "0.9")
        options = (*options, "--seed", "3", "--max-inference-batch-size", "8", *CPU)
        found = {}
        for kind in ("jsonl",) if ranked else JOBS:
            job = f"job.{kind}"
            JOBS[kind](self.folder / job, self.drawing)
            output = f"{prefix}-{kind}"
            self.run("generate", "--input", job, *options, "-o", output)
            found[kind] = self._journal(output, drop, pixels=ranked)
        output = f"{prefix}-jsonl"
        (path,) = (self.folder / output).glob("*.jsonl")
        head = path.read_text("utf-8").splitlines(keepends=True)[:4]
        path.write_text("".join(head) + '{"id": "cut sh', encoding="utf-8")
        recorded = {json.loads(line).get("path") for line in head}
        for image in (self.folder / output).glob("*.png"):
            if image.name not in recorded:
                image.unlink()
        self.run("generate", "--input", "job.jsonl", *options, "-o", output, "--resume")
        found["resumed"] = self._journal(output, drop, pixels=ranked)
        return found

    def _journal(self, output: str, drop: Sequence[str], *, pixels: bool) -> dict[str, Any]:
        """Return the header, the records by id, and the files of a job."""
        (path,) = (self.folder / output).glob("*.jsonl")
        records = []
        for line in path.read_text("utf-8").splitlines():
            with contextlib.suppress(json.JSONDecodeError):  # the record that was cut short
                records.append(former(json.loads(line)))
        files = sorted(image.name for image in (self.folder / output).glob("*.png"))
        return {
            "name": path.name,
            "header": records[0],
            "records": {
                record["id"]: {key: value for key, value in record.items() if key not in (*drop, "id")}
                for record in sorted(records[1:], key=lambda record: record["id"])
            },
            "files": self.images(output) if pixels else files,
        }


def former_settings(arguments: Sequence[str]) -> list[str]:
    """Return options that generate images as the embedded model did before it sampled with min-p and prompts had noise
    of their own; none for a library that has no such options.
    """
    from cogview import __version__

    if arguments[0] not in ("generate", "complete", "upscale") or tuple(map(int, __version__.split(".")[:2])) < (0, 3):
        return []
    options = {"--noise-version": "1"}
    if arguments[0] != "upscale" and "--model" not in arguments:
        options |= {"--temperature": "0.3", "--top-k": "5", "--min-p": "0"}
    return [word for name, value in options.items() if name not in arguments for word in (name, value)]


def run_command(arguments: Sequence[str]) -> tuple[int, str, str]:
    """Run a command in this process; return its status, stdout and stderr."""
    from cogview.cli.main import main

    out, err, root = io.StringIO(), io.StringIO(), logging.getLogger()
    handlers, root.handlers[:] = root.handlers[:], []  # the command shall log to the stderr that is captured
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            status = main(list(arguments))
        except SystemExit as stop:
            status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        finally:
            root.handlers[:] = handlers
    return status, out.getvalue(), err.getvalue()
