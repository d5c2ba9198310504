"""Sizes, durations, counts and columns as people read them."""

import pytest

from cogview.errors import InputError
from cogview.formatting import (
    aligned_columns,
    display_width,
    format_bytes,
    format_duration,
    format_gigabytes,
    format_list,
    plural,
    printable,
    shorten,
    shorten_middle,
)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1.0 kB"),
        (999_999, "1000.0 kB"),
        (3_450_000, "3.5 MB"),
        (7_900_000_000, "7.9 GB"),
        (10**13, "10000.0 GB"),
    ],
)
def test_format_bytes_uses_the_largest_unit_that_is_reached(count, text):
    assert format_bytes(count) == text


def test_format_gigabytes_keeps_the_unit():
    assert (format_gigabytes(10**7), format_gigabytes(10**7, 2)) == ("0.0 GB", "0.01 GB")
    assert format_gigabytes(22.85e9, 2) == "22.85 GB"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "< 1 ms"),
        (0.00099, "< 1 ms"),
        (0.0042, "4.2 ms"),
        (1, "1 s"),
        (1.2549, "1.25 s"),
        (599, "599 s"),
        (600, "10 min"),
        (3599, "60 min"),
        (3600, "1.0 h"),
        (35999, "10.0 h"),
        (36000, "10 h"),
        (3.6e7, "10,000 h"),
    ],
)
def test_format_duration_has_three_digits(seconds, text):
    assert format_duration(seconds) == text


def test_plural_adds_an_s_unless_there_is_one():
    assert [plural(count, "row") for count in (0, 1, 2)] == ["0 rows", "1 row", "2 rows"]


def test_shorten_marks_what_is_missing():
    assert shorten("一只狐狸", 4) == "一只狐狸"
    assert shorten("一只狐狸在雪地里", 4) == "一只狐狸…"
    assert shorten("一只狐狸在雪地里", 4, keep=2) == "一只…"
    assert shorten("一只狐狸", 4, keep=0) == "一只狐狸"


def test_display_width_counts_chinese_characters_twice():
    assert (display_width("fox"), display_width("狐狸"), display_width("“狐”，")) == (3, 4, 6)


def test_aligned_columns_lines_up_chinese_and_numbers():
    rows = [("名字", "count"), ("fox", "10"), ("大熊猫", "1,000")]
    assert aligned_columns(rows, left=(0,)) == ["名字    count", "fox        10", "大熊猫  1,000"]
    assert aligned_columns(rows, left=range(2)) == ["名字    count", "fox     10", "大熊猫  1,000"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("一只狐狸 👨‍👩‍👧", "一只狐狸 👨‍👩‍👧"),
        ("\x1b]0;title\x07name.pt", "\\x1b]0;title\\x07name.pt"),
        ("two\nlines\u2028three", "two\\nlines\\u2028three"),
        ("abc\u202etp.exe", "abc\\u202etp.exe"),
        ("\udcff", "\\udcff"),
    ],
)
def test_printable_escapes_what_a_terminal_obeys(text, expected):
    assert printable(text) == expected


def test_input_error_escapes_control_characters():
    """A name in an archive could change the title of the terminal that printed the message."""
    assert str(InputError("a\x1b[2J.tar\nline")) == "a\\x1b[2J.tar\nline"


def test_shorten_middle_keeps_both_ends():
    assert shorten_middle("abcdef", 6) == "abcdef"
    assert shorten_middle("abcdefg", 6) == "abc…fg"


def test_format_list_shows_the_first_entries_and_counts_the_others():
    assert format_list([]) == ""
    assert format_list(["a", 2], 2) == "a, 2"
    assert format_list(["狐", "狗", "猫"], 2, joint="、") == "狐、狗 and 1 more"
    assert len(format_list(["字" * 10_000] * 6_000)) < 1_000
