"""Scores by which images of a text are ranked: their definitions, and weights that lack what one needs."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from cogview import CogView
from cogview.cli.ranking_options import RANK_BY
from cogview.errors import InputError
from cogview.pipeline.ranking_rules import RANKING_RULES
from cogview.pipeline.requests import GenerationRequest
from cogview.pipeline.results import GeneratedImage

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


def with_masks(model):
    """Return a model whose weights are said to be trained with masked codes."""
    changed = copy.copy(model)
    changed.model = copy.copy(model.model)
    changed.model.config = replace(model.config, full_mask_rate=0.5)
    return changed


def masked_by_hand(model, codes, text=PROMPT):
    """Return the mean of log p(code | text, position) where the input has [MASK] for all codes."""
    vocabulary = model.vocabulary
    row = model.config.layouts["generate"].arrange(
        vocabulary, text=model.text_tokenizer.encode(text), image=codes.reshape(-1)
    )
    image, ids = row.spans["image"], torch.from_numpy(row.ids)[None].clone()
    ids[0, image] = vocabulary.command("[MASK]")
    with torch.inference_mode():
        hidden = model.transformer.hidden(ids, torch.from_numpy(row.positions)[None])[0]
        logits = model.transformer.head(hidden[image.start - 1 : image.stop - 1], vocabulary.image)
    return float(logits.log_softmax(dim=-1)[torch.arange(codes.size), torch.from_numpy(codes.reshape(-1))].mean())


def test_both_is_the_sum_of_means_per_token(tiny_model, images):
    """The many codes of an image do not outweigh the few pieces of its text."""
    pieces = len(tiny_model.text_tokenizer.encode(PROMPT))
    caption, picture, both = (np.array(values(tiny_model, images, by)) for by in RANK_BY)
    assert both == pytest.approx(caption / pieces + picture / 64, abs=1e-4)


def test_both_adds_masked_codes_for_weights_that_know_them(tiny_model, images):
    """Each code is predicted from the text and its position alone; the scores of other names stay."""
    model = with_masks(tiny_model)
    masked = [masked_by_hand(model, image.codes) for image in images]
    assert values(model, images, "both") == pytest.approx(
        np.array(values(tiny_model, images, "both")) + masked, abs=1e-4
    )
    for by in ("caption", "picture"):
        assert values(model, images, by) == values(tiny_model, images, by)


def test_scores_count_the_tokens_that_they_sum(tiny_model, images):
    """A picture has its codes, a text its pieces, and a mean is of one."""
    pieces = len(tiny_model.text_tokenizer.encode(PROMPT))
    counts = [tiny_model.score(images, PROMPT, by=by)[0].num_pieces for by in RANK_BY]
    assert counts == [pieces, 64, 1]


@pytest.mark.parametrize("by", RANK_BY)
@pytest.mark.parametrize("knows_masks", [False, True])
def test_scores_do_not_depend_on_the_batch(tiny_model, images, by, knows_masks):
    """An image alone has the score that it has among others, generated or not."""
    model = with_masks(tiny_model) if knows_masks else tiny_model
    mixed = [*images, Image.fromarray(np.asarray(images[0]))]
    assert values(model, mixed, by) == pytest.approx(
        [model.score(image, PROMPT, by=by).log_probability for image in mixed], abs=1e-3
    )


def test_both_chooses_the_picture_without_planted_damage():
    """The embedded model ranks an image before its copies with exchanged codes, at each of several prompts."""
    model = CogView.from_pretrained("cogview-emoji", device="cpu")
    random = np.random.default_rng(0)
    for prompt in ("蓝色背景上的一只狐狸", "白色背景，三个红苹果"):
        clean = model.generate(prompt, seed=7)[0]
        copies = [clean]
        for number in (2, 6):
            codes = clean.codes.copy()
            codes.flat[random.choice(64, number, replace=False)] = random.integers(8192, size=number)
            request = GenerationRequest(prompt=prompt, seed=7, index=number, sampling=clean.sampling)
            damaged = GeneratedImage.from_pixels(model.decode_images(codes), request, codes, 0.0)
            damaged.codebook_sha256 = clean.codebook_sha256
            copies.append(damaged)
        assert [image.index for image in model.rerank(copies[::-1], by="both")] == [0, 2, 6]


def test_weights_without_a_task_refuse_its_scores(tiny_model, images):
    """The message names what is missing; ``picture`` needs generation alone."""
    model = copy.copy(tiny_model)
    model.model = copy.copy(tiny_model.model)
    model.model.config = replace(tiny_model.config, tasks=("generate",), caption_dropout=0.0)
    for by in ("caption", "both"):
        with pytest.raises(InputError, match="was not trained for the task 'caption'"):
            model.score(images, PROMPT, by=by)
    assert len(model.rerank(images, PROMPT, by="picture")) == 3
    with pytest.raises(InputError, match="cannot be ranked by 'beauty'; known: caption, picture, both"):
        tiny_model.score(images, PROMPT, by="beauty")


def test_options_have_the_names_of_the_rules():
    """The command line lists the scores without importing the pipeline."""
    assert tuple(RANKING_RULES) == RANK_BY
