"""What is known of a GHN: from its configuration, from where it was loaded, from the results of its training."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

import torch

from timm_ghn.errors import ConfigError, GHNError
from timm_ghn.hub.catalogue import GHNEntry
from timm_ghn.hub.load import load_ghn
from timm_ghn.nn.config import GHNConfig, Origin
from timm_ghn.nn.ghn import GHN
from timm_ghn.publish.facts import RunRecord, entry_of
from timm_ghn.publish.send import WEIGHTS_FILE
from timm_ghn.runs.results import RESULTS, read_results
from timm_ghn.text import printable

#: Groups of networks that a training run evaluates on.
GROUPS = ('known', 'unseen')


@dataclasses.dataclass(frozen=True)
class MetaTraining(RunRecord):
    """A run of ``timm-ghn train``, and what came out of it.

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
        return {
            key[len(start) :]: float(value) for key, value in (self.evaluation or {}).items() if key.startswith(start)
        }

    def networks(self, group: str) -> str:
        """The networks of a group, in words."""
        if group == 'unseen':
            return 'networks of families that were never trained'
        drawn = 'networks of the trained families, of designs that training never drew'
        known = {'timm': drawn, 'mix': drawn, 'names': 'the networks that it was trained on'}
        return known.get(str(self.arguments['sampler']), 'networks of the sampler that it was trained on')

    @property
    def begun_with(self) -> str | None:
        """The GHN whose weights it began with, without folders of the machine; None for random ones."""
        name = str(self.arguments.get('init') or '')
        return printable(PurePath(name).name if self.is_local('init') else name) or None

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
        lines = [line for line in read_results(file) if isinstance(line, dict)]
        of = {kind: [line for line in lines if line.get('kind') == kind] for kind in ('run', 'eval', 'end')}
        if not of['run'] or not {'config', 'arguments'} <= of['run'][-1].keys():
            raise ConfigError(f'{str(file)!r} does not say how a GHN was trained')
        if not of['end']:
            raise ConfigError(
                f"{str(file)!r} is of a run that has come to no end: go on with 'timm-ghn train --resume'"
            )
        end = of['end'][-1]
        return cls(of['run'][-1], int(end['step']), float(end['seconds']), of['eval'][-1] if of['eval'] else None)

    def check_of(self, config: GHNConfig) -> None:
        """Refuse results of another GHN.

        Raises:
            ConfigError: naming what differs.
        """
        found, expected = dict(self.run['config']), config.to_dict()
        differing = [
            f'{key} is {printable(found[key])} there and {printable(expected[key])} here'
            for key in expected
            if key != 'format_version' and key in found and found[key] != expected[key]
        ]
        if differing:
            raise ConfigError(f'the results are of the training of another GHN: {"; ".join(differing[:3])}')


@dataclasses.dataclass(frozen=True)
class GHNFacts:
    """What the card of a GHN says.

    Attributes:
        repo_id: Repository on the Hub.
        revision: Branch, if not the main one.
        config: Hyper-parameters.
        parameters: Number of elements of all parameters.
        origin: Where its weights came from; None if that is not known, or says nothing to others.
        entry: What the catalogue says of that origin.
        unchanged: Whether all its weights are certain to be those of that origin.
        training: The run that trained it.
        license: Identifier of the licence, as the Hub writes it.
    """

    repo_id: str
    revision: str | None
    config: GHNConfig
    parameters: int
    origin: Origin | None
    entry: GHNEntry | None
    unchanged: bool
    training: MetaTraining | None
    license: str | None

    @property
    def converted(self) -> bool:
        """Whether the weights came from a file of another form than ours."""
        theirs = self.entry is not None and self.entry.format == 'joblib'
        return theirs or (self.origin is not None and not str(self.origin.file or '').endswith('.safetensors'))


def facts_of(
    ghn: GHN, repo_id: str, revision: str | None, *, training: MetaTraining | None, license: str | None
) -> GHNFacts:
    """Gather what is known.

    Args:
        ghn: The GHN.
        repo_id: Repository on the Hub that it goes to.
        revision: Branch, if not the main one.
        training: The run that trained it. If None, results that lie beside its file serve, if the file says the same.
        license: Identifier of the licence; if None, that of the catalogue.

    Raises:
        ConfigError: if the run trained another GHN.
    """
    if training is not None:
        training.check_of(ghn.config)
    unchanged = is_unchanged(ghn)
    if training is None and unchanged:
        training = _beside(ghn)
    origin = ghn.origin
    entry = _entry(origin)
    return GHNFacts(
        repo_id=repo_id,
        revision=revision,
        config=ghn.config,
        parameters=sum(parameter.numel() for parameter in ghn.parameters()),
        origin=origin if _tells(origin, repo_id) else None,
        entry=entry,
        unchanged=unchanged,
        training=training,
        license=license or (entry.license if entry is not None else None),
    )


def is_unchanged(ghn: GHN) -> bool:
    """Whether a GHN has the weights of the file that it was loaded from, found by reading it again."""
    again = _read_again(ghn.origin)
    if again is None:
        return False
    state, found = ghn.state_dict(), again.state_dict()
    return found.keys() == state.keys() and all(
        state[key].shape == value.shape and torch.equal(state[key].cpu(), value.to(state[key].dtype))
        for key, value in found.items()
    )


def _read_again(origin: Origin | None) -> GHN | None:
    """What an origin names, where it is at hand: nothing is downloaded for the sake of a sentence."""
    if origin is None:
        return None
    entry = _entry(origin)
    name = entry.name if entry is not None else origin.repo_id
    for place, revision in ((name, origin.revision), (origin.file, None)):
        if place is not None:
            try:
                return load_ghn(place, revision=revision, local_files_only=True)
            except GHNError:
                continue
    return None


def _entry(origin: Origin | None) -> GHNEntry | None:
    return None if origin is None else entry_of({'ghn': origin.name, 'origin': dataclasses.asdict(origin)})


def _tells(origin: Origin | None, repo_id: str) -> bool:
    """Whether an origin says something to others: neither a folder of this machine nor the repository itself."""
    if origin is None or origin.repo_id == repo_id:
        return False
    return origin.embedded or origin.repo_id is not None or Path(origin.file or WEIGHTS_FILE).name != WEIGHTS_FILE


def _beside(ghn: GHN) -> MetaTraining | None:
    """The run whose output folder a GHN was loaded from."""
    origin = ghn.origin
    if origin is None or not origin.file or origin.repo_id is not None:
        return None
    folder = Path(origin.file).absolute().parent
    for place in (folder, folder.parent):
        if (place / RESULTS).is_file():
            try:
                found = MetaTraining.read(place)
                found.check_of(ghn.config)
            except ConfigError:  # of something else
                return None
            return found
    return None
