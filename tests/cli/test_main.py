"""``cogview``: commands, and mistakes on the command line itself."""

import importlib
import logging
import re
import signal
import subprocess
import sys
from dataclasses import fields

import click
import pytest

from cogview import __version__
from cogview.cli.main import COMMANDS, cli, main, run_command, run_safely
from cogview.cli.options import DTYPES, Command, overrides_argument, sampling_options
from cogview.device import DTYPES as TORCH_DTYPES
from cogview.device import QUANTIZATIONS
from cogview.errors import MAX_MESSAGE, ExitStatus, InputError
from cogview.kernels.dispatch import ForcedKernelsError
from cogview.modeling.config import Sampling
from cogview.signals import StoppedBySignal


def test_main_finds_the_module_of_every_command():
    for module, _ in COMMANDS.values():
        command = importlib.import_module(f"cogview.cli.{module}")
        assert isinstance(command.command, click.Command)


def test_run_safely_reports_sigterm_in_one_line(capsys):
    """With ``--json`` too, the last line on stderr says why the results end."""
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        assert run_safely(lambda: signal.raise_signal(signal.SIGTERM) or 0, "cogview x") == 143
    finally:
        signal.signal(signal.SIGTERM, before)
    assert capsys.readouterr().err == "cogview x: interrupted; finished results are kept\n"


def required_options() -> list[tuple[tuple[str, ...], str]]:
    """Return each command line that lacks one required option, and that option."""
    found = []
    for name, (module, _) in COMMANDS.items():
        top = importlib.import_module(f"cogview.cli.{module}").command
        inner = [((name, each), top.commands[each]) for each in top.commands] if isinstance(top, click.Group) else []
        for words, command in inner or [((name,), top)]:
            required = [item for item in command.params if isinstance(item, click.Option) and item.required]
            arguments = [item for item in command.params if isinstance(item, click.Argument) and item.required]
            for missing in required:
                others = [word for item in required if item is not missing for word in (item.opts[-1], "1")]
                given = (str(getattr(item.type, "choices", "x")[0]) for item in arguments)
                found.append(((*words, *given, *others), max(missing.opts, key=len)))
    return found


@pytest.mark.parametrize(("line", "option"), required_options(), ids=lambda part: str(part))
def test_main_names_a_required_option_that_is_missing(line, option, capsys):
    """``click`` took a default of None for a value, and ``cogview data build pictures -o x`` was a traceback."""
    assert main(list(line)) == 2
    err = capsys.readouterr().err
    assert re.search(rf"missing option .*'{option}'; see ", err), err
    assert err.count("\n") == 1


@pytest.mark.parametrize("command", COMMANDS)
def test_main_prints_help_of_every_command(command, capsys):
    assert main([command, "--help"]) == 0
    out = capsys.readouterr().out
    assert out.lower().startswith(f"usage: cogview {command}")
    assert "(default: None)" not in out


def test_main_prints_help_without_torch():
    code = """
import sys
from cogview.cli.main import COMMANDS, main
for command in ([], *([name] for name in COMMANDS)):
    assert main([*command, "--help"]) == 0
print("torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout.splitlines()[-1], done.stderr) == ("False", "")


def test_main_ignores_the_local_rank_of_a_launcher(capsys):
    assert main(["--local_rank=1", "train", "--help"]) == 0
    assert main(["train", "--local_rank=1", "--help"]) == 0


def test_main_groups_its_commands_by_purpose(capsys):
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    headings = [f"\n{heading}:\n" for heading in ("Generate", "Models", "Training", "Tools")]
    assert sorted(map(out.index, headings)) == [out.index(heading) for heading in headings]
    assert out.index("  rerank") < out.index("Models:") < out.index("  adapter") < out.index("Training:")


def test_main_prints_help_and_version(capsys):
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert [command for command in COMMANDS if command not in out] == []
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"cogview {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "cogview: missing command; see cogview --help"),
        (["zeichne"], 'cogview: no command "zeichne"; see cogview --help'),
        (
            ["一个红苹果"],
            'cogview: no command "一个红苹果"; to generate images from it: cogview generate 一个红苹果; see cogview',
        ),
        (
            ["a red apple"],
            "cogview: no command \"a red apple\"; to generate images from it: cogview generate 'a red apple'; see ",
        ),
        (
            ["generate", "-5度的红苹果"],
            "cogview generate: no such option '-5'; write -- before an argument that begins with a dash, and "
            "options before that; see cogview generate --help",
        ),
        (["train", "--fast"], "cogview train: no such option '--fast'; see cogview train --help"),
        (["genrate"], 'cogview: no command "genrate"; did you mean "generate"?; see cogview --help'),
        (
            ["generate", "狐狸", "-n", "many"],
            "cogview generate: invalid value for '-n': 'many' is not a valid integer range; see cogview",
        ),
        (
            ["generate", "狐狸", "--sed", "7", "--grid"],
            "cogview generate: no such option '--sed'. Did you mean '--seed'?; see cogview generate --help",
        ),
        (["info", "a", "b"], "cogview info: got unexpected extra argument (b); see cogview info --help"),
        (
            ["train", "recipe.yaml", "--device", "cpu", "steps"],
            'cogview train: "steps" is not KEY=VALUE of the section transformer; see cogview train --help',
        ),
    ],
)
def test_main_reports_mistakes_in_one_line(arguments, message, capsys):
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith(message)
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (InputError("one\n  line"), 2, "cogview x: one line\n"),
        (
            FileNotFoundError(2, "No such file or directory", "文件"),
            2,
            "cogview x: 文件: there is no such file or folder; check its name\n",
        ),
        (ForcedKernelsError("COGVIEW_KERNELS='fast' is unknown"), 2, "cogview x: COGVIEW_KERNELS='fast' is unknown\n"),
        (KeyboardInterrupt(), 130, "cogview x: interrupted; finished results are kept\n"),
        (StoppedBySignal(signal.SIGTERM), 143, "cogview x: interrupted; finished results are kept\n"),
    ],
)
def test_main_turns_expected_errors_into_one_line(error, status, message, capsys):
    def fail():
        raise error

    assert run_safely(fail, "cogview x") == status
    assert capsys.readouterr().err == message


@pytest.mark.parametrize(("fail", "error"), [(lambda: 1 // 0, ZeroDivisionError), (lambda: int("一"), ValueError)])
def test_main_raises_unexpected_errors(fail, error):
    with pytest.raises(error):
        run_safely(fail, "cogview x")


DISK_FULL = "cogview models: the disk is full; finished results are kept; free some space, or choose another folder\n"


def test_main_reports_a_full_disk_of_stdout_in_one_line():
    command = f"{sys.executable} -m cogview models > /dev/full"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (3, DISK_FULL)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["cogview", "gen"], "generate"),
        (["cogview", "generate", "--kv-dtype", ""], "int8"),
        (["cogview", "generate", "--speculative", "a"], "auto"),
        (["cogview", "adapter", "unm"], "unmerge"),
    ],
)
def test_main_completes_words_for_a_shell(words, expected, monkeypatch, capsys):
    monkeypatch.setenv("_COGVIEW_COMPLETE", "bash_complete")
    monkeypatch.setenv("COMP_WORDS", " ".join(words))
    monkeypatch.setenv("COMP_CWORD", str(len(words) - 1))
    assert main([]) == 0
    assert f"plain,{expected}" in capsys.readouterr().out.splitlines()


def test_main_accepts_the_short_help_option(capsys):
    assert main(["generate", "-h"]) == 0
    short = capsys.readouterr().out
    assert main(["generate", "--help"]) == 0
    assert capsys.readouterr().out == short


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "adapter"])
def test_main_describes_every_option_and_argument(command):
    """Each has a help text that starts in lower case, and no default is written twice."""
    names = ("LoRA", "ZeRO", "VQ-VAE", "UTF-8", "LMDB", "YAML", "Chinese")
    for parameter in cli.get_command(click.Context(cli), command).params:
        if not getattr(parameter, "hidden", False):
            text = getattr(parameter, "help", None)
            assert text, parameter.name
            assert text[0].islower() or text.split()[0].strip(":") in names, text
            assert isinstance(parameter, click.Argument) or "default" not in text, text


def test_sampling_options_equal_the_fields_of_sampling():
    @click.command()
    @sampling_options("codes", image_options=True)
    def command(settings):
        """Take sampling settings."""

    shared = [field.name for field in fields(Sampling) if field.name != "image_guidance"]  # an option of edit alone
    assert [parameter.name for parameter in command.params] == shared


def test_choices_of_dtypes_equal_those_of_the_library():
    assert ("auto", *TORCH_DTYPES, *QUANTIZATIONS) == DTYPES


def test_overrides_argument_takes_pairs_anywhere(capsys):
    @click.command(cls=Command)
    @overrides_argument("training")
    @click.option("--work")
    def command(overrides, work):
        """Print the arguments."""
        print(overrides, work)
        return 0

    assert run_command(command, ["steps=3", "--work", "folder", "a.b=1"], "cogview x") == 0
    assert capsys.readouterr().out == "('steps=3', 'a.b=1') folder\n"
    assert run_command(command, ["steps"], "cogview x") == 2
    assert (
        capsys.readouterr().err == 'cogview x: "steps" is not KEY=VALUE of the section training; see cogview x --help\n'
    )


def test_configure_logging_writes_warnings_as_lines_of_the_command(monkeypatch, capsys):
    """The name of a module stood before a warning on a prompt."""
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    monkeypatch.setenv("COGVIEW_LOG", "INFO")

    def log() -> int:
        logging.getLogger("cogview.jobs").warning("line %d is damaged", 5)
        logging.getLogger("cogview.jobs").info("loading")
        logging.getLogger("PIL").warning("odd")
        return 0

    level = root.level
    try:
        assert run_safely(log, "cogview generate") == 0
    finally:
        root.setLevel(level)
    assert capsys.readouterr().err == "warning: line 5 is damaged\ncogview.jobs: loading\nPIL: odd\n"


def test_main_rejects_an_unknown_log_level(monkeypatch, capsys):
    monkeypatch.setenv("COGVIEW_LOG", "laut")
    assert main(["models"]) == 2
    assert capsys.readouterr().err.startswith('cogview models: COGVIEW_LOG is "LAUT"; expected one of DEBUG, INFO, ')


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "--input", "没有.txt"],
        ["generate", "狐狸", "--seed", "七"],
        ["complete", "a.png", "--rows", "四", "--prompt", "狐狸"],
        ["upscale", "--input", "没有.tsv"],
        ["caption", "a.png", "--method", "guess"],
        ["rerank", "--input", "没有.tsv"],
        ["info", "没有"],
        ["estimate", "-n", "一"],
        ["bench", "--repeats", "一"],
        ["convert", "没有"],
        ["convert", "没有", "--to", "v2"],
        ["models", "多"],
        ["download", "没有"],
        ["push", "没有", "狐狸/模型"],
        ["adapter"],
        ["adapter", "merge", "cogview-emoji"],
        ["adapter", "info", "没有"],
        ["runs", "没有"],
        ["import-data", "没有.bin", "--model", "cogview-emoji", "-o", "store"],
        ["doctor", "没有.yaml"],
        ["eval", "feelings", "没有.yaml"],
        *([command, "没有.yaml"] for command in ("scenes", "train-text", "train-image", "encode", "train", "package")),
    ],
)
def test_main_reports_wrong_input_of_every_command_in_one_line(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"cogview {arguments[0]}")
    assert err.count("\n") == 1
    assert "Traceback" not in err


@pytest.mark.parametrize(("done", "failed", "status"), [(0, 0, 0), (3, 0, 0), (3, 1, 1), (0, 2, 2)])
def test_exit_status_says_whether_all_some_or_no_results_were_made(done, failed, status):
    assert ExitStatus.of(done, failed) == status


def test_input_error_shortens_a_message_that_holds_a_whole_file():
    """A value of 200,000 characters in a config stood in the message as it was."""
    message = str(InputError("the value " + "x" * 200_000 + " is wrong: " + "\x07" * 5000))
    assert message.startswith("the value xxx")
    assert message.endswith("\\x07")
    assert len(message) == MAX_MESSAGE
    assert str(InputError("a" * MAX_MESSAGE)) == "a" * MAX_MESSAGE
