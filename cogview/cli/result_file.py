"""The option for a result file, and its writing."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cogview.cli.options import Decorator, output_option
from cogview.errors import InputError

if TYPE_CHECKING:
    from cogview.evaluation.manifest import Manifest, ResultCurve


def result_option() -> Decorator:
    """Return ``-o``/``--output`` for a result file, passed as ``output``; None where it is not given."""
    return output_option(
        default=None,
        metavar="FILE",
        show_default="not written",
        help="file for the results: JSON with a manifest of how they were measured",
    )


def save_result(
    path: Path,
    manifest: Manifest,
    results: Mapping[str, Mapping[str, Any]],
    items: Mapping[str, Any] | None = None,
    curves: Mapping[str, ResultCurve] | None = None,
) -> None:
    """Write a result file and print its path on stderr.

    Args:
        path: The file to write or replace; its folder is made as needed.
        manifest: How the values were measured.
        results: Values by name, with the fields of ``ResultValue``.
        items: Values of single items, with the fields of ``ResultItems``.
        curves: Curves by name.

    Raises:
        InputError: ``path`` is a folder, or cannot be written.
    """
    from cogview.evaluation.manifest import write_result
    from cogview.image_io.png import prepared_folder

    if path.is_dir():
        raise InputError(f"the output {path} is a folder; expected the name of a file")
    with prepared_folder(path.parent):
        write_result(path, manifest, results, items, curves)
    print(f"written to {path}", file=sys.stderr)
