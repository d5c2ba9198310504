"""Building a store: its rows, interruption and continuation, stores of other tokenizers."""

import hashlib
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch

from cogview.checkpoints.image_tokenizer import codebook_hash
from cogview.data.builders import encode as module
from cogview.data.builders.encode import EncodeSettings, encode_dataset, name_grid
from cogview.data.image_dataset import ImageExample, NamedRegion
from cogview.data.store import NO_TOKEN, TokenStore
from cogview.data.store_writer import StoreWriter
from cogview.emoji.datasets import SceneEncodeSettings
from cogview.emoji.scene import PLAIN_KINDS, SceneWeights
from cogview.emoji.world import EmojiWorld
from cogview.errors import InputError
from cogview.tokenizers.text import TextTokenizer, train_text_tokenizer
from cogview.vqvae.model import VQVAE, VQVAEConfig


@pytest.fixture(scope="module")
def world(make_tiny_world) -> EmojiWorld:
    return make_tiny_world(jitter=2)


@pytest.fixture(scope="module")
def text_tokenizer(world) -> TextTokenizer:
    captions = [world.caption(world.sample_scene(0, index), index) for index in range(300)]
    return TextTokenizer(train_text_tokenizer(captions, size=400, coverage=1.0, max_piece_length=1))


@pytest.fixture(scope="module")
def image_tokenizer() -> VQVAE:
    torch.manual_seed(0)
    return VQVAE(VQVAEConfig(channels=(4, 8, 8), encoder_blocks=(0, 0, 1), num_codes=40, code_width=4)).eval()


@pytest.fixture
def encode(world, text_tokenizer, image_tokenizer):
    def run(
        path: Path,
        rows: int,
        *,
        held_out: bool = False,
        vqvae: VQVAE = image_tokenizer,
        text: TextTokenizer = text_tokenizer,
        **changes,
    ) -> TokenStore:
        settings = SceneEncodeSettings(**{"rows": rows, "batch_size": 8, **changes})
        encode_dataset(path, settings.dataset(world, held_out=held_out), text, vqvae, settings, rows=rows)
        return TokenStore(path)

    return run


def everything(store: TokenStore) -> dict[str, np.ndarray]:
    return store.read(range(len(store)))


@pytest.mark.parametrize("held_out", [False, True])
def test_encode_dataset_writes_codes_of_the_image_and_pieces_of_the_caption(
    tmp_path, encode, world, text_tokenizer, image_tokenizer, held_out
):
    store = encode(tmp_path, 19, held_out=held_out, seed=3)  # the last batch is not full
    assert len(store) == 19
    for number in range(19):
        scene = world.sample_scene(3, number, held_out=held_out)
        assert scene.held_out == held_out
        row = store[number]
        pieces = row["text"][row["text"] != NO_TOKEN].tolist()
        assert text_tokenizer.decode(pieces) == unicodedata.normalize("NFKC", world.caption(scene, number))
        image = torch.from_numpy(world.render(scene, number)).permute(2, 0, 1)[None].float() / 255
        assert row["image"].tolist() == image_tokenizer.encode(image).flatten().tolist()


def test_encode_dataset_records_tokenizers_and_provenance(tmp_path, encode, text_tokenizer, image_tokenizer):
    header = encode(tmp_path, 2, held_out=True, text_width=40).header
    assert header.fields == {"text": 40, "image": 64}
    assert (header.grid, header.num_image_codes, header.num_text_pieces) == (8, 40, text_tokenizer.size)
    assert header.layouts == ("generate", "caption")
    assert header.codebook_sha256 == codebook_hash(image_tokenizer)
    assert header.text_sha256 == hashlib.sha256(text_tokenizer.model_bytes).hexdigest()
    assert header.provenance["held_out"] is True
    assert header.provenance["scenes"]["jitter"] == 2


def test_encode_dataset_writes_renditions_at_other_scales(tmp_path, encode, world, image_tokenizer):
    """The same scenes, with everything where it is, at twice and at half the side."""
    store = encode(tmp_path, 6, large=True, small=True)
    assert store.header.fields == {"text": 48, "image": 64, "large": 256, "small": 16}
    assert store.header.layouts == ("generate", "caption", "upscale", "low_level")
    for number in range(6):
        scene = world.sample_scene(0, number)
        for name, side in (("image", 64), ("large", 128), ("small", 32)):
            image = world.render(scene, number, side / 64)
            assert image.shape == (side, side, 3)
            image = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255
            assert store[number][name].tolist() == image_tokenizer.encode(image).flatten().tolist()


class Edited:
    """Images of one grey, each made from a darker one by an instruction; ``lacks`` leaves these out."""

    side, names, is_shuffled, provenance = 64, (), True, {}

    def __init__(self, lacks: bool = False) -> None:
        self.lacks = lacks

    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> ImageExample:
        def grey(level: int):
            return lambda scale: np.full((int(64 * scale), int(64 * scale), 3), level, dtype=np.uint8)

        edit = {} if self.lacks else {"instruction": "两只狗", "render_source": grey(40 * index)}
        return ImageExample(identity=str(index), captions=("一只狗",), render=grey(200), **edit)


def test_encode_dataset_writes_source_and_instruction_of_an_edit(tmp_path, text_tokenizer, image_tokenizer):
    """Beside the image and its caption, so that one store feeds edits and the other tasks."""
    settings = EncodeSettings(text_width=9, source=True, batch_size=2)
    encode_dataset(tmp_path / "store", Edited(), text_tokenizer, image_tokenizer, settings)
    store = TokenStore(tmp_path / "store")
    assert store.header.fields == {"text": 9, "image": 64, "source": 64, "instruction": 9}
    assert store.header.layouts == ("generate", "caption", "edit")
    store.check_compatible(layout="fill")
    for number in range(5):
        row = store[number]
        for field, text in (("text", "一只狗"), ("instruction", "两只狗")):
            assert text_tokenizer.decode(row[field][row[field] != NO_TOKEN].tolist()) == text
        for field, level in (("image", 200), ("source", 40 * number)):
            pixels = torch.full((1, 3, 64, 64), level / 255)
            assert row[field].tolist() == image_tokenizer.encode(pixels).flatten().tolist()
    with pytest.raises(InputError, match="image 0 has no edit that leads to it, expected render_source and instruct"):
        encode_dataset(tmp_path / "other", Edited(lacks=True), text_tokenizer, image_tokenizer, settings)


def test_encode_dataset_writes_the_name_at_each_code(tmp_path, encode, world):
    names = [name for thing in world.things for name in thing.names]
    captions = [world.caption(world.sample_scene(0, index), index) for index in range(300)]
    tokenizer = TextTokenizer(train_text_tokenizer(captions, size=400, coverage=1.0, max_piece_length=1, words=names))
    store = encode(tmp_path, 40, named=True, text=tokenizer)
    assert store.header.fields == {"text": 48, "image": 64, "named": 64}
    seen = set()
    for number in range(40):
        scene, row = world.sample_scene(0, number), store[number]
        named = row["named"].reshape(8, 8)
        areas = {"beside": (named[:, :4], named[:, 4:]), "above": (named[:4], named[4:])}.get(scene.kind, (named,))
        for thing, area in zip(scene.things, areas, strict=True):
            (piece,) = set(area.ravel().tolist())
            assert piece in row["text"]
            assert tokenizer.decode([piece]) in thing.names
        seen.add(scene.kind)
    assert seen == set(PLAIN_KINDS)


def test_name_grid_is_empty_where_the_caption_has_no_name_of_an_object_or_two():
    left = NamedRegion(names=("狗", "小狗"), box=(0, 0, 0.5, 1))
    right = NamedRegion(names=("鱼",), box=(0.5, 0, 1, 1))
    names = {"狗": 7, "小狗": 8, "鱼": 9}
    for pieces, expected in (
        ([1, 8, 2, 9], [8, 9]),
        ([9, 1], [NO_TOKEN, 9]),
        ([7, 8], [NO_TOKEN, NO_TOKEN]),  # which of the two it is about cannot be known
    ):
        named = name_grid((left, right), pieces, names, grid=16).reshape(16, 16)
        assert [set(half.ravel().tolist()) for half in (named[:, :8], named[:, 8:])] == [{piece} for piece in expected]


def test_encode_dataset_refuses_names_of_several_pieces(tmp_path, encode):
    with pytest.raises(
        InputError, match=r"the name 红苹果 of an object takes 3 pieces.*whole_names: true, or encode with named: false"
    ):
        encode(tmp_path, 4, named=True)


def test_scene_weights_apply_to_training_scenes_alone(tmp_path, encode):
    pairs = SceneWeights(one=0, many=0, pair=1)
    trained, held_out = (
        encode(tmp_path / str(held_out), 12, held_out=held_out, weights=pairs) for held_out in (False, True)
    )
    assert trained.header.provenance["shares"] == {"one": 0, "many": 0, "pair": 1}
    assert held_out.header.provenance["shares"] == {"one": 1, "many": 1, "pair": 1}
    equal = everything(encode(tmp_path / "equal", 12, held_out=True))
    assert all(np.array_equal(everything(held_out)[name], equal[name]) for name in equal)
    assert not np.array_equal(everything(trained)["image"], everything(encode(tmp_path / "plain", 12))["image"])


@pytest.mark.parametrize("changes", [{"batch_size": 5}, {"num_workers": 2}], ids=str)
def test_encode_dataset_depends_neither_on_batches_nor_on_workers(tmp_path, encode, changes):
    alone, other = everything(encode(tmp_path / "a", 21)), everything(encode(tmp_path / "b", 21, **changes))
    assert all(np.array_equal(alone[name], other[name]) for name in alone)


def test_encode_dataset_continues_when_interrupted(tmp_path, encode, monkeypatch):
    append, calls = StoreWriter.append, []

    def interrupted(self, rows):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(append(self, rows))

    with monkeypatch.context() as patch:
        patch.setattr(StoreWriter, "append", interrupted)
        with pytest.raises(KeyboardInterrupt):
            encode(tmp_path / "halves", 30)
    assert len(TokenStore(tmp_path / "halves")) == 16
    rows = everything(encode(tmp_path / "halves", 30))
    whole = everything(encode(tmp_path / "whole", 30))
    assert all(np.array_equal(rows[name], whole[name]) for name in rows)


def test_encode_dataset_prints_its_progress_without_a_terminal(tmp_path, encode, monkeypatch, capsys):
    monkeypatch.setattr(module, "LINE_SECONDS", 0.0)
    encode(tmp_path / "store", 20)
    assert capsys.readouterr().err.splitlines() == [f"store: {count} of 20 rows" for count in (8, 16, 20)]


def test_encode_dataset_extends_a_finished_store_when_more_rows_are_requested(tmp_path, encode):
    before = everything(encode(tmp_path, 10))
    assert len(encode(tmp_path, 10)) == 10
    assert len(encode(tmp_path, 6)) == 10
    after = everything(encode(tmp_path, 14))
    assert all(np.array_equal(after[name][:10], before[name]) for name in before)


def test_encode_dataset_refuses_a_store_of_another_codebook(tmp_path, encode, image_tokenizer):
    encode(tmp_path, 4)
    other = VQVAE(image_tokenizer.config).eval()
    with pytest.raises(
        InputError, match=r"was started with codebook_sha256 .* now it is .*: remove the store, or resume"
    ):
        encode(tmp_path, 8, vqvae=other)
    assert len(TokenStore(tmp_path)) == 4


def test_encode_dataset_refuses_a_caption_longer_than_its_field(tmp_path, encode):
    with pytest.raises(InputError, match=r"has \d+ pieces, the store has room for 5: widen its text field"):
        encode(tmp_path, 4, text_width=5)


@pytest.mark.parametrize("name", ["rows", "held_out_rows", "text_width", "batch_size"])
def test_scene_encode_settings_refuse_numbers_below_one(name):
    with pytest.raises(ValueError, match=rf"{name} must be (at least 1|in \[1, \d+\]), got 0"):
        SceneEncodeSettings(**{"rows": 10, name: 0})


class NumberedSquares:
    """Three grey squares with one to three captions each."""

    side, names, is_shuffled, provenance = 32, (), False, {}

    def __len__(self):
        return 3

    def __getitem__(self, index):
        pixels = np.full((32, 32, 3), 80 * index, dtype=np.uint8)
        captions = ("一", "二", "三")[: index + 1]
        return ImageExample.from_pixels(pixels, side=self.side, identity=str(index), captions=captions)


def test_encode_dataset_repeats_examples_with_their_next_captions(tmp_path, text_tokenizer, image_tokenizer):
    dataset = NumberedSquares()
    encode_dataset(tmp_path, dataset, text_tokenizer, image_tokenizer, EncodeSettings(text_width=9, large=True), rows=8)
    store = TokenStore(tmp_path)
    texts = [text_tokenizer.decode(row[row != NO_TOKEN].tolist()) for row in everything(store)["text"]]
    assert texts == ["一", "一", "一", "一", "二", "二", "一", "一"]
    assert store.header.fields == {"text": 9, "image": 16, "large": 64}
    images = everything(store)["image"]
    assert np.array_equal(images[:3], images[3:6])


def test_encode_dataset_writes_a_row_per_example_by_default(tmp_path, text_tokenizer, image_tokenizer):
    encode_dataset(tmp_path, NumberedSquares(), text_tokenizer, image_tokenizer, EncodeSettings())
    assert len(TokenStore(tmp_path)) == 3


def test_encode_dataset_refuses_sides_that_are_no_multiple_of_a_code(tmp_path, text_tokenizer, image_tokenizer):
    class Odd(NumberedSquares):
        side = 24

    settings = EncodeSettings(small=True)
    message = "24 pixels have 3 codes on a side, but the task low_level needs a multiple of 2; .*: 16 and 32"
    with pytest.raises(InputError, match=message):
        encode_dataset(tmp_path, Odd(), text_tokenizer, image_tokenizer, settings)
