"""Sources of architectures behind one interface: a seed in, architectures out."""

from __future__ import annotations

import dataclasses
import functools
import math
import zlib
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numpy as np
import timm
from torch import nn

from timm_ghn.architectures.architecture import SPLITS, Architecture, Task, register_family
from timm_ghn.architectures.cost import Limits, cost_of, count_parameters
from timm_ghn.architectures.draws import Draws
from timm_ghn.architectures.families import FAMILIES, TRAIN_FAMILIES
from timm_ghn.architectures.small_images import adapt_to_small_images_, size_arguments
from timm_ghn.errors import ConfigError
from timm_ghn.runs.recipes import converted


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArchitectureSampler(Task):
    """A source of architectures.

    A sampler is a frozen record that can be pickled. It keeps no state: what it draws depends on the generator alone,
    so that each worker process, each with its own generator, can have its copy.
    """

    def sample(self, rng: np.random.Generator) -> Architecture:
        """Draw an architecture; all randomness comes from ``rng``."""
        raise NotImplementedError


_SAMPLERS: dict[str, type[Any]] = {}
SamplerType = TypeVar('SamplerType', bound=type[Any])


def register_sampler(name: str) -> Callable[[SamplerType], SamplerType]:
    """Class decorator: make an :class:`ArchitectureSampler` known by name."""

    def register(cls: SamplerType) -> SamplerType:
        _SAMPLERS[name] = cls
        return cls

    return register


def build_sampler(name: str, options: Mapping[str, Any]) -> ArchitectureSampler:
    """Make the sampler of a name, with the fields of its dataclass; lists may stand for tuples.

    Raises:
        ConfigError: if nothing has this name, or an option is unknown, missing or wrong.
    """
    if not isinstance(name, str) or name not in _SAMPLERS:
        raise ConfigError(f'expected a sampler among {", ".join(sorted(_SAMPLERS))} (got {name!r})')
    try:
        sampler: ArchitectureSampler = _SAMPLERS[name](**converted(_SAMPLERS[name], options))
    except TypeError as error:  # an option is missing
        raise ConfigError(f'sampler {name!r}: {error}') from error
    return sampler


@register_sampler('timm')
@dataclasses.dataclass(frozen=True)
class TimmSampler(Limits, ArchitectureSampler):
    """Random members of timm's families, within limits.

    A family is drawn first, uniformly; then options, until they fit.

    Attributes:
        families: Names of :data:`~timm_ghn.architectures.families.FAMILIES`.
        split: Which designs may be drawn, see :attr:`Architecture.split`; None for all.
        attempts: How often options are drawn before giving up.
    """

    families: tuple[str, ...] = TRAIN_FAMILIES
    split: str | None = 'train'
    attempts: int = 200

    def __post_init__(self) -> None:
        super().__post_init__()
        unknown = [name for name in self.families if name not in FAMILIES]
        if unknown or not self.families or len(set(self.families)) < len(self.families):
            raise ConfigError(f'expected distinct families among {", ".join(FAMILIES)} (got {self.families})')
        if self.split is not None and self.split not in SPLITS:
            raise ConfigError(f'expected split to be one of {", ".join(SPLITS)}, or None (got {self.split!r})')

    def sample(self, rng: np.random.Generator) -> Architecture:
        """Draw an architecture within the limits."""
        family = self.families[int(rng.integers(len(self.families)))]
        draws, (fewest, most) = Draws(rng, self), self.parameters
        for _ in range(self.attempts):
            architecture = Architecture(family, FAMILIES[family](draws), **self.task)
            if self.split not in (None, architecture.split):
                continue
            model = architecture.build()
            if fewest <= count_parameters(model) <= most and self.admit(cost_of(model, architecture.input_size)):
                return architecture
        raise ConfigError(
            f'found no {family} of {fewest:,} to {most:,} parameters within {self.macs:,} macs and '
            f'{self.least_activations:,} to {self.activations} activations in {self.attempts} attempts; widen the '
            f'limits, or leave {family!r} out of families'
        )


def evaluation_set(sampler: TimmSampler, *, seed: int, count: int, split: str = 'test') -> tuple[Architecture, ...]:
    """A fixed list of architectures that training never draws: ``count`` distinct ones of each family.

    They are held out by :attr:`Architecture.split`, 'val' or 'test'; the sampler's own does not matter. For networks of
    another kind, give a sampler of the families in :data:`~timm_ghn.architectures.families.HELD_OUT`. Each family has a
    generator of its own: one more family changes nothing in the others.
    """
    chosen: list[Architecture] = []
    for family in sampler.families:
        # One design in twenty belongs to the split.
        one = dataclasses.replace(sampler, families=(family,), split=split, attempts=20 * sampler.attempts)
        rng = np.random.default_rng([seed, zlib.crc32(family.encode())])
        found: dict[str, Architecture] = {}
        for _ in range(20 * count):
            architecture = one.sample(rng)
            found.setdefault(architecture.key, architecture)
            if len(found) == count:
                break
        else:
            raise ConfigError(f'expected {count} members of {family} within the limits (got {len(found)})')
        chosen += found.values()
    return tuple(chosen)


@register_sampler('names')
@dataclasses.dataclass(frozen=True)
class NamesSampler(ArchitectureSampler):
    """Models of timm by name.

    They belong to no split: keeping lists for training and for evaluation apart is up to who writes them.

    Attributes:
        names: Names, or patterns such as ``'resnet*'``, which stand for all models that match.
        small_stem: Whether stems are made for small images, as :mod:`timm_ghn.architectures.small_images` does it.
    """

    names: tuple[str, ...]
    small_stem: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.names:
            raise ConfigError('expected names of timm models (got none)')
        for pattern in self.names:
            if not _matching(pattern):
                raise ConfigError(f'timm has no model {pattern!r}; see timm.list_models()')

    @functools.cached_property
    def models(self) -> tuple[str, ...]:
        """All names, each once."""
        return tuple(dict.fromkeys(name for pattern in self.names for name in _matching(pattern)))

    def sample(self, rng: np.random.Generator) -> Architecture:
        """Draw one of the names."""
        return self.architecture(self.models[int(rng.integers(len(self.models)))])

    def architecture(self, name: str) -> Architecture:
        """A model by its name."""
        arguments = _size_arguments(name, self.image_size, small=self.small_stem)
        return Architecture('timm', {'name': name, 'small_stem': self.small_stem, **arguments}, **self.task)


def _matching(pattern: str) -> tuple[str, ...]:
    return tuple(timm.list_models(pattern)) if any(c in pattern for c in '*?[') else (pattern,) * timm.is_model(pattern)


_size_arguments = functools.cache(size_arguments)


@register_family('timm')
def _build_named(architecture: Architecture, common: dict[str, Any]) -> nn.Module:
    """A model of timm, built for the size of the images."""
    arguments = dict(architecture.options)
    name, small = arguments.pop('name'), arguments.pop('small_stem')
    with common.pop('device'):
        model: nn.Module = timm.create_model(name, pretrained=False, **common, **arguments)
        if small and 'patch_size' not in arguments:  # smaller patches are what a smaller stem would be
            adapt_to_small_images_(model, architecture.image_size, in_chans=architecture.in_chans)
    return model


@register_sampler('mix')
@dataclasses.dataclass(frozen=True)
class MixSampler(ArchitectureSampler):
    """Several samplers, drawn from by turns: for instance many small networks and a few as large as timm's own.

    Attributes:
        parts: A mapping for each: its ``share`` of the draws (any positive number, 1 if left out), the name of its
            ``sampler`` ('timm' if left out), and the options of that.
    """

    parts: tuple[Mapping[str, Any], ...] = dataclasses.field(hash=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.parts:
            raise ConfigError('expected parts, a mapping for each (got none)')
        _ = self.members

    @functools.cached_property
    def members(self) -> tuple[tuple[float, ArchitectureSampler], ...]:
        """The share of each part, out of 1, and its sampler."""
        made: list[tuple[float, ArchitectureSampler]] = []
        for part in self.parts:
            own = dict(part)
            share, name = own.pop('share', 1), own.pop('sampler', 'timm')
            if not isinstance(share, int | float) or not 0 < share < math.inf:
                raise ConfigError(f'expected the share of a part to be a positive number (got {share!r})')
            made.append((share, build_sampler(name, {**self.task, **own})))
        whole = sum(share for share, _ in made)
        return tuple((share / whole, sampler) for share, sampler in made)

    def sample(self, rng: np.random.Generator) -> Architecture:
        """Draw from one of the parts."""
        shares = [share for share, _ in self.members]
        return self.members[int(rng.choice(len(shares), p=shares))][1].sample(rng)


def parts_of(sampler: ArchitectureSampler) -> tuple[ArchitectureSampler, ...]:
    """The samplers that a sampler draws from; that is itself where it is no mixture."""
    if isinstance(sampler, MixSampler):
        return tuple(inner for _, member in sampler.members for inner in parts_of(member))
    return (sampler,)


def timm_parts(sampler: ArchitectureSampler) -> list[TimmSampler]:
    """Those of the parts that draw from families of timm."""
    return [part for part in parts_of(sampler) if isinstance(part, TimmSampler)]
