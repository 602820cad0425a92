"""Architectures as records: what a network is, without its weights, and how to build it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

import torch
from timm.layers import DropPath
from torch import nn
from torch.overrides import TorchFunctionMode

from timm_ghn.errors import ConfigError

#: Where an architecture may be used, by its :attr:`Architecture.design`.
SPLITS = ('train', 'val', 'test')

#: Of 100 designs, how many belong to 'val' and how many to 'test'.
HELD_OUT_PERCENT = 5

#: Makes the network of an architecture; the second argument is what all classes of timm take: num_classes, in_chans and
#: device.
Builder = Callable[['Architecture', dict[str, Any]], nn.Module]

_BUILDERS: dict[str, Builder] = {}


def register_family(name: str) -> Callable[[Builder], Builder]:
    """Function decorator: say how architectures of a family are built."""

    def register(builder: Builder) -> Builder:
        _BUILDERS[name] = builder
        return builder

    return register


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """What a network classifies: square images with a side in pixels, into a number of classes."""

    image_size: int = 32
    num_classes: int = 10
    in_chans: int = 3

    def __post_init__(self) -> None:
        if min(self.image_size, self.num_classes, self.in_chans) < 1:
            raise ConfigError(f'expected image_size, num_classes and in_chans of at least 1 (got {self})')

    @property
    def input_size(self) -> tuple[int, int, int]:
        """(channels, height, width) of the images."""
        return self.in_chans, self.image_size, self.image_size

    @property
    def task(self) -> dict[str, int]:
        """These fields alone."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(Task)}


@dataclasses.dataclass(frozen=True)
class Architecture(Task):
    """A network without its weights.

    Equal records build equal networks, on any machine; a record can be pickled, hashed and written as JSON.

    Attributes:
        family: What builds it, a name of :func:`register_family`.
        options: What the family varies. Values are booleans, numbers, strings, None, and tuples of these.
    """

    family: str
    options: Mapping[str, Any] = dataclasses.field(hash=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, 'options', {name: _tuples(self.options[name]) for name in sorted(self.options)})

    @property
    def design(self) -> str:
        """Digest of the family and the options alone: one for all image sizes and numbers of classes."""
        return _digest([self.family, self.options])

    @property
    def name(self) -> str:
        """Its name in timm, if it has one, else its :attr:`key`."""
        return str(self.options.get('name', self.key))

    @property
    def key(self) -> str:
        """The family and a digest of everything: a file name under which what is known of it can be kept."""
        return f'{self.family}-{_digest(self.to_dict())}'

    @property
    def split(self) -> str:
        """'train', 'val' or 'test', decided by :attr:`design`.

        It needs no list: whoever samples and with whatever seed, one design always falls on the same side, and so
        does the same design for other images and classes. What it excludes is one design on both sides, not two that
        differ by a block; for networks of another kind there are the families that training leaves out.
        """
        bucket = int(self.design, 16) % 100
        if bucket < HELD_OUT_PERCENT:
            return 'val'
        return 'test' if bucket < 2 * HELD_OUT_PERCENT else 'train'

    def build(self, device: str | torch.device = 'meta') -> nn.Module:
        """Make the network, in training mode and without dropout of any kind.

        On the meta device it has no values, nor have its buffers: enough for tracing, not for running. On any other
        device it is initialised as its class does it.
        """
        if self.family not in _BUILDERS:
            raise ConfigError(f'expected a family among {", ".join(sorted(_BUILDERS))} (got {self.family!r})')
        common = {'num_classes': self.num_classes, 'in_chans': self.in_chans, 'device': torch.device(device)}
        with SkipInitialisation():
            model = _BUILDERS[self.family](self, common)
        for module in model.modules():  # predicted parameters are not to be regularised
            if isinstance(module, nn.modules.dropout._DropoutNd):
                module.p = 0.0
            elif isinstance(module, DropPath):
                module.drop_prob = 0.0
        return model.train()

    def to_dict(self) -> dict[str, Any]:
        """Plain values that ``json`` can write."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Architecture:
        """The record that :meth:`to_dict` or its JSON describes."""
        try:
            return cls(**values)
        except TypeError as error:
            raise ConfigError(f'expected the fields of an architecture: {error}') from error


def _tuples(value: Any) -> Any:
    """A value with tuples in the place of lists, as JSON gives them back."""
    return tuple(map(_tuples, value)) if isinstance(value, tuple | list) else value


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, separators=(',', ':'), allow_nan=False)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


class SkipInitialisation(TorchFunctionMode):
    """Skip what fills meta tensors: there is nothing to fill, and doing so takes most of the time of building there."""

    _FILLING = frozenset(name for name in dir(nn.init) if name.endswith('_') and not name.startswith('_')) | {
        'normal_', 'uniform_', 'trunc_normal_', 'zero_', 'fill_', 'erfinv_', 'mul_', 'add_', 'div_', 'clamp_', 'sub_',
    }  # fmt: skip

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, '__name__', '') in self._FILLING:
            target = args[0] if args else kwargs.get('tensor')
            if isinstance(target, torch.Tensor) and target.is_meta:
                return target
        return func(*args, **kwargs)
