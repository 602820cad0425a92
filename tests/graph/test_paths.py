"""Orders, levels and shortest paths, against networkx."""

from __future__ import annotations

import itertools
import random

import networkx as nx
import pytest
import torch

from timm_ghn.graph.paths import reachable, shortest_paths, topological_levels, topological_order

SIZES = (1, 2, 3, 10, 40)
SEEDS = pytest.mark.parametrize('seed', range(4))


def random_graph(size: int, seed: int, *, acyclic: bool) -> nx.DiGraph:
    """A random graph whose nodes are numbered in no particular order; some nodes have no edge."""
    rng = random.Random(f'{size} {seed} {acyclic}')
    place = rng.sample(range(size), size)
    graph = nx.DiGraph()
    graph.add_nodes_from(range(size))
    pairs = [(rng.randrange(size), rng.randrange(size)) for _ in range(3 * size // 2)]
    graph.add_edges_from((u, v) for u, v in sorted(pairs) if u != v and (not acyclic or place[u] < place[v]))
    assert size < 40 or nx.is_directed_acyclic_graph(graph) == acyclic
    return graph


def edges(graph: nx.DiGraph) -> torch.Tensor:
    """In a shuffled order: nothing may depend on it."""
    listed = sorted(graph.edges)
    random.Random(0).shuffle(listed)
    return torch.tensor(listed, dtype=torch.int64).view(-1, 2)


@SEEDS
def test_paths_orders_and_what_is_reachable_are_those_of_networkx(seed):
    """The reference sorts with networkx; the level of a node is the length of the longest path to it."""
    for size, acyclic in itertools.product(SIZES, (True, False)):
        graph = random_graph(size, seed, acyclic=acyclic)
        lengths = torch.zeros(size, size, dtype=torch.int16)
        for u, distances in nx.all_pairs_shortest_path_length(graph):
            for v, distance in distances.items():
                lengths[u, v] = distance
        found = shortest_paths(size, edges(graph))
        assert found.dtype == torch.int16
        assert torch.equal(found, lengths)
        assert reachable([size // 2], graph.successors) == {size // 2, *nx.descendants(graph, size // 2)}
        if acyclic:
            order = topological_order({v: set(graph.predecessors(v)) for v in range(size)})
            assert order == list(nx.topological_sort(graph))
            longest = [0] * size
            for v in order:
                longest[v] = max((longest[u] + 1 for u in graph.predecessors(v)), default=0)
            assert topological_levels(size, edges(graph)).tolist() == longest


def test_a_long_chain_neither_overflows_nor_recurses():
    size = 3000
    chain = torch.stack((torch.arange(size - 1), torch.arange(1, size)), dim=1)
    assert topological_levels(size, chain).tolist() == list(range(size))
    distances = shortest_paths(size, chain)
    assert distances[0, -1] == size - 1
    assert distances[-1, 0] == 0


@pytest.mark.parametrize('cycle', [[(0, 1), (1, 2), (2, 3), (3, 1)], [(0, 1), (1, 1)]])
def test_a_cycle_has_no_order_and_no_levels(cycle):
    assert topological_levels(4, torch.tensor(cycle)) is None
