"""Pairs of images: their measures, intervals and items, and pairs that are refused."""

import numpy as np
import pytest
import torch
from PIL import Image

from cogview.errors import InputError
from cogview.evaluation.image_pairs import as_pixels, mean_interval, measure_pairs
from cogview.evaluation.image_sets import open_image_set
from cogview.evaluation.image_statistics import SquareResize
from cogview.evaluation.lpips import AlexNetDistance, _alexnet


@pytest.fixture
def measure(tmp_path):
    """Return a function that writes images by key into two folders and measures their pairs."""

    def run(candidates, references, prepare=as_pixels, **options):
        notes = []
        for name, images in (("a", candidates), ("b", references)):
            (tmp_path / name).mkdir(exist_ok=True)
            for key, pixels in images.items():
                Image.fromarray(pixels).save(tmp_path / name / f"{key}.png")
        sets = [open_image_set(tmp_path / name, lambda: None) for name in "ab"]
        return measure_pairs(*sets, prepare, notes=notes, **options), notes

    return run


def flat(value, size=(16, 16)):
    return np.full((*size, 3), value, np.uint8)


def test_pairs_are_matched_by_name_and_measured(measure):
    report, notes = measure({"x": flat(100), "y": flat(100)}, {"x": flat(100), "y": flat(151)})
    assert report.keys == ["x", "y"]
    error = 10 * np.log10(25)  # 51 levels are a fifth of the range
    assert report.values["psnr"] == pytest.approx([100.0, error])
    results = report.results()
    assert results["psnr"].value == pytest.approx((100 + error) / 2)
    assert results["psnr"].low < results["psnr"].value < results["psnr"].high
    assert (results["psnr"].unit, results["psnr"].n) == ("dB", 2)
    assert list(results) == ["psnr", "ssim"]
    assert notes == ["MS-SSIM is left out: it needs sides of 176 pixels, the smallest is 16"]
    assert report.items().ids == ["x", "y"]
    assert report.candidate.sha256 != report.reference.sha256


def test_large_pairs_have_ms_ssim_and_a_single_pair_no_interval(measure):
    report, notes = measure({"x": flat(100, (176, 180))}, {"x": flat(100, (176, 180))})
    results = report.results()
    assert notes == []
    assert results["ms_ssim"].value == pytest.approx(1)
    assert results["ms_ssim"].low is None


def test_pairs_of_different_sizes_are_refused_or_resized(measure):
    images = {"x": flat(9, (16, 20))}, {"x": flat(9, (16, 24))}
    with pytest.raises(InputError, match="different sizes, 20 x 16 and 24 x 16; resize both with --side: x"):
        measure(*images)
    assert measure(*images, prepare=SquareResize(side=16))[0].values["psnr"] == [100.0]
    with pytest.raises(InputError, match="SSIM needs sides of at least 11 pixels, got 9 x 30"):
        measure({"x": flat(9, (30, 9))}, {"x": flat(9, (30, 9))})


def test_broken_pairs_are_named_and_others_measured(measure, tmp_path):
    images = {"x": flat(1), "y": flat(2)}
    measure(images, images)
    (tmp_path / "b" / "x.png").write_bytes(b"nothing")
    report, _ = measure({}, {})
    assert report.keys == ["y"]
    assert "x.png is no image" in report.problems[0]
    (tmp_path / "a" / "y.png").write_bytes(b"nothing")
    with pytest.raises(InputError, match="no pair can be used; the first problem: "):
        measure({}, {})


def test_mean_interval_is_that_of_the_normal_approximation():
    values = np.random.default_rng(0).normal(size=2000)
    low, high = mean_interval(values)
    half = 1.96 * values.std() / len(values) ** 0.5
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.15 * half)


@pytest.fixture
def lpips_files(tmp_path):
    """Random weights of AlexNet and of the layers' weights: files and networks."""
    torch.manual_seed(0)
    layers = _alexnet()
    heads = {
        f"lin{number}.model.1.weight": torch.rand(1, size, 1, 1) for number, size in enumerate((64, 192, 384, 256, 256))
    }
    backbone = {f"features.{name}": each for name, each in layers.state_dict().items()}
    torch.save({**backbone, "classifier.1.weight": torch.zeros(2)}, tmp_path / "alexnet.pth")
    torch.save(heads, tmp_path / "heads.pth")
    return tmp_path / "alexnet.pth", tmp_path / "heads.pth", layers, list(heads.values())


def test_lpips_equals_its_formula(lpips_files):
    backbone, heads, layers, weights = lpips_files
    distance = AlexNetDistance(backbone, torch.device("cpu"), heads)
    image, other = np.random.default_rng(0).integers(0, 256, (2, 40, 48, 3), dtype=np.uint8)
    expected, hidden = 0.0, []
    for each in (image, other):
        scaled = (each / 127.5 - 1 - [-0.030, -0.088, -0.188]) / [0.458, 0.448, 0.450]
        hidden.append(torch.from_numpy(scaled).float().movedim(2, 0)[None])
    with torch.no_grad():
        for number, layer in enumerate(layers):
            hidden = [layer(each) for each in hidden]
            if number in (1, 4, 7, 9, 11):
                one, two = (each / each.norm(dim=1, keepdim=True) for each in hidden)
                expected += float(
                    ((one - two) ** 2 * weights[(1, 4, 7, 9, 11).index(number)].view(1, -1, 1, 1)).sum(1).mean()
                )
    assert distance(image, other) == pytest.approx(expected, rel=1e-4)
    assert distance(image, image) == 0
    with pytest.raises(InputError, match="LPIPS needs sides of at least 32 pixels, got 20"):
        distance(image[:20], other[:20])


def test_lpips_refuses_weights_of_another_network(lpips_files):
    backbone, heads, *_ = lpips_files
    with pytest.raises(InputError, match=r"heads\.pth has weights of another network than alexnet"):
        AlexNetDistance(heads, torch.device("cpu"), heads)
    with pytest.raises(InputError, match=r"alexnet\.pth has weights of another network than LPIPS"):
        AlexNetDistance(backbone, torch.device("cpu"), backbone)
