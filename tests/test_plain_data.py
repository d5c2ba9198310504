"""JSON and YAML of strangers: what cannot be settings is one line, in a bounded time."""

import pytest

from cogview import plain_data
from cogview.errors import InputError
from cogview.plain_data import MAX_DEPTH, MAX_DIGITS, parse_json, parse_yaml, read_json, read_yaml

# Nine levels of nine aliases: 400 million values in 300 characters.
BOMB = "\n".join(["a0: &a0 1"] + [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 10)])


def test_parse_json_reads_plain_values_of_either_type():
    assert parse_json('{"词": [1, 2.5, null, true]}') == {"词": [1, 2.5, None, True]}
    assert parse_json(b"\xef\xbb\xbf[1]") == [1]  # as Windows writes it


@pytest.mark.parametrize("depth", [MAX_DEPTH + 1, 100_000])
@pytest.mark.parametrize("parse", [parse_json, parse_yaml])
def test_parse_refuses_deep_nesting(parse, depth):
    with pytest.raises(ValueError, match="nested too deeply"):
        parse("[" * depth + "]" * depth)
    assert parse("[" * MAX_DEPTH + "]" * MAX_DEPTH)


@pytest.mark.parametrize("parse", [parse_json, parse_yaml])
def test_parse_refuses_numbers_of_too_many_digits(parse):
    """The message was Python's, about a limit that only programs can change."""
    assert parse(f"[-{'9' * MAX_DIGITS}]") == [1 - 10**MAX_DIGITS]
    with pytest.raises(ValueError, match=r"^(line 1: )?a number of 4,301 digits is too large: -9999999…$"):
        parse(f"[-{'9' * (MAX_DIGITS + 1)}]")


def test_parse_yaml_names_the_line_of_a_date_that_does_not_exist():
    with pytest.raises(ValueError, match=r'^line 2: "2024-13-45" cannot be read: month must be in 1\.\.12$'):
        parse_yaml("steps: 3\ndate: 2024-13-45")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "Expecting value"),
        (b'{"a": \xff}', "byte 6 is not UTF-8"),
        (b'{"a": 1, "b": 2, "a": 3}', '"a" stands here twice'),
        (b"[" + b"9" * 5000 + b"]", "a number of 5,000 digits is too large"),
        (b"\x00" * 100, "Expecting value"),
    ],
)
def test_read_json_reports_a_damaged_file_in_one_line(tmp_path, content, message):
    path = tmp_path / "things.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        read_json(path)
    assert str(caught.value).startswith(f"{path} is not JSON: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (BOMB, "its aliases repeat more than"),
        ("a: &a [*a]", "nested too deeply|recursive"),
        ("a: 1\nb: 2\na: 3", 'line 3: duplicate key "a"'),
        ("when: 2026-99-99", "month must be in"),
        ("a: !!float x", "could not convert|does not match"),
        ("? [1]\n: 2", "unhashable"),
        ("n: " + "9" * 5000, "a number of 5,000 digits is too large"),
    ],
)
def test_read_yaml_reports_what_is_no_recipe_in_one_line(tmp_path, content, message):
    path = tmp_path / "recipe.yaml"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=message) as caught:
        read_yaml(path)
    assert "\n" not in str(caught.value)


def test_read_yaml_and_json_name_the_conversion_of_utf_16(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_bytes("text: {size: 300}".encode("utf-16"))
    advice = f"; it is UTF-16: iconv -f UTF-16 -t UTF-8 {path} > NEW"
    with pytest.raises(InputError, match=f"cannot read the recipe {path}: byte 0 is not UTF-8{advice}$"):
        read_yaml(path, "recipe")
    with pytest.raises(InputError, match=f"{path} is not JSON: byte 0 is not UTF-8{advice}$"):
        read_json(path)


@pytest.mark.parametrize(("read", "limit"), [(read_json, "MAX_JSON_BYTES"), (read_yaml, "MAX_YAML_BYTES")])
def test_read_refuses_a_large_file_before_parsing_it(tmp_path, monkeypatch, read, limit):
    monkeypatch.setattr(plain_data, limit, 1000)
    (tmp_path / "file").write_text(" " * 1001 + "1", encoding="utf-8")
    with pytest.raises(InputError, match=r"too large \(1\.0 kB\): at most 1\.0 kB"):
        read(tmp_path / "file")
