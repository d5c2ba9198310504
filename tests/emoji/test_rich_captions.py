"""Captions of rich scenes are parsed to the content that they name, and leave open what they may."""

from collections.abc import Callable

import pytest

from cogview.emoji.attributes import BOARDS, PATTERNS, STYLES, TYPEFACES, Sign
from cogview.emoji.captions import ParsedCaption
from cogview.emoji.rich_reader import RichReader, describes
from cogview.emoji.scene import COLOURS, Scene
from cogview.emoji.settings import CaptionRates
from cogview.emoji.traditional import simplifying_table, to_traditional, traditional_characters
from cogview.emoji.world import EmojiWorld

MakeWorld = Callable[..., EmojiWorld]
BLUE, WHITE = COLOURS[5], COLOURS[10]


@pytest.fixture(scope="module")
def world(make_rich_world: MakeWorld) -> EmojiWorld:
    return make_rich_world()


@pytest.fixture(scope="module")
def reader(world: EmojiWorld) -> RichReader:
    return RichReader(world.things, world.colours, world.traditional)


def captions(world: EmojiWorld, scene: Scene, complete: bool = True) -> set[str]:
    return {world.caption(scene, seed, complete) for seed in range(800)}


def test_rich_reader_parses_complete_captions_to_the_whole_scene(world: EmojiWorld, reader: RichReader) -> None:
    for index in range(1000):
        scene = world.sample_scene(3, index)
        parsed = reader.read(world.caption(scene, index, complete=True))
        assert parsed is not None
        assert describes(parsed, scene)
        assert parsed.placed
        assert (parsed.colour, parsed.pattern) == (scene.colour, scene.pattern)
        assert parsed.style == (scene.style if scene.things else None)
        assert tuple(next(iter(meant)) for meant in parsed.things) == tuple(thing.emoji for thing in scene.things)
        if scene.sign:
            assert parsed.sign is not None
            assert (parsed.sign.text, parsed.sign.board, parsed.sign.typeface) == tuple(vars(scene.sign).values())


def test_rich_reader_parses_open_captions_to_what_they_name(world: EmojiWorld, reader: RichReader) -> None:
    open_parts: dict[str, int] = {"colour": 0, "style": 0, "place": 0, "board": 0, "typeface": 0}
    for index in range(1000):
        scene = world.sample_scene(4, index)
        caption = world.caption(scene, index)
        parsed = reader.read(caption)
        assert parsed is not None, caption
        assert describes(parsed, scene), caption
        open_parts["colour"] += parsed.colour is None
        open_parts["style"] += parsed.style is None and bool(scene.things)
        open_parts["place"] += not parsed.placed
        open_parts["board"] += parsed.sign is not None and parsed.sign.board is None
        open_parts["typeface"] += parsed.sign is not None and parsed.sign.typeface is None
    assert 120 < open_parts["colour"] < 280
    assert 350 < open_parts["style"] < 650
    assert min(open_parts.values()) > 5


def test_rich_captions_are_the_documented_sentences(world: EmojiWorld) -> None:
    apple, fox, dog, car, _, fish, box = world.things[:7]
    flat = STYLES[2]
    many = Scene(colour=BLUE, kind="many", things=(fox,), count=5, style=flat, pattern=PATTERNS[0])
    assert "蓝色条纹背景上的五只扁平风格的狐狸" in captions(world, many)
    assert "从左到右是狗、狐狸和鱼，白色背景，立体风格" in captions(
        world, Scene(colour=WHITE, kind="row", things=(dog, fox, fish), style=STYLES[3])
    )
    inside = captions(world, Scene(colour=WHITE, kind="inside", things=(box, fox), style=STYLES[1]))
    assert "白色背景，包裹里有狐狸，贴纸风格" in inside
    on = captions(world, Scene(colour=WHITE, kind="on", things=(apple, car)), complete=False)
    assert {"汽车顶上有红苹果", "一个红苹果叠在一辆汽车上"} & on
    sign = Sign(text="福", board=BOARDS[0], typeface=TYPEFACES[1])
    found = captions(world, Scene(colour=WHITE, kind="sign", things=(), sign=sign), complete=False)
    assert "一块红色的牌子，上面写着“福”" in found
    assert "用楷体写着“福”的红色牌子，白色背景" in found
    assert "写着“福”的牌子" in found


def test_rich_captions_leave_places_open_in_any_order(world: EmojiWorld, reader: RichReader) -> None:
    fox, dog = world.things[1:3]
    scene = Scene(colour=BLUE, kind="above", things=(fox, dog))
    found = captions(world, scene, complete=False)
    assert {"狐狸和狗", "狗和狐狸"} <= found
    parsed = reader.read("狗和狐狸")
    assert parsed is not None
    assert describes(parsed, scene)
    other = Scene(colour=BLUE, kind="above", things=(fox, world.things[3]))
    assert not describes(parsed, other)


def test_describes_notices_each_wrong_part(world: EmojiWorld, reader: RichReader) -> None:
    fox, dog = world.things[1:3]
    scene = Scene(colour=BLUE, kind="many", things=(fox,), count=5, style=STYLES[2], pattern=PATTERNS[0])

    def right(text: str, scene: Scene = scene) -> bool:
        parsed: ParsedCaption | None = reader.read(text)
        assert parsed is not None, text
        return describes(parsed, scene)

    assert right("蓝色条纹背景上的五只扁平风格的狐狸")
    assert not right("蓝色背景上的五只扁平风格的狐狸")
    assert not right("蓝色圆点背景上的五只扁平风格的狐狸")
    assert not right("蓝色条纹背景上的五只立体风格的狐狸")
    assert not right("蓝色条纹背景上的六只扁平风格的狐狸")
    assert not right("蓝色条纹背景上的五只扁平风格的狗")
    sign = Sign(text="福", board=BOARDS[0], typeface=TYPEFACES[1])
    label = Scene(colour=WHITE, kind="label", things=(dog,), sign=sign)
    assert right("狗下面的红色牌子上写着“福”", label)
    assert not right("狗下面的红色牌子上写着“春”", label)
    assert not right("狗下面的蓝色牌子上写着“福”", label)
    assert not right("狗下面的红色牌子上用黑体写着“福”", label)
    assert not right("狐狸下面的红色牌子上写着“福”", label)
    assert not right("红色牌子上写着“福”", label)


def test_rich_captions_are_traditional_in_their_share(make_rich_world: MakeWorld) -> None:
    rates = {share: CaptionRates(traditional=share) for share in (0, 100)}
    worlds = {share: make_rich_world(captions=found) for share, found in rates.items()}
    fish = worlds[0].things[5]
    scene = Scene(colour=COLOURS[0], kind="many", things=(fish,), count=2, pattern=PATTERNS[0])
    assert not any("魚" in caption for caption in captions(worlds[0], scene))
    assert all("魚" in caption and "紅色條紋" in caption for caption in captions(worlds[100], scene))


def test_to_traditional_keeps_quoted_characters() -> None:
    table = {"红": "紅", "风": "風"}
    assert to_traditional("红色的牌子上写着“风红”", table) == "紅色的牌子上写着「风红」"
    assert to_traditional("红色面包", table) == "紅色麵包"
    assert "紅色麵包".translate(simplifying_table(table)) == "红色面包"


def test_traditional_characters_are_inverted_by_their_table() -> None:
    try:
        table = traditional_characters()
    except Exception:
        pytest.skip("apt install unicode-data")
    assert (table["红"], table["鱼"], table["里"], table["只"]) == ("紅", "魚", "裡", "隻")
    assert not {"松", "面", "干"} & set(table)
    text = "左边是一只狐狸，右边是两个面包，红色条纹背景"
    assert to_traditional(text, table) == "左邊是一隻狐狸，右邊是兩個麵包，紅色條紋背景"
    assert to_traditional(text, table).translate(simplifying_table(table)) == text


@pytest.mark.parametrize(
    "text", ["狐狸和", "五只", "七只狐狸", "写着“”的牌子", "扁平风格", "红色的牌子", "条纹背景上的狐狸"]
)
def test_rich_reader_refuses_other_texts(reader: RichReader, text: str) -> None:
    assert reader.parses(text) == ()
