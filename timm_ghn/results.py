"""What a run leaves for people: a line of JSON for each epoch, and a picture of the curves."""

from __future__ import annotations

import json
import math
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from timm_ghn.errors import ConfigError
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
    """The file of results: first the run, then a line for each evaluation, then the summary.

    Args:
        folder: Where it is.
        resume: For a run that goes on: an entry of the lines and where it stood; lines that lie behind are dropped,
            since they will be written again. None begins a new file.
    """

    def __init__(self, folder: Path, *, resume: tuple[str, float] | None = None) -> None:
        self.path = folder / RESULTS
        folder.mkdir(parents=True, exist_ok=True)
        kept = []
        if resume is not None and self.path.exists():
            kept = [line for line in read_results(self.path) if _before(line, *resume)]
        part = self.path.with_name(f'.{RESULTS}')
        part.write_text(''.join(json.dumps(line) + '\n' for line in kept), encoding='utf-8')
        os.replace(part, self.path)

    def add(self, kind: str, values: dict[str, Any]) -> None:
        """Append a line; it is on the disk when this returns."""
        with self.path.open('a', encoding='utf-8') as file:
            file.write(json.dumps({'kind': kind, **values}) + '\n')
            file.flush()
            os.fsync(file.fileno())


def _before(line: dict[str, Any], entry: str, reached: float) -> bool:
    return bool(line['kind'] == 'run' or (line['kind'] != 'end' and line.get(entry, math.inf) <= reached))


def read_results(path: Path) -> list[dict[str, Any]]:
    """Lines of a results file; one that a killed process left unfinished is dropped."""
    lines = []
    for text in path.read_text(encoding='utf-8').splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            continue
    return lines


def plot_curves(lines: list[dict[str, Any]], path: Path, title: str) -> bool:
    """Draw loss and accuracy over epochs; False where matplotlib is not installed."""
    try:
        from timm_ghn.picture import new_figure
    except ConfigError:
        return False
    epochs = [line for line in lines if line['kind'] == 'epoch']
    figure = new_figure((9, 3.6), title)
    losses, accuracies = figure.subplots(1, 2)
    for axis, curves in (
        (losses, {'training loss': 'train_loss', 'validation loss': 'val_loss'}),
        (accuracies, {'validation accuracy': 'val_top1', 'of averaged weights': 'ema_top1'}),
    ):
        for label, key in curves.items():
            points = [(line['epoch'], line[key]) for line in epochs if line.get(key) is not None]
            if points:
                axis.plot(*zip(*points, strict=True), marker='.', label=label)
        axis.set_xlabel('epochs trained')
        axis.grid(alpha=0.3)
        axis.legend()
    losses.set_ylabel('cross-entropy')
    accuracies.set_ylabel('%')
    figure.savefig(path, dpi=120)
    return True
