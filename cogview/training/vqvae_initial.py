"""Another image tokenizer as the start of a training: what is taken from it, and what starts anew."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch

from cogview.checkpoints.image_tokenizer import load_image_tokenizer, read_image_config
from cogview.checkpoints.registry import resolve_checkpoint
from cogview.config_io import to_mapping
from cogview.errors import InputError
from cogview.formatting import plural
from cogview.training.recipe import Recipe
from cogview.training.vqvae_recipe import VQVAERecipe
from cogview.vqvae.model import VQVAE, ResidualBlock, VQVAEConfig

# Keys of the shape that a recipe may change; the convolutions fit whatever they are, but for the two at the codebook.
CODEBOOK_KEYS = ("num_codes", "code_width", "normalize_codes")
# Keys whose numbers of residual blocks a recipe may raise; new blocks start as identities.
BLOCK_KEYS = ("encoder_blocks", "decoder_blocks")


@dataclass(frozen=True, kw_only=True, eq=False)
class InitialVQVAE:
    """The VQ-VAE that a training starts with.

    Attributes:
        model: The VQ-VAE, of the shape of the recipe.
        keeps_codebook: Whether its codebook is that of the other image tokenizer; else it starts from the images.
        decoder_only: Whether the decoder alone is trained, so that the codes of all images stay as they are.
        description: What was taken and what starts anew, in a line.
    """

    model: VQVAE
    keeps_codebook: bool = True
    decoder_only: bool = False
    description: str = ""


def image_folder(name: str) -> Path:
    """Return the folder of an image tokenizer.

    Args:
        name: Name or folder of an image tokenizer, or of a model with one.

    Raises:
        InputError: There is no such model.
    """
    folder = resolve_checkpoint(name)
    return folder / "image" if (folder / "image").is_dir() else folder


def image_settings(recipe: Recipe) -> VQVAERecipe:
    """Return the section ``image`` of a recipe; with ``init_from`` the model has its shape, but for keys of ``model``.

    Encoder and decoder may have more residual blocks than ``init_from``.

    Args:
        recipe: The recipe.

    Raises:
        InputError: The section is wrong, or there is no such image tokenizer.
    """
    section = recipe.section("image")
    name = section.get("init_from", section.get("start_from"))  # the key of old recipes
    if not isinstance(name, str):
        return recipe.settings(VQVAERecipe, "image")
    config = read_image_config(image_folder(name))
    model = section.get("model")
    if isinstance(model, Mapping) and model.get("downsampling", config.downsampling) != config.downsampling:
        raise _other_networks(name, "downsampling", config.downsampling, model["downsampling"])
    settings = recipe.settings(VQVAERecipe, "image", {"model": to_mapping(config)})
    _check_shape(name, config, settings.model, decoder_only=settings.train == "decoder")
    return settings


def load_initial_vqvae(name: str, config: VQVAEConfig, seed: int, *, decoder_only: bool = False) -> InitialVQVAE:
    """Load the image tokenizer that a training starts with.

    Args:
        name: Name or folder of an image tokenizer, or of a model with one.
        config: Shape of the recipe. Size, width and normalization of the codebook may be others.
        seed: Seed of the weights that start anew.
        decoder_only: Whether the decoder alone is trained.

    Raises:
        InputError: There is no such model, its networks have another shape, or its codebook cannot be kept.
    """
    source = load_image_tokenizer(image_folder(name))
    _check_shape(name, source.config, config, decoder_only=decoder_only)
    grown = "" if decoder_only else _described_growth(source.config, config)
    if grown:
        source = _with_more_blocks(source, config, seed)
    if source.config == config:
        taken_whole = f"begins with encoder, decoder and codebook of {name}"
        if decoder_only:
            taken_whole = f"trains the decoder alone, so that all codes stay as they are with {name}"
        return InitialVQVAE(model=source, decoder_only=decoder_only, description=taken_whole + grown)
    torch.manual_seed(seed)
    model = VQVAE(config)
    own = model.state_dict()
    taken = {
        key: tensor
        for key, tensor in source.state_dict().items()
        if not key.startswith("quantizer.") and tensor.shape == own[key].shape
    }
    model.load_state_dict(taken, strict=False)
    is_whole = all(key in taken for key in own if not key.startswith("quantizer."))
    new = f"a codebook of {config.num_codes} codes of width {config.code_width}"
    if not is_whole:
        new = f"the two convolutions beside the codebook and {new}"
    return InitialVQVAE(
        model=model,
        keeps_codebook=False,
        description=f"begins with the convolutions of {name}{grown}; anew: {new}, which starts from the images",
    )


def _described_growth(found: VQVAEConfig, expected: VQVAEConfig) -> str:
    """Return how many blocks ``expected`` has more, for the line that describes the start; empty without any."""
    more = sum(sum(getattr(expected, key)) - sum(getattr(found, key)) for key in BLOCK_KEYS)
    return f", and with {plural(more, 'more residual block')} that begin as identities" if more else ""


def _with_more_blocks(source: VQVAE, config: VQVAEConfig, seed: int) -> VQVAE:
    """Return a VQ-VAE with the blocks of ``config`` that computes what ``source`` does, with its codebook.

    A new residual block follows those of its scale; its second convolution is zero.
    """
    torch.manual_seed(seed)
    model = VQVAE(replace(source.config, **{key: getattr(config, key) for key in BLOCK_KEYS}))
    state = model.state_dict()
    for network in ("encoder", "decoder"):
        number_of_block = {module: number for number, module in enumerate(getattr(model, network))}
        known = _slots(getattr(source, network), getattr(source.config, f"{network}_blocks"), network)
        for slot, module in _slots(
            getattr(model, network), getattr(model.config, f"{network}_blocks"), network
        ).items():
            prefix = f"{network}.{number_of_block[module]}."
            for key, tensor in known.get(slot, module).state_dict().items():
                is_new_branch = slot not in known and key.startswith("second.")
                state[prefix + key] = torch.zeros_like(tensor) if is_new_branch else tensor
    state |= {key: tensor for key, tensor in source.state_dict().items() if key.startswith("quantizer.")}
    model.load_state_dict(state)
    return model.train(source.training)


def _slots(
    network: torch.nn.Sequential, blocks: Sequence[int], name: str
) -> dict[tuple[str, int, int], torch.nn.Module]:
    """Return the modules of an encoder or decoder by their place: kind, scale and number there.

    Args:
        network: The network.
        blocks: Its residual blocks at each scale.
        name: ``encoder``, or ``decoder``, which begins at the last scale.
    """
    scales = [scale for scale, count in enumerate(blocks) for _ in range(count)]
    remaining = iter(scales if name == "encoder" else sorted(scales, reverse=True))
    slots: dict[tuple[str, int, int], torch.nn.Module] = {}
    counts: Counter[tuple[str, int]] = Counter()
    for module in network:
        place = ("block", next(remaining)) if isinstance(module, ResidualBlock) else ("other", 0)
        slots[place[0], place[1], counts[place]] = module
        counts[place] += 1
    return slots


def _check_shape(name: str, found: VQVAEConfig, expected: VQVAEConfig, *, decoder_only: bool) -> None:
    """Raise InputError for the first key that differs, besides ``CODEBOOK_KEYS``; of these too for the decoder."""
    for field in fields(VQVAEConfig):
        other, own = getattr(found, field.name), getattr(expected, field.name)
        is_growth = field.name in BLOCK_KEYS and not decoder_only and len(other) == len(own)
        if is_growth and all(more >= blocks for more, blocks in zip(own, other, strict=True)):
            continue
        if field.name not in CODEBOOK_KEYS and other != own:
            raise _other_networks(name, field.name, other, own)
    if decoder_only and found != expected:
        raise InputError(
            f"train: decoder keeps the codebook of {name}; remove {', '.join(CODEBOOK_KEYS)} from the recipe's model"
        )


def _other_networks(name: str, key: str, found: object, expected: object) -> InputError:
    """Return the error for a recipe that asks for other networks than those of ``init_from``."""
    return InputError(
        f"init_from keeps the networks of {name}, whose {key} is {found}; remove {key} from the recipe's model, or "
        f"choose another init_from; got {expected}"
    )
