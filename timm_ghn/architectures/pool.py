"""A fixed set of architectures, drawn one by one as they are needed."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from importlib.metadata import version
from pathlib import Path

import numpy as np

from timm_ghn.architectures.architecture import Architecture
from timm_ghn.architectures.samplers import ArchitectureSampler
from timm_ghn.errors import ConfigError
from timm_ghn.files import atomic_write
from timm_ghn.version import __version__


class Pool:
    """The members 0, 1, 2, ... of a set: each depends on the sampler, the seed and its number alone.

    Drawing a member means to build networks until one is within the limits, which takes longer than to train on it.
    So members are kept in a folder, for other processes and for a run that goes on.

    Args:
        sampler: Draws the members.
        seed: Of the set.
        folder: Where they are kept, one file each; None keeps them in memory only.
    """

    def __init__(self, sampler: ArchitectureSampler, seed: int, folder: Path | None = None) -> None:
        self.sampler, self.seed, self.folder = sampler, seed, folder
        options = dataclasses.asdict(sampler) if dataclasses.is_dataclass(sampler) else repr(sampler)
        # Other versions may draw otherwise.
        drawn_by = [type(sampler).__name__, options, seed, __version__, version('timm'), np.__version__]
        text = json.dumps(drawn_by, sort_keys=True, default=str)
        self._name = hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
        self._memory: dict[int, Architecture] = {}

    def __getitem__(self, member: int) -> Architecture:
        """A member, by its number.

        Raises:
            ConfigError: if the sampler finds none.
        """
        if member not in self._memory:
            path = None if self.folder is None else self.folder / f'{self._name}-{member}.json'
            found = None if path is None else _read(path)
            if found is None:
                found = self.sampler.sample(np.random.default_rng((self.seed, 5, member)))
                if path is not None:
                    _write(path, found)
            self._memory[member] = found
        return self._memory[member]


def _read(path: Path) -> Architecture | None:
    """What a file holds; None where it is missing or damaged."""
    try:
        values = json.loads(path.read_text(encoding='utf-8'))
        return Architecture.from_dict(values)
    except (OSError, ValueError, TypeError, ConfigError):
        return None


def _write(path: Path, architecture: Architecture) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        file.write_text(json.dumps(architecture.to_dict()), encoding='utf-8')
