"""``cogview generate --input``: lines of the task rerank."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import cogview

FOX, DOG = "一只狐狸在汽车的左边", "蓝色背景上的三只狗"
FILES = ["a.png", "b.png", "c.png", "d.png", "e.png"]


@pytest.fixture
def images(run_command, save_image):
    """Save five images in the current folder."""
    return [save_image(name, number) for number, name in enumerate(FILES)]


@pytest.fixture
def run_lines(run_command, images):
    """Return a function that runs a job of some lines: (status, objects on stdout, stderr)."""

    def run(lines, *arguments):
        Path("job.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        status, printed, err = run_command("generate", "--input", "job.jsonl", *arguments)
        return status, [json.loads(line) for line in printed if line.startswith("{")], err

    return run


def line(prompt, *files, **values):
    return {"task": "rerank", "prompt": prompt, "images": files, **values}


def read_lines(name="job"):
    """Return the lines of the journal, without its header."""
    content = Path(f"outputs/{name}.ledger.jsonl").read_text(encoding="utf-8")
    return [json.loads(one) for one in content.splitlines()[1:]]


def approximately(ranking):
    """Return a ranking whose numbers may differ as those of other batches do."""
    images = [
        {key: pytest.approx(value, rel=1e-4) if key in ("score", "per_piece") else value for key, value in one.items()}
        for one in ranking["images"]
    ]
    return {"prompt": ranking["prompt"], "ranked_by": ranking["ranked_by"], "images": images}


@pytest.mark.parametrize("batch", ["1", "3", "64"])
def test_rerank_lines_give_the_scores_of_the_command_in_any_batch(run_lines, run_command, batch):
    lines = [line(FOX, *FILES, id="fox"), {"prompt": FOX}, line(DOG, "b.png", "a.png", "b.png")]
    status, found, _ = run_lines(lines, "--max-inference-batch-size", batch)
    assert status == 0
    expected = []
    for one in (lines[0], lines[2]):
        _, [printed], _ = run_command("rerank", "--prompt", one["prompt"], *one["images"])
        expected.append(json.loads(printed))
    assert [approximately(ranking) for ranking in found] == expected
    assert [ranking["id"] for ranking in found] == [record["id"] for record in read_lines() if "images" in record]
    records = {record["id"]: record for record in read_lines()}
    assert sorted(records) == ["fox/0", "line 2/0", "line 3/0"]
    assert records["fox/0"] == {"id": "fox/0", "task": "rerank", **found[0]}
    assert records["line 3/0"] == {"id": "line 3/0", "task": "rerank", **found[1]}


def test_rerank_lines_are_read_from_a_table(run_command, images):
    """Names stand in one cell, with | between them, and are relative to the file of the job."""
    Path("jobs").mkdir()
    Path("jobs/job.csv").write_text(f"task,prompt,images\nrerank,{FOX},../a.png|../b.png\n", encoding="utf-8")
    status, [printed], err = run_command("generate", "--input", "jobs/job.csv")
    assert status == 0
    assert [image["file"] for image in json.loads(printed)["images"]] == ["jobs/../a.png", "jobs/../b.png"]
    assert "\ngenerating 1 result\n" in err


def test_rerank_lines_keep_an_unreadable_image_with_an_error_and_try_it_again(run_lines):
    """The other images are ranked; the line counts as failed until all of its images have scores."""
    Path("d.png").write_text("no image")
    lines = [line(FOX, "a.png", "none.png", "d.png", "b.png"), line(DOG, "none.png")]
    status, [found], err = run_lines(lines)
    assert status == 1
    assert sorted(image["rank"] for image in found["images"] if image["rank"]) == [1, 2]
    assert [image.get("error") for image in found["images"]] == [
        None,
        "image none.png does not exist",
        "d.png is no image that can be read; expected PNG, JPEG, WebP, GIF, BMP, TIFF or PPM",
        None,
    ]
    reason = "2 of 4 images cannot be read; the first: image none.png does not exist"
    assert f"skipped: line 1: {reason}\n" in err
    first, second = read_lines()
    assert first == {"id": "line 1/0", "error": reason, "line": 1, "task": "rerank", **found}
    assert second == {
        "id": "line 2/0",
        "error": "1 of 1 images cannot be read; the first: image none.png does not exist",
        "line": 2,
    }
    for name in ("none.png", "d.png"):
        Path(name).write_bytes(Path("c.png").read_bytes())
    status, again, err = run_lines(lines, "--resume")
    assert (status, len(again)) == (0, 2)
    assert [record["id"] for record in read_lines()[2:]] == ["line 1/0", "line 2/0"]
    assert run_lines(lines, "--resume")[:2] == (0, [])


def test_rerank_lines_are_made_again_where_their_record_is_damaged(run_lines):
    lines = [line(FOX, "a.png")]
    _, found, _ = run_lines(lines)
    journal = Path("outputs/job.ledger.jsonl")
    header, record = journal.read_text(encoding="utf-8").splitlines()
    del (facts := json.loads(record))["images"]
    journal.write_text(f"{header}\n{json.dumps(facts)}\n", encoding="utf-8")
    assert run_lines(lines, "--resume")[:2] == (0, found)


def test_rerank_lines_need_weights_for_captions(run_lines, generation_checkpoint):
    status, found, err = run_lines([line(FOX, "a.png"), {"prompt": FOX}], "--model", str(generation_checkpoint))
    assert (status, found) == (1, [])
    assert "skipped: line 1: " in err
    assert "was not trained for the task 'caption'" in err


@pytest.mark.multiprocess
@pytest.mark.slow
def test_rerank_lines_are_shared_by_two_processes(tiny_checkpoint, images):
    """Each line is ranked once."""
    prompts = [FOX, DOG] * 4
    Path("job.jsonl").write_text(
        "".join(json.dumps(line(prompt, *FILES)) + "\n" for prompt in prompts), encoding="utf-8"
    )
    command = [sys.executable, "-m", "cogview", "generate", "--input", "job.jsonl", "--max-inference-batch-size", "5"]
    command += ["--model", str(tiny_checkpoint), "--device", "cpu"]
    environment = os.environ | {"PYTHONPATH": str(Path(cogview.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, env=environment | {"RANK": rank, "WORLD_SIZE": "2"}
        )
        for rank in "01"
    ]
    outputs = [process.communicate(timeout=300)[0].splitlines() for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert sum(map(len, outputs)) == len(prompts)
    assert sorted(record["id"] for record in read_lines()) == [f"line {number}/0" for number in range(1, 9)]
