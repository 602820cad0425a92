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
GROUPS = {'known': 'networks of the kinds that were trained', 'unseen': 'networks of families that were never trained'}


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
        return name in self.run.get('local', ('dataset', 'init'))

    def shown(self, name: str) -> str:
        """The data set or the initial weights, without folders of the machine; empty for none."""
        value = str(self.arguments.get(name) or '')
        prefix = 'donor:' if value.startswith('donor:') else ''
        private = self.is_local(name) or value.endswith('.safetensors')
        return printable(prefix + PurePath(value.removeprefix(prefix)).name if private else value)


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
        """Read the results of a run from its output folder, for the best weights, or for a file of weights in it.

        Raises:
            ConfigError: if there are no such results.
        """
        weights = Path(path)
        if weights.is_dir():
            weights = weights / next(iter(WEIGHTS))
        if weights.name not in WEIGHTS:
            raise ConfigError(f'expected the weights of a fine-tuning run, {" or ".join(WEIGHTS)} (got {str(path)!r})')
        lines = _last_lines(weights.parent, 'timm-ghn finetune', ('run', 'epoch'))
        run, epoch, key = lines['run'], lines['epoch'], WEIGHTS[weights.name]
        if key is not None:
            return cls(run, float(epoch['epoch']), float(epoch[key]))
        at = float(read_header(weights).get('epoch', epoch['epoch']))
        return cls(run, at, float(epoch['best_top1']), lines.get('end', {}).get('test_top1'))


@dataclasses.dataclass(frozen=True)
class MetaTraining(RunRecord):
    """A run of ``timm-ghn train``.

    Attributes:
        steps: Steps done when the GHN was written.
        evaluation: The last line about networks that it predicted, without training; empty if there is none.
    """

    steps: int
    evaluation: Mapping[str, Any]

    @property
    def accuracies(self) -> dict[str, float]:
        """Mean accuracy in percent of predicted networks, no training, by group; empty if those of an earlier step."""
        if self.evaluation.get('step') != self.steps:
            return {}
        return {group: float(self.evaluation[group]) for group in GROUPS if group in self.evaluation}

    @classmethod
    def read(cls, path: str | os.PathLike[str], config: GHNConfig) -> MetaTraining:
        """Read the results of the run whose output folder this is.

        Raises:
            ConfigError: if there are no such results, if the run has come to no end, or if it trained another GHN.
        """
        lines = _last_lines(Path(path), 'timm-ghn train', ('run', 'end'))
        found, expected = lines['run'].get('config', {}), config.to_dict()
        differing = [key for key in expected if key in found and found[key] != expected[key]]
        if set(differing) - {'format_version'}:
            raise ConfigError(f'the results in {str(path)!r} are of another GHN: {", ".join(differing)} differ')
        return cls(lines['run'], int(lines['end']['step']), lines.get('eval', {}))


def _last_lines(folder: Path, command: str, kinds: tuple[str, str]) -> dict[str, dict[str, Any]]:
    """The last line of each kind in the results of a run; a ConfigError if one of ``kinds`` is missing."""
    file = folder / RESULTS
    if not file.is_file():
        raise ConfigError(f"expected the output folder of '{command}', with {RESULTS} (got {str(folder)!r})")
    lines = {line['kind']: line for line in read_results(file)}
    missing = [kind for kind in kinds if kind not in lines]
    if missing:
        raise ConfigError(f"{str(file)!r} has no line {missing[0]!r}: go on with '{command} --resume'")
    return lines


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
