"""Accuracy of predicted networks without any training, as the papers report it."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

from tqdm import tqdm

from timm_ghn.architectures.architecture import Architecture
from timm_ghn.architectures.families import FAMILIES
from timm_ghn.architectures.samplers import NamesSampler, TimmSampler, evaluation_set, timm_parts
from timm_ghn.data.memory import evaluation_batches, load_images
from timm_ghn.data.options import DataOptions
from timm_ghn.data.splits import load_splits
from timm_ghn.errors import ConfigError
from timm_ghn.files import check_output
from timm_ghn.hub.load import load_ghn
from timm_ghn.prediction.checks import device_of
from timm_ghn.runs.recipes import POSITIVE, option, read_recipe
from timm_ghn.runs.results import to_json
from timm_ghn.train.blueprints import Blueprints
from timm_ghn.train.options import TrainOptions
from timm_ghn.train.step import accuracies_of

#: Headings of the help, by the option that each begins with.
GROUPS = {'dataset': 'data', 'image_size': 'data', 'ghn': 'GHN', 'archs': 'architectures', 'seed': 'run',
          'batch_size': 'run'}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class EvaluateOptions(DataOptions):
    """Which GHN to evaluate, on which networks and images."""

    train_split: str = option('train', 'split that gives the classes')
    val_split: str = option(
        'auto',
        'split to evaluate on, or a share of the training split (default: the test split, else the validation split, '
        'else a tenth of the training split)',
    )
    image_size: int = option(32, 'side of the images in pixels', within=POSITIVE)
    images: int | None = option(
        None, 'evaluate on so many images, drawn over the classes (default: all)', within=POSITIVE
    )

    ghn: str = option('ghn', 'name or path of a GHN')

    archs: str = option(
        'families', "'families': drawn test architectures of each family; else names of timm models, comma-separated"
    )
    families: str = option('all', "'all', or some of the families, comma-separated")
    count: int = option(4, 'architectures of each family', within=POSITIVE)
    small_stem: bool = option(True, 'named models get a stem for small images')
    recipe: Path | None = option(
        None, 'recipe of a training run: drawn architectures keep to its limits', metavar='FILE'
    )

    batch_size: int = option(64, 'images whose statistics batch normalisation uses', within=POSITIVE)
    device: str = option('cpu', "where to compute, e.g. 'cuda'")
    cache: Path | None = option(None, 'folder for traced architectures', metavar='DIR')
    json: Path | None = option(None, 'also write the numbers to this file', metavar='FILE')
    plot: Path | None = option(None, 'also draw the accuracy by family into this file', metavar='FILE')

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.chosen_families

    @functools.cached_property
    def chosen_families(self) -> tuple[str, ...]:
        """Families to draw from."""
        if self.families == 'all':
            return tuple(FAMILIES)
        chosen = tuple(name.strip() for name in self.families.split(','))
        unknown = [name for name in chosen if name not in FAMILIES]
        if unknown:
            raise ConfigError(f'expected families among {", ".join(FAMILIES)} (got {", ".join(unknown)})')
        return chosen

    def _sampler(self, num_classes: int) -> TimmSampler:
        if self.recipe is None:
            return TimmSampler(self.chosen_families, self.image_size, num_classes)
        sampler = TrainOptions(**{**read_recipe(self.recipe, TrainOptions), 'dataset': '-'}).sampler_for(num_classes)
        drawn = timm_parts(sampler)
        if not drawn:
            raise ConfigError(f'expected {str(self.recipe)!r} to draw from families of timm (its sampler does not)')
        return dataclasses.replace(drawn[0], families=self.chosen_families, image_size=self.image_size)

    def architectures(self, num_classes: int) -> tuple[Architecture, ...]:
        """What to evaluate."""
        if self.archs == 'families':
            return evaluation_set(self._sampler(num_classes), seed=self.seed, count=self.count, split='test')
        names = tuple(name.strip() for name in self.archs.split(','))
        named = NamesSampler(names, self.image_size, num_classes, small_stem=self.small_stem)
        return tuple(named.architecture(name) for name in named.models)


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """A predicted network that was never trained.

    Attributes:
        family: Of the network.
        name: Its key, or its name in timm.
        parameters: Their number.
        top1: Accuracy in percent.
        loss: Cross-entropy.
    """

    family: str
    name: str
    parameters: int
    top1: float
    loss: float


def evaluate(options: EvaluateOptions) -> tuple[Evaluation, ...]:
    """Predict networks and measure them; batch normalisation uses the statistics of each batch.

    Raises:
        ConfigError: if the GHN was trained for another number of classes than the data set has.
        GHNError: if the GHN, the data or an architecture cannot be had.
    """
    if options.json is not None:
        check_output(options.json, ('.json',))
    if options.plot is not None:
        from timm_ghn.plots import SUFFIXES

        check_output(options.plot, SUFFIXES)
    device = device_of(options.device)
    ghn = load_ghn(options.ghn, device=device)
    splits = load_splits(options)
    if ghn.config.num_classes != len(splits.classes):
        raise ConfigError(
            f'{options.ghn!r} predicts classifiers of {ghn.config.num_classes} classes, but {options.dataset!r} has '
            f'{len(splits.classes)}: a network that was never trained cannot tell them apart'
        )
    evaluated = splits.val if options.val_split != 'auto' or splits.test is None else splits.test
    data = load_images(evaluated, (3, options.image_size, options.image_size), progress=True).to(device)
    images = {'mean': ghn.config.mean, 'std': ghn.config.std}
    count = options.images or len(data)
    batches = list(evaluation_batches(data, count, options.batch_size, seed=options.seed, config=images))
    blueprints = Blueprints(ghn.config, options.cache)
    rows = []
    for architecture in tqdm(
        options.architectures(len(splits.classes)), desc='predicting', unit='network', disable=None
    ):
        blueprint = blueprints(architecture)
        top1, loss = accuracies_of(ghn, blueprint, batches)
        size = sum(row.numel for row in blueprint.plan)
        name = str(architecture.options.get('name', architecture.key))
        rows.append(Evaluation(architecture.family, name, size, top1, loss))
    if options.json is not None:
        record = {
            'ghn': options.ghn,
            'images': min(count, len(data)),
            'rows': [dataclasses.asdict(row) for row in rows],
        }
        options.json.write_text(to_json(record, indent=1) + '\n', encoding='utf-8')
    if options.plot is not None:
        from timm_ghn.plots import plot_families

        families: dict[str, list[float]] = {}
        for row in rows:
            families.setdefault(row.family, []).append(row.top1)
        plot_families(families, options.plot, chance=100 / len(splits.classes))
    return tuple(rows)
