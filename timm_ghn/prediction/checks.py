"""Checks of what is predicted and of where it goes; writing into a model: all of it, or nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from timm_ghn.errors import PredictionError, UnsupportedModelError
from timm_ghn.prediction.plan import ParameterRow

#: Dtypes in which torch computes. Narrower ones only store values, with scales that lie elsewhere.
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_dtype(name: str, dtype: torch.dtype) -> None:
    """Raise :class:`UnsupportedModelError` for a parameter of a dtype that torch does not compute in (8 bits)."""
    if dtype not in _DTYPES:
        raise UnsupportedModelError(
            f"'{name}' is in {dtype}; expected one of {', '.join(map(str, _DTYPES))}: predict before the model is "
            'converted to fewer bits'
        )


def check_storage(name: str, parameter: Tensor) -> None:
    """Raise :class:`UnsupportedModelError` for a parameter on the meta device."""
    if parameter.is_meta:
        raise UnsupportedModelError(
            f"'{name}' is on the meta device and has no storage to write to; call model.to_empty(device=...) "
            'first, or load predict(model).state_dict with assign=True'
        )


def check_writable(name: str, parameter: Tensor) -> None:
    """Raise :class:`UnsupportedModelError` for a parameter that cannot be written in place."""
    check_storage(name, parameter)
    check_dtype(name, parameter.dtype)
    if parameter.is_inference() and not torch.is_inference_mode_enabled():
        raise UnsupportedModelError(
            f"'{name}' was made in inference mode and can be written only there; "
            'make this call in torch.inference_mode() as well, or build the model outside of it'
        )
    if any(size > 1 and stride == 0 for size, stride in zip(parameter.shape, parameter.stride(), strict=True)):
        raise UnsupportedModelError(
            f"several elements of '{name}' share their memory (an expanded tensor); give the model its own copy"
        )


def writable(model: nn.Module, rows: Iterable[ParameterRow]) -> dict[str, nn.Parameter]:
    """The parameters that rows of a plan name.

    Raises:
        UnsupportedModelError: if the model lacks one, has one of another shape, or has one that cannot be written.
    """
    parameters, found = dict(model.named_parameters()), {}
    for row in rows:
        parameter = parameters.get(row.name)
        if parameter is None or tuple(parameter.shape) != row.shape:
            has = 'none of that name' if parameter is None else f'one of shape {tuple(parameter.shape)}'
            raise UnsupportedModelError(
                f"expected a model with a parameter '{row.name}' of shape {row.shape} (got {has}): the plan is that of "
                'another model'
            )
        check_writable(row.name, parameter)
        found[row.name] = parameter
    return found


def check_finite(what: str, values: Tensor) -> None:
    """Raise :class:`PredictionError`, which begins with ``what``, if a value is infinite or NaN."""
    # The sum of finite values may overflow, so only a suspicious sum is looked into.
    if not bool(values.sum().isfinite()) and not bool(values.isfinite().all()):
        raise PredictionError(f'{what} are not finite in {values.dtype}')


@torch.no_grad()
def write_all_(parameters: Mapping[str, Tensor], write: Callable[[str, Tensor], object]) -> None:
    """Write parameters in place: all of them or, if anything fails, none.

    What may fail (subclasses of tensors, and what lies on a device) is written first and restored if it does. Copying
    into an ordinary tensor on the CPU cannot fail, only be interrupted: ``KeyboardInterrupt`` is raised when all are
    written, so no copy of them is needed. ``write`` may be called again for the same parameter.

    Raises:
        PredictionError: if a parameter cannot be written; all are what they were.
    """
    pending, others = [], {}
    for name, parameter in parameters.items():
        if type(parameter) in (Tensor, nn.Parameter) and parameter.device.type == 'cpu':
            pending.append((name, parameter))
        else:
            others[name] = parameter
    _write_or_restore(others, write)
    interruption = None
    while pending:
        try:
            write(*pending[-1])
            pending.pop()
        except KeyboardInterrupt as error:
            interruption = error
    if interruption is not None:
        raise interruption


def _write_or_restore(parameters: Mapping[str, Tensor], write: Callable[[str, Tensor], object]) -> None:
    saved: list[tuple[Tensor, Tensor]] = []
    name = ''
    try:
        for name, parameter in parameters.items():
            saved.append((parameter, parameter.detach().clone()))
            write(name, parameter)
    except BaseException as error:
        for parameter, value in reversed(saved):  # the last one first: some may share memory
            with contextlib.suppress(Exception, KeyboardInterrupt):  # one that cannot be written still has its value
                parameter.copy_(value)
        if not isinstance(error, Exception):
            raise
        cause = ': '.join((type(error).__name__, *str(error).splitlines()[:1]))
        raise PredictionError(f"'{name}' cannot be written ({cause}); the model was left as it was") from error
