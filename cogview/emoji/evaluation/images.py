"""True images for a model to read."""

# H, W image in pixels
from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from PIL import Image

from cogview.pipeline.captioning import NOTED


def images_without_notes(images: Iterable[np.ndarray]) -> list[Image.Image]:
    """Return images about whose reconstruction nothing is logged: it is measured, or the image is a true scene.

    Args:
        images: uint8 RGB (H, W, 3) each.
    """
    quiet = [Image.fromarray(pixels) for pixels in images]
    for image in quiet:
        image.info[NOTED] = True
    return quiet
