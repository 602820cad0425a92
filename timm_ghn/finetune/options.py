"""Options of a fine-tuning run: a record that the command line, recipes and Python share."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import functools
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from timm_ghn.data.images import TransformOptions
from timm_ghn.data.splits import DataOptions
from timm_ghn.errors import ConfigError
from timm_ghn.postprocess import PostProcess

#: Values of ``small_stem``.
SMALL_STEM = ('auto', 'on', 'off')
#: Values of ``mixed_precision``, which are those of accelerate.
PRECISIONS = ('no', 'fp16', 'bf16')
#: Headings of the help, by the option that each begins with.
_GROUPS = {'model': 'start', 'dataset': 'data', 'image_size': 'images', 'epochs': 'training', 'seed': 'run'}
#: Inits that are not a GHN's.
OTHER_INITS = ('random', 'pretrained')


def _option(default: Any, help_text: str, **more: Any) -> Any:
    return dataclasses.field(default=default, metadata={'help': help_text, **more})


@dataclasses.dataclass(frozen=True)
class FinetuneOptions:
    """What to train, on what, and how. Every field is an option of the command line and a key of a recipe.

    Raises:
        ConfigError: if options contradict themselves.
    """

    model: str = _option('', 'timm model', metavar='NAME')
    init: str = _option('ghn', "start: 'ghn', the name or path of a GHN, 'random' or 'pretrained' (timm's)")
    postprocess: str = _option(
        'auto', "'orth', 'noise' or 'none', or like 'orth,layer=37,beta=3e-5'; auto: orth for a GHN, else none"
    )
    head: str = _option('auto', 'classifier of a GHN: auto, predict or keep')
    num_classes: str = _option('auto', 'classes; auto takes them from the data set', metavar='N')
    model_args: Any = _option(None, "more arguments of timm.create_model, as in 'drop_path_rate=0.1,act_layer=gelu'")

    dataset: str = _option('', 'name on the Hub, folder, or parquet file')
    subset: str | None = _option(None, 'configuration of a data set that has several')
    train_split: str = _option('train', "split to train on, e.g. 'train[:90%%]'")
    val_split: str = _option('auto', 'split to validate on, or a share of the training split')
    image_column: str | None = _option(None, 'column of images (default: found by its type)')
    label_column: str | None = _option(None, 'column of labels (default: found by its type)')
    shots: int | None = _option(None, 'train on so many images of each class (default: all)')
    shots_seed: int | None = _option(None, 'draw the shots (default: the first of each class)')

    image_size: int | None = _option(None, "side of the images in pixels (default: the model's own)")
    small_stem: str = _option('auto', 'stem for small images: on, off, or auto (up to 64 pixels)')
    crop_pct: float | None = _option(None, "share of the side the centre crop keeps (default: the model's; 1 if small)")
    mean: tuple[float, ...] | None = _option(None, "mean of each channel (default: the model's)")
    std: tuple[float, ...] | None = _option(None, "standard deviation of each channel (default: the model's)")
    no_aug: bool = _option(False, 'train without augmentation')
    train_crop_mode: str = _option('rrc', 'rrc, rkrc, rkrr (see timm) or pad (crop out of a padded image)')
    scale: tuple[float, float] | None = _option(None, 'area of the random crop')
    ratio: tuple[float, float] | None = _option(None, 'aspect ratio of the random crop')
    hflip: float = _option(0.5, 'probability of a horizontal flip')
    vflip: float = _option(0.0, 'probability of a vertical flip')
    color_jitter: float | None = _option(None, 'strength of colour jitter (default: none)')
    aa: str | None = _option(None, "automatic augmentation, e.g. 'rand-m9-mstd0.5'")
    reprob: float = _option(0.0, 'probability of random erasing')
    mixup: float = _option(0.0, 'alpha of mixup')
    cutmix: float = _option(0.0, 'alpha of cutmix')
    smoothing: float = _option(0.0, 'label smoothing')

    epochs: int = _option(10, 'epochs to train')
    max_steps: int | None = _option(None, 'stop after so many optimiser steps')
    time_limit: float | None = _option(None, 'stop, with a checkpoint, after so many minutes', metavar='MINUTES')
    batch_size: int = _option(64, 'images in a batch, of each process')
    val_batch_size: int | None = _option(None, 'images in a batch when validating (default: the same)')
    grad_accum_steps: int = _option(1, 'batches whose gradients are summed for one step')
    opt: str = _option('adamw', 'optimiser of timm')
    lr: float = _option(1e-3, 'learning rate')
    weight_decay: float = _option(0.05, 'weight decay')
    momentum: float = _option(0.9, 'momentum')
    decay_norms: bool = _option(False, 'weight decay also on biases and norm layers, as in plain torch')
    layer_decay: float | None = _option(None, 'factor of the learning rate from layer to layer')
    sched: str = _option('cosine', "schedule of timm; 'none' for a constant rate")
    warmup_epochs: int = _option(0, 'epochs of linear warm-up')
    warmup_lr: float = _option(1e-6, 'learning rate at the start of the warm-up')
    min_lr: float = _option(0.0, 'learning rate at the end')
    sched_on_updates: bool = _option(False, 'change the rate after every step, not every epoch')
    clip_grad: float | None = _option(None, 'largest norm of the gradient')
    model_ema: bool = _option(False, 'also evaluate an average of the weights')
    model_ema_decay: float = _option(0.999, 'decay of that average')
    calibrate_batches: int = _option(8, 'batches for batch-norm statistics before training; not if pretrained')

    seed: int = _option(0, 'of everything that is drawn')
    mixed_precision: str | None = _option(None, 'no, fp16 or bf16 (default: as accelerate is configured)')
    torchcompile: bool = _option(False, 'compile the model')
    workers: int = _option(0, 'processes that load images, of each process')
    output: Path = _option(Path('finetune-out'), 'folder for results, checkpoints and weights', metavar='DIR')
    resume: bool = _option(False, 'go on from the last good checkpoint in the output folder')
    checkpoint_steps: int | None = _option(None, 'steps between checkpoints (default: after each epoch)')
    checkpoint_hist: int = _option(2, 'checkpoints to keep')
    log_with: str | None = _option(None, "tracker of accelerate, e.g. 'tensorboard' or 'wandb'")

    def __post_init__(self) -> None:
        if not self.model:
            raise ConfigError('expected a model, for instance --model resnet50')
        positive = ('epochs', 'batch_size', 'grad_accum_steps', 'lr', 'checkpoint_hist')
        optional = ('max_steps', 'time_limit', 'val_batch_size', 'image_size', 'checkpoint_steps', 'clip_grad')
        for name in positive + tuple(name for name in optional if getattr(self, name) is not None):
            if not getattr(self, name) > 0:
                raise ConfigError(f'expected {name} above 0 (got {getattr(self, name)})')
        for name in ('weight_decay', 'mixup', 'cutmix', 'workers', 'warmup_epochs', 'calibrate_batches', 'seed'):
            if getattr(self, name) < 0:
                raise ConfigError(f'expected {name} of 0 or more (got {getattr(self, name)})')
        if not 0 <= self.smoothing < 1:
            raise ConfigError(f'expected smoothing from 0 to below 1 (got {self.smoothing})')
        for name, allowed in (('small_stem', SMALL_STEM), ('mixed_precision', (None, *PRECISIONS))):
            if getattr(self, name) not in allowed:
                words = ', '.join(filter(None, allowed))
                raise ConfigError(f'expected {name} to be one of {words} (got {getattr(self, name)!r})')
        if self.num_classes != 'auto' and not (self.num_classes.isdigit() and int(self.num_classes) > 1):
            raise ConfigError(f"expected num_classes of 2 or more, or 'auto' (got {self.num_classes!r})")
        # Their own checks.
        _ = self.data, self.transforms, self.post, self.arguments

    @functools.cached_property
    def data(self) -> DataOptions:
        """Those of the data set."""
        return DataOptions(**_those_of(DataOptions, self))

    @functools.cached_property
    def transforms(self) -> TransformOptions:
        """Those of the augmentation."""
        return TransformOptions(**_those_of(TransformOptions, self))

    @functools.cached_property
    def post(self) -> PostProcess | None:
        """The post-processing of the initial weights."""
        if self.postprocess == 'auto':
            return None if self.init in OTHER_INITS else PostProcess.of('orth')
        name, *changes = (part.strip() for part in self.postprocess.split(','))
        chosen = PostProcess.of(None if name == 'none' else name)
        if not changes:
            return chosen
        if chosen is None:
            raise ConfigError(f'there is nothing to change about no post-processing (got {self.postprocess!r})')
        return dataclasses.replace(chosen, **_pairs(', '.join(changes), 'postprocess', PostProcess))

    @functools.cached_property
    def arguments(self) -> dict[str, Any]:
        """More arguments of ``timm.create_model``."""
        if self.model_args is None or isinstance(self.model_args, Mapping):
            return dict(self.model_args or {})
        return _pairs(str(self.model_args), 'model_args')

    def to_dict(self) -> dict[str, Any]:
        """Plain values that ``json`` can write."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}


def _those_of(kind: type, options: FinetuneOptions) -> dict[str, Any]:
    return {field.name: getattr(options, field.name) for field in dataclasses.fields(kind)}


def _pairs(text: str, option: str, kind: type | None = None) -> dict[str, Any]:
    """``'a=1,b=x'`` as a dictionary; values are read as YAML reads them."""
    known = [field.name for field in dataclasses.fields(kind)] if kind is not None else None
    found = {}
    for pair in filter(None, (part.strip() for part in text.split(','))):
        key, equals, value = pair.partition('=')
        if not equals or (known is not None and key not in known):
            words = f'one of {", ".join(known)}' if known else 'a name'
            raise ConfigError(f'expected {option} to have parts like {words} = value (got {pair!r})')
        found[key] = _scalar(value)
    return found


def _scalar(text: str) -> Any:
    """A number where it reads as one (YAML takes 3e-5 for text), else what YAML makes of it."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return yaml.safe_load(text)


def read_recipe(path: Path) -> dict[str, Any]:
    """Options that stand in a YAML file; keys may have dashes or underscores.

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
        return {name: _converted(name, value) for name, value in values.items()}
    except ConfigError as error:
        raise ConfigError(f'{path}: {error}') from error


def _fields() -> dict[str, Any]:
    """The types of the options."""
    return typing.get_type_hints(FinetuneOptions)


def _converted(name: str, value: Any) -> Any:
    """A value of a recipe in the type of its option."""
    hints = _fields()
    if name not in {field.name for field in dataclasses.fields(FinetuneOptions)}:
        near = difflib.get_close_matches(name, hints, n=1)
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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add an option for every field; what is not given on the command line is not in the namespace."""
    parser.add_argument('--config', type=Path, metavar='FILE', help='recipe in YAML; other options override it')
    hints = _fields()
    group: argparse._ActionsContainer = parser
    for field in dataclasses.fields(FinetuneOptions):
        if field.name in _GROUPS:
            group = parser.add_argument_group(_GROUPS[field.name])
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


def options_of(namespace: argparse.Namespace) -> FinetuneOptions:
    """The options of a command line: its own, then those of its recipe, then the defaults.

    Raises:
        ConfigError: if an option is missing or wrong.
    """
    names = {field.name for field in dataclasses.fields(FinetuneOptions)}
    given = {name: value for name, value in vars(namespace).items() if name in names}
    values = read_recipe(namespace.config) if namespace.config is not None else {}
    values.update({name: _converted(name, value) for name, value in given.items()})
    return FinetuneOptions(**values)
