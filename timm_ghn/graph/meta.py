"""Run a network on the meta device, where tensors have shapes but no values, and leave it as it was."""

from __future__ import annotations

import collections
import contextlib
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._pytree import tree_leaves, tree_map_only

from timm_ghn.errors import UnsupportedModelError
from timm_ghn.graph.stand_ins import on_meta_device, stand_in


@contextlib.contextmanager
def on_meta(modules: Sequence[nn.Module], names: Mapping[int, str]) -> Iterator[dict[int, str]]:
    """Replace all parameters and buffers by meta tensors, in training mode; afterwards all modules are as before.

    Floating-point tensors become float32, so that a model with mixed dtypes can be traced; parameters require a
    gradient, so that autograd records frozen ones too.

    Args:
        modules: All modules of a network.
        names: Names of its parameters by the ``id`` of the tensor.

    Yields:
        Names of the parameters by the ``id`` of the meta tensor.
    """
    saved = [dict(module.__dict__) for module in modules]
    held: dict[int, tuple[Any, Any]] = {}
    for state in saved:
        _note((value for key, value in state.items() if key not in ('_parameters', '_buffers')), held)
    stand_ins: dict[int, Tensor] = {}
    try:
        for module in modules:
            state = module.__dict__
            for key in ('_parameters', '_buffers'):
                state[key] = {name: _meta_like(value, stand_ins) for name, value in state[key].items()}
            state['training'] = True
            if isinstance(module, nn.modules.batchnorm._NormBase) and module.momentum is None:
                state['momentum'] = 0.0  # a cumulative average would read the value of num_batches_tracked
        yield {id(stand_ins[key]): name for key, name in names.items()}
    finally:
        for module, state in zip(modules, saved, strict=True):
            module.__dict__.clear()
            module.__dict__.update(state)
        for container, contents in held.values():
            _put_back(container, contents)


def _note(values: Iterable[Any], held: dict[int, tuple[Any, Any]]) -> None:
    """Remember what a forward pass may change in place: containers, and tensors outside parameters and buffers."""
    for value in values:
        if id(value) in held:
            continue
        if isinstance(value, Tensor):
            is_plain = value.layout is torch.strided and not (value.is_meta or value.is_nested or value.is_quantized)
            if is_plain and not isinstance(value, nn.Parameter):
                held[id(value)] = value, value.detach().clone()
        elif isinstance(value, (dict, list, set, collections.deque)):
            held[id(value)] = value, _items(value)
            _note(value.values() if isinstance(value, dict) else value, held)
        elif type(value) is tuple:
            _note(value, held)


def _items(container: Any) -> list[Any]:
    """What a container holds: of a dictionary its keys, then its values."""
    return [*container, *container.values()] if isinstance(container, dict) else list(container)


def _put_back(container: Any, contents: Any) -> None:
    """Restore the contents of a container or a tensor in place, if they have changed."""
    if isinstance(container, Tensor):
        if not torch.equal(container, contents):
            container.detach().copy_(contents)
        return
    found = _items(container)
    if len(found) == len(contents) and all(map(operator.is_, found, contents)):
        return
    container.clear()
    if isinstance(container, dict):
        half = len(contents) // 2
        container.update(zip(contents[:half], contents[half:], strict=True))
    else:
        container.update(contents) if isinstance(container, set) else container.extend(contents)


def _meta_like(value: Tensor | None, stand_ins: dict[int, Tensor]) -> Tensor | None:
    """A meta tensor of the same shape; the same one for the same (tied) tensor."""
    if value is None:
        return None
    if value.is_nested:
        raise UnsupportedModelError('a buffer or parameter is a nested tensor, which has no shape to trace with')
    if id(value) not in stand_ins:
        dtype = torch.float32 if value.dtype.is_floating_point else value.dtype
        meta = torch.empty(value.shape, dtype=dtype, device='meta')
        is_parameter = isinstance(value, nn.Parameter)
        differentiable = dtype.is_floating_point or dtype.is_complex
        stand_ins[id(value)] = nn.Parameter(meta, requires_grad=differentiable) if is_parameter else meta
    return stand_ins[id(value)]


class MetaMode(TorchFunctionMode):
    """Keep all tensors on the meta device and in float32, and write attention out as matrix products and a softmax.

    Networks create tensors in their forward pass (position grids, masks) and hold tensors outside of buffers; both
    are moved to the meta device where they are used.
    """

    def __init__(self) -> None:
        super().__init__()
        self.last: Any = None

    @property
    def operator(self) -> str:
        """Name of the function that was called last, e.g. ``'torch.Tensor.item'``; empty before the first call."""
        if self.last is None:
            return ''
        return str(resolve_name(self.last) or getattr(self.last, '__name__', self.last))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.last = func
        args = tuple(_single(value) for value in args)
        kwargs = {key: _single(value) for key, value in kwargs.items()} if kwargs else {}
        func = _CASTS.get(func, func)
        if func is nn.functional.scaled_dot_product_attention:
            return _plain_attention(*args, **kwargs)
        output = stand_in(func, *args, **kwargs)
        if output is not NotImplemented:
            return output
        if func in _RECURRENT and not isinstance(args[3], (tuple, list)):
            return _one_step(_RECURRENT[func], *args)
        if func in _CONSTRUCTORS:
            return func(*args, **{**kwargs, 'device': 'meta'})
        if func is Tensor.cpu or func is Tensor.cuda:
            return args[0]
        if func in (Tensor.to, Tensor.type) and (len(args) > 1 or kwargs):
            return _cast(*args, **kwargs)
        try:
            return func(*args, **kwargs)
        except (RuntimeError, NotImplementedError):
            if all(value.is_meta for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)):
                raise
            args, kwargs = tree_map_only(Tensor, to_meta, (args, kwargs))
            return func(*args, **kwargs)


_CONSTRUCTORS = frozenset(torch.utils._device._device_constructors())


#: Casts to a floating-point type, and what takes their place.
_CASTS: dict[Any, Any] = dict.fromkeys((Tensor.half, Tensor.bfloat16, Tensor.double), Tensor.float)


def _single(value: Any) -> Any:
    """float32 for every floating-point dtype: in a trace, casts between them have no effect."""
    return torch.float32 if isinstance(value, torch.dtype) and value.is_floating_point else value


def _cast(tensor: Tensor, *wanted: Any, **options: Any) -> Tensor:
    """``tensor.to(...)`` without its change of device; floating-point dtypes become float32."""
    kinds = [getattr(value, 'dtype', value) for value in (*wanted, *options.values())]
    dtype = next((_single(kind) for kind in kinds if isinstance(kind, torch.dtype)), tensor.dtype)
    kept = {key: value for key, value in options.items() if key in ('copy', 'memory_format')}
    return tensor.to(dtype, **kept)


def to_meta(tensor: Tensor) -> Tensor:
    """The tensor on the meta device, float32 if it is floating-point."""
    return tensor.to('meta', _single(tensor.dtype))


def _plain_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Attention as softmax(q k^T) v: fused kernels differ by device and version, and hide the softmax."""
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
        value = value.repeat_interleave(query.shape[-3] // value.shape[-3], -3)
    query = on_meta_device(torch.mul, query, query.shape[-1] ** -0.5 if scale is None else scale)
    logits = on_meta_device(torch.matmul, query, key.transpose(-2, -1))
    if attn_mask is not None and attn_mask.dtype.is_floating_point:
        # It may hold a learned bias; a Boolean mask does not.
        logits = on_meta_device(torch.add, logits, to_meta(attn_mask))
    attention = logits.softmax(dim=-1)
    if dropout_p > 0.0:
        attention = nn.functional.dropout(attention, dropout_p)
    return on_meta_device(torch.matmul, attention, value)


#: Recurrent functions, and the number of gates whose weights are stacked in theirs.
_RECURRENT: dict[Any, int] = {
    torch._VF.lstm: 4,
    torch._VF.gru: 3,
    torch._VF.rnn_tanh: 1,
    torch._VF.rnn_relu: 1,
}


def _one_step(gates: int, *args: Any) -> tuple[Tensor, ...]:
    """A recurrent layer as if every time step were the first, so that each weight is read once.

    Unrolled over the time steps, the graph would be as long as the sequence and read its weights again and again.
    """
    data, _, weights, has_biases, num_layers, _, _, bidirectional, batch_first = args
    directions = 2 if bidirectional else 1
    each = len(weights) // (num_layers * directions)
    last_states = []
    for layer in range(num_layers):
        outputs = []
        for direction in range(directions):
            w_ih, w_hh, *biases = weights[(layer * directions + direction) * each :][:each]
            b_ih, b_hh = biases if has_biases else (None, None)
            size = w_hh.shape[0] // gates
            hidden = nn.functional.linear(data, w_ih, b_ih)[..., : w_hh.shape[1]]
            hidden = nn.functional.linear(hidden, w_hh, b_hh)[..., :size].tanh()
            outputs.append(hidden)
            last_states.append(hidden.select(1 if batch_first and data.dim() > 2 else 0, -1))
        data = torch.cat(outputs, -1)
    states = torch.stack(last_states)
    return (data, states, states) if gates == 4 else (data, states)
