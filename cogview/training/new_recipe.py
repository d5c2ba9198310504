"""A new recipe for pictures of one's own: every setting with the reason for its choice, and an estimate of the time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cogview.data.builders.prepare import is_held_out
from cogview.data.sources.tables import TableOptions
from cogview.training.survey import PictureSurvey

LINE = 120  # characters
BYTES = 256  # pieces of the text tokenizer for the bytes of other characters


@dataclass(frozen=True, kw_only=True)
class SizeRules:
    """What a size of model means.

    Attributes:
        side: Side of the images in pixels.
        preset: Preset of the transformer.
        layers: Its layers; None for those of the preset.
        image_steps: Range of the steps of the image tokenizer.
        image_batch: Pictures of such a step.
        steps: Range of the steps of the transformer.
        batch: Rows of such a step.
        views: How often each caption is to be seen.
        learning_rate: Of the transformer, after the warm-up.
        wide: Whether the image tokenizer is wider than that of cogview-emoji, and starts from random weights.
        cluster: Whether the transformer needs several GPUs.
    """

    side: int
    preset: str
    layers: int | None = None
    image_steps: tuple[int, int]
    image_batch: int = 32
    steps: tuple[int, int]
    batch: int = 24
    views: int = 100
    learning_rate: float = 1e-3
    wide: bool = False
    cluster: bool = False


SIZES: Mapping[str, SizeRules] = {
    "tiny": SizeRules(side=64, preset="5m", layers=3, image_steps=(600, 1500), steps=(300, 2500)),
    "small": SizeRules(side=64, preset="5m", image_steps=(1000, 4000), steps=(500, 12000)),
    "base": SizeRules(
        side=128,
        preset="100m",
        image_steps=(5000, 20000),
        image_batch=64,
        steps=(5000, 60000),
        batch=128,
        views=30,
        learning_rate=8e-4,
        wide=True,
    ),
    "4b": SizeRules(
        side=256,
        preset="4b",
        image_steps=(20000, 100000),
        image_batch=128,
        steps=(10000, 144000),
        batch=1024,
        views=4,
        learning_rate=3e-4,
        wide=True,
        cluster=True,
    ),
}


@dataclass(frozen=True, kw_only=True)
class RecipeLine:
    """A key of a recipe.

    Attributes:
        key: The key.
        value: Its value as plain data, or the lines below it.
        reason: Why it was chosen; empty without a comment.
    """

    key: str
    value: Any
    reason: str = ""


def line(key: str, value: Any, reason: str = "") -> RecipeLine:
    """Return a key with its value and the reason for it."""
    return RecipeLine(key=key, value=value, reason=reason)


def picture_lines(sources: Sequence[Path], table: TableOptions) -> list[RecipeLine]:
    """Return the keys that name the sources of pictures, and the columns of tables that were chosen.

    Args:
        sources: The sources, as the recipe names them.
        table: The columns.
    """
    columns = [line("image_column", table.image_column)] if table.image_column is not None else []
    columns += [line("caption_columns", list(table.caption_columns))] if table.caption_columns else []
    named = line("pictures", [str(source) for source in sources])
    return [named, line("table", columns, "as asked for")] if columns else [named]


def render_lines(lines: Iterable[RecipeLine], translate: Callable[[str], str] = str, depth: int = 0) -> str:
    """Return lines of a recipe as YAML, with the reasons as comments.

    Args:
        lines: The lines.
        translate: Returns a reason in the language of the user.
        depth: How deep they are nested.
    """
    found = []
    for each in lines:
        is_section = isinstance(each.value, list) and all(isinstance(one, RecipeLine) for one in each.value)
        plain = "" if is_section and each.value else f" {flow(each.value)}"
        text = f"{'  ' * depth}{each.key}:{plain}"
        reason = translate(each.reason)
        comment = f"  # {reason}" if reason else ""
        if len(text + comment) > LINE:
            found.append(f"{'  ' * depth}# {reason}")
            comment = ""
        found.append(text + comment)
        if is_section:
            found += render_lines(each.value, translate, depth + 1).splitlines()
    return "\n".join(found) + "\n"


def flow(value: Any) -> str:
    """Return a plain value as YAML on one line."""
    text: str = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, sort_keys=False, width=math.inf)
    return text.removesuffix("\n...\n").strip()


@dataclass(frozen=True, kw_only=True)
class PictureChoices:
    """Choices that follow from the pictures and captions alone.

    Attributes:
        fit: How pictures become squares, and why.
        held_out: Share of the held-out pictures, and why.
        upscale: Whether the model learns to upscale, and why.
        text_size: Pieces of the text tokenizer, and why.
        piece_length: Maximum characters of a piece, and why.
        text_width: Pieces of the longest caption, and why.
    """

    fit: tuple[str, str]
    held_out: tuple[float, str]
    upscale: tuple[bool, str]
    text_size: tuple[int, str]
    piece_length: tuple[int, str]
    text_width: tuple[int, str]


def choose_for(survey: PictureSurvey, side: int) -> PictureChoices:
    """Return the choices for the pictures of a survey.

    Args:
        survey: The survey.
        side: Side of the images in pixels.
    """
    return PictureChoices(
        fit=choose_fit(survey),
        held_out=choose_held_out(survey),
        upscale=_choose_upscale(survey, side),
        text_size=_choose_text_size(survey),
        piece_length=_choose_piece_length(survey),
        text_width=choose_text_width(survey),
    )


def choose_fit(survey: PictureSurvey) -> tuple[str, str]:
    """Return how the pictures of a survey become squares, and why."""
    if survey.transparent_share > 0.3:
        return "pad", f"{survey.transparent_share:.0%} have transparent parts: cut-outs lose heads and feet by crop"
    if survey.odd_share > 0.3:
        return "pad", f"{survey.odd_share:.0%} are far from square: crop would lose much of them"
    return "crop", f"{1 - survey.odd_share:.0%} are nearly square: little is lost"


def choose_held_out(survey: PictureSurvey) -> tuple[float, str]:
    """Return the share of held-out pictures of a survey, and why: at least one, of few pictures a tenth."""
    if not survey.is_whole:
        return 0.05, "of these the model never sees anything: they measure it"
    hashes = sorted({int(digest[:16], 16) for digest in survey.digests})
    wanted = max(1, round(len(hashes) * (0.05 if len(hashes) > 200 else 0.1)))
    share = (hashes[wanted - 1] + hashes[wanted]) / 2**65
    share = next(
        (rounded for digits in range(2, 8) if _count(survey, rounded := round(share, digits)) == wanted), share
    )
    return share, f"{wanted} of {len(hashes)} pictures, which the model never sees: they measure it"


def _count(survey: PictureSurvey, share: float) -> int:
    return sum(is_held_out(digest, share) for digest in set(survey.digests))


def _choose_upscale(survey: PictureSurvey, side: int) -> tuple[bool, str]:
    if survey.median_side >= 1.5 * side:
        return (
            True,
            f"half of the pictures have {survey.median_side} pixels or more a side: enough to learn upscaling from",
        )
    return (
        False,
        f"half of the pictures have at most {survey.median_side} pixels a side: too few to learn upscaling from",
    )


def _choose_text_size(survey: PictureSurvey) -> tuple[int, str]:
    characters = len(survey.characters)
    words = 0 if survey.distinct < 1000 else min(4000, survey.distinct // 2)
    size = max(400, math.ceil((BYTES + 1.1 * characters + words) / 100) * 100)
    more = f" and up to {words} words" if words else ""
    return size, f"at most: {characters} characters in the captions{more}, and {BYTES} bytes for all others"


def _choose_piece_length(survey: PictureSurvey) -> tuple[int, str]:
    if survey.distinct < 1000:
        return 1, f"{survey.distinct} different captions are too few to learn words from: a character is a piece"
    return 4, "characters: frequent words become pieces"


def choose_text_width(survey: PictureSurvey) -> tuple[int, str]:
    """Return the pieces of the longest caption that is used, and why."""
    longest = max(survey.lengths)
    limit = 8 * math.ceil((longest + 2) / 8)
    if limit <= 64:
        return limit, f"pieces: the longest caption has {longest} characters"
    lengths = sorted(survey.lengths)
    usual = lengths[int(0.98 * (len(lengths) - 1))]
    width = min(limit, max(64, min(256, 8 * math.ceil((usual + 2) / 8))))
    longer = sum(length + 2 > width for length in lengths)
    return width, f"pieces: 98% of the captions have at most {usual} characters; {longer} may be too long and left out"


def steps_for(count: int, views: float, batch: int, limits: Sequence[int]) -> int:
    """Return the steps in which each of ``count`` items is seen ``views`` times, within limits, rounded.

    Args:
        count: Items.
        views: How often each is to be seen.
        batch: Items of a step.
        limits: Fewest and most steps.
    """
    return int(min(limits[1], max(limits[0], 50 * math.ceil(count * views / batch / 50))))


def survey_lines(survey: PictureSurvey) -> list[str]:
    """Return what a survey found, as lines of text.

    Args:
        survey: The survey.
    """
    lengths, sides = sorted(survey.lengths), sorted(min(size) for size in survey.sizes)
    sample = "all" if survey.is_whole else f"{len(sides)} of them"
    found = [
        f"{survey.records} entries: {survey.pictures} pictures with captions, {survey.unusable} that cannot be used",
        f"captions of these pictures: {survey.rows}; different texts: {survey.distinct}",
        f"captions of {lengths[0]} to {lengths[-1]} characters, {len(survey.characters)} different ones in all",
        f"looked at {sample}: shorter sides of {sides[0]} to {sides[-1]} pixels, {survey.odd_share:.0%} far from "
        f"square, {survey.transparent_share:.0%} with transparent parts",
    ]
    if survey.copies:
        found.append(f"copies of other pictures among these, which the image tokenizer sees once: {survey.copies}")
    if survey.left_out:
        first = " ".join(survey.problems[0].split())
        found.append(f"the first entry that cannot be used: {first}")
    return found


def recipe_header(path: Path, about: Iterable[str], translate: Callable[[str], str] = str) -> str:
    """Return the comments at the top of a new recipe.

    Args:
        path: Its file.
        about: What was found, and the estimate, one line each.
        translate: Returns a line in the language of the user.
    """
    first = translate("written by cogview new; change what you like, then")
    lines = (first, f"  cogview run {path}", "", *map(translate, about))
    return "".join(f"# {each}".rstrip() + "\n" for each in lines)
