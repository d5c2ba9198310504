"""Commands that are started without streams, whose readers leave early, or in a locale without Chinese."""

import io
import os
import shlex
import subprocess
import sys

import pytest

from cogview.cli.main import run_safely
from cogview.cli.streams import command_line, prepare_streams

PROGRAM = f"{sys.executable} -m cogview"


def shell(command, **environment):
    """Run a command of bash; the status is that of the first program of a pipe."""
    return subprocess.run(
        ["bash", "-c", f"{command}; exit ${{PIPESTATUS[0]}}"],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | environment,
    )


def test_prepare_streams_escapes_characters_that_a_terminal_lacks(monkeypatch):
    ascii_only = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", ascii_only)
    assert run_safely(lambda: print("狐狸") or 0, "cogview x") == 0
    ascii_only.flush()
    assert ascii_only.buffer.getvalue() == b"\\u72d0\\u72f8\n"


def test_prepare_streams_reads_typed_chinese_where_the_locale_has_none(monkeypatch):
    """A prompt that was typed in such a locale was a UnicodeDecodeError."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("狐狸\n".encode()), encoding="ascii"))
    prepare_streams()
    assert sys.stdin.readline() == "狐狸\n"


def test_prepare_streams_discards_what_nobody_reads():
    """As in ``cogview models | head -1``: nobody reads on, which is no error and no message."""
    done = shell(f"{PROGRAM} models | true", PYTHONUNBUFFERED="1")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_prepare_streams_keeps_unbuffered_streams_unbuffered():
    """As in containers, with PYTHONUNBUFFERED: the log of a long training stayed empty for its first 8 KiB."""
    code = "from cogview.cli.streams import prepare_streams as p; p(); print('狐狸'); import os; os._exit(0)"
    assert shell(f'{sys.executable} -c "{code}"', PYTHONUNBUFFERED="1").stdout == "狐狸\n"


@pytest.mark.parametrize("closed", [">&-", "<&- >&- 2>&-"])
def test_prepare_streams_replaces_closed_ones(closed):
    done = shell(f"{PROGRAM} models {closed}")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_prepare_streams_keeps_the_numbers_of_closed_ones_from_files(tmp_path):
    """A file that is opened first gets the number of a closed stderr, and messages of C libraries landed in it."""
    code = f"""
import os
from cogview.cli.streams import prepare_streams
prepare_streams()
with open({str(tmp_path / "image.png")!r}, "wb") as file:
    os.write(2, b"a message of a library")
"""
    assert shell(f"{sys.executable} -c {shlex.quote(code)} 2>&-").returncode == 0
    assert (tmp_path / "image.png").read_bytes() == b""


def test_line_writer_ends_the_command_when_nobody_reads_its_lines():
    """``cogview caption FOLDER | head -1`` captioned the whole folder for nobody."""
    code = """
from cogview.cli.main import run_safely
from cogview.cli.text_io import LineWriter
def write():
    for number in range(10**9):
        LineWriter().write("a caption")
run_safely(write, "cogview x")
"""
    done = shell(f"timeout 60 {sys.executable} -c {shlex.quote(code)} | head -1")
    assert (done.returncode, done.stdout, done.stderr) == (0, "a caption\n", "")


def test_generate_reports_a_missing_prompt_when_stdin_is_closed():
    """It was an AttributeError."""
    done = shell(f"{PROGRAM} generate <&-")
    assert done.returncode == 2
    assert done.stderr.startswith("cogview generate: no prompt was given; ")
    assert done.stderr.count("\n") == 1


def test_command_line_decodes_chinese_in_a_locale_of_ascii(tmp_path):
    """Python made surrogates of the prompt, which "is not UTF-8", and could not name a file in Chinese."""
    ascii_only = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C", "PYTHONIOENCODING": ""}
    done = shell(f"{PROGRAM} info 没有", **ascii_only)
    assert done.returncode == 2
    assert "没有" in done.stderr


def test_command_line_keeps_words_that_are_given():
    assert command_line(("generate", "狐狸")) == ["generate", "狐狸"]


@pytest.mark.slow
def test_generate_makes_all_images_without_stdin_and_stderr_when_the_reader_is_gone(tiny_checkpoint, tmp_path):
    """A service may start a command without streams, and ``head`` has enough after a line: all images are wanted."""
    command = f"{PROGRAM} generate 狐狸 -n 3 --max-inference-batch-size 1 --seed 7 --model {tiny_checkpoint}"
    done = shell(f"{command} -o {tmp_path}/a <&- 2>&- | head -c 5", PYTHONUNBUFFERED="1")
    assert (done.returncode, done.stdout, done.stderr) == (0, str(tmp_path)[:5], "")
    assert len(list((tmp_path / "a").iterdir())) == 3
