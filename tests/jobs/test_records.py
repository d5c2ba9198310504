"""Job files: records of valid lines, and problems of invalid ones."""

import io
import os
import sys
from pathlib import Path

import pytest

from cogview.errors import InputError
from cogview.jobs.records import JobRecord, digest, read_job

FOX, DOG, APPLE = "一只狐狸", "蓝色背景上的三只狗", "一个红苹果"


@pytest.fixture
def read(tmp_path, monkeypatch):
    """Return a function that writes a job file into the current folder and reads it."""
    monkeypatch.chdir(tmp_path)

    def write_and_read(name, content):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return read_job(name)

    return write_and_read


@pytest.mark.parametrize("name", ["prompts.txt", "PROMPTS.TXT", "prompts"])
def test_read_job_reads_a_prompt_per_line(read, name):
    lines, problems = read(
        name, f"\ufeff{FOX}\r\n\r\n  {DOG}  \r{APPLE}"
    )  # a byte-order mark, and line ends of several systems
    assert lines == [
        JobRecord(number=1, prompt=FOX),
        JobRecord(number=3, prompt=DOG),
        JobRecord(number=4, prompt=APPLE),
    ]
    assert problems == []
    assert [line.key for line in lines] == ["line 1", "line 3", "line 4"]


def test_read_job_reads_standard_input(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(f"{FOX}\n\n{DOG}".encode())))
    assert read_job("-") == ([JobRecord(number=1, prompt=FOX), JobRecord(number=3, prompt=DOG)], [])


@pytest.mark.parametrize(("suffix", "mark"), [("csv", ","), ("tsv", "\t")])
def test_read_job_reads_a_table(read, suffix, mark):
    rows = [
        ["id", "prompt", "task", "image", "rows", "n", "seed", "temperature", "top_k", "top_p", "guidance"],
        ["狐狸", f' "{FOX}{mark}\n在草地上" '.strip(), "", "", "", "2", str(2**63 - 1), "0.7", "0", "1", "3"],
        [""] * 11,
        ["7", APPLE, "complete", "画/苹果.png", "4", "", "", "", "", "", ""],
        ["", "", "caption", "/画/狗.png", "", "", "", "", "", "", ""],
    ]
    text = "\ufeff" + "\r\n".join(mark.join(row) for row in rows) + "\r\n"
    lines, problems = read(f"工作/job.{suffix}", text)
    assert problems == []
    assert lines == [
        JobRecord(
            number=2,
            id="狐狸",
            prompt=f"{FOX}{mark}\n在草地上",
            n=2,
            seed=2**63 - 1,
            sampling={"temperature": 0.7, "top_k": 0, "top_p": 1.0, "guidance": 3.0},
        ),
        JobRecord(number=5, id="7", prompt=APPLE, task="complete", image=Path("工作/画/苹果.png"), rows=4),
        JobRecord(number=6, task="caption", image=Path("/画/狗.png")),
    ]
    assert [line.key for line in lines] == ["狐狸", "7", "line 6"]


def test_read_job_reads_json_lines(read):
    lines, problems = read(
        "工作/job.jsonl",
        f'\ufeff{{"id": 7, "prompt": "{FOX}", "guidance": 3, "text_attention": 1.5, "n": null}}\r\n\r\n'
        f'{{"task": "upscale", "prompt": "{DOG}", "image": "../狗.png"}}',
    )
    assert problems == []
    assert lines == [
        JobRecord(number=1, id="7", prompt=FOX, sampling={"guidance": 3.0, "text_attention": 1.5}),
        JobRecord(number=3, task="upscale", prompt=DOG, image=Path("工作/../狗.png")),
    ]
    assert isinstance(lines[0].sampling["guidance"], float)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("job.jsonl", f'{{"task": "rerank", "prompt": "{FOX}", "images": ["a.png", "/画/b.png"]}}'),
        ("job.csv", f"task,prompt,images\nrerank,{FOX},a.png | /画/b.png\n"),
    ],
)
def test_read_job_reads_the_images_to_rank(read, name, content):
    """A list in JSON; in a table names with | between them."""
    [record], problems = read(f"工作/{name}", content)
    assert problems == []
    assert record.images == (Path("工作/a.png"), Path("/画/b.png"))
    [changed], _ = read(f"工作/{name}", content.replace("a.png", "c.png"))
    assert digest([record], f"工作/{name}") != digest([changed], f"工作/{name}")


WRONG_OBJECTS = [
    ('{"prompt": "一只狐狸"', "this is not JSON: Expecting ',' delimiter (character 18)"),
    ("[" * 100_000, "this is nested too deeply to be read"),
    ('"一只狐狸"', 'expected an object in braces, got "一只狐狸"'),
    ('{"n": 1, "prompt": "狗", "n": 2}', '"n" stands here twice'),
    ('{"promt": "狗"}', '"promt" is unknown; did you mean "prompt"?'),
    (
        '{"狗": 1}',
        '"狗" is unknown; known: id, prompt, negative, task, image, images, rows, mask, strength, keep, n, rank_by, '
        "seed, temperature, top_k, top_p, min_p, guidance, text_attention, noise_version",
    ),
    ('{"prompt": "狗", "n": 2.5}', "n: expected a whole number, got 2.5"),
    ('{"prompt": "狗", "n": true}', "n: expected a whole number, got true"),
    ('{"prompt": "狗", "guidance": "高"}', 'guidance: expected a number, got "高"'),
    ('{"prompt": "狗", "guidance": 1' + "0" * 400 + "}", "guidance: expected a number, got 1" + "0" * 39 + "…"),
    ('{"prompt": ["狗"]}', 'prompt: expected text, got ["狗"]'),
    ('{"prompt": "\\ud83d"}', "prompt: holds an invalid character (0, or half of a surrogate pair)"),
    ('{"n": 2}', "the task generate needs prompt"),
    ('{"prompt": " "}', "the prompt is empty; describe an image, for example 一个红苹果"),
    ('{"prompt": "狗", "task": "complete"}', "the task complete needs image and rows"),
    ('{"task": "upscale", "image": "狗.png"}', "the task upscale needs prompt"),
    ('{"task": "caption"}', "the task caption needs image"),
    (
        '{"prompt": "狗", "image": "狗.png"}',
        "image means nothing for the task generate; it belongs to: complete, caption, upscale, edit, fill, vary",
    ),
    ('{"prompt": "狗", "mask": "0,0,8,8"}', "mask means nothing for the task generate; it belongs to: edit, fill"),
    ('{"task": "edit", "image": "a.png"}', "the task edit needs prompt"),
    ('{"task": "fill", "image": "a.png", "prompt": "狗"}', "the task fill needs mask"),
    ('{"task": "vary", "image": "a.png", "prompt": "狗"}', "prompt means nothing for the task vary, which has no text"),
    ('{"task": "vary", "image": "a.png", "keep": 1.5}', "keep must be in [0, 1], got 1.5"),
    (
        '{"task": "vary", "image": "a.png", "strength": 1}',
        "strength means nothing for the task vary; it belongs to: ",
    ),
    ('{"task": "edit", "image": "a.png", "prompt": "狗", "strength": 0}', "strength must be in (0, 1], got 0"),
    (
        '{"task": "edit", "image": "a.png", "prompt": "狗", "mask": [0, 8]}',
        "mask: expected text, got [0, 8]",
    ),
    (
        '{"prompt": "狗", "task": "画"}',
        'the task "画" is unknown; known: generate, complete, caption, upscale, edit, fill, vary, rerank',
    ),
    ('{"prompt": "狗", "task": "rerank"}', "the task rerank needs images"),
    ('{"prompt": "狗", "task": "rerank", "images": "a.png"}', 'images: expected a list of texts, got "a.png"'),
    ('{"prompt": "狗", "task": "rerank", "images": []}', "images: expected a list of texts, got []"),
    ('{"prompt": "狗", "task": "rerank", "images": ["a.png", 3]}', "image: expected text, got 3"),
    (
        '{"prompt": "狗", "task": "rerank", "images": ["a.png", " "]}',
        "images: expected the name of an image, got an empty text",
    ),
    (
        '{"prompt": "狗", "task": "rerank", "images": ["a.png"], "seed": 1, "top_k": 5}',
        "seed and top_k cannot be set for the task rerank, which samples nothing",
    ),
    (
        '{"prompt": "狗", "images": ["a.png"]}',
        "images means nothing for the task generate; it belongs to: rerank",
    ),
    ('{"prompt": "狗", "n": 0}', "n must be from 1 to 100000, got 0"),
    ('{"prompt": "狗", "n": 99999999999}', "n must be from 1 to 100000, got 99999999999"),
    (
        '{"prompt": "狗", "task": "complete", "image": "狗.png", "rows": -1}',
        "rows must be at least 0, got -1",
    ),
    ('{"prompt": "狗", "seed": -1}', "the seed must be from 0 to 9223372036854775807, got -1"),
    ('{"prompt": "狗", "top_p": 2}', "top_p must be in (0, 1], got 2.0"),
    ('{"prompt": "狗", "id": "一"}', 'the id "一" is that of line 1 as well'),
    ('{"prompt": "狗", "id": "line 2"}', 'the id "line 2" is that of line 2 as well'),
]


@pytest.mark.parametrize(("wrong", "problem"), WRONG_OBJECTS)
def test_read_job_skips_invalid_objects(read, wrong, problem):
    lines, problems = read("job.jsonl", f'{{"id": "一", "prompt": "{FOX}"}}\n{{"prompt": "{DOG}"}}\n{wrong}\n')
    assert [line.prompt for line in lines] == [FOX, DOG]
    assert len(problems) == 1
    assert problems[0].startswith(f"line 3: {problem}")
    assert "\n" not in problems[0]


@pytest.mark.parametrize(
    ("wrong", "problem"),
    [
        ("狗", "1 columns, expected 2; a text that holds a comma belongs between quotation marks"),
        ("狗,2,猫", "3 columns, expected 2; a text that holds a comma belongs between quotation marks"),
        ("狗,两", 'n: expected a whole number, got "两"'),
        (",2", "the prompt is empty; describe an image, for example 一个红苹果"),
        ('"狗,2', """the quotation marks are not understood (',' expected after '"')"""),
        ('"狗,2', "the quotation marks are not understood (unexpected end of data)"),
    ],
)
def test_read_job_skips_invalid_rows(read, wrong, problem):
    last = DOG if "end of data" in problem else f'"{DOG}"'
    lines, problems = read("job.csv", f"prompt,n\n{FOX},\n{wrong}\n{APPLE},2\n{last},3\n")
    assert [(line.number, line.prompt) for line in lines] == [(2, FOX), (4, APPLE), (5, DOG)]
    assert problems == [f"line 3: {problem}"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "latin.csv",
            "prompt\ngâteau à la crème".encode("latin-1"),
            "latin.csv is not UTF-8: byte 8 in line 2 is 0xe2; if it is GBK, convert it: iconv -f GB18030 "
            "-t UTF-8 latin.csv > NEW",
        ),
        (
            "big5.txt",
            "藍色背景上的三隻狐狸".encode("big5"),
            "big5.txt is not UTF-8: byte 0 in line 1 is 0xc2; if it is GBK, convert it: iconv -f GB18030 "
            "-t UTF-8 big5.txt > NEW",
        ),
        ("job.txt", " \n\n", "job.txt is empty: expected a prompt per line"),
        ("job.jsonl", "", "job.jsonl is empty: expected a JSON object per line"),
        (
            "job.csv",
            "prompt\n\n",
            "job.csv is empty: expected a header and a row for each result",
        ),
        (
            "job.xlsx",
            "",
            'job.xlsx: the suffix ".xlsx" is unknown; known: .txt (a prompt per line), .csv, .tsv, .jsonl',
        ),
        (
            "job.csv",
            "prmpt,n\n狗,2",
            'job.csv: line 1 must name the columns: "prmpt" is unknown; did you mean "prompt"?',
        ),
        ("job.csv", "prompt,n,prompt\n狗,2,猫", 'job.csv: line 1 names the column "prompt" twice'),
        ("job.csv", '"prompt\n狗', "job.csv: line 1: the quotation marks are not understood (unexpected end of data)"),
        (
            "job.csv",
            "prompt,n\n,2",
            "job.csv has no line that can be used; the first problem is in line 2: the prompt is empty; describe an "
            "image, for example 一个红苹果",
        ),
        (
            "job.csv",
            "n\n1\n2",
            "job.csv has no line that can be used; the first problem is in line 2: the task generate needs prompt",
        ),
    ],
)
def test_read_job_rejects_a_file_without_a_valid_line(read, name, content, message):
    with pytest.raises(InputError) as error:
        read(name, content)
    assert str(error.value) == message


def test_read_job_rejects_a_missing_file(tmp_path):
    with pytest.raises(InputError, match=r"cannot read .*没有\.csv: No such file or directory"):
        read_job(str(tmp_path / "没有.csv"))


def test_read_job_digest_depends_on_the_content_only(read, tmp_path, monkeypatch):
    def of(name, content):
        return digest(read(name, content)[0], name)

    table = of("a/job.csv", f"id,prompt,task,image\n狗,{DOG},upscale,狗.png\n")
    same = f'\n{{"image": "狗.png", "id": "狗", "task": "upscale", "prompt": "{DOG}"}}'
    assert of("b/job.jsonl", same) == table
    assert of("b/job.jsonl", same.replace("狗.png", "猫.png")) != table
    assert of("b/job.jsonl", same[:-1] + ', "n": 2}') != table
    monkeypatch.chdir("a")
    assert digest(read_job("job.csv")[0], "job.csv") == table


def test_read_job_digest_equals_that_of_earlier_versions(read):
    """The value is that of commit ec4ce5b; another one would make old journals useless."""
    text = (
        f'{{"id": "狐狸", "prompt": "{FOX}", "n": 2, "temperature": 0.9, "top_k": 50}}\n'
        '{"task": "caption", "image": "a.png", "seed": 3}\n'
    )
    records, _ = read("job.jsonl", text)
    assert digest(records, "job.jsonl") == "9ee9e88798003fa99ec7c4dcce03483d396e3975957224f52e31e099c140570c"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("pandas.csv", f"\ufeffid,prompt,seed,n,temperature\n1.0,{FOX},7.0,2.0,1\n,{DOG},,,\n"),
        (
            "pandas.jsonl",
            f'{{"id": 1.0, "prompt": "{FOX}", "seed": 7.0, "n": 2.0, "temperature": 1}}\n'
            f'{{"id": null, "prompt": "{DOG}", "seed": null, "n": null, "temperature": null}}\n',
        ),
    ],
)
def test_read_job_reads_whole_floats_and_empty_cells_of_pandas_and_spreadsheets(read, name, content):
    """A column of whole numbers in which one is missing is stored as floats."""
    lines, problems = read(name, content)
    assert problems == []
    assert [(line.prompt, line.seed, line.n, dict(line.sampling)) for line in lines] == [
        (FOX, 7, 2, {"temperature": 1.0}),
        (DOG, None, None, {}),
    ]
    if name.endswith("jsonl"):
        assert lines[0].id == "1"


@pytest.mark.parametrize("name", ["job.txt", "job.csv"])
def test_read_job_reads_gbk_with_a_note(read, capsys, name):
    """Editors and spreadsheets on Chinese systems write it."""
    lines, _ = read(name, f"prompt\n{FOX}\n“{DOG}”，{APPLE}。\n".encode("gbk"))
    assert [line.prompt for line in lines][-2:] == [FOX, f"“{DOG}”，{APPLE}。"]
    assert capsys.readouterr().err == f"note: {name} is not UTF-8 and is read as GB18030 (GBK)\n"


@pytest.mark.parametrize("suffix", ["txt", "jsonl", "csv", "tsv"])
def test_read_job_refuses_a_line_without_end(read, suffix):
    prompt = '{"prompt": "%s"}' if suffix == "jsonl" else "%s"
    header = "prompt\n" if suffix in ("csv", "tsv") else ""
    lines, [problem] = read(f"job.{suffix}", header + "\n".join([prompt % FOX, prompt % (DOG * 12_000)]))
    assert [line.prompt for line in lines] == [FOX]
    assert problem == f"line {3 if header else 2}: the line is too long, expected at most 100000 characters"


def test_read_job_refuses_a_pipe(tmp_path):
    """Opening a pipe that nobody writes to would wait for ever."""
    os.mkfifo(tmp_path / "job.txt")
    with pytest.raises(InputError, match=r"job.txt is no regular file; a command reads a pipe as its standard input"):
        read_job(str(tmp_path / "job.txt"))


def test_read_job_names_problems_by_id_and_escapes_control_characters(read):
    _, problems = read("job.jsonl", f'{{"id": "狗", "n": 1.5}}\n{{"prompt": "{FOX}"}}\n{{"\\u001b[2J": 1}}\n')
    assert [problem.id for problem in problems] == ["狗", "line 3"]
    assert problems[1].startswith(r'line 3: "\x1b[2J" is unknown')


def test_read_job_gives_every_problem_an_id_of_its_own(read):
    """The journal has one error for each id."""
    _, problems = read("job.jsonl", f'{{"id": "a", "prompt": "{FOX}"}}\n{{"id": "a"}}\n{{"id": "b"}}\n{{"id": "b"}}\n')
    assert [(problem.id, problem.number) for problem in problems] == [("line 2", 2), ("b", 3), ("line 4", 4)]
    assert problems[1].reason == "the task generate needs prompt"
