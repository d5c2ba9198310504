"""The journal of a job: recorded results, headers and damaged files."""

import errno
import json
import logging
import os
import shutil

import pytest

from cogview.checkpoints.fingerprint import fingerprint
from cogview.errors import InputError
from cogview.files import write_json
from cogview.jobs.journal import DiskFull, JobJournal
from cogview.jobs.locks import JobLocks
from tests.factories import input_error

HEADER = {"model": "cogview-emoji", "seed": 7, "sampling": {"top_k": 100, "temperature": 0.9}}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "job.ledger"


@pytest.fixture
def open_journal(path):
    """Return a function that opens the journal as a new process does after all others have ended."""
    opened = []

    def open_(header=HEADER, **settings):
        for thing in opened:
            thing.close()
        locks = JobLocks(path)
        opened[:] = [locks]
        journal = JobJournal.open(path, header, locks=locks, **{"resume": True} | settings)
        opened.append(journal)
        return journal

    yield open_
    for thing in opened:
        thing.close()


def test_journal_returns_recorded_results(open_journal, path):
    journal = open_journal(resume=False)
    assert (journal.header, journal.done) == (HEADER, {})
    journal.record("狐狸", file="一只狐狸.png", log_probability=-1.5)
    journal.record("狗")
    done = {"狐狸": {"file": "一只狐狸.png", "log_probability": -1.5}, "狗": {}}
    assert journal.done == done
    again = open_journal()
    assert (again.header, again.done) == (HEADER, done)
    assert path.read_text(encoding="utf-8").splitlines() == [
        json.dumps({"cogview_job": 2} | HEADER),
        '{"id": "狐狸", "file": "一只狐狸.png", "log_probability": -1.5}',
        '{"id": "狗"}',
    ]
    assert sorted(os.listdir(path.parent)) == ["job.ledger", "job.ledger.lock"]


def test_journal_records_an_error_until_its_id_has_a_result(open_journal, path):
    """A failed item is tried again by the next run, and skipped by the processes of this one."""
    journal = open_journal(resume=False)
    journal.record_error("狗", "image a.png does not exist", line=3)
    assert (journal.has_failed("狗"), dict(journal.done)) == (True, {})
    assert path.read_text(encoding="utf-8").splitlines()[1:] == [
        '{"id": "狗", "error": "image a.png does not exist", "line": 3}'
    ]
    again = open_journal()
    assert not again.has_failed("狗")
    assert again.outcomes.errors == {"狗": {"error": "image a.png does not exist", "line": 3}}
    again.record("狗", path="狗.png")
    last = open_journal()
    assert (last.done, last.outcomes.errors) == ({"狗": {"path": "狗.png"}}, {})


def test_journal_repeats_no_error_that_stands_there_already(open_journal, path):
    """A job that is resumed again and again, or shared by many processes, has each reason once."""
    open_journal().record_error("狗", "image a.png does not exist", line=3)
    again, other = open_journal(), JobJournal(path, JobLocks(path))
    for journal in (again, other):
        journal.record_error("狗", "image a.png does not exist", line=3)
        assert journal.has_failed("狗")
    other.close()
    assert path.read_text(encoding="utf-8").count("error") == 1
    again.record_error("狗", "a.png is empty, expected an image", line=3)
    assert path.read_text(encoding="utf-8").count("error") == 2


def test_journal_learns_the_errors_of_other_processes(open_journal, path):
    journal, other = open_journal(), JobJournal(path, JobLocks(path))
    other.record_error("狐狸", "image a.png does not exist")
    assert not journal.has_failed("狐狸")
    journal.refresh()
    assert journal.has_failed("狐狸")
    other.record("狐狸")
    journal.refresh()
    assert (journal.has_failed("狐狸"), list(journal.done)) == (False, ["狐狸"])
    other.close()


def test_journal_leaves_out_results_that_cannot_be_used(open_journal, path):
    journal = open_journal()
    for name in ("狐狸", "狗"):
        journal.record(name, path=f"{name}.png")
    again = open_journal(problem_of=lambda name, facts: f"no {facts['path']}" if name == "狗" else None)
    assert (list(again.done), again.outcomes.lost) == (["狐狸"], {"狗": "no 狗.png"})
    again.record("狗", path="狗_2.png")
    assert again.outcomes.lost == {}


def test_journal_continues_one_of_the_first_format(open_journal, path):
    """Journals of earlier versions hold results alone."""
    path.write_text(json.dumps({"cogview_job": 1} | HEADER) + '\n{"id": "狐狸"}\n', encoding="utf-8")
    journal = open_journal()
    assert (list(journal.done), journal.outcomes.errors) == (["狐狸"], {})


def test_journal_records_file_names_that_are_not_utf8(open_journal):
    open_journal().record("狗", file=os.fsdecode(b"\xb9\xb7.png"))
    assert os.fsencode(open_journal().done["狗"]["file"]) == b"\xb9\xb7.png"


def test_journal_refresh_reads_results_of_other_processes(open_journal, path):
    journal, other = open_journal(), JobJournal(path, JobLocks(path))
    other.record("狐狸", n=1)
    assert journal.done == {}
    journal.refresh()
    assert journal.done == {"狐狸": {"n": 1}}
    journal.record("狗")
    journal.refresh()
    other.refresh()
    assert list(journal.done) == list(other.done) == ["狐狸", "狗"]
    other.close()


@pytest.mark.parametrize(("size", "minutes", "joins"), [("2", 0, True), ("2", -1, False), ("1", 0, False)])
def test_journal_is_joined_late_by_a_process_of_the_same_launch(open_journal, path, monkeypatch, size, minutes, joins):
    """The others of two processes may have finished the job before one of them has imported PyTorch."""
    open_journal().record("狐狸")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", size)
    monkeypatch.setattr("cogview.process_variables.STARTED", path.stat().st_mtime - 60 * minutes - 1)
    if joins:
        assert list(open_journal(resume=False).done) == ["狐狸"]
    else:
        assert "exists from an earlier run" in input_error(lambda: open_journal(resume=False))


def test_journal_refuses_an_existing_file_without_resume(open_journal, path):
    open_journal()
    with pytest.raises(InputError) as error:
        open_journal(resume=False)
    assert str(error.value) == (
        f"{path} exists from an earlier run: continue it with --resume, or choose another output folder"
    )


@pytest.mark.parametrize(
    ("changed", "was", "now"),
    [
        ({"seed": 8}, "seed 7", "seed 8"),
        ({"model": "图画", "seed": 8}, 'model "cogview-emoji"', 'model "图画"'),
        ({"batch_size": 4}, "no batch_size", "batch_size 4"),
        (
            {"sampling": {"top_k": 100, "temperature": 1}},
            'sampling {"temperature": 0.9, "top_k": 100}',
            'sampling {"temperature": 1, "top_k": 100}',
        ),
    ],
)
def test_journal_refuses_another_job(open_journal, path, changed, was, now):
    open_journal()
    before = path.read_bytes()
    with pytest.raises(InputError) as error:
        open_journal(HEADER | changed)
    assert str(error.value) == (
        f"{path} was made with {was}, now with {now}: give the same, or choose another output folder"
    )
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("stored", "given", "difference"),
    [
        ({"adapters": []}, {"adapters": ["ink:0.5"]}, "with no adapters, now with the adapters ink:0.5"),
        ({"adapters": ["ink", "oil"]}, {"adapters": []}, "with the adapters ink, oil, now with no adapters"),
        (
            {"adapters": ["ink"]},
            {"adapters": ["ink"]},
            "with other weights than now, of the model or of the adapters ink",
        ),
        ({"adapters": []}, {"adapters": []}, "with other weights of the model than now"),
        ({}, {"adapters": []}, "with other weights than now, of the model or of an adapter"),
    ],
)
def test_journal_names_adapters_whose_digests_differ(open_journal, path, stored, given, difference):
    open_journal(HEADER | {"weights": "beef" * 16} | stored)
    with pytest.raises(InputError) as error:
        open_journal(HEADER | {"weights": "c0de" * 16} | given)
    assert str(error.value) == f"{path} was made {difference}: give the same, or choose another output folder"


def test_journal_continues_with_adapters_of_other_names_and_equal_weights(open_journal):
    header = HEADER | {"weights": "beef" * 16, "adapters": ["ink"]}
    open_journal(header)
    assert open_journal(header | {"adapters": ["elsewhere/ink"]}).header == header


def test_journal_shows_no_digest_of_a_changed_job_file(open_journal, path):
    open_journal(HEADER | {"job": "beef" * 16})
    with pytest.raises(InputError, match="was made from other lines than the job file has now: give the same"):
        open_journal(HEADER | {"job": "c0de" * 16})


def test_journal_inherits_keys_of_an_existing_header(open_journal):
    open_journal()
    assert open_journal(HEADER | {"seed": 8}, inherit_keys=["seed"]).header == HEADER
    with pytest.raises(InputError, match="made with no batch_size, now with batch_size 4"):
        open_journal(HEADER | {"batch_size": 4}, inherit_keys=["batch_size"])


@pytest.mark.parametrize("content", ["", "一只狐狸\n", '["狗"]\n', '{"id": "狗"}\n'])
def test_journal_refuses_a_file_that_is_not_a_journal(open_journal, path, content):
    path.write_text(content, encoding="utf-8")
    with pytest.raises(InputError) as error:
        open_journal()
    assert str(error.value) == f"{path} is not the journal of a job; move it away, or choose another output folder"
    assert path.read_text(encoding="utf-8") == content


def test_journal_refuses_a_newer_format(open_journal, path):
    path.write_text('{"cogview_job": 3}\n')
    with pytest.raises(InputError, match="has format 3, this version of cogview knows 2: update cogview"):
        open_journal()


def test_journal_ignores_a_line_that_was_cut_off(open_journal, path, caplog):
    """After a power cut within a line, its result is missing; results after it are kept."""
    open_journal().record("狐狸")
    with path.open("ab") as file:
        file.write('{"id": "狗", "file": "蓝色'.encode()[:-1])
    journal = open_journal()
    assert list(journal.done) == ["狐狸"]
    assert caplog.text == ""
    journal.record("狗")
    journal.record("苹果")
    assert list(open_journal().done) == ["狐狸", "狗", "苹果"]
    assert [record.getMessage() for record in caplog.records] == [f"line 3 of {path} is damaged and is ignored"]


def test_journal_accepts_a_last_line_without_newline(open_journal, path):
    """Some editors remove the last newline."""
    open_journal().record("狐狸")
    path.write_bytes(path.read_bytes().rstrip(b"\n"))
    journal = open_journal()
    assert list(journal.done) == ["狐狸"]
    journal.record("狗")
    assert list(open_journal().done) == ["狐狸", "狗"]


@pytest.mark.parametrize("broken", [b"\0\0\0\0", b"[1]", b"7", b'{"file": "a.png"}', b'{"id": ["a"]}', b"\xb9\xb7"])
def test_journal_ignores_a_damaged_line_with_a_warning(open_journal, path, caplog, broken):
    open_journal().record("狐狸")
    path.write_bytes(path.read_bytes() + b"\n" + broken + b'\n{"id": "a"}\n')
    with caplog.at_level(logging.WARNING):
        journal = open_journal()
        journal.refresh()
    assert list(journal.done) == ["狐狸", "a"]
    assert [record.getMessage() for record in caplog.records] == [f"line 4 of {path} is damaged and is ignored"]


@pytest.mark.parametrize(("code", "kind"), [(None, DiskFull), (errno.EDQUOT, DiskFull), (errno.EIO, OSError)])
@pytest.mark.parametrize("torn", [False, True])
def test_journal_leaves_complete_lines_when_the_disk_is_full(open_journal, path, monkeypatch, code, kind, torn):
    journal = open_journal()
    journal.record("狐狸")
    if torn:
        path.write_bytes(path.read_bytes()[:-1])
    before, write, fails = path.read_bytes(), os.write, True

    def write_until_full(file, content):
        if not fails:
            return write(file, content)
        if code is not None:
            write(file, content[:5])
            raise OSError(code, os.strerror(code))
        return write(file, content[:5])

    monkeypatch.setattr("cogview.jobs.journal.os.write", write_until_full)
    with pytest.raises(kind) as error:
        journal.record("狗")
    if kind is DiskFull:
        reason = "the disk quota is used up" if code == errno.EDQUOT else "the disk is full"
        assert str(error.value) == f"{reason}: 1 result is kept; --resume continues when there is space"
    assert path.read_bytes() == before
    fails = False
    journal.record("狗")
    assert list(journal.done) == list(open_journal().done) == ["狐狸", "狗"]


def test_journal_leaves_no_file_when_it_cannot_be_created(open_journal, path, monkeypatch):
    def replace(source, target):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(OSError, match="No space left"):
        open_journal()
    assert os.listdir(path.parent) == ["job.ledger.lock"]


@pytest.mark.parametrize("name", ["config.json", "text.model", "model.safetensors", "image/model.safetensors"])
def test_journal_fingerprint_depends_on_every_file(tiny_checkpoint, tmp_path, name):
    copy = shutil.copytree(tiny_checkpoint, tmp_path / "copy")
    assert fingerprint(copy) == fingerprint(tiny_checkpoint)
    content = bytearray((copy / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copy / name).write_bytes(content)
    assert fingerprint(copy) != fingerprint(tiny_checkpoint)


@pytest.mark.parametrize(
    ("key", "value"),
    [("reconstruction_psnr", {"p01": 24.0, "p05": 26.0, "median": 31.0}), ("full_mask_rate", 0.5)],
)
def test_journal_fingerprint_ignores_facts_of_the_training(tiny_checkpoint, tmp_path, key, value):
    """A job that was begun before a fact was written down can be resumed: no image depends on it."""
    copy = shutil.copytree(tiny_checkpoint, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text("utf-8"))
    config[key] = value
    write_json(copy / "config.json", config)
    assert fingerprint(copy) == fingerprint(tiny_checkpoint)


def test_journal_fingerprint_of_a_large_file_covers_size_header_and_blocks(tiny_checkpoint, tmp_path):
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "copy")
    size, header = 1 << 30, 1 << 20  # a sparse file

    def changed(offset=None, size=size):
        with (folder / "model.safetensors").open("wb") as file:
            file.write(header.to_bytes(8, "little"))
            file.truncate(size)
            if offset is not None:
                file.seek(offset)
                file.write(b"x")
        return fingerprint(folder)

    same = changed()
    assert changed() == same
    step = (size - (1 << 16)) / 63
    for offset in (8 + header - 1, round(31 * step) + 1000, size - 1):
        assert changed(offset) != same
    assert changed(size=size + 1) != same
    assert changed(round(31.5 * step)) == same  # which lies between two blocks
