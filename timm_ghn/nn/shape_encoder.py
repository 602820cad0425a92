"""Embedding of the shape of a node's tensor (arXiv 2110.13100, appendix B)."""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor, nn

from timm_ghn.nn.config import GHNConfig
from timm_ghn.nn.precision import look_up


def channel_vocabulary(num_classes: int) -> tuple[int, ...]:
    """Channel counts that have an embedding of their own: fine steps for small ones, coarse for large ones."""
    return tuple(sorted({1, 3, num_classes, *range(8, 64, 8), *range(64, 4096, 16), *range(4096, 8193, 32)}))


def spatial_vocabulary(max_size: int) -> tuple[int, ...]:
    """Heights and widths that have an embedding of their own."""
    return tuple(sorted({*range(1, max(12, max_size), 2), 14, 16}))


def nearest(vocabulary: tuple[int, ...], exceptions: dict[int, int]) -> Tensor:
    """Row of the embedding table for every size from 0 to the largest of the vocabulary.

    A size takes the row of the nearest member, of the smaller one at equal distance; 0 takes the last member's.

    Returns:
        int64 (vocabulary[-1] + 1,), on the CPU whatever the default device is.
    """
    members = np.asarray(vocabulary)
    sizes = np.arange(members[-1] + 1)
    above = np.searchsorted(members, sizes)
    below = np.maximum(above - 1, 0)
    # Below the first member both are row 0; on a member the distance to `above` is 0.
    row = np.where(sizes - members[below] <= members[above] - sizes, below, above)
    row[members] = np.arange(len(members))
    for size, member in exceptions.items():
        row[size] = vocabulary.index(member)
    row[0] = len(members) - 1
    return torch.from_numpy(row)


@functools.lru_cache(maxsize=16)
def _channel_rows(num_classes: int) -> Tensor:
    return nearest(channel_vocabulary(num_classes), {4: 8, 5: 8, 6: 8, 7: 8})


@functools.lru_cache(maxsize=16)
def _spatial_rows(max_size: int) -> Tensor:
    return nearest(spatial_vocabulary(max_size), {2: 3})


class ShapeEncoder(nn.Module):
    """Maps the four sizes of a node's tensor to a vector: e = [E_ch[out], E_ch[in], E_sp[height], E_sp[width]].

    The last row of either table stands for nodes without a shape.

    Shapes:
        input (N, 4), output (N, d).
    """

    def __init__(self, config: GHNConfig) -> None:
        super().__init__()
        self.num_classes = config.num_classes
        self.max_size = max(config.max_shape[2:])
        width = config.hid // 4
        self.embed_spatial = nn.Embedding(len(spatial_vocabulary(self.max_size)) + 1, width)
        self.embed_channel = nn.Embedding(len(channel_vocabulary(self.num_classes)) + 1, width)

    def forward(self, shapes_N4: Tensor) -> Tensor:
        """Embed shapes.

        Args:
            shapes_N4: int64 (N, 4) on the CPU: (out, in, height, width), negative where a node has no shape.

        Returns:
            (N, d) on the device of the tables.
        """
        shaped_N1 = (shapes_N4 >= 0).all(1, keepdim=True)
        slots = (
            (self.embed_channel, _channel_rows(self.num_classes), shapes_N4[:, :2]),
            (self.embed_spatial, _spatial_rows(self.max_size), shapes_N4[:, 2:]),
        )
        parts = []
        for table, rows, sizes_N2 in slots:
            index_N2 = rows[sizes_N2.clamp(0, len(rows) - 1)]
            dummy = table.num_embeddings - 1
            parts.append(look_up(table, torch.where(shaped_N1, index_N2, dummy)).flatten(1))
        return torch.cat(parts, 1)

    @torch.no_grad()
    def take_(self, other: ShapeEncoder) -> None:
        """Take over the embeddings of an encoder for another number of classes, in place.

        Each size takes that of the same size, and the number of classes that of the other's number of classes.
        """
        self.embed_spatial.weight.copy_(other.embed_spatial.weight)
        rows = {size: row for row, size in enumerate(channel_vocabulary(other.num_classes))}
        taken = [
            rows[other.num_classes if size == self.num_classes else size]
            for size in channel_vocabulary(self.num_classes)
        ]
        self.embed_channel.weight.copy_(other.embed_channel.weight[[*taken, len(rows)]])
