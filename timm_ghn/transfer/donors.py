"""Where the weights of a donor come from."""

from __future__ import annotations

import os
from pathlib import Path

import timm
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from timm_ghn.architectures.timm_models import build_timm_model, check_model_name
from timm_ghn.contexts import preserve_rng
from timm_ghn.errors import CheckpointError, UnsupportedModelError
from timm_ghn.hub.fetch import in_brief
from timm_ghn.publish.files import read_source

_WAYS_OUT = (
    'give a model, a safetensors file, or a timm name whose weights are in the cache of the Hub; '
    'without a donor, timm_ghn.ghn_init(model) predicts the weights'
)


def load_donor(donor: nn.Module | str | os.PathLike[str], *, architecture: str | None = None) -> nn.Module:
    """The network of a donor, with its weights.

    Args:
        donor: As for :func:`timm_ghn.plan_transfer`.
        architecture: The timm name of the network whose weights a file holds, if the file does not say it.

    Raises:
        ConfigError: if a file does not say what it holds.
        CheckpointError: if the weights are not those of the network.
        UnsupportedModelError: if timm cannot build the network, or its weights cannot be had.
    """
    if isinstance(donor, nn.Module):
        return donor
    path = Path(donor)
    if isinstance(donor, os.PathLike) or path.suffix == '.safetensors' or (os.sep in str(donor) and path.exists()):
        return _of_file(path, architecture)
    name = str(donor)
    if not name.startswith('hf-hub:'):
        try:
            return build_timm_model(name, {}, seed=0, pretrained=True)
        except UnsupportedModelError as error:
            raise UnsupportedModelError(f'{error}; {_WAYS_OUT}') from error
    try:
        with preserve_rng(0):
            return timm.create_model(name, pretrained=True)
    except Exception as error:  # of the Hub's client, of timm, or of the model's class
        raise UnsupportedModelError(f'timm cannot load {name!r} ({in_brief(error)}); {_WAYS_OUT}') from error


def _of_file(path: Path, architecture: str | None) -> nn.Module:
    if architecture is None:
        return read_source(path).model
    try:
        state = load_file(path)
        check_model_name(architecture)
        head = getattr(timm.get_pretrained_cfg(architecture), 'classifier', None)
        weight = state.get(f'{head}.weight')
        classes = {} if weight is None else {'num_classes': len(weight)}
        model = build_timm_model(architecture, classes, seed=0)
        model.load_state_dict(state)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(
            f'{str(path)!r} does not hold the weights of {architecture}: {in_brief(error)}'
        ) from error
    return model
