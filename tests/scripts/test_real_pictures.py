"""Collect pictures from folders like those of the packages: stamps, a Qt resource, and a Qt translation."""

import csv
import io
import json
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

GLOSSES = {"gorilla.ogg": "大猩猩", "cherry.ogg": "樱桃", "empty.ogg": ""}


def picture(mode="RGB", size=(40, 30), suffix="webp"):
    """Return the bytes of a picture of noise."""
    channels = len(mode)
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], channels), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise, mode).save(file, suffix)
    return file.getvalue()


def qt_resource(files):
    """Return a Qt binary resource of version 1 with the files {(folder, name): (content, is_compressed)}."""
    names, data, nodes = b"", b"", [None]
    folders = {}
    for (folder, name), (content, is_compressed) in files.items():
        folders.setdefault(folder, []).append((name, content, is_compressed))

    def name_at(text):
        nonlocal names
        offset, names = len(names), names + struct.pack(">HI", len(text), 0) + text.encode("utf-16-be")
        return offset

    first_file = 1 + len(folders)
    leaves = []
    for folder, entries in folders.items():
        nodes.append(struct.pack(">IHII", name_at(folder), 2, len(entries), first_file + len(leaves)))
        for name, content, is_compressed in entries:
            stored = struct.pack(">I", len(content)) + zlib.compress(content) if is_compressed else content
            leaves.append(struct.pack(">IHII", name_at(name), int(is_compressed), 0, len(data)))
            data += struct.pack(">I", len(stored)) + stored
    nodes[0] = struct.pack(">IHII", 0, 2, len(folders), 1)
    tree = b"".join([*nodes, *leaves])
    return b"qres" + struct.pack(">IIII", 1, 20, 20 + len(tree), 20 + len(tree) + len(data)) + tree + data + names


def qt_translation(texts):
    """Return a Qt .qm file with {English: Chinese}, and a message without its English."""
    messages = b""
    for english, chinese in texts.items():
        for tag, content in ((3, chinese.encode("utf-16-be")), (6, english.encode()), (7, b"Board")):
            messages += struct.pack(">Bi", tag, len(content)) + content
        messages += b"\x05" + bytes(4) + b"\x01"
    messages += struct.pack(">Bi", 3, 2) + "无".encode("utf-16-be") + b"\x01"
    return bytes(16) + struct.pack(">BI", 0x42, 8) + bytes(8) + struct.pack(">BI", 0x69, len(messages)) + messages


@pytest.fixture
def script(load_script, tmp_path, monkeypatch):
    """The script, which finds small packages below ``tmp_path``."""
    module = load_script("real_pictures")
    module.gcompris_words.cache_clear()
    for name in ("STAMPS", "ART4APPS", "GCOMPRIS"):
        monkeypatch.setattr(module, name, tmp_path / name)
        monkeypatch.setitem(module.PACKAGES, tmp_path / name, name.lower())
    parts = {"stamps": (module.STAMPS,), "gcompris": (module.GCOMPRIS,), "photographs": (module.GCOMPRIS,)}
    for part, paths in parts.items():
        monkeypatch.setitem(module.PARTS, part, (module.PARTS[part][0], paths))
    return module


def run(script, *arguments):
    return script.main([str(one) for one in arguments])


def test_stamps_have_their_captions_and_letters_are_left_out(script, tmp_path):
    for name, text in {
        "animals/tiger": "Tiger.\nde.utf8=Tiger.\nzh_CN.utf8=苏门答腊虎。\n",
        "animals/no-chinese": "Cat.\n",
        "symbols/a": "A.\nzh_CN.utf8=字母。\n",
    }.items():
        path = tmp_path / "STAMPS" / f"{name}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf8")
        path.with_suffix(".png").write_bytes(picture("RGBA", suffix="png"))
    assert run(script, tmp_path / "out", "--part", "stamps") == 0
    rows = list(csv.DictReader((tmp_path / "out/captions.csv").open(encoding="utf8")))
    assert [(row["image"], row["caption"], row["part"]) for row in rows] == [
        ("stamps-animals-tiger.png", "苏门答腊虎。", "stamps")
    ]
    with Image.open(tmp_path / "out/stamps-animals-tiger.png") as image:
        assert (image.mode, image.size) == ("RGBA", (40, 30))


def test_pictures_of_one_name_in_two_parts_are_both_kept(script, tmp_path, monkeypatch):
    def cheese(**_):
        yield script.Picture("food-cheese", Image.new("RGB", (8, 8)), "奶酪", "somewhere", "CC0")

    for part in ("stamps", "gcompris"):
        monkeypatch.setitem(script.PARTS, part, (cheese, ()))
    assert run(script, tmp_path / "out", "--part", "stamps", "--part", "gcompris") == 0
    assert sorted(path.name for path in (tmp_path / "out").glob("*.jpg")) == [
        "gcompris-food-cheese.jpg",
        "stamps-food-cheese.jpg",
    ]


def test_texture_divides_photographs_from_flat_drawings(script):
    noise = Image.open(io.BytesIO(picture()))
    assert script.texture(noise) > script.PHOTO_TEXTURE
    assert script.texture(Image.new("RGB", (40, 40), "red")) == 0
    assert script.texture(Image.new("RGBA", (40, 40))) == 0  # nothing is opaque


@pytest.mark.parametrize("is_compressed", [False, True])
def test_files_of_a_qt_resource(script, tmp_path, is_compressed):
    path = tmp_path / "GCOMPRIS/rcc/some.rcc"
    path.parent.mkdir(parents=True)
    files = {
        ("猫", "a.txt"): (b"one", is_compressed),
        ("b", "c"): (b"", is_compressed),
        ("b", "d"): (b"x" * 999, False),
    }
    path.write_bytes(qt_resource(files))
    assert script.resources("some") == {"/猫/a.txt": b"one", "/b/c": b"", "/b/d": b"x" * 999}


def test_photographs_have_a_title_and_a_paragraph_in_simplified_characters(script, tmp_path):
    pytest.importorskip("opencc")
    board = """
        { "title": qsTr("Chameleon"), "text": qsTr("It is \\"green\\"."), "image2": "qrc:/animals/a.webp", },
        { "title": qsTr("Bear"), "text": qsTr("Big."), "image2": "qrc:/animals/b.webp", }"""
    (tmp_path / "GCOMPRIS/rcc").mkdir(parents=True)
    (tmp_path / "GCOMPRIS/translations").mkdir()
    texts = {"Chameleon": "變色龍", 'It is "green".': "牠是綠色的。", "Bear": "熊", "Big.": "很大。"}
    (tmp_path / "GCOMPRIS/translations/gcompris_zh_TW.qm").write_bytes(qt_translation(texts))
    entries = {("animals", f"{name}.webp"): (picture(), False) for name in "ab"}
    for activity in ("farm_animals", "world_animals", "monuments", "world_music"):
        boards = {("board", "1.qml"): (board.encode(), True)} if activity == "world_animals" else {}
        (tmp_path / f"GCOMPRIS/rcc/explore_{activity}.rcc").write_bytes(qt_resource({**entries, **boards}))
    found = list(script.photographs())
    assert [(one.name, one.caption) for one in found] == [("world_animals-a", "变色龙"), ("world_animals-b", "熊")]
    assert found[0].paragraph == "它是绿色的。"


def test_words_name_drawings_also_in_the_plural(script, tmp_path):
    words = {"cherry": "樱桃", "peach": "桃子", "plum": "李子"}
    assert [script.translated(name, words) for name in ("cherries", "peaches", "plums", "plum", "olives")] == [
        *("樱桃", "桃子", "李子", "李子"),
        None,
    ]
    folder = "gcompris/src/activities/lang/resource"
    files = {(folder, "content-zh_CN.json"): (json.dumps(GLOSSES).encode(), True)}
    files[folder, "gorilla.webp"] = files[folder, "six.webp"] = (picture(), False)
    (tmp_path / "GCOMPRIS/rcc").mkdir(parents=True)
    (tmp_path / "GCOMPRIS/rcc/lang.rcc").write_bytes(qt_resource(files))
    assert [(one.name, one.caption) for one in script.gcompris()] == [("word-gorilla", "大猩猩")]


def test_objects_are_named_by_the_table_and_letters_are_left_out(script, tmp_path):
    names = (("monuments", "tajMahal.webp"), ("tools", "hammer12.webp"), ("numbers", "numbers.webp"))
    (tmp_path / "GCOMPRIS/rcc").mkdir(parents=True)
    content = qt_resource({name: (picture(), False) for name in names})
    (tmp_path / "GCOMPRIS/rcc/categorization.rcc").write_bytes(content)
    assert [(one.name, one.caption) for one in script.objects()] == [
        ("object-tajMahal", "泰姬陵"),  # not monuments-tajMahal, which is a photograph with a paragraph
        ("object-hammer12", "锤子"),
    ]


def test_missing_packages_are_named_with_the_command_that_installs_them(script, tmp_path, capsys):
    assert run(script, tmp_path / "out", "--part", "gcompris") == 2
    assert capsys.readouterr().err.strip().endswith("packages are missing: apt-get install gcompris")
    assert not (tmp_path / "out").exists()


def test_photos_choose_the_parts(script, tmp_path, capsys):
    assert run(script, tmp_path / "out", "--part", "gcompris", "--photos") == 2
    assert "leave --part out" in capsys.readouterr().err
