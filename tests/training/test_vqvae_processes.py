"""Training a VQ-VAE in two processes: the losses and the codebook of one process, and runs that move between both.

Starting processes takes longer than their work, so they are forked (``launcher.py``), and one start does
many jobs (``vqvae_program.py``).
"""

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from cogview.checkpoints.image_tokenizer import load_image_tokenizer
from cogview.cli.main import main
from tests.training.launcher import Launcher

pytestmark = [pytest.mark.slow, pytest.mark.multiprocess]

SECTION = {
    "pictures": ["pictures"],
    "side": 32,
    "held_out": 0.3,
    "flip": True,
    "model": {"channels": [4, 8, 8], "encoder_blocks": [0, 0, 1], "num_codes": 32, "code_width": 4},
    "training": {"steps": 12, "batch_size": 4, "warmup_steps": 4, "revive_every": 2, "revive_below": 0.3, "decay": 0.7},
    "run": {"save_every": 2, "evaluate_every": 6, "log_every": 1},
    "precision": "float32",
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory, save_image):
    """Train in two processes, in one, and from one to the other; return the messages of the first start by rank."""
    folder, before = tmp_path_factory.mktemp("vqvae"), Path.cwd()
    os.chdir(folder)
    try:
        for number in range(24):
            save_image(f"pictures/{number:02d}.png", number, (40 + number, 48))
        shutil.copytree("pictures", "changed")
        Path("own.yaml").write_text(yaml.safe_dump({"work": "one", "image": SECTION}), encoding="utf-8")
        jobs: list[dict[str, Any]] = [
            {"arguments": ["--work", "two"]},
            {"arguments": ["--work", "two", "pictures=[changed]"]},
            {"arguments": ["--work", "odd", "training.batch_size=5"]},
            {"arguments": ["--work", "touched", "pictures=[changed]"], "touch": 2, "folder": "changed"},
            {"arguments": ["--work", "decoder", "init_from=two/image", "train=decoder", "model={}"]},
            {"arguments": ["--work", "killed"], "die": 7},
        ]
        resumed = [{"arguments": ["--work", "killed", "--resume", "auto"]}]
        with Launcher("vqvae_program", "torch._dynamo") as launcher:  # which the first optimizer imports
            statuses = launcher.start("vqvae_program", ["own.yaml", json.dumps(jobs)], 2, folder)
            errors = [Path(f"errors.{rank}").read_text() for rank in "01"]
            assert statuses[1] == -signal.SIGKILL, errors
            shutil.copytree("killed", "moved")
            assert launcher.start("vqvae_program", ["own.yaml", json.dumps(resumed)], 2, folder) == [0, 0]
        for work in ("one", "moved"):
            assert main(["train-image", "own.yaml", "--device", "cpu", "--work", work, "--resume", "auto"]) == 0
        yield errors
    finally:
        os.chdir(before)


def metrics(work: str, name: str) -> list[float]:
    lines = map(json.loads, Path(work, "image-run/metrics.jsonl").read_text().splitlines())
    return [line[name] for line in lines if name in line]


def weights(work: str) -> dict[str, torch.Tensor]:
    return load_image_tokenizer(Path(work, "image")).state_dict()


@pytest.mark.parametrize("work", ["two", "moved"])
def test_train_image_of_two_processes_gives_the_tokenizer_of_one(trained, work):
    """In float32, with an initialization of the codebook and restarts of dead codes on the way."""
    assert sum(metrics("one", "revived")) > 0
    for name in ("loss", "commitment", "psnr", "gradient_norm"):
        np.testing.assert_allclose(metrics(work, name), metrics("one", name), rtol=1e-4, atol=1e-6, err_msg=name)
    for name in ("revived", "alive", "validation_codes_used", "validation_images"):
        assert metrics(work, name) == metrics("one", name), name
    expected, found = weights("one"), weights(work)
    largest = max(float((found[name] - expected[name]).abs().max()) for name in expected)
    print(f"{work}: weights and codebook differ from those of one process by at most {largest:.1e}")
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], atol=1e-4, rtol=0, msg=name)


def test_train_image_of_two_processes_resumes_bit_for_bit_after_a_kill(trained):
    assert "another process is gone" in trained[0]
    assert "Traceback" not in trained[0]
    names = ("loss", "revived", "validation_psnr", "validation_perplexity")
    assert [metrics("killed", name) for name in names] == [metrics("two", name) for name in names]
    for name, tensor in weights("two").items():
        assert torch.equal(weights("killed")[name], tensor), name


def test_train_image_of_two_processes_reports_a_mistake_once(trained):
    assert "batch_size 5 does not divide among 2 processes; 4 or 6 would" in trained[0]
    assert trained[0].count("has been changed or removed since the training was started") == 1
    assert " to train on, " in trained[0]
    assert "two/image-run already holds a run at step-00000012" in trained[0]
    assert '"changed' not in Path("two/pictures.jsonl").read_text()
    assert trained[1] == ""


def test_train_image_of_two_processes_tunes_the_decoder_and_keeps_the_codes(trained):
    before, after = (load_image_tokenizer(Path(work, "image")) for work in ("two", "decoder"))
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(before.encode(images), after.encode(images))
    assert not torch.equal(before.decode(before.encode(images)), after.decode(after.encode(images)))
