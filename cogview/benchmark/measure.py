"""Measurements of ``cogview bench``: the time of generation, the roofline of the hardware, and the peak memory.

Each batch size is measured in a subprocess, so that its peak memory contains nothing of other batches.
"""

# B images of a batch, G codes on a side, N codes of an image
from __future__ import annotations

import multiprocessing
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

from cogview.benchmark.random_weights import random_model
from cogview.checkpoints.adapted_weights import open_adapters
from cogview.checkpoints.adapter_choice import AdapterChoice
from cogview.checkpoints.checkpoint import load_model
from cogview.device import DevicePlacement, peak_process_memory
from cogview.errors import InputError, is_out_of_memory
from cogview.generation.decode import decode
from cogview.generation.requests import DecodingProgress, DecodingRequest
from cogview.modeling.config import ModelConfig
from cogview.pipeline.cogview import CogView
from cogview.planning.hardware import HardwareSpeed
from cogview.planning.inference import InferenceEstimate
from cogview.planning.model_memory import ForwardPass, matrix_bytes, position_bytes
from cogview.tokenizers.layouts import TokenSequence
from cogview.vqvae.model import VQVAEConfig

TERMINATE_TIMEOUT = 5.0  # seconds between terminating and killing a subprocess


@dataclass(frozen=True, kw_only=True)
class BenchmarkTarget:
    """The model to measure, by its checkpoint folder or with random weights, and its device."""

    config: ModelConfig
    image_config: VQVAEConfig
    placement: DevicePlacement
    folder: Path | None = None  # None: random weights
    adapters: tuple[AdapterChoice, ...] = ()
    speculative: int | None = None  # maximum of drafted codes per forward pass, as ``decode`` takes it

    def load(self) -> CogView:
        """Load the model in this process."""
        placement = self.placement
        if self.folder is None:
            return CogView(random_model(self.config, self.image_config, placement), placement, "random weights")
        adapters = open_adapters(self.adapters, self.config, str(self.folder))
        model = load_model(
            *(self.folder, placement.device, placement.dtype, placement.quantization),
            adapters=adapters,
            keep_halves=True,
        )
        return CogView(model, placement, str(self.folder))


@dataclass(frozen=True, kw_only=True)
class RequestTiming:
    """Seconds of one request, which generates a batch."""

    first_code: float  # prefill of the texts, and the first code of each image
    other_codes: float
    pixels: float


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """Results of a subprocess."""

    requests: tuple[RequestTiming, ...]
    peak: int | None  # bytes; None if the system does not report them


@dataclass(frozen=True, kw_only=True)
class BenchmarkResult:
    """Metrics of a batch size.

    If only ``num_codes`` of an image were generated, the other codes are assumed to reach the same fraction of the
    roofline.
    """

    estimate: InferenceEstimate
    speed: HardwareSpeed
    num_codes: int  # generated codes of each image, 2 or more
    measured: Measurement

    @property
    def first_image(self) -> list[float]:
        """Seconds of each request from start to pixels; all images of a batch are complete at the same time."""
        steps = _decoding_steps(self.estimate)
        scale = 1.0
        if self.num_codes <= len(steps):
            scale = self._roofline(steps) / self._roofline(steps[: self.num_codes - 1])
        return [one.first_code + scale * one.other_codes + one.pixels for one in self.measured.requests]

    @property
    def images_per_second(self) -> float:
        """Images of the batch over the seconds of the median request."""
        return self.estimate.rows / median(self.first_image)

    @property
    def tokens_per_second(self) -> float:
        """Codes of all images except the first ones, over their median time."""
        return self.estimate.rows * (self.num_codes - 1) / self._other_codes

    @property
    def roofline_fraction(self) -> float:
        """Roofline time of the codes except the first ones, over their median time."""
        return self._roofline(_decoding_steps(self.estimate)[: self.num_codes - 1]) / self._other_codes

    @property
    def _other_codes(self) -> float:
        """Median seconds of the codes except the first ones."""
        return median(one.other_codes for one in self.measured.requests)

    def _roofline(self, passes: Sequence[ForwardPass]) -> float:
        """Return the roofline seconds of several forward passes."""
        return sum(roofline_seconds(self.estimate, one, self.speed) for one in passes)


class MeasurementError(Exception):
    """A batch could not be generated; the message has the reason."""


def roofline_seconds(estimate: InferenceEstimate, forward_pass: ForwardPass, speed: HardwareSpeed) -> float:
    """Return the minimum time of a forward pass on the hardware, in seconds.

    It is the longer of moving the bytes and of computing the products. Weights are moved once for all sequences, and
    the KV cache of every sequence (roofline model: Williams et al., 2009, doi:10.1145/1498765.1498785).

    Args:
        estimate: The estimate of the job.
        forward_pass: The forward pass.
        speed: Measured or given rates of the hardware.
    """
    shape, dtype = estimate.transformer, estimate.dtype
    head = forward_pass.output_ids * shape.width * matrix_bytes(dtype, keep_halves=estimate.keep_halves)
    weights = estimate.layers + head
    cache = estimate.rows * (1 + estimate.guidance_rows) * forward_pass.num_keys * position_bytes(shape, dtype)
    return max((weights + cache) / speed.bandwidth, estimate.flops(forward_pass) / speed.flops)


def measure_in_subprocess(
    target: BenchmarkTarget, rows: int, *, num_codes: int, repeats: int, free_bytes: int
) -> Measurement:
    """Call ``measure_requests`` in a new process.

    Args:
        target: The model and its device.
        rows: Images of the batch.
        num_codes: Codes of each image to generate.
        repeats: Timed requests.
        free_bytes: Bytes that were free on the device before.

    Returns:
        Times of all requests and the peak memory of the new process.

    Raises:
        MeasurementError: The process ran out of memory, or ended.
        InputError: The model cannot be loaded.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_report, args=(sender, target, rows, num_codes, repeats, free_bytes), daemon=True)
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited: Ctrl-C ends this process, which ends that one
    try:
        process.start()
    finally:
        signal.signal(signal.SIGINT, handler)
    sender.close()  # this process's copy, so that the pipe closes when the subprocess ends
    try:
        result: Measurement | Exception = receiver.recv()
    except EOFError:
        process.join()
        raise MeasurementError(
            f"its process ended with status {process.exitcode} (-9: killed by the system, usually out of memory)"
        ) from None
    except BaseException:
        process.terminate()
        process.join(TERMINATE_TIMEOUT)
        process.kill()
        raise
    process.join()
    if isinstance(result, Exception):
        raise result
    return result


def _report(
    sender: Connection, target: BenchmarkTarget, rows: int, num_codes: int, repeats: int, free_bytes: int
) -> None:
    """Send the result of ``measure_requests``, or its error, to the parent."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # releases the locks of progress bars
    result: Measurement | Exception
    try:
        result = measure_requests(target, rows, num_codes=num_codes, repeats=repeats, free_bytes=free_bytes)
    except InputError as error:
        result = error
    except (MemoryError, RuntimeError) as error:  # CUDA and the CPU allocator raise RuntimeErrors
        if not is_out_of_memory(error):
            raise
        result = MeasurementError("out of memory")
    sender.send(result)


def measure_requests(
    target: BenchmarkTarget, rows: int, *, num_codes: int, repeats: int, free_bytes: int
) -> Measurement:
    """Load the model and generate codes of a batch, once to warm up and then ``repeats`` times.

    Args:
        target: The model and its device.
        rows: Images of the batch.
        num_codes: Codes of each image to generate.
        repeats: Timed requests.
        free_bytes: Bytes that were free on the device before this process used it.

    Returns:
        Times of all requests and the peak memory.
    """
    model = target.load()
    requests = make_requests(target.config, rows, num_codes)
    time_request(model, requests, num_codes, target.speculative)  # creates everything that is created at first use
    timings = tuple(time_request(model, requests, num_codes, target.speculative) for _ in range(repeats))
    return Measurement(requests=timings, peak=peak_process_memory(target.placement.device, free_bytes))


def make_requests(config: ModelConfig, rows: int, num_codes: int) -> list[DecodingRequest]:
    """Return requests with different random texts of the maximum length, each cut after ``num_codes`` codes.

    Args:
        config: Config of the model.
        rows: Number of requests.
        num_codes: Codes of each image to generate.
    """
    layout, sampling = config.layouts["generate"], config.sampling_of("generate")
    texts = np.random.default_rng(0).integers(0, config.vocabulary.num_text_pieces, (rows, config.max_text))

    def arrange(text: Sequence[int]) -> TokenSequence:
        sequence = layout.arrange(config.vocabulary, text=text)
        return sequence.truncate(sequence.spans["image"].start + num_codes)

    return [
        DecodingRequest(
            sequence=arrange(text),
            seed=0,
            image=index,
            sampling=sampling,
            unconditional=() if sampling.guidance == 1 else (arrange(()),),
        )
        for index, text in enumerate(texts.tolist())
    ]


def time_request(
    model: CogView, requests: Sequence[DecodingRequest], num_codes: int, speculative: int | None
) -> RequestTiming:
    """Generate a batch and return its times.

    Args:
        model: The model.
        requests: The images of the batch.
        num_codes: Codes of each image that ``requests`` generate. The image tokenizer decodes whole images, in which
            the other codes are 0.
        speculative: Maximum of drafted codes per forward pass, as ``decode`` takes it.

    Returns:
        Seconds to the first code, for the other codes and for the images.
    """
    grid = model.config.grid
    first = start = time.perf_counter()

    def on_progress(progress: DecodingProgress) -> None:
        nonlocal first
        if progress.done == 1:
            _synchronize(model.placement.device)
            first = time.perf_counter()

    results = decode(model.transformer, model.vocabulary, requests, on_progress, speculative=speculative)
    decoded = time.perf_counter()
    codes_BN = np.zeros((len(requests), grid * grid), dtype=np.int64)
    codes_BN[:, :num_codes] = [
        result.ids[request.sequence.spans["image"]] for result, request in zip(results, requests, strict=True)
    ]
    model.decode_images(codes_BN.reshape(-1, grid, grid))
    return RequestTiming(first_code=first - start, other_codes=decoded - first, pixels=time.perf_counter() - decoded)


def _decoding_steps(estimate: InferenceEstimate) -> list[ForwardPass]:
    """Return the forward passes of an image after the prefill."""
    return [one for one in estimate.forward_passes if one.new_positions == 1]


def _synchronize(device: torch.device) -> None:
    """Wait until the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
