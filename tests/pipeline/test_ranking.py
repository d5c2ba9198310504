"""Scores by which images of a text are ranked: their definitions, and weights that lack what one needs."""

import copy
from dataclasses import replace

import pytest

from cogview.cli.ranking_options import RANK_BY
from cogview.errors import InputError
from cogview.pipeline.ranking_rules import RANKING_RULES

PROMPT = "一只狐狸在汽车的左边"


@pytest.fixture(scope="module")
def images(tiny_model):
    """Return three images of a prompt."""
    return tiny_model.generate(PROMPT, n=3, seed=7, temperature=1.7, top_k=0)


def values(model, images, by, text=PROMPT):
    """Return the scores of images as numbers."""
    return [score.log_probability for score in model.score(images, text, by=by)]


def test_picture_score_is_the_log_probability_of_generation(tiny_model, images):
    """It is computed at temperature 1, whatever temperature and filters sampled the image."""
    expected = [image.log_probability for image in images]
    assert values(tiny_model, images, "picture") == pytest.approx(expected, abs=1e-3)
    filtered = tiny_model.generate(PROMPT, n=2, seed=3, temperature=0.3, top_k=4)
    expected = [image.log_probability for image in filtered]
    assert values(tiny_model, filtered, "picture") == pytest.approx(expected, abs=1e-3)


def test_both_is_the_sum_and_guidance_the_difference(tiny_model, images):
    """Both sums means per token; log p(picture), which guidance subtracts, is the same for every text."""
    pieces = len(tiny_model.text_tokenizer.encode(PROMPT))
    caption, picture, both, guidance = (values(tiny_model, images, by) for by in RANK_BY)
    assert both == pytest.approx([a / pieces + b / 64 for a, b in zip(caption, picture, strict=True)], abs=1e-4)
    alone = [a - b for a, b in zip(picture, guidance, strict=True)]
    other = [
        a - b
        for a, b in zip(
            values(tiny_model, images, "picture", "狗"), values(tiny_model, images, "guidance", "狗"), strict=True
        )
    ]
    assert alone == pytest.approx(other, abs=1e-3)
    assert alone != pytest.approx(picture, abs=1e-3)


def test_scores_count_the_tokens_that_they_sum(tiny_model, images):
    """A picture has its codes, a text its pieces; what is subtracted adds none, and a mean is of one."""
    pieces = len(tiny_model.text_tokenizer.encode(PROMPT))
    counts = [tiny_model.score(images, PROMPT, by=by)[0].num_pieces for by in RANK_BY]
    assert counts == [pieces, 64, 1, 64]


def test_scores_do_not_depend_on_the_batch(tiny_model, images):
    """An image alone has the score that it has among others."""
    for by in RANK_BY:
        assert values(tiny_model, images, by) == pytest.approx(
            [tiny_model.score(image, PROMPT, by=by).log_probability for image in images], abs=1e-3
        )


def test_weights_without_a_task_or_dropout_refuse_its_scores(tiny_model, images):
    """The message names what is missing; ``picture`` needs generation alone."""
    model = copy.copy(tiny_model)
    model.model = copy.copy(tiny_model.model)
    model.model.config = replace(tiny_model.config, tasks=("generate",), caption_dropout=0.0)
    for by in ("caption", "both"):
        with pytest.raises(InputError, match="was not trained for the task 'caption'"):
            model.score(images, PROMPT, by=by)
    with pytest.raises(InputError, match="without caption dropout, so it knows no log p"):
        model.rerank(images, PROMPT, by="guidance")
    assert len(model.rerank(images, PROMPT, by="picture")) == 3
    with pytest.raises(InputError, match="cannot be ranked by 'beauty'; known: caption, picture, both, guidance"):
        tiny_model.score(images, PROMPT, by="beauty")


def test_options_have_the_names_of_the_rules():
    """The command line lists the scores without importing the pipeline."""
    assert tuple(RANKING_RULES) == RANK_BY
