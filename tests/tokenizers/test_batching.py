"""Batches of sequences, padded on either side."""

import numpy as np
import pytest

from cogview.tokenizers.batching import pad_left, pad_right
from cogview.tokenizers.layouts import layouts
from cogview.tokenizers.vocabulary import TokenKind, Vocabulary

SMALL = Vocabulary(num_image_codes=64, num_text_pieces=300)
RED_APPLE = [7, 21, 4]  # any pieces
IMAGE = list(range(64))


def tiny(name, **values):
    """Return a sequence of a task at a grid of 8."""
    return layouts(8)[name].arrange(SMALL, **values)


def test_padding_leaves_sequences_unchanged():
    rows = [tiny("generate", text=[1]), tiny("generate", text=[1, 2, 3]), tiny("caption", image=IMAGE, text=[9])]
    longest = max(map(len, rows))
    for batch in (pad_left(rows, SMALL.pad), pad_right(rows, SMALL.pad), pad_right(rows, SMALL.pad, 90)):
        for b, row in enumerate(rows):
            inside = np.arange(batch.ids.shape[1])
            inside = (batch.starts[b] <= inside) & (inside < batch.ends[b])
            for name in ("ids", "positions", "kinds", "blanks", "loss"):
                assert getattr(batch, name)[b][inside].tolist() == getattr(row, name).tolist()
            assert (batch.ids[b][~inside] == SMALL.pad).all()
            assert (batch.kinds[b][~inside] == TokenKind.COMMAND).all()
            assert not (batch.blanks[b] | batch.loss[b] | (batch.positions[b] != 0))[~inside].any()
    left, right = pad_left(rows, SMALL.pad), pad_right(rows, SMALL.pad, 90)
    assert (left.ends == longest).all()
    assert left.starts.tolist() == [longest - len(row) for row in rows]
    assert (right.starts == 0).all()
    assert right.ids.shape == (3, 90)


def test_batches_refuse_no_sequence_or_short_length():
    with pytest.raises(ValueError, match="a batch needs at least one row"):
        pad_left([], SMALL.pad)
    with pytest.raises(ValueError, match="a sequence of 71 tokens does not fit a batch of length 70"):
        pad_right([tiny("generate", text=RED_APPLE)], SMALL.pad, 70)
