"""Benchmarks: both sides of each comparison compute the same, and metrics are printed."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from cogview.checkpoints.checkpoint import load_model, save_model
from cogview.data.sources.open import open_source
from cogview.data.sources.tables import TableOptions
from cogview.device import choose_placement
from cogview.evaluation.manifest import read_result
from cogview.generation.decode import decode
from cogview.generation.requests import DecodingRequest
from cogview.modeling.config import GREEDY, AttentionConfig, Sampling
from cogview.pipeline.cogview import CogView
from cogview.tokenizers.layouts import layouts

BENCHMARKS = Path(__file__).parents[2] / "scripts" / "benchmarks"
SHAPE = ("--layers", "2", "--width", "64", "--grid", "8")
SHORT = ("--device", "cpu", "--repeats", "1")
PROMPT = "蓝色背景上的两只狐狸在汽车的左边"
SCRIPTS = ("compare_v1", "compare_peers", "compare_best_of", "compare_upscale", "long_sequences")


@pytest.fixture
def load_benchmark(load_script, monkeypatch):
    """A function that imports a benchmark by name, as from its own folder."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return load_script


@pytest.fixture
def run_benchmark(load_benchmark, tmp_path, capsys):
    """A function that runs a benchmark: the cells of its table, row by row, and what --json wrote."""

    def run(name, *arguments):
        file = tmp_path / "times.json"
        assert load_benchmark(name).main([*SHORT, "--json", str(file), *arguments]) == 0
        lines = capsys.readouterr().out.splitlines()
        cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
        assert len({len(row) for row in cells}) == 1
        assert [path.name for path in tmp_path.iterdir()] == ["times.json"]
        return [cells[0], *cells[2:]], json.loads(file.read_text())

    return run


def partly_known(model, name, **values):
    """Return a sequence of the layout ``name`` with the prompt and an image of which half the codes are known."""
    noise = np.random.default_rng(1)
    image = np.ma.masked_array(noise.integers(0, 8192, 64), mask=noise.random(64) < 0.5)
    text = model.text_tokenizer.encode(PROMPT)
    return layouts(8)[name].arrange(model.vocabulary, text=text, image=image, **values)


def test_v1_generate_equals_greedy_decode(load_benchmark, tiny_model):
    generate = load_benchmark("v1_algorithm").generate
    transformer, vocabulary = copy.deepcopy(tiny_model.transformer), tiny_model.vocabulary
    load_benchmark("compare_v1").sharpen(transformer)  # otherwise greedy codes repeat in any context
    whole = layouts(8)["generate"].arrange(vocabulary, text=tiny_model.text_tokenizer.encode(PROMPT))
    small = np.arange(100, 116).reshape(4, 4)
    # The last two have steps of one position and of several; in the last one positions restart.
    rows = [whole, partly_known(tiny_model, "generate"), partly_known(tiny_model, "upscale", small=small)]
    for row in rows:
        seen = []
        ids = generate(
            transformer,
            vocabulary,
            row,
            2,
            GREEDY,
            torch.Generator(),
            lambda *progress, seen=seen: seen.append(progress),
        )
        (ours,) = decode(transformer, vocabulary, [DecodingRequest(sequence=row, seed=0, sampling=GREEDY)])
        assert np.array_equal(ids, np.stack([ours.ids, ours.ids]))
        assert len(set(ids[0][row.blanks])) >= 10
        assert seen == [(done, row.blanks.sum()) for done in range(1, row.blanks.sum() + 1)]


def test_v1_forward_equals_a_full_forward_pass(load_benchmark, tiny_model):
    v1 = load_benchmark("v1_algorithm")
    transformer, noise = tiny_model.transformer, torch.Generator().manual_seed(0)
    ids_BT = torch.randint(0, 8192, (1, 12), generator=noise)
    positions_T = torch.tensor([0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5])
    expected_BTV = transformer(ids_BT, positions_T.unsqueeze(0))
    memory = v1.empty_memory(transformer)
    for start, stop in ((0, 4), (4, 5), (5, 9), (9, 12)):
        logits_BV, memory = v1.forward(transformer, memory, ids_BT[:, start:stop], positions_T[start:stop])
        torch.testing.assert_close(logits_BV, expected_BTV[:, stop - 1], atol=1e-5, rtol=0)
    assert [inputs_BSD.shape for inputs_BSD in memory] == [(1, 12, 32)] * 2


def test_v1_sample_chooses_among_the_top_k_candidates(load_benchmark):
    logits_BV = torch.tensor([[9.0, 0.0, 3.0, 2.9, 1.0, 9.0]]).repeat(200, 1)
    noise = torch.Generator().manual_seed(0)
    chosen_B = load_benchmark("v1_algorithm").sample(logits_BV, range(1, 5), Sampling(top_k=2), noise)
    assert set(chosen_B.tolist()) == {2, 3}
    assert logits_BV[0, 0] == 9


def test_compare_v1_strata_cover_every_step(load_benchmark, tiny_model):
    row = layouts(8)["generate"].arrange(tiny_model.vocabulary, text=tiny_model.text_tokenizer.encode(PROMPT))
    start = row.spans["image"].start
    strides = load_benchmark("compare_v1").strata(row, 32)
    assert strides == {str(start): 1, str(start + 16): 32, str(start + 48): 31}


@pytest.mark.parametrize(("way", "parts"), [((), 3), pytest.param(("--whole",), 1, marks=pytest.mark.slow)])
def test_compare_v1_prints_the_ratio_of_times(run_benchmark, way, parts):
    table, found = run_benchmark("compare_v1", *SHAPE, "--batches", "1", "3", *way)
    assert [row[0] for row in table[1:]] == ["1", "3"]
    for row, batch in zip(table[1:], found["rows"], strict=True):
        assert float(row[3]) == pytest.approx(batch["v1"] / batch["ours"], abs=0.06)
        assert len(batch["seconds"]["v1"]) == parts
    assert (found["arguments"]["grid"], found["dtype"]) == (8, "float32")


def test_compare_v1_runs_with_trained_weights(run_benchmark, monkeypatch, tiny_model):
    monkeypatch.setattr(CogView, "from_pretrained", lambda name, **placement: tiny_model)
    table, found = run_benchmark("compare_v1", "--model", "tiny", "--batches", "2")
    assert [row[0] for row in table[1:]] == ["2"]
    assert [len(seconds["all"]) for seconds in found["rows"][0]["seconds"].values()] == [1, 1]


def test_compare_peers_prints_the_best_modes_and_dtypes(run_benchmark, load_benchmark, monkeypatch):
    pytest.importorskip("transformers", reason="transformers is a side of the comparison")
    compare = load_benchmark("compare_peers")
    monkeypatch.setattr(compare, "TRANSFORMERS_MODES", {"transformers, sdpa, static": ("sdpa", "static")})
    monkeypatch.setattr(compare, "PLAIN_MODES", {"plain loop, eager": False})
    table, found = run_benchmark("compare_peers", *SHAPE, "--batches", "2", "--tokens", "5")
    sides = ["ours", "transformers, sdpa, static", "plain loop, eager"]
    assert [row[2] for row in table[1:]] == [*sides, *sides, sides[0], sides[2], *sides]
    assert [row[1].split(":")[0] for row in table[-3:]] == ["best"] * 3
    assert all(row[4] == "1.00" for row in table[1:] if row[2] == "ours")
    assert [len(seconds) for seconds in found["rows"][0]["seconds"].values()] == [1] * 8


def test_compare_peers_repeats_modes_near_the_best_of_their_peer(load_benchmark, monkeypatch):
    """Runs of each side: a warm-up, a trial, and the repeats of the best modes."""
    compare, calls = load_benchmark("compare_peers"), []
    seconds = {"ours": 1.0, "peer, slow": 3.0, "peer, fast": 2.0, "other, only": 9.0}
    monkeypatch.setattr(compare, "seconds_of", lambda placement, work: seconds[work()])
    sides = {side: lambda side=side: (calls.append(side), side)[1] for side in seconds}
    times = compare.in_turn_of_best(None, sides, 3)
    assert {side: len(each) for side, each in times.items()} == {"ours": 3, "peer, fast": 3, "other, only": 3}
    assert [calls.count(side) for side in seconds] == [5, 2, 5, 5]
    rows = compare.rows_of({(side, "float32"): each for side, each in times.items()}, 4, "float32", 10)
    assert rows == [
        [4, "float32", "ours", "40", "1.00"],
        [4, "float32", "peer, fast", "20", "2.00"],
        [4, "float32", "other, only", "4", "9.00"],
    ]


@pytest.mark.slow
def test_compare_best_of_prints_each_method_with_random_weights(run_benchmark):
    table, found = run_benchmark("compare_best_of", "--model", "random", *SHAPE, "-n", "3")
    assert [row[0] for row in table[1:]] == ["one by one, sequential", "ours"]
    assert 0 < found["score_share"] < 1


@pytest.mark.slow
def test_compare_best_of_prints_each_method_with_trained_weights(run_benchmark, tiny_checkpoint):
    table, found = run_benchmark("compare_best_of", "--model", str(tiny_checkpoint), "-n", "3")
    assert [row[0] for row in table[1:]] == ["one by one, sequential", "one by one", "ours"]
    assert [row[4] for row in table[1:]] == [*(f"{ratio:.1f}" for ratio in found["ratios"].values()), ""]


def test_compare_best_of_scores_equally_with_both_methods(load_benchmark, tiny_model):
    best_of = load_benchmark("compare_best_of")
    best_of.PROMPT = PROMPT
    best_of.MAX_LOGITS_BYTES = 1  # one image at a time
    codes = best_of.generate_together(tiny_model, best_of.requests_of(tiny_model, 3))
    scores = best_of.score_all_ids(tiny_model, codes)
    assert scores == pytest.approx(best_of.score_pieces(tiny_model, codes), abs=1e-3)
    assert len(set(scores)) == 3


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_compare_upscale_counts_equal_images(run_benchmark, tiny_checkpoint, tmp_path_factory, dtype):
    stored = tmp_path_factory.mktemp("stored") / "model"
    save_model(stored, load_model(tiny_checkpoint, torch.device("cpu"), torch.float32), dtype=dtype)
    table, found = run_benchmark("compare_upscale", "--model", str(stored), "--images", "2")
    assert [row[0] for row in table[1:]] == ["algorithm of v1, one at a time", "ours, in one batch"]
    assert found["same"] == found["images"] == 2


def test_comparisons_report_mistakes_in_one_line(load_benchmark, exit_status, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "transformers", None)
    nowhere = tmp_path / "none" / "times.json"
    for name, arguments, message in [
        ("compare_v1", ["--repeats", "0"], "--repeats: expected a whole number from 1, got '0'"),
        ("compare_v1", ["--batches", "1", "0"], "--batches: expected a whole number from 1, got '0'"),
        ("compare_v1", ["--every", "0"], "--every: expected a whole number from 1, got '0'"),
        ("compare_v1", ["--json", str(nowhere)], f"--json: there is no folder {nowhere.parent}; make "),
        (
            "compare_v1",
            ["--heads", "7"],
            "--layers 2 --width 64 --heads 7: width 64 does not divide into 7 heads",
        ),
        ("compare_v1", ["--model", "cogview-emoji"], "--layers, --width, --grid: cogview-emoji has a shape of "),
        (
            "compare_peers",
            ["--tokens", "65"],
            "--tokens must be from 2 to 64, the codes of an image that fit; got 65",
        ),
        ("compare_peers", ["--batches", "0"], "--batches: expected a whole number from 1, got '0'"),
        ("compare_peers", ["--tokens", "2"], "transformers is missing, a side of this comparison: pip "),
        ("compare_best_of", ["--model", "random", "-n", "0"], "-n: expected a whole number from 1, got '0'"),
        ("compare_best_of", [], "--layers, --width, --grid: cogview-emoji has a shape of its own; for random weights "),
        (
            "compare_upscale",
            ["--model", "random", "--images", "0"],
            "--images: expected a whole number from 1",
        ),
    ]:
        assert exit_status(load_benchmark(name).main, [*SHAPE, *SHORT, *arguments]) == 2
        err = capsys.readouterr().err
        assert message in err
        assert err.count("\n") == 1


def test_compare_best_of_refuses_a_bundle(load_benchmark, tiny_model, monkeypatch, capsys):
    compare = load_benchmark("compare_best_of")
    monkeypatch.setattr(tiny_model, "bundle", object())
    monkeypatch.setattr(CogView, "from_pretrained", lambda name, **placement: tiny_model)
    assert compare.main(["--model", "cogview-released"]) == 2
    err = capsys.readouterr().err
    assert err == (
        "compare_best_of.py: cogview-released is several models; expected one that has the tasks generate and caption\n"
    )


def test_compare_peers_leaves_out_what_cannot_be_compiled(load_benchmark, capsys):
    from torch._dynamo.exc import TorchDynamoException

    compare = load_benchmark("compare_peers")

    def fail():
        raise TorchDynamoException("no C++ compiler\nand a long story")

    placement = choose_placement("cpu", "float32")
    times = compare.in_turn_of_best(placement, {"ours": lambda: None, "peer, compiled": fail}, 1)
    assert list(times) == ["ours"]
    err = capsys.readouterr().err
    assert "left out: peer, compiled: nothing can be compiled here (no C++ compiler)" in err


@pytest.mark.parametrize("name", SCRIPTS)
def test_comparisons_print_help(load_benchmark, capsys, name):
    with pytest.raises(SystemExit) as exit_:
        load_benchmark(name).main(["--help"])
    assert exit_.value.code == 0
    assert "--json FILE" in capsys.readouterr().out


@pytest.mark.slow
def test_gpu_kernels_checks_every_kernel(load_benchmark, tmp_path, capsys):
    pytest.importorskip("triton")
    file = tmp_path / "kernels.json"
    assert load_benchmark("gpu_kernels").main(["--device", "cpu", "--dtype", "float32", "--json", str(file)]) == 0
    metrics = json.loads(file.read_text())["kernels"]
    names = {"attention", "decode_attention", "window_attention", "sandwich_layer_norm", "bias_gelu"}
    assert {*names, "fused_linear_cross_entropy"} <= {metric["name"] for metric in metrics}
    assert all(metric["right"] and metric["error"] is not None for metric in metrics)
    assert capsys.readouterr().out.count("\n|") == 2 + len(metrics)


def test_gpu_kernels_names_a_wrong_kernel(load_benchmark, monkeypatch, capsys):
    pytest.importorskip("triton")
    monkeypatch.setattr("cogview.kernels.gelu_triton.bias_gelu_triton", lambda x, bias: 1.01 * (x + bias))
    assert load_benchmark("gpu_kernels").main(["--device", "cpu", "--dtype", "float32", "--only", "bias_gelu"]) == 1
    assert "wrong: bias_gelu" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.multiprocess
def test_compile_kernels_works_without_a_gpu():
    """The script runs in a separate process, where Triton does not interpret."""
    pytest.importorskip("triton")
    command = [sys.executable, str(BENCHMARKS / "compile_kernels.py"), "--capability", "80", "--dtype", "float16"]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run([*command, "--only", "gelu"], capture_output=True, text=True, env=environment, timeout=240)
    assert run.returncode == 0, run.stderr
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in run.stdout.splitlines()[2:]]
    assert [row[1] for row in rows] == ["_forward_kernel", "_backward_kernel"]
    assert all(0 < int(row[4]) <= 255 for row in rows)


def test_data_build_draws_the_same_pictures_for_every_source(load_benchmark, tmp_path):
    benchmark = load_benchmark("data_build")
    found = []
    benchmark.write_sources(tmp_path, 3)
    for sources in ([tmp_path / "pictures"], [tmp_path / "table.csv"], sorted(tmp_path.glob("*.tar"))):
        opened = [open_source(path, TableOptions(), lambda note: None) for path in sources]
        records = [record for source in opened for record in source]
        found.append([(Path(record.name).name, record.captions) for record in records])
    assert len(found[0]) == 3
    assert found[0] == found[1] == found[2]


def test_speculative_compares_codes_and_forward_passes(load_benchmark, tmp_path, capsys):
    file = tmp_path / "speculative.json"
    chosen = ("--cases", "generate", "candidates", "--batches", "2", "--repeats", "1", "--device", "cpu")
    assert load_benchmark("speculative").main([*chosen, "--result", str(file)]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")][2:]
    assert [row.split(" | ")[:3] for row in rows] == [["| generate", "2", "auto"], ["| candidates", "2", "auto"]]
    found = read_result(file).results
    for name in ("generate.2.auto", "candidates.2.auto"):
        assert found[f"{name}.different"].value == 0
        assert found[f"{name}.forwards"].value < found[f"{name}.sequential_forwards"].value == 64
        assert found[f"{name}.time_ratio"].value > 0


def test_long_sequences_times_window_against_dense_attention(run_benchmark):
    shape = ("--layers", "1", "--width", "32", "--heads", "2", "--window", "64", "--pivots", "16")
    rows, found = run_benchmark("long_sequences", "--only", "time", *shape, "--batches", "1", "--dtypes", "float32")
    assert rows[1][:2] == ["1", "float32"]
    (times,) = found["time"]
    assert len(times["seconds"]["dense"]) == len(times["seconds"]["window"]) == 9  # eight codes, and the last
    assert rows[1][2:] == [f"{times['mean']:.2f}", f"{times['last']:.2f}"]


def test_long_sequences_toy_repeats_its_textures_far_below(load_benchmark):
    toy = load_benchmark("long_sequences_toy")
    codes = toy.picture(3).reshape(8, 4 * 32)
    textures = [set(band.tolist()) for band in codes]
    assert textures[:4] == textures[4:]
    assert all(len(texture) == 4 for texture in textures)
    assert not np.array_equal(codes[:4], codes[4:])


def test_long_sequences_toy_trains_with_a_window(load_benchmark):
    toy = load_benchmark("long_sequences_toy")
    settings = toy.ToyTraining(steps=2, batch_size=1, layers=1, width=32, held_out=1)
    losses = []
    for _ in range(2):
        trainer = toy.ToyTrainer(settings, AttentionConfig(pattern="window", window=96, pivots=32))
        trainer.train()
        losses.append(trainer.losses())
    assert losses[0] == losses[1]
    assert losses[0]["all"] == pytest.approx(np.log(64), abs=0.5)
