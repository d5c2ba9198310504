"""BLEU, ROUGE-L and CIDEr-D of texts against several references each, on tokens: characters or words of Chinese.

The definitions are those of ``pycocoevalcap``, the scorer of MS COCO captions, written anew:

* BLEU-1 to 4: Papineni et al. (ACL 2002) over the corpus, the closest length of a reference, no smoothing.
* ROUGE-L: Lin (2004), with beta = 1.2 and the greatest precision and recall over the references; the mean over items.
* CIDEr-D: Vedantam et al. (CVPR 2015, arXiv:1411.5726), section 4: n = 1 to 4, clipped counts, a Gaussian penalty of
  lengths with sigma = 6, times 10. Document frequencies are those of the references at hand, so the score depends on
  the whole set: identical captions give 10 for two different items and 0 for a single one.

``pycocoevalcap`` first lowers the case and drops punctuation by a tokenizer of English. Here ``tokenizer`` does.
"""

# N items, K statistics of an item, R resamples, n length of an n-gram
from __future__ import annotations

import math
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from cogview.errors import InputError

ORDERS = 4  # n-grams of 1 to 4 tokens
BETA = 1.2  # of ROUGE-L: the weight of recall
SIGMA = 6.0  # of CIDEr-D, in tokens
TINY, SMALL = 1e-15, 1e-9  # keep precisions of 0 and empty corpora defined, as pycocoevalcap does
RESAMPLES = 1000
UNITS = ("characters", "words")

Tokens: TypeAlias = tuple[str, ...]
Vector: TypeAlias = dict[Tokens, float]


@dataclass(frozen=True, kw_only=True, eq=False)
class TextScores:
    """Scores of N texts.

    Attributes:
        summary: Of each measure ``value``, and ``low`` and ``high`` of its 95% bootstrap interval over the items;
            document frequencies stay those of the whole set.
        items: Values of single items, float64 (N,), of the measures that are means over items.
    """

    summary: dict[str, dict[str, float]]
    items: dict[str, np.ndarray]


def normalize_text(text: str) -> str:
    """Return a text in compatibility form NFKC and lower case, with a space for each punctuation mark."""
    folded = unicodedata.normalize("NFKC", text).lower()
    return "".join(" " if unicodedata.category(letter)[0] in "PZC" else letter for letter in folded)


def split_characters(text: str) -> Tokens:
    """Return the characters of a text without punctuation and white space, in lower case."""
    return tuple("".join(normalize_text(text).split()))


def split_words(text: str) -> Tokens:
    """Return the words of a text by jieba, without punctuation and white space, in lower case.

    Raises:
        InputError: jieba is not installed.
    """
    try:
        import jieba
    except ImportError:
        raise InputError(
            "words of Chinese need jieba; install it: pip install jieba, or choose --by characters"
        ) from None
    jieba.setLogLevel("WARNING")  # it logs the loading of its dictionary
    return tuple(word for word in jieba.lcut(normalize_text(text)) if word.strip())


def tokenizer(unit: str) -> Callable[[str], Tokens]:
    """Return the function that splits a text into tokens.

    Args:
        unit: One of ``UNITS``.
    """
    return {"characters": split_characters, "words": split_words}[unit]


def score_texts(hypotheses: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> TextScores:
    """Measure texts against their references.

    Args:
        hypotheses: Tokens of N texts, N >= 1.
        references: Tokens of the references of each, at least one.

    Returns:
        ``bleu_1`` to ``bleu_4`` and ``rouge_l`` in [0, 1], ``cider`` in [0, 10]. Of single items ``rouge_l`` and
        ``cider``; BLEU is a quotient of sums over the corpus.
    """
    counts_NK = np.array([bleu_counts(*pair) for pair in zip(hypotheses, references, strict=True)], dtype=np.float64)
    items = {
        "cider": cider_scores(hypotheses, references),
        "rouge_l": np.array([rouge_l(*pair) for pair in zip(hypotheses, references, strict=True)]),
    }
    bleu = bleu_from_sums(counts_NK.sum(axis=0, keepdims=True))[0]
    statistics_NK = np.concatenate([counts_NK, np.stack(list(items.values()), axis=1)], axis=1)
    sums_RK = resampled_sums(statistics_NK)
    count = len(hypotheses)
    columns = {
        f"bleu_{n + 1}": (bleu[n], bleu_from_sums(sums_RK[:, : counts_NK.shape[1]])[:, n]) for n in range(ORDERS)
    }
    for index, (name, values) in enumerate(items.items()):
        columns[name] = (values.mean(), sums_RK[:, counts_NK.shape[1] + index] / count)
    summary = {}
    for name, (value, resampled) in columns.items():
        low, high = np.percentile(resampled, [2.5, 97.5])
        summary[name] = {"value": float(value), "low": float(low), "high": float(high)}
    return TextScores(summary=summary, items=items)


def resampled_sums(values_NK: np.ndarray, resamples: int = RESAMPLES) -> np.ndarray:
    """Return the sums of bootstrap resamples of items, float64 (R, K); equal calls give equal sums.

    Args:
        values_NK: Statistics of N items.
        resamples: Number of resamples R.
    """
    generator, count = np.random.default_rng(0), len(values_NK)
    sums_RK = np.empty((resamples, values_NK.shape[1]))
    for row in range(resamples):  # one at a time: all together would hold resamples * N indices
        chosen = np.bincount(generator.integers(count, size=count), minlength=count)
        sums_RK[row] = chosen @ values_NK
    return sums_RK


def ngrams(tokens: Tokens, n: int) -> Counter[Tokens]:
    """Return the n-grams of tokens with their counts."""
    return Counter(tokens[start : start + n] for start in range(len(tokens) - n + 1))


def bleu_counts(hypothesis: Tokens, references: Sequence[Tokens]) -> list[int]:
    """Return the statistics of an item from which BLEU is computed.

    Args:
        hypothesis: The tokens.
        references: Tokens of its references.

    Returns:
        Clipped matches of n = 1 to 4, numbers of n-grams of n = 1 to 4, the length, and that of the reference closest
        in length (of two as close, the shorter one).
    """
    matches, totals = [], []
    for n in range(1, ORDERS + 1):
        greatest: Counter[Tokens] = Counter()
        for reference in references:
            greatest |= ngrams(reference, n)
        matches.append(sum((ngrams(hypothesis, n) & greatest).values()))
        totals.append(max(0, len(hypothesis) - n + 1))
    length = len(hypothesis)
    closest = min((abs(len(each) - length), len(each)) for each in references)[1]
    return [*matches, *totals, length, closest]


def bleu_from_sums(sums_RK: np.ndarray) -> np.ndarray:
    """Return BLEU-1 to 4, float64 (R, 4), of sums of ``bleu_counts`` (R, 10)."""
    matches, totals = sums_RK[:, :ORDERS], sums_RK[:, ORDERS : 2 * ORDERS]
    logs = np.log((matches + TINY) / (totals + SMALL)).cumsum(axis=1) / np.arange(1, ORDERS + 1)
    ratio = (sums_RK[:, -2:-1] + TINY) / (sums_RK[:, -1:] + SMALL)
    return np.asarray(np.exp(logs + np.minimum(0.0, 1.0 - 1.0 / ratio)))


def rouge_l(hypothesis: Tokens, references: Sequence[Tokens]) -> float:
    """Return ROUGE-L of an item, in [0, 1]: precision and recall are each the greatest over the references."""
    common = [longest_common(hypothesis, each) for each in references]
    precision = max(common) / len(hypothesis) if hypothesis else 0.0
    recall = max(length / len(each) if each else 0.0 for length, each in zip(common, references, strict=True))
    if precision == 0 or recall == 0:
        return 0.0
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)


def longest_common(first: Tokens, second: Tokens) -> int:
    """Return the length of the longest common subsequence."""
    row = [0] * (len(second) + 1)
    for token in first:
        before = 0  # the value up and to the left
        for index, other in enumerate(second, start=1):
            above = row[index]
            row[index] = before + 1 if token == other else max(above, row[index - 1])
            before = above
    return row[-1]


def cider_scores(hypotheses: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> np.ndarray:
    """Return CIDEr-D of each item, float64 (N,), in [0, 10].

    Args:
        hypotheses: Tokens of N texts.
        references: Tokens of the references of each. The document frequency of an n-gram is the number of items with
            it in any reference.
    """
    counted = [[_all_ngrams(each) for each in group] for group in references]
    frequency: Counter[Tokens] = Counter()
    for group in counted:
        frequency.update({gram for counts in group for gram in counts})
    log_items = math.log(len(hypotheses))
    scores = []
    for hypothesis, group, texts in zip(hypotheses, counted, references, strict=True):
        vectors = _weighted(_all_ngrams(hypothesis), frequency, log_items)
        total = 0.0
        for counts, text in zip(group, texts, strict=True):
            # pycocoevalcap compares numbers of bigrams: a text without tokens is as long as one of a single token.
            delta = max(0, len(hypothesis) - 1) - max(0, len(text) - 1)
            total += _similarity(vectors, _weighted(counts, frequency, log_items)) * math.exp(
                -(delta**2) / (2 * SIGMA**2)
            )
        scores.append(10.0 * total / len(group))
    return np.array(scores)


def _all_ngrams(tokens: Tokens) -> Counter[Tokens]:
    counts: Counter[Tokens] = Counter()
    for n in range(1, ORDERS + 1):
        counts.update(ngrams(tokens, n))
    return counts


def _weighted(counts: Counter[Tokens], frequency: Counter[Tokens], log_items: float) -> list[Vector]:
    """Return the tf-idf vector of each n from 1 to 4; an n-gram of no reference has the frequency 1."""
    vectors: list[Vector] = [{} for _ in range(ORDERS)]
    for gram, count in counts.items():
        vectors[len(gram) - 1][gram] = count * (log_items - math.log(max(1, frequency[gram])))
    return vectors


def _similarity(vectors: Sequence[Vector], others: Sequence[Vector]) -> float:
    """Return the clipped cosine of two texts, the mean over n."""
    total = 0.0
    for vector, other in zip(vectors, others, strict=True):
        norms = _norm(vector) * _norm(other)
        if norms > 0:
            total += (
                sum(min(value, other.get(gram, 0.0)) * other.get(gram, 0.0) for gram, value in vector.items()) / norms
            )
    return total / ORDERS


def _norm(vector: Vector) -> float:
    return math.sqrt(sum(value * value for value in vector.values()))
