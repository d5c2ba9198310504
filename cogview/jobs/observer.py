"""What a job reports: its events while it runs, and its numbers afterwards."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cogview.pipeline.requests import GenerationRequest
    from cogview.pipeline.results import Caption, GenerationProgress, Ranking


class JobObserver:
    """Receiver of the events of a job; each method does nothing by default."""

    def skipped(self, reason: str) -> None:
        """A line cannot be used, or an image of it cannot be read."""

    def noted(self, message: str) -> None:
        """A note on how an image was read or fitted, on one unlike the training, or on a prompt not all understood."""

    def batch(self, paths: Mapping[GenerationRequest, Path]) -> None:
        """A batch starts; ``paths`` has the files of its images."""

    def progress(self, progress: GenerationProgress) -> None:
        """Tokens were decoded."""

    def finished(self, request: GenerationRequest) -> None:
        """A request is done."""

    def recorded(self, num_results: int, num_codes: int) -> None:
        """All processes together have recorded this number of the results that were missing at the start.

        Args:
            num_results: Results recorded so far.
            num_codes: Codes and pieces sampled for them.
        """

    def saved(self, path: Path, score: float | None, facts: Mapping[str, Any]) -> None:
        """An image was saved.

        Args:
            path: Its file.
            score: Score of a ranked image, in nats; else None.
            facts: Its id, task, prompt, index and seed, and the input image if there is one.
        """

    def captioned(self, caption: Caption, image: Path, name: str) -> None:
        """A caption of an image file was generated.

        Args:
            caption: The caption.
            image: The image file.
            name: Its id.
        """

    def ranked(self, ranking: Ranking, name: str) -> None:
        """The images of a record were ranked.

        Args:
            ranking: The ranking.
            name: Its id.
        """


@dataclass(frozen=True, kw_only=True)
class JobReport:
    """The state of a job after ``JobRunner.run``."""

    count: int  # results of the whole job
    missing: int  # of them to be made when the run started
    made: int  # of them made by now, also rankings in which an image has no score
    left: int  # of them neither made nor tried
    failed: int  # of them tried without success, also rankings in which an image has no score
    skipped: int  # lines that cannot be used
