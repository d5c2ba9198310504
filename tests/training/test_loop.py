"""The training loop: killed runs resume exactly, checkpoints are whole or absent, metrics hold each step once."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import cogview
from cogview.data.sampling_order import sample_index
from cogview.errors import InputError, RetryLaterError
from cogview.training import loop as loop_module
from cogview.training import run_folder
from cogview.training.loop import BatchSource, Trainer, run_loop
from cogview.training.run_folder import RunFolder, Writer, find_damage, step_of
from cogview.training.run_record import Best
from cogview.training.settings import RunSettings

PATIENCE = 300  # seconds to wait for a process on a busy machine
STEPS, SAVE_EVERY, BATCH, ROWS = 40, 6, 4, 37

# A trainer whose state is a hash chain over its samples, in a process that can be killed.
PROGRAM = """
import sys, time
from pathlib import Path

sys.modules["torch.utils.tensorboard"] = None  # as without TensorBoard
import numpy as np

from cogview.cli.main import run_safely
from cogview.data.sampling_order import sample_index
from cogview.training.loop import BatchSource, Trainer, run_loop
from cogview.training.run_folder import RunFolder
from cogview.training.settings import RunSettings

folder, pause = Path(sys.argv[1]), float(sys.argv[2])
STEPS, SAVE_EVERY, BATCH, ROWS = map(int, sys.argv[3:])


class Chain(Trainer):
    state = 0

    def step(self, step, batch):
        with (folder / "seen.txt").open("a") as file:
            file.write(f"{step} {' '.join(map(str, batch))}\\n")
        for _ in range(10):
            time.sleep(pause / 10)
        for sample in batch:
            self.state = (self.state * 31 + sample + 1) % 1_000_003
        return {"state": self.state}

    def snapshot(self):
        state = self.state

        def write(folder):
            (folder / "first").write_text(str(state))
            time.sleep(pause)
            (folder / "second").write_text(str(state))

        return write

    def load(self, folder):
        self.state = int((folder / "first").read_text())
        assert self.state == int((folder / "second").read_text())

    def evaluate(self, step, folder):
        return {"validation": float(step)}


sys.exit(run_safely(lambda: run_loop(
    Chain(),
    BatchSource(
        batches=lambda first: iter(
            sample_index(7, np.arange(STEPS * BATCH).reshape(STEPS, BATCH), ROWS).tolist()[first:]
        ),
        steps=STEPS,
        batch_size=BATCH,
    ),
    RunFolder(folder / "run"),
    RunSettings(log_every=1, save_every=SAVE_EVERY, evaluate_every=10),
    recipe={"steps": STEPS},
    resume=True,
), "program"))
"""


def start(folder: Path, pause: float = 0.004) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(Path(cogview.__file__).parents[1])}
    numbers = [str(number) for number in (STEPS, SAVE_EVERY, BATCH, ROWS)]
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(folder), str(pause), *numbers],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(condition, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.002)


def seen(folder: Path) -> list[tuple[int, list[int]]]:
    path = folder / "seen.txt"
    lines = path.read_text().splitlines() if path.exists() else []
    return [(int(step), [int(sample) for sample in samples]) for step, *samples in map(str.split, lines)]


def records(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


def expected_run() -> tuple[dict[int, list[int]], int]:
    """Return the samples of every step of a run that is not killed, and its last state."""
    batches = dict(enumerate(sample_index(7, np.arange(STEPS * BATCH).reshape(STEPS, BATCH), ROWS).tolist()))
    state = 0
    for batch in batches.values():
        for sample in batch:
            state = (state * 31 + sample + 1) % 1_000_003
    return batches, state


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL], ids=lambda number: number.name)
def test_killed_run_resumes_without_a_lost_or_repeated_sample(tmp_path, number):
    process = start(tmp_path)
    wait_for(lambda: len(seen(tmp_path)) >= 15, process)
    process.send_signal(number)
    errors = process.communicate(timeout=PATIENCE)[1]
    before = seen(tmp_path)
    assert 15 <= len(before) < STEPS
    checkpoint = RunFolder(tmp_path / "run").checkpoints()[-1]
    if number == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
        assert step_of(checkpoint) % SAVE_EVERY == 0
    else:
        assert process.returncode == 128 + number
        assert step_of(checkpoint) == len(before)  # the step under way was finished and saved
        assert f"stopped after step {len(before)} of {STEPS}" in errors
        assert "go on with --resume auto" in errors

    process = start(tmp_path)
    errors = process.communicate(timeout=PATIENCE)[1]
    assert process.returncode == 0, errors
    assert f"resuming {tmp_path / 'run'} after step {step_of(checkpoint)}" in errors
    assert "no TensorBoard curves: pip install 'cogview[train]'" in errors
    after = seen(tmp_path)[len(before) :]
    assert [step for step, _ in after] == list(range(step_of(checkpoint), STEPS))
    batches, state = expected_run()
    trained = before[: step_of(checkpoint)] + after
    assert trained == list(batches.items())
    assert before == list(batches.items())[: len(before)]  # steps that are repeated after a kill are equal

    last = RunFolder(tmp_path / "run").checkpoints()[-1]
    assert step_of(last) == STEPS
    assert int((last / "second").read_text()) == state
    training = [record for record in records(tmp_path) if "state" in record]
    assert [record["step"] for record in training] == list(range(1, STEPS + 1))
    validation = [record["step"] for record in records(tmp_path) if "validation" in record]
    assert validation == [10, 20, 30, 40]


@pytest.mark.slow
@pytest.mark.multiprocess
def test_second_signal_stops_at_once(tmp_path):
    process = start(tmp_path, pause=PATIENCE + 100)
    wait_for(lambda: len(seen(tmp_path)) == 1, process)
    process.send_signal(signal.SIGINT)
    assert process.stderr.readline() == "stopping after this step (once more: at once, without saving)\n"
    process.send_signal(signal.SIGINT)
    errors = process.communicate(timeout=PATIENCE)[1]
    assert process.returncode == 130
    assert "program: interrupted" in errors
    assert RunFolder(tmp_path / "run").checkpoints() == []


class Counter(Trainer[int]):
    """A trainer that counts its steps and fails in a given method."""

    def __init__(self, fail_in: str = "", fail_at: int = -1) -> None:
        self.count = 0
        self.fail_in, self.fail_at = fail_in, fail_at

    def step(self, step: int, batch: int) -> dict[str, float]:
        if self.fail_in == "step" and self.count == self.fail_at:
            raise InputError("the gradient is not finite")
        assert step == batch == self.count
        self.count += 1
        return {"loss": float(step)}

    def snapshot(self) -> Writer:
        count = self.count

        def write(folder: Path) -> None:
            (folder / "half").write_text("half")
            if self.fail_in == "save" and count >= self.fail_at:
                raise OSError(28, "No space left on device")
            (folder / "count").write_text(str(count))

        return write

    def load(self, folder: Path) -> None:
        self.count = int((folder / "count").read_text())
        if self.fail_in == "load":
            raise RuntimeError("size mismatch for layers.0.weight:\n\tcopying a param of 3 into 4")
        if self.fail_in == "read":
            raise InputError(f"{folder / 'count'} is damaged: half of it is missing")

    def evaluate(self, step: int, folder: Path) -> dict[str, float]:
        (folder / f"step-{step:08d}.txt").write_text("samples")
        return {"validation": float(step)}


def count_from(first: int) -> Iterator[int]:
    return iter(range(first, 1000))


def loop(run: RunFolder, trainer: Counter, *, steps: int = 10, resume: bool = False, **settings: int) -> int:
    settings = {"log_every": 1, "save_every": 3, "evaluate_every": 4, **settings}
    return run_loop(
        trainer,
        BatchSource(batches=count_from, steps=steps, batch_size=2),
        run,
        RunSettings(**settings),
        recipe={"training": {"steps": steps}, "name": "红苹果"},
        resume=resume,
    )


def names(run: RunFolder) -> list[str]:
    return sorted(path.name for path in (run.folder / "checkpoints").iterdir())


def test_run_loop_writes_its_folder(tmp_path):
    run = RunFolder(tmp_path / "run")
    assert loop(run, Counter(), keep=10) == 0
    assert names(run) == [f"step-{step:08d}" for step in (3, 6, 9, 10)]  # no best one without a validation loss
    assert sorted(path.name for path in run.samples.iterdir()) == [f"step-{s:08d}.txt" for s in (4, 8, 10)]
    assert "name: 红苹果" in (run.folder / "recipe.yaml").read_text(encoding="utf-8")
    training = [record for record in records(tmp_path) if "loss" in record]
    assert [(record["step"], record["loss"]) for record in training] == [(step + 1, step) for step in range(10)]
    assert all(record["samples_per_second"] > 0 for record in training)
    assert any((run.folder / "tensorboard").iterdir())


def test_run_loop_keeps_the_last_checkpoints(tmp_path):
    run = RunFolder(tmp_path)
    loop(run, Counter(), keep=2)
    assert names(run) == ["step-00000009", "step-00000010"]


def test_run_loop_logs_means_since_the_last_line(tmp_path):
    loop(RunFolder(tmp_path / "run"), Counter(), log_every=4, evaluate_every=0)
    assert [(record["step"], record.get("loss")) for record in records(tmp_path)] == [
        (4, 1.5),
        (8, 5.5),
        (10, 8.5),
        (10, None),
    ]


def test_run_folder_logs_six_digits(tmp_path):
    run = RunFolder(tmp_path / "run")
    run.start({}, resume=False)
    run.log(1, {"learning_rate": 1.2345678e-6, "loss": 3.14159265})
    run.close()
    assert records(tmp_path) == [{"step": 1, "learning_rate": 1.23457e-6, "loss": 3.14159}]


def test_run_loop_refuses_to_start_over_another_run(tmp_path):
    run = RunFolder(tmp_path)
    loop(run, Counter())
    metrics = (tmp_path / "metrics.jsonl").read_text()
    with pytest.raises(InputError, match="already holds a run at step-00000010; go on with --resume auto, or remove"):
        loop(run, Counter())
    assert (tmp_path / "metrics.jsonl").read_text() == metrics
    assert names(run) == ["step-00000009", "step-00000010"]


def test_run_loop_changes_nothing_when_the_run_is_finished(tmp_path):
    loop(RunFolder(tmp_path), Counter())
    metrics = (tmp_path / "metrics.jsonl").read_text()
    trainer = Counter()
    assert loop(RunFolder(tmp_path), trainer, resume=True) == 0
    assert trainer.count == 10
    assert (tmp_path / "metrics.jsonl").read_text() == metrics


def test_run_loop_continues_a_finished_run_for_more_steps(tmp_path):
    loop(RunFolder(tmp_path / "run"), Counter())
    assert loop(RunFolder(tmp_path / "run"), Counter(), steps=14, resume=True) == 0
    assert [record["step"] for record in records(tmp_path) if "loss" in record] == list(range(1, 15))


def test_run_loop_starts_when_there_is_nothing_to_resume(tmp_path):
    assert loop(RunFolder(tmp_path), Counter(), resume=True) == 0


@pytest.mark.parametrize("at", [3, 6])
def test_run_loop_continues_when_a_checkpoint_cannot_be_written(tmp_path, at, capsys):
    run, trainer = RunFolder(tmp_path), Counter("save", at)
    assert loop(run, trainer) == 1
    assert trainer.count == 10
    assert names(run) == [f"step-{step:08d}" for step in range(3, at, 3)]
    errors = capsys.readouterr().err
    kept = "there is none yet" if at == 3 else "step-00000003 stays the last one"
    assert f"warning: a checkpoint could not be written, {kept}: No space left on device" in errors
    assert "step 10 of 10 could not be saved; make room and go on with --resume auto" in errors
    assert loop(run, Counter(), resume=True) == 0
    assert names(run) == ["step-00000009", "step-00000010"]


def test_run_loop_writes_a_checkpoint_in_the_background(tmp_path):
    """The writer waits for a later step, which must not wait for it, and writes the state of its step."""
    run, later = RunFolder(tmp_path), threading.Event()

    class Slow(Counter):
        def step(self, step: int, batch: int) -> dict[str, float]:
            if step == 5:
                later.set()
            return super().step(step, batch)

        def snapshot(self) -> Writer:
            write = super().snapshot()

            def write_late(folder: Path) -> None:
                assert later.wait(PATIENCE)
                write(folder)

            return write_late

    assert loop(run, Slow(), keep=10) == 0
    assert (run.checkpoints()[0] / "count").read_text() == "3"


def test_run_loop_keeps_the_best_checkpoint(tmp_path):
    class Evaluated(Counter):
        def evaluate(self, step: int, folder: Path) -> dict[str, float]:
            return {"validation_loss": {2: 5.0, 4: 3.0, 6: 4.0, 8: 3.5, 10: 3.0}[step]}

    run = RunFolder(tmp_path)
    loop(run, Evaluated(), evaluate_every=2, keep=1)
    assert run.best() == Best(4, 3.0)
    assert names(run) == ["best.json", "step-00000004", "step-00000010"]


def test_run_loop_removes_an_unfinished_checkpoint(tmp_path):
    run = RunFolder(tmp_path / "run")
    with pytest.raises(InputError, match="not finite"):
        loop(run, Counter("step", 8))
    half = run.folder / "checkpoints" / ".writing-step-00000009"
    half.mkdir()
    (half / "half").write_text("half")
    with (run.folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "lo')  # a line that was cut short
    assert [step_of(path) for path in run.checkpoints()] == [6, 8]  # the state before the failure is saved
    assert loop(run, Counter(), resume=True) == 0
    assert names(run) == ["step-00000009", "step-00000010"]
    assert [record["step"] for record in records(tmp_path) if "loss" in record] == list(range(1, 11))


def test_run_loop_refuses_a_checkpoint_of_other_settings(tmp_path):
    loop(RunFolder(tmp_path), Counter(), steps=3)
    with pytest.raises(InputError, match=r"does not fit the recipe, go back to its settings or remove .* mismatch"):
        loop(RunFolder(tmp_path), Counter("load"), steps=6, resume=True)


def test_run_loop_distinguishes_a_damaged_checkpoint_from_one_of_other_settings(tmp_path):
    """Damage was reported as a mismatch with the recipe, which had not changed."""
    run = RunFolder(tmp_path / "run")
    loop(run, Counter(), steps=7)
    *_, before, last = run.checkpoints()
    expected = f"{last} cannot be resumed, remove it to go on from {before.name}: {last / 'count'} is damaged: half"
    with pytest.raises(InputError, match=f"^{re.escape(expected)}"):
        loop(run, Counter("read"), resume=True)
    shutil.rmtree(before)
    with pytest.raises(InputError, match=f"cannot be resumed, remove {re.escape(str(run.folder))} to start again: "):
        loop(run, Counter("read"), resume=True)


@pytest.mark.parametrize("content", [b"", bytes(100), b"{"], ids=["empty", "zeros", "cut"])
def test_run_loop_resumes_before_a_damaged_checkpoint(tmp_path, content, capsys):
    """After a power cut the newest files may be empty: only the steps since the checkpoint before are lost."""
    run = RunFolder(tmp_path / "run")
    loop(run, Counter(), steps=7)
    (run.checkpoints()[-1] / "trainer.json").write_bytes(content)
    (run.folder / "checkpoints/best.json").write_bytes(content)
    with run.metrics.open("ab") as file:
        file.write(b"\xff\xfe\n[3]\n{}\n")
    trainer = Counter()
    assert loop(run, trainer, steps=10, resume=True) == 0
    assert trainer.count == 10
    errors = capsys.readouterr().err
    assert f"{run.checkpoint_path(7)} is damaged (trainer.json " in errors
    assert "set aside as damaged-step-00000007, and training goes on from step-00000006\n" in errors
    assert names(run)[-2:] == ["step-00000009", "step-00000010"]
    assert "damaged-step-00000007" in names(run)
    assert [record["step"] for record in records(tmp_path) if "loss" in record] == list(range(1, 11))


def test_run_loop_names_every_checkpoint_when_all_are_damaged(tmp_path):
    run = RunFolder(tmp_path)
    loop(run, Counter())
    for checkpoint in run.checkpoints():
        (checkpoint / "count").write_text("")
    before = names(run)
    with pytest.raises(
        InputError, match=r"is damaged: step-00000010 \(count is empty\), step-00000009 \(count is empty"
    ):
        loop(run, Counter(), resume=True)
    assert names(run) == before


def test_find_damage_names_an_incomplete_file(tmp_path):
    assert find_damage(tmp_path) == "it holds no files"
    save_file({"a": torch.ones(9)}, tmp_path / "model.safetensors")
    torch.save({"a": torch.ones(9)}, tmp_path / "trainer.pt")
    assert find_damage(tmp_path) is None
    for name in ("model.safetensors", "trainer.pt"):
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole[:-10])
        assert find_damage(tmp_path) == f"{name} is incomplete"
        (tmp_path / name).write_bytes(whole)


def test_run_loop_refuses_a_folder_that_another_training_holds(tmp_path):
    """Two trainings of one folder would write its metrics twice and remove each other's checkpoints."""
    run, other = RunFolder(tmp_path), RunFolder(tmp_path)
    loop(run, Counter(), steps=3)
    other.lock()
    for resume in (False, True):
        with pytest.raises(RetryLaterError, match=rf"is trained by another process \(process {os.getpid()} on "):
            loop(run, Counter(), resume=resume)
    assert names(run) == ["step-00000003"]
    other.unlock()
    assert loop(run, Counter(), resume=True) == 0


def test_run_loop_reports_an_exhausted_memory_in_one_line(tmp_path):
    class Large(Counter):
        def step(self, step: int, batch: int) -> dict[str, float]:
            if step == 4:
                raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")
            return super().step(step, batch)

    run = RunFolder(tmp_path)
    expected = (
        f"training is out of memory; a smaller batch_size takes less; the last checkpoint is {run.checkpoint_path(3)}; "
        "go on with --resume auto (DefaultCPUAllocator"
    )
    with pytest.raises(RetryLaterError, match=re.escape(expected)):
        loop(run, Large())
    assert loop(run, Counter(), resume=True) == 0


def test_run_loop_continues_when_metrics_cannot_be_written(tmp_path, capsys, monkeypatch):
    def fail(path: Path, content: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_folder, "append_json_line", fail)
    run = RunFolder(tmp_path)
    assert loop(run, Counter()) == 0
    assert capsys.readouterr().err.count("warning: metrics cannot be written from step 1 on: ") == 1
    assert names(run)[-1] == "step-00000010"


def test_run_loop_prints_a_line_for_each_logged_step_without_a_terminal(tmp_path, capsys):
    loop(RunFolder(tmp_path), Counter(), log_every=4)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("step ")]
    assert [line.split(",")[0] for line in lines] == ["step 1/10", "step 4/10", "step 8/10", "step 10/10"]
    assert re.fullmatch(r"step 1/10, loss 0, \S+ samples/s, .* left", lines[0])
    assert re.fullmatch(r"step 4/10, loss 1\.5, \S+ samples/s, .* left", lines[1]), (
        "the mean since the last logged step"
    )


def test_run_loop_prints_a_line_of_slow_steps_by_time(tmp_path, capsys, monkeypatch):
    """With steps of a minute, the first line of a log came after an hour; metrics keep their interval."""
    monkeypatch.setattr(loop_module, "LINE_SECONDS", 0.0)
    run = RunFolder(tmp_path)
    loop(run, Counter(), log_every=5)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("step ")]
    assert [line.split(",")[0] for line in lines] == [f"step {number}/10" for number in range(1, 11)]
    assert [json.loads(line)["step"] for line in run.metrics.read_text().splitlines() if "loss" in line] == [5, 10]


def test_run_loop_restores_signal_handlers(tmp_path):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    loop(RunFolder(tmp_path), Counter())
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_run_loop_finishes_when_the_signal_comes_in_the_last_step(tmp_path):
    class Interrupted(Counter):
        def step(self, step: int, batch: int) -> dict[str, float]:
            if step == 9:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().step(step, batch)

    assert loop(RunFolder(tmp_path), Interrupted()) == 0
    assert step_of(RunFolder(tmp_path).checkpoints()[-1]) == 10
