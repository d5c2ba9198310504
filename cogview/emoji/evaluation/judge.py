"""The grader of the emoji world as a judge of the images that a score chooses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from cogview.emoji.captions import CaptionReader
from cogview.emoji.grader import SceneGrader
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
        InputError: A prompt is no caption of the world, or names no background.
    """
    reader, things = CaptionReader(world.things, world.colours), {thing.emoji: thing for thing in world.things}
    scenes: dict[str, Scene] = {}
    for number, prompt in prompts.items():
        parsed = reader.read(prompt)
        if parsed is None or parsed.colour is None:
            raise InputError(
                f"{path}, line {number}: the grader cannot judge “{prompt}”; expected a caption of the emoji world "
                "that names the background, such as 蓝色背景上的三只狐狸"
            )
        shown = tuple(things[min(meant)] for meant in parsed.things)
        try:
            scenes[prompt] = Scene(colour=parsed.colour, kind=parsed.kind, things=shown, count=parsed.count)
        except ValueError as error:
            raise InputError(f"{path}, line {number}: {error}") from None
    grader = SceneGrader(world)

    def values_of(images: Sequence[GeneratedImage]) -> list[float]:
        return [float(grader.grade(np.asarray(image), scenes[image.prompt]).everything) for image in images]

    return ImageJudge(name="grader", label="everything right by the grader", unit="fraction", values_of=values_of)
