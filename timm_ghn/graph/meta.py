"""Run a network on the meta device, where tensors have shapes but no values, and leave it as it was."""

from __future__ import annotations

import collections
import contextlib
import operator
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, resolve_name

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

    Raises:
        UnsupportedModelError: if one of them is a nested tensor.
    """
    saved = [dict(module.__dict__) for module in modules]
    contents = _Contents()
    for state in saved:
        contents.note(value for key, value in state.items() if key not in ('_parameters', '_buffers'))
    stand_ins: dict[int, Tensor] = {}
    try:
        for module in modules:
            state = module.__dict__
            for key in ('_parameters', '_buffers'):
                if state[key]:
                    state[key] = {name: _meta_like(value, stand_ins) for name, value in state[key].items()}
                else:
                    state[key] = {}
            state['training'] = True
            if isinstance(module, nn.modules.batchnorm._NormBase) and module.momentum is None:
                state['momentum'] = 0.0  # a cumulative average would read the value of num_batches_tracked
        yield {id(stand_ins[key]): name for key, name in names.items()}
    finally:
        for module, state in zip(modules, saved, strict=True):
            module.__dict__.clear()
            module.__dict__.update(state)
        contents.put_back()


#: Types of values that hold nothing that a forward pass could change.
_ATOMS = frozenset((bool, int, float, str, type(None), type, torch.dtype, torch.device, types.FunctionType))


class _Contents:
    """Contents of attributes that a forward pass may change: containers, and tensors outside parameters and buffers."""

    def __init__(self) -> None:
        self._empty: list[Any] = []
        self._held: dict[int, tuple[Any, Any]] = {}

    def note(self, values: Iterable[Any]) -> None:
        """Remember the contents of values, those of nested containers included."""
        for value in values:
            kind = type(value)
            if kind in _ATOMS:
                continue
            if isinstance(value, Tensor):
                if not value.is_meta and not isinstance(value, nn.Parameter):
                    with contextlib.suppress(RuntimeError):  # quantised per channel: no copy, nor an operator in place
                        version = None if _is_plain(value) else value._version
                        self._held[id(value)] = value, (value.detach().clone(), version)
            elif isinstance(value, (dict, list, set, collections.deque)):
                if not value:  # most of a module's are
                    self._empty.append(value)
                elif id(value) not in self._held:
                    self._held[id(value)] = value, dict(value) if isinstance(value, dict) else list(value)
                    if not isinstance(value, set):
                        self.note(value.values() if isinstance(value, dict) else value)
            elif kind is tuple:
                self.note(value)

    def put_back(self) -> None:
        """Restore the contents."""
        for container in self._empty:
            if container:
                container.clear()
        for container, value in self._held.values():
            _refill(container, value)


def _is_plain(tensor: Tensor) -> bool:
    """Whether a tensor's values can be compared; for the others, its version counter tells whether it changed."""
    return tensor.layout is torch.strided and not tensor.is_quantized and not tensor.is_nested


def _refill(container: Any, contents: Any) -> None:
    """Restore the contents of a container or a tensor in place."""
    if isinstance(container, Tensor):
        values, version = contents
        changed = not torch.equal(container, values) if version is None else container._version != version
        if changed:
            with torch.no_grad():  # detach() would give a sparse tensor of its own
                container.copy_(values)
        return
    if _holds(container, contents):
        return
    container.clear()
    container.update(contents) if isinstance(container, (dict, set)) else container.extend(contents)


def _holds(container: Any, contents: Any) -> bool:
    """Whether a container still holds the identical objects; tensors are never compared by value."""
    if len(container) != len(contents):
        return False
    if isinstance(container, dict) and not all(map(operator.is_, container.values(), contents.values())):
        return False
    return all(map(operator.is_, container, contents))


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
            return _one_step(*args, gates=_RECURRENT[func])
        if func in _CONSTRUCTORS:
            if kwargs.get('device') is None or torch.device(kwargs['device']).type != 'meta':
                kwargs = {**kwargs, 'device': 'meta'}
            return func(*args, **kwargs)
        if func is Tensor.type and (len(args) > 1 or kwargs):
            return args[0].to(_named_type(*args[1:], **kwargs))
        if func is Tensor.to or func is Tensor.cpu or func is Tensor.cuda:
            return _stay(func, args, kwargs)
        try:
            return func(*args, **kwargs)
        except (RuntimeError, NotImplementedError) as error:
            moved = [to_meta(value) for value in args], {key: to_meta(value) for key, value in kwargs.items()}
            if all(a is b for a, b in zip(args, moved[0], strict=True)) and all(
                kwargs[key] is value for key, value in moved[1].items()
            ):
                raise error
            return func(*moved[0], **moved[1])


_CONSTRUCTORS = frozenset(torch.utils._device._device_constructors())


#: Casts to a floating-point type, and what takes their place.
_CASTS: dict[Any, Any] = dict.fromkeys((Tensor.half, Tensor.bfloat16, Tensor.double), Tensor.float)


def _single(value: Any) -> Any:
    """float32 for every floating-point dtype: in a trace, casts between them have no effect."""
    return torch.float32 if isinstance(value, torch.dtype) and value.is_floating_point else value


def _named_type(dtype: Any, non_blocking: bool = False) -> torch.dtype:  # as in torch.Tensor.type
    """The dtype that an argument of ``tensor.type(...)`` names: a dtype, a tensor class or the name of one."""
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype.rpartition('.')[2])
    named: torch.dtype = _single(getattr(dtype, 'dtype', dtype))
    return named


def _stay(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """``tensor.to(...)`` without its change of device; floating-point dtypes become float32."""
    if func is not Tensor.to:
        return args[0]
    kwargs = {key: value for key, value in kwargs.items() if key != 'device'}
    rest = tuple(value for value in args[1:] if not isinstance(value, (str, torch.device)))
    rest = tuple(_single(value.dtype) if isinstance(value, Tensor) else value for value in rest)
    if isinstance(kwargs.get('other'), Tensor):
        kwargs['dtype'] = _single(kwargs.pop('other').dtype)
    if not rest and not (kwargs.keys() - {'non_blocking', 'copy'}):
        return args[0]
    return func(args[0], *rest, **kwargs)


def to_meta(value: Any) -> Any:
    """The value with its tensors on the meta device, float32 if floating-point; itself if nothing had to move."""
    if isinstance(value, Tensor):
        return value if value.device.type == 'meta' else value.to('meta', _single(value.dtype))
    if type(value) in (tuple, list):
        moved = [to_meta(item) for item in value]
        return value if all(a is b for a, b in zip(value, moved, strict=True)) else type(value)(moved)
    return value


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


def _one_step(
    data: Tensor,
    state: Any,
    weights: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
    *,
    gates: int,
) -> tuple[Tensor, ...]:
    """A recurrent layer as if every time step were the first, so that each weight is read once.

    Unrolled over the time steps, the graph would be as long as the sequence and read its weights again and again.
    """
    directions = 2 if bidirectional else 1
    each = len(weights) // (num_layers * directions)
    last_states = []
    for layer in range(num_layers):
        outputs = []
        for direction in range(directions):
            w_ih, w_hh, *rest = weights[(layer * directions + direction) * each :][:each]
            b_ih, b_hh = rest[:2] if has_biases else (None, None)
            size = w_hh.shape[0] // gates
            hidden = nn.functional.linear(data, w_ih, b_ih)[..., : w_hh.shape[1]]
            hidden = nn.functional.linear(hidden, w_hh, b_hh)[..., :size].tanh()
            if len(rest) in (1, 3):  # an LSTM with a projection
                hidden = nn.functional.linear(hidden, rest[-1])
            outputs.append(hidden)
            last_states.append(hidden.select(1 if batch_first and data.dim() > 2 else 0, -1))
        data = torch.cat(outputs, -1)
    states = torch.stack(last_states)
    return (data, states, states) if gates == 4 else (data, states)
