"""Measures of a model on a store: losses, caption score, retrieval; known values of a uniform model."""

from __future__ import annotations

import copy
import hashlib
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from cogview.checkpoints.image_tokenizer import codebook_hash
from cogview.data.store import StoreHeader, TokenStore
from cogview.data.store_writer import StoreWriter, pad_text
from cogview.errors import InputError
from cogview.evaluation.likelihood import PartLikelihood, caption_scores, measure_likelihood
from cogview.evaluation.model_report import ResultTable, add_code_usage, open_matching_store, spread_rows
from cogview.evaluation.reconstruction import code_usage
from cogview.evaluation.retrieval import distinct_rows, pair_scores, recall_at
from cogview.pipeline.cogview import CogView
from tests.training.factories import make_trainer

TEXTS = ["一只狐狸", "两只狗在汽车的左边", "蓝色背景上的三只苹果", "鱼", "一只狗"]


def write_store(path: Path, model: CogView, texts: list[str] | None = None, **changes: object) -> TokenStore:
    """Write a store of random images with captions, and return it."""
    texts = TEXTS if texts is None else texts
    header = StoreHeader(
        **{
            "fields": {"text": 20, "image": 64},
            "grid": 8,
            "num_image_codes": model.vocabulary.num_image_codes,
            "num_text_pieces": model.text_tokenizer.size,
            "layouts": ("generate", "caption"),
            "codebook_sha256": codebook_hash(model.image_tokenizer),
            "text_sha256": hashlib.sha256(model.text_tokenizer.model_bytes).hexdigest(),
            **changes,
        }
    )
    images = np.random.default_rng(0).integers(0, header.num_image_codes, (len(texts), 64)).astype(np.uint16)
    with StoreWriter(path, header) as writer:
        if texts:
            pieces = [model.text_tokenizer.encode(text) for text in texts]
            writer.append({"text": pad_text(pieces, 20), "image": images})
    return TokenStore(path)


@pytest.fixture
def uniform_model(tiny_model):
    """Return a model that gives every id the same probability."""
    model = copy.copy(tiny_model)
    model.model = copy.copy(tiny_model.model)
    model.model.transformer = copy.deepcopy(tiny_model.model.transformer)
    model.model.transformer.cpu_layers = None
    with torch.no_grad():
        model.model.transformer.embedding.weight.zero_()
    return model


def test_uniform_model_has_the_known_caption_score_and_losses(uniform_model, tmp_path):
    """CapS of L pieces among V ids is -L ln V; a code among K costs ln K nats."""
    store = write_store(tmp_path / "store", uniform_model)
    vocabulary = uniform_model.vocabulary
    scores, counts = caption_scores(uniform_model, store, range(len(TEXTS)))
    competing = vocabulary.padded_size - vocabulary.text.start
    assert counts.tolist() == [len(uniform_model.text_tokenizer.encode(text)) for text in TEXTS]
    np.testing.assert_allclose(scores, -counts * math.log(competing), rtol=1e-6)
    parts = {(part.task, part.part): part for part in measure_likelihood(uniform_model, store, list(range(len(TEXTS))))}
    assert set(parts) == {("generate", "text"), ("generate", "image"), ("caption", "text")}
    assert parts["generate", "image"].loss()["value"] == pytest.approx(math.log(vocabulary.num_image_codes), rel=1e-6)
    text_ids = vocabulary.size - vocabulary.text.start
    assert parts["caption", "text"].loss()["value"] == pytest.approx(math.log(text_ids), rel=1e-6)
    assert parts["caption", "text"].num_tokens == counts.sum() + len(TEXTS)  # each caption ends in a stop


def test_losses_equal_those_of_the_trainer(tiny_model, tmp_path):
    """The loss by task and part is that of ``TransformerTrainer.store_losses``, for batches of any size."""
    store = write_store(tmp_path / "store", tiny_model)
    trainer = make_trainer(copy.deepcopy(tiny_model.model), tasks={"generate": 1.0, "caption": 1.0})
    for batch_size in (None, 2):
        for part in measure_likelihood(tiny_model, store, list(range(len(TEXTS))), batch_size=batch_size):
            expected = trainer.store_losses(store, part.task, len(TEXTS))
            assert part.loss()["value"] == pytest.approx(expected[f"{part.task}_{part.part}_loss"], rel=1e-4)


def test_caption_score_equals_the_score_of_the_pipeline(tiny_model, tmp_path):
    """CapS of a row is ``CogView.score`` of a text with the image of its codes."""
    image = tiny_model.generate("一只狐狸", seed=1)[0]
    store = write_store(tmp_path / "store", tiny_model, ["一只狐狸"])
    stored = store.read([0])["image"][0]
    image.codes = stored.reshape(8, 8).astype(np.int64)
    found, _ = caption_scores(tiny_model, store, [0])
    assert found[0] == pytest.approx(tiny_model.score(image, "一只狐狸").log_probability, abs=1e-4)


def test_bands_average_to_the_loss():
    """The losses of the bands, weighted by their tokens, are the whole loss; the quarters of 64 codes have 16 each."""
    tokens = [-np.arange(64.0), -2 * np.arange(64.0)]
    part = PartLikelihood(task="generate", part="image", tokens=tokens)
    bands = part.bands()
    assert list(bands) == ["1-16", "17-32", "33-48", "49-64"]
    assert bands["1-16"] == (pytest.approx(1.5 * 7.5), 32)
    assert np.average([loss for loss, _ in bands.values()], weights=[n for _, n in bands.values()]) == pytest.approx(
        part.loss()["value"]
    )
    text = PartLikelihood(task="caption", part="text", tokens=[np.full(3, -1.0), np.full(10, -2.0)])
    assert {band: count for band, (_, count) in text.bands().items()} == {"1-4": 7, "5-8": 4, "9-10": 2}


def test_recall_counts_ties_as_lost():
    """The match is found at K if fewer than K candidates have its score or a better one."""
    scores = np.array([[3.0, 1.0, 2.0], [5.0, 4.0, 1.0], [1.0, 1.0, 1.0]])
    found = recall_at(scores, (1, 2, 3))
    assert found[1].tolist() == [True, False, False]
    assert found[2].tolist() == [True, True, False]
    assert found[3].tolist() == [True, True, True]
    assert not recall_at(np.zeros((20, 20)))[10].any()
    with pytest.raises(ValueError, match="square of numbers"):
        recall_at(np.full((2, 2), np.nan))


def test_pair_scores_are_those_of_each_pair(tiny_model, tmp_path):
    """Each score is that of its text and picture; guidance subtracts log p(picture), which no text changes."""
    store = write_store(tmp_path / "store", tiny_model)
    scores = pair_scores(tiny_model, store, [0, 1, 2])
    assert set(scores) == {"caption", "picture", "both", "guidance"}
    captions, _ = caption_scores(tiny_model, store, [0, 1, 2])
    np.testing.assert_allclose(np.diag(scores["caption"]), captions, atol=1e-3)
    lengths = np.array([len(tiny_model.text_tokenizer.encode(text)) for text in TEXTS[:3]])
    np.testing.assert_allclose(scores["both"], scores["caption"] / lengths[:, None] + scores["picture"] / 64)
    alone = scores["picture"] - scores["guidance"]
    np.testing.assert_allclose(alone, alone[:1].repeat(3, axis=0))


def test_pairs_leave_out_equal_texts(tiny_model, tmp_path):
    """Of rows with one text the first is taken; one remaining pair is no retrieval."""
    store = write_store(tmp_path / "store", tiny_model, ["一只狗", "一只狗", "鱼", "一只狐狸"])
    assert distinct_rows(store, 2) == [0, 2]
    same = write_store(tmp_path / "same", tiny_model, ["一只狗", "一只狗"])
    with pytest.raises(InputError, match="1 different pair"):
        distinct_rows(same, 5)


def test_code_usage_of_two_equally_frequent_codes():
    """Two of 8,192 codes, half and half: perplexity 2.0, usage 0.0244%."""
    counts = np.zeros(8192, dtype=np.int64)
    counts[[5, 4000]] = 500
    used, perplexity = code_usage(counts)
    assert (round(100 * used, 4), perplexity) == (0.0244, pytest.approx(2.0))


def test_code_usage_of_a_store(tiny_model, tmp_path):
    """All codes of the chosen rows are counted."""
    store, table = write_store(tmp_path / "store", tiny_model), ResultTable()
    add_code_usage(table, store, [0, 1], tiny_model.vocabulary.num_image_codes)
    distinct = len(np.unique(store.read([0, 1])["image"]))
    assert table.values["codes_used"].value == distinct / tiny_model.vocabulary.num_image_codes
    assert table.values["codes_used"].n == 128


def test_stores_of_others_are_refused(tiny_model, tmp_path):
    """An empty store and one of another tokenizer are errors, each with a remedy."""
    write_store(tmp_path / "empty", tiny_model, [])
    write_store(tmp_path / "other", tiny_model, text_sha256="0" * 64)
    with pytest.raises(InputError, match="has no rows"):
        open_matching_store(tiny_model, tmp_path / "empty")
    with pytest.raises(InputError, match="was made with text_sha256"):
        open_matching_store(tiny_model, tmp_path / "other")


def test_spread_rows_are_at_equal_distances(tiny_model, tmp_path):
    """The first and the last row are among them; a small store gives all."""
    store = write_store(tmp_path / "store", tiny_model)
    assert spread_rows(store, 3) == [0, 2, 4]
    assert spread_rows(store, 100) == [0, 1, 2, 3, 4]
