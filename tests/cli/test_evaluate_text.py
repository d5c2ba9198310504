"""``cogview eval text``: forms of its files, what is printed, and what is refused."""

import json
from pathlib import Path

import pytest

from cogview.cli.main import main
from cogview.cli.result_file import check_result_path
from cogview.evaluation.manifest import read_result, unlike_fields

TEXTS = "一只猫坐在垫子上\n两只狗在草地上跑\n"
REFERENCES = "一只猫坐在垫子上\t猫在垫子上坐着\n两只狗在草地上奔跑\t狗在草地上跑\n"


@pytest.fixture
def evaluate(tmp_path, monkeypatch, capsys):
    """Return a function that writes files and measures the first against the second: status, stdout, stderr."""
    monkeypatch.chdir(tmp_path)

    def run(files, *arguments):
        for name, content in files.items():
            Path(name).write_text(content, encoding="utf-8")
        status = main(["eval", "text", *list(files)[:2], *arguments])
        printed = capsys.readouterr()
        return status, printed.out.splitlines(), printed.err.splitlines()

    return run


def lines_of(*rows):
    return "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)


FORMS = {
    "hyp.txt ref.txt": (TEXTS, REFERENCES),
    "hyp.tsv ref.tsv": (
        "id\ttext\nb\t两只狗在草地上跑\na\t一只猫坐在垫子上\n",
        "id\ttext\na\t一只猫坐在垫子上\na\t猫在垫子上坐着\nb\t两只狗在草地上奔跑\nb\t狗在草地上跑\n",
    ),
    "hyp.jsonl ref.jsonl": (
        lines_of({"id": 1, "text": "一只猫坐在垫子上"}, {"id": 2, "text": "两只狗在草地上跑"}),
        lines_of(
            {"id": 2, "texts": ["两只狗在草地上奔跑", "狗在草地上跑"]},
            {"id": 1, "texts": ["一只猫坐在垫子上", "猫在垫子上坐着"]},
        ),
    ),
    "hyp.json ref.json": (
        json.dumps([{"image_id": 1, "caption": "一只猫坐在垫子上"}, {"image_id": 2, "caption": "两只狗在草地上跑"}]),
        json.dumps(
            {
                "annotations": [
                    {"id": number, "image_id": number // 2 + 1, "caption": text}
                    for number, text in enumerate(REFERENCES.split())
                ]
            }
        ),
    ),
}


@pytest.mark.parametrize("names", FORMS)
def test_eval_text_reads_every_form_alike(evaluate, names):
    files = dict(zip(names.split(), FORMS[names], strict=True))
    status, out, err = evaluate(files, "--by", "characters")
    assert (status, err, out[0]) == (0, [], "2 texts, 4 references")
    assert out[2] == "CIDEr-D  7.5931 (7.2827–7.9035)"
    assert [line.split()[:2] for line in out[3:]] == [
        *(["BLEU-" + str(n), "0.9394"] for n in range(1, 5)),
        ["ROUGE-L", "1.0000"],
    ]


def test_eval_text_prints_one_json_object(evaluate):
    status, out, _ = evaluate({"hyp.txt": TEXTS, "ref.txt": REFERENCES}, "--json", "--by", "characters")
    found = json.loads("\n".join(out))
    assert (status, found["items"], round(found["characters"]["cider"]["value"], 4)) == (0, 2, 7.5931)


def test_eval_text_writes_a_result(evaluate):
    files = {"hyp.txt": TEXTS, "ref.txt": REFERENCES}
    status, _, err = evaluate(files, "--by", "characters", "-o", "results/text.json")
    assert (status, err) == (0, ["written to results/text.json"])
    result = read_result(Path("results/text.json"))
    assert result.manifest.measure == "text"
    assert (result.manifest.reference.count, result.manifest.settings["by"]) == (2, ["characters"])
    assert result.results["characters/cider"].value == pytest.approx(7.5931, abs=5e-5)
    assert sum(result.items.values["characters/cider"]) / 2 == pytest.approx(7.5931, abs=5e-5)
    lines = TEXTS.splitlines()
    evaluate({"h.txt": f"{lines[0]}\n狗\n", "ref.txt": REFERENCES}, "--by", "characters", "-o", "other.json")
    assert unlike_fields(result.manifest, read_result(Path("other.json")).manifest) == []
    evaluate({"h.txt": TEXTS, "r.txt": "猫\n狗\n"}, "--by", "characters", "-o", "other.json")
    assert unlike_fields(result.manifest, read_result(Path("other.json")).manifest) == ["reference.sha256"]
    Path("folder").mkdir()
    status, out, err = evaluate(files, "--by", "characters", "-o", "folder")
    assert (status, out, len(err)) == (2, [], 1)
    assert "the output folder is a folder; expected the name of a file" in err[0]


def test_eval_text_leaves_words_out_without_jieba(evaluate, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "jieba", None)
    monkeypatch.setattr("cogview.cli.evaluate_text.is_installed", lambda package: False)
    status, out, err = evaluate({"hyp.txt": TEXTS, "ref.txt": REFERENCES})
    assert (status, out[1].split()) == (0, ["characters"])
    assert err == ["note: words are left out: they need jieba; install it: pip install jieba"]
    status, out, err = evaluate({"hyp.txt": TEXTS, "ref.txt": REFERENCES}, "--by", "words")
    assert (status, out, len(err)) == (2, [], 1)
    assert "words of Chinese need jieba; install it: pip install jieba" in err[0]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"h.txt": TEXTS + "三只鸟\n", "r.txt": REFERENCES}, 'r.txt lacks 1 id of 3 ids in h.txt, first "3"'),
        ({"h.txt": "一只猫\n", "r.txt": REFERENCES}, 'h.txt lacks 1 id of 2 ids in r.txt, first "2"'),
        ({"h.txt": "一只猫\n\n两只狗\n", "r.txt": REFERENCES}, "h.txt, line 2: the text is empty"),
        ({"h.txt": TEXTS, "r.txt": "猫\t\n狗\n"}, "r.txt, line 1: the text is empty"),
        ({"h.txt": TEXTS, "r.txt": "。\n狗\n"}, 'a text or reference of the id "1" holds nothing but punctuation'),
        ({"h.txt": "", "r.txt": REFERENCES}, "h.txt holds no text"),
        (
            {"h.tsv": "id\ttext\na\t猫\na\t狗\n", "r.tsv": "id\ttext\na\t猫\n"},
            'h.tsv, line 3: there is a text of the id "a" already',
        ),
        ({"h.tsv": "name\ttext\na\t猫\n", "r.txt": REFERENCES}, "h.tsv, line 2: expected an id (id, image_id"),
        ({"h.jsonl": '{"id": 1, "text": 3}', "r.txt": REFERENCES}, "h.jsonl, line 1: expected an id"),
        ({"h.jsonl": '{"id": 1, "text": [3]}', "r.txt": REFERENCES}, "h.jsonl, line 1: expected a text, got 3"),
        ({"h.jsonl": "{", "r.txt": REFERENCES}, "h.jsonl, line 1: this is not JSON"),
        ({"h.json": '{"images": []}', "r.txt": REFERENCES}, "h.json: expected a list of captions"),
        ({"h.json": "[3]", "r.txt": REFERENCES}, "h.json, caption 1: expected an id"),
    ],
)
def test_eval_text_refuses_bad_files_in_one_line(evaluate, files, message):
    status, out, err = evaluate(files, "--by", "characters")
    assert (status, out, len(err)) == (2, [], 1)
    assert message in err[0]


def test_check_result_path_keeps_every_file_but_a_result(evaluate):
    """A result with the name of the texts replaced them."""
    files = {"hyp.txt": TEXTS, "ref.txt": REFERENCES}
    status, out, err = evaluate(files, "--by", "characters", "-o", "hyp.txt")
    assert (status, out, len(err)) == (2, [], 1)
    assert "the output hyp.txt exists and is no result of cogview" in err[0]
    assert Path("hyp.txt").read_text(encoding="utf-8") == TEXTS

    Path("empty.json").touch()  # as of mktemp
    for output in ("empty.json", "empty.json", "new/folder/result.json"):
        assert evaluate(files, "--by", "characters", "-o", output)[0] == 0
        assert read_result(Path(output)).manifest.measure == "text"
    edited = Path("empty.json").read_text(encoding="utf-8").replace('"text"', '"texts"')
    assert evaluate({**files, "edited.json": edited}, "--by", "characters", "-o", "edited.json")[0] == 0


def test_check_result_path_leaves_no_folder_behind(tmp_path):
    check_result_path(tmp_path / "new" / "folder" / "result.json")
    assert list(tmp_path.iterdir()) == []
