"""Messages and help in Chinese: templates, joints, streams, the choice of the language, and wrapping."""

from __future__ import annotations

import importlib.util
import io
import sys
from pathlib import Path

import polib
import pytest

from cogview.cli import translation
from cogview.cli.main import main
from cogview.cli.translation import (
    Catalogue,
    TranslatedStream,
    language_of,
    load_catalogue,
    take_language,
    translated,
    wrap_columns,
)
from cogview.errors import InputError
from cogview.formatting import display_width

CATALOGUE = Catalogue(
    {
        "cannot read {path}: {error}": "无法读取 {path}：{error}",
        "{path} is {what}": "{path} 是 {what}",
        "cannot read the {what}": "无法读取{what}",
        "cannot read the file {path}": "无法读取文件 {path}",
        "No such file or directory": "没有这个文件或目录",
        "{count} images": "{count} 张图片",
        "the prompt is empty": "提示为空",
        "note": "提示",
        "; see {command} --help": "；用法见 {command} --help",
    }
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("the prompt is empty", "提示为空"),
        ("  the prompt is empty\n", "  提示为空\n"),
        ("cannot read a.txt: No such file or directory", "无法读取 a.txt：没有这个文件或目录"),
        ("cannot read a{b}.txt: odd", "无法读取 a{b}.txt：odd"),
        ("note: cannot read a: b: No such file or directory", "提示：无法读取 a：b: 没有这个文件或目录"),
        ("16 images; the prompt is empty", "16 张图片；提示为空"),
        ("cogview caption: the prompt is empty", "cogview caption: 提示为空"),
        ("nothing of this is known: at all", "nothing of this is known: at all"),
        ("", ""),
        ("\n", "\n"),
        ("  3,  4.5", "  3,  4.5"),
    ],
)
def test_translate_matches_templates_and_parts(text, expected):
    assert CATALOGUE.translate(text) == expected


def test_translate_prefers_the_template_with_more_literal_text():
    """Two templates match; the one with more words is the one that made the message."""
    assert CATALOGUE.translate("cannot read the file x") == "无法读取文件 x"
    assert CATALOGUE.translate("cannot read the page") == "无法读取page"


def test_translate_ignores_a_template_of_a_single_word():
    """Every English sentence would match it."""
    assert CATALOGUE.translate("this sentence is unknown") == "this sentence is unknown"


@pytest.mark.parametrize("text", ["images of a prompt", "many images"])
def test_translate_counts_with_digits_only(text):
    assert CATALOGUE.translate(text) == text


def test_translate_keeps_the_frame_of_a_command():
    framed = "cogview adapter merge: cannot read a.txt: the prompt is empty; see cogview adapter merge --help"
    assert CATALOGUE.translate(framed) == (
        "cogview adapter merge: 无法读取 a.txt：提示为空；用法见 cogview adapter merge --help"
    )


def test_translate_keeps_the_prompt_of_a_note_and_translates_its_parts():
    """Prompts hold any text: a template must not match across the end of one."""
    catalogue = load_catalogue("zh")
    assert catalogue is not None
    text = "note: “六个“大”猫”: 大 is not understood: all things have one size; the model counts to 4 (一、四), not 六"
    expected = "提示：“六个“大”猫”：模型不懂“大”：所有物体都一样大；模型最多数到 4（一、四），画不了“六”"
    assert catalogue.translate(text) == expected


def test_translated_stream_leaves_progress_bars_alone():
    stream = io.StringIO()
    print("the prompt is empty", file=TranslatedStream(stream, CATALOGUE))
    print("\rthe prompt is empty", file=TranslatedStream(stream, CATALOGUE))
    assert stream.getvalue() == "提示为空\n\rthe prompt is empty\n"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["generate", "猫"], (None, ["generate", "猫"])),
        (["--language", "zh", "generate", "猫"], ("zh", ["generate", "猫"])),
        (["generate", "猫", "--language=en"], ("en", ["generate", "猫"])),
        (["generate", "--", "--language", "zh"], (None, ["generate", "--", "--language", "zh"])),
    ],
)
def test_take_language_finds_the_option_anywhere_before_the_dashes(arguments, expected):
    assert take_language(arguments) == expected


@pytest.mark.parametrize("arguments", [["--language", "fr"], ["models", "--language"], ["--language="]])
def test_take_language_refuses_an_unknown_language(arguments):
    with pytest.raises(InputError, match=r'--language is ".*"; expected one of en, zh'):
        take_language(arguments)


@pytest.mark.parametrize(
    ("environment", "language"),
    [
        ({}, "en"),
        ({"LANG": "C.UTF-8"}, "en"),
        ({"LANG": "zh_CN.UTF-8"}, "zh"),
        ({"LANG": "zh_CN.UTF-8", "LC_ALL": "C"}, "en"),
        ({"LANG": "de_DE.UTF-8", "LC_MESSAGES": "zh_TW.UTF-8"}, "zh"),
        ({"LANG": "zh_CN.UTF-8", "LANGUAGE": "en:zh"}, "en"),
        ({"LANG": "zh_CN.UTF-8", "COGVIEW_LANGUAGE": "en"}, "en"),
    ],
)
def test_language_of_follows_the_locale(environment, language):
    assert language_of(environment) == language


def test_main_refuses_an_unknown_language_of_the_variable(monkeypatch, capsys):
    """A misspelled language was English without a word, whereas ``--language`` names the mistake."""
    monkeypatch.setenv("COGVIEW_LANGUAGE", "cn")
    assert main(["recipes"]) == 2
    assert capsys.readouterr() == ("", 'cogview recipes: COGVIEW_LANGUAGE is "cn"; expected one of en, zh\n')
    monkeypatch.setenv("COGVIEW_LANGUAGE", "zh_CN")
    assert main(["recipes"]) == 0


@pytest.mark.parametrize(
    ("text", "translation"),
    [
        ("skipped: line 3: image fox.png does not exist", "已跳过：第 3 行：图像 fox.png 不存在"),
        ("  1.     -1.74 (-0.58 per piece)  fox.png\n", "  1.     -1.74（每个词元 -0.58）  fox.png\n"),
        ("model fox on cpu, float32 (no GPU is used)", "模型 fox，运行于 cpu, float32（没有使用 GPU）"),
        ("the line of a poem: fox", "the line of a poem: fox"),
    ],
)
def test_translate_knows_short_messages_by_a_number(text, translation):
    """One word beside a field was thought to be too little to know a message by: these stayed English."""
    catalogue = load_catalogue("zh")
    assert catalogue is not None
    assert catalogue.translate(text) == translation


BOXES = '[{"text": "狐狸", "box": [x, y, width, height]}, …]'


@pytest.mark.parametrize(
    ("text", "translation"),
    [
        (
            "section image of a.yaml: num_codes must be at most 65536, which token stores hold, got 70000",
            "a.yaml 的 image 一节：num_codes 至多为 65536（词元数据集的上限），实际为 70000",
        ),
        (
            "cogview train-image: section image of a.yaml, model: downsampling must be 4, 8 or 16, got 3",
            "cogview train-image: a.yaml 的 image 一节，model：downsampling 必须是 4、8 或 16，实际为 3",
        ),
        (
            "section image of a.yaml: scales must be in [1, 16], got [0]",
            "a.yaml 的 image 一节：scales 必须在 [1, 16] 之间，实际为 [0]",
        ),
        (
            "section image of a.yaml: train: decoder needs init_from, the image tokenizer whose encoder and codebook "
            "are kept",
            "a.yaml 的 image 一节：train: decoder 需要 init_from，即保留其编码器和码本的图像分词器",
        ),
        (
            "section image of a.yaml, model: channels must have 3 entries for a downsampling of 8, one for each "
            "halving of the sides, got [8, 8]",
            "a.yaml 的 image 一节，model：8 倍下采样时 channels 必须有 3 项，边长每减半一次对应一项，实际为 [8, 8]",
        ),
        (
            'section image of a.yaml, fit: expected one of crop, pad, stretch, got "fill"',
            'a.yaml 的 image 一节，fit：应为 crop, pad, stretch 之一，实际为 "fill"',
        ),
        (
            'section image of a.yaml: "sidee" is unknown; did you mean "side"?',
            "a.yaml 的 image 一节：“sidee”未知；是否想写“side”？",
        ),
        (
            "section package of a.yaml, licence: expected text, got 3",
            "a.yaml 的 package 一节，licence：应为文本，实际为 3",
        ),
        (
            "images of 30 pixels do not divide into codes of 8 x 8 pixels; the nearest sides that fit: 24 and 32",
            "30 像素的图像不能划分为 8 x 8 像素的编码；最接近的合适边长：24 和 32",
        ),
        ('the target "foo" is unknown; known: query, key', "目标“foo”未知；已知的有：query, key"),
        (
            "warning: none of 23 pictures fell into the held-out share of 0.05: there is no held-out store; a larger "
            "share is --held-out 0.2",
            "警告：23 张图片中没有一张落入 0.05 的留出比例：没有留出存储；更大的比例如 --held-out 0.2",
        ),
        (
            f"a.png: its boxes are left out, they are not JSON (odd); expected {BOXES} in pixels",
            f"a.png: 它的方框未采用，因为不是 JSON（odd）；应为 {BOXES}，以像素计",
        ),
        ("trained on 20 captions", "用于训练：20 条描述"),
        (
            "the settings of step train have changed: training.steps 6 -> 9, seed 1 -> 3 and 4 more",
            "步骤 train 的设置已更改：training.steps 6 -> 9, seed 1 -> 3，以及另外 4 个",
        ),
        (
            "section text of a.yaml, pictures: expected a list of paths, got 3",
            "a.yaml 的 text 一节，pictures：应为路径的列表，实际为 3",
        ),
        (
            "step 1 of 6, train-text: cogview train-text a.yaml --work w",
            "共 6 步，第 1 步，train-text：cogview train-text a.yaml --work w",
        ),
        (
            "cogview train: a.yaml, line 3: mapping values are not allowed here",
            "cogview train: a.yaml 第 3 行：此处不能出现键值（是否多了冒号，或缩进不对？）",
        ),
        ("cogview run: cannot read the recipe w: it is a folder", "cogview run: 无法读取配方 w：这是文件夹"),
        (
            "warning: “二只狐狸”: 30% of its characters are unknown to the model",
            "警告：“二只狐狸”：其中 30% 的字符模型不认识",
        ),
        ("trained on 20 captions, a random part of 40", "用于训练：20 条描述，从 40 条中随机选出"),
    ],
)
def test_translate_gives_whole_sentences(text, translation):
    """A general template took the place of a mistake, or its head, for a part of the sentence and scrambled it."""
    catalogue = load_catalogue("zh")
    assert catalogue is not None
    assert catalogue.translate(text) == translation


def test_wrap_columns_counts_two_columns_for_a_chinese_character():
    text = "写入 PNG 文件，文本块中有提示、种子、编号、模型、设置和图像码。"
    lines = wrap_columns(text, 20)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    assert max(map(display_width, lines)) <= 20
    assert not any(line[0] in "，。、" for line in lines)


def test_wrap_columns_keeps_brackets_beside_their_words():
    """The default stood at the end of a line as "[", and "]" began the next line."""
    text = "采样温度；越低越固定 [默认：由模型设定] 描述（见上文）"
    for width in range(14, 40):
        lines = wrap_columns(text, width)
        assert "".join(lines).replace(" ", "") == text.replace(" ", "")
        assert not any(line[-1] in "[（" or line[0] in "]）" for line in lines)


def test_translated_restores_the_stream_when_a_command_fails(monkeypatch):
    monkeypatch.setattr(translation, "load_catalogue", lambda language: CATALOGUE)
    before = sys.stderr
    with pytest.raises(RuntimeError), translated("zh"):
        raise RuntimeError
    assert sys.stderr is before


def test_main_refuses_an_unknown_language_in_one_line(capsys):
    assert main(["models", "--language", "fr"]) == 2
    assert capsys.readouterr().err == 'cogview: --language is "fr"; expected one of en, zh\n'


def test_catalogue_translates_every_message_with_its_fields():
    """Remedy: python scripts/update_catalogue.py, then fill the empty entries of cogview/locale/zh.po."""
    spec = importlib.util.spec_from_file_location(
        "update_catalogue", Path(__file__).parents[2] / "scripts" / "update_catalogue.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    entries = {entry.msgid: entry.msgstr for entry in polib.pofile(str(translation.FOLDER / "zh.po"))}
    assert list(entries) == module.collect()
    assert [text for text, translated in entries.items() if not translated] == []
    fields = translation.FIELD.findall
    assert [text for text, translated in entries.items() if sorted(fields(text)) != sorted(fields(translated))] == []


def test_main_prints_messages_and_help_in_chinese(capsys):
    assert main(["caption", "没有.png", "--language", "zh"]) == 2
    assert capsys.readouterr().err.endswith("cogview caption: 图像 没有.png 不存在\n")
    assert main(["--language", "zh", "generate", "--help"]) == 0
    page = capsys.readouterr().out
    assert page.startswith("用法：cogview generate")
    assert "从文本生成图像，并打印 PNG 文件的路径。" in page


def test_main_survives_a_closed_stderr_in_chinese(monkeypatch, capsys):
    """A service may start without stderr; its missing stream used to be translated."""
    monkeypatch.setattr(sys, "stderr", None)
    assert main(["caption", "没有.png", "--language", "zh"]) == 2
    assert capsys.readouterr().out == ""
