"""Filters with known answers, and noise that is a function of its key."""

# B rows, V candidate ids

import math

import pytest
import torch

from cogview.generation.sampling import (
    MAX_SEED,
    filter_logits,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    keyed_gumbel,
    noise_keys,
    noise_stream,
    sample,
)
from cogview.modeling.config import Sampling

CUT = -math.inf


def random_logits(*shape, seed=0):
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def log_probs(*probabilities):
    return torch.tensor([probabilities]).log()


def kept(logits):
    return [row.isfinite().nonzero().flatten().tolist() for row in logits]


def key(*values):
    return torch.tensor(values, dtype=torch.int64)


# --- filters ------------------------------------------------------------------------------------------------------


def test_keep_top_k_keeps_the_k_largest():
    logits = torch.tensor([[1.0, 5.0, 3.0, 4.0], [9.0, 0.0, -1.0, 8.0]])
    assert keep_top_k(logits, 2).tolist() == [[CUT, 5.0, CUT, 4.0], [9.0, CUT, CUT, 8.0]]


def test_keep_top_k_keeps_ties_with_the_smallest():
    logits = torch.tensor([[2.0, 1.0, 2.0, 3.0, 2.0]])
    assert kept(keep_top_k(logits, 1)) == [[3]]
    assert kept(keep_top_k(logits, 2)) == [[0, 2, 3, 4]]


@pytest.mark.parametrize("k", [5, 6, 10_000])
def test_keep_top_k_returns_a_new_tensor_when_k_covers_all_ids(k):
    logits = random_logits(2, 5)
    result = keep_top_k(logits, k)
    assert torch.equal(result, logits)
    assert result.data_ptr() != logits.data_ptr()


@pytest.mark.parametrize(
    ("p", "expected"),
    [(1e-6, [1]), (0.4, [1]), (0.5, [1]), (0.51, [1, 3]), (0.8, [1, 3]), (0.9, [0, 1, 3]), (1.0, [0, 1, 2, 3])],
)
def test_keep_top_p_keeps_the_smallest_set_that_reaches_p(p, expected):
    probabilities = log_probs(0.125, 0.5, 0.0625, 0.3125)
    assert kept(keep_top_p(probabilities, p)) == [expected]


def test_keep_top_p_keeps_the_first_ids_when_all_are_equal():
    """The first ids remain, so that equal logits always keep the same ids."""
    assert kept(keep_top_p(torch.zeros(1, 1024), 0.5)) == [list(range(512))]


@pytest.mark.parametrize(
    ("p", "expected"), [(0.1, [0, 1, 2, 3]), (0.2, [0, 1, 3]), (0.6, [1, 3]), (0.63, [1]), (0.99, [1])]
)
def test_keep_min_p_keeps_a_fraction_of_the_largest_probability(p, expected):
    """Of the largest, 0.5, the others are 1/4, 1/8 and 5/8."""
    assert kept(keep_min_p(log_probs(0.125, 0.5, 0.0625, 0.3125), p)) == [expected]


def test_filters_do_not_change_the_kept_logits():
    logits = random_logits(3, 50)
    for result in (keep_top_k(logits, 7), keep_top_p(logits, 0.7), keep_min_p(logits, 0.1)):
        stays = result.isfinite()
        assert torch.equal(result[stays], logits[stays])
        assert (result[~stays] == CUT).all()
        assert 0 < stays.sum() < stays.numel()
        smallest_kept = result.masked_fill(~stays, math.inf).amin(dim=-1)
        assert (logits.masked_fill(stays, CUT).amax(dim=-1) <= smallest_kept).all()


def test_filter_logits_applies_temperature_top_k_and_top_p_in_order():
    """Of 0.4 0.3 0.2 0.1, top-k 2 leaves 4/7 and 3/7: p = 0.5 is then reached by the first alone."""
    probabilities = log_probs(0.4, 0.3, 0.2, 0.1)
    assert kept(keep_top_p(probabilities, 0.5)) == [[0, 1]]
    assert kept(filter_logits(probabilities, Sampling(top_k=2, top_p=0.5))) == [[0]]
    # at half the temperature: 16/30, 9/30, 4/30, 1/30
    sharp = filter_logits(probabilities, Sampling(temperature=0.5, top_k=0, top_p=0.83))
    assert kept(sharp) == [[0, 1]]
    torch.testing.assert_close(sharp[:, :2], probabilities[:, :2] / 0.5)


def test_filter_logits_only_scales_when_filters_are_disabled():
    logits = random_logits(2, 9)
    result = filter_logits(logits, Sampling(temperature=2.0, top_k=0, top_p=1.0))
    torch.testing.assert_close(result, logits / 2, atol=0, rtol=0)


@pytest.mark.parametrize(
    "sampling",
    [Sampling(top_k=3), Sampling(top_k=0, top_p=0.6), Sampling(temperature=0.7), Sampling(top_k=0, min_p=0.2)],
)
def test_filter_logits_keeps_its_input_and_treats_rows_separately(sampling):
    logits = random_logits(4, 40)
    before = logits.clone()
    batched = filter_logits(logits, sampling)
    assert torch.equal(logits, before)
    for row in range(4):
        assert torch.equal(filter_logits(logits[row : row + 1], sampling)[0], batched[row])


def test_filter_logits_returns_float32_when_logits_are_float16():
    assert filter_logits(random_logits(1, 9).half(), Sampling()).dtype == torch.float32


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"temperature": 0.0}, "temperature must be above 0, got 0.0; for greedy decoding use top_k 1"),
        ({"temperature": -1.0}, "temperature must be above 0, got -1.0"),
        ({"temperature": math.nan}, "temperature must be above 0, got nan"),
        ({"temperature": math.inf}, "temperature must be finite, got inf"),
        ({"top_k": -1}, r"top_k must be at least 0 \(0 keeps every id\), got -1"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\], got 0.0"),
        ({"top_p": 1.5}, r"top_p must be in \(0, 1\], got 1.5"),
        ({"min_p": 1.0}, r"min_p must be in \[0, 1\), got 1.0; 0 keeps every id"),
        ({"min_p": math.nan}, r"min_p must be in \[0, 1\), got nan"),
        ({"noise_version": 3}, "noise_version must be 1 or 2, got 3"),
    ],
)
def test_sampling_raises_value_error_when_a_setting_is_out_of_range(setting, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**setting)


def test_filters_raise_value_error_when_nothing_would_remain():
    with pytest.raises(ValueError, match="top_k must be at least 1 here, got 0"):
        keep_top_k(random_logits(1, 3), 0)
    with pytest.raises(ValueError, match=r"top_p must be in \(0, 1\], got 0"):
        keep_top_p(random_logits(1, 3), 0)


# --- noise --------------------------------------------------------------------------------------------------------


def splitmix64(x: int) -> int:
    """SplitMix64 of one state in Python's integers (Steele, Lea and Flood, 2014)."""
    mask = 2**64 - 1
    x = (x + 0x9E3779B97F4A7C15) & mask
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    return x ^ (x >> 31)


def gumbel_of(seed: int, image: int, position: int, token: int) -> float:
    """The noise of one id, without tensors."""
    bits = splitmix64(splitmix64(splitmix64(splitmix64(seed) ^ image) ^ position) ^ splitmix64(token)) >> 12
    return -math.log(-math.log((bits + 0.5) / 2**52))


def test_splitmix64_gives_the_published_first_output():
    assert splitmix64(0) == 0xE220A8397B1DCDAF  # the first output of the published generator for seed 0


@pytest.mark.parametrize("seed", [0, 1, 7, 2**31, MAX_SEED])
def test_keyed_gumbel_equals_its_definition_in_integers(seed):
    noise = keyed_gumbel(noise_keys(key(seed, seed), key(0, 3), key(1, 63)), range(5, 25))
    assert noise.dtype == torch.float32
    expected = [
        [gumbel_of(seed, image, position, token) for token in range(5, 25)] for image, position in ((0, 1), (3, 63))
    ]
    torch.testing.assert_close(noise, torch.tensor(expected), atol=1e-6, rtol=1e-6)


def test_keyed_gumbel_is_the_same_across_versions():
    """If this fails, every seed gives another image. The values come from ``gumbel_of``."""
    noise = keyed_gumbel(noise_keys(key(7), key(3), key(12)), range(4))
    torch.testing.assert_close(noise, torch.tensor([[0.7579, -0.043582, 1.849311, 0.383077]]), atol=1e-5, rtol=0)


def test_keyed_gumbel_of_a_row_depends_on_its_key_alone():
    ids = range(8192)
    keys = noise_keys(key(7, 7, 8, 1), key(0, 3, 3, 0), key(5, 5, 5, 0))
    single_key = noise_keys(key(7), key(3), key(5))
    batch = keyed_gumbel(keys, ids)
    alone = keyed_gumbel(single_key, ids)
    assert torch.equal(batch[1:2], alone)
    assert torch.equal(keyed_gumbel(keys.flip(0), ids).flip(0), batch)
    assert torch.equal(keyed_gumbel(single_key, range(100, 200)), alone[:, 100:200])


@pytest.mark.parametrize("other", [(8, 3, 5), (7, 4, 5), (7, 3, 6), (3, 7, 5), (5, 3, 7), (7, 5, 3)])
def test_keyed_gumbel_differs_when_a_part_of_the_key_differs(other):
    """Exchanged parts of a key give another key too."""
    noise = keyed_gumbel(noise_keys(key(7, other[0]), key(3, other[1]), key(5, other[2])), range(4096))
    assert len(noise.unique()) > 8100  # nearly all of 8192: float32 has few values near 0
    assert abs(torch.corrcoef(noise)[0, 1].item()) < 5 / math.sqrt(4096)


def test_keyed_gumbel_is_standard_gumbel():
    """Mean 0.5772 and variance pi**2/6 over a million values; the distribution function at five points."""
    count = 10_000
    noise = keyed_gumbel(noise_keys(key(7), key(0), torch.arange(count)), range(100))
    assert noise.isfinite().all()
    assert noise.mean().item() == pytest.approx(0.577216, abs=5 * 1.2825 / 1e3)
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, rel=0.015)
    for x in (-1.0, 0.0, 0.5, 2.0, 5.0):
        probability = math.exp(-math.exp(-x))
        assert (noise <= x).float().mean().item() == pytest.approx(
            probability, abs=5 * math.sqrt(probability * (1 - probability) / 1e6)
        )


@pytest.mark.parametrize("axis", ["seed", "image", "position", "id"])
def test_keyed_gumbel_is_uncorrelated_between_neighbours(axis):
    """Keys are small consecutive numbers, whose structure a weak hash would preserve."""
    counting, constant = torch.arange(20_000), torch.full((20_000,), 3)
    keys = noise_keys(*(counting if axis == name else constant for name in ("seed", "image", "position")))
    noise = keyed_gumbel(keys[:1], range(20_000))[0] if axis == "id" else keyed_gumbel(keys, range(1))[:, 0]
    for lag in (1, 2, 8, 64):
        correlation = torch.corrcoef(torch.stack([noise[:-lag], noise[lag:]]))[0, 1].item()
        assert abs(correlation) < 5 / math.sqrt(20_000), (axis, lag)


# --- sampling -----------------------------------------------------------------------------------------------------


def counts_of(logits_V, sampling, count=40_000, seed=1):
    """Return how often each id is sampled at ``count`` positions."""
    keys = noise_keys(key(seed), key(0), torch.arange(count))
    chosen, _ = sample(logits_V.expand(count, -1), keys, range(len(logits_V)), sampling)
    return torch.bincount(chosen, minlength=len(logits_V)).double()


@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
def test_sample_follows_the_softmax(temperature):
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, 1.5, 0.3, -2.0, 0.9])
    expected = (logits.double() / temperature).softmax(dim=-1) * 40_000
    counts = counts_of(logits, Sampling(temperature=temperature, top_k=0))
    chi_square = ((counts - expected).square() / expected).sum().item()
    assert chi_square < 24.3  # 7 degrees of freedom, one chance in a thousand; the keys are fixed


def test_sample_follows_the_filtered_softmax():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, 1.5])
    counts = counts_of(logits, Sampling(top_k=3))
    assert counts[[2, 3]].sum() == 0
    expected = logits[[0, 1, 4]].double().softmax(dim=-1) * 40_000
    assert ((counts[[0, 1, 4]] - expected).square() / expected).sum().item() < 13.8  # 2 degrees of freedom


def test_sample_is_the_argmax_when_top_k_is_1():
    logits = random_logits(50, 30)
    keys = noise_keys(torch.arange(50), torch.arange(50), torch.arange(50))
    assert torch.equal(sample(logits, keys, range(30), Sampling(top_k=1))[0], logits.argmax(dim=-1))
    assert not torch.equal(sample(logits, keys, range(30), Sampling(top_k=0))[0], logits.argmax(dim=-1))


@pytest.mark.slow
@pytest.mark.parametrize(("top_p", "min_p"), [(1.0, 0.0), (0.7, 0.0), (1.0, 0.05), (0.9, 0.2)])
@pytest.mark.parametrize("top_k", [1, 5, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])  # bfloat16: many logits are equal
def test_sample_is_the_same_with_noise_of_the_kept_ids_alone(top_k, top_p, min_p, dtype):
    """On a CPU the ids that top-k drops get no noise; by the definition all do."""
    logits = random_logits(100, 8192).to(dtype).float()
    keys = noise_keys(torch.arange(100), key(0), key(3))
    sampling = Sampling(top_k=top_k, top_p=top_p, min_p=min_p, temperature=0.7)
    expected = (filter_logits(logits, sampling) + keyed_gumbel(keys, range(4, 8196))).argmax(dim=-1)
    assert torch.equal(sample(logits, keys, range(4, 8196), sampling)[0], expected)


def test_sample_includes_all_ties_when_there_are_more_than_top_k():
    """Each of the tied ids can be sampled."""
    logits = torch.zeros(2000, 600)
    logits[:, :100] = 1.0
    chosen, _ = sample(logits, noise_keys(torch.arange(2000), key(0), key(0)), range(600), Sampling(top_k=3))
    assert chosen.unique().tolist() == list(range(100))


def test_noise_stream_differs_between_prompts_and_images():
    streams = {noise_stream(index, prompt, version=2) for index in range(50) for prompt in ([1], [2], [1, 2], [2, 1])}
    assert len(streams) == 200
    assert all(-(2**63) <= stream < 2**63 for stream in streams)


@pytest.mark.parametrize(("prompt", "version"), [([], 2), ([], 1), ([5, 9], 1)])
def test_noise_stream_is_the_index_without_a_prompt_and_in_version_1(prompt, version):
    assert noise_stream(3, prompt, version) == 3


def test_noise_stream_is_a_fixed_function():
    """Golden values of BLAKE2b: images of a seed may not change with the platform."""
    assert [noise_stream(0, [3, 1, 4], 2), noise_stream(7, (506,), 2)] == [-4938247510052647388, -8976995211904132124]
