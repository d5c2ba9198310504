"""The comparisons of training and of encoders: equal rows for all sides, sealed results, one-line refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cogview.evaluation.manifest import ResultValue
from tests.scripts.test_benchmarks import BENCHMARKS


@pytest.fixture
def load_benchmark(load_script, monkeypatch):
    """A function that imports a benchmark by name, as from its folder."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return load_script


def test_peers_learn_the_targets_of_our_batches(load_benchmark):
    """Padded or packed, every target that counts in our batch is there once, and no other."""
    rows, peers = load_benchmark("training_rows"), load_benchmark("training_peers")
    config, settings = rows.model_config(1, 128, 8), rows.settings_of("equal", 3)
    steps = rows.step_rows(rows.store_rows("equal", 6), 3)
    plain = rows.plain_rows(config, settings, steps)
    builder = load_benchmark("training_rows").ExampleBuilder(config, settings)
    ours = [builder.build_batch(step, each, builder.plan_rows(step, 3, 64)) for step, each in enumerate(steps)]
    wanted = sorted(
        np.concatenate(
            [ids for batch in ours for part in batch.thread_shards[0] for _, ids in part.targets.values()]
        ).tolist()
    )
    padded = [peers.padded_batch(step, config.vocabulary.pad, 120) for step in plain]
    packed = peers.packed_batches(plain, config.vocabulary.pad, 32)
    assert padded[0][0].shape == (3, 120)
    assert {batch[0].shape for batch in packed} == {packed[0][0].shape}
    for batches in (padded, packed):
        targets = torch.cat([targets.flatten() for _, targets in batches])
        assert sorted(targets[targets != rows.NO_LOSS].tolist()) == wanted
    tokens = sum(batch.num_tokens for batch in ours)
    assert sum(len(inputs) for step in plain for inputs, _ in step) == tokens


def test_plain_gpt_ties_its_output_and_ignores_positions_without_loss(load_benchmark):
    peers = load_benchmark("training_peers")
    config = load_benchmark("training_rows").model_config(1, 128, 8).transformer
    torch.manual_seed(0)
    model = peers.TrainingGPT(config)
    ids, targets = torch.randint(0, 100, (2, 6)), torch.full((2, 6), peers.NO_LOSS)
    targets[0, 2] = 7
    loss = model(ids, targets)
    ids[0, 3:] = 5  # later inputs have no effect
    torch.testing.assert_close(model(ids, targets), loss)
    assert model.head.weight is model.embedding.weight


def test_values_of_compares_with_the_best_mode_of_each_peer(load_benchmark, capsys):
    compare = load_benchmark("compare_training")
    case = type("Case", (), {"num_tokens": 600})()
    times = {
        "ours, a, 1 thread": [2.0, 2.0, 3.0],
        "plain loop, padded, 1 thread": [6.0, 6.0, 6.0],
        "plain loop, packed, 1 thread": [4.0, 3.0, 3.0],
        "Trainer, random, 1 thread": [8.0, 8.0, 8.0],
    }
    values = compare.values_of("recipe.6x256.float32", case, times)
    assert values["recipe.6x256.float32.ours over plain loop"].value == 1.5
    assert values["recipe.6x256.float32.ours over Trainer"].value == 4
    assert values["recipe.6x256.float32.ours, a, 1 thread"].value == 300
    compare.print_tables(values, {"batch": 24, "steps": 6, "repeats": 3, "threads": [1], "clock": "wall"})
    lines = capsys.readouterr().out.splitlines()
    assert "| recipe | 6x256 | float32 | plain loop, packed, 1 thread | 200 | 1.50 |" in lines


def test_our_encoder_finds_the_codes_of_the_tokenizer(load_benchmark):
    compare = load_benchmark("compare_encoders")
    encoder = compare.OurEncoder(compare.VQVAEConfig(channels=(8, 16, 32)))
    images = torch.rand(2, 3, 32, 32)
    with torch.inference_mode():
        assert torch.equal(encoder(images), encoder.model.encode(images))


def test_comparisons_of_training_refuse_wrong_arguments(load_benchmark, exit_status, tmp_path, capsys):
    nowhere = tmp_path / "missing" / "result.json"
    for name, arguments, message in [
        ("compare_training", ["--shapes", "6x100"], "--shapes 6x100: expected LAYERSxWIDTH with a width that 128 "),
        ("compare_training", ["--steps", "0"], "--steps: expected a whole number from 1, got '0'"),
        ("compare_training", ["--clock", "cpu", "--threads", "2"], "--clock cpu counts the time of all threads: give"),
        ("compare_training", ["--output", str(nowhere)], f"--output: there is no folder {nowhere.parent}"),
        ("compare_encoders", ["--side", "100"], "--side must be a multiple of 16 pixels, got 100"),
        ("compare_encoders", ["--batch", "0"], "--batch: expected a whole number from 1, got '0'"),
    ]:
        assert exit_status(load_benchmark(name).main, arguments) == 2
        err = capsys.readouterr().err
        assert message in err
        assert err.count("\n") == 1


def test_comparisons_print_the_tables_of_result_files(load_benchmark, tmp_path, capsys):
    compare = load_benchmark("compare_encoders")
    values = {
        "equal codes in bfloat16": ResultValue(value=0.5, n=64, unit="fraction"),
        "ours.LlamaGen f8.float32.peer, contiguous, eager, 560000": ResultValue(value=2.0, n=5, unit="pictures/s"),
        "ours.LlamaGen f8.float32.ours, channels_last, eager, 550000": ResultValue(value=8.0, n=5, unit="pictures/s"),
        "ours.LlamaGen f8.float32.ratio": ResultValue(value=4.0, n=5),
    }
    settings = {"side": 256, "batch": 4, "repeats": 5, "threads": 1}
    file = tmp_path / "encoders.json"
    compare.write_result(file, compare.Manifest(measure="encoders", settings=settings), values)
    assert compare.main(["--read", str(file)]) == 0
    out = capsys.readouterr().out
    assert "| ours | LlamaGen f8 | float32 | 0.56M / 0.55M | 2.00 / 8.00 | contiguous, eager | 4.00 |" in out
