"""The grader of rich worlds: true images are right, and every planted fault is noticed in its part."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageFilter

from cogview.emoji.attributes import BOARDS, PATTERNS, STYLES, TYPEFACES, Sign
from cogview.emoji.characters import CharacterFonts
from cogview.emoji.edits import EditSampler
from cogview.emoji.grader import SceneGrader
from cogview.emoji.rich_grades import RichGrader, Verdicts, judge_caption, make_grader
from cogview.emoji.rich_reader import RichReader
from cogview.emoji.scene import COLOURS, NUM_THINGS, Scene, SceneWeights, layout_of
from cogview.emoji.settings import WorldSettings
from cogview.emoji.world import EmojiWorld
from cogview.errors import InputError

MakeWorld = Callable[..., EmojiWorld]
BLUE, WHITE = COLOURS[5], COLOURS[10]
NOTO, FLAT = STYLES[0], STYLES[2]
RED_SIGN = Sign(text="福春", board=BOARDS[0], typeface=TYPEFACES[1])


@pytest.fixture(scope="module")
def world(distinct_world: EmojiWorld) -> EmojiWorld:
    return distinct_world


@pytest.fixture(scope="module")
def grader(world: EmojiWorld) -> RichGrader:
    return RichGrader(world)


def scenes_of_each_kind(world: EmojiWorld, count: int) -> Iterator[Scene]:
    left = dict.fromkeys(NUM_THINGS, count)
    index = 0
    while any(left.values()):
        scene = world.sample_scene(5, index, held_out=True)
        index += 1
        if left[scene.kind]:
            left[scene.kind] -= 1
            yield scene


def degrade(image: np.ndarray, seed: int) -> np.ndarray:
    blurred = np.asarray(Image.fromarray(image).filter(ImageFilter.BoxBlur(1)))
    noise = np.random.default_rng(seed).normal(0, 10, image.shape)
    return np.clip(blurred + noise, 0, 255).astype(np.uint8)


def content(scene: Scene) -> tuple[object, ...]:
    emoji = tuple(thing.emoji for thing in scene.shown)
    return scene.colour, scene.pattern, layout_of(scene), emoji, {scene.style} if emoji else set(), scene.sign


@pytest.mark.parametrize("poor", [False, True])
def test_rich_grader_finds_images_of_each_kind_right(world: EmojiWorld, grader: RichGrader, poor: bool) -> None:
    for number, scene in enumerate(scenes_of_each_kind(world, 12)):
        image = degrade(world.render(scene), number) if poor else world.render(scene)
        assert grader.grade(image, scene).everything, scene.meaning
        found = grader.explain(image)
        emoji = tuple(thing.emoji for thing in found.things)
        assert (found.colour, found.pattern, found.layout, emoji, set(found.styles), found.sign) == content(scene)


def test_rich_grader_notices_each_planted_fault(world: EmojiWorld, grader: RichGrader) -> None:
    apple, fox, dog, car = world.things[:4]

    def wrong(asked: Scene, shown: Scene) -> set[str]:
        grade = grader.grade(world.render(shown), asked)
        parts = ("colour", "object", "count", "relation", "style", "characters")
        found = {part for part in parts if getattr(grade, part) is False}
        assert grade.everything == (not found) == (asked == shown)
        return found

    many = Scene(colour=BLUE, kind="many", things=(fox,), count=6, style=FLAT, pattern=PATTERNS[0])
    assert wrong(many, many) == set()
    assert wrong(many, replace(many, colour=WHITE)) == {"colour"}
    assert wrong(many, replace(many, pattern=PATTERNS[1])) == {"colour"}
    assert wrong(many, replace(many, pattern=None)) == {"colour"}
    assert wrong(many, replace(many, style=NOTO)) == {"style"}
    assert wrong(many, replace(many, things=(dog,))) == {"object"}
    assert wrong(many, replace(many, count=5)) == {"count"}
    beside = Scene(colour=WHITE, kind="beside", things=(fox, apple), style=FLAT)
    assert wrong(beside, replace(beside, things=(apple, fox))) == {"relation"}
    assert wrong(beside, replace(beside, kind="above")) == {"relation"}
    assert wrong(beside, replace(beside, things=(fox, dog))) == {"object", "relation"}
    assert wrong(beside, Scene(colour=WHITE, kind="left", things=(fox,), style=FLAT)) == {"object", "relation"}
    row = Scene(colour=WHITE, kind="row", things=(fox, apple, car))
    assert wrong(row, replace(row, things=(apple, fox, car))) == {"relation"}
    assert wrong(row, replace(row, things=(fox, apple, dog))) == {"object", "relation"}
    left = Scene(colour=WHITE, kind="left", things=(fox,))
    assert wrong(left, replace(left, kind="right")) == {"relation"}
    on = Scene(colour=WHITE, kind="on", things=(fox, car))
    assert wrong(on, replace(on, things=(car, fox))) == {"relation"}
    assert wrong(on, replace(on, kind="above")) == {"relation"}
    inside = Scene(colour=WHITE, kind="inside", things=(car, fox))
    assert wrong(inside, replace(inside, things=(car, dog))) == {"object", "relation"}
    assert wrong(inside, replace(inside, style=FLAT)) == {"style"}
    assert wrong(inside, Scene(colour=WHITE, kind="one", things=(car,))) == {"object", "relation"}
    sign = Scene(colour=WHITE, kind="sign", things=(), sign=RED_SIGN)
    label = Scene(colour=WHITE, kind="label", things=(dog,), sign=RED_SIGN)
    for scene in (sign, label):
        assert wrong(scene, replace(scene, sign=replace(RED_SIGN, text="福茶"))) == {"characters"}
        assert wrong(scene, replace(scene, sign=replace(RED_SIGN, text="春福"))) == {"characters"}
        assert wrong(scene, replace(scene, sign=replace(RED_SIGN, text="福"))) == {"characters"}
        assert wrong(scene, replace(scene, sign=replace(RED_SIGN, board=BOARDS[1]))) == {"colour"}
        assert wrong(scene, replace(scene, sign=replace(RED_SIGN, typeface=TYPEFACES[0]))) == {"style"}
    assert wrong(label, replace(label, things=(fox,))) == {"object", "relation"}
    assert wrong(label, sign) == {"object", "relation", "style"}
    assert wrong(sign, label) == {"characters"}


def test_rich_grader_counts_the_occupied_cells(world: EmojiWorld, grader: RichGrader) -> None:
    fox, dog = world.things[1:3]
    six = Scene(colour=BLUE, kind="many", things=(fox,), count=6)
    image = world.render(six)
    image[40:56, 24:40] = BLUE.rgb
    found = grader.grade(image, six)
    assert (found.count, found.object, len(found.explanation.things)) == (False, True, 5)
    image[40:56, 48:64] = world.render(replace(six, things=(dog,)))[40:56, 48:64]
    image[8:24, 0:16] = world.render(replace(six, style=FLAT))[8:24, 0:16]
    found = grader.grade(image, six)
    assert (found.object, found.style) == (True, False)
    assert [style.key for style in found.explanation.styles] == ["fluent-flat", *["noto"] * 4]
    assert [thing.name for thing in found.explanation.things] == [*["狐狸"] * 4, "狗"]


def test_rich_grader_finds_nothing_in_an_empty_image(world: EmojiWorld, grader: RichGrader) -> None:
    image = np.full((64, 64, 3), BLUE.rgb, dtype=np.uint8)
    image += np.random.default_rng(0).integers(0, 12, image.shape, dtype=np.uint8)
    found = grader.explain(image)
    assert (found.colour, found.layout, found.things, found.sign) == (BLUE, "empty", (), None)
    scene = Scene(colour=BLUE, kind="label", things=world.things[:1], sign=RED_SIGN)
    grade = grader.grade(image, scene)
    assert (grade.object, grade.relation, grade.style, grade.characters) == (False,) * 4


def test_judge_caption_leaves_open_what_the_caption_does(world: EmojiWorld, grader: RichGrader) -> None:
    reader = RichReader(world.things, world.colours, world.traditional)
    fox, apple = world.things[1], world.things[0]
    scene = Scene(colour=BLUE, kind="above", things=(fox, apple), style=FLAT, pattern=PATTERNS[0])
    label = Scene(colour=WHITE, kind="label", things=(fox,), sign=RED_SIGN)

    def judged(text: str, shown: Scene = scene) -> Verdicts:
        parsed = reader.read(text)
        assert parsed is not None, text
        return judge_caption(grader.explain(world.render(shown)), parsed)

    def verdicts(**parts: bool) -> Verdicts:
        names = ("colour", "object", "count", "relation", "style", "characters")
        return Verdicts(**{**dict.fromkeys(names), **parts})  # type: ignore[arg-type]

    assert judged("苹果和狐狸") == verdicts(object=True)
    assert judged("狗和狐狸") == verdicts(object=False)
    assert judged("上面是狐狸，下面是苹果") == verdicts(object=True, relation=True)
    assert judged("左边是狐狸，右边是苹果") == verdicts(object=True, relation=False)
    assert judged("蓝色条纹背景，苹果和狐狸，扁平风格") == verdicts(colour=True, object=True, style=True)
    assert judged("蓝色背景，苹果和狐狸，立体风格") == verdicts(colour=False, object=True, style=False)
    right = judged("狐狸下面的牌子上写着“福春”", label)
    assert right == verdicts(object=True, relation=True, characters=True)
    assert judged("狐狸下面的牌子上用黑体写着“福春”", label) == replace(right, style=False)
    assert judged("狐狸下面的蓝色牌子上写着“福春”", label) == replace(right, colour=False)


def test_grade_edit_accepts_only_the_result(world: EmojiWorld, grader: RichGrader) -> None:
    sampler = EditSampler(world)
    for kind in sampler.kinds:
        for index in range(6):
            edit = sampler.sample(8, index, held_out=True, kind=kind)
            grade = grader.grade_edit(world.render(edit.result), edit)
            assert (grade.everything, grade.unchanged) == (True, False), edit
            untouched = grader.grade_edit(world.render(edit.source), edit)
            assert (untouched.everything, untouched.unchanged) == (False, True), edit
            colour = next(each for each in world.colours if each not in (edit.result.colour, edit.source.colour))
            if edit.result.sign is None or edit.result.sign.board.name != colour.name:
                repainted = grader.grade_edit(world.render(replace(edit.result, colour=colour)), edit)
                assert (repainted.everything, repainted.unchanged) == (False, False), edit


def test_make_grader_takes_that_of_the_world(world: EmojiWorld, make_tiny_world: MakeWorld) -> None:
    assert isinstance(make_grader(world), RichGrader)
    assert isinstance(make_grader(make_tiny_world()), SceneGrader)


def test_rich_grader_refuses_an_image_of_another_size(grader: RichGrader) -> None:
    with pytest.raises(InputError, match=r"needs uint8 \(64, 64, 3\), got uint8 \(32, 32, 3\)"):
        grader.explain(np.zeros((32, 32, 3), dtype=np.uint8))


def test_confusions_of_a_rich_grade_name_each_wrong_part(world: EmojiWorld, grader: RichGrader) -> None:
    fox, dog = world.things[1:3]
    asked = Scene(colour=BLUE, kind="label", things=(fox,), sign=RED_SIGN, pattern=PATTERNS[0])
    shown = replace(asked, things=(dog,), pattern=None, style=FLAT, sign=replace(RED_SIGN, text="福"))
    assert grader.grade(world.render(shown), asked).confusions() == [
        ("蓝色条纹", "蓝色"),
        ("狐狸", "狗"),
        ("表情", "扁平"),
        ("福春", "福"),
    ]


@pytest.mark.slow
@pytest.mark.font
def test_rich_grader_distinguishes_similar_characters() -> None:
    try:
        CharacterFonts().check()
    except InputError as error:
        pytest.skip(str(error))
    settings = WorldSettings(things=40, characters=138, patterns=30, max_count=6, weights=SceneWeights(row=1, sign=2))
    world = EmojiWorld.create(settings)
    assert world.characters is not None
    grader, known = RichGrader(world), world.characters
    for number, typeface in enumerate(TYPEFACES):
        forms = known.bitmaps[number, :, ::4, ::4].reshape(138, -1).astype(float)
        distances = np.square(forms[:, None] - forms).mean(axis=2) + np.diag(np.full(138, np.inf))
        for first in np.argsort(distances.min(axis=1))[:12]:
            second = distances[first].argmin()
            texts = [known.characters[index] for index in (first, second)]
            signs = [Sign(text=text, board=BOARDS[4], typeface=typeface) for text in texts]
            asked, other = (Scene(colour=BLUE, kind="sign", things=(), sign=sign) for sign in signs)
            assert grader.grade(degrade(world.render(asked), 0), asked).everything, texts
            assert grader.grade(degrade(world.render(other), 0), asked).characters is False, texts
    for index in range(100):
        scene = world.sample_scene(6, index, held_out=True)
        assert grader.grade(world.render(scene), scene).everything, scene.meaning
