"""The families of the ``timm`` sampler by name, and which of them training leaves out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from timm_ghn.architectures import families_plain as plain, families_residual as residual, families_tokens as tokens
from timm_ghn.architectures.draws import Draws

#: How each family draws the options of an architecture; they should come near the limits, which are checked afterwards.
FAMILIES: dict[str, Callable[[Draws], Mapping[str, Any]]] = {
    'resnet_basic': residual.draw_resnet_basic,
    'resnet_bottleneck': residual.draw_resnet_bottleneck,
    'resnetv2': residual.draw_resnetv2,
    'regnet': residual.draw_regnet,
    'nfnet': residual.draw_nfnet,
    'vgg': plain.draw_vgg,
    'densenet': plain.draw_densenet,
    'mobilenet': plain.draw_mobilenet,
    'efficientnet': plain.draw_efficientnet,
    'convnext': tokens.draw_convnext,
    'vit': tokens.draw_vit,
    'vit_pooled': tokens.draw_vit_pooled,
    'swin': tokens.draw_swin,
    'mixer': tokens.draw_mixer,
    'poolformer': tokens.draw_poolformer,
    'caformer': tokens.draw_caformer,
}

#: Families that training leaves out, for evaluation on networks of another kind. They differ from what remains by
#: degrees. RegNet is near: its blocks are those of ResNeXt with squeeze-excite, but its widths follow a law of their
#: own. DenseNet is farther: no other family joins the maps of all layers of a block by concatenation. Mixers are the
#: farthest: no other family has weights over positions, whose shapes depend on the image.
HELD_OUT = ('regnet', 'densenet', 'mixer')

#: All others.
TRAIN_FAMILIES = tuple(name for name in FAMILIES if name not in HELD_OUT)
