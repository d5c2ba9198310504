"""The decoding loop: rows of any length and task in one batch give what each gives alone, and what no cache gives."""

# T places of a row, V ids to choose from

import numpy as np
import pytest
import torch

from cogview.config import TransformerConfig
from cogview.engine import Job, fill
from cogview.sampling import Sampling, filter_logits, keyed_gumbel
from cogview.tokenizers.layouts import layouts
from cogview.tokenizers.vocabulary import Kind, Vocabulary
from cogview.transformer import Transformer

VOCABULARY = Vocabulary(num_image_codes=64, num_text_pieces=37)
TABLE = layouts(8)
SAMPLING = Sampling(temperature=1.2, top_k=20, top_p=0.95)
SHORT, LONG = [7], [3, 1, 4, 1, 5, 9, 2, 6, 5, 35]


@pytest.fixture(scope="module")
def transformer() -> Transformer:
    """Weights well above those of a fresh model, so that a wrong context draws other ids.

    The embedding is smaller: tied to the output, it would have the model repeat the last id.
    """
    generator = torch.Generator().manual_seed(0)
    config = TransformerConfig(
        num_layers=2, width=32, num_heads=4, vocabulary_size=VOCABULARY.padded_size, max_positions=96
    )
    transformer = Transformer(config).eval()
    with torch.no_grad():
        for parameter in transformer.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.4 * noise if parameter.dim() == 2 else parameter + 0.1 * noise)
        transformer.embedding.weight.mul_(0.5)
    return transformer


def draw_row(text, image=None):
    return TABLE["generate"].arrange(VOCABULARY, text=text, **({} if image is None else {"image": image}))


def window_row(text, seed=0):
    """A window of upscaling: its first lines known, and single codes scattered over the rest."""
    generator = np.random.default_rng(seed)
    known = generator.random(64) < 0.3
    known[:16] = True
    image = np.ma.masked_array(generator.integers(0, 64, 64), mask=~known)
    return TABLE["upscale"].arrange(VOCABULARY, text=text, small=generator.integers(0, 64, 16), image=image)


def image_of(filled, row):
    return filled.ids[row.spans["image"]].tolist()


def fill_without_cache(transformer, job, sampling):
    """One row by full forwards, a place at a time: the ids, and the log p of each drawn one among the permitted."""
    row, ids, log_p = job.row, torch.from_numpy(job.row.ids.copy()), {}
    positions = torch.from_numpy(row.positions)
    for place in np.flatnonzero(row.blanks).tolist():
        kind = Kind(row.kinds[place])
        permitted = VOCABULARY.permitted(kind)
        with torch.inference_mode():
            all_logits = transformer(ids[None, :place], positions[None, :place])[0, -1]
        logits = all_logits[permitted.start : permitted.stop]
        span = next(span for span in row.spans.values() if span.start <= place < span.stop)
        key = [torch.tensor([value]) for value in (job.seed, job.image, place - span.start)]
        scores = filter_logits(logits[None], sampling) + keyed_gumbel(*key, permitted)
        chosen = int(scores.argmax())
        ids[place] = permitted[chosen]
        log_p[place] = logits.double().log_softmax(dim=-1)[chosen].item()
    return ids.tolist(), log_p


# --- a row is what it is alone ------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", [SAMPLING, Sampling(top_k=1), Sampling(top_k=0)])
def test_prompts_of_different_lengths_in_one_batch(transformer, sampling):
    jobs = [
        Job(row=draw_row(text), seed=seed, image=image)
        for text, seed, image in ((LONG, 7, 0), (SHORT, 7, 1), (LONG[:4], 8, 0))
    ]
    together = fill(transformer, VOCABULARY, jobs, sampling)
    for job, filled in zip(jobs, together, strict=True):
        (alone,) = fill(transformer, VOCABULARY, [job], sampling)
        assert filled.ids.tolist() == alone.ids.tolist()
        assert filled.log_probability == pytest.approx(alone.log_probability, abs=1e-3)
    assert len({tuple(image_of(filled, job.row)) for job, filled in zip(jobs, together, strict=True)}) == 3


def test_different_tasks_in_one_batch(transformer):
    """Blanks of one row stand beside codes, commands and padding of another, and beside blanks for text."""
    caption = TABLE["caption"].arrange(VOCABULARY, image=np.arange(64), max_text=6)
    rows = [
        draw_row(LONG),
        window_row(SHORT, seed=1),
        window_row(LONG, seed=2),
        draw_row(SHORT, image=[5, None, 9, *[None] * 20, *range(30)]),  # known codes among and behind the blanks
        caption,
        draw_row(LONG[:2], image=range(64)),  # nothing to do
    ]
    jobs = [Job(row=row, seed=5, image=number) for number, row in enumerate(rows)]
    together = fill(transformer, VOCABULARY, jobs, SAMPLING)
    for job, filled in zip(jobs, together, strict=True):
        (alone,) = fill(transformer, VOCABULARY, [job], SAMPLING)
        assert filled.ids.tolist() == alone.ids.tolist()
        assert filled.log_probability == pytest.approx(alone.log_probability, abs=1e-3)
        ids, log_p = fill_without_cache(transformer, job, SAMPLING)
        assert filled.ids.tolist() == ids
        assert filled.log_probability == pytest.approx(sum(log_p.values()), abs=1e-3)


def test_picture_of_a_seed_is_the_same_in_any_batch(transformer):
    def pictures(keys):
        jobs = [Job(row=draw_row(LONG), seed=seed, image=image) for seed, image in keys]
        filled = fill(transformer, VOCABULARY, jobs, SAMPLING)
        return {key: image_of(row, job.row) for key, row, job in zip(keys, filled, jobs, strict=True)}

    all_of_them = pictures([(7, 0), (7, 1), (7, 2), (8, 0), (8, 1)])
    assert pictures([(7, 2)]) == {(7, 2): all_of_them[7, 2]}
    assert pictures([(8, 1), (7, 2), (7, 0)]) == {key: all_of_them[key] for key in ((8, 1), (7, 2), (7, 0))}
    assert len({tuple(picture) for picture in all_of_them.values()}) == 5


# --- the cache changes nothing ------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", [Sampling(top_k=1), SAMPLING])
@pytest.mark.parametrize("row", [draw_row(LONG), window_row(LONG)], ids=["generate", "upscale"])
def test_equals_full_forwards_without_a_cache(transformer, row, sampling):
    """Greedy decoding is an argmax loop; sampling adds the noise of (seed, image, place of the code, id)."""
    job = Job(row=row, seed=11, image=2)
    (filled,) = fill(transformer, VOCABULARY, [job], sampling)
    ids, log_p = fill_without_cache(transformer, job, sampling)
    assert filled.ids.tolist() == ids
    assert filled.log_probability == pytest.approx(sum(log_p.values()), abs=1e-3)


def test_greedy_is_an_argmax_loop(transformer):
    row = draw_row(SHORT)
    (filled,) = fill(transformer, VOCABULARY, [Job(row=row, seed=1)], Sampling(top_k=1))
    ids = torch.from_numpy(row.ids[: row.spans["image"].start])
    for _ in range(64):
        with torch.inference_mode():
            ids = torch.cat([ids, transformer(ids[None])[0, -1, :64].argmax()[None]])
    assert filled.ids.tolist() == [*ids.tolist(), VOCABULARY.command("[EOI1]")]


def test_log_probability_is_that_of_one_full_forward(transformer):
    """Of the codes among image ids, before temperature and filters."""
    row = draw_row(LONG)
    (filled,) = fill(transformer, VOCABULARY, [Job(row=row, seed=3)], SAMPLING)
    ids, span = torch.from_numpy(filled.ids), row.spans["image"]
    with torch.inference_mode():
        logits = transformer(ids[None])[0, span.start - 1 : span.stop - 1, :64].double()
    expected = logits.log_softmax(dim=-1).gather(1, ids[span, None]).sum().item()
    assert filled.log_probability == pytest.approx(expected, abs=1e-3)
    assert expected < -10


# --- blanks and what is given -------------------------------------------------------------------------------------


def test_blanks_take_only_the_ids_of_their_kind(transformer):
    """Even if the model would rather say something else."""
    caption = TABLE["caption"].arrange(VOCABULARY, image=np.arange(64), max_text=6)
    rows = [draw_row(LONG), caption]
    jobs = [Job(row=row, seed=1) for row in rows]
    for filled, row in zip(fill(transformer, VOCABULARY, jobs, Sampling(top_k=0)), rows, strict=True):
        permitted = VOCABULARY.permitted(Kind(row.kinds[row.blanks][0]))
        assert row.blanks.sum() == (64 if row is rows[0] else 6)
        assert all(token in permitted for token in filled.ids[row.blanks])
        assert len(set(filled.ids[row.blanks].tolist())) > 3
        with torch.inference_mode():
            free_choice = transformer(torch.from_numpy(filled.ids)[None])[0].argmax(dim=-1).numpy()[:-1]
        assert not all(token in permitted for token in free_choice[row.blanks[1:]])


def test_what_is_given_is_kept(transformer):
    for row in (window_row(LONG), draw_row(SHORT, image=[None, 5, None, *range(50)])):
        before = row.ids.copy()
        (filled,) = fill(transformer, VOCABULARY, [Job(row=row, seed=1)], SAMPLING)
        assert (filled.ids[~row.blanks] == row.ids[~row.blanks]).all()
        assert (filled.ids[row.blanks] != VOCABULARY.pad).all()
        assert (row.ids == before).all()  # the job's own row stays as it was


def test_known_codes_steer_what_follows(transformer):
    pictures = [
        fill(transformer, VOCABULARY, [Job(row=draw_row(SHORT, image=[code] * 8), seed=1)], SAMPLING)[0].ids[-57:]
        for code in (0, 1)
    ]
    assert not np.array_equal(*pictures)


def test_row_without_blanks_comes_back_unchanged(transformer):
    row = draw_row(LONG, image=range(64))
    (filled,) = fill(transformer, VOCABULARY, [Job(row=row, seed=1)], SAMPLING)
    assert filled.ids.tolist() == row.ids.tolist()
    assert filled.ids is not row.ids
    assert filled.log_probability == 0


def test_row_may_end_at_its_last_blank(transformer):
    """Upscaling cuts a window at its last line."""
    row = window_row(LONG)
    end = row.spans["image"].stop - 16
    jobs = [Job(row=row.cut(end), seed=1), Job(row=row, seed=1)]
    cut, whole = fill(transformer, VOCABULARY, jobs, SAMPLING)
    assert cut.ids.tolist() == whole.ids[:end].tolist()


def test_every_column_is_told(transformer):
    told = []
    row = draw_row(SHORT, image=[1] * 60)
    fill(transformer, VOCABULARY, [Job(row=row, seed=1)], SAMPLING, lambda *counts: told.append(counts))
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_bfloat16_model_draws(transformer):
    model = Transformer(transformer.config).to(torch.bfloat16).eval()
    (filled,) = fill(model, VOCABULARY, [Job(row=draw_row(LONG), seed=1)], SAMPLING)
    assert np.isfinite(filled.log_probability)


def test_no_rows_is_an_error(transformer):
    with pytest.raises(ValueError, match="a batch needs at least one row"):
        fill(transformer, VOCABULARY, [], SAMPLING)
