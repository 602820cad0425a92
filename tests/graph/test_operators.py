"""The operator rules: what a network computes decides, not what its parts are called."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import timm
import torch
from hypothesis import given, settings, strategies as st
from isomorphism import Net, counts, edges, labels, same_graph, zeros
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


def read(compute: Callable[[nn.Module, Tensor], Tensor], **members: nn.Module | nn.Parameter) -> Graph:
    return trace(Net(compute, **members), input_size=SIZE, rules='operators')


def conv(inputs: int = 8, outputs: int = 8, **options: object) -> nn.Module:
    return nn.Conv2d(inputs, outputs, **{'kernel_size': 1, 'bias': False, **options})


# -- gates

GATES = {
    'sigmoid': torch.sigmoid,
    'hard sigmoid': nn.functional.hardsigmoid,
    'hard sigmoid by hand': lambda x: nn.functional.relu6(x + 3) / 6,
    'tanh': torch.tanh,
}


@pytest.mark.parametrize('gate', GATES.values(), ids=GATES)
def test_squeeze_and_excite_is_a_gate_and_its_mean_no_pooling(gate):
    for turned in (False, True):

        def compute(net, x, turned=turned):
            x = net.a(x)
            scale = gate(net.se(x.mean((2, 3), keepdim=True)))
            return net.b(x * scale if turned else scale * x).mean((2, 3))

        graph = read(compute, a=conv(3), se=conv(), b=conv())
        assert labels(graph) == ['input', 'a.weight', 'se.weight', 'cse', 'b.weight', 'glob_avg']
        assert {'a.weight>se.weight', 'se.weight>cse', 'a.weight>cse', 'cse>b.weight'} <= edges(graph)


def standardised(*axes: int) -> Callable[[Tensor], Tensor]:
    def compute(x: Tensor) -> Tensor:
        x = x - x.mean(axes, keepdim=True)
        return x * (x.pow(2).mean(axes, keepdim=True) + 1e-6).rsqrt()

    return compute


TRANSPARENT = {
    'silu by hand': lambda x: x * x.sigmoid(),
    'hard swish by hand': lambda x: nn.functional.relu6(x + 3) / 6 * x,
    'mish by hand': lambda x: x * torch.tanh(nn.functional.softplus(x)),
    'gelu by hand': lambda x: 0.5 * x * (1 + torch.tanh(0.8 * (x + 0.04 * x**3))),
    'square': lambda x: x * x,
    **{f'a norm over {axes}': standardised(*axes) for axes in ((2, 3), (1, 2, 3), (1,))},
}


@pytest.mark.parametrize('form', TRANSPARENT.values(), ids=TRANSPARENT)
def test_an_activation_is_no_gate_and_the_mean_of_a_norm_no_pooling(form):
    graph = read(lambda net, x: net.b(form(net.a(x))), a=conv(3), b=conv())
    assert labels(graph) == ['input', 'a.weight', 'b.weight']


def test_a_product_without_a_bounded_factor_is_no_gate():
    graph = read(lambda net, x: net.c(net.a(x) * net.b(x)), a=conv(3), b=conv(3), c=conv())
    assert Primitive.CSE not in counts(graph)
    assert {'a.weight>c.weight', 'b.weight>c.weight'} <= edges(graph)


def test_a_pooling_that_leads_elsewhere_too_stays():
    def compute(net, x):
        x = net.a(x)
        mean = x.mean((2, 3), keepdim=True)
        return net.b(x * net.se(mean).sigmoid()) + mean

    assert counts(read(compute, a=conv(3), se=conv(), b=conv()))[Primitive.GLOB_AVG] == 1


# -- attention


def attention_graph(*, fused: bool, joint: bool, dropout: float = 0.0) -> Graph:
    """Attention in plain or fused form, from one projection or from three."""

    def compute(net: Net, x: Tensor) -> Tensor:
        x = net.stem(x).flatten(2).transpose(1, 2)
        q, k, v = net.qkv(x).chunk(3, -1) if joint else (layer(x) for layer in net.qkv)
        if fused:
            out = nn.functional.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
        else:
            out = nn.functional.dropout(((q * 8**-0.5) @ k.transpose(-2, -1)).softmax(-1), dropout) @ v
        return net.proj(out).mean(1)

    qkv = nn.Linear(8, 24) if joint else nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
    return read(compute, stem=conv(3), qkv=qkv, proj=nn.Linear(8, 8))


@pytest.mark.parametrize('joint', [True, False])
def test_attention_is_the_same_however_it_is_computed(joint):
    """The values reach the output through the softmax only."""
    plain = attention_graph(fused=False, joint=joint)
    for options in ({'fused': True}, {'fused': True, 'dropout': 0.5}, {'fused': False, 'dropout': 0.5}):
        assert same_graph(attention_graph(joint=joint, **options), plain)
    if joint:
        assert len(plain.edges_E2) == len(plain) - 1, 'a chain'
    else:
        assert {f'qkv.{index}.bias>msa' for index in range(3)} <= edges(plain)
    assert counts(plain)[Primitive.MSA] == 1


@pytest.mark.parametrize('name', ['test_vit', 'test_vit_relpos', 'test_maxvit'])
def test_transformers_have_one_graph_with_every_kernel_rate_and_mode(name):
    with torch.device('meta'):
        model = timm.create_model(name)
        set_fused_attn(False)
        try:
            plain = timm.create_model(name)
        finally:
            set_fused_attn(True)
        dropping = timm.create_model(name, drop_rate=0.2, drop_path_rate=0.2)
    for rules in ('auto', 'operators'):
        expected = trace(model, rules=rules)
        assert counts(expected)[Primitive.MSA] > 0
        assert same_graph(trace(plain, rules=rules), expected)
        assert same_graph(trace(dropping, rules=rules), expected)
    assert same_graph(trace(dropping.eval(), rules=rules), expected)


# -- layers


@pytest.mark.parametrize(
    ('layer', 'primitive', 'shape'),
    [
        (conv(3, kernel_size=3, dilation=2), Primitive.CONV, (8, 3, 3, 3)),
        (conv(3, 6, groups=3), Primitive.SEP_CONV, (6, 1, 1, 1)),
        (conv(3, 3, groups=3, kernel_size=3, dilation=2), Primitive.DIL_CONV, (3, 1, 3, 3)),
        (conv(3, 3, groups=3, kernel_size=3, dilation=(2, 1)), Primitive.SEP_CONV, (3, 1, 3, 3)),
        (nn.ConvTranspose2d(3, 8, 3, bias=False), Primitive.CONV, (3, 8, 3, 3)),
        (nn.Sequential(nn.Flatten(2), nn.Conv1d(3, 8, 5, bias=False)), Primitive.CONV, (8, 3, 5, 1)),
        (nn.MaxPool2d(2), Primitive.MAX_POOL, (1, 1, 2, 2)),
        (nn.AvgPool2d((2, 3)), Primitive.AVG_POOL, (1, 1, 2, 3)),
        (nn.AdaptiveAvgPool2d(1), Primitive.GLOB_AVG, None),
        (nn.AdaptiveAvgPool2d(2), Primitive.GLOB_AVG, None),
    ],
    ids=lambda value: value.name if isinstance(value, Primitive) else '',
)
def test_a_layer_is_a_node_of_its_kind(layer, primitive, shape):
    graph = read(lambda net, x: net.a(net.stem(x)), stem=conv(3, 3), a=layer)
    assert [(node.primitive, node.shape) for node in graph.nodes[2:]] == [(primitive, shape)]


def by_hand(net: Net, x: Tensor) -> Tensor:
    """A layer norm over channels, written out."""
    mean = x.mean(1, keepdim=True)
    x = (x - mean) / ((x - mean) ** 2).mean(1, keepdim=True).add(1e-6).sqrt()
    return x * net.norm.weight[:, None, None] + net.norm.bias[:, None, None]


def test_a_layer_norm_is_the_same_in_either_layout():
    def permuted(net: Net, x: Tensor) -> Tensor:
        return net.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    forms = ((nn.LayerNorm(8), permuted), (LayerNorm2d(8), lambda net, x: net.norm(x)), (nn.LayerNorm(8), by_hand))
    for norm, form in forms:
        graph = read(lambda net, x, form=form: net.b(form(net, net.a(x))).mean((2, 3)), a=conv(3), norm=norm, b=conv())
        assert labels(graph) == ['input', 'a.weight', 'norm.weight', 'b.weight', 'glob_avg']
        assert len(graph.edges_E2) == 4
        assert (graph.nodes[2].primitive, graph.nodes[2].norm_bias) == (Primitive.LN, 'norm.bias')


@pytest.mark.parametrize(
    ('norm', 'expected'),
    [
        (nn.SyncBatchNorm(8), [(Primitive.BN, 'norm.bias')]),
        (nn.InstanceNorm2d(8, affine=True), [(Primitive.BN, 'norm.bias')]),
        (nn.GroupNorm(2, 8), [(Primitive.LN, 'norm.bias')]),
        (timm.layers.RmsNorm2d(8), [(Primitive.LN, None)]),
        (timm.layers.BatchNormAct2d(8), [(Primitive.BN, 'norm.bias')]),
        (timm.layers.FrozenBatchNormAct2d(8), []),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else '',
)
def test_a_norm_is_known_by_what_it_is_and_predicts_its_bias(norm, expected):
    graph = read(lambda net, x: net.b(net.norm(net.a(x))), a=conv(3), norm=norm, b=conv())
    assert [(node.primitive, node.norm_bias) for node in graph.nodes if node.label.startswith('norm')] == expected


def test_a_convolution_that_standardises_its_weight_is_a_convolution():
    """Its gain starts from one, and stays there: it is no weight."""
    for layer in (StdConv2d(8, 8, 3), ScaledStdConv2d(8, 8, 3)):
        graph = read(lambda net, x: net.b(net.a(x)), a=conv(3), b=layer)
        assert labels(graph) == ['input', 'a.weight', 'b.weight', *(['b.bias'] if layer.bias is not None else [])]
        assert graph.kept == ({'b.gain': 'layer scale or gain'} if hasattr(layer, 'gain') else {})


def test_a_layer_that_is_used_again_has_several_nodes_and_one_row(ghn):
    graph = read(lambda net, x: net.b(net.a(net.a(net.a(x)))), a=conv(3, 3), b=conv(3))
    assert labels(graph) == ['input', 'a.weight', 'a.weight', 'a.weight', 'b.weight']
    assert graph.is_acyclic
    plan = plan_parameters(graph, ghn.config, head='predict')
    assert [(row.name, row.node) for row in plan] == [('a.weight', 1), ('b.weight', 4)]


def test_positions_that_are_added_to_a_slice_in_place_are_positions():
    """As NaFlexViT adds them; other values that are written to a slice are no positions."""

    def compute(net: Net, x: Tensor) -> Tensor:
        x = net.embed(x).flatten(2).transpose(1, 2)
        x[:, :16].index_add_(0, torch.arange(len(x), device=x.device), net.pos_embed.expand(len(x), -1, -1))
        x[:, 16:32] = net.border
        return net.head(x.mean(1))

    members = {'pos_embed': zeros(1, 16, 8), 'border': zeros(1, 16, 8), 'head': nn.Linear(8, 10)}
    graph = read(compute, embed=nn.Conv2d(3, 8, 2, 2), **members)
    assert graph.nodes[graph.node_of['pos_embed']].primitive is Primitive.POS_ENC
    assert 'border' in graph.kept


def test_a_sum_has_different_inputs():
    """x + x is one input, x + 1 too."""
    graph = read(lambda net, x: net.b(net.a(x) + net.a(x).detach() + 1), a=conv(3), b=conv())
    assert Primitive.SUM not in counts(graph)
    graph = read(lambda net, x: (lambda y: y + net.b(y))(net.a(x)), a=conv(3), b=conv())
    assert edges(graph) == {'input>a.weight', 'a.weight>b.weight', 'a.weight>sum', 'b.weight>sum'}


# -- any network of a grammar


def residual(body: nn.Module) -> nn.Module:
    return Net(lambda net, x: x + net.body(x), body=body)


def branches(bodies: list[nn.Module]) -> nn.Module:
    def compute(net: Net, x: Tensor) -> Tensor:
        return net.join(torch.cat([body(x) for body in net.bodies], 1))

    return Net(compute, bodies=nn.ModuleList(bodies), join=nn.Conv2d(WIDTH * len(bodies), WIDTH, 1))


def excite(pool: bool, gate: Callable[[Tensor], Tensor]) -> nn.Module:
    def compute(net: Net, x: Tensor) -> Tensor:
        return x * gate(net.fc(x.mean((2, 3), keepdim=True) if pool else x))

    return Net(compute, fc=nn.Conv2d(WIDTH, WIDTH, 1))


def attend(fused: bool, position: bool) -> nn.Module:
    def compute(net: Net, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        if position:
            tokens = tokens + net.pos_embed
        q, k, v = net.qkv(net.norm(tokens)).chunk(3, -1)
        if fused:
            out = nn.functional.scaled_dot_product_attention(q, k, v)
        else:
            out = (q @ k.transpose(-2, -1)).softmax(-1) @ v
        return x + net.proj(out).transpose(1, 2).reshape(x.shape)

    layers = {'norm': nn.LayerNorm(WIDTH), 'qkv': nn.Linear(WIDTH, 3 * WIDTH), 'proj': nn.Linear(WIDTH, WIDTH)}
    return Net(compute, pos_embed=zeros(1, SIZE * SIZE, WIDTH) if position else None, **layers)


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
        st.builds(excite, st.booleans(), st.sampled_from([torch.sigmoid, nn.functional.hardsigmoid])),
        st.builds(attend, st.booleans(), st.booleans()),
    )
    return st.recursive(
        leaves,
        lambda inner: st.one_of(
            st.lists(inner, min_size=1, max_size=3).map(lambda layers: nn.Sequential(*layers)),
            inner.map(residual),
            st.lists(inner, min_size=2, max_size=3).map(branches),
            inner.map(lambda layer: nn.Sequential(layer, layer)),
        ),
        max_leaves=6,
    )


@settings(max_examples=30, deadline=None, derandomize=True, database=None)
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
