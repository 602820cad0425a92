"""Small GHNs with random weights, and copies of what a model holds."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import nn

from timm_ghn import GHN, GHNConfig

#: Tiny GHNs in the published formats and what the reference predicts with them; the same for GHNs of published sizes.
GOLDEN = Path(__file__).parent / 'golden'
LARGE_GOLDEN = Path(os.environ.get('TIMM_GHN_GOLDEN') or Path(__file__).parents[2] / 'shared' / 'golden')

TINY = {
    'graphormer': GHNConfig(hid=16, max_shape=(16, 16, 7, 7), num_classes=1000, layers=2, heads=4, name='tiny-ghn3'),
    'gated': GHNConfig(
        hid=16, max_shape=(16, 16, 7, 7), num_classes=1000, gnn='gated', window='corner', name='tiny-ghn2'
    ),
}


def make_ghn(config: GHNConfig) -> GHN:
    """A GHN with random weights that leaves the global generator alone."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return GHN(config).eval()


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of all parameters and buffers, those that are not saved included."""
    return {name: tensor.clone() for name, tensor in (*model.named_parameters(), *model.named_buffers())}
