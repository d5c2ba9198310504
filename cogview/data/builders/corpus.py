"""Captions for a text tokenizer: normalized, with a held-out part, and no more than are trained on."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from cogview.data.builders.prepare import DIGEST_BYTES, NO_TEXT, is_held_out, normalize_caption
from cogview.data.keyed_random import KeyedRandom
from cogview.data.sources.records import PictureRecord

MAX_HELD_OUT = 20_000  # captions: more would hardly change a share


@dataclass(kw_only=True)
class CaptionSample:
    """A random part of captions, of which equal ones are all kept in one place.

    Args:
        limit: Maximum number of captions that are kept. Of more, each is as likely as any other.

    Attributes:
        captions: The captions that are kept.
        count: Number of captions that were added.
    """

    limit: int
    captions: list[str] = field(default_factory=list)
    count: int = 0

    def add(self, caption: str) -> None:
        """Add a caption, in place of a random one if there are enough; equal additions give equal samples."""
        self.count += 1
        if len(self.captions) < self.limit:
            self.captions.append(caption)
            return
        place = KeyedRandom("caption", self.count).randbelow(self.count)  # reservoir sampling
        if place < self.limit:
            self.captions[place] = caption


@dataclass(kw_only=True)
class CaptionCorpus:
    """Captions to train a text tokenizer on, and others to measure it on.

    Attributes:
        training: The captions to train on.
        held_out: Captions that are not trained on, chosen by a hash of their text.
        records: Number of all entries.
        skipped: Number of entries without captions that can be used.
        first_skipped: The first of them, with its reason.
    """

    training: CaptionSample
    held_out: CaptionSample = field(default_factory=lambda: CaptionSample(limit=MAX_HELD_OUT))
    records: int = 0
    skipped: int = 0
    first_skipped: str = ""

    def skip(self, name: str, reason: str) -> None:
        """Count an entry that cannot be used."""
        self.skipped += 1
        self.first_skipped = self.first_skipped or f"{name}: {reason}"


def read_corpus(
    records: Iterable[PictureRecord], *, limit: int, held_out: float, convert: Callable[[str], str] = str
) -> CaptionCorpus:
    """Read the captions of records.

    Args:
        records: The records. Those without captions are counted.
        limit: Maximum number of captions to train on.
        held_out: Share of the captions to measure on, in [0, 1).
        convert: Conversion of each caption before it is normalized.

    Returns:
        The captions, normalized as those of a store are.
    """
    corpus = CaptionCorpus(training=CaptionSample(limit=limit))
    for record in records:
        corpus.records += 1
        if not record.captions:
            corpus.skip(record.name, record.problem or "no caption")
        for text in record.captions:
            if "\0" in text:
                corpus.skip(record.name, NO_TEXT)
                continue
            caption = normalize_caption(convert(text))
            try:
                content = caption.encode()
            except UnicodeEncodeError:
                corpus.skip(record.name, "a caption holds half of a surrogate pair")
                continue
            if not caption:
                corpus.skip(record.name, "a caption without text")
                continue
            digest = hashlib.blake2b(content, digest_size=DIGEST_BYTES).hexdigest()
            (corpus.held_out if is_held_out(digest, held_out) else corpus.training).add(caption)
    return corpus
