"""Graph networks by name, so that a configuration can say which one it means."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from torch import nn

from timm_ghn.errors import ConfigError

if TYPE_CHECKING:
    from timm_ghn.nn.config import GHNConfig

_GNNS: dict[str, type[nn.Module]] = {}
ModuleType = TypeVar('ModuleType', bound=type[nn.Module])


def register_gnn(name: str) -> Callable[[ModuleType], ModuleType]:
    """Class decorator: make a graph network available as ``GHNConfig(gnn=name)``.

    The class is built as ``cls(config)`` and maps node features (N, d) and a
    :class:`~timm_ghn.graph.graph.GraphBatch` of N nodes to node features (N, d).

    Raises:
        ConfigError: if another class has this name.
    """

    def register(cls: ModuleType) -> ModuleType:
        if name in _GNNS:
            raise ConfigError(
                f'expected a new name for a graph network (got {name!r}, which is {_GNNS[name].__name__})'
            )
        _GNNS[name] = cls
        return cls

    return register


def known_gnns() -> tuple[str, ...]:
    """Names of all registered graph networks."""
    return tuple(sorted(_GNNS))


def build_gnn(config: GHNConfig) -> nn.Module:
    """Build the graph network that a configuration names.

    Raises:
        ConfigError: if no graph network has this name.
    """
    if config.gnn not in _GNNS:
        raise ConfigError(f'expected gnn to be one of {", ".join(known_gnns())} (got {config.gnn!r})')
    return _GNNS[config.gnn](config)
