"""Give a GHN message passing of your own, train it on networks of DeepNets-1M, and predict with it.

Usage: python examples/plug_in_gnn.py [STEPS] [DATASET]. The data set is a name on the Hub, a folder or a parquet file.
500 steps on CIFAR-10 take a quarter of an hour on two CPU cores.
"""

from __future__ import annotations

import sys
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

import timm_ghn
from timm_ghn.graph.graph import GraphBatch
from timm_ghn.nn import register_gnn
from timm_ghn.ops import Edges, aggregate
from timm_ghn.train import TrainOptions, train


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


def main(steps: int = 500, dataset: str = 'uoft-cs/cifar10') -> None:
    """Train on drawn networks of eight channels; a network of timm is predicted as well, though none was seen."""
    options = TrainOptions(
        gnn='neighbours', layers=2, hid=32, templates=8, codes=16, max_channels=512,
        dataset=dataset, image_size=32, augment='flip',
        sampler='deepnets', sampler_args={'channels': 8, 'parameters': 300_000}, pool=max(4, min(100, steps // 5)),
        steps=steps, warmup_steps=min(50, steps // 2), meta_batch=4, batch_size=32, lr=3e-3,
        eval_steps=steps, eval_count=1, eval_images=500, output=Path('neighbours'),
    )  # fmt: skip
    print(train(options).output)

    ghn = timm_ghn.load_ghn('neighbours/ghn')
    model = timm.create_model('resnet10t', num_classes=ghn.config.num_classes)
    print(f'resnet10t by a GHN with {ghn.config.gnn}:', timm_ghn.predict(model, ghn).plan.totals())


if __name__ == '__main__':
    main(*(int(text) for text in sys.argv[1:2]), *sys.argv[2:3])
