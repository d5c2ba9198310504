"""Grades of images of rich worlds and of edits: compare what the grader finds with what a caption describes."""

# H, W canvas in pixels
from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cogview.emoji.captions import ParsedCaption, ParsedSign
from cogview.emoji.edits import Edit
from cogview.emoji.grader import ImageGrade, SceneGrade, SceneGrader
from cogview.emoji.rich_grader import RichExplainer, RichExplanation
from cogview.emoji.rich_reader import match_names
from cogview.emoji.scene import Scene, layout_of
from cogview.emoji.world import EmojiWorld

# Kinds of scenes with a relation or a place.
_RELATED = ("beside", "above", "left", "right", "top", "bottom", "row", "inside", "on", "label")


@dataclass(frozen=True, kw_only=True)
class Verdicts:
    """Verdicts on an image; None for a part that the description leaves open or does not have.

    Args:
        colour: The background is right, with its pattern, and so is the colour of the sign.
        object: For one object, exactly one is found and it is the right one; for several of one, more than half of the
            found objects are that object; for different ones, these and no others are found, at any position.
        count: For several of one object, as many objects are found, of any kind.
        relation: Each object is at its place, and so is the sign below it.
        style: Every object that is found has the right style; for a sign, the typeface is right.
        characters: The sign has the right characters, and nothing is beside a sign that stands alone.
    """

    colour: bool | None
    object: bool | None
    count: bool | None
    relation: bool | None
    style: bool | None
    characters: bool | None

    @property
    def everything(self) -> bool:
        """Whether no part is wrong."""
        return all(part is not False for part in vars(self).values())


@dataclass(frozen=True, kw_only=True)
class RichGrade(SceneGrade):
    """Grade of an image of a rich world; the verdicts are those of ``Verdicts``.

    Args:
        style: The style or the typeface is right.
        characters: The characters of the sign are right.
        explanation: The content that the grader found.
    """

    style: bool | None
    characters: bool | None
    explanation: RichExplanation

    @property
    def parts(self) -> dict[str, bool | None]:
        """The verdicts by their names."""
        return {**super().parts, "style": self.style, "characters": self.characters}

    def confusions(self) -> list[tuple[str, str]]:
        """Return (asked, found); ``found`` is "" for every object of which there is no counterpart."""
        scene, found = self.scene, self.explanation
        pairs = []
        asked_shade, found_shade = (
            each.colour.name + (each.pattern.name if each.pattern else "") for each in (scene, found)
        )
        if asked_shade != found_shade:
            pairs.append((asked_shade, found_shade))
        if not self.object and self.object is not None:
            if not found.things:
                pairs.extend((thing.name, "") for thing in scene.things)
            elif len(scene.things) == 1:
                pairs.append((scene.things[0].name, Counter(thing.name for thing in found.things).most_common(1)[0][0]))
            elif found.layout == scene.kind and len(found.things) == len(scene.things):
                named = zip(scene.things, found.things, strict=True)
                pairs.extend((asked.name, shown.name) for asked, shown in named if asked.emoji != shown.emoji)
        if scene.things and self.style is False:
            wrong = Counter(style.name for style in found.styles if style != scene.style)
            pairs.extend((scene.style.name, name) for name, _ in wrong.most_common(1))
        if self.characters is False and scene.sign is not None:
            pairs.append((scene.sign.text, found.sign.text if found.sign else ""))
        return pairs


@dataclass(frozen=True, kw_only=True)
class EditGrade:
    """Grade of the result of an edit.

    Args:
        result: The grade for the scene after the edit.
        arrangement: The objects are in the cells of that scene, and no others.
        unchanged: The image shows the scene before the edit.
    """

    result: RichGrade
    arrangement: bool
    unchanged: bool

    @property
    def everything(self) -> bool:
        """Whether the image shows the scene after the edit."""
        return self.result.everything and self.arrangement


class RichGrader(RichExplainer):
    """Grader of images of one rich world; scaled sprites are kept, so one grader should grade many images."""

    def grade(self, image: np.ndarray, scene: Scene, /) -> RichGrade:
        """Return the grade of an image for a scene, every part of which is asked for.

        Args:
            image: uint8 RGB (H, W, 3) of the world's canvas.
            scene: The scene that it should show.
        """
        return grade_for_scene(self.explain(image), scene)

    def grade_edit(self, image: np.ndarray, edit: Edit, /) -> EditGrade:
        """Return the grade of the result of an edit.

        Args:
            image: The result, uint8 RGB (H, W, 3) of the world's canvas.
            edit: The edit that was asked for.
        """
        found = self.explain(image)
        before = grade_for_scene(found, edit.source)
        return EditGrade(
            result=grade_for_scene(found, edit.result),
            arrangement=_is_arranged_as(found, edit.result),
            unchanged=before.everything and _is_arranged_as(found, edit.source),
        )


def _is_arranged_as(found: RichExplanation, scene: Scene) -> bool:
    return found.layout == layout_of(scene) and len(found.things) == len(scene.shown)


AnyGrade = ImageGrade | RichGrade
AnyGrader = SceneGrader | RichGrader


def make_grader(world: EmojiWorld) -> AnyGrader:
    """Return the grader of a world.

    Args:
        world: The world of the images.
    """
    return RichGrader(world) if world.settings.is_rich else SceneGrader(world)


def describe_scene(scene: Scene) -> ParsedCaption:
    """Return what a caption says that leaves nothing of a scene open.

    Args:
        scene: The scene.
    """
    sign = scene.sign
    return ParsedCaption(
        colour=scene.colour,
        kind=scene.kind,
        count=scene.count,
        things=tuple(frozenset([thing.emoji]) for thing in scene.things),
        pattern=scene.pattern,
        style=scene.style if scene.things else None,
        sign=None if sign is None else ParsedSign(text=sign.text, board=sign.board, typeface=sign.typeface),
    )


def explanation_of(scene: Scene) -> RichExplanation:
    """Return what a grader finds in a true image of a scene.

    Args:
        scene: The scene.
    """
    return RichExplanation(
        colour=scene.colour,
        layout=layout_of(scene),
        things=scene.shown,
        error=0.0,
        styles=(scene.style,) * len(scene.shown),
        pattern=scene.pattern,
        sign=scene.sign,
    )


def grade_for_scene(found: RichExplanation, scene: Scene) -> RichGrade:
    """Return the grade of the content of an image for a scene.

    Args:
        found: The content.
        scene: The scene.
    """
    return RichGrade(scene=scene, explanation=found, **vars(judge_caption(found, describe_scene(scene))))


def judge_caption(found: RichExplanation, parsed: ParsedCaption) -> Verdicts:
    """Return the verdicts on the content of an image by what a caption says; what it leaves open is not judged.

    Args:
        found: The content.
        parsed: Content of the caption.
    """
    return Verdicts(
        colour=_colour(found, parsed),
        object=_object(found, parsed),
        count=len(found.things) == parsed.count if parsed.kind == "many" else None,
        relation=_relation(found, parsed),
        style=_style(found, parsed),
        characters=_characters(found, parsed),
    )


def _colour(found: RichExplanation, parsed: ParsedCaption) -> bool | None:
    verdicts = []
    if parsed.colour is not None:
        verdicts.append((found.colour.name, found.pattern) == (parsed.colour.name, parsed.pattern))
    if parsed.sign is not None and parsed.sign.board is not None:
        verdicts.append(found.sign is not None and found.sign.board == parsed.sign.board)
    return all(verdicts) if verdicts else None


def _object(found: RichExplanation, parsed: ParsedCaption) -> bool | None:
    emoji = [thing.emoji for thing in found.things]
    if not parsed.things:
        return None
    if parsed.kind == "many":
        return 2 * sum(one in parsed.things[0] for one in emoji) > len(emoji)
    return match_names(emoji, parsed.things)


def _relation(found: RichExplanation, parsed: ParsedCaption) -> bool | None:
    if parsed.kind not in _RELATED or not parsed.placed:
        return None
    return found.layout == parsed.kind and _in_order([thing.emoji for thing in found.things], parsed.things)


def _in_order(emoji: Sequence[str], things: Sequence[frozenset[str]]) -> bool:
    return len(emoji) == len(things) and all(one in meant for one, meant in zip(emoji, things, strict=True))


def _style(found: RichExplanation, parsed: ParsedCaption) -> bool | None:
    verdicts = []
    if parsed.style is not None:
        verdicts.append(bool(found.styles) and set(found.styles) == {parsed.style})
    if parsed.sign is not None and parsed.sign.typeface is not None:
        verdicts.append(found.sign is not None and found.sign.typeface == parsed.sign.typeface)
    return all(verdicts) if verdicts else None


def _characters(found: RichExplanation, parsed: ParsedCaption) -> bool | None:
    if parsed.sign is None:
        return None
    alone = parsed.kind != "sign" or not found.things
    return alone and found.sign is not None and found.sign.text == parsed.sign.text
