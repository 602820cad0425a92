"""Predict the parameters of a network of your own: any nn.Module that takes a batch of images.

Usage: python examples/custom_module.py
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import timm_ghn


class Block(nn.Module):
    """A residual block with a squeeze-and-excite gate."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width))
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(width, width, 1), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        return torch.relu(x + y * self.gate(y))


class Network(nn.Module):
    """Three blocks, written without timm."""

    def __init__(self, width: int = 32, num_classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, stride=2, padding=1)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(3)))
        self.temperature = nn.Parameter(torch.ones(1))
        self.head = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3))) * self.temperature


def main() -> None:
    """Initialise the network, and say what happened to each parameter."""
    model = Network()
    # Nothing in the module says what it takes, so the size of the image is named.
    ghn = timm_ghn.load_ghn('ghn_tiny')
    plan = timm_ghn.plan_parameters(timm_ghn.trace(model, input_size=32), ghn.config, head='predict')
    print(plan)
    timm_ghn.ghn_init(model, ghn, input_size=32, head='predict')
    with torch.no_grad():
        print('output:', tuple(model(torch.randn(4, 3, 32, 32)).shape))


if __name__ == '__main__':
    main()
