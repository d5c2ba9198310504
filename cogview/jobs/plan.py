"""The plan of a job: its records, resolved against a model, as work items with file names, in chunks.

Everything here follows from the job file, the settings and the model alone. So every process of a job, before and after
an interruption, divides the work in the same way and generates each result in the same batch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cogview.checkpoints.fingerprint import fingerprint
from cogview.config_io import to_mapping
from cogview.errors import InputError
from cogview.image_io.masks import is_box
from cogview.jobs.journal import JobJournal
from cogview.jobs.locks import JobLocks
from cogview.jobs.records import JobProblem, JobRecord, digest
from cogview.jobs.result_files import result_problem, result_stem, unused_name
from cogview.pipeline.ranking_rules import DEFAULT_RULE
from cogview.tables import name_of
from cogview.tokenizers.tasks import TASKS

if TYPE_CHECKING:
    import numpy as np

    from cogview.modeling.config import Sampling
    from cogview.pipeline.cogview import CogView
    from cogview.pipeline.requests import GenerationRequest


TEXT_SETTINGS = ("guidance", "text_attention")  # of a job, which tasks without a text do not take
SCORED_AT_A_TIME = 64  # images of a job that only ranks, where no batch size limits them


@dataclass(frozen=True, kw_only=True)
class JobSettings:
    """Settings of a job beyond those of its records.

    Attributes:
        source: The job file.
        output: Folder of the results.
        n: Images per record that sets no n.
        keep: Number of the best images to keep; None keeps all.
        rank_by: Score of ``keep`` for records that set none.
        upscale: Whether each image is also written at twice its side.
        sampling: Values of ``Sampling`` by name, for records that do not set them.
        seed: Seed of records that set none; None chooses one.
        max_batch_size: Maximum number of requests in a batch; None for as many as fit into memory.
        kv_dtype: Format of the KV cache that the model was loaded with.
    """

    source: str
    output: Path
    n: int = 1
    keep: int | None = None
    rank_by: str = DEFAULT_RULE
    upscale: bool = False
    sampling: Mapping[str, Any] = field(default_factory=dict)
    seed: int | None = None
    max_batch_size: int | None = None
    kv_dtype: str = "auto"


@dataclass(frozen=True, kw_only=True)
class ResolvedRecord:
    """A record that the model can do, with its number of results and its sampling settings."""

    record: JobRecord
    n: int
    sampling: Sampling
    upscale_sampling: Sampling | None = None  # None: the images are not upscaled

    @property
    def is_on_sheet(self) -> bool:
        """Whether the images of the task are laid on a contact sheet."""
        return self.record.row.output == "image" and not self.record.row.windowed

    @property
    def is_ranked_task(self) -> bool:
        """Whether the images of the task are ranked and upscaled, both by a prompt that describes them."""
        return self.is_on_sheet and self.record.row.is_described


@dataclass(frozen=True, kw_only=True, eq=False)
class WorkItem:
    """Results that are made together: the best ``ids`` of ``requests``, whose images are not read yet; or a ranking."""

    resolved: ResolvedRecord
    requests: Sequence[GenerationRequest]  # none for a ranking
    paths: Sequence[Path]  # of the images of ``requests``; none for captions
    ids: Sequence[str]
    upscaled: Sequence[str]  # ids of the upscaled images: one for each of ``ids``, or none

    @property
    def record(self) -> JobRecord:
        """The record that asks for the results."""
        return self.resolved.record

    @property
    def names(self) -> list[str]:
        """The ids of all results."""
        return [*self.ids, *self.upscaled]

    @property
    def given_images(self) -> Sequence[Path]:
        """Paths of the images that its record gives."""
        return self.record.images or ([] if self.record.image is None else [self.record.image])

    @property
    def given_files(self) -> list[Path]:
        """Paths of these images, and of the file of the mask."""
        mask = self.record.mask
        return [*self.given_images, *([] if mask is None or is_box(mask) else [Path(mask)])]

    @property
    def size(self) -> int:
        """Number of sequences: requests, or images to score."""
        return len(self.requests) or len(self.given_images)


class JobPlan:
    """The work of a job.

    Attributes:
        model: The model that does the job.
        settings: The settings of the job.
        grid: Number of codes on a side of the model's images.
        seed: The seed of records without one; that of the journal once it is open.
        problems: Reasons of the records that cannot be used.
        resolved: The other records.
    """

    def __init__(
        self, model: CogView, settings: JobSettings, records: Sequence[JobRecord], problems: Sequence[JobProblem] = ()
    ) -> None:
        """Check the records against the model.

        Args:
            model: The model, trained for the tasks of the settings.
            settings: The settings of the job.
            records: The records of the job file.
            problems: Reasons of the lines that are not among the records.

        Raises:
            InputError: No record can be used, or a setting is wrong.
        """
        from cogview.pipeline.inputs import resolve_seed

        self.model = model
        self.settings = settings
        self.grid = model.config.grid
        self.seed = resolve_seed(settings.seed)
        self.problems = list(problems)
        self.resolved: list[ResolvedRecord] = []
        self._records = records
        tasks = [*(record.row.weights for record in records), *(["upscale"] if settings.upscale else [])]
        self._sampling = {
            task: model.sampling(**settings.sampling, task=task)
            for task in dict.fromkeys(tasks)
            if TASKS[task].output == "image" and task in model.config.tasks
        }
        for record in records:
            try:
                self.resolved.append(self._resolve(record))
            except ValueError as error:
                self.problems.append(JobProblem.of(record.number, str(error), record.id))
        if not self.resolved:
            raise InputError(
                f"{name_of(settings.source)} has no line that can be used; the first problem is in {self.problems[0]}"
            )

    def open_journal(self, path: Path, locks: JobLocks) -> JobJournal:
        """Create the journal of the job, or continue that of an equal job.

        The batch size and, where the settings give none, the seed are those of an existing journal.

        Args:
            path: The file.
            locks: The locks of the job.

        Returns:
            The open journal.

        Raises:
            InputError: The journal is that of another job, or its header is damaged.
        """
        from cogview.generation.sampling import MAX_SEED
        from cogview.pipeline.inputs import require_int

        inherit = ["batch"] + ["seed"] * (self.settings.seed is None)
        outputs = {name: item.record.row.output for item in self.items() for name in item.names}
        folder = path.parent.resolve()

        def problem_of(name: str, facts: Mapping[str, Any]) -> str | None:
            return result_problem(facts, outputs[name], folder) if name in outputs else None

        journal = JobJournal.open(
            path, self.header(), locks=locks, resume=True, inherit_keys=inherit, problem_of=problem_of
        )
        try:
            self.seed = require_int(journal.header["seed"], "the seed", 0, MAX_SEED)
            require_int(journal.header["batch"], "the batch", 1)
        except InputError as error:
            journal.close()
            raise InputError(f"the header of {path} is damaged: {error}; choose another output folder") from None
        return journal

    def header(self) -> dict[str, Any]:
        """Return the settings that must be equal when the job is resumed, and the planned batch size."""
        from cogview.checkpoints.adapter import Adapter
        from cogview.checkpoints.registry import resolve_checkpoint

        model, settings = self.model, self.settings
        folders = model.bundle.folders.values() if model.bundle else [model.folder or resolve_checkpoint(model.name)]
        prints = list(dict.fromkeys(map(fingerprint, folders)))
        scales = ("" if choice.scale == 1 else f"*{choice.scale!r}" for choice in model.adapters)
        prints += [Adapter(choice.name).sha256() + scale for choice, scale in zip(model.adapters, scales, strict=True)]
        requests = [request for item in self.items() for request in item.requests]
        return {
            "job": digest(self._records, settings.source),
            "model": model.name,
            "weights": " ".join(prints),
            "adapters": [str(choice) for choice in model.adapters],
            "dtype": model.placement.weight_format,
            "kv_dtype": settings.kv_dtype,
            "device": model.placement.device.type,
            "sampling": {task: to_mapping(sampling) for task, sampling in self._sampling.items()},
            "seed": self.seed,
            "n": settings.n,
            "keep": settings.keep,
            **({} if settings.keep is None else {"rank_by": settings.rank_by}),
            "upscale": settings.upscale,
            "batch": max(model.batch_sizes(requests, batch_size=settings.max_batch_size))
            if requests
            else settings.max_batch_size or SCORED_AT_A_TIME,
        }

    def items(self) -> list[WorkItem]:
        """Return all results of the job, in order.

        The given codes of the requests are placeholders. File names follow from the job alone. Equal records continue
        the numbers of their images, as a larger n does.
        """
        counts: Counter[tuple[Any, ...]] = Counter()
        taken: set[str] = set()
        items = []
        for resolved in self.resolved:
            record = resolved.record
            requests, stem = self._requests(resolved, counts), result_stem(record)
            paths = [
                self.settings.output / unused_name(stem, f"-seed{request.seed}-{request.index}.png", taken)
                for request in requests
                if record.row.output == "image"
            ]
            ids = [f"{record.key}/{number}" for number in range(resolved.n)]
            upscaled = [f"{name}/up" for name in ids if resolved.upscale_sampling]
            if self.is_ranked(resolved):
                keep = slice(self.settings.keep)
                items.append(
                    WorkItem(resolved=resolved, requests=requests, paths=paths, ids=ids[keep], upscaled=upscaled[keep])
                )
                continue
            for number in range(resolved.n):
                one = slice(number, number + 1)
                items.append(
                    WorkItem(
                        resolved=resolved,
                        requests=requests[one],
                        paths=paths[one],
                        ids=ids[one],
                        upscaled=upscaled[one],
                    )
                )
        return items

    def chunks(self, size: int) -> list[list[WorkItem]]:
        """Return the work items in chunks of at most ``size`` sequences; a larger item is a chunk of its own."""
        chunks: list[list[WorkItem]] = []
        free = 0
        for item in self.items():
            if not chunks or item.size > free:
                chunks.append([])
                free = size
            chunks[-1].append(item)
            free -= item.size
        return chunks

    def missing_codes(self, journal: JobJournal) -> dict[str, int]:
        """Return the number of tokens of each result that is to be made, by its id.

        Those are the results that are not in the journal and have not failed since it was opened.
        """
        self.seed = journal.header["seed"]
        return {
            name: self._num_codes(item)
            for item in self.items()
            for name in item.names
            if name not in journal.done and not journal.has_failed(name)
        }

    def _resolve(self, record: JobRecord) -> ResolvedRecord:
        """Check a record against the model; raise ValueError with the reason if it cannot be done."""
        from cogview.modeling.config import GREEDY, Sampling

        task = record.task
        self.model.require_task(task)
        if "prompt" in record.row.inputs and (problem := self.model.prompt_problem(record.prompt or "")) is not None:
            raise InputError(problem)
        self._check_ranking(record)
        if record.row.output == "ranking":
            return ResolvedRecord(record=record, n=1, sampling=GREEDY)
        if record.row.output == "text":
            if unused := [name for name in ("guidance", "text_attention", "noise_version") if name in record.sampling]:
                raise InputError(f"{' and '.join(unused)} cannot be set for captions")
            n = record.n or 1
            sampled = Sampling(**{"top_k": 0, **record.sampling})  # type: ignore[arg-type]  # top_k is an int
            return ResolvedRecord(record=record, n=n, sampling=sampled if record.sampling or n > 1 else GREEDY)
        if record.rows is not None and record.rows >= self.grid:
            raise InputError(f"the rows to keep must be from 0 to {self.grid - 1}, got {record.rows}")
        if record.mask is not None and is_box(record.mask):
            from cogview.pipeline.masks import load_mask

            load_mask(record.mask)  # a wrong box is no matter of the image
        shared = {
            name: value
            for name, value in self.settings.sampling.items()
            if "prompt" in record.row.inputs or name not in TEXT_SETTINGS
        }
        sampling = {**shared, **record.sampling}
        resolved_sampling = self.model.sampling(**sampling, task=task)
        resolved = ResolvedRecord(record=record, n=record.n or self.settings.n, sampling=resolved_sampling)
        if record.negative is not None:
            self.model.tokenize_negative(record.negative, resolved_sampling)
        if self.settings.upscale and resolved.is_ranked_task:
            return replace(resolved, upscale_sampling=self.model.sampling(**sampling, task="upscale"))
        return resolved

    def _requests(self, resolved: ResolvedRecord, counts: Counter[tuple[Any, ...]]) -> list[GenerationRequest]:
        """Return the requests of a record; ``counts`` has the number of images of equal records before it."""
        from cogview.pipeline.requests import GenerationRequest

        record = resolved.record
        if record.row.output == "ranking":
            return []
        seed = self.seed if record.seed is None else record.seed
        changes = (record.rows, record.mask, record.share)
        key = (record.task, record.prompt, record.negative, record.image, *changes, seed, resolved.sampling)
        first, counts[key] = counts[key], counts[key] + resolved.n
        codes = self._placeholder(record)
        return [
            GenerationRequest(
                prompt=record.prompt or "",
                negative=record.negative or "",
                seed=seed,
                index=index,
                task=record.task,
                codes=codes,
                strength=record.share,
                sampling=resolved.sampling,
            )
            for index in range(first, first + resolved.n)
        ]

    def _placeholder(self, record: JobRecord) -> np.ndarray | None:
        """Return zeros in the shape of the codes that a record gives."""
        import numpy as np

        if record.image is None:
            return None
        side = round(record.row.input_scale * self.grid)
        return np.zeros((side if record.rows is None else record.rows, side), dtype=np.int64)

    def _num_codes(self, item: WorkItem) -> int:
        """Return the number of codes, or the maximum number of pieces, that are decoded for one result of an item."""
        row = item.record.row
        if row.output == "text":
            return self.model.config.caption_positions
        if row.output == "ranking":
            return len(self.model.tokenize([item.record.prompt or ""])[0].ids) * item.size
        blanks = round(row.output_scale * self.grid) ** 2 - (item.record.rows or 0) * self.grid
        each = round(item.record.share * blanks)
        upscaled = (2 * self.grid) ** 2 * len(item.upscaled)
        return (each * len(item.requests) + upscaled) // len(item.names)

    def rule_of(self, record: JobRecord) -> str:
        """Return the name of the score by which the images of a record are ranked."""
        return record.rank_by or ("caption" if record.row.output == "ranking" else self.settings.rank_by)

    def _check_ranking(self, record: JobRecord) -> None:
        """Raise InputError if a record sets a score that is unknown, of no use, or beyond the model."""
        if record.rank_by is not None and record.row.output == "image" and not record.row.is_described:
            raise InputError(f"rank_by {record.rank_by} needs a prompt that describes the images of {record.task}")
        if self.settings.keep is not None or record.row.output == "ranking":
            self.model.require_ranking(self.rule_of(record))
        elif record.rank_by is not None:
            raise InputError(f"rank_by {record.rank_by} chooses among images: rank them by rerank, or add --keep COUNT")

    def is_ranked(self, resolved: ResolvedRecord) -> bool:
        """Return whether only the best images of a record are kept."""
        return self.settings.keep is not None and resolved.is_ranked_task
