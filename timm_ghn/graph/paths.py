"""Orders, levels and shortest paths in directed graphs."""

from __future__ import annotations

import graphlib
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor


def reachable(start: Iterable[int], following: Callable[[int], Iterable[int]]) -> set[int]:
    """Nodes that edges lead to from some nodes, these included."""
    found = set(start)
    stack = list(found)
    while stack:
        new = set(following(stack.pop())) - found
        found |= new
        stack += new
    return found


def neighbours(num_nodes: int, edges: Iterable[Sequence[int]]) -> tuple[list[list[int]], list[list[int]]]:
    """Predecessors and successors of each node, by edges (source, target)."""
    before: list[list[int]] = [[] for _ in range(num_nodes)]
    behind: list[list[int]] = [[] for _ in range(num_nodes)]
    for source, target in edges:
        before[target].append(source)
        behind[source].append(target)
    return before, behind


def topological_order(predecessors: Mapping[int, Iterable[int]]) -> list[int] | None:
    """Nodes sorted such that each comes after its predecessors; None if there is a cycle.

    The order is fixed: generation by generation, as networkx sorts. The first one are the nodes without predecessors as
    they are listed. A node joins the next one when the last of its predecessors is visited; the successors of a node
    are visited as they are listed.
    """
    sorter = graphlib.TopologicalSorter(dict.fromkeys(predecessors, ()))
    for node, before in predecessors.items():
        sorter.add(node, *before)
    try:
        return list(sorter.static_order())
    except graphlib.CycleError:
        return None


def topological_levels(num_nodes: int, edges_E2: Tensor) -> Tensor | None:
    """Length of the longest path that ends in each node.

    Args:
        num_nodes: N.
        edges_E2: int64 (E, 2), rows (source, target).

    Returns:
        int64 (N,): 0 for a node without predecessors, else one more than the largest level among them; None if the
        edges form a cycle.
    """
    predecessors, _ = neighbours(num_nodes, edges_E2.tolist())
    order = topological_order(dict(enumerate(predecessors)))
    if order is None:
        return None
    level = [0] * num_nodes
    for node in order:
        level[node] = max((level[before] + 1 for before in predecessors[node]), default=0)
    return torch.tensor(level, dtype=torch.int64, device='cpu')


def shortest_paths(num_nodes: int, edges_E2: Tensor) -> Tensor:
    """All shortest directed path lengths.

    The distances to a node follow from those to its predecessors: d(u, v) = 1 + min over edges (w, v) of d(u, w), for
    all u in one vector operation. In topological order one sweep over the edges does; in a graph with a cycle, the
    sweep is repeated until nothing changes.

    Args:
        num_nodes: N.
        edges_E2: int64 (E, 2), rows (source, target).

    Returns:
        int16 (N, N): entry (u, v) is the length of the shortest path from u to v; 0 where there is none or u is v.
    """
    source, target = edges_E2.numpy().T
    level_N = topological_levels(num_nodes, edges_E2)
    level = np.arange(num_nodes) if level_N is None else level_N.numpy()
    order = np.lexsort((target, level[target]))
    unreached = np.int16(np.iinfo(np.int16).max - 1)
    # Row v holds the distances from all u to v: contiguous, unlike the column of the result.
    to_node = np.full((num_nodes, num_nodes), unreached, dtype=np.int16)
    np.fill_diagonal(to_node, 0)
    sweep = list(zip(source[order].tolist(), target[order].tolist(), strict=True))
    while True:
        before = None if level_N is not None else to_node.copy()
        for u, v in sweep:
            np.minimum(to_node[v], to_node[u] + np.int16(1), out=to_node[v])
        if before is None or np.array_equal(before, to_node):
            break
    to_node[to_node >= unreached] = 0
    return torch.from_numpy(np.ascontiguousarray(to_node.T))
