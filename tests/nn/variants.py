"""Configurations of small GHNs, one of each kind."""

from __future__ import annotations

import dataclasses

from timm_ghn.nn import GHNConfig

GHN3 = GHNConfig(hid=16, max_shape=(24, 20, 11, 11), num_classes=30, layers=2, heads=2)
VARIANTS = {
    'ghn3': GHN3,
    'ghn3_s16': dataclasses.replace(GHN3, max_shape=(20, 24, 16, 16), heads=4, virtual_edges=3),
    'ghn3_no_virtual_edges': dataclasses.replace(GHN3, virtual_edges=1, layers=1),
    'ghn2': dataclasses.replace(GHN3, gnn='gated', layers=1, window='corner'),
    'ghn2_cutoff_3': dataclasses.replace(GHN3, gnn='gated', layers=1, window='corner', virtual_edges=3),
    'ghn1': dataclasses.replace(
        GHN3, gnn='gated', layers=1, window='corner', virtual_edges=1, layernorm=False, weight_norm=False
    ),
    'mlp': dataclasses.replace(
        GHN3, gnn='mlp', layers=1, decoder='mlp', window='corner', max_shape=(6, 6, 11, 11), num_classes=7
    ),
}
