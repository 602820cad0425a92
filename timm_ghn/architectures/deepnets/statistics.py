"""Statistics of networks of DeepNets-1M, beside the published ranges."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable

import numpy as np

from timm_ghn.architectures.deepnets.generate import SPLITS
from timm_ghn.architectures.deepnets.records import NetRecord


@dataclasses.dataclass(frozen=True)
class Statistic:
    """A quantity over networks; ``published`` is what the paper's generator allows, empty where nothing is stated."""

    name: str
    mean: float
    least: float
    most: float
    published: str = ''


def statistics(records: Iterable[NetRecord], split: str | None = None) -> list[Statistic]:
    """Nodes, parameters, degrees, path lengths and shares of primitives of networks; one row for each quantity."""
    columns: dict[str, list[float]] = {}
    primitives: Counter[str] = Counter()
    shares: dict[str, list[float]] = {}
    for record in records:
        distances = record.distances_NN()
        reached = distances[distances > 0]
        values = {
            'cells': record.config.n_cells,
            'sums in a cell': len(record.config.genotype.normal) // 2,
            'nodes': len(record),
            'edges': len(record.edges),
            'degree': len(record.edges) / len(record),
            'shortest path, mean': float(reached.mean()) if len(reached) else 0.0,
            'shortest path, longest': float(reached.max(initial=0)),
            'parameters (CIFAR-10), millions': record.num_params.get('cifar10', 0) / 1e6,
            'parameters (ImageNet), millions': record.num_params.get('imagenet', 0) / 1e6,
        }
        for name, value in values.items():
            columns.setdefault(name, []).append(value)
        counts = Counter(primitive.removesuffix('_1x1') for primitive in record.primitives)
        primitives.update(counts)
        for name, count in counts.items():
            shares.setdefault(name, []).append(100 * count / len(record))
    number = len(next(iter(columns.values()), []))
    columns |= {
        f'{name}, % of nodes': shares[name] + [0.0] * (number - len(shares[name]))
        for name, _ in primitives.most_common()
    }
    published = _published(split)
    return [
        Statistic(name, float(np.mean(values)), min(values), max(values), published.get(name, ''))
        for name, values in columns.items()
    ]


def _published(split: str | None) -> dict[str, str]:
    if split not in SPLITS:
        return {}
    ranges = SPLITS[split]
    limit = f'<= {ranges.parameters / 1e6:g}'
    return {
        'cells': f'{ranges.cells[0]}-{ranges.cells[1]}',
        'sums in a cell': f'{ranges.steps[0]}-{ranges.steps[1]}',
        'parameters (CIFAR-10), millions': limit,
        'parameters (ImageNet), millions': limit,
    }
