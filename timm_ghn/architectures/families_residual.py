"""Families of residual convolutional networks: ResNet, pre-activation ResNet, RegNet, norm-free."""

from __future__ import annotations

from functools import partial
from typing import Any, cast

from timm.layers import BatchNormAct2d, GroupNorm, GroupNormAct, StdConv2d, create_conv2d
from timm.models.nfnet import NfCfg, NormFreeNet
from timm.models.regnet import RegNet, RegNetCfg, generate_regnet
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from timm.models.resnetv2 import ResNetV2
from torch import nn

from timm_ghn.architectures.architecture import Architecture, register_family
from timm_ghn.architectures.draws import Draws, round_to

#: Groups of a group normalisation; widths are multiples of 8.
GROUPS = 8

#: Stride of the first convolution and what pools behind it, with the total stride.
_STEMS = (*[((1, 'none'), 1)] * 3, ((2, 'none'), 2), ((1, 'max'), 2), *[((2, 'max'), 4)] * 3)

#: How the last map is pooled: nearly all networks of timm average.
_POOLINGS = (*['avg'] * 18, 'max', 'catavgmax')


def set_convolution(convolution: nn.Conv2d, *, kernel: int, stride: int) -> None:
    """Give a convolution the middle of its kernel and another stride, as for small images."""
    cut = (convolution.kernel_size[0] - kernel) // 2
    if cut > 0:
        middle = convolution.weight.detach()[..., cut : cut + kernel, cut : cut + kernel].clone()
        convolution.weight = nn.Parameter(middle)
        convolution.kernel_size = (kernel, kernel)
        convolution.padding = (kernel // 2, kernel // 2)
    convolution.stride = (stride, stride)


def _draw_stem(draw: Draws) -> dict[str, Any]:
    stride, pool = draw.affordable(_STEMS, after=8)
    stem = draw.choose((*['plain'] * 6, 'deep', 'tiered'))
    kernel = draw.choose((7, 7, 7, 5, 3) if stride > 1 else (3, 3, 3, 3, 3, 5)) if stem == 'plain' else 3
    return {'stem': stem, 'stem_kernel': kernel, 'stem_stride': stride, 'stem_pool': pool}


def _draw_widths(draw: Draws, stem: dict[str, Any], depths: tuple[int, ...], **costs: Any) -> tuple[int, ...]:
    """Widths of the four stages behind a stem; ``costs`` are those of :meth:`Draws.widths`."""
    stride = stem['stem_stride'] * (1 if stem['stem_pool'] == 'none' else 2)
    sides = draw.sides(stride, 2, 2, 2)
    return draw.widths(draw.ratios(4), depths=depths, sides=sides, **costs)


def draw_resnet_basic(draw: Draws) -> dict[str, Any]:
    """Two 3x3 convolutions per block."""
    stem = _draw_stem(draw)
    depths = draw.depths(4, 3)
    widths = _draw_widths(draw, stem, depths, per_block=18)
    return {**stem, 'depths': depths, 'widths': widths, **_draw_resnet_details(draw, stem, widths[0])}


def draw_resnet_bottleneck(draw: Draws) -> dict[str, Any]:
    """1x1, 3x3 (in groups: ResNeXt) and 1x1 convolutions per block; widths are those of a block's 3x3."""
    stem = _draw_stem(draw)
    depths = draw.depths(4, 3)
    cardinality, base_width = draw.choose((*[(1, 64)] * 5, (1, 128), (2, 32), (2, 64), (4, 24), (8, 8), (32, 4)))
    ratio = cardinality * base_width / 64
    per_block = 8 * ratio + 9 * ratio * ratio / cardinality
    widths = _draw_widths(draw, stem, depths, per_block=per_block, multiple=16 if base_width == 4 else 8)
    details = _draw_resnet_details(draw, stem, widths[0])
    if cardinality > 1:
        details['norm'] = 'batch'
    return {**stem, 'depths': depths, 'widths': widths, 'cardinality': cardinality, 'base_width': base_width, **details}


def _draw_resnet_details(draw: Draws, stem: dict[str, Any], width: int) -> dict[str, Any]:
    norm = 'group' if stem['stem'] != 'tiered' and draw.chance(0.08) else 'batch'
    if stem['stem_pool'] == 'max' and draw.chance(0.2):
        stem['stem_pool'] = 'convolution'
    return {
        'stem_width': round_to(width * draw.choose((0.5, 1, 1, 1, 1, 2)), 16),
        'norm': norm,
        'act': draw.choose((*['relu'] * 8, 'silu', 'gelu')),
        'squeeze_excite': draw.chance(0.12),
        'average_down': draw.chance(0.12),
        'pooling': draw.choose(_POOLINGS),
    }


@register_family('resnet_basic')
@register_family('resnet_bottleneck')
def _build_resnet(architecture: Architecture, common: dict[str, Any]) -> nn.Module:
    options = architecture.options
    block: Any = BasicBlock if architecture.family == 'resnet_basic' else Bottleneck
    model: Any = ResNet(
        block,
        layers=options['depths'],
        channels=options['widths'],
        global_pool=options['pooling'],
        cardinality=options.get('cardinality', 1),
        base_width=options.get('base_width', 64),
        # The class gives another width than 64 to deep stems only; the plain one is put in its place below.
        stem_type='deep_tiered' if options['stem'] == 'tiered' else 'deep',
        stem_width=options['stem_width'] // 2,
        replace_stem_pool=options['stem_pool'] == 'convolution',
        avg_down=options['average_down'],
        act_layer=options['act'],
        norm_layer=partial(GroupNorm, num_groups=GROUPS) if options['norm'] == 'group' else nn.BatchNorm2d,
        block_args={'attn_layer': 'se'} if options['squeeze_excite'] else {},
        **common,
    )
    kernel, stride = options['stem_kernel'], options['stem_stride']
    if options['stem'] == 'plain':
        width, device = options['stem_width'], common['device']
        model.conv1 = nn.Conv2d(architecture.in_chans, width, kernel, stride, kernel // 2, bias=False, device=device)
        nn.init.kaiming_normal_(model.conv1.weight, mode='fan_out', nonlinearity='relu')
    else:
        model.conv1[0].stride = (stride, stride)
    if options['stem_pool'] == 'none':
        model.maxpool = nn.Identity()
    return cast(nn.Module, model)


def draw_resnetv2(draw: Draws) -> dict[str, Any]:
    """Norm and activation before each convolution; with group norm, the weights are standardised (BiT)."""
    stem = _draw_stem(draw)
    depths = draw.depths(4, 3)
    basic = draw.chance(0.4)
    ratio = draw.choose((0.25, 0.25, 0.5))
    per_block = 18.0 if basic else 2 * ratio + 9 * ratio * ratio
    widths = _draw_widths(draw, stem, depths, per_block=per_block, multiple=8 if basic else 32)
    norm = 'group' if stem['stem'] != 'tiered' and draw.chance(0.35) else 'batch'
    return {
        **stem,
        'depths': depths,
        'widths': widths,
        'basic': basic,
        'bottle_ratio': ratio,
        'stem_width': round_to(widths[0] * draw.choose((0.5, 1) if basic else (0.25, 0.5)), 16),
        'norm': norm,
        'act': draw.choose((*['relu'] * 6, 'silu', 'gelu')),
        'average_down': draw.chance(0.12),
        'pooling': draw.choose(_POOLINGS),
    }


@register_family('resnetv2')
def _build_resnetv2(architecture: Architecture, common: dict[str, Any]) -> nn.Module:
    options = architecture.options
    group = options['norm'] == 'group'
    model: Any = ResNetV2(
        layers=list(options['depths']),
        channels=options['widths'],
        global_pool=options['pooling'],
        stem_chs=options['stem_width'],
        stem_type={'plain': '', 'deep': 'deep', 'tiered': 'tiered'}[options['stem']],
        avg_down=options['average_down'],
        basic=options['basic'],
        bottle_ratio=1.0 if options['basic'] else options['bottle_ratio'],
        act_layer=options['act'],
        norm_layer=partial(GroupNormAct, num_groups=GROUPS) if group else BatchNormAct2d,
        conv_layer=StdConv2d if group else create_conv2d,
        **common,
    )
    first = model.stem.conv if options['stem'] == 'plain' else model.stem.conv1
    set_convolution(first, kernel=options['stem_kernel'], stride=options['stem_stride'])
    if options['stem_pool'] == 'none':
        model.stem.pool = nn.Identity()
    return cast(nn.Module, model)


def draw_regnet(draw: Draws) -> dict[str, Any]:
    """X, Y (squeeze-excite), V (pre-activation) and Z (inverted bottleneck), by the parameters of arXiv 2003.13678."""
    kind = draw.choose(('x', 'y', 'v', 'z'))
    stride = draw.affordable(((1, 1), (2, 2)), after=16)
    expansion = 4.0 if kind == 'z' else 1.0
    group_size = draw.choose((4, 8, 8, 16, 24, 32))
    per_block = 2 * expansion + 9 * expansion * group_size / 64
    sides = draw.sides(2 * stride, 2, 2, 2)
    for _ in range(100):
        depth = draw.choose(range(4, 15))
        wm = draw.choose((1.5, 1.75, 2.0, 2.25, 2.5, 2.75))
        ratios, depths = tuple(wm**stage for stage in range(4)), (max(1, depth // 4),) * 4
        widths = draw.widths(ratios, depths=depths, sides=sides, per_block=per_block)
        wa = round(widths[0] * (wm**3 - 1) / (depth - 1), 2)
        # The class has four stages, no more and no less.
        if generate_regnet(wa, widths[0], wm, depth, group_size)[1] == 4:
            break
    return {
        'kind': kind,
        'stem_stride': stride,
        'stem_width': round_to(min(widths[0], 64) * draw.choose((0.5, 1)), 8),
        'depth': depth,
        'w0': widths[0],
        'wa': wa,
        'wm': wm,
        'group_size': group_size,
        'expansion': expansion,
        'average_down': kind in 'xyv' and draw.chance(0.25),
        'act': draw.choose((*['relu'] * 5, 'silu')),
        'norm': 'batch',
    }


@register_family('regnet')
def _build_regnet(architecture: Architecture, common: dict[str, Any]) -> nn.Module:
    options = architecture.options
    kind = options['kind']
    config = RegNetCfg(
        depth=options['depth'],
        w0=options['w0'],
        wa=options['wa'],
        wm=options['wm'],
        group_size=options['group_size'],
        bottle_ratio=options['expansion'],
        se_ratio=0.0 if kind == 'x' else 0.25,
        stem_width=options['stem_width'],
        downsample=None if kind == 'z' else 'avg' if options['average_down'] else 'conv1x1',
        linear_out=kind == 'z',
        preact=kind == 'v',
        act_layer=options['act'],
    )
    model: Any = RegNet(config, **common)
    first = model.stem if kind == 'v' else model.stem.conv
    set_convolution(first, kernel=3, stride=options['stem_stride'])
    return cast(nn.Module, model)


def draw_nfnet(draw: Draws) -> dict[str, Any]:
    """Scaled, standardised convolutions and no norms: NF-ResNet, NF-RegNet-like and NFNet blocks."""
    stem_stride, pool = draw.affordable((((1, False), 2), ((2, False), 4), ((1, True), 2), ((2, True), 4)), after=8)
    depths = draw.depths(4, 3)
    ratio = draw.choose((0.25, 0.5, 1.0))
    group_size = draw.choose((None, None, 8, 16))
    extra = draw.chance(0.25)
    sides = draw.sides(stem_stride * 2, 2, 2, 2)
    spatial = 9 * ratio * (ratio if group_size is None else group_size / 64) * (2 if extra else 1)
    multiple = round((group_size or 8) / ratio)  # so that the 3x3 convolutions have whole groups
    widths = draw.widths(draw.ratios(4), depths=depths, sides=sides, per_block=2 * ratio + spatial, multiple=multiple)
    return {
        'stem': draw.choose(('deep', '3x3', '7x7') if stem_stride > 1 else ('deep', '3x3')),
        'stem_stride': stem_stride,
        'stem_pool': pool,
        'stem_width': round_to(widths[0] * draw.choose((0.5, 1)), 16),
        'depths': depths,
        'widths': widths,
        'bottle_ratio': ratio,
        'group_size': group_size,
        'extra_convolution': extra,
        'squeeze_excite': draw.chance(0.35),
        'act': draw.choose(('relu', 'silu', 'gelu')),
        'norm': 'none',
    }


@register_family('nfnet')
def _build_nfnet(architecture: Architecture, common: dict[str, Any]) -> nn.Module:
    options = architecture.options
    config = NfCfg(
        depths=options['depths'],
        channels=options['widths'],
        stem_type=options['stem'] + ('_pool' if options['stem_pool'] else ''),
        stem_chs=options['stem_width'],
        group_size=options['group_size'],
        attn_layer='se' if options['squeeze_excite'] else None,
        attn_kwargs={'rd_ratio': 0.25} if options['squeeze_excite'] else None,
        bottle_ratio=options['bottle_ratio'],
        extra_conv=options['extra_convolution'],
        act_layer=options['act'],
    )
    model: Any = NormFreeNet(config, **common)
    first = model.stem.conv1 if options['stem'] == 'deep' else model.stem.conv
    first.stride = (options['stem_stride'],) * 2
    return cast(nn.Module, model)
