"""``cogview eval text-in-pictures``: real characters that are read, shares computed by hand, and what is refused."""

import importlib.util
import json
from pathlib import Path

import pytest
from PIL import Image, ImageDraw, ImageFont

from cogview.cli.main import main
from cogview.evaluation.manifest import read_result
from cogview.evaluation.ocr import compare_all, open_reader, reading_results
from cogview.evaluation.reading_scores import compare_reading, edit_distance

FONT = Path("/usr/share/fonts/opentype/noto/NotoSansCJK-Regular.ttc")
needs_font = pytest.mark.skipif(not FONT.is_file(), reason="apt install fonts-noto-cjk")


def needs(package):
    return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"needs {package}")


@pytest.fixture
def write_picture(tmp_path, monkeypatch):
    """Return a function that writes a picture with lines of text, 24 pixels high, black on white."""
    monkeypatch.chdir(tmp_path)

    def write(name, *lines):
        font = ImageFont.truetype(str(FONT), 24)
        image = Image.new("RGB", (32 + 24 * max(map(len, lines)), 16 + 40 * len(lines)), "white")
        for number, line in enumerate(lines):
            ImageDraw.Draw(image).text((16, 4 + 40 * number), line, fill="black", font=font)
        image.save(name)

    return write


def evaluate(capsys, *arguments):
    status = main(["eval", *arguments])
    printed = capsys.readouterr()
    return status, printed.out.splitlines(), printed.err.splitlines()


@needs_font
@pytest.mark.slow
@pytest.mark.parametrize(
    "engine", [pytest.param("rapidocr", marks=needs("rapidocr")), pytest.param("ddddocr", marks=needs("ddddocr"))]
)
def test_eval_text_in_pictures_reads_real_characters(write_picture, capsys, engine):
    """The third picture says something else than expected, and the fourth is empty."""
    for name, text in (("a.png", "蓝色背景"), ("b.png", "狐狸坐在雪地"), ("c.png", "自行车")):
        write_picture(name, text)
    Image.new("RGB", (96, 48), "white").save("d.png")
    Path("expected.tsv").write_text(
        "a.png\t“蓝色背景”\nb.png\t狐狸，坐在雪地\nc.png\t自动车\nd.png\t公共汽车\n", encoding="utf-8"
    )
    status, out, err = evaluate(capsys, "text-in-pictures", "expected.tsv", "--ocr", engine, "--json", "-o", "r.json")
    assert (status, err) == (0, ['{"info": "written to r.json"}'])
    rows = [json.loads(line) for line in out]
    assert [row["exact"] for row in rows[:-1]] == [True, True, False, False]
    assert (rows[2]["read"], rows[3]["read"]) == ("自行车", "")
    values = {name: found["value"] for name, found in rows[-1]["results"].items()}
    expected = {"characters": 12 / 17, "words": 3 / 5, "similarity": (1 + 1 + 2 / 3 + 0) / 4, "exact": 0.5}
    assert values == pytest.approx(expected)
    result = read_result(Path("r.json"))
    assert result.manifest.settings["ocr"].split()[0] == engine
    assert result.items.values["exact"] == [1, 1, 0, 0]


@needs_font
@needs("rapidocr")
@pytest.mark.slow
def test_eval_text_in_pictures_reads_several_lines(write_picture, capsys):
    write_picture("a.png", "红色苹果", "两只狐狸")
    Path("expected.tsv").write_text("a.png\t红色苹果 两只狐狸\n", encoding="utf-8")
    status, out, _ = evaluate(capsys, "text-in-pictures", "expected.tsv")
    assert (status, out[0]) == (0, "1 picture read by rapidocr")
    assert [line.split()[:2] for line in out[2:]] == [
        [name, "1.0000"] for name in ("characters", "words", "similarity", "exact")
    ]


@needs_font
@needs("rapidocr")
@pytest.mark.slow
def test_open_reader_reads_single_characters_that_its_detector_misses():
    """The detector finds no line in these pictures; they were read as empty."""
    reader = open_reader("rapidocr")
    font = ImageFont.truetype(str(FONT), 40, index=2)
    for character in "求泽涌":
        image = Image.new("RGB", (96, 64), "white")
        ImageDraw.Draw(image).text((28, 2), character, fill="black", font=font)
        assert reader(image) == character
    assert reader(Image.new("RGB", (96, 64), "white")) == ""


@needs_font
@needs("rapidocr")
@pytest.mark.slow
def test_eval_benchmark_reads_the_pictures_of_chinese_word(write_picture, capsys):
    Path("words.tsv").write_text("level\ttext\tprompt\n1\t猫\t写着“猫”的图\n2\t铧\t写着“铧”的图\n", encoding="utf-8")
    for folder in "12":
        Path(f"out/pictures/{folder}").mkdir(parents=True)
    write_picture("out/pictures/1/U+732B-0.png", "猫")
    command = ["benchmark", "chinese-word", "--prompts", "words.tsv", "--subset", "-o", "out", "--ocr", "rapidocr"]
    status, out, err = evaluate(capsys, *command)
    assert (status, out, len(err)) == (2, [], 1)
    assert "1 of 2 pictures are missing, first out/pictures/2/U+94E7-0.png; the same command without --ocr" in err[0]
    write_picture("out/pictures/2/U+94E7-0.png", "华")
    status, out, _ = evaluate(capsys, *command)
    assert (status, [line.split()[:2] for line in out[2:]]) == (0, [["level_1", "1.0000"], ["level_2", "0.0000"]])


@pytest.mark.parametrize(
    ("read", "expected", "values"),
    [
        ("红色苹果", "红色苹果", (4, 4, 1, 1, 1.0, True)),
        ("红 苹果。", "红色，苹果", (3, 4, 1, 2, 0.75, False)),
        ("果苹", "苹果", (1, 2, 0, 1, 0.0, False)),
        ("", "5G 技术", (0, 4, 0, 2, 0.0, False)),
        ("大大大大", "大", (1, 1, 1, 1, 0.25, False)),
        ("HELLO world", "hello", (5, 5, 1, 1, 0.5, False)),
    ],
)
def test_compare_reading_counts_characters_words_and_edits(read, expected, values):
    found = compare_reading(read, expected)
    assert (found.right_characters, found.characters, found.right_words, found.words) == values[:4]
    assert (found.similarity, found.exact) == (pytest.approx(values[4]), values[5])


@pytest.mark.parametrize(
    ("first", "second", "edits"), [("", "甲乙", 2), ("甲乙丙", "甲丙", 1), ("kitten", "sitting", 3)]
)
def test_edit_distance_counts_insertions_deletions_and_replacements(first, second, edits):
    assert edit_distance(first, second) == edit_distance(second, first) == edits


def test_reading_results_sum_characters_over_pictures():
    results = reading_results(compare_all(["红色苹果", "猫"], ["红色苹果", "狗"]))
    assert results["characters"]["value"] == pytest.approx(4 / 5)
    assert results["exact"]["value"] == pytest.approx(1 / 2)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "f.tsv is empty; expected lines with the name of a picture"),
        ("a.png 猫\n", "f.tsv, line 1: expected the name of a picture, a tab and its text, got a.png 猫"),
        ("a.png\t猫\n\nb.png\t狗\n", "f.tsv, line 2: expected the name of a picture"),
        ("a.png\t。\n", "f.tsv, line 1: the text is empty or holds nothing but punctuation"),
        ("a.png\t猫\na.png\t狗\n", "f.tsv, line 2: a.png has a text already"),
        ("none.png\t猫\n", "none.png"),
    ],
)
def test_eval_text_in_pictures_refuses_in_one_line(tmp_path, monkeypatch, capsys, content, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("cogview.evaluation.ocr.open_reader", lambda engine: lambda image: "")
    Path("f.tsv").write_text(content, encoding="utf-8")
    status, out, err = evaluate(capsys, "text-in-pictures", "f.tsv")
    assert (status, out, len(err)) == (2, [], 1)
    assert message in err[0]


@pytest.mark.parametrize("engine", ["rapidocr", "ddddocr"])
def test_eval_text_in_pictures_names_the_package_that_is_missing(tmp_path, monkeypatch, capsys, save_image, engine):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, engine, None)
    save_image("a.png")
    Path("f.tsv").write_text("a.png\t猫\n", encoding="utf-8")
    status, out, err = evaluate(capsys, "text-in-pictures", "f.tsv", "--ocr", engine)
    assert (status, out, len(err)) == (2, [], 1)
    assert f'is read by {engine}; install it: pip install "cogview[eval]"' in err[0]
