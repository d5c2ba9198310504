"""Images and masks that the records of a job give: read, fitted to the model and encoded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from cogview.errors import InputError
from cogview.jobs.observer import JobObserver
from cogview.jobs.records import JobRecord

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

    from cogview.pipeline.cogview import CogView


class JobImages:
    """Reader of the images of a job, which reports a note on each of them once.

    Args:
        model: The model of the job.
        observer: Receiver of the notes.

    Attributes:
        unread: Reasons of the images that cannot be read for a task.
    """

    def __init__(self, model: CogView, observer: JobObserver) -> None:
        self.unread: dict[tuple[Path, str], str] = {}
        self._model = model
        self._observer = observer
        self._noted: set[Path] = set()
        self._sizes: dict[Path, tuple[int, int]] = {}  # of the images that were read, before they were fitted

    def header_problem(self, path: Path, task: str) -> str | None:
        """Return why an image cannot be used, as far as its header shows; None if it can."""
        from cogview.image_io.reading import open_image

        try:
            with open_image(path) as image:
                problem = self._model.enlargement_problem(image, task=task)
        except InputError as error:
            return str(error)
        return None if problem is None else f"image {path}: {problem}"

    def read(self, path: Path, task: str) -> Image.Image | None:
        """Read an image and fit it to the size that ``task`` is given; None, with a reason kept, if that fails."""
        from cogview.image_io.reading import read_image
        from cogview.pipeline.captioning import NOTED

        notes: list[str] = []
        try:
            image = read_image(path, notes.append)
            self._sizes[path] = image.size
            if (problem := self._model.enlargement_problem(image, task=task)) is not None:
                raise InputError(f"image {path}: {problem}")
            image, note = self._model.fit_image(image, task=task)
        except InputError as error:
            self.unread[path, task] = str(error)
            return None
        image.info[NOTED] = True
        if path not in self._noted:
            self._noted.add(path)
            for line in (*notes, note, self._model.image_warning(image, task=task)):
                if line is not None:
                    self._observer.noted(f"{path}: {line}")
        return image

    def encode(self, images: Mapping[JobRecord, Image.Image]) -> dict[JobRecord, np.ndarray]:
        """Return the codes of images, those of one size together."""
        codes: dict[JobRecord, np.ndarray] = {}
        for size in dict.fromkeys(image.size for image in images.values()):
            records = [record for record, image in images.items() if image.size == size]
            task = records[0].row.weights
            encoded = self._model.encode_images([images[record] for record in records], task=task)
            codes |= zip(records, encoded, strict=True)
        return codes

    def fit_mask(self, record: JobRecord) -> dict[JobRecord, np.ndarray]:
        """Return the codes that the mask of a record covers, if it has one; its image has been read."""
        from cogview.pipeline.editing import require_partial
        from cogview.pipeline.masks import load_mask

        if record.mask is None or record.image is None:
            return {}
        mask = self._model.fit_mask(load_mask(record.mask), self._sizes[record.image], str(record.image))
        if record.row.fills:
            require_partial(mask)
        return {record: mask}
