"""Captions for a text tokenizer: which are trained on, which are held out, and which cannot be used."""

from pathlib import Path

import pytest

from cogview.data.builders.corpus import CaptionSample, read_corpus
from cogview.data.sources.captions import caption_records
from cogview.data.sources.records import PictureRecord
from cogview.data.sources.tables import TableOptions
from cogview.errors import InputError


def records(*captions: str) -> list[PictureRecord]:
    return [PictureRecord(name=f"{number}.png", captions=(caption,)) for number, caption in enumerate(captions)]


def test_read_corpus_never_divides_equal_captions():
    """A caption that is trained on would be measured as well if copies of it fell into both parts."""
    captions = [f"第{number % 50}只狐狸" for number in range(400)]
    corpus = read_corpus(records(*captions), limit=1000, held_out=0.3)
    training, held_out = set(corpus.training.captions), set(corpus.held_out.captions)
    assert training | held_out == set(captions)
    assert not training & held_out
    assert 5 < len(held_out) < 25
    assert len(corpus.training.captions) + len(corpus.held_out.captions) == 400


def test_read_corpus_normalizes_before_it_divides():
    corpus = read_corpus(records("ＡＢ　　c", "AB c"), limit=10, held_out=0.0)
    assert corpus.training.captions == ["AB c", "AB c"]


def test_read_corpus_counts_records_without_captions():
    given = [PictureRecord(name="a.png", problem="broken"), *records("一只狗", " \n", "\udc00", "一\0狗")]
    corpus = read_corpus(given, limit=10, held_out=0.0)
    assert (corpus.training.captions, corpus.skipped) == (["一只狗"], 4)
    assert corpus.first_skipped == "a.png: broken"


def test_caption_sample_takes_captions_of_all_parts_of_a_source():
    """The first captions of several sources would all be of one source."""
    sample, again = (CaptionSample(limit=100) for _ in range(2))
    for number in range(1000):
        sample.add(str(number))
        again.add(str(number))
    assert (len(sample.captions), sample.count) == (100, 1000)
    assert sample.captions == again.captions
    per_tenth = [sum(int(each) // 100 == tenth for each in sample.captions) for tenth in range(10)]
    assert min(per_tenth) >= 3
    assert max(per_tenth) <= 20


def test_caption_records_are_equal_for_each_kind_of_source(picture_sources):
    found = {
        kind: [record.captions for record in caption_records(path, TableOptions(), lambda note: None)]
        for kind, path in picture_sources.items()
    }
    assert len(found["folder"]) == 40
    assert all(each == found["folder"] for each in found.values())


def test_caption_records_read_a_text_file_by_lines(tmp_path):
    (tmp_path / "captions.txt").write_text("一只狗\n\n  一只狐狸 \r\n", encoding="utf-8")
    found = list(caption_records(tmp_path / "captions.txt", TableOptions(), lambda note: None))
    assert [record.captions for record in found] == [("一只狗",), ("一只狐狸",)]
    assert found[1].name == f"{tmp_path / 'captions.txt'}, line 3"


def test_caption_records_refuse_a_source_that_is_missing():
    with pytest.raises(InputError, match=r"the source none\.txt does not exist; expected a \.txt file with a caption"):
        list(caption_records(Path("none.txt"), TableOptions(), lambda note: None))
