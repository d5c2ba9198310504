"""MS-COCO-30k: captions of MS COCO val2014 and the pictures that are generated from them.

Pictures are compared with true ones by the blurred FID-k of CogView (``coco_distances``).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cogview.errors import InputError
from cogview.evaluation.field_benchmarks.benchmark import Benchmark, BenchmarkItem, BenchmarkScore
from cogview.evaluation.text_files import read_hypotheses


def read_items(path: Path) -> list[BenchmarkItem]:
    """Return captions with the ids of their pictures: a table or JSON lines with id and caption, or COCO's ``.json``.

    Raises:
        InputError: The file cannot be read, a caption is empty, or an id is given twice.
    """
    return [BenchmarkItem(id=key, prompt=text) for key, text in read_hypotheses(path).items()]


def score(items: Sequence[BenchmarkItem], answers: Path, samples: int) -> BenchmarkScore:
    """Raise InputError: distances are measured against pictures, not computed from answers."""
    raise InputError("MS-COCO-30k has no answers: compare its pictures with true ones by --reference PICTURES")


COCO = Benchmark(
    name="coco-30k",
    title="MS-COCO-30k",
    source="30,000 captions of MS COCO val2014, in Chinese, one of a picture",
    counts={"": 30_000},
    samples=1,
    read=read_items,
    layout=lambda position, item, sample, model: f"{item.id}.png" if sample == 0 else f"{item.id}-{sample}.png",
    score=score,
    answers="pictures",
    unique=False,
)
