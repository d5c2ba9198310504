"""``cogview generate --input``: jobs, their resumption, and processes that share them."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import cogview.pipeline.runner
from cogview.cli.main import main
from cogview.image_io.png import read_metadata
from tests.factories import assert_on_sheet

FOX, DOG = "一只狐狸在汽车的左边", "蓝色背景上的三只狗"
LINES = (
    {"prompt": FOX, "n": 3},
    {"prompt": DOG, "id": "狗"},
    {"task": "caption", "image": "a.png"},
    {"task": "complete", "prompt": FOX, "image": "a.png", "rows": 5, "n": 2},
    {"prompt": "狐狸/狗", "temperature": 0.7, "seed": 3},
    {"prompt": "狐狸?狗", "top_k": 5, "seed": 3},
    {"task": "upscale", "prompt": DOG, "image": "b.png"},
    {"task": "caption", "image": "b.png", "n": 2, "id": "什么"},
    {"prompt": FOX},
    {"prompt": "一个红苹果", "guidance": 2, "text_attention": 1.5},
    {"prompt": "四只狐狸", "n": 2},
    {"prompt": "红色背景上的一只狗"},
)
COUNT = 17  # results
JOB = ("--input", "job.jsonl", "--seed", "7", "--max-inference-batch-size", "4", "-o", "out")


@dataclass(frozen=True)
class Done:
    """Output of a run of the command."""

    folder: Path
    printed: list[str]
    err: str


@pytest.fixture(scope="module")
def whole(tiny_checkpoint, tmp_path_factory):
    """Run a job of all tasks without interruption into the folder ``out`` beside its file and images."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for number, name in enumerate(("a.png", "b.png")):
            waves = np.sin(np.arange(64) * (number + 1) / 9)
            Image.fromarray((np.add.outer(waves, waves) * 60 + 128).astype(np.uint8)).convert("RGB").save(name)
        Path("job.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES), encoding="utf-8")
        out, err = io.StringIO(), io.StringIO()
        with redirect_stdout(out), redirect_stderr(err):
            assert main(["generate", *JOB, "--model", str(tiny_checkpoint), "--device", "cpu"]) == 0
    return Done(folder, out.getvalue().split("\n")[:-1], err.getvalue())


@pytest.fixture
def generate(run_command):
    """Return a function that runs the command: (status, lines of stdout, stderr)."""
    return lambda *arguments: run_command("generate", *arguments)


@pytest.fixture
def job(generate, whole):
    """Copy the files of the job of all tasks into the current folder, without results."""
    for name in ("job.jsonl", "a.png", "b.png"):
        shutil.copy(whole.folder / name, name)


@pytest.fixture
def prompts(generate):
    """Return the arguments of a job of five prompts, one image each."""
    Path("prompts.txt").write_text("\n".join([FOX, DOG, "狐狸", "四只狗", "一个红苹果"]), encoding="utf-8")
    return ("--input", "prompts.txt", "--max-inference-batch-size", "2", "-o", "out")


@pytest.fixture
def start(tiny_checkpoint):
    """Return a function that starts the command in another process."""
    started = []

    def start_(*arguments, **environment):
        command = [sys.executable, "-m", "cogview", "generate", *arguments]
        command += ["--model", str(tiny_checkpoint), "--device", "cpu"]
        inherited = os.environ | {"PYTHONPATH": str(Path(cogview.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=inherited | environment
        )
        started.append(process)
        return process

    yield start_
    for process in started:
        process.kill()
        process.communicate()


def read_journal(folder, name="job", repeated=()):
    """Return the header of a journal, and its results by id; only ``repeated`` ids may stand in several lines."""
    header, *lines = Path(folder, f"{name}.ledger.jsonl").read_text(encoding="utf-8").splitlines()
    records = [record for line in lines if "error" not in (record := json.loads(line))]
    assert [name for name, count in Counter(record["id"] for record in records).items() if count > 1] == list(repeated)
    return json.loads(header), {record["id"]: record for record in records}


def read_errors(folder, name="job"):
    """Return the lines of a journal about failures."""
    lines = map(json.loads, Path(folder, f"{name}.ledger.jsonl").read_text(encoding="utf-8").splitlines())
    return [line for line in lines if "error" in line]


def image_files(folder):
    """Return the bytes of the files in a folder, without the journal."""
    return {path.name: path.read_bytes() for path in Path(folder).iterdir() if ".ledger" not in path.name}


def codes(path):
    return read_metadata(path)["codes"].split()


def expected_codes(image):
    return [str(code) for code in image.codes.flat]


@pytest.mark.slow
def test_generate_job_runs_lines_of_all_tasks(whole, tiny_model, monkeypatch):
    monkeypatch.chdir(whole.folder)
    printed = whole.printed
    # The model comes first, and the number of results before the size of the first batch.
    assert [line.partition(":")[0] for line in whole.err.splitlines()] == [
        f"{tiny_model.name} on cpu, float32 (no GPU is used), seed 7",
        f"generating {COUNT} results",
        "generating",
    ]
    header, records = read_journal("out")
    assert (header["seed"], header["n"], header["batch"], header["model"]) == (7, 1, 4, tiny_model.name)
    assert [record.get("path") for record in records.values()] == [
        *(f"{FOX}-seed7-{number}.png" for number in range(3)),
        "狗-seed7-0.png",
        None,
        "a-rows5-seed7-0.png",
        "a-rows5-seed7-1.png",
        "狐狸_狗-seed3-0.png",
        "狐狸_狗_2-seed3-0.png",
        "b-up-seed7-0.png",
        None,
        None,
        f"{FOX}-seed7-3.png",  # the prompt of the first line, repeated
        "一个红苹果-seed7-0.png",
        "四只狐狸-seed7-0.png",
        "四只狐狸-seed7-1.png",
        "红色背景上的一只狗-seed7-0.png",
    ]
    assert [line for line in printed if not line.startswith("{")] == [
        f"out/{record['path']}" for record in records.values() if "path" in record
    ]
    assert sorted(image_files("out")) == sorted(record["path"] for record in records.values() if "path" in record)

    first, second = (Image.open(name) for name in ("a.png", "b.png"))
    expected = {
        **{f"line 1/{image.index}": image for image in tiny_model.generate(FOX, n=3, seed=7)},
        "狗/0": tiny_model.generate(DOG, seed=7)[0],
        "line 4/1": tiny_model.complete([first], FOX, rows=5, n=2, seed=7)[1],
        "line 5/0": tiny_model.generate("狐狸/狗", seed=3, temperature=0.7)[0],
        "line 7/0": tiny_model.upscale([second], DOG, seed=7)[0],
        "line 9/0": tiny_model.generate(FOX, n=4, seed=7)[3],
        "line 10/0": tiny_model.generate("一个红苹果", seed=7, guidance=2.0, text_attention=1.5)[0],
    }
    for name, image in expected.items():
        assert codes(Path("out", records[name]["path"])) == expected_codes(image)
        assert records[name]["log_probability"] == pytest.approx(image.log_probability, rel=1e-4)
        assert (records[name]["index"], records[name]["seed"]) == (image.index, image.seed)
    texts = read_metadata("out/a-rows5-seed7-1.png")
    assert (texts["task"], texts["source"], texts["rows"], texts["prompt"]) == ("complete", "a.png", "5", FOX)
    captions = [json.loads(line) for line in printed if line.startswith("{")]
    [[caption]] = tiny_model.caption([first])
    [samples] = tiny_model.caption([second], n=2, seed=7, method="sample")
    assert [one["caption"] for one in captions] == [caption.text, *(one.text for one in samples)]
    assert [one["id"] for one in captions] == ["line 3/0", "什么/0", "什么/1"]
    assert [records[one["id"]]["text"] for one in captions] == [one["caption"] for one in captions]


@pytest.mark.multiprocess
@pytest.mark.slow
def test_generate_job_resumes_after_a_kill_with_equal_results(generate, job, start, whole):
    """Files and records equal those of a run without interruption, bit for bit."""
    process = start(*JOB, "--preview")
    path = Path("out/job.ledger.jsonl")
    while not path.exists() or path.read_bytes().count(b"\n") < 4:
        assert process.poll() is None
        time.sleep(0.001)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    before = path.read_bytes()
    there = before.count(b"\n") - 1
    assert 3 <= there < COUNT

    status, printed, err = generate("--input", "job.jsonl", "-o", "out", "--resume")  # the journal holds the seed
    assert status == 0
    assert f"generating {COUNT - there} results\n" in err
    assert len(printed) == COUNT - there
    assert path.read_bytes().startswith(before)
    assert read_journal("out") == read_journal(whole.folder / "out")
    assert image_files("out") == image_files(whole.folder / "out")

    status, printed, err = generate(*JOB, "--resume")
    assert (status, printed) == (0, [])
    assert err.endswith(f"{COUNT} of {COUNT} results exist already\n")


def test_generate_job_repeats_the_batches_of_a_partly_recorded_chunk(generate, job, whole, monkeypatch):
    """Results without a record, and records without a file, are made again in the batches of the whole job."""
    shutil.copytree(whole.folder / "out", "out")
    header, records = read_journal("out")
    path = Path("out/job.ledger.jsonl")
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:2], *lines[3:-2]]))
    Path("out", records["line 1/0"]["path"]).unlink()
    made = []

    def decode(*arguments, **settings):
        made.append(len(arguments[2]))
        return original(*arguments, **settings)

    original = cogview.pipeline.runner.decode
    monkeypatch.setattr(cogview.pipeline.runner, "decode", decode)
    status, printed, _ = generate("--input", "job.jsonl", "-o", "out", "--resume")
    assert status == 0
    assert printed == [f"out/{records[name]['path']}" for name in ("line 1/0", "line 1/1", "line 11/1", "line 12/0")]
    assert made == [4, 4, 1]
    assert read_journal("out", repeated=["line 1/0"]) == (header, records)
    assert image_files("out") == image_files(whole.folder / "out")


@pytest.mark.multiprocess
@pytest.mark.slow
def test_generate_job_is_shared_by_several_processes(generate, prompts, start):
    """They need neither --resume nor the seed; each result is generated and printed once."""
    processes = [start(*prompts, RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank)) for rank in range(2)]
    outputs = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    printed = [line for out, _ in outputs for line in out.splitlines()]
    assert outputs[1][1] == ""  # notes about the whole job are printed by one process
    header, records = read_journal("out", "prompts")
    assert f"seed {header['seed']}\n" in outputs[0][1]
    assert sorted(printed) == sorted(f"out/{record['path']}" for record in records.values())
    generate(*prompts, "-o", "alone", "--seed", str(header["seed"]))
    assert read_journal("alone", "prompts") == (header, records)
    assert image_files("alone") == image_files("out")


@pytest.mark.parametrize(("number", "expected"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize(
    ("signals", "done", "message"),
    [
        (1, 4, "stopped: 1 of 5 results are left; --resume continues\n"),
        (2, 2, "cogview generate: interrupted; finished results are kept\n"),
    ],
)
def test_generate_job_finishes_the_chunk_on_the_first_interruption(
    generate, prompts, monkeypatch, signals, done, message, number, expected
):
    """The status is 128 + the signal, so that a service knows its own stop from a user's."""
    decode, calls = cogview.pipeline.runner.decode, []

    def interrupted_decode(*arguments, **settings):
        calls.append(1)
        if len(calls) == 2:
            for _ in range(signals):
                os.kill(os.getpid(), number)
        return decode(*arguments, **settings)

    monkeypatch.setattr(cogview.pipeline.runner, "decode", interrupted_decode)
    status, printed, err = generate(*prompts)
    assert (status, len(printed), len(read_journal("out", "prompts")[1])) == (expected, done, done)
    assert err.endswith(message)
    status, printed, _ = generate(*prompts, "--resume")
    assert (status, len(printed)) == (0, 5 - done)


@pytest.mark.multiprocess
@pytest.mark.slow
def test_generate_job_ends_with_143_after_sigterm(generate, job, start, whole):
    """A service stops a job: no advice about a keyboard, and the same command goes on later."""
    process = start(*JOB)
    path = Path("out/job.ledger.jsonl")
    while not path.exists() or path.read_bytes().count(b"\n") < 2:
        assert process.poll() is None
        time.sleep(0.001)
    process.terminate()
    printed, err = process.communicate(timeout=300)
    done = len(printed.splitlines())
    assert process.returncode == 143
    assert "finishing this batch; a second SIGTERM stops at once\n" in err
    assert "Ctrl-C" not in err
    assert err.endswith(f"stopped: {COUNT - done} of {COUNT} results are left; --resume continues\n")
    status, again, _ = generate(*JOB, "--resume")
    assert (status, len(again)) == (0, COUNT - done)
    assert read_journal("out") == read_journal(whole.folder / "out")


def test_generate_job_keeps_finished_results_when_the_disk_is_full(generate, prompts, monkeypatch, disk_for_two_images):
    status, printed, err = generate(*prompts)
    assert (status, len(printed)) == (3, 2)
    assert err.endswith(
        "cogview generate: the disk is full: 2 results are kept; --resume continues when there is space\n"
    )
    assert sorted(image_files("out")) == sorted(record["path"] for record in read_journal("out", "prompts")[1].values())


def test_generate_job_ranks_upscales_and_writes_a_contact_sheet(generate, tiny_model):
    lines = [{"prompt": FOX}, {"prompt": "狐狸", "n": 1, "top_k": 50}]
    Path("job.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    arguments = ("--input", "job.jsonl", "--seed", "7", "-n", "2", "--keep", "1", "--upscale", "--grid")
    status, printed, _ = generate(*arguments, "--max-inference-batch-size", "2")
    assert status == 0
    header, records = read_journal("outputs")
    best = [*tiny_model.generate(FOX, n=2, keep=1, seed=7), *tiny_model.generate("狐狸", seed=7, top_k=50)]
    names = ["line 1/0", "line 2/0"]
    assert sorted(records) == sorted([*names, *(f"{name}/up" for name in names)])
    for name, small in zip(names, best, strict=True):
        assert records[name]["path"] == f"{small.prompt}-seed7-best1-{small.index}.png"
        assert (records[name]["rank"], read_metadata(Path("outputs", records[name]["path"]))["rank"]) == (1, "1")
        assert f"outputs/{records[name]['path']}\t{records[name]['score']:.3f}" in printed
        score = tiny_model.score([small], small.prompt, by="both")[0].log_probability
        assert records[name]["score"] == pytest.approx(score, rel=1e-4)
        assert codes(Path("outputs", records[name]["path"])) == expected_codes(small)
        assert records[f"{name}/up"]["path"] == f"{small.prompt}-seed7-best1-{small.index}-up.png"
    large = Path("outputs", records["line 2/0/up"]["path"])
    assert codes(large) == expected_codes(tiny_model.upscale(best[1:], "狐狸", seed=7, top_k=50)[0])
    assert read_metadata(large)["source"] == records["line 2/0"]["path"]
    assert printed[-1] == "outputs/grid-seed7.png"
    assert_on_sheet(printed[-1], [Path("outputs", records[name]["path"]) for name in names])

    before = image_files("outputs")
    large.unlink()
    path = Path("outputs/job.ledger.jsonl")
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))  # without the last upscaled image
    assert generate(*arguments, "--resume")[1] == [str(large), "outputs/grid-seed7.png"]
    assert read_journal("outputs") == (header, records)
    assert image_files("outputs") == before


def test_generate_job_overwrites_no_other_image(generate, save_image):
    Path("prompts.txt").write_text(f"{FOX}\n", encoding="utf-8")
    save_image(f"outputs/{FOX}-seed7-0.png")
    before = Path(f"outputs/{FOX}-seed7-0.png").read_bytes()
    _, [printed], _ = generate("--input", "prompts.txt", "--seed", "7")
    assert printed == f"outputs/{FOX}-seed7-0_2.png"
    assert read_journal("outputs", "prompts")[1]["line 1/0"]["path"] == f"{FOX}-seed7-0_2.png"
    assert Path(f"outputs/{FOX}-seed7-0.png").read_bytes() == before


@pytest.mark.parametrize("suffix", ["txt", "csv", "tsv"])
def test_generate_job_reads_prompts_from_a_file(generate, suffix):
    head = "" if suffix == "txt" else "prompt\r\n"
    Path(f"prompts.{suffix}").write_bytes(
        f"\ufeff{head}{FOX}\r\n\r\n  {DOG}  \r\n".encode()
    )  # with the byte-order mark and line ends of Windows
    status, printed, _ = generate("--input", f"prompts.{suffix}", "--seed", "7")
    assert (status, printed) == (0, [f"outputs/{prompt}-seed7-0.png" for prompt in (FOX, DOG)])


def test_generate_job_reads_prompts_from_standard_input(generate, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(f"{FOX}\n{DOG}".encode())))
    _, printed, _ = generate("--input", "-", "--seed", "7")
    assert printed == [f"outputs/{prompt}-seed7-0.png" for prompt in (FOX, DOG)]
    assert len(read_journal("outputs", "stdin")[1]) == 2


def test_generate_job_skips_lines_that_cannot_be_used(generate, save_image):
    save_image("a.png")
    lines = [
        {"prompt": DOG * 3},
        {"prompt": FOX},
        {"prompt": FOX, "temprature": 2},
        {"task": "complete", "prompt": FOX, "image": "a.png", "rows": 8},
        {"task": "caption", "image": "none.png", "id": "什么"},
        {"task": "caption", "image": "a.png", "guidance": 2},
        {"task": "upscale", "prompt": FOX, "image": "none.png", "n": 2},
    ]
    Path("job.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    too_long = f"the prompt “{(DOG * 3)[:20]}…” is 27 pieces long, 20 fit; shorten it"
    expected = [
        (3, "line 3", '"temprature" is unknown; did you mean "temperature"?'),
        (1, "line 1", too_long),
        (4, "line 4", "the rows to keep must be from 0 to 7, got 8"),
        (6, "line 6", "guidance cannot be set for captions"),
        (5, "什么/0", "image none.png does not exist"),
        (7, "line 7/0", "image none.png does not exist"),
    ]
    errors = [{"id": name, "error": error, "line": number} for number, name, error in expected]
    errors.append({"id": "line 7/1", "error": "image none.png does not exist", "line": 7})
    for again in ([], ["--resume"]):
        status, printed, err = generate("--input", "job.jsonl", "--seed", "7", *again)
        assert (status, printed) == (1, [] if again else [f"outputs/{FOX}-seed7-0.png"])
        shown = err.splitlines()
        assert shown[1:7] == [f"skipped: line {number}: {error}" for number, _, error in expected]
        assert shown[7:] == ["generating 1 result"] * (not again) + [
            "failed or skipped: 7, with reasons in outputs/job.ledger.jsonl; --resume tries again"
        ]
        assert read_errors("outputs") == errors


def test_generate_job_tries_failed_results_again(generate, save_image):
    """The image of a line was damaged or missing; after it is mended, --resume makes the result."""
    save_image("a.png")
    Path("b.png").write_bytes(Path("a.png").read_bytes()[:150])
    lines = [{"task": "caption", "image": name} for name in ("a.png", "b.png", "c.png")]
    Path("job.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    status, printed, err = generate("--input", "job.jsonl", "--max-inference-batch-size", "1")
    assert (status, len(printed)) == (1, 1)
    assert "\ngenerating 2 results\n" in err  # the header of b.png is whole
    assert {error["id"]: error["error"].partition(":")[0] for error in read_errors("outputs")} == {
        "line 2/0": "b.png is cut off or damaged",
        "line 3/0": "image c.png does not exist",
    }
    for name in ("b.png", "c.png"):
        shutil.copy("a.png", name)
    status, printed, err = generate("--input", "job.jsonl", "--resume")
    assert (status, len(printed)) == (0, 2)
    assert "failed" not in err
    assert list(read_journal("outputs")[1]) == ["line 1/0", "line 2/0", "line 3/0"]
    assert generate("--input", "job.jsonl", "--resume")[0] == 0


def test_generate_job_fails_when_nothing_can_be_made(generate):
    """A service must not take this for a job that is partly done."""
    Path("job.jsonl").write_text('{"task": "caption", "image": "none.png"}\n', encoding="utf-8")
    for again in ([], ["--resume"]):
        status, printed, err = generate("--input", "job.jsonl", *again)
        assert (status, printed) == (2, [])
        assert "skipped: line 1: image none.png does not exist\n" in err
        assert "generating" not in err


def test_generate_job_waits_for_images_that_other_lines_make(generate):
    """The image of the second line exists when its turn comes."""
    lines = [{"id": "fox", "prompt": FOX}, {"task": "caption", "image": "outputs/fox-seed7-0.png"}]
    Path("job.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    arguments = ("--input", "job.jsonl", "--seed", "7", "--max-inference-batch-size", "1")
    status, printed, _ = generate(*arguments)
    assert (status, len(printed)) == (0, 2)


@pytest.mark.parametrize("kind", ["missing", "empty", "parent", "absolute", "inside", "link", "none", "number"])
def test_generate_job_makes_a_result_again_when_its_file_cannot_count(generate, save_image, kind):
    """A record that leads out of the output folder, or to no image, is no result; nothing outside is touched."""
    Path("prompts.txt").write_text(f"{FOX}\n{DOG}\n", encoding="utf-8")
    arguments = ("--input", "prompts.txt", "--seed", "7", "-o", "out")
    fox, _ = generate(*arguments)[1]
    before = image_files("out")
    journal = Path("out/prompts.ledger.jsonl")
    header, first, second = journal.read_text(encoding="utf-8").splitlines()
    facts = json.loads(first)
    outside = Path("outside.png")
    shutil.copy(fox, outside)
    untouched = outside.read_bytes()
    if kind in ("missing", "empty", "link"):
        Path(fox).unlink()
    if kind == "empty":
        Path(fox).touch()
    elif kind == "link":
        Path(fox).symlink_to(outside.resolve())
    elif kind == "none":
        del facts["path"]
    elif kind != "missing":
        absolute = {"absolute": str(outside.resolve()), "inside": str(Path(fox).resolve())}
        facts["path"] = ({"parent": "../outside.png", "number": 7} | absolute)[kind]
    journal.write_text("\n".join([header, json.dumps(facts), second, ""]), encoding="utf-8")

    status, printed, err = generate(*arguments, "--resume")
    assert (status, printed) == (0, [fox])
    assert err.splitlines()[1].startswith(
        "note: 1 recorded result cannot be used and will be made again; the first, line 1/0: its "
    )
    assert image_files("out") == before
    assert not Path(fox).is_symlink()
    assert outside.read_bytes() == untouched
    assert sorted(os.listdir()) == ["out", "outside.png", "prompts.txt"]
    assert generate(*arguments, "--resume")[1:] == ([], err.splitlines()[0] + "\n2 of 2 results exist already\n")


def test_generate_job_upscales_inside_the_output_folder_only(generate):
    """The upscaled image is written beside the small one, wherever the journal says that this is."""
    Path("prompts.txt").write_text(f"{FOX}\n", encoding="utf-8")
    arguments = ("--input", "prompts.txt", "--seed", "7", "-o", "out", "--upscale")
    _, [small, large], _ = generate(*arguments)
    shutil.copy(small, "outside.png")
    Path(large).unlink()
    journal = Path("out/prompts.ledger.jsonl")
    header, first, _ = journal.read_text(encoding="utf-8").splitlines()
    first = json.dumps(json.loads(first) | {"path": "../outside.png"})
    journal.write_text(f"{header}\n{first}\n", encoding="utf-8")
    status, printed, _ = generate(*arguments, "--resume")
    assert (status, printed) == (0, [small, large])
    assert sorted(os.listdir()) == ["out", "outside.png", "prompts.txt"]


def test_generate_job_skips_tasks_that_the_model_lacks(generate, job, generation_checkpoint):
    status, printed, err = generate("--input", "job.jsonl", "--model", str(generation_checkpoint))
    assert (status, len(printed)) == (1, 12)
    skipped = [line for line in err.splitlines() if line.startswith("skipped: ")]
    assert [line.split(": ")[1] for line in skipped] == [f"line {number}" for number in (3, 7, 8, 10)]
    assert "was not trained for the task 'caption'" in skipped[0]


def test_generate_job_resumes_only_an_equal_job(generate):
    Path("prompts.txt").write_text(f"{FOX}\n", encoding="utf-8")
    generate("--input", "prompts.txt", "--seed", "7")
    before = image_files("outputs")
    path = Path("outputs/prompts.ledger.jsonl")
    for arguments, message in [
        ([], f"{path} exists from an earlier run: continue it with --resume, or choose another output folder"),
        (["--resume", "--seed", "8"], f"{path} was made with seed 7, now with seed 8: "),
        (["--resume", "-n", "2"], f"{path} was made with n 1, now with n 2: "),
        (["--resume", "--top-k", "9"], f"{path} was made with sampling "),
        (["--resume", "--kv-dtype", "int8"], f'{path} was made with --kv-dtype "auto", now with --kv-dtype "int8": '),
    ]:
        status, printed, err = generate("--input", "prompts.txt", *arguments)
        assert (status, printed) == (2, [])
        assert err.startswith(f"cogview generate: {message}")
        assert err.count("\n") == 1
    Path("prompts.txt").write_text(f"{FOX}\n{DOG}\n", encoding="utf-8")
    assert f"{path} was made from other lines than the job " in generate("--input", "prompts.txt", "--resume")[2]
    assert image_files("outputs") == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--input", "没有.txt"], "cannot read 没有.txt: No such file or directory"),
        (["--input", "latin.txt"], "latin.txt is not UTF-8: byte 1 in line 1 is 0xe2"),
        (["--input", "blank.txt"], "blank.txt is empty: expected a prompt per line"),
        (["--input", "a.png"], 'a.png: the suffix ".png" is unknown; known: '),
        (
            ["--input", "long.txt"],
            "long.txt has no line that can be used; the first problem is in line 1: the ",
        ),
        ([FOX, "--input", "fox.txt"], "--input holds the prompts: give either --input or PROMPT…"),
        (["--input", "fox.txt", "-n", "1001", "--grid"], "--grid writes one sheet of at most 1000 images, got 1001"),
        (["--input", "fox.txt", "--keep", "2"], "--keep must be from 1 to 1, the images per prompt (-n), "),
        (["--input", "fox.txt", "--temperature", "nan"], "temperature must be above 0, got nan; "),
        (["--input", "fox.txt", "-o", "fox.txt"], "the output folder fox.txt cannot be written: "),
    ],
)
def test_generate_job_reports_mistakes_in_one_line(generate, arguments, message):
    Path("a.png").touch()
    Path("latin.txt").write_bytes("gâteau".encode("latin-1"))
    Path("blank.txt").write_text("\n \n")
    Path("fox.txt").write_text(FOX, encoding="utf-8")
    Path("long.txt").write_text(DOG * 3, encoding="utf-8")
    status, printed, err = generate(*arguments)
    assert (status, printed) == (2, [])
    assert err.startswith(f"cogview generate: {message}")
    assert err.count("\n") == 1


def test_generate_job_refuses_to_make_an_image_smaller_by_upscaling(generate, save_image):
    save_image("photo.jpg", size=(512, 600))
    Path("job.jsonl").write_text(
        f'{{"task": "upscale", "prompt": "{FOX}", "image": "photo.jpg"}}\n{{"prompt": "{FOX}"}}\n', encoding="utf-8"
    )
    status, files, err = generate("--input", "job.jsonl", "--seed", "7")
    assert status != 0
    assert len(files) == 1
    assert "line 1: image photo.jpg: 512 x 600 pixels are more than the 128 x 128 of an upscaled image" in err
