"""The benchmarks by name."""

from __future__ import annotations

from cogview.evaluation.field_benchmarks.benchmark import Benchmark
from cogview.evaluation.field_benchmarks.chinese_word import CHINESE_WORD
from cogview.evaluation.field_benchmarks.coco import COCO
from cogview.evaluation.field_benchmarks.dpg import DPG
from cogview.evaluation.field_benchmarks.editing import GEDIT, IMGEDIT
from cogview.evaluation.field_benchmarks.geneval import GENEVAL
from cogview.evaluation.field_benchmarks.oneig import ONEIG

BENCHMARKS: dict[str, Benchmark] = {
    benchmark.name: benchmark for benchmark in (COCO, GENEVAL, DPG, ONEIG, CHINESE_WORD, GEDIT, IMGEDIT)
}
