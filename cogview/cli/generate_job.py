"""``cogview generate --input``: run a job file and show its progress."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from cogview.cli.caption import caption_line
from cogview.cli.options import SessionOptions
from cogview.cli.progress import ProgressBar, is_first_process
from cogview.cli.session import GenerationSession, result_line
from cogview.jobs.journal import JobJournal, refuse_existing
from cogview.jobs.locks import JobLocks, rank_and_world_size
from cogview.jobs.plan import JobPlan, JobSettings
from cogview.jobs.records import read_job
from cogview.jobs.runner import JobObserver, JobReport, JobRunner
from cogview.signals import GracefulStop

if TYPE_CHECKING:
    from cogview.cli.generate import GenerateOptions
    from cogview.pipeline.requests import GenerationRequest
    from cogview.pipeline.results import Caption, GenerationProgress

STOP_MESSAGE = "finishing this batch; press Ctrl-C again to stop at once"


class TerminalObserver(JobObserver):
    """Print the events of a job; notes and progress in the first of several processes only."""

    def __init__(self, bar: ProgressBar) -> None:
        """Show progress in ``bar``."""
        self.bar = bar

    def skipped(self, reason: str) -> None:
        """Print the reason on stderr."""
        from tqdm import tqdm

        if is_first_process():
            tqdm.write(f"skipped: {reason}", file=sys.stderr)

    def noted(self, message: str) -> None:
        """Print the note on stderr."""
        from tqdm import tqdm

        tqdm.write(f"note: {message}", file=sys.stderr)

    def batch(self, paths: Mapping[GenerationRequest, Path]) -> None:
        """Prepare the previews."""
        self.bar.expect(paths)

    def progress(self, progress: GenerationProgress) -> None:
        """Advance the bar."""
        self.bar.update(progress)

    def finished(self, request: GenerationRequest) -> None:
        """Count the result and remove its preview."""
        self.bar.finished(request)

    def recorded(self, num_results: int, num_codes: int) -> None:
        """Set the bar to the results of all processes."""
        self.bar.set_progress(num_results, num_codes)

    def saved(self, path: Path, score: float | None) -> None:
        """Print the path on stdout, with the score of a ranked image."""
        from tqdm import tqdm

        tqdm.write(result_line(path, score), file=sys.stdout)

    def captioned(self, caption: Caption, image: Path) -> None:
        """Print the caption on stdout as a line of JSON."""
        from tqdm import tqdm

        tqdm.write(caption_line(caption, file=str(image)), file=sys.stdout)


def run_job(source: str, *, resume: bool, options: GenerateOptions, session: SessionOptions) -> int:
    """Generate the results of all valid lines of a job file.

    Args:
        source: The job file, or ``-`` for standard input.
        resume: Whether to continue a journal of an earlier run.
        options: The images per prompt, and the output folder.
        session: The model and the sampling settings.

    Returns:
        The exit status: 2 if a line was skipped, 130 if the job was interrupted.

    Raises:
        InputError: No line can be used, the journal is that of another job, or the model lacks a task.
    """
    from cogview.device import use_local_rank_gpu
    from cogview.image_io.captioned_sheet import require_sheet_fits
    from cogview.image_io.png import prepare_folder

    records, problems = read_job(source)
    rank_and_world_size()  # a wrong environment is reported before the model is loaded
    counts = (record.n or options.n for record in records if record.row.weights == "generate")
    images = sum(min(count, options.keep or count) for count in counts)
    if options.grid:
        require_sheet_fits(images)
    prepare_folder(options.output)
    path = options.output / f"{'stdin' if source == '-' else Path(source).stem}.ledger.jsonl"
    locks = JobLocks(path)
    try:
        if not resume:
            refuse_existing(path, locks)
        use_local_rank_gpu()
        opened = GenerationSession.open(session, options.tasks)
        settings = JobSettings(
            source=source,
            output=options.output,
            n=options.n,
            keep=options.keep,
            upscale=options.upscale,
            sampling=session.settings,
            seed=session.seed,
            max_batch_size=session.model.max_batch_size,
            kv_dtype=session.model.kv_dtype,
        )
        plan = JobPlan(opened.model, settings, records, problems)
        # Results recorded since the look above are those of processes that were started beside this one.
        journal = plan.open_journal(path, locks)
        try:
            return _run(opened, plan, journal, locks, grid=options.grid)
        finally:
            journal.close()
    finally:
        locks.close()


def _run(session: GenerationSession, plan: JobPlan, journal: JobJournal, locks: JobLocks, *, grid: bool) -> int:
    """Run a planned job; return the exit status."""
    first = is_first_process()
    missing = plan.missing_codes(journal)
    session.seed = plan.seed
    if first:
        session.print_header()
        for problem in plan.problems:
            print(f"skipped: {problem}", file=sys.stderr)
    with (
        GracefulStop(STOP_MESSAGE if first else None) as stop,
        session.progress_bar("generating", len(missing), sum(missing.values()), noun="result") as bar,
    ):
        runner = JobRunner(plan, TerminalObserver(bar))
        report = runner.run(journal, locks, stop.requested)
    if stop.requested() and report.left:
        if first:
            print(f"stopped: {report.left} of {report.count} results are left; --resume continues", file=sys.stderr)
        return 130
    if first:
        _finish(runner, journal, report, grid=grid)
    return 2 if report.skipped else 0


def _finish(runner: JobRunner, journal: JobJournal, report: JobReport, *, grid: bool) -> None:
    """Report a job that had nothing to do, and write its contact sheet."""
    if not report.missing:
        print(f"{report.count} of {report.count} results exist already", file=sys.stderr)
    if grid and (path := runner.save_sheet(journal)) is not None:
        print(path)
