"""``scripts/check_figures.py``: the numbers of this repository, and planted mistakes."""

import re
import shutil
from pathlib import Path

import pytest

from cogview.evaluation.manifest import Manifest, ModelRecord, ResultValue, read_result, write_result

ROOT = Path(__file__).parents[2]
VALUES = {
    "right": ResultValue(value=0.986, low=0.971, high=0.9934, n=500, unit="fraction"),
    "all": ResultValue(value=0.9996, n=500, unit="fraction"),
    "generated.object": ResultValue(value=1.0, low=0.992, high=1.0, n=500, unit="fraction"),
    "psnr": ResultValue(value=28.6449, n=1500, unit="dB"),
    "gain": ResultValue(value=-0.25, n=1500, unit="dB"),
}
TABLE = "| right | images | true |\n|---|---|---|\n| object (of 500) | 100.0% (99.2%–100.0%) | 7% |\n"
MARK = "<!-- results: one {column}.{row} | object | generated - -->\n"


@pytest.fixture
def check_figures(load_script):
    return load_script("check_figures")


@pytest.fixture
def check(check_figures, tmp_path):
    """Return a function that checks a README with a text: the number of checked numbers, and the problems."""
    folder = tmp_path / check_figures.RESULTS
    folder.mkdir(parents=True)
    write_result(folder / "one.json", Manifest(measure="scenes"), VALUES)

    def run(text):
        (tmp_path / "README.md").write_text(text, encoding="utf-8")
        return check_figures.check_pages(tmp_path)

    return run


def test_check_pages_finds_every_number_of_this_repository_right(check_figures):
    """Remedy: measure again and copy the result with --keep, or correct the page."""
    count, problems = check_figures.check_pages()
    assert problems == []
    assert count > 50


def test_check_pages_finds_the_same_results_in_both_readmes(check_figures):
    marks = [
        sorted(check_figures.MARK.findall((ROOT / name).read_text(encoding="utf-8")))
        for name in ("README.md", "README.zh.md")
    ]
    assert marks[0] == marks[1] != []


def test_check_pages_notices_a_planted_wrong_number(check_figures, tmp_path):
    """One digit of the real README is changed."""
    for pattern in (
        *check_figures.PAGES,
        f"{check_figures.RESULTS}/*.json",
        "cogview/models/*/*",
        "cogview/models/*/*/*",
    ):
        for path in ROOT.glob(pattern):
            if path.is_file():
                target = tmp_path / path.relative_to(ROOT)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, target)
    assert check_figures.check_pages(tmp_path)[1] == []
    readme = tmp_path / "README.md"
    text = readme.read_text(encoding="utf-8")
    mark = check_figures.MARK.search(text)
    *_, number = check_figures.NUMBER.finditer(text[: mark.start()])
    planted = re.sub(r"\d(?=\D*$)", lambda digit: str((int(digit[0]) + 5) % 10), number[0])
    readme.write_text(text[: number.start()] + planted + text[number.end() :], encoding="utf-8")
    problems = check_figures.check_pages(tmp_path)[1]  # one for each value that the number stands for
    assert problems
    assert all(re.match(rf"README\.md, line \d+: {re.escape(planted)}: ", problem) for problem in problems)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("98.6%<!-- result: one#right -->", 1),
        ("It has 99%<!-- result: one#right value --> right.", 1),
        ("98.6% (97.1%–99.3%)<!-- result: one#right value low high --> of 500<!-- result: one#right n -->", 4),
        ("28.6<!-- result: one#psnr --> dB, 28.64<!-- result: one#psnr --> dB of 1,500<!-- result: one#psnr n -->", 3),
        ("−0.25<!-- result: one#gain --> dB", 1),
        (f"{MARK}\n{TABLE}", 3),
        (MARK.replace("- -->", "none -->") + TABLE.replace("7%", "–"), 4),
        ("```\n7%<!-- result: one#right -->\n```\n98.6%<!-- result: one#right -->", 1),
    ],
)
def test_check_pages_accepts_rounded_numbers(check, text, count):
    found, problems = check(text)
    assert [problem for problem in problems if "no page" not in problem] == []
    assert found == count


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("98.5%<!-- result: one#right -->", "README.md, line 1: 98.5%: value of right in one is 98.600%"),
        ("98.6% (97.1%–99.2%)<!-- result: one#right value low high -->", "99.2%: high of right in one is 99.340%"),
        ("28.65<!-- result: one#psnr --> dB", "line 1: 28.65: value of psnr in one is 28.6449"),
        ("100.0%<!-- result: one#all -->", "line 1: 100.0%: all of one is 99.96%, not all or none"),
        ("1<!-- result: one#none -->", "line 1: 1: one has no value none"),
        ("1<!-- result: one#psnr low -->", "line 1: 1: psnr of one has no low"),
        ("right<!-- result: one#psnr -->", "line 1: expected value as numbers before the mark of psnr"),
        ("1<!-- result: one#psnr mean -->", "line 1: expected mean as numbers before the mark of psnr"),
        ("1<!-- result: one psnr -->", "line 1: a mark of a result cannot be read"),
        ("1<!-- result: two#psnr -->", "cannot read"),
        (MARK + TABLE.replace("99.2%", "99.1%"), "line 4: 99.1%: low of generated.object in one is 99.200%"),
        (MARK.replace("| object", "| object count") + TABLE, "line 1: the mark names 2 rows, its table has 1"),
        (MARK.replace("- -->", "-->") + TABLE, "line 4: the mark names 1 columns, the row has 2"),
        (MARK.replace("- -->", "generated -->") + TABLE.replace("7%", "–"), "line 4: –: generated.object of one is 1"),
        ("nothing", "one.json: no page has a number of it"),
    ],
)  # fmt: skip
def test_check_pages_refuses_wrong_numbers_and_marks(check, text, message):
    problems = check(text)[1]
    assert message in problems[0]
    assert len([problem for problem in problems if "no page" not in problem]) <= 1


def test_check_pages_notices_a_result_that_was_edited(check, check_figures, tmp_path):
    path = tmp_path / check_figures.RESULTS / "one.json"
    path.write_text(path.read_text(encoding="utf-8").replace("0.986", "0.999"), encoding="utf-8")
    assert "was changed after it was written" in check("99.9%<!-- result: one#right -->")[1][0]


def test_check_pages_notices_results_of_other_weights(check, check_figures, tmp_path, tiny_checkpoint):
    """A model that was trained further keeps its name, and its figures are not those of the page any more."""
    shutil.copytree(tiny_checkpoint, tmp_path / check_figures.MODELS / "tiny")
    path = tmp_path / check_figures.RESULTS / "one.json"
    text = "98.6%<!-- result: one#right -->"
    own = check_figures.hash_weights([tiny_checkpoint])
    for sha256, expected in ((own, []), ("0" * 64, ["one was measured on other weights of tiny"])):
        write_result(path, Manifest(measure="scenes", model=ModelRecord(name="tiny", sha256=sha256)), VALUES)
        assert [problem[: len("one was measured on other weights of tiny")] for problem in check(text)[1]] == expected


def test_keep_result_leaves_items_out(check_figures, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(check_figures, "ROOT", tmp_path)
    values = {"psnr": ResultValue(value=28.0, n=1)}
    write_result(tmp_path / "a.json", Manifest(measure="m"), values, {"ids": ["x"], "values": {"psnr": [28.0]}})
    copy = check_figures.keep_result("kept", tmp_path / "a.json", tmp_path)
    assert (read_result(copy).results, read_result(copy).items) == (values, None)
    assert check_figures.main(["--keep", "kept", str(tmp_path / "gone.json")]) == 2
    assert "gone.json" in capsys.readouterr().err
