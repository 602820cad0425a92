"""Small labelled images, made for tests: one colour for each class, with noise."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage

COLOURS = {'red': (220, 40, 40), 'green': (40, 200, 60), 'blue': (50, 60, 220), 'grey': (128, 128, 128)}


def picture(colour: tuple[int, int, int], seed: int, size: int = 32) -> PILImage.Image:
    noise = np.random.default_rng(seed).normal(0, 30, (size, size, 3))
    return PILImage.fromarray((np.array(colour) + noise).clip(0, 255).astype(np.uint8))


def encoded(image: PILImage.Image, form: str = 'PNG') -> bytes:
    file = io.BytesIO()
    image.save(file, form)
    return file.getvalue()


def make_dataset(
    count: int,
    classes: tuple[str, ...] = ('red', 'green', 'blue'),
    *,
    seed: int = 0,
    damaged: tuple[int, ...] = (),
    size: int = 32,
) -> Dataset:
    """Rows of class 0, 1, 2, 0, 1, 2, ...; those that are damaged are half a file."""
    names = list(classes)
    rows = []
    for row in range(count):
        data = encoded(picture(COLOURS[names[row % len(names)]], seed * 10_000 + row, size))
        rows.append({'bytes': data[: len(data) // 2] if row in damaged else data, 'path': None})
    features = Features({'image': Image(), 'label': ClassLabel(names=names)})
    encoded_rows = {'image': rows, 'label': [row % len(names) for row in range(count)]}
    return Dataset.from_dict(encoded_rows, features=features)


def save_dataset(folder: Path, train: Dataset, test: Dataset | None = None) -> Path:
    """Write parquet files that ``load_dataset(folder)`` reads."""
    folder.mkdir(parents=True, exist_ok=True)
    train.to_parquet(folder / 'train-00000-of-00001.parquet')
    if test is not None:
        test.to_parquet(folder / 'test-00000-of-00001.parquet')
    return folder
