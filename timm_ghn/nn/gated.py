"""The gated graph network of GHN-1 and GHN-2, and the baseline without edges."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from timm_ghn.graph.structure import GraphBatch
from timm_ghn.nn.config import GHNConfig
from timm_ghn.nn.precision import apply_linear, linear_of
from timm_ghn.nn.registry import register_gnn
from timm_ghn.ops.aggregate import aggregate


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
    """Nodes that are updated together, and the edges that end in them.

    Attributes:
        size: Number n of the nodes.
        source_E: int64 (E,): message that each edge carries; the N messages of phi first, then those of psi.
        target_E: int64 (E,): 0..n-1.
        weight_E: (E,): 1 for a message of phi, 1 / distance for one of psi.
    """

    size: int
    source_E: Tensor
    target_E: Tensor
    weight_E: Tensor


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
    level_N, distance_E = torch.cat(levels), torch.cat(distances)
    order_N = level_N.argsort(stable=True)
    rank_N = torch.empty_like(order_N)
    rank_N[order_N] = torch.arange(len(order_N), device=order_N.device)
    source_E, target_E = rank_N[torch.cat(sources)], rank_N[torch.cat(targets)]
    weight_E = torch.ones_like(distance_E, dtype=like.dtype)
    near_E = distance_E == 1
    if cutoff > 1:  # real edges carry a message of phi and one of psi, virtual edges only one of psi
        source_E = torch.cat((source_E[near_E], source_E + len(order_N)))
        target_E = torch.cat((target_E[near_E], target_E))
        weight_E = torch.cat((weight_E[near_E], weight_E / distance_E))
    by_target = target_E.argsort(stable=True)
    node_counts = level_N.bincount()
    edge_counts = level_N[order_N][target_E].bincount(minlength=len(node_counts))
    first = (node_counts.cumsum(0) - node_counts).repeat_interleave(edge_counts)
    device, sizes = like.device, edge_counts.tolist()
    per_level = zip(
        node_counts.tolist(),
        torch.split(source_E[by_target].to(device), sizes),
        torch.split((target_E[by_target] - first).to(device), sizes),
        torch.split(weight_E[by_target].to(device), sizes),
        strict=True,
    )
    cyclic = not all(graph.is_acyclic for graph in batch.graphs)
    return Traversal(order_N.to(device), rank_N.to(device), tuple(Level(*fields) for fields in per_level), cyclic)


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
        for backward in (False, True):
            plan = plan_traversal(batch, self.cutoff, backward=backward, like=x_Nd)
            x_Nd = self._traverse(x_Nd[plan.order_N], plan)[plan.rank_N]
        return x_Nd

    def _traverse(self, h_Nd: Tensor, plan: Traversal) -> Tensor:
        gru = [weight.to(h_Nd.dtype) for weight in (self.gru.weight_ih, self.gru.weight_hh)]
        gru += [bias.to(h_Nd.dtype) for bias in (self.gru.bias_ih, self.gru.bias_hh)]
        functions = (self.mlp,) if self.mlp_ve is None else (self.mlp, self.mlp_ve)
        # One buffer that takes up the messages of a level once it is updated.
        if plan.cyclic:
            messages = torch.stack([function(h_Nd) for function in functions])
        else:  # rows of later levels are not read
            messages = h_Nd.new_zeros(len(functions), *h_Nd.shape)
        updated, start = [], 0
        for level, old_nd in zip(plan.levels, torch.split(h_Nd, [level.size for level in plan.levels]), strict=True):
            incoming_nd = aggregate(messages.flatten(0, 1), level.source_E, level.target_E, level.weight_E, level.size)
            new_nd = torch.gru_cell(incoming_nd, old_nd, *gru)
            rows = slice(start, start + level.size)
            messages[:, rows] = torch.stack([function(new_nd) for function in functions])
            updated.append(new_nd)
            start += level.size
        return torch.cat(updated)
