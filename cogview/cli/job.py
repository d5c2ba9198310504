"""``cogview generate --input``: makes what the lines of a file ask for, and keeps a ledger of what is made."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cogview.cli.caption import caption_line
from cogview.cli.inputs import ImageReader
from cogview.cli.options import SAMPLING
from cogview.cli.progress import ProgressBar
from cogview.cli.session import GenerationSession, open_session
from cogview.errors import InputError
from cogview.jobs.journal import JobJournal, fingerprint, refuse_existing
from cogview.jobs.locks import JobLocks, rank_and_world_size, run_chunks
from cogview.jobs.records import JobRecord, digest, name_of, read_job
from cogview.signals import GracefulStop

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

    from cogview.modeling.config import Sampling
    from cogview.pipeline.requests import GenerationRequest
    from cogview.pipeline.results import GeneratedImage

MOST_ON_SHEET = 1000  # pictures
STOPPING = "finishing this batch; press Ctrl-C again to stop at once"
MOST_NOTES = 100  # prompts that are looked at for what a model may not know
IMAGE_TASKS = ("generate", "complete")  # tasks whose pictures are ranked, upscaled and laid on a sheet


@dataclass(frozen=True, kw_only=True)
class ResolvedRecord:
    """A line that can be done: how many results, and how to draw them and their enlargements."""

    record: JobRecord
    n: int
    sampling: Sampling
    upscale_sampling: Sampling | None = None  # None: they are not enlarged


@dataclass(frozen=True, kw_only=True, eq=False)
class WorkItem:
    """Results that are made together: of ``wishes``, whose images are still to be read, the best ``ids``."""

    resolved: ResolvedRecord
    requests: Sequence[GenerationRequest]
    paths: Sequence[Path]  # of the pictures of ``wishes``; a caption has none
    ids: Sequence[str]
    upscaled: Sequence[str]  # ids of the enlargements, one for each of ``ids``, or none

    @property
    def names(self) -> list[str]:
        """The ids of all its results."""
        return [*self.ids, *self.upscaled]


def run_job(args: argparse.Namespace) -> int:
    """Do all lines that can be done; status 2 if there was one that cannot, 130 if the job was interrupted."""
    from cogview.device import use_local_rank_gpu
    from cogview.image_io.png import prepare_folder

    lines, problems = read_job(args.input)
    pictures = sum(line.n or args.n for line in lines if line.task in IMAGE_TASKS)
    if args.grid and pictures > MOST_ON_SHEET:
        raise InputError(f"--grid makes one sheet of at most {MOST_ON_SHEET} pictures, got {pictures}: leave it out")
    prepare_folder(args.output)
    name = "stdin" if args.input == "-" else Path(args.input).stem
    path = args.output / f"{name}.ledger.jsonl"
    claims = JobLocks(path)
    try:
        if not args.resume:
            refuse_existing(path, claims)
        use_local_rank_gpu()
        easel = open_session(args, ["caption"] * (args.keep is not None) + ["upscale"] * args.upscale)
        job = JobRunner(easel, args, lines, problems)
        header = {"job": digest(lines, args.input), **job.header()}
        # What was made since the look above, other processes have made that began beside this one.
        adopt = ["batch"] + ["seed"] * (args.seed is None)
        ledger = JobJournal.open(path, header, locks=claims, resume=True, inherit_keys=adopt)
        try:
            return job.run(ledger, claims)
        finally:
            ledger.close()
    finally:
        claims.close()


class JobRunner:
    """The lines of a file, and the model that does them."""

    def __init__(
        self, easel: GenerationSession, args: argparse.Namespace, lines: Sequence[JobRecord], problems: Sequence[str]
    ) -> None:
        self.easel = easel
        self.model = easel.model
        self.args = args
        self.first = rank_and_world_size()[0] == 0  # of several processes, that which tells what concerns all
        self.images = ImageReader()
        self.unread: set[JobRecord] = set()  # lines whose images cannot be read
        self.problems = list(problems)
        self.asked: list[ResolvedRecord] = []
        self.sampling = {
            task: self.model.sampling(**easel.settings, task=task)
            for task in dict.fromkeys([*map(_weights_of, lines), *easel.sampling])
            if task != "caption" and task in self.model.config.tasks
        }
        for line in lines:
            try:
                self.asked.append(self._resolve(line))
            except ValueError as error:
                self.problems.append(f"line {line.number}: {error}")
        if not self.asked:
            raise InputError(
                f"{name_of(args.input)} has no line that can be used; the first problem is in {self.problems[0]}"
            )

    def header(self) -> dict[str, Any]:
        """What must be the same when the job goes on; how much is done at a time is planned here."""
        from cogview.checkpoints.adapter import Adapter
        from cogview.checkpoints.registry import resolve_checkpoint

        easel, model = self.easel, self.model
        folders = model.bundle.folders.values() if model.bundle else [model.folder or resolve_checkpoint(model.name)]
        prints = [fingerprint(folder) for folder in folders]
        if model.adapter is not None:
            prints.append(Adapter(model.adapter).sha256())
        wishes = [wish for group in self.groups(easel.seed) for wish in group.requests]
        return {
            "model": model.name,
            "weights": " ".join(dict.fromkeys(prints)),
            "dtype": model.placement.weight_format,
            "kv_dtype": self.args.kv_dtype,
            "device": model.placement.device.type,
            "sampling": {task: asdict(sampling) for task, sampling in self.sampling.items()},
            "seed": easel.seed,
            "n": self.args.n,
            "keep": self.args.keep,
            "upscale": self.args.upscale,
            "batch": max(model.batch_sizes(wishes, batch_size=easel.ceiling)),
        }

    def groups(self, seed: int) -> list[WorkItem]:
        """Every result of the job, in order. The images of wishes are blank; names of files follow from the job alone.

        The same line twice goes on counting, as a larger n does.
        """
        from cogview.pipeline.requests import GenerationRequest

        counts: Counter[tuple[Any, ...]] = Counter()
        taken: set[str] = set()
        groups = []
        for asked in self.asked:
            line = asked.record
            own = seed if line.seed is None else line.seed
            same = (line.task, line.prompt, line.image, line.rows, own, asked.sampling)
            first, counts[same] = counts[same], counts[same] + asked.n
            task, codes = _weights_of(line), self._placeholder(line)
            wishes = [
                GenerationRequest(
                    prompt=line.prompt or "", seed=own, index=index, task=task, codes=codes, sampling=asked.sampling
                )
                for index in range(first, first + asked.n)
            ]
            paths = [
                self.args.output / _unused(_stem(line), f"-seed{own}-{wish.index}.png", taken)
                for wish in wishes
                if task != "caption"
            ]
            ids = [f"{line.key}/{number}" for number in range(asked.n)]
            enlarged = [f"{name}/up" for name in ids if asked.upscale_sampling]
            if self._is_ranked(line):
                keep = slice(self.args.keep)
                groups.append(
                    WorkItem(resolved=asked, requests=wishes, paths=paths, ids=ids[keep], upscaled=enlarged[keep])
                )
                continue
            for one in (slice(number, number + 1) for number in range(asked.n)):
                groups.append(
                    WorkItem(
                        resolved=asked, requests=wishes[one], paths=paths[one], ids=ids[one], upscaled=enlarged[one]
                    )
                )
        return groups

    def run(self, ledger: JobJournal, claims: JobLocks) -> int:
        """Make what is not in the ledger."""
        easel = self.easel
        easel.seed = ledger.header["seed"]
        groups = self.groups(easel.seed)
        chunks = _split_chunks(groups, ledger.header["batch"])
        if self.first:
            easel.print_header()
            for problem in self.problems:
                print(f"skipped: {problem}", file=sys.stderr)
            prompts = dict.fromkeys(asked.record.prompt for asked in self.asked if asked.record.task != "caption")
            for prompt in islice(prompts, MOST_NOTES):
                easel.check_prompt(prompt or "")
        missing = {name: self._codes(group) for group in groups for name in group.names if name not in ledger.done}
        with (
            GracefulStop(STOPPING if self.first else None) as stop,
            easel.bar("making", len(missing), sum(missing.values()), noun="result") as bar,
        ):

            def work(number: int, names: Sequence[str]) -> None:
                self._make(chunks[number], set(names), ledger, bar)
                there = [codes for name, codes in missing.items() if name in ledger.done]
                bar.set_progress(len(there), sum(there))

            names = [[name for group in chunk for name in group.names] for chunk in chunks]
            run_chunks(names, ledger, claims, work, stop.requested)
        count = sum(map(len, names))
        left = count - sum(name in ledger.done for chunk in names for name in chunk)
        if stop.requested() and left:
            if self.first:
                print(f"stopped: {left} of {count} results are left; --resume goes on", file=sys.stderr)
            return 130
        if self.first and not missing:
            print(f"{count} of {count} results were there already", file=sys.stderr)
        if self.first and self.args.grid:
            self._save_sheet(
                [name for group in groups if group.resolved.record.task in IMAGE_TASKS for name in group.ids], ledger
            )
        return 2 if self.problems or self.unread else 0

    def _resolve(self, line: JobRecord) -> ResolvedRecord:
        """ValueError says why a line cannot be done."""
        from cogview.modeling.config import GREEDY, Sampling

        task = _weights_of(line)
        self.model.require_task(task)
        settings = {name: value for name in SAMPLING if (value := getattr(line, name)) is not None}
        if task == "caption":
            if unused := [name for name in ("guidance", "text_attention") if name in settings]:
                raise InputError(f"{' and '.join(unused)} cannot be set for captions")
            n = line.n or 1
            drawn = Sampling(**{"top_k": 0, **settings})
            return ResolvedRecord(record=line, n=n, sampling=drawn if settings or n > 1 else GREEDY)
        assert line.prompt is not None
        if (problem := self.model.prompt_problem(line.prompt)) is not None:
            raise InputError(problem)
        if line.rows is not None and line.rows >= self.easel.grid:
            raise InputError(f"the rows to keep must be from 0 to {self.easel.grid - 1}, got {line.rows}")
        settings = {**self.easel.settings, **settings}
        enlarged = self.args.upscale and line.task in IMAGE_TASKS
        return ResolvedRecord(
            record=line,
            n=line.n or self.args.n,
            sampling=self.model.sampling(**settings, task=task),
            upscale_sampling=self.model.sampling(**settings, task="upscale") if enlarged else None,
        )

    def _placeholder(self, line: JobRecord) -> np.ndarray | None:
        """In place of the codes that are given, as many."""
        import numpy as np

        grid = self.easel.grid
        return (
            None if line.image is None else np.zeros((grid if line.rows is None else line.rows, grid), dtype=np.int64)
        )

    def _read(self, line: JobRecord) -> Image.Image | None:
        """The image of a line; None, and a word on stderr, if it cannot be read."""
        from tqdm import tqdm

        from cogview.vqvae.model import PIXELS_PER_CODE

        assert line.image is not None
        image = self.images.read(line.image, PIXELS_PER_CODE * self.easel.grid)
        if image is None and self.first and line not in self.unread:
            tqdm.write(f"skipped: line {line.number}: {self.images.problems[line.image]}", file=sys.stderr)
        if image is None:
            self.unread.add(line)
        return image

    def _make(self, chunk: Sequence[WorkItem], missing: set[str], ledger: JobJournal, bar: ProgressBar) -> None:
        """Make all of a chunk, so that batches are ever the same, and write what is ``missing``."""
        asking = dict.fromkeys(group.resolved.record for group in chunk if group.resolved.record.image is not None)
        images = {line: image for line in asking if (image := self._read(line)) is not None}
        chunk = [group for group in chunk if group.resolved.record in images or group.resolved.record not in asking]
        if not any(name in missing for group in chunk for name in group.names):
            return
        given = dict(zip(images, self.model.encode_images(list(images.values())), strict=True)) if images else {}
        wishes = {
            group: [
                replace(wish, codes=given[line][: line.rows]) if (line := group.resolved.record) in given else wish
                for wish in group.requests
            ]
            for group in chunk
        }
        bar.expect(
            {
                wish: path
                for group, own in wishes.items()
                if group.resolved.record.task in IMAGE_TASKS
                for wish, path in zip(own, group.paths, strict=True)
            }
        )
        ceiling = min(ledger.header["batch"], self.easel.ceiling or ledger.header["batch"])
        made = self.model.run([wish for own in wishes.values() for wish in own], batch_size=ceiling, callback=bar.watch)
        small: list[tuple[WorkItem, str, GeneratedImage, Path]] = []  # to be enlarged, and where it lies
        for group, own in wishes.items():
            results: list[Any] = list(islice(made, len(own)))
            if self._is_ranked(group.resolved.record):
                results = self.model.rerank(results, batch_size=ceiling)
            paths = dict(zip((wish.index for wish in own), group.paths, strict=False))
            for number, (name, result) in enumerate(zip(group.ids, results, strict=False)):  # the best of them
                if name in missing:
                    self._write(name, group.resolved.record, result, paths.get(result.index), ledger)
                if group.upscaled:
                    small.append((group, group.upscaled[number], result, self.args.output / ledger.done[name]["path"]))
            for wish in own:
                bar.finished(wish)
        if small:
            self._upscale(small, missing, ledger, ceiling, bar)

    def _upscale(
        self,
        small: Sequence[tuple[WorkItem, str, GeneratedImage, Path]],
        missing: set[str],
        ledger: JobJournal,
        ceiling: int,
        bar: ProgressBar,
    ) -> None:
        """Upscale pictures of a chunk."""
        from cogview.pipeline.requests import GenerationRequest

        wishes = [
            GenerationRequest(
                prompt=picture.prompt,
                seed=picture.seed,
                index=picture.index,
                task="upscale",
                codes=picture.codes,
                sampling=group.resolved.upscale_sampling,
            )
            for group, _, picture, _ in small
        ]
        made = self.model.run(wishes, batch_size=ceiling, callback=bar.watch)
        for (group, name, _, path), large in zip(small, made, strict=True):
            if name in missing:
                source = path.relative_to(self.args.output)
                line = replace(group.resolved.record, task="upscale", image=source, rows=None)
                self._write(name, line, large, path.with_name(f"{path.stem}-up.png"), ledger)

    def _write(self, name: str, line: JobRecord, result: Any, path: Path | None, ledger: JobJournal) -> None:
        """Write a result, then record it."""
        from tqdm import tqdm

        from cogview.image_io.png import preview_path

        facts: dict[str, Any] = {"task": line.task, "prompt": line.prompt, "index": result.index, "seed": result.seed}
        if line.image is not None:
            facts["image"] = str(line.image)
        if path is None:
            facts["text"] = result.text
            tqdm.write(caption_line(result, file=str(line.image)), file=sys.stdout)
        else:
            facts["path"] = self.easel.save(path, result, **_about(line)).relative_to(self.args.output).as_posix()
            preview_path(path).unlink(missing_ok=True)  # of a process that was killed
            if result.score is not None:
                facts["score"] = result.score.log_probability
        ledger.record(name, **facts, log_probability=result.log_probability)

    def _save_sheet(self, names: Sequence[str], ledger: JobJournal) -> None:
        """Lay the pictures of the job, as their files are, on one sheet."""
        import numpy as np
        from PIL import Image

        from cogview.image_io.contact_sheet import contact_sheet
        from cogview.image_io.png import read_metadata, save_png, sheet_metadata

        paths = [self.args.output / ledger.done[name]["path"] for name in names if name in ledger.done]
        if paths:
            pictures = []
            for path in paths:
                with Image.open(path) as picture:
                    pictures.append(np.asarray(picture))
            sheet = contact_sheet(pictures, columns=self.args.keep or self.args.n)
            texts = sheet_metadata([read_metadata(path) for path in paths])
            print(save_png(self.args.output / f"grid-seed{self.easel.seed}.png", sheet, texts))

    def _codes(self, group: WorkItem) -> int:
        """How many codes, or pieces at most, are drawn for one result of a group."""
        line, grid = group.resolved.record, self.easel.grid
        if line.task == "caption":
            return self.model.config.caption_positions
        each = (2 * grid) ** 2 if line.task == "upscale" else (grid - (line.rows or 0)) * grid
        enlarged = (2 * grid) ** 2 * len(group.upscaled)
        return (each * len(group.requests) + enlarged) // len(group.names)

    def _is_ranked(self, line: JobRecord) -> bool:
        return self.args.keep is not None and line.task in IMAGE_TASKS


def _weights_of(line: JobRecord) -> str:
    """The task of the model that does a line."""
    return "generate" if line.task == "complete" else line.task


def _stem(line: JobRecord) -> str:
    """What the names of the pictures of a line begin with."""
    from cogview.image_io.png import safe_name

    if line.id is not None:
        return safe_name(line.id)
    if line.image is None:
        return safe_name(line.prompt or "")
    return f"{safe_name(line.image.stem)}-{'up' if line.rows is None else f'rows{line.rows}'}"


def _unused(stem: str, ending: str, taken: set[str]) -> str:
    """A name that is not ``taken``, which it is from now on; some systems do not tell A from a."""
    name, number = f"{stem}{ending}", 1
    while name.casefold() in taken:
        number += 1
        name = f"{stem}_{number}{ending}"
    taken.add(name.casefold())
    return name


def _about(line: JobRecord) -> dict[str, str]:
    """What the text chunks of a picture say beside the usual, as the commands of the tasks have it."""
    if line.image is None:
        return {}
    about = {"task": line.task, "source": line.image.name}
    return about if line.rows is None else about | {"rows": str(line.rows)}


def _split_chunks(groups: Sequence[WorkItem], size: int) -> list[list[WorkItem]]:
    """Groups in parts of at most ``size`` wishes; one that is larger is a part of its own."""
    parts: list[list[WorkItem]] = []
    room = 0
    for group in groups:
        if not parts or len(group.requests) > room:
            parts.append([])
            room = size
        parts[-1].append(group)
        room -= len(group.requests)
    return parts
