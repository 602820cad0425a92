"""Stems for small images: the edits that the papers make before they train on 32-pixel images, for any family.

A network for 224-pixel images divides the side by 32; of a 32-pixel image it would leave one position. arXiv 2110.13100
(appendix, ``adjust_net`` of its code) takes the strides of the stem out: ResNet's first convolution becomes 3x3 with
stride 1 and its max-pooling goes; ConvNeXt's patch convolution keeps its 4x4 kernel and gets stride 1. Both divide the
total stride by four, and so does the rule here: whatever divides the resolution within the first factor of four does
not any more.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from typing import Any

import timm
import torch
from timm.layers import PatchEmbed
from torch import nn

from timm_ghn.errors import UnsupportedModelError
from timm_ghn.modes import kept_modes

#: By how much the total stride is divided.
REDUCTION = 4

_POOLINGS = (nn.MaxPool2d, nn.AvgPool2d)

Strided = nn.Conv2d | nn.MaxPool2d | nn.AvgPool2d


@dataclasses.dataclass(frozen=True)
class StemEdit:
    """One change of a model for small images.

    Attributes:
        module: Name of the layer; '' for an argument of ``timm.create_model``.
        change: What was done, in words.
    """

    module: str
    change: str

    def __str__(self) -> str:
        return f'{self.module}: {self.change}' if self.module else self.change


def size_arguments(model_name: str, image_size: int, *, small: bool) -> dict[str, Any]:
    """Arguments of ``timm.create_model`` that fit a model of a fixed image size to another one.

    Vision transformers and their like have a table of positions, so they must be told the size when they are built.
    For small images their patches are divided by :data:`REDUCTION` too, by timm's own argument ``patch_size``. What
    has a fixed size and no such argument is built for images that are larger by as much, which is what its layers
    see behind a stem of :func:`adapt_to_small_images_`.

    Args:
        model_name: timm model.
        image_size: Side of the images in pixels.
        small: Whether the stem is for small images.

    Returns:
        ``img_size`` and ``patch_size``, as far as the model takes them.
    """
    cfg = timm.get_pretrained_cfg(model_name)
    model = _built(model_name, {})
    takes = set(inspect.signature(type(model).__init__).parameters)
    patches = [module.patch_size for module in model.modules() if isinstance(module, PatchEmbed)]
    arguments: dict[str, Any] = {}
    if 'img_size' in takes or (cfg is not None and cfg.fixed_input_size):
        arguments['img_size'] = image_size
    if not small or not arguments:
        return arguments
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
        with torch.random.fork_rng(devices=[]):
            model = timm.create_model(model_name, pretrained=False, **arguments)
    return model


def adapt_to_small_images_(model: nn.Module, image_size: int, *, in_chans: int = 3) -> tuple[StemEdit, ...]:
    """Take the strides of a stem out, in place, before the model is initialised.

    Convolutions and poolings that see the image at more than a quarter of its side get stride 1; a convolution of 5x5
    and more among them shrinks to the middle 3x3 of its kernel, and a pooling goes altogether. A patch convolution,
    whose kernel is as large as its stride, keeps its kernel.

    Args:
        model: Any convolutional network. One whose stem has no stride, or has its patches from
            :func:`size_arguments`, stays as it is.
        image_size: Side of the images in pixels.
        in_chans: Image channels.

    Returns:
        What was changed.

    Raises:
        UnsupportedModelError: if the edited model cannot read such images; it is then as it was.
    """
    layers = _strided_layers(model, (in_chans, image_size, image_size))
    first = [(name, layer) for name, layer, side in layers if side * REDUCTION > image_size]
    before = [
        (layer, {name: getattr(layer, name) for name in ('stride', 'kernel_size', 'padding', 'weight')})
        for _, layer in first
        if isinstance(layer, nn.Conv2d)
    ]
    edits = [_edit(model, name, layer) for name, layer in first]
    try:
        _forward(model, (in_chans, image_size, image_size))
    except Exception as error:
        # Whatever the network says against its new stem, it gets its old one back.
        for convolution, attributes in before:
            for attribute, value in attributes.items():
                setattr(convolution, attribute, value)
        for name, layer in first:
            if isinstance(layer, _POOLINGS):
                model.set_submodule(name, layer)
        raise UnsupportedModelError(
            f'{type(model).__name__} cannot read images of {image_size} pixels with a stem for small images '
            f'({"; ".join(map(str, edits)) or "nothing to change"}): {error}; choose a larger image_size, or keep its '
            'stem with small_stem=off'
        ) from error
    return tuple(edits)


def check_reads(model: nn.Module, size: tuple[int, int, int]) -> None:
    """Run a model on an empty image (channels, height, width).

    Raises:
        UnsupportedModelError: if it cannot read images of this size.
    """
    try:
        _forward(model, size)
    except Exception as error:
        raise UnsupportedModelError(
            f'{type(model).__name__} cannot read images of {size[0]}x{size[1]}x{size[2]}: {error}; choose another '
            'image_size'
        ) from error


def _edit(model: nn.Module, name: str, layer: Strided) -> StemEdit:
    if not isinstance(layer, nn.Conv2d):
        model.set_submodule(name, nn.Identity())
        return StemEdit(name, f'{type(layer).__name__} removed')
    stride, kernel = _side(layer.stride), layer.kernel_size
    layer.stride = (1, 1)
    change = f'stride {stride} -> 1'
    if min(kernel) > max(3, stride):
        cut = [(side - 3) // 2 for side in kernel]
        middle = layer.weight.detach()[..., cut[0] : cut[0] + 3, cut[1] : cut[1] + 3].clone()
        layer.weight = nn.Parameter(middle, requires_grad=layer.weight.requires_grad)
        layer.kernel_size = (3, 3)
        layer.padding = (1, 1) if not isinstance(layer.padding, str) else layer.padding
        change += f', kernel {kernel[0]}x{kernel[1]} -> 3x3'
    return StemEdit(name, change)


def _strided_layers(model: nn.Module, size: tuple[int, int, int]) -> list[tuple[str, Strided, int]]:
    """Convolutions and poolings with a stride, in the order in which they run, with the side of the map they read."""
    found: list[tuple[str, Strided, int]] = []
    handles = []
    try:
        for name, module in model.named_modules():
            if isinstance(module, (nn.Conv2d, *_POOLINGS)) and _side(module.stride) > 1:

                def record(layer: Any, inputs: tuple[Any, ...], *, name: str = name) -> None:
                    if not any(layer is other for _, other, _ in found):
                        found.append((name, layer, int(inputs[0].shape[-1])))

                handles.append(module.register_forward_pre_hook(record))
        with contextlib.suppress(Exception):
            # Many networks cannot read so small an image before their stem is edited; the stem itself was seen.
            _forward(model, size)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _side(value: Any) -> int:
    return int(max(value)) if isinstance(value, tuple | list) else int(value)


def _forward(model: nn.Module, size: tuple[int, int, int]) -> None:
    """Run a model on an empty image, in eval mode and without a trace."""
    parameter = next(model.parameters())
    image = torch.zeros((1, *size), device=parameter.device, dtype=parameter.dtype)
    with torch.no_grad(), kept_modes(model):
        model.eval()
        model(image)
