"""Progress of a generating command on stderr: the planned batch sizes, a progress bar, and preview files."""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from cogview.cli.translation import translate
from cogview.formatting import plural
from cogview.process_variables import is_first_process

if TYPE_CHECKING:
    import numpy as np

    from cogview.pipeline.cogview import CogView
    from cogview.pipeline.requests import GenerationRequest
    from cogview.pipeline.results import GenerationProgress

PREVIEW_SECONDS = 2.0  # minimum between two previews of an image
PREVIEW_SHARE = 0.1  # maximum share of the time that previews may take, besides those after each quarter
AUXILIARY_STEPS = ("encoding images", "decoding pixels")  # logged only where they do not fit into one batch


@contextmanager
def log_batch_plans() -> Iterator[None]:
    """Print the planned batch sizes on stderr within the block; in the first of several processes only."""
    logger = logging.getLogger("cogview.planning.batches")
    handler, before = _PlanLogHandler(), (logger.level, logger.propagate)
    if is_first_process():
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before[0])
        logger.propagate = before[1]


class _PlanLogHandler(logging.Handler):
    """Print the first plan of a command, and later plans with smaller batches."""

    def __init__(self) -> None:
        super().__init__()
        self._smallest: dict[str, float] = {}

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        if record.levelno > logging.INFO or self._is_news(record):
            tqdm.write(record.getMessage(), file=sys.stderr)  # keeps a progress bar intact

    def _is_news(self, record: logging.LogRecord) -> bool:
        arguments: Any = record.args
        step, size, count = str(arguments[0]), int(arguments[1]), int(arguments[2])
        if size == count:
            news = not self._smallest and step not in AUXILIARY_STEPS
            self._smallest |= {step: math.inf} if news else {}
            return news
        news = size < self._smallest.get(step, math.inf)
        self._smallest[step] = min(size, self._smallest.get(step, math.inf))
        return news


class ProgressBar:
    """A progress bar on a terminal; elsewhere one line at the start."""

    def __init__(
        self, activity: str, count: int, codes: int, *, noun: str = "image", previews: Previews | None = None
    ) -> None:
        """Show the bar.

        Args:
            activity: The verb that the bar starts with, such as ``generating``.
            count: Number of results.
            codes: Number of tokens of all results, in which the bar advances.
            noun: Singular noun of a result.
            previews: Writer of preview files; None writes none.
        """
        from tqdm import tqdm

        first = is_first_process()
        if count and first and not sys.stderr.isatty():
            print(f"{translate(activity)} {translate(plural(count, noun))}", file=sys.stderr)
        self._bar = tqdm(
            total=codes,
            unit=" codes",
            desc=translate(activity),
            disable=None if first else True,
            leave=False,
            bar_format="{desc}: {percentage:3.0f}%|{bar}| {rate_noinv_fmt}{postfix}, {remaining} left",
        )
        self._count, self._done, self._noun = count, 0, noun
        self._previews = previews
        self._start = time.monotonic()

    def expect(self, paths: Mapping[GenerationRequest, Path]) -> None:
        """Announce the next batch: its requests and the files of their images, for previews."""
        if self._previews is not None:
            self._previews.paths = dict(paths)

    def update(self, progress: GenerationProgress) -> None:
        """Advance the bar; the callback for ``CogView.run``."""
        # Captions that end early, and batches repeated with less memory, would otherwise pass 100%.
        self._bar.update(min(progress.num_new, self._bar.total - self._bar.n))
        self._show_rate()
        if self._previews is not None:
            self._previews.update(progress)

    def finished(self, request: GenerationRequest) -> None:
        """Count one more saved result and remove its preview."""
        self._done += 1
        self._show_rate()
        if self._previews is not None:
            self._previews.remove(request)

    def catch_up(self) -> None:
        """Advance the bar to the share of results that are finished: some may have fewer codes than was expected."""
        share = min(1.0, self._done / max(1, self._count))
        self._bar.update(max(0, int(share * self._bar.total) - self._bar.n))

    def set_progress(self, done: int, codes: int) -> None:
        """Set the number of results and tokens that all processes of a job have finished."""
        self._done = done
        if not self._bar.disable:
            self._bar.n = codes
            self._show_rate()
            self._bar.refresh()

    def _show_rate(self) -> None:
        if not self._bar.disable:
            rate = self._count * self._bar.n / self._bar.total / max(1e-9, time.monotonic() - self._start)
            nouns = f"{self._noun}s"
            self._bar.set_postfix_str(f"{self._done}/{self._count} {nouns}, {rate:.2g} {nouns}/s", refresh=False)

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
        if self._previews is not None:
            for request in list(self._previews.paths):
                self._previews.remove(request)


class Previews:
    """Preview files ``NAME.preview.png`` of unfinished images, grey where no code is decoded yet.

    Attributes:
        paths: The final file of each image of the current batch.
    """

    def __init__(self, model: CogView) -> None:
        """Decode previews with the image tokenizer of ``model``."""
        self.paths: dict[GenerationRequest, Path] = {}
        self._model = model
        self._share = 0.0  # of the codes that were decoded at the last update
        self._due = 0.0

    def update(self, progress: GenerationProgress) -> None:
        """Write the previews every few seconds, and after each quarter of the codes."""
        share, before = progress.done / progress.total, self._share
        self._share = share
        if share < before:  # another batch
            before = 0.0
        if share == 1 or (int(4 * share) == int(4 * before) and time.monotonic() < self._due):
            return
        start = time.monotonic()
        for request, codes in zip(progress.requests, progress.codes(), strict=True):
            if (path := self.paths.get(request)) is not None:
                self._write(path, codes)
        seconds = time.monotonic() - start
        self._due = time.monotonic() + max(PREVIEW_SECONDS, seconds / PREVIEW_SHARE)

    def remove(self, request: GenerationRequest) -> None:
        """Delete the preview of an image that has been saved."""
        from cogview.image_io.png import preview_path

        if (path := self.paths.pop(request, None)) is not None:
            preview_path(path).unlink(missing_ok=True)

    def _write(self, path: Path, codes: np.ma.MaskedArray) -> None:
        """Decode one image: a whole batch of pixels would not fit beside the batch that is generated."""
        import numpy as np

        from cogview.image_io.png import mask_undecoded, preview_path, write_png

        known = codes.compressed()
        pixels = self._model.decode_images(codes.filled(known[-1] if len(known) else 0)[None])[0]
        path.parent.mkdir(parents=True, exist_ok=True)
        write_png(preview_path(path), mask_undecoded(pixels, np.ma.getmaskarray(codes)), {})
