"""Lines of text files and tables: read in order, one at a time, each mistake named once."""

import pytest

from cogview.errors import InputError
from cogview.tables import MAX_LINE, MAX_ROW_LINES, parse_objects, parse_table, read_text, stream_lines


class Counted:
    """Lines that count how many were taken."""

    def __init__(self, lines):
        self.lines, self.taken = iter(lines), 0

    def __iter__(self):
        return self

    def __next__(self):
        line = next(self.lines)
        self.taken += 1
        return line


def test_parse_table_takes_a_line_when_it_is_needed():
    """The whole table was in memory before its first row."""
    lines = Counted(["a,b\n", *[f"{number},x\n" for number in range(100)]])
    rows = parse_table(lines, ",")
    assert next(rows) == (2, {"a": "0", "b": "x"})
    assert lines.taken == 2


def test_parse_objects_takes_a_line_when_it_is_needed():
    lines = Counted(['{"a": 1}\n', "\n", "7\n", '{"a": 2}\n'])
    rows = parse_objects(lines)
    assert next(rows) == (1, {"a": 1})
    assert lines.taken == 1
    assert [number for number, _ in rows] == [3, 4]


@pytest.mark.parametrize("line", ['x","\n', '"open\n', '"a" b,c\n'])
def test_parse_table_reads_a_line_a_bounded_number_of_times_when_marks_are_open(line, monkeypatch):
    """Each mark that was left open led to the last line: a table of such lines took quadratic time."""
    import csv

    read = []

    def reader(lines, **settings):
        return original((read.append(1) or each for each in lines), **settings)

    original = csv.reader
    monkeypatch.setattr(csv, "reader", reader)
    count = 5 * MAX_ROW_LINES
    problems = [row for _, row in parse_table(["a,b\n", *[line] * count], ",") if isinstance(row, str)]
    assert len(problems) == count
    assert len(read) <= 1 + count * MAX_ROW_LINES
    assert all(problem.startswith("the quotation marks are not understood (") for problem in problems)


def test_parse_table_reads_the_lines_below_an_open_mark():
    text = 'a,b\n"1,2\n3,4\n"5\n6",7\n' + "8" * (MAX_LINE + 1) + "\n9,10\n"
    found = dict(parse_table(text, ","))
    assert found[3] == {"a": "3", "b": "4"}
    assert found[4] == {"a": "5\n6", "b": "7"}
    assert found[6] == f"the line is too long, expected at most {MAX_LINE} characters"
    assert found[7] == {"a": "9", "b": "10"}
    assert found[2].startswith("the quotation marks are not understood")
    assert len(found) == 5


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_stream_lines_yields_lines_and_the_beginning_of_those_that_are_too_long(tmp_path, newline):
    lines = ["一", "狐" * MAX_LINE, "x" * (MAX_LINE + 1), "y" * (3 * MAX_LINE), "", "end"]
    path = tmp_path / "lines.csv"
    path.write_bytes("\ufeff".encode() + newline.join(lines).encode())
    found = [line.rstrip("\r\n") for line in stream_lines(path)]
    assert [line[: MAX_LINE + 1] for line in found] == [line[: MAX_LINE + 1] for line in lines]
    assert max(map(len, found)) <= MAX_LINE + 2


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-32"])
def test_read_text_and_stream_lines_read_what_a_byte_order_mark_names(tmp_path, encoding):
    """Excel saves "Unicode text" as UTF-16, and the advice was to convert it from GBK."""
    notes, path = [], tmp_path / "a.tsv"
    mark = "\ufeff" if encoding == "utf-16-be" else ""  # the others begin with one
    path.write_bytes(f"{mark}蓝色背景上的三只狐狸\n一只狗\n".encode(encoding))
    assert read_text(str(path), notes.append) == "蓝色背景上的三只狐狸\n一只狗\n"
    assert list(stream_lines(path, notes.append)) == ["蓝色背景上的三只狐狸\n", "一只狗\n"]
    assert notes == [f"{path} is read as {encoding[:6].upper()}"] * 2


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_stream_lines_names_the_conversion_of_utf_16_without_a_mark(tmp_path, encoding):
    path = tmp_path / "a.tsv"
    path.write_bytes("a\t狐狸\n".encode(encoding))
    with pytest.raises(InputError, match=f"it is UTF-16{encoding[-2:].upper()}: iconv -f UTF-16"):
        list(stream_lines(path))


def test_stream_lines_names_the_conversion_of_a_large_file(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_bytes(("一只狗\n" * 100).encode("utf-16"))
    with pytest.raises(InputError, match=f"in another encoding; it is UTF-16: iconv -f UTF-16 -t UTF-8 {path} > NEW$"):
        list(stream_lines(path, limit=100))


def test_stream_lines_reads_gbk_with_a_note_and_refuses_other_encodings(tmp_path):
    notes = []
    path = tmp_path / "a.csv"
    path.write_bytes("蓝色背景上的三只狐狸\n一只狗\n".encode("gbk"))
    assert list(stream_lines(path, notes.append)) == ["蓝色背景上的三只狐狸\n", "一只狗\n"]
    assert notes == [f"{path} is not UTF-8 and is read as GB18030 (GBK)"]
    path.write_bytes("gâteau\n".encode("latin-1"))
    with pytest.raises(InputError, match="is not UTF-8: byte 1 in line 1 is 0xe2"):
        list(stream_lines(path))
