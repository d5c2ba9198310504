"""A survey of pictures with captions, for the choices of a new recipe: all captions, and the pixels of a sample."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from cogview.data.builders.prepare import MIN_SIDE, fit_picture, normalize_caption, pixel_digest
from cogview.data.keyed_random import KeyedRandom
from cogview.data.sources.open import open_source
from cogview.data.sources.records import PictureRecord
from cogview.data.sources.tables import TableOptions
from cogview.errors import InputError
from cogview.formatting import format_list, shorten
from cogview.image_io.reading import FitRule, open_image, read_image

MAX_RECORDS = 100_000  # whose captions are read
MAX_SAMPLE = 400  # pictures whose pixels are read
MAX_KEPT = 64  # pictures that are kept, for measurements
KEPT_SIDE = 512  # pixels


@dataclass(kw_only=True)
class PictureSurvey:
    """What the pictures of some sources are like.

    Attributes:
        records: Entries of the sources.
        read: Entries whose captions were read.
        captioned: Those of them with a picture and a caption.
        problems: Reasons why others cannot be used, by the name of the entry; the first ones.
        left_out: Number of those.
        captions: Captions of all captioned pictures.
        lengths: Characters of each caption.
        distinct: Number of different captions.
        characters: Uses of each character.
        sampled: Pictures of the sample, whether or not they can be read.
        unread: Pictures of the sample that cannot be used.
        unread_captions: Their captions.
        sizes: Width and height of the pictures of the sample.
        transparent: Pictures of the sample with transparent parts.
        digests: Hashes of the pixels of the sample.
        images: Some pictures of the sample, RGB, at most ``KEPT_SIDE`` pixels a side.
        texts: Some captions.
    """

    records: int = 0
    read: int = 0
    captioned: int = 0
    problems: list[str] = field(default_factory=list)
    left_out: int = 0
    lengths: list[int] = field(default_factory=list)
    distinct: int = 0
    characters: Counter[str] = field(default_factory=Counter)
    sampled: int = 0
    unread: int = 0
    unread_captions: int = 0
    sizes: list[tuple[int, int]] = field(default_factory=list)
    transparent: int = 0
    digests: list[str] = field(default_factory=list)
    images: list[Image.Image] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)

    @property
    def captions(self) -> int:
        """Number of captions."""
        return len(self.lengths)

    @property
    def pictures(self) -> int:
        """Number of usable pictures with captions in all sources; an estimate, unless all were looked at."""
        return self._in_all(self.captioned, self.unread)

    @property
    def unusable(self) -> int:
        """Number of the other entries of the sources."""
        return self.records - self.pictures

    @property
    def copies(self) -> int:
        """Pictures of the sample with the same pixels as an earlier one."""
        return len(self.digests) - len(set(self.digests))

    @property
    def rows(self) -> int:
        """Number of captions of these pictures; an estimate, unless all were looked at."""
        return self._in_all(self.captions, self.unread_captions)

    def _in_all(self, count: int, unread: int) -> int:
        """Return a count of what was read, less the share of the sample that cannot be used, for all sources."""
        usable = count - unread * self.captioned / max(1, self.sampled)
        return round(usable * self.records / max(1, self.read))

    @property
    def is_whole(self) -> bool:
        """Whether every picture is in the sample."""
        return self.read == self.records and self.sampled == self.captioned

    @property
    def median_side(self) -> int:
        """Median of the shorter sides of the sample, in pixels."""
        return round(float(np.median([min(size) for size in self.sizes])))

    @property
    def transparent_share(self) -> float:
        """Share of the sample with transparent parts."""
        return self.transparent / len(self.sizes)

    @property
    def odd_share(self) -> float:
        """Share of the sample whose longer side is more than 1.4 times the shorter one."""
        return sum(max(size) > 1.4 * min(size) for size in self.sizes) / len(self.sizes)

    def pixels(self, side: int, fit: FitRule) -> np.ndarray:
        """Return the kept pictures as squares, uint8 (N, side, side, 3)."""
        return np.stack([fit_picture(image, side, fit) for image in self.images])

    def check(self, sources: Sequence[Path]) -> None:
        """Raise InputError unless a model can be trained on the pictures.

        Args:
            sources: Names of the sources, for the message.
        """
        named = format_list(sources)
        first = f"; the first: {self.problems[0]}" if self.problems else ""
        if not self.captioned:
            raise InputError(
                f"none of {self.records} entries of {named} is a picture with a caption; put NAME.txt beside NAME.jpg, "
                f"or train an image tokenizer alone, cogview train-image, which needs no captions{first}"
            )
        if not self.sizes:
            raise InputError(f"no picture of {named} can be read{first}")
        if self.captioned == 1 or (self.is_whole and len(set(self.digests)) == 1):
            raise InputError(
                f"one picture is too few: {named} must have at least two different ones, to train on and to hold out"
                f"{first}"
            )
        if self.distinct == 1:
            raise InputError(
                f"all captions are the same, so that a model cannot learn which picture is meant: "
                f"{shorten(self.texts[0], 40)}"
            )


def survey_pictures(
    sources: Sequence[Path], on_note: Callable[[str], object], table: TableOptions | None = None
) -> PictureSurvey:
    """Read the captions of sources and the pixels of a random sample, with a progress bar.

    Args:
        sources: Sources as ``cogview data build`` reads them.
        on_note: Called with a line about what was guessed or is not read.
        table: Columns of sources that are tables; None to guess them.

    Returns:
        The survey.

    Raises:
        InputError: A source cannot be read.
    """
    opened = [open_source(path, table or TableOptions(), on_note) for path in sources]
    found = PictureSurvey(records=sum(map(len, opened)))
    found.read = min(found.records, MAX_RECORDS)
    if found.read < found.records:
        on_note(f"the captions of the first {found.read} of {found.records} pictures are looked at")
    sample: list[PictureRecord] = []
    known: set[str] = set()
    records = islice(chain.from_iterable(opened), found.read)
    for record in tqdm(records, total=found.read, unit="caption", desc="captions", disable=None, leave=False):
        _add_captions(found, record, known, sample)
    found.distinct, found.sampled = len(known), len(sample)
    for record in tqdm(sample, unit="picture", desc="pictures", disable=None, leave=False):
        try:
            _add_picture(found, record)
        except InputError as error:
            _add_problem(found, str(error))
            found.unread += 1
            found.unread_captions += len(usable_captions(record))
    return found


def usable_captions(record: PictureRecord) -> list[str]:
    """Return the captions of a record, normalized as those of a store are, without empty ones."""
    return list(filter(None, map(normalize_caption, record.captions)))


def _add_captions(found: PictureSurvey, record: PictureRecord, known: set[str], sample: list[PictureRecord]) -> None:
    """Add the captions of a record, and the record to the random sample."""
    captions = usable_captions(record)
    if record.file is None or not captions:
        _add_problem(found, f"{record.name}: {record.problem or 'a picture without a caption'}")
        return
    if found.captioned < MAX_SAMPLE:
        sample.append(record)
    elif (place := KeyedRandom("survey", found.captioned).randbelow(found.captioned + 1)) < MAX_SAMPLE:
        sample[place] = record
    found.captioned += 1
    for caption in captions:
        found.lengths.append(len(caption))
        found.characters.update(character for character in caption if not character.isspace())
        known.add(caption)
        if len(found.texts) < MAX_KEPT:
            found.texts.append(caption)


def _add_picture(found: PictureSurvey, record: PictureRecord) -> None:
    """Add the pixels of a record; raise InputError if it cannot be read."""
    assert record.file is not None
    path, content = Path(record.name), record.file.read_part()
    with open_image(path, content=content) as image:
        is_transparent = False
        if image.has_transparency_data:
            try:
                is_transparent = image.convert("RGBA").getchannel("A").getextrema()[0] < 255  # type: ignore[operator]
            except Exception:  # what Pillow raises for broken files; ``read_image`` says what is wrong
                is_transparent = False
    image = read_image(path, content=content)
    if min(image.size) < MIN_SIDE:
        raise InputError(f"{path} is {image.width} x {image.height} pixels, expected at least {MIN_SIDE} on a side")
    found.sizes.append(image.size)
    found.transparent += is_transparent
    found.digests.append(pixel_digest(image))
    if len(found.images) < MAX_KEPT:
        image.thumbnail((KEPT_SIDE, KEPT_SIDE))
        found.images.append(image)


def _add_problem(found: PictureSurvey, problem: str) -> None:
    found.left_out += 1
    if len(found.problems) < MAX_KEPT:
        found.problems.append(problem)
