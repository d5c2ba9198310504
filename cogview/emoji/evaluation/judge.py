"""The grader of the emoji world as a judge of the images that a score chooses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from cogview.emoji.captions import ParsedCaption
from cogview.emoji.rich_grades import RichGrader, judge_caption, make_grader
from cogview.emoji.rich_reader import make_reader
from cogview.emoji.scene import Scene
from cogview.emoji.world import EmojiWorld
from cogview.errors import InputError
from cogview.evaluation.prompt_report import ImageJudge
from cogview.pipeline.results import GeneratedImage


def grader_judge(world: EmojiWorld, prompts: Mapping[int, str], path: Path) -> ImageJudge:
    """Return a judge by which an image is right, 1, if it shows all that its prompt says, and 0 otherwise.

    Args:
        world: The emoji world.
        prompts: The prompts by the numbers of their lines.
        path: Their file, for messages.

    Raises:
        InputError: A prompt is no caption of the world, or names no background of a plain one.
    """
    reader, things = make_reader(world), {thing.emoji: thing for thing in world.things}
    readings: dict[str, tuple[ParsedCaption, ...]] = {}
    scenes: dict[str, Scene] = {}
    for number, prompt in prompts.items():
        readings[prompt] = reader.parses(prompt)
        parsed = next(iter(readings[prompt]), None)
        if parsed is None or (parsed.colour is None and not world.settings.is_rich):
            raise InputError(
                f"{path}, line {number}: the grader cannot judge “{prompt}”; expected a caption of the emoji world "
                "that names the background, such as 蓝色背景上的三只狐狸"
            )
        if parsed.colour is None or world.settings.is_rich:
            continue
        shown = tuple(things[min(meant)] for meant in parsed.things)
        try:
            scenes[prompt] = Scene(colour=parsed.colour, kind=parsed.kind, things=shown, count=parsed.count)
        except ValueError as error:
            raise InputError(f"{path}, line {number}: {error}") from None
    grader = make_grader(world)

    def is_right(image: GeneratedImage) -> bool:
        if isinstance(grader, RichGrader):
            found = grader.explain(np.asarray(image))
            return any(judge_caption(found, parsed).everything for parsed in readings[image.prompt])
        return grader.grade(np.asarray(image), scenes[image.prompt]).everything

    def values_of(images: Sequence[GeneratedImage]) -> list[float]:
        return [float(is_right(image)) for image in images]

    return ImageJudge(name="grader", label="everything right by the grader", unit="fraction", values_of=values_of)
