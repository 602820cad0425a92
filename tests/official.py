"""GHNs in the forms of the official files, written with the packages that wrote those."""

from __future__ import annotations

import collections
from pathlib import Path
from typing import Any

import joblib
import torch
from torch import Tensor

from timm_ghn.nn import GHN

_TOP_LEVEL = ('centrality_embed_in', 'centrality_embed_out', 'input_dist_embed')


def official_state(ghn: GHN) -> dict[str, Tensor]:
    """The state dictionary as the Hub's files have it."""
    state: dict[str, Tensor] = collections.OrderedDict()
    for key, value in ghn.state_dict().items():
        name = key.removeprefix('gnn.0.') if key.split('.')[2:3] and key.split('.')[2] in _TOP_LEVEL else key
        if ghn.config.gnn != 'graphormer' and (
            name.startswith(('decoder.conv.', 'decoder.class_layer')) and value.dim() == 2 and 'mlp' not in name
        ):
            value = value[:, :, None, None]
        state[name] = value.clone()
    state._metadata = {'': {'version': 1}}  # type: ignore[attr-defined]
    return state


def options(ghn: GHN) -> dict[str, Any]:
    """The configuration as the first releases store it."""
    config = ghn.config
    return {
        'max_shape': config.max_shape,
        'num_classes': config.num_classes,
        'hypernet': {'gated': 'gatedgnn'}.get(config.gnn, config.gnn),
        'decoder': config.decoder,
        'weight_norm': config.weight_norm,
        've': config.virtual_edges > 1,
        'layernorm': config.layernorm,
        'hid': config.hid,
    }


def write_joblib(obj: Any, path: Path) -> Path:
    joblib.dump(obj, path)
    return path


def write_torch(obj: Any, path: Path) -> Path:
    torch.save(obj, path)
    return path


def write_legacy(obj: Any, path: Path) -> Path:
    torch.save(obj, path, _use_new_zipfile_serialization=False)
    return path


WRITERS = {'joblib': write_joblib, 'torch': write_torch, 'legacy': write_legacy}
