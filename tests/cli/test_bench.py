"""``cogview bench``: a table and JSON of each batch size. No test compares one time with another."""

import json
import os
from dataclasses import replace
from pathlib import Path
from statistics import median

import pytest
import torch

from cogview.benchmark import measure, report
from cogview.benchmark.measure import Measurement, MeasurementError, RequestTiming, measure_requests
from cogview.cli.main import main
from cogview.generation.decode import decode
from cogview.planning.hardware import HardwareSpeed
from cogview.planning.inference import estimate_inference
from cogview.planning.target import load_target_model, random_config
from cogview.vqvae.model import VQVAEConfig

COLUMNS = ["batch", "first image, s", "s/image", "images/s", "tokens/s", "roofline", "predicted", "peak"]
SPEED = HardwareSpeed(bandwidth=1e9, flops=1e10, starts_ahead=False)


@pytest.fixture(autouse=True)
def given_speed(monkeypatch):
    """Replace the measurement of the hardware, which takes a second and 256 MB."""
    monkeypatch.setattr(report, "measure_hardware", lambda device, dtype: SPEED)


@pytest.fixture
def in_this_process(monkeypatch):
    """Measure batches without a subprocess."""
    monkeypatch.setattr(report, "measure_in_subprocess", measure_requests)


@pytest.fixture
def small_images(monkeypatch):
    """Replace the VQ-VAE of CogView v1 by a narrow one that decodes an image in milliseconds."""
    config = replace(VQVAEConfig.released(), channels=(8, 8, 8), code_width=8)
    monkeypatch.setattr(VQVAEConfig, "released", lambda: config)
    return config


def estimate_of(folder, rows=2):
    """Return the estimate of a batch of a checkpoint folder."""
    model = load_target_model(str(folder))
    return estimate_inference(model.config, model.image_config, task="generate", rows=rows)


def test_bench_prints_row_for_each_batch_size(tiny_checkpoint, in_this_process, tmp_path, capsys):
    path = tmp_path / "bench.json"
    arguments = ["--model", str(tiny_checkpoint), "--batch", "1,2", "--repeats", "2", "--device", "cpu"]
    assert main(["bench", *arguments, "--json", str(path)]) == 0
    printed = capsys.readouterr()
    head, table = printed.out.split("\n\n")
    assert head.splitlines() == [
        f"{tiny_checkpoint}: 2 layers, width 32, 2 heads; 64 codes per image",
        f"cpu, float32 (no GPU is used); PyTorch {torch.__version__}, {torch.get_num_threads()} threads",
        "hardware: 1 GB/s, 0.01 TFLOP/s",
    ]
    names, *lines = table.splitlines()
    assert names.split() == " ".join(COLUMNS).split()
    assert [line.split()[0] for line in lines] == ["1", "2"]
    assert {len(line) for line in lines} == {len(names)}
    progress = [line for line in printed.err.splitlines() if line.startswith("batch ")]
    assert [line.split(",")[0] for line in progress] == ["batch 1: 1 + 2 requests", "batch 2: 1 + 2 requests"]

    found = json.loads(path.read_text(encoding="utf-8"))
    assert os.listdir(tmp_path) == ["bench.json"]
    assert (found["device"], found["dtype"], found["codes_generated"], found["codes_per_image"]) == (
        *("cpu", "float32"),
        *(64, 64),
    )
    assert found["hardware"] == {"bandwidth": 1e9, "flops": 1e10}
    for rows, row, line in zip((1, 2), found["rows"], lines, strict=True):
        assert row["batch"] == rows
        assert row["predicted_bytes"] == estimate_of(tiny_checkpoint, rows).total
        assert row["peak_bytes"] > 50_000_000  # Python and PyTorch alone take more
        whole = [sum(request.values()) for request in row["requests"]]
        assert len(whole) == 2
        assert row["first_image_s"] == pytest.approx({"median": median(whole), "min": min(whole), "max": max(whole)})
        assert row["images_per_s"] == pytest.approx(rows / median(whole))
        others = median(request["other_codes"] for request in row["requests"])
        assert row["tokens_per_s"] == pytest.approx(rows * 63 / others)
        assert f"{row['roofline']:.0%}" in line
        assert "~" not in line


def test_bench_extrapolates_when_part_of_codes_is_generated(small_images, in_this_process, tmp_path, capsys):
    path = tmp_path / "bench.json"
    arguments = ["--random", "2x64x4", "--codes", "4", "--batch", "2", "--repeats", "1", "--device", "cpu"]
    assert main(["bench", *arguments, "--json", str(path)]) == 0
    out = capsys.readouterr().out
    assert out.startswith("random 2x64x4: 2 layers, width 64, 4 heads; 1,024 codes per image\n")
    assert "generated: the first 4 codes of each image; ~ is extrapolated" in out
    line = out.splitlines()[-1]
    assert line.split()[0] == "2"
    assert line.count("~") == 3  # the metrics of whole images
    found = json.loads(path.read_text(encoding="utf-8"))
    row, (request,) = found["rows"][0], found["rows"][0]["requests"]
    assert (found["layers"], found["width"], found["heads"], found["codes_generated"]) == (2, 64, 4, 4)
    assert row["tokens_per_s"] == pytest.approx(2 * 3 / request["other_codes"])
    assert row["first_image_s"]["median"] > sum(request.values())


def test_random_config_of_preset_equals_that_of_its_shape():
    assert random_config("20m") == random_config("10x416x8")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [((), None), (("--parallel", "8"), 8), (("--random", "2x64x4"), 1), (("--random", "2x64x4", "--parallel", "8"), 8)],
)
@pytest.mark.usefixtures("in_this_process", "small_images")
def test_bench_disables_speculative_decoding_for_random_weights(
    arguments, expected, tiny_checkpoint, monkeypatch, capsys
):
    """Drafts are accepted more often with random weights, so that the result would be better than with trained ones."""
    passed = []

    def spy(transformer, vocabulary, requests, callback=None, *, speculative=None):
        passed.append(speculative)
        return decode(transformer, vocabulary, requests, callback, speculative=speculative)

    monkeypatch.setattr(measure, "decode", spy)
    chosen = arguments if "--random" in arguments else ("--model", str(tiny_checkpoint), *arguments)
    assert main(["bench", *chosen, "--codes", "4", "--batch", "1", "--repeats", "1", "--device", "cpu"]) == 0
    assert set(passed) == {expected}
    assert ("speculative decoding: off" in capsys.readouterr().out) == (expected == 1)


def test_bench_skips_batch_that_does_not_fit(tiny_checkpoint, monkeypatch, tmp_path, capsys):
    free = estimate_of(tiny_checkpoint, rows=2).total + 1000  # fits without the margin

    def fail(*_, **__):
        raise AssertionError("a batch was measured")

    monkeypatch.setattr(report, "available_memory", lambda device: free)
    monkeypatch.setattr(report, "measure_in_subprocess", fail)
    path = tmp_path / "bench.json"
    arguments = ["--model", str(tiny_checkpoint), "--device", "cpu", "--dtype", "float32", "--batch", "2"]
    assert main(["bench", *arguments, "--json", str(path)]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("    2  does not fit: ")
    (row,) = json.loads(path.read_text(encoding="utf-8"))["rows"]
    assert row == {"batch": 2, "predicted_bytes": free - 1000, "free_bytes": free, "skipped": "does not fit"}


def test_bench_measures_other_batches_when_one_fails(tiny_checkpoint, monkeypatch, capsys):
    request = RequestTiming(first_code=1.0, other_codes=2.0, pixels=3.0)

    def fake(target, rows, **_):
        if rows == 1:
            raise MeasurementError("out of memory")
        return Measurement(requests=(request, request), peak=None)

    monkeypatch.setattr(report, "measure_in_subprocess", fake)
    assert main(["bench", "--model", str(tiny_checkpoint), "--device", "cpu", "--batch", "1,2"]) == 1
    first, second = capsys.readouterr().out.splitlines()[-2:]
    assert first.startswith("    1  failed: out of memory; ")
    assert second.split()[:6] == ["2", "6", "(6..6)", "3", "0.333", "63"]
    assert second.endswith("unknown")


def test_bench_keeps_older_json_when_disk_is_full(tiny_checkpoint, in_this_process, tmp_path, monkeypatch, capsys):
    path = tmp_path / "bench.json"
    older = json.dumps({"rows": [], "hardware": {}, "codes_per_image": 64})
    path.write_text(older)

    def full(self, text, encoding):
        self.write_bytes(b"{")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    arguments = ["--model", str(tiny_checkpoint), "--device", "cpu", "--batch", "1", "--repeats", "1", "--codes", "2"]
    assert main(["bench", *arguments, "--json", str(path)]) == 3
    printed = capsys.readouterr()
    assert "the disk is full" in printed.err
    assert printed.out.splitlines()[-1].split()[0] == "1"  # the table is printed before
    assert (os.listdir(tmp_path), path.read_text()) == (["bench.json"], older)


def test_bench_reports_mistake_in_one_line(tiny_checkpoint, tmp_path, capsys):
    batches = "invalid value for '--batch': "
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("一只狐狸\n", encoding="utf-8")
    not_a_list = "is not a list of whole numbers from 1 on, such as 1,8,32"
    for arguments, message in [
        (["--model", "cogview-bse"], 'model "cogview-bse" is unknown; known: cogview-emoji, '),
        (["--random", "4x"], "--random must be LAYERSxWIDTHxHEADS such as 12x832x13, or one of 5m, "),
        (["--random", ""], "--random must be LAYERSxWIDTHxHEADS such as 12x832x13, or one of 5m, "),
        (["--parallel", "0"], "invalid value for '--speculative' / '--parallel': "),
        (["--random", "2x64x5"], "--random 2x64x5: width 64 does not divide into 5 heads"),
        (["--random", "0x64x4"], "--random 0x64x4: num_layers must be in [1, 1000], got 0"),
        (["--random", "2x40x4", "--dtype", "int4"], "int4 needs layers whose inputs are a multiple of 32, got 40"),
        (["--batch", "0"], f'{batches}"0" {not_a_list}'),
        (["--batch", "1,two"], f'{batches}"1,two" {not_a_list}'),
        (["--batch", ""], f'{batches}"" {not_a_list}'),
        (["--repeats", "0"], "invalid value for '--repeats': 0 is not in the range x>=1"),
        (["--codes", "1"], "--codes must be from 2 to 64, the codes of an image, got 1"),
        (["--codes", "65"], "--codes must be from 2 to 64, the codes of an image, got 65"),
        (["--device", "gpu"], "device 'gpu' is unknown; expected auto, cpu, cuda, cuda:N or mps"),
        (["--dtype", "int7"], "invalid value for '--dtype': 'int7' is not one of 'auto', "),
        (["--json", str(tmp_path)], f"the output {tmp_path} is a folder; expected the name of a file"),
        (["--json", str(prompts)], f"the output {prompts} exists and is no result of cogview, so that it is not repl"),
    ]:
        chosen = [] if arguments[0] in ("--model", "--random") else ["--model", str(tiny_checkpoint)]
        assert main(["bench", *chosen, *arguments]) == 2
        printed = capsys.readouterr()
        assert printed.err.startswith(f"cogview bench: {message}")
        assert (printed.err.count("\n"), printed.out) == (1, "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--random", "4b", "--model", "tiny"], "--random replaces --model: give either"),
        (["--repeats", "many"], "invalid value for '--repeats': 'many' is not a valid integer"),
    ],
)
def test_bench_points_to_help_when_usage_is_wrong(arguments, message, capsys):
    assert main(["bench", *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(f"cogview bench: {message}")
    assert printed.err.endswith("; see cogview bench --help\n")
    assert printed.err.count("\n") == 1


def test_bench_help_explains_columns(capsys):
    assert main(["bench", "--help"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert (
        "Columns: batch: images generated at once; first image, s: seconds from the request until the images of the "
        in out
    )
    assert all(f"{name}: " in out for name in COLUMNS)
