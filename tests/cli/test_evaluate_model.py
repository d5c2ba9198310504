"""``cogview eval model``: what it prints, and the stores that it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from cogview.cli.main import main
from cogview.evaluation.manifest import read_result
from tests.evaluation.test_model_measures import TEXTS, write_store


@pytest.fixture
def evaluate(tiny_checkpoint, tmp_path, monkeypatch, capsys):
    """Return a function that runs the command in an empty folder: (status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        status = main(["eval", "model", str(tiny_checkpoint), "--device", "cpu", *arguments])
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return run


def test_eval_model_prints_losses_scores_and_recall(evaluate, tiny_model):
    """Each row has a value, its number of items and a unit; proportions and means have an interval."""
    write_store("store", tiny_model)
    status, out, _ = evaluate("--store", "store", "--json", "-o", "folder/result.json")
    results = json.loads(out)["results"]
    assert status == 0
    assert {"loss_generate_image", "loss_caption_text", "caps", "caploss", "codes_used"} <= set(results)
    assert results["text_to_picture_r1_by_caption"]["n"] == len(TEXTS)
    assert results["picture_to_text_r10_by_guidance"]["value"] == 1.0  # five candidates
    assert results["caps"]["low"] < results["caps"]["value"] < results["caps"]["high"]
    assert results["caps"]["higher_is_better"]
    assert not results["caploss"]["higher_is_better"]
    written = read_result(Path("folder/result.json"))
    assert written.manifest.measure == "model"
    assert written.manifest.reference.count == len(TEXTS)
    for name, values in written.items.values.items():
        assert np.mean(values) == pytest.approx(results[name]["value"])
    _, lines, _ = evaluate("--store", "store", "--pairs", "0")
    assert not any("picture_to_text" in line for line in lines.splitlines())
    assert next(line for line in lines.splitlines() if line.startswith("caploss")).endswith("n = 5")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--store", "none"], "none"),
        (["--store", "empty"], "empty has no rows: encode some first"),
        (["--store", "other"], "was made with text_sha256"),
        (["--store", "store", "--pairs", "1"], "--pairs must be 0 or at least 2, got 1"),
        (["--store", "twin"], "has 1 different pair of a text and an image, retrieval needs 2"),
    ],
)
def test_eval_model_refuses_stores_in_one_line(evaluate, tiny_model, arguments, message):
    """A store without rows, of another tokenizer, or without pairs gives one line and status 2."""
    write_store("store", tiny_model)
    write_store("empty", tiny_model, [])
    write_store("twin", tiny_model, ["一只狗", "一只狗"])
    write_store("other", tiny_model, text_sha256="0" * 64)
    status, out, err = evaluate(*arguments)
    assert (status, out) == (2, "")
    assert message in err.splitlines()[-1]
    assert "Traceback" not in err
