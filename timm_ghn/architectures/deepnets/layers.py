"""Layers of the cells of DeepNets-1M, with the names and the order of parameters of the reference."""

from __future__ import annotations

import re
from collections import OrderedDict
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_ghn.errors import ConfigError

#: Operations of a genotype, in the order of the reference.
OPS = (
    'none', 'max_pool_3x3', 'avg_pool_3x3', 'skip_connect', 'sep_conv_3x3', 'sep_conv_5x5', 'dil_conv_3x3',
    'dil_conv_5x5', 'conv_1x1', 'conv_7x1_1x7', 'conv_3x3', 'conv_5x5', 'conv_7x7', 'msa', 'cse',
)  # fmt: skip


def make_norm(norm: str | None, channels: int) -> nn.Module:
    """A batch normalisation, or nothing; it keeps running statistics only if its name says 'track'."""
    if norm is None:
        return nn.Identity()
    if not norm.startswith('bn'):
        raise ConfigError(f"expected norm to be 'bnorm', 'bn-track' or None (got {norm!r})")
    return nn.BatchNorm2d(channels, track_running_stats='track' in norm)


def make_op(name: str, channels: int, stride: int, norm: str | None) -> nn.Module:
    """An operation of a genotype, which keeps the number of channels."""
    if name == 'none':
        return Zero()
    if name == 'skip_connect':
        return nn.Identity() if stride == 1 else FactorizedReduce(channels, channels, norm)
    if name == 'max_pool_3x3':
        return nn.MaxPool2d(3, stride=stride, padding=1)
    if name == 'avg_pool_3x3':
        return nn.AvgPool2d(3, stride=stride, padding=1, count_include_pad=False)
    if name == 'msa':
        return Transformer(channels, stride)
    if name == 'cse':
        return SqueezeExcite(channels, stride)
    kernel = max(int(number) for number in re.findall(r'\d+', name))
    if name.startswith('sep_conv'):
        first, second = (_separable(channels, kernel, each, 1, norm) for each in (stride, 1))
        return _in_a_row('op', *first, *second)
    if name.startswith('dil_conv'):
        return _in_a_row('op', *_separable(channels, kernel, stride, 2, norm))
    if name == 'conv_7x1_1x7':
        return _in_a_row(
            'op',
            nn.ReLU(),
            nn.Conv2d(channels, channels, (1, kernel), (1, stride), (0, kernel // 2), bias=False),
            nn.Conv2d(channels, channels, (kernel, 1), (stride, 1), (kernel // 2, 0), bias=False),
            make_norm(norm, channels),
        )
    return relu_conv_norm(channels, channels, kernel, stride, norm)


def relu_conv_norm(in_channels: int, channels: int, kernel: int, stride: int, norm: str | None) -> nn.Module:
    """ReLU, a convolution without bias, a normalisation."""
    convolution = nn.Conv2d(in_channels, channels, kernel, stride, kernel // 2, bias=False)
    return _in_a_row('op', nn.ReLU(), convolution, make_norm(norm, channels))


def _separable(channels: int, kernel: int, stride: int, dilation: int, norm: str | None) -> tuple[nn.Module, ...]:
    """ReLU, a depthwise and a pointwise convolution, a normalisation."""
    padding = dilation * (kernel // 2)
    return (
        nn.ReLU(),
        nn.Conv2d(channels, channels, kernel, stride, padding, dilation, groups=channels, bias=False),
        nn.Conv2d(channels, channels, 1, bias=False),
        make_norm(norm, channels),
    )


def _in_a_row(name: str, *layers: nn.Module) -> nn.Module:
    """Layers ``name.0``, ``name.1``, ..."""
    return nn.Sequential(OrderedDict({name: nn.Sequential(*layers)}))


class Zero(nn.Module):
    """The operation 'none': a cell leaves it out."""


class Subsample(nn.Module):
    """Every stride-th position in height and width."""

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, x_nchw: Tensor) -> Tensor:
        """Subsample a map."""
        return x_nchw if self.stride == 1 else x_nchw[:, :, :: self.stride, :: self.stride]


class FactorizedReduce(nn.Module):
    """Halve a map by two strided 1x1 convolutions, the second of them shifted by one pixel."""

    def __init__(self, in_channels: int, channels: int, norm: str | None) -> None:
        super().__init__()
        self.conv_1 = nn.Conv2d(in_channels, channels // 2, 1, stride=2, bias=False)
        self.conv_2 = nn.Conv2d(in_channels, channels - channels // 2, 1, stride=2, bias=False)
        self.bn = make_norm(norm, channels)

    def forward(self, x_nchw: Tensor) -> Tensor:
        """Halve a map; one row and column of zeros is added where the side is odd."""
        x_nchw = F.relu(x_nchw)
        height, width = x_nchw.shape[2:]
        if height % 2 or width % 2:
            x_nchw = F.pad(x_nchw, (0, width % 2, 0, height % 2))
        output: Tensor = self.bn(torch.cat([self.conv_1(x_nchw), self.conv_2(x_nchw[:, :, 1:, 1:])], dim=1))
        return output


class Transformer(nn.Module):
    """The operation 'msa': a transformer layer with normalisation first, over the positions of a map."""

    heads = 8

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        if channels % self.heads:
            raise ConfigError(f'expected the channels of msa to be a multiple of {self.heads} (got {channels})')
        self.subsample = Subsample(stride)
        self.to_qkv = nn.Linear(channels, 3 * channels, bias=False)
        self.to_out = nn.Sequential(nn.Linear(channels, channels))
        self.ln1 = nn.LayerNorm(channels)
        self.ln2 = nn.LayerNorm(channels)
        # The place of the reference's dropout is kept.
        layers = (nn.Linear(channels, channels), nn.GELU(), nn.Identity(), nn.Linear(channels, channels))
        self.ff = _in_a_row('net', *layers)

    def forward(self, x_nchw: Tensor) -> Tensor:
        """Attend over all positions, then apply the feed-forward network."""
        batch, channels, height, width = x_nchw.shape
        x_blc = x_nchw.flatten(2).transpose(1, 2)
        x_blc = x_blc + self.attention(self.ln1(x_blc))
        x_blc = x_blc + self.ff(self.ln2(x_blc))
        output = x_blc.transpose(1, 2).reshape(batch, channels, height, width)
        return cast(Tensor, self.subsample(output))

    def attention(self, x_blc: Tensor) -> Tensor:
        """Multi-head self-attention, softmax(q k^T / sqrt(d)) v."""
        batch, length, channels = x_blc.shape
        qkv = self.to_qkv(x_blc).view(batch, length, 3, self.heads, channels // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        weights = (query @ key.transpose(-2, -1) * (channels // self.heads) ** -0.5).softmax(dim=-1)
        output: Tensor = self.to_out((weights @ value).transpose(1, 2).reshape(batch, length, channels))
        return output


class SqueezeExcite(nn.Module):
    """The operation 'cse': channels times a gate that is computed from their means."""

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.subsample = Subsample(stride)
        self.fc1 = nn.Linear(channels, channels // 2)
        self.fc2 = nn.Linear(channels // 2, channels)

    def forward(self, x_nchw: Tensor) -> Tensor:
        """Scale the channels."""
        gate_nc = F.hardswish(self.fc2(F.relu(self.fc1(x_nchw.mean(dim=(2, 3))))))
        return cast(Tensor, self.subsample(x_nchw * gate_nc[:, :, None, None]))


class PosEnc(nn.Module):
    """A positional encoding of a map, which is added to it."""

    def __init__(self, channels: int, side: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(1, channels, side, side))

    def forward(self, x_nchw: Tensor) -> Tensor:
        """Add the encoding."""
        return x_nchw + self.weight
