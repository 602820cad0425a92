from __future__ import annotations

import dataclasses

import pytest
import timm
import torch

from timm_ghn import trace
from timm_ghn.analysis.embeddings import graph_embeddings


@pytest.fixture(scope='module')
def graphs():
    return [trace(timm.create_model(name)) for name in ('test_vit', 'test_resnet', 'test_byobnet')]


def reordered(graph):
    """The same graph with its nodes listed in another order."""
    order = torch.randperm(len(graph), generator=torch.Generator().manual_seed(0))
    place = order.argsort()
    nodes = tuple(graph.nodes[old] for old in order.tolist())
    return dataclasses.replace(graph, nodes=nodes, edges_E2=place[graph.edges_E2], start=int(place[graph.start]))


def test_embeddings_are_means_that_depend_on_no_other_graph(ghn, graphs):
    together = graph_embeddings(ghn, graphs)
    assert together.shape == (3, ghn.config.hid)
    assert not together.requires_grad
    for graph, row in zip(graphs, together, strict=True):
        torch.testing.assert_close(graph_embeddings(ghn, [graph])[0], row)
        torch.testing.assert_close(ghn.encode(graph).mean(0).detach(), row)


def test_embeddings_do_not_depend_on_the_order_of_nodes(ghn, graphs):
    torch.testing.assert_close(
        graph_embeddings(ghn, map(reordered, graphs)), graph_embeddings(ghn, graphs), atol=1e-5, rtol=1e-4
    )
