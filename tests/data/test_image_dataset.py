"""Examples of image datasets: renditions of stored pixels, rows of several captions, checks."""

import numpy as np
import pytest

from cogview.data.image_dataset import ImageExample, caption_of, check_dataset, check_side, render, texts
from cogview.errors import InputError


def example(pixels: np.ndarray, side: int = 16, **changes) -> ImageExample:
    return ImageExample.from_pixels(pixels, **{"side": side, "identity": "照片", "captions": ("一张照片",), **changes})


class Numbers:
    """Two examples with two captions and one."""

    side, names, is_shuffled, provenance = 8, (), False, {}

    def __len__(self):
        return 2

    def __getitem__(self, index):
        pixels = np.full((8, 8, 3), index, dtype=np.uint8)
        return example(pixels, 8, identity=str(index), captions=("一", "二")[: 2 - index])


def test_from_pixels_renders_every_scale_of_the_side():
    pixels = np.random.default_rng(0).integers(256, size=(32, 32, 3), dtype=np.uint8)
    made = example(pixels)
    assert render(made, 16, 2) is pixels  # the stored pixels where they have the size
    for scale, size in ((1, 16), (0.5, 8), (3, 48)):
        assert render(made, 16, scale).shape == (size, size, 3)
    flat = example(np.full((32, 32, 3), 77, dtype=np.uint8))
    assert (render(flat, 16, 0.5) == 77).all()


@pytest.mark.parametrize("shape", [(16, 16), (16, 15, 3), (16, 16, 4)])
def test_from_pixels_refuses_images_that_are_not_square_rgb(shape):
    with pytest.raises(ValueError, match="example 照片 needs uint8"):
        example(np.zeros(shape, dtype=np.uint8))
    with pytest.raises(ValueError, match=r"got float64 \(16, 16, 3\)"):
        example(np.zeros((16, 16, 3)))


def test_caption_of_refuses_an_example_without_captions():
    """Pictures without captions suit an image tokenizer alone."""
    with pytest.raises(InputError, match="example 照片 has no caption, expected at least one"):
        caption_of([example(np.zeros((16, 16, 3), dtype=np.uint8), captions=())], 0)


def test_captions_yields_every_caption_once():
    assert list(texts(Numbers())) == ["一", "二", "一"]


def test_caption_of_pairs_rows_beyond_the_examples_with_their_next_captions():
    rows = [caption_of(Numbers(), row) for row in range(6)]
    assert [(made.identity, caption) for made, caption in rows] == [
        *(("0", "一"), ("1", "一"), ("0", "二"), ("1", "一"), ("0", "一"), ("1", "一"))
    ]


def test_render_refuses_renditions_of_another_size():
    wrong = ImageExample(identity="7", captions=("一",), render=lambda scale: np.zeros((8, 8, 3), dtype=np.uint8))
    with pytest.raises(InputError, match=r"image 7 at scale 2 must be uint8 \(16, 16, 3\), got uint8 \(8, 8, 3\)"):
        render(wrong, 8, 2)


def test_check_dataset_refuses_sides_that_do_not_divide_into_codes():
    check_dataset(Numbers(), 8)
    with pytest.raises(InputError, match="images of 8 pixels do not divide into codes of 16 x 16 pixels"):
        check_dataset(Numbers(), 16)


@pytest.mark.parametrize(
    ("side", "downsampling", "tasks"),
    [(96, 8, ("generate", "upscale")), (80, 8, ("generate", "low_level")), (48, 16, ("caption",)), (1024, 4, ())],
)
def test_check_side_accepts_any_multiple_that_the_tasks_divide(side, downsampling, tasks):
    check_side(side, downsampling, tasks)


@pytest.mark.parametrize(
    ("side", "downsampling", "tasks", "message"),
    [
        (100, 16, (), "images of 100 pixels do not divide into codes of 16 x 16 pixels; .* sides that fit: 96 and 112"),
        (9, 16, (), "images of 9 pixels do not divide into codes of 16 x 16 pixels; the nearest sides that fit: 16"),
        (70, 8, ("generate", "upscale"), "do not divide into codes of 8 x 8 pixels; the nearest sides .*: 64 and 96"),
        (
            80,
            8,
            ("upscale",),
            "have 10 codes on a side, but the task upscale needs a multiple of 4; .*: 64 and 96",
        ),
        (
            1028,
            4,
            (),
            "have 257 codes on a side, at most 256 fit a model; the nearest side that fits: 1024",
        ),
        (1030, 4, (), "images of 1030 pixels do not divide into codes of 4 x 4 pixels; .* sides that fit: 1024"),
    ],
)
def test_check_side_names_the_nearest_sides_that_fit(side, downsampling, tasks, message):
    with pytest.raises(InputError, match=f"{message}$"):
        check_side(side, downsampling, tasks)
