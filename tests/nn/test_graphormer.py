"""Biases by distinct distance and attention by graph give what all pairs of nodes give."""

from __future__ import annotations

import dataclasses

import literal
import pytest
import torch
from variants import GHN3, VARIANTS

from timm_ghn.graph.graph import GraphBatch

GRAPHORMERS = [name for name, config in VARIANTS.items() if config.gnn == 'graphormer']


@pytest.mark.parametrize('variant', GRAPHORMERS)
@pytest.mark.parametrize('size', [1, 2, 24])
def test_layers_equal_the_formulas_over_all_pairs(variant, size, make_ghn, make_graph):
    config = VARIANTS[variant]
    ghn, graph = make_ghn(config), make_graph(size)
    x = torch.randn(size, config.hid, dtype=torch.float64)
    expected = literal.graphormer(dict(ghn.named_parameters()), config, graph, x)
    assert torch.allclose(ghn.gnn(x, GraphBatch.of(graph)), expected, rtol=0, atol=1e-9)


def test_large_degrees_and_distances_share_the_last_row(make_ghn, make_graph):
    """A star of 120 leaves, and a chain of 60 nodes behind a cutoff of 50: no row outside the tables is asked for."""
    base, ghn = make_graph(121), make_ghn(GHN3)
    star = dataclasses.replace(base, edges_E2=torch.tensor([(0, leaf) for leaf in range(1, 121)]), start=0)
    chain = dataclasses.replace(base, edges_E2=torch.tensor([(v, v + 1) for v in range(120)]), start=0)
    weights = dict(ghn.named_parameters())
    for graph in (star, chain):
        assert torch.allclose(ghn.encode(graph), literal.encode(weights, GHN3, graph), rtol=0, atol=1e-9)
