"""A graph as a page of HTML to zoom in, in one file that needs no network."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from pathlib import Path

from timm_ghn.drawing.layout import GraphLayout, Point
from timm_ghn.drawing.legend import KINDS
from timm_ghn.errors import LONGEST, printable
from timm_ghn.files import atomic_write
from timm_ghn.graph.graph import Graph

_TEMPLATE = Path(__file__).with_name('page.html')


def write_page(
    graph: Graph, layout: GraphLayout, path: Path, *, title: str, virtual: Sequence[tuple[int, int]] = ()
) -> None:
    """Write the page; virtual edges are drawn faintly."""
    shapes = {info.name: info.shape for info in graph.parameters}
    kinds = list(KINDS)
    nodes = [
        {
            'at': _flat([point]),
            'kind': kinds.index(node.primitive),
            'name': printable(node.label),
            'shape': 'x'.join(map(str, shapes[node.parameter] if node.parameter else node.shape or ())),
        }
        for node, point in zip(graph.nodes, layout.points, strict=True)
    ]
    data = {
        'kinds': list(KINDS.values()),
        'nodes': nodes,
        'edges': graph.edges_E2.tolist(),
        'lines': [[number, _flat(points)] for number, points in layout.lines],
        'arcs': [[number, _flat(points)] for number, points in layout.arcs],
        'virtual': list(virtual),
        'labels': [[*_flat([point]), text] for point, text in layout.labels],
        'size': layout.size,
    }
    # Names come from anybody's network: none of them ends the script.
    script = json.dumps(data, ensure_ascii=True, separators=(',', ':')).replace('<', '\\u003c')
    page = _TEMPLATE.read_text(encoding='utf-8')
    page = page.replace('__TITLE__', html.escape(printable(title, LONGEST))).replace('__DATA__', script)
    with atomic_write(path) as part:
        part.write_text(page, encoding='utf-8')


def _flat(points: Sequence[Point]) -> list[float]:
    return [round(number, 2) for point in points for number in point]
