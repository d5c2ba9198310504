"""Upscaling in tiles: where they lie, how they are joined, and that each is an upscaled image of its own."""

from itertools import pairwise

import numpy as np
import pytest
from PIL import Image

from cogview.errors import InputError
from cogview.generation.requests import DecodingStopped
from cogview.pipeline.requests import GenerationRequest
from cogview.pipeline.tiles import MAX_TILES, TileGrid, tiles_problem

FOX = "一只狐狸在汽车的左边"


def noise(width, height, seed=0):
    """Return an image of random pixels."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("size", [(64, 64), (65, 64), (112, 112), (150, 40), (333, 200), (10, 9), (1, 70)])
def test_tile_grid_joins_what_it_splits(size):
    """The weights of the tiles add up to 1 at every pixel, also where a side is no multiple of anything."""
    pixels_HWC = np.asarray(noise(*size))
    grid = TileGrid(width=size[0], height=size[1], side=64)
    tiles = grid.split(pixels_HWC)
    assert len(tiles) == len(grid)
    assert {tile.shape for tile in tiles} == {(64, 64, 3)}
    np.testing.assert_array_equal(grid.join(tiles, 1), pixels_HWC)
    larger = [tile.repeat(2, axis=0).repeat(2, axis=1) for tile in tiles]
    np.testing.assert_array_equal(grid.join(larger, 2), pixels_HWC.repeat(2, axis=0).repeat(2, axis=1))


@pytest.mark.parametrize(
    ("length", "starts"),
    [(64, [0]), (30, [0]), (65, [0, 1]), (112, [0, 48]), (113, [0, 24, 49]), (300, [0, 47, 94, 142, 189, 236])],
)
def test_tile_grid_spreads_tiles_evenly(length, starts):
    grid = TileGrid(width=length, height=64, side=64)
    assert grid.lefts == starts
    assert all(after - before <= 48 for before, after in pairwise(starts))


def test_tile_grid_pads_with_the_mirror_image():
    pixels_HWC = np.arange(6, dtype=np.uint8).reshape(2, 1, 3).repeat(3, axis=1)
    (tile,) = TileGrid(width=3, height=2, side=4).split(pixels_HWC)
    np.testing.assert_array_equal(tile[:, 0, 0], [0, 3, 3, 0])


def test_tile_grid_fades_from_one_tile_to_the_next():
    grid = TileGrid(width=112, height=64, side=64)
    row = grid.join([np.full((64, 64, 3), value, np.uint8) for value in (0, 160)], 1)[0, :, 0].astype(int)
    assert (row[:48] == 0).all()
    assert (row[64:] == 160).all()
    assert set(np.diff(row[47:65])) == {5, 10}


@pytest.mark.parametrize("low_level", [False, True])
def test_upscale_in_tiles_equals_upscale_when_the_image_is_one_tile(tiny_model, low_level):
    side = 32 if low_level else 64
    image = noise(side, side)
    expected = tiny_model.upscale(image, FOX, seed=7, low_level=low_level)
    tiled = tiny_model.upscale(image, FOX, seed=7, low_level=low_level, tiles=True)
    np.testing.assert_array_equal(np.asarray(tiled), np.asarray(expected))
    np.testing.assert_array_equal(tiled.codes, expected.codes)


def test_upscale_in_tiles_keeps_the_codes_and_the_index_of_a_generated_image(tiny_model):
    image = tiny_model.generate(FOX, n=3, seed=7)[2]
    expected = tiny_model.upscale(image, seed=8)
    tiled = tiny_model.upscale(image, seed=8, tiles=True)
    assert tiled.index == 2
    np.testing.assert_array_equal(tiled.codes, expected.codes)


def test_upscale_in_tiles_upscales_each_tile_as_an_image_of_its_own(tiny_model):
    image = noise(70, 40)
    tiled = tiny_model.upscale(image, FOX, seed=7, low_level=True, tiles=True)
    assert tiled.size == (140, 80)
    grid = TileGrid(width=70, height=40, side=32)
    crops = grid.split(np.asarray(image))
    assert len(crops) == 6
    codes = tiny_model.encode_images(crops, task="low_level")
    requests = [
        GenerationRequest(prompt=FOX, seed=7, index=number, task="low_level", codes=codes[number])
        for number in range(6)
    ]
    alone = [one.codes for request in requests for one in tiny_model.run([request])]
    np.testing.assert_array_equal(tiled.codes, alone)
    for size in (1, 4):
        again = tiny_model.upscale(image, FOX, seed=7, low_level=True, tiles=True, batch_size=size)
        np.testing.assert_array_equal(again.codes, tiled.codes)
        np.testing.assert_array_equal(np.asarray(again), np.asarray(tiled))
    np.testing.assert_array_equal(grid.join(map(tiny_model.decode_images, tiled.codes), 2), np.asarray(tiled))


@pytest.mark.parametrize("size", [(33, 47), (5, 9), (40, 20)])
def test_upscale_in_tiles_doubles_any_sides(tiny_model, size):
    tiled = tiny_model.upscale(noise(*size), FOX, seed=7, low_level=True, tiles=True)
    assert tiled.size == (2 * size[0], 2 * size[1])


def test_upscale_in_tiles_returns_the_finished_images_when_the_callback_stops_it(tiny_model):
    images, calls = [noise(32, 32), noise(64, 32)], []

    def stop(progress):
        calls.append(progress)
        return len(calls) <= 8  # the lines of the first tile

    settings = {"seed": 7, "low_level": True, "tiles": True, "batch_size": 1}
    assert len(tiny_model.upscale(images, FOX, **settings, callback=stop)) == 1
    with pytest.raises(DecodingStopped):
        tiny_model.upscale(images[1], FOX, **settings, callback=lambda _: False)


def test_upscale_in_tiles_refuses_too_many_tiles(tiny_model):
    side = 32 + 24 * 64
    problem = tiles_problem(side, side, 32)
    assert problem == (
        f"{side} x {side} pixels are 4225 tiles of 32 x 32, at most {MAX_TILES} are upscaled: scale it down or crop it "
        "first"
    )
    with pytest.raises(InputError, match=r"images\[1\]: 1568 x 1568 pixels are 4225 tiles"):
        tiny_model.upscale([noise(8, 8), Image.new("RGB", (side, side))], FOX, low_level=True, tiles=True)
