"""Options of a meta-training run: a record that the command line, recipes and Python share."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, ClassVar

from timm_ghn.architectures.families import FAMILIES, HELD_OUT
from timm_ghn.architectures.samplers import ArchitectureSampler, build_sampler, timm_parts
from timm_ghn.data.memory import AUGMENTATIONS
from timm_ghn.data.options import DataOptions
from timm_ghn.errors import ConfigError
from timm_ghn.nn.config import GHNConfig
from timm_ghn.runs.recipes import BELOW_ONE, NOT_NEGATIVE, POSITIVE, RunOptions, option, read_yaml

OPTIMISERS = ('adamw', 'muon')
#: Options that are hyper-parameters of the GHN.
OF_CONFIG = ('hid', 'gnn', 'layers', 'heads', 'virtual_edges', 'decoder', 'smooth', 'templates', 'codes', 'name')


@dataclasses.dataclass(frozen=True)
class TrainOptions(RunOptions, DataOptions):
    """What GHN to train, on which architectures and images, and how.

    Raises:
        ConfigError: if options contradict themselves.
    """

    groups: ClassVar = {
        'dataset': 'data', 'image_size': 'data', 'name': 'GHN', 'sampler': 'architectures', 'steps': 'training',
        'lr': 'training', 'seed': 'run', 'output': 'run', 'eval_steps': 'run',
    }  # fmt: skip

    image_size: int = option(32, 'side of the images in pixels', within=POSITIVE)
    augment: str = option('crop', 'none, flip (horizontally), or crop: random crops and flips', choices=AUGMENTATIONS)

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
    max_channels: int | None = option(None, 'channels that are decoded at once; more are repeated', within=POSITIVE)
    max_kernel: int = option(16, 'side of the largest kernel that is decoded as it is', within=POSITIVE)
    virtual_edges: int = option(50, 'longest path that becomes an edge')

    sampler: str = option('timm', 'source of architectures: timm, names or mix')
    sampler_args: Any = option(None, "its options: in a recipe a mapping, else YAML like '{families: [vgg]}'")
    held_out: tuple[str, ...] | None = option(None, 'families to evaluate on that are never trained')
    pool: int = option(2000, 'number of architectures to train on; 0 for ever new ones', within=NOT_NEGATIVE)
    cache: Path | None = option(None, 'folder for traced architectures (default: in the output folder)')

    steps: int = option(2000, 'optimiser steps', within=POSITIVE)
    meta_batch: int = option(4, 'architectures in a step, of all processes', within=POSITIVE)
    batch_size: int = option(64, 'images that an architecture sees in a step', within=POSITIVE)
    own_images: bool = option(False, 'each architecture of a step sees other images, instead of all the same')
    opt: str = option('adamw', 'optimiser: adamw, or muon for the templates and adamw for the rest', choices=OPTIMISERS)
    weight_decay: float = option(0.01, 'weight decay', within=NOT_NEGATIVE)
    warmup_steps: int = option(100, 'steps of linear warm-up', within=NOT_NEGATIVE)
    decay_steps: int = option(0, 'steps of linear decay at the end; 0 for half a cosine', within=NOT_NEGATIVE)
    clip_grad: float = option(1.0, 'largest norm of the gradient', within=POSITIVE)
    clip_network: float = option(1.0, 'largest norm of the gradient of each network', within=POSITIVE)
    ema_decay: float = option(0.998, 'decay of the average that is evaluated and shipped, or 0', within=BELOW_ONE)
    max_skipped: int = option(50, 'give up after so many steps in a row without a finite loss', within=POSITIVE)

    eval_steps: int = option(500, 'steps between evaluations', within=POSITIVE)
    eval_count: int = option(2, 'architectures of each family to evaluate', within=POSITIVE)
    eval_images: int = option(512, 'images to evaluate on', within=POSITIVE)
    log_steps: int = option(20, 'steps between lines of the log', within=POSITIVE)
    checkpoint_steps: int = option(200, 'steps between checkpoints', within=POSITIVE)
    mixed_precision: str | None = option(None, "no or bf16 (default: accelerate's)", choices=('no', 'bf16'))
    output: Path = option(Path('train-out'), 'folder for the log, checkpoints and the GHN')

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.opt == 'muon' and self.decoder != 'templates':
            raise ConfigError(f"opt 'muon' is for the decoder 'templates' (got the decoder {self.decoder!r})")
        if self.warmup_steps + self.decay_steps > self.steps:
            raise ConfigError(
                f'expected at least {self.warmup_steps} + {self.decay_steps} steps, to warm up and to decay '
                f'(got {self.steps})'
            )
        _ = self.config_for(2), self.unseen_families()  # their own checks

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
            **{name: getattr(self, name) for name in OF_CONFIG},
        )

    def sampler_for(self, num_classes: int) -> ArchitectureSampler:
        """Source of the architectures to train on."""
        own = self.sampler_args or {}
        own = read_yaml(own, 'sampler_args') if isinstance(own, str) else own
        if not isinstance(own, dict):
            raise ConfigError(f"expected sampler_args to be a mapping like '{{families: [vgg]}}' (got {own!r})")
        return build_sampler(self.sampler, {'image_size': self.image_size, 'num_classes': num_classes, **own})

    @property
    def images_in_step(self) -> int:
        """Images that all architectures of a step see together."""
        return self.batch_size * (self.meta_batch if self.own_images else 1)

    def unseen_families(self) -> tuple[str, ...]:
        """Families that are evaluated and never trained."""
        unseen = HELD_OUT if self.held_out is None else self.held_out
        unknown = [name for name in unseen if name not in FAMILIES]
        if unknown:
            raise ConfigError(f'expected held_out to name families among {", ".join(FAMILIES)} (got {unknown})')
        trained = {family for part in timm_parts(self.sampler_for(2)) for family in part.families}
        return tuple(name for name in unseen if name not in trained)
