"""Facts about weights, for model cards: from their prediction, their origin and the results of a run."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from timm_ghn.errors import ConfigError, GHNError
from timm_ghn.files import crc32_of
from timm_ghn.hub.catalogue import GHNEntry, known_ghns
from timm_ghn.nn.config import Origin
from timm_ghn.prediction.predict import Prediction
from timm_ghn.publish.training import Training
from timm_ghn.timm_source import DEFAULT_TAG


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """Facts for the card of a timm model.

    Attributes:
        revision: Branch, if not the main one.
        model_args: What ``timm.create_model`` needs beside the name.
        parameters: Number of elements of all parameters.
        provenance: Facts about the prediction, as :func:`~timm_ghn.prediction.predict.provenance` gives them; None if
            the weights are not known to be predicted.
        unchanged: Whether the weights are those of the prediction.
        training: The fine-tuning run that the weights come from.
    """

    repo_id: str
    revision: str | None
    license: str | None
    architecture: str
    model_args: Mapping[str, Any]
    input_size: tuple[int, ...]
    num_classes: int
    parameters: int
    provenance: Mapping[str, Any] | None
    unchanged: bool
    training: Training | None


@contextlib.contextmanager
def expect_complete() -> Iterator[None]:
    """Refuse facts that lack something, or are of another kind: they come from callers and files."""
    try:
        yield
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        if isinstance(error, GHNError):
            raise
        raise ConfigError(f'the facts about the weights are incomplete ({type(error).__name__}: {error})') from error


def origin_of(provenance: Mapping[str, Any] | None) -> Origin:
    """Origin of the GHN that made a prediction."""
    said = provenance or {}
    origin = Origin(**(said.get('origin') or {}))
    return dataclasses.replace(origin, name=origin.name or said.get('ghn'))


def entry_of(origin: Origin | None) -> GHNEntry | None:
    """The entry of the catalogue with an origin; None for another GHN of the same name."""
    entry = None if origin is None else known_ghns().get(origin.name or '')
    if origin is None or entry is None:
        return None
    return entry if origin.embedded or (entry.repo_id and entry.repo_id == origin.repo_id) else None


def provenance_of(
    model: nn.Module, prediction: Prediction | Mapping[str, Any] | None, training: Training | None
) -> tuple[dict[str, Any] | None, bool]:
    """The provenance of the weights, and whether they are still those of the prediction.

    They are if their checksum is the recorded one, or, for a :class:`Prediction`, if its tensors are in the model.
    """
    if isinstance(prediction, Prediction):
        parameters = dict(model.named_parameters(remove_duplicate=False))
        if training is None and all(torch.equal(parameters[k], v) for k, v in prediction.state_dict.items()):
            return prediction.provenance, True
        return {**prediction.provenance, 'postprocess': 'not recorded'}, False
    found = prediction
    if found is None:
        found = _provenance_of_tag(model) if training is None else training.run.get('provenance')
    if found is None:
        return None, False
    return dict(found), training is None and found.get('weights') == crc32_of(model.state_dict())


def _provenance_of_tag(model: nn.Module) -> Any:
    """Facts that the timm source wrote into the configuration of the model."""
    cfg: Mapping[str, Any] = getattr(model, 'pretrained_cfg', None) or {}
    if cfg.get('source') != DEFAULT_TAG:
        return None
    notes = dict(note.split(': ', 1) for note in cfg.get('notes') or () if ': ' in note)
    return json.loads(notes['provenance'])
