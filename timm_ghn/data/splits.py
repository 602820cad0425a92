"""A Hugging Face data set as a training, a validation and a test split with known columns and classes."""

from __future__ import annotations

import dataclasses
import math
import os
import warnings
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, Image, ReadInstruction, concatenate_datasets, load_dataset, load_from_disk

from timm_ghn.data.options import DataOptions
from timm_ghn.errors import DataError

#: Names under which labels stand, the first that exists wins; a single column of class labels is found by its type.
LABEL_COLUMNS = ('label', 'labels', 'class', 'target', 'category')

#: How the types of labels begin; that of class labels is int64.
_LABEL_TYPES = ('int', 'uint', 'bool', 'string', 'large_string')

#: Splits that are validated on where none is named, the first that exists wins.
VALIDATION_SPLITS = ('validation', 'valid', 'val', 'dev')

#: Split that is kept for the end: nothing is chosen by it.
TEST_SPLIT = 'test'

#: Share of the training split that is held out for validation where the data set has no split for it.
HELD_OUT = 0.1


@dataclasses.dataclass(frozen=True)
class Split:
    """Rows of a data set, whose images in ``image_column`` are not decoded, with the class of each: int64 (rows,)."""

    rows: Dataset
    image_column: str
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, rows: np.ndarray) -> Split:
        """Some of the rows, in the given order."""
        return Split(self.rows.select(rows), self.image_column, self.labels[rows])


@dataclasses.dataclass(frozen=True)
class Splits:
    """What :func:`load_splits` finds.

    Attributes:
        train: To train on.
        val: To validate on.
        test: To look at once, at the end; None where the data set has none, or where it is trained or validated on.
        classes: Names of the classes, in the order of the labels.
        names: Names of the training and the validation split.
    """

    train: Split
    val: Split
    test: Split | None
    classes: tuple[str, ...]
    names: tuple[str, str]


def load_splits(options: DataOptions, *, shots: int | None = None, shots_seed: int | None = None) -> Splits:
    """Load a data set and find its images, labels, classes and splits.

    A validation split that is held out has the classes of the training split in its proportions. Of a few-shot problem
    it consists of images that are no shots: these are the same whatever is held out, and as many as asked for.

    Args:
        options: Which data set, and what of it.
        shots: Images of each class to train on; None for all.
        shots_seed: Draw the shots with this seed; None takes the first of each class in the order of the data set.

    Raises:
        DataError: if the data set cannot be had, or lacks something.
    """
    parts = _load(options)
    train = _part(parts, options.train_split, 'train_split')
    val_name, share = options.val_split, options.val_share
    if val_name == 'auto':
        trained = _named(options.train_split)
        val_name = next((name for name in VALIDATION_SPLITS if name in parts and name not in trained), '')
        share = None if val_name else HELD_OUT
    if share is not None:
        val_name = f'{share:g} of {options.train_split}'
    image_column, label_column = _columns(train, options)
    classes = _classes(train, label_column)

    def read(part: Dataset, name: str) -> Split:
        missing = {image_column, label_column} - set(part.column_names)
        if missing or not len(part):
            what = f'column {min(missing)!r}' if missing else 'images'
            raise DataError(f'split {name!r} of {options.dataset!r} has no {what}')
        # Only the images, as bytes: a damaged one must not end the run.
        rows = part.select_columns([image_column]).cast_column(image_column, Image(decode=False))
        return Split(rows, image_column, _labels(part, label_column, classes, name))

    whole = read(train, options.train_split)
    chosen = np.arange(len(whole))
    if shots is not None:
        chosen = first_shots(whole.labels, shots, shots_seed)
        counts = np.bincount(whole.labels[chosen], minlength=len(classes))
        if min(counts) < shots:
            few = int(np.argmin(counts))
            raise DataError(
                f'expected {shots} images of each class, but {classes[few]!r} has {counts[few]}; ask for fewer shots'
            )
    if share is None:
        val = read(_part(parts, val_name, 'val_split'), val_name)
    else:
        held_out = _held_out(whole.labels, share, options.seed, np.array([]) if shots is None else chosen)
        val, chosen = whole.select(held_out), np.setdiff1d(chosen, held_out)
    if len(left := np.unique(whole.labels[chosen])) < 2:
        only = classes[left[0]]
        raise DataError(f'split {options.train_split!r} has only the class {only!r}; expected at least two')
    test = None
    # Not where it is used for something else.
    if TEST_SPLIT in parts and TEST_SPLIT not in _named(options.train_split) | _named(val_name):
        try:
            test = read(parts[TEST_SPLIT], TEST_SPLIT)
        except DataError as error:  # of some, the labels are secret
            warnings.warn(f'the test split is left out: {error}', stacklevel=2)
    return Splits(whole.select(chosen), val, test, classes, (options.train_split, val_name))


def _held_out(labels: np.ndarray, share: float, seed: int, shots: np.ndarray) -> np.ndarray:
    """Rows to validate on: a share of all rows, out of those that are no shots.

    They are drawn by systematic sampling of the rows in the order of their classes, so that each class has its share
    but for a fraction of an image.
    """
    rows = np.setdiff1d(np.arange(len(labels)), shots)
    count = min(math.ceil(share * len(labels)), len(rows) if len(shots) else len(rows) - 1)
    if count < 1:
        raise DataError(
            f'of {len(labels)} training images none can be held out for validation: ask for fewer shots, or name a '
            'split to validate on with val_split'
        )
    rng = np.random.default_rng(seed)
    rows = rng.permutation(rows)
    rows = rows[np.argsort(labels[rows], kind='stable')]
    places = (np.arange(count) + rng.random()) * (len(rows) / count)
    return np.sort(rows[np.minimum(places.astype(np.int64), len(rows) - 1)])


def first_shots(labels: np.ndarray, shots: int, seed: int | None = None) -> np.ndarray:
    """Rows of so many images of each class, or of all that a class has.

    They are the first in the order of the data set, as in arXiv 2207.10049, or drawn with a seed.
    """
    order = np.arange(len(labels)) if seed is None else np.random.default_rng(seed).permutation(len(labels))
    chosen = [order[labels[order] == label][:shots] for label in np.unique(labels)]
    return np.sort(np.concatenate(chosen)) if chosen else order[:0]


def _load(options: DataOptions) -> Mapping[str, Dataset]:
    place = Path(os.path.expanduser(options.dataset))  # an unknown user's ~ stays as it is
    try:
        if place.is_file():
            loaded = load_dataset('parquet', data_files=str(place))
        elif (place / 'state.json').is_file() or (place / 'dataset_dict.json').is_file():
            loaded = load_from_disk(str(place))
        else:
            loaded = load_dataset(str(place) if place.is_dir() else options.dataset, options.subset)
    except Exception as error:
        # Anything can come out of the readers of datasets, from errors of the network to those of pyarrow.
        raise DataError(
            f'the data set {options.dataset!r} cannot be loaded: {str(error)[:400] or type(error).__name__}; expected '
            'a name on the Hub (and a network), a folder of parquet files or of one folder per class, or a parquet file'
        ) from error
    return {'train': loaded} if isinstance(loaded, Dataset) else dict(loaded)


def _named(spec: str) -> set[str]:
    """Splits that slices like 'train[:90%]+validation' are of."""
    return {part.partition('[')[0].strip() for part in spec.split('+')}


def _part(parts: Mapping[str, Dataset], spec: str, option: str) -> Dataset:
    """A split, or slices of splits, as datasets writes them."""
    sizes = {name: len(part) for name, part in parts.items()}
    try:
        slices = ReadInstruction.from_spec(spec).to_absolute(sizes)
    except (ValueError, AssertionError, AttributeError) as error:
        raise DataError(
            f'{option} {spec!r} is no split of this data set (it has {", ".join(parts)}), nor a slice like '
            f"'{next(iter(parts))}[:90%]'"
        ) from error
    # What reaches beyond the end is cut, as Python does.
    rows = [(cut.splitname, range(sizes[cut.splitname])[slice(cut.from_, cut.to)]) for cut in slices]
    return concatenate_datasets([parts[name].select(chosen or []) for name, chosen in rows])


def _columns(train: Dataset, options: DataOptions) -> tuple[str, str]:
    """Where images and labels are: the columns that are named, if they fit, else the usual ones."""
    images = [name for name, feature in train.features.items() if isinstance(feature, Image)]
    types = {name: str(getattr(feature, 'dtype', '')) for name, feature in train.features.items()}
    labels = [name for name, kind in types.items() if kind.startswith(_LABEL_TYPES)]
    usual = [name for name in LABEL_COLUMNS if name in labels][:1]
    usual = usual or [name for name in labels if isinstance(train.features[name], ClassLabel)]
    found: list[str] = []
    for option, fitting, chosen in (('image_column', images, images), ('label_column', labels, usual)):
        named = getattr(options, option)
        chosen = chosen if named is None else [name for name in fitting if name == named]
        if len(chosen) != 1:
            columns = ', '.join(train.column_names)
            raise DataError(f'expected {option} to name one column of that kind (got {named!r}; there are {columns})')
        found += chosen
    return found[0], found[1]


def _classes(train: Dataset, column: str) -> tuple[str, ...]:
    """Names of the classes: those of the feature, else the values that occur in the training split, in order."""
    feature = train.features[column]
    if isinstance(feature, ClassLabel):
        return tuple(feature.names)
    return tuple(map(str, sorted(value for value in train.unique(column) if value is not None)))


def _labels(part: Dataset, column: str, classes: tuple[str, ...], name: str) -> np.ndarray:
    """Class of each row."""
    values = list(part.select_columns([column])[:][column])
    feature = part.features[column]
    if isinstance(feature, ClassLabel):
        if tuple(feature.names) != classes:
            raise DataError(f'split {name!r} has other classes ({", ".join(feature.names[:5])}, ...) than the first')
        labels = np.array([-1 if value is None else value for value in values], dtype=np.int64)
    else:
        known = {label: index for index, label in enumerate(classes)}
        labels = np.array([known.get(str(value), -1) for value in values], dtype=np.int64)
    wrong = np.flatnonzero((labels < 0) | (labels >= len(classes)))
    if len(wrong):
        raise DataError(
            f'{len(wrong)} of {len(labels)} rows of split {name!r} have no known label (row {wrong[0]}: '
            f'{values[int(wrong[0])]!r})'
        )
    return labels
