"""The operator rules: what a network computes decides, not what its parts are called."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import timm
import torch
from hypothesis import given, settings, strategies as st
from isomorphism import same_graph
from timm.layers import LayerNorm2d, ScaledStdConv2d, StdConv2d, set_fused_attn
from tiny import TINY
from torch import Tensor, nn

from timm_ghn import Graph, plan_parameters, trace
from timm_ghn.graph import Primitive
from timm_ghn.graph.checks import flaws_of
from timm_ghn.graph.flow import Flow
from timm_ghn.graph.trace import record

SIZE = 16
CONFIG = TINY['graphormer']


class Net(nn.Module):
    """A network from a function of its layers and the image."""

    def __init__(self, compute: Callable[[nn.Module, Tensor], Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.compute = compute
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.compute(self, x)


def read(compute: Callable[[nn.Module, Tensor], Tensor], **layers: nn.Module) -> Graph:
    return trace(Net(compute, **layers), input_size=SIZE, rules='operators')


def labels(graph: Graph) -> list[str]:
    """Parameters by name, ops by what they are."""
    return [node.parameter or node.primitive.label for node in graph.nodes]


def edges(graph: Graph) -> set[str]:
    name = labels(graph)
    return {f'{name[u]}>{name[v]}' for u, v in graph.edges_E2.tolist()}


def conv(inputs: int = 8, outputs: int = 8, **options: object) -> nn.Module:
    return nn.Conv2d(inputs, outputs, **{'kernel_size': 1, 'bias': False, **options})


def counts(graph: Graph) -> Counter:
    return Counter(node.primitive for node in graph.nodes)


# -- gates

GATES = {
    'sigmoid': torch.sigmoid,
    'hard sigmoid': nn.functional.hardsigmoid,
    'hard sigmoid by hand': lambda x: nn.functional.relu6(x + 3) / 6,
    'tanh': torch.tanh,
}


@pytest.mark.parametrize('gate', GATES.values(), ids=GATES)
@pytest.mark.parametrize('turned', [False, True])
def test_squeeze_and_excite_is_a_gate_and_its_mean_no_pooling(gate, turned):
    def compute(net, x):
        x = net.a(x)
        scale = gate(net.se(x.mean((2, 3), keepdim=True)))
        return net.b(x * scale if turned else scale * x).mean((2, 3))

    graph = read(compute, a=conv(3), se=conv(), b=conv())
    assert labels(graph) == ['input', 'a.weight', 'se.weight', 'cse', 'b.weight', 'glob_avg']
    assert {'a.weight>se.weight', 'se.weight>cse', 'a.weight>cse', 'cse>b.weight'} <= edges(graph)


ACTIVATIONS = {
    'silu': nn.functional.silu,
    'silu by hand': lambda x: x * x.sigmoid(),
    'hard swish by hand': lambda x: nn.functional.relu6(x + 3) / 6 * x,
    'quick gelu': lambda x: x * torch.sigmoid(1.702 * x),
    'mish by hand': lambda x: x * torch.tanh(nn.functional.softplus(x)),
    'gelu by hand': lambda x: 0.5 * x * (1 + torch.tanh(0.8 * (x + 0.04 * x**3))),
    'square': lambda x: x * x,
}


@pytest.mark.parametrize('activation', ACTIVATIONS.values(), ids=ACTIVATIONS)
def test_an_activation_is_no_gate(activation):
    graph = read(lambda net, x: net.b(activation(net.a(x))), a=conv(3), b=conv())
    assert labels(graph) == ['input', 'a.weight', 'b.weight']


def test_a_product_without_a_bounded_factor_is_no_gate():
    graph = read(lambda net, x: net.c(net.a(x) * net.b(x)), a=conv(3), b=conv(3), c=conv())
    assert Primitive.CSE not in counts(graph)
    assert {'a.weight>c.weight', 'b.weight>c.weight'} <= edges(graph)


@pytest.mark.parametrize('axes', [(2, 3), (1, 2, 3), (1,)])
def test_a_mean_that_a_normalisation_takes_is_no_pooling(axes):
    def compute(net, x):
        x = net.a(x)
        x = x - x.mean(axes, keepdim=True)
        return net.b(x * (x.pow(2).mean(axes, keepdim=True) + 1e-6).rsqrt())

    assert labels(read(compute, a=conv(3), b=conv())) == ['input', 'a.weight', 'b.weight']


def test_a_pooling_that_leads_elsewhere_too_stays():
    def compute(net, x):
        x = net.a(x)
        mean = x.mean((2, 3), keepdim=True)
        return net.b(x * net.se(mean).sigmoid()) + mean

    assert counts(read(compute, a=conv(3), se=conv(), b=conv()))[Primitive.GLOB_AVG] == 1


# -- attention


class Attention(nn.Module):
    """Attention in plain or fused form, from one projection or from three."""

    def __init__(self, fused: bool, joint: bool, dropout: float = 0.0) -> None:
        super().__init__()
        self.fused, self.dropout = fused, dropout
        self.qkv = nn.Linear(8, 24) if joint else nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.proj = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        joint = isinstance(self.qkv, nn.Linear)
        q, k, v = self.qkv(x).chunk(3, -1) if joint else (layer(x) for layer in self.qkv)
        if self.fused:
            out = nn.functional.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout)
        else:
            weights = ((q * 8**-0.5) @ k.transpose(-2, -1)).softmax(-1)
            out = nn.functional.dropout(weights, self.dropout) @ v
        return self.proj(out)


def attention_graph(**options: object) -> Graph:
    return read(
        lambda net, x: net.attention(net.stem(x).flatten(2).transpose(1, 2)).mean(1),
        stem=conv(3),
        attention=Attention(**options),
    )


@pytest.mark.parametrize('joint', [True, False])
def test_attention_is_the_same_however_it_is_computed(joint):
    plain = attention_graph(fused=False, joint=joint)
    assert counts(plain)[Primitive.MSA] == 1
    for options in ({'fused': True}, {'fused': True, 'dropout': 0.5}, {'fused': False, 'dropout': 0.5}):
        assert same_graph(attention_graph(joint=joint, **options), plain)


def test_values_reach_the_output_through_the_softmax_only():
    graph = attention_graph(fused=True, joint=True)
    assert labels(graph)[2:-1] == [
        'attention.qkv.weight',
        'attention.qkv.bias',
        'msa',
        'attention.proj.weight',
        'attention.proj.bias',
    ]
    assert len(graph.edges_E2) == len(graph) - 1, 'a chain'
    graph = attention_graph(fused=True, joint=False)
    assert {f'attention.qkv.{index}.bias>msa' for index in range(3)} <= edges(graph)


@pytest.mark.parametrize('rules', ['auto', 'operators'])
@pytest.mark.parametrize('name', ['test_vit', 'test_vit2', 'test_vit_relpos', 'test_maxvit', 'swin_s3_tiny_224'])
def test_transformers_have_one_graph_with_every_kernel_rate_and_mode(name, rules):
    with torch.device('meta'):
        expected = trace(timm.create_model(name), rules=rules)
        assert counts(expected)[Primitive.MSA] > 0
        set_fused_attn(False)
        try:
            plain = timm.create_model(name)
        finally:
            set_fused_attn(True)
        dropping = timm.create_model(name, drop_rate=0.2, drop_path_rate=0.2)
    assert same_graph(trace(plain, rules=rules), expected)
    assert same_graph(trace(dropping, rules=rules), expected)
    assert same_graph(trace(dropping.eval(), rules=rules), expected)


def test_a_softmax_over_channels_is_no_attention():
    graph = read(lambda net, x: net.a(x).softmax(1), a=conv(3))
    assert Primitive.MSA not in counts(graph)


# -- layers


@pytest.mark.parametrize(
    ('layer', 'primitive'),
    [
        (conv(3, kernel_size=3), Primitive.CONV),
        (conv(3, kernel_size=3, dilation=2), Primitive.CONV),
        (conv(3, 6, groups=3), Primitive.SEP_CONV),
        (conv(3, 3, groups=3, kernel_size=3), Primitive.SEP_CONV),
        (conv(3, 3, groups=3, kernel_size=3, dilation=2), Primitive.DIL_CONV),
        (conv(3, 3, groups=3, kernel_size=3, dilation=(2, 1)), Primitive.SEP_CONV),
        (nn.ConvTranspose2d(3, 8, 3, bias=False), Primitive.CONV),
    ],
    ids=lambda value: '' if isinstance(value, nn.Module) else value.label,
)
def test_a_convolution_is_what_its_groups_and_dilation_make_it(layer, primitive):
    graph = read(lambda net, x: net.a(x), a=layer)
    assert [node.primitive for node in graph.nodes] == [Primitive.INPUT, primitive]
    assert graph.nodes[1].shape == tuple(layer.weight.shape)


def test_other_dimensions_are_known_too():
    graph = read(
        lambda net, x: net.c(net.b(net.a(x).flatten(2)).unsqueeze(-1).unsqueeze(-1)).mean((2, 3, 4)),
        a=conv(3),
        b=nn.Conv1d(8, 8, 3),
        c=nn.Conv3d(8, 4, 1),
    )
    assert labels(graph) == ['input', 'a.weight', 'b.weight', 'b.bias', 'c.weight', 'c.bias', 'glob_avg']
    assert graph.nodes[2].shape == (8, 8, 3, 1)


class ByHand(nn.Module):
    """A layer norm over channels, written out."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(1, keepdim=True)
        x = (x - mean) / ((x - mean) ** 2).mean(1, keepdim=True).add(1e-6).sqrt()
        return x * self.norm.weight[:, None, None] + self.norm.bias[:, None, None]


def test_a_layer_norm_is_the_same_in_either_layout():
    def compute(net, x):
        x = net.a(x)
        x = net.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) if type(net.norm) is nn.LayerNorm else net.norm(x)
        return net.b(x).mean((2, 3))

    graphs = [read(compute, a=conv(3), norm=norm, b=conv()) for norm in (nn.LayerNorm(8), LayerNorm2d(8), ByHand())]
    for graph in graphs:
        assert [node.primitive.label for node in graph.nodes] == ['input', 'conv', 'ln', 'conv', 'glob_avg']
        assert graph.nodes[2].norm_bias is not None
        assert same_graph(graph, graphs[0])


@pytest.mark.parametrize(
    ('norm', 'primitive', 'with_bias'),
    [
        (nn.BatchNorm2d(8), Primitive.BN, True),
        (nn.SyncBatchNorm(8), Primitive.BN, True),
        (nn.InstanceNorm2d(8, affine=True), Primitive.BN, True),
        (nn.GroupNorm(2, 8), Primitive.LN, True),
        (timm.layers.RmsNorm2d(8), Primitive.LN, False),
        (timm.layers.BatchNormAct2d(8), Primitive.BN, True),
        (timm.layers.GroupNormAct(8, 2), Primitive.LN, True),
        (timm.layers.LayerNormAct2d(8), Primitive.LN, True),
        (timm.layers.FrozenBatchNormAct2d(8), None, False),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else '',
)
def test_a_norm_is_known_by_what_it_is_and_predicts_its_bias(norm, primitive, with_bias):
    graph = read(lambda net, x: net.b(net.norm(net.a(x))), a=conv(3), norm=norm, b=conv())
    found = [node for node in graph.nodes if node.parameter and node.parameter.startswith('norm')]
    assert [node.primitive for node in found] == ([primitive] if primitive is not None else [])
    assert [node.norm_bias for node in found] == (['norm.bias' if with_bias else None] if found else [])


@pytest.mark.parametrize(
    'layer', [StdConv2d(8, 8, 3), ScaledStdConv2d(8, 8, 3)], ids=lambda layer: type(layer).__name__
)
def test_a_convolution_that_standardises_its_weight_is_a_convolution(layer):
    """Its gain starts from one, and stays there: it is no weight."""
    graph = read(lambda net, x: net.b(net.a(x)), a=conv(3), b=layer)
    assert labels(graph) == ['input', 'a.weight', 'b.weight', *(['b.bias'] if layer.bias is not None else [])]
    assert graph.kept == ({'b.gain': 'layer scale or gain'} if hasattr(layer, 'gain') else {})


def test_a_layer_that_is_used_again_has_several_nodes_and_one_row(ghn):
    graph = read(lambda net, x: net.b(net.a(net.a(net.a(x)))), a=conv(3, 3), b=conv(3))
    assert labels(graph) == ['input', 'a.weight', 'a.weight', 'a.weight', 'b.weight']
    assert graph.is_acyclic
    plan = plan_parameters(graph, ghn.config, head='predict')
    assert [(row.name, row.node) for row in plan] == [('a.weight', 1), ('b.weight', 4)]


def test_a_layer_scale_is_transparent_and_kept():
    net = Net(lambda net, x: net.b(net.a(x) * net.gamma), a=conv(3), b=conv())
    net.gamma = nn.Parameter(torch.ones(8, 1, 1))
    graph = trace(net, input_size=SIZE, rules='operators')
    assert labels(graph) == ['input', 'a.weight', 'b.weight']
    assert graph.kept == {'gamma': 'layer scale or gain'}


def test_positions_that_are_added_to_a_slice_in_place_are_positions():
    """As NaFlexViT adds them; what other values a slice takes are no positions."""

    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Conv2d(3, 8, 8, 8), nn.Linear(8, 10)
            self.pos_embed, self.border = nn.Parameter(torch.zeros(1, 16, 8)), nn.Parameter(torch.zeros(1, 16, 8))

        def forward(self, x):
            x = self.embed(x).flatten(2).transpose(1, 2)
            x[:, :16].index_add_(0, torch.arange(len(x), device=x.device), self.pos_embed.expand(len(x), -1, -1))
            x[:, 16:32] = self.border
            return self.head(x.mean(1))

    graph = trace(Tokens(), input_size=64, rules='operators')
    assert graph.nodes[graph.node_of['pos_embed']].primitive is Primitive.POS_ENC
    assert 'border' in graph.kept


def test_a_sum_has_different_inputs():
    """x + x is one input, x + 1 too."""
    graph = read(lambda net, x: net.b(net.a(x) + net.a(x).detach() + 1), a=conv(3), b=conv())
    assert Primitive.SUM not in counts(graph)
    graph = read(lambda net, x: (lambda y: y + net.b(y))(net.a(x)), a=conv(3), b=conv())
    assert edges(graph) == {'input>a.weight', 'a.weight>b.weight', 'a.weight>sum', 'b.weight>sum'}


@pytest.mark.parametrize(
    ('pool', 'primitive', 'shape'),
    [
        (nn.MaxPool2d(2), Primitive.MAX_POOL, (1, 1, 2, 2)),
        (nn.AvgPool2d((2, 3)), Primitive.AVG_POOL, (1, 1, 2, 3)),
        (nn.AdaptiveAvgPool2d(1), Primitive.GLOB_AVG, None),
        (nn.AdaptiveAvgPool2d(2), Primitive.GLOB_AVG, None),
    ],
    ids=['max', 'average', 'global', 'adaptive'],
)
def test_a_pooling_is_a_node_of_its_kind(pool, primitive, shape):
    graph = read(lambda net, x: net.b(net.pool(net.a(x))), a=conv(3), pool=pool, b=conv())
    assert [(node.primitive, node.shape) for node in graph.nodes][2] == (primitive, shape)


# -- any network of a grammar


class Residual(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class Branches(nn.Module):
    def __init__(self, width: int, *bodies: nn.Module) -> None:
        super().__init__()
        self.bodies = nn.ModuleList(bodies)
        self.join = nn.Conv2d(width * len(bodies), width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.join(torch.cat([body(x) for body in self.bodies], 1))


class Excite(nn.Module):
    def __init__(self, width: int, pool: bool, gate: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.fc, self.pool, self.gate = nn.Conv2d(width, width, 1), pool, gate

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(self.fc(x.mean((2, 3), keepdim=True) if self.pool else x))


class Attend(nn.Module):
    def __init__(self, width: int, fused: bool, position: bool) -> None:
        super().__init__()
        self.norm, self.qkv, self.proj = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fused = fused
        self.pos_embed = nn.Parameter(torch.zeros(1, SIZE * SIZE, width)) if position else None

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        if self.pos_embed is not None:
            tokens = tokens + self.pos_embed
        q, k, v = self.qkv(self.norm(tokens)).chunk(3, -1)
        if self.fused:
            out = nn.functional.scaled_dot_product_attention(q, k, v)
        else:
            out = (q @ k.transpose(-2, -1)).softmax(-1) @ v
        return x + self.proj(out).transpose(1, 2).reshape(x.shape)


WIDTH = 8


def blocks() -> st.SearchStrategy[nn.Module]:
    """Blocks that keep the shape of their data."""
    convs = st.builds(
        lambda kernel, groups, dilation, bias, kind: kind(
            WIDTH, WIDTH, kernel, padding=dilation * (kernel // 2), groups=groups, dilation=dilation, bias=bias
        ),
        st.sampled_from([1, 3, 5]),
        st.sampled_from([1, 2, WIDTH]),
        st.sampled_from([1, 2]),
        st.booleans(),
        st.sampled_from([nn.Conv2d, ScaledStdConv2d]),
    )
    norms = st.sampled_from([nn.BatchNorm2d, LayerNorm2d, lambda width: nn.GroupNorm(2, width)]).map(lambda n: n(WIDTH))
    others = st.sampled_from(
        [nn.ReLU, nn.SiLU, nn.Hardswish, nn.GELU, nn.Dropout, nn.PReLU, nn.Identity, lambda: nn.AvgPool2d(3, 1, 1)]
    ).map(lambda make: make())
    leaves = st.one_of(
        convs,
        norms,
        others,
        st.builds(Excite, st.just(WIDTH), st.booleans(), st.sampled_from([torch.sigmoid, nn.functional.hardsigmoid])),
        st.builds(Attend, st.just(WIDTH), st.booleans(), st.booleans()),
    )
    return st.recursive(
        leaves,
        lambda inner: st.one_of(
            st.lists(inner, min_size=1, max_size=3).map(lambda layers: nn.Sequential(*layers)),
            inner.map(Residual),
            st.lists(inner, min_size=2, max_size=3).map(lambda bodies: Branches(WIDTH, *bodies)),
            inner.map(lambda layer: nn.Sequential(layer, layer)),
        ),
        max_leaves=6,
    )


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(body=st.lists(blocks(), min_size=1, max_size=3), rules=st.sampled_from(['auto', 'operators']))
def test_any_network_has_a_sound_graph_and_a_complete_plan(body, rules):
    model = nn.Sequential(
        nn.Conv2d(3, WIDTH, 3, padding=1), *body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(WIDTH, 1000)
    )
    graph = trace(model, input_size=SIZE, rules=rules)
    plan = plan_parameters(graph, CONFIG)
    assert [row.name for row in plan] == [name for name, _ in model.named_parameters()]
    assert all(row.predicted or row.reason for row in plan)
    assert graph.is_acyclic
    reached = graph.distances_NN(10_000)[graph.start] > 0
    apart = {node.label for node, found in zip(graph.nodes, reached.tolist(), strict=True) if not found}
    assert {name for name in apart if not name.endswith('pos_embed')} == {'input'}
    assert graph.nodes[-1].label.endswith('.bias')
    assert not flaws_of(graph, Flow.of(record(model, input_size=SIZE)))
