"""Boxes of a table become the piece of the caption that names the object at each code."""

import csv
import io
import json
import tarfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from cogview.checkpoints.checkpoint import read_config
from cogview.checkpoints.image_tokenizer import load_image_tokenizer
from cogview.cli.main import main
from cogview.data.builders.boxes import NamedBox, name_codes, own_pieces, parse_boxes, place_boxes
from cogview.data.builders.pictures import PictureBuild, StorePaths
from cogview.data.builders.prepare import PictureSettings, fit_box, fit_picture, normalize_caption
from cogview.data.sources.open import open_source
from cogview.data.sources.tables import TableOptions
from cogview.data.store import NO_TOKEN, TokenStore
from cogview.errors import InputError
from cogview.image_io.reading import read_image
from cogview.tokenizers.text import TextTokenizer, train_text_tokenizer
from tests.factories import tiny_text_tokenizer

CAPTION = "狐狸在狗的左边"
OPTIONS = TableOptions(boxes_column="boxes")


def draw(path: Path, size: tuple[int, int], boxes: list[list[float]], orientation: int = 1) -> None:
    """Save a black picture with red, then blue rectangles; a camera stores it turned by an EXIF orientation."""
    image = Image.new("RGB", size)
    for (x, y, width, height), colour in zip(boxes, ("red", "blue"), strict=True):
        ImageDraw.Draw(image).rectangle((x, y, x + width - 1, y + height - 1), fill=colour)
    turned = {1: None, 3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90}[orientation]
    if turned is not None:
        image = image.transpose(turned)
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(path, exif=exif)


@pytest.mark.parametrize("rule", ["crop", "pad", "stretch"])
@pytest.mark.parametrize("size", [(110, 64), (54, 80), (64, 64), (203, 90)])
@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_boxes_give_the_codes_that_show_the_object(tmp_path, rule, size, orientation):
    """A pixel in the middle of each code, at both sizes, has the colour of the object that is named there."""
    width, height = size
    boxes = [[0, 0, width * 0.38, height * 0.6], [width * 0.65, height * 0.47, width * 0.35, height * 0.53]]
    boxes = [[round(edge) for edge in box] for box in boxes]
    draw(tmp_path / "a.png", size, boxes, orientation)
    image = read_image(tmp_path / "a.png")
    assert image.size == size
    cell = json.dumps([{"text": name, "box": box} for name, box in zip(("狐狸", "狗"), boxes, strict=True)])
    parsed = parse_boxes(cell, normalize_caption)
    placed, left_out, is_cut = place_boxes(parsed, size, lambda box: fit_box(box, size, 64, rule))
    assert (left_out, is_cut) == ([], False)
    named = name_codes(placed, {"狐狸": 7, "狗": 9}, 8).reshape(8, 8)
    for scale in (1, 2):
        pixels = fit_picture(image, 64 * scale, rule)
        middle = pixels.reshape(8, 8 * scale, 8, 8 * scale, 3)[:, 4 * scale - 1 : 4 * scale + 1]
        middle = middle[:, :, :, 4 * scale - 1 : 4 * scale + 1].mean(axis=(1, 3))
        is_object = middle.max(axis=-1) - middle.min(axis=-1) > 127  # neither black nor white
        shown = np.where(is_object, np.where(middle[:, :, 0] > middle[:, :, 2], 7, 9), NO_TOKEN)
        assert np.array_equal(shown, named), (shown, named)
    assert set(named.ravel().tolist()) == {7, 9, NO_TOKEN}


def test_name_codes_puts_the_smaller_box_in_front_and_keeps_thin_ones():
    ball = NamedBox(name="球", box=(0.45, 0.45, 0.55, 0.55))
    dog = NamedBox(name="狗", box=(0.25, 0.25, 0.75, 0.75))
    line = NamedBox(name="线", box=(0, 0.99, 1, 1))
    for order in ([ball, dog, line], [line, dog, ball]):
        named = name_codes(order, {"球": 1, "狗": 2, "线": 3}, 4).reshape(4, 4)
        expected = np.full((4, 4), NO_TOKEN)
        expected[1:3, 1:3], expected[3] = 2, 3
        expected[2, 2] = 1  # the middle of the ball lies on the edge of four codes: it has the last
        assert np.array_equal(named, expected)
    assert (name_codes([dog], {"球": 1}, 4) == NO_TOKEN).all()


@pytest.mark.parametrize(
    ("caption", "names", "expected"),
    [
        ("狐狸在狗的左边", ("狐狸", "狗"), {"狐狸": "狐", "狗": "狗"}),
        ("小狗和小猫", ("小狗", "小猫"), {"小狗": "狗", "小猫": "猫"}),  # 小 would name either
        ("苹果在青苹果的左边", ("苹果", "青苹果"), {"青苹果": "青"}),  # the pieces of 苹果 are all in 青苹果 too
        ("狗和狗", ("狗",), {"狗": "狗"}),
        ("一只猫", ("狗",), {}),
        ("饕餮和猫", ("饕餮", "猫"), {"饕餮": "<0xE9>", "猫": "猫"}),  # spelt in bytes
        ("猫", (), {}),
    ],
)
def test_own_pieces_takes_the_first_piece_that_only_the_name_has(caption, names, expected):
    tokenizer = tiny_text_tokenizer(("狐狸在狗的左边苹果青和猫一只小",), 400, coverage=1.0, max_piece_length=1)
    found = own_pieces(names, caption, tokenizer)
    assert {name: tokenizer.pieces[piece] for name, piece in found.items()} == expected


def test_own_pieces_takes_a_piece_that_reaches_beyond_one_name_but_not_into_another():
    words = ("左边是狐狸", "猫和狗")
    tokenizer = TextTokenizer(train_text_tokenizer(["左边是狐狸，猫和狗，右"], size=400, coverage=1.0, words=words))
    found = own_pieces(("狐狸", "猫", "狗"), "左边是狐狸，猫和狗", tokenizer)
    assert {name: tokenizer.pieces[piece] for name, piece in found.items()} == {"狐狸": "左边是狐狸"}


def test_encode_with_spans_gives_the_characters_of_each_piece():
    tokenizer = tiny_text_tokenizer(("狐狸 cat",), 400, coverage=1.0)
    text = "狐狸饕 cat餮"
    ids, spans = tokenizer.encode_with_spans(text)
    assert ids == tokenizer.encode(text)
    assert spans[0][0] == 0
    assert spans[-1][1] == len(text)
    for i, (start, end) in zip(ids, spans, strict=True):
        piece = tokenizer.pieces[i]
        if piece.startswith("<0x"):
            assert int(piece[3:5], 16) in text[start:end].encode()
        else:
            assert text[start:end] == piece.replace("\u2581", " ")


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ("狐狸", r"not JSON .*expected \[\{\"text\": \"狐狸\", \"box\": \[x, y, width, height\]\}"),
        ('{"text": "狐狸"}', "no list"),
        ('[{"box": [1, 2, 3, 4]}]', 'one has no "text"'),
        ('[{"text": " ", "box": [1, 2, 3, 4]}]', 'one has no "text"'),
        ('[{"text": "狐狸", "box": [1, 2, 3]}]', 'one has no "box"'),
        ('[{"text": "狐狸", "box": [1, 2, 3, true]}]', 'one has no "box"'),
        ('[{"text": "狐狸", "box": [1, 2, -3, 4]}]', 'one has no "box" with positive width'),
        ('[{"text": "狐狸", "box": [1, 2, 3, 1e400]}]', "its boxes are left out"),
        ("[" * 1000, "not JSON"),
        (f'[{{"text": "狐狸", "box": [{"9" * 5000}, 1, 1, 1]}}]', r"a number of 5,000 digits is too large: 99999999…"),
        (f'[{{"text": "狐狸", "box": [{"9" * 4000}, 1, 1, 1]}}]', r'one has no "box" with positive width and height'),
    ],
)
def test_parse_boxes_refuses_other_forms(cell, message):
    with pytest.raises(InputError, match=message):
        parse_boxes(cell, normalize_caption)


def test_parse_boxes_normalizes_names_and_takes_an_empty_cell():
    assert parse_boxes('[{"text": " Ｃａｔ　 a", "box": [1, 2, 3, 4.5]}]', normalize_caption) == [
        NamedBox(name="Cat a", box=(1, 2, 4, 6.5))
    ]
    assert parse_boxes(" ", normalize_caption) == parse_boxes("null", normalize_caption) == []


def test_place_boxes_leaves_out_what_the_picture_lacks():
    boxes = [NamedBox(name="狗", box=box) for box in ((-0.6, 0, 64, 48.9), (0, 0, 66, 9), (640, 0, 700, 9))]
    placed, left_out, is_cut = place_boxes(boxes, (64, 48), partial(fit_box, size=(64, 48), side=64, rule="stretch"))
    assert [box.box for box in placed] == [(0, 0, 1, 1)]  # annotations are rounded
    assert left_out[0] == "a box reaches beyond the picture of 64 x 48 pixels: 狗, [0, 0, 66, 9]"
    assert (len(left_out), is_cut) == (2, False)


@pytest.fixture
def table(tmp_path):
    """Return a function that writes rows of (caption, boxes), each with a picture, as a source of each kind."""

    def write(rows: list[tuple[str, list | str]], folder: Path = tmp_path / "in") -> dict[str, Path]:
        folder.mkdir(exist_ok=True)
        for number in range(len(rows)):
            draw(folder / f"{number:02d}.png", (80, 64), [[0, 0, 20 + number, 64], [40, 0, 40, 64 - number]])
        with (folder / "list.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["image", "caption", "boxes"])
            for number, (caption, boxes) in enumerate(rows):
                cell = boxes if isinstance(boxes, str) else json.dumps(boxes, ensure_ascii=False)
                writer.writerow([f"{number:02d}.png", caption, cell])
        lines = [{"image": f"{n:02d}.png", "caption": text, "boxes": boxes} for n, (text, boxes) in enumerate(rows)]
        (folder / "list.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
        with tarfile.open(folder / "shard.tar", "w") as archive:
            for number, (caption, boxes) in enumerate(rows):
                archive.add(folder / f"{number:02d}.png", arcname=f"{number:02d}.png")
                content = json.dumps({"caption": caption, "boxes": boxes}).encode()
                info = tarfile.TarInfo(f"{number:02d}.json")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
        return {
            kind: folder / name for kind, name in (("csv", "list.csv"), ("jsonl", "list.jsonl"), ("tar", "shard.tar"))
        }

    return write


@pytest.fixture
def build(tiny_checkpoint, tmp_path):
    """Return a function that builds the stores of a source: the store, and the report by file."""
    text, image = TextTokenizer.load(tiny_checkpoint / "text.model"), load_image_tokenizer(tiny_checkpoint / "image")

    def run(source: Path, name: str = "store", **settings):
        given = {"text_width": read_config(tiny_checkpoint).max_text, "held_out": 0, "batch_size": 3, "large": True}
        task = PictureBuild(
            paths=StorePaths(store=tmp_path / name),
            sources={str(source): open_source(source, OPTIONS, lambda note: None)},
            text_tokenizer=text,
            image_tokenizer=image,
            settings=PictureSettings(named=True, **given, **settings),
            side=64,
        )
        report = task.run()
        path = task.paths.report
        lines = map(json.loads, path.read_text(encoding="utf-8").splitlines()) if path.exists() else ()
        return tmp_path / name, report, [(Path(line["file"]).name, line["reason"]) for line in lines]

    return run


BOXES = [{"text": "狐狸", "box": [0, 0, 32, 64]}, {"text": "狗", "box": [48, 0, 32, 64]}]


def pieces_at(row: dict[str, np.ndarray], tiny_checkpoint) -> list[list[str]]:
    """Return the pieces that name objects in the upper row of codes."""
    pieces = TextTokenizer.load(tiny_checkpoint / "text.model").pieces
    return [pieces[each] if each != NO_TOKEN else "" for each in row["named"].reshape(8, 8)[0].tolist()]


def test_build_writes_names_for_every_kind_of_source(build, table, tiny_checkpoint):
    rows = [(CAPTION, BOXES), ("一只狗", BOXES[1:]), (CAPTION, None), ("两只猫", [])]
    found = set()
    for kind, path in table(rows).items():
        store, report, left_out = build(path, kind, fit="stretch")
        assert (report.left_out, left_out, report.lacks_names) == (0, [], False), kind
        assert report.notes["its boxes name objects of its captions"] == 2
        found.add((store / "data.mdb").read_bytes())
    assert len(found) == 1
    opened = TokenStore(store)
    assert opened.header.fields == {"text": 20, "image": 64, "large": 256, "named": 64}
    names = [pieces_at(opened[number], tiny_checkpoint) for number in range(4)]
    assert names[0][:3] == [names[0][0]] * 3
    assert names[0][0] in "狐狸"
    assert names[0][3:5] == ["", ""]  # codes 3 and 4 have their centres between the boxes
    assert names[0][5:] == [names[1][7]] * 3
    assert names[1][7] == "狗"
    assert names[2:] == [[""] * 8] * 2


def test_build_of_parquet_takes_lists_of_structs(build, table):
    parquet, arrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    sources = table([(CAPTION, BOXES), (CAPTION, BOXES)])
    lines = [json.loads(line) for line in sources["jsonl"].read_text(encoding="utf-8").splitlines()]
    path = sources["jsonl"].with_suffix(".parquet")
    parquet.write_table(arrow.Table.from_pylist(lines), path)
    stores = [build(source, name)[0] for name, source in (("a", path), ("b", sources["csv"]))]
    assert (stores[0] / "data.mdb").read_bytes() == (stores[1] / "data.mdb").read_bytes()


@pytest.mark.slow
@pytest.mark.multiprocess
def test_build_with_boxes_gives_equal_files_for_any_number_of_workers(build, table):
    path = table([(CAPTION, BOXES), ("一只狗", BOXES)] * 5)["csv"]
    found = {(build(path, f"{n}", num_workers=n)[0] / "data.mdb").read_bytes() for n in (0, 1, 2, 4)}
    assert len(found) == 1


def test_build_keeps_pictures_whose_boxes_are_left_out_and_says_why(build, table):
    outside = [{"text": "狗", "box": [70, 0, 20, 20]}, BOXES[0]]
    rows = [
        (CAPTION, outside),
        (CAPTION, "[{"),
        ("一只猫", BOXES[:1]),
        ("狐狸", [{"text": "狐", "box": [0, 0, 4, 64]}]),
    ]
    store, report, left_out = build(table(rows)["csv"])
    assert len(TokenStore(store)) == 4
    assert [name for name, _ in left_out] == ["00.png", "01.png", "02.png"]
    assert left_out[0][1] == "a box reaches beyond the picture of 80 x 64 pixels: 狗, [70, 0, 20, 20]"
    assert left_out[1][1].startswith("its boxes are left out, they are not JSON")
    assert left_out[2][1] == "a box has a name that no caption has: 狐狸"
    assert report.notes["a box lies outside the square that is kept of it"] == 1  # 4 of the 8 pixels that crop cuts


def test_build_warns_when_no_box_names_an_object(build, table):
    report = build(table([("一只猫", BOXES)])["csv"])[1]
    assert any("the column of boxes names no object of any caption" in line for line in report.warnings())


def test_build_names_the_columns_when_that_of_boxes_is_unknown(table):
    with pytest.raises(InputError, match='has no column "box"; its columns: "image", "caption", "boxes"'):
        open_source(table([(CAPTION, BOXES)])["csv"], TableOptions(boxes_column="box"), lambda note: None)


def test_stores_with_names_are_counted_merged_and_exported(table, tiny_checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = ["--model", str(tiny_checkpoint), "--device", "cpu"]
    path = str(table([(CAPTION, BOXES), ("一只狗", BOXES[1:])])["csv"])
    columns = ["--image-column", "image", "--caption-column", "caption"]
    build = ["data", "build", path, *model, *columns, "--held-out", "0", "--workers", "0", "--fit", "stretch"]
    assert main([*build, "-o", "named", "--boxes-column", "boxes"]) == 0
    assert "note: 2 pictures: its boxes name objects of its captions" in capsys.readouterr().err.splitlines()
    assert main([*build, "-o", "plain"]) == 0
    capsys.readouterr()
    assert main(["data", "stats", "named"]) == 0
    assert "codes with a name: 56%" in capsys.readouterr().out.splitlines()  # 6 and 3 of 8 columns
    assert main(["data", "merge", "named", "named-2", "-o", "all"]) == 2
    capsys.readouterr()
    assert main(["data", "merge", "named", "plain", "-o", "all"]) == 2
    assert "both with boxes or both without" in capsys.readouterr().err
    assert main([*build, "-o", "again", "--boxes-column", "boxes"]) == 0
    assert main(["data", "merge", "named", "again", "-o", "all"]) == 0
    stores = [TokenStore(Path(name)) for name in ("named", "all")]
    assert np.array_equal(stores[1].read(range(4))["named"], np.tile(stores[0].read(range(2))["named"], (2, 1)))
    capsys.readouterr()
    assert main(["data", "export", "named", "--model", str(tiny_checkpoint), "--device", "cpu", "-o", "shards"]) == 0
    assert "note: the names of codes are not exported" in capsys.readouterr().err
