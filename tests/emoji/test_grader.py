"""The grader: true images are right, and every planted fault is noticed."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageFilter

from cogview.emoji.evaluation.scenes import held_out_scenes, summarize_images
from cogview.emoji.grader import Explanation, SceneGrader, grade_explanation
from cogview.emoji.scene import COLOURS, Scene
from cogview.emoji.settings import WorldSettings
from cogview.emoji.world import EmojiWorld
from cogview.errors import InputError

MakeWorld = Callable[..., EmojiWorld]
BLUE, WHITE = COLOURS[5], COLOURS[10]


def degrade(image: np.ndarray, seed: int) -> np.ndarray:
    """Blur and noise, with about the error of a good VQ-VAE."""
    blurred = Image.fromarray(image).filter(ImageFilter.GaussianBlur(1.5))
    noise = np.random.default_rng(seed).normal(0, 8, image.shape)
    return np.clip(np.asarray(blurred) + noise, 0, 255).astype(np.uint8)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"canvas": 128, "jitter": 8, "sizes": (0.6, 0.8, 1.0)}])
def test_scene_grader_finds_true_images_right(make_tiny_world: MakeWorld, settings: dict[str, object]) -> None:
    world = make_tiny_world(**settings)
    grader = SceneGrader(world)
    for index, (scene, _) in enumerate(held_out_scenes(world, 40)):
        assert grader.grade(world.render(scene, index), scene).everything, scene.meaning


def test_scene_grader_finds_degraded_images_right(make_tiny_world: MakeWorld) -> None:
    world = make_tiny_world()
    grader = SceneGrader(world)
    scenes = [scene for scene, _ in held_out_scenes(world, 60)]
    images = [(world.render(scene), degrade(world.render(scene), seed)) for seed, scene in enumerate(scenes)]
    mean_squared = np.mean([np.square(true.astype(float) - poor).mean() for true, poor in images])
    assert 20 < 10 * np.log10(255**2 / mean_squared) < 26  # dB
    right = [grader.grade(poor, scene).everything for (_, poor), scene in zip(images, scenes, strict=True)]
    assert sum(right) >= 57


def test_scene_grader_notices_each_planted_fault(make_tiny_world: MakeWorld) -> None:
    world = make_tiny_world()
    apple, fox, dog = world.things[:3]
    grader = SceneGrader(world)

    def parts(asked: Scene, shown: Scene) -> tuple[bool, bool, bool | None, bool | None]:
        grade = grader.grade(world.render(shown), asked)
        assert grade.everything == (asked == shown)
        return grade.colour, grade.object, grade.count, grade.relation

    one = Scene(colour=BLUE, kind="one", things=(fox,))
    three = Scene(colour=BLUE, kind="many", things=(fox,), count=3)
    beside = Scene(colour=BLUE, kind="beside", things=(fox, apple))
    assert parts(one, one) == (True, True, None, None)
    assert parts(one, replace(one, colour=WHITE)) == (False, True, None, None)
    assert parts(one, replace(one, things=(dog,))) == (True, False, None, None)
    assert parts(one, three) == (True, False, None, None)
    assert parts(three, three) == (True, True, True, None)
    assert parts(three, replace(three, count=4)) == (True, True, False, None)
    assert parts(three, replace(three, things=(dog,))) == (True, False, True, None)
    assert parts(three, one) == (True, True, False, None)
    assert parts(beside, beside) == (True, True, None, True)
    assert parts(beside, replace(beside, things=(apple, fox))) == (True, True, None, False)
    assert parts(beside, replace(beside, kind="above")) == (True, True, None, False)
    assert parts(beside, replace(beside, things=(fox, dog))) == (True, False, None, False)


def test_scene_grader_finds_nothing_in_an_empty_image(make_tiny_world: MakeWorld) -> None:
    world = make_tiny_world()
    image = np.full((64, 64, 3), BLUE.rgb, dtype=np.uint8)
    image += np.random.default_rng(0).integers(0, 12, image.shape, dtype=np.uint8)
    seen = SceneGrader(world).explain(image)
    assert (seen.colour, seen.layout, seen.things) == (BLUE, "empty", ())
    grade = grade_explanation(seen, Scene(colour=BLUE, kind="beside", things=world.things[:2]))
    assert (grade.colour, grade.object, grade.relation) == (True, False, False)
    assert grade_explanation(seen, Scene(colour=BLUE, kind="many", things=world.things[:1], count=2)).object is False


def test_explain_error_is_the_distance_to_the_rendered_explanation(make_tiny_world: MakeWorld) -> None:
    world = make_tiny_world()
    scene = Scene(colour=WHITE, kind="beside", things=world.things[2:4])
    image = world.render(scene)
    grader = SceneGrader(world)
    assert grader.explain(image).error < 0.5  # rounding to bytes
    image[:, :, 1] -= np.minimum(image[:, :, 1], 9)
    exact = np.square(image.astype(float) - world.render(scene)).mean()
    assert grader.explain(image).error == pytest.approx(exact, rel=0.05)


def test_grade_explanation_needs_a_majority_of_several_objects(make_tiny_world: MakeWorld) -> None:
    fox, dog = make_tiny_world().things[1:3]
    four = Scene(colour=BLUE, kind="many", things=(fox,), count=4)

    def seen(*things: object) -> Explanation:
        return Explanation(colour=BLUE, layout="four", things=things, error=0.0)  # type: ignore[arg-type]

    assert grade_explanation(seen(fox, fox, dog, fox), four).object
    assert not grade_explanation(seen(fox, fox, dog, dog), four).object


def test_scene_grader_refuses_an_image_of_another_size(make_tiny_world: MakeWorld) -> None:
    with pytest.raises(InputError, match=r"needs uint8 \(64, 64, 3\), got uint8 \(32, 32, 3\)"):
        SceneGrader(make_tiny_world()).explain(np.zeros((32, 32, 3), dtype=np.uint8))


@pytest.mark.slow
@pytest.mark.font
def test_scene_grader_finds_true_images_of_the_real_world_right() -> None:
    world = EmojiWorld.create(WorldSettings(things=400))
    grader = SceneGrader(world)
    grades = [grader.grade(world.render(scene), scene) for scene, _ in held_out_scenes(world, 60)]
    assert all(grade.everything for grade in grades)
    assert summarize_images(grades)["confusions"] == []
