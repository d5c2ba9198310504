"""``cogview generate``: generate images from text."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import click

from cogview.cli.messages import is_json, print_note
from cogview.cli.options import (
    Command,
    SessionOptions,
    argument,
    count_option,
    option_group,
    output_option,
    session_options,
)
from cogview.cli.ranking_options import rank_by_option
from cogview.cli.session import GenerationSession, ImageOutput, UpscaleInput
from cogview.cli.text_io import prompt_lines
from cogview.errors import ExitStatus, InputError
from cogview.pipeline.ranking_rules import DEFAULT_RULE, ranking_rule


@dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    """How many images a prompt gets, and which files are written."""

    n: int
    keep: int | None  # the best of the n; None: all
    rank_by: str | None  # score of ``keep``; None: the default
    upscale: bool
    grid: bool
    output: Path
    negative: str | None = None  # what guidance leads away from

    @property
    def num_written(self) -> int:
        """Images of each prompt that are written."""
        return self.keep or self.n

    def sheet_metadata(self, prompts: Sequence[str]) -> dict[str, str]:
        """Return text chunks of a contact sheet: what the chunk ``prompt`` does not say of its command."""
        facts = {"n": str(self.n)} | ({} if self.keep is None else {"keep": str(self.keep), "rank_by": self.rule})
        if "\n".join(dict.fromkeys(prompts)).split("\n") != list(prompts):
            facts["prompts"] = json.dumps(list(prompts), ensure_ascii=False)
        return facts

    @property
    def tasks(self) -> list[str]:
        """The tasks that the model must have been trained for, beyond those of a job's lines."""
        return [*(ranking_rule(self.rule).tasks if self.keep is not None else ()), *["upscale"] * self.upscale]

    @property
    def rule(self) -> str:
        """Name of the score of ``keep``."""
        return self.rank_by or DEFAULT_RULE


@click.command(cls=Command)
@argument("prompts", nargs=-1, metavar="PROMPT", help="text to generate images from, such as 蓝色背景上的三只狐狸")
@click.option(
    "--input",
    "source",
    metavar="FILE",
    help="run the lines of a file as a job: .txt, or - for standard input, holds a prompt per line; .csv, .tsv and "
    ".jsonl may also set id, task (generate, complete, edit, fill, vary, upscale, caption, rerank), image, images, "
    "rows, mask, strength, keep, n, rank_by, seed, temperature, top_k, top_p, min_p, guidance, text_attention and "
    "noise_version",
)
@click.option("--resume", is_flag=True, help="resume the job of --input")
@option_group(
    GenerateOptions,
    "options",
    ("n", "keep", "rank_by", "upscale", "grid", "output", "negative"),
    count_option("images per prompt"),
    click.option(
        "--negative",
        metavar="TEXT",
        help="text that guidance leads away from, for all prompts; it needs --guidance, such as 2",
    ),
    click.option(
        "--keep",
        type=click.IntRange(min=1),
        metavar="COUNT",
        show_default="all",
        help="write only the COUNT best images per prompt by the score of --rank-by, which is printed after the path "
        "and a tab",
    ),
    rank_by_option(default=None, show_default=DEFAULT_RULE),
    click.option("--upscale", is_flag=True, help="also write each image at twice its side, as NAME-up.png"),
    click.option("--grid", is_flag=True, help="also write a contact sheet with the images of each prompt above it"),
    output_option(),
)
@click.option("--preview", is_flag=True, help="show unfinished images in files NAME.preview.png")
@session_options("images", "prompt and number of the image")
def command(
    prompts: tuple[str, ...],
    source: str | None,
    resume: bool,
    preview: bool,
    options: GenerateOptions,
    session: SessionOptions,
) -> int:
    """Generate images from text and print the paths of their PNG files.

    Without PROMPT, the command asks for prompts on a terminal. A file is named PROMPT-seedSEED-NUMBER.png, continued
    with _2, _3, … where another image has the name. Its text chunks hold the prompt, seed, number, model, settings and
    codes. A repeated prompt gets additional images.

    With --input, the lines of a file are generated together. OUTPUT/FILE.ledger.jsonl records each result and each
    failure, so that --resume continues after an interruption and tries again what failed. The same command started
    several times, or by torchrun, shares the work.
    """
    from cogview.image_io.captioned_sheet import require_sheet_fits
    from cogview.image_io.png import prepared_folder

    if options.keep is not None and options.keep > options.n:
        raise InputError(f"--keep must be from 1 to {options.n}, the images per prompt (-n), got {options.keep}")
    if options.rank_by is not None and options.keep is None and source is None:
        raise InputError(f"--rank-by {options.rank_by} chooses among images: add --keep COUNT")
    if options.negative is not None and source is not None:
        raise InputError("--negative goes with PROMPT, not with the lines of --input")
    if options.grid:
        require_sheet_fits(max(1, len(prompts)) * options.num_written)
    session = replace(session, preview=preview)
    if source is not None:
        from cogview.cli.generate_job import run_job

        if prompts:
            raise InputError("--input holds the prompts: give either --input or PROMPT…")
        return run_job(source, resume=resume, options=options, session=session)
    if resume:
        raise InputError("--resume continues a job: give its file by --input FILE")
    if not prompts and (is_json() or not sys.stdin.isatty()):
        raise InputError('no prompt was given; write it after the command: cogview generate "一个红苹果"')
    with prepared_folder(options.output):
        opened = GenerationSession.open(session, ["generate", *options.tasks])
    if options.keep is not None:
        opened.model.require_ranking(options.rule)
    if options.negative is not None:
        opened.model.tokenize_negative(options.negative, opened.sampling["generate"])
    opened.print_header()
    if prompts:
        return generate_images(opened, prompts, options)
    for prompt in prompt_lines("What shall I generate? (an empty line ends)"):
        generate_images(opened, [prompt], options)
    return 0


def generate_images(session: GenerationSession, prompts: Sequence[str], options: GenerateOptions) -> int:
    """Generate and save the images of each prompt that the model can use.

    Returns:
        The exit status: 1 if a prompt was skipped, 2 if all were, else 0.
    """
    from cogview.image_io.captioned_sheet import captioned_sheet, group_images, legend
    from cogview.image_io.png import safe_name
    from cogview.pipeline.results import repetition_notes

    good = [prompt for prompt in prompts if session.check_prompt(prompt)]
    outputs = [
        ImageOutput(
            request=request, path=options.output / f"{safe_name(prompt)}-seed{request.seed}-{request.index}.png"
        )
        for prompt in good
        for request in session.requests(prompt, options.n, negative=options.negative)
    ]
    generated = session.generate([outputs], "generating", len(outputs), session.grid**2)
    if options.keep is not None:
        generated = session.best(generated, options.n, options.keep, by=options.rule)
    sheet, small, codes = [], [], []
    for output, image in generated:
        codes.append((image.prompt, image.codes.tobytes()))
        path = session.save(output.path, image, **output.metadata)
        if options.grid:
            sheet.append(image)
        if options.upscale:
            target = path.with_name(f"{path.stem}-up.png")
            small.append(UpscaleInput(image=image, prompt=image.prompt, source=path.name, path=target))
    for note in repetition_notes(codes):
        print_note(note)
    if small:
        session.upscale(small, len(small))
    if sheet:
        groups = group_images((image.prompt for image in sheet), sheet)
        page = captioned_sheet(groups, print_note)
        facts = {"captions": legend(groups), **options.sheet_metadata(good)}
        session.save_sheet(options.output / f"grid-seed{session.seed}.png", page, sheet, **facts)
    return ExitStatus.of(len(good), len(prompts) - len(good))
