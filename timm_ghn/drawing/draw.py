"""A graph into a file, the kind of which its name says."""

from __future__ import annotations

import importlib
from pathlib import Path

from timm_ghn.drawing.layout import layout_graph
from timm_ghn.drawing.page import write_page
from timm_ghn.errors import ConfigError
from timm_ghn.files import check_output
from timm_ghn.graph.graph import Graph

#: Ends of the names of files that a graph can be drawn into.
SUFFIXES = ('.png', '.pdf', '.svg', '.html')
_PAGE = '.html'


def draw_graph(graph: Graph, path: str | Path, *, title: str = '', virtual_edges: int = 1) -> None:
    """Draw the graph of a network: layers from top to bottom, folded into columns; a colour for each kind of node.

    Args:
        graph: What :func:`timm_ghn.trace` gives.
        path: The file (.png, .pdf, .svg, or .html: one page to zoom in, which needs no network); one that exists is
            replaced.
        title: Stands above the picture.
        virtual_edges: Virtual edges up to this length are drawn too (arXiv 2110.13100, section 4.1); 1: none.

    Raises:
        ConfigError: if the file's name ends otherwise, ``virtual_edges`` is not positive, or an image is asked for
            and matplotlib is not installed.
        OSError: if the file cannot be written.
    """
    path = Path(path)
    check_picture(path)
    if virtual_edges < 1:
        raise ConfigError(f'expected virtual_edges of 1 or more (got {virtual_edges})')
    virtual = [] if virtual_edges == 1 else (graph.distances_NN(virtual_edges) > 1).nonzero().tolist()
    draw = write_page
    if path.suffix.lower() != _PAGE:
        from timm_ghn.drawing.figure import draw_figure as draw
    draw(graph, layout_graph(graph), path, title=title, virtual=virtual)


def check_picture(path: Path) -> None:
    """Refuse a file that a graph cannot be drawn into, before a network is built for it.

    Raises:
        ConfigError: if its name ends otherwise than in :data:`SUFFIXES`, or it needs matplotlib and there is none.
        OSError: if it cannot be written.
    """
    check_output(path, SUFFIXES)
    if path.suffix.lower() != _PAGE:
        importlib.import_module('timm_ghn.plots')  # without matplotlib it says what to install
