"""The portable results of ``scripts/benchmarks/frozen.py`` against golden values, and the comparison itself.

``golden/frozen.json`` was written with the library of commit ec4ce5b by the command in its field ``origin``. Results
that depend on the processor are not in it: record and compare these with the script.
"""

import hashlib
import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from cogview.pipeline.cogview import CogView

GOLDEN = Path(__file__).parent / "golden" / "frozen.json"
BENCHMARKS = Path(__file__).parents[1] / "scripts" / "benchmarks"
ITEMS = ("estimate", "journal.portable", "stores.imported", "stores.encoded-text")
SLOW = ("estimate", "journal.portable")


@pytest.fixture
def frozen(monkeypatch):
    """The script, imported as from its own folder."""
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):  # the script sets them
        monkeypatch.setenv(variable, "1")
    loaded = set(sys.modules)
    yield importlib.import_module("frozen")
    for name in set(sys.modules) - loaded:
        if name.startswith("frozen"):
            del sys.modules[name]


@pytest.fixture
def values(frozen):
    """The module of readers and of the comparison."""
    return sys.modules["frozen_values"]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in ITEMS]
)
def test_frozen_item_equals_its_golden_value(name, frozen, capsys):
    status = frozen.main(["--compare", str(GOLDEN), "--only", name])
    assert (status, capsys.readouterr().out) == (0, "1 of 1 items equal (0 machine, 1 portable)\n")


def codes_hash(image) -> str:
    """Return the first digits of the SHA-256 of the codes of an image, little-endian uint16."""
    return hashlib.sha256(np.asarray(image.codes).astype("<u2").tobytes()).hexdigest()[:16]


@pytest.mark.slow
def test_former_settings_give_the_images_of_former_versions():
    """Commit ec4ce5b, the last one without min-p and without noise of the prompt, gave these codes.

    The hashes come from the same calls in a checkout of it, without the settings that it did not have. Bfloat16 gives
    the same codes there and here, so the rounding of other processors should as well.
    """
    model = CogView.from_pretrained("cogview-emoji", device="cpu")
    prompts = ["一个红苹果", "蓝色背景上的三只狐狸", "左边是狐狸，右边是红苹果，绿色背景"]
    former = {"temperature": 0.3, "top_k": 5, "min_p": 0.0, "noise_version": 1}
    images = model.generate(prompts, seed=7, **former)
    assert [codes_hash(image) for image in images] == ["ce91272d587933fd", "e0b301e07eb70405", "deff72595df053dc"]
    (completed,) = model.complete(images[:1], prompts[:1], rows=3, seed=8, **former)
    assert codes_hash(completed) == "430da19828de9937"
    (upscaled,) = model.upscale(images[1:2], prompts[1:2], seed=7, noise_version=1)
    assert codes_hash(upscaled) == "f7713c42cfca8412"


def test_golden_file_holds_each_portable_item_that_is_quick():
    assert tuple(json.loads(GOLDEN.read_text("utf-8"))["items"]) == ITEMS


def test_compare_names_the_value_that_differs(frozen, tmp_path, capsys):
    """A golden value that is changed must fail, and the line must say where."""
    golden = json.loads(GOLDEN.read_text("utf-8"))
    golden["items"]["stores.imported"]["values"]["lmdb"]["fields"]["image"] = "0000"
    changed = tmp_path / "changed.json"
    changed.write_text(json.dumps(golden), encoding="utf-8")
    assert frozen.main(["--compare", str(changed), "--only", "stores.imported"]) == 1
    line = capsys.readouterr().out.splitlines()[0]
    assert line.startswith("differs  stores.imported [portable]: 1 of ")
    assert "lmdb/fields/image: 0000 -> 5ff5278edd883c24" in line


def test_compare_refuses_a_file_of_another_format(frozen, tmp_path, capsys):
    """Inputs of items differ between formats, so that results cannot be compared."""
    old = tmp_path / "old.json"
    old.write_text(json.dumps({"format_version": 1, "items": {}}), encoding="utf-8")
    with pytest.raises(SystemExit, match="2"):
        frozen.main(["--compare", str(old)])
    assert "has format 1, this script compares 2" in capsys.readouterr().err


def test_record_reports_a_command_that_fails(frozen, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(frozen, "ESTIMATES", ("--model nonsense --device cpu:1GB",))
    assert frozen.main(["--compare", str(GOLDEN), "--only", "estimate"]) == 1
    assert "new failed" in capsys.readouterr().out
    assert frozen.main(["--write", str(tmp_path / "new.json"), "--only", "estimate"]) == 1
    assert "ended with status 2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("now", "line"),
    [
        ({"loss": {"1": 2.0, "2": 3.0}}, None),
        ({"loss": {"1": 2.0, "2": 3.000001}}, "by rounding alone, at most 3.3e-07 relative"),
        ({"loss": {"1": 2.0, "2": 4.0}}, "1 of 2 values changed; loss/2: 3.0 -> 4.0"),
        ({"loss": {"1": 2.0}}, "1 missing; missing loss/2"),
        ({"loss": {"1": 2.0, "2": 3.0, "3": 1.0}}, "1 new; new loss/3"),
        ({"loss": {"1": 2.0, "2": "3.0"}}, "loss/2: 3.0 -> 3.0"),
    ],
)
def test_difference_describes_what_changed(values, now, line):
    found = values.difference({"loss": {"1": 2.0, "2": 3.0}}, now)
    assert found is None if line is None else line in found


def test_former_translates_renamed_keys_at_any_depth(values):
    content = {"transformer": [{"branch_norm_init": 0.05}], "validation_loss": 1.5}
    assert values.former(content) == {"transformer": [{"branch_gain": 0.05}], "held_out_loss": 1.5}
    assert values.former({"job": {"world_size": 8}, "world_size": 8}) == {"job": {"world": 8}, "world_size": 8}
    assert values.former_name("layers.0.query.scales_and_zeros") == "layers.0.query.scale_zero"
