"""What is known of a model's weights: from the prediction, from timm's configuration, from a run's results."""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from timm_ghn.errors import ConfigError, GHNError, UnsupportedModelError
from timm_ghn.graph.build import trace
from timm_ghn.hub.catalogue import GHNEntry, known_ghns
from timm_ghn.hub.load import load_ghn
from timm_ghn.prediction.plan import plan_parameters
from timm_ghn.prediction.postprocess import NAMED, PostProcess, postprocess_
from timm_ghn.prediction.predict import Prediction, ghn_init
from timm_ghn.runs.results import RESULTS, read_results
from timm_ghn.text import printable
from timm_ghn.timm_source import DEFAULT_TAG

#: Weights that a fine-tuning run leaves, and the entry of its last line that says how good they are; None: the file.
WEIGHTS = {'model_best.safetensors': None, 'model.safetensors': 'val_top1', 'model_ema.safetensors': 'ema_top1'}


#: Entries of a provenance and their types; each may be left open.
_PROVENANCE: dict[str, Any] = {
    'ghn': str, 'trained': bool, 'origin': Mapping, 'timm_ghn': str, 'rules': str, 'input_size': Sequence,
    'mean': Sequence, 'std': Sequence, 'head': str, 'seed': int, 'postprocess': (Mapping, str), 'tensors': int,
    'predicted_tensors': int, 'elements': int, 'predicted_elements': int,
}  # fmt: skip


def check_provenance(found: object) -> dict[str, Any]:
    """Facts about a prediction, as :func:`~timm_ghn.prediction.predict.provenance` gives them, from whoever says so.

    Raises:
        ConfigError: if they are something else.
    """
    if not isinstance(found, Mapping):
        raise ConfigError(f'expected facts about a prediction (got {type(found).__name__})')
    for key, kind in _PROVENANCE.items():
        if found.get(key) is not None and not isinstance(found[key], kind):
            raise ConfigError(f'expected {key} of a prediction as its provenance has it (got {printable(found[key])})')
    for key, value in (found.get('origin') or {}).items():
        if not isinstance(value, str | None | bool):
            raise ConfigError(f'expected {key} of the origin of a prediction to be text (got {printable(value)})')
    if isinstance(found.get('postprocess'), Mapping):
        try:
            PostProcess(**found['postprocess'])
        except TypeError as error:
            raise ConfigError(f'expected options of post-processing as the provenance has them ({error})') from error
    return dict(found)


def is_public(named: object) -> bool:
    """Whether a data set or a GHN was named as on the Hub, and not as a file or folder."""
    name = str(named)
    return not os.path.exists(name) and not name.startswith(('.', '~', os.sep)) and name.count('/') <= 1


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """What the results of a run say of it, be it of fine-tuning or of meta-training.

    Attributes:
        run: The first line of its results.
    """

    run: Mapping[str, Any]

    @property
    def arguments(self) -> dict[str, Any]:
        """Options of the run."""
        return dict(self.run['arguments'])

    def is_local(self, name: str) -> bool:
        """Whether an argument named a file or folder where the run was, which is nobody else's business."""
        recorded = self.run.get('local')
        return not is_public(self.arguments.get(name)) or (recorded is not None and name in recorded)

    @property
    def dataset(self) -> str:
        """Name of the data set: that of the Hub, or the last part of a path."""
        name = str(self.arguments['dataset'])
        return printable(name if self.dataset_is_public else PurePath(name).stem)

    @property
    def dataset_is_public(self) -> bool:
        """Whether the data set was named as on the Hub, and not as a file or folder."""
        return not self.is_local('dataset')


@dataclasses.dataclass(frozen=True)
class Training(RunRecord):
    """A fine-tuning run, and how good the weights are that came out of it.

    Attributes:
        epoch: After which epoch the weights are from.
        top1: Their accuracy on the validation split, in percent. The best weights were chosen by it.
        test_top1: Their accuracy on the test split, in percent, by which nothing was chosen; None if it is not known.
    """

    epoch: float
    top1: float
    test_top1: float | None = None

    @property
    def data_config(self) -> Mapping[str, Any]:
        """timm's data config that the model was trained with.

        Raises:
            ConfigError: if the results do not say.
        """
        found = self.run.get('data_config')
        if not isinstance(found, Mapping):
            raise ConfigError('the results of the run are incomplete (they have no data_config)')
        return found

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
        if entry is None:
            found = read_header(weights)
            tested = lines[-1].get('test_top1')
            return cls(runs[-1], float(found.get('epoch', epochs[-1]['epoch'])), float(epochs[-1]['best_top1']), tested)
        return cls(runs[-1], float(epochs[-1]['epoch']), float(epochs[-1][entry]))


@dataclasses.dataclass(frozen=True)
class Facts:
    """What a model card says.

    Attributes:
        repo_id: Repository on the Hub.
        revision: Branch, tag or pull request, if not the main branch.
        architecture: timm's name.
        model_args: What ``timm.create_model`` needs beside the name.
        input_size: (channels, height, width).
        num_classes: Outputs of the classifier; 0 for none.
        parameters: Number of elements of all parameters.
        provenance: Facts about the prediction, as :func:`~timm_ghn.prediction.predict.provenance` gives them; None if
            the weights are not known to be predicted.
        raw: Whether the weights are certain to be what was predicted, without training.
        training: The fine-tuning run that the weights come from.
        license: Identifier of the licence, as the Hub writes it.
    """

    repo_id: str
    revision: str | None
    architecture: str
    model_args: Mapping[str, Any]
    input_size: tuple[int, ...]
    num_classes: int
    parameters: int
    provenance: Mapping[str, Any] | None
    raw: bool
    training: Training | None
    license: str | None

    @property
    def ghn(self) -> str | None:
        """Name of the GHN, for people."""
        if self.provenance is None:
            return None
        origin = self.provenance.get('origin') or {}
        name = self.provenance.get('ghn') or origin.get('name') or origin.get('repo_id')
        return printable(name or PurePath(origin.get('file') or 'without a name').name)


def provenance_of(
    model: nn.Module, prediction: Prediction | Mapping[str, Any] | None, training: Training | None
) -> tuple[dict[str, Any] | None, bool]:
    """Where the weights come from, and whether they are certain to be as predicted.

    Args:
        model: The model; timm's configuration of it says whether it was made by the tag of a GHN.
        prediction: What was predicted for it, or facts about that.
        training: The run that trained it.
    """
    if isinstance(prediction, Prediction) and training is None:
        return _compared(model, prediction)
    if isinstance(prediction, Prediction):
        return dict(prediction.provenance), False
    if training is not None:
        return (_of_training(model, training) if prediction is None else check_provenance(prediction)), False
    found = _of_tag(model) if prediction is None else check_provenance(prediction)
    return found, found is not None and _comes_out_again(model, found)


def _compared(model: nn.Module, prediction: Prediction) -> tuple[dict[str, Any], bool]:
    """How weights were post-processed, found by doing it again; anything else was not predicted alone."""
    facts = dict(prediction.provenance)
    for options in (None, *(PostProcess.of(name, seed=facts['seed']) for name in NAMED)):
        again = copy.deepcopy(model)
        again.load_state_dict(prediction.state_dict, strict=False)
        postprocess_(again, options, plan=prediction.plan)
        if _are_equal(model, again):
            return {**facts, 'postprocess': None if options is None else options.to_dict()}, True
    return {**facts, 'postprocess': 'not recorded'}, False


def _comes_out_again(model: nn.Module, facts: Mapping[str, Any]) -> bool:
    """Whether a prediction as the facts tell it gives the parameters that a model has."""
    origin, entry = facts.get('origin') or {}, entry_of(facts)
    name = entry.name if entry is not None else origin.get('repo_id') or origin.get('file')
    options = facts.get('postprocess')
    if not name or isinstance(options, str):
        return False
    try:
        # Where it is at hand: nothing is downloaded for the sake of a sentence.
        ghn = load_ghn(name, revision=origin.get('revision'), local_files_only=True)
        again = ghn_init(
            copy.deepcopy(model),
            ghn,
            input_size=facts.get('input_size'),
            head=facts.get('head', 'auto'),
            seed=facts.get('seed', 0),
            postprocess=None if options is None else PostProcess(**options),
        )
    except GHNError:
        return False
    return _are_equal(model, again)


def _are_equal(model: nn.Module, other: nn.Module) -> bool:
    parameters = dict(other.named_parameters())
    return all(torch.equal(parameter, parameters[name]) for name, parameter in model.named_parameters())


def _of_tag(model: nn.Module) -> dict[str, Any] | None:
    """Facts that the timm source wrote into the configuration of the model."""
    cfg: Mapping[str, Any] = getattr(model, 'pretrained_cfg', None) or {}
    if cfg.get('source') != DEFAULT_TAG:
        return None
    notes = dict(note.split(': ', 1) for note in cfg.get('notes') or () if ': ' in note)
    origin = {key: notes.get(key) for key in ('repo_id', 'revision', 'file', 'sha256')}
    described = notes.get('postprocess')
    known: dict[str | None, dict[str, Any] | None] = {made.describe(): made.to_dict() for made in NAMED.values()}
    options = (known | {'none': None}).get(described, described)
    found = {'ghn': notes.get('ghn'), 'origin': {**origin, 'embedded': notes.get('embedded') == 'True'}}
    entry = known_ghns().get(notes.get('ghn', ''))
    totals = {} if entry is None else _totals(model, entry, 'auto')
    return {**found, 'head': 'auto', 'seed': 0, 'postprocess': options, **totals}


def _of_training(model: nn.Module, training: Training) -> dict[str, Any] | None:
    """Facts about the start of a run."""
    recorded = training.run.get('provenance')
    if recorded is not None:
        return check_provenance(recorded)
    # Runs of before that was recorded name the GHN, and no more.
    said = training.arguments
    if said['init'] in ('random', 'pretrained'):
        return None
    entry = known_ghns().get(said['init'])
    origin = (
        None if entry is None else {'name': entry.name, 'repo_id': entry.repo_id, 'embedded': entry.path is not None}
    )
    name = PurePath(str(said['init'])).name if said['init'] != DEFAULT_TAG else 'the default GHN'
    facts = {'ghn': name, 'origin': origin, 'head': said['head'], 'seed': said['seed']}
    totals = {} if entry is None else _totals(model, entry, said['head'])
    return {**facts, 'postprocess': _of_option(said['postprocess'], said['seed']), **totals}


def _of_option(text: str, seed: int) -> dict[str, Any] | str | None:
    """Post-processing as the options of a run name it; what they spell out stays text."""
    name = 'orth' if text == 'auto' else text
    if name == 'none':
        return None
    return dataclasses.asdict(dataclasses.replace(NAMED[name], seed=seed)) if name in NAMED else name


def _totals(model: nn.Module, entry: GHNEntry, head: str) -> dict[str, Any]:
    """How much of a model a GHN of the catalogue predicts."""
    try:
        plan = plan_parameters(trace(model, rules=entry.config.rules), entry.config, head=head)
    except UnsupportedModelError:  # it needs an input that timm does not tell
        return {'trained': entry.config.trained}
    totals = plan.summary()
    kept = ('tensors', 'elements', 'predicted_tensors', 'predicted_elements')
    return {'trained': entry.config.trained, **{key: totals[key] for key in kept}}


def entry_of(provenance: Mapping[str, Any] | None) -> GHNEntry | None:
    """The GHN of the catalogue that predicted; None for another."""
    if provenance is None:
        return None
    origin = provenance.get('origin') or {}
    entry = known_ghns().get(origin.get('name') or provenance.get('ghn') or '')
    if entry is None or not (origin.get('embedded') or (entry.repo_id and entry.repo_id == origin.get('repo_id'))):
        return None
    return entry


def read_header(path: Path) -> dict[str, str]:
    """Facts in the header of a safetensors file.

    Raises:
        ConfigError: if it is no such file.
    """
    try:
        with safe_open(path, framework='pt') as file:
            return dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise ConfigError(f'expected a safetensors file in {str(path)!r}: {error}') from error
