"""Upscaling in tiles: an image larger than the model's, as overlapping parts of the model's size.

Each tile is a request of its own, and neighbours are cross-faded in the middle of their overlap. Tiles are sampled
independently, so an edge that one invents does not continue in its neighbour.
"""

# H height, W width, N tiles
from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice, pairwise

import numpy as np

from cogview.errors import InputError
from cogview.image_io.reading import to_rgb
from cogview.modeling.config import Sampling
from cogview.pipeline.inputs import ImageLike, load_image
from cogview.pipeline.requests import GenerationRequest, Prompt, upscale_requests
from cogview.pipeline.results import Caption, GeneratedImage, only_images

OVERLAP = 1 / 4  # of a side of a tile: minimum that neighbours share
MAX_TILES = 4096


@dataclass(frozen=True, kw_only=True)
class TileGrid:
    """The tiles of an image.

    A side below that of a tile is padded to it with its mirror image at the right or the bottom; the result is
    cropped. Along a longer side the tiles are spread evenly, so that the first and the last lie at the edges.

    Attributes:
        width: Pixels of the image from left to right.
        height: Its pixels from top to bottom.
        side: Pixels of a side of a tile.
    """

    width: int
    height: int
    side: int

    def __len__(self) -> int:
        return len(self.tops) * len(self.lefts)

    def __str__(self) -> str:
        """Return columns and rows, such as "11 x 13"."""
        return f"{len(self.lefts)} x {len(self.tops)}"

    @property
    def is_whole(self) -> bool:
        """Whether the image has the size of a tile."""
        return self.width == self.height == self.side

    @property
    def lefts(self) -> list[int]:
        """Left edges of the columns, in pixels."""
        return _starts(self.width, self.side)

    @property
    def tops(self) -> list[int]:
        """Upper edges of the rows, in pixels."""
        return _starts(self.height, self.side)

    def split(self, pixels_HWC: np.ndarray) -> list[np.ndarray]:
        """Return the tiles (side, side, 3) of an image, row by row.

        Args:
            pixels_HWC: uint8 RGB pixels of the image.
        """
        below, right = (max(0, self.side - length) for length in pixels_HWC.shape[:2])
        padded_HWC = np.pad(pixels_HWC, ((0, below), (0, right), (0, 0)), mode="symmetric")
        return [padded_HWC[top : top + self.side, left : left + self.side] for top in self.tops for left in self.lefts]

    def join(self, tiles: Iterable[np.ndarray], scale: int) -> np.ndarray:
        """Return the upscaled image, uint8 (scale H, scale W, 3).

        Args:
            tiles: Upscaled tiles, uint8 RGB (scale side, scale side, 3), row by row.
            scale: Factor of the sides.
        """
        side = scale * self.side
        height, width = scale * max(self.height, self.side), scale * max(self.width, self.side)
        weights_y = _weights([scale * top for top in self.tops], side, round(OVERLAP * side))
        weights_x = _weights([scale * left for left in self.lefts], side, round(OVERLAP * side))
        total_HWC = np.zeros((height, width, 3), np.float32)
        positions = [(row, column) for row in range(len(self.tops)) for column in range(len(self.lefts))]
        for (row, column), tile in zip(positions, tiles, strict=True):
            top, left = scale * self.tops[row], scale * self.lefts[column]
            weight = (weights_y[row][:, None] * weights_x[column])[..., None]
            total_HWC[top : top + side, left : left + side] += weight * tile
        return np.rint(total_HWC[: scale * self.height, : scale * self.width]).astype(np.uint8)


def tiles_problem(width: int, height: int, side: int) -> str | None:
    """Return why an image has too many tiles, in one line, or None if it has not.

    Args:
        width: Pixels of the image from left to right.
        height: Its pixels from top to bottom.
        side: Pixels of a side of a tile.
    """
    if (count := len(TileGrid(width=width, height=height, side=side))) <= MAX_TILES:
        return None
    return (
        f"{width} x {height} pixels are {count} tiles of {side} x {side}, at most {MAX_TILES} are upscaled: scale it "
        "down or crop it first"
    )


def sample_tiles(image: ImageLike, side: int, count: int = 64) -> np.ndarray:
    """Return some tiles of an image, uint8 RGB (N, side, side, 3).

    Args:
        image: Image of any size and form.
        side: Pixels of a side of a tile.
        count: Maximum number of tiles, which are taken evenly from all.
    """
    pixels_HWC = np.asarray(to_rgb(load_image(image)))
    tiles = TileGrid(height=pixels_HWC.shape[0], width=pixels_HWC.shape[1], side=side).split(pixels_HWC)
    return np.stack(tiles[:: -(-len(tiles) // count)])


def upscale_tiles(
    images: Sequence[ImageLike],
    prompts: Sequence[Prompt],
    *,
    seeds: Sequence[int],
    task: str,
    sampling: Sampling,
    side: int,
    encode: Callable[[Sequence[ImageLike]], np.ndarray],
    run: Callable[[Sequence[GenerationRequest]], Iterator[GeneratedImage | Caption]],
) -> list[GeneratedImage]:
    """Upscale images in tiles.

    Tile k of an image has its index plus k, and so its own noise, in any batch. An image of the size of a tile is
    upscaled as without tiles.

    Args:
        images: Images of any size and form.
        prompts: A checked prompt for each.
        seeds: Seed of each image.
        task: ``upscale`` or ``low_level``.
        sampling: Sampling settings.
        side: Pixels of a side of the images that the task is given.
        encode: Returns the codes of images of that side.
        run: Runs requests.

    Returns:
        An image for each; those so far if ``run`` ends early. The codes of an image of several tiles are (N, G, G).

    Raises:
        InputError: If an image cannot be used, or has more than ``MAX_TILES`` tiles.
    """
    grids: list[TileGrid] = []
    parts: list[ImageLike] = []
    owners: list[int] = []
    for number, image in enumerate(images):
        pixels_HWC = np.asarray(to_rgb(load_image(image, f"images[{number}]")))
        height, width = pixels_HWC.shape[:2]
        if (problem := tiles_problem(width, height, side)) is not None:
            raise InputError(f"images[{number}]: {problem}")
        grid = TileGrid(height=height, width=width, side=side)
        grids.append(grid)
        parts += [image] if grid.is_whole else grid.split(pixels_HWC)  # a generated image has its codes
        owners += [number] * len(grid)
    requests = upscale_requests(
        [prompts[owner] for owner in owners],
        [images[owner] for owner in owners],
        encode(parts),
        task=task,
        seeds=[seeds[owner] for owner in owners],
        sampling=sampling,
    )
    firsts = [owners.index(number) for number in range(len(grids))]
    numbered = [
        replace(request, index=request.index + place - firsts[owner])
        for place, (request, owner) in enumerate(zip(requests, owners, strict=True))
    ]
    results, upscaled = only_images(run(numbered)), []
    for grid, first in zip(grids, firsts, strict=True):
        tiles = list(islice(results, len(grid)))
        if len(tiles) < len(grid):
            break
        upscaled.append(tiles[0] if grid.is_whole else _join(grid, tiles, requests[first]))
    return upscaled


def _join(grid: TileGrid, tiles: Sequence[GeneratedImage], request: GenerationRequest) -> GeneratedImage:
    """Return the image of upscaled tiles."""
    pixels = grid.join(map(np.asarray, tiles), tiles[0].width // grid.side)
    codes = np.stack([tile.codes for tile in tiles])
    image = GeneratedImage.from_pixels(pixels, request, codes, sum(tile.log_probability for tile in tiles))
    image.model_prompt, image.codebook_sha256 = tiles[0].model_prompt, tiles[0].codebook_sha256
    return image


def _starts(length: int, side: int) -> list[int]:
    """Return where tiles start along an axis."""
    stride = side - round(OVERLAP * side)
    steps = max(0, -(-(length - side) // stride))
    return [round(step * (length - side) / max(1, steps)) for step in range(steps + 1)]


def _weights(starts: Sequence[int], side: int, fade: int) -> list[np.ndarray]:
    """Return the weights of the pixels of each tile along an axis, which add up to 1 at each pixel of the image.

    Args:
        starts: Where the upscaled tiles start.
        side: Pixels of an upscaled tile.
        fade: Pixels over which a tile takes over from its neighbour, in the middle of their overlap.
    """
    weights = [np.ones(side, np.float32) for _ in starts]
    for number, (start, following) in enumerate(pairwise(starts)):
        middle = (start + side + following) / 2
        for index, sign in ((number, -1), (number + 1, 1)):
            pixels = starts[index] + np.arange(side) + 0.5
            weights[index] *= np.clip(0.5 + sign * (pixels - middle) / fade, 0, 1).astype(np.float32)
    return weights
