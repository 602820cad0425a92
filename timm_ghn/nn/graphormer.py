"""The graph transformer of GHN-3 (arXiv 2303.04143)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_ghn.graph.graph import Graph, GraphBatch
from timm_ghn.nn.config import MAX_DISTANCE, GHNConfig
from timm_ghn.nn.precision import apply_layer_norm, apply_linear, linear, linear_of, look_up

#: Largest degree, and largest distance from the start, that has an embedding; larger ones share the last.
MAX_DEGREE = 100
MAX_INPUT_DISTANCE = 1000


class EdgeEmbedding(nn.Module):
    """Embedding of a distance l, as row l + 2; row 2 means that there is no path."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(MAX_DISTANCE + 3, width)


class FeedForward(nn.Module):
    """FF(x) = W_2 GELU(W_1 x + b_1) + b_2, with a hidden layer of 4d features."""

    def __init__(self, width: int) -> None:
        super().__init__()
        # Position 2 holds a dropout of rate 0 in the published checkpoints.
        self.net = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Identity(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., d) to (..., d)."""
        return apply_linear(linear_of(self.net, 3), F.gelu(apply_linear(linear_of(self.net, 0), x)))


class Attention(nn.Module):
    """Multi-head self-attention over the nodes of one graph, with a bias for each pair of nodes.

    ``edges``: whether it owns the edge embedding that makes the bias.
    """

    def __init__(self, config: GHNConfig, *, edges: bool) -> None:
        super().__init__()
        self.heads, self.cutoff = config.heads, config.virtual_edges
        self.to_qkv = nn.Linear(config.hid, 3 * config.hid, bias=False)
        self.to_out = nn.Sequential(nn.Linear(config.hid, config.hid))
        if edges:
            self.edge_embed = EdgeEmbedding(config.hid)
            self.proj_e = nn.Sequential(
                nn.Linear(2 * config.hid, config.hid), nn.ReLU(), nn.Linear(config.hid, config.heads)
            )

    def bias_of_distances(self) -> Tensor:
        """Attention bias for every pair of distances that two nodes i, j can have to and from each other.

        bias(i, j) = W2 ReLU(W1 [T[d(i, j) + 2], T[d(j, i) + 2]] + b1) + b2. There are far fewer pairs of distances than
        pairs of nodes, and W1 is applied to each half by itself.

        Returns:
            ((cutoff + 1)^2, heads); row d(i, j) (cutoff + 1) + d(j, i).
        """
        table = self.edge_embed.embed
        first = linear_of(self.proj_e, 0)
        embedded = look_up(table, torch.arange(2, self.cutoff + 3, device=table.weight.device))
        there_weight, back_weight = first.weight.chunk(2, 1)
        there, back = linear(embedded, there_weight, first.bias), linear(embedded, back_weight, None)
        hidden = (there[:, None] + back[None]).flatten(0, 1).relu()
        return apply_linear(linear_of(self.proj_e, 2), hidden)

    def forward(self, x_Nd: Tensor, sizes: tuple[int, ...], biases: list[Tensor]) -> Tensor:
        """Attend within each graph of n nodes; ``biases`` are (heads, n, n) for each."""
        qkv = apply_linear(self.to_qkv, x_Nd).view(len(x_Nd), 3, self.heads, -1)
        attended = []
        for qkv_n3hk, bias_hnn in zip(torch.split(qkv, list(sizes)), biases, strict=True):
            query, key, value = qkv_n3hk.permute(1, 2, 0, 3).unsqueeze(1)  # each (1, heads, n, d / heads)
            merged = F.scaled_dot_product_attention(query, key, value, attn_mask=bias_hnn[None])
            attended.append(merged[0].transpose(0, 1).flatten(1))
        return apply_linear(linear_of(self.to_out, 0), torch.cat(attended))


class GraphormerLayer(nn.Module):
    """Pre-norm transformer layer: x <- x + Attention(LN1(x)); x <- x + FF(LN2(x)).

    The first one owns the embeddings of degrees, of the distance from the start, and of edges.
    """

    def __init__(self, config: GHNConfig, *, first: bool) -> None:
        super().__init__()
        self.cutoff = config.virtual_edges
        self.ln1 = nn.LayerNorm(config.hid)
        self.attn = Attention(config, edges=first)
        self.ln2 = nn.LayerNorm(config.hid)
        self.ff = FeedForward(config.hid)
        if first:
            self.centrality_embed_in = nn.Embedding(MAX_DEGREE + 1, config.hid)
            self.centrality_embed_out = nn.Embedding(MAX_DEGREE + 1, config.hid)
            self.input_dist_embed = nn.Embedding(MAX_INPUT_DISTANCE + 1, config.hid)

    def position(self, graph: Graph) -> Tensor:
        """Embedding of each node's position: E_in[in-degree] + E_out[out-degree] + E_dist[distance from the start].

        The start itself and nodes that it does not reach have distance 0.
        """
        source_E, target_E = graph.edges_E2.unbind(1)
        distance_N = graph.distances_NN(self.cutoff)[graph.start].long()
        return (
            look_up(self.centrality_embed_in, target_E.bincount(minlength=len(graph)).clamp(max=MAX_DEGREE))
            + look_up(self.centrality_embed_out, source_E.bincount(minlength=len(graph)).clamp(max=MAX_DEGREE))
            + look_up(self.input_dist_embed, distance_N.clamp(max=MAX_INPUT_DISTANCE))
        )

    def biases(self, batch: GraphBatch) -> list[Tensor]:
        """Attention bias (heads, n, n) of each graph; all layers use the one of the first."""
        table = self.attn.bias_of_distances()
        found = []
        for graph in batch.graphs:
            distances_NN = graph.distances_NN(self.cutoff).int()
            row_NN = (distances_NN * (self.cutoff + 1) + distances_NN.T).to(table.device)
            # Attention would copy what has gaps in every layer.
            found.append(F.embedding(row_NN, table).permute(2, 0, 1).contiguous())
        return found

    def forward(self, x_Nd: Tensor, sizes: tuple[int, ...], biases: list[Tensor]) -> Tensor:
        """See :meth:`Attention.forward`."""
        x_Nd = x_Nd + self.attn(apply_layer_norm(self.ln1, x_Nd), sizes, biases)
        changed_Nd: Tensor = self.ff(apply_layer_norm(self.ln2, x_Nd))
        return x_Nd + changed_Nd


class Graphormer(nn.ModuleList):
    """Graph transformer of GHN-3: nodes attend to all nodes of their graph, biased by the distances between them.

    Nodes of all graphs pass through the linear layers together, without padding; attention runs graph by graph. The
    published code reads shifted rows when it batches graphs of unequal size; this one gives every graph its own.

    Shapes:
        input (N, d), output (N, d).
    """

    def __init__(self, config: GHNConfig) -> None:
        super().__init__(GraphormerLayer(config, first=index == 0) for index in range(config.layers))

    @torch.no_grad()
    def scale_down_(self) -> None:
        """Scale the last linear layers of all residual branches by 0.1, in place."""
        for name, module in self.named_modules():
            if name.endswith(('to_out.0', 'ff.net.3')) and isinstance(module, nn.Linear):
                module.weight.mul_(0.1)
                module.bias.zero_()

    def forward(self, x_Nd: Tensor, batch: GraphBatch) -> Tensor:
        """Run all layers; ``x_Nd`` are the features of all graphs' nodes, in the numbering of the batch."""
        first: GraphormerLayer = self[0]  # type: ignore[assignment]
        x_Nd = x_Nd + torch.cat([first.position(graph) for graph in batch.graphs])
        biases = first.biases(batch)
        for layer in self:
            x_Nd = layer(x_Nd, batch.sizes, biases)
        return x_Nd
