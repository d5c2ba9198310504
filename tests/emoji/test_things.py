"""The things: read from planted files, and from Debian's where they are installed."""

from pathlib import Path

import pytest

from cogview.emoji.things import EmojiFiles, draw_sprites, name_tables, read_things
from cogview.errors import InputError

DEBIAN = EmojiFiles()

ANNOTATIONS = """<?xml version="1.0" encoding="UTF-8"?>
<ldml><annotations>
  <annotation cp="🦊">头 | 狐狸 | 脸</annotation>
  <annotation cp="🦊" type="tts">狐狸</annotation>
  <annotation cp="🍎" type="tts">红苹果</annotation>
  <annotation cp="🪐" type="tts">有环行星</annotation>
  <annotation cp="☂" type="tts">伞</annotation>
  <annotation cp="☔" type="tts">雨伞</annotation>
  <annotation cp="😀" type="tts">嘿嘿</annotation>
</annotations></ldml>
"""
DERIVED = '<ldml><annotations><annotation cp="🐻‍❄" type="tts">北极 熊</annotation></annotations></ldml>'
EMOJI_TEST = """# group: Smileys & Emotion
# subgroup: face-smiling
1F600 ; fully-qualified # 😀
# group: Animals & Nature
# subgroup: animal-mammal
1F98A ; fully-qualified # 🦊
1F43B 200D 2744 FE0F ; fully-qualified # 🐻‍❄️
1F43B 200D 2744 ; minimally-qualified # 🐻‍❄
1FACE ; fully-qualified # moose, without a Chinese name
# group: Food & Drink
# subgroup: food-fruit
1F34E ; fully-qualified # 🍎
# group: Travel & Places
# subgroup: sky & weather
1FA90 ; fully-qualified # 🪐
2602 FE0F ; fully-qualified # ☂️
2614 ; fully-qualified # ☔
"""


@pytest.fixture
def planted(tmp_path: Path) -> EmojiFiles:
    files = EmojiFiles(
        font=tmp_path / "font.ttf",
        annotations=(tmp_path / "zh.xml", tmp_path / "derived.xml"),
        emoji_test=tmp_path / "emoji-test.txt",
    )
    files.font.write_bytes(b"")
    files.annotations[0].write_text(ANNOTATIONS, encoding="utf-8")
    files.annotations[1].write_text(DERIVED, encoding="utf-8")
    files.emoji_test.write_text(EMOJI_TEST, encoding="utf-8")
    return files


def test_read_things_returns_named_objects_of_five_groups_common_ones_first(planted: EmojiFiles) -> None:
    things = {thing.emoji: thing for thing in read_things(planted)}
    # 🍎 leads the common objects; a smiley and an animal without a Chinese name stay out; variation selectors do not
    # matter.
    assert list(things) == ["🍎", "🦊", "☂️", "🪐", "🐻‍❄️", "☔"]
    assert things["🦊"].measures == ("只", "个")
    assert things["🦊"].group == "Animals & Nature"
    assert things["🐻‍❄️"].name == "北极熊"


def test_read_things_puts_common_names_first_and_drops_shared_synonyms(planted: EmojiFiles) -> None:
    things = {thing.emoji: thing for thing in read_things(planted)}
    assert things["🪐"].names == ("土星", "有环行星")
    assert things["🍎"].names == ("红苹果", "苹果")
    # Both umbrellas could be called 雨伞: then it names neither.
    assert things["☂️"].names == ("伞",)
    assert things["☔"].names == ("雨中的伞",)


@pytest.mark.parametrize(
    ("name", "package"),
    [
        ("font.ttf", "fonts-noto-color-emoji"),
        ("zh.xml", "unicode-cldr-core"),
        ("derived.xml", "unicode-cldr-core"),
        ("emoji-test.txt", "unicode-data"),
    ],
)
def test_read_things_names_the_package_of_a_missing_file(
    planted: EmojiFiles, tmp_path: Path, name: str, package: str
) -> None:
    (tmp_path / name).unlink()
    with pytest.raises(InputError, match=rf"{name} is missing.*apt install {package} "):
        read_things(planted)


def test_read_things_refuses_files_without_a_common_emoji(planted: EmojiFiles) -> None:
    planted.emoji_test.write_text("# group: Objects\n1F600 ; fully-qualified # 😀\n".replace("1F600", "1F4BB"))
    with pytest.raises(InputError, match="no named emoji in common"):
        read_things(planted)


def test_read_things_names_annotations_that_are_no_xml(planted: EmojiFiles) -> None:
    """A Markdown file given by --annotations used to end in a traceback."""
    planted.annotations[0].write_text("# 小模型\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"zh\.xml is no XML file: .*expected annotations of the Unicode CLDR"):
        read_things(planted)


def test_draw_sprites_names_a_file_that_is_no_font(tmp_path: Path) -> None:
    """The message used to be "unknown file format", without the file."""
    (tmp_path / "card.md").write_text("# 小模型\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"card\.md cannot be read as a font: .*expected NotoColorEmoji\.ttf"):
        draw_sprites((), tmp_path / "card.md")


@pytest.mark.font
def test_read_things_of_debian_have_distinct_names_and_sprites() -> None:
    things = read_things(DEBIAN)
    assert len(things) >= 800  # 836 with the files of Debian 12
    names = [name for thing in things for name in thing.names]
    assert len(set(names)) == len(names)
    common = list(name_tables().common)
    assert [thing.emoji for thing in things[: len(common)]] == common
    fox = next(thing for thing in things if thing.emoji == "🦊")
    assert (fox.name, fox.measures[0]) == ("狐狸", "只")

    sprites = draw_sprites(things, DEBIAN.font)
    assert (sprites[..., 3].max(axis=(1, 2)) == 255).all()
    assert len({sprite.tobytes() for sprite in sprites}) == len(things)
