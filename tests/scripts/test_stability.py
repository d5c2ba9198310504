"""``scripts/benchmarks/stability.py``: forms differ only in the compared property, and planted failures are found."""

import importlib.util
import json
import math
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from cogview.kernels.layer_norm import pb_relax_layer_norm

BENCHMARKS = Path(__file__).parents[2] / "scripts" / "benchmarks"
SHAPE = (3, 16, 2)
TINY = ("--layers", "3", "--width", "16", "--heads", "2", "--seeds", "1", "--steps", "20", "--processes", "1")


@pytest.fixture
def stability(load_script, monkeypatch):
    """The script, imported as from its own folder."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return load_script("stability")


def some_ids():
    return torch.randint(16, (2, 16), generator=torch.Generator().manual_seed(0))


@pytest.mark.slow
def test_stability_writes_the_metrics_of_every_part(stability, tmp_path, capsys):
    file = tmp_path / "metrics.json"
    assert stability.main([*TINY, "--rates", "0.01", "--json", str(file)]) == 0
    found = json.loads(file.read_text())
    assert set(found) == {"outliers", "attention", "rates", "injected"}
    forms = {part: {row["form"] for row in rows} for part, rows in found.items()}
    assert forms["outliers"] == forms["rates"] == forms["injected"] == {"pre-ln", "released", "ours"}
    assert forms["attention"] == {"raw order", "released order", "PB-relax"}
    assert {row["case"] for row in found["outliers"]} == {"one norm", "before layer 2 of 3", "before layer 3 of 3"}
    assert {"right", "wrong", "curve"} < set(found["outliers"][0])
    assert {"run", "losses", "skipped", "failure", "first_not_finite"} < set(found["rates"][0])
    assert {"outlier_borne", "outlier_not_borne"} < set(found["injected"][0])
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("ours / released", "times as large", "peak learning rate", "outlier borne"))


@pytest.mark.slow
def test_stability_draws_the_plot(stability, tmp_path):
    pytest.importorskip("matplotlib")
    file = tmp_path / "stability.png"
    assert stability.main([*TINY, "--parts", "outliers", "injected", "--plot", str(file)]) == 0
    assert file.read_bytes().startswith(b"\x89PNG")


def test_stability_norms_isolate_an_outlier_except_v1(stability):
    tokens = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    grown = tokens.clone()
    grown[-1, 0] = 1e4
    weight, bias = torch.ones(64), torch.zeros(64)
    change = {
        form: (norm(grown, weight, bias) - norm(tokens, weight, bias))[:-1] for form, norm in stability.NORMS.items()
    }
    assert not change["ours"].any()
    assert not change["pre-ln"].any()
    assert change["released"].norm() / tokens[:-1].norm() > 0.5


@pytest.mark.parametrize(("form", "moves"), [("ours", False), ("pre-ln", False), ("released", True)])
def test_stability_models_isolate_an_outlier_except_v1(stability, form, moves):
    model = stability.make_model(form, *SHAPE, seed=0)
    with torch.autocast("cpu", torch.float16):
        before = model.hidden(some_ids())
        with stability.outlier_before(model, 1, -1, 3e4):
            after = model.hidden(some_ids())
    assert torch.equal(after[:, :-1], before[:, :-1]) != moves
    assert not torch.equal(after[:, -1], before[:, -1])
    assert torch.isfinite(after).all()


def test_stability_only_ours_stays_finite_beyond_half_precision(stability):
    for form in stability.FORMS:
        model = stability.make_model(form, *SHAPE, seed=0)
        with torch.autocast("cpu", torch.float16), stability.outlier_before(model, 1, -1, 1e6):
            assert torch.isfinite(model.hidden(some_ids())).all() == (form == "ours")


def test_stability_v1_and_ours_agree_without_outliers(stability):
    released, ours = (stability.make_model(form, *SHAPE, seed=0).double() for form in ("released", "ours"))
    torch.testing.assert_close(released(some_ids()), ours(some_ids()), rtol=0, atol=1e-3)


def test_stability_variants_start_with_equal_weights(stability):
    ours = stability.make_model("ours", *SHAPE, seed=5).state_dict()
    for form in ("pre-ln", "released"):
        own = stability.make_model(form, *SHAPE, seed=5).state_dict()
        missing = set(ours) - set(own)
        assert set(own) <= set(ours)
        assert all("output_norm" in name for name in missing)
        assert bool(missing) == (form == "pre-ln")
        assert all(torch.equal(own[name], ours[name]) for name in own)


def test_stability_residual_streams_are_float16_except_ours(stability):
    for form in stability.FORMS:
        model, seen = stability.make_model(form, *SHAPE, seed=0), []
        model.layers[-1].register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[0].dtype))
        with torch.autocast("cpu", torch.float16):
            model(some_ids())
        assert seen == [torch.float32 if form == "ours" else torch.float16]


def test_cpu_float16_products_accumulate_in_float32():
    terms = torch.ones(4, 4096, dtype=torch.float16)
    terms[:, 0] = 2048  # to which float16 cannot add 1
    ones = torch.ones(4096, 4, dtype=torch.float16)
    assert (terms @ ones == 6144).all()
    assert (F.linear(terms, ones.T.contiguous()) == 6144).all()


def test_stability_attention_orders_equal_scaled_dot_product(stability):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, 7, 8, generator=generator, dtype=torch.float64) for _ in range(3))
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    for attend in stability.ATTENTIONS.values():
        torch.testing.assert_close(attend(q, k, v).double(), expected, rtol=0, atol=1e-5)


def test_stability_attention_limit_equals_the_overflow_of_float16(stability):
    limits = {order: stability.attention_limit(order, seed=0) for order in stability.ORDERS}
    for order, most in (("raw order", 65504 / 8), ("released order", 65504), ("PB-relax", 65504 * 32)):
        assert limits[order].right == pytest.approx(most, rel=0.01)
        assert limits[order].wrong is not None


def test_stability_limit_of_bisects_between_sizes(stability):
    found = stability.limit_of(lambda size: 0.0 if size < 100 else 0.5, [1.0, 16.0, 256.0, 512.0])
    assert found.right < 100 <= found.wrong
    assert found.wrong / found.right < 1.01
    assert found.curve == [(1.0, 0.0), (16.0, 0.0), (256.0, 0.5), (512.0, 0.5)]
    assert stability.limit_of(lambda size: 0.0, [1.0, 2.0]).wrong is None
    assert stability.limit_of(lambda size: math.inf, [1.0, 2.0]).curve == [(1.0, None)]


def test_stability_batch_contains_its_targets(stability):
    table = torch.randperm(stability.CODES, generator=torch.Generator().manual_seed(3))
    ids, targets = stability.batch(table, torch.Generator().manual_seed(4))
    assert (targets[:, :2] == -100).all()
    assert torch.equal(targets[:, 2:], table[ids[:, 1:-1]])


def test_stability_train_is_reproducible(stability):
    run = stability.Run("ours", SHAPE, seed=0, steps=6, rate=1e-2, outlier_from=3)
    assert stability.train(run) == stability.train(run)


def outcome(stability, losses, stopped=None, outlier_from=None):
    run = stability.Run("ours", SHAPE, 0, len(losses), 1e-3, outlier_from)
    return stability.Outcome(run, losses, 0, stopped)


def test_stability_outcome_explains_a_failure(stability):
    assert outcome(stability, [2.7] * 10 + [0.1] * 10).failure is None
    assert "guess" in outcome(stability, [0.1] * 10 + [2.8] * 10).failure
    assert "not finite" in outcome(stability, [0.1] * 19 + [None]).failure
    assert "step 20" in outcome(stability, [0.1] * 20, stopped=19).failure


def test_stability_outcome_finds_the_largest_tolerated_outlier(stability):
    run = outcome(stability, [1.0] * 10 + [1.1] * 5 + [2.5] * 20, outlier_from=10)
    assert run.outlier_borne == (run.run.outlier(14), run.run.outlier(15))
    run = outcome(stability, [1.0] * 10 + [1.1] * 5 + [None] * 20, outlier_from=10)
    assert run.outlier_borne == (run.run.outlier(14), run.run.outlier(15))
    assert run.first_not_finite == 15
    run = outcome(stability, [1.0] * 35, outlier_from=10)
    assert run.outlier_borne == (2.0**24, None)
    assert run.run.outlier(9) == 0
    assert run.run.outlier(10) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--steps", "3"), "--steps must be at least 10, got 3"),
        (("--seeds", "0"), "--seeds: expected a whole number from 1, got '0'"),
        (("--width", "10", "--heads", "4"), "--width 10 does not divide into --heads 4"),
        (("--rates", "0.1", "-1"), "--rates: expected a number above 0, got '-1'"),
        (("--json", "nowhere/metrics.json"), "there is no folder nowhere"),
        (("--parts", "attention", "--plot", "here.png"), "--parts leaves out injected and outliers"),
    ],
)
def test_stability_reports_mistakes_in_one_line(
    stability, exit_status, tmp_path, monkeypatch, capsys, arguments, message
):
    monkeypatch.chdir(tmp_path)
    assert exit_status(stability.main, list(arguments)) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert not printed.out
    assert not list(tmp_path.iterdir())


def test_stability_names_the_extra_when_matplotlib_is_missing(stability, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert stability.main(["--plot", "here.png"]) == 2
    assert "pip install 'cogview[train]'" in capsys.readouterr().err


def test_stability_ours_is_the_norm_of_the_toolkit(stability):
    assert stability.NORMS["ours"] is pb_relax_layer_norm
