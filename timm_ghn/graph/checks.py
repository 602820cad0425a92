"""Whether a graph is sound: judged by what autograd recorded of the network, and not by how the graph was made."""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Iterable

from torch import argsort

from timm_ghn.graph.flow import Flow
from timm_ghn.graph.graph import Graph
from timm_ghn.graph.primitives import Primitive

WEIGHTS = frozenset(
    {Primitive.CONV, Primitive.SEP_CONV, Primitive.DIL_CONV, Primitive.BN, Primitive.LN, Primitive.BIAS}
)

#: Ops that multiply. What only constants have met by then is a network of its own: its weights have no place in the
#: order along the image, but they come before all that their result meets.
MULTIPLIES = ('Mm', 'Addmm', 'Bmm', 'Baddbmm', 'Convolution')


def flaws_of(graph: Graph, flow: Flow) -> list[str]:
    """What is wrong with a graph, in words; empty if it is sound.

    - It is acyclic, has one input, and all leads from it (positional encodings apart) to an output.
    - Each weight stands between its data input and its data output: of two weights, one comes behind the other in the
      graph exactly if it does in the network, as autograd recorded it.
    - The classifier is found.

    Args:
        graph: The graph of a network, by any rules.
        flow: The data's way through the network's recording.
    """
    if not graph.is_acyclic:
        return ['cyclic', *head_flaws(graph)]
    return [*shape_flaws(graph, len(flow.recording.outputs)), *order_flaws(graph, flow), *head_flaws(graph)]


def shape_flaws(graph: Graph, outputs: int) -> list[str]:
    """One connected graph from the input to the outputs."""
    flaws = []
    successors, predecessors = neighbours(graph)
    inputs = [i for i, node in enumerate(graph.nodes) if node.primitive is Primitive.INPUT]
    if len(inputs) != 1:
        flaws.append(f'{len(inputs)} inputs')
    sources = {i for i, node in enumerate(graph.nodes) if node.primitive is Primitive.POS_ENC}
    cut_off = set(range(len(graph))) - reachable(successors, inputs) - sources
    if cut_off:
        flaws.append(f'not reached from the input: {labels(graph, cut_off)}')
    ends = [i for i in range(len(graph)) if not successors[i]]
    if len(ends) > outputs:
        flaws.append(f'{len(ends)} ends for {outputs} outputs: {labels(graph, ends)}')
    orphans = [i for i, node in enumerate(graph.nodes) if node.primitive in WEIGHTS and not predecessors[i]]
    if orphans:
        flaws.append(f'weights without an input: {labels(graph, orphans)}')
    return flaws


def head_flaws(graph: Graph) -> list[str]:
    """The class predictor decodes the classifier, whose weights give as many numbers as there are classes."""
    if graph.num_classes is None:
        return []
    shapes = {info.name: info.shape for info in graph.parameters}
    if not graph.class_weights:
        return [f'no classifier found for {graph.num_classes} classes']
    matrices = {name for name in graph.classifier if len(shapes[name]) > 1 and name in graph.node_of}
    missed = sorted(matrices - {*graph.class_weights})
    return [f'{name} of the classifier is no class weight' for name in missed] + [
        f'classifier {name} of shape {shapes[name]} for {graph.num_classes} classes'
        for name in (*graph.class_weights, *graph.class_biases)
        if shapes[name][0] != graph.num_classes
    ]


def order_flaws(graph: Graph, flow: Flow) -> list[str]:
    """Compare the order of the weights in the graph with that in the network."""
    before = weights_before(flow)
    bit = before.bit
    _, predecessors = neighbours(graph)
    known, reach = 0, [0] * len(graph)
    for node in graph.nodes:
        known |= bit.get(node.parameter or '', 0)
    for i in argsort(graph.forward_levels_N, stable=True).tolist():
        for p in predecessors[i]:
            reach[i] |= reach[p] | bit.get(graph.nodes[p].parameter or '', 0)
    constant = sum(bit.get(name, 0) for name in before.aside)
    lost, invented = Counter[str](), Counter[str]()
    for i, node in enumerate(graph.nodes):
        if node.parameter not in bit or node.primitive is Primitive.POS_ENC:
            continue
        if node.parameter in before.aside:  # the image must not lead through it
            invented[node.parameter] = (reach[i] & ~constant).bit_count()
            continue
        right = before.masks[node.parameter] & known
        lost[node.parameter] = (right & ~reach[i]).bit_count()
        invented[node.parameter] = (reach[i] & ~right & ~before.beside[node.parameter]).bit_count()
    flaws = []
    for what, count in (('behind a weight but not so in the graph', lost), ('in the graph only behind', invented)):
        if count.total():
            name, most = count.most_common(1)[0]
            flaws.append(f'{count.total()} pairs {what} (of {name}: {most})')
    return flaws


@dataclasses.dataclass(frozen=True)
class WeightsBefore:
    """Order of the parameters that a network uses once. Sets of them are bit masks; ``bit`` has that of each.

    ``masks`` has all that the data has met before each parameter, ``beside`` what joins the data at the same place.
    ``aside`` are the parameters of a network that computes from constants only, such as one of positions.
    """

    bit: dict[str, int]
    masks: dict[str, int]
    beside: dict[str, int]
    aside: frozenset[str]


def weights_before(flow: Flow) -> WeightsBefore:
    """Follow the image through the recorded ops; a parameter joins it at the first op that has image data."""
    ops, order = flow.ops, flow.order
    image = [False] * len(ops)
    carried: list[set[str]] = [set() for _ in ops]
    sites: dict[str, list[int]] = defaultdict(list)
    aside: set[str] = set()
    for i in order:
        children = ops[i].children
        image[i] = ops[i].reads_image or any(image[child] for child in children)
        joining = set(ops[i].parameters).union(*(carried[child] for child in children if not image[child]))
        if not image[i]:
            carried[i] = joining
            aside |= joining if ops[i].kind in MULTIPLIES or joining & aside else set()
            continue
        for name in joining:
            sites[name].append(i)
    bit = {name: 1 << k for k, name in enumerate(name for name, where in sites.items() if len(where) == 1)}
    here = [0] * len(ops)
    for name, own in bit.items():
        here[sites[name][0]] |= own
    met = [0] * len(ops)
    for i in order:
        for child in ops[i].children:
            met[i] |= met[child] | here[child]
    return WeightsBefore(bit, {n: met[sites[n][0]] for n in bit}, {n: here[sites[n][0]] for n in bit}, frozenset(aside))


def neighbours(graph: Graph) -> tuple[list[list[int]], list[list[int]]]:
    """Successors and predecessors of each node."""
    successors: list[list[int]] = [[] for _ in graph.nodes]
    predecessors: list[list[int]] = [[] for _ in graph.nodes]
    for source, target in graph.edges_E2.tolist():
        successors[source].append(target)
        predecessors[target].append(source)
    return successors, predecessors


def reachable(successors: list[list[int]], start: Iterable[int]) -> set[int]:
    """Nodes that edges lead to, the start included."""
    stack = list(start)
    found = set(stack)
    while stack:
        new = [s for s in successors[stack.pop()] if s not in found]
        found.update(new)
        stack += new
    return found


def labels(graph: Graph, nodes: Iterable[int]) -> str:
    """A few of them by name."""
    names = [graph.nodes[i].label for i in sorted(nodes)]
    return ', '.join(names[:4]) + (f' and {len(names) - 4} more' if len(names) > 4 else '')
