"""Updating whole levels of a whole batch gives what visiting one node after another gives."""

from __future__ import annotations

import dataclasses

import literal
import pytest
import torch
from variants import VARIANTS

from timm_ghn.graph.structure import GraphBatch
from timm_ghn.nn.gated import GatedGNN, plan_traversal

GATED = [name for name, config in VARIANTS.items() if config.gnn == 'gated']


@pytest.mark.parametrize('variant', GATED)
@pytest.mark.parametrize('size', [1, 2, 9, 24])
def test_levels_equal_the_visit_of_single_nodes(variant, size, make_ghn, make_graph):
    config = VARIANTS[variant]
    ghn, graph = make_ghn(config), make_graph(size)
    x = torch.randn(size, config.hid, dtype=torch.float64)
    expected = literal.gated(dict(ghn.named_parameters()), config, graph, x)
    assert torch.allclose(ghn.gnn(x, GraphBatch.of(graph)), expected, rtol=0, atol=1e-9)


def test_virtual_edges_matter(make_graph):
    config = VARIANTS['ghn2']
    torch.manual_seed(0)
    deep = GatedGNN(config)
    shallow = GatedGNN(dataclasses.replace(config, virtual_edges=2))
    shallow.load_state_dict(deep.state_dict())
    x, batch = torch.randn(24, config.hid), GraphBatch.of(make_graph(24))
    assert not torch.allclose(deep(x, batch), shallow(x, batch), atol=1e-4)


@pytest.mark.parametrize('backward', [False, True])
def test_edges_lead_from_lower_levels_to_the_level_that_they_update(backward, make_graph):
    batch = GraphBatch.of([make_graph(9), make_graph(24), make_graph(1)])
    plan = plan_traversal(batch, 50, backward=backward, like=torch.zeros(0))
    assert sorted(plan.order_N.tolist()) == list(range(34))
    assert plan.order_N[plan.rank_N].tolist() == list(range(34))
    start = edges = 0
    for level in plan.levels:
        assert level.sources.stop <= start
        assert level.weight_nM.shape == (level.size, 2 * (level.sources.stop - level.sources.start))
        start += level.size
        edges += int((level.weight_nM > 0).sum())
    reachable = sum(int((graph.distances_NN(50) > 0).sum()) for graph in batch.graphs)
    assert (start, edges) == (34, reachable + sum(len(graph.edges_E2) for graph in batch.graphs))
