"""Images of a split as tensors: decoded, and augmented with seeds of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import numpy as np
import torch
from datasets import Image
from PIL import Image as PILImage
from timm.data import create_transform
from timm.data.transforms import str_to_interp_mode
from torch import Tensor
from torch.utils.data import Dataset, Sampler
from torchvision import transforms

from timm_ghn.contexts import preserve_rng, seed_rng
from timm_ghn.data.options import TransformOptions
from timm_ghn.data.splits import Split
from timm_ghn.errors import ConfigError, DataError

#: Label of an image that cannot be decoded; losses and metrics leave it out.
NO_LABEL = -100

#: Sides up to which images are taken as they are, without the margin that a centre crop cuts off.
SMALL_IMAGE = 64

Transform = Callable[[PILImage.Image], Tensor]

_decoder = Image()


def train_transform(config: Mapping[str, Any], options: TransformOptions) -> Transform:
    """Transform of training images, by ``timm.data.create_transform``, for a data config of a model.

    Raises:
        ConfigError: if timm refuses the options.
    """
    if options.no_aug:
        return eval_transform(config)
    try:
        primary, secondary, final = create_transform(
            input_size=config['input_size'],
            is_training=True,
            interpolation=config['interpolation'],
            mean=config['mean'],
            std=config['std'],
            train_crop_mode=None if options.train_crop_mode == 'pad' else options.train_crop_mode,
            scale=options.scale,
            ratio=options.ratio,
            hflip=options.hflip,
            vflip=options.vflip,
            color_jitter=options.color_jitter,  # type: ignore[arg-type]  # None is timm's word for none
            auto_augment=options.aa,
            re_prob=options.reprob,
            separate=True,
        )
    except (AssertionError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(f'timm cannot build the augmentation as asked: {error or type(error).__name__}') from error
    steps = [*primary.transforms, *secondary.transforms, *final.transforms]
    if options.train_crop_mode == 'pad':
        # Resize to the input size, and crop at random out of a margin of zeros.
        size = tuple(config['input_size'][1:])
        margin = tuple(max(1, side // 8) for side in reversed(size))
        resize = transforms.Resize(size, interpolation=str_to_interp_mode(config['interpolation']))
        steps[:1] = [resize, transforms.RandomCrop(size, padding=margin)]
    return cast(Transform, transforms.Compose(steps))


def eval_transform(config: Mapping[str, Any]) -> Transform:
    """Transform of images to evaluate on, by ``timm.data.create_transform``."""
    names = ('input_size', 'interpolation', 'mean', 'std', 'crop_pct', 'crop_mode')
    arguments: dict[str, Any] = {name: config.get(name) for name in names}
    return cast(Transform, create_transform(**arguments))


class ImageDataset(Dataset[tuple[Tensor, int, int]]):
    """Images of a split, as (image tensor, label, number of damaged images met).

    What is random about an image depends on the seed, the epoch and its row alone: not on the number of processes or
    workers, nor on where a run was resumed. A damaged training image gives way to the next one that can be read;
    when evaluating it is an empty one with :data:`NO_LABEL`. Images are read as grey for one channel, else as RGB.
    """

    def __init__(
        self,
        split: Split,
        transform: Transform,
        *,
        channels: int = 3,
        seed: int = 0,
        training: bool = False,
    ) -> None:
        if channels not in (1, 3):
            raise ConfigError(f'expected a model of 1 or 3 image channels (got {channels})')
        self.split, self.transform, self.seed, self.training = split, transform, seed, training
        self.mode = 'L' if channels == 1 else 'RGB'

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, key: int) -> tuple[Tensor, int, int]:
        """An image; ``key`` is epoch * rows + row, as :class:`EpochSampler` counts."""
        rows = len(self)
        row = key % rows
        for damaged in range(rows if self.training else 1):
            at = (row + damaged) % rows
            image = decoded(self.split.rows[at][self.split.image_column], self.mode)
            if image is not None:
                label = int(self.split.labels[at])
                if not self.training:  # nothing is drawn
                    return self.transform(image), label, damaged
                with preserve_rng():
                    seed_rng(self.seed, key)
                    return self.transform(image), label, damaged
        if self.training:
            raise DataError(f'none of the {rows} training images can be read')
        return torch.zeros_like(self.transform(PILImage.new(self.mode, (SMALL_IMAGE, SMALL_IMAGE)))), NO_LABEL, 1


def decoded(value: Any, mode: str) -> PILImage.Image | None:
    """An image of a row in a mode of PIL; None if it is damaged or missing."""
    try:
        image: PILImage.Image = _decoder.decode_example(value)
        image.load()
        if image.mode.startswith('I'):
            # 16 bits, which PIL would cut off at 255.
            image = image.convert('I').point(lambda value: value * (1 / 257)).convert('L')
        return image.convert(mode)
    except (OSError, SyntaxError, ValueError, TypeError, AttributeError, EOFError, PILImage.DecompressionBombError):
        return None


class EpochSampler(Sampler[int]):
    """Every row once per epoch, in an order that depends on the seed and the epoch alone.

    Keys are epoch * rows + row, so that workers that live for many epochs know the epoch too.
    """

    def __init__(self, rows: int, *, seed: int = 0) -> None:
        self.rows, self.seed, self.epoch = rows, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next pass."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.rows

    def __iter__(self) -> Iterator[int]:
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.rows)
        return (self.epoch * self.rows + int(row) for row in order)
