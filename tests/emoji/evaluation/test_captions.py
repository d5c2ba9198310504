"""The measure of captions: planted captions are graded exactly, on true images and on reconstructions."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cogview.checkpoints.checkpoint import NamedThing
from cogview.emoji.evaluation.caption_grades import CaptionGrader
from cogview.emoji.evaluation.captions import (
    evaluate_captions,
    format_caption_report,
    summarize_captions,
)
from cogview.emoji.evaluation.scenes import PARTS, held_out_scenes
from cogview.emoji.scene import COLOURS, Scene
from cogview.emoji.things import EmojiObject
from cogview.emoji.world import EmojiWorld
from cogview.errors import InputError
from cogview.evaluation.metrics import accuracy

WHITE, BLUE = COLOURS[10], COLOURS[5]


class Repainter:
    """Image tokenizer whose reconstructions are a shade darker, so that they differ from the original."""

    codebook = torch.zeros(1, 1)
    downsampling = 8

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        return images

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        return (codes - 1 / 255).clamp(min=0)


@dataclass
class Planted:
    text: str
    log_probability: float = -2.5


class Captioner:
    """Generates ``caption_true(number, scene)`` of true images, ``caption_restored(number, scene)`` of others."""

    name = "captioner"

    def __init__(self, world: EmojiWorld, count: int, seed: int, caption_true: Any, caption_restored: Any) -> None:
        self.config = SimpleNamespace(grid=8)
        self.things = tuple(NamedThing(name=thing.name) for thing in world.things)
        self.image_tokenizer = Repainter()
        self.captions: dict[bytes, str] = {}
        self.batches: list[int] = []
        for number, (scene, _) in enumerate(held_out_scenes(world, count, seed)):
            image = world.render(scene, number)
            self.captions[image.tobytes()] = caption_true(number, scene)
            self.captions[(image - np.minimum(image, 1)).tobytes()] = caption_restored(number, scene)

    def require_task(self, task: str) -> None:
        assert task == "caption"

    def caption(self, images: list[Image.Image], *, method: str, batch_size: int) -> list[list[Planted]]:
        assert method == "greedy"
        assert len(images) <= batch_size
        self.batches.append(len(images))
        return [[Planted(self.captions[np.asarray(image).tobytes()])] for image in images]


@pytest.fixture
def world(make_tiny_world: Callable[..., EmojiWorld]) -> EmojiWorld:
    return make_tiny_world()


def parts(grader: CaptionGrader, text: str, scene: Scene) -> tuple[bool, bool, bool | None, bool | None, bool]:
    grade = grader.grade(text, scene)
    return grade.colour, grade.object, grade.count, grade.relation, grade.everything


def test_caption_grader_notices_each_planted_fault_of_one_object(world: EmojiWorld) -> None:
    grader = CaptionGrader(world.candidates)
    scene = Scene(colour=BLUE, kind="one", things=(world.things[1],))
    assert parts(grader, "蓝色背景上的一只狐狸", scene) == (True, True, None, None, True)
    assert parts(grader, "狐狸，背景是蓝色的", scene) == (True, True, None, None, True)
    assert parts(grader, "白色背景上的狐狸", scene) == (False, True, None, None, False)
    assert parts(grader, "狐狸", scene) == (False, True, None, None, False)  # the colour is asked of every caption
    assert parts(grader, "蓝色背景上的一只狗", scene) == (True, False, None, None, False)
    assert parts(grader, "蓝色背景上的两只狐狸", scene) == (True, True, None, None, False)
    assert parts(grader, "狐狸在鱼的左边，蓝色背景", scene) == (True, False, None, None, False)
    assert parts(grader, "蓝色的狐狸", scene) == (False, False, None, None, False)


def test_caption_grader_notices_each_planted_fault_of_several_objects(world: EmojiWorld) -> None:
    grader = CaptionGrader(world.candidates)
    scene = Scene(colour=BLUE, kind="many", things=(world.things[1],), count=3)
    assert parts(grader, "蓝色背景上的三只狐狸", scene) == (True, True, True, None, True)
    assert parts(grader, "3个狐狸,背景是蓝色", scene) == (True, True, True, None, True)
    assert parts(grader, "蓝色背景上的四只狐狸", scene) == (True, True, False, None, False)
    assert parts(grader, "蓝色背景上的狐狸", scene) == (True, True, False, None, False)
    assert parts(grader, "蓝色背景上的三条鱼", scene) == (True, False, True, None, False)
    assert parts(grader, "狐狸在鱼的左边，蓝色背景", scene) == (True, False, False, None, False)
    assert parts(grader, "蓝色背景上的五只狐狸", scene) == (False, False, False, None, False)


def test_caption_grader_notices_each_planted_fault_of_a_pair(world: EmojiWorld) -> None:
    grader = CaptionGrader(world.candidates)
    scene = Scene(colour=BLUE, kind="beside", things=(world.things[1], world.things[0]))
    assert parts(grader, "左边是狐狸，右边是苹果，蓝色背景", scene) == (True, True, None, True, True)
    assert parts(grader, "蓝色背景上，红苹果在狐狸右边", scene) == (True, True, None, True, True)
    assert parts(grader, "蓝色背景上，红苹果在狐狸左边", scene) == (True, True, None, False, False)
    assert parts(grader, "蓝色背景上，狐狸在红苹果上面", scene) == (True, True, None, False, False)
    assert parts(grader, "白色背景上，红苹果在狐狸下面", scene) == (False, True, None, False, False)
    assert parts(grader, "蓝色背景上，狐狸在鱼左边", scene) == (True, False, None, False, False)
    assert parts(grader, "蓝色背景上，狐狸在狐狸左边", scene) == (True, False, None, False, False)
    assert parts(grader, "蓝色背景上的狐狸", scene) == (True, False, None, False, False)
    assert parts(grader, "狐狸，苹果", scene) == (False, False, None, False, False)


def test_caption_grader_accepts_any_meaning_of_a_name_or_text() -> None:
    beer = EmojiObject(emoji="🍺", name="啤酒", measures=("杯", "个"))
    beers = EmojiObject(emoji="🍻", name="两杯啤酒", synonyms=("干杯",))
    dog, dog_face = EmojiObject(emoji="🐕", name="狗"), EmojiObject(emoji="🐶", name="狗头", synonyms=("狗",))
    grader = CaptionGrader((beer, beers, dog, dog_face))
    two = Scene(colour=BLUE, kind="many", things=(beer,), count=2)
    one = Scene(colour=BLUE, kind="one", things=(beers,))
    for scene in (two, one):
        assert grader.grade("蓝色背景上的两杯啤酒", scene).everything
    assert not grader.grade("蓝色背景上的两杯啤酒", replace(two, count=3)).everything
    for thing in (dog, dog_face):
        assert grader.grade("蓝色背景上的狗", replace(one, things=(thing,))).everything
    pair = Scene(colour=BLUE, kind="above", things=(dog_face, dog))
    assert grader.grade("狗在狗上面，蓝色背景", pair).everything
    assert not grader.grade("狗头在狗头上面，蓝色背景", pair).object


def test_summarize_captions_counts_and_names_confusions(world: EmojiWorld) -> None:
    grader = CaptionGrader(world.candidates)
    apple, fox = world.things[:2]
    one = Scene(colour=BLUE, kind="one", things=(fox,))
    pair = Scene(colour=BLUE, kind="beside", things=(fox, apple))
    grades = [
        grader.grade(text, scene)
        for scene, text in [
            (one, "蓝色背景上的狐狸"),
            (one, "白色背景上的两只小狗"),
            (one, "白色背景上的狗"),
            (one, "胡言乱语"),
            (one, "狐狸"),
            (pair, "狐狸在鱼左边，蓝色背景"),
            (pair, "狗在鱼上面，蓝色背景"),  # who was meant to be whom is not plain
        ]
    ]
    summary = summarize_captions(grades)
    assert (summary["captions"], summary["unreadable"]) == (7, 1)
    assert summary["colour"] == accuracy(3, 7)
    assert summary["object"] == accuracy(2, 7)
    assert summary["count"] == {"right": 0, "of": 0, "accuracy": None, "low": None, "high": None}
    assert summary["relation"] == accuracy(0, 2)
    assert summary["everything"] == accuracy(1, 7)
    assert summary["confusions"] == [
        {"shown": "蓝色", "said": "白色", "times": 2},
        {"shown": "狐狸", "said": "狗", "times": 2},
        {"shown": "蓝色", "said": "", "times": 1},
        {"shown": "红苹果", "said": "鱼", "times": 1},
    ]
    assert len(summarize_captions(grades, max_confusions=2)["confusions"]) == 2


def wrong_colour(scene: Scene) -> Scene:
    return replace(scene, colour=WHITE if scene.colour != WHITE else BLUE)


def wrong_count(scene: Scene) -> Scene:
    """One more or fewer of several; other scenes as they are."""
    return replace(scene, count=2 if scene.count == 4 else scene.count + 1) if scene.kind == "many" else scene


def swapped(scene: Scene) -> Scene:
    return replace(scene, things=scene.things[::-1])


@pytest.mark.parametrize(
    ("fault", "wrong"),
    [
        (lambda scene: scene, {}),
        (wrong_colour, {"colour": ("one", "many", "beside", "above")}),
        (wrong_count, {"count": ("many",)}),
        (swapped, {"relation": ("beside", "above")}),
    ],
)
def test_evaluate_captions_measures_planted_captions_exactly(
    world: EmojiWorld, fault: Any, wrong: dict[str, tuple[str, ...]]
) -> None:
    """The captions of every third scene have one fault, and all captions of reconstructions are nonsense."""

    def write(number: int, scene: Scene) -> str:
        return world.caption(scene if number % 3 else fault(scene), number, complete=True)

    captioner = Captioner(world, 40, 7, write, lambda number, scene: "恐龙")
    report = evaluate_captions(captioner, world, count=40, seed=7, batch_size=16)  # type: ignore[arg-type]
    assert captioner.batches == 2 * [16, 16, 8]
    scenes = [scene for scene, _ in held_out_scenes(world, 40, 7)]
    asked_of = {
        "colour": [True] * 40,
        "object": [True] * 40,
        "count": [scene.kind == "many" for scene in scenes],
        "relation": [scene.kind in ("beside", "above") for scene in scenes],
        "everything": [True] * 40,
    }
    kinds = {kind for some in wrong.values() for kind in some}
    for part in PARTS:
        faulty_kinds = kinds if part == "everything" else wrong.get(part, ())
        faulty = sum(scene.kind in faulty_kinds for scene in scenes[::3])
        assert faulty > 3 or not faulty_kinds
        of = sum(asked_of[part])
        assert report["true_scenes"][part] == accuracy(of - faulty, of)
        assert report["reconstructions"][part] == accuracy(0, of)
    assert (report["true_scenes"]["unreadable"], report["reconstructions"]["unreadable"]) == (0, 40)
    assert report["reconstructions"]["confusions"] == []


def test_evaluate_captions_lists_captions_beside_right_ones(world: EmojiWorld) -> None:
    def write(number: int, scene: Scene) -> str:
        return world.caption(scene if number else wrong_colour(scene), number, complete=True)

    captioner = Captioner(world, 3, 0, write, lambda number, scene: "恐龙")
    report = evaluate_captions(captioner, world, count=3, seed=0, batch_size=2)  # type: ignore[arg-type]
    assert report["captions"] == [
        {
            "meaning": scene.meaning,
            "right_caption": caption,
            "true_scenes": {
                "caption": write(number, scene),
                "log_probability": -2.5,
                "readable": True,
                "right": number > 0,
            },
            "reconstructions": {"caption": "恐龙", "log_probability": -2.5, "readable": False, "right": False},
        }
        for number, (scene, caption) in enumerate(held_out_scenes(world, 3, 0))
    ]


def test_evaluate_captions_describes_its_protocol(world: EmojiWorld) -> None:
    made = {}
    for seed in (0, 1):
        captioner = Captioner(world, 4, seed, lambda number, scene: "狐狸", lambda number, scene: "狐狸")
        made[seed] = evaluate_captions(captioner, world, count=4, seed=seed, batch_size=4)["protocol"]  # type: ignore[arg-type]
    assert (made[0]["captions"], made[0]["seed"], made[0]["things"], made[0]["candidates"]) == (4, 0, 6, 6)
    assert (made[0]["model"], made[0]["method"], made[0]["world"]["canvas"]) == ("captioner", "greedy", 64)
    assert made[0]["captions_sha256"] != made[1]["captions_sha256"]


def test_evaluate_captions_refuses_another_world(make_tiny_world: Callable[..., EmojiWorld], world: EmojiWorld) -> None:
    captioner = Captioner(world, 1, 0, lambda number, scene: "", lambda number, scene: "")
    with pytest.raises(InputError, match="generates 64 pixels, the world has 128: use the recipe of the model"):
        evaluate_captions(captioner, make_tiny_world(canvas=128), count=1, seed=0, batch_size=1)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="knows 6 objects, not the 3 of this world: use the recipe of the model"):
        evaluate_captions(captioner, make_tiny_world(things=3), count=1, seed=0, batch_size=1)  # type: ignore[arg-type]


def test_format_caption_report_is_a_table() -> None:
    sure = {"right": 9, "of": 10, "accuracy": 0.9, "low": 0.596, "high": 0.982}
    none = accuracy(0, 0)
    grades = {"colour": sure, "object": sure, "count": none, "relation": sure, "everything": sure}
    report = {"true_scenes": {**grades, "unreadable": 0}, "reconstructions": {**grades, "unreadable": 1}}
    lines = format_caption_report(report).splitlines()
    assert lines[0] == "| right | true scenes | VQ-VAE's reconstructions |"
    assert lines[2] == "| colour (of 10) |" + 2 * " 90.0% (59.6%–98.2%) |"
    assert lines[4] == "| count (of 0) | – | – |"
    assert lines[-1] == (
        "Captions that cannot be read, and count as wrong: 0 of true scenes, 1 of VQ-VAE's reconstructions."
    )
