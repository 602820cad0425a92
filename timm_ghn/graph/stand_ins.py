"""Stand-ins for functions that PyTorch decomposes in Python on the meta device: they only make the shape, and fast.

A traced forward pass computes nothing, so a function needs to give a tensor of the right shape and to leave the name
and the inputs of its backward function in the autograd graph. PyTorch has no meta kernels of its own for some frequent
functions and takes them apart in Python: a linear layer with a bias takes 0.4 ms, a hard swish 1.5 ms. Those that take
the most time in timm's networks have a stand-in.

A function here returns ``NotImplemented`` for arguments that it does not stand for; PyTorch's own is called then.
"""

from __future__ import annotations

import functools
import math
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class _StandIn(torch.autograd.Function):
    """Makes a tensor that depends on others. The name of the class is that of the operator in autograd."""

    @staticmethod
    def forward(ctx: Any, make: Callable[[], Tensor], *inputs: Tensor | None) -> Tensor:
        return make()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise NotImplementedError('a traced network is not differentiated')


class _InPlace(_StandIn):
    """Returns its input, marked as changed in place."""

    @staticmethod
    def forward(ctx: Any, data: Tensor) -> Tensor:  # type: ignore[override]
        ctx.mark_dirty(data)
        return data


_unsafe_view = torch.ops.aten._unsafe_view.default


@functools.cache
def _operator(name: str, base: type[_StandIn] = _StandIn) -> Callable[..., Tensor]:
    found: Callable[..., Tensor] = type(name, (base,), {}).apply  # type: ignore[attr-defined]
    return found


def _is_plain(*tensors: object) -> bool:
    """Whether all are float32 tensors on the meta device."""
    return all(isinstance(x, Tensor) and x.dtype is torch.float32 and x.is_meta for x in tensors)


def _empty(*shape: int) -> Callable[[], Tensor]:
    return functools.partial(torch.empty, shape, dtype=torch.float32, device='meta')


def _like(tensor: Tensor) -> Callable[[], Tensor]:
    """With the memory format of the tensor, as PyTorch's elementwise functions have it."""
    return functools.partial(torch.empty_like, tensor)


def _covers(shape: Sequence[int], other: Sequence[int]) -> bool:
    """Whether two shapes broadcast to the first of them."""
    return shape == other or (
        len(shape) >= len(other) and all(b in (a, 1) for a, b in zip(reversed(shape), reversed(other), strict=False))
    )


def unary(name: str) -> Callable[..., Any]:
    """An elementwise function, also in place."""

    def function(input: Tensor, inplace: bool = False) -> Any:
        if not _is_plain(input) or (inplace and input._is_view()):
            return NotImplemented
        if inplace:
            return _operator(name, _InPlace)(input)
        return _operator(name)(_like(input), input)

    return function


def binary(name: str) -> Callable[..., Any]:
    """Arithmetic of two tensors, or of a tensor and a number, that broadcast to the shape of one of them."""

    def function(input: Any, other: Any, **kwargs: Any) -> Any:
        if kwargs or not _is_plain(input):
            return NotImplemented
        if type(other) in (int, float):
            return _operator(name)(_like(input), input)
        if not _is_plain(other):
            return NotImplemented
        like = input if _covers(input.shape, other.shape) else other if _covers(other.shape, input.shape) else None
        return NotImplemented if like is None else _operator(name)(_like(like), input, other)

    return function


_add, _mul, _gelu = binary('Add'), binary('Mul'), unary('Gelu')


def gelu(input: Tensor, approximate: str = 'none') -> Any:  # as torch.nn.functional.gelu
    """GELU."""
    return _gelu(input)


def cat(tensors: Any, dim: int = 0) -> Any:
    """Concatenation of tensors of one rank."""
    if not tensors or not _is_plain(*tensors) or not all(x.is_contiguous() for x in tensors):
        return NotImplemented
    shapes = [list(x.shape) for x in tensors]
    total = sum(shape.pop(dim) for shape in shapes)
    if any(shape != shapes[0] for shape in shapes):
        return NotImplemented
    shapes[0].insert(dim % tensors[0].dim(), total)
    return _operator('Cat')(_empty(*shapes[0]), *tensors)


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    """A linear layer, taken apart as PyTorch does it: a product of matrices with or without the bias added."""
    if not _is_plain(input, weight, weight if bias is None else bias) or not weight.requires_grad:
        return NotImplemented
    if weight.dim() != 2 or input.dim() < 2 or input.shape[-1] != weight.shape[1]:
        return NotImplemented
    if bias is not None and bias.shape != weight.shape[:1]:
        return NotImplemented
    fused = bias is not None and (input.dim() == 2 or input.is_contiguous())
    rows = input if input.dim() == 2 else input.reshape(-1, weight.shape[1])
    shape = (len(rows), len(weight))
    if fused:
        output = _operator('Addmm')(_empty(*shape), bias, rows, weight.t())
        return output if input.dim() == 2 else output.view(*input.shape[:-1], len(weight))
    output = _operator('Mm')(_empty(*shape), rows, weight.t())
    if input.dim() > 2:
        output = _unsafe_view(output, (*input.shape[:-1], len(weight)))
    return output if bias is None else _add(output, bias)


def matmul(input: Tensor, other: Tensor) -> Any:
    """A product of batches of matrices, taken apart as PyTorch does it."""
    if not _is_plain(input, other) or min(input.dim(), other.dim()) < 3 or input.shape[-1] != other.shape[-2]:
        return NotImplemented
    batch = input.shape[:-2] if _covers(input.shape[:-2], other.shape[:-2]) else other.shape[:-2]
    if not _covers(batch, input.shape[:-2]):
        return NotImplemented
    count, rows, columns = math.prod(batch), input.shape[-2], other.shape[-1]
    left = input.expand(*batch, *input.shape[-2:]).reshape(count, rows, -1)
    right = other.expand(*batch, *other.shape[-2:]).reshape(count, -1, columns)
    return _unsafe_view(_operator('Bmm')(_empty(count, rows, columns), left, right), (*batch, rows, columns))


def attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, *options: Any) -> Any:
    """What PyTorch takes an attention apart into where it has no fused kernel: both factors are scaled."""
    if attn_mask is not None or any(options) or not _is_plain(query, key, value):
        return NotImplemented
    factor = query.shape[-1] ** -0.25
    logits = on_meta_device(torch.matmul, _mul(query, factor), _mul(key.transpose(-2, -1), factor))
    return on_meta_device(torch.matmul, _operator('SafeSoftmax')(_like(logits), logits), value)


def layer_norm(
    input: Tensor,  # the names of torch.nn.functional.layer_norm
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Any:
    """Layer normalisation; PyTorch's own tells of shapes that do not fit."""
    shape = tuple(normalized_shape)
    if not _is_plain(input) or tuple(input.shape[-len(shape) :]) != shape:
        return NotImplemented
    return _operator('NativeLayerNorm')(_like(input), input, weight, bias)


def batch_norm(
    input: Tensor,  # the names of torch.nn.functional.batch_norm
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    """Batch normalisation; PyTorch's own tells of channels that do not fit."""
    given = (tensor for tensor in (running_mean, weight, bias) if tensor is not None)
    if not _is_plain(input) or any(tensor.numel() != input.shape[1] for tensor in given):
        return NotImplemented
    return _operator('NativeBatchNorm')(_like(input), input, weight, bias)


def stand_in(function: Any, *args: Any, **kwargs: Any) -> Any:
    """Output of a stand-in; ``NotImplemented`` if there is none for the function or its arguments."""
    if function not in STAND_INS:
        return NotImplemented
    try:
        return STAND_INS[function](*args, **kwargs)
    except TypeError:  # arguments in another form
        return NotImplemented


def on_meta_device(function: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    """Call a stand-in, or PyTorch's own function where there is none."""
    output: Tensor = stand_in(function, *args, **kwargs)
    return function(*args, **kwargs) if output is NotImplemented else output


def _with_stand_ins(function: Any, names: Sequence[str]) -> Callable[..., Any]:
    """A copy of a PyTorch function that calls stand-ins."""
    inner = {name: _with_stand_ins(function.__globals__[name], ()) for name in names}
    for name in ('linear', 'scaled_dot_product_attention'):
        inner[name] = functools.partial(on_meta_device, getattr(nn.functional, name))
    copy = types.FunctionType(function.__code__, {**function.__globals__, **inner}, function.__name__)
    copy.__defaults__, copy.__kwdefaults__ = function.__defaults__, function.__kwdefaults__
    return copy


#: Functions by what they stand for.
STAND_INS: dict[Any, Callable[..., Any]] = {
    nn.functional.batch_norm: batch_norm,
    nn.functional.layer_norm: layer_norm,
    nn.functional.gelu: gelu,
    nn.functional.hardswish: unary('Hardswish'),
    nn.functional.hardsigmoid: unary('Hardsigmoid'),
    nn.functional.silu: unary('Silu'),
    **dict.fromkeys((torch.sigmoid, Tensor.sigmoid), unary('Sigmoid')),
    **dict.fromkeys((torch.add, Tensor.add), _add),
    **dict.fromkeys((torch.mul, Tensor.mul), _mul),
    torch.cat: cat,
    nn.functional.linear: linear,
    **dict.fromkeys((torch.matmul, Tensor.matmul), matmul),
    # Called by PyTorch's own modules only: MetaMode shows a network's attention in another form.
    nn.functional.scaled_dot_product_attention: attention,
    nn.functional.multi_head_attention_forward: _with_stand_ins(
        nn.functional.multi_head_attention_forward, ('_in_projection_packed', '_in_projection')
    ),
}
