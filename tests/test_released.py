"""What the released CogView v1 computes, our transformer, engine and VQ-VAE compute too.

``released.npz`` holds values computed by the released code (CPU, float32, checked against float64) on the weights that
``transformer_weights`` and ``vqvae_weights`` make here by the same recipe: a transformer of 3 layers, width 64 and
4 heads over the full vocabulary, and a VQ-VAE of the released shape. It is an excerpt: logits of some 130 ids at nine
places, a corner of an image, every third pixel of another. Agreement to expect: 2e-4 on logits (they reach 20), 1e-3
on summed scores, 1e-5 on images, every token and code equal.
"""

# B batch, T positions, V ids

import math
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from cogview.config import TransformerConfig
from cogview.engine import Job, fill, score
from cogview.sampling import GREEDY
from cogview.tokenizers.layouts import layouts, upscale_windows
from cogview.tokenizers.vocabulary import Vocabulary
from cogview.transformer import Transformer
from cogview.vqvae.model import VQVAE, VQVAEConfig

# Our name of each module, and the released one, which the recipe's random numbers are keyed by.
TRANSFORMER_NAMES = {"embedding": "word_embeddings", "positions": "transformer.position_embeddings"}
TRANSFORMER_NAMES["final_norm"] = "transformer.final_layernorm"
LAYER_NAMES = {
    "attention_norm": "input_layernorm",
    "attention.query_key_value": "attention.query_key_value",
    "attention.output": "attention.dense",
    "attention_output_norm": "third_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "mlp.input": "mlp.dense_h_to_4h",
    "mlp.output": "mlp.dense_4h_to_h",
    "mlp_output_norm": "fourth_layernorm",
}
for _number in range(3):
    for _ours, _released in LAYER_NAMES.items():
        TRANSFORMER_NAMES[f"layers.{_number}.{_ours}"] = f"transformer.layers.{_number}.{_released}"


def normal(name: str, shape: torch.Size, std: float) -> torch.Tensor:
    """N(0, std) noise that depends on the released name of the tensor alone."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"0:{name}".encode()))
    return torch.randn(shape, generator=generator) * std


def transformer_weights(transformer: Transformer) -> dict[str, torch.Tensor]:
    weights = {}
    for ours, parameter in transformer.state_dict().items():
        module, _, kind = ours.rpartition(".")
        name, shape = f"{TRANSFORMER_NAMES[module]}.{kind}", parameter.shape
        if name.endswith("layernorm.weight"):
            weights[ours] = 1 + normal(name, shape, 0.1)
        elif kind == "bias":
            weights[ours] = normal(name, shape, 0.02)
        elif module in ("positions", "embedding"):
            weights[ours] = normal(name, shape, 2.0 if module == "positions" else 0.5)
        else:
            weights[ours] = normal(name, shape, 2.0 / math.sqrt(shape[1]))
    return weights


def vqvae_weights(vqvae: VQVAE) -> dict[str, torch.Tensor]:
    weights = {}
    for ours, parameter in vqvae.state_dict().items():
        name = ours.replace("encoder.", "enc_b.blocks.").replace("decoder.", "dec.blocks.")
        shape = parameter.shape
        if ours == "quantizer.codebook":  # one code per column in the release
            weights[ours] = normal("quantize_t.embed", shape[::-1], 0.6).T.contiguous()
        elif name.endswith("bias"):
            weights[ours] = normal(name, shape, 0.1)
        else:
            transposed = name.startswith("dec") and shape[-1] > 1
            fan = shape[0] * 4 if transposed else math.prod(shape[1:])
            weights[ours] = normal(name, shape, math.sqrt(2.0 / fan))
    return weights


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(Path(__file__).with_name("released.npz")) as arrays:
        wide = {np.dtype(np.uint16): np.int64}
        return {name: array.astype(wide.get(array.dtype, array.dtype)) for name, array in arrays.items()}


@pytest.fixture(scope="module")
def transformer() -> Transformer:
    transformer = Transformer(TransformerConfig(num_layers=3, width=64, num_heads=4, vocabulary_size=58_240)).eval()
    transformer.load_state_dict(transformer_weights(transformer))
    return transformer


@pytest.fixture(scope="module")
def vqvae() -> VQVAE:
    vqvae = VQVAE(VQVAEConfig.released()).eval()
    vqvae.load_state_dict(vqvae_weights(vqvae))
    return vqvae


def assert_near(got, expected, atol):
    torch.testing.assert_close(got, torch.from_numpy(expected), atol=atol, rtol=0)


def test_logits_of_text_to_image(transformer, golden):
    """一只可爱的小猫坐在窗台上, and 1024 codes."""
    ids = torch.from_numpy(golden["t2i_tokens"])[None]
    with torch.inference_mode():
        hidden = transformer.hidden(ids)[0]
        logits = transformer.head(hidden[golden["t2i_places"]])
        nll = sum(
            F.cross_entropy(transformer.head(part), labels, reduction="sum").item()
            for part, labels in zip(hidden[:-1].split(128), ids[0, 1:].split(128), strict=True)
        )
    assert_near(logits[:, golden["logit_ids"]], golden["t2i_logits"], atol=2e-4)
    assert logits.argmax(dim=-1).tolist() == golden["t2i_best"].tolist()
    assert nll == pytest.approx(golden["t2i_nll"].item(), abs=0.05)  # 1033 places


def test_logits_of_super_resolution(transformer, golden):
    """Positions restart at [ROI2], as in the released training."""
    ids, roi2 = torch.from_numpy(golden["sr_tokens"])[None], int(golden["sr_roi2"])
    positions = torch.cat([torch.arange(roi2), torch.arange(ids.shape[1] - roi2)])[None]
    with torch.inference_mode():
        logits = transformer.head(transformer.hidden(ids, positions)[0, golden["sr_places"]])
    assert_near(logits[:, golden["logit_ids"]], golden["sr_logits"], atol=2e-4)


def test_scores_of_post_selection(transformer, golden):
    """Two images with the text 一只猫, two pieces long: log p of the text, among text and commands alone."""
    ids, vocabulary = torch.from_numpy(golden["score_tokens"]), Vocabulary()
    layout, text = layouts(32)["score"], ids[0, -2:].numpy() - vocabulary.text.start
    rows = [layout.arrange(vocabulary, image=row[2:1026].numpy(), text=text) for row in ids]
    for row, expected in zip(rows, ids, strict=True):
        assert row.ids.tolist() == expected.tolist()
    assert score(transformer, vocabulary, rows) == pytest.approx(golden["scores"].tolist(), abs=1e-3)


def test_greedy_codes(transformer, golden):
    """The first 128 codes that the released sampler draws with top-k 1."""
    vocabulary, expected = Vocabulary(), golden["greedy_tokens"]
    text = expected[1:7] - vocabulary.text.start
    row = layouts(32)["generate"].arrange(vocabulary, text=text, image=[None] * 128 + [0] * 896)
    assert row.ids[:9].tolist() == expected[:9].tolist()
    (filled,) = fill(transformer, vocabulary, [Job(row=row, seed=0, sampling=GREEDY)])
    assert filled.ids[:137].tolist() == expected.tolist()
    assert len(set(expected[9:].tolist())) > 10


def test_a_greedy_caption(transformer, golden):
    """The 20 pieces that the released sampler writes of an image with top-k 1."""
    vocabulary, expected = Vocabulary(), golden["caption_tokens"]
    row = layouts(32)["caption"].arrange(vocabulary, image=expected[2:1026], text=[None] * 20)
    assert row.ids[:1028].tolist() == expected[:1028].tolist()
    (filled,) = fill(transformer, vocabulary, [Job(row=row, seed=0, sampling=GREEDY)])
    assert filled.ids[: len(expected)].tolist() == expected.tolist()


@pytest.mark.parametrize("number", [0, 3, 8])
def test_two_lines_of_a_super_resolution_window(transformer, golden, number):
    """The next 64 codes of a window with top-k 1, after all that the windows before it drew."""
    vocabulary, windows, out = Vocabulary(), upscale_windows(32), golden["magnify_out"]
    codes = np.ma.masked_all(out.shape, dtype=np.int64)
    for window in windows[:number]:
        codes[window.target] = out[window.target]
    rows, columns = windows[number].target
    target = (slice(rows.start, rows.start + 32), columns)
    row = layouts(32)["upscale"].arrange(
        vocabulary,
        text=golden["greedy_tokens"][1:7] - vocabulary.text.start,
        small=golden["magnify_code"].reshape(32, 32)[windows[number].source],
        image=codes[target],
    )
    first_unknown = int(np.flatnonzero(row.blanks)[0])
    row = row.cut(first_unknown + 64)
    (filled,) = fill(transformer, vocabulary, [Job(row=row, seed=0, sampling=GREEDY)])
    image = row.spans["image"]
    assert filled.ids[image].tolist() == out[target].reshape(-1)[: image.stop - image.start].tolist()
    assert row.blanks.sum() > 20


def test_codes_of_an_image(vqvae, golden):
    """The nine codes of a corner, which see nothing beyond its 32 x 32 pixels."""
    codes = vqvae.encode(torch.from_numpy(golden["image"]))
    assert codes[:, :3, :3].tolist() == golden["image_codes"].tolist()


def test_image_of_codes(vqvae, golden):
    with torch.inference_mode():
        pixels = vqvae.pixels(vqvae.quantizer.vectors_of(torch.from_numpy(golden["codes"])))
    assert_near(pixels[:, :, ::3, ::3], golden["decoded"], atol=1e-5)
    images = vqvae.decode(torch.from_numpy(golden["codes"]))
    assert torch.equal(images, pixels.clamp(0, 1))  # the release leaves values outside [0, 1]
