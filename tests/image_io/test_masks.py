"""Masks: what counts as painted, and the codes that painted pixels cover."""

import numpy as np
import pytest
from PIL import Image

from cogview.image_io.masks import masked_codes, painted_pixels, read_mask
from cogview.image_io.reading import fit
from tests.factories import input_error


def painted(mode: str) -> Image.Image:
    """Return a mask of 6 x 4 pixels in which those of column 2 are painted."""
    pixels = np.zeros((4, 6), dtype=bool)
    pixels[:, 2] = True
    if mode == "LA of black on nothing":
        return Image.fromarray(np.stack([np.zeros((4, 6)), pixels * 255], axis=-1).astype(np.uint8))
    if mode == "I;16":
        return Image.fromarray((pixels * 65535).astype(np.uint16))
    return Image.fromarray((pixels * 255).astype(np.uint8)).convert(mode)


@pytest.mark.parametrize("mode", ["1", "L", "RGB", "RGBA", "P", "I;16", "LA of black on nothing"])
def test_white_is_painted_and_opaque_where_a_part_is_transparent(mode):
    """A mask of any mode; one in RGBA without transparency is read by its colours."""
    assert (painted_pixels(painted(mode)) == np.array([0, 0, 1, 0, 0, 0], dtype=bool)).all()


def test_grey_counts_from_the_middle():
    """What a filter or JPEG leaves of an edge is painted from 128 on."""
    assert painted_pixels(Image.fromarray(np.array([[0, 127, 128, 255]], dtype=np.uint8))).tolist() == [
        [False, False, True, True]
    ]


def test_mask_is_read_upright(tmp_path):
    """A mask beside a photograph is turned as that is."""
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    painted("L").save(tmp_path / "mask.png", exif=exif)
    assert read_mask(tmp_path / "mask.png").shape == (6, 4)


def test_unreadable_mask_is_refused(tmp_path):
    """A missing file, a text and a damaged image, in one line each."""
    (tmp_path / "text.png").write_text("no image")
    assert input_error(read_mask, tmp_path / "none.png").endswith("none.png does not exist")
    assert "text.png is no image that can be read" in input_error(read_mask, tmp_path / "text.png")
    painted("L").resize((64, 64)).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:70])
    assert "cut.png is cut off or damaged" in input_error(read_mask, tmp_path / "cut.png")


@pytest.mark.parametrize("rule", ["crop", "pad", "stretch"])
@pytest.mark.parametrize("size", [(64, 64), (128, 128), (96, 64), (64, 100), (37, 53), (5, 3), (1, 1)])
def test_codes_of_mask_are_those_whose_area_holds_a_painted_pixel(rule, size):
    """A painted pixel is compared with where it lies once the image is a square of 64 pixels with 8 codes."""
    width, height = size
    random = np.random.default_rng(0)
    for _ in range(20):
        x, y = int(random.integers(width)), int(random.integers(height))
        pixels = np.zeros((height, width), dtype=bool)
        pixels[y, x] = True
        scale = {"crop": max(64 / width, 64 / height), "pad": min(64 / width, 64 / height), "stretch": 0}[rule]
        scales = [scale or 64 / width, scale or 64 / height]
        if rule == "pad":  # rounded to whole pixels, as ``fit`` does
            scales = [max(1, round(width * scale)) / width, max(1, round(height * scale)) / height]
        if rule == "crop":
            short = min(size)
            low = [(x - (width - short) // 2) * scale, (y - (height - short) // 2) * scale]
        else:
            low = [
                x * scales[0] + (64 - round(width * scales[0])) // 2,
                y * scales[1] + (64 - round(height * scales[1])) // 2,
            ]
        expected = np.ones((8, 8), dtype=bool)
        for axis, (start, each) in enumerate(zip(low, scales, strict=True)):
            covered = (8 * np.arange(8) < start + each - 1e-9) & (8 * np.arange(1, 9) > start + 1e-9)
            expected &= covered[None, :] if axis == 0 else covered[:, None]
        np.testing.assert_array_equal(masked_codes(pixels, 8, side=64, rule=rule), expected)


def test_mask_covers_what_fit_shows_of_it():
    """A painted half of a photograph is in the codes that are bright after the photograph is fitted."""
    pixels = np.zeros((90, 120), dtype=bool)
    pixels[:, 60:] = True
    for rule in ("crop", "pad", "stretch"):
        image = Image.fromarray(np.where(pixels[..., None], 255, 0).repeat(3, axis=-1).astype(np.uint8))
        fitted = fit(image, 64, rule)[0].astype(float).mean(axis=-1).reshape(8, 8, 8, 8).mean(axis=(1, 3))
        codes = masked_codes(pixels, 8, side=64, rule=rule)
        inner = slice(1, 7)  # white borders of pad are outside of the mask
        np.testing.assert_array_equal(codes[inner], fitted[inner] > 100)
