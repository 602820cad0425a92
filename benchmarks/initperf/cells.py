"""What is measured: networks, data sets, and the tiers, which say which of them with how many steps and which arms.

A cell is a network, a data set and a number of steps. Convolutional networks leave a map of at least 2x2 positions, and
vision transformers have at least 64 tokens, since with fewer no arrangement of space can show: networks at 32 pixels
have the stem for small images of ``timm_ghn.finetune --small-stem auto``, those at 64 and 128 pixels their own.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from timm_ghn.data.memory import ImageTensors, load_images
from timm_ghn.data.options import DataOptions
from timm_ghn.data.splits import Split, first_shots, load_splits
from timm_ghn.finetune.options import FinetuneOptions
from timm_ghn.finetune.setup import Start, build

#: Parts of a data set: the learning rates are chosen on the one, the accuracies reported on the other.
PARTS = ('select', 'report')

#: Images to evaluate on: those that are reported on, and those that a rate is chosen on.
TEST_IMAGES = {'report': 1000, 'select': 400}


@dataclasses.dataclass(frozen=True)
class Network:
    """A network as it is fine-tuned.

    Attributes:
        label: Name in the results.
        family: Networks of a family share their donor, and a point of the picture.
        seen: Whether the embedded GHN was trained on networks of this family.
        model: Architecture of timm.
        image_size: Side of the images in pixels.
        small_stem: 'on' or 'off', see :class:`~timm_ghn.finetune.options.FinetuneOptions`.
        model_args: More arguments of ``timm.create_model``, for variants that timm does not list.
        donor: Label of the small network of the family that :func:`~benchmarks.initperf.arms.donor` resizes.
    """

    label: str
    family: str
    seen: bool
    model: str
    image_size: int = 32
    small_stem: str = 'on'
    model_args: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)
    donor: str = ''

    def start(self, num_classes: int, seed: int, *, pretrained: bool = False) -> Start:
        """The network as timm initialises it: the same call gives the same weights."""
        options = FinetuneOptions(
            dataset='none',
            model=self.model,
            init='pretrained' if pretrained else 'random',
            image_size=self.image_size,
            small_stem=self.small_stem,
            model_args=dict(self.model_args),
            seed=seed,
        )
        return build(options, num_classes)

    def facts(self) -> dict[str, Any]:
        """What builds it."""
        return {**dataclasses.asdict(self), 'model_args': dict(self.model_args)}


def _own(model: str, family: str, seen: bool, donor: str = '', **more: Any) -> Network:
    """A network at 64 pixels with timm's own stem, which divides the side by 32."""
    return Network(f'{model}@64', family, seen, model, 64, 'off', donor=donor, **more)


def _small(model: str, family: str, seen: bool, donor: str = '', **more: Any) -> Network:
    return Network(model, family, seen, model, donor=donor, **more)


def _scaled(label: str, model: str, family: str, donor: str = '', size: int = 64, **model_args: Any) -> Network:
    return Network(label, family, True, model, size, 'on' if size == 32 else 'off', model_args, donor)


#: All networks by label: 24 of timm, of families that the embedded GHN was trained on and of others; three variants
#: that timm does not list; and three at 128 pixels.
NETWORKS: dict[str, Network] = {
    network.label: network
    for network in (
        # Families that it was trained on.
        _own('test_resnet', 'resnet', True),
        _own('resnet10t', 'resnet', True, 'test_resnet@64'),
        _own('resnet18', 'resnet', True, 'resnet10t@64'),
        _own('resnet26', 'resnet_bottleneck', True),
        _own('mobilenetv3_small_100', 'mobilenet', True, 'mobilenetv3_small_050'),
        _small('mobilenetv3_small_050', 'mobilenet', True),
        _own('test_efficientnet', 'efficientnet', True),
        _own('efficientnet_b0', 'efficientnet', True, 'test_efficientnet@64'),
        _own('test_convnext', 'convnext', True),
        _own('convnext_atto', 'convnext', True, 'test_convnext@64'),
        _small('test_vit', 'vit', True),
        _small('vit_tiny_patch16_224', 'vit', True, 'test_vit'),
        _own('poolformer_s12', 'poolformer', True),
        _own('resnetv2_18', 'resnetv2', True),
        _own('regnetx_002', 'regnet', True),
        _own('regnety_002', 'regnet', True, 'regnetx_002@64'),
        # Families that it was not.
        _own('ghostnet_100', 'ghostnet', False),
        _own('test_byobnet', 'byobnet', False),
        _own('edgenext_xx_small', 'edgenext', False),
        _own('test_mambaout', 'mambaout', False),
        _small('test_nfnet', 'nfnet', False),
        _own('mobilevit_xxs', 'mobilevit', False),
        _own('densenet121', 'densenet', False),
        _small('xcit_nano_12_p16_224', 'xcit', False),
        # Variants.
        _scaled('resnet18x0.75@64', 'resnet18', 'resnet', 'resnet10t@64', channels=[48, 96, 192, 384]),
        _scaled('resnet18x1.5@64', 'resnet18', 'resnet', 'resnet10t@64', channels=[96, 192, 384, 768]),
        _scaled('test_vit-deep', 'test_vit', 'vit', 'test_vit', 32, depth=10),
        # Larger images.
        Network('resnet18@128', 'resnet', True, 'resnet18', 128, 'off', donor='resnet10t@64'),
        Network('convnext_atto@128', 'convnext', True, 'convnext_atto', 128, 'off', donor='test_convnext@64'),
        Network('vit_tiny_patch16_224@128', 'vit', True, 'vit_tiny_patch16_224', 128, 'off', donor='test_vit'),
    )
}


@dataclasses.dataclass(frozen=True)
class DataSet:
    """Labelled images.

    Attributes:
        name: In the results.
        place: Folder or name for ``datasets.load_dataset``.
        shots: Images of each class to train on.
        seen: Whether the embedded GHN was trained on these images.
    """

    name: str
    place: str
    shots: int = 25
    seen: bool = False


#: Data sets by name, in the folder of ``--data-root``; of any other folder, see ``--data``.
DATA = {'cifar10': (25, True), 'clothing_128': (25, False), 'tiny_imagenet_32': (20, True)}


def data_set(name: str, root: Path, places: Mapping[str, str]) -> DataSet:
    """A data set by its name: one of ``--data NAME=PLACE``, or of :data:`DATA`."""
    shots, seen = DATA.get(name, (25, False))
    return DataSet(name, places.get(name, str(root / name)), shots, seen)


@dataclasses.dataclass(frozen=True)
class Images:
    """Decoded images of one part of a data set.

    Attributes:
        pool: To draw the training images from.
        test: To evaluate on.
        shots: Images of each class to train on.
        num_classes: Classes.
    """

    pool: ImageTensors
    test: ImageTensors
    shots: int
    num_classes: int

    def train(self, seed: int) -> ImageTensors:
        """The training images of a seed."""
        rows = first_shots(self.pool.labels_n.numpy(), self.shots, seed)
        return ImageTensors(self.pool.images_nchw[rows], self.pool.labels_n[rows], 0)


@functools.lru_cache(maxsize=2)
def load_part(data: DataSet, image_size: int, part: str) -> Images:
    """Decode one part. No image is in both: each has a half of the training rows of each class.

    What is reported is measured on the test split (the validation split, where there is none); rates are chosen on
    other rows of the training split.
    """
    splits = load_splits(DataOptions(dataset=data.place, val_split='auto'))
    rng = np.random.default_rng(0)
    order = rng.permutation(len(splits.train))
    halves = {name: order[np.sort(_half(splits.train.labels[order], index))] for index, name in enumerate(PARTS)}
    rows = halves[part]
    pooled = first_shots(splits.train.labels[rows], 4 * data.shots, None)
    rest = np.setdiff1d(np.arange(len(rows)), pooled)
    if part == 'report':
        test = splits.test or splits.val
        chosen = rng.permutation(len(test))
    elif len(rest):
        test, chosen = splits.train.select(rows), rng.permutation(rest)
    else:  # a small data set, whose pool is all of it: a quarter of that is kept
        test, chosen = splits.train.select(rows), rng.permutation(pooled)[: max(1, len(pooled) // 4)]
        pooled = np.setdiff1d(pooled, chosen)
    size = (3, image_size, image_size)
    return Images(
        load_images(_rows(splits.train.select(rows), pooled), size),
        load_images(_rows(test, chosen[: TEST_IMAGES[part]]), size),
        data.shots,
        len(splits.classes),
    )


def _half(labels: np.ndarray, index: int) -> np.ndarray:
    """Every second row of each class."""
    chosen = [np.flatnonzero(labels == label)[index::2] for label in np.unique(labels)]
    return np.concatenate(chosen)


def _rows(split: Split, rows: np.ndarray) -> Split:
    return split.select(np.asarray(rows))


@dataclasses.dataclass(frozen=True)
class Cell:
    """What arms are compared in.

    Attributes:
        network: Label of a network.
        data: Name of a data set.
        steps: Steps of training.
    """

    network: str
    data: str
    steps: int


@dataclasses.dataclass(frozen=True)
class Tier:
    """A size of the whole measurement.

    Attributes:
        cells: In the order in which they are measured: what is cut short has whole cells.
        arms: Arms of each number of steps.
        seeds: Paired seeds of what is reported.
    """

    cells: tuple[Cell, ...]
    arms: Mapping[int, tuple[str, ...]]
    seeds: int = 5


IGNORANT = ('timm', 'timm_open', 'kaiming', 'lsuv', 'orthogonal', 'mimetic', 'impulse')
OF_GHN = ('ghn_raw', 'ghn_noise', 'ghn_orth', 'ghn_open', 'shuffled', 'norms_only')
MIXED = ('donor:8', 'relative:8', 'race:ghn_orth+lsuv')
PRETRAIN = tuple(f'pretrain:{minutes:g}' for minutes in (0.5, 1, 2, 4, 8, 16, 32))

_CORE_ARMS = (
    'timm', 'timm_open', 'lsuv', 'mimetic', 'impulse', 'ghn_orth', 'ghn_open', 'shuffled', 'norms_only',
    'pretrain:0.5', 'pretrain:2', 'pretrain:8',
)  # fmt: skip
_CORE_LONG = ('timm', 'timm_open', 'lsuv', 'ghn_orth', 'pretrain:2')
_CORE = (
    'test_resnet@64', 'test_vit', 'test_mambaout@64', 'test_efficientnet@64',
    'regnetx_002@64', 'mobilenetv3_small_100@64', 'test_convnext@64', 'edgenext_xx_small@64',
    'test_byobnet@64', 'resnet10t@64', 'test_vit-deep', 'convnext_atto@64',
)  # fmt: skip
_CORE_DATA = ('clothing_128', 'cifar10')

TIERS: dict[str, Tier] = {
    'smoke': Tier(
        (Cell('test_resnet@64', 'cifar10', 20),),
        {20: ('timm', 'timm_open', 'ghn_orth', 'shuffled', 'pretrain:0.1')},
        seeds=2,
    ),
    'core': Tier(
        (
            *(Cell(network, data, 60) for data in _CORE_DATA for network in _CORE),
            *(Cell(network, _CORE_DATA[0], 300) for network in _CORE[:4]),
        ),
        {60: _CORE_ARMS, 300: _CORE_LONG},
    ),
    'full': Tier(
        tuple(Cell(network, data, steps) for steps in (60, 300, 1500) for network in NETWORKS for data in DATA),
        dict.fromkeys((60, 300, 1500), (*IGNORANT, *OF_GHN, *MIXED, *PRETRAIN, 'pretrained')),
        seeds=8,
    ),
}
