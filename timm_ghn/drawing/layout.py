"""Where the nodes and edges of a graph are drawn: in layers from top to bottom, folded into columns as text is.

Networks are long and narrow: hundreds of layers of a few nodes. fast-sugiyama lays them out as a long strip, which is
then cut into columns.
"""

from __future__ import annotations

import bisect
import dataclasses
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

from timm_ghn.drawing.legend import KINDS
from timm_ghn.errors import ConfigError, printable
from timm_ghn.graph.graph import Graph, Node

try:
    from fast_sugiyama import from_edges
except ImportError as error:
    raise ConfigError(
        "a picture of a graph needs fast-sugiyama: pip install 'timm-ghn[draw]', or leave --plot out"
    ) from error

Point = tuple[float, float]

#: Space beside a line; nodes take 1.
_LINE = 0.85

#: Edges over more layers are arcs: leading all of them around nodes makes DenseNets as wide as they are long.
_LONGEST = 16

#: Graphs of more nodes get a label for each block, not for each layer.
_ALL_LABELS = 250

#: Width over height that the columns are chosen for.
_RATIO = 1.5

#: Most columns.
_COLUMNS = 60

#: Width of a character of a label, and of the space between columns. Layers are 1 apart.
_CHARACTER, _GAP = 0.42, 2.0


@dataclasses.dataclass(frozen=True)
class GraphLayout:
    """Places in a picture whose y grows downwards; layers of a graph are 1 apart.

    Attributes:
        points: Place of each node.
        lines: Edges as polylines, with the number of the edge; one that leaves its column has a line in each.
        arcs: Long edges, with the number of the edge: see :func:`arc`.
        labels: Texts to the right of a column, with the places where they begin.
        size: Width and height of all of it.
    """

    points: tuple[Point, ...]
    lines: tuple[tuple[int, tuple[Point, ...]], ...]
    arcs: tuple[tuple[int, tuple[Point, Point, Point]], ...]
    labels: tuple[tuple[Point, str], ...]
    size: tuple[float, float]


def layout_graph(graph: Graph) -> GraphLayout:
    """Find a place for each node and edge of a graph."""
    layers = graph.forward_levels_N.tolist()
    edges: list[list[int]] = graph.edges_E2.tolist()
    routed = [number for number, (a, b) in enumerate(edges) if 0 < layers[b] - layers[a] <= _LONGEST]
    places, lines = _strip(layers, [(edges[number][0], edges[number][1]) for number in routed])
    rows = [int(y) for _, y in places]
    columns = _Columns.fitting([*places, *(point for line in lines for point in line)], _labels(graph, rows))
    points = tuple(map(columns.place, places))
    pieces = ((number, piece) for number, line in zip(routed, lines, strict=True) for piece in columns.pieces(line))
    long = sorted(set(range(len(edges))).difference(routed))
    arcs = ((number, arc(*(points[node] for node in edges[number]))) for number in long)
    return GraphLayout(points, tuple(pieces), tuple(arcs), columns.labels(), columns.size)


def _strip(layers: Sequence[int], edges: Sequence[tuple[int, int]]) -> tuple[list[Point], list[list[Point]]]:
    """Places of nodes in a strip by Sugiyama's method, and the polyline of each edge to a layer of a larger number.

    Parts without an edge between them stand side by side, nodes without any edge in a column of their own.
    """
    names = sorted({node for edge in edges for node in edge})  # fast-sugiyama numbers turns from their count on
    number_of = {node: number for number, node in enumerate(names)}
    found: Any = from_edges(
        [(number_of[source], number_of[target]) for source, target in edges],
        minimum_length=1,
        vertex_spacing=1,
        dummy_size=_LINE,
        dummy_vertices=True,
        ranking_type='up',
        check_layout=False,
    )
    places: list[Point | None] = [None] * len(layers)
    lines: dict[tuple[int, int], list[Point]] = {}
    left = 0.0
    for positions, width, _, links in found:
        y_first = max(y for _, (_, y) in positions)  # y grows upwards
        at = {point: (x + left, float(y_first - y)) for point, (x, y) in positions}
        next_of = {a: b for a, b in links if a >= len(names)}
        for source, point in links:
            if source < len(names):
                line = [at[source], at[point]]
                while point >= len(names):
                    point = next_of[point]
                    line.append(at[point])
                lines[names[source], names[point]] = line
        for point, place in at.items():
            if point < len(names):
                places[names[point]] = place
        left += width + 1
    alone = [(left, float(layer)) for layer in layers]
    return [place or alone[node] for node, place in enumerate(places)], [lines[edge] for edge in edges]


def arc(start: Point, end: Point) -> tuple[Point, Point, Point]:
    """Start, control point and end of a quadratic Bézier curve, which passes by the nodes between the two."""
    (x0, y0), (x1, y1) = start, end
    bend = 0.5 + 0.25 * math.dist(start, end) if x0 == x1 else 0.0
    return start, ((x0 + x1) / 2 - min(bend, _LONGEST / 2), (y0 + y1) / 2), end


def name_of(node: Node) -> str:
    """What a person calls a node: its parameter, or its kind of operator."""
    return printable(node.parameter) if node.parameter else KINDS[node.primitive][0]


def _labels(graph: Graph, layers: Sequence[int]) -> dict[int, str]:
    """Text for each layer; in large graphs for the first layer of each block."""
    shapes = {info.name: 'x'.join(map(str, info.shape)) for info in graph.parameters}
    labels: dict[int, str] = {}
    named: set[str] = set()
    for node, layer in zip(graph.nodes, layers, strict=True):
        if len(graph) <= _ALL_LABELS:
            text = name_of(node).removesuffix('.weight')
            if node.parameter and layer not in labels:
                text += f'  {shapes[node.parameter]}'
            labels[layer] = f'{labels[layer]},  {text}' if layer in labels else text
        elif node.parameter and (block := _block(node.parameter)) not in named:
            named.add(block)
            labels.setdefault(layer, printable(block))
    return {layer: text if len(text) <= 60 else f'{text[:57]}...' for layer, text in labels.items()}


def _block(name: str) -> str:
    """The block of a parameter, up to the second number (else name with a digit): 'layers.2.blocks.3', 'layer3.12'."""
    parts = name.split('.')[:-1]
    numbers = [place for place, part in enumerate(parts, 1) if part.isdigit()]
    numbers = numbers or [place for place, part in enumerate(parts, 1) if re.search(r'\d', part)] or [1]
    return '.'.join(parts[: numbers[:2][-1]]) or name


class _Columns:
    """The strip, with all points that are drawn and texts of layers, cut into columns of equally many layers."""

    def __init__(self, points: Sequence[Point], labels: dict[int, str], count: int) -> None:
        self._texts = labels
        self.rows = math.ceil((max(y for _, y in points) + 1) / count)
        xs: list[list[float]] = [[] for _ in range(count)]
        for x, y in points:
            xs[int(y) // self.rows].append(x)
        characters = [0] * count
        for layer, text in labels.items():
            column = layer // self.rows
            characters[column] = max(characters[column], len(text))
        self._least = [min(own, default=0.0) for own in xs]
        self._left, self._right = [0.0], []
        for own, least, wide in zip(xs, self._least, characters, strict=True):
            self._right.append(self._left[-1] + max(own, default=0.0) - least)
            self._left.append(self._right[-1] + wide * _CHARACTER + _GAP)
        self.size = (self._left[-1], float(self.rows))

    @classmethod
    def fitting(cls, points: Sequence[Point], labels: dict[int, str]) -> _Columns:
        """As many columns as make the picture neither long nor wide."""
        most = min(_COLUMNS, int(max(y for _, y in points)) + 1)
        tried = (cls(points, labels, count) for count in range(1, most + 1))
        return min(tried, key=lambda columns: abs(math.log(columns.size[0] / columns.size[1] / _RATIO)))

    def place(self, point: Point, column: int | None = None) -> Point:
        """Place of a point of the strip, in its own column or another."""
        x, y = point
        column = int(y) // self.rows if column is None else column
        return x - self._least[column] + self._left[column], y - column * self.rows

    def pieces(self, line: Sequence[Point]) -> Iterator[tuple[Point, ...]]:
        """A line of the strip as one line for each column: it ends below the last row, and goes on above the first."""
        cuts = [column * self.rows - 0.5 for column in range(1, int(line[-1][1]) // self.rows + 1)]
        points = list(line)
        for cut in cuts:
            at = bisect.bisect([y for _, y in points], cut)
            if not 0 < at < len(points):
                continue
            (x0, y0), (x1, y1) = points[at - 1], points[at]
            x = x0 + (x1 - x0) * (cut - y0) / (y1 - y0)
            column = round((cut + 0.5) / self.rows)
            yield tuple(self.place(point, column - 1) for point in (*points[:at], (x, cut)))
            points = [(x, cut), *points[at:]]
        yield tuple(self.place(point, int(points[-1][1]) // self.rows) for point in points)

    def labels(self) -> tuple[tuple[Point, str], ...]:
        """Texts, and where they begin."""
        return tuple(
            ((self._right[layer // self.rows] + 0.6, float(layer % self.rows)), text)
            for layer, text in self._texts.items()
        )
