"""Contact sheets with captions: their pages, the images on them, and captions that no font can show."""

import functools

import numpy as np
import pytest
from PIL import Image, ImageChops, ImageFont

from cogview.errors import InputError
from cogview.image_io import fonts
from cogview.image_io.captioned_sheet import captioned_sheet, group_images
from cogview.image_io.fonts import missing_characters, system_font, wrap_text

LATIN = ImageFont.load_default(17)  # of Pillow: it has no Chinese characters
FOX = "左边是狐狸，右边是红苹果"


def images(count, side=64):
    """Return images of different colours."""
    return [Image.new("RGB", (side, side), (number % 256, 37 * number % 256, 11)) for number in range(1, count + 1)]


def boxes(sheet, image):
    """Return the edges (left, top, right, bottom) of the pixels that have the colour of a one-coloured image."""
    levels = [[255 * (level == value) for level in range(256)] for value in image.getpixel((0, 0))]
    parts = [part.point(table) for part, table in zip(sheet.split(), levels, strict=True)]
    return functools.reduce(ImageChops.darker, parts).getbbox()


@pytest.mark.parametrize(
    ("prompts", "n", "columns", "rows"),
    [(16, 4, 12, 6), (1, 16, 4, 4), (3, 1, 3, 1), (16, 1, 6, 3), (2, 4, 4, 2), (1, 1, 1, 1)],
)
def test_captioned_sheet_arranges_images_on_a_page(prompts, n, columns, rows):
    """Sixteen prompts were one column of 72 x 1092 pixels, without a word about which row is which."""
    pictures = images(prompts * n)
    groups = [(f"prompt {number}", pictures[number * n : (number + 1) * n]) for number in range(prompts)]
    sheet = captioned_sheet(groups, fonts=[LATIN])
    edges = [boxes(sheet, picture) for picture in pictures]
    assert {(right - left, bottom - top) for left, top, right, bottom in edges} == {(192, 192)}  # three times 64
    assert (len({left for left, *_ in edges}), len({top for _, top, *_ in edges})) == (columns, rows)
    for group in (edges[::n], edges[:n]):  # from left to right, then down
        assert group == sorted(group, key=lambda edge: (edge[1], edge[0]))
    if prompts > 3:
        assert 1 < sheet.width / sheet.height < 2


def test_captioned_sheet_writes_a_caption_below_each_group():
    pictures = images(2)
    sheet = captioned_sheet([("a red apple", pictures[:1]), ("", pictures[1:])], fonts=[LATIN])
    below = [
        np.asarray(sheet)[bottom:, left:right] for left, _, right, bottom in (boxes(sheet, one) for one in pictures)
    ]
    assert [bool((part < 128).any()) for part in below] == [True, False]


@pytest.mark.parametrize(("side", "count", "factor"), [(64, 4, 3), (96, 4, 2), (256, 2, 1), (64, 1000, 2)])
def test_captioned_sheet_enlarges_small_images_by_whole_factors(side, count, factor):
    first, *others = images(count, side)
    first.putpixel((0, 0), (200, 100, 50))
    sheet = captioned_sheet([("a", [first, *others])], fonts=[LATIN])
    left, top, right, bottom = boxes(sheet, first)
    assert (right - left, bottom - top) == (factor, factor)
    assert sheet.width * sheet.height < 40_000_000


def test_captioned_sheet_numbers_captions_that_no_font_can_show():
    """A font without a character shows a box in its place."""
    pictures, notes = images(3), []
    groups = list(zip((FOX, "a cat", "三只🦊"), ([one] for one in pictures), strict=True))
    sheet = captioned_sheet(groups, notes.append, fonts=[LATIN])
    assert notes == [
        "no installed font has 左边是狐狸，右红…: the contact sheet has numbers in place of the captions 1, 3, "
        "which cogview info prints; a Chinese font such as Noto Sans CJK (fonts-noto-cjk) shows them"
    ]
    same = captioned_sheet(list(zip(("1", "a cat", "3"), (each for _, each in groups), strict=True)), fonts=[LATIN])
    assert sheet == same


def test_captioned_sheet_refuses_more_images_than_a_page_holds():
    with pytest.raises(InputError, match="--grid writes one sheet of at most 1000 images, got 1001: leave it out"):
        captioned_sheet([("a", images(1) * 1001)], fonts=[LATIN])


def test_group_images_joins_neighbours_of_one_caption():
    assert group_images("aaba", [1, 2, 3, 4]) == [("a", [1, 2]), ("b", [3]), ("a", [4])]


def test_system_font_prefers_the_font_that_has_all_characters():
    font = system_font([FOX, "a"], 17, [LATIN])
    assert font is LATIN
    assert missing_characters("a 狐狸狐", font) == "狐狸"
    chosen = system_font([FOX], 17)
    if missing_characters(FOX, chosen):
        pytest.skip("no Chinese font is installed")
    assert system_font([FOX], 17, [LATIN, chosen]) is chosen
    assert missing_characters(FOX, chosen) == ""


def test_system_font_takes_the_one_of_pillow_when_none_is_installed(monkeypatch):
    monkeypatch.setattr(fonts, "_FILES", ())
    monkeypatch.setattr(fonts, "_fonts_of_fontconfig", lambda characters: iter(()))
    assert system_font([FOX], 17).getname() == LATIN.getname()


@pytest.mark.parametrize(
    ("text", "width", "expected"),
    [
        ("a red apple", 10, ["a red", "apple"]),
        ("一二三四五六", 4, ["一二三四", "五六"]),
        ("一二三四，五", 4, ["一二三", "四，五"]),  # no line begins with a comma
        ("一二三四五六七八九", 4, ["一二三四", "五六七…"]),
        ("abcdefghij", 8, ["abcd", "efg…"]),
        ("", 4, []),
    ],
)
def test_wrap_text_breaks_between_words_and_characters(text, width, expected):
    class Grid:  # the characters of a font of one width
        def getlength(self, text):
            return sum(2 if character.isascii() else 1 for character in text)

    lines = wrap_text(text, width, Grid(), 2)
    assert lines == expected
