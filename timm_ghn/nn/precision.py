"""Layers applied in at least single precision, whatever the weights are stored in.

A GHN's outputs become the weights of a network, and an error in them stays there for the whole training. The
published GHNs compute them in float32 outside of autocast, and so do we; float64 weights compute in float64.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def compute_dtype(weight: Tensor) -> torch.dtype:
    """Dtype to compute in: the weight's own, but no narrower than float32."""
    return torch.promote_types(weight.dtype, torch.float32)


def sum_dtype(device: torch.device) -> torch.dtype:
    """Dtype to add up many values in: float64 where the device has it, which Apple's GPUs do not."""
    return torch.float32 if device.type == 'mps' else torch.float64


def full_precision(device: torch.device) -> torch.autocast:
    """Context in which autocast is off."""
    return torch.autocast(device.type, enabled=False)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x weight^T + bias`` in the dtype of ``x``."""
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def apply_linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """A linear layer in the dtype of ``x``."""
    return linear(x, layer.weight, layer.bias)


def apply_layer_norm(layer: nn.LayerNorm, x: Tensor) -> Tensor:
    """A layer normalisation in the dtype of ``x``."""
    return F.layer_norm(x, layer.normalized_shape, layer.weight.to(x.dtype), layer.bias.to(x.dtype), layer.eps)


def linear_of(layers: nn.Module, index: int) -> nn.Linear:
    """The linear layer at one position of a sequence."""
    layer = layers.get_submodule(str(index))
    if not isinstance(layer, nn.Linear):
        raise TypeError(f'expected a linear layer at position {index} (got {type(layer).__name__})')
    return layer


def look_up(layer: nn.Embedding, index: Tensor) -> Tensor:
    """Rows of an embedding in the dtype to compute in; ``index`` may be on another device."""
    return F.embedding(index.to(layer.weight.device), layer.weight).to(compute_dtype(layer.weight))
