"""``cogview train-text`` on captions of one's own: what is trained, what is printed, and what is refused."""

import re
from pathlib import Path

import pytest
import yaml

from cogview.cli.main import main
from cogview.tokenizers.text import TextTokenizer

CHARACTERS = "天地玄宇宙洪荒日月盈辰宿列张寒来暑往秋收冬藏闰成岁律吕调阳云腾致雨露结为霜"


def caption(number: int) -> str:
    """A caption of four different characters."""
    return "".join(CHARACTERS[(number * step + step) % len(CHARACTERS)] for step in (1, 3, 7, 11)) + "的画"


@pytest.fixture
def train_text(tmp_path, monkeypatch, capsys):
    """Return a function that runs ``cogview train-text`` in a folder with captions: status, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    Path("captions.txt").write_text("\n".join(map(caption, range(300))), encoding="utf-8")

    def run(*overrides, **text):
        section = {"pictures": ["captions.txt"], "size": 400, "max_piece_length": 1, **text}
        Path("own.yaml").write_text(yaml.safe_dump({"work": "work", "text": section}), encoding="utf-8")
        status = main(["train-text", "own.yaml", *overrides])
        printed = capsys.readouterr()
        return status, printed.out.splitlines(), printed.err.splitlines()

    return run


def test_train_text_reports_how_held_out_captions_are_spelt(train_text):
    status, out, err = train_text()
    assert (status, out) == (0, ["work/text.model"])
    counts = list(map(int, re.findall(r"\d+", err[0])))
    assert err[0] == f"300 records: {counts[1]} captions to train on, {counts[2]} held out by their text"
    assert counts[1] + counts[2] == 300
    assert err[1] == f"trained on {counts[1]} captions"
    assert "held-out captions: 0.00% of the characters are spelt in bytes, 6.0 pieces a caption" in err[2]
    assert len(err) == 4
    assert err[3].endswith("pieces (at most 400 requested)")
    tokenizer = TextTokenizer.load("work/text.model")
    assert len(tokenizer.encode(caption(7))) == 6


def test_train_text_names_characters_that_are_spelt_in_bytes(train_text):
    """A held-out caption may have a character that no other one has; the user sees which."""
    lines = [caption(number) + ("龘" if number == 7 else "") for number in range(60)]
    held_out = next(share for share in (0.1, 0.2, 0.3, 0.4, 0.6, 0.8) if is_held_out_at(lines[7], share))
    Path("captions.txt").write_text("\n".join(lines), encoding="utf-8")
    _, _, err = train_text(held_out=held_out)
    assert err[3] == "spelt in bytes most often: 龘", err
    assert "0.00%" not in err[2]


def is_held_out_at(text: str, share: float) -> bool:
    from cogview.data.builders.corpus import read_corpus
    from cogview.data.sources.records import PictureRecord

    return bool(read_corpus([PictureRecord(name="", captions=(text,))], limit=1, held_out=share).held_out.captions)


def test_train_text_takes_a_random_part_of_many_captions_and_several_sources(train_text):
    Path("table.csv").write_text("图片,描述\n" + "a.png,一只狐狸\na.png,两只狐狸\n" * 30, encoding="utf-8")
    status, _, err = train_text("captions=200", "held_out=0", pictures=["captions.txt", "table.csv"])
    assert status == 0
    assert err[:3] == [
        'note: table.csv: pictures in "图片", captions in "描述"',
        "301 records: 360 captions to train on, 0 held out by their text",
        "trained on 200 captions, a random part of 360",
    ]
    assert not TextTokenizer.load("work/text.model").byte_share("狐狸")


def test_train_text_notes_pictures_without_captions(train_text, save_image):
    for number in range(3):
        save_image(f"pictures/{number}.png", number)
    Path("pictures/0.txt").write_text("一只狗", encoding="utf-8")
    status, _, err = train_text(pictures=["pictures"], held_out=0)
    assert status == 0
    assert err[0] == (
        "note: 2 records without a usable caption, the first: pictures/1.png: a picture without a caption: "
        "expected 1.txt beside it"
    )


def test_train_text_notes_that_nothing_is_held_out(train_text):
    Path("captions.txt").write_text("一只狗\n一只狐狸", encoding="utf-8")
    _, _, err = train_text(held_out=1e-9)
    assert err[2] == "note: no caption fell into the held-out share of 1e-09: the share of bytes is unknown"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            {"pictures": ["none"]},
            "the source none does not exist; expected a .txt file with a caption a line, a folder",
        ),
        ({"pictures": ["empty.txt"]}, "no caption of empty.txt can be used"),
        ({"held_out": 0.9999999}, "the held-out share took all captions of captions.txt: lower it, held_out: 0 takes"),
        ({"whole_names": True}, "whole_names needs the names of the emoji world, which pictures lack: leave it out"),
        ({"pictures": [], "simplified": True}, "simplified and table apply to pictures, which are not given"),
        ({"table": {"column": "a"}}, 'section text of own.yaml, table: "column" is unknown'),
        ({"coverage": 0.9}, "coverage must be in [0.98, 1], got 0.9"),
        ({"size": 100}, "a text tokenizer of size 100 is too small for this corpus: at least"),
    ],
)
def test_train_text_refuses_in_one_line(train_text, text, message):
    Path("empty.txt").write_text("\n \n", encoding="utf-8")
    status, out, err = train_text(**text)
    assert (status, out) == (2, [])
    assert message in err[-1]
    assert len(err) == 1
    assert not Path("work").exists()
