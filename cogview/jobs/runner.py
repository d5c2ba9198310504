"""Generate the results of a job and record each finished one in the journal."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cogview.errors import InputError
from cogview.jobs.journal import JobJournal
from cogview.jobs.locks import JobLocks, run_chunks
from cogview.jobs.plan import JobPlan, WorkItem
from cogview.jobs.records import JobRecord

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

    from cogview.pipeline.requests import GenerationRequest
    from cogview.pipeline.results import Caption, GeneratedImage, GenerationProgress


MAX_PROMPT_NOTES = 20  # prompts of a run that are noted


class JobObserver:
    """Receiver of the events of a job; each method does nothing by default."""

    def skipped(self, reason: str) -> None:
        """A record cannot be used."""

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

    def saved(self, path: Path, score: float | None) -> None:
        """An image was saved.

        Args:
            path: Its file.
            score: Log-probability of its prompt as its caption, in nats, of a ranked image; else None.
        """

    def captioned(self, caption: Caption, image: Path) -> None:
        """A caption of an image file was generated.

        Args:
            caption: The caption.
            image: The image file.
        """


@dataclass(frozen=True, kw_only=True)
class JobReport:
    """The state of a job after ``JobRunner.run``."""

    count: int  # results of the whole job
    missing: int  # of them not in the journal when the run started
    left: int  # of them not in the journal now
    skipped: int  # records that could not be used


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
        self._unread: dict[JobRecord, str] = {}  # reasons of the records whose images cannot be read
        self._noted: set[Path] = set()
        self._noted_prompts: set[str] = set()

    def run(self, journal: JobJournal, locks: JobLocks, stop: Callable[[], bool] = lambda: False) -> JobReport:
        """Generate the results that are not in the journal.

        Args:
            journal: The journal of the plan.
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
        return JobReport(
            count=sum(map(len, names)),
            missing=len(missing),
            left=sum(name not in journal.done for chunk in names for name in chunk),
            skipped=len(self.plan.problems) + len(self._unread),
        )

    def save_sheet(self, journal: JobJournal) -> Path | None:
        """Lay the saved images of the job on a contact sheet; return its path, None without images."""
        from cogview.image_io.captioned_sheet import captioned_sheet, group_images, legend
        from cogview.image_io.png import SAMPLING_KEYS, read_metadata, save_png, sheet_metadata
        from cogview.image_io.reading import read_image

        names = [name for item in self.plan.items() if item.resolved.is_ranked_task for name in item.ids]
        paths = [self.plan.settings.output / journal.done[name]["path"] for name in names if name in journal.done]
        if not paths:
            return None
        settings, parts = self.plan.settings, [read_metadata(path) for path in paths]
        groups = group_images((part["prompt"] for part in parts), map(read_image, paths))
        sheet = captioned_sheet(groups, self._observer.noted)
        texts = sheet_metadata(parts, task="job", source=Path(settings.source).name, n=str(settings.n))
        if settings.keep is not None:
            texts["keep"] = str(settings.keep)
        for key in SAMPLING_KEYS:  # of the first image; records have their own, which the job file holds
            texts.pop(key, None)
        texts |= {"captions": legend(groups), "seed": str(self.plan.seed)} | {
            key: str(value) for key, value in settings.sampling.items()
        }
        return save_png(settings.output / f"grid-seed{self.plan.seed}.png", sheet, texts)

    def _read(self, record: JobRecord) -> Image.Image | None:
        """Read the image of a record; None if it cannot be read."""
        from cogview.image_io.reading import read_image

        assert record.image is not None
        if record in self._unread:
            return None
        notes: list[str] = []
        task = record.row.weights
        try:
            image = read_image(record.image, notes.append)
            if (problem := self.model.enlargement_problem(image, task=task)) is not None:
                raise InputError(f"image {record.image}: {problem}")
            image, note = self.model.fit_image(image, task=task)
        except InputError as error:
            self._unread[record] = str(error)
            self._observer.skipped(f"line {record.number}: {error}")
            return None
        if record.image not in self._noted:
            self._noted.add(record.image)
            for line in (*notes, note, self.model.image_warning(image, task=task)):
                if line is not None:
                    self._observer.noted(f"{record.image}: {line}")
        return image

    def _note_prompts(self, prompts: Iterable[str | None]) -> None:
        """Report what is converted or not understood in prompts, each once and ``MAX_PROMPT_NOTES`` in all."""
        for prompt in prompts:
            if not prompt or prompt in self._noted_prompts or len(self._noted_prompts) > MAX_PROMPT_NOTES:
                continue
            if (warning := self.model.prompt_warning(prompt)) is not None:
                full = len(self._noted_prompts) == MAX_PROMPT_NOTES
                self._observer.noted("further notes on prompts are left out" if full else warning)
                self._noted_prompts.add(prompt)

    def _encode(self, images: Mapping[JobRecord, Image.Image]) -> dict[JobRecord, np.ndarray]:
        """Return the codes of images, those of one size together."""
        codes: dict[JobRecord, np.ndarray] = {}
        for size in dict.fromkeys(image.size for image in images.values()):
            records = [record for record, image in images.items() if image.size == size]
            task = records[0].row.weights
            encoded = self.model.encode_images([images[record] for record in records], task=task)
            codes |= zip(records, encoded, strict=True)
        return codes

    def _run_chunk(self, chunk: Sequence[WorkItem], missing: set[str], journal: JobJournal) -> None:
        """Generate a whole chunk, so that batches are always the same, and save the results in ``missing``."""
        from cogview.image_io.png import preview_path, ranked_path

        with_image = dict.fromkeys(item.record for item in chunk if item.record.image is not None)
        images = {record: image for record in with_image if (image := self._read(record)) is not None}
        chunk = [item for item in chunk if item.record in images or item.record not in with_image]
        if not any(name in missing for item in chunk for name in item.names):
            return
        self._note_prompts(item.record.prompt for item in chunk if not missing.isdisjoint(item.names))
        given = self._encode(images)
        requests = {
            item: [
                replace(request, codes=given[item.record][: item.record.rows]) if item.record in given else request
                for request in item.requests
            ]
            for item in chunk
        }
        self._observer.batch(
            {
                request: path
                for item, group in requests.items()
                if item.resolved.is_ranked_task
                for request, path in zip(group, item.paths, strict=True)
            }
        )
        batch_size = min(journal.header["batch"], self.plan.settings.max_batch_size or journal.header["batch"])
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
                generated = self.model.rerank(generated, batch_size=batch_size)[: len(item.ids)]
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
                record = replace(each.item.record, task="upscale", image=source, rows=None)
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
            self._observer.captioned(result, record.image)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            ranked = {} if rank is None else {"rank": str(rank)}
            texts = self.model.file_metadata(result) | _metadata(record) | ranked | dict(metadata or {})
            path = save_png(path, result, texts)
            score = None if result.score is None else result.score.log_probability
            self._observer.saved(path, score)
            facts["path"] = path.relative_to(self.plan.settings.output).as_posix()
            if score is not None:
                facts |= {"score": score, "rank": rank}
        journal.record(name, **facts, log_probability=result.log_probability)


def _metadata(record: JobRecord) -> dict[str, str]:
    """Return the text chunks that the commands of the tasks add to those of every image."""
    if record.image is None:
        return {}
    metadata = {"task": record.task, "source": record.image.name}
    return metadata if record.rows is None else metadata | {"rows": str(record.rows)}
