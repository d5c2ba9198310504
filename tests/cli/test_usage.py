"""Messages about the command line."""

import click
import pytest

from cogview.cli.main import cli, main
from cogview.cli.usage import with_options


@pytest.mark.parametrize(
    ("command", "message", "expected"),
    [
        ("generate", "for greedy decoding use top_k 1", "for greedy decoding use --top-k 1"),
        ("generate", 'no CUDA device; use device="cpu"', "no CUDA device; use --device cpu"),
        ("generate", 'suggestions: dtype="int8" or dtype="int4"', "suggestions: --dtype int8 or --dtype int4"),
        ("generate", "line 3: top_k must be at least 0", "line 3: top_k must be at least 0"),  # a key of the file
        ("train", 'top_k of the recipe; use device="cpu"', "top_k of the recipe; use --device cpu"),
        ("models", "top_k", "top_k"),
    ],
)
def test_with_options_names_the_options_of_the_command(command, message, expected):
    """Messages named fields of Python, ``top_k``, where the user writes ``--top-k``; and the other way round."""
    assert with_options(message, cli.get_command(click.Context(cli), command)) == expected


def test_main_names_options_in_errors_of_the_library(tiny_checkpoint, capsys):
    assert main(["generate", "狐狸", "--device", "mps", "--model", str(tiny_checkpoint)]) == 2
    assert capsys.readouterr().err.endswith("has no MPS device; use --device cpu\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data", "bild"], 'cogview data: no command "bild"; did you mean "build"?; see cogview data --help'),
        (["adapter", "unmerg"], 'cogview adapter: no command "unmerg"; did you mean "unmerge"?; see cogview adapter'),
        (["adapter", "狐狸"], 'cogview adapter: no command "狐狸"; expected one of merge, unmerge, info; see cogview'),
    ],
)
def test_group_suggests_the_command_that_was_meant(arguments, message, capsys):
    """Commands of commands were refused by words of click, without the command that is spelled like the word."""
    assert main(arguments) == 2
    assert message in capsys.readouterr().err
