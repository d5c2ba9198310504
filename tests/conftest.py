"""What several test files share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from cogview.data.emoji.things import Thing
from cogview.data.emoji.world import World, WorldSettings

if TYPE_CHECKING:
    from cogview.pipeline import CogView


@pytest.fixture(scope="session")
def make_tiny_world() -> Callable[..., World]:
    """A function that makes a world of six drawn shapes under Chinese names; no font is needed."""
    things = (
        Thing(emoji="🍎", name="红苹果", synonyms=("苹果",)),
        Thing(emoji="🦊", name="狐狸", measures=("只", "个")),
        Thing(emoji="🐕", name="狗", synonyms=("小狗",), measures=("只", "条", "个")),
        Thing(emoji="🚗", name="汽车", measures=("辆", "个")),
        Thing(emoji="📖", name="打开的书", measures=("本", "个")),
        Thing(emoji="🐟", name="鱼", measures=("条", "个")),
    )
    sprites = np.stack([_shape(index) for index in range(len(things))])

    def make(**settings: Any) -> World:
        return World(WorldSettings(**settings), things, sprites)

    return make


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole checkpoint folder with random weights, the same in every run: 8 x 8 codes, prompts of up to 20 pieces.

    Tests share it: copy it before changing anything in it.
    """
    import torch

    from cogview.checkpoints.folder import Model, ModelConfig, NamedThing, save_model
    from cogview.checkpoints.image import codebook_hash
    from cogview.config import TransformerConfig
    from cogview.sampling import Sampling
    from cogview.tokenizers.text import TextTokenizer, train_text_tokenizer
    from cogview.tokenizers.vocabulary import Vocabulary
    from cogview.transformer import Transformer
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
        caption_drop=0.1,
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
    from cogview.pipeline import CogView

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
