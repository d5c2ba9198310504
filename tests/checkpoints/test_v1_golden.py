"""A converted v1 checkpoint computes what the published CogView v1 computes.

``released.npz`` holds values computed by the published code (CPU, float32, checked against float64) on the weights of
``golden_release``: a transformer of 3 layers, width 64 and 4 heads over the full vocabulary, and a VQ-VAE of the
published shape. It is an excerpt: logits of some 130 ids at nine positions, a corner of an image, every third pixel of
another. Agreement to expect: 2e-4 on logits (they reach 20), 1e-3 on summed scores,
1e-5 on images, every token and code equal.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from cogview.checkpoints.precision import Precision
from cogview.checkpoints.safetensors_io import WeightsFile
from cogview.checkpoints.v1_convert import ALL_TASKS, import_v1
from cogview.pipeline.cogview import CogView

pytestmark = pytest.mark.slow

PROMPT = "一只可爱的小猫坐在窗台上"


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(Path(__file__).with_name("released.npz")) as arrays:
        wide = {np.dtype(np.uint16): np.int64}
        return {name: array.astype(wide.get(array.dtype, array.dtype)) for name, array in arrays.items()}


@pytest.fixture(scope="module")
def convert(golden_release, tmp_path_factory):
    """A function that writes v1 files with the given layout, converts them and returns the folder."""

    def convert(**layout):
        folder = tmp_path_factory.mktemp("released")
        files = golden_release.write(folder, **layout)
        import_v1(**files, output=folder / "ours", tasks=ALL_TASKS, precision=Precision(), num_heads=4)
        return folder / "ours"

    return convert


@pytest.fixture(scope="module")
def folder(convert):
    return convert()


@pytest.fixture(scope="module")
def model(folder) -> CogView:
    return CogView.from_pretrained(folder, device="cpu", dtype="float32")


def logits(model, ids, positions=None):
    """Return the logits (T, V) of (T,) ids."""
    with torch.inference_mode():
        return model.transformer(torch.from_numpy(ids)[None], None if positions is None else positions[None])[0]


def image_of(codes):
    """Return an image that carries its (1024,) codes, as generated images do."""
    image = Image.new("RGB", (256, 256))
    image.codes = codes.reshape(32, 32)
    return image


def assert_near(got, expected, atol):
    torch.testing.assert_close(got, torch.from_numpy(expected), atol=atol, rtol=0)


def test_v1_logits_of_text_to_image_equal_golden_values(model, golden):
    """The prompt 一只可爱的小猫坐在窗台上 and 1024 codes."""
    ids = golden["t2i_tokens"]
    got = logits(model, ids)
    nll = sum(
        F.cross_entropy(part, labels, reduction="sum").item()
        for part, labels in zip(got[:-1].split(128), torch.from_numpy(ids[1:]).split(128), strict=True)
    )
    chosen = got[golden["t2i_places"]]
    assert_near(chosen[:, golden["logit_ids"]], golden["t2i_logits"], atol=2e-4)
    assert chosen.argmax(dim=-1).tolist() == golden["t2i_best"].tolist()
    assert nll == pytest.approx(golden["t2i_nll"].item(), abs=0.05)  # 1033 positions


def test_v1_logits_of_super_resolution_equal_golden_values(model, golden):
    """Positions restart at [ROI2], as in the published training."""
    ids, roi2 = golden["sr_tokens"], int(golden["sr_roi2"])
    got = logits(model, ids, torch.cat([torch.arange(roi2), torch.arange(len(ids) - roi2)]))
    assert_near(got[golden["sr_places"]][:, golden["logit_ids"]], golden["sr_logits"], atol=2e-4)


def test_v1_scores_of_post_selection_equal_golden_values(model, golden):
    """Two images with the text 一只猫, two pieces long: log p of the text, among text and commands only."""
    rows = golden["score_tokens"]
    layout, text = model.config.layouts["score"], model.text_tokenizer.encode("一只猫")
    for row in rows:
        assert layout.arrange(model.vocabulary, image=row[2:1026], text=text).ids.tolist() == row.tolist()
    scores = model.score([image_of(row[2:1026]) for row in rows], "一只猫")
    assert [score.num_pieces for score in scores] == [2, 2]
    assert [score.log_probability for score in scores] == pytest.approx(golden["scores"].tolist(), abs=1e-3)


def test_v1_greedy_codes_equal_golden_values(model, golden):
    """The first 128 codes that the published sampler chooses with top-k 1."""
    expected = golden["greedy_tokens"]
    (image,) = model.generate(PROMPT, seed=0, top_k=1)
    assert image.codes.flat[:128].tolist() == expected[9:].tolist()
    assert len(set(expected[9:].tolist())) > 10


def test_v1_greedy_caption_equals_golden_values(model, golden):
    """The 20 pieces that the published sampler writes for an image with top-k 1."""
    expected = golden["caption_tokens"]
    ((caption,),) = model.caption([image_of(expected[2:1026])])
    assert caption.num_pieces == 20
    assert caption.text == model.text_tokenizer.decode((expected[-20:] - model.vocabulary.text.start).tolist())


def test_v1_super_resolution_equals_golden_values(model, golden):
    """All 4,096 codes of nine windows with top-k 1."""
    (image,) = model.upscale([image_of(golden["magnify_code"])], PROMPT, seed=0, top_k=1)
    assert image.codes.tolist() == golden["magnify_out"].tolist()
    assert image.size == (512, 512)


def test_v1_codes_of_an_image_equal_golden_values(model, golden):
    """The nine codes of a corner, whose receptive fields end within the 32 x 32 pixels."""
    codes = model.image_tokenizer.encode(torch.from_numpy(golden["image"]))
    assert codes[:, :3, :3].tolist() == golden["image_codes"].tolist()


def test_v1_image_of_codes_equals_golden_values(model, golden):
    codes, vqvae = torch.from_numpy(golden["codes"]), model.image_tokenizer
    with torch.inference_mode():
        pixels = vqvae.decode_vectors(vqvae.quantizer.lookup(codes))
    assert_near(pixels[:, :, ::3, ::3], golden["decoded"], atol=1e-5)
    assert torch.equal(vqvae.decode(codes), pixels.clamp(0, 1))  # the release leaves values outside [0, 1]


def test_v1_model_exposes_logits_codes_pieces_and_ids(model, golden):
    """Logits, codes, pieces and ids as a caller gets them."""
    assert logits(model, golden["t2i_tokens"][:9]).shape == (9, 58_240)
    assert logits(model, golden["t2i_tokens"][:9]).dtype == torch.float32
    pieces = model.text_tokenizer.encode(PROMPT)
    assert [id + 8192 for id in pieces] == golden["greedy_tokens"][1:7].tolist()
    assert model.text_tokenizer.decode(pieces) == PROMPT
    codes = model.image_tokenizer.encode(torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)))
    assert (codes.shape, codes.dtype) == ((1, 8, 8), torch.int64)
    assert model.image_tokenizer.decode(codes).shape == (1, 3, 64, 64)
    vocabulary = model.vocabulary
    assert (vocabulary.image.start, vocabulary.text.start, vocabulary.size) == (0, 8192, 58_219)
    assert (vocabulary.command("[PAD]"), vocabulary.command("[POS0]")) == (58_192, 58_210)


def test_v1_half_precision_is_kept_within_its_rounding_error(convert, golden):
    """Each weight is off by up to 2**-11 of itself, which is 0.01 of a logit of 20.

    Twelve matrices, two embeddings and the output add such errors, which are independent: 0.01 * sqrt(15) = 0.04.
    """
    folder = convert(half=True)
    assert {spec.dtype for spec in WeightsFile(folder / "model.safetensors").specs.values()} == {torch.float16}
    model = CogView.from_pretrained(folder, device="cpu", dtype="float32")
    got = logits(model, golden["t2i_tokens"])[golden["t2i_places"]][:, golden["logit_ids"]]
    assert_near(got, golden["t2i_logits"], atol=0.04)
    assert (got - torch.from_numpy(golden["t2i_logits"])).abs().max() > 1e-3


@pytest.mark.parametrize(
    "layout",
    [{"shards": 2, "prefix": "module."}, {"shards": 4, "tracker": "release"}, {"prefix": "module.module."}],
    ids=["two shards with a prefix", "four shards of a release", "two prefixes"],
)
def test_v1_layouts_of_the_files_give_the_same_model(convert, folder, layout):
    other = convert(**layout)
    for name in ("config.json", "model.safetensors", "text.model", "image/config.json", "image/model.safetensors"):
        assert (other / name).read_bytes() == (folder / name).read_bytes(), name
