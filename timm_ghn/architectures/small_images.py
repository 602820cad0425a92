"""Stems for small images: the edits that the papers make before they train on 32-pixel images, for any family.

A network for 224-pixel images divides the side by 32; of a 32-pixel image it would leave one position. arXiv 2110.13100
(appendix, ``adjust_net`` of its code) takes the strides of the stem out: ResNet's first convolution becomes 3x3 with
stride 1 and its max-pooling goes; ConvNeXt's patch convolution keeps its 4x4 kernel and gets stride 1. Both divide the
total stride by four, and so does the rule here: whatever divides the resolution within the first factor of four does
not any more. A stem that divides it in another way than by strides, as TResNet's does by moving pixels into channels,
is refused.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from typing import Any

import timm
import torch
from timm.layers import BlurPool2d, PatchEmbed, ScaledStdConv2d, ScaledStdConv2dSame
from torch import Tensor, nn

from timm_ghn.contexts import preserve_modes, preserve_rng
from timm_ghn.errors import UnsupportedModelError

#: By how much the total stride is divided.
REDUCTION = 4

_POOLINGS = (nn.MaxPool2d, nn.AvgPool2d, BlurPool2d)

Strided = nn.Conv2d | nn.MaxPool2d | nn.AvgPool2d | BlurPool2d


def size_arguments(model_name: str, image_size: int, *, small: bool) -> dict[str, Any]:
    """Arguments of ``timm.create_model`` that fit a model of a fixed image size to another one.

    Vision transformers and their like have a table of positions, so they must be told the size when they are built.
    For small images their patches are divided by :data:`REDUCTION` too, by timm's own argument ``patch_size``. What
    has a fixed size and no such argument is built for images that are larger by as much, which is what its layers
    see behind a stem of :func:`adapt_to_small_images_`.

    Returns:
        ``img_size`` and ``patch_size``, as far as the model takes them.
    """
    cfg = timm.get_pretrained_cfg(model_name)
    model = _built(model_name, {})
    takes = set(inspect.signature(type(model).__init__).parameters)
    if 'img_size' not in takes and not (cfg and cfg.fixed_input_size):
        return {}
    arguments = {'img_size': image_size}
    if not small:
        return arguments
    patches = [module.patch_size for module in model.modules() if isinstance(module, PatchEmbed)]
    if patches and 'patch_size' in takes:
        smaller = {**arguments, 'patch_size': max(1, min(patches[0]) // REDUCTION)}
        # Some take only patches of certain sizes, and say so in any way.
        with contextlib.suppress(Exception):
            _built(model_name, smaller)
            return smaller
    return {'img_size': image_size * REDUCTION}


def _built(model_name: str, arguments: dict[str, Any]) -> nn.Module:
    model: nn.Module
    try:
        with torch.device('meta'):
            model = timm.create_model(model_name, pretrained=False, **arguments)
    except (NotImplementedError, RuntimeError):
        # Some classes of older timm look at values of tensors while they are built; there are none on that device.
        with preserve_rng():
            model = timm.create_model(model_name, pretrained=False, **arguments)
    return model


def adapt_to_small_images_(model: nn.Module, image_size: int, *, in_chans: int = 3) -> tuple[str, ...]:
    """Take the strides of a stem out, in place, before the model is initialised.

    Convolutions and poolings that see the image at more than a quarter of its side get stride 1; a convolution of 5x5
    and more among them shrinks to the middle 3x3 of its kernel, and a pooling goes altogether. A patch convolution,
    whose kernel is as large as its stride, keeps its kernel, and a stride of eight or more is divided by four.

    It is for networks that do not have their patches from :func:`size_arguments`; whether they can read the images
    then is for :func:`check_reads` to say.

    Returns:
        What was changed, in words.

    Raises:
        UnsupportedModelError: if the stem reduces images in another way.
    """
    first = _reductions(model, (in_chans, image_size, image_size))
    if not first:
        raise UnsupportedModelError(
            f'{type(model).__name__} has no strides that a stem for small images could do without: it reduces them in '
            'another way; keep its stem with small_stem=off'
        )
    return tuple(_edit(model, name, layer) for name, layer in first)


def check_reads(model: nn.Module, size: tuple[int, int, int]) -> None:
    """Run a model on an empty image (channels, height, width); an UnsupportedModelError if it cannot read it."""
    try:
        _forward(model, size)
    except Exception as error:
        raise UnsupportedModelError(
            f'{type(model).__name__} cannot read images of {size[0]}x{size[1]}x{size[2]}: {error}; choose another '
            'image_size, or another small_stem'
        ) from error


def _edit(model: nn.Module, name: str, layer: Strided) -> str:
    if not isinstance(layer, nn.Conv2d):
        model.set_submodule(name, nn.Identity())
        return f'{name}: {type(layer).__name__} removed'
    stride, kernel = _side(layer.stride), layer.kernel_size
    smaller = max(1, stride // REDUCTION)
    layer.stride = (smaller, smaller)
    change = f'{name}: stride {stride} -> {smaller}'
    if min(kernel) > max(3, stride):
        cut = [(side - 3) // 2 for side in kernel]
        middle = layer.weight.detach()[..., cut[0] : cut[0] + 3, cut[1] : cut[1] + 3].clone()
        if isinstance(layer, ScaledStdConv2d | ScaledStdConv2dSame):
            # Their factor has the fan-in, gamma / sqrt(fan_in).
            layer.scale *= (layer.weight.numel() / middle.numel()) ** 0.5
        layer.weight = nn.Parameter(middle, requires_grad=layer.weight.requires_grad)
        layer.kernel_size = (3, 3)
        layer.padding = (1, 1) if not isinstance(layer.padding, str) else layer.padding
        change += f', kernel {kernel[0]}x{kernel[1]} -> 3x3'
    return change


def _reductions(model: nn.Module, size: tuple[int, int, int]) -> list[tuple[str, Strided]]:
    """Convolutions and poolings that divide the resolution within the first factor, in the order in which they run."""
    found: dict[str, Strided] = {}

    def enter(name: str, module: Strided, inputs: tuple[Tensor, ...]) -> None:
        if inputs[0].shape[-1] * REDUCTION > size[-1] and _side(module.stride) > 1:
            found.setdefault(name, module)

    handles = [
        module.register_forward_pre_hook(functools.partial(enter, name))
        for name, module in model.named_modules()
        if isinstance(module, (nn.Conv2d, *_POOLINGS))
    ]
    try:
        with contextlib.suppress(Exception):
            # Many networks cannot read so small an image before their stem is edited; the stem itself was seen.
            _forward(model, size)
    finally:
        for handle in handles:
            handle.remove()
    return list(found.items())


def _side(value: Any) -> int:
    return int(max(value)) if isinstance(value, tuple | list) else int(value)


def _forward(model: nn.Module, size: tuple[int, int, int]) -> None:
    """Run a model on an empty image, in eval mode and without a trace."""
    parameter = next(model.parameters())
    image = torch.zeros((1, *size), device=parameter.device, dtype=parameter.dtype)
    with torch.no_grad(), preserve_modes(model):
        model.eval()
        model(image)
