"""Layered drawing of a directed graph (Sugiyama, Tagawa and Toda 1981): an order in each layer, then places.

The libraries that do this are under the GPL or need programs of the system; a network's graph is so narrow that little
is needed: sweeps that sort each layer by the means of its neighbours, and sweeps that place it near them.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

#: Sweeps down and up over all layers, for the order and for the places.
_SWEEPS = 6

#: Least distance in a layer of two nodes, and of a line from anything else.
_NODE, _LINE = 1.0, 0.85


class Layering:
    """Nodes in layers, and edges as chains of points with one in each layer between their ends.

    Attributes:
        x: Place of each point within its layer: first the nodes, then the turns of edges.
        layer: Layer of each point.
        chains: For each edge its points, from the source to the target.

    Args:
        layers: Layer of each node.
        edges: Source and target of each edge; the target's layer is the lower one, with the larger number.
    """

    def __init__(self, layers: Sequence[int], edges: Sequence[Sequence[int]]) -> None:
        self.layer = list(layers)
        self._nodes = len(layers)
        self.chains: list[list[int]] = []
        for source, target in edges:
            between = range(layers[source] + 1, layers[target])
            turns = range(len(self.layer), len(self.layer) + len(between))
            self.layer += between
            self.chains.append([source, *turns, target])
        self._above: list[list[int]] = [[] for _ in self.layer]
        self._below: list[list[int]] = [[] for _ in self.layer]
        for chain in self.chains:
            for a, b in itertools.pairwise(chain):
                self._below[a].append(b)
                self._above[b].append(a)
        self._rows: list[list[int]] = [[] for _ in range(max(self.layer, default=0) + 1)]
        for point, layer in enumerate(self.layer):
            self._rows[layer].append(point)
        self.x = [0.0] * len(self.layer)
        for row in self._rows:
            self._place(row, [float(at) for at in range(len(row))])
        self._order()
        for sweep in range(2 * _SWEEPS + 1):
            down = sweep % 2 == 0
            for row in self._rows if down else self._rows[::-1]:
                self._place(row, self._wanted(row, down))

    def _order(self) -> None:
        """Sort each layer by its neighbours in the one before, down and up in turns; keep what crosses least."""
        best, fewest = [list(row) for row in self._rows], self._crossings()
        for sweep in range(2 * _SWEEPS):
            down = sweep % 2 == 0
            for row in self._rows if down else self._rows[::-1]:
                wanted = dict(zip(row, self._wanted(row, down), strict=True))
                row.sort(key=wanted.__getitem__)
                self._place(row, [float(at) for at in range(len(row))])
            crossings = self._crossings()
            if crossings < fewest:
                best, fewest = [list(row) for row in self._rows], crossings
        self._rows = best
        for row in self._rows:
            self._place(row, [float(at) for at in range(len(row))])

    def _crossings(self) -> int:
        """How many pairs of lines between two layers cross."""
        count = 0
        for row in self._rows:
            lines = sorted((self.x[a], self.x[b]) for a in row for b in self._below[a])
            count += sum(b0 > b1 and a0 < a1 for (a0, b0), (a1, b1) in itertools.combinations(lines, 2))
        return count

    def _wanted(self, row: Sequence[int], down: bool) -> list[float]:
        """For each point of a layer, the mean place of its neighbours in the layer before it; its own without any."""
        near = self._above if down else self._below
        return [
            sum(self.x[other] for other in near[point]) / len(near[point]) if near[point] else self.x[point]
            for point in row
        ]

    def _place(self, row: Sequence[int], wanted: Sequence[float]) -> None:
        """Place a layer in its order, as near to the wanted places as the distances allow (least squares).

        Where points come too close, they and their neighbours move together: pooling of adjacent violators.
        """
        offset, groups = 0.0, []  # each group: sum of what its points want, and their number
        offsets = []
        for before, point, want in zip([None, *row], row, wanted, strict=False):
            if before is not None:
                offset += _NODE if max(before, point) < self._nodes else _LINE
            offsets.append(offset)
            groups.append((want - offset, 1))
            while len(groups) > 1 and groups[-2][0] / groups[-2][1] >= groups[-1][0] / groups[-1][1]:
                total, number = groups.pop()
                groups[-1] = groups[-1][0] + total, groups[-1][1] + number
        places = itertools.chain.from_iterable([total / number] * number for total, number in groups)
        for point, place, offset in zip(row, places, offsets, strict=True):
            self.x[point] = place + offset
