"""The options of a data set that every command with images has."""

from __future__ import annotations

import dataclasses
import functools

from timm_ghn.data.splits import DataOptions
from timm_ghn.recipes import option, those_of


@dataclasses.dataclass(frozen=True)
class DatasetOptions:
    """Which data set to read, and what of it. Every field is an option of the command line and a key of a recipe."""

    dataset: str = option('', 'name on the Hub, folder, or parquet file')
    subset: str | None = option(None, 'configuration of a data set that has several')
    train_split: str = option('train', "split to train on, e.g. 'train[:90%%]'")
    val_split: str = option('auto', 'split to validate on, or a share of the training split')
    image_column: str | None = option(None, 'column of images (default: found by its type)')
    label_column: str | None = option(None, 'column of labels (default: found by its name or type)')

    @functools.cached_property
    def data(self) -> DataOptions:
        """What is to be loaded.

        Raises:
            ConfigError: if the options contradict themselves.
        """
        own = {field.name for field in dataclasses.fields(self)}
        names = [field.name for field in dataclasses.fields(DataOptions) if field.name in own]
        return DataOptions(**those_of(DataOptions, self, names))
