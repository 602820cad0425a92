"""Predict the parameters of a timm network, look at what was predicted, and make it ready for use.

Usage: python examples/quickstart.py [MODEL]. The GHN is the one inside the package: nothing is downloaded.
"""

from __future__ import annotations

import sys

import timm
import torch

import timm_ghn  # makes the names of GHNs tags of timm


def main(name: str = 'resnet18') -> None:
    """Predict the parameters of a network of timm, for ten classes."""
    # As pretrained weights of timm: predicted and post-processed, a start for training.
    model = timm.create_model(f'{name}.ghn_tiny', num_classes=10)

    # Step by step: the graph that the GHN reads, the plan, and the raw prediction.
    graph = timm_ghn.trace(model)
    print(f'{name}: {len(graph)} nodes, {len(graph.edges_E2)} edges')
    prediction = timm_ghn.predict(model, 'ghn_tiny')
    print(prediction.plan.totals())
    for row in prediction.plan.rows[:5]:
        print(f'  {row.name}: {row.how}')

    # The running statistics of batch normalisation are not predicted: a few batches of your images make them.
    size = (8, *timm.data.resolve_model_data_config(model)['input_size'])
    batches = [torch.randn(size) for _ in range(2)]
    timm_ghn.calibrate_batchnorm_(model, batches).eval()
    with torch.no_grad():
        print('output:', tuple(model(batches[0]).shape))


if __name__ == '__main__':
    main(*sys.argv[1:])
