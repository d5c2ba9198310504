"""Model cards of models and adapters that were trained on pictures of one's own."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cogview import __version__
from cogview.cli.continuation import UnfinishedTraining, run_settings
from cogview.cli.evaluate_samples import SHEET_FILE
from cogview.training.recipe import Recipe

if TYPE_CHECKING:
    from cogview.checkpoints.checkpoint import Model

SHOWN_SETTINGS = ("steps", "batch_size", "learning_rate", "tasks", "seed")

SAMPLES = """![samples](samples.png)

Each caption has a generated image on the left, and on the right its own picture as the image tokenizer keeps it.
Captions of the training show memory; only the held-out ones show what the model makes of a text that it has not seen.
"""


def picture_card(recipe: Recipe, facts: tuple[str, str], tables: str, model: Model) -> str:
    """Return the card of a model of pictures.

    Args:
        recipe: The recipe.
        facts: Licence of the model, and the origin of the data.
        tables: The tables of what was measured.
        model: The model.
    """
    config = model.config
    side, shape = config.grid * model.image_tokenizer.downsampling, config.transformer
    rows = (
        (
            "images",
            f"{side} x {side} pixels, {config.grid} x {config.grid} codes of {config.vocabulary.num_image_codes}",
        ),
        (
            "transformer",
            f"{shape.num_layers} layers of width {shape.width}, {shape.num_parameters / 1e6:.1f} M parameters",
        ),
        ("text", f"{config.vocabulary.num_text_pieces} pieces, captions of at most {config.max_text}"),
        ("tasks", ", ".join(config.tasks)),
        *training_rows(recipe),
    )
    return "\n".join(
        [
            "# A model of pictures",
            "",
            f"Trained by a recipe of cogview {__version__} on pictures with captions.",
            "",
            f"```bash\ncogview generate TEXT --model {recipe.work / 'model'}\n```",
            "",
            SAMPLES,
            "## Data",
            "",
            table(("", ""), (*data_rows(recipe), ("origin and licences", facts[1]))),
            "",
            f"Licence of this model: {facts[0]}.",
            "",
            "The model can reproduce pictures of its training data, so that their licences apply to such images.",
            "",
            "## Settings",
            "",
            table(("", ""), rows),
            "",
            "## Measured",
            "",
            tables,
            "",
        ]
    )


def adapter_card(recipe: Recipe, licence: str, data: str, tables: str) -> str:
    """Return the card of an adapter.

    Args:
        recipe: The recipe.
        licence: Licence of the adapter.
        data: Where the pictures are from, and their licences.
        tables: The tables of what was measured.
    """
    base = recipe.section("transformer").get("init_from")
    command = f"cogview generate TEXT --model {base} --adapter {recipe.work / 'adapter'}"
    return "\n".join(
        [
            f"# An adapter of {base}",
            "",
            f"A LoRA adapter (arXiv:2106.09685), trained by a recipe of cogview {__version__} on captioned pictures.",
            "",
            f"```bash\n{command}\n```",
            "",
            SAMPLES,
            "## Data and settings",
            "",
            table(("", ""), (*data_rows(recipe), ("origin and licences", data), *training_rows(recipe))),
            "",
            f"Licence of this adapter: {licence}.",
            "",
            "## Measured",
            "",
            tables,
            "",
        ]
    )


def data_rows(recipe: Recipe) -> list[tuple[str, str]]:
    """Return the counts of the data of a recipe."""
    from cogview.data.store import TokenStore

    found = []
    if recipe.picture_index.is_file():
        from cogview.data.builders.picture_index import divide, known_pictures

        index = divide(known_pictures(recipe.picture_index), float(recipe.section("image").get("held_out", 0.05)))
        found += [
            ("pictures of the image tokenizer", f"{len(index.training)}, and {len(index.held_out)} held out"),
            ("left out of them", str(len(index.left_out))),
        ]
    for name, path in (("training", recipe.store), ("held-out", recipe.held_out_store)):
        if path.is_dir():
            with TokenStore(path) as store:
                found.append((f"{name} captions", str(len(store))))
    report = recipe.store.with_name(f"{recipe.store.name}-left-out.jsonl")
    if report.is_file():
        with report.open("rb") as file:
            found.append(("pictures or captions left out", str(sum(1 for _ in file))))
    return found


def training_rows(recipe: Recipe) -> list[tuple[str, str]]:
    """Return the main settings of the trainings of a recipe, as their run folders have them."""
    from cogview.training.new_recipe import flow

    found = []
    for name, folder in (("image tokenizer", recipe.image_run), ("transformer", recipe.transformer_run)):
        training = (run_settings(folder) or {}).get("training") or {}
        settings = ", ".join(f"{key} {flow(training[key])}" for key in SHOWN_SETTINGS if key in training)
        if settings:
            found.append((f"training of the {name}", settings))
    return found


def unfinished_lines(recipe: Recipe) -> list[str]:
    """Return a line for each training of a recipe that has steps left, whether it goes on or was ended early."""
    runs = (("image", "image tokenizer", recipe.image_run), ("transformer", "transformer", recipe.transformer_run))
    return [
        f"training of the {name} not finished: {found.done} of {found.planned} steps are done"
        for section, name, folder in runs
        if (found := UnfinishedTraining.find(section, folder)) is not None
    ]


def report_tables(recipe: Recipe, report: Mapping[str, Any] | None) -> str:
    """Return tables of the measures on held-out pictures and of the report on samples.

    Args:
        recipe: The recipe.
        report: The report on samples; None if there is none.
    """
    from cogview.files import read_json_lines
    from cogview.training.run_folder import RunFolder
    from cogview.training.run_record import VALIDATION

    rows = []
    for name, folder in (("image tokenizer", recipe.image_run), ("transformer", recipe.transformer_run)):
        last: dict[str, Any] = {}
        for record in read_json_lines(RunFolder(folder).metrics):
            last |= {key: value for key, value in record.items() if key.startswith(VALIDATION)}
        rows += [(f"{name}, {key.removeprefix(VALIDATION)}", f"{value:g}") for key, value in last.items()]
    for side, found in (report or {}).get("image_tokenizer", {}).items():
        psnr = f"{found['psnr']:.2f} dB (p05 {found['psnr_p05']:.2f}, median {found['psnr_median']:.2f})"
        text = f"{psnr}, SSIM {found['ssim']:.3f}"
        rows.append((f"reconstructions, {found['pictures']} pictures of {side} x {side} pixels", text))
    text = "\n\n".join([*unfinished_lines(recipe), table(("measure on held-out pictures", "value"), rows)])
    if report and (nearest := report.get("nearest_is_own")):
        text += (
            f"\n\nOf {nearest['of']} images for captions of the training, {nearest['share']:.0%} are nearest to their "
            f"own picture among {nearest['among']} (mean squared error of pixels): that is memory."
        )
    return text


def copy_samples(recipe: Recipe, report: Mapping[str, Any] | None, folder: Path) -> None:
    """Copy the sheet of samples into a package, and list its captions in the card; without one, say so there.

    Args:
        recipe: The recipe.
        report: The report on samples; None if there is none.
        folder: The package.
    """
    sheet, card = recipe.work / "report" / SHEET_FILE, folder / "README.md"
    captions = sheet.with_suffix(".txt")
    text = card.read_text(encoding="utf-8") if card.is_file() else ""  # an empty card has no file
    if report is not None and sheet.is_file():
        shutil.copy(sheet, folder / SHEET_FILE)
        lines = captions.read_text(encoding="utf-8").splitlines() if captions.is_file() else []
        listed = "\n".join(f"{number}. {line}" for number, line in enumerate(lines, start=1))
        card.write_text(text.replace(SAMPLES, f"{SAMPLES}\n{listed}\n"), encoding="utf-8")
    else:
        card.write_text(text.replace(SAMPLES, "No samples.\n"), encoding="utf-8")


def table(head: tuple[str, str], rows: Any) -> str:
    """Return a table of two columns in Markdown."""
    lines = [f"| {head[0]} | {head[1]} |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)]
    return "\n".join(lines)
