"""Look for new token stores in a folder while a run is training."""

from __future__ import annotations

import os
import sys
from collections.abc import Collection
from pathlib import Path

from cogview.data.mixture import check_fits
from cogview.data.store import StoreHeader, TokenStore
from cogview.data.store_checksum import DATA_FILE
from cogview.data.store_writer import is_being_written
from cogview.data.v1_datasets import InvalidRow, open_dataset
from cogview.errors import InputError


class StoreWatcher:
    """Watch for new stores directly below a folder.

    A store may be written, moved or linked there. It must not be written to once it was found.

    Args:
        folder: the folder to watch.
        header: header of the run's first store, which a new store must match.
        tasks: tasks that a new store must feed.

    Raises:
        InputError: if there is no such folder.
    """

    def __init__(self, folder: str | Path, header: StoreHeader, tasks: Collection[str] = ()) -> None:
        self.folder = Path(folder)
        self.header = header
        self.tasks = tuple(tasks)
        self._reported: set[str] = set()
        if not self.folder.is_dir():
            raise InputError(f"there is no folder {self.folder} to look for new stores in: make it, or watch none")

    def new_stores(self, known: Collection[str]) -> list[TokenStore]:
        """Return the stores that are not yet known, in the order of their names; CogView v1 datasets count too.

        Hidden folders, stores that are being written, empty stores and unreadable folders are skipped and looked at
        again next time. A store that does not match is reported once on stderr and then ignored. A writer is noticed by
        its LMDB lock, if it runs on this machine and the lock file is writable.

        Args:
            known: paths of the stores that are in use.

        Returns:
            The new stores, open for reading.
        """
        seen = {os.path.realpath(name) for name in known}
        try:
            names = sorted(entry.name for entry in os.scandir(self.folder) if not entry.name.startswith("."))
        except OSError as error:
            self._report_once("", f"no new stores: {self.folder} is no longer readable ({error.strerror})")
            return []
        found = []
        for path in (self.folder / name for name in names):
            real_path = os.path.realpath(path)
            if real_path in seen or real_path in self._reported:
                continue
            seen.add(real_path)
            try:
                store = self._open(path)
            except InputError as error:
                self._report_once(real_path, f"a new store does not fit and is skipped: {error}")
            else:
                found += [store] if store is not None else []
        return found

    def _open(self, path: Path) -> TokenStore | None:
        """Return the store at ``path``, or None if there is none yet; raise InputError if it does not match."""
        header = self.header
        try:
            data = path / DATA_FILE
            if not data.is_file() or is_being_written(data) or _is_written_by_lmdb(path):
                return None
            store = open_dataset(
                path,
                num_image_codes=header.num_image_codes,
                num_text_pieces=header.num_text_pieces,
                codebook_sha256=header.codebook_sha256,
                text_sha256=header.text_sha256,
            )
        except InvalidRow:  # a readable CogView v1 dataset with a bad row
            raise
        except (InputError, OSError):
            return None
        if not len(store):
            return None
        check_fits(store, header, "the run")
        for task in self.tasks:
            store.check_compatible(layout=task)
        return store

    def _report_once(self, path: str, message: str) -> None:
        if path not in self._reported:
            self._reported.add(path)
            print(message, file=sys.stderr)


def _is_written_by_lmdb(path: Path) -> bool:
    """Return whether another process has the LMDB in ``path`` open for writing: another program, or an earlier version.

    LMDB locks the first byte of its lock file while an environment is open (``mdb_env_share_locks``).
    """
    try:
        import fcntl
    except ImportError:  # not on Windows, where LMDB locks otherwise
        return False
    try:
        with (path / "lock.mdb").open("r+b") as file:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1)
            except (BlockingIOError, PermissionError):
                return True
    except OSError:
        pass  # our writers make none
    return False
