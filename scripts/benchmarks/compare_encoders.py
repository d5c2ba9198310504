"""Compare how many pictures a second the encoder of our image tokenizer turns into codes with peers of equal size.

    pip install diffusers
    python scripts/benchmarks/compare_encoders.py [--side 256] [--batch 4] [--dtypes float32 bfloat16] [--output FILE]
    python scripts/benchmarks/compare_encoders.py --read FILE

The peers are the encoders of taming-transformers (VQGAN) and of LlamaGen (VQ-16 and VQ-8), built from the blocks of
diffusers' ``VQModel``: 128 channels, two residual blocks at each scale, attention at the last one, 8,192 codes of width
256 and 8. Each is measured at its usual factor, 16 pixels on a side of a code, and at ours, 8. ``published`` compares
encoders of its size, with ours widened to as many parameters; ``ours`` those of our default size, with the peer
narrowed. Weights are random; time does not depend on them.

Every side runs eagerly and compiled, in channels_last and contiguous memory (ours always uses channels_last), once to
warm up and once for a trial; the best of each side is repeated, in turn. The search for the nearest code is included.
The ratio is our rate over the peer's, and larger than 1 where ours is faster. Ours in bfloat16 also reports the share
of codes that are those of float32, of the embedded model on its samples: below 1, encoding stays in float32.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import arguments
import numpy as np
import torch
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException

from cogview.cli.main import run_safely
from cogview.device import DTYPES, flush_denormals
from cogview.errors import InputError
from cogview.evaluation.manifest import Manifest, ResultValue, SeedsRecord, read_result, write_result
from cogview.evaluation.model_record import describe_hardware, describe_versions
from cogview.pipeline.cogview import CogView
from cogview.vqvae.codec import to_float
from cogview.vqvae.model import VQVAE, VQVAEConfig

SEED, NUM_CODES = 0, 8192
# Multipliers of the channels by scale, and the width of a code.
PEERS = {
    "taming f16": ((1, 1, 2, 2, 4), 256),
    "taming f8": ((1, 1, 2, 4), 256),
    "LlamaGen f16": ((1, 1, 2, 2, 4), 8),
    "LlamaGen f8": ((1, 2, 2, 4), 8),
}
PUBLISHED_CHANNELS = 128
Encode = Callable[[Tensor], Tensor]  # images (B, 3, S, S) in [0, 1] to codes


class PeerEncoder(nn.Module):
    """Encoder and quantizer of a peer."""

    def __init__(self, name: str, channels: int) -> None:
        """Build the peer ``name`` of ``PEERS`` with ``channels`` at the first scale."""
        super().__init__()
        multipliers, width = PEERS[name]
        model = import_diffusers().VQModel(
            block_out_channels=tuple(channels * each for each in multipliers),
            down_block_types=("DownEncoderBlock2D",) * (len(multipliers) - 1) + ("AttnDownEncoderBlock2D",),
            up_block_types=("UpDecoderBlock2D",) * len(multipliers),
            layers_per_block=2,
            latent_channels=width,
            norm_num_groups=min(32, channels // 4),
            num_vq_embeddings=NUM_CODES,
            vq_embed_dim=width,
        )
        self.encoder, self.projection, self.quantizer = model.encoder, model.quant_conv, model.quantize

    def forward(self, images: Tensor) -> Tensor:
        """Return the codes of images."""
        vectors = self.projection(self.encoder(images * 2 - 1))
        codes: Tensor = self.quantizer(vectors)[2][2]
        return codes


class OurEncoder(nn.Module):
    """Encoder and quantizer of ours."""

    def __init__(self, config: VQVAEConfig) -> None:
        super().__init__()
        self.model = VQVAE(config)
        self.encoder = self.model.encoder

    def forward(self, images: Tensor) -> Tensor:
        """Return the codes of images."""
        model = self.model
        vectors = model.encoder(((images - model.mean) / model.std).contiguous(memory_format=torch.channels_last))
        return model.quantizer.nearest(model.quantizer.normalized(vectors.permute(0, 2, 3, 1).float()))


def num_parameters(module: nn.Module) -> int:
    """Return the number of parameters."""
    return sum(parameter.numel() for parameter in module.parameters())


def widened(count: int) -> OurEncoder:
    """Return our encoder with the channels whose number of parameters is closest to ``count``."""
    configs = [VQVAEConfig(channels=(first, 4 * first, 8 * first)) for first in range(16, 385, 8)]
    with torch.device("meta"):
        sizes = [num_parameters(OurEncoder(config).encoder) for config in configs]
    best = min(range(len(sizes)), key=lambda index: abs(sizes[index] - count))
    return OurEncoder(configs[best])


def narrowed(name: str, count: int) -> PeerEncoder:
    """Return the peer with the channels whose number of parameters is closest to ``count``."""
    choices = range(8, PUBLISHED_CHANNELS + 1, 8)
    with torch.device("meta"):
        sizes = {channels: num_parameters(PeerEncoder(name, channels).encoder) for channels in choices}
    return PeerEncoder(name, min(choices, key=lambda channels: abs(sizes[channels] - count)))


def pairs_of(names: Sequence[str]) -> dict[str, tuple[PeerEncoder, OurEncoder]]:
    """Return a peer and ours of equal size for each size and name."""
    pairs = {}
    for name in names:
        peer = PeerEncoder(name, PUBLISHED_CHANNELS)
        pairs[f"published.{name}"] = (peer, widened(num_parameters(peer.encoder)))
        ours = OurEncoder(VQVAEConfig())
        pairs[f"ours.{name}"] = (narrowed(name, num_parameters(ours.encoder)), ours)
    return pairs


def modes_of(encoder: nn.Module, dtype: torch.dtype) -> dict[str, Encode]:
    """Return the functions that encode in each mode, by its name."""
    peer = isinstance(encoder, PeerEncoder)
    encoder.to(dtype)
    if isinstance(encoder, OurEncoder):
        encoder.model.quantizer.float()  # the products decide between near codes

    def encode(run: Encode, layout: torch.memory_format, images: Tensor) -> Tensor:
        with torch.inference_mode():
            return run(images.to(dtype).contiguous(memory_format=layout))

    modes: dict[str, Encode] = {}
    layouts = {"channels_last": torch.channels_last} | ({"contiguous": torch.contiguous_format} if peer else {})
    for layout_name, layout in layouts.items():
        modes[f"{layout_name}, eager"] = partial(encode, encoder, layout)
        modes[f"{layout_name}, compiled"] = partial(encode, torch.compile(encoder, dynamic=False), layout)
    return modes


def best_mode(encoder: nn.Module, dtype: torch.dtype, images: Tensor) -> tuple[str, Encode]:
    """Return the fastest mode of an encoder in one trial, with its name."""
    trials: dict[str, float] = {}
    modes = modes_of(encoder, dtype)
    for name, encode in modes.items():
        if "channels_last" in name:
            encoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        else:
            encoder.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        try:
            encode(images)
        except TorchDynamoException as error:
            print(f"  left out: {name}: {str(error).strip().splitlines()[0]}", file=sys.stderr, flush=True)
            continue
        trials[name] = seconds_of(encode, images)
        print(f"  {type(encoder).__name__}, {name}: {trials[name]:.2f} s", file=sys.stderr, flush=True)
    best = min(trials, key=lambda name: trials[name])
    layout = torch.channels_last if "channels_last" in best else torch.contiguous_format
    encoder.to(memory_format=layout)  # type: ignore[call-overload]
    return best, modes[best]


def seconds_of(encode: Encode, images: Tensor) -> float:
    """Return the wall seconds of encoding once."""
    start = time.perf_counter()
    encode(images)
    return time.perf_counter() - start


def equal_codes() -> float:
    """Return the share of codes of the embedded model that are the same in bfloat16, on images that it generates."""
    model = CogView.from_pretrained("cogview-emoji", device="cpu")
    images = model.generate([thing.name for thing in model.things[:16]], seed=SEED)
    tokenizer = model.image_tokenizer
    given = to_float(np.stack([np.asarray(image) for image in images]))
    exact = tokenizer.encode(given)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = tokenizer.encode(given)
    return float((exact == rounded).float().mean())


def import_diffusers() -> Any:
    """Return the module of the peers.

    Raises:
        InputError: It is missing.
    """
    try:
        import diffusers
    except ImportError:
        raise InputError("diffusers is missing, which has the blocks of the peers: pip install diffusers") from None
    return diffusers


def run(args: argparse.Namespace) -> int:
    """Run the whole comparison."""
    if args.read is not None:
        result = read_result(args.read)
        print_table(result.results, result.manifest.settings)
        return 0
    if args.side % 16:
        raise InputError(f"--side must be a multiple of 16 pixels, got {args.side}")
    import_diffusers()
    flush_denormals()
    torch.manual_seed(SEED)
    images = torch.rand(args.batch, 3, args.side, args.side)
    values = {"equal codes in bfloat16": ResultValue(value=equal_codes(), n=16 * 64, unit="fraction")}
    for dtype in args.dtypes:
        for name, (peer, ours) in pairs_of(args.peers).items():
            torch._dynamo.reset()
            print(f"{name}, {dtype}", file=sys.stderr, flush=True)
            sides = {"peer": best_mode(peer, DTYPES[dtype], images), "ours": best_mode(ours, DTYPES[dtype], images)}
            times: dict[str, list[float]] = {side: [] for side in sides}
            for _ in range(args.repeats):
                for side, (_, encode) in sides.items():
                    times[side].append(seconds_of(encode, images))
            medians = {side: statistics.median(seconds) for side, seconds in times.items()}
            for side, encoder in (("peer", peer), ("ours", ours)):
                values[f"{name}.{dtype}.{side}, {sides[side][0]}, {num_parameters(encoder.encoder)}"] = ResultValue(
                    value=args.batch / medians[side], n=args.repeats, unit="pictures/s", higher_is_better=True
                )
            values[f"{name}.{dtype}.ratio"] = ResultValue(value=medians["peer"] / medians["ours"], n=args.repeats)
    settings = {name: getattr(args, name) for name in ("side", "batch", "repeats")}
    settings["threads"] = torch.get_num_threads()
    if args.output is not None:
        manifest = Manifest(
            measure="encoders",
            seeds=SeedsRecord(first=SEED, count=1),
            settings=settings,
            versions=describe_versions("diffusers"),
            hardware=describe_hardware(),
        )
        write_result(args.output, manifest, values)
    print_table(values, settings)
    return 0


def print_table(values: Mapping[str, ResultValue], settings: Mapping[str, Any]) -> None:
    """Print rates and ratios."""
    print(
        f"{settings['side']} x {settings['side']} pixels, {settings['batch']} at a time, medians of "
        f"{settings['repeats']}, {settings['threads']} threads, torch {torch.__version__}"
    )
    print(f"codes of the embedded model that are the same in bfloat16: {values['equal codes in bfloat16'].value:.2%}\n")
    print("| size | peer | dtype | parameters, peer / ours | pictures/s, peer / ours | best mode of the peer | ratio |")
    print("|---|---|---|---|---|---|---|")
    for name, value in values.items():
        if not name.endswith(".ratio"):
            continue
        case = name.removesuffix(".ratio")
        size, peer, dtype = case.split(".")
        found = {other.removeprefix(f"{case}."): each.value for other, each in values.items() if case + "." in other}
        sides = {side: next(key for key in found if key.startswith(side)) for side in ("peer", "ours")}
        counts = " / ".join(f"{int(sides[side].rsplit(', ', 1)[1]) / 1e6:.2f}M" for side in ("peer", "ours"))
        rates = " / ".join(f"{found[sides[side]]:.2f}" for side in ("peer", "ours"))
        mode = ", ".join(sides["peer"].split(", ")[1:-1])
        print(f"| {size} | {peer} | {dtype} | {counts} | {rates} | {mode} | {value.value:.2f} |")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; return the exit status."""
    parser = arguments.Parser(__doc__)
    add = parser.add_argument
    add("--peers", nargs="+", choices=list(PEERS), default=list(PEERS), help="(default: all)")
    add("--dtypes", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"], help="(default: both)")
    add("--side", type=arguments.count, default=256, metavar="PIXELS", help="side of a picture (default: 256)")
    add("--batch", type=arguments.count, default=4, metavar="PICTURES", help="pictures at a time (default: 4)")
    add("--repeats", type=arguments.count, default=5, metavar="COUNT", help="runs of each side (default: 5)")
    add("--output", type=arguments.output_file, metavar="FILE", help="result file to write")
    add("--read", type=arguments.file, metavar="FILE", help="print the table of a result file")
    args = parser.parse_args(argv)
    return run_safely(lambda: run(args), "compare_encoders.py")


if __name__ == "__main__":
    sys.exit(main())
