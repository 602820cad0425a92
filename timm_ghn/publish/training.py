"""Results of a run, read from its output folder: of fine-tuning a model, or of training a GHN."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

from safetensors import SafetensorError, safe_open

from timm_ghn.errors import ConfigError, printable
from timm_ghn.nn.config import GHNConfig
from timm_ghn.runs.results import RESULTS, read_results

#: Weights that a fine-tuning run leaves, and the key of their accuracy in its last epoch; None for the best epoch's.
WEIGHTS = {'model_best.safetensors': None, 'model.safetensors': 'val_top1', 'model_ema.safetensors': 'ema_top1'}

#: Groups of networks that a training run evaluates on.
GROUPS = ('known', 'unseen')


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """Results of a run; ``run`` is their first line."""

    run: Mapping[str, Any]

    @property
    def arguments(self) -> dict[str, Any]:
        """Options of the run."""
        return dict(self.run['arguments'])

    def is_local(self, name: str) -> bool:
        """Whether an argument is a path on the machine of the run, which is not published."""
        named = str(self.arguments.get(name))
        on_the_hub = not os.path.exists(named) and not named.startswith(('.', '~', os.sep)) and named.count('/') <= 1
        return not on_the_hub or name in (self.run.get('local') or ())

    @property
    def dataset(self) -> str:
        """Name of the data set: that of the Hub, or the last part of a path."""
        name = str(self.arguments['dataset'])
        return printable(PurePath(name).stem if self.is_local('dataset') else name)

    @property
    def init(self) -> str | None:
        """Initial weights, without folders of the machine; None for random weights of a GHN."""
        name = str(self.arguments.get('init') or '')
        if name.startswith('donor:') and name.endswith('.safetensors'):
            return printable(f'donor:{PurePath(name).name}')
        return printable(PurePath(name).name if self.is_local('init') else name) or None


@dataclasses.dataclass(frozen=True)
class Training(RunRecord):
    """A fine-tuning run and the accuracy of its weights.

    Attributes:
        epoch: After which epoch the weights are from.
        top1: Their accuracy on the validation split, in percent. The best weights were chosen by it.
        test_top1: Their accuracy on the test split, in percent, by which nothing was chosen; None if it is not known.
    """

    epoch: float
    top1: float
    test_top1: float | None = None

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Training:
        """Read the results of a run.

        Args:
            path: Its output folder, for the best weights; or one of the files of weights in it.

        Raises:
            ConfigError: if there are no such results.
        """
        weights = Path(path)
        if weights.is_dir():
            weights = weights / next(iter(WEIGHTS))
        results = weights.parent / RESULTS
        if weights.name not in WEIGHTS or not results.is_file():
            raise ConfigError(
                f'expected the output folder of a fine-tuning run, with {RESULTS} and {" or ".join(WEIGHTS)} '
                f'(got {os.fspath(path)!r})'
            )
        lines = read_results(results)
        runs = [line for line in lines if line.get('kind') == 'run' and 'dataset' in line.get('arguments', {})]
        epochs = [line for line in lines if line.get('kind') == 'epoch']
        if not runs or not epochs:
            raise ConfigError(f'{results} says of no fine-tuning run how it went: train for one epoch at least')
        entry = WEIGHTS[weights.name]
        if entry is not None:
            return cls(runs[-1], float(epochs[-1]['epoch']), float(epochs[-1][entry]))
        epoch = float(read_header(weights).get('epoch', epochs[-1]['epoch']))
        return cls(runs[-1], epoch, float(epochs[-1]['best_top1']), lines[-1].get('test_top1'))


@dataclasses.dataclass(frozen=True)
class MetaTraining(RunRecord):
    """A run of ``timm-ghn train``.

    Attributes:
        steps: Steps done when the GHN was written.
        seconds: Time that they took.
        evaluation: The last line about networks that it predicted, without training; None if there is none.
    """

    steps: int
    seconds: float
    evaluation: Mapping[str, Any] | None

    @property
    def accuracies(self) -> dict[str, float]:
        """Mean accuracy in percent of predicted networks, no training, by group of :data:`GROUPS`."""
        found = self.evaluation or {}
        return {group: float(found[group]) for group in GROUPS if group in found}

    def families(self, group: str) -> dict[str, float]:
        """Accuracy in percent by family of networks; empty if the group was not evaluated."""
        start = f'{group}/'
        found = self.evaluation or {}
        return {key.removeprefix(start): float(value) for key, value in found.items() if key.startswith(start)}

    def networks(self, group: str) -> str:
        """The networks of a group, in words."""
        if group == 'unseen':
            return 'networks of families that were never trained'
        drawn = 'networks of the trained families, of designs that training never drew'
        known = {'timm': drawn, 'mix': drawn, 'names': 'the networks that it was trained on'}
        return known.get(str(self.arguments['sampler']), 'networks of the sampler that it was trained on')

    @property
    def is_of_the_end(self) -> bool:
        """Whether the evaluation is that of the GHN that was written."""
        return self.evaluation is not None and int(self.evaluation['step']) == self.steps

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> MetaTraining:
        """Read the results of a run.

        Args:
            path: Its output folder, or the file of results in it.

        Raises:
            ConfigError: if there are no such results, or if the run has come to no end.
        """
        file = Path(path) / RESULTS if Path(path).is_dir() else Path(path)
        if not file.is_file():
            raise ConfigError(
                f"expected the output folder of 'timm-ghn train', with {RESULTS} (got {os.fspath(path)!r})"
            )
        lines = read_results(file)
        of = {kind: [line for line in lines if line.get('kind') == kind] for kind in ('run', 'eval', 'end')}
        if not of['run'] or not {'config', 'arguments'} <= of['run'][-1].keys():
            raise ConfigError(f'{str(file)!r} does not say how a GHN was trained')
        if not of['end']:
            raise ConfigError(
                f"{str(file)!r} is of a run that has come to no end: go on with 'timm-ghn train --resume'"
            )
        end = of['end'][-1]
        return cls(of['run'][-1], int(end['step']), float(end['seconds']), of['eval'][-1] if of['eval'] else None)

    def check_config(self, config: GHNConfig) -> None:
        """Refuse results of another GHN.

        Raises:
            ConfigError: naming what differs.
        """
        found, expected = self.run['config'], config.to_dict()
        differing = [
            f'{key} is {printable(found[key])} there and {printable(expected[key])} here'
            for key in expected
            if key != 'format_version' and key in found and found[key] != expected[key]
        ]
        if differing:
            raise ConfigError(f'the results are of the training of another GHN: {"; ".join(differing[:3])}')


def read_header(path: Path) -> dict[str, str]:
    """The metadata in the header of a safetensors file.

    Raises:
        ConfigError: if it is no such file.
    """
    try:
        with safe_open(path, framework='pt') as file:
            return dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise ConfigError(f'expected a safetensors file in {str(path)!r}: {error}') from error
