"""From an official file to a folder of ours, tensor by tensor, so that the weights are never all in memory."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from timm_ghn.hub.formats import OfficialGHN, open_official
from timm_ghn.hub.records import TensorRecord, memory_of
from timm_ghn.hub.storage import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    empty_ghn,
    expect_finite,
    expect_floating,
    write_config,
)
from timm_ghn.nn.config import GHNConfig

#: End of the names of folders that are not complete yet.
PARTIAL = '.partial'

_DTYPES = {torch.float64: 'F64', torch.float32: 'F32', torch.float16: 'F16', torch.bfloat16: 'BF16'}


def convert_official(
    path: Path,
    folder: Path,
    *,
    config: GHNConfig | None = None,
    sha256: str | None = None,
    facts: Mapping[str, str] | None = None,
) -> None:
    """Write an official file as a folder of ours, which appears complete or not at all.

    The weights keep the type that they have in the file.

    Args:
        path: The file. Nothing in it is executed.
        folder: The folder to make. Where it exists already, nothing is put in its place.
        config: What the catalogue says of the file; inferred from it if None.
        sha256: Of the file, if it is known; nothing is unpickled if it has another.
        facts: More to write into the header of the weights, where safetensors keep facts.

    Raises:
        GHNNotFoundError: if the file cannot be opened.
        UnsafeCheckpointError: if it names anything outside the allow-list.
        CheckpointError: if it is damaged, is no GHN, differs from ``config`` or ``sha256``, or holds a weight that is
            not finite.
        OSError: if the folder cannot be written, FileExistsError if it is there already.
    """
    with open_official(path, config=config, sha256=sha256) as found, appearing(folder.absolute()) as partial:
        empty_ghn(found.config, found.shapes, str(path))
        _write_weights(found, partial / WEIGHTS_FILE, {'format': 'pt', **(facts or {})}, str(path))
        write_config(found.config, partial / CONFIG_FILE)


@contextlib.contextmanager
def appearing(folder: Path) -> Iterator[Path]:
    """A folder beside ``folder`` that gets its name when it is complete and on the disk.

    Raises:
        OSError: if it cannot be written, FileExistsError if ``folder`` is there already by then.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f'.{folder.name}.{uuid.uuid4().hex}{PARTIAL}')
    try:
        partial.mkdir()
        yield partial
        for file in partial.iterdir():
            # Otherwise a power cut may leave zeros under the final name, which are finite weights.
            with file.open('rb+') as written:
                os.fsync(written.fileno())
        try:
            os.rename(partial, folder)
        except OSError as error:
            if folder.exists():
                raise FileExistsError(errno.EEXIST, 'the folder exists already', str(folder)) from error
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_weights(found: OfficialGHN, path: Path, facts: Mapping[str, str], label: str) -> None:
    """Write safetensors one tensor at a time; safetensors' own writer wants all of them in memory, twice."""
    # Wide types first, as safetensors orders them: each tensor then begins at a multiple of its element's size.
    ordered = sorted(found.weights.items(), key=lambda item: (-item[1].storage.dtype.itemsize, item[0]))
    header, total = _header(ordered, facts, label)
    if shutil.disk_usage(path.parent).free < total + len(header):
        raise OSError(errno.ENOSPC, f'no room for {total + len(header):,} bytes', str(path))
    with path.open('wb') as file:
        file.write(header)
        for key, record in ordered:
            tensor = record.read()
            expect_finite(key, tensor.to(torch.float32), label)
            if tensor.numel():
                file.write(memory_of(tensor.reshape(-1)))


def _header(ordered: list[tuple[str, TensorRecord]], facts: Mapping[str, str], label: str) -> tuple[bytes, int]:
    """The header of a safetensors file with its length before it, and the number of bytes behind it."""
    described: dict[str, Any] = {'__metadata__': facts}
    begin = 0
    for key, record in ordered:
        expect_floating(key, record.storage.dtype, label)
        end = begin + math.prod(record.shape) * record.storage.dtype.itemsize
        dtype = _DTYPES[record.storage.dtype]
        described[key] = {'dtype': dtype, 'shape': list(record.shape), 'data_offsets': [begin, end]}
        begin = end
    text = json.dumps(described, separators=(',', ':')).encode()
    text += b' ' * (-len(text) % 8)
    return len(text).to_bytes(8, 'little') + text, begin
