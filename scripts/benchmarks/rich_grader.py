"""Measure the grader of rich worlds: the true images that it finds right, and the planted faults that it notices.

The scenes are held out. Images are as rendered, or poor: blurred by a filter of 3 x 3 pixels, with Gaussian noise of
standard deviation 10. A fault is noticed if the part that it concerns is wrong.

python scripts/benchmarks/rich_grader.py WORLD [--scenes 500] [--poor]
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import arguments
import numpy as np
from PIL import Image, ImageFilter

from cogview.data.keyed_random import KeyedRandom
from cogview.emoji.attributes import PATTERNS, TYPEFACES
from cogview.emoji.rich_grades import RichGrader
from cogview.emoji.scene import NUM_THINGS, Scene, SceneKind
from cogview.emoji.world import EmojiWorld
from cogview.errors import InputError
from cogview.evaluation.metrics import accuracy, format_accuracy

NOISE = 10.0
Fault = Callable[[EmojiWorld, Scene, KeyedRandom], Scene | None]


def held_out_of_kind(world: EmojiWorld, kind: SceneKind, count: int) -> Iterator[Scene]:
    """Yield held-out scenes of a kind.

    Args:
        world: The world.
        kind: The kind.
        count: Number of scenes.
    """
    index = 0
    while count:
        scene = world.sampler().sample(KeyedRandom("grader", kind, index), kind)
        index += 1
        if scene.held_out:
            count -= 1
            yield scene


def spoil(image: np.ndarray, seed: int) -> np.ndarray:
    """Return an image, blurred and with noise.

    Args:
        image: uint8 RGB (H, W, 3).
        seed: Seed of the noise.
    """
    blurred = np.asarray(Image.fromarray(image).filter(ImageFilter.BoxBlur(1)))
    noise = np.random.default_rng(seed).normal(0, NOISE, image.shape)
    spoilt: np.ndarray = np.clip(blurred + noise, 0, 255).astype(np.uint8)
    return spoilt


def _other_style(world: EmojiWorld, scene: Scene, random: KeyedRandom) -> Scene | None:
    styles = [style for style in world.sampler().styles if style != scene.style]
    return replace(scene, style=random.pick(styles)) if styles and scene.things else None


def _other_thing(world: EmojiWorld, scene: Scene, random: KeyedRandom) -> Scene | None:
    if not scene.things:
        return None
    number = random.randbelow(len(scene.things))
    thing = random.pick([thing for thing in world.things if thing not in scene.things])
    return replace(scene, things=(*scene.things[:number], thing, *scene.things[number + 1 :]))


def _fewer(world: EmojiWorld, scene: Scene, random: KeyedRandom) -> Scene | None:
    return replace(scene, count=scene.count - 1) if scene.count > 2 else None


def _swapped(world: EmojiWorld, scene: Scene, random: KeyedRandom) -> Scene | None:
    return replace(scene, things=scene.things[::-1]) if len(scene.things) > 1 else None


def _other_colour(world: EmojiWorld, scene: Scene, random: KeyedRandom) -> Scene | None:
    boards = [] if scene.sign is None else [scene.sign.board.name]
    colours = [each for each in world.colours if each.name not in (scene.colour.name, *boards)]
    return replace(scene, colour=random.pick(colours))


def _other_pattern(world: EmojiWorld, scene: Scene, random: KeyedRandom) -> Scene | None:
    return replace(scene, pattern=random.pick([each for each in (None, *PATTERNS) if each != scene.pattern]))


def _similar_character(world: EmojiWorld, scene: Scene, random: KeyedRandom) -> Scene | None:
    """Another first character, the one of the nearest form."""
    if scene.sign is None or world.characters is None:
        return None
    known = world.characters
    bitmaps = known.bitmaps[TYPEFACES.index(scene.sign.typeface), :, ::4, ::4].astype(float)
    index = known.characters.index(scene.sign.text[0])
    distances = np.square(bitmaps - bitmaps[index]).mean(axis=(1, 2))
    distances[index] = np.inf
    text = known.characters[int(distances.argmin())] + scene.sign.text[1:]
    return replace(scene, sign=replace(scene.sign, text=text))


FAULTS: dict[str, tuple[str, Fault]] = {
    "another style": ("style", _other_style),
    "another object": ("object", _other_thing),
    "one less": ("count", _fewer),
    "opposite order": ("relation", _swapped),
    "another colour": ("colour", _other_colour),
    "another pattern": ("colour", _other_pattern),
    "a similar character": ("characters", _similar_character),
}
"""Faults by name: the part that they concern, and the scene that is shown instead; None if there is none."""


def main() -> int:
    """Print the two tables."""
    parser = arguments.Parser(__doc__)
    parser.add_argument("world", type=arguments.folder, help="folder of a rich world, as cogview scenes writes it")
    parser.add_argument(
        "--scenes", type=arguments.count, default=500, help="number of scenes of each kind (default: 500)"
    )
    parser.add_argument("--poor", action="store_true", help="blur the images and add noise")
    options = parser.parse_args()
    world = EmojiWorld.load(options.world)
    if not world.settings.is_rich:
        raise InputError(f"{options.world} is a plain world; expected a rich one")
    measure(world, options.scenes, poor=options.poor)
    return 0


def measure(world: EmojiWorld, count: int, *, poor: bool) -> None:
    """Print what the grader finds in images of each kind, and the faults that it notices.

    Args:
        world: The world.
        count: Number of scenes of each kind.
        poor: Blur the images and add noise.
    """
    grader = RichGrader(world)
    weights = world.settings.weights.by_name
    noticed: dict[str, list[bool]] = {name: [] for name in FAULTS}
    graded, started = 0, time.process_time()
    print("| kind | everything right |\n|---|---|")
    for kind in NUM_THINGS:
        name = {"beside": "pair", "above": "pair", "on": "on_top"}.get(kind, kind)
        if not weights.get("place" if kind in ("left", "right", "top", "bottom") else name):
            continue
        right = []
        for number, scene in enumerate(held_out_of_kind(world, kind, count)):
            random = KeyedRandom("fault", kind, number)
            image = world.render(scene)
            right.append(grader.grade(spoil(image, number) if poor else image, scene).everything)
            fault = random.pick(tuple(FAULTS))
            part, change = FAULTS[fault]
            shown = change(world, scene, random)
            graded += 1
            if shown is not None:
                image = world.render(shown)
                grade = grader.grade(spoil(image, number) if poor else image, scene)
                noticed[fault].append(grade.parts[part] is False)
                graded += 1
        print(f"| {kind} | {format_accuracy(accuracy(sum(right), len(right)))} |", flush=True)
    print("\n| fault | noticed |\n|---|---|")
    for fault, found in noticed.items():
        print(f"| {fault} (of {len(found)}) | {format_accuracy(accuracy(sum(found), len(found)))} |")
    print(f"\n{(time.process_time() - started) / graded:.3f} s of CPU time an image")


if __name__ == "__main__":
    arguments.run_script(main)
