"""Command lines of the benchmarks: a mistake is one line and status 2, before any work."""

import argparse
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "scripts" / "benchmarks"
SOURCES = {path.stem: path.read_text() for path in sorted(BENCHMARKS.glob("*.py"))}
SCRIPTS = [name for name, text in SOURCES.items() if "add_argument(" in text or "make_parser(" in text]
OPEN = {"pictures", "--recipe"}  # arguments whose paths the library checks


class Parsed(Exception):
    """Raised where a script parses its command line."""


@pytest.fixture
def load_benchmark(load_script, monkeypatch):
    """A function that imports a benchmark by name, as from its own folder."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return load_script


@pytest.fixture
def arguments(load_benchmark):
    """The module of the types."""
    return load_benchmark("arguments")


@pytest.mark.parametrize("name", SCRIPTS)
def test_benchmarks_state_the_range_of_every_number_and_path(load_benchmark, arguments, monkeypatch, name):
    def parse(parser, argv=None):
        raise Parsed(parser)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    with pytest.raises(Parsed) as parsed:
        load_benchmark(name).main()
    (parser,) = parsed.value.args
    assert isinstance(parser, arguments.Parser)
    for action in parser._actions:
        if not OPEN & {action.dest, *action.option_strings}:
            assert action.type not in (int, float, Path), f"{name}: {action.dest} takes any {action.type.__name__}"


@pytest.mark.parametrize(
    ("kind", "right", "wrong"),
    [
        ("count", {"1": 1, "12": 12}, ("0", "-1", "1.5", "x", "", "²")),
        ("whole", {"0": 0}, ("-1", "nan")),
        ("counts", {"1,8": [1, 8]}, ("1,,8", "1,0", "")),
        ("shape", {"6x256": (6, 256)}, ("6", "6x0", "6x2x3", "axb")),
        ("positive", {"0.5": 0.5}, ("0", "-1", "inf", "nan", "x")),
        ("fraction", {"0": 0, "1": 1}, ("-0.1", "1.1", "nan", "x")),
    ],
)
def test_types_refuse_numbers_out_of_range(arguments, kind, right, wrong):
    convert = getattr(arguments, kind)
    assert {text: convert(text) for text in right} == right
    for text in wrong:
        with pytest.raises(argparse.ArgumentTypeError, match=r"expected .*, got '"):
            convert(text)


def test_types_refuse_paths_that_cannot_be_used(arguments, tmp_path):
    existing, missing = tmp_path / "file", tmp_path / "missing"
    existing.touch()
    assert arguments.file(str(existing)) == arguments.output_file(str(existing)) == existing
    assert arguments.folder(str(tmp_path)) == arguments.output_folder(str(tmp_path)) == tmp_path
    assert arguments.output_file(str(missing)) == arguments.output_folder(str(missing)) == missing
    for kind, path in [
        *(("file", path) for path in (missing, tmp_path, "")),
        *(("folder", path) for path in (missing, existing, "")),
        *(("output_file", path) for path in (missing / "file", tmp_path, existing / "file", "")),
        *(("output_folder", path) for path in (existing, existing / "folder", "")),
    ]:
        with pytest.raises(argparse.ArgumentTypeError, match=r"expected|there is no folder .*; make it first"):
            getattr(arguments, kind)(str(path))


def test_parser_reports_a_mistake_in_one_line(arguments, capsys):
    parser = arguments.Parser("What it measures.")
    parser.add_argument("--steps", type=arguments.count)
    for words, message in ((["--steps", "0"], "--steps: expected a whole number from 1, got '0'"), (["--x"], "--x")):
        with pytest.raises(SystemExit) as exit_:
            parser.parse_args(words)
        err = capsys.readouterr().err
        assert exit_.value.code == 2
        assert err.count("\n") == 1
        assert message in err
        assert err.endswith(" --help\n")
