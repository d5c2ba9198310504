"""``cogview generate``: draw pictures from text."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from cogview.cli.job import run_job
from cogview.cli.options import (
    add_drawing_arguments,
    add_model_arguments,
    add_seed_argument,
    require_positive,
)
from cogview.cli.session import GenerationSession, ImageOutput, UpscaleInput, open_session
from cogview.cli.text_io import prompt_lines
from cogview.errors import InputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.description = (
        "Draw pictures from text and print the paths of their PNG files. Without a prompt, on a terminal, it asks. "
        "A file is named PROMPT-seedSEED-NUMBER.png; a name that another picture has continues with _2, _3, …, and no "
        "other picture is overwritten. Text chunks of the file hold prompt, seed, number, model, settings and codes. "
        "A prompt given twice gets further pictures, as with a larger -n. With --input the lines of a file are drawn "
        "together, and OUTPUT/FILE.ledger.jsonl records each result when it is there: --resume goes on with it after "
        "whatever happened, and the same command started several times, or by torchrun, shares the work."
    )
    parser.add_argument("prompts", nargs="*", metavar="PROMPT", help="what to draw, such as 蓝色背景上的三只狐狸")
    parser.add_argument(
        "--input",
        metavar="FILE",
        help="a job instead: .txt, or - for standard input, has a prompt per line; .csv, .tsv and .jsonl may also give "
        "id, task (generate, complete, upscale, caption), image, rows, n, seed, temperature, top_k, top_p, guidance "
        "and text_attention",
    )
    parser.add_argument("--resume", action="store_true", help="go on with the job of --input: what is done stays")
    parser.add_argument("-n", type=int, default=1, metavar="COUNT", help="pictures per prompt")
    parser.add_argument(
        "--keep",
        type=int,
        metavar="COUNT",
        help="of the pictures of a prompt, write only so many: those whose captions it is likeliest to be, best first",
    )
    parser.add_argument(
        "--upscale", action="store_true", help="write each picture at twice its side as well; its name ends in -up"
    )
    parser.add_argument(
        "--preview", action="store_true", help="show pictures while they are drawn, in files NAME.preview.png"
    )
    parser.add_argument("--grid", action="store_true", help="one contact sheet as well: a row per prompt")
    add_seed_argument(parser, "prompt and number give the same picture")
    add_drawing_arguments(parser)
    add_model_arguments(parser, "pictures")


def run(args: argparse.Namespace) -> int:
    """Draw every prompt that can be drawn; status 2 if there was one that cannot."""
    from cogview.image_io.png import prepare_folder

    require_positive("-n", args.n)
    if args.keep is not None and not 1 <= args.keep <= args.n:
        raise InputError(f"--keep must be from 1 to {args.n}, the pictures drawn of a prompt (-n), got {args.keep}")
    if args.input is not None:
        if args.prompts:
            raise InputError("--input brings its own prompts: give it alone, or PROMPT…")
        return run_job(args)
    if args.resume:
        raise InputError("--resume goes on with a job: give its file by --input FILE")
    prompts = list(args.prompts)
    asking = not prompts
    if asking and not sys.stdin.isatty():
        raise InputError('no prompt was given; write it behind the command: cogview generate "一个红苹果"')
    prepare_folder(args.output)
    tasks = ["generate"] + ["caption"] * (args.keep is not None) + ["upscale"] * args.upscale
    easel = open_session(args, tasks)
    easel.print_header()
    if not asking:
        return draw_prompts(easel, prompts, args)
    for prompt in prompt_lines("What shall I draw? (an empty line ends)"):
        draw_prompts(easel, [prompt], args)
    return 0


def draw_prompts(easel: GenerationSession, prompts: Sequence[str], args: argparse.Namespace) -> int:
    """Draw ``args.n`` pictures of each prompt into ``args.output``, and what else was asked for."""
    from cogview.image_io.png import safe_name

    good = [prompt for prompt in prompts if easel.check_prompt(prompt)]
    orders = [
        ImageOutput(request=wish, path=args.output / f"{safe_name(prompt)}-seed{wish.seed}-{wish.index}.png")
        for prompt in good
        for wish in easel.requests(prompt, args.n)
    ]
    drawn = easel.generate([orders], "drawing", len(orders), easel.grid**2)
    if args.keep is not None:
        drawn = easel.best(drawn, args.n, args.keep)
    sheet, small = [], []
    for order, picture in drawn:
        path = easel.save(order.path, picture)
        if args.grid:
            sheet.append(picture)
        if args.upscale:
            up = path.with_name(f"{path.stem}-up.png")
            small.append(UpscaleInput(image=picture, prompt=picture.prompt, source=path.name, path=up))
    if small:
        easel.upscale(small, len(small))
    if sheet:
        easel.save_sheet(args.output / f"grid-seed{easel.seed}.png", sheet, columns=args.keep or args.n)
    return 0 if len(good) == len(prompts) else 2
