"""Small images decoded once and held in memory: what meta-training reads faster than it trains."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from timm.data import create_transform
from torch import Tensor
from tqdm import tqdm

from timm_ghn.data.images import decoded
from timm_ghn.data.splits import Split
from timm_ghn.errors import DataError

#: What may be done to the images of training.
AUGMENTATIONS = ('none', 'flip', 'crop')


@dataclasses.dataclass(frozen=True)
class ImageTensors:
    """Decoded images.

    Attributes:
        images_nchw: uint8 (n, channels, side, side).
        labels_n: int64 (n,).
        damaged: Images that could not be read; they are left out.
    """

    images_nchw: Tensor
    labels_n: Tensor
    damaged: int

    def __len__(self) -> int:
        return len(self.labels_n)

    def to(self, device: torch.device) -> ImageTensors:
        """The same on a device."""
        return dataclasses.replace(self, images_nchw=self.images_nchw.to(device), labels_n=self.labels_n.to(device))


def load_images(split: Split, size: tuple[int, int, int], *, progress: bool = False) -> ImageTensors:
    """Decode all images of a split, resized to (channels, height, width) and cut at the centre.

    Raises:
        DataError: if none can be read, or if they need more memory than there is.
    """
    transform: Any = create_transform(size, crop_pct=1.0, interpolation='bicubic', normalize=False)
    mode = 'L' if size[0] == 1 else 'RGB'
    try:
        images = torch.empty((len(split), *size), dtype=torch.uint8)
    except RuntimeError as error:
        raise DataError(
            f'{len(split):,} images of {"x".join(map(str, size))} do not fit into memory; choose a smaller image_size'
        ) from error
    good = np.zeros(len(split), dtype=bool)
    values = split.rows[split.image_column]
    for row, value in enumerate(tqdm(values, desc='decoding', unit='image', disable=None if progress else True)):
        image = decoded(value, mode)
        if image is not None:
            images[row] = transform(image)
            good[row] = True
    if not good.any():
        raise DataError(f'none of the {len(split)} images can be read')
    kept = torch.from_numpy(good)
    return ImageTensors(
        images if good.all() else images[kept], torch.from_numpy(split.labels)[kept], int((~good).sum())
    )


def normalised(images_nchw: Tensor, config: Mapping[str, Any]) -> Tensor:
    """Bytes as normalised floats, with the mean and std of a data config."""
    mean, std = (torch.tensor(config[name], device=images_nchw.device).view(1, -1, 1, 1) for name in ('mean', 'std'))
    return (images_nchw.float() / 255 - mean) / std


def augmented(images_nchw: Tensor, rng: np.random.Generator, *, crop: bool = True) -> Tensor:
    """Horizontal flips, and random crops out of images with an eighth of their side around them; bytes stay bytes."""
    count, _, height, width = images_nchw.shape
    flipped_n = torch.from_numpy(rng.random(count) < 0.5).to(images_nchw.device)
    images_nchw = torch.where(flipped_n[:, None, None, None], images_nchw.flip(3), images_nchw)
    if not crop:
        return images_nchw
    margin = max(1, width // 8)
    tops, lefts = (rng.integers(2 * margin + 1, size=count) for _ in range(2))
    padded = zip(F.pad(images_nchw, (margin,) * 4), tops, lefts, strict=True)
    return torch.stack([image[:, top : top + height, left : left + width] for image, top, left in padded])


def training_batch(
    data: ImageTensors, step: int, batch_size: int, *, seed: int, config: Mapping[str, Any], augment: str = 'crop'
) -> tuple[Tensor, Tensor]:
    """The images of a step: they depend on the seed and the step alone. Each epoch has an order of its own.

    ``config`` has the mean and std to normalise with; ``augment`` is one of :data:`AUGMENTATIONS`.
    """
    per_epoch = max(1, len(data) // batch_size)
    epoch, place = divmod(step, per_epoch)
    order = _order(len(data), seed, epoch)
    rows = torch.from_numpy(order[place * batch_size : (place + 1) * batch_size]).to(data.labels_n.device)
    images = data.images_nchw[rows]
    if augment != 'none':
        images = augmented(images, np.random.default_rng((seed, 2, step)), crop=augment == 'crop')
    return normalised(images, config), data.labels_n[rows]


@functools.lru_cache(maxsize=1)
def _order(rows: int, seed: int, epoch: int) -> np.ndarray:
    """Rows of an epoch; the steps of the epoch share it."""
    return np.random.default_rng((seed, 1, epoch)).permutation(rows)


def evaluation_batches(
    data: ImageTensors, count: int, batch_size: int, *, seed: int, config: Mapping[str, Any]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Images to evaluate on, mixed over the classes: the same for each call with the same seed."""
    order = np.random.default_rng((seed, 3)).permutation(len(data))[:count]
    cuts = [*range(0, len(order), batch_size), len(order)]
    if len(cuts) > 2 and cuts[-1] - cuts[-2] < batch_size / 2:
        # Batch normalisation would see too few images in the last one: they go with those before.
        del cuts[-2]
    for start, end in itertools.pairwise(cuts):
        rows = torch.from_numpy(order[start:end]).to(data.labels_n.device)
        yield normalised(data.images_nchw[rows], config), data.labels_n[rows]
