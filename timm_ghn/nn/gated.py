"""The gated graph network of GHN-1 and GHN-2, and the baseline without edges."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from timm_ghn.graph.graph import GraphBatch
from timm_ghn.nn.config import GHNConfig
from timm_ghn.nn.precision import apply_linear, linear_of
from timm_ghn.ops.backends import backend_in_use
from timm_ghn.ops.edges import Edges
from timm_ghn.ops.rows import Rows, split_rows


class MLP(nn.Module):
    """Two linear layers, each followed by a ReLU, the last one included."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, width), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., d) to (..., d)."""
        for index in (0, 2):
            x = apply_linear(linear_of(self.fc, index), x).relu()
        return x


class NodeMLP(MLP):
    """Baseline of arXiv 2110.13100: each node by itself, edges ignored."""

    def __init__(self, config: GHNConfig) -> None:
        super().__init__(config.hid, config.hid)

    def forward(self, x_Nd: Tensor, batch: GraphBatch | None = None) -> Tensor:
        """Map (N, d) to (N, d); the graphs are not read."""
        return super().forward(x_Nd)


@dataclasses.dataclass(frozen=True, eq=False)
class Traversal:
    """One pass over all graphs of a batch, level by level: which messages arrive where.

    Attributes:
        order_N: int64 (N,): nodes of the batch, sorted by level. Levels count nodes in this order.
        rank_N: int64 (N,): the inverse permutation.
        sizes: Number of nodes of each level, in the order of the pass.
        functions: Number F of messages of each node: phi, and psi if there are virtual edges.
        edges: From messages to nodes by rank. Row F r + f is the message f of the node of rank r after its update; its
            factor is 1 for phi and 1 / distance for psi.
        cyclic: Whether an edge leads from a level to itself or a lower one, as in the few published graphs with a
            cycle. Their nodes are visited one by one, and such an edge carries the message from before the pass, which
            is in row F (N + r) + f.
        like: Empty (0, d), of the device and dtype of the features.
        backend: See :func:`timm_ghn.ops.rows.split_rows`.
    """

    order_N: Tensor
    rank_N: Tensor
    sizes: tuple[int, ...]
    functions: int
    edges: Edges
    cyclic: bool
    like: Tensor
    backend: str = 'auto'

    @functools.cached_property
    def receiving(self) -> tuple[Rows, ...]:
        """For each level the sums of the messages that its nodes receive."""
        return split_rows(self.edges, self.sizes, self.like, backend=self.backend)

    @functools.cached_property
    def sending(self) -> tuple[Rows, ...]:
        """For each level the sums that are the gradients of its messages; then those of all messages from before."""
        sizes = [self.functions * size for size in self.sizes]
        before = [self.functions * len(self.order_N)] if self.cyclic else []
        return split_rows(self.edges.transposed, sizes + before, self.like, backend=self.backend)


def plan_traversal(batch: GraphBatch, cutoff: int, *, backward: bool, like: Tensor, backend: str = 'auto') -> Traversal:
    """Group the nodes of a batch into levels such that edges lead from a lower level to a higher one.

    In an acyclic graph a shortest path of any length leads upwards too, so the nodes of a level do not read one
    another and can be updated at once, in all graphs of the batch together. The result is the one of visiting node by
    node. ``cutoff`` is the longest distance that makes an edge; ``like`` has the device, dtype and width of the pass.
    """
    level_N = torch.cat([graph.backward_levels_N if backward else graph.forward_levels_N for graph in batch.graphs])
    order_N = level_N.argsort(stable=True)
    rank_N = torch.empty_like(order_N)
    rank_N[order_N] = torch.arange(len(order_N), device='cpu')
    functions = 2 if cutoff > 1 else 1
    found = [_messages(graph.distances_NN(cutoff), backward, functions, like.dtype) for graph in batch.graphs]
    message_E = torch.cat([parts[0] + functions * at for parts, at in zip(found, batch.offsets, strict=True)])
    row_M = (functions * rank_N[:, None] + torch.arange(functions, device='cpu')).flatten().int()
    row_E = row_M.index_select(0, message_E)
    weight_E, count_N = (torch.cat([parts[index] for parts in found]) for index in (1, 2))
    cyclic = not all(graph.is_acyclic for graph in batch.graphs)
    if cyclic:
        source_level_E = level_N.index_select(0, message_E // functions)
        row_E += functions * len(order_N) * (source_level_E >= level_N.repeat_interleave(count_N))
    # Messages are listed by node. Whole lists move to where their node comes in the order: no sorting of edges.
    end_N, count_N = count_N.cumsum(0), count_N[order_N]
    pointer_N1 = torch.cat([count_N.new_zeros(1), count_N.cumsum(0)])
    moved_N = (end_N[order_N] - count_N - pointer_N1[:-1]).int()
    take_E = torch.arange(len(row_E), dtype=torch.int32, device='cpu') + moved_N.repeat_interleave(count_N)
    edges = Edges(
        row_E.index_select(0, take_E).to(like.device),
        pointer_N1.int().to(like.device),
        functions * len(order_N) * (2 if cyclic else 1),
        weight_E.index_select(0, take_E).to(like.device),
    )
    order_N, rank_N = order_N.to(like.device), rank_N.to(like.device)
    sizes = tuple(level_N.bincount().tolist())
    empty = like.detach().new_empty(0, like.shape[1])
    return Traversal(order_N, rank_N, sizes, functions, edges, cyclic, empty, backend)


def _messages(
    distances_NN: Tensor, backward: bool, functions: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """What each node of a graph receives.

    Returns:
        (e,) messages F u + f of the sources u, node by node; (e,) their factors; (N,) their number for each node. Real
        edges carry a message of phi and one of psi, virtual edges only one of psi.
    """
    distances_NN = distances_NN if backward else distances_NN.T
    near_NN = distances_NN == 1
    weight_NM = near_NN.to(dtype)
    if functions > 1:
        inverse_NN = torch.where(distances_NN > 0, 1 / distances_NN.to(dtype), 0)
        weight_NM = torch.stack((weight_NM, inverse_NN), -1).flatten(1)
    exists_NM = weight_NM > 0
    return exists_NM.nonzero()[:, 1].int(), weight_NM.masked_select(exists_NM), exists_NM.sum(1)


def traversals(batch: GraphBatch, cutoff: int, like: Tensor) -> tuple[Traversal, Traversal]:
    """The forward and the backward pass over a batch, planned once for each backend and cached in the batch."""
    kept = vars(batch).setdefault('_traversals', {})
    backend = backend_in_use()
    key = cutoff, like.device, like.dtype, like.shape[1], backend
    if key not in kept:
        with torch.inference_mode(False):  # what is planned there could not be used in training
            kept[key] = tuple(
                plan_traversal(batch, cutoff, backward=backward, like=like, backend=backend)
                for backward in (False, True)
            )
    found: tuple[Traversal, Traversal] = kept[key]
    return found


@dataclasses.dataclass(frozen=True, eq=False)
class _Update:
    """What a node does: h <- GRU(m, h), then its messages phi(h) and psi(h), side by side.

    The GRU has torch's ``weight_ih`` (m) and ``weight_hh`` (h), each (3d, d); the first layers of the F functions are
    stacked, their last ones are the blocks of a block-diagonal matrix (F d, ...).
    """

    gru_weight_m: Tensor
    gru_weight_h: Tensor
    gru_bias_m: Tensor
    gru_bias_h: Tensor
    first_weight: Tensor
    first_bias: Tensor
    last_weight: Tensor
    last_bias: Tensor

    @classmethod
    def of(cls, gru: nn.GRUCell, functions: Sequence[MLP], dtype: torch.dtype) -> _Update:
        """Put the weights of the layers together, to compute in one dtype."""
        gates = gru.weight_ih, gru.weight_hh, gru.bias_ih, gru.bias_hh
        first, last = ([linear_of(function.fc, index) for function in functions] for index in (0, 2))
        first_weight = torch.cat([layer.weight for layer in first])
        last_weight = torch.block_diag(*(layer.weight for layer in last))
        biases = [torch.cat([layer.bias for layer in layers]) for layers in (first, last)]
        tensors = (*gates, first_weight, biases[0], last_weight, biases[1])
        return cls(*(tensor.to(dtype) for tensor in tensors))

    def tensors(self) -> tuple[Tensor, ...]:
        """All tensors, in the order of the constructor."""
        return tuple(getattr(self, field.name) for field in dataclasses.fields(self))

    def state(self, message_nd: Tensor, h_nd: Tensor) -> Tensor:
        """GRU(m, h)."""
        return torch.gru_cell(message_nd, h_nd, self.gru_weight_m, self.gru_weight_h, self.gru_bias_m, self.gru_bias_h)

    def hidden(self, h_nd: Tensor) -> Tensor:
        """First layers of all functions."""
        return F.linear(h_nd, self.first_weight, self.first_bias).relu()

    def messages(self, h_nd: Tensor) -> Tensor:
        """Messages (n, F d) of all functions, side by side."""
        return F.linear(self.hidden(h_nd), self.last_weight, self.last_bias).relu()

    def slope(self, message_nd: Tensor, h_nd: Tensor) -> Tensor:
        """(n, 3d): derivative of each feature of GRU(m, h) with respect to its own three gates' share of m.

        With r, z = sigmoid and n = tanh(i_n + r h_n), where i = W m + b and h_n are the parts of the gates
        (torch.nn.GRUCell), h' = (1 - z) n + z h.
        """
        i_r, i_z, i_n = F.linear(message_nd, self.gru_weight_m, self.gru_bias_m).chunk(3, 1)
        h_r, h_z, h_n = F.linear(h_nd, self.gru_weight_h, self.gru_bias_h).chunk(3, 1)
        r, z = (i_r + h_r).sigmoid(), (i_z + h_z).sigmoid()
        n = (i_n + r * h_n).tanh()
        by_n = (1 - z) * (1 - n * n)
        return torch.cat((by_n * h_n * r * (1 - r), (h_nd - n) * z * (1 - z), by_n), 1)


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
    """

    def __init__(self, config: GHNConfig) -> None:
        super().__init__()
        self.cutoff = config.virtual_edges
        virtual = self.cutoff > 1
        self.mlp = MLP(config.hid, config.hid // 2 if virtual else config.hid)
        self.mlp_ve = MLP(config.hid, config.hid // 2) if virtual else None
        self.gru = nn.GRUCell(config.hid, config.hid)

    def forward(self, x_Nd: Tensor, batch: GraphBatch) -> Tensor:
        """One forward and one backward pass; ``x_Nd`` are the features of all nodes, in the numbering of the batch."""
        functions = (self.mlp,) if self.mlp_ve is None else (self.mlp, self.mlp_ve)
        update = _Update.of(self.gru, functions, x_Nd.dtype)
        for plan in traversals(batch, self.cutoff, x_Nd):
            h_Nd: Tensor = _Traverse.apply(plan, x_Nd[plan.order_N], *update.tensors())
            x_Nd = h_Nd[plan.rank_N]
        return x_Nd


class _Traverse(torch.autograd.Function):
    """Update the nodes level by level.

    Autograd alone would differentiate one level after another with respect to all nodes and all weights. Here a sweep
    from the last level to the first computes what later levels need, the gradients of the states and messages; those of
    the weights follow for all nodes at once. Not twice differentiable.
    """

    @staticmethod
    def forward(ctx: Any, plan: Traversal, h_Nd: Tensor, *weights: Tensor) -> Tensor:
        update, (nodes, width) = _Update(*weights), h_Nd.shape
        # Rows of later levels are multiplied by zero where a window reaches over them, so they must be finite.
        messages_Md = h_Nd.new_zeros(plan.edges.num_sources, width)
        if plan.cyclic:
            messages_Md[plan.functions * nodes :] = update.messages(h_Nd).view(-1, width)
        slots = messages_Md[: plan.functions * nodes].view(nodes, -1).split(plan.sizes)
        received, updated = [], []
        for rows, h_nd, slot_nm in zip(plan.receiving, h_Nd.split(plan.sizes), slots, strict=True):
            received.append(rows.sum(messages_Md))
            updated.append(update.state(received[-1], h_nd))
            slot_nm.copy_(update.messages(updated[-1]))
        new_Nd = torch.cat(updated)
        ctx.plan = plan
        ctx.save_for_backward(h_Nd, torch.cat(received), new_Nd, *weights)
        return new_Nd

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_Nd: Tensor) -> tuple[Tensor | None, ...]:
        h_Nd, received_Nd, new_Nd, *weights = ctx.saved_tensors
        plan: Traversal = ctx.plan
        swept = _sweep(plan, _Update(*weights), h_Nd, received_Nd, new_Nd, gradient_Nd)
        with torch.enable_grad():
            leaves = [tensor.detach().requires_grad_() for tensor in (h_Nd, *weights)]
            update = _Update(*leaves[1:])
            results = [update.state(received_Nd, leaves[0]), update.messages(new_Nd)]
            if plan.cyclic:
                results.append(update.messages(leaves[0]))
        return None, *torch.autograd.grad(results, leaves, swept)


def _sweep(
    plan: Traversal, update: _Update, h_Nd: Tensor, received_Nd: Tensor, new_Nd: Tensor, gradient_Nd: Tensor
) -> list[Tensor]:
    """Gradients of all states and messages of a pass, from the last level to the first.

    Returns:
        (N, d) of the new states, by all paths; (N, F d) of the messages; of a cyclic traversal also (N, F d) of the
        messages from before the pass.
    """
    hidden_Nk = update.hidden(new_Nd)
    message_on = F.linear(hidden_Nk, update.last_weight, update.last_bias) > 0
    parts = (gradient_Nd, message_on, hidden_Nk > 0, update.slope(received_Nd, h_Nd))
    # As in the forward pass, windows reach over rows that are not known yet.
    of_received_Nd = torch.zeros_like(received_Nd)
    levels = [*zip(*(part.split(plan.sizes) for part in (*parts, of_received_Nd)), strict=True)]
    of_new, of_messages = [], []
    for rows, level in zip(reversed(plan.sending[: len(levels)]), reversed(levels), strict=True):
        gradient_nd, message_on_nm, hidden_on_nk, slope_n3d, of_received_nd = level
        of_message_nm = rows.sum(of_received_Nd).view(len(gradient_nd), -1)
        of_hidden_nk = (of_message_nm * message_on_nm) @ update.last_weight * hidden_on_nk
        of_new_nd = torch.addmm(gradient_nd, of_hidden_nk, update.first_weight)
        of_received_nd.copy_((of_new_nd.repeat(1, 3) * slope_n3d) @ update.gru_weight_m)
        of_new.append(of_new_nd)
        of_messages.append(of_message_nm)
    before = [plan.sending[-1].sum(of_received_Nd).view(len(h_Nd), -1)] if plan.cyclic else []
    return [torch.cat(of_new[::-1]), torch.cat(of_messages[::-1]), *before]
