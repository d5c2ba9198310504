"""The ledger: what of a job is done, after whatever happened to the file."""

import errno
import json
import logging
import os
import shutil

import pytest

from cogview.errors import InputError
from cogview.jobs.journal import DiskFull, JobJournal, fingerprint
from cogview.jobs.locks import JobLocks

HEADER = {"model": "cogview-emoji", "seed": 7, "sampling": {"top_k": 100, "temperature": 0.9}}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "job.ledger"


@pytest.fixture
def open_ledger(path):
    """A function that opens the ledger as a process does that begins when all others are gone."""
    opened = []

    def open_(header=HEADER, **settings):
        for thing in opened:
            thing.close()
        claims = JobLocks(path)
        opened[:] = [claims]
        ledger = JobJournal.open(path, header, locks=claims, **{"resume": True} | settings)
        opened.append(ledger)
        return ledger

    yield open_
    for thing in opened:
        thing.close()


def test_journal_returns_recorded_results(open_ledger, path):
    ledger = open_ledger(resume=False)
    assert (ledger.header, ledger.done) == (HEADER, {})
    ledger.record("狐狸", file="一只狐狸.png", log_probability=-1.5)
    ledger.record("狗")
    done = {"狐狸": {"file": "一只狐狸.png", "log_probability": -1.5}, "狗": {}}
    assert ledger.done == done
    again = open_ledger()
    assert (again.header, again.done) == (HEADER, done)
    assert path.read_text(encoding="utf-8").splitlines() == [
        json.dumps({"cogview_job": 1} | HEADER),
        '{"id": "狐狸", "file": "一只狐狸.png", "log_probability": -1.5}',
        '{"id": "狗"}',
    ]
    assert sorted(os.listdir(path.parent)) == ["job.ledger", "job.ledger.lock"]


def test_journal_records_file_names_that_are_not_utf8(open_ledger):
    open_ledger().record("狗", file=os.fsdecode(b"\xb9\xb7.png"))
    assert os.fsencode(open_ledger().done["狗"]["file"]) == b"\xb9\xb7.png"


def test_journal_refresh_reads_results_of_other_processes(open_ledger, path):
    ledger, other = open_ledger(), JobJournal(path, JobLocks(path))
    other.record("狐狸", n=1)
    assert ledger.done == {}
    ledger.refresh()
    assert ledger.done == {"狐狸": {"n": 1}}
    ledger.record("狗")
    ledger.refresh()
    other.refresh()
    assert list(ledger.done) == list(other.done) == ["狐狸", "狗"]
    other.close()


def test_journal_refuses_an_existing_file_without_resume(open_ledger, path):
    open_ledger()
    with pytest.raises(InputError) as error:
        open_ledger(resume=False)
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
def test_journal_refuses_another_job(open_ledger, path, changed, was, now):
    open_ledger()
    before = path.read_bytes()
    with pytest.raises(InputError) as error:
        open_ledger(HEADER | changed)
    assert str(error.value) == (
        f"{path} was made with {was}, now with {now}: give the same, or choose another output folder"
    )
    assert path.read_bytes() == before


def test_journal_inherits_keys_of_an_existing_header(open_ledger):
    open_ledger()
    assert open_ledger(HEADER | {"seed": 8}, inherit_keys=["seed"]).header == HEADER
    with pytest.raises(InputError, match="made with no batch_size, now with batch_size 4"):
        open_ledger(HEADER | {"batch_size": 4}, inherit_keys=["batch_size"])


@pytest.mark.parametrize("content", ["", "一只狐狸\n", '["狗"]\n', '{"id": "狗"}\n'])
def test_journal_refuses_a_file_that_is_not_a_journal(open_ledger, path, content):
    path.write_text(content, encoding="utf-8")
    with pytest.raises(InputError) as error:
        open_ledger()
    assert str(error.value) == f"{path} is not the journal of a job; move it away, or choose another output folder"
    assert path.read_text(encoding="utf-8") == content


def test_journal_refuses_a_newer_format(open_ledger, path):
    path.write_text('{"cogview_job": 2}\n')
    with pytest.raises(InputError, match="has format 2, this version of cogview knows 1: update cogview"):
        open_ledger()


def test_journal_ignores_a_line_that_was_cut_off(open_ledger, path, caplog):
    """A power cut in the middle of a line: that result counts as not done, and those behind it as done."""
    open_ledger().record("狐狸")
    with path.open("ab") as file:
        file.write('{"id": "狗", "file": "蓝色'.encode()[:-1])
    ledger = open_ledger()
    assert list(ledger.done) == ["狐狸"]
    assert caplog.text == ""
    ledger.record("狗")
    ledger.record("苹果")
    assert list(open_ledger().done) == ["狐狸", "狗", "苹果"]
    assert [record.getMessage() for record in caplog.records] == [f"line 3 of {path} is damaged and is ignored"]


def test_journal_accepts_a_last_line_without_newline(open_ledger, path):
    """As some editors leave it."""
    open_ledger().record("狐狸")
    path.write_bytes(path.read_bytes().rstrip(b"\n"))
    ledger = open_ledger()
    assert list(ledger.done) == ["狐狸"]
    ledger.record("狗")
    assert list(open_ledger().done) == ["狐狸", "狗"]


@pytest.mark.parametrize("broken", [b"\0\0\0\0", b"[1]", b"7", b'{"file": "a.png"}', b'{"id": ["a"]}', b"\xb9\xb7"])
def test_journal_ignores_a_damaged_line_with_a_warning(open_ledger, path, caplog, broken):
    open_ledger().record("狐狸")
    path.write_bytes(path.read_bytes() + b"\n" + broken + b'\n{"id": "a"}\n')
    with caplog.at_level(logging.WARNING):
        ledger = open_ledger()
        ledger.refresh()
    assert list(ledger.done) == ["狐狸", "a"]
    assert [record.getMessage() for record in caplog.records] == [f"line 4 of {path} is damaged and is ignored"]


@pytest.mark.parametrize(("code", "kind"), [(None, DiskFull), (errno.EDQUOT, DiskFull), (errno.EIO, OSError)])
@pytest.mark.parametrize("torn", [False, True])
def test_journal_leaves_complete_lines_when_the_disk_is_full(open_ledger, path, monkeypatch, code, kind, torn):
    ledger = open_ledger()
    ledger.record("狐狸")
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
        ledger.record("狗")
    if kind is DiskFull:
        assert str(error.value) == "the disk is full: 1 result is kept; --resume continues when there is space"
    assert path.read_bytes() == before
    fails = False
    ledger.record("狗")
    assert list(ledger.done) == list(open_ledger().done) == ["狐狸", "狗"]


def test_journal_leaves_no_file_when_it_cannot_be_created(open_ledger, path, monkeypatch):
    def replace(source, target):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(OSError, match="No space left"):
        open_ledger()
    assert os.listdir(path.parent) == ["job.ledger.lock"]


@pytest.mark.parametrize("name", ["config.json", "text.model", "model.safetensors", "image/model.safetensors"])
def test_journal_fingerprint_depends_on_every_file(tiny_checkpoint, tmp_path, name):
    copy = shutil.copytree(tiny_checkpoint, tmp_path / "copy")
    assert fingerprint(copy) == fingerprint(tiny_checkpoint)
    content = bytearray((copy / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copy / name).write_bytes(content)
    assert fingerprint(copy) != fingerprint(tiny_checkpoint)


def test_journal_fingerprint_of_a_large_file_covers_size_header_and_blocks(tiny_checkpoint, tmp_path):
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "copy")
    size, header = 1 << 30, 1 << 20  # holes, which take no place

    def changed(place=None, size=size):
        with (folder / "model.safetensors").open("wb") as file:
            file.write(header.to_bytes(8, "little"))
            file.truncate(size)
            if place is not None:
                file.seek(place)
                file.write(b"x")
        return fingerprint(folder)

    same = changed()
    assert changed() == same
    step = (size - (1 << 16)) / 63
    for place in (8 + header - 1, round(31 * step) + 1000, size - 1):
        assert changed(place) != same
    assert changed(size=size + 1) != same
    assert changed(round(31.5 * step)) == same  # which lies between two blocks
