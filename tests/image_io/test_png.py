"""PNG files: names valid on every system, text chunks that are read back, no other image overwritten."""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields

import pytest
from PIL import Image

from cogview.errors import InputError
from cogview.image_io import png
from cogview.image_io.png import (
    NAME_BYTES,
    prepare_folder,
    prepared_folder,
    read_metadata,
    safe_name,
    save_png,
    sheet_metadata,
)
from cogview.modeling.config import Sampling
from cogview.pipeline.results import Score


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("蓝色背景上的三只狐狸", "蓝色背景上的三只狐狸"),
        ("一只狐狸，在左边！", "一只狐狸，在左边！"),
        ("../../etc/passwd", "etc_passwd"),
        ('a<b>c:d"e\\f|g?h*i', "a_b_c_d_e_f_g_h_i"),
        ("两 行\n和\t制表\0", "两_行_和_制表"),
        ("-rf ~", "rf_~"),
        (".隐藏", "隐藏"),
        ("句点...", "句点"),
        ("con", "_con"),
        ("NUL.txt", "_NUL.txt"),
        ("console", "console"),
        ("\u202e倒写", "倒写"),  # would turn the rest of the line around in a terminal
        ("e\u0301", "\u00e9"),  # one spelling, as macOS has it
        ("\udcbb坏", "坏"),  # bytes that were no UTF-8
        ("???", "_"),
        ("", "_"),
    ],
)
def test_safe_name_is_valid_on_every_system(text, name):
    assert safe_name(text) == name


@pytest.mark.parametrize("text", ["长" * 500, "🦊" * 500, "a" + "长" * 500, "x" * 500])
def test_safe_name_cuts_between_characters(text):
    name = safe_name(text)
    assert text.startswith(name)
    assert NAME_BYTES - 4 < len(name.encode()) <= NAME_BYTES


def image(value=0):
    return Image.new("RGB", (8, 8), (value, value, value))


def test_read_metadata_returns_text_chunks(tmp_path):
    texts = {"prompt": "一只🦊：“狐狸”\n第二行", "seed": "7", "codes": "1 2 3"}
    path = save_png(tmp_path / "a.png", image(), texts)
    found = read_metadata(path)
    assert found.pop("parameters").startswith("一只🦊：“狐狸”\n第二行\nSteps: 3, Sampler: cogview, ")
    assert found == texts


def test_save_png_overwrites_same_image_only(tmp_path):
    path = tmp_path / "a.png"
    texts = {"prompt": "狐狸", "codes": "1 2 3", "log_probability": "-1.5", "cogview": "0.1.0"}
    assert save_png(path, image(1), texts) == path
    assert save_png(path, image(2), {**texts, "log_probability": "-1.50001", "cogview": "0.2.0"}) == path
    assert read_metadata(path)["cogview"] == "0.2.0"
    other, third = {**texts, "prompt": "狗"}, {**texts, "codes": "1 2 4"}
    assert save_png(path, image(3), other) == tmp_path / "a_2.png"
    assert save_png(path, image(4), third) == tmp_path / "a_3.png"
    assert save_png(path, image(5), other) == tmp_path / "a_2.png"
    assert [Image.open(tmp_path / name).getpixel((0, 0))[0] for name in ("a.png", "a_2.png", "a_3.png")] == [2, 5, 4]
    assert sorted(os.listdir(tmp_path)) == ["a.png", "a_2.png", "a_3.png"]


def test_save_png_passes_over_a_link_that_leads_nowhere(tmp_path):
    """Its name is neither free nor that of an image: the writer waited for ever."""
    path = tmp_path / "a.png"
    path.symlink_to(tmp_path / "gone" / "a.png")
    assert save_png(path, image(), {"prompt": "狐狸"}) == tmp_path / "a_2.png"
    assert path.is_symlink()


def test_save_png_recognizes_images_of_older_versions(tmp_path):
    """They were drawn without guidance and without weights on the text, and did not say so."""
    path = tmp_path / "a.png"
    old = {"prompt": "狐狸", "codes": "1 2 3", "top_p": "1.0"}
    assert save_png(path, image(1), old) == path
    assert save_png(path, image(2), {**old, "guidance": "3.0", "text_attention": "1.0"}) == tmp_path / "a_2.png"
    assert save_png(path, image(3), {**old, "guidance": "1.0", "text_attention": "1.5"}) == tmp_path / "a_3.png"
    now = {**old, "guidance": "1.0", "text_attention": "1.0"}
    assert save_png(path, image(4), now) == path
    assert save_png(path, image(5), {**now, "score": "-2.5", "score_per_piece": "-0.5"}) == path  # no other picture
    assert read_metadata(path)["score"] == "-2.5"


@pytest.mark.parametrize("content", [b"", b"notes of mine", b"\x89PNG\r\n\x1a\n broken"])
def test_save_png_keeps_files_of_other_origin(tmp_path, content):
    (tmp_path / "a.png").write_bytes(content)
    assert save_png(tmp_path / "a.png", image(), {"prompt": "狐狸"}) == tmp_path / "a_2.png"
    assert (tmp_path / "a.png").read_bytes() == content


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_write_png_is_atomic_when_interrupted(tmp_path, monkeypatch, error):
    path = save_png(tmp_path / "a.png", image(1), {"prompt": "狐狸"})

    def half_written(self, file, **_):
        file.write_bytes(b"\x89PNG")
        raise error

    monkeypatch.setattr(Image.Image, "save", half_written)
    with pytest.raises(BaseException) as caught:  # noqa: PT011  KeyboardInterrupt is no Exception
        save_png(path, image(2), {"prompt": "狐狸"})
    assert caught.type in (KeyboardInterrupt, OSError)
    assert os.listdir(tmp_path) == ["a.png"]
    assert Image.open(path).getpixel((0, 0)) == (1, 1, 1)


@pytest.mark.parametrize("with_links", [True, False])
def test_save_png_gives_each_of_several_writers_a_name(tmp_path, monkeypatch, with_links):
    """Two commands that saved one name at once left one image, or failed on the temporary file of the other."""
    if not with_links:

        def refuse(*_):
            raise PermissionError(1, "Operation not permitted")  # a file system without links

        monkeypatch.setattr(os, "link", refuse)
    with ThreadPoolExecutor(8) as pool:
        paths = list(
            pool.map(lambda i: save_png(tmp_path / "a.png", image(i), {"prompt": "狐狸", "top_k": str(i)}), range(24))
        )
    assert len(set(paths)) == 24
    assert sorted(os.listdir(tmp_path)) == sorted(path.name for path in paths)
    assert [read_metadata(path)["top_k"] for path in paths] == [str(i) for i in range(24)]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_save_png_passes_over_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    assert save_png(tmp_path / "a.png", image(), {"prompt": "狐狸"}) == tmp_path / "a_2.png"


def test_prepare_folder_leaves_folder_empty(tmp_path):
    prepare_folder(tmp_path / "新" / "文件夹")
    assert os.listdir(tmp_path / "新" / "文件夹") == []


def test_prepare_folder_refuses_unwritable_folder(tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(InputError, match=r"output folder .*file cannot be written: it is a file; choose another"):
        prepare_folder(file)
    with pytest.raises(InputError, match="cannot be written: Not a directory"):
        prepare_folder(file / "below")

    def denied(self, *_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.touch", denied)  # root may write anywhere
    with pytest.raises(InputError, match="cannot be written: Permission denied"):
        prepare_folder(tmp_path)


def test_sheet_metadata_lists_prompts_and_hashes_codes(tiny_model):
    first, second = (
        [picture.metadata("tiny") for picture in tiny_model.generate(["一只狐狸", "两只狗"], n=2, seed=seed)]
        for seed in (1, 2)
    )
    assert sheet_metadata(first)["prompt"] == "一只狐狸\n两只狗"
    assert sheet_metadata(first)["seed"] == "1"
    assert sheet_metadata(first)["codes_sha256"] != sheet_metadata(second)["codes_sha256"]


def test_metadata_has_settings_and_scores(tiny_model):
    first, second = tiny_model.generate("一只狐狸", n=2, seed=1, guidance=2.5, text_attention=1.5)
    texts = first.metadata("tiny")
    assert (texts["guidance"], texts["text_attention"]) == ("2.5", "1.5")
    assert "score" not in texts
    first.score = Score(log_probability=-6.0, num_pieces=4)
    scored = first.metadata("tiny")
    assert (scored["score"], scored["score_per_piece"]) == ("-6.0", "-1.5")
    sheet = sheet_metadata([scored, second.metadata("tiny")])
    assert (sheet["guidance"], sheet["text_attention"]) == ("2.5", "1.5")
    assert "score" not in sheet  # not all have one
    second.score = Score(log_probability=-8.0, num_pieces=4)
    sheet = sheet_metadata([scored, second.metadata("tiny")])
    assert (sheet["score"], sheet["score_per_piece"]) == ("-6.0 -8.0", "-1.5 -2.0")


def test_sampling_keys_are_fields_of_sampling():
    """Metadata of a sheet name every sampling setting."""
    assert tuple(setting.name for setting in fields(Sampling)) == png.SAMPLING_KEYS


def test_prepared_folder_removes_the_folders_it_made_when_the_block_fails(tmp_path):
    with pytest.raises(InputError), prepared_folder(tmp_path / "a" / "b"):
        raise InputError("no such model")
    assert not list(tmp_path.iterdir())


def test_prepared_folder_keeps_what_was_there_and_what_was_written(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError), prepared_folder(tmp_path / "empty"):
        raise InputError("no such model")

    def write_and_fail():
        (tmp_path / "new" / "deep" / "a.png").touch()
        raise InputError("no such model")

    with pytest.raises(InputError), prepared_folder(tmp_path / "new" / "deep"):
        write_and_fail()
    with prepared_folder(tmp_path / "done"):
        pass
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == [
        "done",
        "empty",
        "new",
        "new/deep",
        "new/deep/a.png",
    ]
