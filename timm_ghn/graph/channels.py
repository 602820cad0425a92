"""Which channels of a weight are the same as those of the layers around it, read off the graph.

A decoder that gives each channel a code wants channel c to mean the same on both sides of a connection. Where a layer
puts out queries, keys and values one after the other, or reads an image, or only the channels of its own group, the
row and column numbers of its weight are not those of the channels; a :class:`ChannelLayout` says which they are.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from timm_ghn.graph.graph import Graph, Node
from timm_ghn.graph.primitives import CONVOLUTIONS, Primitive
from timm_ghn.graph.vocabulary import encoded_position, positional_size

#: What a weight with two channel axes can be.
ROLES = ('dense', 'conv', 'depthwise', 'stem', 'position', 'head')

#: Most channels of an image; a layer that reads more directly from the input reads patches, as a linear layer does.
_IMAGE_CHANNELS = 4

_NORMS = (Primitive.BN, Primitive.LN, Primitive.BIAS)


@dataclasses.dataclass(frozen=True, slots=True)
class ChannelLayout:
    """How rows and columns of a weight are numbered.

    Attributes:
        role: One of :data:`ROLES`.
        rows: Parts of equal size, each with rows numbered from the first channel: 3 for fused queries, keys, values.
        columns: The same for the columns: 4 for a layer that reads four neighbouring positions at once.
        groups: Of a grouped convolution: rows and columns of group g belong to the g-th part of the channels.
    """

    role: str = 'dense'
    rows: int = 1
    columns: int = 1
    groups: int = 1


#: One part, one group: row r and column c are the channels r and c.
PLAIN = ChannelLayout()


@dataclasses.dataclass(frozen=True, slots=True)
class _Channels:
    """Channels that leave a node: their number, after how many their numbering begins again, whether an image's."""

    width: int
    period: int
    image: bool = False


def channel_layouts(graph: Graph) -> tuple[ChannelLayout, ...]:
    """The layout of the weight of each node; the default one where a node has no such weight."""
    sources: list[list[int]] = [[] for _ in graph.nodes]
    targets: list[list[int]] = [[] for _ in graph.nodes]
    for source, target in graph.edges_E2.tolist():
        sources[target].append(source)
        targets[source].append(target)
    shapes = {info.name: info.shape for info in graph.parameters}
    left: list[_Channels | None] = [None] * len(graph)
    found = [PLAIN] * len(graph)
    for index, node in enumerate(graph.nodes):
        # In a cycle, what comes later is not known yet.
        entering = [channels for source in sources[index] if (channels := left[source]) is not None]
        widest = max(entering, key=lambda channels: channels.width, default=None)
        shape = shapes.get(node.parameter or '')
        if node.primitive is Primitive.INPUT:
            left[index] = _Channels(graph.input_size[0], graph.input_size[0], image=True)
        elif node.primitive is Primitive.POS_ENC and shape and node.shape:
            if positional_size(shape) and node.shape == encoded_position(shape):
                found[index] = ChannelLayout('position')
            left[index] = _Channels(node.shape[1], node.shape[1])
        elif node.shape and node.primitive in CONVOLUTIONS and shape:
            queries = len(shape) == 2 and _meets_attention(index, graph.nodes, targets)
            found[index] = layout = _layout(
                node.kernel or shape, widest, head=node.parameter in graph.class_weights, queries=queries
            )
            left[index] = _Channels(node.shape[0], node.shape[0] // layout.rows)
        elif node.shape and node.primitive in _NORMS:
            repeats = widest is not None and not node.shape[0] % widest.period
            period = widest.period if widest and repeats else node.shape[0]
            left[index] = _Channels(node.shape[0], period, widest is not None and widest.image)
        elif node.primitive is Primitive.CONCAT:
            width = sum(channels.width for channels in entering)
            left[index] = _Channels(width, width) if entering else None
        elif node.primitive is Primitive.MSA and widest is not None:
            left[index] = _Channels(widest.period, widest.period)
        else:
            left[index] = widest
    return tuple(found)


def _layout(shape: Sequence[int], entering: _Channels | None, *, head: bool, queries: bool) -> ChannelLayout:
    """Layout of a weight (out, in, ...) that reads some channels."""
    outputs, inputs = shape[:2]
    if head:
        return ChannelLayout('head')
    if entering is not None and entering.image and inputs == entering.width <= _IMAGE_CHANNELS:
        return ChannelLayout('stem')
    spatial = math.prod(shape[2:]) > 1
    if len(shape) > 2 and inputs == 1:
        return ChannelLayout('depthwise')
    role = 'conv' if spatial else 'dense'
    rows = outputs // inputs if queries and outputs in (2 * inputs, 3 * inputs) else 1
    if entering is None:
        return ChannelLayout(role, rows)
    groups, columns = 1, 1
    if len(shape) > 2 and inputs < entering.width and not entering.width % inputs:
        groups = entering.width // inputs
        groups = 1 if outputs % groups else groups
    elif inputs in (entering.width, 4 * entering.width) and not inputs % entering.period:
        columns = inputs // entering.period
        columns = columns if columns <= 4 else 1
    return ChannelLayout(role, rows, columns, groups)


def _meets_attention(index: int, nodes: Sequence[Node], targets: Sequence[Sequence[int]]) -> bool:
    """Whether the outputs of a node become queries, keys or values: through biases and norms alone."""
    pending = list(targets[index])
    while pending:
        at = pending.pop()
        if nodes[at].primitive is Primitive.MSA:
            return True
        if nodes[at].primitive in _NORMS:
            pending += targets[at]
    return False
