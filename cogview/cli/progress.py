"""What a command shows while it draws: how the work was planned, a bar, and previews."""

from __future__ import annotations

import logging
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from cogview.formatting import plural

if TYPE_CHECKING:
    import numpy as np

    from cogview.pipeline.cogview import CogView
    from cogview.pipeline.requests import GenerationRequest
    from cogview.pipeline.results import GenerationProgress

PREVIEW_SECONDS = 2.0  # at least, between two looks at a picture
PREVIEW_SHARE = 0.1  # of the time may go into looking, beside the looks after each quarter
AUXILIARY_STEPS = ("encoding images", "decoding pixels")  # told only where memory does not hold all of it


@contextmanager
def log_batch_plans() -> Iterator[None]:
    """Within, lines on stderr say how much is done at a time, and why; in the first of several processes only."""
    logger = logging.getLogger("cogview.planning.batches")
    handler, before = _PlanLogHandler(), (logger.level, logger.propagate)
    if _is_first_process():
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before[0])
        logger.propagate = before[1]


def _is_first_process() -> bool:
    """Of several that share a job, one shows what is done."""
    return os.environ.get("RANK", "0") == "0"


class _PlanLogHandler(logging.Handler):
    """Of the plans of a command tells the first, and later ones that do less at a time."""

    def __init__(self) -> None:
        super().__init__()
        self._least: dict[str, float] = {}

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        if record.levelno > logging.INFO or self._is_news(record):
            tqdm.write(record.getMessage(), file=sys.stderr)  # beside a progress bar, if there is one

    def _is_news(self, record: logging.LogRecord) -> bool:
        arguments: Any = record.args
        what, size, count = arguments[:3]
        if size == count:
            news = not self._least and what not in AUXILIARY_STEPS
            self._least |= {what: math.inf} if news else {}
            return news
        news = size < self._least.get(what, math.inf)
        self._least[what] = min(size, self._least.get(what, math.inf))
        return news


class ProgressBar:
    """A bar on a terminal over ``count`` things that have ``codes`` in all; a line where there is no terminal."""

    def __init__(
        self, what: str, count: int, codes: int, *, noun: str = "picture", previews: Previews | None = None
    ) -> None:
        from tqdm import tqdm

        first = _is_first_process()
        if count and first and not sys.stderr.isatty():
            print(f"{what} {plural(count, noun)}", file=sys.stderr)
        form = "{desc}: {percentage:3.0f}%|{bar}| {rate_noinv_fmt}{postfix}, {remaining} left"
        self._bar = tqdm(
            total=codes, unit=" codes", desc=what, disable=None if first else True, leave=False, bar_format=form
        )
        self._count, self._done, self._noun = count, 0, noun
        self._previews = previews
        self._begun = time.monotonic()

    def expect(self, paths: Mapping[GenerationRequest, Path]) -> None:
        """Where the pictures will be that are drawn from now on; of them there are previews."""
        if self._previews is not None:
            self._previews.paths = dict(paths)

    def watch(self, moment: GenerationProgress) -> None:
        """For ``CogView.make``."""
        # Captions that end early, and what memory did not hold and is done again, would count too much.
        self._bar.update(min(moment.num_new, self._bar.total - self._bar.n))
        self._tell()
        if self._previews is not None:
            self._previews.watch(moment)

    def finished(self, wish: GenerationRequest) -> None:
        """One more is written."""
        self._done += 1
        self._tell()
        if self._previews is not None:
            self._previews.remove(wish)

    def set_progress(self, done: int, codes: int) -> None:
        """So many are written, by whomever, with so many codes."""
        self._done = done
        if not self._bar.disable:
            self._bar.n = codes
            self._tell()
            self._bar.refresh()

    def _tell(self) -> None:
        if not self._bar.disable:
            speed = self._count * self._bar.n / self._bar.total / max(1e-9, time.monotonic() - self._begun)
            nouns = f"{self._noun}s"
            self._bar.set_postfix_str(f"{self._done}/{self._count} {nouns}, {speed:.2g} {nouns}/s", refresh=False)

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
        if self._previews is not None:
            for wish in list(self._previews.paths):
                self._previews.remove(wish)


class Previews:
    """Files of pictures as far as they are drawn, grey where they are not yet: ``NAME.preview.png``.

    ``paths`` are the files that the pictures will be written into.
    """

    def __init__(self, model: CogView) -> None:
        self.paths: dict[GenerationRequest, Path] = {}
        self._model = model
        self._lines = 0.0  # share of them that was drawn when it was looked at last
        self._due = 0.0

    def watch(self, moment: GenerationProgress) -> None:
        """Write them every few seconds, and after each quarter of the lines."""
        share, before = moment.done / moment.total, self._lines
        self._lines = share
        if share < before:  # another batch
            before = 0.0
        if share == 1 or (int(4 * share) == int(4 * before) and time.monotonic() < self._due):
            return
        begun = time.monotonic()
        for wish, codes in zip(moment.requests, moment.codes(), strict=True):
            if (path := self.paths.get(wish)) is not None:
                self._write(path, codes)
        took = time.monotonic() - begun
        self._due = time.monotonic() + max(PREVIEW_SECONDS, took / PREVIEW_SHARE)

    def remove(self, wish: GenerationRequest) -> None:
        """Remove that of a picture which is written now."""
        from cogview.image_io.png import preview_path

        if (path := self.paths.pop(wish, None)) is not None:
            preview_path(path).unlink(missing_ok=True)

    def _write(self, path: Path, codes: np.ma.MaskedArray) -> None:
        import numpy as np

        from cogview.image_io.png import mask_undecoded, preview_path, write_png

        drawn = codes.compressed()
        # One at a time: what is drawn leaves memory for no batch of pixels.
        pixels = self._model.decode_images(codes.filled(drawn[-1] if len(drawn) else 0)[None])[0]
        path.parent.mkdir(parents=True, exist_ok=True)
        write_png(preview_path(path), mask_undecoded(pixels, np.ma.getmaskarray(codes)), {})
