"""Options of a fine-tuning run: a record that the command line, recipes and Python share."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from timm_ghn.data.options import DataOptions, TransformOptions
from timm_ghn.errors import ConfigError
from timm_ghn.prediction.plan import HEAD_OPTIONS
from timm_ghn.prediction.postprocess import PostProcess
from timm_ghn.publish.push import Target
from timm_ghn.runs.recipes import (
    BELOW_ONE,
    NOT_NEGATIVE,
    POSITIVE,
    POSITIVE_PROPORTION,
    RunOptions,
    converted,
    option,
    read_yaml,
)

STEMS = ('auto', 'on', 'off')
#: Inits that are not a GHN's.
OTHER_INITS = ('random', 'pretrained')
#: The init that lets several starts race.
RACE = 'race'
_OF_TARGET = ('hub_private', 'hub_revision', 'hub_create_pr', 'hub_license')


@dataclasses.dataclass(frozen=True)
class FinetuneOptions(RunOptions, TransformOptions, DataOptions):
    """What to train, on what, and how.

    Raises:
        ConfigError: if options contradict themselves.
    """

    groups: ClassVar = {
        'dataset': 'data', 'no_aug': 'augmentation', 'shots': 'few shots', 'model': 'start', 'image_size': 'images',
        'epochs': 'training', 'lr': 'training', 'seed': 'run', 'output': 'run', 'workers': 'run',
        'push_to_hub': 'Hub (the token is that of HF_TOKEN or `hf auth login`)',
    }  # fmt: skip

    shots: int | None = option(None, 'train on so many images of each class (default: all)', within=POSITIVE)
    shots_seed: int | None = option(None, 'draw the shots (default: the first of each class)', within=NOT_NEGATIVE)

    model: str = option('', 'timm model')
    init: str = option(
        'ghn',
        "start: 'ghn', the name or path of a GHN, 'random' or 'pretrained' (timm's), 'donor:NAME' (a relative's "
        "weights: timm name, file or hf-hub:), 'donor:auto' (timm's nearest), or 'race' (the best on your data)",
    )
    race_inits: tuple[str, ...] = option(('ghn', 'donor:auto'), "starts that race beside timm's own, comma-separated")
    race_steps: int = option(20, 'optimiser steps of each start and rate in the first round', within=POSITIVE)
    race_minutes: float | None = option(None, 'bound on the time of the race', within=POSITIVE)
    postprocess: str = option('auto', 'orth, noise, none, auto (as the GHN recommends), or orth,layer=37,beta=3e-5')
    head: str = option('auto', 'classifier of a GHN: auto, predict or keep', choices=HEAD_OPTIONS)
    model_args: Any = option(None, "more arguments of timm.create_model, as in 'drop_path_rate=0.1,act_layer=gelu'")

    image_size: int | None = option(None, "side of the images in pixels (default: the model's own)", within=POSITIVE)
    small_stem: str = option('auto', 'stem for small images: on, off, or auto (up to 64 pixels)', choices=STEMS)
    crop_pct: float | None = option(None, 'share of the side that a centre crop keeps', within=POSITIVE_PROPORTION)
    mean: tuple[float, ...] | None = option(None, "mean of each channel (default: the model's)")
    std: tuple[float, ...] | None = option(None, 'standard deviation of each channel', within=POSITIVE)
    mixup: float = option(0.0, 'alpha of mixup', within=NOT_NEGATIVE)
    cutmix: float = option(0.0, 'alpha of cutmix', within=NOT_NEGATIVE)

    epochs: int = option(10, 'epochs to train', within=POSITIVE)
    max_steps: int | None = option(None, 'stop after so many optimiser steps', within=POSITIVE)
    batch_size: int = option(64, 'images in a batch, of each process', within=POSITIVE)
    val_batch_size: int | None = option(None, 'images in a batch when validating (default: the same)', within=POSITIVE)
    grad_accum_steps: int = option(1, 'batches whose gradients are averaged for one step', within=POSITIVE)
    opt: str = option('adamw', 'optimiser of timm')
    weight_decay: float = option(0.05, 'weight decay', within=NOT_NEGATIVE)
    momentum: float = option(0.9, 'momentum', within=NOT_NEGATIVE)
    decay_norms: bool = option(False, 'weight decay also on biases and norm layers, as in plain torch')
    layer_decay: float | None = option(None, 'factor of the learning rate from layer to layer', within=POSITIVE)
    sched: str = option('cosine', "schedule of timm; 'none' for a constant rate")
    warmup_epochs: int = option(0, 'epochs of linear warm-up, the first at warmup_lr', within=NOT_NEGATIVE)
    warmup_lr: float = option(1e-6, 'learning rate at the start of the warm-up', within=NOT_NEGATIVE)
    min_lr: float = option(0.0, 'learning rate at the end', within=NOT_NEGATIVE)
    sched_on_updates: bool = option(False, 'change the rate after every step, not every epoch')
    clip_grad: float | None = option(None, 'largest norm of the gradient', within=POSITIVE)
    model_ema: bool = option(False, 'also evaluate an average of the weights')
    model_ema_decay: float = option(0.999, 'decay of that average', within=BELOW_ONE)
    calibrate_batches: int = option(8, 'batches for batch-norm statistics before training', within=NOT_NEGATIVE)

    workers: int = option(0, 'processes that load images, of each process', within=NOT_NEGATIVE)
    torchcompile: bool = option(False, 'compile the model')
    channels_last: bool = option(False, 'channels-last memory: often faster for convolutions, on a CPU too')
    output: Path = option(Path('finetune-out'), 'folder for results, checkpoints and weights')

    # No token: options are written into results, weights and trackers, and whoever lists the processes reads them.
    push_to_hub: str | None = option(None, 'push the best weights there when all is done')
    hub_private: bool = option(False, 'refuse a public repository, make a private one')
    hub_revision: str | None = option(None, 'branch; it is made if it does not exist (default: main)')
    hub_create_pr: bool = option(False, 'open a pull request instead')
    hub_license: str | None = option(None, "licence of the model (default: that of the catalogue's GHN)")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.model:
            raise ConfigError('expected a model, for instance --model resnet50')
        given = [name for name in _OF_TARGET if getattr(self, name)]
        if self.push_to_hub is None and given:
            raise ConfigError(f'{given[0]} is about the repository of push_to_hub, which is not given')
        _ = self.post('orth'), self.arguments, self.target  # their own checks

    @property
    def mixed(self) -> bool:
        """Whether images are mixed."""
        return self.mixup > 0 or self.cutmix > 0

    def post(self, recommended: str = 'none') -> PostProcess | None:
        """The post-processing of the initial weights; 'auto' stands for what a GHN recommends."""
        name, *changes = (part.strip() for part in self.postprocess.split(','))
        chosen = PostProcess.of(name, seed=self.seed, auto=recommended)
        if chosen is None or not changes:
            return chosen
        return dataclasses.replace(chosen, **converted(PostProcess, _pairs(','.join(changes), 'postprocess')))

    @property
    def target(self) -> Target | None:
        """Where the model is pushed to; None if it is not."""
        if self.push_to_hub is None:
            return None
        return Target(self.push_to_hub, self.hub_private or None, self.hub_revision, self.hub_create_pr)

    @property
    def arguments(self) -> dict[str, Any]:
        """More arguments of ``timm.create_model``."""
        given = self.model_args or {}
        return dict(given) if isinstance(given, Mapping) else _pairs(str(given), 'model_args')


def _pairs(text: str, option: str) -> dict[str, Any]:
    """``'a=1,b=x'`` as a dictionary; values are read as YAML reads them, but 3e-5 as a number too."""
    found = {}
    for pair in filter(None, map(str.strip, text.split(','))):
        key, equals, value = pair.partition('=')
        if not equals:
            raise ConfigError(f'expected {option} to have parts like name=value (got {pair!r})')
        number = re.fullmatch(r'[+-]?\d+e[+-]?\d+', value)
        found[key] = float(value) if number else read_yaml(value, f'{option} {value!r}')
    return found
