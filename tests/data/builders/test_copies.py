"""The index of copies: what it finds, and that its memory does not grow."""

import tracemalloc

import pytest

from cogview.data.builders.copies import CopyFinder
from cogview.data.builders.journal import JournalEntry
from cogview.data.builders.prepare import PreparedPicture
from cogview.data.sources.records import PictureRecord
from cogview.errors import RetryLaterError


def picture(name: str, number: int, *captions: str) -> PreparedPicture:
    """Return a prepared picture without pixels."""
    record = PictureRecord(name=name, captions=captions)
    return PreparedPicture(record=record, digest=f"{number:032x}", captions=captions, stamp="7 8")


def test_copy_finder_names_the_first_copy_and_keeps_new_captions(tmp_path):
    with CopyFinder(tmp_path / "index") as copies:
        first = copies.entry(picture("狐\udcc4.png", 1, "狐狸"), "0", 0.5)
        assert (first.captions, first.stamp, first.left_out) == (("狐狸",), "7 8", ())
        assert copies.entry(picture("b", 1, "狐狸", "狗"), "0", 0.5).captions == ("狗",)
        third = copies.entry(picture("c", 1, "狗", "狐狸"), "0", 0.5)
        assert (third.captions, third.left_out) == ((), ("a copy of 狐\udcc4.png, with no other caption",))
        assert copies.entry(picture("d", 2, "狗"), "0", 0.5).captions == ("狗",)


def test_copy_finder_begins_anew_with_the_entries_of_the_journal(tmp_path):
    (tmp_path / "index").write_bytes(b"cut short by a kill")
    entry = JournalEntry(name="a", source="0", digest=f"{1:032x}", captions=("狐狸",))
    with CopyFinder(tmp_path / "index") as copies:
        copies.add(entry)
        assert copies.entry(picture("b", 1, "狐狸"), "0", 0.5).left_out == ("a copy of a, with no other caption",)
    with CopyFinder(tmp_path / "index") as copies:
        assert copies.entry(picture("b", 1, "狐狸"), "0", 0.5).left_out == ()


def test_copy_finder_holds_no_picture_in_memory(tmp_path):
    """The names and captions of all pictures were kept: several gigabytes for ten million."""
    with CopyFinder(tmp_path / "index") as copies:
        copies.entry(picture("first", 0, "狐狸"), "0", 0.5)
        tracemalloc.start()
        try:
            for number in range(1, 2000):
                copies.entry(picture(f"{number}.png", number, f"狐狸 {number}"), "0", 0.5)
            assert tracemalloc.get_traced_memory()[0] < 50_000
        finally:
            tracemalloc.stop()


def test_copy_finder_explains_an_index_that_cannot_be_written(tmp_path):
    with CopyFinder(tmp_path / "index") as copies:
        copies._index.execute("DROP TABLE pictures")
        with pytest.raises(RetryLaterError, match=r"cannot write .*index: no such table"):
            copies.entry(picture("a", 1, "狐狸"), "0", 0.5)
