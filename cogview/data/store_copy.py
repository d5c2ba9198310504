"""Copy the rows of stores into a new store, whose files depend on the rows alone."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from cogview.data.store import NO_TOKEN, TEXT_FIELDS, StoreHeader, TokenStore
from cogview.data.store_writer import ROWS_PER_TRANSACTION, StoreWriter
from cogview.errors import InputError
from cogview.files import atomic_folder
from cogview.formatting import format_list


def merged_header(stores: Sequence[TokenStore]) -> StoreHeader:
    """Return the header of a store that holds the rows of several ones.

    Args:
        stores: At least one store.

    Raises:
        InputError: Two stores have other tokenizers, grids or fields.
    """
    first = stores[0].header
    for store in stores[1:]:
        store.check_same_tokenizers(first)
        if set(store.header.fields) != set(first.fields):
            raise InputError(
                f"{store.path} has the fields {', '.join(sorted(store.header.fields))}, {stores[0].path} has "
                f"{', '.join(sorted(first.fields))}: build both for a model with the same tasks, and both "
                "with boxes or both without"
            )
    if len(stores) == 1:
        return first
    widths = {name: max(store.header.fields[name] for store in stores) for name in first.fields}
    layouts = tuple(name for name in first.layouts if all(name in store.header.layouts for store in stores))
    provenance: dict[str, Any] = {"merged": [store.header.provenance for store in stores]}
    return replace(first, fields=widths, layouts=layouts, provenance=provenance)


def copy_rows(paths: Sequence[Path], target: Path, *, overwrite: bool = False) -> int:
    """Write the rows of stores, one after another, to a new store.

    Args:
        paths: The stores.
        target: Folder of the new store; it is whole or absent.
        overwrite: Replace a store that is there.

    Returns:
        The number of rows.

    Raises:
        InputError: A store cannot be read, two do not fit together, one is given twice, or ``target`` exists.
        RetryLaterError: The disk is full, or another process writes ``target``.
    """
    resolved = [path.resolve() for path in paths]
    if twice := [str(path) for path, place in zip(paths, resolved, strict=True) if resolved.count(place) > 1]:
        raise InputError(f"one store is given more than once ({format_list(twice)}): its rows would be doubled")
    with ExitStack() as stack:
        stores = [stack.enter_context(TokenStore(path)) for path in paths]
        header = merged_header(stores)
        folder = stack.enter_context(atomic_folder(target, overwrite=overwrite))
        if target.exists() and not overwrite:
            raise InputError(f"{target} is there already: remove it, or choose another folder with -o")
        with StoreWriter(folder, header) as writer:
            for store in stores:
                for start in range(0, len(store), ROWS_PER_TRANSACTION):
                    rows = store.read(range(start, min(start + ROWS_PER_TRANSACTION, len(store))))
                    writer.append({name: _widen(rows[name], width, name) for name, width in header.fields.items()})
        return writer.count


def _widen(ids_NW: np.ndarray, width: int, name: str) -> np.ndarray:
    """Return the values of a text field with padding up to ``width``; others are as wide."""
    if name not in TEXT_FIELDS or ids_NW.shape[1] == width:
        return ids_NW
    padding = np.full((len(ids_NW), width - ids_NW.shape[1]), NO_TOKEN, dtype=ids_NW.dtype)
    return np.concatenate([ids_NW, padding], axis=1)
