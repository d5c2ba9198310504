"""The settings of training a VQ-VAE."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Literal

from cogview.data.sources.tables import TableOptions
from cogview.data.store import MAX_CODES
from cogview.image_io.reading import FitRule
from cogview.training.settings import RunSettings
from cogview.training.vqvae_images import VALIDATION_IMAGES
from cogview.vqvae.model import VQVAEConfig
from cogview.vqvae.ranges import COUNT, WORKERS, check_ranges
from cogview.vqvae.training import VQVAETrainingSettings


@dataclass(frozen=True, kw_only=True)
class VQVAERecipe:
    """The ``image`` section of a recipe.

    Args:
        pictures: Sources of pictures, as ``cogview data build`` reads them, or folders and files of pictures without
            captions; none for scenes of the emoji world.
        table: Folder and columns of sources that are tables.
        side: Side of the images at scale 1, in pixels. Scenes have that of their canvas.
        fit: How a picture becomes a square: ``crop``, ``pad`` or ``stretch``.
        held_out: Share of the pictures that are held out, by a hash of their pixels.
        flip: Mirror every other training image, chosen at random, from left to right.
        training: Settings of the training steps.
        model: Shape of the VQ-VAE.
        scales: Scales of the training images, in turn; [1, 2] for a model that upscales.
        init_from: Name or folder of an image tokenizer, or of a model with one, that initializes the weights. The
            model then has its shape; ``num_codes``, ``code_width`` and ``normalize_codes`` may be others.
        train: ``all``, or ``decoder`` to keep the encoder and the codebook of ``init_from``, and so every code.
        run: Intervals of logging, saving and evaluation.
        precision: ``auto``, or the dtype of autocast.
        num_workers: Processes that render images; 0 renders in the main process.
        validation_images: Maximum number of held-out images of an evaluation, of all scales together.

    Raises:
        ValueError: ``scales`` is empty, a number is out of range, the codebook is larger than token stores hold, or a
            setting of pictures is given without them.
    """

    pictures: tuple[Path, ...] = ()
    table: TableOptions = field(default_factory=TableOptions)
    side: int = 64
    fit: FitRule = "crop"
    held_out: float = 0.05
    flip: bool = False
    training: VQVAETrainingSettings
    model: VQVAEConfig = field(default_factory=VQVAEConfig)
    scales: tuple[int, ...] = (1,)
    init_from: str | None = None
    train: Literal["all", "decoder"] = "all"
    run: RunSettings = field(default_factory=RunSettings)
    precision: str = "auto"
    num_workers: int = 0
    validation_images: int = VALIDATION_IMAGES

    def __post_init__(self) -> None:
        if not self.scales:
            raise ValueError("scales must hold at least one number")
        if self.model.num_codes > MAX_CODES:
            raise ValueError(
                f"num_codes must be at most {MAX_CODES}, which token stores hold, got {self.model.num_codes}"
            )
        check_ranges(
            self,
            {
                "side": "[8, 4096]",
                "held_out": "(0, 1)",
                "scales": "[1, 16]",
                "num_workers": WORKERS,
                "validation_images": COUNT,
            },
        )
        if self.train == "decoder" and self.init_from is None:
            raise ValueError("train: decoder needs init_from, the image tokenizer whose encoder and codebook are kept")
        if not self.pictures:
            for name in ("table", "side", "fit", "held_out"):
                setting = type(self).__dataclass_fields__[name]
                default = TableOptions() if setting.default is MISSING else setting.default
                if getattr(self, name) != default:
                    raise ValueError(f"{name} applies to pictures, which are not given")
