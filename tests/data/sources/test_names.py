"""Names of pictures and captions on the disk: sorted as by Python, and none of them in memory."""

import os
import tracemalloc

import pytest

from cogview.data.sources import names as module
from cogview.data.sources.folders import files_below
from cogview.data.sources.names import CAPTIONS, PICTURE, UNREAD, FilePairs, NamedPictures
from cogview.data.sources.records import PictureFile, PictureRecord
from cogview.errors import RetryLaterError


def test_file_pairs_sorts_names_as_python_does():
    gbk = os.fsdecode("狐狸".encode("gbk"))
    stems = ["b", "a", "a.b", "a b", "a-b", "a/b", "狐狸", "狐", "😀", "\uffee", "A", "a\nb", gbk]
    pairs = FilePairs([f"{stem}{suffix}" for stem in stems for suffix in (".txt", ".JPG")])
    assert [name for name, _, _ in pairs] == sorted(f"{stem}.JPG" for stem in stems)
    assert all(captions == name[:-4] + ".txt" and kind == PICTURE for name, kind, captions in pairs)


def test_file_pairs_keeps_what_has_no_partner():
    pairs = FilePairs(["a.png", "b.txt", "c.heic", "list.csv", "d.png", "d.webp", "d.TXT", "e"])
    assert list(pairs) == [
        ("a.png", PICTURE, None),
        ("b.txt", CAPTIONS, None),
        ("c.heic", UNREAD, None),
        ("d.png", PICTURE, "d.TXT"),
        ("d.webp", PICTURE, "d.TXT"),
    ]
    assert pairs.first_other((".csv",)) == "list.csv"
    assert pairs.first(PICTURE) == "a.png"


def test_file_pairs_holds_no_name_in_memory():
    """The names of a folder were in memory, several times: gigabytes for ten million."""
    peaks = []
    for count in (2000, 20_000):
        tracemalloc.start()
        try:
            pairs = FilePairs(f"{number:08d}.{suffix}" for number in range(count) for suffix in ("jpg", "txt"))
            assert sum(captions is not None for _, _, captions in pairs) == len(pairs) == count
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
    assert peaks[1] < 2 * peaks[0]


def test_files_below_enters_folders_in_the_order_of_their_names(tmp_path):
    """Of two links to one folder, the first one is entered, on every file system."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a.png").touch()
    (tmp_path / "in").mkdir()
    for name in ("y", "x", "z"):
        (tmp_path / "in" / name).symlink_to(tmp_path / "elsewhere")
    assert list(files_below(tmp_path / "in")) == ["x/a.png"]


def test_named_pictures_finds_others_beside_them(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_HASHES", 2)
    for name in ("c.png", "a.png", "b.png", "d.jpg", ".e.png", "f.txt"):
        (tmp_path / name).touch()
    named = NamedPictures()
    for name in ("b.png", "a.png", "missing.png"):
        path = tmp_path / name
        named.add(PictureRecord(name=str(path), file=PictureFile(path=path)))
    named.find_others()
    assert (len(named), list(named)) == (2, [str(tmp_path / "c.png"), str(tmp_path / "d.jpg")])


def test_file_pairs_names_a_full_disk(monkeypatch):
    def names():
        yield "a.png"
        raise module.sqlite3.OperationalError("database or disk is full")

    with pytest.raises(
        RetryLaterError, match=r"^the names of the files cannot be written to a temporary file .* TMPDIR"
    ):
        FilePairs(names())
