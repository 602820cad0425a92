"""Tables of text."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from timm_ghn.errors import LONGEST, printable

if TYPE_CHECKING:
    from timm_ghn.prediction.diversity import Comparison

_NUMBER = re.compile(r'-|[+-]?[\d,]*\.?\d+[*%]?')


def diversity_table(comparisons: Iterable[Comparison]) -> Iterator[str]:
    """Each layer as predicted, post-processed and random, with what the columns mean."""
    header = ['layer', 'parameter', 'shape']
    for measure in ('same', 'stable', 'spread'):
        header += [f'{measure}: pred', 'post', 'rand']
    rows = []
    for comparison in comparisons:
        number, shape = f'{comparison.number}{"*" * comparison.processed}', 'x'.join(map(str, comparison.shape))
        row, measured = [number, comparison.name, shape], comparison.weights.values()
        row += [f'{100 * layer.duplicates:.0f}%' for layer in measured]
        row += [f'{layer.stable_rank:.1f}' for layer in measured]
        row += [f'{layer.effective_rank:.1f}' for layer in measured]
        rows.append(row)
    yield from aligned(header, rows)
    yield ''
    yield 'pred, post, rand: weights as predicted, post-processed (layers marked *), and as timm draws them'
    yield 'same: output channels that point in the direction of an earlier one'
    yield 'stable: stable rank |W|_F^2 / |W|_2^2'
    yield 'spread: directions over which the correlations of the channels are spread (participation ratio)'


def aligned(header: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """Lines of a table; columns of numbers are aligned to the right."""
    body = [tuple(printable(cell, LONGEST) for cell in row) for row in rows]
    columns = list(zip(header, *body, strict=True))
    widths = [max(map(len, column)) for column in columns]
    to_right = [all(_NUMBER.fullmatch(cell) for cell in column[1:]) for column in columns]
    for row in (header, ['-' * width for width in widths], *body):
        cells = zip(row, widths, to_right, strict=True)
        yield '  '.join(cell.rjust(width) if right else cell.ljust(width) for cell, width, right in cells).rstrip()
