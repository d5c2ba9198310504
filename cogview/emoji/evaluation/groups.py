"""Accuracies of groups of scenes of a rich world: by kind, with held-out styles of objects, and with held-out texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cogview.emoji.grader import SceneGrade
from cogview.emoji.scene import NUM_THINGS, Scene, is_style_held_out, is_text_held_out
from cogview.evaluation.metrics import accuracy, format_accuracy

HELD_OUT_STYLES = "held-out styles of objects"
HELD_OUT_TEXTS = "held-out pairs of characters"


def groups_of(scene: Scene) -> tuple[str, ...]:
    """Return the groups that a scene belongs to: its kind, and what of it is held out beside its content.

    Args:
        scene: The scene.
    """
    groups: list[str] = [scene.kind]
    if any(is_style_held_out(thing, scene.style) for thing in scene.things):
        groups.append(HELD_OUT_STYLES)
    if scene.sign is not None and is_text_held_out(scene.sign.text):
        groups.append(HELD_OUT_TEXTS)
    return tuple(groups)


def group_accuracies(scenes: Sequence[Scene], grades: Sequence[SceneGrade]) -> dict[str, dict[str, Any]]:
    """Return the ``accuracy`` of images with everything right, for each group that has scenes.

    Args:
        scenes: The scenes.
        grades: A grade for each.
    """
    right: dict[str, list[bool]] = {group: [] for group in (*NUM_THINGS, HELD_OUT_STYLES, HELD_OUT_TEXTS)}
    for scene, grade in zip(scenes, grades, strict=True):
        for group in groups_of(scene):
            right[group].append(grade.everything)
    return {group: accuracy(sum(found), len(found)) for group, found in right.items() if found}


def format_groups(groups: Mapping[str, Mapping[str, Any]], columns: Mapping[str, str]) -> list[str]:
    """Return the lines of a Markdown table of groups, and an empty one.

    Args:
        groups: Results of ``group_accuracies`` by column.
        columns: Titles of the columns.
    """
    lines = ["| everything right | " + " | ".join(columns.values()) + " |", "|---|" + "---|" * len(columns)]
    for name in groups[next(iter(columns))]:
        found = [groups[key][name] for key in columns]
        lines.append(f"| {name} (of {found[0]['of']}) | " + " | ".join(map(format_accuracy, found)) + " |")
    return [*lines, ""]
