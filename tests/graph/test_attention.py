"""What is an attention, and which parameters are its tables of relative positions, as the operators tell."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import timm
import torch
from isomorphism import Net, counts, edges, zeros
from torch import Tensor, nn

from timm_ghn import Graph, trace
from timm_ghn.graph import Primitive
from timm_ghn.graph.attention import Attention
from timm_ghn.graph.flow import Flow
from timm_ghn.graph.trace import record

SIDE = 4
TOKENS = SIDE * SIDE
TABLE = 'relative position table'
INDEX = torch.zeros(TOKENS, TOKENS, dtype=torch.int64)

Form = Callable[[Net, Tensor, Tensor], Tensor]


def unchanged(net: Net, values: Tensor, q: Tensor) -> Tensor:
    return values


def attending(*shape: int, logits: Form = unchanged, weights: Form = unchanged) -> Net:
    """Attention whose logits or weights are computed in some form, with a parameter of some shape."""

    def compute(net: Net, x: Tensor) -> Tensor:
        x = net.stem(x).flatten(2).transpose(1, 2)
        q, k, v = (layer(x).unflatten(2, (2, 4)).transpose(1, 2) for layer in (net.q, net.k, net.v))
        found = weights(net, logits(net, q @ k.transpose(-2, -1) * 0.5, q).softmax(-1), q)
        return net.head((found @ v).transpose(1, 2).flatten(2).mean(1))

    layers = {name: nn.Linear(8, 8) for name in ('q', 'k', 'v')}
    heads = nn.Conv2d(2, 2, 1)
    return Net(compute, stem=nn.Conv2d(3, 8, 1), **layers, heads=heads, zeta=zeros(*shape), head=nn.Linear(8, 10))


def graph_of(model: nn.Module, rules: str = 'operators') -> Graph:
    return trace(model, input_size=SIDE, rules=rules)


def found_in(model: nn.Module) -> Attention:
    return Attention.of(Flow.of(record(model, input_size=SIDE)))


def in_place(net: Net, logits: Tensor, q: Tensor) -> Tensor:
    """As MViT adds what it multiplied with the queries."""
    relative = torch.einsum('bhnc,nmc->bhnm', q, net.zeta[INDEX])
    logits[:, :, 1:, 1:] = logits[:, :, 1:, 1:] + relative[:, :, 1:, 1:]
    return logits


def shifted(net: Net, logits: Tensor, q: Tensor) -> Tensor:
    """As halo and bottleneck attention multiply, pad and slice."""
    x = nn.functional.pad(q @ net.zeta.t(), [0, 1]).flatten(2)
    return logits + nn.functional.pad(x, [0, TOKENS]).reshape(*x.shape[:2], -1, TOKENS)[:, :, :TOKENS]


TABLES: dict[str, tuple[tuple[int, ...], Form]] = {
    'added': ((1, 2, TOKENS, TOKENS), lambda net, logits, q: logits + net.zeta),
    'gathered': ((49, 2), lambda net, logits, q: logits + net.zeta[INDEX].permute(2, 0, 1).unsqueeze(0)),
    'behind talking heads': ((2, 49), lambda net, logits, q: net.heads(logits) + net.zeta[:, INDEX]),
    'under a mask': (
        (2, 49),
        lambda net, logits, q: (logits + net.zeta[:, INDEX]).masked_fill(INDEX.bool().to(logits.device), -1e9),
    ),
    'with a soft cap': ((2, 49), lambda net, logits, q: 50 * torch.tanh((logits + net.zeta[:, INDEX]) / 50)),
    'concatenated with zeros': (
        (2, 49),
        lambda net, logits, q: logits + torch.cat([torch.zeros(2, 1, TOKENS), net.zeta[:, INDEX][:, 1:]], 1),
    ),
    'multiplied and added in place': ((49, 4), in_place),
    'multiplied, padded and sliced': ((TOKENS, 4), shifted),
}


@pytest.mark.parametrize('form', TABLES)
def test_what_is_added_to_the_logits_is_kept_as_a_table_of_relative_positions(form):
    shape, logits = TABLES[form]
    model = attending(*shape, logits=logits)
    assert found_in(model).tables == {'zeta'}
    for rules in ('operators', 'published'):
        graph = graph_of(model, rules)
        assert graph.kept['zeta'] == TABLE
        assert 'zeta' not in graph.node_of
    assert counts(graph_of(model))[Primitive.MSA] == 1


def test_other_parameters_are_no_tables():
    weight = attending(4, TOKENS, logits=lambda net, logits, q: q @ net.zeta)
    gain = attending(2, 1, 1, logits=lambda net, logits, q: logits * net.zeta)
    assert not found_in(weight).tables
    assert not found_in(gain).tables

    def pooling(net: Net, x: Tensor) -> Tensor:
        x = net.stem(x) + net.zeta
        return net.head((x.flatten(2) @ net.gate(x).flatten(2).softmax(-1).transpose(1, 2)).flatten(1))

    layers = {'stem': nn.Conv2d(3, 8, 1), 'gate': nn.Conv2d(8, 1, 1), 'head': nn.Linear(8, 10)}
    graph = graph_of(Net(pooling, **layers, zeta=zeros(1, 8, SIDE, SIDE)))
    assert graph.nodes[graph.node_of['zeta']].primitive is Primitive.POS_ENC, 'added to the image'


@pytest.mark.parametrize(
    ('name', 'leaves'),
    [
        ('efficientformerv2_s0', {'attention_biases'}),
        ('mvitv2_tiny', {'rel_pos_h', 'rel_pos_w'}),
        ('halonet26t', {'height_rel', 'width_rel'}),
        ('swin_tiny_patch4_window7_224', {'relative_position_bias_table'}),
    ],
)
def test_timms_relative_positions_are_all_kept(name, leaves):
    with torch.device('meta'):
        model = timm.create_model(name)
    named = {parameter for parameter, _ in model.named_parameters() if parameter.rpartition('.')[2] in leaves}
    graph = trace(model, rules='operators')
    assert {parameter for parameter, reason in graph.kept.items() if reason == TABLE} == named
    assert named


# -- the weights of an attention


def mixed(net: Net, weights: Tensor, q: Tensor) -> Tensor:
    """As ConViT: two attentions, mixed by a gate and normalised."""
    gate = net.zeta.sigmoid()
    weights = (1 - gate) * weights + gate * (q @ q.transpose(-2, -1)).softmax(-1)
    return weights / weights.sum(-1, keepdim=True)


def test_two_softmaxes_that_are_mixed_are_two_attentions_with_the_same_values():
    graph = graph_of(attending(1, weights=mixed))
    assert counts(graph)[Primitive.MSA] == 2
    assert sum(graph.nodes[u].parameter == 'v.bias' for u, _ in graph.edges_E2.tolist()) == 2
    assert {'v.bias>msa', 'msa>sum', 'sum>glob_avg'} <= edges(graph)
    assert 'v.bias>glob_avg' not in edges(graph)


def test_weights_that_are_multiplied_by_data_are_an_attention_and_no_gate():
    """As in EfficientViM: before the product with the values."""
    graph = graph_of(attending(1, weights=lambda net, weights, q: weights * q.mean(-1, keepdim=True)))
    assert counts(graph)[Primitive.MSA] == 1
    assert counts(graph)[Primitive.CSE] == 0
    assert [edge for edge in edges(graph) if edge.endswith('>glob_avg')] == ['msa>glob_avg']


def test_a_gate_over_branches_is_no_attention():
    """Selective kernels, then a layer."""

    def compute(net: Net, x: Tensor) -> Tensor:
        branches = torch.stack([net.a(x), net.b(x)], 1)
        gate = net.fc(branches.sum(1).mean((2, 3), keepdim=True)).view(-1, 2, 8, 1, 1).softmax(1)
        return net.head((branches * gate).sum(1)).mean((2, 3))

    layers = {'a': nn.Conv2d(3, 8, 1), 'b': nn.Conv2d(3, 8, 3, padding=1), 'fc': nn.Conv2d(8, 16, 1)}
    graph = graph_of(Net(compute, **layers, head=nn.Conv2d(8, 10, 1)))
    assert counts(graph)[Primitive.MSA] == 0
    assert counts(graph)[Primitive.CSE] == 1


def test_values_that_come_from_the_same_attention_close_no_circle():
    def compute(net: Net, x: Tensor) -> Tensor:
        x = net.stem(x).flatten(2).transpose(1, 2)
        weights = (net.q(x) @ net.k(x).transpose(-2, -1)).softmax(-1)
        return net.head((weights @ net.v(weights @ x)).mean(1))

    layers = {name: nn.Linear(8, 8) for name in ('q', 'k', 'v', 'head')}
    graph = graph_of(Net(compute, stem=nn.Conv2d(3, 8, 1), **layers))
    assert graph.is_acyclic
    assert counts(graph)[Primitive.MSA] == 1
    assert 'msa>v.weight' in edges(graph)


def test_a_softmax_that_weighs_nothing_is_no_attention():
    nothing = Attention(frozenset(), frozenset(), frozenset())
    assert found_in(nn.Sequential(nn.Conv2d(3, 8, 1), nn.Softmax(1))) == nothing
