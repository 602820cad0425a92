"""Files that appear whole or not at all, digests and JSON."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import stat
import uuid
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from timm_ghn.errors import CheckpointError, ConfigError

#: End of the names of folders that are not complete yet, or are being removed.
PARTIAL = '.partial'

#: Longest JSON file that is read, in bytes.
MAX_JSON = 1 << 20


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A temporary file that takes the place of ``path`` when it is complete; several processes may do so at once."""
    temporary = path.with_name(f'.{path.name}.{uuid.uuid4().hex}')
    try:
        temporary.touch()
        mode = stat.S_IMODE(temporary.stat().st_mode)
        yield temporary
        os.chmod(temporary, mode)  # safetensors writes files that nobody else can read
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder that gets the name ``folder`` when it is complete and on the disk.

    Raises:
        OSError: if it cannot be written, or ``folder`` is there already by then and not empty.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f'.{folder.name}.{uuid.uuid4().hex}{PARTIAL}')
    try:
        temporary.mkdir()
        yield temporary
        flush(temporary.iterdir())
        os.rename(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def flush(paths: Iterable[Path]) -> None:
    """Have files and folders on the disk: else a power cut may leave zeros under a name, which are finite weights."""
    for path in paths:
        if path.is_dir():
            if os.name != 'posix':
                continue  # folders cannot be opened there
            handle = os.open(path, os.O_RDONLY)
        else:
            handle = os.open(path, os.O_RDWR)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_json(record: Mapping[str, Any], path: Path) -> None:
    """Write a JSON object with sorted keys, for people to read."""
    with atomic_write(path) as part:
        part.write_text(json.dumps(record, indent=2, sort_keys=True) + '\n', encoding='utf-8')


def read_json(path: Path) -> dict[str, Any]:
    """Read a file with one JSON object.

    Raises:
        CheckpointError: if it holds anything else.
    """
    try:
        if path.exists() and not path.is_file():
            raise CheckpointError(f'expected a file in {path}, which is none: pipes and devices are not read')
        if path.stat().st_size > MAX_JSON:
            raise CheckpointError(f'{path} is longer than {MAX_JSON:,} bytes, too long for a configuration')
        record = json.loads(path.read_text(encoding='utf-8'))
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f'{path} is truncated or damaged, expected JSON: {error}') from error
    if not isinstance(record, dict):
        raise CheckpointError(f'expected {path} to hold a JSON object (got {type(record).__name__})')
    return record


def sha256_of(path: Path) -> str:
    """SHA-256 of a file in hexadecimal."""
    digest = hashlib.sha256()
    with path.open('rb') as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def crc32_of(state_dict: Mapping[str, Tensor]) -> str:
    """CRC-32 of the values of a state dict: it tells weights that were trained since, and costs little."""
    found = 0
    for value in state_dict.values():
        found = zlib.crc32(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data, found)
    return f'{found:08x}'


def check_output(path: Path, suffixes: Sequence[str] = ('.safetensors',)) -> None:
    """Refuse a file that cannot be written before minutes go into what it is to hold.

    Args:
        path: The file.
        suffixes: Ends that its name may have.

    Raises:
        ConfigError: if it ends otherwise.
        OSError: if it cannot be written.
    """
    if path.suffix.lower() not in suffixes:
        raise ConfigError(f'expected a name that ends in {" or ".join(suffixes)} (got {str(path)!r})')
    if path.is_dir():
        raise IsADirectoryError(f'{str(path)!r} is a folder')
    if not path.parent.is_dir():
        raise FileNotFoundError(f'the folder {str(path.parent)!r} does not exist')
    if not os.access(path.parent, os.W_OK):
        raise PermissionError(f'the folder {str(path.parent)!r} cannot be written')


def write_state_dict(state_dict: Mapping[str, Tensor], path: Path, metadata: Mapping[str, Any]) -> None:
    """Write a state dict as safetensors: the whole file, or nothing.

    Args:
        state_dict: What to write.
        path: The file; one that exists is replaced.
        metadata: Goes into the file's header, as JSON where it is not text.

    Raises:
        OSError: if the file cannot be written.
    """
    # Tied parameters share memory, which the format has no word for: each name gets its own copy.
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state_dict.items()}
    header = {key: value if isinstance(value, str) else json.dumps(value) for key, value in metadata.items()}
    with atomic_write(path) as part:
        try:
            save_file(tensors, part, metadata={'format': 'pt', **header})
        except SafetensorError as error:
            raise OSError(f'{str(path)!r} cannot be written: {error}') from error
