"""Scorers of benchmarks on hand-made detections and answers, with totals computed by hand."""

import json

import pytest

from cogview.errors import InputError
from cogview.evaluation.field_benchmarks.benchmark import mean_of_groups
from cogview.evaluation.field_benchmarks.catalogue import BENCHMARKS
from cogview.evaluation.field_benchmarks.chinese_word import LEVELS
from cogview.evaluation.field_benchmarks.dpg import counted
from cogview.evaluation.field_benchmarks.geneval import is_correct, objects_by_class, relations
from cogview.evaluation.field_benchmarks.oneig import clean_text, compare_text


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def values_of(score):
    return {name: round(found["value"], 6) for name, found in score.results.items()}


def detection(name, score=0.95, box=(0, 0, 10, 10), color=None):
    return {"class": name, "score": score, "box": list(box)} | ({} if color is None else {"color": color})


GENEVAL_PROMPTS = [
    {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "一张长椅"},
    {"tag": "two_object", "include": [{"class": "cat", "count": 1}, {"class": "dog", "count": 1}], "prompt": "猫和狗"},
    {
        "tag": "counting",
        "include": [{"class": "clock", "count": 2}],
        "exclude": [{"class": "clock", "count": 3}],
        "prompt": "两个时钟",
    },
    {"tag": "colors", "include": [{"class": "bus", "count": 1, "color": "blue"}], "prompt": "蓝色的公共汽车"},
    {
        "tag": "position",
        "include": [{"class": "cat", "count": 1}, {"class": "dog", "count": 1, "position": ["right of", 0]}],
        "prompt": "猫右边的狗",
    },
    {
        "tag": "color_attr",
        "include": [
            {"class": "cup", "count": 1, "color": "red"},
            {"class": "apple", "count": 1, "color": "green"},
        ],
        "prompt": "红杯子和绿苹果",
    },
    {"tag": "single_object", "include": [{"class": "cow", "count": 1}], "prompt": "一头牛"},
]
# Two pictures of each prompt, and whether they are right.
GENEVAL_PICTURES = [
    ([detection("bench", 0.31)], True),
    ([detection("bench", 0.3)], False),  # not above the threshold
    ([detection("cat"), detection("dog")], True),
    ([detection("cat"), detection("horse")], False),
    ([detection("clock", 0.91), detection("clock", 0.92), detection("clock", 0.9)], True),  # counting: above 0.9
    ([detection("clock")] * 3, False),
    ([detection("bus", 0.5, color="red"), detection("bus", 0.9, color="blue")], True),  # the most confident one
    ([detection("bus", 0.9, color="red"), detection("bus", 0.5, color="blue")], False),
    ([detection("cat"), detection("dog", box=(40, 0, 50, 10))], True),
    ([detection("cat", box=(40, 0, 50, 10)), detection("dog")], False),
    ([detection("cup", color="red"), detection("apple", color="green")], True),
    ([detection("cup", color="green"), detection("apple", color="red")], False),
    ([detection("cow")], True),
    ([detection("cow")], True),
]


@pytest.fixture
def geneval(tmp_path):
    """Return the prompts and the rows of detections of all pictures."""
    items = BENCHMARKS["geneval"].read_items(write_lines(tmp_path / "prompts.jsonl", GENEVAL_PROMPTS), subset=True)
    rows = [
        {"filename": f"some/folder/{n // 2:05}/samples/{n % 2:04}.png", "detections": found}
        for n, (found, _) in enumerate(GENEVAL_PICTURES)
    ]
    return items, rows


def test_geneval_scores_detections_by_hand(geneval, tmp_path):
    """Tasks: single_object 3 of 4, the five others 1 of 2 each; overall (0.75 + 5 * 0.5) / 6; pictures 8 of 14."""
    items, rows = geneval
    assert [is_correct(found, items[n // 2].details) for n, (found, _) in enumerate(GENEVAL_PICTURES)] == [
        right for _, right in GENEVAL_PICTURES
    ]
    score = BENCHMARKS["geneval"].score(items, write_lines(tmp_path / "d.jsonl", rows), 2)
    assert values_of(score) == {
        "overall": round(3.25 / 6, 6),
        "single_object": 0.75,
        **dict.fromkeys(("two_object", "counting", "colors", "position", "color_attr"), 0.5),
        "pictures": round(8 / 14, 6),
        "prompts": 1.0,
    }
    assert score.values["pictures"] == [0.5] * 6 + [1.0]
    assert score.values["single_object"] == [0.5, *[None] * 5, 1.0]
    assert score.results["overall"]["low"] <= 3.25 / 6 <= score.results["overall"]["high"]


def test_geneval_takes_verdicts_of_the_benchmarks_script(geneval, tmp_path):
    items, rows = geneval
    scored = BENCHMARKS["geneval"].score(items, write_lines(tmp_path / "d.jsonl", rows), 2)
    verdicts = [
        {"filename": row["filename"], "correct": right, "prompt": items[n // 2].prompt}
        for n, (row, (_, right)) in enumerate(zip(rows, GENEVAL_PICTURES, strict=True))
    ]
    given = BENCHMARKS["geneval"].score(items, write_lines(tmp_path / "v.jsonl", verdicts), 2)
    assert given.results == scored.results


def test_geneval_refuses_other_sets_and_missing_parts(geneval, tmp_path):
    items, rows = geneval

    def refusal(changed):
        with pytest.raises(InputError) as caught:
            BENCHMARKS["geneval"].score(items, write_lines(tmp_path / "d.jsonl", changed), 2)
        return str(caught.value)

    assert "has 1 picture of each prompt: give --samples 1" in refusal(rows[::2])
    more = {**rows[0], "filename": "00000/samples/0002.png"}
    assert "is of another set" in refusal([*rows, more])  # of one prompt only
    assert "lacks 1 of 14 pictures, first 00006/0001" in refusal(rows[:-1])
    assert "has a picture more than once: 00000/0000" in refusal([*rows, rows[0]])
    other = {"filename": "00099/samples/0000.png", "detections": []}
    assert "is of another set: it has the picture 00099/0000" in refusal([*rows, other])
    assert "its prompt is 一只鸟" in refusal([{**rows[0], "prompt": "一只鸟"}, *rows[1:]])
    colourless = {**rows[6], "detections": [detection("bus")]}
    assert 'a detection of "bus" has no color, which is asked for' in refusal([*rows[:6], colourless, *rows[7:]])
    assert "expected detections as" in refusal([{**rows[0], "detections": [{"class": "bench"}]}, *rows[1:]])
    assert "expected correct (true or false) or detections" in refusal([{"filename": rows[0]["filename"]}, *rows[1:]])


def test_objects_by_class_keeps_the_sixteen_most_confident():
    found = objects_by_class([detection("cat", 0.4 + n / 100) for n in range(20)], 0.3)
    assert [each["score"] for each in found["cat"]] == [pytest.approx(0.59 - n / 100) for n in range(16)]


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        ((20, 0, 30, 10), {"right of"}),
        ((-30, 0, -20, 10), {"left of"}),
        ((0, -30, 10, -20), {"above"}),
        ((20, 20, 30, 30), {"right of", "below"}),  # (18, 18) / |(20, 20)| = 0.64 each
        ((1, 1, 11, 11), set()),  # within 0.1 of the sizes
        ((3, 0, 13, 10), set()),  # (3 - 2) / 3 = 0.33, not above 0.5
        ((4, 0, 14, 10), set()),  # (4 - 2) / 4 = 0.5
        ((5, 0, 15, 10), {"right of"}),
    ],
)
def test_relations_follow_offset_and_sizes(box, expected):
    assert relations(box, (0, 0, 10, 10)) == expected


DPG_TABLE = """item_id,text,keywords,proposition_id,dependency,tuple,question_natural_language
a,一只戴帽子的红狐狸,,1,0,entity - whole (fox),Is there a fox?
a,一只戴帽子的红狐狸,,2,1,attribute - color (red),Is the fox red?
a,一只戴帽子的红狐狸,,3,1,entity - part (hat),Does the fox wear a hat?
a,一只戴帽子的红狐狸,,4,"1,3",attribute - color (hat),Is the hat blue?
b,两只狗,,1,0,entity - whole (dog),Are there dogs?
b,两只狗,,2,1,other - count (two),Are there two dogs?
"""


def dpg_rows():
    answers = {
        ("a", 0): "yes yes yes no",
        ("a", 1): "yes no no yes",  # the hat is missing: its colour counts 0
        ("b", 0): "yes yes",
        ("b", 1): "no yes",
    }
    return [
        {"item_id": item, "picture": picture, "question": number, "answer": answer}
        for (item, picture), text in answers.items()
        for number, answer in enumerate(text.split(), start=1)
    ]


def test_dpg_scores_answers_by_hand(tmp_path):
    """a: 3/4 and 1/4; b: 2/2 and 0/2: the score is (0.5 + 0.5) / 2.

    Categories count all answers: entity 4 of 6, attribute 2 of 4 and other 2 of 2.
    """
    (tmp_path / "dpg.csv").write_text(DPG_TABLE, encoding="utf-8")
    items = BENCHMARKS["dpg"].read_items(tmp_path / "dpg.csv", subset=True)
    score = BENCHMARKS["dpg"].score(items, write_lines(tmp_path / "answers.jsonl", dpg_rows()), 2)
    assert values_of(score) == {"dpg": 0.5, "attribute": 0.5, "entity": round(4 / 6, 6), "other": 1.0}
    assert score.ids == ["a", "b"]
    with pytest.raises(InputError, match="lacks 1 of 12 answers, first b/1/2"):
        BENCHMARKS["dpg"].score(items, write_lines(tmp_path / "answers.jsonl", dpg_rows()[:-1]), 2)
    maybe = [{**dpg_rows()[0], "answer": "maybe"}, *dpg_rows()[1:]]
    with pytest.raises(InputError, match="line 1: expected yes or no as answer, got maybe"):
        BENCHMARKS["dpg"].score(items, write_lines(tmp_path / "answers.jsonl", maybe), 2)


def test_counted_passes_a_no_on_to_descendants_where_it_cascades():
    answers, parents = {1: False, 2: True, 3: True, 4: True}, {1: [], 2: [1], 3: [2], 4: []}
    assert counted(answers, parents, cascade=True) == {1: 0, 2: 0, 3: 0, 4: 1}
    assert counted(answers, parents, cascade=False) == {1: 0, 2: 0, 3: 1, 4: 1}  # as OneIG-Bench does


@pytest.fixture
def oneig(tmp_path):
    """Return a small folder of OneIG-Bench-ZH, and its prompts."""
    folder = tmp_path / "oneig"
    (folder / "scripts/alignment/Q_D").mkdir(parents=True)
    (folder / "scripts/text").mkdir()
    (folder / "OneIG-Bench-ZH.csv").write_text(
        "category,id,prompt_cn,class\n"
        "Anime_Stylization,000,水彩画风格的猫,watercolor\n"
        "General_Object,000,桌子上的红苹果,\n"
        "Text_Rendering,000,写着“你好，世界”的海报,\n"
        "Knowledge_Reasoning,000,水的分子结构,\n",
        encoding="utf-8",
    )
    graphs = {"anime": {"1": [0], "2": [1], "3": [2]}, "object": {"1": [0], "2": [1]}}
    for name in ("anime", "human", "object", "multilingualism"):
        graph = graphs.get(name)
        item = {"question": "{}", "dependency": json.dumps(graph)}
        content = {"000": item} if graph else {}
        (folder / f"scripts/alignment/Q_D/{name}_zh.json").write_text(json.dumps(content), encoding="utf-8")
    (folder / "scripts/text/text_content_zh.csv").write_text(
        ",id,prompt_cn,text_content\n0,000,海报,\"['你好，世界']\"\n", encoding="utf-8"
    )
    return folder, BENCHMARKS["oneig-zh"].read_items(folder, subset=True)


def test_oneig_scores_answers_by_hand(oneig, tmp_path):
    """Alignment: anime answers no, yes, yes count 0, 0, 1 and yes, yes, no 1, 1, 0; object yes, no and yes, yes.

    Text 你好世界: 你好世界 is complete, 世好 has 3 edits and 2 of 4 characters: distance 1.5, complete 1/2, words 6/8.
    """
    _, items = oneig
    answers = tmp_path / "answers"
    answers.mkdir()
    given = {("anime/000", 0): "no yes yes", ("anime/000", 1): "yes yes no"}
    given |= {("object/000", 0): "yes no", ("object/000", 1): "yes yes"}
    rows = [
        {"item_id": item, "picture": picture, "question": number, "answer": answer}
        for (item, picture), text in given.items()
        for number, answer in enumerate(text.split(), start=1)
    ]
    write_lines(answers / "alignment.jsonl", rows)
    read = ["你好，世界！", "世好"]
    write_lines(answers / "text.jsonl", [{"item_id": "text/000", "picture": n, "text": t} for n, t in enumerate(read)])
    write_lines(answers / "style.jsonl", [{"item_id": "anime/000", "score": 0.4}])
    write_lines(answers / "reasoning.jsonl", [{"item_id": "reasoning/000", "score": 0.3}])
    diversity = [{"item_id": item.id, "score": n / 10} for n, item in enumerate(items)]
    write_lines(answers / "diversity.jsonl", diversity)
    found = values_of(BENCHMARKS["oneig-zh"].score(items, answers, 2))
    distance, complete, words = 1.5, 0.5, 6 / 8
    assert found == {
        "alignment": 0.625,
        "alignment/anime": 0.5,
        "alignment/object": 0.75,
        "text": round(1 - distance * (1 - complete) * (1 - words) / 50, 6),
        "text/edit_distance": distance,
        "text/complete": complete,
        "text/words": words,
        "reasoning": 0.3,
        "style": 0.4,
        "diversity": 0.15,
    }


def test_oneig_needs_the_folder_of_the_benchmark_to_score(oneig, tmp_path):
    folder, _ = oneig
    items = BENCHMARKS["oneig-zh"].read_items(folder / "OneIG-Bench-ZH.csv", subset=True)
    with pytest.raises(InputError, match="holds no answers; expected one of alignment"):
        BENCHMARKS["oneig-zh"].score(items, tmp_path, 2)
    write_lines(tmp_path / "alignment.jsonl", [{"item_id": "anime/000", "picture": 0, "question": 1, "answer": "yes"}])
    with pytest.raises(InputError, match="the questions and texts of anime/000 are missing; give the folder"):
        BENCHMARKS["oneig-zh"].score(items, tmp_path, 2)


@pytest.mark.parametrize(
    ("read", "expected", "distance", "right", "of"),
    [
        ("你好 世界\n", "['你好，世界']", 0, 4, 4),
        ("No text recognized.", "['你好']", 2, 0, 2),
        ("open the  door", "['Open the door']", 1, 2, 3),
    ],
)
def test_compare_text_counts_edits_and_characters_or_words(read, expected, distance, right, of):
    found = compare_text(read, expected)
    assert (found["distance"], found["right"], found["of"]) == (distance, right, of)
    assert clean_text("5G，技术 a b") == "5G技术ab"


def test_chinese_word_weighs_levels_by_their_sizes():
    levels = {"1": [0.9729] * 3500, "2": [0.4053] * 3000, "3": [0.0648] * 1605}
    weights = {level: float(count) for level, count in LEVELS.items()}
    assert round(100 * mean_of_groups(levels, weights=weights)["value"], 2) == 58.30


def test_chinese_word_scores_read_characters(tmp_path):
    """Level 1: one of two, level 2: none, level 3: one of one; total (0.5 * 3500 + 1605) / 8105."""
    table = "level\ttext\tprompt\n1\t一\t写着“一”的图\n1\t猫\t写着“猫”的图\n2\t铧\t写着“铧”的图\n3\t鿍\t写着“鿍”的图\n"
    (tmp_path / "p.tsv").write_text(table, encoding="utf-8")
    items = BENCHMARKS["chinese-word"].read_items(tmp_path / "p.tsv", subset=True)
    read = {"1/U+4E00-0.png": "一。", "1/U+732B-0.png": "猫猫", "2/U+94E7-0.png": "", "3/U+9FCD-0.png": "鿍"}
    rows = [{"picture": f"out/pictures/{name}", "text": text} for name, text in read.items()]
    score = BENCHMARKS["chinese-word"].score(items, write_lines(tmp_path / "a.jsonl", rows), 1)
    total = round((0.5 * 3500 + 1605) / 8105, 6)
    assert values_of(score) == {"overall": total, "level_1": 0.5, "level_2": 0.0, "level_3": 1.0}


def test_gedit_averages_geometric_means_by_task(tmp_path):
    """color_alter sqrt(4 * 9) = 6 and sqrt(0 * 9) = 0, mean 3; text_change sqrt(9 * 9) = 9; overall 6."""
    names = [("a", "color_alter"), ("b", "color_alter"), ("c", "text_change")]
    prompts = [
        {"key": key, "task_type": task, "instruction": "把帽子变成红色", "instruction_language": "cn"}
        for key, task in names
    ]
    items = BENCHMARKS["gedit"].read_items(write_lines(tmp_path / "p.jsonl", prompts), subset=True)
    grades = [("a", 4, 9), ("b", 0, 9), ("c", 9, 9)]
    rows = [{"key": key, "semantics": semantics, "quality": quality} for key, semantics, quality in grades]
    score = BENCHMARKS["gedit"].score(items, write_lines(tmp_path / "a.jsonl", rows), 1)
    expected = {"overall": 6.0, "semantics": 5.5, "quality": 9.0, "color_alter": 3.0, "text_change": 9.0}
    assert values_of(score) == expected
    bad = [{**rows[0], "quality": 11}, *rows[1:]]
    with pytest.raises(InputError, match=r"expected 2 grades in \[0, 10\] as semantics, quality"):
        BENCHMARKS["gedit"].score(items, write_lines(tmp_path / "a.jsonl", bad), 1)


def test_imgedit_averages_grades_by_picture_and_by_type(tmp_path):
    """Means 2, 4 and 5; over pictures 11/3, over types (3 + 5) / 2."""
    edits = {
        key: {"id": f"{key}.jpg", "prompt": "换成雪山", "edit_type": kind}
        for key, kind in zip("123", "aab", strict=True)
    }
    for edit in edits.values():
        edit["edit_type"] = {"a": "add", "b": "style"}[edit["edit_type"]]
    (tmp_path / "p.json").write_text(json.dumps(edits), encoding="utf-8")
    items = BENCHMARKS["imgedit"].read_items(tmp_path / "p.json", subset=True)
    rows = [{"key": "1", "grades": [1, 2, 3]}, {"key": "2", "grades": [4, 4, 4]}, {"key": "3", "grades": [5, 5, 5]}]
    score = BENCHMARKS["imgedit"].score(items, write_lines(tmp_path / "a.jsonl", rows), 1)
    assert values_of(score) == {"overall": round(11 / 3, 6), "mean_of_types": 4.0, "add": 3.0, "style": 5.0}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([*GENEVAL_PROMPTS, GENEVAL_PROMPTS[0]], "has a prompt 2 times, expected each once: 一张长椅"),
        ([{**GENEVAL_PROMPTS[0], "prompt": " "}], 'the prompt of "00000" is empty'),
        ([{**GENEVAL_PROMPTS[0], "tag": "texture"}], '"texture" is no part of GenEval; expected single_object'),
        ([{"tag": "colors", "prompt": "猫"}], "line 1: include is missing"),
        ([{**GENEVAL_PROMPTS[0], "include": [{"count": 1}]}], "include must be a list of objects with class and count"),
        (
            [{**GENEVAL_PROMPTS[4], "include": GENEVAL_PROMPTS[4]["include"][1:]}],
            "a position refers to object 0, which does not stand before it",
        ),
    ],
)
def test_read_items_refuses_bad_prompts(tmp_path, lines, message):
    with pytest.raises(InputError) as caught:
        BENCHMARKS["geneval"].read_items(write_lines(tmp_path / "p.jsonl", lines), subset=True)
    assert message in str(caught.value)


def test_read_items_refuses_a_part_unless_it_is_asked_for(tmp_path):
    path = write_lines(tmp_path / "p.jsonl", GENEVAL_PROMPTS)
    with pytest.raises(InputError, match=r"2 prompts of .single_object., GenEval has 80; .* --subset accepts it"):
        BENCHMARKS["geneval"].read_items(path, subset=False)
    (tmp_path / "dpg.csv").write_text(DPG_TABLE, encoding="utf-8")
    with pytest.raises(InputError, match="has 2 prompts of all, DPG-Bench has 1065"):
        BENCHMARKS["dpg"].read_items(tmp_path / "dpg.csv", subset=False)
    (tmp_path / "dpg.csv").write_text(DPG_TABLE.replace("\na,", "\n../a,"), encoding="utf-8")
    with pytest.raises(InputError, match=r"the id .\.\./a. cannot name a file"):
        BENCHMARKS["dpg"].read_items(tmp_path / "dpg.csv", subset=True)
