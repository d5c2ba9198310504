"""The protocol of ``cogview eval captions``: does a caption name the right things, count, relation and colour?

Captions are read back with the grammar that scenes are described by, and so judged by what they say, whichever of
the many ways of saying it a model chose.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from cogview.emoji.captions import CaptionReader, ParsedCaption
from cogview.emoji.evaluation.scenes import accuracy, format_accuracy, held_out_scenes
from cogview.emoji.scene import Scene
from cogview.emoji.world import EmojiWorld
from cogview.evaluation.harness import PARTS, check_world, describe
from cogview.pipeline.cogview import CogView
from cogview.pipeline.results import Caption
from cogview.vqvae.codec import reconstruct

COLUMNS = {"true_scenes": "true scenes", "reconstructions": "VQ-VAE's reconstructions"}


@dataclass(frozen=True, kw_only=True)
class CaptionGrade:
    """Which parts of ``scene`` a caption got right; None for what the scene does not ask.

    ``said`` is what the caption says, None if it cannot be read; then all that was asked is wrong. ``colour``: the
    background is named, and rightly. ``object``: for one thing and for several of one, that one thing is named and it
    is the right one, whatever the count; for a pair, that both things are named, wherever. ``count``: for several of
    one, that the number is right, whatever they are. ``relation``: for a pair, that it is told which way the things
    stand, and each is in its place. A name that several things share counts for each of them.
    """

    scene: Scene
    parsed: ParsedCaption | None
    colour: bool
    object: bool
    count: bool | None
    relation: bool | None

    @property
    def everything(self) -> bool:
        """True when nothing that was asked is wrong, nor a single thing said to be several."""
        parts = (self.colour, self.object, self.count, self.relation)
        return (
            self.parsed is not None
            and self.parsed.count == self.scene.count
            and all(part is not False for part in parts)
        )


def evaluate_captions(model: CogView, world: EmojiWorld, *, count: int, seed: int, batch_size: int) -> dict[str, Any]:
    """Grade the model's most probable captions (greedy) of ``count`` held-out scenes; the report, as plain data.

    Captions are written of the true pictures of the scenes and of their VQ-VAE reconstructions. ``captions`` holds them
    beside a caption that is right, a row for each scene.
    """
    model.require_task("caption")
    check_world(model, world)
    asked = held_out_scenes(world, count, seed)
    scenes, right_captions = [scene for scene, _ in asked], [caption for _, caption in asked]
    true = np.stack([world.render(scene, number) for number, scene in enumerate(scenes)])
    restored = reconstruct(model.image_tokenizer, true, batch_size)
    reader = CaptionReader(world.candidates, world.colours)
    report: dict[str, Any] = {"protocol": describe(model, world, right_captions, seed, method="greedy")}
    rows: list[dict[str, Any]] = [
        {"meaning": scene.meaning, "right_caption": caption}
        for scene, caption in zip(scenes, right_captions, strict=True)
    ]
    for key, pictures in (("true_scenes", true), ("reconstructions", restored)):
        captions = _write_captions(model, pictures, batch_size, f"captions of {COLUMNS[key]}")
        grades = [grade_caption(reader, one.text, scene) for one, scene in zip(captions, scenes, strict=True)]
        report[key] = summarize_captions(grades, world)
        for row, one, grade in zip(rows, captions, grades, strict=True):
            row[key] = {
                "caption": one.text,
                "log_probability": one.log_probability,
                "readable": grade.parsed is not None,
                "right": grade.everything,
            }
    report["captions"] = rows
    return report


def grade_caption(reader: CaptionReader, text: str, scene: Scene) -> CaptionGrade:
    """Compare what ``text`` says with ``scene``; of several readings the one that is most nearly right counts."""
    grades = [_judge(said, scene) for said in reader.parses(text)]
    if not grades:
        count = False if scene.kind == "many" else None
        relation = False if len(scene.things) == 2 else None
        return CaptionGrade(scene=scene, parsed=None, colour=False, object=False, count=count, relation=relation)
    return max(grades, key=lambda grade: (grade.everything, sum(getattr(grade, part) is True for part in PARTS)))


def summarize_captions(grades: Sequence[CaptionGrade], world: EmojiWorld, num_confusions: int = 10) -> dict[str, Any]:
    """Accuracies with 95% intervals, how many captions cannot be read, and the commonest mistakes, as plain data.

    The mistakes are of the captions that can be read; ``said`` is "" for a background that is not mentioned.
    """
    summary: dict[str, Any] = {"captions": len(grades)}
    for part in PARTS:
        asked = [verdict for verdict in (getattr(grade, part) for grade in grades) if verdict is not None]
        summary[part] = accuracy(sum(asked), len(asked))
    summary["unreadable"] = sum(grade.parsed is None for grade in grades)
    mistakes = Counter(pair for grade in grades for pair in _confusions(grade, world))
    summary["confusions"] = [
        {"shown": shown, "said": said, "times": times} for (shown, said), times in mistakes.most_common(num_confusions)
    ]
    return summary


def format_caption_report(report: dict[str, Any]) -> str:
    """A Markdown table: accuracies in percent with their 95% intervals."""
    lines = ["| right | " + " | ".join(COLUMNS.values()) + " |", "|---|" + "---|" * len(COLUMNS)]
    for part in PARTS:
        cells = [format_accuracy(report[key][part]) for key in COLUMNS]
        lines.append(f"| {part} (of {report['true_scenes'][part]['of']}) | " + " | ".join(cells) + " |")
    unreadable = [f"{report[key]['unreadable']} of {title}" for key, title in COLUMNS.items()]
    lines += ["", f"Captions that cannot be read, and count as wrong: {', '.join(unreadable)}."]
    return "\n".join(lines)


def _write_captions(model: CogView, pictures: np.ndarray, batch_size: int, label: str) -> list[Caption]:
    """The model's most probable caption of each picture, uint8 (N, H, W, 3)."""
    captions = []
    with tqdm(total=len(pictures), unit="caption", desc=label, disable=None) as bar:
        for first in range(0, len(pictures), batch_size):
            chunk = [Image.fromarray(pixels) for pixels in pictures[first : first + batch_size]]
            captions += [caption for (caption,) in model.caption(chunk, method="greedy", batch_size=batch_size)]
            bar.update(len(chunk))
    return captions


def _judge(said: ParsedCaption, scene: Scene) -> CaptionGrade:
    shown = [thing.emoji for thing in scene.things]
    in_place = _all_named(shown, said.things)
    count = relation = None
    if len(shown) == 1:
        named = in_place
        count = said.count == scene.count if scene.kind == "many" else None
    else:
        named = in_place or _all_named(shown[::-1], said.things)
        relation = said.kind == scene.kind and in_place
    colour = said.colour is not None and said.colour.name == scene.colour.name
    return CaptionGrade(scene=scene, parsed=said, colour=colour, object=named, count=count, relation=relation)


def _all_named(shown: Sequence[str], named: Sequence[frozenset[str]]) -> bool:
    """Whether the names may mean the emoji shown, each in its place and no more of them."""
    return len(shown) == len(named) and all(emoji in meant for emoji, meant in zip(shown, named, strict=True))


def _confusions(grade: CaptionGrade, world: EmojiWorld) -> list[tuple[str, str]]:
    """(shown, said) of what is wrong: colours, and things where it is plain which was meant to be which."""
    scene, said = grade.scene, grade.parsed
    if said is None:
        return []
    pairs = []
    if not grade.colour:
        pairs.append((scene.colour.name, said.colour.name if said.colour else ""))
    same_arrangement = said.kind == scene.kind or len(scene.things) == len(said.things) == 1
    if not grade.object and same_arrangement:
        for thing, meant in zip(scene.things, said.things, strict=True):
            if thing.emoji not in meant:
                names = [candidate.name for candidate in world.candidates if candidate.emoji in meant]
                pairs.append((thing.name, "/".join(names)))
    return pairs
