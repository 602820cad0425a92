"""A GHN as a whole: its names and sizes, its symmetries, its gradients, its dtypes and devices."""

from __future__ import annotations

import dataclasses
import random

import literal
import pytest
import torch
from isomorphism import permuted
from torch import nn
from variants import GHN3

from timm_ghn.errors import ConfigError
from timm_ghn.nn import GHN, DecodeKind, DecodeRequest, GHNConfig, ghn as ghn_module

REQUESTS = (
    DecodeRequest(DecodeKind.TENSOR, 2, (24, 20, 3, 3)),
    DecodeRequest(DecodeKind.TENSOR, 0, (9, 17, 1, 1)),
    DecodeRequest(DecodeKind.TENSOR, 1, (4, 3, 1, 1)),
    DecodeRequest(DecodeKind.TENSOR, 2, (4, 3, 13, 13)),
    DecodeRequest(DecodeKind.WEIGHT_1D, 3, (8, 1, 1, 1)),
    DecodeRequest(DecodeKind.BIAS_1D, 3, (8, 1, 1, 1)),
    DecodeRequest(DecodeKind.HEAD_WEIGHT, 4, (10, 18, 1, 1)),
    DecodeRequest(DecodeKind.HEAD_BIAS, 5, (10, 1, 1, 1)),
)


def published(hid: int, layers: int, heads: int, size: int = 16, classes: int = 1000) -> GHNConfig:
    return GHNConfig(hid=hid, max_shape=(hid, hid, size, size), num_classes=classes, layers=layers, heads=heads)


@pytest.mark.parametrize(
    ('config', 'count'),
    [
        (published(64, 3, 8), 6_906_632),
        (published(128, 5, 16), 35_810_368),
        (published(256, 12, 16), 214_668_960),
        (published(384, 24, 16), 654_365_184),
        (published(64, 3, 8, 11, 10), 4_531_500),
        (GHNConfig(hid=32, max_shape=(64, 64, 16, 16), num_classes=1000, gnn='gated', window='corner'), 2_319_720),
    ],
)
def test_parameter_counts_are_the_published_ones(config, count):
    with torch.device('meta'):
        ghn = GHN(config)
    assert sum(parameter.numel() for parameter in ghn.parameters()) == count
    assert not list(ghn.buffers())


def test_a_fresh_ghn3_starts_small_and_the_others_as_pytorch_does():
    torch.manual_seed(0)
    ghn = GHN(published(64, 1, 8, 11, 10))
    for layer in (ghn.decoder.last, ghn.decoder.class_predictor, ghn.decoder_1d.last):
        assert not layer.bias.any()
        bound = layer.in_features**-0.5 / 5
        assert 0.9 * bound < layer.weight.abs().max().item() <= bound
    assert ghn.embed.weight.std().item() == pytest.approx(64**-0.5, rel=0.1)
    assert ghn.shape_enc.embed_channel.weight.std().item() == pytest.approx(16**-0.5, rel=0.1)
    assert ghn.gnn[0].attn.edge_embed.embed.weight.std().item() == pytest.approx(64**-0.5, rel=0.1)
    gated = GHN(dataclasses.replace(ghn.config, gnn='gated', window='corner'))
    assert gated.decoder.last.bias.any()
    assert gated.shape_enc.embed_channel.weight.std().item() == pytest.approx(1, rel=0.1)


def test_a_cycle_is_visited_in_the_order_of_the_nodes(config, make_ghn, make_graph):
    """A published rule closes cycles in a few graphs; an edge from a later node carries the state before the pass."""
    ghn, graph, other = make_ghn(config), make_graph(12), make_graph(9)
    back = torch.tensor([(7, 2), (11, 5)])
    graph = dataclasses.replace(graph, edges_E2=torch.cat((graph.edges_E2, back)))
    assert not graph.is_acyclic
    weights = dict(ghn.named_parameters())
    expected = torch.cat([literal.encode(weights, config, graph), literal.encode(weights, config, other)])
    assert torch.allclose(ghn.encode([graph, other]), expected, rtol=0, atol=1e-9)


def test_renumbering_the_nodes_renumbers_the_embeddings(config, make_ghn, make_graph):
    ghn, graph = make_ghn(config), make_graph(24)
    order = random.Random(0).sample(range(24), 24)
    assert torch.allclose(ghn.encode(permuted(graph, order)), ghn.encode(graph)[order], rtol=0, atol=1e-12)


def test_gradients_equal_those_of_the_literal_formulas(config, make_ghn, make_graph):
    ghn, graph = make_ghn(config), make_graph(6)
    weights = dict(ghn.named_parameters())
    generator = torch.Generator().manual_seed(5)

    def gradients(decoded: list[torch.Tensor]) -> tuple[torch.Tensor | None, ...]:
        generator.manual_seed(5)
        factors = (torch.randn(tensor.shape, dtype=tensor.dtype, generator=generator) for tensor in decoded)
        loss = sum((tensor * factor).sum() for tensor, factor in zip(decoded, factors, strict=True))
        return torch.autograd.grad(loss, list(weights.values()), allow_unused=True)

    ours = gradients(ghn(graph, REQUESTS))
    z = literal.encode(weights, config, graph)
    expected = gradients([literal.decode(weights, config, z[request.node], request) for request in REQUESTS])
    for name, a, b in zip(weights, ours, expected, strict=True):
        a, b = (torch.zeros(()) if gradient is None else gradient for gradient in (a, b))
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-9), name
        assert a.any(), f'no gradient reaches {name}'


def test_decoding_leaves_no_mode_behind_between_results(make_ghn, make_graph):
    ghn = make_ghn(GHN3)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        results = ghn.decode(ghn.encode(make_graph(6)), REQUESTS)
        next(results)
        assert torch.is_autocast_enabled('cpu')
        results.close()
    assert not torch.is_autocast_enabled('cpu')


def test_autocast_changes_nothing(config, make_graph):
    torch.manual_seed(0)
    ghn, graph = GHN(config), make_graph(6)
    expected = ghn(graph, REQUESTS)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        cast = ghn(graph, REQUESTS)
    assert all(torch.equal(a, b) for a, b in zip(cast, expected, strict=True))


def test_narrow_weights_compute_in_single_precision(config, make_graph):
    torch.manual_seed(0)
    narrow, graph = GHN(config).bfloat16(), make_graph(6)
    wide = GHN(config)
    wide.load_state_dict(narrow.state_dict())
    for a, b in zip(narrow(graph, REQUESTS), wide(graph, REQUESTS), strict=True):
        assert a.dtype is torch.float32
        assert torch.allclose(a, b, rtol=0, atol=1e-6)


def test_a_ghn_built_on_the_meta_device_works_once_weights_are_assigned(config, make_graph):
    ghn, graph = GHN(config), make_graph(6)
    state = torch.get_rng_state()
    with torch.device('meta'):
        empty = GHN(config)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(tensor.is_meta for tensor in empty.state_dict().values())
    empty.load_state_dict(ghn.state_dict(), assign=True)
    assert not any(tensor.is_meta for tensor in (*empty.parameters(), *empty.buffers()))
    assert all(torch.equal(a, b) for a, b in zip(empty(graph, REQUESTS), ghn(graph, REQUESTS), strict=True))


@pytest.mark.gpu
def test_the_gpu_gives_what_the_cpu_gives(config, make_ghn, make_graph):
    ghn, graphs = make_ghn(config), [make_graph(6), make_graph(24)]
    expected = [tensor.detach() for tensor in ghn(graphs, REQUESTS)]
    decoded = ghn.cuda()(graphs, REQUESTS)
    for a, b in zip(decoded, expected, strict=True):
        assert a.is_cuda
        assert torch.allclose(a.cpu(), b, rtol=0, atol=1e-9)


def test_a_registered_graph_network_is_built_by_its_name_once(make_graph):
    class Twice(nn.Module):
        def __init__(self, config):
            super().__init__()

        def forward(self, x_Nd, batch):
            return 2 * x_Nd

    try:
        ghn_module.register_gnn('twice')(Twice)
        config = GHNConfig(hid=8, max_shape=(8, 8, 11, 11), num_classes=10, gnn='twice')
        assert GHN(config).encode(make_graph(5)).shape == (5, 8)
        with pytest.raises(ConfigError, match="'twice'"):
            ghn_module.register_gnn('twice')(Twice)
    finally:
        ghn_module.GNNS.pop('twice', None)
