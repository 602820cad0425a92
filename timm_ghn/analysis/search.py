"""Search for an architecture by the accuracy of predicted networks, without or after a few steps of training."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from timm_ghn.architectures.architecture import Architecture
from timm_ghn.architectures.cost import cost_of
from timm_ghn.data.memory import ImageTensors, load_images, training_batch
from timm_ghn.errors import ConfigError
from timm_ghn.nn.ghn import GHN
from timm_ghn.runs.recipes import NOT_NEGATIVE, POSITIVE, option
from timm_ghn.runs.results import to_json
from timm_ghn.train.blueprints import Blueprint, Blueprints
from timm_ghn.train.evaluate import NetworkOptions, check_outputs, load_batches, load_ghn_and_splits
from timm_ghn.train.step import accuracy_with, predict_parameters

#: Candidates that are drawn for each that is wanted, before giving up.
_ATTEMPTS = 100


@dataclasses.dataclass(frozen=True)
class SearchOptions(NetworkOptions):
    """Which architectures to rank, by which GHN and images."""

    groups = NetworkOptions.groups | {'num': 'architectures', 'steps': 'run'}

    num: int = option(20, 'architectures to rank: the first within the limits', within=POSITIVE)
    max_params: int | None = option(None, 'most parameters of an architecture', within=POSITIVE)
    max_macs: int | None = option(None, 'most multiply-accumulates for one image', within=POSITIVE)
    steps: int = option(0, 'train each predicted network for so many steps first', within=NOT_NEGATIVE)
    lr: float = option(0.01, 'learning rate of these (SGD with momentum 0.9)', within=NOT_NEGATIVE)

    def candidates(self, num_classes: int) -> Iterator[Architecture]:
        """Architectures in a fixed order, without regard to the limits."""
        if self.split:
            by_turns = itertools.zip_longest(*(self.deepnets(split, num_classes) for split in self.split))
            return (network for turn in by_turns for network in turn if network is not None)
        if self.archs != ('families',):
            return iter(self.named(num_classes))
        sampler, rng = dataclasses.replace(self.sampler(num_classes), split=None), np.random.default_rng((self.seed, 0))
        return iter(lambda: sampler.sample(rng), None)


@dataclasses.dataclass(frozen=True)
class Ranked:
    """An architecture, its parameters and multiply-accumulates, and how well its predicted network does.

    ``architecture.build('cpu')`` makes the network. Accuracy (in percent) and cross-entropy are on validation images.
    """

    architecture: Architecture
    parameters: int
    macs: int
    top1: float
    loss: float

    @property
    def name(self) -> str:
        """Name in timm, or the key of the architecture."""
        return self.architecture.name


def search(options: SearchOptions) -> tuple[Ranked, ...]:
    """Rank architectures by the accuracy of predicted networks; the same call gives the same ranking.

    They are measured on validation images, so that the test images stay for the architecture that is chosen. Batch
    normalisation uses the statistics of each batch.

    Returns:
        The best first; of two with one accuracy, the one of the smaller cross-entropy.

    Raises:
        ConfigError: if no candidate is within the limits, or the GHN was trained for other classes.
        GHNError: if the GHN, the data or an architecture cannot be had.
    """
    check_outputs(options)
    ghn, splits = load_ghn_and_splits(options)
    chosen = _within_limits(options, len(splits.classes))
    batches = load_batches(options, ghn, splits.val)
    size = (3, options.image_size, options.image_size)
    train = load_images(splits.train, size, progress=True).to(ghn.device) if options.steps else None
    blueprints = Blueprints(ghn.config, options.cache)
    rows = []
    for architecture, parameters, macs in tqdm(chosen, desc='measuring', unit='network', disable=None):
        blueprint = blueprints(architecture)
        with torch.no_grad():
            (predicted,) = predict_parameters(ghn, [blueprint])
        if train is not None:
            predicted = _trained(ghn, blueprint, predicted, train, options)
        rows.append(Ranked(architecture, parameters, macs, *accuracy_with(blueprint, predicted, batches)))
    rows.sort(key=lambda row: (-row.top1, math.inf if math.isnan(row.loss) else row.loss))
    if options.json is not None:
        ranked = [{'name': row.name, **dataclasses.asdict(row)} for row in rows]
        record = {'ghn': options.ghn, 'steps': options.steps, 'rows': ranked}
        options.json.write_text(to_json(record, indent=1) + '\n', encoding='utf-8')
    if options.plot is not None:
        from timm_ghn.plots import plot_search

        plot_search([(row.name, row.macs, row.top1) for row in rows], options.plot)
    return tuple(rows)


def _within_limits(options: SearchOptions, num_classes: int) -> list[tuple[Architecture, int, int]]:
    """Distinct candidates within the limits, with their parameters and multiply-accumulates."""
    found: dict[str, tuple[Architecture, int, int]] = {}
    for architecture in itertools.islice(options.candidates(num_classes), _ATTEMPTS * options.num):
        if architecture.key in found:
            continue
        cost = cost_of(architecture.build(), architecture.input_size)
        if cost.parameters <= (options.max_params or cost.parameters) and cost.macs <= (options.max_macs or cost.macs):
            found[architecture.key] = architecture, cost.parameters, cost.macs
            if len(found) == options.num:
                break
    if not found:
        raise ConfigError('found no architecture within the limits; raise --max-params or --max-macs')
    return list(found.values())


def _trained(
    ghn: GHN, blueprint: Blueprint, predicted: dict[str, Tensor], data: ImageTensors, options: SearchOptions
) -> dict[str, Tensor]:
    """Predicted parameters after some steps; those that are not predicted stay as they are."""
    leaves = {id(tensor): tensor.clone().requires_grad_() for tensor in predicted.values()}
    parameters = {name: leaves[id(tensor)] for name, tensor in predicted.items()}
    optimizer = torch.optim.SGD(leaves.values(), options.lr, momentum=0.9)
    for step in range(options.steps):
        images, labels = training_batch(data, step, options.batch_size, seed=options.seed, config=vars(ghn.config))
        optimizer.zero_grad()
        F.cross_entropy(blueprint(parameters, images), labels).backward()
        torch.nn.utils.clip_grad_norm_(leaves.values(), 1.0)
        optimizer.step()
    return {name: tensor.detach() for name, tensor in parameters.items()}
