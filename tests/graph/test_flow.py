"""Where parameters join the data, and what their elements are there."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import timm
import torch
from isomorphism import Net, zeros
from timm.layers import CondConv2d
from tiny import TINY
from torch import Tensor, nn

from timm_ghn import Graph, plan_parameters, trace
from timm_ghn.graph import Primitive
from timm_ghn.prediction.fit import fan_in_scale

SIZE = 16
CONFIG = TINY['graphormer']


def net_of(shape: tuple[int, ...], compute: Callable[[Tensor, Tensor], Tensor]) -> Net:
    """A stem, something with a parameter of its own, and a classifier."""
    layers = {'stem': nn.Conv2d(3, 8, 1), 'head': nn.LazyLinear(10)}
    net = Net(lambda net, x: net.head(compute(net.stem(x), net.zeta).flatten(1)), **layers, zeta=zeros(*shape))
    with torch.no_grad():
        net(torch.zeros(2, 3, SIZE, SIZE))
    return net


def graph_of(shape: tuple[int, ...], compute: Callable[[Tensor, Tensor], Tensor]) -> Graph:
    return trace(net_of(shape, compute), input_size=SIZE, rules='operators')


def node_of(graph: Graph, name: str = 'zeta') -> tuple[Primitive, tuple[int, ...] | None]:
    node = graph.nodes[graph.node_of[name]]
    return node.primitive, node.kernel


# -- matrices


@pytest.mark.parametrize(
    ('shape', 'compute', 'kernel'),
    [
        ((8, 5), lambda x, p: x.permute(0, 2, 3, 1) @ p, (5, 8)),
        ((5, 8), lambda x, p: x.permute(0, 2, 3, 1) @ p.t(), None),
        ((1, 8), lambda x, p: nn.functional.linear(x.permute(0, 2, 3, 1), p), None),
    ],
    ids=['from the right', 'transposed', 'linear'],
)
def test_a_matrix_that_data_is_multiplied_with_is_a_weight_of_any_shape_and_name(shape, compute, kernel):
    graph = graph_of(shape, compute)
    assert node_of(graph) == (Primitive.CONV, kernel)
    row = next(row for row in plan_parameters(graph, CONFIG) if row.name == 'zeta')
    assert row.fit.scale == pytest.approx(fan_in_scale((shape[1] if kernel else shape[0], 8)))


def test_a_vector_that_scales_a_weight_is_a_gain_still():
    def compute(net: Net, x: Tensor) -> Tensor:
        return nn.functional.linear(net.stem(x).flatten(1), net.head.weight * net.zeta, net.head.bias)

    model = Net(compute, stem=nn.Conv2d(3, 8, SIZE), head=nn.Linear(8, 10), zeta=nn.Parameter(torch.ones(10, 1)))
    assert trace(model, input_size=SIZE, rules='operators').kept == {'zeta': 'layer scale or gain'}


@pytest.mark.parametrize(('groups', 'kernel'), [(1, (8, 8, 3, 3)), (8, (8, 1, 3, 3)), (2, (8, 4, 3, 3))])
def test_kernels_of_experts_are_scaled_each_to_its_own_fan_in(groups, kernel):
    """Kernels of several experts are mixed for each image."""

    def compute(net: Net, x: Tensor) -> Tensor:
        x = net.stem(x)
        return net.head(net.conv(x, net.routing(x.mean((2, 3))).sigmoid()).mean((2, 3)))

    layers = {'stem': nn.Conv2d(3, 8, 1), 'routing': nn.Linear(8, 4), 'head': nn.Linear(8, 10)}
    model = Net(compute, **layers, conv=CondConv2d(8, 8, 3, groups=groups, num_experts=4))
    graph = trace(model, input_size=SIZE, rules='operators')
    assert node_of(graph, 'conv.weight') == (Primitive.CONV, kernel)
    row = next(row for row in plan_parameters(graph, CONFIG) if row.name == 'conv.weight')
    assert row.fit.scale == fan_in_scale(kernel)
    assert row.how.endswith(f'for kernels of {"x".join(map(str, kernel))}')


# -- tables of positions


def test_a_table_with_a_row_for_each_coordinate_is_kept_and_no_weight():
    """Gemma's positions: constants that choose rows are multiplied with a table for each axis."""

    def compute(x: Tensor, table: Tensor) -> Tensor:
        rows = nn.functional.one_hot(torch.arange(SIZE), 40).to(table.dtype)
        chosen = rows.to(table.device).expand(2, -1, -1) @ table
        return (x + chosen[0].t()[:, None]) + chosen[1].t()[:, :, None]

    assert 'zeta' not in graph_of((2, 40, 8), compute).node_of


def cut(x: Tensor, rows: int, columns: int) -> Tensor:
    """A map (B, C, H, W) as (B, blocks, positions, C)."""
    images, features, height, width = x.shape
    x = x.permute(0, 2, 3, 1).reshape(images, rows, height // rows, columns, width // columns, features)
    return x.transpose(2, 3).reshape(images, rows * columns, -1, features)


@pytest.mark.parametrize(
    ('shape', 'compute', 'blocks'),
    [
        ((1, 4, 64, 8), lambda x, p: cut(x, 2, 2) + p, (2, 2, 8, 8)),
        ((1, 64, 4, 8), lambda x, p: cut(x, 8, 8) + p, (8, 8, 2, 2)),
        ((1, 1, 256, 8), lambda x, p: cut(x, 1, 1) + p, None),
        ((1, 256, 8), lambda x, p: x.flatten(2).transpose(1, 2) + p, None),
    ],
    ids=['large blocks', 'small blocks', 'one block', 'tokens'],
)
def test_positions_that_are_stored_by_blocks_are_known(shape, compute, blocks):
    graph = graph_of(shape, compute)
    node = graph.nodes[graph.node_of['zeta']]
    assert (node.primitive, node.blocks) == (Primitive.POS_ENC, blocks)
    row = next(row for row in plan_parameters(graph, CONFIG) if row.name == 'zeta')
    assert row.fit.blocks == blocks


def test_timms_nested_transformer_stores_its_positions_by_blocks():
    with torch.device('meta'):
        graph = trace(timm.create_model('nest_tiny'), rules='operators')
    found = [node.blocks for node in graph.nodes if node.primitive is Primitive.POS_ENC]
    assert found == [(4, 4, 14, 14), (2, 2, 14, 14), None]
