"""The table of tasks: what is derived from its rows, and how a row is added."""

import pytest

from cogview.tokenizers.layouts import layouts
from cogview.tokenizers.store_tasks import feeds, tasks_of_store
from cogview.tokenizers.tasks import (
    TASKS,
    Task,
    commands_of,
    job_tasks,
    planned_tasks,
    register_task,
    registered,
    trained_tasks,
)

FORM = {"inputs": ("prompt",), "output": "image", "activity": "painting"}


def test_tasks_of_each_reader():
    """Training, memory plans and job files read the same table."""
    assert trained_tasks() == ("generate", "caption", "upscale", "low_level", "edit", "fill")
    assert planned_tasks() == ("generate", "caption", "upscale", "low_level", "edit", "fill", "score")
    assert tuple(layouts(8)) == planned_tasks()
    assert {name: task.inputs for name, task in job_tasks().items()} == {
        "generate": ("prompt",),
        "complete": ("prompt", "image", "rows"),
        "caption": ("image",),
        "upscale": ("prompt", "image"),
        "edit": ("prompt", "image"),
        "fill": ("prompt", "image", "mask"),
        "vary": ("image",),
        "rerank": ("prompt", "images"),
    }
    assert {name: task.options for name, task in TASKS.items() if task.options} == {
        "edit": ("mask", "strength"),
        "vary": ("keep",),
    }


@pytest.mark.parametrize(
    ("name", "fields", "input_scale", "output_scale"),
    [
        ("generate", ("text", "image"), 1, 1),
        ("complete", ("text", "image"), 1, 1),
        ("caption", ("image", "text"), 1, 0),
        ("score", ("image", "text"), 1, 0),
        ("rerank", ("image", "text"), 1, 0),
        ("upscale", ("text", "image", "large"), 1, 2),
        ("low_level", ("text", "small", "image"), 0.5, 1),
        ("edit", ("text", "source", "image"), 1, 1),
        ("fill", ("text", "image", "image"), 1, 1),
        ("vary", ("text", "image", "image"), 1, 1),
    ],
)
def test_fields_and_scales_follow_from_layout(name, fields, input_scale, output_scale):
    """A windowed task reads half of the given image per window, and generates twice its side."""
    task = TASKS[name]
    assert (task.store_fields, task.input_scale, task.output_scale) == (fields, input_scale, output_scale)


def test_given_and_blank_elements():
    """A prompt fills the given texts; the given image is the blank one where no other is known."""
    parts = {name: (task.given_texts, task.given_image.name, task.blank_name) for name, task in TASKS.items()}
    assert parts == {
        "generate": (("text",), "image", "image"),
        "complete": (("text",), "image", "image"),
        "caption": ((), "image", "text"),
        "upscale": (("text",), "small", "image"),
        "low_level": (("text",), "small", "image"),
        "edit": (("text",), "source", "image"),
        "fill": (("text",), "source", "image"),
        "vary": (("text",), "source", "image"),
        "score": (("text",), "image", ""),
        "rerank": ((), "image", "text"),
    }


def test_commands_include_those_of_derived_tasks():
    """Weights for generation also complete, weights for captions also rank."""
    assert {name: commands_of(name) for name in trained_tasks()} == {
        "generate": ("generate", "complete"),
        "caption": ("caption", "rerank"),
        "upscale": ("upscale",),
        "low_level": ("upscale --low-level",),
        "edit": ("edit",),
        "fill": ("complete --mask", "vary"),
    }


def test_tasks_of_store_need_all_fields():
    """Each field more lets a store train one task more."""
    assert tasks_of_store({"text", "image"}) == ("generate", "caption")
    assert tasks_of_store({"text", "image", "named", "large"}) == ("generate", "caption", "upscale")
    assert tasks_of_store({"text", "image", "small"}) == ("generate", "caption", "low_level")


def test_tasks_of_store_with_source_need_captions_besides_instructions():
    """Its texts are instructions, unless these have a field of their own."""
    assert tasks_of_store({"text", "image", "source", "large"}) == ("edit",)
    assert tasks_of_store({"text", "image", "source", "instruction"}) == ("generate", "caption", "edit")


def test_feeds_fill_from_every_store_that_feeds_generate():
    """Also from one of an earlier version, which does not name it."""
    assert feeds(("generate", "caption"), "fill")
    assert feeds(("edit", "fill"), "fill")
    assert not feeds(("edit",), "fill")
    assert not feeds(("generate", "caption"), "edit")
    assert not feeds(("generate",), "dance")


def test_fills_only_where_source_and_result_are_one_image():
    """The source of an edit may be unknown in full, but is another image."""
    assert [name for name, task in TASKS.items() if task.fills] == ["fill", "vary"]
    assert [name for name, task in TASKS.items() if task.masked_image is not None] == ["edit", "fill", "vary"]


def test_registered_task_is_removed_after_block():
    """Also where the block fails."""
    task = Task(name="paint", trained_as="generate", **FORM)
    with pytest.raises(RuntimeError), registered(task):  # noqa: PT012
        assert TASKS["paint"].elements == TASKS["generate"].layout
        assert commands_of("generate") == ("generate", "complete")
        assert "paint" in job_tasks()
        raise RuntimeError
    assert "paint" not in TASKS


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (Task(name="caption", trained_as="generate", **FORM), "task 'caption' is registered already; known: generate"),
        (Task(name="paint", trained_as="dance", **FORM), "task 'paint' is trained as 'dance', which is unknown"),
        (Task(name="paint", **FORM), "task 'paint' needs a layout, or trained_as"),
    ],
)
def test_register_task_refuses_row(task, message):
    """The message names the row and what it lacks."""
    with pytest.raises(ValueError, match=message):
        register_task(task)
    assert "paint" not in TASKS
