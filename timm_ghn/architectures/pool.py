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
from timm_ghn.errors import CheckpointError, ConfigError
from timm_ghn.files import read_json, write_json
from timm_ghn.version import __version__


class Pool:
    """The members 0, 1, 2, ... of a set: each depends on the sampler, the seed and its number alone.

    Drawing a member means to build networks until one is within the limits, which takes longer than to train on it.
    So members are kept in a folder, one file each, for other processes and for a run that goes on.
    """

    def __init__(self, sampler: ArchitectureSampler, seed: int, folder: Path) -> None:
        self.sampler, self.seed, self.folder = sampler, seed, folder
        # Other versions may draw otherwise.
        versions = __version__, version('timm'), np.__version__
        drawn_by = [type(sampler).__name__, dataclasses.asdict(sampler), seed, *versions]
        text = json.dumps(drawn_by, sort_keys=True, default=str)
        self._name = hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
        self._memory: dict[int, Architecture] = {}

    def __getitem__(self, member: int) -> Architecture:
        """A member, by its number."""
        if member not in self._memory:
            path = self.folder / f'{self._name}-{member}.json'
            try:
                self._memory[member] = Architecture.from_dict(read_json(path))
            except (ConfigError, CheckpointError):  # it is missing or damaged
                self._memory[member] = self.sampler.sample(np.random.default_rng((self.seed, 5, member)))
                self.folder.mkdir(parents=True, exist_ok=True)
                write_json(self._memory[member].to_dict(), path)
        return self._memory[member]
