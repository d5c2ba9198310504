"""Arguments of the Python API in their usual forms: images, texts, seeds, settings and counts, checked and unified.

Every message begins with the argument, such as ``images[3]``, and says what came and what was expected.
"""

# B images, H height, W width, C channels
from __future__ import annotations

import math
import operator
import os
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import fields, replace
from difflib import get_close_matches
from numbers import Real
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from cogview.checkpoints.adapter_choice import MAX_SCALE, AdapterChoice
from cogview.errors import InputError
from cogview.formatting import shorten
from cogview.generation.sampling import MAX_SEED
from cogview.image_io.reading import ignore_note, read_image
from cogview.limits import MAX_RESULTS
from cogview.modeling.config import Sampling
from cogview.tokenizers.tasks import TASKS

ImageFile: TypeAlias = str | os.PathLike[str] | Image.Image  # one image
ImageArray: TypeAlias = np.ndarray | Tensor  # one image or a batch, by its number of axes
ImageLike: TypeAlias = ImageFile | ImageArray
ImagesLike: TypeAlias = ImageLike | Iterable[ImageLike]
TextsLike: TypeAlias = str | Iterable[str]
SeedsLike: TypeAlias = int | Iterable[int] | None
AdaptersLike: TypeAlias = (  # one adapter, several, or several with their scales
    str | os.PathLike[str] | Iterable[str | os.PathLike[str]] | Mapping[Any, float] | None
)

IMAGE_FORMS = "a path, a PIL image, an array (H, W, 3) or a tensor (3, H, W)"
EXIF_ORIENTATION = 0x0112
SAMPLING_NAMES = tuple(setting.name for setting in fields(Sampling))
ROUNDING = 1e-3  # by which floats may leave [0, 1], as after resizing in 16 bits


def describe(value: object) -> str:
    """Return what a value is, for messages: "None", "the text 'a'", "3.5", "a list", "a uint8 tensor (3, 64, 64)"."""
    if value is None or isinstance(value, bool | int | float):
        return shorten(str(value), 40)
    if isinstance(value, str):
        return f"the text {shorten(value, 40)!r}"
    if isinstance(value, np.ndarray):
        return f"{_article(str(value.dtype))} array {value.shape}"
    if isinstance(value, Tensor):
        return f"{_article(str(value.dtype).removeprefix('torch.'))} tensor {tuple(value.shape)}"
    kind = type(value)
    name = kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__.partition('.')[0]}.{kind.__name__}"
    return name if isinstance(value, bytes) else _article(name)


def list_images(images: ImagesLike) -> tuple[list[ImageLike], bool]:
    """Return images as a list, and whether a single one was given. None of them is opened.

    Args:
        images: One image (see ``load_image``), an iterable of images, or a batch: an array (B, H, W, C) or a tensor
            (B, C, H, W).

    Raises:
        InputError: If it is neither.
    """
    if isinstance(images, str | os.PathLike | Image.Image):
        return [images], True
    if isinstance(images, np.ndarray | Tensor) and images.ndim != 1:
        return (list(images), False) if images.ndim == 4 else ([images], True)
    if isinstance(images, bytes | Mapping | Set) or not isinstance(images, Iterable):
        raise InputError(f"images must be {IMAGE_FORMS}, or a list of these, got {describe(images)}{_remedy(images)}")
    items = list(images)
    for number, item in enumerate(items):
        if not isinstance(item, str | os.PathLike | Image.Image | np.ndarray | Tensor):
            raise InputError(f"images[{number}] must be {IMAGE_FORMS}, got {describe(item)}{_remedy(item)}")
    return items, False


def load_image(
    image: ImageLike, name: str = "the image", on_note: Callable[[str], object] = ignore_note
) -> Image.Image:
    """Return an image of any form as a PIL image.

    Args:
        image: A path, a PIL image of any mode, an array (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), or a tensor
            (1, H, W) or (3, H, W). Arrays and tensors are uint8, or floats in [0, 1], which are rounded to 8 bits.
        name: Name of the argument, for messages.
        on_note: Called with a choice that was made when a file was read.

    Returns:
        The image, upright by its EXIF data. A PIL image that needs nothing is returned as it is.

    Raises:
        InputError: If it cannot be read, or has another type, shape or range.
    """
    if isinstance(image, str | os.PathLike):
        return read_image(Path(image), on_note)
    if isinstance(image, Image.Image):
        try:
            image.load()
            return ImageOps.exif_transpose(image) if image.getexif().get(EXIF_ORIENTATION, 1) != 1 else image
        except Exception as error:  # Pillow's readers raise nearly anything on broken data
            reason = " ".join(str(error).split()) or type(error).__name__
            raise InputError(f"{name} is a PIL image that cannot be read: {reason}") from None
    if isinstance(image, np.ndarray | Tensor):
        return Image.fromarray(_pixels(image, name))
    raise InputError(f"{name} must be {IMAGE_FORMS}, got {describe(image)}{_remedy(image)}")


def list_texts(texts: TextsLike, noun: str) -> list[str]:
    """Return one text or several as a list.

    Args:
        texts: A text, or an iterable of texts.
        noun: Name of the argument in the singular, for messages, such as ``prompt``.

    Raises:
        InputError: If it is neither.
    """
    if isinstance(texts, str):
        return [texts]
    if isinstance(texts, bytes | Mapping | Set | Tensor) or not isinstance(texts, Iterable):
        raise InputError(f"{noun}s must be a text or a list of texts, got {describe(texts)}")
    items = list(texts)
    for number, item in enumerate(items):
        if not isinstance(item, str):
            raise InputError(f"{noun}s[{number}] must be a text, got {describe(item)}")
    return items


def texts_of_images(texts: TextsLike | None, images: Sequence[ImageLike], noun: str) -> list[str]:
    """Return a text for each image.

    Args:
        texts: One text for all images, or one for each; None: the prompts of generated images.
        images: The images.
        noun: Name of the argument in the singular, for messages.

    Raises:
        InputError: If it is none of these, the numbers differ, or an image has no prompt.
    """
    if texts is None:
        prompts = [getattr(image, "prompt", None) for image in images]
        for number, prompt in enumerate(prompts):
            if not isinstance(prompt, str):
                raise InputError(f"images[{number}] was not generated here and has no prompt: give its {noun}")
        return [str(prompt) for prompt in prompts]
    if isinstance(texts, str):
        return [texts] * len(images)
    given = list_texts(texts, noun)
    if len(given) != len(images):
        raise InputError(f"{len(images)} images need one {noun} or {len(images)}, got {len(given)}")
    return given


def resolve_seed(seed: int | None) -> int:
    """Return ``seed``, or a random one for None.

    Raises:
        InputError: If it is no whole number from 0 to 2**63 - 1.
    """
    if seed is None:
        return secrets.randbelow(2**31)
    if isinstance(seed, torch.Generator):
        raise InputError("the seed must be a whole number, got a torch.Generator: pass generator.initial_seed()")
    return require_int(seed, "the seed", 0, MAX_SEED)


def resolve_seeds(seed: SeedsLike, count: int, noun: str) -> list[int]:
    """Return a seed for each of ``count`` inputs: the same for all, or the given ones.

    Args:
        seed: A seed for all; an iterable of one for each; None for a random one for all.
        count: Number of the inputs.
        noun: What they are, for messages, such as ``prompts``.

    Raises:
        InputError: If a seed is out of range, or their number is not ``count``.
    """
    if seed is None or isinstance(seed, str | bytes | Mapping | Set) or not isinstance(seed, Iterable):
        return [resolve_seed(seed)] * count  # type: ignore[arg-type]  # anything else is refused there
    if isinstance(seed, np.ndarray | Tensor) and seed.ndim == 0:
        return [resolve_seed(seed)] * count  # type: ignore[arg-type]
    seeds = list(seed)
    if len(seeds) != count:
        raise InputError(f"{count} {noun} need one seed or {count}, got {len(seeds)}")
    return [require_int(one, f"seed[{number}]", 0, MAX_SEED) for number, one in enumerate(seeds)]


def require_int(value: Any, noun: str, least: int, greatest: int | None = None) -> int:
    """Return ``value`` as an int.

    Args:
        value: An int, or another type that stands for one, such as that of numpy.
        noun: Name of the argument, for messages.
        least: Smallest allowed value.
        greatest: Largest allowed value; None for no limit.

    Raises:
        InputError: If it is no whole number in the range.
    """
    wanted = f"at least {least}" if greatest is None else f"from {least} to {greatest}"
    try:
        if isinstance(value, bool | np.bool_):
            raise TypeError
        number = operator.index(value)
    except (TypeError, RuntimeError):  # the latter of a tensor with several elements
        raise InputError(f"{noun} must be a whole number {wanted}, got {describe(value)}") from None
    if number < least or (greatest is not None and number > greatest):
        raise InputError(f"{noun} must be {wanted}, got {number}")
    return number


def require_count(value: Any, noun: str) -> int:
    """Return ``value``, a number of results from 1 to ``MAX_RESULTS``; InputError for any other."""
    return require_int(value, noun, 1, MAX_RESULTS)


def require_share(value: Any, noun: str, *, above_zero: bool = False) -> float:
    """Return ``value``, a share from 0 to 1, as a float.

    Args:
        value: A number.
        noun: Name of the argument, for messages.
        above_zero: Whether 0 is refused.

    Raises:
        InputError: If it is no number in the range.
    """
    if isinstance(value, bool | np.bool_) or not isinstance(value, Real):
        raise InputError(f"{noun} must be a number, got {describe(value)}")
    share = float(value)
    if above_zero and not 0 < share <= 1:
        raise InputError(f"{noun} must be in (0, 1], got {share:g}")
    if not 0 <= share <= 1:
        raise InputError(f"{noun} must be in [0, 1], got {share:g}")
    return share


def option_text(value: Any, name: str, *types: type) -> str:
    """Return a setting, such as a device, as the text that names it.

    Args:
        value: A text, or an object that stands for one.
        name: Name of the argument, for messages.
        *types: Types of such objects.

    Raises:
        InputError: If it has another type.
    """
    if isinstance(value, bool) or not isinstance(value, (str, *types)):
        raise InputError(f"{name} must be a text, got {describe(value)}")
    if isinstance(value, str | os.PathLike):
        return os.fspath(value)
    return str(value).removeprefix("torch.")  # of a ``torch.dtype``


def list_adapters(adapters: AdaptersLike) -> tuple[AdapterChoice, ...]:
    """Return adapters of any form with their scales.

    Args:
        adapters: ``NAME`` or ``NAME:SCALE`` as a text, a path, an iterable of these, a mapping from names to scales, or
            None.

    Raises:
        InputError: If it is none of these, or a scale is out of range.
    """
    if adapters is None:
        return ()
    if isinstance(adapters, Mapping):
        choices = []
        for name, scale in adapters.items():
            if isinstance(scale, bool) or not isinstance(scale, int | float):
                raise InputError(f"the scale of an adapter must be a number, got {describe(scale)}")
            in_range = abs(scale) <= MAX_SCALE  # an int may be too large for a float
            choices.append(
                AdapterChoice(option_text(name, "adapter", os.PathLike), float(scale) if in_range else math.inf)
            )
        return tuple(choices)
    if isinstance(adapters, str | os.PathLike | bytes) or not isinstance(adapters, Iterable):
        adapters = [adapters]  # another type is refused below
    return tuple(
        AdapterChoice.parse(option_text(one, "adapter", os.PathLike))
        if isinstance(one, str)
        else AdapterChoice(option_text(one, "adapter", os.PathLike))
        for one in adapters
    )


def require_known_task(task: str) -> None:
    """Raise InputError unless ``task`` is a row of the table of tasks."""
    if task not in TASKS:
        raise InputError(f"the task {task!r} is unknown; known: {', '.join(TASKS)}")


def require_callback(callback: object) -> None:
    """Raise InputError unless ``callback`` is None or can be called."""
    if callback is not None and not callable(callback):
        raise InputError(f"callback must be a function of a GenerationProgress, got {describe(callback)}")


def override_sampling(base: Sampling, overrides: dict[str, float | None]) -> Sampling:
    """Return ``base`` with the fields that are given.

    Args:
        base: Settings to start from.
        overrides: Values by the names of fields; None is ignored.

    Raises:
        InputError: If a value is no number or out of range, or ``base`` is no ``Sampling``.
        TypeError: If ``Sampling`` has no such field.
    """
    if not isinstance(base, Sampling):
        raise InputError(f"sampling must be a Sampling, got {describe(base)}")
    for name in overrides:
        if name not in SAMPLING_NAMES:
            near = get_close_matches(name, SAMPLING_NAMES, n=1)
            remedy = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(SAMPLING_NAMES)}"
            raise TypeError(f"{name!r} is no sampling setting; {remedy}")
    given: dict[str, Any] = {name: value for name, value in overrides.items() if value is not None}
    try:
        return replace(base, **given)
    except ValueError as error:
        raise InputError(str(error)) from None


def _pixels(image: ImageArray, name: str) -> np.ndarray:
    """Return an array or tensor as uint8 pixels (H, W), (H, W, 3) or (H, W, 4)."""
    came, shape = describe(image), tuple(image.shape)
    if isinstance(image, Tensor):
        form, turned = "a tensor (3, H, W)", "tensors have channels first: use permute(2, 0, 1)"
        is_image, is_turned = len(shape) == 3 and shape[0] in (1, 3), len(shape) == 3 and shape[-1] in (1, 3)
        on_cpu = image.detach().cpu()
        values = (on_cpu.float() if on_cpu.is_floating_point() else on_cpu).numpy()
    else:
        form, turned = "an array (H, W, 3)", "arrays have channels last: use transpose(1, 2, 0)"
        is_image = len(shape) == 2 or (len(shape) == 3 and shape[2] in (1, 3, 4))
        is_turned, values = len(shape) == 3 and shape[0] in (1, 3), image
    known = values.dtype == np.uint8 or np.issubdtype(values.dtype, np.floating)
    if not (is_image and known):
        hint = ""
        if is_image and np.issubdtype(values.dtype, np.integer):
            hint = "; convert values from 0 to 255 to uint8"
        elif is_turned and not is_image:
            hint = f"; {turned}"
        elif len(shape) == 4:
            hint = "; a batch stands alone, not in a list"
        raise InputError(f"{name} must be {form} of uint8, or of floats in [0, 1], got {came}{hint}")
    if not values.size:
        raise InputError(f"{name} has no pixels, got {came}")
    if values.dtype != np.uint8:
        values = _eight_bits(values, name)
    if isinstance(image, Tensor):
        values = np.moveaxis(values, 0, -1)
    return np.ascontiguousarray(values[..., 0] if values.shape[2:] == (1,) else values)


def _eight_bits(values: np.ndarray, name: str) -> np.ndarray:
    """Return floats in [0, 1] as uint8."""
    smallest, greatest = float(values.min()), float(values.max())
    if not (smallest >= -ROUNDING and greatest <= 1 + ROUNDING):  # also of NaN
        hint = ""
        if smallest >= 0 and 1 < greatest <= 255:
            hint = "; divide by 255, or convert to uint8"
        elif smallest >= -1 - ROUNDING and greatest <= 1 + ROUNDING:
            hint = "; for values from -1 to 1 use (x + 1) / 2"
        raise InputError(f"{name} must hold floats in [0, 1], got {smallest:.4g} to {greatest:.4g}{hint}")
    return np.rint(values.clip(0, 1).astype(np.float32) * 255).astype(np.uint8)


def _remedy(value: object) -> str:
    """Return what to do with a value that is no image, or an empty text."""
    return "; open them with PIL.Image.open(io.BytesIO(data))" if isinstance(value, bytes | bytearray) else ""


def _article(name: str) -> str:
    """Return a name behind "a" or "an"; an initial u is that of "uint8"."""
    return f"{'an' if name[0] in 'aeioAEIO' else 'a'} {name}"
