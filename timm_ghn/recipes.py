"""Options of a run as one frozen dataclass: a recipe in YAML and a command line both fill it in."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml

from timm_ghn.errors import ConfigError

OptionsType = TypeVar('OptionsType')


def option(default: Any, help_text: str, **more: Any) -> Any:
    """A field of a dataclass of options.

    Args:
        default: Its default.
        help_text: For the command line.
        more: ``metavar`` for the command line.
    """
    return dataclasses.field(default=default, metadata={'help': help_text, **more})


def those_of(kind: Any, options: Any, names: Iterable[str] | None = None) -> dict[str, Any]:
    """Values of options that a smaller dataclass of options has too, or those with the given names."""
    return {name: getattr(options, name) for name in (_names(kind) if names is None else names)}


def read_recipe(path: Path, kind: type) -> dict[str, Any]:
    """Options that stand in a YAML file; keys may have dashes or underscores.

    Args:
        path: The file.
        kind: Dataclass of the options.

    Raises:
        ConfigError: if it is no such file, or an option is unknown or of another type.
    """
    try:
        read = yaml.safe_load(path.read_text(encoding='utf-8'))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f'the recipe {str(path)!r} cannot be read: {" ".join(str(error).split())}') from error
    if not isinstance(read, dict):
        raise ConfigError(
            f"expected the recipe {str(path)!r} to have lines like 'lr: 0.01' (got {type(read).__name__})"
        )
    values = {str(key).replace('-', '_'): value for key, value in read.items()}
    try:
        return {name: _converted(name, value, kind) for name, value in values.items()}
    except ConfigError as error:
        raise ConfigError(f'{path}: {error}') from error


def _names(kind: Any) -> list[str]:
    return [field.name for field in dataclasses.fields(kind)]


def _converted(name: str, value: Any, options: type) -> Any:
    """A value of a recipe in the type of its option."""
    hints = typing.get_type_hints(options)
    if name not in _names(options):
        near = difflib.get_close_matches(name, _names(options), n=1)
        raise ConfigError(f'there is no option {name!r}' + (f'; did you mean {near[0]!r}?' if near else ''))
    kind, optional = _kind(hints[name])
    if kind is None or (value is None and optional):
        return value
    if kind is tuple:
        items = value if isinstance(value, list | tuple) else [value]
        return tuple(_number(name, item, float) for item in items)
    if kind is bool:
        if not isinstance(value, bool):
            raise ConfigError(f'expected {name} to be true or false (got {value!r})')
        return value
    if kind in (int, float):
        return _number(name, value, kind)
    if isinstance(value, bool) and kind is str:
        # YAML reads a bare off and on as truth values.
        return 'on' if value else 'off'
    return kind(value)


def _number(name: str, value: Any, kind: type) -> Any:
    # YAML reads 1e-3, without a dot, as text.
    try:
        if isinstance(value, bool) or (kind is int and float(value) != int(float(value))):
            raise ValueError(value)
        return kind(float(value)) if kind is int else kind(value)
    except (TypeError, ValueError) as error:
        raise ConfigError(f'expected {name} to be a number of type {kind.__name__} (got {value!r})') from error


def _kind(hint: Any) -> tuple[Any, bool]:
    """The type of an option, and whether it may be left open."""
    if hint is Any:
        return None, True
    parts = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    kinds = [part for part in parts if part is not type(None)]
    return typing.get_origin(kinds[0]) or kinds[0], len(kinds) < len(parts)


def add_arguments(parser: argparse.ArgumentParser, options: Any, groups: Mapping[str, str]) -> None:
    """Add an option for every field; what is not given on the command line is not in the namespace.

    Args:
        parser: Gets the options.
        options: Dataclass of the options.
        groups: Headings of the help, by the option that each begins with.
    """
    parser.add_argument('--config', type=Path, metavar='FILE', help='recipe in YAML; other options override it')
    hints = typing.get_type_hints(options)
    group: argparse._ActionsContainer = parser
    for field in dataclasses.fields(options):
        if field.name in groups:
            group = parser.add_argument_group(groups[field.name])
        kind, _ = _kind(hints[field.name])
        flag = '--' + field.name.replace('_', '-')
        text = field.metadata['help']
        if field.default not in (None, '', False) and 'default' not in text:
            text += f' (default: {field.default})'
        common: dict[str, Any] = {'dest': field.name, 'default': argparse.SUPPRESS, 'help': text}
        if kind is bool:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, **common)
            continue
        names = {int: 'N', float: 'X', tuple: 'X'}
        metavar = field.metadata.get('metavar') or names.get(kind, 'TEXT')
        many: dict[str, Any] = {'nargs': '+'} if kind is tuple else {}
        group.add_argument(flag, type=kind if kind in (int, float) else str, metavar=metavar, **many, **common)


def options_of(namespace: argparse.Namespace, options: type[OptionsType]) -> OptionsType:
    """The options of a command line: its own, then those of its recipe, then the defaults.

    Args:
        namespace: What the parser found.
        options: Dataclass of the options.

    Raises:
        ConfigError: if an option is missing or wrong.
    """
    given = {name: value for name, value in vars(namespace).items() if name in _names(options)}
    values = read_recipe(namespace.config, options) if namespace.config is not None else {}
    values.update({name: _converted(name, value, options) for name, value in given.items()})
    return options(**values)
