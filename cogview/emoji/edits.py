"""Edits of scenes: a source, a change that an instruction asks for, and the result, which shares everything else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np

from cogview.data.keyed_random import KeyedRandom
from cogview.emoji.attributes import PATTERNS, Pattern, Style
from cogview.emoji.sampling import SceneSampler
from cogview.emoji.scene import PLACES, Colour, Scene, SceneKind, SceneWeights
from cogview.emoji.settings import WorldSettings
from cogview.emoji.things import EmojiObject
from cogview.emoji.world import EmojiWorld
from cogview.errors import InputError

EditKind = Literal["background", "replace", "add", "remove", "count", "swap", "style", "text"]
EDIT_KINDS: tuple[EditKind, ...] = ("background", "replace", "add", "remove", "count", "swap", "style", "text")

_ANY_THINGS: tuple[SceneKind, ...] = ("one", "many", "beside", "above", *PLACES, "row", "inside", "on", "label")
_SOURCES: dict[EditKind, tuple[SceneKind, ...]] = {
    "background": (*_ANY_THINGS, "sign"),
    "replace": _ANY_THINGS,
    "add": ("one", *PLACES),
    "remove": ("beside", "above", "inside"),
    "count": ("one", "many"),
    "swap": ("beside", "above"),
    "style": _ANY_THINGS,
    "text": ("sign", "label"),
}
_OPPOSITE: dict[SceneKind, SceneKind] = {"left": "right", "right": "left", "top": "bottom", "bottom": "top"}
_PAIR_OF: dict[SceneKind, SceneKind] = {"left": "beside", "right": "beside", "top": "above", "bottom": "above"}
_WEIGHT_OF: dict[SceneKind, str] = {"beside": "pair", "above": "pair", "on": "on_top", **dict.fromkeys(PLACES, "place")}
_CODES = 8  # on a side of an image


@dataclass(frozen=True, kw_only=True)
class Change:
    """A change of a scene.

    Args:
        kind: Kind of the change.
        colour: The new background, for ``background``.
        pattern: The pattern of the new background; None if it is plain.
        old: The object that is replaced or removed.
        new: The object that replaces it or is added.
        place: Side of the object that is added.
        count: The new number of objects.
        style: The new style.
        text: The new characters.
    """

    kind: EditKind
    colour: Colour | None = None
    pattern: Pattern | None = None
    old: EmojiObject | None = None
    new: EmojiObject | None = None
    place: SceneKind | None = None
    count: int | None = None
    style: Style | None = None
    text: str | None = None


@dataclass(frozen=True, kw_only=True)
class Edit:
    """An edit of a scene.

    Args:
        source: The scene before.
        change: The change.
        result: The scene after.
    """

    source: Scene
    change: Change
    result: Scene

    @property
    def meaning(self) -> str:
        """The meanings of both scenes."""
        return f"{self.source.meaning} > {self.result.meaning}"

    @property
    def held_out(self) -> bool:
        """Whether the result is for evaluation only."""
        return self.result.held_out


def apply_change(scene: Scene, change: Change) -> Scene | None:
    """Return the scene after a change, which is as before in everything that the change does not name.

    Args:
        scene: The scene before.
        change: The change.

    Returns:
        The scene; None if it cannot be changed so, or would be as before.
    """
    if scene.kind not in _SOURCES[change.kind]:
        return None
    if change.kind in ("add", "remove", "replace"):
        result = _with_things(scene, change)
    elif change.kind == "background" and change.colour is not None:
        is_board = scene.sign is not None and scene.sign.board.name == change.colour.name
        result = None if is_board else replace(scene, colour=change.colour, pattern=change.pattern)
    elif change.kind == "count" and change.count is not None:
        kind: SceneKind = "one" if change.count == 1 else "many"
        result = replace(scene, kind=kind, count=change.count)
    elif change.kind == "swap":
        result = replace(scene, things=scene.things[::-1])
    elif change.kind == "style" and change.style is not None:
        result = replace(scene, style=change.style)
    elif change.kind == "text" and change.text and scene.sign is not None:
        result = replace(scene, sign=replace(scene.sign, text=change.text))
    else:
        result = None
    return None if result == scene else result


def _with_things(scene: Scene, change: Change) -> Scene | None:
    """The scene with an object more, less or another one."""
    if change.new is not None and change.new in scene.things:
        return None
    if change.kind == "add":
        if change.new is None or change.place not in PLACES:
            return None
        if scene.kind != "one" and scene.kind != _OPPOSITE[change.place]:
            return None
        both = (scene.things[0], change.new)
        things = both[::-1] if change.place in ("left", "top") else both
        return replace(scene, kind=_PAIR_OF[change.place], things=things)
    if change.old not in scene.things:
        return None
    if change.kind == "replace":
        if change.new is None:
            return None
        return replace(scene, things=tuple(change.new if one == change.old else one for one in scene.things))
    if scene.kind == "inside":
        return replace(scene, kind="one", things=scene.things[:1]) if change.old == scene.things[1] else None
    first, second = scene.things
    places: tuple[SceneKind, SceneKind] = ("left", "right") if scene.kind == "beside" else ("top", "bottom")
    kind, kept = (places[1], second) if change.old == first else (places[0], first)
    return replace(scene, kind=kind, things=(kept,))


class EditSampler:
    """Sampler of edits of one world.

    Args:
        world: The world of the scenes.
        weights: Frequencies of the kinds of scenes that are edited; those of the world if None.
    """

    def __init__(self, world: EmojiWorld, weights: SceneWeights | None = None) -> None:
        self.world = world
        self.weights = weights or world.settings.weights
        self._sources = {
            kind: tuple(source for source in sources for _ in range(self._frequency(source)))
            for kind, sources in _SOURCES.items()
        }
        if self._sources["replace"]:  # what is left of a pair, to which something can be added again
            self._sources["add"] += tuple(place for place in PLACES if place not in self._sources["add"])
        self.kinds = tuple(kind for kind in EDIT_KINDS if self._sources[kind] and self._is_possible(kind))
        if not self.kinds:
            raise InputError("no scene of this world can be edited")

    def _frequency(self, kind: SceneKind) -> int:
        """Relative frequency of the sources of a kind; kinds that share a weight divide it."""
        name = _WEIGHT_OF.get(kind, kind)
        kinds = len(PLACES) if name == "place" else 2 if name == "pair" else 1
        return len(PLACES) // kinds * self.weights.by_name[name]

    def _is_possible(self, kind: EditKind) -> bool:
        settings: WorldSettings = self.world.settings
        if kind == "style":
            return len(settings.styles) > 1
        return kind != "text" or settings.characters > 1

    @cached_property
    def _scenes(self) -> SceneSampler:
        return self.world.sampler(self.weights)

    def sample(self, seed: int, index: int, held_out: bool = False, kind: EditKind | None = None) -> Edit:
        """Return an edit, as a function of the arguments and the world.

        Neither scene of a training edit is held out; of a held-out one, the result is.

        Args:
            seed: Seed of the edits.
            index: Index of the edit, from 0.
            held_out: Whether the result is held out.
            kind: Kind of the change; all are equally frequent if None.

        Raises:
            InputError: The world has no edits of the kind.
        """
        if kind is not None and kind not in self.kinds:
            raise InputError(f"this world has no edits of kind {kind}; it has: {', '.join(self.kinds)}")
        random = KeyedRandom("edit", seed, index, held_out, *(() if kind is None else (kind,)))
        chosen: EditKind = random.pick(self.kinds) if kind is None else kind
        while True:
            source = self._scenes.sample(random, random.pick(self._sources[chosen]))
            edit = self._edit(source, chosen, random)
            if edit is not None and edit.held_out == held_out and (held_out or not source.held_out):
                return edit

    def sample_chain(self, seed: int, index: int, length: int) -> tuple[Edit, ...]:
        """Return edits, each of the result of the one before; their results are not held out.

        Args:
            seed: Seed of the chain.
            index: Index of the chain, from 0.
            length: Number of edits, at least 1.
        """
        edits = [self.sample(seed, index)]
        random = KeyedRandom("edits", seed, index)
        while len(edits) < length:
            edit = self._edit(edits[-1].result, random.pick(self.kinds), random)
            if edit is not None and not edit.held_out:
                edits.append(edit)
        return tuple(edits)

    def _edit(self, source: Scene, kind: EditKind, random: KeyedRandom) -> Edit | None:
        """An edit of a scene; None if a sampled change does not suit it."""
        if source.kind not in _SOURCES[kind]:
            return None
        change = self._change(source, kind, random)
        result = apply_change(source, change)
        return None if result is None else Edit(source=source, change=change, result=result)

    def _change(self, source: Scene, kind: EditKind, random: KeyedRandom) -> Change:
        scenes, settings = self._scenes, self.world.settings
        if kind == "background":
            pattern = random.pick(PATTERNS) if random.chance(settings.patterns) else None
            return Change(kind=kind, colour=random.pick(scenes.colours), pattern=pattern)
        if kind == "replace":
            old = random.pick(source.things)
            outer = source.kind == "inside" and old == source.things[0]
            return Change(kind=kind, old=old, new=random.pick(scenes.containers if outer else scenes.things))
        if kind == "add":
            places = PLACES if source.kind == "one" else (_OPPOSITE[source.kind],)
            return Change(kind=kind, new=random.pick(scenes.things), place=random.pick(places))
        if kind == "remove":
            return Change(kind=kind, old=source.things[1] if source.kind == "inside" else random.pick(source.things))
        if kind == "count":
            return Change(kind=kind, count=1 + random.randbelow(settings.max_count))
        if kind == "style":
            return Change(kind=kind, style=random.pick(scenes.styles))
        return Change(kind=kind, text=scenes.sample_text(random)) if kind == "text" else Change(kind=kind)


def changed_cells(world: EmojiWorld, edit: Edit) -> np.ndarray:
    """Return which codes of a true edit show other pixels than before: bool (8, 8).

    Args:
        world: The world of the scenes.
        edit: The edit.
    """
    before, after = (world.render(scene) for scene in (edit.source, edit.result))
    side = len(before) // _CODES
    differs = (before != after).any(axis=2)
    changed: np.ndarray = differs.reshape(_CODES, side, _CODES, side).any(axis=(1, 3))
    return changed


def unchanged_share(before: np.ndarray, after: np.ndarray, changed: Sequence[Sequence[bool]] | np.ndarray) -> float:
    """Return the share of equal codes among those that an edit should not change; 1 if it should change all.

    Args:
        before: Codes of the source, (G, G).
        after: Codes of the result, (G, G).
        changed: bool (G, G), the codes that may differ.

    Raises:
        ValueError: The shapes differ.
    """
    mask = ~np.asarray(changed, dtype=bool)
    if before.shape != after.shape or before.shape != mask.shape:
        raise ValueError(f"codes and mask differ in shape: {before.shape}, {after.shape}, {mask.shape}")
    return float((before == after)[mask].mean()) if mask.any() else 1.0
