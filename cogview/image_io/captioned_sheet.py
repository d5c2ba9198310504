"""Contact sheets with captions: the images of each caption above it, several captions side by side."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from PIL import Image, ImageDraw

from cogview.errors import InputError
from cogview.image_io.fonts import Font, missing_characters, system_font, wrap_text
from cogview.image_io.reading import ignore_note

MAX_IMAGES = 1000
SIDE = 192  # pixels of a side up to which small images are enlarged by a whole factor
MAX_FACTOR = 3
MAX_PIXELS = 24_000_000  # of a sheet with enlarged images
MAX_LINES = 2  # of a caption
GAP = 4  # pixels between images
MARGIN = 16  # pixels between groups, and around the sheet
ASPECT = 1.4  # width of a page over its height
MAX_PER_ROW = 64
MAX_LISTED = 8  # characters and numbers in a note
COLOUR = (40, 40, 40)

Group: TypeAlias = tuple[str, Sequence[Image.Image]]  # a caption and its images


def captioned_sheet(
    groups: Sequence[Group],
    on_note: Callable[[str], object] = ignore_note,
    *,
    fonts: Iterable[Font] | None = None,
) -> Image.Image:
    """Return one image that shows groups of others, each group above its caption, on white.

    Small images are enlarged two or three times without smoothing. A caption that no installed font can show is
    replaced by the number of its group.

    Args:
        groups: Captions and their RGB images, at least one image each.
        on_note: Called with a line about captions that are replaced by numbers.
        fonts: Fonts to choose from; None: those of the system.

    Raises:
        InputError: If there are more than ``MAX_IMAGES`` images.
    """
    counts = [len(images) for _, images in groups]
    require_sheet_fits(sum(counts))
    width = max(image.width for _, images in groups for image in images)
    height = max(image.height for _, images in groups for image in images)
    pages = (_Page.choose(counts, width * factor, height * factor, factor) for factor in range(MAX_FACTOR, 0, -1))
    page = next(page for page in pages if page.factor == 1 or page.is_enlargement_useful)
    size = page.font_size
    captions = [_one_line(caption) for caption, _ in groups]
    font = system_font(captions, size, fonts)
    missing = ["" if not caption else missing_characters(caption, font) for caption in captions]
    if any(missing):
        on_note(_note_on_numbers(missing))
    lines = [
        [str(number)] if lacking else wrap_text(caption, page.group_width, font, MAX_LINES)
        for number, (caption, lacking) in enumerate(zip(captions, missing, strict=True), start=1)
    ]
    return page.draw(groups, lines, font)


def require_sheet_fits(count: int) -> None:
    """Raise InputError if a sheet cannot have ``count`` images."""
    if count > MAX_IMAGES:
        raise InputError(f"--grid writes one sheet of at most {MAX_IMAGES} images, got {count}: leave it out")


def group_images(captions: Iterable[str], images: Iterable[Image.Image]) -> list[Group]:
    """Return images in groups; consecutive ones of one caption share a group."""
    groups: list[tuple[str, list[Image.Image]]] = []
    for caption, image in zip(captions, images, strict=True):
        if not groups or groups[-1][0] != caption:
            groups.append((caption, []))
        groups[-1][1].append(image)
    return list(groups)


def legend(groups: Sequence[Group]) -> str:
    """Return the captions of a sheet with their numbers, a line for each."""
    return "\n".join(f"{number}: {_one_line(caption)}" for number, (caption, _) in enumerate(groups, start=1))


@dataclass(frozen=True, kw_only=True)
class _Page:
    """The arrangement of groups on a sheet.

    Attributes:
        counts: Images of each group.
        width: Pixels of an enlarged image from left to right.
        height: Its pixels from top to bottom.
        factor: How many times it is enlarged.
        per_row: Maximum number of images beside each other in a group.
        columns: Groups beside each other.
    """

    counts: Sequence[int]
    width: int
    height: int
    factor: int
    per_row: int
    columns: int

    @classmethod
    def choose(cls, counts: Sequence[int], width: int, height: int, factor: int) -> _Page:
        """Return the page whose sides are nearest to the wanted ratio, with few blanks and few broken rows."""
        widest = min(max(counts), MAX_PER_ROW)
        pages = [
            cls(counts=counts, width=width, height=height, factor=factor, per_row=per_row, columns=columns)
            for per_row in range(1, widest + 1)
            for columns in range(1, max(1, min(len(counts), MAX_PER_ROW // per_row)) + 1)
        ]
        return min(pages, key=_Page.cost)

    def cost(self) -> float:
        """Return how far the page is from a good one."""
        slots = sum(self.rows_of(count) for count in self.counts) * self.per_row
        blank = 1 - sum(self.counts) / slots
        blank_groups = 1 - len(self.counts) / (self.columns * -(-len(self.counts) // self.columns))
        total_width, total_height = self.size([1] * len(self.counts))
        ratio = abs(math.log(total_width / total_height / ASPECT))
        return ratio + 2 * blank + blank_groups + 0.15 * (self.per_row < max(self.counts))

    @property
    def is_enlargement_useful(self) -> bool:
        """Whether the images are still small and the sheet is not too large."""
        width, height = self.size([MAX_LINES] * len(self.counts))
        return min(self.width, self.height) <= SIDE and width * height <= MAX_PIXELS

    @property
    def font_size(self) -> int:
        """Height of the captions' font in pixels."""
        return max(12, min(24, self.height // 11))

    @property
    def line_height(self) -> int:
        """Pixels from one line of a caption to the next."""
        return round(1.4 * self.font_size)

    @property
    def group_width(self) -> int:
        """Pixels from the left of a group to its right."""
        return self.per_row * (self.width + GAP) - GAP

    def rows_of(self, count: int) -> int:
        """Return the rows of a group of ``count`` images."""
        return -(-count // self.per_row)

    def size(self, num_lines: Sequence[int]) -> tuple[int, int]:
        """Return width and height of the sheet; ``num_lines`` has the lines of each caption."""
        columns = min(self.columns, len(self.counts))
        tops = self.tops(num_lines)
        return columns * (self.group_width + MARGIN) + MARGIN, tops[-1]

    def tops(self, num_lines: Sequence[int]) -> list[int]:
        """Return the upper edge of each row of groups, and the height of the sheet."""
        tops = [MARGIN]
        for first in range(0, len(self.counts), self.columns):
            row = slice(first, first + self.columns)
            images = max(map(self.rows_of, self.counts[row])) * (self.height + GAP)
            tops.append(tops[-1] + images + max(num_lines[row]) * self.line_height + MARGIN)
        return tops

    def draw(self, groups: Sequence[Group], lines: Sequence[Sequence[str]], font: Font) -> Image.Image:
        """Return the sheet with the lines of the captions."""
        num_lines = [len(each) for each in lines]
        tops = self.tops(num_lines)
        sheet = Image.new("RGB", self.size(num_lines), "white")
        pen = ImageDraw.Draw(sheet)
        for number, ((_, images), caption) in enumerate(zip(groups, lines, strict=True)):
            left = MARGIN + number % self.columns * (self.group_width + MARGIN)
            top = tops[number // self.columns]
            for index, image in enumerate(images):
                size = image.width * self.factor, image.height * self.factor
                across, down = index % self.per_row, index // self.per_row
                place = left + across * (self.width + GAP), top + down * (self.height + GAP)
                sheet.paste(image.resize(size, Image.Resampling.NEAREST), place)
            top += self.rows_of(len(images)) * (self.height + GAP)
            for line_number, line in enumerate(caption):
                baseline = top + line_number * self.line_height + round(1.05 * self.font_size)
                pen.text((left, baseline), line, COLOUR, font, anchor="ls")
        return sheet


def _one_line(text: str) -> str:
    """Return a text on one line, without control characters and those that change the direction."""
    words = " ".join(text.split())
    return "".join(one for one in words if unicodedata.category(one)[0] != "C")


def _note_on_numbers(missing: Sequence[str]) -> str:
    """Return the note that groups with missing characters are numbered."""
    characters = "".join(dict.fromkeys("".join(missing)))
    numbers = [str(number) for number, lacking in enumerate(missing, start=1) if lacking]
    shown = ", ".join(numbers[:MAX_LISTED]) + ", …" * (len(numbers) > MAX_LISTED)
    remedy = (
        "; a Chinese font such as Noto Sans CJK (fonts-noto-cjk) shows them"
        if any(unicodedata.name(one, "").startswith("CJK") for one in characters)
        else ""
    )
    return (
        f"no installed font has {characters[:MAX_LISTED]}{'…' * (len(characters) > MAX_LISTED)}: the contact sheet has "
        f"numbers in place of the captions {shown}, which cogview info prints{remedy}"
    )
