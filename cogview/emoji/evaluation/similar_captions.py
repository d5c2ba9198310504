"""Captions of scenes with one difference, among which a model should prefer the right one."""

from __future__ import annotations

from dataclasses import replace

from cogview.data.keyed_random import KeyedRandom
from cogview.emoji.scene import Scene
from cogview.emoji.world import EmojiWorld


def similar_captions(world: EmojiWorld, scene: Scene, seed: int) -> list[str]:
    """Return the caption of a scene, then captions in the same wording of scenes with one difference.

    Another background, another object, another number, other characters, or of several objects the opposite order.

    Args:
        world: The world of the scene.
        scene: The scene.
        seed: Seed of the wording and of the differences.
    """
    random = KeyedRandom("similar", seed, scene.meaning)
    boards = [] if scene.sign is None else [scene.sign.board.name]
    colour = random.pick([each for each in world.colours if each.name not in (scene.colour.name, *boards)])
    others = [replace(scene, colour=colour)]
    if scene.things:
        names = {name for thing in scene.things for name in thing.names}
        thing = random.pick([each for each in world.things if not names & set(each.names)])
        others.append(replace(scene, things=(thing, *scene.things[1:])))
    if scene.kind == "many":
        counts = range(2, world.settings.max_count + 1)
        others.append(replace(scene, count=random.pick([each for each in counts if each != scene.count])))
    elif len(scene.things) > 1:
        others.append(replace(scene, things=scene.things[::-1]))
    if scene.sign is not None and world.characters is not None:
        first = random.pick([each for each in world.characters.characters if each not in scene.sign.text])
        others.append(replace(scene, sign=replace(scene.sign, text=first + scene.sign.text[1:])))
    return [world.caption(each, seed, complete=True, wording=scene) for each in (scene, *others)]
