"""Protocol of ``cogview eval captions``: grade the objects, count, relation and colour that a caption names.

Captions are parsed by the grammar that describes scenes. They are therefore graded by their content, in any of the
wordings of the grammar.
"""

# N images, H, W image in pixels
from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from cogview.emoji.captions import CaptionReader, ParsedCaption
from cogview.emoji.evaluation.scenes import (
    MAX_CONFUSIONS,
    PARTS,
    check_world,
    count_confusions,
    describe,
    format_parts,
    grade_items,
    held_out_scenes,
    part_accuracies,
)
from cogview.emoji.grader import SceneGrade
from cogview.emoji.scene import COLOURS, Colour, Scene
from cogview.emoji.things import EmojiObject
from cogview.emoji.world import EmojiWorld
from cogview.pipeline.captioning import NOTED
from cogview.pipeline.cogview import CogView
from cogview.pipeline.results import Caption
from cogview.vqvae.codec import reconstruct

COLUMNS = {"true_scenes": "true scenes", "reconstructions": "VQ-VAE's reconstructions"}


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
        pairs = [] if self.colour else [(scene.colour.name, parsed.colour.name if parsed.colour else "")]
        same_arrangement = parsed.kind == scene.kind or len(scene.things) == len(parsed.things) == 1
        if not self.object and same_arrangement:
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
            return CaptionGrade(
                scene=scene,
                parsed=None,
                names=self.names,
                colour=False,
                object=False,
                count=False if scene.kind == "many" else None,
                relation=False if len(scene.things) == 2 else None,
            )
        return max(grades, key=lambda grade: (grade.everything, sum(getattr(grade, part) is True for part in PARTS)))

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


def evaluate_captions(model: CogView, world: EmojiWorld, *, count: int, seed: int, batch_size: int) -> dict[str, Any]:
    """Grade the greedy captions of held-out scenes and of their VQ-VAE reconstructions.

    Args:
        model: The model.
        world: The world of the model.
        count: Number of scenes.
        seed: Seed of the scenes.
        batch_size: Images in a batch.

    Returns:
        The report as plain data; its key ``captions`` has a row per scene, with all captions and a right one, and its
        key ``items`` the fields of ``ResultItems``.
    """
    model.require_task("caption")
    check_world(model, world)
    asked = held_out_scenes(world, count, seed)
    scenes, right_captions = [scene for scene, _ in asked], [caption for _, caption in asked]
    true = np.stack([world.render(scene, number) for number, scene in enumerate(scenes)])
    restored = reconstruct(model.image_tokenizer, true, batch_size)
    grader = CaptionGrader(world.candidates, world.colours)
    report: dict[str, Any] = {"protocol": describe(model, world, right_captions, seed, method="greedy")}
    rows: list[dict[str, Any]] = [
        {"meaning": scene.meaning, "right_caption": caption}
        for scene, caption in zip(scenes, right_captions, strict=True)
    ]
    graded: dict[str, list[CaptionGrade]] = {}
    for key, images in (("true_scenes", true), ("reconstructions", restored)):
        captions = generate_captions(model, images, batch_size, f"captions of {COLUMNS[key]}")
        grades = [grader.grade(caption.text, scene) for caption, scene in zip(captions, scenes, strict=True)]
        report[key] = summarize_captions(grades)
        graded[key] = grades
        for row, caption, grade in zip(rows, captions, grades, strict=True):
            row[key] = {
                "caption": caption.text,
                "log_probability": caption.log_probability,
                "readable": grade.parsed is not None,
                "right": grade.everything,
            }
    report["captions"] = rows
    report["items"] = grade_items(asked, graded)
    return report


def summarize_captions(grades: Sequence[CaptionGrade], max_confusions: int = MAX_CONFUSIONS) -> dict[str, Any]:
    """Return the accuracy of each part, the number of unreadable captions and the most frequent confusions.

    Args:
        grades: Grades of the captions.
        max_confusions: Number of confusions to return.
    """
    return {
        "captions": len(grades),
        **part_accuracies(grades),
        "unreadable": sum(grade.parsed is None for grade in grades),
        "confusions": count_confusions(grades, ("shown", "said"), max_confusions),
    }


def format_caption_report(report: Mapping[str, Any]) -> str:
    """Return the report of ``evaluate_captions`` as Markdown."""
    unreadable = [f"{report[key]['unreadable']} of {title}" for key, title in COLUMNS.items()]
    note = f"Captions that cannot be read, and count as wrong: {', '.join(unreadable)}."
    return "\n".join([*format_parts(report, COLUMNS), "", note])


def generate_captions(model: CogView, images: np.ndarray, batch_size: int, label: str) -> list[Caption]:
    """The most probable caption of each image, uint8 (N, H, W, 3)."""
    captions = []
    with tqdm(total=len(images), unit="caption", desc=label, disable=None) as bar:
        for first in range(0, len(images), batch_size):
            chunk = images_without_notes(images[first : first + batch_size])
            captions += [caption for (caption,) in model.caption(chunk, method="greedy", batch_size=batch_size)]
            bar.update(len(chunk))
    return captions


def images_without_notes(images: Iterable[np.ndarray]) -> list[Image.Image]:
    """Return images about whose reconstruction nothing is logged: it is measured, or the image is a true scene.

    Args:
        images: uint8 RGB (H, W, 3) each.
    """
    quiet = [Image.fromarray(pixels) for pixels in images]
    for image in quiet:
        image.info[NOTED] = True
    return quiet


def _all_named(shown: Sequence[str], named: Sequence[frozenset[str]]) -> bool:
    """Whether the names may mean the emoji shown, in their order and no others."""
    return len(shown) == len(named) and all(emoji in meant for emoji, meant in zip(shown, named, strict=True))
