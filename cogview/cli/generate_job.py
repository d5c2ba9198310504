"""``cogview generate --input``: run a job file and show its progress."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Mapping
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cogview.cli.caption import caption_line
from cogview.cli.messages import print_result
from cogview.cli.options import SessionOptions
from cogview.cli.progress import ProgressBar
from cogview.cli.session import GenerationSession, result_line
from cogview.errors import ExitStatus
from cogview.formatting import plural
from cogview.jobs.journal import JobJournal, refuse_existing
from cogview.jobs.locks import JobLocks
from cogview.jobs.observer import JobObserver, JobReport
from cogview.jobs.plan import JobPlan, JobSettings
from cogview.jobs.records import read_job
from cogview.jobs.runner import JobRunner
from cogview.limits import MAX_RESULTS
from cogview.process_variables import is_first_process, rank_and_world_size
from cogview.signals import GracefulStop, exit_status_of_signal

if TYPE_CHECKING:
    from cogview.cli.generate import GenerateOptions
    from cogview.pipeline.requests import GenerationRequest
    from cogview.pipeline.results import Caption, GenerationProgress, Ranking

STOP_MESSAGES: dict[int, str] = {
    signal.SIGINT: "finishing this batch; press Ctrl-C again to stop at once",
    signal.SIGTERM: "finishing this batch; a second SIGTERM stops at once",
}


class TerminalObserver(JobObserver):
    """Print the events of a job; those before its bar is set, which all processes have alike, in the first one only.

    Attributes:
        bar: The progress bar of the run.
    """

    bar: ProgressBar | None = None

    def skipped(self, reason: str) -> None:
        """Print the reason on stderr."""
        from tqdm import tqdm

        if self.bar is not None or is_first_process():
            tqdm.write(f"skipped: {reason}", file=sys.stderr)

    def noted(self, message: str) -> None:
        """Print the note on stderr."""
        from tqdm import tqdm

        tqdm.write(f"note: {message}", file=sys.stderr)

    def batch(self, paths: Mapping[GenerationRequest, Path]) -> None:
        """Prepare the previews."""
        if self.bar is not None:
            self.bar.expect(paths)

    def progress(self, progress: GenerationProgress) -> None:
        """Advance the bar."""
        if self.bar is not None:
            self.bar.update(progress)

    def finished(self, request: GenerationRequest) -> None:
        """Count the result and remove its preview."""
        if self.bar is not None:
            self.bar.finished(request)

    def recorded(self, num_results: int, num_codes: int) -> None:
        """Set the bar to the results of all processes."""
        if self.bar is not None:
            self.bar.set_progress(num_results, num_codes)

    def saved(self, path: Path, score: float | None, facts: Mapping[str, Any]) -> None:
        """Print the path on stdout, with the score of a ranked image."""
        print_result(result_line(path, score), {"file": str(path), **facts, "score": score})

    def captioned(self, caption: Caption, image: Path, name: str) -> None:
        """Print the caption on stdout as a line of JSON."""
        from tqdm import tqdm

        tqdm.write(caption_line(caption, id=name, file=str(image)), file=sys.stdout)

    def ranked(self, ranking: Ranking, name: str) -> None:
        """Print the ranking on stdout as a line of JSON."""
        from tqdm import tqdm

        tqdm.write(json.dumps({"id": name, **ranking.as_json()}, ensure_ascii=False), file=sys.stdout)


def run_job(source: str, *, resume: bool, options: GenerateOptions, session: SessionOptions) -> int:
    """Generate the results of all valid lines of a job file.

    Args:
        source: The job file, or ``-`` for standard input.
        resume: Whether to continue a journal of an earlier run.
        options: The images per prompt, and the output folder.
        session: The model and the sampling settings.

    Returns:
        The exit status: 1 if a line was skipped or a result failed, 2 if there is no result, 128 + the signal if the
        job was stopped.

    Raises:
        InputError: No line can be used, the journal is that of another job, or the model lacks a task.
    """
    from cogview.device import use_local_rank_gpu
    from cogview.image_io.captioned_sheet import require_sheet_fits
    from cogview.image_io.png import prepared_folder

    records, problems = read_job(source)
    rank_and_world_size()  # a wrong environment is reported before the model is loaded
    images = sum(
        min(record.n or options.n, (options.keep if record.row.is_described else None) or MAX_RESULTS)
        for record in records
        if record.row.output == "image" and not record.row.windowed
    )
    if options.grid:
        require_sheet_fits(images)
    path = options.output / f"{'stdin' if source == '-' else Path(source).stem}.ledger.jsonl"
    with prepared_folder(options.output), ExitStack() as stack:
        locks = None  # without a journal, not before the model is open: one that is refused leaves no file
        if path.exists():
            locks = stack.enter_context(closing(JobLocks(path)))
            if not resume:
                refuse_existing(path, locks)
        use_local_rank_gpu()
        opened = GenerationSession.open(session, options.tasks)
        settings = JobSettings(
            source=source,
            output=options.output,
            n=options.n,
            keep=options.keep,
            rank_by=options.rule,
            upscale=options.upscale,
            sampling=session.settings,
            seed=session.seed,
            max_batch_size=session.model.max_batch_size,
            kv_dtype=session.model.kv_dtype,
        )
        plan = JobPlan(opened.model, settings, records, problems)
        if locks is None:
            locks = stack.enter_context(closing(JobLocks(path)))
        # Results recorded since the look above are those of processes that were started beside this one.
        journal = stack.enter_context(closing(plan.open_journal(path, locks)))
        return _run(opened, plan, journal, locks, grid=options.grid)


def _run(session: GenerationSession, plan: JobPlan, journal: JobJournal, locks: JobLocks, *, grid: bool) -> int:
    """Run a planned job; return the exit status."""
    first = is_first_process()
    session.seed = plan.seed
    if first:
        session.print_header()
        _print_lost(journal)
    observer = TerminalObserver()
    runner = JobRunner(plan, observer)
    missing = runner.prepare(journal)
    with (
        GracefulStop(STOP_MESSAGES if first else None) as stop,
        session.progress_bar("generating", len(missing), sum(missing.values()), noun="result") as bar,
    ):
        observer.bar = bar
        report = runner.run(journal, locks, stop.requested)
    if stop.number is not None and report.left:
        if first:
            print(f"stopped: {report.left} of {report.count} results are left; --resume continues", file=sys.stderr)
        return exit_status_of_signal(stop.number)
    if first:
        _finish(runner, journal, report, grid=grid)
    return ExitStatus.of(report.made, report.failed + report.skipped)


def _print_lost(journal: JobJournal) -> None:
    """Print how many recorded results cannot be used."""
    lost = journal.outcomes.lost
    if lost:
        name, reason = next(iter(lost.items()))
        print(
            f"note: {plural(len(lost), 'recorded result')} cannot be used and will be made again; the first, {name}: "
            f"{reason}",
            file=sys.stderr,
        )


def _finish(runner: JobRunner, journal: JobJournal, report: JobReport, *, grid: bool) -> None:
    """Report a job that had nothing to do, and what failed, and write its contact sheet."""
    failed = report.failed + report.skipped
    if not report.missing and report.made == report.count:
        print(f"{report.count} of {report.count} results exist already", file=sys.stderr)
    if failed:
        print(f"failed or skipped: {failed}, with reasons in {journal.path}; --resume tries again", file=sys.stderr)
    if grid and (path := runner.save_sheet(journal)) is not None:
        print_result(str(path), {"file": str(path), "task": "sheet"})
