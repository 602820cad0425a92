"""The gated graph network of GHN-1 and GHN-2, and the baseline without edges."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_ghn.graph.structure import GraphBatch
from timm_ghn.nn.config import GHNConfig
from timm_ghn.nn.precision import apply_linear, linear_of
from timm_ghn.nn.registry import register_gnn


class MLP(nn.Module):
    """Two linear layers, each followed by a ReLU, the last one included.

    Args:
        width: Size d of input and output.
        hidden: Size between the two layers.
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, width), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., d) to (..., d)."""
        for index in (0, 2):
            x = apply_linear(linear_of(self.fc, index), x).relu()
        return x


@register_gnn('mlp')
class NodeMLP(MLP):
    """Baseline of arXiv 2110.13100: each node by itself, edges ignored.

    Args:
        config: Its ``hid`` is used.
    """

    def __init__(self, config: GHNConfig) -> None:
        super().__init__(config.hid, config.hid)

    def forward(self, x_Nd: Tensor, batch: GraphBatch | None = None) -> Tensor:
        """Map (N, d) to (N, d)."""
        return super().forward(x_Nd)


@dataclasses.dataclass(frozen=True)
class Level:
    """Nodes that are updated together, and the messages that they receive.

    Attributes:
        size: Number n of the nodes.
        sources: Range of the nodes, by rank, that the messages come from; others lie between them.
        weight_nM: (n, F (sources.stop - sources.start)): weight of each message, of the F functions of a source by
            turns; 1 for a message of phi, 1 / distance for one of psi, 0 where there is no edge.
    """

    size: int
    sources: slice
    weight_nM: Tensor


@dataclasses.dataclass(frozen=True)
class Traversal:
    """One pass over all graphs of a batch.

    Attributes:
        order_N: int64 (N,): nodes of the batch, sorted by level. Levels count nodes in this order.
        rank_N: int64 (N,): the inverse permutation.
        levels: In the order of the pass.
        cyclic: Whether an edge leads from a level to itself or a lower one, as in the few published graphs with a
            cycle. Their nodes are visited one by one, and such an edge carries the state from before the pass.
    """

    order_N: Tensor
    rank_N: Tensor
    levels: tuple[Level, ...]
    cyclic: bool


def plan_traversal(batch: GraphBatch, cutoff: int, *, backward: bool, like: Tensor) -> Traversal:
    """Group the nodes of a batch into levels such that edges lead from a lower level to a higher one.

    In an acyclic graph a shortest path of any length leads upwards too, so the nodes of a level do not read one
    another and can be updated at once, in all graphs of the batch together. The result is the one of visiting node by
    node.

    Args:
        batch: Graphs.
        cutoff: Longest distance that makes an edge; 1 for the real edges only.
        backward: Whether edges are followed from target to source.
        like: Its device and dtype are those of the result.
    """
    levels, sources, targets, distances = [], [], [], []
    for graph, offset in zip(batch.graphs, batch.offsets, strict=True):
        distances_NN = graph.distances_NN(cutoff)
        source, target = distances_NN.nonzero(as_tuple=True)
        distances.append(distances_NN[source, target])
        sources.append((target if backward else source) + offset)
        targets.append((source if backward else target) + offset)
        levels.append(graph.backward_levels_N if backward else graph.forward_levels_N)
    level_N = torch.cat(levels)
    order_N = level_N.argsort(stable=True)
    rank_N = torch.empty_like(order_N)
    rank_N[order_N] = torch.arange(len(order_N), device=order_N.device)
    source_E, target_E = rank_N[torch.cat(sources)], rank_N[torch.cat(targets)]
    planned = _levels(level_N[order_N], source_E, target_E, torch.cat(distances), virtual=cutoff > 1, like=like)
    cyclic = not all(graph.is_acyclic for graph in batch.graphs)
    return Traversal(order_N.to(like.device), rank_N.to(like.device), planned, cyclic)


def _levels(
    level_N: Tensor, source_E: Tensor, target_E: Tensor, distance_E: Tensor, *, virtual: bool, like: Tensor
) -> tuple[Level, ...]:
    """The levels, from nodes in their order and edges between ranks.

    Weights are dense matrices that reach from the first source of a level to the last: for graphs like these, whose
    nodes have an edge to most of those some dozens of steps ahead, they take little more memory than lists of edges.
    """
    functions = 2 if virtual else 1
    size_L = level_N.bincount()
    level_E = level_N[target_E]
    stop_L = torch.zeros_like(size_L).scatter_reduce(0, level_E, source_E + 1, 'amax')
    first_L = stop_L.scatter_reduce(0, level_E, source_E, 'amin')
    width_L = functions * (stop_L - first_L)
    begin_L = (size_L * width_L).cumsum(0) - size_L * width_L
    row_E = target_E - (size_L.cumsum(0) - size_L)[level_E]
    place_E = begin_L[level_E] + row_E * width_L[level_E] + functions * (source_E - first_L[level_E])
    near_E = distance_E == 1
    weights = torch.zeros(int((size_L * width_L).sum()), dtype=like.dtype, device='cpu')
    weights[place_E[near_E]] = 1
    if virtual:  # real edges carry a message of phi and one of psi, virtual edges only one of psi
        weights[place_E + 1] = 1 / distance_E.to(like.dtype)
    sizes, firsts, stops = size_L.tolist(), first_L.tolist(), stop_L.tolist()
    parts = weights.to(like.device).split((size_L * width_L).tolist())
    return tuple(
        Level(size, slice(first, stop), part.view(size, functions * (stop - first)))
        for size, first, stop, part in zip(sizes, firsts, stops, parts, strict=True)
    )


class _Update:
    """What a node does, with all weights put together once: h <- GRU(m, h), then its messages phi(h) and psi(h).

    Args:
        gru: The gates.
        functions: phi, and psi if there are virtual edges: two layers each.
        dtype: To compute in.
    """

    def __init__(self, gru: nn.GRUCell, functions: Sequence[MLP], dtype: torch.dtype) -> None:
        weights = gru.weight_ih, gru.weight_hh, gru.bias_ih, gru.bias_hh
        self.gru = tuple(weight.to(dtype) for weight in weights)
        first, last = ([linear_of(function.fc, index) for function in functions] for index in (0, 2))
        self.first = torch.cat([layer.weight for layer in first]).to(dtype), _biases(first).to(dtype)
        self.last = torch.block_diag(*(layer.weight for layer in last)).to(dtype), _biases(last).to(dtype)

    def state(self, message_nd: Tensor, h_nd: Tensor) -> Tensor:
        """GRU(m, h)."""
        return torch.gru_cell(message_nd, h_nd, *self.gru)

    def messages(self, h_nd: Tensor) -> Tensor:
        """Messages (n, F d) of all functions, side by side."""
        return F.linear(F.linear(h_nd, *self.first).relu(), *self.last).relu()


def _biases(layers: Sequence[nn.Linear]) -> Tensor:
    return torch.cat([layer.bias for layer in layers])


@register_gnn('gated')
class GatedGNN(nn.Module):
    """Gated graph network that follows the order of execution (arXiv 1810.05749, 2110.13100).

    A forward pass updates every node v after all its predecessors, then a backward pass every node after all its
    successors, with the roles of source and target exchanged:

        m_v = sum over u with d(u, v) = 1 of phi(h_u) + sum over u with 1 <= d(u, v) <= cutoff of psi(h_u) / d(u, v)
        h_v <- GRU(m_v, h_v)

    The papers add psi for virtual edges only (d > 1); the published weights were trained with direct neighbours in
    both sums. Without virtual edges there is no psi. phi and psi are evaluated once for each node, not for each edge.

    Shapes:
        input (N, d), output (N, d).

    Args:
        config: Its ``hid`` and ``virtual_edges`` are used.
    """

    def __init__(self, config: GHNConfig) -> None:
        super().__init__()
        self.cutoff = config.virtual_edges
        virtual = self.cutoff > 1
        self.mlp = MLP(config.hid, config.hid // 2 if virtual else config.hid)
        self.mlp_ve = MLP(config.hid, config.hid // 2) if virtual else None
        self.gru = nn.GRUCell(config.hid, config.hid)

    def forward(self, x_Nd: Tensor, batch: GraphBatch) -> Tensor:
        """One forward and one backward pass.

        Args:
            x_Nd: Features of the nodes of all graphs, in the numbering of the batch.
            batch: The graphs.
        """
        functions = (self.mlp,) if self.mlp_ve is None else (self.mlp, self.mlp_ve)
        update = _Update(self.gru, functions, x_Nd.dtype)
        for backward in (False, True):
            plan = plan_traversal(batch, self.cutoff, backward=backward, like=x_Nd)
            x_Nd = _traverse(x_Nd[plan.order_N], plan, update, len(functions))[plan.rank_N]
        return x_Nd


def _traverse(h_Nd: Tensor, plan: Traversal, update: _Update, functions: int) -> Tensor:
    """Update the nodes level by level."""
    nodes, width = h_Nd.shape
    # One buffer that takes up the messages of a level once it is updated; rows of later levels are not read.
    messages_Nm = update.messages(h_Nd) if plan.cyclic else h_Nd.new_zeros(nodes, functions * width)
    sizes = [level.size for level in plan.levels]
    updated, start = [], 0
    for level, h_nd in zip(plan.levels, h_Nd.split(sizes), strict=True):
        received_nd = level.weight_nM @ messages_Nm[level.sources].view(-1, width)
        new_nd = update.state(received_nd, h_nd)
        messages_Nm[start : start + level.size] = update.messages(new_nd)
        updated.append(new_nd)
        start += level.size
    return torch.cat(updated)
