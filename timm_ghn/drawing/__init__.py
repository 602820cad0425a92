"""Pictures of graphs: :func:`draw_graph` writes an image, or a page to zoom in.

Importing this package without fast-sugiyama is a :class:`ConfigError` that says how to install it.
"""

from timm_ghn.drawing.draw import check_picture as check_picture, draw_graph as draw_graph
