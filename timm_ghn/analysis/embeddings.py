"""Embeddings of whole networks."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from timm_ghn.graph.graph import Graph
from timm_ghn.nn.ghn import GHN

#: Graphs that are encoded together: the attention of a Graphormer is as large as the largest of them for each.
_TOGETHER = 16


@torch.no_grad()
def graph_embeddings(ghn: GHN, graphs: Iterable[Graph]) -> Tensor:
    """Embed networks: the mean over the nodes of their encoded states, as in arXiv 2110.13100.

    Args:
        ghn: The GHN.
        graphs: Of the networks, see :func:`timm_ghn.trace`; at least one.

    Returns:
        (G, d) on the device of the GHN, one row for each graph. It depends on no other graph and not on the order in
        which the nodes of the graph are listed.

    Raises:
        ValueError: if there is no graph.
    """
    listed = list(graphs)
    if not listed:
        raise ValueError('expected at least one graph (got none)')
    rows_d: list[Tensor] = []
    for first in range(0, len(listed), _TOGETHER):
        chunk = listed[first : first + _TOGETHER]
        rows_d += [states_nd.mean(0) for states_nd in ghn.encode(chunk).split([len(graph) for graph in chunk])]
    return torch.stack(rows_d)
