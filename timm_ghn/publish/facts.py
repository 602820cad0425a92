"""Facts about weights, for model cards: from their prediction, their origin and the results of a run."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

import torch
from torch import Tensor, nn

from timm_ghn.errors import ConfigError, GHNError, UnsupportedModelError, printable
from timm_ghn.graph.build import trace
from timm_ghn.hub.catalogue import GHNEntry, known_ghns
from timm_ghn.hub.load import load_ghn
from timm_ghn.hub.storage import WEIGHTS_FILE
from timm_ghn.nn.config import GHNConfig, Origin
from timm_ghn.nn.ghn import GHN
from timm_ghn.prediction.plan import plan_parameters
from timm_ghn.prediction.postprocess import NAMED, PostProcess, postprocess_
from timm_ghn.prediction.predict import Prediction, ghn_init
from timm_ghn.publish.training import MetaTraining, Training
from timm_ghn.runs.results import RESULTS
from timm_ghn.timm_source import DEFAULT_TAG

#: Entries of a provenance and their types; each may be left open.
_PROVENANCE: dict[str, Any] = {
    'ghn': str, 'trained': bool, 'origin': Mapping, 'timm_ghn': str, 'rules': str, 'input_size': Sequence,
    'mean': Sequence, 'std': Sequence, 'head': str, 'seed': int, 'postprocess': (Mapping, str), 'tensors': int,
    'predicted_tensors': int, 'elements': int, 'predicted_elements': int,
}  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Facts:
    """Facts for every model card.

    Attributes:
        repo_id: Repository on the Hub.
        revision: Branch, if not the main one.
        parameters: Number of elements of all parameters.
        license: Identifier of the licence, as the Hub writes it.
    """

    repo_id: str
    revision: str | None
    parameters: int
    license: str | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelFacts(Facts):
    """Facts for the card of a timm model.

    Attributes:
        architecture: timm's name.
        model_args: What ``timm.create_model`` needs beside the name.
        input_size: (channels, height, width).
        num_classes: Outputs of the classifier; 0 for none.
        provenance: Facts about the prediction, as :func:`~timm_ghn.prediction.predict.provenance` gives them; None if
            the weights are not known to be predicted.
        raw: Whether a second prediction gave the same weights: they are predicted, without training.
        training: The fine-tuning run that the weights come from.
    """

    architecture: str
    model_args: Mapping[str, Any]
    input_size: tuple[int, ...]
    num_classes: int
    provenance: Mapping[str, Any] | None
    raw: bool
    training: Training | None

    @property
    def ghn(self) -> str | None:
        """Human-readable name of the GHN."""
        origin = origin_of(self.provenance)
        if self.provenance is None or origin is None:
            return None
        name = self.provenance.get('ghn') or origin.name or origin.repo_id
        return printable(name or PurePath(origin.file or 'without a name').name)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GHNFacts(Facts):
    """Facts for the card of a GHN.

    Attributes:
        config: Hyper-parameters.
        origin: Where its weights came from; None if that is unknown or a folder of this machine.
        entry: What the catalogue says of that origin.
        unchanged: Whether all its weights were compared with that origin and are equal.
        training: The run that trained it.
    """

    config: GHNConfig
    origin: Origin | None
    entry: GHNEntry | None
    unchanged: bool
    training: MetaTraining | None

    @property
    def converted(self) -> bool:
        """Whether the weights came from a file that is not in the native format."""
        official = self.entry is not None and self.entry.format == 'joblib'
        return official or (self.origin is not None and not str(self.origin.file or '').endswith('.safetensors'))


def origin_of(provenance: Mapping[str, Any] | None) -> Origin | None:
    """Origin of the GHN that made a prediction."""
    if provenance is None:
        return None
    recorded = provenance.get('origin') or {}
    known: dict[str, Any] = {field.name: recorded.get(field.name) for field in dataclasses.fields(Origin)}
    return Origin(**{**known, 'name': known['name'] or provenance.get('ghn'), 'embedded': bool(known['embedded'])})


def entry_of(origin: Origin | None) -> GHNEntry | None:
    """The entry of the catalogue with this origin; None for another GHN of the same name."""
    if origin is None:
        return None
    entry = known_ghns().get(origin.name or '')
    if entry is None or not (origin.embedded or (entry.repo_id and entry.repo_id == origin.repo_id)):
        return None
    return entry


def check_provenance(found: object) -> dict[str, Any]:
    """Refuse facts that :func:`~timm_ghn.prediction.predict.provenance` cannot have given.

    Raises:
        ConfigError: naming the wrong one.
    """
    if not isinstance(found, Mapping):
        raise ConfigError(f'expected facts about a prediction (got {type(found).__name__})')
    for key, kind in _PROVENANCE.items():
        if found.get(key) is not None and not isinstance(found[key], kind):
            raise ConfigError(f'expected {key} of a prediction as its provenance has it (got {printable(found[key])})')
    for key, value in (found.get('origin') or {}).items():
        if not isinstance(value, (bool if key == 'embedded' else str) | None):
            raise ConfigError(f'expected {key} of the origin of a prediction to be text (got {printable(value)})')
    if isinstance(found.get('postprocess'), Mapping):
        try:
            PostProcess(**found['postprocess'])
        except TypeError as error:
            raise ConfigError(f'expected options of post-processing as the provenance has them ({error})') from error
    return dict(found)


# Models


def provenance_of(
    model: nn.Module, prediction: Prediction | Mapping[str, Any] | None, training: Training | None
) -> tuple[dict[str, Any] | None, bool]:
    """The provenance of the weights, and whether a second prediction gives the same ones."""
    if isinstance(prediction, Prediction):
        return (dict(prediction.provenance), False) if training is not None else _compare(model, prediction)
    found = None if prediction is None else check_provenance(prediction)
    if training is not None:
        recorded = training.run.get('provenance')
        return (check_provenance(recorded) if found is None and recorded is not None else found), False
    if found is None:
        found = _provenance_of_tag(model)
    return found, found is not None and _comes_out_again(model, found)


def _compare(model: nn.Module, prediction: Prediction) -> tuple[dict[str, Any], bool]:
    """Find the post-processing that gives these weights again; without one, they were changed otherwise."""
    facts = dict(prediction.provenance)
    for options in (None, *(PostProcess.of(name, seed=facts['seed']) for name in NAMED)):
        again = copy.deepcopy(model)
        again.load_state_dict(prediction.state_dict, strict=False)
        postprocess_(again, options, plan=prediction.plan)
        if _equal_parameters(model, again):
            return {**facts, 'postprocess': None if options is None else options.to_dict()}, True
    return {**facts, 'postprocess': 'not recorded'}, False


def _comes_out_again(model: nn.Module, facts: Mapping[str, Any]) -> bool:
    """Whether a second prediction from the same facts gives the parameters of the model."""
    options = facts.get('postprocess')
    ghn = None if isinstance(options, str) else _load_again(origin_of(facts))
    if ghn is None:
        return False
    try:
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
    return _equal_parameters(model, again)


def _equal_parameters(model: nn.Module, other: nn.Module) -> bool:
    parameters = dict(other.named_parameters())
    return all(torch.equal(parameter, parameters[name]) for name, parameter in model.named_parameters())


def _provenance_of_tag(model: nn.Module) -> dict[str, Any] | None:
    """Facts that the timm source wrote into the configuration of the model."""
    cfg: Mapping[str, Any] = getattr(model, 'pretrained_cfg', None) or {}
    if cfg.get('source') != DEFAULT_TAG:
        return None
    notes = dict(note.split(': ', 1) for note in cfg.get('notes') or () if ': ' in note)
    origin = {key: notes.get(key) for key in ('repo_id', 'revision', 'file', 'sha256')}
    described = notes.get('postprocess')
    known: dict[str | None, dict[str, Any] | None] = {made.describe(): made.to_dict() for made in NAMED.values()}
    return {
        'ghn': notes.get('ghn'),
        'origin': {**origin, 'embedded': notes.get('embedded') == 'True'},
        'head': 'auto',
        'seed': 0,
        'postprocess': (known | {'none': None}).get(described, described),
        **_totals(model, known_ghns().get(notes.get('ghn', ''))),
    }


def _totals(model: nn.Module, entry: GHNEntry | None) -> dict[str, Any]:
    """How much of a model a GHN of the catalogue predicts."""
    if entry is None:
        return {}
    try:
        totals = plan_parameters(trace(model, rules=entry.config.rules), entry.config).summary()
    except UnsupportedModelError:  # timm does not say which input it needs
        return {'trained': entry.config.trained}
    kept = ('tensors', 'elements', 'predicted_tensors', 'predicted_elements')
    return {'trained': entry.config.trained, **{key: totals[key] for key in kept}}


# GHNs


def ghn_facts(
    ghn: GHN, repo_id: str, revision: str | None, *, training: MetaTraining | None, license: str | None
) -> GHNFacts:
    """Gather what is known of a GHN that goes to a repository.

    Without ``training``, the results beside the file that it was loaded from serve, if its weights did not change;
    without ``license``, that of the catalogue.

    Raises:
        ConfigError: if the run trained another GHN.
    """
    if training is not None:
        training.check_config(ghn.config)
    origin = ghn.origin
    entry = entry_of(origin)
    again = _load_again(origin)
    unchanged = again is not None and _equal_states(again.state_dict(), ghn.state_dict())
    return GHNFacts(
        repo_id=repo_id,
        revision=revision,
        config=ghn.config,
        parameters=sum(parameter.numel() for parameter in ghn.parameters()),
        origin=origin if _is_public(origin, repo_id) else None,
        entry=entry,
        unchanged=unchanged,
        training=_results_beside(ghn) if training is None and unchanged else training,
        license=license or (entry.license if entry is not None else None),
    )


def _equal_states(found: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> bool:
    return found.keys() == state.keys() and all(
        state[key].shape == value.shape and torch.equal(state[key].cpu(), value.to(state[key].dtype))
        for key, value in found.items()
    )


def _load_again(origin: Origin | None) -> GHN | None:
    """Load the GHN of an origin from this machine, if it is there; nothing is downloaded for a sentence."""
    if origin is None:
        return None
    entry = entry_of(origin)
    name = entry.name if entry is not None else origin.repo_id
    for place, revision in ((name, origin.revision), (origin.file, None)):
        if place is not None:
            try:
                return load_ghn(place, revision=revision, local_files_only=True)
            except GHNError:
                continue
    return None


def _is_public(origin: Origin | None, repo_id: str) -> bool:
    """Whether others can use an origin: it is neither a folder of this machine nor the repository itself."""
    if origin is None or origin.repo_id == repo_id:
        return False
    return origin.embedded or origin.repo_id is not None or Path(origin.file or WEIGHTS_FILE).name != WEIGHTS_FILE


def _results_beside(ghn: GHN) -> MetaTraining | None:
    """The run whose output folder a GHN was loaded from."""
    origin = ghn.origin
    if origin is None or not origin.file or origin.repo_id is not None:
        return None
    folder = Path(origin.file).absolute().parent
    for place in (folder, folder.parent):
        if (place / RESULTS).is_file():
            try:
                found = MetaTraining.read(place)
                found.check_config(ghn.config)
            except ConfigError:  # the results of something else
                return None
            return found
    return None
