"""Scenes to token rows: drawn, encoded by the VQ-VAE, captioned, and stored."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from cogview.checkpoints.image_tokenizer import codebook_hash
from cogview.config_io import to_mapping
from cogview.data.store import NO_TOKEN, StoreHeader
from cogview.data.store_writer import StoreWriter, pad_text
from cogview.emoji.scene import EQUAL_WEIGHTS, Scene, SceneWeights, cells_of
from cogview.emoji.world import EmojiWorld
from cogview.errors import InputError
from cogview.tokenizers.text import TextTokenizer
from cogview.vqvae.codec import to_float
from cogview.vqvae.model import PIXELS_PER_CODE, VQVAE


@dataclass(frozen=True, kw_only=True)
class EncodeSettings:
    """The ``encode`` section of a recipe."""

    rows: int  # training scenes
    held_out_rows: int = 2048
    weights: SceneWeights = EQUAL_WEIGHTS  # of the training scenes; those held out have equal shares
    text_width: int = 48  # pieces in the longest caption
    large: bool = False  # the codes of each scene at twice the side as well, for the task upscale
    small: bool = False  # and at half the side, for the task low_level
    named: bool = False  # at each code, the piece of the caption that names the thing there
    batch_size: int = 256
    seed: int = 0
    num_workers: int = 0  # processes that draw scenes

    def __post_init__(self) -> None:
        for name in ("rows", "held_out_rows", "text_width", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


class CaptionedScenes(Dataset[tuple[Scene, list[np.ndarray], list[int]]]):
    """Scene number i of a world, a function of (seed, i), its pictures and its caption's pieces.

    Pictures are uint8 (H, W, 3), one for each of ``scales``.
    """

    def __init__(
        self,
        world: EmojiWorld,
        text_tokenizer: TextTokenizer,
        seed: int,
        *,
        held_out: bool,
        shares: SceneWeights = EQUAL_WEIGHTS,
        scales: Sequence[float] = (1,),
    ) -> None:
        self.world = world
        self.text_tokenizer = text_tokenizer
        self.seed = seed
        self.held_out = held_out
        self.shares = shares
        self.scales = scales

    def __getitem__(self, index: int) -> tuple[Scene, list[np.ndarray], list[int]]:
        scene = self.world.sample(self.seed, index, self.held_out, self.shares)
        pictures = [self.world.render(scene, index, scale) for scale in self.scales]
        return scene, pictures, self.text_tokenizer.encode(self.world.caption(scene, index))


def name_pieces(world: EmojiWorld, text_tokenizer: TextTokenizer) -> dict[str, frozenset[int]]:
    """The pieces that are a name of each thing, by emoji; InputError where a name takes several pieces."""

    def piece_of(name: str) -> int:
        pieces = text_tokenizer.encode(name)
        if len(pieces) != 1:
            raise InputError(
                f"the name {name} of a thing takes {len(pieces)} pieces, so that no single one can stand for it; "
                "train the text tokenizer with whole_names: true, or encode with named: false"
            )
        return pieces[0]

    return {thing.emoji: frozenset(map(piece_of, thing.names)) for thing in world.things}


def name_places(scene: Scene, pieces: Sequence[int], names: Mapping[str, frozenset[int]], grid: int) -> np.ndarray:
    """For each code of a picture of ``scene``, the piece of its caption that names the thing there: uint16 (G * G,).

    A thing has all of its cell's area. ABSENT where the caption has no name of the thing, or more than one.
    """
    named = np.full((grid, grid), NO_TOKEN, dtype=np.uint16)
    for thing, cell in zip(scene.shown, cells_of(scene), strict=True):
        own = names[thing.emoji].intersection(pieces)
        if len(own) == 1:
            left, top, right, bottom = (eighths * grid // 8 for eighths in cell.area)
            named[top:bottom, left:right] = next(iter(own))
    return named.ravel()


def encode_scenes(
    path: Path,
    world: EmojiWorld,
    text_tokenizer: TextTokenizer,
    image_tokenizer: VQVAE,
    settings: EncodeSettings,
    *,
    rows: int,
    held_out: bool,
) -> None:
    """Write scenes 0 … ``rows`` - 1 to a store at ``path``; one that was interrupted is continued."""
    grid = world.settings.canvas // PIXELS_PER_CODE
    shares = EQUAL_WEIGHTS if held_out else settings.weights
    scales: dict[str, float] = {"image": 1}
    tasks = ["generate", "caption"]
    if settings.large:
        scales["large"] = 2
        tasks.append("upscale")
    if settings.small:
        scales["small"] = 0.5
        tasks.append("low_level")
    names = name_pieces(world, text_tokenizer) if settings.named else None
    header = StoreHeader(
        fields={
            "text": settings.text_width,
            **{name: round(grid * scale) ** 2 for name, scale in scales.items()},
            **({"named": grid**2} if names is not None else {}),
        },
        grid=grid,
        num_image_codes=image_tokenizer.config.num_codes,
        num_text_pieces=text_tokenizer.size,
        layouts=tuple(tasks),
        codebook_sha256=codebook_hash(image_tokenizer),
        text_sha256=hashlib.sha256(text_tokenizer.model_bytes).hexdigest(),
        provenance={
            "scenes": to_mapping(world.settings),
            "shares": to_mapping(shares),
            "seed": settings.seed,
            "held_out": held_out,
        },
    )
    device = next(image_tokenizer.parameters()).device
    with (
        StoreWriter(path, header, resume=True) as writer,
        tqdm(total=rows, initial=writer.count, unit="scene", desc=path.name, disable=None) as bar,
    ):
        scenes = DataLoader(
            CaptionedScenes(
                world, text_tokenizer, settings.seed, held_out=held_out, shares=shares, scales=list(scales.values())
            ),
            batch_size=settings.batch_size,
            sampler=range(writer.count, rows),
            collate_fn=list,
            num_workers=settings.num_workers,
        )
        for batch in scenes:
            fields = {"text": pad_text([pieces for _, _, pieces in batch], settings.text_width)}
            for number, name in enumerate(scales):
                images = to_float(np.stack([pictures[number] for _, pictures, _ in batch]), device)
                fields[name] = image_tokenizer.encode(images).flatten(1).cpu().numpy()
            if names is not None:
                fields["named"] = np.stack([name_places(scene, pieces, names, grid) for scene, _, pieces in batch])
            writer.append(fields)
            bar.update(len(batch))
