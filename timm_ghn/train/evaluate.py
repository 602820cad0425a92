"""Accuracy of predicted networks without any training, as the papers report it."""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import ClassVar

from torch import Tensor
from tqdm import tqdm

from timm_ghn.architectures.architecture import Architecture
from timm_ghn.architectures.deepnets.generate import ranges_of
from timm_ghn.architectures.deepnets.sampler import networks_of
from timm_ghn.architectures.families import FAMILIES
from timm_ghn.architectures.samplers import NamesSampler, TimmSampler, evaluation_set, timm_parts
from timm_ghn.data.memory import evaluation_batches, load_images
from timm_ghn.data.options import DataOptions
from timm_ghn.data.splits import Split, Splits, load_splits
from timm_ghn.errors import ConfigError
from timm_ghn.files import check_output
from timm_ghn.hub.load import load_ghn
from timm_ghn.nn.ghn import GHN
from timm_ghn.runs.recipes import POSITIVE, option, read_recipe
from timm_ghn.runs.results import to_json
from timm_ghn.train.blueprints import Blueprints
from timm_ghn.train.options import TrainOptions
from timm_ghn.train.step import accuracies_of


@dataclasses.dataclass(frozen=True)
class NetworkOptions(DataOptions):
    """A GHN, networks to predict and images to measure them on."""

    groups: ClassVar = {
        'dataset': 'data', 'image_size': 'data', 'ghn': 'GHN', 'archs': 'architectures', 'seed': 'run',
        'batch_size': 'run', 'count': 'architectures',
    }  # fmt: skip

    train_split: str = option('train', 'split that gives the classes')
    val_split: str = option(
        'auto',
        'split to evaluate on, or a share of the training split (default: the test split, else the validation split, '
        'else a tenth of the training split)',
    )
    image_size: int = option(32, 'side of the images in pixels', within=POSITIVE)
    images: int | None = option(None, 'images to evaluate on (default: all)', within=POSITIVE)

    ghn: str = option('ghn', 'name or path of a GHN')

    archs: tuple[str, ...] = option(('families',), "'families', for drawn networks of each; or names of timm models")
    families: tuple[str, ...] = option(('all',), "'all', or some of the families, comma-separated")
    split: tuple[str, ...] = option((), 'instead networks of splits of DeepNets-1M: test, wide, deep, dense, bnfree')
    file: Path | None = option(None, 'Arrow or HDF5 file with the networks of --split (default: drawn)')
    small_stem: bool = option(True, 'named models get a stem for small images')
    recipe: Path | None = option(None, 'recipe of a training run, to whose limits drawn networks keep')

    batch_size: int = option(64, 'images whose statistics batch normalisation uses', within=POSITIVE)
    device: str = option('cpu', "where to compute, e.g. 'cuda'")
    cache: Path | None = option(None, 'folder for traced architectures')
    plot: Path | None = option(None, 'also draw the accuracy into this file')
    json: Path | None = option(None, 'also write the numbers to this file')

    def __post_init__(self) -> None:
        super().__post_init__()
        unknown = [name for name in self.chosen_families if name not in FAMILIES]
        if unknown:
            raise ConfigError(f'expected families among {", ".join(FAMILIES)} (got {", ".join(unknown)})')
        for split in self.split:
            ranges_of(split)
        if self.file is not None and not self.split:
            raise ConfigError('expected a split of the file of networks (name it with --split)')

    @property
    def chosen_families(self) -> tuple[str, ...]:
        """Families to draw from."""
        return tuple(FAMILIES) if self.families == ('all',) else self.families

    def sampler(self, num_classes: int) -> TimmSampler:
        """Draws networks of the families."""
        drawn = [TimmSampler(num_classes=num_classes)]
        if self.recipe is not None:
            recipe = TrainOptions(**{**read_recipe(self.recipe, TrainOptions), 'dataset': '-'})
            drawn = timm_parts(recipe.sampler_for(num_classes))
        if not drawn:
            raise ConfigError(f'expected {str(self.recipe)!r} to draw from families of timm (its sampler does not)')
        return dataclasses.replace(drawn[0], families=self.chosen_families, image_size=self.image_size)

    def named(self, num_classes: int) -> tuple[Architecture, ...]:
        """The models of timm that ``archs`` names."""
        named = NamesSampler(
            self.archs, image_size=self.image_size, num_classes=num_classes, small_stem=self.small_stem
        )
        return tuple(named.architecture(name) for name in named.models)

    def deepnets(self, split: str, num_classes: int) -> Iterable[Architecture]:
        """Networks of a split of DeepNets-1M: those of the file, or drawn without end."""
        return networks_of(split, self.image_size, num_classes, seed=self.seed, file=self.file)


@dataclasses.dataclass(frozen=True)
class EvaluateOptions(NetworkOptions):
    """Which GHN to evaluate, on which networks and images."""

    count: int = option(4, 'architectures of each family, or networks of each split', within=POSITIVE)

    def architectures(self, num_classes: int) -> list[tuple[str, Architecture]]:
        """What to evaluate, each with its family or its split of DeepNets-1M."""
        if self.split:
            found = [
                (split, network)
                for split in self.split
                for network in itertools.islice(self.deepnets(split, num_classes), self.count)
            ]
            if self.file is not None and len(found) < self.count * len(self.split):
                raise ConfigError(f'expected {self.count:,} networks of each split in {self.file} (got {len(found):,})')
            return found
        networks = (
            evaluation_set(self.sampler(num_classes), seed=self.seed, count=self.count, split='test')
            if self.archs == ('families',)
            else self.named(num_classes)
        )
        return [(network.family, network) for network in networks]


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """A predicted network that was never trained: family (or split of DeepNets-1M), name, size, accuracy in %."""

    family: str
    name: str
    parameters: int
    top1: float
    loss: float


@dataclasses.dataclass(frozen=True)
class Summary:
    """Accuracy in percent over the networks of a split or family; the error is that of the mean."""

    split: str
    networks: int
    mean: float
    standard_error: float
    maximum: float


def summaries(rows: Iterable[Evaluation]) -> tuple[Summary, ...]:
    """Mean, standard error and maximum of the accuracy of each family or split, in the order of the rows."""
    return tuple(
        Summary(name, len(top1), statistics.fmean(top1), statistics.pstdev(top1) / math.sqrt(len(top1)), max(top1))
        for name, top1 in _by_family(rows).items()
    )


def _by_family(rows: Iterable[Evaluation]) -> dict[str, list[float]]:
    accuracies: dict[str, list[float]] = {}
    for row in rows:
        accuracies.setdefault(row.family, []).append(row.top1)
    return accuracies


def load_ghn_and_splits(options: NetworkOptions) -> tuple[GHN, Splits]:
    """Load a GHN and a data set; a ConfigError if the GHN was trained for another number of classes."""
    ghn = load_ghn(options.ghn, device=options.device)
    splits = load_splits(options)
    if ghn.config.num_classes != len(splits.classes):
        raise ConfigError(
            f'{options.ghn!r} predicts classifiers of {ghn.config.num_classes} classes, but {options.dataset!r} has '
            f'{len(splits.classes)}: a network that was never trained cannot tell them apart'
        )
    return ghn, splits


def load_batches(options: NetworkOptions, ghn: GHN, split: Split) -> list[tuple[Tensor, Tensor]]:
    """Images of a split to measure on, normalised as the GHN expects them, with their labels."""
    data = load_images(split, (3, options.image_size, options.image_size), progress=True).to(ghn.device)
    count = options.images or len(data)
    return list(evaluation_batches(data, count, options.batch_size, seed=options.seed, config=vars(ghn.config)))


def check_outputs(options: NetworkOptions) -> None:
    """Refuse files that cannot be written before minutes go into what they are to hold."""
    if options.json is not None:
        check_output(options.json, ('.json',))
    if options.plot is not None:
        from timm_ghn.plots import SUFFIXES

        check_output(options.plot, SUFFIXES)


def evaluate(options: EvaluateOptions) -> tuple[Evaluation, ...]:
    """Predict networks and measure them; batch normalisation uses the statistics of each batch.

    Raises:
        GHNError: if the GHN, the data or an architecture cannot be had, or the classes differ in number.
    """
    check_outputs(options)
    ghn, splits = load_ghn_and_splits(options)
    batches = load_batches(options, ghn, splits.val if options.val_split != 'auto' else splits.test or splits.val)
    blueprints = Blueprints(ghn.config, options.cache)
    networks, rows = options.architectures(len(splits.classes)), []
    for family, architecture in tqdm(networks, desc='predicting', unit='network', disable=None):
        blueprint = blueprints(architecture)
        size = sum(row.numel for row in blueprint.plan)
        rows.append(Evaluation(family, architecture.name, size, *accuracies_of(ghn, blueprint, batches)))
    if options.json is not None:
        record = {
            'ghn': options.ghn,
            'images': sum(len(labels) for _, labels in batches),
            'rows': [dataclasses.asdict(row) for row in rows],
            'summary': [dataclasses.asdict(row) for row in summaries(rows)],
        }
        options.json.write_text(to_json(record, indent=1) + '\n', encoding='utf-8')
    if options.plot is not None:
        from timm_ghn.plots import plot_families

        plot_families(_by_family(rows), options.plot, chance=100 / len(splits.classes))
    return tuple(rows)
