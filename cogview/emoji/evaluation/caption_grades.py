"""Grades of captions: the objects, count, relation and colour that a caption names.

Captions are parsed by the grammar that describes scenes. They are therefore graded by their content, in any of the
wordings of the grammar.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cogview.emoji.captions import CaptionReader, ParsedCaption
from cogview.emoji.grader import SceneGrade
from cogview.emoji.scene import COLOURS, Colour, Scene
from cogview.emoji.things import EmojiObject


@dataclass(frozen=True, kw_only=True)
class CaptionGrade(SceneGrade):
    """Grade of a caption; a name that several objects share counts for each of them.

    ``colour``: the background is named, and correctly. ``object``: for one object and for several of one, a single
    object is named and it is the right one, with any count; for a pair, both objects are named, in any order.
    ``count``: the number is right, for any object. ``relation``: the relation is named, and each object is on its
    side.

    Args:
        parsed: The content of the caption; None if it cannot be parsed, and then every part is wrong.
        names: Names of the objects in ``parsed`` by emoji.
    """

    parsed: ParsedCaption | None
    names: Mapping[str, str]

    @property
    def everything(self) -> bool:
        """Whether no part is wrong, and the count is right for a single object too."""
        return self.parsed is not None and self.parsed.count == self.scene.count and super().everything

    def confusions(self) -> list[tuple[str, str]]:
        """Return (asked, named) of a readable caption; ``named`` is "" for a background that is not mentioned."""
        scene, parsed = self.scene, self.parsed
        if parsed is None:
            return []
        pairs = [] if self.colour is not False else [(scene.colour.name, parsed.colour.name if parsed.colour else "")]
        same_arrangement = parsed.kind == scene.kind or len(scene.things) == len(parsed.things) == 1
        if self.object is False and same_arrangement:
            for thing, meant in zip(scene.things, parsed.things, strict=True):
                if thing.emoji not in meant:
                    named = [name for emoji, name in self.names.items() if emoji in meant]
                    pairs.append((thing.name, "/".join(named)))
        return pairs


class CaptionGrader:
    """Grader of captions of scenes.

    Args:
        things: Objects that a caption may name.
        colours: Backgrounds that a caption may name.
    """

    def __init__(self, things: Sequence[EmojiObject], colours: Sequence[Colour] = COLOURS) -> None:
        self.reader = CaptionReader(things, colours)
        self.names = {thing.emoji: thing.name for thing in things}

    def grade(self, text: str, scene: Scene) -> CaptionGrade:
        """Return the grade of a caption for a scene; of several readings, that of the best one.

        Args:
            text: The caption.
            scene: The scene that it describes.
        """
        grades = [self._grade(parsed, scene) for parsed in self.reader.parses(text)]
        if not grades:
            return self._unreadable(scene)
        return max(grades, key=lambda grade: (grade.everything, sum(part is True for part in grade.parts.values())))

    def _unreadable(self, scene: Scene) -> CaptionGrade:
        """Grade of a text that is no caption."""
        return CaptionGrade(
            scene=scene,
            parsed=None,
            names=self.names,
            colour=False,
            object=False,
            count=False if scene.kind == "many" else None,
            relation=False if len(scene.things) == 2 else None,
        )

    def _grade(self, parsed: ParsedCaption, scene: Scene) -> CaptionGrade:
        """Grade of one reading of a caption."""
        shown = [thing.emoji for thing in scene.things]
        in_order = _all_named(shown, parsed.things)
        count = relation = None
        if len(shown) == 1:
            named = in_order
            count = parsed.count == scene.count if scene.kind == "many" else None
        else:
            named = in_order or _all_named(shown[::-1], parsed.things)
            relation = parsed.kind == scene.kind and in_order
        return CaptionGrade(
            scene=scene,
            parsed=parsed,
            names=self.names,
            colour=parsed.colour is not None and parsed.colour.name == scene.colour.name,
            object=named,
            count=count,
            relation=relation,
        )


def _all_named(shown: Sequence[str], named: Sequence[frozenset[str]]) -> bool:
    """Whether the names may mean the emoji shown, in their order and no others."""
    return len(shown) == len(named) and all(emoji in meant for emoji, meant in zip(shown, named, strict=True))
