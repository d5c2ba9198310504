"""Sampling of the scenes of a rich world."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from cogview.data.keyed_random import KeyedRandom
from cogview.emoji.attributes import BOARDS, PATTERNS, STYLES, TYPEFACES, Sign, Style, scene_tables
from cogview.emoji.scene import NUM_THINGS, PLACES, Colour, Scene, SceneKind, SceneWeights
from cogview.emoji.settings import WorldSettings
from cogview.emoji.things import VARIATION_SELECTOR, EmojiObject
from cogview.errors import InputError

_WORDS = 50  # percentage of the texts of two characters that are words; the others are random
_PAIRS = 60  # percentage of the texts that have two characters


class SceneSampler:
    """Sampler of the scenes of a rich world, held out or not.

    Args:
        settings: Settings of the world.
        things: Objects of the scenes.
        colours: Backgrounds.
        characters: Characters of signs.
        weights: Frequencies of the kinds of scenes.

    Raises:
        InputError: The weights require a container, and no object is one.
    """

    def __init__(
        self,
        settings: WorldSettings,
        things: Sequence[EmojiObject],
        colours: Sequence[Colour],
        characters: str,
        weights: SceneWeights,
    ) -> None:
        self.settings, self.things, self.colours, self.weights = settings, things, colours, weights
        self.characters = characters
        self.styles: tuple[Style, ...] = tuple(style for style in STYLES if style.key in settings.styles) or STYLES[:1]
        containers = scene_tables().containers
        self.containers = [thing for thing in things if thing.emoji.replace(VARIATION_SELECTOR, "") in containers]
        if weights.inside and not self.containers:
            raise InputError(
                f"none of the {len(things)} objects can hold another one; ask for more, or leave the weight "
                f"of inside out"
            )
        self.words = [word for word in scene_tables().words if set(word) <= set(characters)]

    def sample(self, random: KeyedRandom, kind: SceneKind | None = None) -> Scene:
        """Return a scene.

        Args:
            random: Source of its content.
            kind: Its kind; sampled by the weights if None.
        """
        colour = random.pick(self.colours)
        pattern = random.pick(PATTERNS) if random.chance(self.settings.patterns) else None
        style = random.pick(self.styles)
        kind = kind or self._sample_kind(random)
        count = 2 + random.randbelow(self.settings.max_count - 1) if kind == "many" else 1
        sign = self.sample_sign(random, colour) if kind in ("sign", "label") else None
        return Scene(
            colour=colour,
            kind=kind,
            things=self.sample_things(random, kind),
            count=count,
            style=style if NUM_THINGS[kind] else STYLES[0],
            pattern=pattern,
            sign=sign,
        )

    def _sample_kind(self, random: KeyedRandom) -> SceneKind:
        weights = self.weights.by_name
        index = random.randbelow(sum(weights.values()))
        ends = accumulate(weights.values())
        name = next(name for name, end in zip(weights, ends, strict=True) if index < end)
        choices: dict[str, tuple[SceneKind, ...]] = {"pair": ("beside", "above"), "place": PLACES, "on_top": ("on",)}
        return random.pick(choices[name]) if name in choices else name  # type: ignore[return-value]

    def sample_things(self, random: KeyedRandom, kind: SceneKind) -> tuple[EmojiObject, ...]:
        """Return different objects for a kind of scene; the first of ``inside`` is a container.

        Args:
            random: Source of the objects.
            kind: Kind of the scene.
        """
        chosen: list[EmojiObject] = []
        while len(chosen) < NUM_THINGS[kind]:
            thing = random.pick(self.containers if kind == "inside" and not chosen else self.things)
            if thing not in chosen:
                chosen.append(thing)
        return tuple(chosen)

    def sample_sign(self, random: KeyedRandom, background: Colour) -> Sign:
        """Return a sign whose board has another colour than the background.

        Args:
            random: Source of the sign.
            background: The background.
        """
        board = random.pick([board for board in BOARDS if board.name != background.name])
        typeface = random.pick(TYPEFACES)
        return Sign(text=self.sample_text(random), board=board, typeface=typeface)

    def sample_text(self, random: KeyedRandom) -> str:
        """Return one or two characters.

        Args:
            random: Source of the text.
        """
        if not random.chance(_PAIRS):
            return random.pick(self.characters)
        if self.words and random.chance(_WORDS):
            return random.pick(self.words)
        return random.pick(self.characters) + random.pick(self.characters)
