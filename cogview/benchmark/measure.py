"""How fast a model draws here, against the least time that the machine would need: what ``cogview bench`` measures.

Each batch size is measured in a process of its own, so that the peak of its memory is its own.
"""

# B pictures of a batch, G codes on a side
from __future__ import annotations

import multiprocessing
import re
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median

import numpy as np
import torch

from cogview.checkpoints.checkpoint import Model, load_model
from cogview.checkpoints.registry import resolve_checkpoint
from cogview.device import DevicePlacement, is_out_of_memory, peak_process_memory
from cogview.errors import InputError
from cogview.generation.decode import decode
from cogview.generation.requests import DecodingProgress, DecodingRequest
from cogview.kernels.linear import has_native_kernels
from cogview.modeling.config import ModelConfig, TransformerConfig
from cogview.modeling.quantization import Int4Linear, swap_quantized_linears
from cogview.modeling.transformer import INIT_STD, Transformer
from cogview.pipeline.cogview import CogView
from cogview.planning.inference import ACTIVATION_BYTES, ForwardPass, HardwareSpeed, InferenceEstimate, position_bytes
from cogview.tokenizers.layouts import TokenSequence
from cogview.tokenizers.text import TextTokenizer
from cogview.vqvae.model import VQVAE, VQVAEConfig

TERMINATE_TIMEOUT = 5.0  # seconds for a process to end when it is told to


@dataclass(frozen=True, kw_only=True)
class BenchmarkTarget:
    """What is measured: the weights of a checkpoint folder, or random ones of a shape, and where they are."""

    config: ModelConfig
    image_config: VQVAEConfig
    placement: DevicePlacement
    folder: Path | None = None  # None: random weights
    speculative: int | None = None  # codes that are guessed at one go (``engine.fill``)

    def load(self) -> CogView:
        """The model, in this process."""
        place = self.placement
        if self.folder is None:
            return CogView(random_model(self.config, self.image_config, place), place, "random weights")
        return CogView(load_model(self.folder, place.device, place.dtype, place.quantization), place, str(self.folder))


@dataclass(frozen=True, kw_only=True)
class RequestTiming:
    """The time of one request, which draws a batch."""

    first_code: float  # the texts are read, and the first code of each picture is drawn
    other_codes: float
    pixels: float


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What a process of its own found."""

    requests: tuple[RequestTiming, ...]
    peak: int | None  # bytes, None where the system does not say


@dataclass(frozen=True, kw_only=True)
class BenchmarkResult:
    """A batch size in numbers. Of pictures that were drawn in part, the other codes take the same share of ``speed``.

    ``codes`` is how many codes of each picture were drawn, 2 at least.
    """

    plan: InferenceEstimate
    speed: HardwareSpeed
    codes: int
    measured: Measurement

    @property
    def first_image(self) -> list[float]:
        """Seconds of each request until there are pixels, which all pictures of a batch have at the same time."""
        steps = _steps(self.plan)
        larger = 1.0
        if self.codes <= len(steps):
            larger = self._least(steps) / self._least(steps[: self.codes - 1])
        return [one.first_code + larger * one.other_codes + one.pixels for one in self.measured.requests]

    @property
    def images_per_second(self) -> float:
        """Of the median request."""
        return self.plan.rows / median(self.first_image)

    @property
    def tokens_per_second(self) -> float:
        """Codes of all pictures behind the first ones, over the median time that they took."""
        return self.plan.rows * (self.codes - 1) / self._other_codes

    @property
    def share(self) -> float:
        """The least time of the codes behind the first ones by ``speed``, over the median time that they took."""
        return self._least(_steps(self.plan)[: self.codes - 1]) / self._other_codes

    @property
    def _other_codes(self) -> float:
        return median(one.other_codes for one in self.measured.requests)

    def _least(self, reads: Sequence[ForwardPass]) -> float:
        return sum(roofline_seconds(self.plan, read, self.speed) for read in reads)


class Failed(Exception):
    """A batch could not be drawn; the message says why."""


def roofline_seconds(plan: InferenceEstimate, read: ForwardPass, speed: HardwareSpeed) -> float:
    """The time of a read by the roofline: that of what it must move, or of its products, whichever is longer.

    Weights are moved once for all rows, and the keys and values so far of every row.
    """
    weights = plan.layers + read.output_ids * plan.transformer.width * ACTIVATION_BYTES[plan.dtype]
    kept = plan.rows * (1 + plan.guided) * read.total_positions * position_bytes(plan.transformer, plan.dtype)
    return max((weights + kept) / speed.bandwidth, plan.flops(read) / speed.flops)


def measure_in_subprocess(subject: BenchmarkTarget, rows: int, *, codes: int, repeats: int, free: int) -> Measurement:
    """``measure_requests`` in a fresh process. Raises ``Failed`` where its memory does not suffice, or it ends."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_report, args=(sender, subject, rows, codes, repeats, free), daemon=True)
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited: Ctrl-C ends this process, and this one that
    try:
        process.start()
    finally:
        signal.signal(signal.SIGINT, handler)
    sender.close()  # ours, so that the end of the process is the end of what comes
    try:
        found = receiver.recv()
    except EOFError:
        process.join()
        raise Failed(
            f"its process ended with status {process.exitcode} (-9: the system killed it, mostly for want of memory)"
        ) from None
    except BaseException:
        process.terminate()
        process.join(TERMINATE_TIMEOUT)
        process.kill()
        raise
    process.join()
    if isinstance(found, Exception):
        raise found
    return found


def _report(sender: Connection, subject: BenchmarkTarget, rows: int, codes: int, repeats: int, free: int) -> None:
    """``measure_requests``, with what it returns or has to say against it sent to the parent."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # with the locks of progress bars released
    found: Measurement | Exception
    try:
        found = measure_requests(subject, rows, codes=codes, repeats=repeats, free=free)
    except InputError as error:
        found = error
    except (MemoryError, RuntimeError) as error:  # that of CUDA and that of the allocator for CPUs are RuntimeErrors
        if not is_out_of_memory(error):
            raise
        found = Failed("out of memory")
    sender.send(found)


def measure_requests(subject: BenchmarkTarget, rows: int, *, codes: int, repeats: int, free: int) -> Measurement:
    """Load the model and draw the first ``codes`` codes of ``rows`` pictures ``repeats`` times, and once before.

    ``free`` is how many bytes the device had free before this process used it.
    """
    model = subject.load()
    jobs = make_requests(subject.config, rows, codes)
    generate_once(model, jobs, codes, subject.speculative)  # to warm up: what is made at the first use is made now
    requests = tuple(generate_once(model, jobs, codes, subject.speculative) for _ in range(repeats))
    return Measurement(requests=requests, peak=peak_process_memory(subject.placement.device, free))


def make_requests(config: ModelConfig, rows: int, codes: int) -> list[DecodingRequest]:
    """Rows that end behind their first ``codes`` codes, each with another text, of the greatest length there is."""
    layout, sampling = config.layouts["generate"], config.sampling
    texts = np.random.default_rng(0).integers(0, config.vocabulary.num_text_pieces, (rows, config.max_text))

    def arrange(text: Sequence[int]) -> TokenSequence:
        row = layout.arrange(config.vocabulary, text=text)
        return row.truncate(row.spans["image"].start + codes)

    return [
        DecodingRequest(
            sequence=arrange(text),
            seed=0,
            image=index,
            sampling=sampling,
            unconditional=None if sampling.guidance == 1 else arrange(()),
        )
        for index, text in enumerate(texts.tolist())
    ]


def generate_once(model: CogView, jobs: Sequence[DecodingRequest], codes: int, parallel: int | None) -> RequestTiming:
    """One request, timed. The pixels are those of whole pictures, the codes that are not drawn being 0."""
    grid = model.config.grid
    first = start = time.perf_counter()

    def watch(moment: DecodingProgress) -> None:
        nonlocal first
        if moment.done == 1:
            _wait_for(model.placement.device)
            first = time.perf_counter()

    filled = decode(model.transformer, model.vocabulary, jobs, watch, speculative=parallel)
    drawn = time.perf_counter()
    codes_BN = np.zeros((len(jobs), grid * grid), dtype=np.int64)
    codes_BN[:, :codes] = [row.ids[job.sequence.spans["image"]] for row, job in zip(filled, jobs, strict=True)]
    model.decode_images(codes_BN.reshape(-1, grid, grid))
    return RequestTiming(first_code=first - start, other_codes=drawn - first, pixels=time.perf_counter() - drawn)


def random_model(config: ModelConfig, image_config: VQVAEConfig, placement: DevicePlacement) -> Model:
    """A model of random weights."""
    torch.manual_seed(0)
    return Model(
        config=config,
        transformer=random_transformer(config.transformer, placement),
        image_tokenizer=VQVAE(image_config).eval().to(placement.device),
        # A model has one; rows are made of pieces here, and no text is read.
        text_tokenizer=TextTokenizer.load(resolve_checkpoint("cogview-emoji") / "text.model"),
    )


def random_transformer(config: TransformerConfig, placement: DevicePlacement) -> Transformer:
    """A transformer of random weights as ``placement`` holds them, in little more memory than they take.

    Layers are alike: to draw four billion numbers takes a CPU a minute, to copy them a second.
    """
    with torch.device("meta"):
        transformer = Transformer(config)
        if placement.quantization is not None:
            swap_quantized_linears(transformer, placement.quantization)
    weights: dict[str, torch.Tensor] = {}
    for name, shape in transformer.state_dict().items():
        first = re.sub(r"^layers\.\d+\.", "layers.0.", name)
        if first in weights:
            weights[name] = weights[first].clone()
            continue
        dtype = placement.dtype if shape.dtype == torch.float32 else shape.dtype
        tensor = weights[name] = torch.empty(shape.shape, dtype=dtype, device=placement.device)
        if not dtype.is_floating_point:  # rounded weights
            tensor.random_(-127, 128) if dtype == torch.int8 else tensor.random_(0, 256)
        elif name.endswith("scale"):
            tensor.fill_(INIT_STD / 73)  # 73: the deviation of numbers from -127 to 127
        elif name.endswith("scales_and_zeros"):
            tensor[..., 0], tensor[..., 1] = INIT_STD / 4.6, 0  # 4.6: that of numbers from 0 to 15
        elif tensor.dim() == 1:
            tensor.fill_(float(name.endswith("norm.weight")))
        else:
            tensor.normal_(std=INIT_STD)
    transformer.load_state_dict(weights, strict=True, assign=True)
    for module in transformer.modules():
        if isinstance(module, Int4Linear):  # random bytes are as good in any order
            module.cpu_packed = has_native_kernels(placement.device)
    return transformer.eval()


def _steps(plan: InferenceEstimate) -> list[ForwardPass]:
    """The reads of a picture behind the first, which has the text."""
    return [read for read in plan.forward_passes if read.new_positions == 1]


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
