"""Comparisons of results: what is refused, which interval a difference gets, and the page."""

import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from cogview.errors import InputError
from cogview.evaluation.comparison import (
    bootstrap_difference,
    combine_intervals,
    compare_results,
    format_difference,
    format_interval,
    format_value,
)
from cogview.evaluation.manifest import (
    Manifest,
    ModelRecord,
    Result,
    ResultCurve,
    ResultItems,
    ResultValue,
    hash_prompts,
    hash_set,
)
from cogview.evaluation.metrics import wilson_interval
from cogview.evaluation.page import ComparedFiles, comparison_page
from cogview.evaluation.plots import nice_ticks

NAMES = ("a.json", "b.json")
COUNT = 40


def result_of(values, *, ids=None, name="tiny", **changes) -> Result:
    """Return a result whose value ``psnr`` is the mean of ``values``."""
    items = ResultItems(ids=ids or [str(index) for index in range(len(values))], values={"psnr": list(values)})
    mean = float(np.mean([value for value in values if value is not None]))
    manifest = Manifest(
        measure="images",
        prompts=hash_prompts(["一只狐狸"]),
        candidate=hash_set(name, [str(value) for value in values]),
        model=ModelRecord(name=name, sha256=None),
    )
    value = ResultValue(value=mean, low=mean - 1, high=mean + 1, n=len(values), unit="dB", higher_is_better=True)
    return replace(Result(manifest=manifest, results={"psnr": value}, items=items, sha256="0" * 64), **changes)


@pytest.fixture
def noisy() -> list[float]:
    """Values of items that vary much more than a change moves them."""
    return list(np.random.default_rng(1).normal(30, 10, COUNT))


def test_compare_results_pairs_items_by_their_ids(noisy):
    """A change of 0.5 dB on every item is certain where items are paired, and invisible where they are not."""
    better = [value + 0.5 for value in noisy]
    ids = [str(index) for index in range(COUNT)]
    [paired] = compare_results(result_of(noisy), result_of(better[::-1], ids=ids[::-1]), NAMES).differences
    assert (paired.method, paired.verdict, paired.is_significant) == ("paired", "better", True)
    assert (paired.low, paired.high) == pytest.approx((0.5, 0.5))
    [unpaired] = compare_results(result_of(noisy), result_of(better, ids=["x" + key for key in ids]), NAMES).differences
    assert (unpaired.method, unpaired.verdict) == ("unpaired", "")
    assert unpaired.low < 0 < unpaired.high


def test_compare_results_uses_intervals_when_items_are_missing(noisy):
    bare = replace(result_of(noisy), items=None)
    [found] = compare_results(bare, result_of(noisy), NAMES).differences
    assert found.method == "from intervals"
    assert (found.low, found.high) == pytest.approx((-(2**0.5), 2**0.5))


def test_compare_results_does_not_resample_what_is_no_mean(noisy):
    """The PSNR of all pixels is not the mean of the PSNRs of pictures."""
    total = {"psnr": replace(result_of(noisy).results["psnr"], value=12.0, low=11.0, high=13.0)}
    [found] = compare_results(result_of(noisy, results=total), result_of(noisy), NAMES).differences
    assert found.method == "from intervals"


def test_compare_results_finds_no_difference_of_a_result_to_itself(noisy):
    [found] = compare_results(result_of(noisy), result_of(noisy), NAMES).differences
    assert (found.value, found.low, found.high, found.verdict) == (0.0, 0.0, 0.0, "")


def test_compare_results_leaves_out_uncounted_items(noisy):
    some = [None if index % 2 else value for index, value in enumerate(noisy)]
    more = [None if index % 2 else value + 1 for index, value in enumerate(noisy)]
    [found] = compare_results(result_of(some), result_of(more), NAMES).differences
    assert (found.method, found.low, found.high) == ("paired", pytest.approx(1), pytest.approx(1))


def test_compare_results_gives_few_items_no_bootstrap():
    """Two items that happen to change alike would have an interval without width."""
    few = replace(result_of([1.0, 2.0]).results["psnr"], low=None, high=None)
    results = [replace(result_of([1.0 + change, 2.0 + change]), results={"psnr": few}) for change in (0, 1)]
    [found] = compare_results(*results, NAMES).differences
    assert (found.method, found.low, found.verdict) == ("", None, "")


@pytest.mark.parametrize(("better", "verdict"), [(True, "better"), (False, "worse"), (None, "different")])
def test_verdict_follows_the_direction_of_the_value(noisy, better, verdict):
    results = []
    for shift in (0, 1):
        found = result_of([value + shift for value in noisy])
        results.append(replace(found, results={"psnr": replace(found.results["psnr"], higher_is_better=better)}))
    [difference] = compare_results(*results, NAMES).differences
    assert difference.verdict == verdict


def changed(result, **fields) -> Result:
    return replace(result, manifest=replace(result.manifest, **fields))


@pytest.mark.parametrize(
    ("fields", "allow", "message"),
    [
        ({"measure": "text"}, (), "a.json and b.json cannot be compared: their measures are images and text"),
        (
            {"prompts": hash_prompts(["一只狗"])},
            (),
            r"allow knowingly with --allow FIELD; they differ in prompts.sha256",
        ),
        ({"sampling": {"top_k": 5}}, (), r"they differ in sampling.top_k \(none, 5\)"),
        ({}, ("measure",), "--allow measure: results of different measures cannot be compared"),
        ({}, ("blurr",), "--allow blurr: neither manifest has it; fields: prompts, candidate, model"),
    ],
)
def test_compare_results_refuses_unlike_manifests(noisy, fields, allow, message):
    with pytest.raises(InputError, match=message):
        compare_results(result_of(noisy), changed(result_of(noisy), **fields), NAMES, allow)


def test_compare_results_takes_what_is_allowed(noisy):
    other = changed(result_of(noisy), sampling={"top_k": 5}, prompts=hash_prompts(["一只狗"]))
    found = compare_results(result_of(noisy), other, NAMES, ("sampling", "prompts.sha256"))
    assert found.allowed == ["prompts.sha256", "sampling.top_k"]


def test_compare_results_refuses_other_values_and_units(noisy):
    value = result_of(noisy).results["psnr"]
    with pytest.raises(InputError, match=r"a\.json and b\.json share no value"):
        compare_results(result_of(noisy), result_of(noisy, results={"ssim": value}), NAMES)
    with pytest.raises(InputError, match='the value "psnr" has the unit "dB" in one result, "fraction" in the other'):
        compare_results(result_of(noisy), result_of(noisy, results={"psnr": replace(value, unit="fraction")}), NAMES)


def test_bootstrap_difference_covers_a_known_difference():
    """95% intervals of a difference of 1 hold it in nearly 95% of 200 samples of 100 items."""
    generator = np.random.default_rng(5)
    inside = 0
    for _ in range(200):
        low, high = bootstrap_difference(generator.normal(0, 1, 100), generator.normal(1, 1, 100), paired=False)
        inside += low <= 1 <= high
    assert 180 <= inside <= 199


def test_combine_intervals_equals_newcombe():
    """Newcombe (1998), table II, method 10: 56/70 against 48/80 give 0.0524 to 0.3339."""
    values = []
    for right, of in ((48, 80), (56, 70)):
        low, high = wilson_interval(right, of)
        values.append(ResultValue(value=right / of, low=low, high=high, n=of))
    assert combine_intervals(*values) == pytest.approx((0.0524, 0.3339), abs=1e-4)


def test_format_value_shows_units():
    assert (format_value(0.7166, "fraction"), format_value(30.204, "dB"), format_value(2, "bits")) == (
        *("71.7%", "30.20 dB", "2 bits"),
    )
    assert (format_difference(-0.051, "fraction"), format_difference(0.5, "dB")) == ("-5.1 points", "+0.50 dB")
    assert format_interval(-0.1, 0.2, "fraction", signed=True) == "-10.0 to +20.0"


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (1, 16, [0, 5, 10, 15, 20]), (3, 3, [1, 2, 3, 4, 5])],
)
def test_nice_ticks_cover_the_range(low, high, ticks):
    assert nice_ticks(low, high) == ticks


class Tags(HTMLParser):
    """Collects tags that are opened, addresses that a browser would request, and checks that tags are closed."""

    def __init__(self, page):
        super().__init__()
        self.opened, self.seen, self.addresses = [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.seen.append(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "href")]
        if tag not in ("meta", "img", "br"):
            self.opened.append(tag)

    def handle_endtag(self, tag):
        assert self.opened.pop() == tag

    def handle_startendtag(self, tag, attributes):
        self.seen.append(tag)


@pytest.fixture
def page(noisy, tmp_path) -> str:
    """A page with a loss of one item, a curve, and a label that is markup."""
    labels = [f"<b>第{index}只狐狸</b>" for index in range(COUNT)]
    results = []
    for number, name in enumerate("ab"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 8), (200 * number, 10, 10)).save(tmp_path / name / "one.png")
        values = [value - 3 * number * (index == 7) for index, value in enumerate(noisy)]
        found = result_of(values, name=name)
        items = replace(found.items, pictures=["one.png"] * COUNT, labels=labels)
        curve = ResultCurve(x=[1, 2, 4], y=[0.5, 0.6, 0.7], low=[0.4, 0.5, 0.6], high=[0.6, 0.7, 0.8], x_label="N")
        results.append(replace(found, items=items, curves={"best of N": curve}))
    files = ComparedFiles(names=("a.json", "b.json"), folders=(tmp_path / "a", tmp_path / "b"))
    return comparison_page(compare_results(*results, NAMES), files)


def test_page_requests_nothing_and_closes_its_tags(page):
    tags = Tags(page)
    assert tags.opened == []
    assert tags.addresses
    assert all(address.startswith("data:image/png;base64,") for address in tags.addresses)
    assert not re.search(r"https?://|@import|<script|url\(", page)


def test_page_shows_the_item_that_lost(page):
    """One item of 40 lost 3 dB: it alone is shown, with both pictures, and its label is no markup."""
    assert page.count("<figure>") == 1 + 1  # a curve and a pair
    assert Tags(page).seen.count("img") == 2
    assert "&lt;b&gt;第7只狐狸&lt;/b&gt;" in page
    assert page.count("<polyline") == 2
    assert page.count("<polygon") == 2


def test_page_refuses_a_missing_picture(noisy, tmp_path):
    results = []
    for shift in (0, 1):
        found = result_of([value + shift for value in noisy])
        results.append(replace(found, items=replace(found.items, pictures=["gone.png"] * COUNT)))
    files = ComparedFiles(names=NAMES, folders=(tmp_path, tmp_path))
    with pytest.raises(InputError, match=r"gone\.png"):
        comparison_page(compare_results(*results, NAMES), files)
