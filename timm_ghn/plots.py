"""Figures, drawn with matplotlib; and the diversity of a network's weights as one.

Importing this module without matplotlib is a :class:`ConfigError` that says how to install it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
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

#: How many of the best are named in the picture of a search.
_NAMED = 5
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
    for kind in reversed(KINDS):
        shown = [max(value, _LEAST) for value in comparison.weights[kind].spectrum]
        ax.plot(range(1, len(shown) + 1), shown, _STYLES[kind], color=_COLOURS[kind], label=_LABELS[kind])
    shape = 'x'.join(map(str, comparison.shape))
    title = f'eigenvalues of the channel correlations, layer {comparison.number}:\n{comparison.name} ({shape})'
    ax.set_title(title, fontsize=10, parse_math=False)
    ax.set(xlabel='eigenvalue, the largest first', ylabel=f'{_LEAST:g} stands for less', yscale='log')
    ax.grid(alpha=0.3)


def plot_curves(log: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """Draw loss and accuracy over the epochs of a fine-tuning run.

    Args:
        log: Its lines, see :func:`timm_ghn.runs.results.read_results`.
        path: The file; one that exists is replaced.
        title: Stands above the picture.
    """
    figure = new_figure((9, 3.6), title)
    losses, accuracies = figure.subplots(1, 2)
    for axis, unit, curves in (
        (losses, 'cross-entropy', {'training loss': 'train_loss', 'validation loss': 'val_loss'}),
        (accuracies, '%', {'validation accuracy': 'val_top1', 'of averaged weights': 'ema_top1'}),
    ):
        for label, key in curves.items():
            _draw_curve(axis, log, 'epoch', 'epoch', key, marker='.', label=label)
        axis.set(xlabel='epochs trained', ylabel=unit)
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend()
    figure.savefig(path, dpi=120)


def plot_training(log: Sequence[dict[str, Any]], path: Path, title: str, *, chance: float) -> None:
    """Draw the accuracy of predicted networks over the steps of meta-training.

    Args:
        log: Lines of the run, see :func:`timm_ghn.runs.results.read_results`.
        path: The file; one that exists is replaced.
        title: Stands above the picture.
        chance: Accuracy of guessing, in percent.
    """
    figure = new_figure((7.5, 4), title)
    axis = figure.subplots()
    for kind, key, label, colour in (
        ('train', 'top1', 'architectures and images of training', '#bbbbbb'),
        ('eval', 'known', 'held-out designs of the trained families', '#00798c'),
        ('eval', 'unseen', 'families that were never trained', '#d1495b'),
    ):
        marker = '.' if kind == 'eval' else ''
        _draw_curve(axis, log, kind, 'step', key, marker=marker, color=colour, label=label)
    axis.axhline(chance, color='black', linestyle=':', linewidth=1, label='chance')
    axis.set(xlabel='steps', ylabel='accuracy, predicted, no training, %')
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=120)


def plot_families(accuracies: Mapping[str, Sequence[float]], path: Path, *, chance: float) -> None:
    """Draw a point for the accuracy of each predicted network, by family.

    Args:
        accuracies: Of the networks of each family, in percent.
        path: The file; one that exists is replaced.
        chance: Accuracy of guessing, in percent.
    """
    figure = new_figure((1.5 + 0.6 * len(accuracies), 3.6))
    axis = figure.subplots()
    for place, values in enumerate(accuracies.values()):
        axis.plot([place] * len(values), values, 'o', color='#00798c', alpha=0.6)
        axis.plot([place - 0.3, place + 0.3], [sum(values) / len(values)] * 2, color='#d1495b')
    axis.axhline(chance, color='#999999', linestyle=':', label='chance')
    axis.set_xticks(range(len(accuracies)), list(accuracies), rotation=40, ha='right', fontsize=8)
    axis.set_ylabel('accuracy, predicted, no training, %')
    axis.legend()
    figure.savefig(path, dpi=130)


def plot_race(runners: Sequence[tuple[str, Sequence[tuple[int, float, float]]]], path: Path) -> None:
    """Draw the accuracy of the runners of a race over the steps, a colour for each start.

    Args:
        runners: Start, and (steps, accuracy, probability) after each round, of each: what a
            :class:`~timm_ghn.transfer.race.Runner` has.
        path: The file; one that exists is replaced.
    """
    figure = new_figure((6.5, 4))
    axis = figure.subplots()
    starts = list(dict.fromkeys(start for start, _ in runners))
    for start, rounds in sorted(runners, key=lambda runner: len(runner[1])):
        steps, accuracies = [one[0] for one in rounds], [one[1] for one in rounds]
        axis.plot(steps, accuracies, marker='.', color=f'C{starts.index(start) % 10}')
    for place, start in enumerate(starts):
        axis.plot([], [], color=f'C{place % 10}', label=start)
    axis.set(xlabel='steps', ylabel='accuracy on the images of comparison, %')
    axis.grid(alpha=0.3)
    for text in axis.legend(title='start').get_texts():
        text.set_parse_math(False)
    figure.savefig(path, dpi=120)


def plot_search(ranked: Sequence[tuple[str, int, float]], path: Path) -> None:
    """Draw the accuracy of predicted networks over what they cost, with the names of the best.

    Args:
        ranked: Name, multiply-accumulates and accuracy in percent, the best first.
        path: The file; one that exists is replaced.
    """
    figure = new_figure((7.5, 4.5))
    axis = figure.subplots()
    axis.plot([macs for _, macs, _ in ranked], [top1 for *_, top1 in ranked], 'o', color='#00798c', alpha=0.6)
    for name, macs, top1 in ranked[:_NAMED]:
        axis.annotate(
            name, (macs, top1), (4, 2), textcoords='offset points', fontsize=7, parse_math=False, color='#d1495b'
        )
    axis.set(xlabel='multiply-accumulates', ylabel='accuracy of the predicted network, %', xscale='log')
    axis.grid(alpha=0.3)
    figure.savefig(path, dpi=130)


def _draw_curve(ax: Any, log: Sequence[dict[str, Any]], kind: str, x: str, y: str, **style: Any) -> None:
    """Draw the lines of a kind that have both numbers."""
    pairs = [(line.get(x), line.get(y)) for line in log if line['kind'] == kind]
    points = [pair for pair in pairs if all(isinstance(number, int | float) for number in pair)]
    if points:
        ax.plot(*zip(*points, strict=True), **style)
