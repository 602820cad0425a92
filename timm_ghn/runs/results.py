"""The log of a run: a line of JSON for the run, for each evaluation, and for its end."""

from __future__ import annotations

import json
import math
import os
import platform
import warnings
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
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


class Results:
    """The log on the disk: first the run, then a line for each evaluation, then the summary.

    Args:
        folder: Where it is.
        resume: For a run that goes on: an entry by which lines are ordered, and where it stood in the checkpoint;
            lines after that are dropped, since they will be written again. None begins a new file.
    """

    def __init__(self, folder: Path, *, resume: tuple[str, float] | None = None) -> None:
        self.path = folder / RESULTS
        folder.mkdir(parents=True, exist_ok=True)
        kept = []
        if resume is not None and self.path.exists():
            kept = [line for line in read_results(self.path) if _before(line, *resume)]
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


def _before(line: dict[str, Any], entry: str, reached: float) -> bool:
    place = line.get(entry)
    done = isinstance(place, int | float) and place <= reached
    return bool(line['kind'] == 'run' or (line['kind'] != 'end' and done))


def read_results(path: Path) -> list[dict[str, Any]]:
    """Lines of a results file: objects with a ``kind``.

    One at the end that a killed process left unfinished is dropped; any other that is no such object is passed over
    with a warning.
    """
    lines, wrong = [], []
    texts = path.read_bytes().split(b'\n')
    for number, text in enumerate(texts, start=1):
        try:
            line = json.loads(text.decode('utf-8'))
        except (ValueError, RecursionError):
            line = None
        if isinstance(line, dict) and isinstance(line.get('kind'), str):
            lines.append(line)
        elif number < len(texts) and text.strip():
            wrong.append(number)
    if wrong:
        warnings.warn(
            f'{str(path)!r} has {len(wrong)} lines that are no results and are passed over (the first is line '
            f'{wrong[0]})',
            stacklevel=2,
        )
    return lines
