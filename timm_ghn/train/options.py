"""Options of a meta-training run: a record that the command line, recipes and Python share."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import yaml

from timm_ghn.data.memory import AUGMENTATIONS
from timm_ghn.data.options import DatasetOptions
from timm_ghn.errors import ConfigError
from timm_ghn.nn.config import GHNConfig
from timm_ghn.recipes import option, those_of
from timm_ghn.train.families import FAMILIES, HELD_OUT
from timm_ghn.train.samplers import ArchitectureSampler, build_sampler, families_of

#: Headings of the help, by the option that each begins with.
GROUPS = {'dataset': 'data', 'name': 'GHN', 'sampler': 'architectures', 'steps': 'training', 'seed': 'run'}

PRECISIONS = ('no', 'bf16')
OPTIMISERS = ('adamw', 'muon')
#: Options that are hyper-parameters of the GHN.
OF_CONFIG = ('hid', 'gnn', 'layers', 'heads', 'virtual_edges', 'decoder', 'smooth', 'templates', 'codes', 'name')


@dataclasses.dataclass(frozen=True)
class TrainOptions(DatasetOptions):
    """What GHN to train, on which architectures and images, and how. Every field is an option and a key of a recipe.

    Raises:
        ConfigError: if options contradict themselves.
    """

    image_size: int = option(32, 'side of the images in pixels')
    augment: str = option('crop', 'none, flip (horizontally), or crop: random crops and flips')

    name: str = option('my_ghn', 'name of the GHN')
    init: str | None = option(None, 'name or path of a GHN to begin with (default: random weights)')
    gnn: str = option('graphormer', 'graph network: graphormer, gated or mlp')
    decoder: str = option('templates', 'decoder: templates, conv or mlp')
    hid: int = option(64, 'width of the node embeddings')
    layers: int = option(2, 'depth of the Graphormer')
    heads: int = option(4, 'attention heads of the Graphormer')
    smooth: bool = option(True, 'describe nodes by numbers that vary smoothly with sizes and depth')
    templates: int = option(32, 'number of templates of the decoder templates')
    codes: int = option(64, 'size of its channel codes')
    max_channels: int | None = option(
        None, 'channels that are decoded at once; more are repeated (default: 2048; 64 or hid for conv and mlp)'
    )
    max_kernel: int = option(16, 'side of the largest kernel that is decoded as it is')
    virtual_edges: int = option(50, 'longest path that becomes an edge')

    sampler: str = option('timm', 'source of architectures: timm, names or mix')
    sampler_args: Any = option(
        None, "its options (see timm_ghn.train.samplers): in a recipe a mapping, else YAML like '{families: [vgg]}'"
    )
    held_out: Any = option(
        None, 'families to evaluate on that are never trained, comma-separated (default: of the sampler timm)'
    )
    pool: int = option(2000, 'number of architectures to train on; 0 for ever new ones')
    cache: Path | None = option(None, 'folder for traced architectures (default: in the output folder)', metavar='DIR')

    steps: int = option(2000, 'optimiser steps')
    meta_batch: int = option(4, 'architectures in a step, of all processes')
    accumulate: int = option(1, 'parts into which the architectures of a process are divided, to save memory')
    batch_size: int = option(64, 'images that an architecture sees in a step')
    own_images: bool = option(False, 'each architecture of a step sees other images, instead of all the same')
    opt: str = option('adamw', 'optimiser: adamw, or muon for the templates and adamw for the rest')
    lr: float = option(1e-3, 'learning rate')
    weight_decay: float = option(0.01, 'weight decay')
    warmup_steps: int = option(100, 'steps of linear warm-up')
    decay_steps: int = option(0, 'steps of linear decay at the end, after a constant rate; 0 for half a cosine')
    clip_grad: float = option(1.0, 'largest norm of the gradient')
    clip_network: float = option(1.0, 'largest norm of the gradient of each network')
    smoothing: float = option(0.0, 'label smoothing')
    ema_decay: float = option(0.998, 'decay of the averaged weights, which are evaluated and shipped; 0 for none')
    max_skipped: int = option(50, 'give up after so many steps in a row without a finite loss')

    seed: int = option(0, 'of everything that is drawn')
    eval_steps: int = option(500, 'steps between evaluations')
    eval_count: int = option(2, 'architectures of each family to evaluate')
    eval_images: int = option(512, 'images to evaluate on')
    log_steps: int = option(20, 'steps between lines of the log')
    checkpoint_steps: int = option(200, 'steps between checkpoints')
    checkpoint_hist: int = option(2, 'checkpoints to keep')
    time_limit: float | None = option(None, 'stop, with a checkpoint, after so many minutes', metavar='MINUTES')
    mixed_precision: str | None = option(None, 'no or bf16, for the networks (default: as accelerate says)')
    output: Path = option(Path('train-out'), 'folder for the log, checkpoints and the GHN', metavar='DIR')
    resume: bool = option(False, 'go on from the last good checkpoint in the output folder')
    log_with: str | None = option(None, "tracker of accelerate, e.g. 'tensorboard' or 'wandb'")

    def __post_init__(self) -> None:
        object.__setattr__(self, 'output', Path(self.output))
        positive = (
            'max_kernel', 'steps', 'meta_batch', 'accumulate', 'batch_size', 'lr', 'clip_grad',
            'clip_network',
            'max_skipped', 'eval_steps', 'eval_count', 'eval_images', 'log_steps', 'checkpoint_steps',
            'checkpoint_hist',
        )  # fmt: skip
        given = tuple(name for name in ('time_limit', 'max_channels') if getattr(self, name) is not None)
        for name in positive + given:
            if not getattr(self, name) > 0:
                raise ConfigError(f'expected {name} above 0 (got {getattr(self, name)})')
        for name in ('weight_decay', 'warmup_steps', 'decay_steps', 'pool', 'seed', 'smoothing', 'ema_decay'):
            if getattr(self, name) < 0:
                raise ConfigError(f'expected {name} of 0 or more (got {getattr(self, name)})')
        for name in ('smoothing', 'ema_decay'):
            if getattr(self, name) >= 1:
                raise ConfigError(f'expected {name} below 1 (got {getattr(self, name)})')
        if self.meta_batch % self.accumulate:
            raise ConfigError(
                f'expected meta_batch to be a multiple of accumulate (got {self.meta_batch}, {self.accumulate})'
            )
        choices = {'mixed_precision': (None, *PRECISIONS), 'opt': OPTIMISERS, 'augment': AUGMENTATIONS}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                names = ', '.join(filter(None, known))
                raise ConfigError(f'expected {name} to be one of {names} (got {getattr(self, name)!r})')
        if self.opt == 'muon' and self.decoder != 'templates':
            raise ConfigError(f"opt 'muon' is for the decoder 'templates' (got the decoder {self.decoder!r})")
        if self.warmup_steps + self.decay_steps > self.steps:
            raise ConfigError(
                f'expected at least {self.warmup_steps} + {self.decay_steps} steps, to warm up and to decay '
                f'(got {self.steps})'
            )
        # Their own checks.
        _ = self.data, self.config_for(2), self.unseen_families()

    def config_for(self, num_classes: int) -> GHNConfig:
        """Hyper-parameters of the GHN."""
        # The published decoders grow with the square of the channels, and repeat them from 64 to 384 on.
        few = self.decoder != 'templates'
        channels, kernel = self.max_channels or (max(64, self.hid) if few else 2048), self.max_kernel
        return GHNConfig(
            max_shape=(channels, channels, kernel, kernel),
            num_classes=num_classes,
            rules='operators',
            trained=True,
            **those_of(GHNConfig, self, OF_CONFIG),
        )

    def sampler_for(self, num_classes: int) -> ArchitectureSampler:
        """Source of the architectures to train on."""
        own = self.sampler_args or {}
        if isinstance(own, str):
            try:
                own = yaml.safe_load(own)
            except yaml.YAMLError as error:
                raise ConfigError(f'sampler_args is no YAML: {" ".join(str(error).split())}') from error
        if not isinstance(own, dict):
            raise ConfigError(f"expected sampler_args to be a mapping like '{{families: [vgg]}}' (got {own!r})")
        return build_sampler(self.sampler, {'image_size': self.image_size, 'num_classes': num_classes, **own})

    @property
    def images_in_step(self) -> int:
        """Images that all architectures of a step see together."""
        return self.batch_size * (self.meta_batch if self.own_images else 1)

    def unseen_families(self) -> tuple[str, ...]:
        """Families that are evaluated and never trained."""
        named = self.held_out
        if isinstance(named, str):
            named = [name.strip() for name in named.split(',') if name.strip()]
        unseen = HELD_OUT if named is None else tuple(named)
        unknown = [name for name in unseen if name not in FAMILIES]
        if unknown:
            raise ConfigError(f'expected held_out to name families among {", ".join(FAMILIES)} (got {unknown})')
        trained = families_of(self.sampler_for(2))
        return tuple(name for name in unseen if name not in trained)

    def to_dict(self) -> dict[str, Any]:
        """Plain values that ``json`` can write."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}
