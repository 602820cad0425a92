"""Families that mix positions and channels in turn: ConvNeXt, vision transformers, Swin, Mixer, MetaFormer."""

from __future__ import annotations

from typing import Any

from timm.layers import GatedMlp, GroupNorm1, Mlp
from timm.models.convnext import ConvNeXt
from timm.models.metaformer import (
    Attention,
    GroupNorm1NoBias,
    LayerNorm2dNoBias,
    LayerNormNoBias,
    MetaFormer,
    Pooling,
    SepConv,
    StarReLU,
)
from timm.models.mlp_mixer import Affine, MixerBlock, MlpMixer, ResBlock, SpatialGatingBlock
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from timm_ghn.architectures.architecture import Architecture, register_family
from timm_ghn.architectures.draws import Draws
from timm_ghn.architectures.families_residual import set_convolution

#: Initial layer scales that are drawn; None for no layer scale. timm's own start at 1e-6 to 1e-4: under such a factor
#: the weights of a branch have next to no gradient, so a GHN would learn nothing from them.
OPEN_GATES = (None, 0.1)


def draw_convnext(draw: Draws) -> dict[str, Any]:
    """Depthwise convolution, norm, two linear layers; layer scale (v1) or response norm (v2) or neither."""
    stems = (('convolution', 1), ('patch2', 2), ('patch2', 2), ('patch4', 4), ('overlap', 4))
    stem = draw.affordable(stems, after=8)
    depths = draw.depths(4, 3)
    sides = draw.sides({'convolution': 1, 'patch2': 2}.get(stem, 4), 2, 2, 2)
    widths = draw.widths(draw.ratios(4), depths=depths, sides=sides, per_block=8)
    kernels = draw.each(4, (3, 5, 7, 9)) if draw.chance(0.1) else (draw.choose((*[7] * 6, 3, 5)),) * 4
    response = draw.chance(0.35)
    return {
        'stem': stem,
        'depths': depths,
        'widths': widths,
        'kernels': kernels,
        'layer_scale': None if response else draw.choose(OPEN_GATES),
        'response_norm': response,
        'convolutional_mlp': draw.chance(0.3),
        'norm_before_pooling': draw.chance(0.1),
        'act': draw.choose((*['gelu'] * 8, 'relu', 'silu')),
    }


@register_family('convnext')
def _build_convnext(architecture: Architecture, common: dict[str, Any]) -> nn.Module:
    options = architecture.options
    stem = options['stem']
    model = ConvNeXt(
        depths=options['depths'],
        dims=options['widths'],
        kernel_sizes=options['kernels'],
        ls_init_value=options['layer_scale'],
        stem_type='overlap' if stem == 'overlap' else 'patch',
        # A patch of 2 would halve the map in the first stage too; the convolution is replaced below.
        patch_size=4 if stem == 'patch4' else 1,
        head_norm_first=options['norm_before_pooling'],
        conv_mlp=options['convolutional_mlp'],
        use_grn=options['response_norm'],
        act_layer=options['act'],
        **common,
    )
    if stem in ('convolution', 'patch2'):
        kernel, stride, padding = (3, 1, 1) if stem == 'convolution' else (2, 2, 0)
        width = options['widths'][0]
        first = nn.Conv2d(architecture.in_chans, width, kernel, stride=stride, padding=padding, device=common['device'])
        nn.init.trunc_normal_(first.weight, std=0.02)
        model.stem[0] = first
    return model


def _draw_patches(draw: Draws) -> tuple[int, int, int]:
    """Patch size, depth, and tokens along a side of a network without stages; at least 2x2 tokens."""
    patch = draw.affordable(((2, 2), (4, 4), (4, 4), (8, 8), (16, 16)), after=2)
    return patch, draw.choose((2, 3, 4, 5, 6, 8, 10, 12)), max(1, draw.image_size // patch)


def _draw_transformer(draw: Draws) -> dict[str, Any]:
    mlp_ratio = draw.choose((*[4.0] * 6, 1.0, 2.0, 3.0))
    patch, depth, side = _draw_patches(draw)
    head = draw.choose((16, 32, 32, 64))
    (width,) = draw.widths((1.0,), depths=(depth,), sides=(side,), per_block=4 + 2 * mlp_ratio, multiple=head)
    return {
        'patch': patch,
        'depth': depth,
        'width': width,
        'heads': width // head,
        'mlp_ratio': mlp_ratio,
        'qkv_bias': draw.chance(0.92),
        'qk_norm': draw.chance(0.08),
        'layer_scale': draw.choose((None, None, None, *OPEN_GATES)),
        'norm_first': draw.chance(0.05),
        'act': draw.choose((*['gelu'] * 8, 'relu', 'silu')),
    }


def draw_vit(draw: Draws) -> dict[str, Any]:
    """With a class token that is read at the end."""
    options = _draw_transformer(draw)
    return {**options, 'class_token': True, 'pooling': 'token', 'registers': 0, 'positions': 'learn'}


def draw_vit_pooled(draw: Draws) -> dict[str, Any]:
    """Without a class token: tokens are averaged, or pooled by attention; with registers, or without positions."""
    return {
        **_draw_transformer(draw),
        'class_token': False,
        'pooling': draw.choose(('avg', 'avg', 'avg', 'map')),
        'registers': draw.choose((0, 0, 0, 1, 4)),
        'positions': draw.choose(('learn', 'learn', 'learn', 'none')),
    }


@register_family('vit')
@register_family('vit_pooled')
def _build_vit(architecture: Architecture, common: dict[str, Any]) -> nn.Module:
    options = architecture.options
    return VisionTransformer(
        img_size=architecture.image_size,
        patch_size=options['patch'],
        global_pool=options['pooling'],
        embed_dim=options['width'],
        depth=options['depth'],
        num_heads=options['heads'],
        mlp_ratio=options['mlp_ratio'],
        qkv_bias=options['qkv_bias'],
        qk_norm=options['qk_norm'],
        init_values=options['layer_scale'],
        class_token=options['class_token'],
        pos_embed=options['positions'],
        reg_tokens=options['registers'],
        pre_norm=options['norm_first'],
        act_layer=options['act'],
        **common,
    )


def draw_swin(draw: Draws) -> dict[str, Any]:
    """Attention in shifted windows, and patches that are merged between stages."""
    stages = draw.choose((2, 3, 3, 4))
    patch = draw.affordable(((1, 1), (2, 2), (2, 2), (4, 4), (4, 4)), after=2 ** (stages - 1))
    depths = tuple(2 * draw.choose((1, 1, 2)) if draw.chance(0.8) else 1 for _ in range(stages))
    mlp_ratio = draw.choose((2.0, 3.0, 4.0))
    head = draw.choose((8, 16, 32))
    sides = draw.sides(patch, *(2,) * (stages - 1))
    ratios = tuple(2.0**stage for stage in range(stages))
    widths = draw.widths(ratios, depths=depths, sides=sides, per_block=4 + 2 * mlp_ratio, multiple=head)
    return {
        'patch': patch,
        'depths': depths,
        'width': widths[0],
        'heads': tuple(width // head for width in widths),
        'window': draw.choose((2, 4, 4, 7, 8)),
        'mlp_ratio': mlp_ratio,
        'qkv_bias': draw.chance(0.92),
    }


@register_family('swin')
def _build_swin(architecture: Architecture, common: dict[str, Any]) -> nn.Module:
    options = architecture.options
    return SwinTransformer(
        img_size=architecture.image_size,
        patch_size=options['patch'],
        embed_dim=options['width'],
        depths=options['depths'],
        num_heads=options['heads'],
        window_size=options['window'],
        mlp_ratio=options['mlp_ratio'],
        qkv_bias=options['qkv_bias'],
        drop_path_rate=0.0,
        **common,
    )


#: Channels of an attention head of MetaFormer, which its class fixes.
HEAD = 32

_MIXERS: dict[str, dict[str, Any]] = {
    'mixer': {'block_layer': MixerBlock, 'mlp_layer': Mlp},
    'resmlp': {'block_layer': ResBlock, 'mlp_layer': Mlp, 'norm_layer': Affine},
    'gmlp': {'block_layer': SpatialGatingBlock, 'mlp_layer': GatedMlp},
}


def draw_mixer(draw: Draws) -> dict[str, Any]:
    """Linear layers over positions: MLP-Mixer, ResMLP, gMLP."""
    block = draw.choose(('mixer', 'mixer', 'resmlp', 'gmlp'))
    ratio = draw.choose((2.0, 3.0, 4.0))
    patch, depth, side = _draw_patches(draw)
    (width,) = draw.widths((1.0,), depths=(depth,), sides=(side,), per_block=2 * ratio, multiple=16)
    return {
        'block': block,
        'patch': patch,
        'depth': depth,
        'width': width,
        'mlp_ratio': (draw.choose((0.5, 0.5, 1.0)), ratio) if block == 'mixer' else ratio,
        'stem_norm': draw.chance(0.2),
        'act': draw.choose(('gelu', 'gelu', 'relu', 'silu')),
    }


_ACTIVATIONS: dict[str, type[nn.Module]] = {'gelu': nn.GELU, 'relu': nn.ReLU, 'silu': nn.SiLU, 'star_relu': StarReLU}


@register_family('mixer')
def _build_mixer(architecture: Architecture, common: dict[str, Any]) -> nn.Module:
    options = architecture.options
    return MlpMixer(
        img_size=architecture.image_size,
        patch_size=options['patch'],
        num_blocks=options['depth'],
        embed_dim=options['width'],
        mlp_ratio=options['mlp_ratio'],
        act_layer=_ACTIVATIONS[options['act']],
        stem_norm=options['stem_norm'],
        **common,
        **_MIXERS[options['block']],
    )


def draw_poolformer(draw: Draws) -> dict[str, Any]:
    """Average pooling in the place of attention."""
    options = _draw_metaformer(draw, per_block=8, multiple=16)
    return {**options, 'mixers': ('pool',) * 4}


def draw_caformer(draw: Draws) -> dict[str, Any]:
    """Separable convolutions in the first stages, attention in the last: ConvFormer, CAFormer."""
    options = _draw_metaformer(draw, per_block=12, multiple=HEAD)
    convolutional = draw.choose((2, 3, 4))
    return {**options, 'mixers': tuple('convolution' if stage < convolutional else 'attention' for stage in range(4))}


def _draw_metaformer(draw: Draws, *, per_block: float, multiple: int) -> dict[str, Any]:
    kernel, stride = draw.affordable((((3, 1), 1), ((3, 2), 2), ((7, 2), 2), ((7, 4), 4)), after=8)
    depths = draw.depths(4, 2)
    sides = draw.sides(stride, 2, 2, 2)
    widths = draw.widths(draw.ratios(4), depths=depths, sides=sides, per_block=per_block, multiple=multiple)
    version = draw.choose((1, 2))
    return {
        'stem_kernel': kernel,
        'stem_stride': stride,
        'depths': depths,
        'widths': widths,
        # The first version has biases and a layer scale, the second neither, but scales its shortcuts.
        'bias': version == 1,
        'layer_scale': draw.choose(OPEN_GATES) if version == 1 else None,
        'residual_scale': version == 2,
        'act': draw.choose(('gelu', 'relu')) if version == 1 else draw.choose(('star_relu', 'gelu')),
    }


_TOKEN_MIXERS: dict[str, type[nn.Module]] = {'pool': Pooling, 'convolution': SepConv, 'attention': Attention}


@register_family('poolformer')
@register_family('caformer')
def _build_metaformer(architecture: Architecture, common: dict[str, Any]) -> nn.Module:
    options = architecture.options
    bias, mixers = options['bias'], options['mixers']
    if bias:
        norms: list[type[nn.Module]] = [GroupNorm1] * 4
    else:
        norms = [GroupNorm1NoBias if mixer == 'pool' else LayerNorm2dNoBias for mixer in mixers]
    if 'attention' in mixers:
        norms = [LayerNormNoBias if mixer == 'attention' else LayerNorm2dNoBias for mixer in mixers]
    model = MetaFormer(
        depths=options['depths'],
        dims=options['widths'],
        token_mixers=[_TOKEN_MIXERS[mixer] for mixer in mixers],
        mlp_act=_ACTIVATIONS[options['act']],
        mlp_bias=bias,
        layer_scale_init_values=options['layer_scale'],
        res_scale_init_values=(None, None, 1.0, 1.0) if options['residual_scale'] else (None,) * 4,
        downsample_norm=None if bias else LayerNorm2dNoBias,
        norm_layers=norms,
        use_mlp_head=False,
        **common,
    )
    set_convolution(model.stem.conv, kernel=options['stem_kernel'], stride=options['stem_stride'])
    return model
