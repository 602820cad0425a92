from collections import Counter

import pytest
import timm

from timm_ghn import trace
from timm_ghn.graph.channels import ChannelLayout, channel_layouts
from timm_ghn.graph.primitives import Primitive


def layouts(name, **options):
    graph = trace(timm.create_model(name, **options), rules='operators')
    weights = (Primitive.CONV, Primitive.SEP_CONV, Primitive.DIL_CONV, Primitive.POS_ENC)
    found = zip(graph.nodes, channel_layouts(graph), strict=True)
    return {node.parameter: layout for node, layout in found if node.shape and node.primitive in weights}


def test_fused_queries_keys_and_values_are_three_parts():
    found = layouts('test_vit')
    for name, layout in found.items():
        assert layout.rows == (3 if 'qkv' in name else 1), name
    assert found['pos_embed'] == ChannelLayout('position')
    assert found['patch_embed.proj.weight'] == ChannelLayout('stem')
    assert found['head.weight'] == ChannelLayout('head')


@pytest.mark.parametrize(
    ('name', 'expected'),
    [
        ('swin_tiny_patch4_window7_224', {ChannelLayout(columns=4): 3, ChannelLayout(rows=3): 12}),
        ('regnety_002', {ChannelLayout('conv', groups=46): 7, ChannelLayout('conv', groups=3): 1}),
        ('resnext50_32x4d', {ChannelLayout('conv', groups=32): 16}),
        ('mobilenetv3_small_100', {ChannelLayout('depthwise'): 11, ChannelLayout('stem'): 1}),
        ('pvt_v2_b0', {ChannelLayout(rows=2): 8}),
        ('resnet18', {ChannelLayout('conv'): 16, ChannelLayout('dense'): 3}),
    ],
)
def test_families(name, expected):
    found = Counter(layouts(name).values())
    assert {layout: found[layout] for layout in expected} == expected


def test_layers_over_positions_are_no_groups():
    assert {layout.groups for layout in layouts('mixer_s32_224').values()} == {1}
