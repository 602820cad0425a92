"""Levels and shortest paths, against networkx."""

from __future__ import annotations

import random

import networkx as nx
import pytest
import torch

from timm_ghn import UnsupportedModelError
from timm_ghn.graph.paths import shortest_paths, topological_levels

SIZES = pytest.mark.parametrize('size', [1, 2, 3, 10, 40])
SEEDS = pytest.mark.parametrize('seed', range(4))


def random_graph(size: int, seed: int, *, acyclic: bool, density: float = 1.5) -> nx.DiGraph:
    """A random graph whose nodes are numbered in no particular order; some nodes have no edge."""
    rng = random.Random(f'{size} {seed} {acyclic}')
    place = list(range(size))
    rng.shuffle(place)
    graph = nx.DiGraph()
    graph.add_nodes_from(range(size))
    for _ in range(int(density * size)):
        u, v = rng.randrange(size), rng.randrange(size)
        if u != v and (not acyclic or place[u] < place[v]):
            graph.add_edge(u, v)
    return graph


def edges(graph: nx.DiGraph) -> torch.Tensor:
    """In a shuffled order: nothing may depend on it."""
    listed = sorted(graph.edges)
    random.Random(0).shuffle(listed)
    return torch.tensor(listed, dtype=torch.int64).view(-1, 2)


def lengths(graph: nx.DiGraph) -> torch.Tensor:
    expected = torch.zeros(len(graph), len(graph), dtype=torch.int16)
    for u, distances in nx.all_pairs_shortest_path_length(graph):
        for v, distance in distances.items():
            expected[u, v] = distance
    return expected


@SIZES
@SEEDS
@pytest.mark.parametrize('acyclic', [True, False])
def test_shortest_paths_are_those_of_networkx(size, seed, acyclic):
    graph = random_graph(size, seed, acyclic=acyclic)
    found = shortest_paths(size, edges(graph))
    assert found.dtype == torch.int16
    assert torch.equal(found, lengths(graph))


@SIZES
@SEEDS
def test_the_level_of_a_node_is_the_longest_path_to_it(size, seed):
    graph = random_graph(size, seed, acyclic=True)
    expected = [0] * size
    for v in nx.topological_sort(graph):
        expected[v] = max((expected[u] + 1 for u in graph.predecessors(v)), default=0)
    assert topological_levels(size, edges(graph)).tolist() == expected


def test_the_random_graphs_are_what_they_should_be():
    assert all(nx.is_directed_acyclic_graph(random_graph(40, seed, acyclic=True)) for seed in range(4))
    assert not any(nx.is_directed_acyclic_graph(random_graph(40, seed, acyclic=False)) for seed in range(4))


def test_a_long_chain_neither_overflows_nor_recurses():
    size = 3000
    chain = torch.stack((torch.arange(size - 1), torch.arange(1, size)), dim=1)
    assert topological_levels(size, chain).tolist() == list(range(size))
    distances = shortest_paths(size, chain)
    assert distances[0, -1] == size - 1
    assert distances[-1, 0] == 0


@pytest.mark.parametrize('cycle', [[(0, 1), (1, 0)], [(0, 1), (1, 2), (2, 3), (3, 1)]])
def test_a_cycle_has_no_levels_and_the_error_counts_the_nodes_that_it_holds_up(cycle):
    stuck = len(cycle) if (1, 0) in cycle else 3
    with pytest.raises(UnsupportedModelError, match=f'cycle: {stuck} of its 4 nodes'):
        topological_levels(4, torch.tensor(cycle))


def test_an_edge_from_a_node_to_itself_is_a_cycle():
    with pytest.raises(UnsupportedModelError, match='cycle'):
        topological_levels(2, torch.tensor([[0, 1], [1, 1]]))
