"""The table of tasks: one row for each thing that the model can do.

A row says how text, image codes and commands stand in one sequence, what a request and a training row must bring, and
what comes out. Layouts, loss masks, training examples, memory plans, job files and commands are derived from it. A new
task is a row of its own, added by ``register_task``. The layouts are those of CogView v1 (arXiv:2105.13290).
"""

# G codes on a side of the model's images
from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import Final, Literal, TypeAlias

from cogview.tokenizers.vocabulary import MAX_GRID, TokenKind

GRID: Final = "[GRID]"  # in a layout: the command that announces the model's grid, such as [BASE] for 32 x 32 codes
SOURCE_FIELD: Final = "source"  # of a store's row: codes of the image that an edit starts from
INSTRUCTION_FIELD: Final = "instruction"  # of a store's row: pieces of the text of an edit, beside a caption in "text"


@dataclass(frozen=True)
class TextElement:
    """Text pieces of any number.

    Attributes:
        name: Name of its values, in ``Layout.arrange`` and in the rows of a store.
        loss: Whether training learns to write them.
        preferred: Field of a store's row that holds the pieces where the store has it; else ``name`` does.
    """

    name: str
    loss: bool = False
    preferred: str = ""

    kind = TokenKind.TEXT

    @property
    def field(self) -> str:
        """Field of a store's row that holds the pieces."""
        return self.name


@dataclass(frozen=True)
class ImageElement:
    """A square of image codes in raster order.

    Attributes:
        name: Name of its values in ``Layout.arrange``.
        scale: Its side over G.
        loss: Whether training learns to generate it.
        stored: Field of a store's row that holds the codes, by default ``name``. In a windowed task, the field holds
            the whole image, and the element is the part of it that belongs to a window.
        maskable: Whether codes of it may be unknown, which stand as ``[MASK]`` and are no blanks.
    """

    name: str
    scale: float = 1.0
    loss: bool = False
    stored: str = ""
    maskable: bool = False

    kind = TokenKind.IMAGE

    @property
    def field(self) -> str:
        """Field of a store's row that holds the codes."""
        return self.stored or self.name

    def side(self, grid: int) -> int:
        """Return the codes on its side for images of ``grid`` x ``grid`` codes."""
        return round(self.scale * grid)


@dataclass(frozen=True)
class Blank:
    """An element that is unknown, wholly or in part, when a sequence is generated. Training knows it.

    Attributes:
        content: The text or image.
        stop: Command that ends a blank text: training learns it after the last piece, and a generated text ends there.
    """

    content: TextElement | ImageElement
    stop: str | None = None


@dataclass(frozen=True)
class RestartPositions:
    """A mark in a layout: positions count from 0 again at the next index."""


RESTART_POSITIONS: Final = RestartPositions()

Element: TypeAlias = str | TextElement | ImageElement | Blank | RestartPositions  # a str is a command


@dataclass(frozen=True, kw_only=True)
class Task:
    """One row of the table.

    Attributes:
        name: Name in recipes, configs, job files and messages.
        layout: Elements of its sequence. Empty: that of ``trained_as``.
        inputs: Keys that a request must bring, as job files name them: ``prompt``, ``image``, ``images``, ``rows``,
            ``mask``.
        options: Keys that a request may bring beside the settings of all tasks: ``mask``, ``strength``, ``keep``.
        output: Whether an image, a text or a ranking of the given images comes out.
        activity: Present participle for progress bars and logs, such as ``upscaling``.
        trained_as: Task whose weights do this one. Empty: its own, so that training and configs know it by name.
        windowed: Whether the output is twice as large as the given image and generated in nine overlapping windows
            (``windows.upscale_windows``). The layout is that of one window.
        command: Command of ``cogview`` that does it, with its flags.
        in_jobs: Whether job files may name it.
        v1_model: Published model of CogView v1 that was trained for it: ``base``, ``caption`` or ``sr``.
    """

    name: str
    layout: tuple[Element, ...] = ()
    inputs: tuple[str, ...]
    options: tuple[str, ...] = ()
    output: Literal["image", "text", "ranking"]
    activity: str
    trained_as: str = ""
    windowed: bool = False
    command: str = ""
    in_jobs: bool = True
    v1_model: str = ""

    @property
    def weights(self) -> str:
        """Name of the task whose weights do this one."""
        return self.trained_as or self.name

    @property
    def contents(self) -> dict[str, TextElement | ImageElement]:
        """Texts and images of the layout by name, in its order."""
        found = [element.content if isinstance(element, Blank) else element for element in self.elements]
        return {one.name: one for one in found if isinstance(one, TextElement | ImageElement)}

    @property
    def elements(self) -> tuple[Element, ...]:
        """The layout, or that of the task whose weights do this one."""
        return self.layout or TASKS[self.trained_as].layout

    @property
    def blank_name(self) -> str:
        """Name of the text or image that is generated; empty where nothing is blank."""
        return next((element.content.name for element in self.elements if isinstance(element, Blank)), "")

    @property
    def given_texts(self) -> tuple[str, ...]:
        """Names of the texts that hold the prompt."""
        return tuple(
            name for name, one in self.contents.items() if isinstance(one, TextElement) and name != self.blank_name
        )

    @property
    def is_described(self) -> bool:
        """Whether the prompt describes the image, rather than how it changes."""
        texts = [self.contents[name] for name in self.given_texts] if "prompt" in self.inputs else []
        return any(isinstance(text, TextElement) and text.preferred != INSTRUCTION_FIELD for text in texts)

    @property
    def given_image(self) -> ImageElement | None:
        """The image that a request gives: the known one, else the blank one, whose first rows may be given."""
        images = [one for one in self.contents.values() if isinstance(one, ImageElement)]
        return next((one for one in images if one.name != self.blank_name), images[0] if images else None)

    @property
    def masked_image(self) -> ImageElement | None:
        """The given image, if codes of it may be unknown."""
        image = self.given_image
        return image if image is not None and image.maskable else None

    @property
    def fills(self) -> bool:
        """Whether the given image and the blank one are the same, of which the unknown codes are generated."""
        image, blank = self.masked_image, self.contents.get(self.blank_name)
        return image is not None and blank is not None and image.field == blank.field

    @property
    def input_scale(self) -> float:
        """Side of the given image over G. In a windowed task a window reads half of its side."""
        image = self.given_image
        return 0.0 if image is None else image.scale * (2 if self.windowed else 1)

    @property
    def output_scale(self) -> float:
        """Side of the generated image over G; 0 where none is generated."""
        if self.output != "image":
            return 0.0
        blank = self.contents[self.blank_name]
        return (blank.scale if isinstance(blank, ImageElement) else 0.0) * (2 if self.windowed else 1)

    @property
    def grid_multiple(self) -> int:
        """Number that G must be a multiple of: every image, and every half of an overlapping window, has whole codes.

        It is 1 for tasks whose images all have G codes on a side, 2 for ``low_level``, 4 for ``upscale``: a window
        reads half of the small image, and starts at multiples of half of that.
        """
        images = [one for one in self.contents.values() if isinstance(one, ImageElement)]
        whole = math.lcm(*(Fraction(one.scale).limit_denominator(MAX_GRID).denominator for one in images))
        return 2 * whole if self.windowed else whole

    @property
    def store_fields(self) -> tuple[str, ...]:
        """Fields that a training row must hold, in the order of the layout."""
        return tuple(content.field for content in self.contents.values())


_TEXT, _LEARNT_TEXT = TextElement("text"), TextElement("text", loss=True)
_INSTRUCTION: Final = TextElement("text", preferred=INSTRUCTION_FIELD)
_UPSCALE_HEAD: Final[tuple[Element, ...]] = ("[ROI1]", _TEXT, GRID, "[BOI1]")
_UPSCALE_MIDDLE: Final[tuple[Element, ...]] = ("[EOI1]", RESTART_POSITIONS, "[ROI2]", "[POS0]", GRID, "[BOI2]")


def _edit_layout(text: TextElement, source: ImageElement) -> tuple[Element, ...]:
    """Return the layout of a task that generates an image from a text and an image of the same size."""
    head = ("[ROI1]", text, GRID, "[BOI1]", source, "[EOI1]")
    return (*head, RESTART_POSITIONS, "[ROI2]", GRID, "[BOI2]", Blank(ImageElement("image", loss=True)), "[EOI2]")


_ROWS = (
    Task(
        name="generate",
        layout=("[ROI1]", _LEARNT_TEXT, GRID, "[BOI1]", Blank(ImageElement("image", loss=True)), "[EOI1]"),
        inputs=("prompt",),
        output="image",
        activity="generating",
        command="generate",
        v1_model="base",
    ),
    Task(  # the first rows of the image are given
        name="complete",
        inputs=("prompt", "image", "rows"),
        output="image",
        activity="completing",
        trained_as="generate",
        command="complete",
    ),
    Task(
        name="caption",
        layout=(GRID, "[BOI1]", ImageElement("image"), "[EOI1]", "[ROI1]", Blank(_LEARNT_TEXT, stop="[SEP]")),
        inputs=("image",),
        output="text",
        activity="captioning",
        command="caption",
        v1_model="caption",
    ),
    Task(
        name="upscale",
        layout=(
            *_UPSCALE_HEAD,
            ImageElement("small", scale=0.5, stored="image"),
            *_UPSCALE_MIDDLE,
            Blank(ImageElement("image", loss=True, stored="large")),
            "[EOI2]",
        ),
        inputs=("prompt", "image"),
        output="image",
        activity="upscaling",
        windowed=True,
        command="upscale",
        v1_model="sr",
    ),
    Task(  # one window: G x G codes from an image of half the side; the name is that of CogView v1
        name="low_level",
        layout=(
            *_UPSCALE_HEAD,
            ImageElement("small", scale=0.5),
            *_UPSCALE_MIDDLE,
            Blank(ImageElement("image", loss=True)),
            "[EOI2]",
        ),
        inputs=("prompt", "image"),
        output="image",
        activity="upscaling",
        command="upscale --low-level",
        in_jobs=False,
        v1_model="sr",
    ),
    Task(  # the text is an instruction; a source that is unknown in full is none
        name="edit",
        layout=_edit_layout(_INSTRUCTION, ImageElement(SOURCE_FIELD, maskable=True)),
        inputs=("prompt", "image"),
        options=("mask", "strength"),
        output="image",
        activity="editing",
        command="edit",
    ),
    Task(  # the codes of the image that are unknown in the source are generated; the text describes the whole
        name="fill",
        layout=_edit_layout(_TEXT, ImageElement("source", stored="image", maskable=True)),
        inputs=("prompt", "image", "mask"),
        output="image",
        activity="filling",
        command="complete --mask",
    ),
    Task(  # some codes of the image stay, without any text
        name="vary",
        inputs=("image",),
        options=("keep",),
        output="image",
        activity="varying",
        trained_as="fill",
        command="vary",
    ),
    Task(  # nothing is blank: the text is given and scored
        name="score",
        layout=(GRID, "[BOI1]", ImageElement("image"), "[EOI1]", "[ROI1]", _LEARNT_TEXT),
        inputs=("prompt", "image"),
        output="text",
        activity="scoring",
        trained_as="caption",
        in_jobs=False,
    ),
    Task(  # a sequence of the task score for each image
        name="rerank",
        inputs=("prompt", "images"),
        output="ranking",
        activity="ranking",
        trained_as="caption",
        command="rerank",
    ),
)

TASKS: Final[dict[str, Task]] = {task.name: task for task in _ROWS}


def register_task(task: Task) -> None:
    """Add a row to the table, for this process and from now on.

    Args:
        task: The row. Its layout may use any commands of the vocabulary.

    Raises:
        ValueError: If a task of that name is registered, or ``trained_as`` names none.
    """
    if task.name in TASKS:
        raise ValueError(f"task {task.name!r} is registered already; known: {', '.join(TASKS)}")
    if task.trained_as and task.trained_as not in TASKS:
        raise ValueError(
            f"task {task.name!r} is trained as {task.trained_as!r}, which is unknown; known: {', '.join(TASKS)}"
        )
    if not task.layout and not task.trained_as:
        raise ValueError(f"task {task.name!r} needs a layout, or trained_as with the name of a task that has one")
    TASKS[task.name] = task


@contextmanager
def registered(task: Task) -> Iterator[Task]:
    """Register ``task`` within a ``with`` block.

    Args:
        task: The row.

    Yields:
        The row.

    Raises:
        ValueError: As ``register_task`` does.
    """
    register_task(task)
    try:
        yield task
    finally:
        del TASKS[task.name]


def check_grid(names: Iterable[str], grid: int) -> None:
    """Check that tasks suit a grid.

    Args:
        names: Names of tasks; unknown ones are ignored.
        grid: Codes on a side of the images.

    Raises:
        ValueError: A task needs a multiple of another number.
    """
    for name in names:
        multiple = TASKS[name].grid_multiple if name in TASKS else 1
        if grid % multiple:
            raise ValueError(
                f"the task {name!r} needs a multiple of {multiple} codes on a side, since it divides images into "
                f"parts; got a grid of {grid}"
            )


def trained_tasks() -> tuple[str, ...]:
    """Return the names of the tasks that weights can be trained for."""
    return tuple(name for name, task in TASKS.items() if not task.trained_as)


def planned_tasks() -> tuple[str, ...]:
    """Return the names of the tasks that have a layout of their own."""
    return tuple(name for name, task in TASKS.items() if task.layout)


def job_tasks() -> dict[str, Task]:
    """Return the tasks that job files may name."""
    return {name: task for name, task in TASKS.items() if task.in_jobs}


def commands_of(name: str) -> tuple[str, ...]:
    """Return the commands that weights trained for the task ``name`` can do."""
    return tuple(task.command for task in TASKS.values() if task.weights == name and task.command)
