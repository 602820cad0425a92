"""What a file of DeepNets-1M holds of a network: its configuration and its graph."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from timm_ghn.architectures.deepnets.network import DeepNet, NetworkConfig
from timm_ghn.errors import DataError
from timm_ghn.graph.build import trace
from timm_ghn.graph.paths import neighbours, shortest_paths
from timm_ghn.graph.primitives import Primitive

#: Longest path that the official files hold: distances are bytes.
LONGEST_PATH = 250


@dataclasses.dataclass(frozen=True)
class NetRecord:
    """A network with its graph, nodes in topological order.

    Attributes:
        config: The network.
        num_params: Number of parameters with 32 channels, by 'cifar10' and 'imagenet'.
        primitives: Of each node, in the words of the official files ('conv_1x1', 'bn', ...).
        cells: The cell that each node belongs to.
        names: Name of each node within its cell.
        edges: (source, target) pairs.
    """

    config: NetworkConfig
    num_params: Mapping[str, int]
    primitives: tuple[str, ...]
    cells: tuple[int, ...]
    names: tuple[str, ...]
    edges: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        count = len(self.primitives)
        if not count == len(self.cells) == len(self.names) or not count:
            raise DataError('expected a primitive, a cell and a name for each node of a network')
        if any(not 0 <= source < target < count for source, target in self.edges):
            raise DataError(f'expected edges from a node to a later one of {count}')

    def __len__(self) -> int:
        return len(self.primitives)

    @functools.cached_property
    def neighbours(self) -> tuple[list[list[int]], list[list[int]]]:
        """Predecessors and successors of each node."""
        return neighbours(len(self), self.edges)

    @property
    def is_connected(self) -> bool:
        """Whether each node but positional encodings comes after the first, and all lead to the last."""
        before, behind = self.neighbours
        last = len(self) - 1
        starts = [v for v in range(1, len(self)) if not before[v] and self.primitives[v] != 'pos_enc']
        return not starts and all(behind[v] for v in range(last))

    def distances_NN(self) -> np.ndarray:
        """uint8 (N, N): lengths of the shortest paths, 0 where there is none or a longer one."""
        edges = torch.tensor(self.edges, dtype=torch.int64).view(-1, 2)
        distances = shortest_paths(len(self), edges).numpy()
        return np.where(distances > LONGEST_PATH, 0, distances).astype(np.uint8)

    def to_dict(self) -> dict[str, Any]:
        """Plain values that ``json`` can write."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> NetRecord:
        """The record that :meth:`to_dict` describes."""
        try:
            return cls(
                NetworkConfig.from_dict(values['config']),
                {name: int(count) for name, count in values['num_params'].items()},
                tuple(map(str, values['primitives'])),
                tuple(map(int, values['cells'])),
                tuple(map(str, values['names'])),
                tuple((int(source), int(target)) for source, target in values['edges']),
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise DataError(f'expected a network with its graph ({error!r})') from error


def record_of(model: DeepNet, num_params: Mapping[str, int]) -> NetRecord:
    """Trace a network."""
    graph, cell = trace(model), 0
    primitives, cells, names = [], [], []
    for node in graph.nodes:
        primitive = node.primitive.name.lower()
        name = node.parameter or primitive
        if match := re.match(r'cells\.(\d+)\.(.*)', name):
            cell, name = int(match[1]), match[2]
        elif name.startswith('classifier'):
            cell = model.config.n_cells - 1
        elif name.startswith(('stem', 'pos_enc')):
            cell = 0
        pointwise = node.primitive is Primitive.CONV and node.shape is not None and set(node.shape[2:]) == {1}
        primitives.append('conv_1x1' if pointwise else primitive)
        cells.append(cell)
        names.append(name)
    edges = sorted((int(source), int(target)) for source, target in graph.edges_E2.tolist())
    return NetRecord(model.config, dict(num_params), tuple(primitives), tuple(cells), tuple(names), tuple(edges))
