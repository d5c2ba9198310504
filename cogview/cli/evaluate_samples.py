"""``cogview eval samples``: images for training captions and held-out ones, and the quality of reconstructions."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from cogview.cli.messages import print_note
from cogview.cli.options import Command, device_option
from cogview.cli.recipes import recipe_options
from cogview.cli.translation import translate
from cogview.errors import InputError
from cogview.training.recipe import Recipe

if TYPE_CHECKING:
    import numpy as np

    from cogview.evaluation.manifest import Manifest, ResultValue
    from cogview.evaluation.samples import CaptionSamples
    from cogview.modeling.config import Sampling
    from cogview.pipeline.cogview import CogView
    from cogview.training.settings import TransformerSettings

SAMPLES_FILE = "report-samples.json"
RESULT_FILE = "result-samples.json"
SHEET_FILE = "samples.png"
CAPTIONS = 48  # of each split
FEW_OWN = 0.1  # of the images for training captions; fewer are nearest to their own picture after a short training
MAX_HELD_OUT = 200  # pictures whose reconstructions are measured
MAX_SEARCHED = 4000  # pictures among which held-out ones are looked for, without an index


@click.command(name="samples", cls=Command)
@recipe_options("transformer")
@click.option(
    "-n", "--captions", "count", type=click.IntRange(min=1, max=1000), default=CAPTIONS, metavar="COUNT",
    help="number of training captions, and of held-out ones",
)  # fmt: skip
@device_option()
def samples(recipe: Recipe, count: int, device: str) -> int:
    """Generate images for training captions and for held-out ones.

    Writes a sheet with each image beside the picture of its caption, and a report: the share of the images that are
    nearest to their own picture among the training pictures, and the PSNR of reconstructions of held-out pictures.
    """
    from cogview.data.store import TokenStore
    from cogview.evaluation.manifest import write_result
    from cogview.evaluation.samples import draw_samples, nearest_share, sample_sheet
    from cogview.files import write_json
    from cogview.training.settings import TransformerSettings
    from cogview.training.step_records import record_step

    settings = recipe.settings(TransformerSettings, "transformer")
    if settings.validation_store is None:
        recipe.require_held_out_store()
    training = TokenStore(settings.store or recipe.store)
    held_out = TokenStore(settings.validation_store or recipe.held_out_store)
    model, name = open_trained(recipe, settings, device)
    own = "sampling" in recipe.section("transformer")  # an adapter without has the settings of its model
    sampling = model.sampling(settings.sampling if own or settings.lora is None else None)
    drawn = [draw_samples(model, store, count, sampling) for store in (training, held_out)]
    share, compared = nearest_share(model, training, drawn[0])
    report: dict[str, Any] = {
        "protocol": {"model": name, "captions": [len(each.captions) for each in drawn], "seed": 0},
        "nearest_is_own": {"share": round(share, 4), "of": len(drawn[0].captions), "among": compared},
        **measure_reconstructions(recipe, model),
    }
    folder = recipe.work / "report"
    folder.mkdir(parents=True, exist_ok=True)
    words = translate("held out"), translate("trained on")
    sheet, lines = sample_sheet([(words[0], drawn[1]), (words[1], drawn[0])], print_note)
    sheet.save(folder / SHEET_FILE)
    (folder / "samples.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    write_result(folder / RESULT_FILE, sample_manifest(model, drawn, sampling, compared), sample_values(report))
    write_json(folder / SAMPLES_FILE, report)  # last: the report says that the sheet is there
    record_step(recipe, "eval samples", {})
    print(f"nearest to their own picture: {share:.0%} of the images for training captions, among {compared} pictures")
    if share < FEW_OWN:
        print_note(
            "fewer than a tenth of the images for training captions are nearest to their own picture: the training is "
            "probably too short; train with more steps: transformer.training.steps"
        )
    for side, found in report.get("image_tokenizer", {}).items():
        print(f"reconstructions of {found['pictures']} held-out pictures, {side} pixels: {found['psnr']:.2f} dB")
    print(folder / SHEET_FILE)
    print(f"written to {folder}", file=sys.stderr)
    return 0


def sample_manifest(model: CogView, drawn: Sequence[CaptionSamples], sampling: Sampling, compared: int) -> Manifest:
    """Return how samples were measured.

    Args:
        model: The model.
        drawn: Samples of training captions, and of held-out ones.
        sampling: Their sampling settings.
        compared: Number of training pictures that each image was compared with.
    """
    from cogview.config_io import to_mapping
    from cogview.evaluation.manifest import Manifest, SeedsRecord, hash_prompts
    from cogview.evaluation.model_record import describe_hardware, describe_model, describe_versions

    captions = [caption for each in drawn for caption in each.captions]
    return Manifest(
        measure="samples",
        prompts=hash_prompts(captions),
        seeds=SeedsRecord(first=0, count=max(len(each.captions) for each in drawn)),
        sampling=to_mapping(sampling),
        model=describe_model(model),
        settings={"training_captions": len(drawn[0].captions), "compared_with": compared},
        versions=describe_versions("pillow"),
        hardware=describe_hardware(model.placement.device),
    )


def sample_values(report: Mapping[str, Any]) -> dict[str, ResultValue]:
    """Return the values of a report on samples for a result file."""
    from cogview.evaluation.manifest import ResultValue
    from cogview.evaluation.metrics import wilson_interval

    nearest = report["nearest_is_own"]
    low, high = wilson_interval(round(nearest["share"] * nearest["of"]), nearest["of"])
    values = {
        "nearest_is_own": ResultValue(value=nearest["share"], low=low, high=high, n=nearest["of"], unit="fraction")
    }
    for side, found in report.get("image_tokenizer", {}).items():
        count = found["pictures"]
        for name, unit in (("psnr", "dB"), ("psnr_median", "dB"), ("ssim", ""), ("codes_used", "fraction")):
            values[f"reconstructions_{side}.{name}"] = ResultValue(
                value=found[name], n=count, unit=unit, higher_is_better=True
            )
    return values


def open_trained(recipe: Recipe, settings: TransformerSettings, device: str) -> tuple[CogView, str]:
    """Return the model of the last checkpoint of a recipe, or its base with the adapter, and the checkpoint's path."""
    from cogview.cli.evaluate import last_checkpoint
    from cogview.pipeline.cogview import CogView

    checkpoint = last_checkpoint(recipe)
    if settings.lora is None:
        return CogView.from_pretrained(checkpoint, device=device), str(checkpoint)
    base = settings.init_from or ""
    return CogView.from_pretrained(base, device=device, adapter=checkpoint), str(checkpoint)


def measure_reconstructions(recipe: Recipe, model: CogView) -> dict[str, Any]:
    """Return the quality of reconstructions of held-out pictures, at all sizes together and at each.

    Args:
        recipe: The recipe.
        model: The model with the image tokenizer.

    Returns:
        ``reconstruction_psnr``, for the config of the model, and ``image_tokenizer``, by side; empty for a recipe
        without pictures.
    """
    from cogview.config_io import to_mapping
    from cogview.data.builders.prepare import fit_picture
    from cogview.evaluation.metrics import reconstruction_quality
    from cogview.evaluation.reconstruction import ReconstructionReport
    from cogview.vqvae.codec import reconstruct

    if "pictures" not in (recipe.sections.get("encode") or {}):
        return {}
    import numpy as np

    from cogview.training.picture_encoding import PictureEncodeSettings

    settings = replace(recipe, overrides=()).settings(PictureEncodeSettings, "encode")
    pictures = list(held_out_pictures(recipe))
    if not pictures:
        return {}
    scales = [1, 2] if settings.large else [1]
    true: list[np.ndarray] = []
    restored: list[np.ndarray] = []
    by_side = {}
    for scale in scales:
        images = np.stack([fit_picture(image, scale * settings.side, settings.fit) for image in pictures])
        report = ReconstructionReport(model=model.image_tokenizer)
        for start in range(0, len(images), 32):
            report.add(images[start : start + 32])
        true += list(images)
        restored += list(reconstruct(model.image_tokenizer, images, 32))
        by_side[str(scale * settings.side)] = report.summary()
    return {"reconstruction_psnr": to_mapping(reconstruction_quality(true, restored)), "image_tokenizer": by_side}


def held_out_pictures(recipe: Recipe) -> Iterator[Any]:
    """Yield held-out pictures of a recipe as RGB images, ``MAX_HELD_OUT`` at most.

    Args:
        recipe: The recipe, whose section ``encode`` names pictures.
    """
    from itertools import chain, islice
    from pathlib import Path

    from cogview.data.builders.prepare import MIN_SIDE, is_held_out, pixel_digest
    from cogview.data.sources.open import open_source
    from cogview.image_io.reading import read_image
    from cogview.training.picture_encoding import PictureEncodeSettings

    settings = replace(recipe, overrides=()).settings(PictureEncodeSettings, "encode")
    sources = [open_source(path, settings.table, lambda note: None) for path in settings.pictures]
    count, known = 0, set()
    for record in islice(chain.from_iterable(sources), MAX_SEARCHED):
        if record.file is None or count == MAX_HELD_OUT:
            continue
        try:
            image = read_image(Path(record.name), content=record.file.read_part())
        except InputError:  # it is left out of the stores too, which list it
            continue
        digest = pixel_digest(image)
        if min(image.size) >= MIN_SIDE and digest not in known and is_held_out(digest, settings.held_out):
            known.add(digest)
            count += 1
            yield image
