"""``--json``: results, notes and errors as lines of JSON."""

import io
import json
import signal
import sys

import pytest

from cogview.cli.main import main, run_safely
from cogview.cli.messages import json_lines, print_message, print_result
from cogview.cli.translation import translated
from cogview.errors import RetryLaterError
from cogview.signals import GracefulStop

FOX = "蓝色背景上的三只狐狸"


def objects(text):
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture
def run(run_command):
    """Return a function that runs a command with --json: (status, objects of stdout, objects of stderr)."""

    def call(*arguments):
        status, lines, err = run_command(*arguments, "--json")
        return status, list(map(json.loads, lines)), objects(err)

    return call


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("note: the seed is random\n", {"note": "the seed is random"}),
        ("Warning: slow\n", {"warning": "slow"}),
        ("skipped: line 3: no prompt\n", {"skipped": "line 3: no prompt"}),
        ("generating 3 images\n", {"info": "generating 3 images"}),
        ("12%|##  \rdone\n", {"info": "done"}),
    ],
)
def test_json_lines_turns_each_line_of_text_into_an_object(text, expected, capsys):
    """Parts of the library print notes themselves: a service got lines of English between its objects."""
    with json_lines(True):
        for character in text:  # print() writes the end of a line by itself
            sys.stderr.write(character)
    assert objects(capsys.readouterr().err)[-1] == expected


def test_json_lines_ends_a_line_that_has_no_end(capsys):
    with json_lines(True):
        print("compiling…", end="", file=sys.stderr)
    assert objects(capsys.readouterr().err) == [{"info": "compiling…"}]


def test_json_lines_translates_messages_but_not_keys(capsys):
    with translated("zh"), json_lines(True):
        print_message("failed", "the permission is denied", file="a.png")
    (found,) = objects(capsys.readouterr().err)
    assert found == {"failed": "没有权限", "file": "a.png"}


def test_json_lines_escapes_for_a_stream_without_unicode(monkeypatch):
    """An escape of Python such as \\U0001f98a is no JSON."""
    ascii_only = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", ascii_only)
    with json_lines(True):
        print_result("🦊.png", {"file": "🦊.png", "score": None})
    assert json.loads(ascii_only.buffer.getvalue()) == {"file": "🦊.png"}


@pytest.mark.parametrize(
    ("language", "translation"),
    [
        ("en", "stopping after this step (once more: at once, without saving)"),
        ("zh", "完成这一步后停止（再来一次：立即停止，不保存）"),
    ],
)
def test_graceful_stop_writes_the_lines_of_the_running_command(capfd, language, translation):
    """A handler of signals writes to the descriptor, past the streams that translate: its line was English."""
    message = "stopping after this step (once more: at once, without saving)"
    for as_json in (False, True):
        with translated(language), json_lines(as_json), GracefulStop(message):
            signal.raise_signal(signal.SIGTERM)
        line = capfd.readouterr().err
        assert (json.loads(line)["info"] if as_json else line.rstrip("\n")) == translation


def test_run_safely_reports_the_status_of_an_error_as_json(capsys):
    def fail():
        raise RetryLaterError("the lock\nis held")

    with json_lines(True):
        assert run_safely(fail, "cogview x") == 3
    assert objects(capsys.readouterr().err) == [{"error": "the lock is held", "status": 3}]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--json"],
        ["genrate", "--json"],
        ["generate", "--json"],
        ["generate", "狐狸", "-n", "many", "--json"],
        ["upscale", "--input", "没有.tsv", "--json"],
        ["models", "多", "--json"],
        ["--language", "fr", "models", "--json"],
    ],
)
def test_main_reports_mistakes_as_json(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LANG", "zh_CN.UTF-8")
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    (found,) = objects(err)
    assert list(found) == ["error", "status"]
    assert found["status"] == 2
    assert found["error"][0].isascii()  # English, whatever the locale is


def test_main_takes_json_behind_two_dashes_for_an_argument(capsys):
    assert main(["info", "--", "--json"]) == 2
    assert capsys.readouterr().err.startswith("cogview info: ")


def test_generate_prints_its_results_and_notes_as_json(run):
    status, results, messages = run("generate", FOX, "", "两只狸子", "--seed", "7", "--grid", "-n", "2", "--keep", "1")
    assert status == 1
    assert [(found["task"], found.get("prompt")) for found in results] == [
        ("generate", FOX),
        ("generate", "两只狸子"),
        ("sheet", None),
    ]
    assert results[0]["seed"] == 7
    assert results[0]["score"] < 0
    assert [found.get("rank") for found in results] == [1, 1, None]
    assert [found["prompt"] for found in messages if "skipped" in found] == [""]
    assert [found["prompt"] for found in messages if "note" in found and "prompt" in found] == ["两只狸子"]
    assert all(next(iter(found)) in ("info", "note", "skipped") for found in messages)


def test_complete_and_upscale_print_the_source_of_a_result(run, save_image):
    save_image("a.png")
    status, (result,), messages = run("complete", "a.png", "没有.png", "--rows", "4", "--prompt", FOX, "--seed", "7")
    assert (status, result["task"], result["source"], result["seed"]) == (1, "complete", "a.png", 7)
    assert [found["file"] for found in messages if "failed" in found] == ["没有.png"]
    status, (result,), _ = run("upscale", "a.png", "--prompt", FOX, "--seed", "7")
    assert (status, result["task"], result["source"]) == (0, "upscale", "a.png")


def test_caption_and_rerank_print_objects_alone(run, save_image):
    """The readable ranking of rerank is for people."""
    save_image("a.png")
    status, (caption,), messages = run("caption", "a.png")
    assert (status, caption["file"]) == (0, "a.png")
    assert {"info", "note"} >= {key for found in messages for key in found if key != "file"}
    status, (ranking,), messages = run("rerank", "a.png", "--prompt", FOX)
    assert (status, ranking["images"][0]["rank"]) == (0, 1)
    assert not any("per piece" in str(found) for found in messages)


def test_generate_ends_with_an_error_as_json_when_nothing_could_be_done(run):
    """Lines on each prompt alone left the status to the exit of the process."""
    status, results, messages = run("generate", "", " ")
    assert (status, results) == (2, [])
    assert messages[-1] == {"error": "nothing could be done", "status": 2}
    assert [found["prompt"] for found in messages if "skipped" in found] == ["", " "]


def test_generate_job_prints_its_results_as_json(run, tmp_path):
    (tmp_path / "prompts.txt").write_text(f"{FOX}\n\n{FOX * 9}\n", encoding="utf-8")
    _, results, messages = run("generate", "--input", "prompts.txt", "--seed", "7")
    assert [(found["file"], found["task"], found["seed"]) for found in results] == [
        (f"outputs/{FOX}-seed7-0.png", "generate", 7)
    ]
    assert "id" in results[0]
    assert any("skipped" in found for found in messages)
