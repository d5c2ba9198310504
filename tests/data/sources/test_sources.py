"""Sources of captioned pictures: what each yields, what it names as a problem, and what it refuses."""

import json
import os
import tarfile
import tracemalloc
from pathlib import Path

import pytest

from cogview.data.sources.columns import choose_columns
from cogview.data.sources.open import open_source
from cogview.data.sources.tables import TableOptions
from cogview.errors import InputError


@pytest.fixture
def read(tmp_path, monkeypatch):
    """Return a function that opens a source in an empty folder: its records, problems by name, and notes."""
    monkeypatch.chdir(tmp_path)

    def run(name: str, **options):
        notes: list[str] = []
        source = open_source(Path(name), TableOptions(**options), notes.append)
        records = list(source)
        assert len(source) == len(records)
        used = {record.name: record.captions for record in records if record.file is not None}
        return used, {record.name: record.problem for record in records if record.file is None}, notes

    return run


def write(name: str, content: str | bytes = b"") -> None:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())


def test_open_source_yields_the_same_pictures_of_each_kind(picture_sources):
    found = {}
    for kind, path in picture_sources.items():
        records = list(open_source(path, TableOptions(), lambda note: None))
        assert all(record.problem is None for record in records)
        found[kind] = [(Path(record.name).name, record.captions) for record in records]
    assert len(found["folder"]) == 40
    assert found["folder"][5] == ("005.png", ("红色背景上的两只狐狸", "一只狗"))
    assert all(each == found["folder"] for each in found.values())


def test_picture_folder_names_pictures_and_captions_without_partner(read):
    for name in ("a.jpg", "b/c.png", "b/alone.png", "empty.webp", "d.svg", ".hidden/e.png", ".f.png"):
        write(name)
    write("a.txt", "\ufeff一只狐狸\r\n\r\n 另一只 \n")
    write("b/c.txt", "一只狗")
    write("empty.txt", " \n")
    write("README.txt", "about")
    used, problems, _ = read(".")
    assert used == {"a.jpg": ("一只狐狸", "另一只"), "b/c.png": ("一只狗",)}
    assert problems == {
        "README.txt": "a caption without a picture: none of this name is beside it",
        "b/alone.png": "a picture without a caption: expected alone.txt beside it",
        "d.svg": "this format is not read; expected PNG, JPEG, WebP, GIF, BMP, TIFF or PPM",
        "empty.webp": "a picture without a caption: empty.txt is empty",
    }


def test_picture_folder_enters_a_folder_once_when_links_form_a_loop(read):
    """A link to the folder above made the search endless."""
    write("pictures/inner/a.png")
    write("pictures/inner/a.txt", "一只狐狸")
    write("elsewhere/b.png")
    write("elsewhere/b.txt", "一只狗")
    Path("pictures/inner/loop").symlink_to("..")
    Path("pictures/linked").symlink_to(Path("elsewhere").resolve())
    used, _, _ = read("pictures")
    assert list(used) == ["pictures/inner/a.png", "pictures/linked/b.png"]


def test_picture_folder_passes_links_that_lead_nowhere_on_to_the_reader(read):
    """They are named as files that do not exist, or that cannot be read."""
    for name, target in (("gone", "nowhere.png"), ("left", "right.png"), ("right", "left.png")):
        Path(f"{name}.png").symlink_to(target)
        write(f"{name}.txt", "狐狸")
    used, problems, _ = read(".")
    assert (list(used), problems) == (["gone.png", "left.png", "right.png"], {})


def test_picture_folder_reads_captions_in_gbk_and_names_other_encodings(read):
    for name in ("gbk", "latin"):
        write(f"{name}.png")
    write("gbk.txt", "蓝色背景上的三只狐狸，一只狗。".encode("gbk"))
    write("latin.txt", "gâteau".encode("latin-1"))
    used, problems, _ = read(".")
    assert used == {"gbk.png": ("蓝色背景上的三只狐狸，一只狗。",)}
    assert problems["latin.png"].startswith("latin.txt is not UTF-8: byte 1 in line 1 is 0xe2")


def test_picture_folder_takes_names_with_newlines_and_in_gbk(read):
    for stem in (b"a\nb", "狐狸".encode("gbk")):
        for suffix in (b".png", b".txt"):
            Path(os.fsdecode(stem + suffix)).write_bytes("一只狐狸".encode())
    used, problems, _ = read(".")
    assert sorted(map(os.fsencode, used)) == [b"a\nb.png", "狐狸".encode("gbk") + b".png"]
    assert not problems


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("a.txt",), r"^\. has no pictures, expected NAME\.jpg beside NAME\.txt$"),
        (("a.jpg", "list.csv"), r"has no captions NAME\.txt, .*; it holds list\.csv: give list\.csv as the source"),
        (("shards/0.tar",), r"has no pictures, .*; it holds shards/0\.tar"),
    ],
)
def test_picture_folder_refuses_a_folder_without_pairs(read, names, message):
    for name in names:
        write(name, "x")
    with pytest.raises(InputError, match=message):
        read(".")


def test_picture_table_guesses_columns_and_says_so(read):
    write("list.tsv", "编号\t文件名\t描述\n1\ta.png\t一只狐狸\n2\ta.png\t“两只”\n3\tb.png\t狗\n".encode("gbk"))
    used, problems, notes = read("list.tsv")
    assert used == {"a.png": ("一只狐狸", "“两只”"), "b.png": ("狗",)}
    assert not problems
    assert notes[1:] == ['list.tsv: pictures in "文件名", captions in "描述"']
    assert "GB18030" in notes[0]


def test_picture_table_takes_given_columns_and_numbers(read):
    write("list.jsonl", '{"id": 7.0, "zh": "狐狸", "en": "fox"}\n{"id": 8, "zh": null, "en": ["dog", "a dog"]}\n')
    used, problems, notes = read("list.jsonl", image_column="id", caption_columns=("zh", "en"), folder=Path("in"))
    assert (used, problems, notes) == ({"in/7": ("狐狸", "fox"), "in/8": ("dog", "a dog")}, {}, [])


def test_picture_table_names_lines_and_pictures_that_cannot_be_used(read):
    write("in/named.png")
    write("in/unnamed.png")
    write("list.csv", 'file,caption\nin/named.png,狐狸\n,狗\nin/x.png,\na,b,c\n"open,\n')
    used, problems, _ = read("list.csv")
    assert used == {"in/named.png": ("狐狸",)}
    assert problems.pop("list.csv, line 6").startswith("the quotation marks are not understood")
    assert problems == {
        "list.csv, line 3": 'the column "file" names no picture',
        "in/x.png": "a picture without a caption in line 4 of list.csv",
        "list.csv, line 5": "3 columns, expected 2; a text that holds a comma belongs between quotation marks",
        "in/unnamed.png": "a picture without a caption: list.csv does not name it",
    }


@pytest.mark.parametrize("name", ["list.csv", "list.tsv", "list.jsonl"])
def test_picture_table_holds_no_row_in_memory(read, name):
    """All rows were in memory, twice: gigabytes for ten million."""
    peaks = []
    for count in (500, 4000):
        rows = [(f"{number // 2}.jpg", f"{number}" + "只狐狸" * 50) for number in range(count)]
        if name.endswith("l"):
            lines = [json.dumps({"image": image, "text": text}) for image, text in rows]
        else:
            lines = [("\t" if "tsv" in name else ",").join(row) for row in [("image", "text"), *rows]]
        write(name, "\n".join(lines))
        del lines, rows
        tracemalloc.start()
        try:
            source = open_source(Path(name), TableOptions(), print)
            assert sum(len(record.captions) == 2 for record in source) == len(source) == count // 2
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
    assert peaks[1] - peaks[0] < 50 * 3500  # of 450 bytes in a row
    assert peaks[1] < 1_000_000  # no buffer of the whole file either


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("list.csv", "a,caption\nx,y\n", r'column of pictures in list\.csv .* --image-column among "a", "caption"'),
        ("list.csv", "file,b\nx,y\n", r'column of captions in list\.csv .* --caption-column among "b"'),
        ("list.csv", "file,file\nx,y\n", r'list\.csv: line 1 names the column "file" twice'),
        ("list.csv", "", r"list\.csv has no rows that can be used"),
        (  # a line in GBK among lines in UTF-8
            "list.csv",
            "file,caption\na.png,狐狸\n".encode() + "b.png,蓝色的狗\n".encode("gbk") + "c.png,猫\n".encode(),
            r"list\.csv is not UTF-8: byte 32 in line 3 is 0xc0",
        ),
        ("list.jsonl", "[1]\n", r"list\.jsonl has no rows that can be used; line 1: expected an object in braces"),
        ("coco.json", "{}", r'coco\.json has no list of objects under "images"; expected COCO'),
        ("coco.json", "{", r"coco\.json is not JSON"),
        ("list.xlsx", "", r'list\.xlsx: the suffix "\.xlsx" is unknown; expected a folder, \.csv'),
        ("all.tar.gz", "", r"all\.tar\.gz is compressed: unpack it first"),
        ("a.tar", "no tar" * 100, r"a\.tar is no tar archive: invalid header"),
    ],
)
def test_open_source_refuses_what_cannot_be_read(read, name, content, message):
    write(name, content)
    with pytest.raises(InputError, match=message):
        read(name)


def test_open_source_lists_the_columns_when_one_is_unknown(read):
    write("list.csv", "file,text\nx,y\n")
    with pytest.raises(InputError, match=r'list\.csv has no column "caption"; its columns: "file", "text"'):
        read("list.csv", caption_columns=("caption",))
    with pytest.raises(InputError, match=r"the source nothing does not exist"):
        read("nothing")


def test_choose_columns_takes_numbered_captions_together():
    columns = choose_columns(["Image Path", "caption_1", "caption_2", "Text"], None, (), "t")
    assert (columns.picture, columns.captions) == ("Image Path", ("caption_1", "caption_2"))


@pytest.mark.parametrize(
    ("names", "captions"),
    [
        (["文件名", "中文说明"], ("中文说明",)),
        (["图片", "说明"], ("说明",)),
        (["图片", "说明文字"], ("说明文字",)),
        (["图片", "描述", "备注"], ("描述",)),
        (["图片", "中文标题"], ("中文标题",)),
        (["图片", "文本"], ("文本",)),
        (["图片", "内容（中文）"], ("内容（中文）",)),
        (["圖片", "圖說"], ("圖說",)),
        (["file", "caption", "caption_zh"], ("caption_zh",)),
        (["file", "caption", "中文说明2", "中文说明1"], ("中文说明2", "中文说明1")),
        (["file", "en", "zh"], ("zh",)),
        (["file", "caption", "中文"], ("caption",)),
    ],
)
def test_choose_columns_guesses_chinese_captions(names, captions):
    """The models are of Chinese text: of two usual columns, the one that is marked as Chinese is taken."""
    assert choose_columns(names, None, (), "t").captions == captions


@pytest.mark.parametrize("names", [["file", "英文说明"], ["file", "caption_en"], ["file", "备注"]])
def test_choose_columns_guesses_no_column_of_another_language(names):
    with pytest.raises(InputError, match="the column of captions in t is not known"):
        choose_columns(names, None, (), "t")


def test_picture_table_needs_pyarrow_for_parquet(read):
    write("a.parquet", b"PAR1")
    expected = r'needs pyarrow: pip install "cogview\[data\]"|is no Parquet file that can be read'
    with pytest.raises(InputError, match=expected):
        read("a.parquet")


def test_coco_captions_names_images_and_annotations_without_partner(read):
    images = [{"id": 1, "file_name": "a.png"}, {"id": 2, "file_name": "b.png"}, {"id": 3}]
    annotations = [
        {"id": 10, "image_id": 1, "caption": "狐狸"},
        {"id": 11, "image_id": "1", "caption": "狗"},
        {"id": 12, "image_id": 9, "caption": "猫"},
        {"id": 13, "image_id": 1},
    ]
    write("coco.json", json.dumps({"images": images, "annotations": annotations}))
    used, problems, _ = read("coco.json", folder=Path("val"))
    assert used == {"val/a.png": ("狐狸", "狗")}
    assert problems == {
        "val/b.png": "a picture without a caption: coco.json has no annotation for it",
        "coco.json, image 3": "an image without a file_name",
        "coco.json, annotation 12": "a caption without a picture: no image 9",
        "coco.json, annotation 13": "an annotation without a caption",
    }


def make_tar(name: str, members: dict[str, bytes], form: int = tarfile.PAX_FORMAT) -> None:
    """Write an archive."""
    with tarfile.open(name, "w", format=form) as archive:
        for member, content in members.items():
            write("member", content)
            archive.add("member", arcname=member)


def test_tar_shard_groups_members_by_key(read):
    members = {
        "x/1.jpg": b"JPEG",
        "x/1.txt": "狐狸\n狗\n".encode(),
        "2.PNG": b"P",
        "2.json": json.dumps({"text": "猫", "id": 2}).encode(),
        "3.jpg": b"J",
        "4.txt": b"alone",
        "5.cls": b"7",
    }
    make_tar("a.tar", members)
    used, problems, _ = read("a.tar")
    assert used == {"a.tar/x/1.jpg": ("狐狸", "狗"), "a.tar/2.PNG": ("猫",)}
    assert problems == {
        "a.tar/3.jpg": "a picture without a caption: expected 3.txt",
        "a.tar/4.txt": "a caption without a picture under the key 4",
        "a.tar/5": "no picture and no caption under the key 5",
    }
    first = next(iter(open_source(Path("a.tar"), TableOptions(), print)))
    assert first.file.read_part() == b"JPEG"


@pytest.mark.parametrize(
    ("size", "name", "problem"),
    [
        (0, "", "or damaged at its end"),
        (7, "", "or damaged at its end"),
        (512, "/0.jpg", "within it, after 0 of 700 bytes"),
        (600, "/0.jpg", "within it, after 88 of 700 bytes"),
        (3 * 512, "", "or damaged at its end"),
        (4 * 512, "/1.jpg", "within it, after 0 of 700 bytes"),
        (5 * 512, "/1.jpg", "within it, after 512 of 700 bytes"),
        (6 * 512, "", "or damaged at its end"),
        (6 * 512 + 7, "", "or damaged at its end"),
    ],
    ids="{0}".format,
)
def test_tar_shard_names_the_member_where_an_archive_is_cut(read, size, name, problem):
    """``tarfile`` ends at a cut within a header or between two members as if the archive were whole.

    A cut within the first header was refused, and with it all other sources of the build.
    """
    make_tar("whole.tar", {f"{number}.jpg": b"x" * 700 for number in range(3)}, tarfile.USTAR_FORMAT)
    write("cut.tar", Path("whole.tar").read_bytes()[:size])
    _, problems, _ = read("cut.tar")
    assert problems[f"cut.tar{name}"] == f"the archive is cut off {problem}"
    assert len(problems) == 1 + size // (3 * 512)  # the whole members before it lack captions


def test_tar_shard_reports_a_cut_within_a_long_name(read):
    """The name of a member beyond 100 characters stands in a part of its own."""
    make_tar("whole.tar", {"狐" * 100 + ".jpg": b"x"})
    write("cut.tar", Path("whole.tar").read_bytes()[:700])
    _, problems, _ = read("cut.tar")
    assert problems == {"cut.tar": "the archive is cut off or damaged at its end"}


def test_tar_shard_ends_at_a_member_with_a_negative_size(read):
    """The header behind such a member is the one before it, and the archive was read for ever."""
    member = tarfile.TarInfo("1.jpg")
    member.size = -512
    make_tar("whole.tar", {"0.jpg": b"x"}, tarfile.USTAR_FORMAT)
    write("back.tar", Path("whole.tar").read_bytes()[:1024] + member.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    _, problems, _ = read("back.tar")
    assert problems["back.tar"] == "the archive is cut off or damaged at its end"


def test_coco_captions_names_images_and_annotations_without_an_id(read):
    """An image without an id had the captions of all annotations that name none."""
    images, annotations = [{"file_name": "a.png"}], [{"caption": "狗"}]
    write("coco.json", json.dumps({"images": images, "annotations": annotations}))
    used, problems, _ = read("coco.json")
    assert not used
    assert problems == {
        "a.png": "an image without an id, which no annotation can name",
        "coco.json, annotation 0": "a caption without a picture: no image None",
    }
