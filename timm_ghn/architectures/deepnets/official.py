"""The official files of DeepNets-1M: graphs in HDF5, configurations in JSON beside them.

Importing this module needs the package h5py.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from timm_ghn.architectures.deepnets.network import NetworkConfig
from timm_ghn.architectures.deepnets.records import NetRecord
from timm_ghn.errors import ConfigError, DataError
from timm_ghn.files import atomic_write

try:
    import h5py
except ImportError as error:
    raise ConfigError('the official files of DeepNets-1M need h5py: pip install h5py') from error


def meta_path(path: Path) -> Path:
    """The JSON file that belongs to an HDF5 file."""
    return path.with_name(f'{path.stem}_meta.json')


@functools.lru_cache(2)
def _meta(path: Path) -> dict[str, Any]:
    file = meta_path(path)
    if not file.is_file():
        raise FileNotFoundError(f'{str(file)!r}, which belongs to {str(path)!r}, is missing')
    try:
        values = json.loads(file.read_text(encoding='utf-8'))
        if not values or not all({'nets', 'meta'} <= set(part) for part in values.values()):
            raise ValueError("expected 'nets' and 'meta' of each split")
    except (ValueError, TypeError, AttributeError) as error:
        raise DataError(f'{file} is damaged: {error}') from error
    result: dict[str, Any] = values
    return result


def official_splits(path: Path) -> tuple[str, ...]:
    """Splits of an official file."""
    return tuple(_meta(path))


class HDF5Nets(Sequence[NetRecord]):
    """Networks of one split of an official file, each of which is read when it is asked for."""

    def __init__(self, path: Path, split: str) -> None:
        self.path, self.split = path, split
        if not path.is_file():
            raise FileNotFoundError(f'{str(path)!r} is no file')
        meta = _meta(path)
        # The wide networks are those of the test split.
        self.group = split if split in meta or split != 'wide' else 'test'
        if self.group not in meta:
            raise ConfigError(f'{path} has the splits {", ".join(meta)} (asked for {split!r})')
        self.nets: list[dict[str, Any]] = meta[self.group]['nets']
        words = meta[self.group]['meta']
        try:
            self.primitives = {int(key): name for key, name in words['primitives_ext'].items()}
            self.names = {int(key): name for key, name in words['unique_op_names'].items()}
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f'{meta_path(path)} is damaged: {error!r}') from error

    def __len__(self) -> int:
        return len(self.nets)

    @functools.cached_property
    def _file(self) -> h5py.File:
        try:
            return h5py.File(self.path, 'r')
        except OSError as error:
            raise DataError(f'{self.path} is damaged, expected an HDF5 file: {error}') from error

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != '_file'}

    def arrays(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Distances uint8 (N, N) and nodes uint16 (N, 3) as the file has them."""
        try:
            group = self._file[self.group][str(index)]
            distances, nodes = np.asarray(group['adj']), np.asarray(group['nodes'])
        except (KeyError, OSError, TypeError, ValueError) as error:
            raise DataError(f'{self.path} is damaged at network {index} of {self.group}: {error}') from error
        if nodes.ndim != 2 or nodes.shape[1] != 3 or distances.shape != (len(nodes), len(nodes)):
            raise DataError(f'expected N x N distances and N x 3 nodes (got {distances.shape}, {nodes.shape})')
        return distances, nodes

    def __getitem__(self, index: Any) -> Any:
        index = range(len(self))[index]
        distances, nodes = self.arrays(index)
        net = self.nets[index]
        try:
            words = [(self.primitives[p], cell, self.names[name]) for p, cell, name in nodes.tolist()]
        except KeyError as error:
            raise DataError(f'network {index} of {self.path} has a node of an unknown kind {error}') from error
        primitives, cells, names = zip(*words, strict=True)
        edges = tuple((source, target) for source, target in np.argwhere(distances == 1).tolist())
        return NetRecord(NetworkConfig.from_dict(net), net.get('num_params', {}), primitives, cells, names, edges)


def write_official(path: Path, records: Iterable[tuple[str, NetRecord]]) -> None:
    """Write networks, each with its split, in the official form: an HDF5 file and its JSON file."""
    meta: dict[str, Any] = {}
    ids: dict[str, tuple[dict[str, int], dict[str, int]]] = {}
    with atomic_write(path) as part, atomic_write(meta_path(path)) as part_meta, h5py.File(part, 'w') as file:
        file.attrs['title'] = 'DeepNets-1M'
        for split, record in records:
            nets = meta.setdefault(split, {'nets': []})['nets']
            primitives, names = ids.setdefault(split, ({}, {}))
            rows = [
                (primitives.setdefault(primitive, len(primitives)), cell, names.setdefault(name, len(names)))
                for primitive, cell, name in zip(record.primitives, record.cells, record.names, strict=True)
            ]
            group = file.create_group(f'{split}/{len(nets)}')
            group.create_dataset('adj', data=record.distances_NN(), compression='gzip')
            group.create_dataset('nodes', data=np.array(rows, dtype=np.uint16), compression='gzip')
            config = dataclasses.asdict(record.config)
            nets.append({**config, 'num_nodes': len(record), 'num_params': dict(record.num_params)})
        for split, (primitives, names) in ids.items():
            meta[split]['meta'] = {
                'primitives_ext': {str(number): name for name, number in primitives.items()},
                'unique_op_names': {str(number): name for name, number in names.items()},
            }
        part_meta.write_text(json.dumps(meta), encoding='utf-8')
    _meta.cache_clear()
