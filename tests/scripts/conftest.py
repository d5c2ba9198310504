"""Scripts import each other by short names, as from their own folder."""

import importlib
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture
def load_script(monkeypatch):
    """A function that imports a script by name."""
    monkeypatch.syspath_prepend(str(SCRIPTS / "benchmarks"))
    monkeypatch.syspath_prepend(str(SCRIPTS))
    loaded = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - loaded:  # `rerank` may mean something else to other tests
        if str(SCRIPTS) in (getattr(sys.modules[name], "__file__", None) or ""):
            del sys.modules[name]


@pytest.fixture
def run_script(load_script, tiny_checkpoint, tmp_path, monkeypatch, capsys):
    """A function that runs a script in an empty folder with the tiny model: (status, lines printed, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(name, *arguments):
        chosen = [] if "--load" in arguments else ["--load", str(tiny_checkpoint)]
        status = load_script(name).main([*chosen, "--device", "cpu", *arguments])
        printed = capsys.readouterr()
        return status, printed.out.split("\n")[:-1], printed.err

    return run


# The flags of the released scripts/*.sh that all tasks share.
RELEASED = (
    *("--deepspeed", "--model-parallel-size", "1", "--num-layers", "48", "--hidden-size", "2560"),
    *("--num-attention-heads", "40", "--max-position-embeddings", "1089", "--fp16", "--temperature", "1."),
    *("--top_k", "200", "--top_p", "0", "--img-tokenizer-path", "pretrained/vqvae/vqvae_hard_biggerset_011.pt"),
    *("--query-window", "64", "--key-window-times", "4", "--num-pivot", "256", "--is-sparse", "0"),
    *("--max-position-embeddings-finetune", "1089", "--debug"),
)


@pytest.fixture
def v1_flags():
    """What a released script gives besides task, input and output."""
    return RELEASED


@pytest.fixture
def exit_status():
    """A function that calls the main function of a script and returns its status, also where its parser exits."""

    def call(main, words):
        try:
            return main(words)
        except SystemExit as exit_:
            return exit_.code

    return call
