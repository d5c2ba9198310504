"""Statistics of sets: independence of batches and processes, blur, and sets that leave nothing to compare."""

from pathlib import Path

import numpy as np
import pytest

from cogview.errors import InputError
from cogview.evaluation import image_statistics
from cogview.evaluation.features import StubNetwork
from cogview.evaluation.image_sets import open_image_set
from cogview.evaluation.image_statistics import (
    ImageProtocol,
    SquareResize,
    distribution_results,
    gaussian_blur,
    kernel_subset_size,
    measure_blurs,
    measure_set,
)
from cogview.evaluation.manifest import BlurRecord

PROTOCOL = ImageProtocol(resize=SquareResize(side=32))


@pytest.fixture
def sets(tmp_path, save_image):
    """Folders of 20 and of 15 pictures."""
    for number in range(20):
        save_image(tmp_path / f"a/{number:02d}.png", number)
        if number < 15:
            save_image(tmp_path / f"b/{number:02d}.png", 3 * number + 1)
    return [open_image_set(tmp_path / name, lambda: None) for name in "ab"]


def measure(sets, protocol=PROTOCOL, workers=0):
    network, notes = StubNetwork(), []
    a, b = (
        measure_set(each, network, protocol, is_reference=number == 1, workers=workers)
        for number, each in enumerate(sets)
    )
    return distribution_results(a, b, protocol, notes), notes, a, b


def test_results_have_values_counts_and_intervals(sets):
    results, notes, a, b = measure(sets)
    assert list(results) == ["fid", "kid", "precision", "recall", "inception_score"]
    assert (a.record.count, b.record.count, kernel_subset_size(a, b, 10_000)) == (20, 15, 7)
    assert [each.n for each in results.values()] == [15, 15, 15, 15, 20]
    for name in ("kid", "inception_score"):
        assert results[name].low <= results[name].value <= results[name].high
    assert [note.split(":")[0] for note in notes] == ["rank-deficient"]  # 48 dimensions
    assert "quote KID" in notes[0]
    assert notes[0].endswith("Pictures of the smaller set: 15")


def test_distances_have_intervals_unless_a_fold_is_rank_deficient(tmp_path, save_image, sets):
    for number in range(60):
        save_image(tmp_path / f"many/{number:02d}.png", number)
    many = open_image_set(tmp_path / "many", lambda: None)
    results, notes, *_ = measure([many, many])
    assert (results["fid"].low, notes) == (0, [])
    assert results["precision"].low <= results["precision"].value == results["precision"].high == 1
    results, *_ = measure([many, sets[0]])  # 48 dimensions, 20 pictures
    assert results["fid"].low is results["fid"].high is None
    assert 0 <= results["recall"].low <= results["recall"].value <= results["recall"].high <= 1
    results, *_ = measure([many, sets[1]])  # too few for blocks
    assert results["recall"].low is None


def test_measure_blurs_equals_separate_passes_and_reads_once(sets):
    """FID-k reads each picture once; the statistics are those of a pass for each blur."""
    read = []
    network, sigmas = StubNetwork(), (0, 1, 4)
    found = measure_blurs(sets[0], network, PROTOCOL, sigmas, on_image=lambda: read.append(1))
    assert len(read) == 20
    for sigma, each in zip(sigmas, found, strict=True):
        protocol = ImageProtocol(resize=PROTOCOL.resize, blur=BlurRecord(sigma=sigma, which="both"))
        alone = measure_set(sets[0], network, protocol, is_reference=True)
        assert (each.statistics.moments.mean == alone.statistics.moments.mean).all()
        assert (each.statistics.moments.scatter == alone.statistics.moments.scatter).all()
        assert each.record == alone.record
    assert (found[0].statistics.moments.mean != found[1].statistics.moments.mean).any()


def test_equal_sets_have_no_distance(sets):
    results, *_ = measure([sets[0], sets[0]])
    assert results["fid"].value == pytest.approx(0, abs=1e-9)
    assert results["precision"].value == results["recall"].value == 1


def test_results_do_not_depend_on_batches(sets, monkeypatch):
    expected = {name: each.value for name, each in measure(sets)[0].items()}
    monkeypatch.setattr(image_statistics, "BATCH", 3)
    found = {name: each.value for name, each in measure(sets)[0].items()}
    assert found == pytest.approx(expected, rel=1e-9)


@pytest.mark.multiprocess
def test_results_of_two_processes_equal_those_of_one(sets):
    assert measure(sets, workers=2)[0] == measure(sets)[0]


def test_sample_is_bounded_and_follows_the_seed(sets):
    protocols = [ImageProtocol(resize=PROTOCOL.resize, sample=8, seed=seed) for seed in (0, 0, 1)]
    first, again, other = (measure(sets, protocol)[0] for protocol in protocols)
    assert first == again
    assert first["kid"].n == 8
    assert first["kid"].value != other["kid"].value
    assert first["fid"] == other["fid"]  # of all pictures


def test_blur_of_the_reference_alone(sets):
    both, reference = (
        ImageProtocol(resize=PROTOCOL.resize, blur=BlurRecord(sigma=4, which=which)) for which in ("both", "reference")
    )
    equal = [sets[0], sets[0]]
    assert measure(equal, both)[0]["fid"].value == pytest.approx(0, abs=1e-9)
    assert measure(equal, reference)[0]["fid"].value > 1e-4


@pytest.mark.parametrize("sigma", [0.5, 2.0, 8.0])
def test_gaussian_blur_equals_that_of_scipy(sigma):
    ndimage = pytest.importorskip("scipy.ndimage")
    pixels = np.random.default_rng(0).integers(0, 256, (2, 20, 13, 3), dtype=np.uint8)
    expected = ndimage.gaussian_filter(pixels.astype(float), (0, sigma, sigma, 0), mode="reflect", truncate=4)
    assert np.abs(gaussian_blur(pixels, sigma).astype(float) - expected).max() < 0.51
    assert gaussian_blur(pixels, 0) is pixels


def test_gaussian_blur_keeps_flat_images_and_the_mean_of_a_point():
    flat = np.full((1, 9, 9, 3), 77, np.uint8)
    np.testing.assert_array_equal(gaussian_blur(flat, 3), flat)
    point = np.zeros((1, 31, 31, 3), np.uint8)
    point[0, 15, 15] = 255
    assert gaussian_blur(point, 1)[0, 15, 15, 0] == round(255 / (2 * np.pi))


def test_sets_without_a_distribution_are_refused(tmp_path, save_image):
    def measured(name):
        return measure_set(open_image_set(tmp_path / name, lambda: None), StubNetwork(), PROTOCOL, is_reference=False)

    save_image(tmp_path / "one/0.png")
    with pytest.raises(InputError, match="one has a single picture; distances of sets need at least two"):
        measured("one")
    for number in range(3):
        save_image(tmp_path / f"same/{number}.png", 5)
    with pytest.raises(InputError, match=r"all pictures of .*same are the same"):
        measured("same")
    for number in range(3):
        Path(tmp_path, "broken").mkdir(exist_ok=True)
        Path(tmp_path, f"broken/{number}.png").write_bytes(b"nothing")
    with pytest.raises(InputError, match=r"none of the pictures of .*broken can be used; the first: .*broken/0\.png"):
        measured("broken")


def test_few_pictures_leave_out_precision_and_recall(tmp_path, save_image):
    for number in range(3):
        save_image(tmp_path / f"few/{number}.png", number)
    few = open_image_set(tmp_path / "few", lambda: None)
    results, notes, *_ = measure([few, few])
    assert "precision" not in results
    assert "precision and recall are left out: they need more pictures in each set than 3" in notes
