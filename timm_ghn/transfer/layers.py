"""The layers of a network in order, each with its place (stage, block, depth) and the channels that it reads and makes.

A *space* is a set of channels that several layers share: all that read or write one residual stream number its channels
in the same way, so they must select or copy the same ones.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Iterable, Sequence

from torch import nn

from timm_ghn.graph.channels import ChannelLayout, channel_layouts
from timm_ghn.graph.graph import Graph, Node
from timm_ghn.graph.primitives import CONVOLUTIONS, Primitive

_NORMS = (Primitive.BN, Primitive.LN)
_JOINS = (Primitive.SUM, Primitive.CONCAT)
_POOLS = (Primitive.MAX_POOL, Primitive.AVG_POOL)


class Space:
    """Channels that layers share; :meth:`join` makes two spaces one.

    Attributes:
        width: Number of channels.
        blocks: Groups or heads that the channels lie in, one after the other.
        maker: Parameter whose rows they are.
    """

    def __init__(self, width: int, blocks: int = 1, maker: str = '') -> None:
        self.width, self.blocks, self.maker = width, blocks, maker
        self._parent: Space | None = None

    def root(self) -> Space:
        """The space that this one has become part of."""
        space = self
        while space._parent is not None:
            space = space._parent
        return space

    def join(self, other: Space) -> None:
        """Make two spaces of one width the same."""
        first, second = self.root(), other.root()
        if first is not second:
            first.blocks = max(first.blocks, second.blocks)
            second._parent = first


#: Spaces that lie one after the other, as a concatenation puts them.
Axis = tuple[Space, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Layer:
    """A weight, a norm or a positional embedding, and where it stands.

    Attributes:
        name: Its parameter.
        shape: Of the parameter.
        kind: What it is; layers of different kinds have nothing to give each other.
        node: Index of its node.
        level: How often the resolution is halved between it and the last stage.
        run: Place of its run of equally wide blocks among those of the level, from 0 to 1.
        depth: Place of its block in the run, from 0 to 1.
        place: Its place in the block, from 0 to 1.
        enters: Whether its block changes the number of channels or the resolution.
        block: Number of its block.
        signature: Kinds of the layers of its block.
        rows: Channels of its first axis.
        columns: Channels of its second axis; None where these are counted within a group, or there are none.
        flattened: Whether the columns hold all positions of one channel before those of the next.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    node: int
    level: int
    run: float
    depth: float
    place: float
    enters: bool
    block: int
    signature: tuple[str, ...]
    rows: Axis
    columns: Axis | None
    flattened: bool


def layers_of(model: nn.Module, graph: Graph) -> tuple[Layer, ...]:
    """The layers of a traced network, block by block; within a block as the modules list them."""
    layouts = channel_layouts(graph)
    sources: list[list[int]] = [[] for _ in graph.nodes]
    for source, target in graph.edges_E2.tolist():
        sources[target].append(source)
    shapes = {info.name: info.shape for info in graph.parameters}
    order = {info.name: index for index, info in enumerate(graph.parameters)}
    channels = _Channels(model, graph, layouts, sources, shapes)
    gates = _gate_nodes(graph, sources)
    blocks = _blocks(graph)
    stages = _stages(model, graph, blocks, channels)
    members: dict[int, dict[str, int]] = {}
    kinds: dict[int, str] = {}
    for index, node in enumerate(graph.nodes):
        if node.parameter and node.primitive in (*CONVOLUTIONS, *_NORMS, Primitive.POS_ENC):
            attends = any(graph.nodes[source].primitive is Primitive.MSA for source in sources[index])
            kinds[index] = _kind(node, layouts[index], gate=index in gates, attends=attends)
            members.setdefault(blocks[index], {}).setdefault(node.parameter, index)
    found = []
    for block, inside in sorted(members.items()):
        names = sorted(inside, key=order.__getitem__)
        signature = tuple(kinds[inside[name]] for name in names)
        for position, name in enumerate(names):
            index = inside[name]
            level, run, depth, enters = stages[block]
            place = (position + 0.5) / len(names)
            found.append(
                Layer(
                    name, shapes[name], kinds[index], index, level, run, depth, place, enters, block, signature,
                    channels.rows.get(index, ()), channels.columns.get(index), index in channels.flattened,
                )
            )  # fmt: skip
    return tuple(found)


def last_of_branch(graph: Graph, layers: Sequence[Layer]) -> tuple[Layer, ...]:
    """The layers of a residual block that make what is added to its input; empty where a block has no such form."""
    nodes = {layer.node: layer for layer in layers}
    if not nodes:
        return ()
    sources: list[list[int]] = [[] for _ in graph.nodes]
    readers: list[list[int]] = [[] for _ in graph.nodes]
    for source, target in graph.edges_E2.tolist():
        sources[target].append(source)
        readers[source].append(target)
    first = min(nodes)
    end = max(nodes)
    while graph.nodes[end].primitive is not Primitive.SUM:
        if not readers[end]:
            return ()
        end = min(readers[end])
    if not any(source < first for source in sources[end]):
        return ()  # the shortcut has layers of its own
    found, pending = [], [source for source in sources[end] if source >= first]
    while pending:
        at = pending.pop()
        if at in nodes:
            found.append(nodes[at])
        elif at > first:
            before = sources[at]
            # What a gate multiplies comes before the gate.
            pending += before if graph.nodes[at].primitive is not Primitive.CSE else [min(before)]
    return tuple(found)


def _kind(node: Node, layout: ChannelLayout, *, gate: bool, attends: bool) -> str:
    if node.primitive is Primitive.POS_ENC:
        return 'position'
    if node.primitive in _NORMS:
        return f'{node.primitive.name.lower()}{" of a gate" if gate else ""}'
    if gate:
        return 'gate'
    grouped = ' grouped' if layout.groups > 1 else ''
    parts = f' in {layout.rows} parts' if layout.rows > 1 else ''
    return f'{layout.role}{grouped}{parts}{" after attention" if attends else ""}'


def _gate_nodes(graph: Graph, sources: Sequence[Sequence[int]]) -> frozenset[int]:
    """Nodes of the gates of squeeze-and-excite: on the way from what is scaled to what scales it."""
    found: set[int] = set()
    for index, node in enumerate(graph.nodes):
        if node.primitive is not Primitive.CSE or len(sources[index]) != 2:
            continue
        for gate, trunk in (sources[index], sources[index][::-1]):
            chain, at = [], gate
            while at != trunk and len(sources[at]) == 1:
                chain.append(at)
                at = sources[at][0]
            if at == trunk:
                found.update(chain)
    return frozenset(found)


def _blocks(graph: Graph) -> list[int]:
    """Number of the block of each node.

    A block ends with a sum or a concatenation that all paths pass; in a chain of layers each weight begins one.
    """
    farthest = [0] * (len(graph) + 1)  # target of the longest edge that begins before a node
    for source, target in graph.edges_E2.tolist():
        farthest[source + 1] = max(farthest[source + 1], target)
    blocks, weights = [0], 0
    for index in range(1, len(graph)):
        farthest[index] = max(farthest[index], farthest[index - 1])
        before = graph.nodes[index - 1].primitive
        is_weight = graph.nodes[index].primitive in CONVOLUTIONS
        cut = farthest[index - 1] <= index - 1
        new = before is Primitive.CONCAT or (cut and (before in _JOINS or (is_weight and weights > 0)))
        weights = is_weight + (0 if new else weights)
        blocks.append(blocks[-1] + new)
    return blocks


def _stages(
    model: nn.Module, graph: Graph, blocks: Sequence[int], channels: _Channels
) -> list[tuple[int, float, float, bool]]:
    """(level, run, depth, enters) of each block, see :class:`Layer`.

    A run ends where the number of channels or the resolution changes; the level tells where resolutions change, so
    that networks for small and large images agree on it.
    """
    nodes: dict[int, list[int]] = collections.defaultdict(list)
    for index, block in enumerate(blocks):
        nodes[block].append(index)
    keys: list[tuple[int, int, bool]] = []
    level = number = width = 0
    for inside in nodes.values():
        end = graph.nodes[inside[-1]].primitive
        pooled = end is Primitive.MAX_POOL  # halves the resolution of what follows
        body = inside[:-1] if pooled else inside
        halvings = round(math.log2(max((_stride(model, graph.nodes[index]) for index in body), default=1)))
        made = width if end is Primitive.CONCAT else _width(channels.out[inside[-1]])
        enters = halvings > 0 or made != width
        level, number, width = level + halvings, number + enters, made
        keys.append((level, number, enters))
        level, number = level + pooled, number + pooled
    runs: dict[int, list[int]] = collections.defaultdict(list)
    for at, number, _ in keys:
        runs[at] += [] if number in runs[at] else [number]
    length = collections.Counter(number for _, number, _ in keys)
    seen: collections.Counter[int] = collections.Counter()
    found = []
    for at, number, enters in keys:
        run = (runs[at].index(number) + 0.5) / len(runs[at])
        found.append((level - at, run, (seen[number] + 0.5) / length[number], enters))
        seen[number] += 1
    return found


def _stride(model: nn.Module, node: Node) -> int:
    """By how much a node lessens the resolution, as far as the graph and its module tell."""
    if node.primitive in _POOLS:
        return 2 if node.shape is not None and node.shape[2] == 2 else 1
    if node.parameter is None or node.primitive not in CONVOLUTIONS:
        return 1
    stride = getattr(model.get_submodule(node.parameter.rpartition('.')[0]), 'stride', 1)
    return max(stride) if isinstance(stride, tuple) else int(stride)


def _width(axis: Iterable[Space]) -> int:
    return sum(space.root().width for space in axis)


class _Channels:
    """Follows the channels through a graph.

    Attributes:
        out: Channels that leave each node.
        rows: Channels of the first axis of each layer's parameter.
        columns: Channels of its second axis.
        flattened: Layers whose columns hold all positions of a channel one after the other.
    """

    def __init__(
        self,
        model: nn.Module,
        graph: Graph,
        layouts: Sequence[ChannelLayout],
        sources: Sequence[Sequence[int]],
        shapes: dict[str, tuple[int, ...]],
    ) -> None:
        self.model, self.layouts, self.shapes = model, layouts, shapes
        self.out: list[Axis] = []
        self.rows: dict[int, Axis] = {}
        self.columns: dict[int, Axis] = {}
        self.flattened: set[int] = set()
        for index, node in enumerate(graph.nodes):
            entering = [self.out[source] for source in sources[index] if source < index and self.out[source]]
            widest = max(entering, key=_width, default=())
            if node.primitive is Primitive.INPUT:
                self.out.append((Space(graph.input_size[0]),))
            elif node.parameter and node.primitive in CONVOLUTIONS:
                self.out.append(self._weight(index, node, widest))
            elif node.parameter and node.primitive in (*_NORMS, Primitive.POS_ENC) and node.shape:
                width = node.shape[1 if node.primitive is Primitive.POS_ENC else 0]
                self.rows[index] = widest if _width(widest) == width else (Space(width),)
                self.out.append(self.rows[index] if _width(widest) <= width else widest)
            elif node.primitive is Primitive.CONCAT:
                self.out.append(tuple(space for axis in entering for space in axis))
            else:
                if node.primitive in (Primitive.SUM, Primitive.CSE, Primitive.MSA):
                    self._join(entering, widest)
                if node.primitive is Primitive.MSA:
                    for space in widest:
                        space.root().blocks = max(space.root().blocks, self._heads(space.root()))
                self.out.append(widest)

    def _weight(self, index: int, node: Node, entering: Axis) -> Axis:
        assert node.parameter is not None
        layout = self.layouts[index]
        shape = node.kernel or self.shapes[node.parameter]
        outputs, inputs = (*shape, 1)[:2]
        width = _width(entering)
        if layout.role == 'depthwise' and outputs == width:
            self.rows[index] = entering
            return entering
        if layout.groups > 1:
            if len(entering) == 1:
                entering[0].root().blocks = max(entering[0].root().blocks, layout.groups)
        elif layout.role != 'depthwise':
            if len(entering) == 1 and 2 * inputs == width:  # the halves of a gated linear unit
                entering[0].root().width = width = inputs
            known = width and inputs % width == 0
            self.columns[index] = entering if known else (Space(inputs),)
            if known and inputs // width > 4:
                self.flattened.add(index)
        parts = layout.rows
        self.rows[index] = (Space(outputs // parts, layout.groups, node.parameter),)
        return self.rows[index]

    def _join(self, entering: Sequence[Axis], widest: Axis) -> None:
        """Add up or multiply channels: those of equal number are the same."""
        for axis in entering:
            if len(axis) == len(widest):
                for one, other in zip(widest, axis, strict=True):
                    if one.root().width == other.root().width:
                        one.join(other)

    def _heads(self, space: Space) -> int:
        """Heads of the attention whose module holds the layer that makes a space."""
        path = space.maker
        while path:
            path = path.rpartition('.')[0]
            heads = getattr(self.model.get_submodule(path), 'num_heads', None)
            if isinstance(heads, int) and heads > 0 and space.width % heads == 0:
                return heads
        return 1


def blocks_of(layers: Iterable[Layer]) -> dict[int, list[Layer]]:
    """Layers by the number of their block."""
    found: dict[int, list[Layer]] = collections.defaultdict(list)
    for layer in layers:
        found[layer.block].append(layer)
    return found
