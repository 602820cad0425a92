"""The options of a data set that every command with images has."""

from __future__ import annotations

import dataclasses

from timm_ghn.errors import ConfigError
from timm_ghn.runs.recipes import Options, option


@dataclasses.dataclass(frozen=True)
class DataOptions(Options):
    """Which data set to read, and what of it. Every field is an option of the command line and a key of a recipe.

    Attributes:
        dataset: Name on the Hub, a folder (parquet files, a folder per class, or what ``save_to_disk`` wrote), or a
            parquet file.
        subset: Configuration of a data set that has several.
        train_split: Split to train on, in the notation of datasets: 'train', 'train[:90%]'.
        val_split: Split to validate on, or the share of the training split to hold out. 'auto': the validation split if
            there is one, else a tenth of the training split; never the test split.
        image_column: Column of images; None finds it by its type.
        label_column: Column of labels; None finds it by its type and name.

    Raises:
        ConfigError: if there is no data set, or a share that leaves nothing.
    """

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
