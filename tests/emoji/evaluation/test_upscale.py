"""Protocol of ``cogview eval upscale``: planted enlargements get exact metrics."""

# B batch, H W pixels

import math
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from cogview.checkpoints.checkpoint import NamedThing
from cogview.config_io import to_mapping
from cogview.emoji.evaluation.scenes import held_out_scenes
from cogview.emoji.evaluation.upscale import (
    border_mask,
    evaluate_upscale,
    expected_under_reference,
    format_upscale_report,
    window_owners,
)
from cogview.errors import InputError
from cogview.evaluation.metrics import ssim
from cogview.modeling.config import Sampling
from cogview.vqvae.codec import psnr
from cogview.vqvae.model import VQVAE, VQVAEConfig

COUNT, SEED = 5, 11


def off_by(images: np.ndarray, error: int | np.ndarray) -> np.ndarray:
    """Every byte further from its nearer end of the range by ``error``, so that none is clipped."""
    return np.where(images > 127, images - error, images + error).astype(np.uint8)


class Mirror(VQVAE):
    """An image tokenizer that restores what it has seen, every byte off by 4."""

    def __init__(self) -> None:
        super().__init__(VQVAEConfig(channels=(4, 4, 4), num_codes=64))
        self.seen = torch.empty(0)

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        self.seen = images
        return torch.zeros(len(images), 8, 8, dtype=torch.long)

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(off_by((self.seen * 255).round().byte().numpy(), 4)).float() / 255


class Enlarger:
    """Decodes small images with every byte off by 2, and enlarges scene i to ``enlarge(true large image)``."""

    name = "enlarger"

    def __init__(self, world, enlarge, *, tasks=("upscale",)) -> None:
        self.config = SimpleNamespace(grid=8)
        self.things = tuple(NamedThing(name=thing.name) for thing in world.things)
        self.image_tokenizer = Mirror()
        self.tasks = tasks
        asked = held_out_scenes(world, COUNT, SEED)
        self.captions = [caption for _, caption in asked]
        self.small = np.stack([world.render(scene, number) for number, (scene, _) in enumerate(asked)])
        self.large = np.stack([world.render(scene, number, scale=2) for number, (scene, _) in enumerate(asked)])
        self.enlarged = np.stack([enlarge(image) for image in self.large])
        self.calls: list[dict[str, object]] = []

    def require_task(self, task):
        if task not in self.tasks:
            raise InputError(f"enlarger was not trained for the task {task!r}")

    def encode_images(self, images):
        numbers = [next(n for n, row in enumerate(self.small) if np.array_equal(row, image)) for image in images]
        return np.broadcast_to(np.array(numbers)[:, None, None], (len(images), 8, 8))

    def decode_images(self, codes):
        return off_by(self.small[codes[:, 0, 0]], 2)

    def upscale(self, images, texts, *, callback, **settings):
        assert [np.array_equal(image, row) for image, row in zip(images, self.small, strict=True)] == [True] * COUNT
        assert texts == self.captions
        callback(SimpleNamespace(done=1, total=2))
        callback(SimpleNamespace(done=2, total=2))
        self.calls.append(settings)
        return [Image.fromarray(image) for image in self.enlarged]


def evaluate(model, world, batch_size=2):
    sampling = Sampling(temperature=0.5, top_k=3)
    return evaluate_upscale(model, world, count=COUNT, seed=SEED, sampling=sampling, batch_size=batch_size)


@pytest.fixture
def world(make_tiny_world):
    return make_tiny_world()


# Where windows meet


def test_window_owners_are_the_first_windows_by_hand():
    by_hand = (
        ["0000000011112222"] * 5  # the first window stops after 5 lines, the others of its row after 8
        + ["4444111111112222"] * 3
        + ["4444333333335555"] * 4
        + ["6666666677778888"] * 4
    )
    assert ["".join(map(str, line)) for line in window_owners(8)] == by_hand


@pytest.mark.parametrize("grid", [8, 16, 32])
def test_border_mask_has_four_pixels_on_either_side(grid):
    owners, near = window_owners(grid), border_mask(grid, 8)
    assert near.shape == (16 * grid, 16 * grid)
    last = 2 * grid - 1
    for y in range(2 * grid):
        for x in range(2 * grid):
            row = owners[y, x]
            expected = np.zeros((8, 8), dtype=bool)
            expected[:4] |= y > 0 and owners[y - 1, x] != row
            expected[4:] |= y < last and owners[y + 1, x] != row
            expected[:, :4] |= x > 0 and owners[y, x - 1] != row
            expected[:, 4:] |= x < last and owners[y, x + 1] != row
            assert (near[8 * y : 8 * y + 8, 8 * x : 8 * x + 8] == expected).all()


def test_border_mask_of_the_smallest_grid_by_hand():
    near = border_mask(8, 8)
    # Along the top line: borders before columns 8 and 12 of codes, at pixels 64 and 96.
    assert np.flatnonzero(near[0]).tolist() == [*range(60, 68), *range(92, 100)]
    # Down the left edge: borders before lines 5 and 12, at pixels 40 and 96.
    assert np.flatnonzero(near[:, 0]).tolist() == [*range(36, 44), *range(92, 100)]
    # Down column 6 of codes: windows 0, 1, 3, 6 meet before lines 5, 8 and 12.
    assert np.flatnonzero(near[:, 52]).tolist() == [*range(36, 44), *range(60, 68), *range(92, 100)]


# The protocol


def test_evaluate_upscale_measures_planted_errors(world):
    near = border_mask(8, 8)[:, :, None]
    model = Enlarger(world, lambda image: off_by(image, np.where(near, 6, 3)))
    report, images = evaluate(model, world)

    share = near.mean()
    row = report["large_pictures"]["ours"]["psnr"]
    assert row["value"] == pytest.approx(10 * math.log10(255**2 / (36 * share + 9 * (1 - share))))
    assert row["low"] == pytest.approx(row["value"])  # every image has the same errors
    assert row["high"] == pytest.approx(row["value"])
    assert report["large_pictures"]["vq_ceiling"]["psnr"]["value"] == pytest.approx(20 * math.log10(255 / 4))
    seam = report["seam"]
    assert seam["ours"]["value"] == pytest.approx(4)
    assert seam["vq_ceiling"]["value"] == pytest.approx(1)
    assert seam["quotient"]["value"] == pytest.approx(4)
    assert seam["quotient"]["low"] == pytest.approx(4)

    side, bicubic = model.large.shape[1], Image.Resampling.BICUBIC
    for name, small in (("bicubic", off_by(model.small, 2)), ("bicubic_of_true", model.small)):
        enlarged = [np.asarray(Image.fromarray(image).resize((side, side), bicubic)) for image in small]
        metrics = report["large_pictures"][name]
        values = {
            "psnr": [psnr(a, b) for a, b in zip(enlarged, model.large, strict=True)],
            "ssim": [ssim(a, b) for a, b in zip(enlarged, model.large, strict=True)],
        }
        for metric, expected in values.items():
            assert metrics[metric]["value"] == pytest.approx(np.mean(expected))
            assert min(expected) <= metrics[metric]["low"] < metrics[metric]["value"] < metrics[metric]["high"]
            gain = report["large_pictures"]["ours"][metric]["value"] - np.mean(expected)
            if name == "bicubic":
                assert report["gain_over_bicubic"][metric]["value"] == pytest.approx(gain)

    shown = np.stack(images).reshape(COUNT, 4, 128, 128, 3)
    assert (shown[:, 0, ::2, ::2] == off_by(model.small, 2)).all()
    assert (shown[:, 0, 1::2, 1::2] == shown[:, 0, ::2, ::2]).all()
    assert (shown[:, 2] == model.enlarged).all()
    assert (shown[:, 3] == model.large).all()


def test_expected_under_reference_allows_for_images_that_are_harder_at_borders():
    reference = np.array([[20.0, 1.0], [10.0, 2.0]])  # near and elsewhere, of two images
    ours = reference * [5.0, 1.0]  # the first has a larger error, and not more so near borders
    np.testing.assert_allclose(expected_under_reference(ours, reference, 0.3), ours)
    seam = ours * [[1.5], [1.0]]
    near, elsewhere = seam.sum(axis=1) / expected_under_reference(seam, reference, 0.3).sum(axis=1)
    assert near / elsewhere == pytest.approx(1.5, rel=0.05)
    np.testing.assert_allclose([0.3, 0.7] @ expected_under_reference(seam, reference, 0.3), [0.3, 0.7] @ seam)


def test_evaluate_upscale_compares_reduced_images_with_decoded_codes(world):
    # An image that repeats every pixel of the decoded small image, which is off by 2, is consistent with it.
    model = Enlarger(world, lambda image: image)
    model.enlarged = off_by(model.small, 2).repeat(2, axis=1).repeat(2, axis=2)
    assert evaluate(model, world)[0]["large_pictures"]["ours"]["consistency"]["value"] == 100
    model.enlarged = off_by(model.small, 3).repeat(2, axis=1).repeat(2, axis=2)
    report, _ = evaluate(model, world)
    assert report["large_pictures"]["ours"]["consistency"]["value"] == pytest.approx(20 * math.log10(255))


def test_evaluate_upscale_describes_its_protocol(world):
    model = Enlarger(world, lambda image: off_by(image, 1))
    reports = [evaluate(model, world, batch_size=size)[0] for size in (2, 100)]
    assert reports[0] == reports[1]
    asked = asdict(Sampling(temperature=0.5, top_k=3))
    assert model.calls == [{"seed": SEED, "batch_size": size, **asked} for size in (2, 100)]
    made = reports[0]["protocol"]
    recorded = to_mapping(Sampling(temperature=0.5, top_k=3))
    assert (made["captions"], made["seed"], made["model"], made["sampling"]) == (COUNT, SEED, "enlarger", recorded)


def test_evaluate_upscale_refuses_a_model_without_the_task(world):
    model = Enlarger(world, lambda image: image, tasks=("generate", "caption"))
    with pytest.raises(InputError, match="upscale"):
        evaluate(model, world)
    assert model.calls == []


def test_evaluate_upscale_measures_a_real_model(make_tiny_world, tiny_model):
    report, images = evaluate_upscale(
        tiny_model, make_tiny_world(things=4), count=2, seed=0, sampling=tiny_model.sampling(), batch_size=2
    )
    assert [image.shape for image in images] == [(128, 128, 3)] * 8
    ours = report["large_pictures"]["ours"]
    assert 0 < ours["psnr"]["value"] < 30
    assert 0 < report["seam"]["ours"]["value"] < math.inf


def test_format_upscale_report_is_a_table():
    metric = {"value": 25.126, "low": 24.9, "high": 25.31}
    names = ("ours", "bicubic", "bicubic_of_true", "vq_ceiling")
    report = {
        "protocol": {"captions": 500},
        "large_pictures": {name: dict.fromkeys(("psnr", "ssim", "consistency"), metric) for name in names},
        "gain_over_bicubic": {"psnr": {"value": -0.5, "low": -0.75, "high": 0.25}, "ssim": metric},
        "seam": {name: {"value": 1.0421, "low": 1.0, "high": 1.1} for name in ("ours", "vq_ceiling", "quotient")},
    }
    lines = format_upscale_report(report).splitlines()
    assert lines[2] == "| upscaled | 25.13 (24.90 to 25.31) | 25.126 (24.900 to 25.310) | 25.13 (24.90 to 25.31) |"
    assert [line.split(" | ")[0] for line in lines[3:6]] == [
        "| bicubic, of the decoded codes",
        "| bicubic, of the true small image",
        "| VQ-VAE's reconstruction of the true large image",
    ]
    assert "Over 500 held-out scenes, upscaled less bicubic is -0.50 (-0.75 to 0.25) dB" in lines[7]
    assert lines[8].startswith("Squared error within 4 pixels of window borders over that elsewhere: 1.042 (1.000 to")
