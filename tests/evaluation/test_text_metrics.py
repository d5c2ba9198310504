"""BLEU, ROUGE-L and CIDEr-D against answers computed by pycocoevalcap or by hand."""

import importlib.util
import math

import numpy as np
import pytest

from cogview.evaluation.text_metrics import (
    bleu_counts,
    cider_scores,
    longest_common,
    resampled_sums,
    rouge_l,
    score_texts,
    split_characters,
    split_words,
    tokenizer,
)

HYPOTHESES = ["一只猫坐在垫子上", "两只狗在草地上跑"]
REFERENCES = [["一只猫坐在垫子上", "猫在垫子上坐着"], ["两只狗在草地上奔跑", "狗在草地上跑"]]
needs_jieba = pytest.mark.skipif(importlib.util.find_spec("jieba") is None, reason="needs jieba")


def scores(unit, hypotheses=HYPOTHESES, references=REFERENCES):
    split = tokenizer(unit)
    return score_texts([split(text) for text in hypotheses], [[split(text) for text in group] for group in references])


@pytest.mark.parametrize(
    ("unit", "bleu", "cider", "rouge"),
    [
        ("characters", 0.9394, 7.5931, 1.0),
        pytest.param("words", 1.0, 6.9224, 0.9621, marks=needs_jieba),
    ],
)
def test_score_texts_equals_pycocoevalcap(unit, bleu, cider, rouge):
    summary = scores(unit).summary
    expected = {**{f"bleu_{n}": bleu for n in range(1, 5)}, "cider": cider, "rouge_l": rouge}
    assert {name: round(each["value"], 4) for name, each in summary.items()} == expected
    assert all(each["low"] <= each["value"] <= each["high"] for each in summary.values())


@pytest.mark.parametrize(("count", "expected"), [(2, 10.0), (1, 0.0)])
def test_cider_of_identical_captions_depends_on_the_number_of_items(count, expected):
    texts = [split_characters(text) for text in HYPOTHESES[:count]]
    assert cider_scores(texts, [[text] for text in texts]) == pytest.approx([expected] * count)


def test_cider_penalizes_lengths_and_clips_repeated_words():
    """A caption that repeats a word of its reference gains nothing by it."""
    references = [[split_characters("红色的猫")], [split_characters("两只狗")]]
    good, repeated = ([split_characters(text), references[1][0]] for text in ("红猫", "红红红红红红猫"))
    assert cider_scores(good, references)[0] > cider_scores(repeated, references)[0] > 0


def test_score_texts_does_not_depend_on_the_order_of_items():
    forward, backward = scores("characters"), scores("characters", HYPOTHESES[::-1], REFERENCES[::-1])
    for name in forward.summary:
        assert forward.summary[name]["value"] == pytest.approx(backward.summary[name]["value"])
    np.testing.assert_allclose(forward.items["cider"], backward.items["cider"][::-1])


def test_bleu_counts_clip_matches_and_take_the_closest_length():
    """Papineni et al.: "the the the …" matches twice; of references as close in length the shorter one counts."""
    counts = bleu_counts(tuple("的" * 7), [tuple("的猫在的垫子上"), tuple("一只猫"), tuple("猫" * 11)])
    assert counts == [2, 0, 0, 0, 7, 6, 5, 4, 7, 7]
    assert bleu_counts(tuple("一二三四"), [tuple("一二三四五"), tuple("一二三")])[-2:] == [4, 3]


def test_bleu_has_a_brevity_penalty():
    summary = scores("characters", ["一只猫"], [["一只猫坐着"]]).summary
    assert summary["bleu_1"]["value"] == pytest.approx(math.exp(1 - 5 / 3), rel=1e-6)


def test_rouge_l_takes_the_greatest_precision_and_recall():
    """By hand: longest common subsequences of 2 and 1 tokens; precision 2/3, recall 1/1 of the other reference."""
    precision, recall = 2 / 3, 1.0
    expected = (1 + 1.44) * precision * recall / (recall + 1.44 * precision)
    assert rouge_l(tuple("甲乙丙"), [tuple("甲丁乙戊"), tuple("丙")]) == pytest.approx(expected)
    assert rouge_l(tuple("甲"), [tuple("乙")]) == 0.0
    assert longest_common(tuple("甲乙丙丁"), tuple("乙甲丙甲丁")) == 3


def test_split_characters_drops_punctuation_and_folds_forms():
    assert split_characters("一只Ｃat，“坐着”。 3 只") == tuple("一只cat坐着3只")


@needs_jieba
def test_split_words_joins_characters_to_words():
    assert split_words("一只猫坐在垫子上。") == ("一只", "猫", "坐在", "垫子", "上")


def test_resampled_sums_are_repeatable_and_centred():
    values = np.arange(200.0)[:, None]
    sums = resampled_sums(values)
    np.testing.assert_array_equal(sums, resampled_sums(values))
    assert sums.mean() == pytest.approx(values.sum(), rel=0.01)
    assert sums.std() == pytest.approx(values.std() * math.sqrt(200), rel=0.1)
