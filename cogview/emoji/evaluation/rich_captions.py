"""Grades of captions of rich scenes: what a caption says is right or wrong, what it leaves open is neither."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cogview.emoji.captions import ParsedCaption
from cogview.emoji.evaluation.caption_grades import CaptionGrade, CaptionGrader
from cogview.emoji.rich_grades import describe_scene, explanation_of, judge_caption
from cogview.emoji.rich_reader import RichReader, describes
from cogview.emoji.scene import COLOURS, Colour, Scene
from cogview.emoji.things import EmojiObject
from cogview.emoji.world import EmojiWorld


@dataclass(frozen=True, kw_only=True)
class RichCaptionGrade(CaptionGrade):
    """Grade of a caption of a rich scene; the verdicts are those of ``Verdicts``, None where the caption says nothing.

    Args:
        style: The style or the typeface is right.
        characters: The characters of the sign are right.
    """

    style: bool | None
    characters: bool | None

    @property
    def parts(self) -> dict[str, bool | None]:
        """The verdicts by their names."""
        return {**super().parts, "style": self.style, "characters": self.characters}

    @property
    def everything(self) -> bool:
        """Whether the caption describes the scene: no part is wrong, and no object or sign is missing."""
        return self.parsed is not None and describes(self.parsed, self.scene)


class RichCaptionGrader(CaptionGrader):
    """Grader of captions of rich scenes.

    Args:
        things: Objects that a caption may name.
        colours: Backgrounds that a caption may name.
        traditional: Traditional characters by simplified ones.
    """

    def __init__(
        self,
        things: Sequence[EmojiObject],
        colours: Sequence[Colour] = COLOURS,
        traditional: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(things, colours)
        self.reader = RichReader(things, colours, traditional)

    def _grade(self, parsed: ParsedCaption, scene: Scene) -> RichCaptionGrade:
        verdicts = judge_caption(explanation_of(scene), parsed)
        return RichCaptionGrade(scene=scene, parsed=parsed, names=self.names, **vars(verdicts))

    def _unreadable(self, scene: Scene) -> RichCaptionGrade:
        asked = vars(judge_caption(explanation_of(scene), describe_scene(scene)))
        wrong = {part: None if verdict is None else False for part, verdict in asked.items()}
        return RichCaptionGrade(scene=scene, parsed=None, names=self.names, **wrong)


def make_caption_grader(world: EmojiWorld) -> CaptionGrader:
    """Return the grader of the captions of a world.

    Args:
        world: The world.
    """
    if world.settings.is_rich:
        return RichCaptionGrader(world.candidates, world.colours, world.traditional)
    return CaptionGrader(world.candidates, world.colours)
