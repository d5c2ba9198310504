"""What several test files share."""

from __future__ import annotations

import math
import os
import signal
import struct
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from cogview.emoji.things import EmojiObject
from cogview.emoji.world import EmojiWorld, WorldSettings

if TYPE_CHECKING:
    from cogview.pipeline.cogview import CogView

# Without a GPU Triton's kernels are interpreted, which Triton looks at when they are imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# How the released text model splits 一只可爱的小猫坐在窗台上 and 一只猫, and the ids of those pieces.
RELEASED_PIECES = {15955: "▁一只", 32637: "可爱的小", 44506: "猫", 3500: "坐在", 44893: "窗", 9388: "台上"}


@pytest.fixture(scope="session", autouse=True)
def ctrl_c_interrupts() -> None:
    """A shell has what it starts in the background ignore SIGINT; tests of Ctrl-C, and what they start, should not."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def make_tiny_world() -> Callable[..., EmojiWorld]:
    """A function that makes a world of six drawn shapes under Chinese names; no font is needed."""
    things = (
        EmojiObject(emoji="🍎", name="红苹果", synonyms=("苹果",)),
        EmojiObject(emoji="🦊", name="狐狸", measures=("只", "个")),
        EmojiObject(emoji="🐕", name="狗", synonyms=("小狗",), measures=("只", "条", "个")),
        EmojiObject(emoji="🚗", name="汽车", measures=("辆", "个")),
        EmojiObject(emoji="📖", name="打开的书", measures=("本", "个")),
        EmojiObject(emoji="🐟", name="鱼", measures=("条", "个")),
    )
    sprites = np.stack([_shape(index) for index in range(len(things))])

    def make(**settings: Any) -> EmojiWorld:
        return EmojiWorld(WorldSettings(**settings), things, sprites)

    return make


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole checkpoint folder with random weights, the same in every run: 8 x 8 codes, prompts of up to 20 pieces.

    Tests share it: copy it before changing anything in it.
    """
    from cogview.checkpoints.checkpoint import Model, NamedThing, save_model
    from cogview.checkpoints.image_tokenizer import codebook_hash
    from cogview.modeling.config import ModelConfig, Sampling, TransformerConfig
    from cogview.modeling.transformer import Transformer
    from cogview.tokenizers.text import TextTokenizer, train_text_tokenizer
    from cogview.tokenizers.vocabulary import Vocabulary
    from cogview.vqvae.model import VQVAE, VQVAEConfig

    captions = [
        f"{colour}色背景上的{number}只{thing}在{other}的左边"
        for colour in "红蓝绿黄"
        for number in "一两三四"
        for thing in ("狐狸", "狗", "苹果")
        for other in ("汽车", "鱼")
    ]
    text_tokenizer = TextTokenizer(train_text_tokenizer(captions, size=320, max_piece_length=1))
    vocabulary = Vocabulary(num_text_pieces=text_tokenizer.size)
    shape = TransformerConfig(
        num_layers=2, width=32, num_heads=2, vocabulary_size=vocabulary.padded_size, max_positions=96, dropout=0.0
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformer = Transformer(shape)
        image_tokenizer = VQVAE(
            VQVAEConfig(channels=(8, 8, 16), encoder_blocks=(0, 0, 1), decoder_blocks=(0, 0, 1), code_width=4)
        )
    things = (
        NamedThing(name="狐狸", emoji="🦊"),
        NamedThing(name="狗", emoji="🐕"),
        NamedThing(name="红苹果", emoji="🍎", synonyms=("苹果",)),
        NamedThing(name="汽车", emoji="🚗", synonyms=("轿车", "小汽车")),
    )
    config = ModelConfig(
        transformer=shape,
        vocabulary=vocabulary,
        grid=8,
        tasks=("generate", "caption", "upscale", "low_level"),
        max_text=20,
        caption_dropout=0.1,
        codebook_sha256=codebook_hash(image_tokenizer),
        sampling=Sampling(temperature=0.9, top_k=100),
    )
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    model = Model(
        config=config,
        transformer=transformer,
        image_tokenizer=image_tokenizer,
        text_tokenizer=text_tokenizer,
        things=things,
        card="# tiny\n",
    )
    save_model(folder, model)
    return folder


@pytest.fixture(scope="session")
def tiny_model(tiny_checkpoint: Path) -> CogView:
    """The tiny checkpoint, opened on the CPU in float32."""
    from cogview.pipeline.cogview import CogView

    return CogView.from_pretrained(tiny_checkpoint, device="cpu")


@pytest.fixture
def save_image() -> Callable[..., Image.Image]:
    """A function that writes an image file of smooth colours, others for each ``number``; returns the image."""

    def save(path: str | Path, number: int = 0, size: tuple[int, int] = (64, 64)) -> Image.Image:
        x, y = np.meshgrid(np.linspace(0, 1, size[0]), np.linspace(0, 1, size[1]))
        waves = [np.sin(9 * x + number) + np.cos(7 * y - number), x + number % 2, np.sin(20 * x * y + number)]
        image = Image.fromarray((np.stack(waves, axis=-1) * 60 + 120).astype(np.uint8))
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
        return image

    return save


@pytest.fixture(scope="session")
def golden_release() -> Release:
    """The model behind ``released.npz``: 3 layers, width 64, 4 heads, the full vocabulary, the released VQ-VAE."""
    return Release(
        transformer=_transformer_weights(_transformer_shapes(num_layers=3, width=64, num_rows=58_240)),
        image_tokenizer=_image_weights(_image_shapes(num_codes=8192, code_width=256, channels=512)),
        text_model=_text_model(50_000, RELEASED_PIECES),
    )


@pytest.fixture(scope="session")
def small_release() -> Release:
    """A model of two megabytes: 2 layers, width 64, 4 heads, 16 codes and 77 pieces, which make 128 rows."""
    return Release(
        transformer=_transformer_weights(_transformer_shapes(num_layers=2, width=64, num_rows=128)),
        image_tokenizer=_image_weights(_image_shapes(num_codes=16, code_width=4, channels=64)),
        text_model=_text_model(77, dict(enumerate(RELEASED_PIECES.values(), start=1))),
    )


@pytest.fixture(scope="session")
def released_shapes() -> Callable[..., dict[str, tuple[int, ...]]]:
    """A function that tells names and shapes of a released transformer by ``num_layers``, ``width``, ``num_rows``."""
    return _transformer_shapes


@dataclass(frozen=True, eq=False)
class Release:
    """A released model: tensors in float32 under the released names, and the bytes of its text model."""

    transformer: dict[str, Tensor]
    image_tokenizer: dict[str, Tensor]
    text_model: bytes

    def write(
        self,
        folder: Path,
        *,
        half: bool = False,
        shards: int = 1,
        prefix: str = "",
        tracker: str = "50000",
        legacy: bool = False,
        extra: Mapping[str, Any] | None = None,
    ) -> dict[str, Path]:
        """Write its files into ``folder``; returns them under the names that ``import_released`` has for them.

        ``prefix`` goes before every name, ``tracker`` is what the tracker file says, ``legacy`` writes the layout
        before torch 1.6, and ``extra`` stands beside the weights in each file of the transformer.
        """
        dtype = torch.float16 if half else torch.float32
        place = folder / "transformer" / tracker
        place.mkdir(parents=True)
        (folder / "transformer" / "latest_checkpointed_iteration.txt").write_text(f"{tracker}\n")
        for rank in range(shards):
            module = {prefix + name: _shard(name, t, rank, shards).to(dtype) for name, t in self.transformer.items()}
            content = {"module": module, "iteration": 50000, **(extra or {})}
            file = place / f"mp_rank_{rank:02d}_model_states.pt"
            torch.save(content, file, _use_new_zipfile_serialization=not legacy)
        image = {prefix + name: tensor.to(dtype) for name, tensor in self.image_tokenizer.items()}
        torch.save(image, folder / "vqvae.pt", _use_new_zipfile_serialization=not legacy)
        (folder / "text.model").write_bytes(self.text_model)
        return {
            "source": folder / "transformer",
            "image_tokenizer": folder / "vqvae.pt",
            "text_model": folder / "text.model",
        }


def _transformer_shapes(num_layers: int, width: int, num_rows: int) -> dict[str, tuple[int, ...]]:
    matrices = {
        "attention.query_key_value": (3 * width, width),
        "attention.dense": (width, width),
        "mlp.dense_h_to_4h": (4 * width, width),
        "mlp.dense_4h_to_h": (width, 4 * width),
    }
    norms = [
        f"layers.{number}.{norm}_layernorm"
        for number in range(num_layers)
        for norm in ("input", "post_attention", "third", "fourth")
    ]
    shapes: dict[str, tuple[int, ...]] = {
        "word_embeddings.weight": (num_rows, width),
        "transformer.position_embeddings.weight": (1089, width),
    }
    for number in range(num_layers):
        for name, shape in matrices.items():
            shapes[f"transformer.layers.{number}.{name}.weight"] = shape
            shapes[f"transformer.layers.{number}.{name}.bias"] = shape[:1]
    for norm in (*norms, "final_layernorm"):
        shapes[f"transformer.{norm}.weight"] = shapes[f"transformer.{norm}.bias"] = (width,)
    return shapes


def _image_shapes(num_codes: int, code_width: int, channels: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "quantize_t.embed": (code_width, num_codes),
        "quantize_t.cluster_size": (num_codes,),
        "quantize_t.embed_avg": (code_width, num_codes),
        "enc_b.blocks.0.weight": (channels, 3, 4, 4),
        "enc_b.blocks.6.weight": (code_width, channels, 1, 1),
        "enc_b.blocks.6.bias": (code_width,),
        "dec.blocks.0.weight": (code_width, channels, 4, 4),  # transposed: inputs first
        "dec.blocks.6.weight": (3, channels, 1, 1),
        "dec.blocks.6.bias": (3,),
    }
    shapes |= {f"{part}.blocks.{n}.weight": (channels, channels, 4, 4) for part in ("enc_b", "dec") for n in (2, 4)}
    return shapes | {f"{part}.blocks.{n}.bias": (channels,) for part in ("enc_b", "dec") for n in (0, 2, 4)}


def _transformer_weights(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """The recipe that ``released.npz`` was made by."""
    weights = {}
    for name, shape in shapes.items():
        if name.endswith("layernorm.weight"):
            weights[name] = 1 + _normal(name, shape, 0.1)
        elif name.endswith("bias"):
            weights[name] = _normal(name, shape, 0.02)
        elif "embeddings" in name:
            weights[name] = _normal(name, shape, 2.0 if "position" in name else 0.5)
        else:
            weights[name] = _normal(name, shape, 2.0 / math.sqrt(shape[1]))
    return weights


def _image_weights(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """The recipe that ``released.npz`` was made by."""
    weights = {}
    for name, shape in shapes.items():
        if name.startswith("quantize_t."):
            weights[name] = _normal(name, shape, 0.6)
        elif name.endswith("bias"):
            weights[name] = _normal(name, shape, 0.1)
        else:
            transposed = name.startswith("dec") and shape[-1] > 1
            fan = shape[0] * 4 if transposed else math.prod(shape[1:])
            weights[name] = _normal(name, shape, math.sqrt(2.0 / fan))
    return weights


def _normal(name: str, shape: tuple[int, ...], std: float) -> Tensor:
    """N(0, std) noise that depends on the released name of the tensor alone."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"0:{name}".encode()))
    return torch.randn(shape, generator=generator) * std


def _shard(name: str, tensor: Tensor, rank: int, shards: int) -> Tensor:
    """What model-parallel rank ``rank`` of ``shards`` has of a tensor."""
    rest = tensor.shape[1:]
    if ".query_key_value." in name:  # its part of the queries, of the keys and of the values
        return tensor.reshape(3, shards, -1, *rest)[:, rank].reshape(-1, *rest).clone()
    if name.startswith("word_embeddings") or ".dense_h_to_4h." in name:
        return tensor.reshape(shards, -1, *rest)[rank].clone()
    if name.endswith((".dense.weight", ".dense_4h_to_h.weight")):
        return tensor.reshape(len(tensor), shards, -1)[:, rank].clone()
    return tensor


def _text_model(size: int, pieces: Mapping[int, str]) -> bytes:
    """A SentencePiece model file of ``size`` pieces, made by hand: ``<unk>``, ``pieces`` by id, and fillers."""
    fields = []
    for index in range(size):
        piece = "<unk>" if index == 0 else pieces.get(index, f"字{index}")
        kind = 2 if index == 0 else 1  # unknown, normal
        fields.append(_field(1, _field(1, piece.encode()) + _field(2, -1.0) + _field(3, kind)))
    trainer, normalizer = _field(3, 1) + _field(4, size), b""  # unigram; text stays as it is
    return b"".join([*fields, _field(2, trainer), _field(3, normalizer)])


def _field(number: int, value: bytes | float | int) -> bytes:
    """A field of a protocol buffer, with its key."""
    if isinstance(value, bytes):
        return _varint(number << 3 | 2) + _varint(len(value)) + value
    if isinstance(value, float):
        return _varint(number << 3 | 5) + struct.pack("<f", value)
    return _varint(number << 3) + _varint(value)


def _varint(value: int) -> bytes:
    low, rest = value & 127, value >> 7
    return bytes([low | 128]) + _varint(rest) if rest else bytes([low])


def _shape(index: int) -> np.ndarray:
    """A drawing that no other index has, RGBA (128, 128, 4)."""
    image = Image.new("RGBA", (128, 128), (0, 0, 0, 0))
    draw = ImageDraw.Draw(image)
    if index == 0:
        draw.ellipse((8, 8, 120, 120), fill=(200, 20, 60, 255))
    elif index == 1:
        draw.polygon([(64, 4), (124, 124), (4, 124)], fill=(230, 120, 10, 255))
    elif index == 2:
        draw.rectangle((20, 20, 108, 108), fill=(120, 70, 30, 255), outline=(255, 255, 255, 255), width=14)
    elif index == 3:
        draw.rectangle((4, 44, 124, 84), fill=(20, 60, 200, 255))
        draw.rectangle((44, 4, 84, 124), fill=(20, 60, 200, 255))
    elif index == 4:
        draw.ellipse((8, 8, 120, 120), outline=(20, 140, 60, 255), width=24)
    else:
        draw.polygon([(4, 4), (124, 64), (4, 124)], fill=(250, 250, 120, 255))
        draw.rectangle((90, 90, 124, 124), fill=(10, 10, 10, 255))
    return np.asarray(image)
