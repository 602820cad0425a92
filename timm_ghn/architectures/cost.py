"""What a network costs, without running it: parameters, multiply-accumulates, activations."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from timm_ghn.architectures.architecture import Task
from timm_ghn.errors import ConfigError
from timm_ghn.graph.meta import MetaMode


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a network costs.

    Attributes:
        parameters: Number of elements of its parameters.
        macs: Multiply-accumulates of its convolutions, linear layers and matrix products, for one image.
        activations: Elements that these write, for one image (time follows them rather than the multiply-accumulates:
            arXiv 2003.13678; a step of a CPU correlates by 0.9 with them, by 0.6 with those).
    """

    parameters: int
    macs: int
    activations: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits(Task):
    """What a network may cost, and for which images.

    Attributes:
        parameters: Fewest and most parameters.
        macs: Most multiply-accumulates for one image.
        activations: Most elements that layers write for one image; None for any number. The default keeps out the
            slowest one in twenty of what the other limits admit.
        least_activations: Fewest elements that layers write for one image: networks with many positions, such as
            transformers of 64 and more tokens, write many.
    """

    parameters: tuple[int, int] = (20_000, 1_500_000)
    macs: int = 30_000_000
    activations: int | None = 400_000
    least_activations: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.parameters[0] <= self.parameters[1]:
            raise ConfigError(f'expected parameters as (fewest, most) (got {self.parameters})')
        for name, most in (('macs', self.macs), ('activations', self.activations)):
            if most is not None and most < 1:
                raise ConfigError(f'expected {name} to be at least 1 (got {most})')

    def admit(self, cost: Cost) -> bool:
        """Whether a network may cost so much."""
        most = math.inf if self.activations is None else self.activations
        return (
            self.parameters[0] <= cost.parameters <= self.parameters[1]
            and cost.macs <= self.macs
            and self.least_activations <= cost.activations <= most
        )


def count_parameters(model: nn.Module) -> int:
    """Number of elements of all parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def cost_of(model: nn.Module, input_size: tuple[int, int, int]) -> Cost:
    """Count what a forward pass of a network on the meta device does, for images (channels, height, width)."""
    counter = _Counter()
    images = torch.empty((2, *input_size), device='meta')
    with torch.no_grad(), MetaMode(), counter:
        model(images)
    return Cost(count_parameters(model), counter.macs // len(images), counter.activations // len(images))


class _Counter(TorchFunctionMode):
    macs = activations = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in (F.conv2d, torch.conv2d, F.linear):
            weight = args[1] if len(args) > 1 else (kwargs or {})['weight']
            macs = out.numel() * (weight.numel() // weight.shape[0])
        elif func in (torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.bmm, torch.Tensor.bmm):
            macs = out.numel() * args[0].shape[-1]
        elif func is F.scaled_dot_product_attention:
            # Scores have query x key positions, each a product over the channels; weighing the values is as much.
            macs = 2 * args[0].numel() * args[1].shape[-2]
        else:
            return out
        self.macs += macs
        self.activations += out.numel()
        return out
