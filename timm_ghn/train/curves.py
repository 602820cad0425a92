"""The curves of a meta-training run, from its log."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from timm_ghn.errors import ConfigError
from timm_ghn.runs.results import points

#: Curves by the kind of the lines and the key that hold them.
_CURVES = (
    ('train', 'top1', 'architectures and images of training', '#bbbbbb'),
    ('eval', 'known', 'held-out designs of the trained families', '#00798c'),
    ('eval', 'unseen', 'families that were never trained', '#d1495b'),
)


def plot_training(lines: Sequence[dict[str, Any]], path: Path, title: str, *, chance: float) -> bool:
    """Draw the accuracy of predicted networks over the steps; False where matplotlib is not installed.

    Args:
        lines: Of the log, see :func:`timm_ghn.runs.results.read_results`.
        path: The picture; one that exists is replaced.
        title: Stands above it.
        chance: Accuracy of guessing, in percent.
    """
    try:
        from timm_ghn.plots import new_figure
    except ConfigError:
        return False
    figure = new_figure((7.5, 4), title)
    axis = figure.subplots()
    for kind, key, label, colour in _CURVES:
        curve = points(lines, kind, 'step', key)
        if curve:
            axis.plot(*zip(*curve, strict=True), marker='.' if kind == 'eval' else '', color=colour, label=label)
    axis.axhline(chance, color='black', linestyle=':', linewidth=1, label='chance')
    axis.set_xlabel('steps')
    axis.set_ylabel('accuracy, predicted, no training, %')
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=120)
    return True
