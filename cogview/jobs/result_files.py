"""Files of a job's results: their names, their text chunks, and whether a recorded one can be used."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cogview.formatting import shorten
from cogview.image_io.masks import is_box
from cogview.jobs.records import JobRecord
from cogview.tables import SHOWN

EDITING = ("edit", "fill", "vary")  # tasks that the names of their files name


def result_stem(record: JobRecord) -> str:
    """Return the start of the file names of a record's images."""
    from cogview.image_io.png import safe_name

    if record.id is not None:
        return safe_name(record.id)
    if record.image is None:
        return safe_name(record.prompt or "")
    ending = "up" if record.rows is None else f"rows{record.rows}"
    return f"{safe_name(record.image.stem)}-{record.task if record.task in EDITING else ending}"


def unused_name(stem: str, ending: str, taken: set[str]) -> str:
    """Return a name that is not in ``taken``, and add it; case is ignored, as some file systems do."""
    name, number = f"{stem}{ending}", 1
    while name.casefold() in taken:
        number += 1
        name = f"{stem}_{number}{ending}"
    taken.add(name.casefold())
    return name


def result_problem(facts: Mapping[str, Any], output: str, folder: Path) -> str | None:
    """Return why a recorded result cannot be used, or None if it can.

    Args:
        facts: What the journal records of the result.
        output: What comes out of its task: an image, a text or a ranking.
        folder: The output folder, with links resolved. A file counts only inside it, wherever links lead.
    """
    key, kind = {"image": ("path", str), "text": ("text", str), "ranking": ("images", list)}[output]
    value = facts.get(key)
    if not isinstance(value, kind):
        return f'its record has no "{key}"'
    if output != "image":
        return None
    try:
        file = (folder / value).resolve()
        if Path(value).is_absolute() or not file.is_relative_to(folder):
            return f"its file {shorten(value, SHOWN)} is no path inside the output folder"
        if not file.is_file():
            return f"its file {shorten(value, SHOWN)} does not exist"
        return None if file.stat().st_size else f"its file {shorten(value, SHOWN)} is empty"
    except (OSError, ValueError, RuntimeError) as error:  # a zero byte, a loop of links, a name that is too long
        return f"its file {shorten(value, SHOWN)} cannot be read: {error}"


def result_metadata(record: JobRecord) -> dict[str, str]:
    """Return the text chunks that the commands of the tasks add to those of every image."""
    if record.image is None:
        return {}
    metadata = {"task": record.task, "source": record.image.name}
    if record.mask is not None:
        metadata["mask"] = record.mask.replace(" ", "") if is_box(record.mask) else Path(record.mask).name
    return metadata if record.rows is None else metadata | {"rows": str(record.rows)}
