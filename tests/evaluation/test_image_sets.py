"""Sets of images: what is read from folders, shards and stores, their keys and hashes, and pairs that are refused."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cogview.checkpoints.image_tokenizer import codebook_hash, load_image_tokenizer
from cogview.data.store import StoreHeader
from cogview.data.store_writer import StoreWriter
from cogview.errors import InputError
from cogview.evaluation.image_pairs import as_pixels
from cogview.evaluation.image_sets import StoredSet, match_keys, open_image_set
from cogview.evaluation.image_statistics import SquareResize


def no_tokenizer():
    raise AssertionError("no store is opened")


def open_set(path):
    return open_image_set(Path(path), no_tokenizer)


@pytest.fixture
def folder(tmp_path, monkeypatch, save_image):
    monkeypatch.chdir(tmp_path)
    for number in range(6):
        save_image(f"pictures/{'ab'[number % 2]}/{number}.png", number)
    return Path("pictures")


def write_shard(path, members):
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def read(images, workers=0):
    return [(each.key, each.sha256, each.pixels) for each in images.read(as_pixels, workers)]


def assert_same(found, expected):
    assert [each[:2] for each in found] == [each[:2] for each in expected]
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one[2], other[2])


def test_image_set_of_a_folder_is_that_of_its_shards(folder):
    """Names, hashes and pixels agree; captions are not needed, and other members are passed over."""
    members = {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*.png"))}
    Path("shards").mkdir()
    names = list(members)
    write_shard("shards/1.tar", {name: members[name] for name in names[3:]} | {"a/0.txt": b"caption"})
    write_shard("shards/0.tar", {"note.json": b"{}"} | {name: members[name] for name in names[:3]})
    images = open_set("pictures")
    assert (images.name, images.keys) == ("pictures", ["a/0", "a/2", "a/4", "b/1", "b/3", "b/5"])
    assert_same(read(open_set("shards")), read(images))
    write_shard("all.tar", members)
    assert_same(read(open_set("all.tar")), read(images))
    match_keys(open_set("all.tar"), images)


@pytest.mark.multiprocess
def test_worker_processes_read_the_same_images(folder):
    assert_same(read(open_set("pictures"), workers=2), read(open_set("pictures")))


def test_broken_pictures_are_named(folder):
    Path("pictures/a/2.png").write_bytes(b"nothing")
    Path("pictures/b/1.png").write_bytes(b"")
    Path("pictures/c.heic").write_bytes(b"nothing")
    problems = [each.problem for each in open_set("pictures").read(as_pixels) if each.pixels is None]
    assert len(problems) == 3
    assert problems[0].startswith("pictures/a/2.png is no image that can be read")
    assert problems[1] == "pictures/b/1.png is empty, expected an image"
    assert problems[2].startswith("pictures/c.heic: this format is not read")


def test_image_set_of_a_shard_that_is_cut_off_has_a_problem(folder):
    picture = Path("pictures/a/0.png").read_bytes()
    write_shard("cut.tar", {"0.png": picture, "1.png": bytes(5000)})
    whole = Path("cut.tar").read_bytes()
    Path("cut.tar").write_bytes(whole[: 1024 + -(-len(picture) // 512) * 512 + 1000])
    found = list(open_set("cut.tar").read(as_pixels))
    assert [each.pixels is None for each in found] == [False, True]
    assert "the archive is cut off within it, after 1000 of 5000 bytes" in found[1].problem
    Path("cut.tar").write_bytes(whole[:700])
    with pytest.raises(InputError, match=r"cut\.tar has no pictures; the first problem: cut\.tar/0\.png: .* cut off"):
        open_set("cut.tar")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("none", "none does not exist; expected a folder of pictures"),
        ("empty", "empty has no pictures: looked for names in"),
        ("list.csv", r"list\.csv is a file; expected a folder of pictures"),
        ("text.tar", r"text\.tar has no pictures"),
        ("noise.tar", r"noise\.tar is no tar archive"),
    ],
)
def test_open_image_set_refuses(folder, path, message):
    Path("empty").mkdir()
    Path("list.csv").write_text("file,caption\n", encoding="utf-8")
    write_shard("text.tar", {"0.txt": b"caption"})
    Path("noise.tar").write_bytes(bytes(range(256)) * 8)
    with pytest.raises(InputError, match=message):
        open_set(path)


@pytest.fixture
def make_store(tmp_path, tiny_checkpoint):
    """Return a function that writes a store of rows of image codes, and its image tokenizer."""
    tokenizer = load_image_tokenizer(tiny_checkpoint / "image")

    def make(codes, codebook=None):
        header = StoreHeader(
            fields={"text": 2, "image": 64},
            grid=8,
            num_image_codes=len(tokenizer.codebook),
            num_text_pieces=100,
            layouts=("generate",),
            codebook_sha256=codebook or codebook_hash(tokenizer),
            text_sha256="0" * 64,
        )
        path = tmp_path / f"store-{len(codes)}-{codebook is None}"
        with StoreWriter(path, header) as writer:
            text = np.ones((len(codes), 2), np.uint16)
            writer.append({"text": text, "image": codes.astype(np.uint16)})
        return path

    return make, tokenizer


def test_stored_set_decodes_each_picture_once(make_store):
    make, tokenizer = make_store
    codes = np.random.default_rng(0).integers(0, len(tokenizer.codebook), (70, 64))
    rows = np.concatenate([codes[:1], codes])  # the first picture has two captions
    images = open_image_set(make(rows), lambda: tokenizer)
    assert isinstance(images, StoredSet)
    assert images.keys == [f"{number:09d}" for number in range(70)]
    found = read(images)
    assert [each[0] for each in found] == images.keys
    assert len({each[1] for each in found}) == 70
    assert {each[2].shape for each in found} == {(64, 64, 3)}
    assert_same(read(open_image_set(make(codes), lambda: tokenizer)), found)


def test_stored_set_of_another_codebook_is_refused(make_store):
    make, tokenizer = make_store
    with pytest.raises(InputError, match="was made with codebook_sha256"):
        open_image_set(make(np.zeros((2, 64)), codebook="1" * 64), lambda: tokenizer)


def test_match_keys_names_what_is_missing(folder, save_image):
    for number in (0, 2, 7):
        save_image(f"other/a/{number}.jpg", number)
    with pytest.raises(
        InputError, match="pairs need pictures of the same names, pictures has 6 and other has 3"
    ) as one:
        match_keys(open_set("pictures"), open_set("other"))
    assert str(one.value).endswith("only in pictures: a/4, b/1, b/3 and 1 more; only in other: a/7")
    save_image("other/a/0.png")
    with pytest.raises(InputError, match="other has several pictures of one name: a/0"):
        match_keys(open_set("pictures"), open_set("other"))


def test_square_resize_crops_pads_or_stretches():
    pixels = np.zeros((10, 30, 3), np.uint8)
    pixels[:, 10:20] = 200
    image = Image.fromarray(pixels)
    assert (SquareResize(side=10)(image) == 200).all()
    padded = SquareResize(side=30, rule="pad")(image)
    assert (padded[:10] == 255).all()
    np.testing.assert_array_equal(padded[10:20], pixels)
    stretched = SquareResize(side=30, rule="stretch", filter="box")(image)
    np.testing.assert_array_equal(stretched, pixels.repeat(3, axis=0))
    record = SquareResize(side=30, rule="stretch", filter="box").record()
    assert (record.side, record.filter, record.antialias, record.fit) == (30, "box", True, "stretch")
