"""The option for a result file, its check before the measurement, and its writing."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cogview.cli.options import Decorator, output_option
from cogview.errors import InputError

if TYPE_CHECKING:
    from cogview.evaluation.manifest import Manifest, ResultCurve, ResultItems, ResultValue

RESULT_FORMATS = "cogview-result-"  # the format of a result, without its version


def result_option() -> Decorator:
    """Return ``-o``/``--output`` for a result file, passed as ``output``; None where it is not given."""
    return output_option(
        default=None,
        metavar="FILE",
        show_default="not written",
        help="file for the results: JSON with a manifest of how they were measured",
    )


def check_result_path(path: Path, *, is_bench: bool = False) -> None:
    """Check that a result can be written, before the minutes or hours of the measurement; nothing is left behind.

    A result may replace an earlier one, and no other file: ``-o`` with the name of the prompts would destroy them.

    Args:
        path: The result file.
        is_bench: Whether it is one of ``cogview bench``, which has no manifest.

    Raises:
        InputError: ``path`` is a folder or holds anything but a result, or its folder cannot be written.
    """
    from cogview.image_io.png import prepare_folder

    if path.is_dir():
        raise InputError(f"the output {path} is a folder; expected the name of a file")
    if path.is_file() and path.stat().st_size and not _is_result(path, is_bench):
        raise InputError(
            f"the output {path} exists and is no result of cogview, so that it is not replaced; choose another name"
        )
    made = [folder for folder in path.parents if not folder.exists()]
    prepare_folder(path.parent)
    with suppress(OSError):  # another process wrote there
        for folder in made:
            folder.rmdir()


def _is_result(path: Path, is_bench: bool) -> bool:
    """Return whether a file is a result of any version, also one that was edited by hand."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    if is_bench:
        return isinstance(content, dict) and {"rows", "hardware", "codes_per_image"} <= content.keys()
    return isinstance(content, dict) and str(content.get("format")).startswith(RESULT_FORMATS)


def save_result(
    path: Path,
    manifest: Manifest,
    results: Mapping[str, ResultValue | Mapping[str, Any]],
    items: ResultItems | Mapping[str, Any] | None = None,
    curves: Mapping[str, ResultCurve] | None = None,
) -> None:
    """Write a result file and print its path on stderr.

    Args:
        path: The file to write or replace; its folder is made as needed.
        manifest: How the values were measured.
        results: Values by name; a mapping has the fields of ``ResultValue``.
        items: Values of single items; a mapping has the fields of ``ResultItems``.
        curves: Curves by name.

    Raises:
        InputError: ``path`` is a folder or holds anything but a result, or cannot be written.
    """
    from cogview.evaluation.manifest import write_result
    from cogview.image_io.png import prepared_folder

    check_result_path(path)
    with prepared_folder(path.parent):
        write_result(path, manifest, results, items, curves)
    print(f"written to {path}", file=sys.stderr)
