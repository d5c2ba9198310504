"""Plans and runs of jobs through the library, without the command."""

import json
from pathlib import Path

import pytest

from cogview.errors import InputError
from cogview.jobs.locks import JobLocks
from cogview.jobs.observer import JobObserver
from cogview.jobs.plan import JobPlan, JobSettings
from cogview.jobs.records import JobProblem, JobRecord, read_job
from cogview.jobs.runner import JobRunner

FOX, DOG = "一只狐狸在汽车的左边", "蓝色背景上的三只狗"

# Header and first result of the journal that commit ec4ce5b wrote for OLD_JOB with the embedded model.
OLD_JOB = [
    {"id": "狐狸", "prompt": "蓝色背景上的三只狐狸", "n": 2, "temperature": 0.9, "top_k": 50},
    {"prompt": "一个红苹果", "seed": 3, "guidance": 1.5},
    {"task": "caption", "image": "a.png"},
]
OLD_HEADER = {
    "cogview_job": 1,
    "job": "a4bcd36a2133cb0d78768c5863516ae2ec4555b99c2d02e6b9541d19d861d40b",
    "model": "cogview-emoji",
    "weights": "2b2bbeb11de8ab8a9a0272edf6b4400419e82f29cd25f1434c88abba7e284205",
    "dtype": "float32",
    "kv_dtype": "auto",
    "device": "cpu",
    "sampling": {"generate": {"temperature": 0.3, "top_k": 5, "top_p": 1.0, "guidance": 1.0, "text_attention": 1.0}},
    "seed": 7,
    "n": 1,
    "keep": None,
    "upscale": False,
    "batch": 4,
}
OLD_RESULT = {
    "id": "狐狸/0",
    "task": "generate",
    "prompt": "蓝色背景上的三只狐狸",
    "index": 0,
    "seed": 7,
    "path": "狐狸-seed7-0.png",
    "log_probability": -4.163806270313216,
}


class RecordingObserver(JobObserver):
    """An observer that keeps the names of its events, and the values of some."""

    def __init__(self):
        self.events = []
        self.values = []

    def skipped(self, reason):
        self.events.append("skipped")
        self.values.append(reason)

    def noted(self, message):
        self.events.append("noted")
        self.values.append(message)

    def batch(self, paths):
        self.events.append("batch")
        self.values.append(sorted(path.name for path in paths.values()))

    def progress(self, progress):
        if self.events[-1] != "progress":
            self.events.append("progress")

    def finished(self, request):
        self.events.append("finished")

    def recorded(self, num_results, num_codes):
        self.events.append("recorded")
        self.values.append((num_results, num_codes))

    def saved(self, path, score, facts):
        self.events.append("saved")
        self.values.append(path)

    def captioned(self, caption, image, name):
        self.events.append("captioned")
        self.values.append(image)


@pytest.fixture
def open_job(tmp_path, monkeypatch):
    """A function that plans a job in an empty folder and opens its journal: (plan, journal, locks)."""
    monkeypatch.chdir(tmp_path)
    opened = []

    def open_(model, records, problems=(), source="job.txt", **settings):
        while opened:
            opened.pop().close()
        output = Path("out")
        output.mkdir(exist_ok=True)
        plan = JobPlan(model, JobSettings(source=source, output=output, **settings), records, problems)
        locks = JobLocks(output / "job.ledger.jsonl")
        journal = plan.open_journal(output / "job.ledger.jsonl", locks)
        opened[:] = [locks, journal]
        return plan, journal, locks

    yield open_
    while opened:
        opened.pop().close()


def test_job_runner_reports_events_in_order(open_job, tiny_model, save_image):
    save_image("a.png", size=(80, 64))
    records = [
        JobRecord(number=1, prompt=FOX),
        JobRecord(number=2, task="caption", image=Path("a.png")),
        JobRecord(number=3, task="caption", image=Path("没有.png")),
    ]
    observer = RecordingObserver()
    plan, journal, locks = open_job(tiny_model, records, [JobProblem.of(9, "unknown")], seed=7)
    runner = JobRunner(plan, observer)
    assert runner.prepare(journal) == {"line 1/0": 64, "line 2/0": tiny_model.config.caption_positions}
    report = runner.run(journal, locks)
    assert observer.events == [
        *("skipped", "skipped", "noted", "batch", "progress", "saved", "finished", "captioned", "finished", "recorded"),
    ]
    problem, reason, note, batch, saved, image, recorded = observer.values
    assert problem == "line 9: unknown"
    assert note.startswith("a.png: ")
    assert reason.startswith("line 3: image 没有.png does not exist")
    assert batch == [f"{FOX}-seed7-0.png"]
    assert saved == Path("out", f"{FOX}-seed7-0.png")
    assert saved.is_file()
    assert image == Path("a.png")
    assert recorded == (2, 64 + tiny_model.config.caption_positions)
    assert (report.count, report.missing, report.made, report.left) == (3, 2, 2, 0)
    assert (report.failed, report.skipped) == (1, 1)
    assert journal.outcomes.errors == {
        "line 9": {"error": "unknown", "line": 9},
        "line 3/0": {"error": "image 没有.png does not exist", "line": 3},
    }


def test_job_runner_notes_each_prompt_once_and_a_limited_number(open_job, tiny_model, monkeypatch):
    """A long job of unusable prompts does not fill the terminal; prompts with results already are not noted."""
    monkeypatch.setattr("cogview.jobs.runner.MAX_PROMPT_NOTES", 2)
    prompts = [FOX, "龘狐狸", "龘狐狸", "狸子", "龘狗", "龘汽车"]
    records = [JobRecord(number=number, prompt=prompt) for number, prompt in enumerate(prompts, start=1)]
    plan, journal, locks = open_job(tiny_model, records, seed=7)
    observer = RecordingObserver()
    JobRunner(plan, observer).run(journal, locks)
    notes = [value for value in observer.values if isinstance(value, str)]
    assert notes == [
        *map(tiny_model.prompt_warning, ("龘狐狸", "狸子")),
        "further notes on prompts are left out",
    ]
    again = RecordingObserver()
    JobRunner(plan, again).run(journal, locks)
    assert "noted" not in again.events


def test_job_runner_stops_before_a_chunk_when_requested(open_job, tiny_model):
    plan, journal, locks = open_job(tiny_model, [JobRecord(number=1, prompt=FOX, n=3)], seed=7, max_batch_size=1)
    report = JobRunner(plan).run(journal, locks, stop=lambda: len(journal.done) == 2)
    assert (report.count, report.left) == (3, 1)
    assert list(journal.done) == ["line 1/0", "line 1/1"]


def test_job_plan_inherits_the_seed_of_the_journal(open_job, tiny_model):
    records = [JobRecord(number=1, prompt=FOX)]
    first, _, _ = open_job(tiny_model, records)
    second, _, _ = open_job(tiny_model, records)
    assert second.seed == first.seed
    with pytest.raises(InputError, match="was made with seed"):
        open_job(tiny_model, records, seed=first.seed + 1)


def test_job_plan_splits_chunks_by_requests(open_job, tiny_model):
    """Ranked images of a record stay together, even where they exceed the size of a chunk."""
    records = [JobRecord(number=1, prompt=FOX, n=3), JobRecord(number=2, prompt=DOG)]
    plan, _, _ = open_job(tiny_model, records, seed=7, keep=1)
    assert [[len(item.requests) for item in chunk] for chunk in plan.chunks(2)] == [[3], [1]]
    assert [item.ids for chunk in plan.chunks(4) for item in chunk] == [["line 1/0"], ["line 2/0"]]


def test_job_plan_rejects_a_job_without_a_usable_record(open_job, tiny_model):
    with pytest.raises(InputError, match=r"job\.txt has no line that can be used; the first problem is in line 1: "):
        open_job(tiny_model, [JobRecord(number=1, prompt=DOG * 3)])


def test_job_plan_continues_a_journal_of_an_earlier_version(open_job, save_image):
    """Only the results that the old journal lacks are generated, with the old seed and batch size."""
    from cogview.pipeline.cogview import CogView

    save_image("a.png")
    Path("job.jsonl").write_text("".join(json.dumps(line) + "\n" for line in OLD_JOB))
    save_image("out/狐狸-seed7-0.png")
    Path("out/job.ledger.jsonl").write_text(json.dumps(OLD_HEADER) + "\n" + json.dumps(OLD_RESULT) + "\n")
    records, problems = read_job("job.jsonl")
    model = CogView.from_pretrained("cogview-emoji", device="cpu")
    old = {"temperature": 0.3, "top_k": 5, "min_p": 0.0, "noise_version": 1}
    plan, journal, _ = open_job(model, records, problems, source="job.jsonl", sampling=old)
    header = plan.header() | {"batch": 4, "cogview_job": 1}
    assert header.pop("sampling")["generate"] == {**OLD_HEADER["sampling"]["generate"], **old}
    assert header.pop("adapters") == []
    assert header == {key: value for key, value in OLD_HEADER.items() if key != "sampling"}
    assert journal.header["batch"] == 4
    assert list(plan.missing_codes(journal)) == ["狐狸/1", "line 2/0", "line 3/0"]
    assert [request.index for item in plan.items() for request in item.requests] == [0, 1, 0, 0]


@pytest.mark.parametrize(("key", "value"), [("seed", "七"), ("seed", -1), ("batch", 0), ("batch", [4])])
def test_job_plan_refuses_a_journal_with_a_damaged_header(open_job, tiny_model, key, value):
    """Numbers that no version writes were tracebacks in the middle of the job."""
    records = [JobRecord(number=1, prompt=FOX)]
    open_job(tiny_model, records)
    path = Path("out/job.ledger.jsonl")
    header = json.loads(path.read_text(encoding="utf-8")) | {key: value}
    path.write_text(json.dumps(header) + "\n", encoding="utf-8")
    with pytest.raises(InputError, match=rf"the header of .* is damaged: the {key} must be .*; choose another output"):
        open_job(tiny_model, records)
