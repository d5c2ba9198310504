"""The comparison of image tokenizers: its table, and the codebook of CogView v1 in training."""

import json

import pytest
import torch


@pytest.fixture
def benchmark(load_script, monkeypatch):
    """Return the script, which counts codes on few crops."""
    script = load_script("benchmarks.image_tokenizers")
    monkeypatch.setattr(script, "COUNTED_IMAGES", 4)
    return script


@pytest.mark.slow
def test_image_tokenizers_prints_a_row_for_each_training(benchmark, tmp_path, save_image, capsys):
    for number in range(8):
        save_image(tmp_path / f"pictures/{number}.png", number)
    arguments = [str(tmp_path / "pictures"), "-o", str(tmp_path / "runs"), "--held-out", "0.4", "--side", "32"]
    assert benchmark.main([*arguments, "--steps", "4", "--batch-size", "2", "--channels", "4"]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert [row.split(" | ")[0].strip("| ") for row in rows[2:]] == list(benchmark.NAMES.values())
    for name in benchmark.NAMES:
        found = json.loads((tmp_path / f"runs/{name}.json").read_text())
        assert 1 <= found["codes"] <= 64  # 4 crops of 16 codes


def test_released_quantizer_loses_codes_without_vectors(benchmark):
    """One update by hand: sums and sizes decay, and a smoothed size near 0 throws an unused code far off."""
    quantizer = benchmark.ReleasedQuantizer(2, 3, normalize=False)
    quantizer.initialize_released()
    first, second = quantizer.codebook.clone()
    quantizer.update(torch.ones(4, 3), torch.zeros(4, dtype=torch.long), 0.5)
    share = 2 / (2 + 2 * 1e-5)
    torch.testing.assert_close(quantizer.codebook[0], (first / 2 + 2) / ((2 + 1e-5) * share))
    torch.testing.assert_close(quantizer.codebook[1], second / 2 / (1e-5 * share))
