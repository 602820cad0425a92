"""A Hugging Face data set as a training and a validation split with known columns and classes."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from datasets import (
    ClassLabel,
    Dataset,
    DatasetDict,
    Image,
    IterableDataset,
    IterableDatasetDict,
    ReadInstruction,
    Value,
    concatenate_datasets,
    load_dataset,
    load_from_disk,
)

from timm_ghn.errors import ConfigError, DataError

#: Names under which labels stand, the first that exists wins; a single column of class labels is found by its type.
LABEL_COLUMNS = ('label', 'labels', 'class', 'target', 'category')

#: Splits that are validated on where none is named, the first that exists wins.
VALIDATION_SPLITS = ('validation', 'valid', 'val', 'dev', 'test')

#: Share of the training split that is held out where the data set has no other split.
HELD_OUT = 0.1


@dataclasses.dataclass(frozen=True)
class DataOptions:
    """Which images to train on and to validate on.

    Attributes:
        dataset: Name on the Hub, a folder (parquet files, a folder per class, or what ``save_to_disk`` wrote), or a
            parquet file.
        subset: Configuration of a data set that has several.
        train_split: Split to train on, in the notation of datasets: 'train', 'train[:90%]'.
        val_split: Split to validate on, or the share of the training split to hold out (drawn with ``seed``). 'auto':
            the validation or test split if there is one, else a tenth of the training split.
        image_column: Column of images; None finds it by its type.
        label_column: Column of labels; None finds it by its type and name.
        shots: Images of each class to train on; None for all.
        shots_seed: Draw the shots with this seed; None takes the first of each class in the order of the data set.
        seed: Of the split that is held out.
    """

    dataset: str
    subset: str | None = None
    train_split: str = 'train'
    val_split: str = 'auto'
    image_column: str | None = None
    label_column: str | None = None
    shots: int | None = None
    shots_seed: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.dataset:
            raise ConfigError('expected a data set: a name on the Hub, a folder or a parquet file (got nothing)')
        if self.shots is not None and self.shots < 1:
            raise ConfigError(f'expected shots of at least 1 (got {self.shots})')
        share = _share(self.val_split)
        if share is not None and not 0 < share < 1:
            raise ConfigError(f'expected a share of the training split between 0 and 1 (got {self.val_split})')


@dataclasses.dataclass(frozen=True)
class Split:
    """Rows with their labels.

    Attributes:
        rows: The data set; its images are not decoded.
        image_column: Where the images are.
        labels: Class of each row, int64, (rows,).
    """

    rows: Dataset
    image_column: str
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)


@dataclasses.dataclass(frozen=True)
class Splits:
    """What :func:`load_splits` finds.

    Attributes:
        train: To train on.
        val: To validate on.
        classes: Names of the classes, in the order of the labels.
        names: Names of the two splits, as far as they were named.
    """

    train: Split
    val: Split
    classes: tuple[str, ...]
    names: tuple[str, str]


def load_splits(options: DataOptions) -> Splits:
    """Load a data set and find its images, labels, classes and splits.

    Raises:
        DataError: if the data set cannot be had, or lacks something.
    """
    parts = _load(options)
    train, val, names = _choose(parts, options)
    image_column = _image_column(train, options.image_column)
    label_column = _label_column(train, options.label_column, image_column)
    for part, name in ((train, names[0]), (val, names[1])):
        missing = [column for column in (image_column, label_column) if column not in part.column_names]
        if missing:
            raise DataError(f'split {name!r} has no column {missing[0]!r} (it has {", ".join(part.column_names)})')
    classes = _classes(train, label_column)
    labels = [_labels(part, label_column, classes, name) for part, name in zip((train, val), names, strict=True)]
    _check_classes(labels[0], classes, names[0])
    if options.shots is not None:
        chosen = first_shots(labels[0], options.shots, options.shots_seed)
        _check_shots(labels[0], chosen, options.shots, classes)
        train, labels[0] = train.select(chosen), labels[0][chosen]
    found = []
    for part, name, label in zip((train, val), names, labels, strict=True):
        if not len(part):
            raise DataError(f'split {name!r} of {options.dataset!r} has no images')
        found.append(Split(_undecoded(part, image_column), image_column, label))
    return Splits(found[0], found[1], classes, names)


def first_shots(labels: np.ndarray, shots: int, seed: int | None = None) -> np.ndarray:
    """Rows of N images of each class, in the order of the data set.

    Args:
        labels: Class of each row.
        shots: N. A class with fewer images gives all that it has.
        seed: Draw them; None takes the first of each class, as arXiv 2207.10049 does.
    """
    order = np.arange(len(labels))
    if seed is not None:
        order = np.random.default_rng(seed).permutation(len(labels))
    chosen = [order[labels[order] == label][:shots] for label in np.unique(labels)]
    return np.sort(np.concatenate(chosen)) if chosen else order[:0]


def _load(options: DataOptions) -> Mapping[str, Dataset]:
    """All splits of the data set."""
    place = Path(options.dataset).expanduser()
    try:
        if place.is_file():
            kind = {'.parquet': 'parquet', '.arrow': 'arrow'}.get(place.suffix.lower())
            if kind is None:
                raise DataError(f'expected a folder or a .parquet file (got the file {options.dataset!r})')
            loaded = load_dataset(kind, data_files=str(place))
        elif place.is_dir() and any((place / name).is_file() for name in ('state.json', 'dataset_dict.json')):
            loaded = load_from_disk(str(place))
        else:
            loaded = load_dataset(str(place) if place.is_dir() else options.dataset, options.subset)
    except DataError:
        raise
    except Exception as error:
        # Anything can come out of the readers of datasets, from errors of the network to those of pyarrow.
        cause = ' '.join(str(error).split())[:400] or type(error).__name__
        raise DataError(
            f'the data set {options.dataset!r} cannot be loaded: {cause}; expected a name on the Hub (and a network), '
            'a folder of parquet files or of one folder per class, or a parquet file'
        ) from error
    if isinstance(loaded, Dataset):
        loaded = DatasetDict({'train': loaded})
    if isinstance(loaded, IterableDataset | IterableDatasetDict):
        raise DataError(f'{options.dataset!r} is streamed; training needs random access to its images')
    return dict(loaded)


def _choose(parts: Mapping[str, Dataset], options: DataOptions) -> tuple[Dataset, Dataset, tuple[str, str]]:
    """Training and validation rows and their names."""
    train = _part(parts, options.train_split, 'train_split')
    base = re.split(r'[\[+]', options.train_split)[0].strip()
    wanted, share = options.val_split, _share(options.val_split)
    if wanted == 'auto':
        others = [name for name in VALIDATION_SPLITS if name in parts and name != base]
        wanted, share = (others[0], None) if others else (wanted, HELD_OUT)
    if share is None:
        return train, _part(parts, wanted, 'val_split'), (options.train_split, wanted)
    if len(train) < 2:
        raise DataError(f'split {options.train_split!r} has {len(train)} images, too few to hold some out')
    held_out = min(max(1, math.ceil(share * len(train))), len(train) - 1)
    # As Dataset.train_test_split draws them, which would write into the folder of the data set.
    rows = np.random.default_rng(options.seed).permutation(len(train))
    order = f'{share:g} of {options.train_split}'
    return train.select(rows[held_out:]), train.select(rows[:held_out]), (options.train_split, order)


def _part(parts: Mapping[str, Dataset], spec: str, option: str) -> Dataset:
    """A split, or slices of splits, as datasets writes them."""
    if spec in parts:
        return parts[spec]
    sizes = {name: len(part) for name, part in parts.items()}
    try:
        slices = ReadInstruction.from_spec(spec).to_absolute(sizes)
    except (ValueError, AssertionError, AttributeError) as error:
        raise DataError(
            f'{option} {spec!r} is no split of this data set (it has {", ".join(parts)}), nor a slice like '
            f"'{next(iter(parts))}[:90%]'"
        ) from error
    chosen = [parts[cut.splitname].select(range(cut.from_ or 0, _end(cut.to, sizes[cut.splitname]))) for cut in slices]
    return concatenate_datasets(chosen)


def _end(to: int | None, size: int) -> int:
    return size if to is None else to


def _share(val_split: str) -> float | None:
    try:
        return float(val_split)
    except ValueError:
        return None


def _image_column(part: Dataset, named: str | None) -> str:
    features = part.features
    images = [str(name) for name, feature in features.items() if isinstance(feature, Image)]
    if named is not None:
        if named not in features:
            raise DataError(f'there is no column {named!r} (there are {", ".join(features)})')
        if named not in images:
            raise DataError(f'column {named!r} holds {_type(features[named])}, expected images')
        return named
    if len(images) == 1:
        return images[0]
    if images:
        raise DataError(f'several columns hold images ({", ".join(images)}): name one with image_column')
    kinds = ', '.join(f'{name}: {_type(feature)}' for name, feature in features.items())
    raise DataError(f'no column holds images ({kinds}); expected a data set for image classification')


def _label_column(part: Dataset, named: str | None, image_column: str) -> str:
    features = part.features
    if named is not None:
        if named not in features:
            raise DataError(f'there is no column {named!r} (there are {", ".join(features)})')
        if not _is_label(features[named]):
            raise DataError(f'column {named!r} holds {_type(features[named])}, expected class labels')
        return named
    usual = [name for name in LABEL_COLUMNS if name in features and _is_label(features[name])]
    labelled = [name for name, feature in features.items() if isinstance(feature, ClassLabel)]
    if usual or len(labelled) == 1:
        return (usual or labelled)[0]
    others = ', '.join(name for name in features if name != image_column) or 'none'
    raise DataError(f'no column is known to hold the labels: name one of these with label_column: {others}')


def _is_label(feature: Any) -> bool:
    if isinstance(feature, ClassLabel):
        return True
    return isinstance(feature, Value) and (
        feature.dtype.startswith(('int', 'uint', 'bool')) or 'string' in feature.dtype
    )


def _type(feature: Any) -> str:
    return str(getattr(feature, 'dtype', '')) if isinstance(feature, Value) else type(feature).__name__


def _classes(train: Dataset, column: str) -> tuple[str, ...]:
    """Names of the classes: those of the feature, else the values that occur in the training split, in order."""
    feature = train.features[column]
    if isinstance(feature, ClassLabel):
        return tuple(feature.names)
    values = {value for value in train.unique(column) if value is not None}
    return tuple(map(str, sorted(values)))


def _labels(part: Dataset, column: str, classes: tuple[str, ...], name: str) -> np.ndarray:
    """Class of each row."""
    values = _column(part, column)
    feature = part.features[column]
    if isinstance(feature, ClassLabel):
        if tuple(feature.names) != classes:
            raise DataError(
                f'split {name!r} has other classes ({_some(feature.names)}) than the first ({_some(classes)})'
            )
        labels = np.array([-1 if value is None else value for value in values], dtype=np.int64)
    else:
        known = {label: index for index, label in enumerate(classes)}
        labels = np.array([known.get(str(value), -1) for value in values], dtype=np.int64)
    wrong = np.flatnonzero((labels < 0) | (labels >= len(classes)))
    if len(wrong):
        raise DataError(
            f'{len(wrong)} of {len(labels)} rows of split {name!r} have no known label (row {wrong[0]}: '
            f'{values[int(wrong[0])]!r}; classes: {_some(classes)})'
        )
    return labels


def _column(part: Dataset, column: str) -> list[Any]:
    return list(part.select_columns([column])[:][column])


def _check_classes(labels: np.ndarray, classes: tuple[str, ...], name: str) -> None:
    found = np.unique(labels)
    if len(found) < 2:
        what = f'only the class {classes[int(found[0])]!r}' if len(found) else 'no images'
        raise DataError(f'split {name!r} has {what}; expected at least two classes')


def _check_shots(labels: np.ndarray, chosen: np.ndarray, shots: int, classes: tuple[str, ...]) -> None:
    """A class without an image would never be learnt, one with fewer than asked is no few-shot problem as asked."""
    counts = np.bincount(labels[chosen], minlength=len(classes))
    few = [f'{classes[index]!r} has {count}' for index, count in enumerate(counts) if count < shots]
    if few:
        raise DataError(f'expected {shots} images of each class, but {_some(few)}; ask for fewer shots')


def _undecoded(part: Dataset, column: str) -> Dataset:
    """Only the images, as bytes: a damaged one must not end the run."""
    return part.select_columns([column]).cast_column(column, Image(decode=False))


def _some(values: Iterable[Any], most: int = 5) -> str:
    values = list(values)
    return ', '.join(map(str, values[:most])) + (f' and {len(values) - most} more' if len(values) > most else '')
