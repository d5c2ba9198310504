"""Results of generation: the note on images that repeat."""

import numpy as np
import pytest

from cogview.pipeline.results import repetition_notes


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        ([0, 1, 2, 3], []),
        ([0, 1, 2, 2], []),  # three quarters differ
        ([0, 0, 1, 1], ["“一只狐狸”: only 2 of 4 images differ"]),
        ([0], []),
    ],
)
def test_repetition_notes_count_equal_images_of_a_prompt(tiny_model, kinds, expected):
    images = tiny_model.generate("一只狐狸", n=len(kinds), seed=7)
    for image, kind in zip(images, kinds, strict=True):
        image.codes = np.full((8, 8), kind)
    notes = repetition_notes((image.prompt, image.codes.tobytes()) for image in images)
    assert [note.partition(";")[0] for note in notes] == expected


def test_generate_warns_when_images_repeat(tiny_model, caplog):
    """Greedy images are all equal."""
    tiny_model.generate("一只狐狸", n=4, seed=7, top_k=1)
    assert "“一只狐狸”: only 1 of 4 images differ; a higher temperature" in caplog.text
