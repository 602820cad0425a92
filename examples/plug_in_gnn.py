"""Give a GHN message passing of your own, predict with it, and find it in a saved GHN again.

Usage: python examples/plug_in_gnn.py [MODEL]. To train it: TrainOptions(gnn='neighbours', ...), as in train_ghn.py.
"""

from __future__ import annotations

import sys
import tempfile

import timm
import torch
from torch import Tensor, nn

import timm_ghn
from timm_ghn.graph.graph import GraphBatch
from timm_ghn.nn import register_gnn
from timm_ghn.ops import Edges, aggregate


@register_gnn('neighbours')
class Neighbours(nn.Module):
    """A few rounds in which each node hears the nodes before it, and then those after it."""

    def __init__(self, config: timm_ghn.GHNConfig) -> None:
        super().__init__()
        self.forth, self.back = (
            nn.ModuleList(nn.Linear(config.hid, config.hid) for _ in range(config.layers)) for _ in range(2)
        )

    def forward(self, x_Nd: Tensor, batch: GraphBatch) -> Tensor:
        pairs_E2 = torch.cat(
            [graph.edges_E2 + offset for graph, offset in zip(batch.graphs, batch.offsets, strict=True)]
        )
        source, target = pairs_E2.to(x_Nd.device).T
        after = Edges.of(source, target, num_sources=len(x_Nd), num_targets=len(x_Nd))
        before = Edges.of(target, source, num_sources=len(x_Nd), num_targets=len(x_Nd))
        for forth, back in zip(self.forth, self.back, strict=True):
            x_Nd = x_Nd + aggregate(torch.relu(forth(x_Nd)), after)
            x_Nd = x_Nd + aggregate(torch.relu(back(x_Nd)), before)
        return x_Nd


def main(name: str = 'resnet18') -> None:
    """A GHN with random weights, which is as good as none: what matters here is the way."""
    config = timm_ghn.GHNConfig(
        hid=32, layers=2, max_shape=(256, 256, 16, 16), num_classes=10, gnn='neighbours', decoder='templates',
        templates=8, codes=16, smooth=True, rules='operators', name='with_neighbours',
    )  # fmt: skip
    ghn = timm_ghn.GHN(config)
    print(timm_ghn.predict(timm.create_model(name, num_classes=10), ghn).plan.totals())
    with tempfile.TemporaryDirectory() as folder:
        timm_ghn.save_ghn(ghn, folder)
        print('saved and loaded:', timm_ghn.load_ghn(folder).config.gnn)


if __name__ == '__main__':
    main(*sys.argv[1:])
