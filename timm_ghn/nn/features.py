"""Numbers that say what a node is, for GHNs that must transfer between networks of different sizes.

The published GHNs look sizes and distances up in tables: 64 and 72 channels have nothing in common before both were
seen often. These numbers vary smoothly with the size of a tensor and with its place between input and output.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from timm_ghn.graph.graph import Graph
from timm_ghn.nn.config import GHNConfig
from timm_ghn.nn.precision import apply_linear

#: Waves over the depth.
_WAVES = 4
_COUNT = 9 + 2 * _WAVES


def node_features(graph: Graph) -> Tensor:
    """Features (N, f) of the nodes of a graph.

    Sizes as logarithms, whether there is a shape, whether it is depthwise, and the depth: the share of the longest
    path from the input that leads to the node, by itself and as sine and cosine waves.
    """
    known = graph.shapes_N4[:, :1] > 0
    sizes_N4 = graph.shapes_N4.clamp(min=1).float().log2()
    forward_N, backward_N = graph.forward_levels_N.float(), graph.backward_levels_N.float()
    depth_N1 = (forward_N / (forward_N + backward_N).clamp(min=1))[:, None]
    scales = math.pi * 2.0 ** torch.arange(_WAVES, device='cpu')
    columns = [
        sizes_N4[:, :2] / 4 - 1,
        sizes_N4[:, 2:],
        known,
        sizes_N4[:, 1:2] == 0,
        (sizes_N4[:, :1] - sizes_N4[:, 1:2]) / 4,
        2 * depth_N1 - 1,
        forward_N[:, None].clamp(max=4) / 4,
        torch.sin(depth_N1 * scales),
        torch.cos(depth_N1 * scales),
    ]
    return torch.cat([column.float() for column in columns], 1)


class SmoothEncoder(nn.Module):
    """x = W f with the features f of :func:`node_features`; a random W keeps distances between nodes.

    Args:
        config: Its ``hid`` is used.
    """

    def __init__(self, config: GHNConfig) -> None:
        super().__init__()
        self.net = nn.Linear(_COUNT, config.hid, bias=False)
        nn.init.normal_(self.net.weight, std=config.hid**-0.5)

    def forward(self, features_Nf: Tensor) -> Tensor:
        """Map (N, f) to (N, d)."""
        return apply_linear(self.net, features_Nf.to(self.net.weight))
