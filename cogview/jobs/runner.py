"""Generate the results of a job and record each finished one in the journal."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cogview.errors import InputError
from cogview.jobs.job_images import JobImages
from cogview.jobs.journal import JobJournal
from cogview.jobs.locks import JobLocks, run_chunks
from cogview.jobs.observer import JobObserver, JobReport
from cogview.jobs.plan import JobPlan, WorkItem
from cogview.jobs.records import JobRecord
from cogview.jobs.result_files import result_metadata

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

    from cogview.pipeline.results import GeneratedImage


MAX_PROMPT_NOTES = 20  # prompts of a run that are noted


@dataclass(frozen=True, kw_only=True)
class _UpscaleItem:
    """A result to upscale: its work item, the id of the upscaled image, the image, and the file of the image."""

    item: WorkItem
    name: str
    image: GeneratedImage
    path: Path


class JobRunner:
    """A plan, and an observer of its run."""

    def __init__(self, plan: JobPlan, observer: JobObserver | None = None) -> None:
        """Prepare to run ``plan``; ``observer`` receives the events."""
        self.plan = plan
        self.model = plan.model
        self._observer = observer or JobObserver()
        self._images = JobImages(plan.model, self._observer)
        self._noted_prompts: set[str] = set()

    def prepare(self, journal: JobJournal) -> dict[str, int]:
        """Record the lines that cannot be used, and the results whose images are missing or no images.

        An image in the output folder may be a result of another line: it is looked at when it is needed.

        Args:
            journal: The journal of the plan.

        Returns:
            The number of tokens of each result that can be made, by its id.

        Raises:
            DiskFull: The disk has no space for a line of the journal.
        """
        for problem in self.plan.problems:
            self._observer.skipped(problem)
            journal.record_error(problem.id, problem.reason, line=problem.number)
        output = self.plan.settings.output.resolve()
        missing = self.plan.missing_codes(journal)
        found: dict[tuple[Path, str], str | None] = {}
        reported: set[JobRecord] = set()
        for item in self.plan.items():
            names = [name for name in item.names if name in missing]
            task, record = item.record.row.weights, item.record
            reason = None
            for path in item.given_files if names else ():
                if (path, task) not in found and not path.resolve().is_relative_to(output):
                    found[path, task] = self._images.header_problem(path, task)
                reason = reason or found.get((path, task))
            if reason is None or record.row.output == "ranking":  # which ranks the other images
                continue
            self._fail(record, names, reason, journal, reported)
        return self.plan.missing_codes(journal)

    def run(self, journal: JobJournal, locks: JobLocks, stop: Callable[[], bool] = lambda: False) -> JobReport:
        """Make the results that are not in the journal.

        Args:
            journal: The journal of the plan, after ``prepare``.
            locks: The locks of the job.
            stop: Called before each chunk; the run ends where it returns True.

        Returns:
            Numbers of results and failures.

        Raises:
            DiskFull: The disk has no space for a result; finished results are kept.
        """
        missing = self.plan.missing_codes(journal)
        chunks = self.plan.chunks(journal.header["batch"])

        def work(number: int, names: Sequence[str]) -> None:
            self._run_chunk(chunks[number], set(names), journal)
            there = [codes for name, codes in missing.items() if name in journal.done]
            self._observer.recorded(len(there), sum(there))

        names = [[name for item in chunk for name in item.names] for chunk in chunks]
        run_chunks(names, journal, locks, work, stop)
        count = sum(map(len, names))
        undone = [name for chunk in names for name in chunk if name not in journal.done]
        failed = [name for name in undone if journal.has_failed(name)]
        return JobReport(
            count=count,
            missing=len(missing),
            made=count - len(undone) + sum("images" in journal.outcomes.errors[name] for name in failed),
            left=len(undone) - len(failed),
            failed=len(failed),
            skipped=len(self.plan.problems),
        )

    def save_sheet(self, journal: JobJournal) -> Path | None:
        """Lay the saved images of the job on a contact sheet; return its path, None without images."""
        from cogview.image_io.captioned_sheet import captioned_sheet, group_images, legend
        from cogview.image_io.png import SAMPLING_KEYS, read_metadata, save_png, sheet_metadata
        from cogview.image_io.reading import read_image

        names = [name for item in self.plan.items() if item.resolved.is_on_sheet for name in item.ids]
        paths = [self.plan.settings.output / journal.done[name]["path"] for name in names if name in journal.done]
        if not paths:
            return None
        settings, parts = self.plan.settings, [read_metadata(path) for path in paths]
        groups = group_images((part["prompt"] for part in parts), map(read_image, paths))
        sheet = captioned_sheet(groups, self._observer.noted)
        texts = sheet_metadata(parts, task="job", source=Path(settings.source).name, n=str(settings.n))
        if settings.keep is not None:
            texts |= {"keep": str(settings.keep), "rank_by": settings.rank_by}
        for key in SAMPLING_KEYS:  # of the first image; records have their own, which the job file holds
            texts.pop(key, None)
        texts |= {"captions": legend(groups), "seed": str(self.plan.seed)} | {
            key: str(value) for key, value in settings.sampling.items()
        }
        return save_png(settings.output / f"grid-seed{self.plan.seed}.png", sheet, texts)

    def _fail(
        self,
        record: JobRecord,
        names: Iterable[str],
        reason: str,
        journal: JobJournal,
        reported: set[JobRecord],
        **facts: Any,
    ) -> None:
        """Record the error of results, and report it once for each record."""
        for name in names:
            if record not in reported:
                reported.add(record)
                self._observer.skipped(f"line {record.number}: {reason}")
            journal.record_error(name, reason, line=record.number, **facts)

    def _note_prompts(self, prompts: Iterable[str | None]) -> None:
        """Report what is converted or not understood in prompts, each once and ``MAX_PROMPT_NOTES`` in all."""
        for prompt in prompts:
            if not prompt or prompt in self._noted_prompts or len(self._noted_prompts) > MAX_PROMPT_NOTES:
                continue
            if (warning := self.model.prompt_warning(prompt)) is not None:
                full = len(self._noted_prompts) == MAX_PROMPT_NOTES
                self._observer.noted("further notes on prompts are left out" if full else warning)
                self._noted_prompts.add(prompt)

    def _read_images(
        self, chunk: Sequence[WorkItem], missing: set[str], journal: JobJournal
    ) -> tuple[list[WorkItem], dict[JobRecord, Image.Image], dict[JobRecord, np.ndarray]]:
        """Return the items of a chunk that can be decoded, their images and masks; record the errors of the others."""
        with_image = dict.fromkeys(item.record for item in chunk if item.record.image is not None)
        images: dict[JobRecord, Image.Image] = {}
        masks: dict[JobRecord, np.ndarray] = {}
        reasons: dict[JobRecord, str] = {}
        for record in with_image:
            assert record.image is not None
            if (image := self._images.read(record.image, record.row.weights)) is None:
                reasons[record] = self._images.unread[record.image, record.row.weights]
                continue
            try:
                masks |= self._images.fit_mask(record)
            except InputError as error:
                reasons[record] = str(error)
            else:
                images[record] = image
        reported: set[JobRecord] = set()
        for item in chunk:
            if item.record in reasons:
                names = [name for name in item.names if name in missing]
                self._fail(item.record, names, reasons[item.record], journal, reported)
        can_run = [item for item in chunk if item.requests and item.record not in reasons]
        return can_run, images, masks

    def _run_chunk(self, chunk: Sequence[WorkItem], missing: set[str], journal: JobJournal) -> None:
        """Generate a whole chunk, so that batches are always the same, and save the results in ``missing``."""
        from cogview.image_io.png import preview_path, ranked_path

        for item in chunk:
            if item.record.row.output == "ranking" and not missing.isdisjoint(item.names):
                self._rank(item, journal)
        chunk, images, masks = self._read_images(chunk, missing, journal)
        if not any(name in missing for item in chunk for name in item.names):
            return
        asked = [item.record for item in chunk if not missing.isdisjoint(item.names)]
        self._note_prompts(record.prompt for record in asked if record.row.is_described)
        given = self._images.encode(images)
        requests = {
            item: [
                replace(request, codes=given[item.record][: item.record.rows], mask=masks.get(item.record))
                if item.record in given
                else request
                for request in item.requests
            ]
            for item in chunk
        }
        self._observer.batch(
            {
                request: path
                for item, group in requests.items()
                if item.resolved.is_on_sheet
                for request, path in zip(group, item.paths, strict=True)
            }
        )
        batch_size = self._batch_size(journal)
        results = self.model.run(
            [request for group in requests.values() for request in group],
            batch_size=batch_size,
            callback=self._observer.progress,
        )
        small: list[_UpscaleItem] = []
        for item, group in requests.items():
            generated: list[Any] = list(islice(results, len(group)))
            paths = dict(zip((request.index for request in group), item.paths, strict=False))
            if self.plan.is_ranked(item.resolved):
                rule = self.plan.rule_of(item.record)
                generated = self.model.rerank(generated, by=rule, batch_size=batch_size)[: len(item.ids)]
                for rank, image in enumerate(generated, start=1):
                    paths[image.index] = ranked_path(paths[image.index], rank, len(item.ids))
            for number, (name, result) in enumerate(zip(item.ids, generated, strict=True)):
                if name in missing:
                    place = number + 1 if self.plan.is_ranked(item.resolved) else None
                    self._save(name, item.record, result, paths.get(result.index), journal, rank=place)
                if item.upscaled:
                    path = self.plan.settings.output / journal.done[name]["path"]
                    small.append(_UpscaleItem(item=item, name=item.upscaled[number], image=result, path=path))
            for request in group:
                self._observer.finished(request)
            for path in item.paths:
                preview_path(path).unlink(missing_ok=True)  # of a process that was killed
        if small:
            self._upscale(small, missing, journal, batch_size)

    def _batch_size(self, journal: JobJournal) -> int:
        """Return the maximum number of sequences in a batch."""
        planned: int = journal.header["batch"]
        return min(planned, self.plan.settings.max_batch_size or planned)

    def _rank(self, item: WorkItem, journal: JobJournal) -> None:
        """Rank the images of a record and record their scores; as an error if an image cannot be read."""
        from cogview.pipeline.results import Ranking

        record, prompt, task, paths = item.record, item.record.prompt or "", item.record.row.weights, item.given_images
        images = {
            index: image for index, path in enumerate(paths) if (image := self._images.read(path, task)) is not None
        }
        errors = [None if index in images else self._images.unread[path, task] for index, path in enumerate(paths)]
        unread = [error for error in errors if error is not None]
        reason = f"{len(unread)} of {len(paths)} images cannot be read; the first: {unread[0]}" if unread else ""
        if not images:
            self._fail(record, item.ids, reason, journal, set())
            return
        self._note_prompts([prompt])
        settings: Any = {
            "by": self.plan.rule_of(record),
            "batch_size": self._batch_size(journal),
            "callback": self._observer.progress,
        }
        scores = dict(zip(images, self.model.score(list(images.values()), prompt, **settings), strict=True))
        ranking = Ranking(
            prompt=prompt,
            files=paths,
            scores=list(map(scores.get, range(len(paths)))),
            errors=errors,
            ranked_by=settings["by"],
        )
        self._observer.ranked(ranking, item.ids[0])
        facts = {"task": record.task, **ranking.as_json()}
        if unread:
            self._fail(record, item.ids, reason, journal, set(), **facts)
        else:
            journal.record(item.ids[0], **facts)

    def _upscale(
        self,
        small: Sequence[_UpscaleItem],
        missing: set[str],
        journal: JobJournal,
        batch_size: int,
    ) -> None:
        """Upscale images of a chunk, and save the results in ``missing``."""
        from cogview.pipeline.requests import GenerationRequest
        from cogview.pipeline.results import source_metadata

        requests = [
            GenerationRequest(
                prompt=each.image.prompt,
                seed=each.image.seed,
                index=each.image.index,
                task="upscale",
                codes=each.image.codes,
                sampling=each.item.resolved.upscale_sampling,
            )
            for each in small
        ]
        results = self.model.run(requests, batch_size=batch_size, callback=self._observer.progress)
        for each, large in zip(small, results, strict=True):
            if each.name in missing:
                source = each.path.relative_to(self.plan.settings.output)
                record = replace(each.item.record, task="upscale", image=source, rows=None, mask=None, strength=None)
                path = each.path.with_name(f"{each.path.stem}-up.png")
                small_facts = source_metadata(each.image, each.item.record.task)
                self._save(each.name, record, large, path, journal, metadata=small_facts)

    def _save(
        self,
        name: str,
        record: JobRecord,
        result: Any,
        path: Path | None,
        journal: JobJournal,
        *,
        rank: int | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        """Save a result, then record it in the journal.

        Args:
            name: Id of the result.
            record: What asked for it.
            result: The image or caption.
            path: File of the image; None for a caption.
            journal: The journal.
            rank: Rank of a kept image among those of its record, from 1.
            metadata: Further text chunks.
        """
        from cogview.image_io.png import save_png

        facts: dict[str, Any] = {
            "task": record.task,
            "prompt": record.prompt,
            "index": result.index,
            "seed": result.seed,
        }
        if record.image is not None:
            facts["image"] = str(record.image)
        if path is None:
            assert record.image is not None
            facts["text"] = result.text
            self._observer.captioned(result, record.image, name)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            if name in journal.outcomes.lost and path.is_file() and not path.stat().st_size:
                path.unlink()  # what a power cut has left
            ranked = {} if rank is None else {"rank": str(rank)}
            texts = self.model.file_metadata(result) | result_metadata(record) | ranked | dict(metadata or {})
            path = save_png(path, result, texts)
            score = None if result.score is None else result.score.log_probability
            self._observer.saved(path, score, {"id": name, **facts, "rank": rank})
            facts["path"] = path.relative_to(self.plan.settings.output).as_posix()
            if score is not None:
                facts |= {"score": score, "ranked_by": result.score.ranked_by, "rank": rank}
        journal.record(name, **facts, log_probability=result.log_probability)
