"""Stores built from captioned pictures: equal for every source, worker count and interruption; what is left out."""

import io
import json
import os
import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cogview.checkpoints.checkpoint import read_config
from cogview.checkpoints.image_tokenizer import load_image_tokenizer
from cogview.data.builders import pictures as module
from cogview.data.builders.journal import BuildJournal, JournalEntry
from cogview.data.builders.pictures import PictureBuild, StorePaths
from cogview.data.builders.prepare import PictureSettings, fit_picture, is_held_out, normalize_caption, pixel_digest
from cogview.data.sources.open import open_source
from cogview.data.sources.tables import TableOptions
from cogview.data.store import NO_TOKEN, TokenStore
from cogview.data.store_writer import StoreWriter
from cogview.errors import InputError, RetryLaterError
from cogview.image_io.reading import EXPECTED, read_image
from cogview.tokenizers.text import TextTokenizer


@pytest.fixture
def make_build(tiny_checkpoint, tmp_path):
    """Return a function that makes a build of sources with the tokenizers of the tiny model."""
    config = read_config(tiny_checkpoint)
    tokenizers = {
        "text_tokenizer": TextTokenizer.load(tiny_checkpoint / "text.model"),
        "image_tokenizer": load_image_tokenizer(tiny_checkpoint / "image"),
    }

    def make(*sources: Path, name: str = "store", **settings) -> PictureBuild:
        given = {"text_width": config.max_text, "held_out": 0.2, "batch_size": 7, **settings}
        opened = {str(path): open_source(path, TableOptions(), lambda note: None) for path in sources}
        paths = StorePaths(store=tmp_path / name)
        return PictureBuild(paths=paths, sources=opened, settings=PictureSettings(**given), side=64, **tokenizers)

    return make


@pytest.fixture
def folder(tmp_path, draw_picture):
    """Return a folder, and a function that draws a picture with captions in it."""
    path = tmp_path / "pictures"

    def add(name: str, number: int, *captions: str, **settings):
        draw_picture(path / name, number, **settings)
        (path / name).with_suffix(".txt").write_text("\n".join(captions), encoding="utf-8")

    return path, add


def content(build: PictureBuild) -> tuple[bytes, bytes]:
    """Return the bytes of both stores of a finished build."""
    return tuple((path / "data.mdb").read_bytes() for path in (build.paths.store, build.paths.held_out))


def left_out(build: PictureBuild) -> dict[str, str]:
    """Return the reasons of the report by the names of the files."""
    lines = map(json.loads, build.paths.report.read_text(encoding="utf-8").splitlines())
    return {Path(line["file"]).name: line["reason"] for line in lines}


def test_picture_build_writes_codes_and_pieces_of_every_caption(make_build, picture_sources):
    build = make_build(picture_sources["folder"], large=True, small=True)
    report = build.run()
    assert (report.records, report.left_out, report.same_caption) == (40, 0, False)
    assert sum(report.rows.values()) == 48
    assert report.rows[True] > 1
    assert not build.paths.work.exists()
    assert not build.paths.report.exists()
    rows = {False: [], True: []}
    for record in build.sources[str(picture_sources["folder"])]:
        image = read_image(record.file.path)
        rows[is_held_out(pixel_digest(image), 0.2)] += [(image, caption) for caption in record.captions]
    for held_out, expected in rows.items():
        store = TokenStore(build.paths.of_split(held_out))
        assert store.header.fields == {"text": 20, "image": 64, "large": 256, "small": 16}
        assert store.header.layouts == ("generate", "caption", "upscale", "low_level")
        assert len(store) == len(expected)
        for row, (image, caption) in zip((store[number] for number in range(len(store))), expected, strict=True):
            assert build.text_tokenizer.decode(row["text"][row["text"] != NO_TOKEN].tolist()) == caption
            for name, side in (("image", 64), ("large", 128), ("small", 32)):
                pixels = torch.from_numpy(fit_picture(image, side, "crop")).permute(2, 0, 1)[None].float() / 255
                assert row[name].tolist() == build.image_tokenizer.encode(pixels).flatten().tolist()


def test_picture_build_gives_equal_files_for_every_kind_of_source(make_build, picture_sources):
    """A folder, a CSV file, JSON lines, a COCO file and a tar shard of the same pictures: equal byte for byte."""
    found = set()
    for kind, path in picture_sources.items():
        build = make_build(path, name=kind)
        build.run()
        found.add(content(build))
    assert len(found) == 1


@pytest.mark.slow
@pytest.mark.multiprocess
def test_picture_build_gives_equal_files_for_any_number_of_workers(make_build, picture_sources):
    found = set()
    for workers in (0, 1, 2, 4):
        build = make_build(picture_sources["tar"], name=f"{workers}", num_workers=workers)
        build.run()
        found.add(content(build))
    assert len(found) == 1


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a forked process")
def test_picture_build_gives_equal_files_when_it_was_killed_at_any_moment(make_build, picture_sources):
    """Kill -9 before and after each write of journal and stores, several times in one build; then compare the files."""
    whole = make_build(picture_sources["folder"], name="whole")
    whole.run()
    for first in range(1, 28, 3):
        build = make_build(picture_sources["folder"], name=f"killed-{first}")
        for moment in (first, 4, 1, 2):  # later runs have fewer writes
            child = os.fork()
            if child == 0:
                _run_and_die(build, moment)
            _, status = os.waitpid(child, 0)
            assert os.WIFEXITED(status) or os.WTERMSIG(status) == signal.SIGKILL
        if not build.paths.store.exists():
            build.run()
        assert content(build) == content(whole), first
        shutil.rmtree(build.paths.store)


def _run_and_die(build: PictureBuild, moment: int) -> None:
    """Run a build in a forked process, which kills itself at its ``moment``-th write."""
    seen = [0]

    def dying(function):
        def call(*arguments):
            for step in (None, function):
                seen[0] += 1
                if seen[0] == moment:
                    os.kill(os.getpid(), signal.SIGKILL)
                result = None if step is None else step(*arguments)
            return result

        return call

    BuildJournal.append = dying(BuildJournal.append)
    StoreWriter.append = dying(StoreWriter.append)
    try:
        build.run()
    finally:
        os._exit(0)


def test_picture_build_leaves_out_and_names_what_cannot_be_used(make_build, folder, tmp_path):
    pictures, add = folder
    add("good.png", 1, "一只狐狸")
    add("broken.png", 2, "一只狗")
    (pictures / "broken.png").write_bytes((pictures / "broken.png").read_bytes()[:60])
    add("tiny.png", 3, "一只鱼", size=(90, 3))
    add("text.png", 4, "一只狗")
    (pictures / "text.png").write_text("no picture")
    add("long.png", 5, "一" * 21, "两只狗")
    add("longer.png", 6, "狗" * 30)
    add("binary.png", 7, "一只\0狗")
    add("copy.png", 1, "一只狐狸")
    add("other.png", 1, "红色的狐狸")  # the same pixels with another caption
    (pictures / "lonely.txt").write_text("狐狸")
    report = (build := make_build(pictures, held_out=0)).run()
    reasons = left_out(build)
    assert reasons == {
        "broken.png": f"{pictures}/broken.png is cut off or damaged: image file is truncated",
        "text.png": f"{pictures}/text.png is no image that can be read; expected {EXPECTED}",
        "good.png": f"a copy of {pictures}/copy.png, with no other caption",
        "tiny.png": "the picture is 90 x 3 pixels, expected at least 16 on a side",
        "long.png": f"a caption has 21 pieces, at most 20 are used: {'一' * 21}…",
        "longer.png": f"a caption has 30 pieces, at most 20 are used: {'狗' * 30}…",
        "binary.png": "a caption holds a character 0: its file is no text",
        "lonely.txt": "a caption without a picture: none of this name is beside it",
    }
    assert (report.left_out, report.rows) == (8, {False: 3, True: 0})
    store = TokenStore(build.paths.store)
    texts = [build.text_tokenizer.decode(row[row != NO_TOKEN].tolist()) for row in store.read(range(3))["text"]]
    assert texts == ["一只狐狸", "两只狗", "红色的狐狸"]
    assert store[0]["image"].tolist() == store[2]["image"].tolist()


def test_picture_build_reads_pictures_of_every_mode(make_build, folder):
    """CMYK, 16 bits, a palette, transparency, EXIF rotation and an animation are read; the first frame is noted."""
    pictures, add = folder
    add("rgb.png", 1, "一只狐狸", size=(64, 64))
    base = Image.open(pictures / "rgb.png")
    base.convert("CMYK").save(pictures / "cmyk.jpg", quality=100)
    base.convert("P").save(pictures / "palette.png")
    Image.fromarray(np.asarray(base.convert("L")).astype(np.uint16) * 257).save(pictures / "deep.png")
    clear = base.convert("RGBA")
    clear.putalpha(0)
    clear.save(pictures / "clear.png")
    base.save(pictures / "frames.gif", save_all=True, append_images=[base.rotate(90)])
    exif = Image.Exif()
    exif[0x0112] = 6
    base.rotate(90).save(pictures / "turned.png", exif=exif)
    for path in list(pictures.iterdir()):
        path.with_suffix(".txt").write_text(f"一只狐狸{path.stem}", encoding="utf-8")
    build = make_build(pictures, held_out=0)
    report = build.run()
    assert report.left_out == 0
    assert report.notes == {"it has several frames, and the first is taken": 1}
    images = TokenStore(build.paths.store).read(range(7))["image"]
    names = sorted(path.stem for path in pictures.glob("*.txt"))
    codes = dict(zip(names, images.tolist(), strict=True))
    assert codes["turned"] == codes["rgb"]
    white = build.image_tokenizer.encode(torch.ones(1, 3, 64, 64)).flatten().tolist()
    assert codes["clear"] == white


def test_picture_build_refuses_a_bomb_and_goes_on(make_build, folder):
    pictures, add = folder
    add("a.png", 1, "一只狐狸")
    add("bomb.png", 2, "一只狗")
    content = io.BytesIO()
    Image.new("1", (60000, 2000)).save(content, "PNG")
    (pictures / "bomb.png").write_bytes(content.getvalue())
    build = make_build(pictures, held_out=0)
    assert build.run().rows[False] == 1
    assert "60000 x 2000 pixels" in left_out(build)["bomb.png"]


def test_picture_build_never_divides_copies_between_the_stores(make_build, folder):
    pictures, add = folder
    for number in range(12):
        add(f"{number}.png", number, "一只狐狸")
        add(f"{number}-copy.png", number, "一只狗")
    build = make_build(pictures, held_out=0.5)
    report = build.run()
    assert all(count % 2 == 0 and count > 0 for count in report.rows.values())
    found = [
        {row.tobytes() for row in store.read(range(len(store)))["image"]}
        for store in (TokenStore(build.paths.store), TokenStore(build.paths.held_out))
    ]
    assert not found[0] & found[1]


def test_picture_build_refuses_to_replace_a_store(make_build, picture_sources):
    make_build(picture_sources["csv"]).run()
    with pytest.raises(InputError, match=r"store is there already: remove it, or choose another store with -o"):
        make_build(picture_sources["csv"]).run()
    assert not make_build(picture_sources["csv"]).paths.work.exists()


def test_picture_build_keeps_its_work_when_a_store_appears(make_build, picture_sources, monkeypatch):
    """A folder that was copied to the name of the store meanwhile took the work of hours with it."""
    build = make_build(picture_sources["folder"])
    interrupt(build, monkeypatch)
    build.paths.store.mkdir()
    with pytest.raises(InputError, match="is there already"):
        make_build(picture_sources["folder"]).run()
    assert (build.paths.work / "journal.jsonl").is_file()
    build.paths.store.rmdir()
    assert sum(make_build(picture_sources["folder"]).run().pictures.values()) == 40


@pytest.mark.parametrize(
    "damage", [{"held_out": 2}, {"captions": "一只狐狸"}, {"captions": [1]}, {"digest": None}, {"other": ""}], ids=str
)
def test_journal_entry_is_refused_when_a_value_has_another_type(damage):
    """A number in place of a truth value was a traceback."""
    with pytest.raises(ValueError, match="no entry"):
        JournalEntry.from_mapping({"name": "a", "source": "b", **damage})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fit": "pad"}, r"holds a build that was started with other settings \(fit\): run it with the same command"),
        ({"held_out": 0.3}, r"other settings \(held_out\)"),
    ],
    ids=str,
)
def test_picture_build_continues_with_the_same_settings_alone(
    make_build, picture_sources, monkeypatch, changes, message
):
    interrupt(make_build(picture_sources["folder"]), monkeypatch)
    with pytest.raises(InputError, match=message):
        make_build(picture_sources["folder"], **changes).run()


def test_picture_build_continues_with_the_same_sources_alone(make_build, folder, monkeypatch):
    """A caption that was changed meanwhile stayed as it was, without a word."""
    pictures, add = folder
    for number in range(20):
        add(f"{number:02d}.png", number, "一只狐狸")
    interrupt(make_build(pictures), monkeypatch)
    (pictures / "03.txt").write_text("一只狗")
    with pytest.raises(InputError, match=r"the sources have changed since the build was started, .*03\.png first"):
        make_build(pictures).run()


@pytest.mark.parametrize("change", ["drawn anew", "removed", "mended"])
def test_picture_build_notices_a_picture_that_has_changed(make_build, folder, draw_picture, monkeypatch, change):
    """A picture that was replaced under its name, with its captions, kept the codes of the former one."""
    pictures, add = folder
    for number in range(20):
        add(f"{number:02d}.png", number, "一只狐狸")
    changed = pictures / "03.png"
    if change == "mended":
        changed.write_bytes(b"nothing")
    interrupt(make_build(pictures), monkeypatch)
    build = make_build(pictures)
    changed.unlink()
    if change != "removed":
        draw_picture(changed, 100)
    with pytest.raises(InputError, match=r"^the picture .*03\.png has changed since .*: remove .*\.building to start"):
        build.run()


def test_picture_build_continues_when_pictures_have_other_times_alone(make_build, folder, monkeypatch):
    """A folder that is copied to another disk often has new times."""
    pictures, add = folder
    for number in range(20):
        add(f"{number:02d}.png", number, "一只狐狸")
    whole = make_build(pictures, name="whole")
    whole.run()
    interrupt(make_build(pictures), monkeypatch)
    for path in pictures.iterdir():
        os.utime(path, (1, 1))
    build = make_build(pictures)
    build.run()
    assert content(build) == content(whole)


def test_picture_build_keeps_the_batch_size_of_its_start(make_build, picture_sources, monkeypatch):
    whole = make_build(picture_sources["folder"], name="whole")
    whole.run()
    interrupt(make_build(picture_sources["folder"]), monkeypatch)
    build = make_build(picture_sources["folder"], batch_size=3)
    build.run()
    assert content(build) == content(whole)


def interrupt(build: PictureBuild, monkeypatch) -> None:
    """Run a build until its third write of rows."""
    append, calls = StoreWriter.append, []

    def interrupted(self, rows):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        append(self, rows)

    with monkeypatch.context() as patch:
        patch.setattr(StoreWriter, "append", interrupted)
        with pytest.raises(KeyboardInterrupt):
            build.run()


@pytest.mark.parametrize("moment", ["journal", "rows", "copies", "finished stores"])
def test_picture_build_keeps_a_valid_shorter_store_when_the_disk_is_full(
    make_build, picture_sources, monkeypatch, moment
):
    """Blocks of 7 pictures are whole or absent, and the same command goes on when there is space."""
    whole = make_build(picture_sources["folder"], name="whole")
    whole.run()
    owner, name, last = {
        "journal": (BuildJournal, "append", 3),
        "rows": (StoreWriter, "append", 5),
        "copies": (module.CopyFinder, "add", 20),
        "finished stores": (module, "copy_rows", 2),
    }[moment]
    function, calls = getattr(owner, name), []

    def full(*arguments, **settings):
        calls.append(1)
        if len(calls) < last:
            return function(*arguments, **settings)
        raise RetryLaterError("rows could not be written") if "stores" in moment else OSError(28, "No space left")

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, full)
        with pytest.raises((OSError, RetryLaterError), match=r"No space left|the work of the build is kept in .*"):
            make_build(picture_sources["folder"]).run()
    build = make_build(picture_sources["folder"])
    shorter = TokenStore(build.paths.work / "training")
    assert 0 < len(shorter) <= len(TokenStore(whole.paths.store))
    expected = TokenStore(whole.paths.store).read(range(len(shorter)))
    assert all((ids == expected[field]).all() for field, ids in shorter.read(range(len(shorter))).items())
    shorter.close()
    del shorter
    build.run()
    assert content(build) == content(whole)


@pytest.mark.multiprocess
@pytest.mark.skipif(not hasattr(os, "fork"), reason="another process is needed")
def test_picture_build_refuses_a_second_process(make_build, picture_sources, monkeypatch):
    build = make_build(picture_sources["folder"])

    def second(self, *arguments):
        child = os.fork()
        if child == 0:
            try:
                build.run()
            except RetryLaterError as error:
                os._exit(7 if f"is being built by another process (process {os.getppid()}" in str(error) else 1)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        return append(self, *arguments)

    append = BuildJournal.append
    with monkeypatch.context() as patch:
        patch.setattr(BuildJournal, "append", second)
        build.run()
    assert len(TokenStore(build.paths.store)) > 0


def test_picture_build_fails_when_no_picture_can_be_used(make_build, folder):
    pictures, add = folder
    add("a.png", 1, "狗" * 30)
    build = make_build(pictures)
    with pytest.raises(InputError, match=r"none of 1 picture can be used, as .*; the first: .*a\.png: a caption has"):
        build.run()
    assert len(left_out(build)) == 1
    assert not build.paths.work.exists()
    add("a.png", 1, "狗")
    with pytest.raises(InputError, match=r"the held-out share took all of 1 picture: lower it, --held-out 0"):
        make_build(pictures, held_out=0.9999999).run()
    assert make_build(pictures, held_out=0).run().warnings() == []


def test_build_report_warns_of_equal_captions_and_of_no_held_out_picture(make_build, folder):
    pictures, add = folder
    for number in range(3):
        add(f"{number}.png", number, "一只狐狸")
    assert make_build(pictures, held_out=0.0001).run().warnings() == [
        "all 3 captions are the same: a model cannot learn to distinguish the pictures by text",
        "none of 3 pictures fell into the held-out share of 0.0001: there is no held-out store; a larger share is "
        "--held-out 0.2",
    ]


def test_picture_build_prints_rate_and_time_left_without_a_terminal(make_build, folder, monkeypatch, capsys):
    monkeypatch.setattr(module, "LINE_SECONDS", 0.0)
    pictures, add = folder
    for number in range(10):
        add(f"{number}.png", number, "一只狐狸")
    make_build(pictures).run()
    lines = capsys.readouterr().err.splitlines()
    assert [re.sub(r"[\d.]+ pictures/s, (< )?[\d.]+ m?s left", "…", line) for line in lines] == [
        "store: 7 of 10 pictures, …",
        "store: 10 of 10 pictures, …",
    ]


def test_fit_picture_crops_pads_or_stretches():
    image = Image.new("RGB", (80, 40), "red")
    image.paste("blue", (0, 0, 20, 40))
    cropped, padded, stretched = (fit_picture(image, 40, rule) for rule in ("crop", "pad", "stretch"))
    assert {each.shape for each in (cropped, padded, stretched)} == {(40, 40, 3)}
    assert cropped[20, 2].tolist() == [255, 0, 0]
    assert padded[2, 20].tolist() == padded[37, 20].tolist() == [255, 255, 255]
    assert padded[20, 2].tolist() == stretched[2, 2].tolist() == [0, 0, 255]


@pytest.mark.parametrize(
    ("text", "expected"),
    [("  ＡＢ　　Ｃ\n", "AB C"), ("一只\t\x07狐狸", "一只 狐狸"), ("①，ﬁ", "1,fi"), ("👩‍🚀", "👩‍🚀")],
)
def test_normalize_caption_gives_nfkc_and_single_spaces(text, expected):
    assert normalize_caption(text) == expected


def test_picture_settings_need_opencc_to_convert_characters(make_build, folder):
    pictures, add = folder
    add("a.png", 1, "一隻狐狸")
    build = make_build(pictures, simplified=True, held_out=0)
    try:
        import opencc  # noqa: F401
    except ImportError:
        with pytest.raises(InputError, match=r'needs the package opencc: pip install "cogview\[data\]"'):
            build.run()
    else:
        build.run()
        text = TokenStore(build.paths.store)[0]["text"]
        assert build.text_tokenizer.decode(text[text != NO_TOKEN].tolist()) == "一只狐狸"
