"""A donor's tensor in another shape: channels are selected or copied, kernels and positions interpolated."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from timm.layers import resample_abs_pos_embed, resample_patch_embed
from torch import Tensor
from torch.nn import functional as F

from timm_ghn.graph.vocabulary import has_features_first, positional_size
from timm_ghn.prediction.fit import random_tokens
from timm_ghn.transfer.layers import Axis, Layer

#: Standard deviation of the noise on copied channels, as a share of the weight's own.
NOISE = 0.01


def spread(wanted: int, given: int, blocks: tuple[int, int] = (1, 1)) -> Tensor:
    """int64 (wanted,): evenly spaced channels out of those that are given, in order.

    Where fewer are wanted, this is the uniform selection of arXiv 2311.18823; where more are wanted, each is copied
    equally often, or once more than others. Channels in blocks (groups, attention heads) are selected by blocks first,
    then within each block.
    """
    if max(blocks) > 1 and not (wanted % blocks[0] or given % blocks[1]):
        size = given // blocks[1]
        within = spread(wanted // blocks[0], size)
        return (spread(*blocks)[:, None] * size + within).flatten()
    return torch.arange(wanted) * given // wanted


def channel_map(target: Axis, donor: Axis, wanted: int, given: int, *, flattened: bool = False) -> Tensor:
    """int64 (wanted,): which of the donor's channels each channel of an axis is.

    It depends on the spaces alone, so all layers that share one have the same map.

    Args:
        target: Spaces of the axis.
        donor: Spaces of the donor's axis.
        wanted: Length of the axis, a multiple of what its spaces have together: it may hold several parts.
        given: Length of the donor's axis.
        flattened: Whether the axis holds all positions of one channel before those of the next.
    """
    spaces, others = [space.root() for space in target], [space.root() for space in donor]
    mine, theirs = sum(space.width for space in spaces), sum(space.width for space in others)
    if not mine or not theirs or wanted % mine or given % theirs:
        return spread(wanted, given)
    offsets = list(itertools.accumulate((other.width for other in others), initial=0))
    pieces = []
    for nearest, space in zip(spread(len(spaces), len(others)).tolist(), spaces, strict=True):
        other = others[nearest]
        pieces.append(offsets[nearest] + spread(space.width, other.width, (space.blocks, other.blocks)))
    channels = torch.cat(pieces)
    parts = spread(wanted // mine, given // theirs)
    if flattened:
        return (channels[:, None] * (given // theirs) + parts).flatten()
    return (parts[:, None] * theirs + channels).flatten()


def _select(tensor: Tensor, axis: int, index: Tensor) -> Tensor:
    """The channels of an axis; the tensor itself where these are all of them in order."""
    is_whole = torch.equal(index, torch.arange(tensor.shape[axis]))
    return tensor if is_whole else tensor.index_select(axis, index.to(tensor.device))


def resize_weight(
    tensor: Tensor,
    target: Layer,
    donor: Layer,
    *,
    patches: bool = False,
    preserve: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor | None:
    """A donor's weight in the shape of a layer; None where there is no rule for it.

    Wider layers are those of Net2Net (arXiv 1511.05641): copies of channels, whose weights in the next layer are
    divided by the number of copies, with a little noise that lets the copies become different.

    Args:
        tensor: Weight of the donor's layer.
        target: The layer.
        donor: The donor's layer.
        patches: Whether the kernel reads patches that do not overlap.
        preserve: Whether the layer is to compute the same: without noise, and larger kernels with zeros around.
        generator: Draws the noise.
    """
    shape = target.shape
    if tuple(tensor.shape) == shape and not target.columns and not target.rows:
        return tensor
    if tensor.dim() != len(shape):
        if tensor.dim() < 2 or len(shape) < 2 or math.prod(tensor.shape[2:]) * math.prod(shape[2:]) > 1:
            return None
        tensor = tensor.reshape(*tensor.shape[:2], *(1,) * (len(shape) - 2))  # a linear layer as a 1x1 convolution
    rows = channel_map(target.rows, donor.rows, shape[0], tensor.shape[0])
    values = _select(tensor, 0, rows)
    if len(shape) > 1 and target.kind == 'stem':
        values = _with_input_channels(values, shape[1])
    elif len(shape) > 1:
        given = tensor.shape[1]
        columns = channel_map(
            target.columns or (), donor.columns or (), shape[1], given, flattened=target.flattened and donor.flattened
        )
        values = _select(values, 1, columns)
        copies = torch.bincount(columns, minlength=given)[columns]
        if int(copies.max()) > 1:
            values = values / copies.to(values).view(1, -1, *(1,) * (len(shape) - 2))
    if tuple(values.shape[2:]) != shape[2:]:
        if len(shape) != 4:
            return None
        values = _with_kernel(values, shape[2:], patches=patches, preserve=preserve)
    if len(shape) > 1 and not preserve and len(rows.unique()) < len(rows):
        noise = torch.randn(values.shape, generator=generator, dtype=torch.float32)
        values = values + NOISE * values.float().std() * noise.to(values)
    return values


def resize_vector(tensor: Tensor, target: Axis, donor: Axis, wanted: int) -> Tensor:
    """A donor's bias, gain or statistic of each channel for a layer of other width."""
    return _select(tensor, 0, channel_map(target, donor, wanted, tensor.shape[0]))


def _with_input_channels(weight: Tensor, channels: int) -> Tensor:
    """The first layer for images of other channels: as :func:`timm.models.adapt_input_conv`, from any number of them.

    For one channel the weights are added up; else they are repeated, and scaled to keep the size of the output.
    """
    given = weight.shape[1]
    if channels == given:
        return weight
    if channels == 1:
        return weight.float().sum(1, keepdim=True).to(weight)
    repeats = -(-channels // given)
    return weight.repeat(1, repeats, *(1,) * (weight.dim() - 2))[:, :channels] * (given / channels)


def _with_kernel(weight: Tensor, size: Sequence[int], *, patches: bool, preserve: bool) -> Tensor:
    """The weight of a two-dimensional convolution with kernels of another size."""
    given = weight.shape[2:]
    if patches:
        patched: Tensor = resample_patch_embed(weight.float(), list(size)).to(weight)
        return patched
    margins = [wanted - have for wanted, have in zip(size, given, strict=True)]
    if preserve and min(margins) >= 0 and not any(margin % 2 for margin in margins):
        return F.pad(weight, (margins[1] // 2, margins[1] // 2, margins[0] // 2, margins[0] // 2))
    resized = F.interpolate(weight.float(), tuple(size), mode='bilinear', antialias=True)
    return (resized * (math.prod(given) / math.prod(size))).to(weight)


def resize_positions(tensor: Tensor, shape: Sequence[int]) -> Tensor | None:
    """A positional embedding for another number of positions or features; None where there is no rule for it.

    Maps are interpolated, tokens in front of them are taken over; those that the donor lacks are zero.
    """
    have, want = positional_size(tuple(tensor.shape)), positional_size(tuple(shape))
    if have is None or want is None:
        return None
    old, new = _grid(tuple(tensor.shape)), _grid(tuple(shape))
    if old is None or new is None:
        return None
    features_first = has_features_first(tuple(tensor.shape))
    tokens = tensor.flatten(2).transpose(1, 2) if features_first else tensor.reshape(1, -1, tensor.shape[-1])
    if old != new:
        positions = resample_abs_pos_embed(tokens[:, old[0] :].float(), [*new[1:]], [*old[1:]], 0).to(tensor)
        front = torch.zeros(1, new[0], have[1]).to(tensor)
        shared = min(old[0], new[0])
        front[:, :shared] = tokens[:, :shared]
        tokens = torch.cat((front, positions), dim=1)
    tokens = _select(tokens, 2, spread(want[1], have[1]))
    return (tokens.transpose(1, 2) if has_features_first(tuple(shape)) else tokens).reshape(tuple(shape))


def _grid(shape: tuple[int, ...]) -> tuple[int, int, int] | None:
    """Tokens in front, rows and columns of a positional embedding; None where its positions are no map."""
    if len(shape) == 4:
        return (0, *shape[2:]) if has_features_first(shape) else (0, *shape[1:3])
    tokens = shape[-2]
    front = random_tokens(tokens)
    side = math.isqrt(tokens - front)
    return (front, side, side) if side**2 == tokens - front else None


def resize_other(tensor: Tensor, shape: Sequence[int]) -> Tensor | None:
    """What has no node in a graph, such as layer scales and tokens: evenly spaced along each axis that differs.

    None where the numbers of axes differ.
    """
    if tensor.dim() != len(shape) or not all(tensor.shape):
        return None
    for axis, wanted in enumerate(shape):
        tensor = _select(tensor, axis, spread(wanted, tensor.shape[axis]))
    return tensor
