"""Graph networks are found by name, and a name is given once."""

from __future__ import annotations

import pytest
from torch import nn

from timm_ghn.errors import ConfigError
from timm_ghn.nn import GHN, GHNConfig, known_gnns, register_gnn, registry


def test_the_published_networks_are_registered():
    assert {'gated', 'graphormer', 'mlp'} <= set(known_gnns())


def test_a_name_is_refused_the_second_time():
    with pytest.raises(ConfigError, match=r"'gated'.*GatedGNN"):
        register_gnn('gated')(nn.Module)


def test_a_registered_network_is_built_by_its_name(monkeypatch, make_graph):
    monkeypatch.setattr(registry, '_GNNS', dict(registry._GNNS))

    @register_gnn('identity')
    class Identity(nn.Module):
        def __init__(self, config):
            super().__init__()

        def forward(self, x_Nd, batch):
            return x_Nd

    config = GHNConfig(hid=8, max_shape=(8, 8, 11, 11), num_classes=10, gnn='identity')
    assert GHN(config).encode(make_graph(5)).shape == (5, 8)
