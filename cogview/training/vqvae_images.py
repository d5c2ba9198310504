"""Images in the order of training a VQ-VAE, and the held-out ones."""

# B batch, H W pixels
from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from cogview.data.image_dataset import ImageDataset, render
from cogview.data.keyed_random import KeyedRandom
from cogview.data.sampling_order import sample_index
from cogview.errors import InputError
from cogview.signals import worker_init
from cogview.vqvae.codec import to_float

VALIDATION_IMAGES = 512


class TrainingImages(Dataset[Tensor]):
    """Square images for a VQ-VAE, float32 (3, side, side) in [0, 1], in the order of training.

    Positions take the ``scales`` in turn. An image that is rendered larger than the side is cropped at a random
    position of the grid of codes, so that a crop has the codes of its part of the image.

    Args:
        dataset: The images. Unless it ``is_shuffled``, every epoch is a new permutation of it.
        downsampling: Pixels on each side of the square that one code stands for.
        scales: Scales of the images.
        seed: Seed of the permutations; None keeps the order of the dataset.
        flip: Mirror every other image, chosen at random, from left to right.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        downsampling: int,
        scales: Sequence[int] = (1,),
        seed: int | None = None,
        *,
        flip: bool = False,
    ) -> None:
        self.dataset = dataset
        self.downsampling = downsampling
        self.scales = scales
        self.seed = seed
        self.flip = flip

    def __getitem__(self, position: int) -> Tensor:
        """Return the image at a position of the training."""
        epoch, index = divmod(position, len(self.dataset))
        if self.seed is not None and not self.dataset.is_shuffled:
            index = int(sample_index(self.seed, position, len(self.dataset)))
        example = self.dataset[index]
        scale, side = self.scales[position % len(self.scales)], self.dataset.side
        random = KeyedRandom("part", example.identity, *([epoch] if epoch else []))
        steps = (scale - 1) * side // self.downsampling + 1
        top, left = (self.downsampling * random.randbelow(steps) for _ in range(2))
        pixels = render(example, side, scale)[top : top + side, left : left + side]
        if self.flip and random.randbelow(2):
            pixels = pixels[:, ::-1].copy()
        return to_float(pixels)


def training_batches(
    images: TrainingImages, batch_size: int, first: int, last: int, num_workers: int = 0, part: slice | None = None
) -> Iterator[Tensor]:
    """Return batches ``first`` to ``last`` - 1 of a training, each (B, 3, H, W).

    Args:
        images: The images.
        batch_size: Images of a batch, over all processes.
        first: First batch.
        last: Batch after the last one.
        num_workers: Processes that render images ahead of time.
        part: Part of each batch that this process computes; None for all of it.
    """
    own = range(batch_size)[part or slice(None)]
    loader: DataLoader[Any] = DataLoader(
        _Reporting(images),
        batch_sampler=([step * batch_size + number for number in own] for step in range(first, last)),
        collate_fn=_collate,
        num_workers=num_workers,
        worker_init_fn=worker_init,
    )
    return map(_raise_reported, loader)


class _Reporting(Dataset[Any]):
    """Images of which one that cannot be read is returned as its error: a worker process would add its traceback."""

    def __init__(self, images: TrainingImages) -> None:
        self.images = images

    def __getitem__(self, position: int) -> Tensor | InputError:
        try:
            return self.images[position]
        except InputError as error:
            return error


def _collate(items: Sequence[Tensor | InputError]) -> Tensor | InputError:
    """Return the batch of images, or the first error."""
    tensors = []
    for item in items:
        if isinstance(item, InputError):
            return item
        tensors.append(item)
    return cast(Tensor, default_collate(tensors))


def _raise_reported(batch: Tensor | InputError) -> Tensor:
    if isinstance(batch, InputError):
        raise batch
    return batch


def held_out_batches(
    dataset: ImageDataset,
    downsampling: int,
    scales: Sequence[int] = (1,),
    count: int = VALIDATION_IMAGES,
    batch_size: int = 64,
    *,
    part: slice | None = None,
) -> Iterator[Tensor]:
    """Return batches (B, 3, H, W) of the first ``count`` held-out images, fewer if the dataset is smaller.

    Args:
        dataset: The dataset.
        downsampling: Side of a code in pixels.
        scales: Sizes of the images, over that of the dataset.
        count: Maximum number of images.
        batch_size: Images of a batch.
        part: The images of this process, such as every other one; None for all of them.
    """
    images = TrainingImages(dataset, downsampling, scales)
    own = range(min(count, len(dataset)))[part or slice(None)]
    return iter(DataLoader(images, batch_size=batch_size, sampler=own))
