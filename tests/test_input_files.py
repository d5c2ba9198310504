"""Files that users name: anything but a regular file of a sensible size is refused before it is read."""

import io
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest

from cogview import input_files
from cogview.errors import InputError
from cogview.files import read_json_lines
from cogview.input_files import conversion_advice, open_regular, read_arrays, read_regular
from cogview.plain_data import read_json, read_yaml


def put(kind: str, path: Path) -> Path:
    """Put something that is no regular file at a path."""
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    return path


@pytest.mark.parametrize("read", [open_regular, read_json, read_yaml, lambda path: read_regular(path, 10)])
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("pipe", "is no regular file; a command reads a pipe as its standard input"),
        ("device", "is no regular file"),
        ("folder", "cannot read .*/here: it is a folder"),
        ("loop", "cannot read .*/here: Too many levels of symbolic links"),
        ("nothing", "cannot read .*/here: No such file or directory"),
    ],
)
def test_open_regular_refuses_other_files_without_waiting(tmp_path, read, kind, message):
    """A pipe named as a recipe made the command wait for ever, and /dev/zero filled the memory."""
    with pytest.raises(InputError, match=message):
        read(put(kind, tmp_path / "here"))


def test_open_regular_names_the_kind_of_file(tmp_path):
    with pytest.raises(InputError, match=r"cannot read the recipe .*: No such file"):
        open_regular(tmp_path / "none", "recipe")
    with pytest.raises(InputError, match=r"cannot read a\\x00b: embedded null byte"):
        open_regular(Path("a\0b"))


@pytest.mark.parametrize(
    ("content", "advice"),
    [
        ("一只狐狸\n".encode("utf-16-le"), "it is UTF-16LE: iconv -f UTF-16LE -t UTF-8 a.txt > NEW"),
        ("a fox\n".encode("utf-16-le"), "it is UTF-16LE: iconv"),
        ("a fox, 一只狐狸".encode("utf-16-be"), "it is UTF-16BE: iconv"),
        (bytes(range(256)) * 3, "it holds bytes 0, so it is no text: check that it is the right file"),
        (np.random.default_rng(0).bytes(4000), "it holds bytes 0, so it is no text"),
        (b"\xb0\xa1", "if it is GBK, convert it: iconv -f GB18030 -t UTF-8 a.txt > NEW"),
    ],
)
def test_conversion_advice_names_an_encoding_that_fits(content, advice):
    """Random bytes were called UTF-16LE."""
    assert conversion_advice(content, "a.txt").startswith(advice)


def test_read_regular_refuses_a_file_above_its_limit(tmp_path):
    """A sparse file of gigabytes is refused by its size, before memory is taken for it."""
    path = tmp_path / "file"
    path.write_bytes(b"12345")
    assert read_regular(path, 5) == b"12345"
    with path.open("r+b") as file:
        file.truncate(1 << 40)
    with pytest.raises(InputError, match=r"file is too large \(1099\.5 GB\): at most 5 bytes are read"):
        read_regular(path, 5)
    with pytest.raises(InputError, match="is too large"):
        list(read_json_lines(path))


def test_read_arrays_returns_what_numpy_wrote(tmp_path):
    np.savez_compressed(tmp_path / "a.npz", rows=np.arange(6).reshape(2, 3), names=np.array(["a"]))
    arrays = read_arrays(tmp_path / "a.npz")
    assert arrays["rows"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert arrays["names"].tolist() == ["a"]


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "text", "object"])
def test_read_arrays_refuses_damage_in_one_line(tmp_path, damage):
    """numpy and zipfile raise a dozen kinds of errors on damaged archives."""
    path, buffer = tmp_path / "a.npz", io.BytesIO()
    np.savez_compressed(buffer, rows=np.array([{}]) if damage == "object" else np.arange(1000))
    content = bytearray(buffer.getvalue())
    content[200] ^= 1
    contents = {"cut": content[:-30], "flipped": content, "empty": b"", "text": b"rows", "object": buffer.getvalue()}
    path.write_bytes(contents[damage])
    with pytest.raises(InputError, match=r"a\.npz is damaged or holds no arrays of numpy: ") as caught:
        read_arrays(path)
    assert "\n" not in str(caught.value)


def test_read_arrays_refuses_what_unpacks_beyond_the_limit(tmp_path, monkeypatch):
    """A kilobyte of a zip archive may unpack to a megabyte, and a megabyte to a gigabyte."""
    monkeypatch.setattr(input_files, "MAX_ARRAYS_BYTES", 10_000)
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("rows.npy", bytes(20_000))
    with pytest.raises(InputError, match=r"unpacks to 20\.0 kB: at most 10\.0 kB are read"):
        read_arrays(tmp_path / "a.npz")


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="needs the files of Linux that state no size")
def test_read_regular_reads_a_file_of_the_system_that_states_no_size():
    """A read of the stated size alone would return one byte of it."""
    path = Path("/proc/self/status")
    assert path.stat().st_size == 0
    assert b"VmRSS" in read_regular(path, 1 << 20)
    with pytest.raises(InputError, match="is too large"):
        read_regular(path, 10)
