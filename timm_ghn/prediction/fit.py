"""From what a GHN decodes to a parameter: repeated to its shape and scaled to its fan-in.

A GHN decodes at most ``max_shape`` channels at once; larger parameters repeat them cyclically, W[o, i] = s[o mod s0,
i mod s1]. The scale follows arXiv 2110.13100, section 4.2.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from timm_ghn.graph.vocabulary import encoded_position, has_features_first, positional_size
from timm_ghn.nn.config import GHNConfig
from timm_ghn.nn.requests import DecodeKind

#: Standard deviation of the tokens of a positional embedding that stand for no image position.
TOKEN_STD = 0.02

#: A positional embedding of s*s + n tokens has n tokens without a position, if n is at most this.
_MOST_TOKENS = 8


@dataclasses.dataclass(frozen=True, slots=True)
class Fit:
    """How a decoded tensor becomes a parameter.

    Attributes:
        rows: Decoded outputs, repeated to the parameter's first axis.
        columns: Decoded inputs, repeated to its second axis; 0 for a parameter decoded as a vector.
        scale: Factor of a tensor, sqrt(beta / fan_in); None where the decoded values are used as they are.
        activation: For vectors: 'gain' for 2 sigmoid(p / 2), 'shift' for tanh(p / 5), 'none'.
        tokens: For a positional embedding, how many of its tokens are drawn at random; None for anything else.
        kernel: Shape of the kernels that the parameter holds, where their fan-in is not that of its own shape.
        blocks: (rows, columns, height, width) of the blocks in which a positional embedding is stored, if it is.
    """

    rows: int
    columns: int = 0
    scale: float | None = None
    activation: str = 'none'
    tokens: int | None = None
    kernel: tuple[int, ...] | None = None
    blocks: tuple[int, int, int, int] | None = None

    def describe(self, shape: tuple[int, ...]) -> str:
        """The fit in words, for the plan."""
        if not self.columns:
            n = math.prod(shape)
            text = f'{self.rows} values' if self.rows >= n else f'{self.rows} values repeated to {n}'
            return {'gain': f'2 sigmoid(p/2) of {text}', 'shift': f'tanh(p/5) of {text}'}.get(self.activation, text)
        if self.tokens is not None:
            text = f'{self.columns} features at each position, {self.tokens} random tokens in front'
            return text + (', in {}x{} blocks of {}x{}'.format(*self.blocks) if self.blocks else '')
        text = f'{self.rows}x{self.columns} channels'
        if (self.rows, self.columns) != tuple(shape[:2]):
            text += f' repeated to {shape[0]}x{shape[1]}'
        text += f', times {self.scale:.3g}' if self.scale is not None else ''
        return text + (f' for kernels of {"x".join(map(str, self.kernel))}' if self.kernel and self.scale else '')


def random_tokens(tokens: int) -> int:
    """How many of T tokens of a positional embedding stand in front of the floor(sqrt(T))^2 positions of a map.

    A few do: class, distillation and register tokens. More of them mean that the positions are no square map.
    """
    extra = tokens - math.isqrt(tokens) ** 2
    return extra if extra <= _MOST_TOKENS else 0


def fit_of(
    kind: DecodeKind,
    shape: tuple[int, ...],
    config: GHNConfig,
    *,
    position: bool = False,
    kernel: tuple[int, ...] | None = None,
    blocks: tuple[int, int, int, int] | None = None,
) -> tuple[tuple[int, int, int, int], Fit]:
    """How to decode a parameter: the size (out, in, height, width) to request, and how to fit what comes back.

    ``position`` says whether it is a positional embedding, see :func:`timm_ghn.graph.vocabulary.positional_size`.
    """
    outputs, inputs = config.max_shape[:2]
    normalise = config.weight_norm
    if kind in (DecodeKind.WEIGHT_1D, DecodeKind.BIAS_1D, DecodeKind.HEAD_BIAS):
        n = math.prod(shape)
        activation = 'gain' if kind is DecodeKind.WEIGHT_1D else 'shift'
        limit = config.num_classes if kind is DecodeKind.HEAD_BIAS else max(outputs, inputs)
        return (n, 1, 1, 1), Fit(min(n, limit), activation=activation if normalise else 'none')
    size = positional_size(shape) if position else None
    if size is not None:
        tokens, features = size
        scale = fan_in_scale((1, tokens, features)) if normalise else None
        fit = Fit(1, min(features, inputs), scale, tokens=random_tokens(tokens), blocks=blocks)
        return encoded_position(shape), fit
    scale = fan_in_scale(kernel or shape) if normalise else None
    height, width = (*shape[2:], 1, 1)[:2] if len(shape) < 5 else shape[-2:]
    limit = config.num_classes if kind is DecodeKind.HEAD_WEIGHT else outputs
    return (shape[0], shape[1], height, width), Fit(min(shape[0], limit), min(shape[1], inputs), scale, kernel=kernel)


def fan_in_scale(shape: tuple[int, ...]) -> float | None:
    """sqrt(beta / fan_in) of a tensor with at least two axes; None where predictions are used as they are.

    fan_in is the number of elements behind one output. beta is 1 for depthwise and for 1 x k kernels, else 2 (the
    published rule compares height and width, so k x 1 has 2). Kernels of 11 and more with one output, and with them
    positional embeddings, are not scaled.
    """
    if len(shape) > 2 and shape[0] == 1 and shape[2] >= 11:
        return None
    beta = 2.0
    if len(shape) > 2 and (shape[1] == 1 or (len(shape) > 3 and shape[2] < shape[3])):
        beta = 1.0
    return math.sqrt(beta / math.prod(shape[1:]))


def scaled(decoded: Tensor, fit: Fit, dtype: torch.dtype | None = None) -> Tensor:
    """Apply the scale or the activation of a fit to a decoded tensor, before it is repeated.

    By default it is differentiable; with a dtype, the result is contiguous and has memory of its own.
    """
    if dtype is not None and fit.activation == 'none':
        out = torch.empty(decoded.shape, dtype=dtype, device=decoded.device)
        return out.copy_(decoded) if fit.scale is None else torch.mul(decoded, fit.scale, out=out)
    values = decoded if fit.scale is None else decoded * fit.scale
    if fit.activation == 'gain':
        values = 2 * torch.sigmoid(decoded * 0.5)
    elif fit.activation == 'shift':
        values = torch.tanh(decoded * 0.2)
    return values if dtype is None else values.to(dtype)


def fitted(decoded: Tensor, fit: Fit, shape: tuple[int, ...], generator: torch.Generator | None = None) -> Tensor:
    """The parameter that a decoded tensor becomes; differentiable. See :func:`scaled` and :func:`repeated`."""
    return repeated(scaled(decoded, fit), fit, shape, generator)


def repeated(values: Tensor, fit: Fit, shape: tuple[int, ...], generator: torch.Generator | None = None) -> Tensor:
    """The parameter that the values of :func:`scaled` become; it may be a view of them."""
    if not fit.columns:
        return values.repeat(-(-math.prod(shape) // fit.rows))[: math.prod(shape)].view(shape)
    size = positional_size(shape)
    if fit.tokens is not None and size is not None:
        positions = _tiled(_with_tokens(values, fit.tokens, size[0], generator), (1, *size))
        if fit.blocks is not None:
            rows, columns, height, width = fit.blocks
            positions = positions.view(rows, height, columns, width, -1).transpose(1, 2)
        return (positions.transpose(1, 2) if has_features_first(shape) else positions).reshape(shape)
    return _tiled(_with_axes(values, len(shape)), shape)


def _with_axes(values: Tensor, rank: int) -> Tensor:
    """Give decoded channels (o, i) or kernels (o, i, h, w) the rank of a parameter; all axes left out have size 1."""
    height, width = (*values.shape[2:], 1, 1)[:2]
    kernel = {2: (), 3: (height,), 4: (height, width)}.get(rank, (1,) * (rank - 4) + (height, width))
    return values.reshape(*values.shape[:2], *kernel)


def _tiled(values: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Repeat a tensor along its axes until it covers a shape, and cut it there."""
    repeats = [-(-wanted // have) for wanted, have in zip(shape, values.shape, strict=True)]
    return values.repeat(repeats)[tuple(slice(n) for n in shape)] if max(repeats) > 1 else values


def _with_tokens(values: Tensor, count: int, tokens: int, generator: torch.Generator | None) -> Tensor:
    """Positions in reading order as tokens (1, T, c), with random ones for what has no position in front."""
    positions = values.flatten(2).transpose(1, 2)[:, :tokens]
    if not count:
        return positions
    # Drawn in float32 on the CPU, so that the tokens are the same on every device.
    random = torch.randn(1, count, positions.shape[2], generator=generator, dtype=torch.float32, device='cpu')
    return torch.cat(((random * TOKEN_STD).to(positions), positions), dim=1)[:, :tokens]


def write_repeated(target: Tensor, values: Tensor, fit: Fit) -> None:
    """Write what :func:`repeated` gives into a parameter, without a temporary of its size.

    What has the shape of the parameter is repeated already, as an embedding of positions must be.
    """
    if values.shape == target.shape:
        target.copy_(values)
    elif fit.columns:
        values = _with_axes(values.to(target), target.dim())
        _copy_repeated(target, values, (fit.rows, fit.columns))
    elif target.is_contiguous():
        _copy_repeated(target.view(-1), values.to(target), (fit.rows,))
    else:
        target.copy_(repeated(values, fit, tuple(target.shape)))


def _copy_repeated(target: Tensor, values: Tensor, periods: tuple[int, ...]) -> None:
    """Copy values to wherever they recur in the first axes of a tensor, the last of these axes first."""
    if not periods or target.shape == values.shape:
        target.copy_(values)
        return
    axis, period = len(periods) - 1, periods[-1]
    if target.shape[axis] == period:
        _copy_repeated(target, values, periods[:-1])
        return
    rest = target.shape[axis] % period
    whole = target.shape[axis] - rest
    if whole:
        recurring = (target.narrow(axis, 0, whole) if rest else target).unflatten(axis, (-1, period))
        _copy_repeated(recurring, values.unsqueeze(axis), periods[:-1])
    if rest:
        _copy_repeated(target.narrow(axis, whole, rest), values.narrow(axis, 0, rest), periods[:-1])
