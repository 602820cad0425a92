"""What is an attention, and which parameters are its tables of relative positions, as the operators tell."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import timm
import torch
from torch import Tensor, nn

from timm_ghn import Graph, trace
from timm_ghn.graph import Primitive
from timm_ghn.graph.attention import Attention
from timm_ghn.graph.flow import Flow
from timm_ghn.graph.trace import record

SIDE = 4
TOKENS = SIDE * SIDE
TABLE = 'relative position table'

Form = Callable[['Attending', Tensor, Tensor], Tensor]


class Attending(nn.Module):
    """Attention whose logits or weights are computed in some form, with a table that may have any name."""

    def __init__(
        self, *, shape: tuple[int, ...] = (1,), logits: Form | None = None, weights: Form | None = None
    ) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.q, self.k, self.v = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.heads = nn.Conv2d(2, 2, 1)
        self.zeta = nn.Parameter(torch.zeros(shape))
        self.head = nn.Linear(8, 10)
        self.logits, self.weights = logits, weights

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).transpose(1, 2)
        q, k, v = (layer(x).unflatten(2, (2, 4)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        logits = q @ k.transpose(-2, -1) * 0.5
        weights = (logits if self.logits is None else self.logits(self, logits, q)).softmax(-1)
        weights = weights if self.weights is None else self.weights(self, weights, q)
        return self.head((weights @ v).transpose(1, 2).flatten(2).mean(1))


def graph_of(model: nn.Module, rules: str = 'operators') -> Graph:
    return trace(model, input_size=SIDE, rules=rules)


def found_in(model: nn.Module) -> Attention:
    return Attention.of(Flow.of(record(model, input_size=SIDE)))


def count(graph: Graph, primitive: Primitive) -> int:
    return sum(node.primitive is primitive for node in graph.nodes)


def in_place(net: Attending, logits: Tensor, q: Tensor) -> Tensor:
    """As MViT adds what it multiplied with the queries."""
    relative = torch.einsum('bhnc,nmc->bhnm', q, net.zeta[torch.zeros(TOKENS, TOKENS, dtype=torch.int64)])
    logits[:, :, 1:, 1:] = logits[:, :, 1:, 1:] + relative[:, :, 1:, 1:]
    return logits


def shifted(net: Attending, logits: Tensor, q: Tensor) -> Tensor:
    """As halo and bottleneck attention multiply, pad and slice."""
    x = nn.functional.pad(q @ net.zeta.t(), [0, 1]).flatten(2)
    return logits + nn.functional.pad(x, [0, TOKENS]).reshape(*x.shape[:2], -1, TOKENS)[:, :, :TOKENS]


INDEX = torch.zeros(TOKENS, TOKENS, dtype=torch.int64)

TABLES: dict[str, tuple[tuple[int, ...], Form]] = {
    'added': ((1, 2, TOKENS, TOKENS), lambda net, logits, q: logits + net.zeta),
    'gathered': ((49, 2), lambda net, logits, q: logits + net.zeta[INDEX].permute(2, 0, 1).unsqueeze(0)),
    'before talking heads': ((2, 49), lambda net, logits, q: net.heads(logits + net.zeta[:, INDEX])),
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


@pytest.mark.parametrize('rules', ['operators', 'published'])
@pytest.mark.parametrize('form', TABLES)
def test_what_enters_the_logits_beside_queries_and_keys_is_kept_as_a_table_of_relative_positions(form, rules):
    shape, logits = TABLES[form]
    model = Attending(shape=shape, logits=logits)
    assert found_in(model).tables == {'zeta'}
    graph = graph_of(model, rules)
    assert graph.kept['zeta'] == TABLE
    assert 'zeta' not in graph.node_of
    assert count(graph_of(model), Primitive.MSA) == 1


OTHERS: dict[str, tuple[tuple[int, ...], Form]] = {
    'a weight from which logits are made': ((4, TOKENS), lambda net, logits, q: q @ net.zeta),
    'a gain of the logits': ((2, 1, 1), lambda net, logits, q: logits * net.zeta),
}


@pytest.mark.parametrize('form', OTHERS)
def test_other_parameters_of_an_attention_are_no_tables(form):
    shape, logits = OTHERS[form]
    assert not found_in(Attending(shape=shape, logits=logits)).tables


def test_positions_that_are_added_to_the_image_are_no_table_even_where_a_softmax_follows():
    class Pooling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.gate, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 1, 1), nn.Linear(8, 10)
            self.zeta = nn.Parameter(torch.zeros(1, 8, SIDE, SIDE))

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x) + self.zeta
            return self.head((x.flatten(2) @ self.gate(x).flatten(2).softmax(-1).transpose(1, 2)).flatten(1))

    graph = graph_of(Pooling())
    assert [node.primitive for node in graph.nodes if node.parameter == 'zeta'] == [Primitive.POS_ENC]


@pytest.mark.parametrize(
    ('name', 'leaves'),
    [
        ('efficientformerv2_s0', {'attention_biases'}),
        ('mvitv2_tiny', {'rel_pos_h', 'rel_pos_w'}),
        ('halonet26t', {'height_rel', 'width_rel'}),
        ('botnet26t_256', {'height_rel', 'width_rel'}),
        ('samvit_base_patch16', {'rel_pos_h', 'rel_pos_w'}),
        ('levit_128s', {'attention_biases'}),
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


def mixed(net: Attending, weights: Tensor, q: Tensor) -> Tensor:
    """As ConViT: two attentions, mixed by a gate and normalised."""
    gate = net.zeta.sigmoid()
    weights = (1 - gate) * weights + gate * (q @ q.transpose(-2, -1)).softmax(-1)
    return weights / weights.sum(-1, keepdim=True)


def scaled(net: Attending, weights: Tensor, q: Tensor) -> Tensor:
    """As EfficientViM: the weights are multiplied by data before the product with the values."""
    return weights * q.mean(-1, keepdim=True)


def edges(graph: Graph) -> set[tuple[str, str]]:
    name = [node.parameter or node.primitive.label for node in graph.nodes]
    return {(name[u], name[v]) for u, v in graph.edges_E2.tolist()}


def test_two_softmaxes_that_are_mixed_are_two_attentions_with_the_same_values():
    graph = graph_of(Attending(weights=mixed))
    assert count(graph, Primitive.MSA) == 2
    into = [u for u, v in graph.edges_E2.tolist() if graph.nodes[u].parameter == 'v.bias']
    assert len(into) == 2
    assert {('v.bias', 'msa'), ('msa', 'sum'), ('sum', 'glob_avg')} <= edges(graph)
    assert ('v.bias', 'glob_avg') not in edges(graph)


def test_weights_that_are_multiplied_by_data_are_an_attention_and_no_gate():
    graph = graph_of(Attending(weights=scaled))
    assert count(graph, Primitive.MSA) == 1
    assert count(graph, Primitive.CSE) == 0
    assert [edge for edge in edges(graph) if edge[1] == 'glob_avg'] == [('msa', 'glob_avg')]


class Selecting(nn.Module):
    """A gate over branches (selective kernels), then a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.fc = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 16, 1)
        self.head = nn.Conv2d(8, 10, 1)

    def forward(self, x: Tensor) -> Tensor:
        branches = torch.stack([self.a(x), self.b(x)], 1)
        gate = self.fc(branches.sum(1).mean((2, 3), keepdim=True)).view(-1, 2, 8, 1, 1).softmax(1)
        return self.head((branches * gate).sum(1)).mean((2, 3))


def test_a_gate_over_branches_is_no_attention():
    graph = graph_of(Selecting())
    assert count(graph, Primitive.MSA) == 0
    assert count(graph, Primitive.CSE) == 1


def test_values_that_come_from_the_same_attention_close_no_circle():
    class Twice(Attending):
        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x).flatten(2).transpose(1, 2)
            weights = (self.q(x) @ self.k(x).transpose(-2, -1)).softmax(-1)
            return self.head((weights @ self.v(weights @ x)).mean(1))

    graph = graph_of(Twice())
    assert graph.is_acyclic
    assert count(graph, Primitive.MSA) == 1
    assert ('msa', 'v.weight') in edges(graph)


@pytest.mark.parametrize(('name', 'attentions'), [('convit_tiny', 22), ('efficientvim_m1', 6)])
def test_timms_mixed_and_scaled_attentions_are_found(name: str, attentions: int):
    with torch.device('meta'):
        graph = trace(timm.create_model(name), rules='operators')
    assert count(graph, Primitive.MSA) == attentions


def test_a_softmax_that_weighs_nothing_is_no_attention():
    assert found_in(nn.Sequential(nn.Conv2d(3, 8, 1), nn.Softmax(1))) == Attention(
        frozenset(), frozenset(), frozenset()
    )
