"""Tables of text."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from timm_ghn.errors import LONGEST, printable

if TYPE_CHECKING:
    from timm_ghn.prediction.diversity import Comparison


def diversity_table(comparisons: Iterable[Comparison]) -> Iterator[str]:
    """Each layer as predicted, post-processed and random, with what the columns mean."""
    header = ['layer', 'parameter', 'shape']
    for measure in ('same', 'stable', 'spread'):
        header += [f'{measure}: pred', 'post', 'rand']
    rows = []
    for comparison in comparisons:
        measured = comparison.weights
        row = [
            f'{comparison.number}{"*" if comparison.processed else ""}',
            comparison.name,
            'x'.join(map(str, comparison.shape)),
        ]
        row += [f'{100 * layer.duplicates:.0f}%' for layer in measured.values()]
        row += [f'{layer.stable_rank:.1f}' for layer in measured.values()]
        row += [f'{layer.effective_rank:.1f}' for layer in measured.values()]
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
    right = [all(_is_number(cell) for cell in column[1:]) for column in columns]
    for row in (header, ['-' * width for width in widths], *body):
        cells = (
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(row, widths, right, strict=True)
        )
        yield '  '.join(cells).rstrip()


def _is_number(text: str) -> bool:
    return text == '-' or re.fullmatch(r'[+-]?[\d,]*\.?\d+[*%]?', text) is not None
