"""Families of convolutional networks built otherwise: VGG, DenseNet, MobileNet and EfficientNet."""

from __future__ import annotations

from typing import Any, cast

from timm.layers import ClassifierHead, get_act_layer
from timm.models.densenet import DenseNet
from timm.models.efficientnet import EfficientNet, decode_arch_def
from timm.models.mobilenetv3 import MobileNetV3
from timm.models.vgg import VGG, ConvMlp
from torch import nn

from timm_ghn.architectures.architecture import Architecture, register_family
from timm_ghn.architectures.draws import Draws, round_to, stage_sides
from timm_ghn.architectures.families_residual import set_convolution


def draw_vgg(draw: Draws) -> dict[str, Any]:
    """3x3 convolutions and poolings in a row, then a linear classifier or VGG's own convolutional one."""
    stages = draw.affordable(((3, 4), (4, 8), (5, 16), (5, 16)))
    depths = draw.depths(stages, 3)
    sides = draw.sides(1, *(2,) * (stages - 1))
    # Only the first convolution of a stage reads another width than its own.
    ratios = draw.ratios(stages)
    widths = draw.widths(ratios, depths=depths, sides=sides, per_block=9)
    return {
        'depths': depths,
        'widths': widths,
        'last_pooling': draw.image_size >> stages >= 1 and draw.chance(0.5),
        'classifier': draw.choose(('linear', 'linear', 'convolutions')),
        'classifier_kernel': draw.choose((1, 3, 7)),
        'classifier_width': draw.choose((64, 128, 256, 512)),
        'norm': draw.choose((*['batch'] * 5, 'none')),
        'act': draw.choose((*['relu'] * 6, 'gelu')),
    }


@register_family('vgg')
def _build_vgg(architecture: Architecture, common: dict[str, Any]) -> nn.Module:
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


def draw_densenet(draw: Draws) -> dict[str, Any]:
    """Every layer of a block reads all before it."""
    stride, pool = draw.affordable((((1, False), 1), ((2, False), 2), ((1, True), 2), ((2, True), 4)), after=8)
    stages = draw.choose((3, 4, 4))
    return {
        'stem': draw.choose(('plain', 'plain', 'deep')),
        'stem_kernel': draw.choose((3, 5, 7)) if stride > 1 else 3,
        'stem_stride': stride,
        'stem_pool': pool,
        'depths': draw.depths(stages, 6),
        'growth': draw.choose((8, 12, 16, 24, 32)),
        'bottleneck': draw.choose((2, 4)),
        'act': draw.choose((*['relu'] * 5, 'silu')),
        'norm': 'batch',
    }


@register_family('densenet')
def _build_densenet(architecture: Architecture, common: dict[str, Any]) -> nn.Module:
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


def draw_mobilenet(draw: Draws) -> dict[str, Any]:
    """Depthwise separable convolutions (MobileNet), inverted bottlenecks (v2), these with v3's head and activation."""
    kind = draw.choose(('v1', 'v2', 'v2', 'v3'))
    block = 'ds' if kind == 'v1' else 'ir'
    act = {'v1': draw.choose(('relu', 'relu6')), 'v2': draw.choose(('relu6', 'relu')), 'v3': 'hard_swish'}[kind]
    return _draw_inverted(draw, head='v3' if kind == 'v3' else 'plain', blocks=(block,), act=act, squeeze=kind == 'v3')


def draw_efficientnet(draw: Draws) -> dict[str, Any]:
    """Inverted bottlenecks with squeeze-excite, the first of them fused (v2) or not."""
    blocks = draw.choose((('ir',), ('er', 'ir'), ('er', 'er', 'ir')))
    return _draw_inverted(draw, head='plain', blocks=blocks, act=draw.choose(('silu', 'silu', 'relu')), squeeze=True)


def _draw_inverted(draw: Draws, *, head: str, blocks: tuple[str, ...], act: str, squeeze: bool) -> dict[str, Any]:
    """Stages in timm's words, ``ir_r2_k3_s2_e4_c24_se0.25``: type, repeats, kernel, stride, expansion, width, ratio."""
    stages = draw.choose((4, 5, 6, 7))
    stem_stride = draw.choose((1, 1, 2))
    strides = _draw_strides(draw, stages, draw.image_size // stem_stride)
    depths = draw.depths(stages, 2)
    sides = stage_sides(draw.image_size // stem_stride, strides)
    expansion = draw.choose((2, 3, 4, 6))
    spatial = {'ds': 1.0, 'ir': 2.0 * expansion, 'er': 10.0 * expansion}
    kinds = tuple(blocks[min(stage, len(blocks) - 1)] for stage in range(stages))
    per_block = sum(spatial[kind] for kind in kinds) / stages
    ratios = draw.ratios(stages, (1.0, 1.5, 1.5, 2.0))
    widths = draw.widths(ratios, depths=depths, sides=sides, per_block=per_block)
    texts = []
    for kind, depth, stride, width in zip(kinds, depths, strides, widths, strict=True):
        kernel = draw.choose((3, 3, 5, 7) if kind != 'er' else (3,))
        expanded = '' if kind == 'ds' else f'_e{draw.choose((expansion, expansion, max(1, expansion - 1)))}'
        ratio = '_se0.25' if squeeze and kind == 'ir' and draw.chance(0.8) else ''
        texts.append(f'{kind}_r{depth}_k{kernel}_s{stride}{expanded}_c{width}{ratio}')
    return {
        'stages': tuple(texts),
        'stem_width': round_to(widths[0] * draw.choose((1, 1, 2)), 8),
        'stem_stride': stem_stride,
        'head': head,
        'head_width': round_to(widths[-1] * draw.choose((1, 2, 4)), 8),
        'act': act,
        'norm': 'batch',
    }


def _draw_strides(draw: Draws, stages: int, side: int) -> tuple[int, ...]:
    """Which stages halve the map: at least two of them, and no more than there is to halve."""
    most = min(4, stages, max(0, side.bit_length() - 1))
    count = min(most, draw.choose((2, 3, 4)))
    halving = set(draw.rng.permutation(stages)[:count].tolist())
    return tuple(2 if stage in halving else 1 for stage in range(stages))


@register_family('mobilenet')
@register_family('efficientnet')
def _build_inverted(architecture: Architecture, common: dict[str, Any]) -> nn.Module:
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
