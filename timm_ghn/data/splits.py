"""A Hugging Face data set as a training, a validation and a test split with known columns and classes."""

from __future__ import annotations

import dataclasses
import math
import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from datasets import (
    ClassLabel,
    Dataset,
    Image,
    ReadInstruction,
    Value,
    concatenate_datasets,
    load_dataset,
    load_from_disk,
)

from timm_ghn.data.options import DataOptions
from timm_ghn.errors import DataError

#: Names under which labels stand, the first that exists wins; a single column of class labels is found by its type.
LABEL_COLUMNS = ('label', 'labels', 'class', 'target', 'category')

#: Splits that are validated on where none is named, the first that exists wins.
VALIDATION_SPLITS = ('validation', 'valid', 'val', 'dev')

#: Split that is kept for the end: nothing is chosen by it.
TEST_SPLIT = 'test'

#: Share of the training split that is held out for validation where the data set has no split for it.
HELD_OUT = 0.1


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

    def select(self, rows: np.ndarray) -> Split:
        """Some of the rows, in the given order."""
        if np.array_equal(rows, np.arange(len(self))):
            return self
        return Split(self.rows.select(rows), self.image_column, self.labels[rows])


@dataclasses.dataclass(frozen=True)
class Splits:
    """What :func:`load_splits` finds.

    Attributes:
        train: To train on.
        val: To validate on.
        test: To look at once, at the end; None where the data set has none, or where it is trained or validated on.
        classes: Names of the classes, in the order of the labels.
        names: Names of the training and the validation split, as far as they were named.
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
    train, val, share, names = _choose(parts, options)
    image_column = _image_column(train, options.image_column)
    label_column = _label_column(train, options.label_column, image_column)
    classes = _classes(train, label_column)

    def read(part: Dataset, name: str) -> Split:
        missing = [column for column in (image_column, label_column) if column not in part.column_names]
        if missing:
            raise DataError(f'split {name!r} has no column {missing[0]!r} (it has {", ".join(part.column_names)})')
        labels = _labels(part, label_column, classes, name)
        if not len(part):
            raise DataError(f'split {name!r} of {options.dataset!r} has no images')
        return Split(_undecoded(part, image_column), image_column, labels)

    whole = read(train, names[0])
    _check_classes(whole.labels, classes, names[0])
    chosen = np.arange(len(whole))
    if shots is not None:
        chosen = first_shots(whole.labels, shots, shots_seed)
        _check_shots(whole.labels, chosen, shots, classes)
    if share is None:
        held_out = None
    else:
        held_out = _held_out(whole.labels, share, options.seed, np.array([]) if shots is None else chosen, names[0])
        chosen = np.setdiff1d(chosen, held_out)
        _check_classes(whole.labels[chosen], classes, names[0])
    return Splits(
        train=whole.select(chosen),
        val=read(val, names[1]) if held_out is None else whole.select(held_out),
        test=_test_split(parts, options, names, read),
        classes=classes,
        names=names,
    )


def _test_split(
    parts: Mapping[str, Dataset], options: DataOptions, names: tuple[str, str], read: Callable[[Dataset, str], Split]
) -> Split | None:
    """The test split, unless it is used for something else, or cannot be used: of some, the labels are secret."""
    if TEST_SPLIT not in parts or TEST_SPLIT in _named(options.train_split) | _named(names[1]):
        return None
    try:
        return read(parts[TEST_SPLIT], TEST_SPLIT)
    except DataError as error:
        warnings.warn(f'the test split is left out: {error}', stacklevel=3)
        return None


def _held_out(labels: np.ndarray, share: float, seed: int, shots: np.ndarray, name: str) -> np.ndarray:
    """Rows to validate on: a share of all rows, out of those that are no shots.

    They are drawn by systematic sampling of the rows in the order of their classes, so that each class has its share
    but for a fraction of an image.
    """
    rows = np.setdiff1d(np.arange(len(labels)), shots)
    if len(labels) < 2 or not len(rows):
        what = 'all of them are shots: ask for fewer' if len(labels) > 1 else 'too few'
        raise DataError(
            f'split {name!r} has {len(labels)} images, of which none can be held out for validation ({what}); or name '
            'a split to validate on with val_split'
        )
    count = min(math.ceil(share * len(labels)), len(rows) if len(shots) else len(rows) - 1)
    rng = np.random.default_rng(seed)
    rows = rng.permutation(rows)
    rows = rows[np.argsort(labels[rows], kind='stable')]
    places = (np.arange(count) + rng.random()) * (len(rows) / count)
    return np.sort(rows[np.minimum(places.astype(np.int64), len(rows) - 1)])


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
    place = Path(os.path.expanduser(options.dataset))  # an unknown user's ~ stays as it is
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
    return {'train': loaded} if isinstance(loaded, Dataset) else dict(loaded)


def _choose(
    parts: Mapping[str, Dataset], options: DataOptions
) -> tuple[Dataset, Dataset, float | None, tuple[str, str]]:
    """Training rows, validation rows or the share of the training rows that they are, and the names of both."""
    train = _part(parts, options.train_split, 'train_split')
    wanted, share = options.val_split, options.val_share
    if wanted == 'auto':
        trained = _named(options.train_split)
        others = [name for name in VALIDATION_SPLITS if name in parts and name not in trained]
        wanted, share = (others[0], None) if others else (wanted, HELD_OUT)
    if share is None:
        return train, _part(parts, wanted, 'val_split'), None, (options.train_split, wanted)
    return train, train, share, (options.train_split, f'{share:g} of {options.train_split}')


def _named(spec: str) -> set[str]:
    """Splits that slices like 'train[:90%]+validation' are of."""
    return {part.partition('[')[0].strip() for part in spec.split('+')}


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
    # What reaches beyond the end is cut, as Python does.
    rows = [(cut.splitname, range(sizes[cut.splitname])[slice(cut.from_, cut.to)]) for cut in slices]
    return concatenate_datasets([parts[name].select(chosen or []) for name, chosen in rows])


def _image_column(part: Dataset, named: str | None) -> str:
    features = part.features
    images = [str(name) for name, feature in features.items() if isinstance(feature, Image)]
    if named is not None:
        return _named_column(features, named, named in images, 'images')
    if len(images) == 1:
        return images[0]
    if images:
        raise DataError(f'several columns hold images ({", ".join(images)}): name one with image_column')
    kinds = ', '.join(f'{name}: {_type(feature)}' for name, feature in features.items())
    raise DataError(f'no column holds images ({kinds}); expected a data set for image classification')


def _label_column(part: Dataset, named: str | None, image_column: str) -> str:
    features = part.features
    if named is not None:
        return _named_column(features, named, named in features and _is_label(features[named]), 'class labels')
    usual = [name for name in LABEL_COLUMNS if name in features and _is_label(features[name])]
    labelled = [name for name, feature in features.items() if isinstance(feature, ClassLabel)]
    if usual or len(labelled) == 1:
        return (usual or labelled)[0]
    others = ', '.join(name for name in features if name != image_column) or 'none'
    raise DataError(f'no column is known to hold the labels: name one of these with label_column: {others}')


def _named_column(features: Mapping[str, Any], name: str, fits: bool, expected: str) -> str:
    if name not in features:
        raise DataError(f'there is no column {name!r} (there are {", ".join(features)})')
    if not fits:
        raise DataError(f'column {name!r} holds {_type(features[name])}, expected {expected}')
    return name


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
    values = list(part.select_columns([column])[:][column])
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
