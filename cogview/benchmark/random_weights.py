"""Models with random weights, to measure a shape without its checkpoint."""

from __future__ import annotations

import re

import torch

from cogview.checkpoints.checkpoint import Model
from cogview.checkpoints.registry import resolve_checkpoint
from cogview.device import DevicePlacement
from cogview.kernels.linear import has_quantized_kernels
from cogview.kernels.native import uses_native_kernels
from cogview.modeling.config import ModelConfig, TransformerConfig
from cogview.modeling.quantization import Int4Linear, swap_quantized_linears
from cogview.modeling.transformer import INIT_STD, Transformer
from cogview.tokenizers.text import TextTokenizer
from cogview.vqvae.model import VQVAE, VQVAEConfig

INT8_STD, INT4_STD = 73, 4.6  # standard deviations of uniform integers from -127 to 127 and from 0 to 15


def random_model(config: ModelConfig, image_config: VQVAEConfig, placement: DevicePlacement) -> Model:
    """Return a model with random weights and the text tokenizer of cogview-emoji, which the benchmark does not use.

    Args:
        config: Config of the model.
        image_config: Config of the VQ-VAE.
        placement: Device and weight format.
    """
    torch.manual_seed(0)
    return Model(
        config=config,
        transformer=random_transformer(config.transformer, placement),
        image_tokenizer=VQVAE(image_config).eval().to(placement.device),
        text_tokenizer=TextTokenizer.load(resolve_checkpoint("cogview-emoji") / "text.model"),
    )


def random_transformer(config: TransformerConfig, placement: DevicePlacement) -> Transformer:
    """Return a transformer with random weights in the format of ``placement``.

    All layers have equal weights: a CPU generates four billion random numbers in a minute and copies them in a second.
    Little more memory than that of the weights is used.

    Args:
        config: Config of the transformer.
        placement: Device and weight format.
    """
    with torch.device("meta"):
        transformer = Transformer(config)
        if placement.quantization is not None:
            swap_quantized_linears(transformer, placement.quantization)
    weights: dict[str, torch.Tensor] = {}
    for name, meta in transformer.state_dict().items():
        first = re.sub(r"^layers\.\d+\.", "layers.0.", name)
        weights[name] = weights[first].clone() if first in weights else _random_tensor(name, meta, placement)
    transformer.load_state_dict(weights, strict=True, assign=True)
    for module in transformer.modules():
        if isinstance(module, Int4Linear):  # random bytes need no reordering
            native = uses_native_kernels(placement.device, placement.dtype)
            module.cpu_packed = has_quantized_kernels(placement.device) and not native
    return transformer.eval()


def _random_tensor(name: str, meta: torch.Tensor, placement: DevicePlacement) -> torch.Tensor:
    """Return random weights with the distribution of a new model."""
    dtype = placement.dtype if meta.dtype == torch.float32 else meta.dtype
    tensor = torch.empty(meta.shape, dtype=dtype, device=placement.device)
    if not dtype.is_floating_point:  # quantized weights
        return tensor.random_(-127, 128) if dtype == torch.int8 else tensor.random_(0, 256)
    if name.endswith("scale"):  # of int8
        return tensor.fill_(INIT_STD / INT8_STD)
    if tensor.dim() == 3:  # scales and zeros of int4
        tensor[..., 0], tensor[..., 1] = INIT_STD / INT4_STD, 0
        return tensor
    if tensor.dim() == 1:
        return tensor.fill_(float(name.endswith("norm.weight")))
    return tensor.normal_(std=INIT_STD)
