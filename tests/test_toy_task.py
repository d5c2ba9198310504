"""Tasks that users add: one row of the table each, with which a model is trained, generates and runs a job.

Nothing in the library knows ``repaint``, which generates an image from a text and another image, and ``answer``, which
generates a text from a question and a small image.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cogview.checkpoints.checkpoint import Model, load_model, save_model
from cogview.cli.main import main
from cogview.data.store_writer import pad_text
from cogview.errors import InputError
from cogview.image_io.png import read_metadata
from cogview.modeling.config import GREEDY, ModelConfig
from cogview.pipeline.cogview import CogView
from cogview.pipeline.requests import GenerationRequest
from cogview.planning.inference import estimate_inference
from cogview.tokenizers.store_tasks import tasks_of_store
from cogview.tokenizers.tasks import (
    GRID,
    RESTART_POSITIONS,
    TASKS,
    Blank,
    ImageElement,
    Task,
    TextElement,
    commands_of,
    register_task,
    registered,
)
from cogview.training.distributed import DistributedContext
from cogview.training.engines import open_engine
from cogview.training.engines.base import TransformerWithLoss
from cogview.training.settings import EngineSettings, TransformerTraining
from cogview.training.trainer import TransformerTrainer

REPAINT = Task(
    name="repaint",
    layout=(
        *("[ROI1]", TextElement("text"), GRID, "[BOI1]", ImageElement("source"), "[EOI1]", RESTART_POSITIONS),
        *("[ROI2]", GRID, "[BOI2]", Blank(ImageElement("image", loss=True)), "[EOI2]"),
    ),
    inputs=("prompt", "image"),
    output="image",
    activity="repainting",
    command="generate --input",
)
# Answers a question about a small image.
ANSWER = Task(
    name="answer",
    layout=(
        *(GRID, "[BOI1]", ImageElement("picture", scale=0.5), "[EOI1]", "[ROI1]", TextElement("question"), "[ROI2]"),
        Blank(TextElement("reply", loss=True), stop="[SEP]"),
    ),
    inputs=("prompt", "image"),
    output="text",
    activity="answering",
    command="generate --input",
)
PROMPT = "一只狐狸"
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def toy_tasks():
    """Register the tasks for one test."""
    with registered(REPAINT), registered(ANSWER):
        yield


@pytest.fixture
def folder(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A checkpoint whose config names the tasks."""
    model = load_model(tiny_checkpoint, CPU, torch.float32)
    config = ModelConfig(**{**vars(model.config), "tasks": ("repaint", "answer")})
    save_model(tmp_path / "painter", Model(**{**vars(model), "config": config}))
    return tmp_path / "painter"


@pytest.fixture
def model(folder: Path) -> CogView:
    """The model of that checkpoint."""
    return CogView.from_pretrained(folder, device="cpu")


def sources(count: int) -> np.ndarray:
    """Return (count, 8, 8) codes."""
    return np.random.default_rng(0).integers(0, 8192, (count, 8, 8))


def test_registered_task_is_known_everywhere_and_nowhere_afterwards(folder):
    """Layouts, stores and commands are derived from the row; without it the checkpoint cannot be opened."""
    assert REPAINT.store_fields == ("text", "source", "image")
    assert tasks_of_store({"text", "image", "source"}) == ("edit", "repaint")
    assert commands_of("repaint") == ("generate --input",)
    assert (REPAINT.input_scale, REPAINT.output_scale) == (1, 1)
    del TASKS["repaint"]
    try:
        with pytest.raises(InputError, match="task 'repaint' is unknown; known: generate, caption"):
            CogView.from_pretrained(folder, device="cpu")
    finally:
        register_task(REPAINT)
    with pytest.raises(ValueError, match="task 'repaint' is registered already"):
        register_task(REPAINT)


def test_training_lowers_the_loss_of_a_registered_task(folder):
    """Twenty steps of the trainer on two images."""
    model = load_model(folder, CPU, torch.float32)
    settings = TransformerTraining(
        steps=20, batch_size=2, warmup_steps=1, learning_rate=3e-3, tasks={"repaint": 1.0}, caption_dropout=0.0
    )
    network = TransformerWithLoss(model.transformer, None)
    engine = open_engine(network, settings, EngineSettings(), DistributedContext(CPU), None)
    trainer = TransformerTrainer(model, settings, engine)
    codes = sources(4).reshape(4, -1).astype(np.uint16)
    text = pad_text([model.text_tokenizer.encode(PROMPT)] * 2, 20)
    rows = {"text": text, "source": codes[:2], "image": codes[2:]}
    batch = trainer.batch(0, rows)
    counts = {f"{task} {kind.value}": int(n) for (task, kind), n in zip(batch.keys, batch.target_counts, strict=True)}
    assert counts == {"repaint image": 128, "repaint text": 0, "repaint name": 0}
    losses = [trainer.step(number, trainer.batch(number, rows))["loss"] for number in range(20)]
    assert losses[-1] < losses[0] - 1


def test_run_generates_registered_task_in_any_batch(model):
    """The given image matters, the batch does not."""
    codes = sources(3)
    requests = [GenerationRequest(task="repaint", prompt=PROMPT, seed=7, codes=own) for own in codes]
    together = list(model.run(requests))
    for request, image in zip(requests, together, strict=True):
        (alone,) = model.run([request])
        assert image.codes.shape == (8, 8)
        np.testing.assert_array_equal(image.codes, alone.codes)
    assert (together[0].codes != together[1].codes).any()
    assert model.batch_sizes(requests, batch_size=2) == [2, 1]
    row = model.config.layouts["repaint"].arrange(
        model.vocabulary, text=model.text_tokenizer.encode(PROMPT), source=codes[0], image=together[0].codes
    )
    span = row.spans["image"]
    with torch.inference_mode():
        logits = model.transformer(torch.from_numpy(row.ids)[None], torch.from_numpy(row.positions)[None])[0]
    log_p = logits[span.start - 1 : span.stop - 1, :8192].double().log_softmax(-1)
    expected = log_p.gather(1, torch.from_numpy(row.ids[span])[:, None]).sum()
    assert together[0].log_probability == pytest.approx(float(expected), abs=1e-2)


def test_estimate_plans_registered_task(model):
    """Its sequence is longer than that of ``generate`` by the given image."""
    plan = estimate_inference(model.config, model.image_tokenizer.config, task="repaint", rows=1)
    assert plan.sequence_length > 128
    assert plan.image_side == 8


def test_job_runs_registered_tasks(folder, model, tmp_path, save_image, monkeypatch, capsys):
    """Lines of a job file name the tasks; images are read, fitted to the size of the task, and encoded."""
    monkeypatch.chdir(tmp_path)
    image = save_image("fox.png", number=3, size=(100, 80))
    lines = [{"task": task, "prompt": PROMPT, "image": "fox.png"} for task in ("repaint", "answer")]
    Path("job.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    command = [
        "generate",
        "--input",
        "job.jsonl",
        "--model",
        str(folder),
        "--device",
        "cpu",
        "--seed",
        "7",
        "-o",
        "out",
    ]
    assert main(command) == 0
    requests = [
        GenerationRequest(
            task=task, prompt=PROMPT, seed=7, codes=model.encode_images([image], task=task)[0], sampling=sampling
        )
        for task, sampling in (("repaint", None), ("answer", GREEDY))
    ]
    assert requests[1].codes.shape == (4, 4)
    painted, reply = model.run(requests)
    path, answer = capsys.readouterr().out.splitlines()
    with Image.open(path) as saved:
        np.testing.assert_array_equal(np.asarray(saved), np.asarray(painted))
    assert read_metadata(Path(path))["task"] == "repaint"
    assert json.loads(answer)["caption"] == reply.text
    assert reply.num_pieces <= 20
    journal = [json.loads(row) for row in Path("out/job.ledger.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {row["task"] for row in journal if "log_probability" in row} == {"repaint", "answer"}


def test_job_refuses_line_without_input_of_registered_task(folder, tmp_path, monkeypatch, capsys):
    """The inputs of the row are required of a line."""
    monkeypatch.chdir(tmp_path)
    Path("job.jsonl").write_text(json.dumps({"task": "repaint", "prompt": PROMPT}) + "\n", encoding="utf-8")
    assert main(["generate", "--input", "job.jsonl", "--model", str(folder), "--device", "cpu", "-o", "out"]) == 2
    assert "the task repaint needs image" in capsys.readouterr().err
