"""Run a network without computing anything and record its autograd graph.

The forward pass runs on the meta device, where tensors have shapes but no values. The network is not copied: during the
pass its parameters and buffers are replaced by meta tensors of the same shapes, and afterwards every attribute of every
module is what it was.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import threading
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import checkpoint
from torch.utils._pytree import tree_leaves, tree_map_only

from timm_ghn.contexts import restore_global_state
from timm_ghn.errors import UnsupportedModelError
from timm_ghn.graph.autograd import Op, walk
from timm_ghn.graph.graph import ParameterInfo
from timm_ghn.graph.meta import MetaMode, on_meta, to_meta
from timm_ghn.graph.vocabulary import class_path

#: Batch size of the traced forward pass; the published graphs were made with it.
TRACE_BATCH = 2

DEFAULT_IMAGE_SIZE = 224

#: Largest number of an input size; with much larger ones, torch cannot count the elements of a tensor.
_MAX_SIDE = 2**20


@dataclasses.dataclass(frozen=True)
class Recording:
    """What a forward pass did.

    Attributes:
        ops: In depth-first pre-order from the outputs, inputs in the order in which autograd lists them; some
            published rules depend on this order.
        outputs: Indices of the ops that made the outputs.
        parameters: Every parameter of the model once, in the order of ``model.named_parameters()``, used or not.
        owners: Module that holds each of them, by name.
        names: Name of each of them, by the ``id`` of the tensor.
        model: The traced model.
        input_size: (channels, height, width) of the traced image.
    """

    ops: tuple[Op, ...]
    outputs: tuple[int, ...]
    parameters: tuple[ParameterInfo, ...]
    owners: Mapping[str, nn.Module]
    names: Mapping[int, str]
    model: nn.Module
    input_size: tuple[int, int, int]

    @functools.cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every parameter."""
        return {info.name: info.shape for info in self.parameters}

    @functools.cached_property
    def readers(self) -> tuple[tuple[int, ...], ...]:
        """Ops that read each op."""
        found: list[list[int]] = [[] for _ in self.ops]
        for index, op in enumerate(self.ops):
            for child in op.children:
                found[child].append(index)
        return tuple(map(tuple, found))


def resolve_input_size(model: nn.Module, input_size: int | Sequence[int] | None = None) -> tuple[int, int, int]:
    """Size of the image that a model expects.

    Args:
        model: Any network; timm's own metadata is read where it is present.
        input_size: Overrides it: a side length, (height, width) or (channels, height, width).

    Returns:
        (channels, height, width).

    Raises:
        UnsupportedModelError: if ``input_size`` has another form, or a number is out of range.
    """
    channels = _input_channels(model)
    if input_size is None:
        return (channels, *(_image_size(model) or _stated_size(model)[1:]))
    size: Any = (input_size, input_size) if isinstance(input_size, int) else input_size
    if isinstance(size, Sequence) and len(size) == 2:
        size = (channels, *size)
    is_size = isinstance(size, Sequence) and len(size) == 3
    if not is_size or not all(type(n) is int and 1 <= n <= _MAX_SIDE for n in size):
        raise UnsupportedModelError(
            'expected input_size to be a side, (height, width) or (channels, height, width), with numbers from 1 to '
            f'{_MAX_SIDE} (got {input_size!r})'
        )
    return size[0], size[1], size[2]


def timm_metadata(model: nn.Module) -> Mapping[str, Any]:
    """timm's metadata of a model, empty for other models."""
    config = getattr(model, 'pretrained_cfg', None)
    return config if isinstance(config, Mapping) else {}


def named_layers(model: nn.Module, key: str) -> list[nn.Module]:
    """The layers, one or several, that timm's metadata names under a key."""
    named = timm_metadata(model).get(key)
    modules = dict(model.named_modules(remove_duplicate=False)) if named else {}
    return [modules[name] for name in ((named,) if isinstance(named, str) else named or ()) if name in modules]


def _stated_size(model: nn.Module) -> tuple[int, int, int]:
    """(channels, height, width) that a model's metadata states, else the default."""
    channels, height, width = timm_metadata(model).get('input_size') or (3, DEFAULT_IMAGE_SIZE, DEFAULT_IMAGE_SIZE)
    return channels, height, width


def _input_channels(model: nn.Module) -> int:
    """Channels that the first layer takes: a model may have been built with another ``in_chans`` than its metadata."""
    layers = named_layers(model, 'first_conv') if timm_metadata(model) else model.modules()
    first = next((layer for layer in layers if isinstance(layer, nn.Conv2d)), None)
    return first.in_channels if first is not None and first.groups == 1 else _stated_size(model)[0]


def _image_size(model: nn.Module) -> tuple[int, int] | None:
    """Image size that the model was built for, if its architecture fixes one."""
    size = getattr(getattr(model, 'patch_embed', None), 'img_size', None)
    if size is None:
        size = getattr(model, 'image_size', None)  # torchvision's ViT
    if isinstance(size, int):
        return size, size
    if isinstance(size, (tuple, list)) and len(size) == 2:
        return int(size[0]), int(size[1])
    return None


def record(model: nn.Module, *, input_size: int | Sequence[int] | None = None, example_inputs: Any = None) -> Recording:
    """Run a forward pass of ``model`` in training mode on the meta device; arguments as in :func:`timm_ghn.trace`.

    Raises:
        UnsupportedModelError: if the forward pass fails on the meta device, or if the output depends on no parameter.
    """
    with _TRACING:  # another thread may have borrowed the network
        modules = list(model.named_modules(remove_duplicate=False))
        _refuse_compiled(modules)
        size = resolve_input_size(model, input_size)
        empty = Recording((), (), *_list_parameters(modules), model, size)
        if not empty.parameters:
            raise UnsupportedModelError(f'{type(model).__name__} has no parameters: there is nothing to predict')
        try:
            return _run(empty, modules, example_inputs)
        except UnsupportedModelError:
            # The first convolution need not take the image itself: TResNet folds 4x4 pixels into channels first.
            stated = (_stated_size(model)[0], size[1], size[2])
            given = example_inputs is not None or (isinstance(input_size, Sequence) and len(input_size) == 3)
            if not given and stated != size:
                with contextlib.suppress(UnsupportedModelError):
                    return _run(dataclasses.replace(empty, input_size=stated), modules, example_inputs)
            raise


def _refuse_compiled(modules: Sequence[tuple[str, nn.Module]]) -> None:
    """A compiled or scripted module does not run Python code that could be followed."""
    for name, module in modules:
        where = f"module '{name}'" if name else 'the model'
        if isinstance(module, torch.jit.ScriptModule) or type(module).__name__ == 'OptimizedModule':
            raise UnsupportedModelError(
                f'{where} is compiled or scripted; predict for the model before '
                'scripting it, and before torch.compile or for its _orig_mod, which shares its parameters'
            )


@contextlib.contextmanager
def _no_reentrant_checkpointing() -> Iterator[None]:
    """Run reentrantly checkpointed functions as they are: autograd does not see the parameters that they read."""
    original = checkpoint.CheckpointFunction
    direct = types.SimpleNamespace(apply=lambda function, preserve_rng_state, *args: function(*args))
    checkpoint.CheckpointFunction = direct  # type: ignore[assignment, misc]
    try:
        yield
    finally:
        checkpoint.CheckpointFunction = original  # type: ignore[misc]


#: Held while a network is on the meta device, and the process's default dtype and random generators are set aside.
_TRACING = threading.RLock()


def _run(empty: Recording, modules: Sequence[tuple[str, nn.Module]], example_inputs: Any) -> Recording:
    """Run the model once; the recording with what it did."""
    model, size = empty.model, empty.input_size
    borrowed = list(dict.fromkeys(module for _, module in modules))
    with (
        restore_global_state(),
        torch.inference_mode(False),
        torch.enable_grad(),
        _no_reentrant_checkpointing(),
        on_meta(borrowed, empty.names) as names,
    ):
        torch.set_default_dtype(torch.float32)
        args, kwargs = _meta_inputs(example_inputs, size)
        mode = MetaMode()
        try:
            with mode:
                output = model(*args, **kwargs)
        except Exception as error:
            raise UnsupportedModelError(_failure(modules, mode.operator, size, error)) from error
        ops, outputs = walk([leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)], names)
    if not any(op.parameters for op in ops):
        raise UnsupportedModelError(
            f'no parameter of {type(model).__name__} is connected to its output; '
            'the forward pass may detach it, or return something else than tensors'
        )
    return dataclasses.replace(empty, ops=ops, outputs=outputs)


def _list_parameters(
    modules: Sequence[tuple[str, nn.Module]],
) -> tuple[tuple[ParameterInfo, ...], dict[str, nn.Module], dict[int, str]]:
    """Every parameter once (also a tied one): its facts, its module by name, and its name by identity."""
    names: dict[int, list[str]] = {}
    parameters: dict[int, nn.Parameter] = {}
    for name, parameter in modules[0][1].named_parameters(remove_duplicate=False):
        if nn.parameter.is_lazy(parameter):
            raise UnsupportedModelError(f"'{name}' has no shape yet; run the model once to initialise lazy layers")
        names.setdefault(id(parameter), []).append(name)
        parameters[id(parameter)] = parameter
    by_path = dict(modules)
    owners = {first: by_path[[first, *aliases][-1].rpartition('.')[0]] for first, *aliases in names.values()}
    infos = tuple(
        ParameterInfo(first, tuple(parameter.shape), parameter.dtype, class_path(owners[first]), tuple(aliases))
        for parameter, (first, *aliases) in zip(parameters.values(), names.values(), strict=True)
    )
    return infos, owners, {key: first for key, (first, *_) in names.items()}


def _running(modules: Sequence[tuple[str, nn.Module]], error: Exception) -> str:
    """Name of the innermost module that was running when an error occurred."""
    names = {id(module): name for name, module in reversed(modules)}
    path, trail = '', error.__traceback__
    while trail is not None:
        path = names.get(id(trail.tb_frame.f_locals.get('self')), path)
        trail = trail.tb_next
    return path


def _failure(
    modules: Sequence[tuple[str, nn.Module]], operator: str, size: tuple[int, int, int], error: Exception
) -> str:
    """What happened where, and the ways out."""
    path, model = _running(modules, error), modules[0][1]
    where = f"module '{path}' ({type(dict(modules)[path]).__name__})" if path else 'the model itself'
    after = f', at {operator},' if operator else ''
    text = (str(error).strip().splitlines() or [''])[0]
    return (
        f'{type(model).__name__} cannot be traced with an image of {size[0]}x{size[1]}x{size[2]}: {where}{after} '
        f'failed with {type(error).__name__}: {text}. Pass input_size=... for another image size or example_inputs=... '
        'for a network that takes something else; where control flow depends on values, which a trace does not have, '
        'the network keeps its own initialisation'
    )


def _meta_inputs(example_inputs: Any, size: tuple[int, int, int]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments for the forward pass, their tensors on the meta device."""
    if example_inputs is None:
        example_inputs = torch.empty((TRACE_BATCH, *size), device='meta')
    if isinstance(example_inputs, Mapping):
        return (), tree_map_only(Tensor, _data, dict(example_inputs))
    if isinstance(example_inputs, Tensor):
        example_inputs = (example_inputs,)
    if not isinstance(example_inputs, (tuple, list)):
        raise UnsupportedModelError(
            'expected example_inputs to be a tensor, a tuple of positional or a dictionary of keyword arguments '
            f'(got {example_inputs!r})'
        )
    return tree_map_only(Tensor, _data, tuple(example_inputs)), {}


def _data(tensor: Tensor) -> Tensor:
    """A floating-point input requires a gradient, so that autograd records what depends on it."""
    tensor = to_meta(tensor)
    # Not a leaf, since a network may change its input in place.
    return tensor.detach().requires_grad_().clone() if tensor.is_floating_point() else tensor
