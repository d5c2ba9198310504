"""Pictures of files as an ``ImageDataset``."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cogview.data.builders.picture_index import IndexedPicture, make_index
from cogview.data.image_dataset import render
from cogview.data.picture_images import PictureImages
from cogview.data.sources.pictures import picture_records
from cogview.data.sources.tables import TableOptions
from cogview.errors import InputError


@pytest.fixture
def pictures(tmp_path, picture_sources) -> list[IndexedPicture]:
    """Return an index of a wide picture of three stripes, and of a member of a tar archive."""
    pixels = np.repeat(np.array([[[0] * 3, [255] * 3, [0] * 3]], dtype=np.uint8), 20, axis=0).repeat(20, axis=1)
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    wide = list(picture_records(tmp_path / "wide.png", TableOptions(), print))
    shard = list(picture_records(picture_sources["tar"], TableOptions(), print))
    return make_index(tmp_path / "index.jsonl", {}, [*wide, shard[7]])


@pytest.mark.parametrize(
    ("fit", "middle_column"),
    [("crop", [255, 255, 255]), ("pad", [255, 255, 255]), ("stretch", [255, 255, 255])],
)
def test_picture_images_are_fitted_at_every_scale(pictures, fit, middle_column):
    images = PictureImages(pictures=pictures, side=48, fit=fit)
    for scale, side in ((1, 48), (2, 96)):
        pixels = render(images[0], 48, scale)
        assert pixels.shape == (side, side, 3)
        assert pixels[side // 2, side // 2].tolist() == middle_column
        left = pixels[side // 2, 2].tolist()
        assert left == ([255] * 3 if fit == "crop" else [0] * 3)
        assert pixels[1, 2].tolist() == ([0] * 3 if fit == "stretch" else [255] * 3)


def test_picture_images_read_members_of_archives(pictures, picture_sources):
    shown = render(PictureImages(pictures=pictures, side=32, fit="stretch")[1], 32)
    with Image.open(picture_sources["folder"] / "007.png") as image:
        expected = image.resize((32, 32), Image.Resampling.LANCZOS, reducing_gap=3.0)
    assert np.array_equal(shown, np.asarray(expected))


def test_picture_images_refuse_a_file_that_is_gone(pictures):
    example = PictureImages(pictures=pictures, side=32)[0]
    Path(pictures[0].path).unlink()
    with pytest.raises(InputError, match=r"wide\.png has been changed or removed since the training was started"):
        render(example, 32)
