"""Build token stores from pictures with captions: a training store, a held-out store, and a report of what is left out.

The stores grow in a folder beside the target, ``STORE.building``, which a killed build leaves and the next one
continues. They are then written anew in one go, so that the files depend on the pictures alone: not on interruptions,
the number of processes or the kind of the source.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import shutil
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import DataLoader
from tqdm import tqdm

from cogview.data.builders.copies import CopyFinder
from cogview.data.builders.encode import LINE_SECONDS, encode_renditions, make_header
from cogview.data.builders.journal import BuildJournal, JournalEntry
from cogview.data.builders.prepare import NAMED_NOTE, PicturePreparer, PictureSettings, PreparedPicture
from cogview.data.image_dataset import check_side
from cogview.data.sources.records import PictureRecord, PictureSource
from cogview.data.store import NAMES_FIELD, TEXT_FIELD
from cogview.data.store_copy import copy_rows
from cogview.data.store_writer import StoreWriter, pad_text
from cogview.errors import InputError, RetryLaterError
from cogview.files import atomic_write, describe_owner, json_line, try_lock, write_owner
from cogview.formatting import format_duration, plural, printable
from cogview.signals import worker_init
from cogview.tokenizers.text import TextTokenizer
from cogview.vqvae.codec import ImageTokenizer, codebook_sha256

SPLITS = {True: "held-out", False: "training"}  # the training store is complete last
JOURNAL = "journal.jsonl"
COPIES = "copies.sqlite"
LOCK = "owner.json"
MEASURED = 10_000  # captions
MANY_BYTES = 0.2  # share of the characters of captions from which on a warning is given


@dataclass(frozen=True, kw_only=True)
class StorePaths:
    """The files of a build.

    Args:
        store: Folder of the training store, which the other names follow.

    Raises:
        InputError: It is the current folder or the one above, which are there.
    """

    store: Path

    def __post_init__(self) -> None:
        if self.store.name in ("", ".."):
            raise InputError(f"{self.store} is there already: choose another store with -o")

    @property
    def held_out(self) -> Path:
        """Folder of the held-out store."""
        return self.store.with_name(f"{self.store.name}-held-out")

    @property
    def report(self) -> Path:
        """Report of what was left out: JSON lines with file and reason."""
        return self.store.with_name(f"{self.store.name}-left-out.jsonl")

    @property
    def work(self) -> Path:
        """Folder of the build under way."""
        return self.store.with_name(f"{self.store.name}.building")

    def of_split(self, held_out: bool) -> Path:
        """Return the folder of a finished store."""
        return self.held_out if held_out else self.store


@dataclass(kw_only=True)
class BuildReport:
    """Counts of a finished build.

    Attributes:
        records: Records of the sources.
        pictures: Pictures with rows, by whether they are held out.
        rows: Rows, by whether they are held out.
        left_out: Entries of the report.
        first_left_out: The first of them.
        notes: Number of pictures by note.
        same_caption: Whether all rows have the same caption.
        lacks_names: Whether boxes were to name objects, and none does.
        held_out_share: Share of the pictures that was to be held out.
        byte_share: Share of the characters without a piece of their own, in the first ``MEASURED`` captions.
    """

    records: int = 0
    pictures: dict[bool, int] = field(default_factory=lambda: {False: 0, True: 0})
    rows: dict[bool, int] = field(default_factory=lambda: {False: 0, True: 0})
    left_out: int = 0
    first_left_out: str = ""
    notes: Counter[str] = field(default_factory=Counter)
    same_caption: bool = False
    lacks_names: bool = False
    held_out_share: float = 0.0
    byte_share: float = 0.0

    def warnings(self) -> list[str]:
        """Return what is likely to be a mistake in the data."""
        found = []
        rows = sum(self.rows.values())
        if rows > 1 and self.same_caption:
            found.append(f"all {rows} captions are the same: a model cannot learn to distinguish the pictures by text")
        if self.byte_share > MANY_BYTES:
            found.append(
                f"of the characters of captions, {self.byte_share:.0%} have no piece in this text tokenizer and are "
                "spelt in bytes: train a text tokenizer on these captions"
            )
        if self.lacks_names:
            found.append(
                "the column of boxes names no object of any caption, so name_loss_weight has no effect: a box has the "
                "text of the object as the caption has it"
            )
        if not self.rows[True] and self.held_out_share:
            found.append(
                f"none of {plural(self.pictures[False], 'picture')} fell into the held-out share of "
                f"{self.held_out_share:g}: there is no held-out store; a larger share is --held-out 0.2"
            )
        return found


@dataclass(frozen=True, kw_only=True, eq=False)
class PictureBuild:
    """A build of stores from captioned pictures.

    Args:
        paths: Files of the build.
        sources: The pictures, by the names of their sources.
        text_tokenizer: Tokenizer of the captions.
        image_tokenizer: Tokenizer of the images.
        settings: Settings of the stores; ``batch_size`` is the number of pictures encoded together.
        side: Side of the images at scale 1, in pixels.
    """

    paths: StorePaths
    sources: Mapping[str, PictureSource]
    text_tokenizer: TextTokenizer
    image_tokenizer: ImageTokenizer
    settings: PictureSettings
    side: int

    def with_sources(self, sources: Mapping[str, PictureSource]) -> PictureBuild:
        """Return the build with other sources."""
        return replace(self, sources=sources)

    def run(self) -> BuildReport:
        """Build the stores, or continue a build that was interrupted.

        Returns:
            Counts of the build. The stores and the report are at ``paths``.

        Raises:
            InputError: The side does not divide into codes, a store is there already, the build was started with other
                settings or sources, or no picture can be used; the report says why.
            RetryLaterError: The disk is full, or another process builds the same store.
        """
        check_side(self.side, self.image_tokenizer.downsampling, self.settings.tasks)
        grid = self.side // self.image_tokenizer.downsampling
        preparer = PicturePreparer(self.text_tokenizer, self.settings, self.side, grid)
        with self._locked():
            settings = self._journal_settings()
            # The size of batches is that of the first start: the free memory may differ by now.
            journal = BuildJournal(self.paths.work / JOURNAL, settings, kept={"batch_size": self.settings.batch_size})
            block = int(journal.header["batch_size"])
            with self._writer(False) as training, self._writer(True) as held_out:
                self._write_rows(preparer, journal, block, {False: training, True: held_out})
            return self._finish(journal)

    def _write_rows(
        self, preparer: PicturePreparer, journal: BuildJournal, block: int, writers: Mapping[bool, StoreWriter]
    ) -> None:
        """Write the rows of all records that are not done yet."""
        point = journal.resume(block, {split: writer.count for split, writer in writers.items()})
        records = itertools.chain.from_iterable(self.sources.values())
        surplus = dict(point.surplus)
        total = sum(map(len, self.sources.values()))
        with (
            CopyFinder(self.paths.work / COPIES) as copies,
            _Progress(self.paths.store.name, point.records, total) as progress,
        ):
            for entry in itertools.islice(journal.entries(), point.records):
                self._check_unchanged(entry, next(records, None), preparer)
                copies.add(entry)
            for batch in self._prepared(preparer, records, block):
                entries = [
                    copies.entry(picture, source_hash(picture.record), self.settings.held_out) for picture in batch
                ]
                rows = self._encode_rows(batch, entries)
                journal.append(entries)
                for split, fields in rows.items():
                    new = {name: ids[surplus[split] :] for name, ids in fields.items()}
                    surplus[split] = 0
                    if len(new[TEXT_FIELD]):
                        writers[split].append(new)
                progress.update(len(batch))

    def _check_unchanged(self, entry: JournalEntry, record: PictureRecord | None, preparer: PicturePreparer) -> None:
        """Raise InputError if a record is no longer that of an entry.

        A picture whose file has another size or time is read again: a copied folder has other times.
        """
        remedy = f"remove {self.paths.work} to start anew"
        if record is None or entry.source != source_hash(record):
            raise InputError(f"the sources have changed since the build was started, {entry.name} first: {remedy}")
        if record.file is not None and record.stamp() != entry.stamp and preparer[record].digest != entry.digest:
            raise InputError(f"the picture {entry.name} has changed since the build was started: {remedy}")

    def _prepared(
        self, preparer: PicturePreparer, records: Iterator[PictureRecord], block: int
    ) -> Iterator[list[PreparedPicture]]:
        """Yield the prepared pictures of records in blocks, in their order."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="This DataLoader will create")  # the user chose how many
            loader: DataLoader[PreparedPicture] = DataLoader(
                preparer,
                batch_size=block,
                sampler=records,  # records in place of indices, drawn as they are needed
                collate_fn=list,
                num_workers=self.settings.num_workers,
                worker_init_fn=worker_init,
            )
            batches = iter(loader)
        yield from batches

    def _encode_rows(
        self, batch: Sequence[PreparedPicture], entries: Sequence[JournalEntry]
    ) -> dict[bool, dict[str, np.ndarray]]:
        """Return the rows of a block by field, for the held-out store (True) and the training store."""
        used = [(picture, entry) for picture, entry in zip(batch, entries, strict=True) if entry.captions]
        if not used:
            return {}
        codes = encode_renditions([picture.images for picture, _ in used], self.image_tokenizer)
        rows = {}
        for split in SPLITS:
            chosen = [  # index of the picture, and number of the caption
                (index, number)
                for index, (picture, entry) in enumerate(used)
                for number, caption in enumerate(picture.captions)
                if entry.held_out == split and caption in entry.captions
            ]
            index = np.array([index for index, _ in chosen], dtype=np.int64)
            text = pad_text([used[index][0].pieces[number] for index, number in chosen], self.settings.text_width)
            rows[split] = {TEXT_FIELD: text, **{name: ids[index] for name, ids in codes.items()}}
            if self.settings.named and chosen:
                rows[split][NAMES_FIELD] = np.stack([used[index][0].named[number] for index, number in chosen])
        return rows

    def _finish(self, journal: BuildJournal) -> BuildReport:
        """Write the report and the stores to their places, and remove the folder of the build."""
        report = self._write_report(journal)
        if not report.rows[False]:
            shutil.rmtree(self.paths.work)
            if report.rows[True]:
                pictures = plural(report.pictures[True], "picture")
                raise InputError(f"the held-out share took all of {pictures}: lower it, --held-out 0 takes none")
            raise InputError(
                f"none of {plural(report.records, 'picture')} can be used, as {self.paths.report} lists; "
                f"the first: {report.first_left_out}"
            )
        for split in SPLITS:
            if report.rows[split]:
                try:
                    copy_rows([self.paths.work / SPLITS[split]], self.paths.of_split(split), overwrite=split)
                except RetryLaterError as error:
                    raise RetryLaterError(f"the work of the build is kept in {self.paths.work}; {error}") from None
        shutil.rmtree(self.paths.work)
        return report

    def _write_report(self, journal: BuildJournal) -> BuildReport:
        report = BuildReport(held_out_share=self.settings.held_out)
        first_caption: str | None = None
        others = False
        shares: list[float] = []
        with atomic_write(self.paths.report) as temporary, temporary.open("wb") as file:
            for entry in journal.entries():
                report.records += 1
                report.pictures[entry.held_out] += bool(entry.captions)
                report.rows[entry.held_out] += len(entry.captions)
                report.notes.update(entry.notes)
                for caption in entry.captions:
                    first_caption = caption if first_caption is None else first_caption
                    others = others or caption != first_caption
                if len(shares) < MEASURED:
                    shares += map(self.text_tokenizer.byte_share, entry.captions)
                for reason in entry.left_out:
                    report.left_out += 1
                    named = reason if printable(entry.name) in reason else f"{entry.name}: {reason}"
                    report.first_left_out = report.first_left_out or named
                    file.write(json_line({"file": entry.name, "reason": reason}))
        if not report.left_out:
            self.paths.report.unlink()
        report.lacks_names = self.settings.named and not report.notes[NAMED_NOTE]
        report.same_caption = not others and first_caption is not None
        report.byte_share = sum(shares) / max(1, len(shares))
        return report

    def _writer(self, held_out: bool) -> StoreWriter:
        share = {"fit": self.settings.fit, "simplified": self.settings.simplified, "held_out": self.settings.held_out}
        provenance = {"pictures": share, "split": SPLITS[held_out]}
        header = make_header(self.side, provenance, self.text_tokenizer, self.image_tokenizer, self.settings)
        return StoreWriter(self.paths.work / SPLITS[held_out], header, resume=True)

    def _journal_settings(self) -> dict[str, Any]:
        """Return what must be the same when a build is continued."""
        return {
            "sources": list(self.sources),
            "fit": self.settings.fit,
            "held_out": self.settings.held_out,
            "simplified": self.settings.simplified,
            "text_width": self.settings.text_width,
            "fields": [
                *self.settings.scales,
                *([NAMES_FIELD] if self.settings.named else []),
                *self.settings.edit_fields,
            ],
            "side": self.side,
            "codebook_sha256": codebook_sha256(self.image_tokenizer.codebook),
            "text_sha256": hashlib.sha256(self.text_tokenizer.model_bytes).hexdigest(),
        }

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the lock of the build, in its folder.

        Raises:
            InputError: A store is there already.
            RetryLaterError: Another process builds the same store.
        """
        work = self.paths.work
        work.mkdir(parents=True, exist_ok=True)
        file = os.open(work / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            with suppress(OSError):  # on a file system without locks, one process builds at a time
                if not try_lock(file):
                    owner = describe_owner(os.pread(file, 1000, 0))
                    raise RetryLaterError(
                        f"{self.paths.store} is being built by another process ({owner}): wait, or choose another "
                        "store with -o"
                    )
            write_owner(file)
            is_begun = (work / JOURNAL).exists()
            for path in (self.paths.store, *(() if is_begun else (self.paths.held_out,))):
                if os.path.lexists(path):  # also a link that leads nowhere
                    if not is_begun:
                        shutil.rmtree(work, ignore_errors=True)  # which another process may just have removed
                    raise InputError(f"{path} is there already: remove it, or choose another store with -o")
            yield
        finally:
            os.close(file)


class _Progress:
    """A progress bar with pictures per second and the time left; lines where stderr is no terminal."""

    def __init__(self, name: str, done: int, total: int) -> None:
        self.name, self.done, self.total = name, done, total

    def __enter__(self) -> _Progress:
        self.bar = tqdm(total=self.total, initial=self.done, unit="picture", desc=self.name, disable=None)
        self.first, self.started = self.done, time.monotonic()
        self.printed = self.started
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def update(self, count: int) -> None:
        """Add pictures."""
        self.done += count
        self.bar.update(count)
        now = time.monotonic()
        if self.bar.disable and now - self.printed >= LINE_SECONDS:
            self.printed = now
            rate = max(1, self.done - self.first) / max(1e-3, now - self.started)
            left = format_duration((self.total - self.done) / rate)
            print(
                f"{self.name}: {self.done} of {self.total} pictures, {rate:.1f} pictures/s, {left} left",
                file=sys.stderr,
            )


def source_hash(record: PictureRecord) -> str:
    """Return a short hash of the name, the captions, the boxes and the source of a record."""
    source = () if record.source is None else (str(record.source.path),)
    content = "\0".join((record.name, *record.captions, *record.boxes, record.problem or "", *source))
    return hashlib.blake2b(content.encode("utf-8", "surrogatepass"), digest_size=6).hexdigest()
