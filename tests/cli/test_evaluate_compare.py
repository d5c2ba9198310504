"""``cogview eval compare``: what is printed, the page, and files that are refused."""

import json
from pathlib import Path

import pytest

from cogview.cli.main import main
from cogview.evaluation.manifest import Manifest, ResultValue, hash_prompts, write_result


@pytest.fixture
def compare(tmp_path, monkeypatch, capsys):
    """Return a function that compares a.json and b.json, which hold FIDs with intervals: status, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    for name, value in (("a", 20.0), ("b", 15.0)):
        results = {"fid": ResultValue(value=value, low=value - 1, high=value + 1, n=100, higher_is_better=False)}
        sampling = {"top_k": 100 if name == "a" else 5}
        manifest = Manifest(measure="images", prompts=hash_prompts(["一只狐狸"]), sampling=sampling)
        write_result(tmp_path / f"{name}.json", manifest, results)

    def run(*arguments, files=("a.json", "b.json")):
        status = main(["eval", "compare", *files, *arguments])
        printed = capsys.readouterr()
        return status, printed.out.splitlines(), printed.err.splitlines()

    return run


def test_compare_prints_differences(compare):
    status, out, err = compare("--allow", "sampling")
    assert status == 0
    assert out[1].split() == ["fid", "20", "15", "-5", "*", "-6.41", "to", "-3.59,", "from", "intervals", "better"]
    assert out[2] == "* the interval excludes 0: 1 of 1"
    assert err == ["note: not measured alike, as allowed: sampling.top_k"]


def test_compare_prints_json(compare):
    status, out, _ = compare("--allow", "sampling", "--json")
    found = json.loads(out[0])
    assert (status, found["allowed"]) == (0, ["sampling.top_k"])
    assert found["differences"]["fid"]["difference"] == -5
    assert found["differences"]["fid"]["excludes_0"] is True


def test_compare_writes_a_page(compare, tmp_path):
    status, _, err = compare("--allow", "sampling.top_k", "-o", "page.html")
    assert (status, err[-1]) == (0, "written to page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>")
    assert "<td>fid" in page


def test_compare_makes_the_folder_of_its_page(compare):
    """As other commands do; it wanted an existing one."""
    assert compare("--allow", "sampling", "-o", "new/folder/page.html")[0] == 0
    assert "<html" in Path("new/folder/page.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "they differ in sampling.top_k (100, 5)"),
        (("--allow", "sampling", "-o", "page.png"), "-o must name an HTML file, such as page.html, got page.png"),
        (("--allow", "sampling", "--allow", "top_k"), "--allow top_k: neither manifest has it"),
    ],
)
def test_compare_refuses_arguments(compare, arguments, message):
    status, out, err = compare(*arguments)
    assert (status, out, len(err)) == (2, [], 1)
    assert message in err[0]


BAD = {
    "list.json": ("[1, 2]", "is not a result"),
    "report.json": ('{"protocol": {"model": "tiny"}}', "is not a result"),
    "newer.json": ('{"format": "cogview-result-7"}', "has the format cogview-result-7"),
    "nan.json": ('{"format": "cogview-result-1", "results": {"fid": {"value": NaN, "n": 1}}}', "is nan"),
    "cut.json": ('{"format": "cogview-re', "is not JSON"),
}


@pytest.mark.parametrize("name", [*BAD, "gone.json", "."])
def test_compare_refuses_other_files(compare, tmp_path, name):
    content, message = BAD.get(name, (None, "cannot read"))
    if content is not None:
        (tmp_path / name).write_text(content)
    status, out, err = compare(files=("a.json", name))
    assert (status, out, len(err)) == (2, [], 1)
    assert message in err[0]


def test_compare_refuses_a_result_that_was_edited(compare, tmp_path):
    path = tmp_path / "b.json"
    path.write_text(path.read_text(encoding="utf-8").replace("15.0", "10.0"), encoding="utf-8")
    status, _, err = compare("--allow", "sampling")
    assert status == 2
    assert err[0].endswith("; measure again")
    assert "b.json was changed after it was written" in err[0]
