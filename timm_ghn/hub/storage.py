"""GHNs on disk in the native format: a folder with ``config.json`` and ``model.safetensors``."""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from timm_ghn.errors import CheckpointError, ConfigError, GHNNotFoundError, first_line
from timm_ghn.files import atomic_write, read_json, sha256_of, write_json
from timm_ghn.nn.config import GHNConfig, Origin
from timm_ghn.nn.ghn import GHN

CONFIG_FILE = 'config.json'
WEIGHTS_FILE = 'model.safetensors'

#: Largest file in bytes whose digest is computed when it is loaded (in a second at most).
MAX_HASHED = 512 * 2**20

#: Types of weights. Those of 8 bits and fewer are refused: torch cannot even add them.
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def save_ghn(ghn: GHN, directory: str | os.PathLike[str], *, dtype: torch.dtype | None = None) -> None:
    """Write a GHN in the native format (config.json and safetensors). Each file appears complete or not at all.

    Args:
        ghn: The GHN.
        directory: Made if it does not exist; its two files are replaced.
        dtype: Floating type of the file, e.g. bfloat16 for half the size; that of the GHN if None.

    Raises:
        CheckpointError: if a weight is not finite; nothing is written.
        OSError: if the folder cannot be written.
    """
    state = {
        key: value.detach().to(device='cpu', dtype=dtype or value.dtype).contiguous()
        for key, value in ghn.state_dict().items()
    }
    write_native(state, ghn.config, Path(directory), label='the GHN')


def write_native(state: Mapping[str, Tensor], config: GHNConfig, folder: Path, *, label: str) -> None:
    """Write weights, which must be contiguous and on the CPU, and a configuration; see :func:`save_ghn`."""
    for key, value in state.items():
        expect_floating(key, value.dtype, label)
        expect_finite(key, value, label)
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(folder / WEIGHTS_FILE) as path:
        try:
            save_file(dict(state), path, metadata={'format': 'pt'})
        except SafetensorError as error:
            raise OSError(f'{str(folder)!r} cannot be written: {error}') from error
    write_json(config.to_dict(), folder / CONFIG_FILE)


def is_native(path: Path) -> bool:
    """Whether a path names a GHN in the native format, and not a file of the authors."""
    return path.is_dir() or path.suffix == '.safetensors'


def read_config(path: Path) -> GHNConfig:
    """Read the configuration of a GHN; errors are those of :func:`read_ghn`."""
    return GHNConfig.from_dict(read_json(path))


def read_ghn(
    directory: str | os.PathLike[str],
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    config: GHNConfig | None = None,
    origin: Origin | None = None,
) -> GHN:
    """Read what :func:`save_ghn` wrote. No weight is initialised first, so the peak of memory is one copy of them.

    Args:
        directory: The folder, or its ``model.safetensors``.
        device: The CPU if None.
        dtype: Floating type of the weights; float32 if None, whatever the file has.
        config: What the folder's configuration must say, its name aside, if known.
        origin: Where the weights came from; this file if None, of which the digest is then computed.

    Raises:
        GHNNotFoundError: if the folder or a file in it does not exist.
        ConfigError: if the configuration is wrong, or of a newer version of this package, or if the weights cannot be
            put on the device or have the type.
        CheckpointError: if a file is damaged, if they do not fit together, or if a weight is not finite.
    """
    directory = Path(directory)
    weights = directory if directory.suffix == '.safetensors' else directory / WEIGHTS_FILE
    for path in (weights.parent / CONFIG_FILE, weights):
        if not path.is_file():
            raise GHNNotFoundError(
                f'expected a GHN in {weights.parent}, which has no file {path.name}: a saved GHN is a folder with '
                f'{CONFIG_FILE} and {WEIGHTS_FILE}'
            )
    found = read_config(weights.parent / CONFIG_FILE)
    if config is not None:
        expect_config(found, config, str(weights.parent / CONFIG_FILE))
    try:
        try:
            opened = safe_open(weights, framework='pt', device='cpu')
        except RuntimeError as error:  # torch's, which maps it: another process has removed it meanwhile
            raise OSError(error) from error
        with opened as file:
            shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
            ghn = build_ghn(found, shapes, file.get_tensor, device=device, dtype=dtype, label=str(weights))
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f'{weights} is truncated or damaged: {error}') from error
    ghn.origin = origin or Origin(name=found.name, file=str(weights), sha256=file_digest(weights))
    return ghn


def build_ghn(
    config: GHNConfig,
    shapes: Mapping[str, tuple[int, ...]],
    read: Callable[[str], Tensor],
    *,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
    label: str,
) -> GHN:
    """Make a GHN of weights that ``read`` gives one by one, once it is known that all of them fit."""
    device, dtype = device_of(device), dtype_of(dtype)
    ghn = empty_ghn(config, shapes, label)
    weights: dict[str, Tensor] = {}
    for key in ghn.state_dict():
        with torch.device('cpu'):  # also where the caller has another default device
            tensor = read(key)
        expect_floating(key, tensor.dtype, label)
        tensor = tensor.to(device=device, dtype=dtype)
        expect_finite(key, tensor, label)
        weights[key] = tensor
    ghn.load_state_dict(weights, strict=True, assign=True)
    return ghn.eval()


def empty_ghn(config: GHNConfig, shapes: Mapping[str, tuple[int, ...]], label: str) -> GHN:
    """Make a GHN on the meta device for tensors of these shapes; a CheckpointError if any does not fit."""
    _expect_plausible(config, shapes, label)
    try:
        with torch.device('meta'):
            ghn = GHN(config)
            ghn.load_state_dict({key: torch.empty(shape) for key, shape in shapes.items()}, assign=True)
    except (RuntimeError, TypeError, OverflowError) as error:  # also torch's for sizes of more than 64 bits
        raise CheckpointError(f'{label} does not match its configuration: {error}') from error
    return ghn


def expect_floating(key: str, dtype: torch.dtype, label: str) -> None:
    """Refuse a tensor of another type than :data:`FLOATS`."""
    if dtype not in FLOATS:
        raise CheckpointError(
            f'{label} holds {key} as {dtype}, expected a floating type: {", ".join(map(str, FLOATS))}'
        )


def device_of(name: torch.device | str | None) -> torch.device:
    """The device of a name like 'cuda:1'; the CPU if None. A ConfigError if this machine has none that holds values."""
    try:
        device = torch.empty(0, device='cpu' if name is None else name).device
    except (RuntimeError, AssertionError, TypeError) as error:
        raise ConfigError(f'expected a device that this machine has (got {name!r}): {first_line(error)}') from error
    if device.type == 'meta':
        raise ConfigError("expected a device that holds values (got 'meta')")
    return device


def dtype_of(dtype: torch.dtype | None) -> torch.dtype:
    """Floating type of weights; float32 if None. A ConfigError if weights have no such type."""
    if dtype is not None and dtype not in FLOATS:
        raise ConfigError(f'expected dtype to be one of {", ".join(map(str, FLOATS))} (got {dtype!r})')
    return dtype or torch.float32


def _expect_plausible(config: GHNConfig, shapes: Mapping[str, tuple[int, ...]], label: str) -> None:
    """Refuse a configuration that is far larger than the file before anything of that size is built."""
    limit = sum(math.prod(shape) for shape in shapes.values())
    largest = max(config.hid, config.num_classes, *config.max_shape)
    if config.decoder == 'templates':
        largest = max(largest, config.templates, config.codes)
    if config.layers > len(shapes) or largest > limit:
        raise CheckpointError(f'{label} holds {limit:,} numbers, far fewer than its configuration needs: {config}')


def expect_finite(key: str, tensor: Tensor, label: str) -> None:
    """Refuse a tensor with NaN or infinity."""
    # A sum needs no memory, and is finite only if every term is; one that overflows is looked at again below.
    if torch.isfinite(tensor.sum()) or torch.isfinite(tensor).all():
        return
    count = int((~torch.isfinite(tensor)).sum())
    raise CheckpointError(f'{label} holds values that are not finite: {count:,} of {tensor.numel():,} in {key}')


def expect_config(found: GHNConfig, expected: GHNConfig, label: str, *, ignore: frozenset[str] = frozenset()) -> None:
    """Refuse a configuration that differs from the catalogue's in any field but ``ignore``, name and format version."""
    free = ignore | {'name', 'format_version'}
    differing = [
        f'{field.name} {getattr(found, field.name)!r} where {getattr(expected, field.name)!r} is expected'
        for field in dataclasses.fields(GHNConfig)
        if field.name not in free and getattr(found, field.name) != getattr(expected, field.name)
    ]
    if differing:
        raise CheckpointError(f'{label} is not the GHN that the catalogue describes: it has {", ".join(differing)}')


def file_digest(path: Path) -> str | None:
    """SHA-256 of a file in hexadecimal, None for one that would take long to read."""
    return digest_in_name(path) or (sha256_of(path) if path.stat().st_size <= MAX_HASHED else None)


def digest_in_name(path: Path) -> str | None:
    """SHA-256 by which the cache of the Hub names a large file; None for other files."""
    # One link on: what the cache shares among repositories has a name of another kind behind a second link.
    blob = path.parent / path.readlink() if path.is_symlink() else path
    return blob.name if blob.parent.name == 'blobs' and re.fullmatch('[0-9a-f]{64}', blob.name) else None
