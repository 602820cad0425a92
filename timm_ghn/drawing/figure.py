"""A graph as an image, drawn by matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.collections import LineCollection, PathCollection
from matplotlib.lines import Line2D
from matplotlib.path import Path as Curve

from timm_ghn.drawing.layout import GraphLayout, arc
from timm_ghn.drawing.legend import KINDS
from timm_ghn.graph.graph import Graph
from timm_ghn.plots import new_figure

#: Inches between two layers.
_UNIT = 0.14


def draw_figure(
    graph: Graph, layout: GraphLayout, path: Path, *, title: str, virtual: Sequence[tuple[int, int]] = ()
) -> None:
    """Draw a graph into an image file, whose end says which kind; virtual edges faintly."""
    width, height = layout.size
    figure = new_figure((max(_UNIT * (width + 1), 6), _UNIT * (height + 2) + 1), title)
    axis = figure.subplots()
    lines = [points for _, points in layout.lines]
    axis.add_collection(LineCollection(lines, colors='#888888', linewidths=0.7, zorder=1))
    places = layout.points
    for arcs, colour, alpha in (
        ([arc(places[a], places[b]) for a, b in virtual], '#1f5fa8', 0.12),
        ([points for _, points in layout.arcs], '#888888', 0.35),
    ):
        curves = [Curve(points, [Curve.MOVETO, Curve.CURVE3, Curve.CURVE3]) for points in arcs]
        collection = PathCollection(curves, facecolors='none', edgecolors=colour, alpha=alpha, linewidths=0.5, zorder=0)
        axis.add_collection(collection)
    # One collection for each kind: its points are the nodes of that kind.
    handles = []
    for kind, (name, colour) in KINDS.items():
        own = [point for node, point in zip(graph.nodes, places, strict=True) if node.primitive is kind]
        if own:
            xs, ys = zip(*own, strict=True)
            edge: dict[str, Any] = {'color': colour, 'markeredgecolor': '#333333', 'markeredgewidth': 0.4}
            axis.scatter(xs, ys, s=30, color=colour, edgecolors='#333333', linewidths=0.4, zorder=2)
            handles.append(Line2D([], [], linestyle='', marker='o', label=f'{name} ({len(own):,})', **edge))
    for (x, y), text in layout.labels:
        axis.text(x, y, text, fontsize=5.5, va='center', color='#333333', parse_math=False)
    axis.set(xlim=(-1, width), ylim=(height, -1), aspect='equal', anchor='N')
    axis.set_axis_off()
    columns = max(1, min(len(handles), int(figure.get_figwidth() / 1.9)))
    figure.legend(handles=handles, loc='outside lower center', ncols=columns, fontsize=7, frameon=False)
    figure.savefig(path, dpi=150)
