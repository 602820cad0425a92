"""The compact form of DeepNets-1M: an Arrow file that is mapped into memory, not loaded; and which reader a file needs.

Importing this module needs the package datasets.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from timm_ghn.architectures.deepnets.records import NetRecord
from timm_ghn.errors import ConfigError, DataError
from timm_ghn.files import atomic_write

try:
    import pyarrow as pa
    from datasets import Dataset
except ImportError as error:
    raise ConfigError("files of networks need datasets: pip install 'timm-ghn[deepnets]'") from error

#: Ends of the names of official files.
HDF5 = ('.hdf5', '.h5')

_SCHEMA = pa.schema(
    [
        ('split', pa.string()),
        ('config', pa.string()),
        ('cifar10', pa.int64()),
        ('imagenet', pa.int64()),
        ('primitives', pa.list_(pa.string())),
        ('cells', pa.list_(pa.uint16())),
        ('names', pa.list_(pa.string())),
        ('edges', pa.list_(pa.uint16())),
    ]
)

#: Networks that are written at once.
_ROWS = 64


class ArrowNets(Sequence[NetRecord]):
    """Networks of a file, each of which is read when it is asked for.

    Args:
        path: The file.
        split: Only networks of this split; all if None.
    """

    def __init__(self, path: Path, split: str | None = None) -> None:
        self.path = path
        if not path.is_file():
            raise FileNotFoundError(f'{str(path)!r} is no file')
        try:
            self.rows: Dataset = Dataset.from_file(str(path))
        except Exception as error:  # whatever pyarrow makes of a damaged file
            raise DataError(f'{path} is damaged, expected an Arrow file of networks: {error}') from error
        if set(self.rows.column_names) != set(_SCHEMA.names):
            raise DataError(f'expected {path} to hold the columns {_SCHEMA.names} (got {self.rows.column_names})')
        self.splits: list[str] = self.rows['split'][:]
        if split is not None:
            chosen = [index for index, name in enumerate(self.splits) if name == split]
            if not chosen:
                raise ConfigError(f'{path} has the splits {", ".join(sorted(set(self.splits)))} (asked for {split!r})')
            self.rows, self.splits = self.rows.select(chosen), [split] * len(chosen)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        row = self.rows[index]
        try:
            config = json.loads(row['config'])
        except ValueError as error:
            raise DataError(f'network {index} of {self.path} is damaged: {error}') from error
        num_params = {name: row[name] for name in ('cifar10', 'imagenet') if row[name] is not None}
        edges = list(zip(row['edges'][::2], row['edges'][1::2], strict=True))
        return NetRecord.from_dict({**row, 'config': config, 'num_params': num_params, 'edges': edges})


def write_records(path: Path, records: Iterable[tuple[str, NetRecord]]) -> None:
    """Write networks, each with its split, as they come: the whole file, or nothing."""
    with atomic_write(path) as part, pa.OSFile(str(part), 'wb') as sink, pa.ipc.new_stream(sink, _SCHEMA) as writer:
        stream = iter(records)
        while rows := [_row(split, record) for split, record in itertools.islice(stream, _ROWS)]:
            writer.write_batch(pa.RecordBatch.from_pylist(rows, schema=_SCHEMA))


def _row(split: str, record: NetRecord) -> dict[str, Any]:
    return {
        'split': split,
        'config': json.dumps(dataclasses.asdict(record.config)),
        **{name: record.num_params.get(name) for name in ('cifar10', 'imagenet')},
        'primitives': record.primitives,
        'cells': record.cells,
        'names': record.names,
        'edges': [node for edge in record.edges for node in edge],
    }


def open_nets(path: Path, split: str | None = None) -> Sequence[NetRecord]:
    """Networks of an Arrow file, or of one split of an official file.

    Raises:
        ConfigError: if the split is missing, or the file needs a package that is.
        DataError: if it is damaged.
    """
    if path.suffix.lower() not in HDF5:
        return ArrowNets(path, split)
    from timm_ghn.architectures.deepnets.official import HDF5Nets, official_splits  # needs h5py

    if split is None:
        splits = official_splits(path)
        if len(splits) > 1:
            raise ConfigError(f'{path} has the splits {", ".join(splits)}; name one')
        split = splits[0]
    return HDF5Nets(path, split)


def convert(source: Path, target: Path) -> int:
    """Convert between the official and the compact form, by the ends of the names; returns how many networks."""
    if (source.suffix.lower() in HDF5) == (target.suffix.lower() in HDF5):
        raise ConfigError(f'expected one of {source} and {target} to end in {" or ".join(HDF5)}')
    from timm_ghn.architectures.deepnets.official import HDF5Nets, official_splits, write_official

    if target.suffix.lower() in HDF5:
        nets = ArrowNets(source)
        write_official(target, zip(nets.splits, nets, strict=True))
        return len(nets)
    parts = {split: HDF5Nets(source, split) for split in official_splits(source)}
    write_records(target, ((split, record) for split, records in parts.items() for record in records))
    return sum(map(len, parts.values()))
