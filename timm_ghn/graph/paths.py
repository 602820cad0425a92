"""Levels and shortest paths of a directed acyclic graph, vectorised over nodes."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from timm_ghn.errors import UnsupportedModelError


def topological_levels(num_nodes: int, edges_E2: Tensor) -> Tensor:
    """Length of the longest path that ends in each node.

    Args:
        num_nodes: N.
        edges_E2: int64 (E, 2), rows (source, target).

    Returns:
        int64 (N,): 0 for a node without predecessors, else one more than the largest level among them.

    Raises:
        UnsupportedModelError: if the edges form a cycle.
    """
    source, target = edges_E2.numpy().T
    by_source = np.argsort(source, kind='stable')
    first = np.searchsorted(source[by_source], np.arange(num_nodes + 1))
    targets = target[by_source]
    waiting = np.bincount(target, minlength=num_nodes)
    level = np.zeros(num_nodes, dtype=np.int64)
    frontier = np.flatnonzero(waiting == 0)
    depth = seen = 0
    while len(frontier):
        level[frontier] = depth
        seen += len(frontier)
        depth += 1
        reached = np.concatenate([targets[first[v] : first[v + 1]] for v in frontier])
        np.subtract.at(waiting, reached, 1)
        reached = np.unique(reached)
        frontier = reached[waiting[reached] == 0]
    if seen < num_nodes:
        raise UnsupportedModelError(
            f'the graph has a cycle: {num_nodes - seen} of its {num_nodes} nodes cannot be ordered'
        )
    return torch.from_numpy(level)


def shortest_paths(num_nodes: int, edges_E2: Tensor) -> Tensor:
    """All shortest directed path lengths.

    The distances to a node follow from those to its predecessors: d(u, v) = 1 + min over edges (w, v) of d(u, w), for
    all u in one vector operation. In topological order one sweep over the edges does; where a published rule closed a
    cycle, the sweep is repeated until nothing changes.

    Args:
        num_nodes: N.
        edges_E2: int64 (E, 2), rows (source, target).

    Returns:
        int16 (N, N): entry (u, v) is the length of the shortest path from u to v; 0 where there is none or u is v.
    """
    source, target = edges_E2.numpy().T
    try:
        level, acyclic = topological_levels(num_nodes, edges_E2).numpy(), True
    except UnsupportedModelError:
        level, acyclic = np.arange(num_nodes), False
    order = np.lexsort((target, level[target]))
    unreached = np.int16(np.iinfo(np.int16).max - 1)
    # Row v holds the distances from all u to v: contiguous, unlike the column of the result.
    to_node = np.full((num_nodes, num_nodes), unreached, dtype=np.int16)
    np.fill_diagonal(to_node, 0)
    sweep = list(zip(source[order].tolist(), target[order].tolist(), strict=True))
    while True:
        before = None if acyclic else to_node.copy()
        for u, v in sweep:
            np.minimum(to_node[v], to_node[u] + np.int16(1), out=to_node[v])
        if before is None or np.array_equal(before, to_node):
            break
    to_node[to_node >= unreached] = 0
    return torch.from_numpy(np.ascontiguousarray(to_node.T))
