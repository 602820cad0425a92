"""Networks for images that are not RGB: one channel (grey), twelve (a satellite's bands).

Usage: python examples/channels.py [MODEL]
"""

from __future__ import annotations

import sys

import timm
import torch
from torch import nn

import timm_ghn


def main(name: str = 'convnext_atto') -> None:
    """Predict a network for one and for twelve channels."""
    ghn = timm_ghn.load_ghn('ghn_tiny')
    for channels in (1, 12):
        model = timm.create_model(name, in_chans=channels, num_classes=5)
        size = (channels, *timm.data.resolve_model_data_config(model)['input_size'][1:])
        timm_ghn.ghn_init(model, ghn, input_size=size)
        stem = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
        with torch.no_grad():
            output = model.eval()(torch.randn(2, *size))
        print(f'{channels:>2} channels: stem {tuple(stem.weight.shape)}, output {tuple(output.shape)}')

    # The tag does the same.
    timm.create_model(f'{name}.ghn_tiny', in_chans=12, num_classes=5)


if __name__ == '__main__':
    main(*sys.argv[1:])
