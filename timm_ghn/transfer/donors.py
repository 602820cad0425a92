"""Where the weights of a donor come from."""

from __future__ import annotations

import os
from pathlib import Path

import timm
from torch import nn

from timm_ghn.architectures.timm_models import build_timm_model
from timm_ghn.contexts import preserve_rng
from timm_ghn.errors import UnsupportedModelError, first_line
from timm_ghn.publish.files import read_source

_WAYS_OUT = (
    'give a model, a safetensors file, or a timm name whose weights are in the cache of the Hub; '
    'without a donor, timm_ghn.ghn_init(model) predicts the weights'
)


def load_donor(donor: nn.Module | str | os.PathLike[str]) -> nn.Module:
    """The network of a donor, with its weights; see :func:`timm_ghn.plan_transfer`.

    Raises:
        ConfigError: if a file does not say what it holds.
        CheckpointError: if the weights are not those of the network.
        UnsupportedModelError: if timm cannot build the network, or its weights cannot be had.
    """
    if isinstance(donor, nn.Module):
        return donor
    name, path = str(donor), Path(donor)
    if isinstance(donor, os.PathLike) or path.suffix == '.safetensors' or (os.sep in name and path.exists()):
        return read_source(path).model
    try:
        if not name.startswith('hf-hub:'):
            return build_timm_model(name, {}, seed=0, pretrained=True)
        with preserve_rng(0):
            return timm.create_model(name, pretrained=True)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f'{error}; {_WAYS_OUT}') from error
    except Exception as error:  # of the Hub's client, of timm, or of the model's class
        raise UnsupportedModelError(f'timm cannot load {name!r} ({first_line(error)}); {_WAYS_OUT}') from error
