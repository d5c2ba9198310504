"""Masks of edits: their forms, their sizes, and the codes of a share."""

import numpy as np
import pytest
import torch
from PIL import Image

from cogview.pipeline.masks import load_mask, sample_changes
from tests.factories import input_error

BOX = (8, 16, 17, 8)  # columns 1 to 4 are touched, row 2
PIXELS = np.zeros((64, 64), dtype=bool)
PIXELS[16:24, 8:25] = True
CODES = np.zeros((8, 8), dtype=bool)
CODES[2, 1:4] = True
ALL = np.ones((8, 8), dtype=bool)


def fitted(mask, size=(64, 64), rule="crop"):
    return load_mask(mask).fitted(size, 8, side=64, rule=rule)


def test_forms_of_a_mask_are_equal(tmp_path, monkeypatch):
    """A box as a tuple and as a text, arrays and tensors of pixels and codes, PIL images, a path as text and Path."""
    monkeypatch.chdir(tmp_path)
    image = Image.fromarray(PIXELS)
    image.save("mask.png")
    for form in (BOX, "8,16,17,8", " 8, 16 ,17,8", PIXELS, torch.from_numpy(PIXELS), image, image.convert("RGB")):
        codes = fitted(form)
        assert np.flatnonzero(codes).tolist() == [17, 18, 19]
    for form in (CODES, torch.from_numpy(CODES), "mask.png", tmp_path / "mask.png"):
        np.testing.assert_array_equal(fitted(form), codes)


def test_file_named_like_a_box_is_read(tmp_path, monkeypatch):
    """An existing file is never taken for a box."""
    monkeypatch.chdir(tmp_path)
    Image.fromarray(PIXELS).save("1,2,3,4", format="PNG")
    assert fitted("1,2,3,4").sum() == 3


def test_box_is_in_pixels_of_the_image_before_it_is_fitted():
    """The left half of a photograph of 128 x 64 pixels, of which the middle is kept."""
    assert np.flatnonzero(fitted((0, 0, 64, 64), (128, 64))[0]).tolist() == [0, 1, 2, 3]
    assert np.flatnonzero(fitted((0, 0, 64, 64), (128, 64), rule="stretch")[0]).tolist() == [0, 1, 2, 3]
    assert fitted((0, 0, 128, 64), (128, 64), rule="pad").sum(axis=1).tolist() == [0, 0, 8, 8, 8, 8, 0, 0]


@pytest.mark.parametrize(
    ("mask", "size", "message"),
    [
        (PIXELS, (32, 64), "mask: it is 64 x 64 pixels, and the image is 32 x 64; expected the same size"),
        (Image.new("L", (8, 8), 255), (64, 64), "mask: it is 8 x 8 pixels, and the image is 64 x 64; expected the"),
        (np.zeros((64, 64), dtype=bool), (64, 64), "mask: it is empty, so nothing would change; paint what may "),
        (np.zeros((8, 8), dtype=bool), (64, 64), "mask: it is empty, so nothing would change; paint what may "),
        (Image.new("1", (64, 64)), (64, 64), "mask: it is empty, so nothing would change; paint what may "),
        ((60, 0, 5, 5), (64, 64), "mask: the box 60,0,5,5 reaches beyond the 64 x 64 pixels of the image"),
        ((0, 0, 5, 5), (128, 64), "mask: it covers no part of the image that is left once the image is cropped to"),
        ("1,2,3", (64, 64), 'mask: expected a box x,y,w,h in whole pixels, w and h from 1 on, got "1,2,3"'),
        ("1,2,0,3", (64, 64), 'mask: expected a box x,y,w,h in whole pixels, w and h from 1 on, got "1,2,0,3"'),
        ("-1,2,3,4", (64, 64), 'mask: expected a box x,y,w,h in whole pixels, w and h from 1 on, got "-1,2,3,4"'),
        ("1.5,2,3,4", (64, 64), 'mask: expected a box x,y,w,h in whole pixels, w and h from 1 on, got "1.5,2,3,4"'),
        ((1, 2, 3), (64, 64), "mask: expected four whole numbers x, y, w, h in pixels, got (1, 2, 3)"),
        ((1, 2, 3, 0.5), (64, 64), "mask: expected four whole numbers x, y, w, h in pixels, got (1, 2, 3, 0.5)"),
        ("", (64, 64), "mask: the name is empty; expected an image, a bool array"),
        ("none.png", (64, 64), "image none.png does not exist"),
        (PIXELS.astype(int), (64, 64), "mask must be a bool array (H, W) or (G, G), got an int64 array (64, 64); com"),
        (PIXELS[None], (64, 64), "mask must be a bool array (H, W) or (G, G), got a bool array (1, 64, 64); com"),
        (3.5, (64, 64), "mask must be an image, a bool array (H, W) or (G, G), or a box x,y,w,h in pixels, got 3.5"),
    ],
)
def test_masks_that_cannot_be_used(mask, size, message):
    """One line with what came and what was expected."""
    assert input_error(fitted, mask, size).startswith(message)


@pytest.mark.parametrize("mask", [ALL, CODES])
def test_changes_are_nested_and_of_the_share(mask):
    """A code that changes at one strength changes at every higher one; never a code outside of the mask."""
    before = np.zeros((8, 8), dtype=bool)
    for strength in (0, 0.001, 0.1, 0.25, 0.5, 0.75, 0.9, 1):
        changes = sample_changes(mask, strength, seed=7, index=3)
        assert not (before & ~changes).any()
        assert not (changes & ~mask).any()
        assert changes.sum() == (max(1, round(strength * mask.sum())) if strength else 0)
        before = changes
    np.testing.assert_array_equal(before, mask)


def test_changes_depend_on_seed_and_index():
    """No two images keep the same codes."""
    keys = [(7, 0), (7, 1), (8, 0), (2**63 - 1, 5)]
    found = {sample_changes(ALL, 0.5, seed=seed, index=index).tobytes() for seed, index in keys}
    assert len(found) == len(keys)


def test_changes_are_the_same_in_every_version():
    """Otherwise a picture could not be made again from its metadata."""
    changes = sample_changes(ALL, 0.1, seed=7, index=0)
    assert np.flatnonzero(changes).tolist() == [2, 3, 30, 32, 47, 57]


def test_changes_are_spread_evenly():
    """Each code changes as often as the others."""
    counts = sum(sample_changes(ALL, 0.25, seed=seed, index=0).astype(int) for seed in range(400))
    assert abs(counts / 400 - 0.25).max() < 0.1
