"""The formulas of GHN-1, GHN-2, GHN-3 written out one node, one pair and one full map at a time.

Slow on purpose and independent of the package's arithmetic: weights are read from a dictionary by their names.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from timm_ghn.nn import DecodeKind, DecodeRequest, GHNConfig

Weights = dict[str, torch.Tensor]


def dense(w: Weights, name: str, x: torch.Tensor) -> torch.Tensor:
    return x @ w[f'{name}.weight'].T + w[f'{name}.bias']


def norm(w: Weights, name: str, x: torch.Tensor) -> torch.Tensor:
    centred = x - x.mean(-1, keepdim=True)
    scale = (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return centred / scale * w[f'{name}.weight'] + w[f'{name}.bias']


def distances(graph, cutoff: int) -> list[list[int]]:
    """Breadth-first search from each node."""
    successors = [[] for _ in graph.nodes]
    for source, target in graph.edges_E2.tolist():
        successors[source].append(target)
    result = []
    for start in range(len(graph)):
        found, frontier, depth = {start: 0}, [start], 0
        while frontier:
            depth += 1
            frontier = sorted({v for u in frontier for v in successors[u]} - set(found))
            found.update(dict.fromkeys(frontier, depth))
        result.append([found.get(v, 0) if found.get(v, 0) <= cutoff else 0 for v in range(len(graph))])
    return result


def channel_row(c: int, num_classes: int) -> int:
    vocabulary = [1, 3, *range(8, 57, 8), *range(64, 4081, 16), *range(4096, 8193, 32)]
    vocabulary = sorted({*vocabulary, num_classes})
    if 4 <= c <= 7:
        c = 8
    if c == 0 or c > vocabulary[-1]:
        c = vocabulary[-1]
    return min(range(len(vocabulary)), key=lambda row: (abs(vocabulary[row] - c), vocabulary[row]))


def spatial_row(k: int, max_size: int) -> int:
    vocabulary = sorted({k for k in range(1, max(12, max_size)) if k % 2} | {14, 16})
    if k == 2:
        k = 3
    if k == 0 or k > vocabulary[-1]:
        k = vocabulary[-1]
    return min(range(len(vocabulary)), key=lambda row: (abs(vocabulary[row] - k), vocabulary[row]))


def features(w: Weights, config: GHNConfig, graph) -> torch.Tensor:
    channel, spatial = w['shape_enc.embed_channel.weight'], w['shape_enc.embed_spatial.weight']
    rows = []
    for node in graph.nodes:
        if node.shape is None:
            parts = [channel[-1], channel[-1], spatial[-1], spatial[-1]]
        else:
            parts = [channel[channel_row(c, config.num_classes)] for c in node.shape[:2]]
            parts += [spatial[spatial_row(k, config.max_shape[3])] for k in node.shape[2:]]
        rows.append(w['embed.weight'][int(node.primitive)] + torch.cat(parts))
    return torch.stack(rows)


def gru(w: Weights, m: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    gates_m = w['gnn.gru.weight_ih'] @ m + w['gnn.gru.bias_ih']
    gates_h = w['gnn.gru.weight_hh'] @ h + w['gnn.gru.bias_hh']
    (reset_m, update_m, new_m), (reset_h, update_h, new_h) = gates_m.chunk(3), gates_h.chunk(3)
    reset, update = (reset_m + reset_h).sigmoid(), (update_m + update_h).sigmoid()
    return (1 - update) * (new_m + reset * new_h).tanh() + update * h


def gated(w: Weights, config: GHNConfig, graph, x: torch.Tensor) -> torch.Tensor:
    """Node by node, an evaluation of the message functions for every edge. Nodes are in topological order."""
    d = distances(graph, config.virtual_edges)
    h = list(x)

    def message(name: str, state: torch.Tensor) -> torch.Tensor:
        return dense(w, f'gnn.{name}.fc.2', dense(w, f'gnn.{name}.fc.0', state).relu()).relu()

    n = len(graph)
    for backward in (False, True):
        for v in reversed(range(n)) if backward else range(n):
            m = torch.zeros_like(x[0])
            for u in range(n):
                length = d[v][u] if backward else d[u][v]
                if length == 1:
                    m = m + message('mlp', h[u])
                if length >= 1 and config.virtual_edges > 1:
                    m = m + message('mlp_ve', h[u]) / length
            h[v] = gru(w, m, h[v])
    return torch.stack(h)


def graphormer(w: Weights, config: GHNConfig, graph, x: torch.Tensor) -> torch.Tensor:
    n, width = len(graph), config.hid // config.heads
    d = torch.tensor(distances(graph, config.virtual_edges))
    for v in range(n):
        x = x.index_add(
            0,
            torch.tensor([v]),
            (
                w['gnn.0.centrality_embed_in.weight'][min(int((d[:, v] == 1).sum()), 100)]
                + w['gnn.0.centrality_embed_out.weight'][min(int((d[v] == 1).sum()), 100)]
                + w['gnn.0.input_dist_embed.weight'][min(int(d[graph.start, v]), 1000)]
            )[None],
        )
    table = w['gnn.0.attn.edge_embed.embed.weight']
    pairs = torch.cat((table[d + 2], table[d.T + 2]), -1)
    bias = dense(w, 'gnn.0.attn.proj_e.2', dense(w, 'gnn.0.attn.proj_e.0', pairs).relu())
    for layer in range(config.layers):
        name = f'gnn.{layer}'
        qkv = norm(w, f'{name}.ln1', x) @ w[f'{name}.attn.to_qkv.weight'].T
        merged = []
        for head in range(config.heads):
            q, k, v = (
                qkv[:, part * config.hid + head * width : part * config.hid + (head + 1) * width] for part in range(3)
            )
            merged.append((q @ k.T / math.sqrt(width) + bias[:, :, head]).softmax(1) @ v)
        x = x + dense(w, f'{name}.attn.to_out.0', torch.cat(merged, 1))
        hidden = dense(w, f'{name}.ff.net.0', norm(w, f'{name}.ln2', x))
        hidden = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
        x = x + dense(w, f'{name}.ff.net.3', hidden)
    return x


def encode(w: Weights, config: GHNConfig, graph) -> torch.Tensor:
    x = features(w, config, graph)
    if config.gnn == 'mlp':
        x = dense(w, 'gnn.fc.2', dense(w, 'gnn.fc.0', x).relu()).relu()
    else:
        x = {'gated': gated, 'graphormer': graphormer}[config.gnn](w, config, graph, x)
    return norm(w, 'ln', x) if config.layernorm else x


def full_map(w: Weights, config: GHNConfig, z: torch.Tensor) -> torch.Tensor:
    """(C0, C1, H, W): everything that one node can decode."""
    c0, c1, height, width = config.max_shape
    if config.decoder == 'mlp':
        return dense(w, 'decoder.mlp.fc.2', dense(w, 'decoder.mlp.fc.0', z).relu()).view(config.max_shape)
    u = dense(w, 'decoder.fc.0', z).relu().view(4 * config.hid, height, width)
    s = F.conv2d(u[None], w['decoder.conv.0.weight'][:, :, None, None], w['decoder.conv.0.bias']).relu()
    r = F.conv2d(s, w['decoder.conv.2.weight'][:, :, None, None], w['decoder.conv.2.bias'])
    return r.view(c0, c1, height, width)


def window(config: GHNConfig, wanted: int) -> slice:
    size = config.max_shape[2]
    if config.window == 'corner':
        return slice(0, min(wanted, size))
    centre = size // 2
    return slice(max(0, centre - wanted // 2), min(size, centre + -(-wanted // 2)))


def decode(w: Weights, config: GHNConfig, z: torch.Tensor, request: DecodeRequest) -> torch.Tensor:
    outputs, inputs, height, width = request.size
    if request.kind is DecodeKind.TENSOR:
        cut = full_map(w, config, z)[:, :, window(config, height), window(config, width)]
        if height > config.max_shape[2] or width > config.max_shape[3]:
            cut = F.interpolate(cut, size=(height, width), mode='bilinear', align_corners=False)
        return cut[:outputs, :inputs]
    if request.kind is DecodeKind.HEAD_WEIGHT:
        if config.decoder == 'mlp':
            rows = dense(w, 'decoder.class_layer_predictor.1', dense(w, 'decoder.mlp.fc.0', z).relu())
            return rows.view(config.num_classes, -1)[:outputs, :inputs]
        pixel = full_map(w, config, z)[:, :, window(config, 1), window(config, 1)]
        return dense(w, 'decoder.class_layer_predictor.1', pixel[:, :, 0, 0].T.relu()).T[:outputs, :inputs]
    weight, bias = dense(w, 'decoder_1d.fc.2', dense(w, 'decoder_1d.fc.0', z).relu()).view(2, -1)
    if request.kind is DecodeKind.HEAD_BIAS:
        bias = dense(w, 'bias_class.1', bias.relu())
    return (weight if request.kind is DecodeKind.WEIGHT_1D else bias)[:outputs]
