"""Random choices from which families draw their options.

Everything comes from a ``numpy.random.Generator`` and exact arithmetic (choices from tables, square roots), so a seed
means the same architectures on every platform.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np

from timm_ghn.architectures.cost import Limits

T = TypeVar('T')

#: Four widths in each octave: a uniform choice among them is nearly log-uniform.
WIDTHS = tuple(mantissa << octave for octave in range(10) for mantissa in (4, 5, 6, 7))


def round_to(value: float, multiple: int) -> int:
    """The nearest positive multiple."""
    return max(1, math.floor(value / multiple + 0.5)) * multiple


def stage_sides(side: int, strides: Sequence[int]) -> tuple[int, ...]:
    """Side of the map after each of these strides in turn."""
    sides = itertools.accumulate((side, *strides), lambda before, stride: max(1, -(-before // stride)))
    return tuple(sides)[1:]


class Draws:
    """Choices for one network within limits."""

    def __init__(self, rng: np.random.Generator, limits: Limits) -> None:
        self.rng, self.limits, self.image_size = rng, limits, limits.image_size

    def choose(self, values: Sequence[T]) -> T:
        """One of the values."""
        return values[int(self.rng.integers(len(values)))]

    def chance(self, probability: float) -> bool:
        """True with a probability."""
        return bool(self.rng.random() < probability)

    def each(self, count: int, values: Sequence[T]) -> tuple[T, ...]:
        """One of the values, several times."""
        return tuple(self.choose(values) for _ in range(count))

    def ratios(self, stages: int, steps: Sequence[float] = (1.0, 1.5, 2.0, 2.0)) -> tuple[float, ...]:
        """Width of each stage in units of the first one's, which never falls."""
        growth = self.each(stages - 1, steps)
        return tuple(itertools.accumulate((1.0, *growth), lambda a, b: a * b))

    def depths(self, stages: int, most: int) -> tuple[int, ...]:
        """Blocks per stage: even, or most of them in the last but one, as in most published networks."""
        if stages < 3 or self.chance(0.5):
            return self.each(stages, range(1, most + 1))
        few: list[Any] = list(self.each(stages, range(1, max(1, most // 2) + 1)))
        few[-2] = self.choose(range(most // 2 + 1, 2 * most + 1))
        return tuple(few)

    def sides(self, *strides: int) -> tuple[int, ...]:
        """Side of the map after each of these strides in turn."""
        return stage_sides(self.image_size, strides)

    def affordable(self, table: Sequence[tuple[T, int]], *, after: int = 1) -> T:
        """One of the values of (value, total stride) that leave a position after ``after`` more, else the smallest."""
        fitting = [value for value, stride in table if stride * after <= self.image_size]
        return self.choose(fitting or [min(table, key=lambda entry: entry[1])[0]])

    def widths(
        self,
        ratios: Sequence[float],
        *,
        depths: Sequence[int],
        sides: Sequence[int],
        per_block: float,
        multiple: int = 8,
    ) -> tuple[int, ...]:
        """Widths of the stages, log-uniformly among those that fit the limits.

        A block of width w on a map of side s has about ``per_block * w**2`` weights and uses each s**2 times. This
        leads close to the limits; whether they are kept is decided by counting.
        """
        shares = [depth * ratio * ratio for depth, ratio in zip(depths, ratios, strict=True)]
        weights = per_block * sum(shares)
        uses = per_block * sum(share * side * side for share, side in zip(shares, sides, strict=True))
        low = math.sqrt(self.limits.parameters[0] / weights)
        high = math.sqrt(min(self.limits.parameters[1] / weights, self.limits.macs / uses))
        first = self._width(low, high, multiple)
        return tuple(round_to(first * ratio, multiple) for ratio in ratios)

    def _width(self, low: float, high: float, multiple: int) -> int:
        """A width from low to high, log-uniformly; the next one below, or the least, where there is none."""
        grid = [width for width in WIDTHS if width % multiple == 0]
        inside = [width for width in grid if low <= width <= high]
        return self.choose(inside) if inside else max((width for width in grid if width <= high), default=grid[0])
