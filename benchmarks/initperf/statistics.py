"""Statistics of paired runs: intervals over architectures and data sets, corrections, profiles, equivalents."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

#: Draws of the bootstrap.
DRAWS = 10_000


@dataclasses.dataclass(frozen=True)
class Interval:
    """A mean over cells.

    Attributes:
        mean: Of the cells.
        low: 2.5 % of the bootstrap's means are below.
        high: 97.5 % of them are.
        p: Two-sided: twice the share of the means on the other side of zero, at least 1 / draws.
    """

    mean: float
    low: float
    high: float
    p: float


def bootstrap(gains: Mapping[tuple[str, str], Sequence[float]], *, draws: int = DRAWS, seed: int = 0) -> Interval:
    """Mean over cells, with architectures, data sets and seeds drawn anew.

    Each draw takes as many architectures and, apart from them, as many data sets as there are, with replacement; a cell
    counts as often as its architecture times its data set. Within a cell it takes as many seeds as there are.

    Args:
        gains: Paired differences of each seed, by (architecture, data set).
        draws: How many.
        seed: Of the draws.
    """
    rng = np.random.default_rng(seed)
    networks, data = (sorted({key[axis] for key in gains}) for axis in (0, 1))
    means = np.zeros((draws, len(networks), len(data)))
    present = np.zeros((len(networks), len(data)))
    for (network, name), values in gains.items():
        place = networks.index(network), data.index(name)
        present[place] = 1
        taken = rng.integers(len(values), size=(draws, len(values)))
        means[:, place[0], place[1]] = np.asarray(values, dtype=float)[taken].mean(axis=1)
    weights_n = rng.multinomial(len(networks), np.full(len(networks), 1 / len(networks)), size=draws)
    weights_d = rng.multinomial(len(data), np.full(len(data), 1 / len(data)), size=draws)
    count = np.einsum('bn,nd,bd->b', weights_n, present, weights_d)
    total = np.einsum('bn,bnd,bd->b', weights_n, means, weights_d)
    samples = total[count > 0] / count[count > 0]
    low, high = np.percentile(samples, [2.5, 97.5])
    p = 2 * min(float((samples <= 0).mean()), float((samples >= 0).mean()))
    mean = float(np.mean([np.mean(values) for values in gains.values()]))
    return Interval(mean, float(low), float(high), min(1.0, max(p, 1 / draws)))


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Holm's step-down correction (1979): p values that hold for all arms together."""
    ordered = sorted(p_values, key=lambda name: p_values[name])
    adjusted, highest = {}, 0.0
    for place, name in enumerate(ordered):
        highest = max(highest, min(1.0, (len(ordered) - place) * p_values[name]))
        adjusted[name] = highest
    return adjusted


def performance_profile(
    accuracies: Mapping[str, Mapping[str, float]], ratios: Sequence[float]
) -> dict[str, list[float]]:
    """Performance profiles (Dolan and More, 2002): share of the cells in which an arm is within a ratio of the best.

    Args:
        accuracies: By arm and cell; only the cells that all arms have are counted.
        ratios: The best accuracy by the arm's, at least 1.
    """
    cells = set.intersection(*(set(values) for values in accuracies.values())) if accuracies else set()
    best = {cell: max(values[cell] for values in accuracies.values()) for cell in cells}
    return {
        arm: [sum(best[cell] <= ratio * values[cell] for cell in cells) / max(1, len(cells)) for ratio in ratios]
        for arm, values in accuracies.items()
    }


def steps_to(curve: Sequence[tuple[float, float]], accuracy: float) -> float:
    """First step at which a curve of (step, accuracy), linear in between, reaches an accuracy; infinite if never."""
    before: tuple[float, float] | None = None
    for step, value in curve:
        if value >= accuracy:
            if before is None:
                return float(step)
            return before[0] + (step - before[0]) * (accuracy - before[1]) / (value - before[1])
        before = step, value
    return math.inf


def isotonic(values: Sequence[float]) -> list[float]:
    """Nearest ascending sequence by squares (pool adjacent violators)."""
    blocks: list[list[float]] = []
    for value in values:
        blocks.append([float(value), 1.0])
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            mean, count = blocks.pop()
            other, others = blocks.pop()
            blocks.append([(mean * count + other * others) / (count + others), count + others])
    return [mean for mean, count in blocks for _ in range(int(count))]


def pretraining_equivalent(minutes: Sequence[float], accuracies: Sequence[float], accuracy: float) -> float:
    """Minutes of pretraining after which fine-tuning ends at an accuracy.

    The curve is made ascending and is linear in the logarithm of the minutes between its points.

    Args:
        minutes: Ascending, above 0; images do as well.
        accuracies: What fine-tuning ends at after so many.
        accuracy: Where the start to be measured ends.

    Returns:
        Minutes; 0 if the shortest pretraining ends higher already, infinite if the longest ends lower.
    """
    smooth = isotonic(accuracies)
    if accuracy < smooth[0]:
        return 0.0
    if accuracy > smooth[-1]:
        return math.inf
    for (short, low), (long, high) in zip(
        zip(minutes, smooth, strict=True), zip(minutes[1:], smooth[1:], strict=True), strict=False
    ):
        if low <= accuracy < high:
            return float(short * (long / short) ** ((accuracy - low) / (high - low)))
    return float(minutes[smooth.index(smooth[-1])])
