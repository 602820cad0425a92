"""The authors' files: joblib dumps (GHN-3), and both formats of ``torch.save`` (GHN-2).

All three are pickles and storages, and :mod:`timm_ghn.hub.pickles` reads the pickles of all three.
``torch.load(weights_only=True)`` does not execute anything either, but a pickle of 500 bytes (a dictionary with a tuple
of tuples of tuples as its key) keeps it busy for centuries, and it allocates whatever a file claims to hold.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from timm_ghn.errors import CheckpointError, ConfigError, GHNNotFoundError
from timm_ghn.files import sha256_of
from timm_ghn.hub.pickles import BytesRecord, CheckpointFile, StorageRecord, TensorRecord, are_sizes, brief, read_pickle
from timm_ghn.hub.storage import build_ghn, digest_in_name, expect_config, file_digest
from timm_ghn.nn.config import IMAGENET_MEAN, IMAGENET_STD, GHNConfig, Origin
from timm_ghn.nn.ghn import GHN

#: Statistics of the images that the published CIFAR-10 GHNs were trained on.
CIFAR10_MEAN = (0.49139968, 0.48215827, 0.44653124)
CIFAR10_STD = (0.24703233, 0.24348505, 0.26158768)

#: Fields of the configuration that a bare state dictionary does not determine.
NOT_IN_WEIGHTS = frozenset({'virtual_edges', 'weight_norm', 'rules', 'mean', 'std', 'trained', 'postprocess'})

#: Cut-off of the shortest paths that all GHNs with virtual edges were published with.
VIRTUAL_EDGES = 50

_MOVED = ('centrality_embed_in.', 'centrality_embed_out.', 'input_dist_embed.')
_CONVOLUTIONS = ('decoder.conv.', 'decoder.class_layer_predictor.')

#: The first bytes of the legacy format of ``torch.save``, also inside joblib dumps: a pickled magic number and version.
LEGACY_HEAD = b'\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.'

_ZIP_MAGIC = b'PK\x03\x04'
_ZIP_HEADER = 30


def read_official(
    path: Path,
    *,
    config: GHNConfig | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> GHN:
    """Read a joblib dump (GHN-3) or a file of ``torch.save`` (GHN-2). Nothing in it is executed.

    ``config`` is what the catalogue says of it; inferred from the file if None. The GHN is in evaluation mode.

    Raises:
        GHNNotFoundError: if the file cannot be opened.
        UnsafeCheckpointError: if it names anything outside the allow-list.
        CheckpointError: if it is damaged, is no GHN, differs from ``config`` or from the SHA-256 by which the Hub's
            cache names it, or holds a weight that is not finite.
    """
    with open_official(path, config) as found:
        weights = found.weights
        ghn = build_ghn(
            found.config, found.shapes, lambda key: weights[key].read(), device=device, dtype=dtype, label=str(path)
        )
    ghn.origin = Origin(name=found.config.name, file=str(path), sha256=file_digest(path))
    return ghn


@dataclasses.dataclass(frozen=True)
class OfficialGHN:
    """An open file of the authors: hyper-parameters, and tensors, still in the file, by their names in :class:`GHN`."""

    config: GHNConfig
    weights: Mapping[str, TensorRecord]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor."""
        return {key: record.shape for key, record in self.weights.items()}


@contextlib.contextmanager
def open_official(path: Path, config: GHNConfig | None = None) -> Iterator[OfficialGHN]:
    """Open a file of the authors, whose weights can be read while it is open; see :func:`read_official`."""
    label = str(path)
    with open_checkpoint(path) as loaded:
        weights, options = _parts(loaded, label)
        weights = _native_keys(weights)
        inferred = _infer_config({key: record.shape for key, record in weights.items()}, options or {}, label)
        if config is not None:
            expect_config(inferred, config, label, ignore=NOT_IN_WEIGHTS)
            inferred = config
        elif inferred.name is None:
            inferred = dataclasses.replace(inferred, name=path.stem)
        yield OfficialGHN(inferred, weights)


def _parts(loaded: Any, label: str) -> tuple[dict[str, TensorRecord], dict[str, Any] | None]:
    """The state dictionary of a file and, if it has one, its configuration."""
    options = None
    if isinstance(loaded, dict) and 'state_dict' in loaded:
        options, loaded = loaded.get('config'), loaded['state_dict']
    if not isinstance(loaded, dict) or not loaded:
        raise CheckpointError(f'{label} is no GHN: expected a dictionary of tensors (got {type(loaded).__name__})')
    for key, value in loaded.items():
        if not isinstance(key, str) or not isinstance(value, TensorRecord):
            raise CheckpointError(f'{label} is no GHN: expected tensors by name (got {brief(key)})')
    total, size = sum(value.nbytes for value in loaded.values()), next(iter(loaded.values())).storage.source.size
    if total > size:
        raise CheckpointError(f'{label} holds tensors of {total:,} bytes in {size:,}: they share their memory')
    if options is not None and not isinstance(options, dict):
        raise CheckpointError(f'{label} is damaged: its configuration is not a dictionary')
    return loaded, options


def _native_keys(weights: Mapping[str, TensorRecord]) -> dict[str, TensorRecord]:
    """Give the weights the names and shapes that they have in :class:`GHN`.

    GHN-3's files have three embeddings of the first layer at the top level, GHN-2's linear layers as convolutions.
    """
    renamed: dict[str, TensorRecord] = {}
    for key, record in weights.items():
        if key.startswith(_CONVOLUTIONS) and len(record.shape) == 4 and record.shape[2:] == (1, 1):
            record = dataclasses.replace(record, shape=record.shape[:2], stride=record.stride[:2])
        renamed[f'gnn.0.{key}' if key.startswith(_MOVED) else key] = record
    return renamed


def _infer_config(shapes: Mapping[str, tuple[int, ...]], options: Mapping[str, Any], label: str) -> GHNConfig:
    """Find the hyper-parameters of a published GHN from the shapes of its tensors, by their names in :class:`GHN`.

    ``options``, the configuration in the file, decides what the shapes do not.
    """
    try:
        hid = shapes['embed.weight'][1]
        num_classes = shapes['bias_class.1.weight'][0]
        decoder = 'mlp' if 'decoder.mlp.fc.0.weight' in shapes else 'conv'
        gnn = 'gated' if any(key.startswith('gnn.gru.') for key in shapes) else 'mlp'
        if 'gnn.0.attn.to_qkv.weight' in shapes:
            gnn = 'graphormer'
        if 'max_shape' in options or decoder == 'mlp':
            max_shape = options.get('max_shape')
            if not isinstance(max_shape, (tuple, list)) or len(max_shape) != 4 or not are_sizes(max_shape):
                raise CheckpointError(f'{label} states an impossible max_shape: {brief(max_shape)}')
        else:
            outs = shapes['decoder.class_layer_predictor.1.weight'][1]
            size = math.isqrt(shapes['decoder.fc.0.weight'][0] // (4 * hid))
            max_shape = (outs, shapes['decoder.conv.2.weight'][0] // outs, size, size)
        virtual = bool(options.get('ve', gnn == 'graphormer' or 'gnn.mlp_ve.fc.0.weight' in shapes))
        return GHNConfig(
            hid=hid,
            max_shape=tuple(max_shape),
            num_classes=num_classes,
            gnn=gnn,
            layers=max(sum(key.startswith('gnn.') and key.endswith('.ln1.weight') for key in shapes), 1),
            heads=shapes['gnn.0.attn.proj_e.2.weight'][0] if gnn == 'graphormer' else 8,
            virtual_edges=VIRTUAL_EDGES if virtual else 1,
            layernorm='ln.weight' in shapes,
            weight_norm=bool(options.get('weight_norm', gnn != 'gated' or virtual)),  # all but GHN-1
            decoder=decoder,
            window='center' if gnn == 'graphormer' else 'corner',
            mean=CIFAR10_MEAN if num_classes == 10 else IMAGENET_MEAN,
            std=CIFAR10_STD if num_classes == 10 else IMAGENET_STD,
        )
    except (KeyError, IndexError, TypeError, ArithmeticError, ConfigError) as error:
        raise CheckpointError(f'{label} does not hold the weights of a GHN: {type(error).__name__} {error}') from error


@contextlib.contextmanager
def open_checkpoint(path: Path) -> Iterator[Any]:
    """Read a checkpoint: plain containers with records for its tensors, which can be read while it is open."""
    if path.exists() and not path.is_file():
        raise CheckpointError(f'expected a file in {path}, which is none: pipes and devices are not read')
    try:
        file = open(path, 'rb')  # noqa: SIM115  # closed below
    except OSError as error:
        raise GHNNotFoundError(f'cannot open the GHN file {path}: {error}') from error
    with file:
        expected = digest_in_name(path)
        if expected is not None and (found := sha256_of(path)) != expected:
            raise CheckpointError(
                f'{path} is damaged or another file: its SHA-256 is {found} where {expected} is expected. Nothing in '
                'it was read; remove it, and load it again'
            )
        source = CheckpointFile(file, str(path))
        head = file.read(len(LEGACY_HEAD))
        file.seek(0)
        if head.startswith(_ZIP_MAGIC):
            yield _read_zip(source)
        elif head == LEGACY_HEAD:
            yield _read_legacy(source)
        else:
            yield _read_joblib(source)


def _read_joblib(source: CheckpointFile) -> Any:
    """One pickle; the storage of each tensor is a file of ``torch.save`` of its own."""

    def nested(data: Any) -> object:
        if not isinstance(data, BytesRecord):
            raise TypeError('expected bytes')
        place = source.tell()
        source.seek(data.offset)
        loaded = _read_legacy(source)
        source.seek(place)
        return loaded

    return read_pickle(source, nested=nested)


def _read_legacy(source: CheckpointFile) -> Any:
    """Magic number and version, a description of the machine, the object, names of the storages, the storages."""
    if source.read(len(LEGACY_HEAD)) != LEGACY_HEAD:
        raise source.error('nests data that torch.save did not write')
    machine = read_pickle(source)
    if not isinstance(machine, dict) or machine.get('little_endian') is not True:
        raise source.error('was written on a big-endian machine, which is not supported')
    storages: dict[str, StorageRecord] = {}

    def storage(record: tuple[Any, ...]) -> StorageRecord:
        _, kind, key, _, numel, *view = record
        if any(part is not None for part in view):
            raise source.error('holds a view of a storage, which no GHN file needs')
        if not isinstance(key, str):
            raise source.error('is damaged: it has a storage without a name')
        return storages.setdefault(key, _storage(source, kind, numel))

    loaded = read_pickle(source, storage=storage)
    keys = read_pickle(source)
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys) or set(keys) != set(storages):
        raise source.error('is damaged: it does not list the storages that it refers to')
    for key in keys:
        found = storages[key]
        numel = int.from_bytes(source.read(8), 'little', signed=True)
        if numel != found.numel:
            raise source.error(f'is damaged: a storage has {numel:,} elements where {found.numel:,} are declared')
        found.offset = source.skip(numel * found.dtype.itemsize)
    return loaded


def _read_zip(source: CheckpointFile) -> Any:
    """The format of ``torch.save`` since torch 1.6: a zip archive of a pickle and one stored member per storage."""
    try:
        members = {info.filename: info for info in zipfile.ZipFile(source).infolist()}
    except CheckpointError:
        raise
    except (zipfile.BadZipFile, ValueError, NotImplementedError, OSError) as error:
        raise source.error(f'is truncated or damaged: {error}') from error
    pickles = [name for name in members if name.endswith('/data.pkl') and name.count('/') == 1]
    if len(pickles) != 1:
        raise source.error('is a zip archive, but not one of torch.save: it has no data.pkl')
    root = pickles[0].removesuffix('data.pkl')
    if f'{root}byteorder' in members:
        _enter(source, members[f'{root}byteorder'])
        if source.read(6) != b'little':
            raise source.error('was written on a big-endian machine, which is not supported')
    storages: dict[str, StorageRecord] = {}

    def storage(record: tuple[Any, ...]) -> StorageRecord:
        _, kind, key, _, numel = record
        name = f'{root}data/{key}' if isinstance(key, str) else ''
        if name not in members:
            raise source.error(f'is damaged: its storage {brief(key)} is missing')
        if name not in storages:
            place = source.tell()
            found = _storage(source, kind, numel)
            _enter(source, members[name])
            found.offset = source.skip(numel * found.dtype.itemsize)
            source.seek(place)
            storages[name] = found
        return storages[name]

    _enter(source, members[pickles[0]])
    return read_pickle(source, storage=storage)


def _storage(source: CheckpointFile, kind: Any, numel: Any) -> StorageRecord:
    if not isinstance(kind, torch.dtype) or type(numel) is not int or numel < 0:
        raise source.error('holds a storage of a type that no GHN has')
    return StorageRecord(source, kind, numel)


def _enter(source: CheckpointFile, info: zipfile.ZipInfo) -> None:
    """Seek to the first byte of a member, behind its local header, whose names may differ in length from the index."""
    if info.compress_type != zipfile.ZIP_STORED:
        raise source.error(f'has a compressed member {info.filename[:40]!r}, which torch.save does not write')
    source.seek(min(max(info.header_offset, 0), source.size))
    header = source.read(_ZIP_HEADER)
    if not header.startswith(_ZIP_MAGIC):
        raise source.error('is damaged: a member of the archive is not where the index says')
    source.skip(int.from_bytes(header[26:28], 'little') + int.from_bytes(header[28:30], 'little'))
