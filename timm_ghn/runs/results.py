"""The log of a run: a line of JSON for the run, for each evaluation, and for its end."""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from timm_ghn.files import atomic_write
from timm_ghn.version import __version__

RESULTS = 'results.jsonl'
CURVES = 'curves.png'

_PACKAGES = ('timm', 'torch', 'torchvision', 'accelerate', 'datasets', 'safetensors', 'huggingface_hub')


def versions() -> dict[str, str]:
    """Versions of what a result may depend on."""
    found = {'python': platform.python_version(), 'timm_ghn': __version__}
    for name in _PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


class Results:
    """The log on the disk: first the run, then a line for each evaluation, then the summary.

    A run that goes on gives ``resume``, an entry by which lines are ordered and where it stood in the checkpoint: lines
    after that are dropped, since they will be written again. None begins a new file.
    """

    def __init__(self, folder: Path, *, resume: tuple[str, float] | None = None) -> None:
        self.path = folder / RESULTS
        folder.mkdir(parents=True, exist_ok=True)
        kept = []
        if resume is not None and self.path.exists():
            entry, reached = resume
            kept = [line for line in read_results(self.path) if line.get(entry, 0) <= reached and line['kind'] != 'end']
        with atomic_write(self.path) as part:
            part.write_text(''.join(to_json(line) + '\n' for line in kept), encoding='utf-8')

    def add(self, kind: str, values: dict[str, Any]) -> None:
        """Append a line; it is on the disk when this returns."""
        with self.path.open('a', encoding='utf-8') as file:
            file.write(to_json({'kind': kind, **values}) + '\n')
            file.flush()
            os.fsync(file.fileno())


def to_json(value: Any, *, indent: int | None = None) -> str:
    """JSON as its standard has it: a number that is not finite becomes null."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_results(path: Path) -> list[dict[str, Any]]:
    """Lines of a results file: objects with a ``kind``. One that a killed process left unfinished is dropped."""
    lines = []
    for text in path.read_bytes().splitlines():
        with contextlib.suppress(ValueError, RecursionError):
            line = json.loads(text)
            if isinstance(line, dict) and isinstance(line.get('kind'), str):
                lines.append(line)
    return lines
