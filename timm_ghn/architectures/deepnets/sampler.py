"""Networks of DeepNets-1M for the training of a GHN."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from timm_ghn.architectures.architecture import Architecture, register_family
from timm_ghn.architectures.cost import count_parameters
from timm_ghn.architectures.deepnets.generate import distinct, draw_config, ranges_of
from timm_ghn.architectures.deepnets.network import DeepNet, NetworkConfig
from timm_ghn.architectures.samplers import ArchitectureSampler, register_sampler
from timm_ghn.errors import ConfigError


@register_family('deepnets')
def _build(architecture: Architecture, common: dict[str, Any]) -> nn.Module:
    options = dict(architecture.options)
    genotype = {name: options.pop(name) for name in ('normal', 'normal_concat', 'reduce', 'reduce_concat')}
    with common['device']:
        return DeepNet(NetworkConfig.from_dict({**options, 'genotype': genotype}), **architecture.task)


@register_sampler('deepnets')
@dataclasses.dataclass(frozen=True)
class DeepNetsSampler(ArchitectureSampler):
    """Networks of DeepNets-1M, from a file or drawn as the paper draws them.

    Attributes:
        file: Arrow or official HDF5 file; networks are drawn by the published ranges if None.
        split: Split of the file, or of the ranges; 'wide' has four times the channels.
        channels: Channels of the first cells.
        parameters: Most parameters of a network.
        attempts: How often a network is drawn before giving up.
    """

    file: str | None = None
    split: str = 'train'
    channels: int = 32
    parameters: int = 10**7
    attempts: int = 1000

    def __post_init__(self) -> None:
        super().__post_init__()
        ranges_of(self.split)
        if min(self.channels, self.parameters, self.attempts) < 1:
            raise ConfigError(f'expected channels, parameters and attempts of at least 1 (got {self})')

    @functools.cached_property
    def nets(self) -> Sequence[Any]:
        """Networks of the file."""
        from timm_ghn.architectures.deepnets.store import open_nets  # needs datasets

        assert self.file is not None
        return open_nets(Path(self.file), self.split)

    def sample(self, rng: np.random.Generator) -> Architecture:
        """Draw a network within the limit of parameters."""
        for _ in range(self.attempts):
            if self.file is None:
                config = draw_config(rng, self.split)
            else:
                config = self.nets[int(rng.integers(len(self.nets)))].config
            if config is None:
                continue
            architecture = self.architecture(config)
            if count_parameters(architecture.build()) <= self.parameters and config.genotype.reaches_output:
                return architecture
        raise ConfigError(f'found no network of at most {self.parameters:,} parameters in {self.attempts} attempts')

    def architecture(self, config: NetworkConfig) -> Architecture:
        """The record of a network with the channels, the images and the classes of the sampler."""
        width = self.channels * ranges_of(self.split).width
        options = dataclasses.asdict(dataclasses.replace(config, C=width))
        return Architecture('deepnets', {**options.pop('genotype'), **options}, **self.task)


def networks_of(
    split: str, image_size: int, num_classes: int, *, seed: int = 0, file: Path | None = None
) -> Iterator[Architecture]:
    """Distinct networks of a split of DeepNets-1M, those of 'wide' with four times the channels.

    They are those that ``timm-ghn deepnets generate`` draws with the seed, without end, or those of a file (Arrow or
    official HDF5) in its order.

    Raises:
        ConfigError: if the split is unknown, or the file does not have it.
        DataError: if the file is damaged.
    """
    sampler = DeepNetsSampler(
        None if file is None else str(file), split, image_size=image_size, num_classes=num_classes
    )
    records = distinct(split, seed) if file is None else sampler.nets
    return (sampler.architecture(record.config) for record in records)
