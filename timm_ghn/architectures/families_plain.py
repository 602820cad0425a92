"""Families of convolutional networks built otherwise: VGG, DenseNet, MobileNet and EfficientNet."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
from timm.layers import ClassifierHead, get_act_layer
from timm.models.densenet import DenseNet
from timm.models.efficientnet import EfficientNet, decode_arch_def
from timm.models.mobilenetv3 import MobileNetV3
from timm.models.vgg import VGG, ConvMlp
from torch import nn

from timm_ghn.architectures.architecture import Architecture, register_family
from timm_ghn.architectures.cost import Limits
from timm_ghn.architectures.draws import (
    affordable,
    chance,
    choose,
    draw_depths,
    draw_ratios,
    round_to,
    stage_sides,
    stage_widths,
)
from timm_ghn.architectures.families_residual import set_convolution


def draw_vgg(rng: np.random.Generator, limits: Limits) -> dict[str, Any]:
    """3x3 convolutions and poolings in a row, then a linear classifier or VGG's own convolutional one."""
    stages = affordable(rng, limits, ((3, 4), (4, 8), (5, 16), (5, 16)))
    depths = draw_depths(rng, stages, 3)
    sides = stage_sides(limits.image_size, (1,) + (2,) * (stages - 1))
    # Only the first convolution of a stage reads another width than its own.
    ratios = draw_ratios(rng, stages)
    widths = stage_widths(rng, limits, ratios, depths=depths, sides=sides, per_block=9)
    return {
        'depths': depths,
        'widths': widths,
        'last_pooling': limits.image_size >> stages >= 1 and chance(rng, 0.5),
        'classifier': choose(rng, ('linear', 'linear', 'convolutions')),
        'classifier_kernel': choose(rng, (1, 3, 7)),
        'classifier_width': choose(rng, (64, 128, 256, 512)),
        'norm': choose(rng, (*['batch'] * 5, 'none')),
        'act': choose(rng, (*['relu'] * 6, 'gelu')),
    }


@register_family('vgg')
def build_vgg(architecture: Architecture, common: dict[str, Any]) -> nn.Module:
    """timm's VGG."""
    options = architecture.options
    cfg: list[int | str] = []
    for depth, width in zip(options['depths'], options['widths'], strict=True):
        cfg += [*([width] * depth), 'M']
    act = get_act_layer(options['act'])
    model: Any = VGG(
        cfg if options['last_pooling'] else cfg[:-1],
        # The class's own classifier has 4096 channels; it is made as small as can be, and replaced.
        mlp_ratio=1 / 4096,
        act_layer=act,
        norm_layer=nn.BatchNorm2d if options['norm'] == 'batch' else None,
        **{**common, 'num_classes': 0},
    )
    features = options['widths'][-1]
    model.pre_logits = nn.Identity()
    if options['classifier'] == 'convolutions':
        kernel, width = options['classifier_kernel'], options['classifier_width']
        model.pre_logits = ConvMlp(features, width, kernel, drop_rate=0.0, act_layer=act, device=common['device'])
        features = width
    model.head = ClassifierHead(features, architecture.num_classes, device=common['device'])
    model.num_classes, model.head_hidden_size = architecture.num_classes, features
    return cast(nn.Module, model)


def draw_densenet(rng: np.random.Generator, limits: Limits) -> dict[str, Any]:
    """Every layer of a block reads all before it."""
    stride, pool = affordable(rng, limits, (((1, False), 1), ((2, False), 2), ((1, True), 2), ((2, True), 4)), after=8)
    stages = choose(rng, (3, 4, 4))
    return {
        'stem': choose(rng, ('plain', 'plain', 'deep')),
        'stem_kernel': choose(rng, (3, 5, 7)) if stride > 1 else 3,
        'stem_stride': stride,
        'stem_pool': pool,
        'depths': draw_depths(rng, stages, 6),
        'growth': choose(rng, (8, 12, 16, 24, 32)),
        'bottleneck': choose(rng, (2, 4)),
        'act': choose(rng, (*['relu'] * 5, 'silu')),
        'norm': 'batch',
    }


@register_family('densenet')
def build_densenet(architecture: Architecture, common: dict[str, Any]) -> nn.Module:
    """timm's DenseNet."""
    options = architecture.options
    model: Any = DenseNet(
        growth_rate=options['growth'],
        block_config=options['depths'],
        bn_size=options['bottleneck'],
        stem_type='deep' if options['stem'] == 'deep' else '',
        act_layer=options['act'],
        **common,
    )
    kernel = options['stem_kernel'] if options['stem'] == 'plain' else 3
    set_convolution(model.features.conv0, kernel=kernel, stride=options['stem_stride'])
    if not options['stem_pool']:
        model.features.pool0 = nn.Identity()
    return cast(nn.Module, model)


def draw_mobilenet(rng: np.random.Generator, limits: Limits) -> dict[str, Any]:
    """Depthwise separable convolutions (MobileNet), inverted bottlenecks (v2), these with v3's head and activation."""
    kind = choose(rng, ('v1', 'v2', 'v2', 'v3'))
    block = 'ds' if kind == 'v1' else 'ir'
    act = {'v1': choose(rng, ('relu', 'relu6')), 'v2': choose(rng, ('relu6', 'relu')), 'v3': 'hard_swish'}[kind]
    return _draw_inverted(
        rng, limits, head='v3' if kind == 'v3' else 'plain', blocks=(block,), act=act, squeeze=kind == 'v3'
    )


def draw_efficientnet(rng: np.random.Generator, limits: Limits) -> dict[str, Any]:
    """Inverted bottlenecks with squeeze-excite, the first of them fused (v2) or not."""
    blocks = choose(rng, (('ir',), ('er', 'ir'), ('er', 'er', 'ir')))
    return _draw_inverted(
        rng, limits, head='plain', blocks=blocks, act=choose(rng, ('silu', 'silu', 'relu')), squeeze=True
    )


def _draw_inverted(
    rng: np.random.Generator, limits: Limits, *, head: str, blocks: tuple[str, ...], act: str, squeeze: bool
) -> dict[str, Any]:
    """Stages in timm's words, ``ir_r2_k3_s2_e4_c24_se0.25``: type, repeats, kernel, stride, expansion, width, ratio."""
    stages = choose(rng, (4, 5, 6, 7))
    stem_stride = choose(rng, (1, 1, 2))
    strides = _draw_strides(rng, stages, limits.image_size // stem_stride)
    depths = draw_depths(rng, stages, 2)
    sides = stage_sides(limits.image_size // stem_stride, strides)
    expansion = choose(rng, (2, 3, 4, 6))
    spatial = {'ds': 1.0, 'ir': 2.0 * expansion, 'er': 10.0 * expansion}
    kinds = tuple(blocks[min(stage, len(blocks) - 1)] for stage in range(stages))
    per_block = sum(spatial[kind] for kind in kinds) / stages
    ratios = draw_ratios(rng, stages, (1.0, 1.5, 1.5, 2.0))
    widths = stage_widths(rng, limits, ratios, depths=depths, sides=sides, per_block=per_block)
    texts = []
    for kind, depth, stride, width in zip(kinds, depths, strides, widths, strict=True):
        kernel = choose(rng, (3, 3, 5, 7) if kind != 'er' else (3,))
        expanded = '' if kind == 'ds' else f'_e{choose(rng, (expansion, expansion, max(1, expansion - 1)))}'
        ratio = '_se0.25' if squeeze and kind == 'ir' and chance(rng, 0.8) else ''
        texts.append(f'{kind}_r{depth}_k{kernel}_s{stride}{expanded}_c{width}{ratio}')
    return {
        'stages': tuple(texts),
        'stem_width': round_to(widths[0] * choose(rng, (1, 1, 2)), 8),
        'stem_stride': stem_stride,
        'head': head,
        'head_width': round_to(widths[-1] * choose(rng, (1, 2, 4)), 8),
        'act': act,
        'norm': 'batch',
    }


def _draw_strides(rng: np.random.Generator, stages: int, side: int) -> tuple[int, ...]:
    """Which stages halve the map: at least two of them, and no more than there is to halve."""
    most = min(4, stages, max(0, side.bit_length() - 1))
    count = min(most, choose(rng, (2, 3, 4)))
    halving = set(rng.permutation(stages)[:count].tolist())
    return tuple(2 if stage in halving else 1 for stage in range(stages))


@register_family('mobilenet')
@register_family('efficientnet')
def build_inverted(architecture: Architecture, common: dict[str, Any]) -> nn.Module:
    """timm's EfficientNet, or its MobileNetV3 for the head that pools before its last convolution."""
    options = architecture.options
    build = MobileNetV3 if options['head'] == 'v3' else EfficientNet
    model = build(
        block_args=decode_arch_def([[text] for text in options['stages']]),
        num_features=options['head_width'],
        stem_size=options['stem_width'],
        fix_stem=True,
        act_layer=get_act_layer(options['act']),
        **common,
    )
    set_convolution(model.conv_stem, kernel=3, stride=options['stem_stride'])
    return model
