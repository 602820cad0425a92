"""Figures, drawn with matplotlib; and the diversity of a network's weights as one.

Importing this module without matplotlib is a :class:`ConfigError` that says how to install it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from timm_ghn.errors import ConfigError
from timm_ghn.prediction.diversity import KINDS, Comparison, LayerDiversity

try:
    from matplotlib.figure import Figure
except ImportError as error:
    raise ConfigError('a plot needs matplotlib: pip install matplotlib, or leave --plot out') from error

#: Ends of the names of files that can be drawn.
SUFFIXES = ('.png', '.pdf', '.svg')

#: Eigenvalues below are drawn here.
_LEAST = 1e-3

_COLOURS = dict(zip(KINDS, ('#d55e00', '#0072b2', '#999999'), strict=True))
_LABELS = dict(zip(KINDS, ('predicted', 'post-processed', 'random (timm)'), strict=True))
_STYLES = dict(zip(KINDS, ('-', '-', '--'), strict=True))


def new_figure(size: tuple[float, float], title: str = '') -> Figure:
    """An empty figure.

    Args:
        size: Width and height in inches.
        title: Stands above it, as it is: a name with two dollar signs is no formula.
    """
    figure = Figure(figsize=size, layout='constrained')
    if title:
        figure.suptitle(title, fontsize=12, parse_math=False)
    return figure


def draw(comparisons: Sequence[Comparison], path: Path, *, title: str) -> None:
    """Draw three measures over the layers, and the spectrum of one layer.

    Args:
        comparisons: At least one layer, see :func:`timm_ghn.prediction.diversity.compare`.
        path: The file; one that exists is replaced.
        title: Stands above the picture.

    Raises:
        ConfigError: if there is nothing to draw.
        OSError: if the file cannot be written.
    """
    if not comparisons:
        raise ConfigError('there is no layer to draw')
    figure = new_figure((12, 8), title)
    axes = figure.subplots(2, 2)
    measures = {
        'duplicated output channels, %': lambda layer: layer.duplicates,
        'stable rank, % of the largest possible': lambda layer: layer.relative_rank,
        'directions of the correlations, % of the largest possible': lambda layer: (
            layer.effective_rank / len(layer.spectrum)
        ),
    }
    for ax, (label, measure) in zip(axes.flat, measures.items(), strict=False):
        _draw_layers(ax, comparisons, label, measure)
    _draw_spectrum(axes[1, 1], shown_layer(comparisons))
    axes[0, 0].legend(loc='best', framealpha=0.9)
    figure.savefig(path, dpi=120)


def shown_layer(comparisons: Sequence[Comparison]) -> Comparison:
    """The layer whose spectrum is drawn: the largest one that post-processing changes, or of all if there is none."""
    changed = [comparison for comparison in comparisons if comparison.processed]
    return max(changed or comparisons, key=lambda comparison: len(comparison.weights[KINDS[0]].spectrum))


def _draw_layers(
    ax: Any, comparisons: Sequence[Comparison], label: str, measure: Callable[[LayerDiversity], float]
) -> None:
    numbers = [comparison.number for comparison in comparisons]
    changed = [comparison.number for comparison in comparisons if comparison.processed]
    if changed:
        ax.axvspan(changed[0] - 0.5, changed[-1] + 0.5, color='#0072b2', alpha=0.08, linewidth=0)
    for kind in reversed(KINDS):
        # Where nothing was post-processed, there is nothing to draw beside what was predicted.
        drawn = [comparison.processed or kind != KINDS[1] for comparison in comparisons]
        values = [
            100 * measure(comparison.weights[kind]) if shown else math.nan
            for comparison, shown in zip(comparisons, drawn, strict=True)
        ]
        ax.plot(numbers, values, _STYLES[kind], color=_COLOURS[kind], label=_LABELS[kind], marker='.', markersize=5)
    ax.set(title=label, xlabel='layer (shaded: post-processed)', ylim=(-4, 104))
    ax.title.set_fontsize(10)
    ax.grid(alpha=0.3)


def _draw_spectrum(ax: Any, comparison: Comparison) -> None:
    first: LayerDiversity = comparison.weights[KINDS[0]]
    for kind in reversed(KINDS):
        shown = [max(value, _LEAST) for value in comparison.weights[kind].spectrum]
        ax.plot(range(1, len(shown) + 1), shown, _STYLES[kind], color=_COLOURS[kind], label=_LABELS[kind])
    shape = 'x'.join(map(str, first.shape))
    title = f'eigenvalues of the channel correlations, layer {comparison.number}:\n{first.name} ({shape})'
    ax.set_title(title, fontsize=10, parse_math=False)
    ax.set(xlabel='eigenvalue, the largest first', ylabel=f'{_LEAST:g} stands for less', yscale='log')
    ax.grid(alpha=0.3)
