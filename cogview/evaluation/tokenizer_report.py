"""Measures of the image tokenizer of a model on pictures, as rows of a result."""

from __future__ import annotations

from dataclasses import dataclass

from tqdm import tqdm

from cogview.data.image_dataset import check_side
from cogview.errors import InputError
from cogview.evaluation.features import FeatureNetwork, finite_features
from cogview.evaluation.image_sets import ImageSet
from cogview.evaluation.image_statistics import (
    ImageProtocol,
    ImageStatistics,
    MeasuredSet,
    SquareResize,
    frechet_result,
    read_batches,
)
from cogview.evaluation.manifest import Manifest, hash_set
from cogview.evaluation.model_record import describe_hardware, describe_model, describe_versions
from cogview.evaluation.model_report import ResultTable
from cogview.evaluation.reconstruction import ReconstructionReport
from cogview.formatting import plural
from cogview.pipeline.cogview import CogView

MIN_PICTURES = 2  # for a covariance


@dataclass(frozen=True, kw_only=True)
class PictureProblems:
    """What is to be reported about pictures.

    Attributes:
        notes: A line about each value that says less than usual.
        left_out: Why a picture could not be read, a line each.
    """

    notes: tuple[str, ...]
    left_out: tuple[str, ...]


def measure_reconstructions(
    table: ResultTable, model: CogView, images: ImageSet, network: FeatureNetwork, batch_size: int
) -> tuple[Manifest, PictureProblems]:
    """Reconstruct pictures by the image tokenizer of a model, and compare them with the pictures.

    Args:
        table: Receives the measures of ``ReconstructionReport``, and ``rfid``, the Fréchet distance of features
            between pictures and their reconstructions.
        model: The model.
        images: Pictures that the image tokenizer was not trained on.
        network: The feature network.
        batch_size: Maximum number of pictures in a batch.

    Returns:
        How the results were measured, and what is to be reported about the pictures.

    Raises:
        InputError: The side of the model does not suit the network, or fewer than two pictures can be read.
    """
    tokenizer = model.image_tokenizer
    side = model.config.grid * tokenizer.downsampling
    if network.downsampling > 1:
        check_side(side, network.downsampling)
    protocol = ImageProtocol(resize=SquareResize(side=side, filter="lanczos"), sample=2)
    report = ReconstructionReport(model=tokenizer)
    true, restored = (ImageStatistics(network.record.dimensions, 0, protocol) for _ in range(2))
    hashes: list[str] = []
    problems: list[str] = []
    with tqdm(total=len(images.keys), unit="picture", desc="reconstructing", disable=None, leave=False) as bar:
        for pixels in read_batches(images, protocol.resize, hashes, problems, size=batch_size, on_image=bar.update):
            for statistics, batch in ((true, pixels), (restored, report.add(pixels))):
                statistics.add(finite_features(network, batch)[0], None)
    if len(hashes) < MIN_PICTURES:
        first = f"; the first problem: {problems[0]}" if problems else ""
        raise InputError(
            f"{images.path} has {plural(len(hashes), 'picture')} that can be read, expected at least 2{first}"
        )
    record = hash_set(images.name, hashes)
    notes = []
    if true.moments.is_rank_deficient:
        notes.append(
            f"rank-deficient: rfid of {network.record.dimensions} dimensions needs more pictures than that, and is too "
            f"large with fewer, got {len(hashes)}"
        )
    a, b = (MeasuredSet(statistics=each, record=record, problems=tuple(problems)) for each in (restored, true))
    table.values |= {"rfid": frechet_result(a, b), **report.result_values()}
    ids = [f"{each}-{number}" for number, each in enumerate(hashes)]
    for name, values in report.item_values().items():
        table.items[name] = dict(zip(ids, values, strict=True))
    manifest = Manifest(
        measure="model pictures",
        reference=record,
        resize=protocol.resize.record(),
        network=network.record,
        model=describe_model(model),
        settings={
            "network_resize": {"side": network.side, "filter": network.filter},
            "rank_deficient": true.moments.is_rank_deficient,
        },
        versions=describe_versions("pillow", "torch-fidelity", "efficientnet-lite-pytorch"),
        hardware=describe_hardware(model.placement.device),
    )
    return manifest, PictureProblems(notes=tuple(notes), left_out=tuple(problems))
