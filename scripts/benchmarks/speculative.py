"""Compare speculative with sequential decoding: forward passes, time, and whether the codes are equal.

    OMP_NUM_THREADS=1 python scripts/benchmarks/speculative.py --result FILE

Both sides generate the same images in turn, in one process, and their codes are compared. A line is a case, a batch
size and the maximal window, the number of codes of a row that are drafted per forward pass; "auto" is the default.
Prompts name objects of the emoji world. Times are from prompts to pixels: CPU time of all threads, or passed time on
another device than a CPU. The cases:

* generate: images of different prompts
* candidates: images of one prompt
* guided: images of different prompts with guidance 2
* complete: images of different prompts with half of the codes given
* upscale: images to upscale
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import arguments
import numpy as np
import torch
from torch import Tensor

from cogview.evaluation.manifest import (
    Manifest,
    ResultValue,
    SeedsRecord,
    hash_prompts,
    write_result,
)
from cogview.evaluation.metrics import bootstrap
from cogview.evaluation.model_record import describe_hardware, describe_model, describe_versions
from cogview.pipeline.cogview import CogView
from cogview.pipeline.requests import GenerationRequest
from cogview.pipeline.results import GeneratedImage, only_images

THINGS = ("狐狸", "红苹果", "足球", "猫", "企鹅", "蓝色汽车")
COLOURS = ("蓝色", "黄色", "紫色", "绿色", "粉色")
NUMBERS = ("一只", "两只", "三只")
PROMPTS = [
    *(f"{colour}背景上的{number}{thing}" for colour in COLOURS for number, thing in zip(NUMBERS, THINGS, strict=False)),
    *(f"左边是{one}，右边是{two}，{c}背景" for c, one, two in zip(COLOURS, THINGS, THINGS[1:], strict=False)),
]
CASES = ("generate", "candidates", "guided", "complete", "upscale")
GUIDANCE = 2.0


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Speculative beside sequential decoding of some batches.

    Attributes:
        ratios: Time of sequential over that of speculative decoding, of each batch.
        forwards: Forward passes of a batch, on average.
        sequential: The same without speculation.
        different: Codes that differ.
        codes: Codes in all.
    """

    ratios: tuple[float, ...]
    forwards: float
    sequential: float
    different: int
    codes: int

    def row(self) -> str:
        """Return the cells of a table."""
        return (
            f"{self.forwards:.1f} of {self.sequential:.0f} | {self.sequential / self.forwards:.2f} | "
            f"{np.median(self.ratios):.2f} | {self.different} of {self.codes}"
        )

    def values(self, name: str) -> dict[str, ResultValue]:
        """Return the values of a result file, whose names start with ``name``."""
        ratios, count = np.array(self.ratios), len(self.ratios)
        interval = bootstrap(lambda rows: np.median(ratios[rows], axis=-1), count)
        return {
            f"{name}.time_ratio": ResultValue(**interval, n=count, higher_is_better=True),
            f"{name}.forwards": ResultValue(value=self.forwards, n=count, unit="passes"),
            f"{name}.sequential_forwards": ResultValue(value=self.sequential, n=count, unit="passes"),
            f"{name}.different": ResultValue(value=self.different, n=self.codes, unit="codes"),
        }


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print a table."""
    parser = arguments.Parser(__doc__)
    parser.add_argument("--model", default="cogview-emoji", help="(default: cogview-emoji)")
    parser.add_argument("--device", default="auto", help="(default: auto)")
    parser.add_argument("--dtype", default="auto", help="(default: auto)")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES, help="(default: all)")
    parser.add_argument("--batches", type=arguments.counts, default="1,2,4,8,16", help="(default: 1,2,4,8,16)")
    parser.add_argument(
        "--windows", type=windows, default="auto", help="codes drafted per row, such as 4,8,auto (default: auto)"
    )
    parser.add_argument("--repeats", type=arguments.count, default=9, help="batches of each kind (default: 9)")
    parser.add_argument("--result", type=arguments.output_file, help="write all values to a result file")
    args = parser.parse_args(argv)

    model = CogView.from_pretrained(args.model, device=args.device, dtype=args.dtype)
    print(f"{model.name} on {model.placement}, {torch.get_num_threads()} threads, PyTorch {torch.__version__}")
    print("| case | batch | window | forwards per batch | fewer | time, ratio | codes that differ |")
    print("|---|---|---|---|---|---|---|")
    values: dict[str, ResultValue] = {}
    for case in args.cases:
        for batch in args.batches:
            if batch == 1 and case == "candidates":
                continue
            for window in args.windows:
                found = compare(model, case, batch, None if window == "auto" else window, args.repeats)
                print(f"| {case} | {batch} | {window} | {found.row()} |", flush=True)
                values |= found.values(f"{case}.{batch}.{window}")
    if args.result:
        model.speculative = None
        manifest = Manifest(
            measure="speculative",
            prompts=hash_prompts(PROMPTS),
            seeds=SeedsRecord(first=0, count=args.repeats + 1),
            model=describe_model(model),
            settings={
                name: list(value) if isinstance(value, tuple) else value
                for name, value in vars(args).items()
                if name in ("cases", "batches", "windows", "repeats")
            },
            versions=describe_versions(),
            hardware=describe_hardware(model.placement.device),
        )
        write_result(args.result, manifest, values)
    return 0


def windows(text: str) -> list[int | str]:
    """Return the windows of a text such as ``4,8,auto``."""
    return [part if part == "auto" else arguments.count(part) for part in text.split(",")]


def compare(model: CogView, case: str, batch: int, window: int | None, repeats: int) -> Comparison:
    """Generate ``repeats`` batches with both methods."""
    ratios, forwards, sequential, different, codes = [], 0, 0, 0, 0
    for repeat in range(repeats + 1):  # the first warms up
        requests = requests_of(model, case, batch, repeat)
        plain, plain_forwards, plain_seconds = generated(model, requests, 1)
        drafted, drafted_forwards, drafted_seconds = generated(model, requests, window)
        different += int((plain != drafted).sum())
        codes += plain.size
        if repeat:
            ratios.append(plain_seconds / drafted_seconds)
            forwards += drafted_forwards
            sequential += plain_forwards
    return Comparison(
        ratios=tuple(ratios),
        forwards=forwards / repeats,
        sequential=sequential / repeats,
        different=different,
        codes=codes,
    )


def requests_of(model: CogView, case: str, batch: int, repeat: int) -> list[GenerationRequest]:
    """Return the requests of a batch; upscaling and completion start from images that are generated for them."""
    numbers = [repeat if case == "candidates" else repeat * batch + number for number in range(batch)]
    requests = [
        GenerationRequest(prompt=PROMPTS[number % len(PROMPTS)], seed=repeat, index=index)
        for index, number in enumerate(numbers)
    ]
    if case == "guided":
        return [replace(request, sampling=model.sampling(guidance=GUIDANCE)) for request in requests]
    if case not in ("complete", "upscale"):
        return requests
    images = [image.codes for image in only_images(model.run(requests))]
    if case == "upscale":
        return [replace(request, task="upscale", codes=codes) for request, codes in zip(requests, images, strict=True)]
    half = len(images[0]) // 2
    return [
        replace(request, seed=repeat + 1, codes=codes[:half]) for request, codes in zip(requests, images, strict=True)
    ]


def generated(
    model: CogView, requests: Sequence[GenerationRequest], window: int | None
) -> tuple[np.ndarray, int, float]:
    """Return the codes, the number of forward passes through the transformer, and the seconds."""
    count = 0
    transformer = model.transformer_for(requests[0].task)
    hidden = transformer.hidden

    def counted(*ids: Tensor, **named: Any) -> Tensor:
        nonlocal count
        count += 1
        return hidden(*ids, **named)

    clock = time.process_time if model.placement.device.type == "cpu" else time.perf_counter
    transformer.hidden = counted  # type: ignore[method-assign]
    model.speculative = window
    start = clock()
    results = [result for result in model.run(requests, batch_size=10_000) if isinstance(result, GeneratedImage)]
    seconds = clock() - start
    del transformer.hidden  # that of the class remains
    return np.stack([result.codes for result in results]), count, seconds


if __name__ == "__main__":
    arguments.run_script(main)
