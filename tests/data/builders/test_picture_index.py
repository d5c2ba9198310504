"""An index of pictures: what is read, how it is divided, and what is not read again."""

import os
from pathlib import Path

import pytest

from cogview.data.builders import picture_index
from cogview.data.builders.picture_index import IndexedPicture, PictureScanner, divide, make_index, read_index
from cogview.data.builders.prepare import is_held_out
from cogview.data.sources.pictures import picture_records
from cogview.data.sources.tables import TableOptions
from cogview.errors import InputError


def records(source: str | Path):
    return picture_records(Path(source), TableOptions(), lambda note: None)


@pytest.fixture
def folder(tmp_path, monkeypatch, draw_picture):
    """Enter a folder with ten pictures, without captions, in ``a`` and ``b``."""
    monkeypatch.chdir(tmp_path)
    for number in range(10):
        draw_picture(Path("ab"[number % 2], f"{number}.png"), number)


@pytest.fixture
def read_names(monkeypatch) -> list[str]:
    """Return a list to which the names of pictures are added that are read."""
    names: list[str] = []
    read = PictureScanner.__getitem__

    def noted(self, found):
        names.append(found.name)
        return read(self, found)

    monkeypatch.setattr(PictureScanner, "__getitem__", noted)
    return names


def test_picture_records_take_pictures_without_captions(folder):
    Path("a/note.txt").write_text("about")
    Path("a/x.heic").write_bytes(b"")
    found = list(records("."))
    assert [record.name for record in found if record.file] == sorted(f"{'ab'[n % 2]}/{n}.png" for n in range(10))
    assert [record.name for record in found if not record.file] == ["a/x.heic"]
    assert [record.name for record in records("a/0.png")] == ["a/0.png"]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("none", "the source none does not exist; expected a picture, a folder"),
        ("empty", "empty has no pictures: looked for names in .png, .jpg"),
        ("a/0.bin", 'a/0.bin: the suffix ".bin" is unknown'),
    ],
)
def test_picture_records_refuse_in_one_line(folder, source, message):
    Path("empty").mkdir()
    Path("a/0.bin").write_bytes(b"")
    with pytest.raises(InputError) as caught:
        list(records(source))
    assert str(caught.value).startswith(message)


def test_make_index_divides_the_pictures_of_each_kind_of_source_alike(picture_sources, tmp_path):
    """A held-out picture must be held out wherever it comes from, as ``data build`` does."""
    splits = {}
    for kind, source in picture_sources.items():
        pictures = make_index(tmp_path / f"{kind}.jsonl", {}, records(source))
        index = divide(pictures, 0.2)
        assert not index.left_out
        splits[kind] = tuple([each.digest for each in split] for split in (index.training, index.held_out))
    training, held_out = splits["folder"]
    assert len(training) + len(held_out) == 40
    assert held_out == sorted(digest for digest in training + held_out if is_held_out(digest, 0.2))
    assert all(each == splits["folder"] for each in splits.values())


def test_make_index_leaves_out_broken_small_and_copied_pictures(folder, draw_picture):
    Path("a/0.png").write_bytes(b"nothing")
    draw_picture(Path("a/2.png"), 2, (15, 40))
    draw_picture(Path("b/copy.png"), 1, None)
    Path("b/gone.png").symlink_to("nowhere")
    index = divide(make_index(Path("i.jsonl"), {}, records(".")), 0.1)
    assert dict(index.left_out) == {
        "a/0.png": "a/0.png is no image that can be read; expected PNG, JPEG, WebP, GIF, BMP, TIFF or PPM",
        "a/2.png": "the picture is 15 x 40 pixels, expected at least 16 on a side",
        "b/copy.png": "a copy of b/1.png",
        "b/gone.png": "image b/gone.png does not exist",
    }
    assert len(index.training) + len(index.held_out) == 8


def test_make_index_reads_changed_files_only(folder, read_names, draw_picture):
    first = make_index(Path("i.jsonl"), {}, records("."))
    assert len(read_names) == 10
    assert read_index(Path("i.jsonl"), {}) == first
    assert read_index(Path("i.jsonl"), {"other": 1}) is None
    read_names.clear()
    draw_picture(Path("a/4.png"), 40)
    os.utime("a/4.png", ns=(1, 1))
    notes: list[str] = []
    second = make_index(Path("i.jsonl"), {}, records("."), on_note=notes.append)
    assert read_names == ["a/4.png"]
    assert notes == ["1 of 10 pictures are new or changed, and are read"]
    assert [one.name for one, other in zip(first, second, strict=True) if one != other] == ["a/4.png"]


def test_make_index_goes_on_where_it_was_killed(folder, read_names, monkeypatch):
    """Reading a million pictures takes hours; a kill may cut a line short."""
    monkeypatch.setattr(picture_index, "READ_AT_ONCE", 2)
    read = PictureScanner.__getitem__

    def killed(self, found):
        if len(read_names) == 6:
            raise KeyboardInterrupt
        return read(self, found)

    with monkeypatch.context() as patch:
        patch.setattr(PictureScanner, "__getitem__", killed)
        with pytest.raises(KeyboardInterrupt):
            make_index(Path("i.jsonl"), {}, records("."))
    assert not Path("i.jsonl").exists()
    unfinished = Path("i.jsonl.unfinished")
    unfinished.write_bytes(unfinished.read_bytes()[:-9])
    read_names.clear()
    found = make_index(Path("i.jsonl"), {}, records("."), on_note=lambda note: None)
    assert len(read_names) == 5
    assert found == make_index(Path("j.jsonl"), {}, records("."))
    assert not unfinished.exists()


@pytest.mark.multiprocess
def test_make_index_is_the_same_with_worker_processes(folder):
    make_index(Path("i.jsonl"), {}, records("."))
    make_index(Path("j.jsonl"), {}, records("."), num_workers=2)
    assert Path("i.jsonl").read_bytes() == Path("j.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("digests", "share", "message"),
    [
        ([], 0.1, "none of 1 pictures can be used; the first: x.png: broken"),
        (["f" * 32, "e" * 32], 0.1, "of 2 pictures, none is held out with held_out: 0.1; change it, or add more"),
        (["0" * 32], 0.1, "of 1 pictures, none is trained on with held_out: 0.1; change it, or add more pictures"),
    ],
)
def test_picture_index_check_refuses_a_split_without_pictures(digests, share, message):
    pictures = [IndexedPicture(name=digest, digest=digest) for digest in digests]
    with pytest.raises(InputError) as caught:
        divide([*pictures, IndexedPicture(name="x.png", left_out="broken")], share).check(share)
    assert str(caught.value).startswith(message)


def test_make_index_reads_a_picture_again_when_its_line_is_damaged(folder, read_names):
    """A list in place of a text was a traceback."""
    make_index(Path("index"), {}, records("a/0.png"))
    line = '{"name": ["a/0.png"], "digest": 3}\n'
    Path("index").write_text(Path("index").read_text(encoding="utf-8").splitlines()[0] + "\n" + line, encoding="utf-8")
    assert [picture.name for picture in make_index(Path("index"), {}, records("a/0.png"))] == ["a/0.png"]
    assert read_names == ["a/0.png"] * 2
