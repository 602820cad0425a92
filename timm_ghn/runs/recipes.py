"""Options of a run as one frozen dataclass: a recipe in YAML and a command line both fill it in.

Each option states its default, help and range once, where it is declared; its type is its annotation. Whoever makes a
record of options, from a recipe, a command line or Python, gets them converted and checked by :class:`Options`.
"""

from __future__ import annotations

import argparse
import collections.abc
import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import yaml

from timm_ghn.errors import ConfigError

OptionsType = TypeVar('OptionsType')


class Range(NamedTuple):
    """Numbers that an option may have.

    Attributes:
        words: What they are, after 'expected lr'.
        holds: Whether a number is one of them.
    """

    words: str
    holds: Callable[[float], bool]


POSITIVE = Range('above 0', lambda number: number > 0)
NOT_NEGATIVE = Range('of 0 or more', lambda number: number >= 0)
PROPORTION = Range('between 0 and 1', lambda number: 0 <= number <= 1)
POSITIVE_PROPORTION = Range('above 0, to 1', lambda number: 0 < number <= 1)
BELOW_ONE = Range('from 0 to below 1', lambda number: 0 <= number < 1)


def option(
    default: Any,
    help_text: str,
    *,
    within: Range | None = None,
    choices: Iterable[str] | None = None,
    metavar: str | None = None,
) -> Any:
    """A field of a dataclass of options.

    Args:
        default: Its default.
        help_text: For the command line.
        within: Numbers that it may be, or that each of its values may be.
        choices: Texts that it may be.
        metavar: For the command line.
    """
    more = {'within': within, 'choices': None if choices is None else tuple(choices), 'metavar': metavar}
    return dataclasses.field(default=default, metadata={'help': help_text, **more})


@dataclasses.dataclass(frozen=True)
class Options:
    """Base of the records of options: every field has the type of its annotation and is within its range.

    Raises:
        ConfigError: if one is not.
    """

    def __post_init__(self) -> None:
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        for name, value in converted(type(self), values).items():
            object.__setattr__(self, name, value)

    def to_dict(self) -> dict[str, Any]:
        """Plain values that ``json`` can write."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}


@dataclasses.dataclass(frozen=True)
class RunOptions(Options):
    """What every run of training is told. Every field is an option of the command line and a key of a recipe."""

    output: Path = option(Path('out'), 'folder for the log, checkpoints and weights', metavar='DIR')
    resume: bool = option(False, 'go on from the last good checkpoint in the output folder')
    checkpoint_steps: int | None = option(
        None, 'steps between checkpoints (default: after each epoch)', within=POSITIVE
    )
    checkpoint_hist: int = option(2, 'checkpoints to keep', within=POSITIVE)
    time_limit: float | None = option(
        None, 'stop, with a checkpoint, after so many minutes', within=POSITIVE, metavar='MINUTES'
    )
    mixed_precision: str | None = option(
        None, 'no, fp16 or bf16 (default: as accelerate is configured)', choices=('no', 'fp16', 'bf16')
    )
    log_with: str | None = option(None, "tracker of accelerate, e.g. 'tensorboard' or 'wandb'")
    lr: float = option(1e-3, 'learning rate', within=POSITIVE)
    smoothing: float = option(0.0, 'label smoothing', within=BELOW_ONE)


def converted(kind: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """Values in the types that the annotations of a dataclass ask for, and within the ranges of its options.

    Args:
        kind: The dataclass.
        values: By the names of its fields; not all need be there.

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
    """A value in YAML.

    Args:
        text: The YAML.
        what: What it is, in words that an error begins with.

    Raises:
        ConfigError: if it is none.
    """
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        # Dates that do not exist are ValueErrors.
        cause = ' '.join(str(error).split()) or type(error).__name__
        raise ConfigError(f'{what} cannot be read as YAML: {cause}') from error


def read_recipe(path: Path, kind: type) -> dict[str, Any]:
    """Options that stand in a YAML file; keys may have dashes or underscores.

    Args:
        path: The file.
        kind: Dataclass of the options.

    Raises:
        ConfigError: if it is no such file, or an option is unknown or wrong.
    """
    try:
        text = path.read_text(encoding='utf-8')
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f'the recipe {str(path)!r} cannot be read: {" ".join(str(error).split())}') from error
    read = read_yaml(text, f'the recipe {str(path)!r}')
    if not isinstance(read, dict):
        raise ConfigError(
            f"expected the recipe {str(path)!r} to have lines like 'lr: 0.01' (got {type(read).__name__})"
        )
    try:
        return converted(kind, {str(key).replace('-', '_'): value for key, value in read.items()})
    except ConfigError as error:
        raise ConfigError(f'{path}: {error}') from error


def _checked(field: dataclasses.Field[Any], hint: Any, value: Any) -> Any:
    """A value of a field in its type, within its range and among its choices."""
    choices, within = field.metadata.get('choices'), field.metadata.get('within')
    if choices is not None and isinstance(value, bool):
        # YAML reads a bare on, off and no as truth values.
        value = next((word for word in (('on', 'yes') if value else ('off', 'no')) if word in choices), value)
    found = _typed(field.name, hint, value)
    if found is None:
        return None
    if choices is not None and found not in choices:
        raise ConfigError(f'expected {field.name} to be one of {", ".join(choices)} (got {value!r})')
    if within is not None and not all(within.holds(number) for number in (found if type(found) is tuple else (found,))):
        raise ConfigError(f'expected {field.name} {within.words} (got {value!r})')
    return found


def _typed(name: str, hint: Any, value: Any) -> Any:
    """A value in the type of an annotation."""
    kinds, optional = _kinds(hint)
    if len(kinds) != 1 or (value is None and optional):
        return value
    kind = typing.get_origin(kinds[0]) or kinds[0]
    if kind is tuple:
        return _tuple(name, typing.get_args(kinds[0]), value)
    if kind in (int, float):
        return _number(name, value, kind)
    words = {bool: 'true or false', str: 'a text', Path: 'a path', collections.abc.Mapping: 'a mapping'}
    if kind in (str, Path) and isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    if kind is Path and isinstance(value, str):
        value = Path(value)
    if kind in words and not isinstance(value, kind):
        got = 'nothing' if value is None else repr(value)
        raise ConfigError(f'expected {name} to be {words[kind]} (got {got})')
    return value


def _tuple(name: str, kinds: tuple[Any, ...], value: Any) -> tuple[Any, ...]:
    """Several values; a single one stands for itself, a text for those between its commas."""
    if isinstance(value, str) and kinds[0] is str:
        value = [part.strip() for part in value.split(',') if part.strip()]
    if typing.get_origin(kinds[0]) is collections.abc.Mapping and not isinstance(value, list | tuple):
        raise ConfigError(f'expected {name} to be a list of mappings (got {value!r})')
    items = value if isinstance(value, list | tuple) else [value]
    if kinds[-1] is not Ellipsis and len(items) != len(kinds):
        raise ConfigError(f'expected {name} to have {len(kinds)} values (got {value!r})')
    return tuple(_typed(name, kinds[0], item) for item in items)


def _number(name: str, value: Any, kind: type) -> Any:
    """A finite number; texts are taken too, since YAML reads 1e-3, without a dot, as text."""
    wrong = ConfigError(f'expected {name} to be a number of type {kind.__name__} (got {value!r})')
    if isinstance(value, bool):
        raise wrong
    try:
        if kind is int and isinstance(value, int | str) and str(value).strip().lstrip('+-').isdecimal():
            number: float = int(value)
        else:
            number = float(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise wrong from error
    if (kind is int and abs(number) >= 2**63) or not math.isfinite(number):
        raise ConfigError(f'expected {name} to be a finite number{" below 2**63" * (kind is int)} (got {value!r})')
    if kind is int and number != int(number):
        raise wrong
    return kind(number)


def _kinds(hint: Any) -> tuple[list[Any], bool]:
    """The types of an annotation, none where it allows any, and whether None is allowed."""
    if hint is Any:
        return [], True
    union = typing.get_origin(hint) in (types.UnionType, typing.Union)
    parts = typing.get_args(hint) if union else (hint,)
    kinds = [part for part in parts if part is not type(None)]
    return kinds, len(kinds) < len(parts)


def add_arguments(parser: argparse.ArgumentParser, options: Any, groups: Mapping[str, str]) -> None:
    """Add an option for every field; what is not given on the command line is not in the namespace.

    Args:
        parser: Gets the options.
        options: Dataclass of the options.
        groups: Headings of the help in their order, by the options with which they begin or go on.
    """
    parser.add_argument('--config', type=Path, metavar='FILE', help='recipe in YAML; other options override it')
    hints = typing.get_type_hints(options)
    sections = {heading: parser.add_argument_group(heading) for heading in dict.fromkeys(groups.values())}
    group: argparse._ActionsContainer = parser
    for field in dataclasses.fields(options):
        group = sections[groups[field.name]] if field.name in groups else group
        kinds, _ = _kinds(hints[field.name])
        kind = kinds[0] if kinds else None
        flag = '--' + field.name.replace('_', '-')
        text = field.metadata['help']
        if field.default not in (None, '', False) and 'default' not in text:
            text += f' (default: {field.default})'
        common: dict[str, Any] = {'dest': field.name, 'default': argparse.SUPPRESS, 'help': text}
        if kind is bool:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, **common)
            continue
        if typing.get_origin(kind) is tuple and typing.get_args(kind)[0] is float:
            common['nargs'], kind = '+', float
        words: dict[Any, str] = {int: 'N', float: 'X'}
        group.add_argument(flag, metavar=field.metadata['metavar'] or words.get(kind, 'TEXT'), **common)


def options_of(namespace: argparse.Namespace, options: type[OptionsType]) -> OptionsType:
    """The options of a command line: its own, then those of its recipe, then the defaults.

    Args:
        namespace: What the parser found.
        options: Dataclass of the options.

    Raises:
        ConfigError: if an option is missing or wrong.
    """
    names = {field.name for field in dataclasses.fields(options)}  # type: ignore[arg-type]
    values = read_recipe(namespace.config, options) if namespace.config is not None else {}
    values.update({name: value for name, value in vars(namespace).items() if name in names})
    return options(**values)
