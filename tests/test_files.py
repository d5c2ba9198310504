"""Files are whole or absent: what a failure, a kill or a full disk leaves, and what is read back."""

import errno
import hashlib
import json
import os
from pathlib import Path

import pytest

import cogview.files
from cogview.errors import InputError, RetryLaterError
from cogview.files import (
    append_json_line,
    atomic_folder,
    atomic_write,
    file_sha256,
    json_line,
    new_folder,
    read_json_lines,
    remove_unfinished,
    write_json,
)
from cogview.plain_data import read_json

OLDER_LEFTOVERS = [".狐狸.writing", ".狐狸-writing", ".writing-狐狸"]  # of the folder 狐狸


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# --- files --------------------------------------------------------------------------------------------------------


def test_atomic_write_replaces_the_file_when_the_block_ends(tmp_path):
    path = tmp_path / "狐狸.txt"
    path.write_text("旧")
    with atomic_write(path) as temporary:
        temporary.write_text("新")
        assert path.read_text() == "旧"
        assert temporary.parent == path.parent
    assert path.read_text() == "新"
    assert names(tmp_path) == ["狐狸.txt"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_atomic_write_refuses_to_replace_what_is_no_file(tmp_path):
    """Root's ``cogview caption a.png -o /dev/null`` put a file in the place of the device, for all programs."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="is a device or a pipe"), atomic_write(tmp_path / "pipe") as temporary:
        temporary.touch()
    assert (tmp_path / "pipe").is_fifo()
    assert names(tmp_path) == ["pipe"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("begun", [False, True])
def test_atomic_write_leaves_the_older_file_when_the_block_fails(tmp_path, error, begun):
    path = tmp_path / "狐狸.txt"
    path.write_text("旧")

    def write():
        with atomic_write(path) as temporary:
            if begun:
                temporary.write_text("half")
            raise error

    with pytest.raises(type(error)):
        write()
    assert path.read_text() == "旧"
    assert names(tmp_path) == ["狐狸.txt"]


def test_atomic_write_removes_the_temporary_file_when_renaming_fails(tmp_path):
    (tmp_path / "狐狸").mkdir()
    with pytest.raises(IsADirectoryError), atomic_write(tmp_path / "狐狸") as temporary:
        temporary.write_text("whole")
    assert names(tmp_path) == ["狐狸"]


def test_atomic_write_reports_the_first_error_when_the_folder_is_a_file(tmp_path):
    (tmp_path / "folder").write_text("a file")
    with pytest.raises(NotADirectoryError) as caught, atomic_write(tmp_path / "folder" / "狐狸.txt") as temporary:
        temporary.write_text("新")
    assert caught.value.__context__ is None


def test_atomic_write_replaces_the_leftover_of_a_killed_process(tmp_path):
    (tmp_path / ".狐狸.txt.writing").write_text("half, and longer than the new content")
    with atomic_write(tmp_path / "狐狸.txt") as temporary:
        temporary.write_text("新")
    assert names(tmp_path) == ["狐狸.txt"]


@pytest.mark.parametrize("locks", [True, False])
def test_atomic_write_keeps_writers_of_one_path_apart(tmp_path, monkeypatch, locks):
    """Two processes once shared a temporary file: one of them failed, or published the half-written other."""
    if not locks:
        monkeypatch.setattr(cogview.files, "fcntl", None)
    path = tmp_path / "world.json"
    with atomic_write(path) as theirs:
        theirs.write_text("theirs")
        for number in range(3) if locks else ():
            with atomic_write(path) as ours:
                assert ours != theirs
                ours.write_text(f"ours {number}")
            assert path.read_text() == f"ours {number}"
    assert path.read_text() == "theirs"  # the outer block ended later
    assert names(tmp_path) == ["world.json"]


@pytest.mark.parametrize("links", [True, False])
def test_atomic_write_replaces_no_file_without_overwrite(tmp_path, monkeypatch, links):
    """Of two writers of a new name, the second is refused at the end, however long before both looked."""

    def refuse(*_):
        raise OSError(errno.EPERM, "Operation not permitted")

    if not links:
        monkeypatch.setattr(Path, "hardlink_to", refuse)
    path = tmp_path / "狐狸.png"

    def second():
        with atomic_write(path, overwrite=False) as temporary:
            temporary.write_text("second")

    with atomic_write(path, overwrite=False) as temporary:
        temporary.write_text("first")
    for _ in range(2):
        with pytest.raises(FileExistsError):
            second()
    assert path.read_text() == "first"
    assert names(tmp_path) == ["狐狸.png"]


@pytest.mark.parametrize("write", ["file", "folder"])
def test_atomic_write_syncs_the_content_before_it_is_renamed(tmp_path, monkeypatch, write):
    """After a power cut, files that were renamed without fsync were empty."""
    events = []
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(
        os, "fsync", lambda file: (events.append(str(Path(f"/proc/self/fd/{file}").readlink())), fsync(file))
    )
    monkeypatch.setattr(Path, "replace", lambda path, target: (events.append("rename"), replace(path, target)))
    if write == "file":
        with atomic_write(tmp_path / "a") as path:
            path.write_text("whole")
        assert events == [str(path), "rename", str(tmp_path)]
        with atomic_write(tmp_path / "preview", durable=False) as path:
            path.write_text("whole")
        assert events[3:] == ["rename"]
    else:
        with atomic_folder(tmp_path / "model") as folder:
            (folder / "image").mkdir()
            (folder / "image" / "weights").write_text("whole")
        expected = [folder / "image", folder / "image" / "weights", folder]
        assert events == [*map(str, expected), "rename", str(tmp_path)]


# --- folders ------------------------------------------------------------------------------------------------------


def test_atomic_folder_appears_when_the_block_ends(tmp_path):
    path = tmp_path / "models" / "狐狸"
    with atomic_folder(path) as folder:
        (folder / "config.json").write_text("{}")
        assert not path.exists()
    assert names(tmp_path / "models") == ["狐狸"]
    assert names(path) == ["config.json"]


@pytest.mark.parametrize("leftover", OLDER_LEFTOVERS)
def test_atomic_folder_starts_empty_and_removes_leftovers_of_killed_processes(tmp_path, leftover):
    (tmp_path / leftover).mkdir()
    (tmp_path / leftover / "model.safetensors").write_bytes(b"half")
    with atomic_folder(tmp_path / "狐狸") as folder:
        assert names(folder) == []
    assert names(tmp_path) == ["狐狸"]


def test_atomic_folder_takes_its_name_literally(tmp_path):
    """A name with the characters of a pattern must not remove what another process is writing."""
    (tmp_path / ".狐狸.writing").mkdir()
    with atomic_folder(tmp_path / "*"):
        pass
    assert names(tmp_path) == ["*", ".狐狸.writing"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_atomic_folder_leaves_the_older_folder_when_the_block_fails(tmp_path, overwrite):
    (tmp_path / "狐狸").mkdir()
    (tmp_path / "狐狸" / "old").write_text("旧")

    def write():
        with atomic_folder(tmp_path / "狐狸", overwrite=overwrite) as folder:
            (folder / "new").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    assert names(tmp_path) == ["狐狸"]
    assert names(tmp_path / "狐狸") == ["old"]


def test_atomic_folder_replaces_an_older_folder_with_overwrite_only(tmp_path):
    for overwrite in (False, True):
        (tmp_path / "狐狸").mkdir(exist_ok=True)
        (tmp_path / "狐狸" / "old").write_text("旧")
        if overwrite:
            with atomic_folder(tmp_path / "狐狸", overwrite=True) as folder:
                (folder / "new").write_text("新")
        else:
            with pytest.raises(OSError, match="not empty"), atomic_folder(tmp_path / "狐狸"):
                pass
        assert names(tmp_path) == ["狐狸"]
        assert names(tmp_path / "狐狸") == (["new"] if overwrite else ["old"])


def test_new_folder_refuses_an_existing_folder(tmp_path):
    with (
        pytest.raises(InputError, match=r"is there already: remove it, or choose another folder with -o$"),
        new_folder(tmp_path),
    ):
        pass


def test_atomic_folder_refuses_a_folder_that_another_process_is_writing(tmp_path):
    """Two conversions to one target removed each other's folder, and one returned the half-written weights of both."""
    with atomic_folder(tmp_path / "狐狸") as folder:
        (folder / "model").write_text("half")
        message = (
            rf"狐狸 is being written by another process \(process {os.getpid()} on .* since 2.*\): wait, or choose"
        )
        for writer in (atomic_folder, new_folder):
            with pytest.raises(RetryLaterError, match=message), writer(tmp_path / "狐狸"):
                pytest.fail("two writers of one folder")
        assert names(folder) == ["model"]
    assert names(tmp_path / "狐狸") == ["model"]
    assert names(tmp_path) == ["狐狸"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_new_folder_reports_a_full_disk_as_an_error_that_may_pass(tmp_path, number):
    output = tmp_path / "狐狸"
    with (
        pytest.raises(
            RetryLaterError, match=rf"^there is no room for {output}: \d.* GB are free there; nothing was written$"
        ),
        new_folder(output),
    ):
        raise OSError(number, os.strerror(number))
    assert names(tmp_path) == []


def test_new_folder_passes_other_errors_on(tmp_path):
    with pytest.raises(PermissionError), new_folder(tmp_path / "狐狸"):
        raise PermissionError(errno.EACCES, "Permission denied")
    assert names(tmp_path) == []


def test_remove_unfinished_removes_temporary_folders_of_the_pattern_only(tmp_path):
    for name in (".step-1.writing", ".step-2-writing", ".writing-step-3", ".other.writing", "step-4"):
        (tmp_path / name).mkdir()
    remove_unfinished(tmp_path, "step-*")
    assert names(tmp_path) == [".other.writing", "step-4"]


# --- JSON ---------------------------------------------------------------------------------------------------------


def test_write_json_is_read_by_people(tmp_path):
    write_json(tmp_path / "a.json", {"名": ["狐狸", 1, None]})
    assert (tmp_path / "a.json").read_bytes().decode() == ('{\n  "名": [\n    "狐狸",\n    1,\n    null\n  ]\n}\n')
    write_json(tmp_path / "b.json", {"step": 4, "loss": 1e-05}, indent=None)
    assert (tmp_path / "b.json").read_bytes() == b'{"step": 4, "loss": 1e-05}\n'
    assert read_json(tmp_path / "a.json") == {"名": ["狐狸", 1, None]}


def test_write_json_leaves_the_older_file_when_the_content_is_not_plain(tmp_path):
    write_json(tmp_path / "a.json", [1])
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", [1, {2}])
    assert read_json(tmp_path / "a.json") == [1]
    assert names(tmp_path) == ["a.json"]


@pytest.mark.parametrize("content", [b"{", b"", b"\xff"])
def test_read_json_names_the_file_when_it_is_damaged(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(InputError, match=rf"^{tmp_path / 'a.json'} is not JSON: "):
        read_json(tmp_path / "a.json")


def test_json_line_keeps_file_names_that_are_not_utf8():
    name = os.fsdecode("狐狸".encode() + b"\xff")
    line = json_line({"file": name})
    assert line == '{"file": "狐狸\\udcff"}\n'.encode()
    assert json.loads(line)["file"] == name


def test_append_json_line_starts_a_new_line_after_one_that_was_cut_short(tmp_path):
    path = tmp_path / "metrics.jsonl"
    append_json_line(path, {"step": 1})
    append_json_line(path, {"step": 2})
    assert path.read_bytes() == b'{"step": 1}\n{"step": 2}\n'
    with path.open("ab") as file:
        file.write(b'{"step": 3, "lo')
    append_json_line(path, {"step": 3})
    assert path.read_bytes() == b'{"step": 1}\n{"step": 2}\n{"step": 3, "lo\n{"step": 3}\n'
    assert list(read_json_lines(path)) == [{"step": 1}, {"step": 2}, {"step": 3}]


def test_read_json_lines_skips_what_is_not_an_object(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"a": 1}\n\n[2]\n\xff\n{"b": 3}')
    assert list(read_json_lines(tmp_path / "a.jsonl")) == [{"a": 1}, {"b": 3}]
    assert list(read_json_lines(tmp_path / "missing.jsonl")) == []


# --- checksums ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 3, (1 << 20) + 7])
def test_file_sha256_equals_that_of_the_content(tmp_path, size):
    content = bytes(range(256)) * (size // 256) + bytes(size % 256)
    (tmp_path / "file").write_bytes(content)
    read = []
    assert file_sha256(tmp_path / "file", read.append) == hashlib.sha256(content).hexdigest()
    assert sum(read) == size
