"""The options of a data set of images and of how its images are augmented."""

from __future__ import annotations

import dataclasses

from timm_ghn.errors import ConfigError
from timm_ghn.runs.recipes import NOT_NEGATIVE, POSITIVE, PROPORTION, Options, option

#: How training images are cropped: timm's random resized crop, its two resizes that keep the ratio, or a crop out of
#: the image with an eighth of its size around it (arXiv 2110.13100: 4 of 32 pixels).
CROP_MODES = ('rrc', 'rkrc', 'rkrr', 'pad')


@dataclasses.dataclass(frozen=True)
class DataOptions(Options):
    """Which data set to read, and what of it."""

    dataset: str = option('', 'name on the Hub, folder, or parquet file')
    subset: str | None = option(None, 'configuration of a data set that has several')
    train_split: str = option('train', "split to train on, e.g. 'train[:90%%]'")
    val_split: str = option(
        'auto',
        'split to validate on, or a share of the training split (default: the validation split, else a tenth of the '
        'training split; the test split is kept for the end)',
    )
    image_column: str | None = option(None, 'column of images (default: found by its type)')
    label_column: str | None = option(None, 'column of labels (default: found by its name or type)')
    seed: int = option(0, 'of everything that is drawn', within=NOT_NEGATIVE)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.dataset:
            raise ConfigError('expected a data set: a name on the Hub, a folder or a parquet file (got nothing)')
        if self.val_share is not None and not 0 < self.val_share < 1:
            raise ConfigError(f'expected a share of the training split between 0 and 1 (got {self.val_split})')

    @property
    def val_share(self) -> float | None:
        """The share of the training split to hold out, where ``val_split`` is a number."""
        try:
            return float(self.val_split)
        except ValueError:
            return None


@dataclasses.dataclass(frozen=True)
class TransformOptions(Options):
    """How training images become tensors; the names are timm's."""

    no_aug: bool = option(False, 'train without augmentation')
    train_crop_mode: str = option('rrc', 'rrc, rkrc, rkrr (see timm) or pad (crop out of a padded image)',
                                  choices=CROP_MODES)  # fmt: skip
    scale: tuple[float, float] | None = option(None, 'area of the random crop, as shares of the image', within=POSITIVE)
    ratio: tuple[float, float] | None = option(None, 'aspect ratio of the random crop', within=POSITIVE)
    hflip: float = option(0.5, 'probability of a horizontal flip', within=PROPORTION)
    vflip: float = option(0.0, 'probability of a vertical flip', within=PROPORTION)
    color_jitter: float | None = option(None, 'strength of colour jitter (default: none)', within=NOT_NEGATIVE)
    aa: str | None = option(None, "automatic augmentation, e.g. 'rand-m9-mstd0.5'")
    reprob: float = option(0.0, 'probability of random erasing', within=PROPORTION)

    def __post_init__(self) -> None:
        super().__post_init__()
        for values in (self.scale, self.ratio):
            if values is not None and values[0] > values[1]:
                raise ConfigError(f'expected two ascending numbers for scale and ratio (got {values})')
