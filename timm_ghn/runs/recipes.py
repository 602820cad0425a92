"""Options of a run as one frozen dataclass: a recipe in YAML and a command line both fill it in.

Each option states its default, help and range once, where it is declared; its type is its annotation. Whoever makes a
record of options, from a recipe, a command line or Python, gets them converted and checked by :class:`Options`.
"""

from __future__ import annotations

import argparse
import collections.abc
import dataclasses
import difflib
import json
import math
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import yaml

from timm_ghn.errors import ConfigError

OptionsType = TypeVar('OptionsType', bound='Options')

#: Ranges of numbers, in words that stand after 'expected lr'.
POSITIVE = 'above 0'
NOT_NEGATIVE = 'of 0 or more'
PROPORTION = 'between 0 and 1'
POSITIVE_PROPORTION = 'above 0, to 1'
BELOW_ONE = 'from 0 to below 1'
_RANGES: dict[str, Callable[[float], bool]] = {
    POSITIVE: lambda number: number > 0,
    NOT_NEGATIVE: lambda number: number >= 0,
    PROPORTION: lambda number: 0 <= number <= 1,
    POSITIVE_PROPORTION: lambda number: 0 < number <= 1,
    BELOW_ONE: lambda number: 0 <= number < 1,
}

#: Each type of an option in words, and what it is made from: YAML reads 1e-3, without a dot, as text.
_TYPES: dict[Any, tuple[str, Any]] = {
    bool: ('true or false', (bool,)),
    int: ('a whole number', (int, float, str)),
    float: ('a finite number', (int, float, str)),
    str: ('a text', (str, int, float)),
    Path: ('a path', (Path, str, int, float)),
    collections.abc.Mapping: ('a mapping', (collections.abc.Mapping,)),
}


def option(default: Any, text: str, *, within: str | None = None, choices: Iterable[str] | None = None) -> Any:
    """A field of a dataclass of options: what the command line says of it, and which values it may have."""
    return dataclasses.field(default=default, metadata={'help': text, 'within': within, 'choices': choices})


@dataclasses.dataclass(frozen=True)
class Options:
    """Base of the records of options: every field has the type of its annotation and is within its range.

    Raises:
        ConfigError: if one is not.
    """

    #: Headings of the help in their order, by the options with which they begin or go on.
    groups: ClassVar[Mapping[str, str]] = {}

    def __post_init__(self) -> None:
        for name, value in converted(type(self), vars(self)).items():
            object.__setattr__(self, name, value)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON gives them back."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        found: dict[str, Any] = json.loads(json.dumps(values, default=str))
        return found


@dataclasses.dataclass(frozen=True)
class RunOptions(Options):
    """What every run of training is told."""

    output: Path = option(Path('out'), 'folder for the log, checkpoints and weights')
    resume: bool = option(False, 'go on from the last good checkpoint in the output folder')
    checkpoint_steps: int | None = option(None, 'steps between checkpoints (default: each epoch)', within=POSITIVE)
    checkpoint_hist: int = option(2, 'checkpoints to keep', within=POSITIVE)
    time_limit: float | None = option(None, 'minutes after which to stop, with a checkpoint', within=POSITIVE)
    mixed_precision: str | None = option(
        None, "no, fp16 or bf16 (default: accelerate's)", choices=('no', 'fp16', 'bf16')
    )
    log_with: str | None = option(None, "tracker of accelerate, e.g. 'tensorboard' or 'wandb'")
    lr: float = option(1e-3, 'learning rate', within=POSITIVE)
    smoothing: float = option(0.0, 'label smoothing', within=BELOW_ONE)


def converted(kind: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """Values of some fields in the types that the annotations of a dataclass ask for, and within their ranges.

    Raises:
        ConfigError: if there is no such field, or a value is of another type or out of range.
    """
    hints = typing.get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for name in values:
        if name not in fields:
            near = difflib.get_close_matches(str(name), fields, n=1)
            raise ConfigError(f'there is no option {name!r}' + (f'; did you mean {near[0]!r}?' if near else ''))
    return {name: _checked(fields[name], hints[name], value) for name, value in values.items()}


def read_yaml(text: str, what: str) -> Any:
    """A value in YAML; a :class:`ConfigError` that begins with ``what`` if the text is none."""
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        # Dates that do not exist are ValueErrors.
        raise ConfigError(f'{what} cannot be read as YAML: {error or type(error).__name__}') from error


def read_recipe(path: Path, kind: type) -> dict[str, Any]:
    """Options that stand in a YAML file; keys may have dashes or underscores. What is wrong is a ConfigError."""
    try:
        text = path.read_text(encoding='utf-8')
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f'the recipe {str(path)!r} cannot be read: {error}') from error
    read = read_yaml(text, f'the recipe {str(path)!r}')
    if not isinstance(read, dict):
        raise ConfigError(f"expected {str(path)!r} to have lines like 'lr: 0.01' (got {type(read).__name__})")
    try:
        return converted(kind, {str(key).replace('-', '_'): value for key, value in read.items()})
    except ConfigError as error:
        raise ConfigError(f'{path}: {error}') from error


def _checked(field: dataclasses.Field[Any], hint: Any, value: Any) -> Any:
    """A value of a field in its type, within its range and among its choices."""
    choices, within = field.metadata.get('choices'), field.metadata.get('within')
    if choices is not None and isinstance(value, bool):
        # YAML reads a bare on, off and no as truth values.
        value = next((word for word in (('on',) if value else ('off', 'no')) if word in choices), value)
    found = _typed(field.name, hint, value)
    if found is None:
        return None
    if choices is not None and found not in choices:
        raise ConfigError(f'expected {field.name} to be one of {", ".join(choices)} (got {value!r})')
    if within is not None and not all(map(_RANGES[within], found if isinstance(found, tuple) else (found,))):
        raise ConfigError(f'expected {field.name} {within} (got {value!r})')
    return found


def _typed(name: str, hint: Any, value: Any) -> Any:
    """A value in the type of an annotation: one of _TYPES, a tuple of them, either or None; any other as it is."""
    kind, *others = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if kind is Any or (value is None and others) or any(other is not types.NoneType for other in others):
        return value
    kind, items = typing.get_origin(kind) or kind, typing.get_args(kind)
    if kind is not tuple:
        return _scalar(name, kind, value)
    if isinstance(value, str) and items[0] is str:
        value = [part.strip() for part in value.split(',') if part.strip()]
    values = value if isinstance(value, list | tuple) else [value]
    if items[-1] is not Ellipsis and len(values) != len(items):
        raise ConfigError(f'expected {name} to have {len(items)} values (got {value!r})')
    return tuple(_scalar(name, typing.get_origin(items[0]) or items[0], item) for item in values)


def _scalar(name: str, kind: Any, value: Any) -> Any:
    words, sources = _TYPES[kind]
    wrong = ConfigError(f'expected {name} to be {words} (got {"nothing" if value is None else repr(value)})')
    if not isinstance(value, sources) or (isinstance(value, bool) and kind is not bool):
        raise wrong
    if kind not in (int, float):
        return kind(str(value)) if kind in (str, Path) else value
    try:
        number = int(value) if kind is int and str(value).strip().lstrip('+-').isdecimal() else float(value)
        finite = math.isfinite(number)
    except (ValueError, OverflowError) as error:
        raise wrong from error
    if not finite or (kind is int and number != int(number)):
        raise wrong
    return kind(number)


def add_arguments(parser: argparse.ArgumentParser, options: type[Options]) -> None:
    """Add an option for every field of a dataclass; what is not given on the command line is not in the namespace."""
    parser.add_argument('--config', type=Path, metavar='FILE', help='recipe in YAML; other options override it')
    hints = typing.get_type_hints(options)
    sections = {heading: parser.add_argument_group(heading) for heading in dict.fromkeys(options.groups.values())}
    group: argparse._ActionsContainer = parser
    for field in dataclasses.fields(options):
        group = sections[options.groups[field.name]] if field.name in options.groups else group
        kind = str(hints[field.name])
        text = field.metadata['help']
        if field.default not in (None, '', False, ()) and 'default' not in text:
            default = ','.join(field.default) if isinstance(field.default, tuple) else field.default
            text += f' (default: {default})'
        more: dict[str, Any]
        if hints[field.name] is bool:
            more = {'action': argparse.BooleanOptionalAction}
        else:
            words = {'int': 'N', 'float': 'X', 'Path': 'PATH'}
            word = next((word for part, word in words.items() if part in kind), 'TEXT')
            more = {'metavar': word, 'nargs': '+' if 'tuple[float' in kind else None}
        flag = '--' + field.name.replace('_', '-')
        group.add_argument(flag, dest=field.name, default=argparse.SUPPRESS, help=text, **more)


def options_of(namespace: argparse.Namespace, options: type[OptionsType]) -> OptionsType:
    """The options of a command line: its own, then those of its recipe, then the defaults."""
    names = {field.name for field in dataclasses.fields(options)}
    values = read_recipe(namespace.config, options) if namespace.config is not None else {}
    values.update({name: value for name, value in vars(namespace).items() if name in names})
    return options(**values)
