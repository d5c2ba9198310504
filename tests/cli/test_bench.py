"""``cogview bench``: what a batch takes here, in a table and as JSON. No time is compared with another."""

import json
import os
from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy as np
import pytest
import torch

from cogview.benchmark import measure as bench
from cogview.benchmark.measure import (
    BenchmarkResult,
    BenchmarkTarget,
    Failed,
    Measurement,
    RequestTiming,
    measure_in_subprocess,
    measure_requests,
    roofline_seconds,
)
from cogview.cli.bench import random_config
from cogview.cli.estimate import open_configs
from cogview.cli.main import main
from cogview.device import choose_placement, peak_process_memory
from cogview.errors import InputError
from cogview.generation.decode import decode
from cogview.modeling.config import Sampling
from cogview.planning.inference import HardwareSpeed, estimate, layer_bytes
from cogview.vqvae.model import VQVAEConfig

COLUMNS = ["batch", "first picture, s", "s/picture", "pictures/s", "tokens/s", "roofline", "predicted", "seen"]
SPEED = HardwareSpeed(bandwidth=1e9, flops=1e10, starts_ahead=False)


@pytest.fixture(autouse=True)
def nothing_is_probed(monkeypatch):
    """The real one takes a second, and 256 MB."""
    monkeypatch.setattr("cogview.planning.inference.measure_hardware", lambda device, dtype: SPEED)


@pytest.fixture
def in_this_process(monkeypatch):
    """Batches are measured here, which saves starting a process."""

    def measure(subject, rows, *, codes, repeats, free):
        return measure_requests(subject, rows, codes=codes, repeats=repeats, free=free)

    monkeypatch.setattr(bench, "measure_in_subprocess", measure)


@pytest.fixture
def small_pictures(monkeypatch):
    """The released VQ-VAE, so narrow that a picture is a matter of milliseconds."""
    config = replace(VQVAEConfig.released(), channels=(8, 8, 8), code_width=8)
    monkeypatch.setattr(VQVAEConfig, "released", lambda: config)
    return config


def plan_of(folder, rows=2, dtype="float32"):
    config, image_config, _ = open_configs(str(folder))
    return estimate(config, image_config, task="generate", rows=rows, dtype=dtype)


def test_a_row_for_each_batch_size(tiny_checkpoint, in_this_process, tmp_path, capsys):
    path = tmp_path / "bench.json"
    arguments = ["--model", str(tiny_checkpoint), "--batch", "1,2", "--repeats", "2", "--device", "cpu"]
    assert main(["bench", *arguments, "--json", str(path)]) == 0
    printed = capsys.readouterr()
    head, table = printed.out.split("\n\n")
    assert head.splitlines() == [
        f"{tiny_checkpoint}: 2 layers, width 32, 2 heads; 64 codes a picture",
        f"cpu, float32 (no GPU is used); PyTorch {torch.__version__}, {torch.get_num_threads()} threads",
        "probe: 1 GB/s, 0.01 TFLOP/s",
    ]
    names, *lines = table.splitlines()
    assert names.split() == " ".join(COLUMNS).split()
    assert [line.split()[0] for line in lines] == ["1", "2"]
    assert {len(line) for line in lines} == {len(names)}
    progress = [line for line in printed.err.splitlines() if line.startswith("batch ")]
    assert [line.split(",")[0] for line in progress] == ["batch 1: 1 + 2 requests", "batch 2: 1 + 2 requests"]

    found = json.loads(path.read_text(encoding="utf-8"))
    assert os.listdir(tmp_path) == ["bench.json"]
    assert (found["device"], found["dtype"], found["codes_drawn"], found["codes_of_a_picture"]) == (
        *("cpu", "float32"),
        *(64, 64),
    )
    assert found["probe"] == {"bandwidth": 1e9, "flops": 1e10}
    for rows, row, line in zip((1, 2), found["rows"], lines, strict=True):
        assert row["batch"] == rows
        assert row["predicted_bytes"] == plan_of(tiny_checkpoint, rows).total
        assert row["seen_bytes"] > 50_000_000  # Python and PyTorch alone are more
        whole = [sum(request.values()) for request in row["requests"]]
        assert len(whole) == 2
        assert row["first_picture_s"] == pytest.approx({"median": median(whole), "min": min(whole), "max": max(whole)})
        assert row["pictures_per_s"] == pytest.approx(rows / median(whole))
        others = median(request["other_codes"] for request in row["requests"])
        assert row["tokens_per_s"] == pytest.approx(rows * 63 / others)
        assert f"{row['roofline']:.0%}" in line
        assert "~" not in line


def test_random_weights_of_a_shape_in_part(small_pictures, in_this_process, tmp_path, capsys):
    path = tmp_path / "bench.json"
    arguments = ["--random", "2x64x4", "--codes", "4", "--batch", "2", "--repeats", "1", "--device", "cpu"]
    assert main(["bench", *arguments, "--json", str(path)]) == 0
    out = capsys.readouterr().out
    assert out.startswith("random 2x64x4: 2 layers, width 64, 4 heads; 1,024 codes a picture\n")
    assert "drawn: the first 4 codes of each picture; ~ is extrapolated" in out
    line = out.splitlines()[-1]
    assert line.split()[0] == "2"
    assert line.count("~") == 3  # what is said of pictures
    found = json.loads(path.read_text(encoding="utf-8"))
    row, (request,) = found["rows"][0], found["rows"][0]["requests"]
    assert (found["layers"], found["width"], found["heads"], found["codes_drawn"]) == (2, 64, 4, 4)
    assert row["tokens_per_s"] == pytest.approx(2 * 3 / request["other_codes"])
    assert row["first_picture_s"]["median"] > sum(request.values())


def test_a_size_by_its_name_and_a_shape_of_the_same_numbers():
    assert random_config("20m") == random_config("10x416x8")


def test_what_is_extrapolated_takes_the_same_share(tiny_checkpoint):
    plan, steps = plan_of(tiny_checkpoint), 63
    least = [roofline_seconds(plan, read, SPEED) for read in plan.forward_passes[1:]]
    assert len(least) == steps

    def figures(codes):
        """Of a machine that takes twice the least time for all but the first code."""
        other_codes = 2 * sum(least[: codes - 1])
        request = RequestTiming(first_code=3.0, other_codes=other_codes, pixels=4.0)
        return BenchmarkResult(
            plan=plan, speed=SPEED, codes=codes, measured=Measurement(requests=(request,), peak=None)
        )

    assert [figures(codes).share for codes in (2, 30, 64)] == pytest.approx([0.5] * 3)
    assert figures(64).first_image == pytest.approx([7 + 2 * sum(least)])
    assert figures(64).tokens_per_second == pytest.approx(2 * steps / (2 * sum(least)))
    for codes in (2, 30):
        assert figures(codes).first_image == pytest.approx(figures(64).first_image)
        assert figures(codes).images_per_second == pytest.approx(figures(64).images_per_second)


def test_the_least_time_is_that_of_bytes_or_of_products(tiny_checkpoint):
    plan = plan_of(tiny_checkpoint, rows=3)
    read = plan.forward_passes[10]
    weights = 2 * (12 * 32**2 + 17 * 32) + 8192 * 32
    kept = 3 * 2 * 2 * 32 * read.total_positions
    moved, multiplied = 4 * (weights + kept), plan.flops(read)
    assert roofline_seconds(plan, read, replace(SPEED, bandwidth=5.0, flops=1e30)) == pytest.approx(moved / 5)
    assert roofline_seconds(plan, read, replace(SPEED, bandwidth=1e30, flops=5.0)) == pytest.approx(multiplied / 5)


@pytest.mark.parametrize(
    ("arguments", "guessed"),
    [((), None), (("--parallel", "8"), 8), (("--random", "2x64x4"), 1), (("--random", "2x64x4", "--parallel", "8"), 8)],
)
@pytest.mark.usefixtures("in_this_process", "small_pictures")
def test_random_weights_are_not_guessed_from(arguments, guessed, tiny_checkpoint, monkeypatch, capsys):
    """They are easier to guess than any others, and what is measured would be better than what anyone gets."""
    asked = []

    def draw(transformer, vocabulary, jobs, watch=None, *, int8_cache=False, speculative=None):
        asked.append(speculative)
        return decode(transformer, vocabulary, jobs, watch, speculative=speculative)

    monkeypatch.setattr(bench, "decode", draw)
    chosen = arguments if "--random" in arguments else ("--model", str(tiny_checkpoint), *arguments)
    assert main(["bench", *chosen, "--codes", "4", "--batch", "1", "--repeats", "1", "--device", "cpu"]) == 0
    assert set(asked) == {guessed}
    assert ("drawn: one code after another" in capsys.readouterr().out) == (guessed == 1)


def test_guided_rows_are_drawn_with_their_twins(tiny_checkpoint, tiny_model):
    config = replace(tiny_model.config, sampling=Sampling(guidance=3.0))
    jobs = bench.make_requests(config, rows=2, codes=5)
    filled = decode(tiny_model.transformer, tiny_model.vocabulary, jobs)
    assert [len(row.ids) for row in filled] == [len(job.sequence) for job in jobs]
    assert len({tuple(job.sequence.ids) for job in jobs}) == 2  # texts of their own: nothing can be shared


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "int4"])
def test_random_weights_are_held_as_asked_and_draw(dtype, small_pictures):
    config = random_config("2x64x4")
    placement = choose_placement("cpu", dtype)
    transformer = bench.random_transformer(config.transformer, placement)
    weights = transformer.state_dict()
    layers = {name: tensor for name, tensor in weights.items() if name.startswith("layers.")}
    assert sum(tensor.nbytes for tensor in layers.values()) == layer_bytes(config.transformer, dtype)
    assert len({tensor.data_ptr() for tensor in layers.values()}) == len(layers)  # each has to be read
    jobs = bench.make_requests(config, rows=2, codes=3)
    assert all(
        torch.isfinite(torch.tensor(row.log_probability)) for row in decode(transformer, config.vocabulary, jobs)
    )


def test_a_batch_that_does_not_fit_is_not_tried(tiny_checkpoint, monkeypatch, tmp_path, capsys):
    free = plan_of(tiny_checkpoint, rows=2).total + 1000  # all of it would be needed, and some has to stay free

    def tried(*_, **__):
        raise AssertionError("a batch was tried")

    monkeypatch.setattr("cogview.device.available_memory", lambda device: free)
    monkeypatch.setattr(bench, "measure_in_subprocess", tried)
    path = tmp_path / "bench.json"
    arguments = ["--model", str(tiny_checkpoint), "--device", "cpu", "--dtype", "float32", "--batch", "2"]
    assert main(["bench", *arguments, "--json", str(path)]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("    2  does not fit: ")
    (row,) = json.loads(path.read_text(encoding="utf-8"))["rows"]
    assert row == {"batch": 2, "predicted_bytes": free - 1000, "free_bytes": free, "left_out": "does not fit"}


def test_a_batch_that_fails_leaves_the_others(tiny_checkpoint, monkeypatch, capsys):
    request = RequestTiming(first_code=1.0, other_codes=2.0, pixels=3.0)

    def measure(subject, rows, **_):
        if rows == 1:
            raise Failed("out of memory")
        return Measurement(requests=(request, request), peak=None)

    monkeypatch.setattr(bench, "measure_in_subprocess", measure)
    assert main(["bench", "--model", str(tiny_checkpoint), "--device", "cpu", "--batch", "1,2"]) == 1
    first, second = capsys.readouterr().out.splitlines()[-2:]
    assert first.startswith("    1  failed: out of memory; ")
    assert second.split()[:6] == ["2", "6", "(6..6)", "3", "0.333", "63"]
    assert second.endswith("unknown")


def subject_of(folder):
    config, image_config, _ = open_configs(str(folder))
    return BenchmarkTarget(config=config, image_config=image_config, placement=choose_placement("cpu"), folder=folder)


def test_the_peak_is_that_of_a_process_of_its_own(tiny_checkpoint):
    """The kernel's own figure of a process (ru_maxrss) begins with what its parent had."""
    ballast = np.ones(50_000_000)
    own = peak_process_memory(torch.device("cpu"), free_before=0)
    measured = measure_in_subprocess(subject_of(tiny_checkpoint), 1, codes=2, repeats=3, free=0)
    assert len(measured.requests) == 3
    assert measured.peak < own - ballast.nbytes / 2


class Deadly:
    """Ends the process that receives it."""

    def __reduce__(self):
        return os._exit, (9,)


def test_what_ends_a_process_is_told(tiny_checkpoint, tmp_path):
    with pytest.raises(Failed, match="its process ended with status 9 "):
        measure_in_subprocess(Deadly(), 1, codes=2, repeats=1, free=0)
    subject = replace(subject_of(tiny_checkpoint), folder=tmp_path / "gone")
    with pytest.raises(InputError, match="gone is no checkpoint folder"):
        measure_in_subprocess(subject, 1, codes=2, repeats=1, free=0)


def test_json_is_there_whole_or_not_at_all(tiny_checkpoint, in_this_process, tmp_path, monkeypatch, capsys):
    path = tmp_path / "bench.json"
    path.write_text("older")

    def full(self, text, encoding):
        self.write_bytes(b"{")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    arguments = ["--model", str(tiny_checkpoint), "--device", "cpu", "--batch", "1", "--repeats", "1", "--codes", "2"]
    assert main(["bench", *arguments, "--json", str(path)]) == 2
    printed = capsys.readouterr()
    assert "No space left" in printed.err
    assert printed.out.splitlines()[-1].split()[0] == "1"  # what was measured is on the screen
    assert (os.listdir(tmp_path), path.read_text()) == (["bench.json"], "older")


def test_mistakes_are_one_line(tiny_checkpoint, tmp_path, capsys):
    batches = "--batch must be whole numbers above 0 with commas between, such as 1,8,32, got "
    for arguments, message in [
        (["--model", "cogview-bse"], 'model "cogview-bse" is unknown; known: cogview-emoji, '),
        (["--random", "4x"], "--random must be LAYERSxWIDTHxHEADS such as 12x832x13, or one of 5m, "),
        (["--random", ""], "--random must be LAYERSxWIDTHxHEADS such as 12x832x13, or one of 5m, "),
        (["--parallel", "0"], "--parallel must be auto, off or a whole number from 1 on, got "),
        (["--random", "2x64x5"], "--random 2x64x5: width 64 does not divide into 5 heads"),
        (["--random", "0x64x4"], "--random 0x64x4: num_layers must be at least 1, got 0"),
        (["--random", "2x40x4", "--dtype", "int4"], "int4 needs layers whose inputs are a multiple of 32, got 40"),
        (["--batch", "0"], f"{batches}'0'"),
        (["--batch", "1,two"], f"{batches}'1,two'"),
        (["--batch", ""], f"{batches}''"),
        (["--repeats", "0"], "--repeats must be at least 1, got 0"),
        (["--codes", "1"], "--codes must be from 2 to 64, the codes of a picture, got 1"),
        (["--codes", "65"], "--codes must be from 2 to 64, the codes of a picture, got 65"),
        (["--device", "gpu"], "device 'gpu' is unknown; expected auto, cpu, cuda, cuda:N or mps"),
        (["--dtype", "int7"], "dtype 'int7' is unknown; known: auto, "),
        (["--json", f"{tmp_path}/no/b.json"], f"--json {tmp_path}/no/b.json: there is no folder {tmp_path}/no; "),
        (["--json", str(tmp_path)], f"--json {tmp_path} is a folder; expected the name of a file"),
    ]:
        chosen = [] if arguments[0] in ("--model", "--random") else ["--model", str(tiny_checkpoint)]
        assert main(["bench", *chosen, *arguments]) == 2
        printed = capsys.readouterr()
        assert printed.err.startswith(f"cogview bench: {message}")
        assert (printed.err.count("\n"), printed.out) == (1, "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--random", "4b", "--model", "tiny"], "argument --model: not allowed with argument --random"),
        (["--repeats", "many"], "argument --repeats: invalid int value: 'many'"),
    ],
)
def test_what_the_parser_refuses(arguments, message, capsys):
    assert main(["bench", *arguments]) == 2
    assert capsys.readouterr().err == f"cogview bench: {message}; see cogview bench --help\n"


def test_help_explains_the_columns(capsys):
    assert main(["bench", "--help"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "Columns: batch: pictures drawn at once; first picture, s: from request to pixels" in out
