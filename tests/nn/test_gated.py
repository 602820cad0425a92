"""Updating whole levels of a whole batch gives what visiting one node after another gives."""

from __future__ import annotations

import dataclasses
import gc
import weakref

import literal
import pytest
import torch
from networks import plain
from tiny import TINY, make_ghn as make_tiny
from variants import VARIANTS

from timm_ghn import predict, trace
from timm_ghn.graph.graph import GraphBatch
from timm_ghn.nn import gated
from timm_ghn.nn.gated import GatedGNN, plan_traversal
from timm_ghn.ops import use_backend
from timm_ghn.ops.backends import BACKENDS, missing_package
from timm_ghn.ops.rows import DenseRows, SparseRows

GATED = [name for name, config in VARIANTS.items() if config.gnn == 'gated']


@pytest.fixture
def make_cycle(make_graph):
    """A graph in which an edge leads back, as a published rule makes them."""

    def make(size):
        graph = make_graph(size)
        edges = torch.cat((graph.edges_E2, torch.tensor([[size - 2, 1], [size - 1, size // 2]])))
        graph = dataclasses.replace(graph, edges_E2=edges)
        assert not graph.is_acyclic
        return graph

    return make


def passes(ghn, x, batch, backend):
    """The network on schedules of one backend."""
    plans = tuple(plan_traversal(batch, ghn.gnn.cutoff, backward=b, like=x, backend=backend) for b in (False, True))
    batch = GraphBatch(batch.graphs)
    vars(batch)['_traversals'] = {(ghn.gnn.cutoff, x.device, x.dtype, x.shape[1], 'auto'): plans}
    return ghn.gnn(x, batch)


@pytest.mark.parametrize('backend', ['dense', 'bag'])
@pytest.mark.parametrize('variant', GATED)
def test_gradients_are_those_of_the_visit_of_single_nodes(variant, backend, make_ghn, make_graph, make_cycle):
    """Graphs of a batch do not see one another, whatever their depth and whether they have cycles."""
    config = VARIANTS[variant]
    ghn = make_ghn(config)
    weights = dict(ghn.named_parameters())
    for graphs in ([make_graph(2)], [make_graph(1), make_graph(12), make_graph(5)], [make_graph(7), make_cycle(8)]):
        sizes = [len(graph) for graph in graphs]
        x = torch.randn(sum(sizes), config.hid, dtype=torch.float64, requires_grad=True)
        outer = torch.randn_like(x)
        found = passes(ghn, x, GraphBatch.of(graphs), backend)
        alone = [
            literal.gated(weights, config, graph, part) for graph, part in zip(graphs, x.split(sizes), strict=True)
        ]
        assert torch.allclose(found, torch.cat(alone), rtol=0, atol=1e-9)
        leaves = [x, *ghn.gnn.parameters()]
        ours, theirs = (torch.autograd.grad(result, leaves, outer) for result in (found, torch.cat(alone)))
        for one, other in zip(ours, theirs, strict=True):
            assert torch.allclose(one, other, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize('backend', BACKENDS)
def test_any_backend_gives_the_predictions_and_gradients_of_ghn_2(backend, request):
    if backend == 'scatter' and missing_package('torch_scatter'):
        request.getfixturevalue('scatter_double')
    problem = BACKENDS[backend].problem('cpu', torch.float32, deterministic=False)
    if problem is not None:
        pytest.skip(f'{backend} {problem}')
    ghn, model = make_tiny(TINY['gated']), plain()
    graph = trace(model)

    def gradients():
        embeddings_Nd = ghn.encode([graph])
        outer = torch.linspace(-1, 1, embeddings_Nd.numel()).view_as(embeddings_Nd)
        return torch.autograd.grad((embeddings_Nd * outer).sum(), list(ghn.gnn.parameters()))

    expected, wanted = predict(model, ghn).state_dict, gradients()
    called = []

    def counting(*args):
        called.append(args)
        return replaced.sums(*args)

    replaced = BACKENDS[backend]
    with pytest.MonkeyPatch.context() as patch, use_backend(backend):
        patch.setitem(BACKENDS, backend, dataclasses.replace(replaced, sums=counting))
        found, ours = predict(model, ghn).state_dict, gradients()
    assert called
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-6)
    for one, other in zip(ours, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('variant', ['ghn1', 'ghn2'])
def test_gradients_pass_the_numerical_check(variant, make_ghn, make_graph, make_cycle):
    config = dataclasses.replace(VARIANTS[variant], hid=4, heads=1)
    ghn = make_ghn(config)
    batch = GraphBatch.of([make_graph(5), make_cycle(4)])
    names = [name for name, _ in ghn.gnn.named_parameters()]
    x = torch.randn(9, 4, dtype=torch.float64, requires_grad=True)

    def function(x, *weights):
        return torch.func.functional_call(ghn.gnn, dict(zip(names, weights, strict=True)), (x, batch))

    assert torch.autograd.gradcheck(function, (x, *ghn.gnn.parameters()))


def test_schedules_are_planned_once_for_a_batch_and_go_with_it(make_graph, monkeypatch):
    config = VARIANTS['ghn2']
    network, batch = GatedGNN(config), GraphBatch.of([make_graph(9), make_graph(12)])
    planned = []

    def counting(*args, **options):
        planned.append(plan_traversal(*args, **options))
        return planned[-1]

    monkeypatch.setattr(gated, 'plan_traversal', counting)
    x = torch.randn(21, config.hid)
    for _ in range(3):
        network(x.clone().requires_grad_(), batch).sum().backward()
    assert len(planned) == 2
    assert vars(planned[0])['sending'] is planned[0].sending
    network.double()(x.double(), batch)
    assert len(planned) == 4
    plan, gone = weakref.ref(planned[0]), weakref.ref(batch)
    planned.clear()
    del batch
    gc.collect()
    assert gone() is None
    assert plan() is None


def test_a_batch_that_was_planned_for_inference_can_be_trained_on(make_graph):
    config = VARIANTS['ghn2']
    network, batch = GatedGNN(config), GraphBatch.of([make_graph(9), make_graph(12)])
    x = torch.randn(21, config.hid)
    with torch.inference_mode():
        expected = network(x, batch)
    found = network(x.requires_grad_(), batch)
    found.sum().backward()
    assert torch.equal(found, expected)
    assert x.grad.abs().min() > 0


def test_the_plan_of_many_graphs_holds_edges_and_no_matrices(make_graph):
    """As matrices, the plan of 32 merged chains would grow with the square of their number."""
    graphs = [make_graph(60, seed) for seed in range(32)]
    alone = plan_traversal(GraphBatch.of(graphs[0]), 50, backward=False, like=torch.zeros(0, 32))
    merged = plan_traversal(GraphBatch.of(graphs), 50, backward=False, like=torch.zeros(0, 32))
    assert {type(rows) for rows in alone.receiving} == {DenseRows}
    assert {type(rows) for rows in merged.receiving} == {SparseRows}
    assert sum(rows.edges.weight_E.numel() for rows in merged.receiving) == len(merged.edges)
    assert len(merged.receiving) == max(int(graph.forward_levels_N.max()) + 1 for graph in graphs)
