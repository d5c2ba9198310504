"""Training in several processes: the losses of one process with any engine, and checkpoints that all engines share.

Processes are started as by torchrun, exchange gradients by gloo and compute on the CPU. Starting them takes longer than
their work, so they are forked (``launcher.py``), and one start does many jobs (``program.py``).
"""

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cogview.checkpoints.checkpoint import read_config
from cogview.data.store import StoreHeader
from cogview.data.store_writer import StoreWriter
from cogview.pipeline.cogview import CogView
from tests.training.launcher import Launcher

pytestmark = [pytest.mark.slow, pytest.mark.multiprocess]

STEPS = 20
ZERO = {f"zero{stage}": {"name": "deepspeed", "zero": stage} for stage in (1, 2, 3)}
ENGINES = {"torch": {}, **ZERO, "offload": {"name": "deepspeed", "zero": 2, "offload": True}}


@pytest.fixture(scope="module")
def folder(tiny_checkpoint, tmp_path_factory) -> Path:
    """Return a folder with the tiny model and a store of 40 rows for it."""
    place = tmp_path_factory.mktemp("processes")
    shutil.copytree(tiny_checkpoint, place / "model")
    config = read_config(tiny_checkpoint)
    header = StoreHeader(
        fields={"text": 20, "image": config.grid**2},
        grid=config.grid,
        num_image_codes=config.vocabulary.num_image_codes,
        num_text_pieces=config.vocabulary.num_text_pieces,
        layouts=("generate", "caption"),
        codebook_sha256=config.codebook_sha256,
        text_sha256="",
    )
    random = np.random.default_rng(0)
    text = random.integers(config.vocabulary.num_text_pieces, size=(40, 20)).astype(np.uint16)
    text[np.arange(20) >= random.integers(1, 21, size=(40, 1))] = 0xFFFF
    codes = random.integers(config.vocabulary.num_image_codes, size=(40, config.grid**2))
    with StoreWriter(place / "store", header) as writer:
        writer.append({"text": text, "image": codes.astype(np.uint16)})
    return place


def steps_of(folder: Path, name: str, rank: int = 0) -> list[dict[str, Any]]:
    """Return what process ``rank`` has logged of each step of the run ``name``."""
    return [json.loads(line) for line in (folder / f"{name}.{rank}").read_text().splitlines()]


def losses(folder: Path, name: str) -> list[float]:
    return [step["loss"] for step in steps_of(folder, name)]


def difference(found: list[float], expected: list[float]) -> float:
    return max(abs(one - other) for one, other in zip(found, expected, strict=True))


@pytest.fixture(scope="module")
def trained(folder) -> Path:
    """Return the folder after all jobs."""
    pytest.importorskip("deepspeed")
    place = {"DS_ACCELERATOR": "cpu", "TORCH_EXTENSIONS_DIR": str(folder / "extensions")}
    lazy = ("torch._dynamo", "deepspeed.runtime.zero.muon.muon_optimizer")  # imported by the first optimizer: 4 s
    with Launcher("program", *lazy, **place) as launcher:
        run_all(launcher, folder)
    return folder


def run_all(launcher: Launcher, folder: Path) -> None:
    """Run all jobs, in one start of two processes, then of one, then of three.

    Several jobs continue at each start. The last one of two processes ends by a kill.
    """

    def train(jobs: list[dict[str, Any]], size: int = 1) -> list[int]:
        return launcher.start("program", [str(folder), json.dumps(jobs)], size, folder)

    chain = {"name": "chain", "dtype": "bfloat16", "steps": 15}
    killed = {"name": "killed", "steps": 14, "save_every": 4}
    window = {"name": "window", "steps": 6, "attention": {"pattern": "window", "window": 9, "pivots": 8}}
    two: list[dict[str, Any]] = [{"name": name, "engine": engine, "steps": STEPS} for name, engine in ENGINES.items()]
    for name, engine in ENGINES.items():
        half = {"name": f"{name}-half", "engine": engine, "dropout": 0.1, "steps": 6, "save_every": 3}
        two += [{**half, "name": f"{name}-whole"}, {**half, "until": 3}, {**half, "resume": True}]
    two += [window, {**chain, "engine": ZERO["zero2"], "until": 5}, {**killed, "die": [1, 6]}]
    one = [
        {"name": "one", "steps": STEPS},
        {**window, "name": "one-window"},
        {"name": "one-bfloat16", "dtype": "bfloat16", "steps": 15},
        {**chain, "engine": ZERO["zero1"], "until": 10, "resume": True},
        {**killed, "resume": True, "until": 8},
        {**killed, "name": "undisturbed"},
    ]
    three = [{**chain, "engine": ZERO["zero3"], "resume": True}, {**killed, "resume": True}]

    assert train(two, 2) == [1, -signal.SIGKILL], (folder / "errors.0").read_text()
    shutil.copy(folder / "errors.0", folder / "errors-of-killed.0")
    for path in folder.glob("killed.[0-9]"):
        path.unlink()
    assert train(one) == [0], (folder / "errors.0").read_text()
    assert train(three, 3) == [0, 0, 0], (folder / "errors.0").read_text()


@pytest.mark.parametrize("name", ENGINES)
def test_engine_of_two_processes_has_the_losses_of_one(trained, name):
    """In float32, over steps whose micro-batches differ in number, with each engine."""
    expected, found = losses(trained, "one"), losses(trained, name)
    assert len(found) == STEPS
    assert np.mean(found[-5:]) < np.mean(found[:5]) - 0.05
    print(
        f"{name}: losses of {STEPS} steps differ from those of one process by at most {difference(found, expected):.1e}"
    )
    np.testing.assert_allclose(found, expected, atol=1e-6, rtol=0)
    norms = [[step["gradient_norm"] for step in steps_of(trained, run)] for run in (name, "one")]
    np.testing.assert_allclose(*norms, rtol=1e-4)


def test_window_attention_in_two_processes_has_the_losses_of_one(trained):
    """A row has the same pivots in any process."""
    expected, found, dense = (losses(trained, name) for name in ("one-window", "window", "one"))
    np.testing.assert_allclose(found, expected, atol=1e-6, rtol=0)
    assert difference(found, dense[:6]) > 1e-4


def test_engine_compiles_no_extension(trained):
    """On a CPU DeepSpeed compiled one for minutes at the first start, which only inference calls."""
    assert not list((trained / "extensions").rglob("*"))


@pytest.mark.parametrize("name", ENGINES)
def test_whole_transformer_has_all_weights(trained, name):
    logits = [json.loads((trained / run / "samples" / f"step-{STEPS:08}.json").read_text()) for run in (name, "one")]
    np.testing.assert_allclose(*logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ENGINES)
def test_engine_of_two_processes_resumes_exactly(trained, name):
    """Bit for bit, with dropout."""
    assert losses(trained, f"{name}-half") == losses(trained, f"{name}-whole")
    last = "checkpoints/step-00000006"
    for file in ("model.safetensors", "trainer.safetensors"):
        halves, whole = (trained / f"{name}-{part}" / last / file for part in ("half", "whole"))
        assert halves.read_bytes() == whole.read_bytes()


def test_checkpoint_moves_between_engines_and_numbers_of_processes(trained):
    """In bfloat16, from ZeRO 2 to ZeRO 1 to ZeRO 3: within 1e-2 of a single process."""
    expected, found = losses(trained, "one-bfloat16"), losses(trained, "chain")
    assert len(found) == 15
    print(
        f"2 -> 1 -> 3 processes: losses differ from those of one process by at most {difference(found, expected):.1e}"
    )
    np.testing.assert_allclose(found, expected, atol=1e-2, rtol=0)
    states = [
        json.loads((path / "trainer.json").read_text())
        for path in sorted((trained / "chain" / "checkpoints").glob("step-*"))
    ]
    assert [(state["engine"], state["processes"], state["updates"]) for state in states][-2:] == [
        ("deepspeed", 1, 10),
        ("deepspeed", 3, 15),
    ]


def test_checkpoint_of_zero_3_opens_as_a_model(trained):
    model = CogView.from_pretrained(trained / "zero3" / "checkpoints" / f"step-{STEPS:08}", device="cpu")
    assert model.generate("一只狐狸", seed=1)[0].size == (64, 64)


def test_remaining_process_ends_when_another_is_killed(trained):
    errors = (trained / "errors-of-killed.0").read_text()
    assert "Traceback" not in errors
    assert "another process is gone" in errors


def test_remaining_samples_are_trained_on_after_a_kill(trained):
    """One of two processes is killed in step 6; one process continues, then three."""
    expected = {step["step"]: step for step in steps_of(trained, "undisturbed")}
    left = steps_of(trained, "killed")
    assert [step["step"] for step in left] == list(range(4, 14))
    for step in left:
        ranks = range(3) if step["step"] >= 8 else range(1)
        local = [next(s for s in steps_of(trained, "killed", rank) if s["step"] == step["step"]) for rank in ranks]
        assert [sample for one in local for sample in one["samples"]] == expected[step["step"]]["samples"]
        assert step["loss"] == pytest.approx(expected[step["step"]]["loss"], abs=1e-6)
