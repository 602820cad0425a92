"""Whether a graph is sound, judged by what autograd recorded of the network."""

from __future__ import annotations

from collections.abc import Iterable

from torch import argsort

from timm_ghn.graph.flow import Flow
from timm_ghn.graph.graph import Graph
from timm_ghn.graph.paths import neighbours, reachable
from timm_ghn.graph.primitives import CONVOLUTIONS, Primitive
from timm_ghn.graph.vocabulary import MULTIPLIES

WEIGHTS = (*CONVOLUTIONS, Primitive.BN, Primitive.LN, Primitive.BIAS)


def flaws_of(graph: Graph, flow: Flow) -> list[str]:
    """What is wrong with a graph, in words; empty if it is sound.

    - It is acyclic and has one input, from which all nodes but positional encodings are reached.
    - It has no more ends than the network has outputs, and no weight without a predecessor.
    - Of two weights, one comes after the other in the graph exactly if it does in the network.
    - The class predictor decodes the classifier, and that has as many outputs as there are classes.

    Args:
        graph: The graph of a network, by any rules.
        flow: How data flows through the network.
    """
    if not graph.is_acyclic:
        return ['cyclic', *_head_flaws(graph)]
    return [*_shape_flaws(graph, len(flow.recording.outputs)), *_order_flaws(graph, flow), *_head_flaws(graph)]


def _shape_flaws(graph: Graph, outputs: int) -> list[str]:
    flaws = []
    predecessors, successors = neighbours(len(graph), graph.edges_E2.tolist())
    inputs = [i for i, node in enumerate(graph.nodes) if node.primitive is Primitive.INPUT]
    if len(inputs) != 1:
        flaws.append(f'{len(inputs)} inputs')
    sources = {i for i, node in enumerate(graph.nodes) if node.primitive is Primitive.POS_ENC}
    cut_off = set(range(len(graph))) - reachable(inputs, successors.__getitem__) - sources
    if cut_off:
        flaws.append(f'not reached from the input: {_labels(graph, cut_off)}')
    ends = [i for i in range(len(graph)) if not successors[i]]
    if len(ends) > outputs:
        flaws.append(f'{len(ends)} ends for {outputs} outputs: {_labels(graph, ends)}')
    orphans = [i for i, node in enumerate(graph.nodes) if node.primitive in WEIGHTS and not predecessors[i]]
    if orphans:
        flaws.append(f'weights without an input: {_labels(graph, orphans)}')
    return flaws


def _head_flaws(graph: Graph) -> list[str]:
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


def _order_flaws(graph: Graph, flow: Flow) -> list[str]:
    """Compare the order of the weights in the graph with that in the network. Sets of weights are bit masks."""
    bit, met, beside, aside = _weights_before(flow)
    predecessors, _ = neighbours(len(graph), graph.edges_E2.tolist())
    known, reach = 0, [0] * len(graph)
    for node in graph.nodes:
        known |= bit.get(node.parameter or '', 0)
    for i in argsort(graph.forward_levels_N, stable=True).tolist():
        for p in predecessors[i]:
            reach[i] |= reach[p] | bit.get(graph.nodes[p].parameter or '', 0)
    constant = sum(bit.get(name, 0) for name in aside)
    lost, invented = set(), set()
    for i, node in enumerate(graph.nodes):
        name = node.parameter
        if name not in bit or node.primitive is Primitive.POS_ENC:
            continue
        if name in aside:  # the image must not flow through it
            wrong = reach[i] & ~constant
        else:
            right = met[name] & known
            wrong = reach[i] & ~right & ~beside[name]
            if right & ~reach[i]:
                lost.add(i)
        if wrong:
            invented.add(i)
    found = (('behind a weight but not so in the graph', lost), ('in the graph only behind a weight', invented))
    return [f'{what}: {_labels(graph, nodes)}' for what, nodes in found if nodes]


def _weights_before(flow: Flow) -> tuple[dict[str, int], dict[str, int], dict[str, int], set[str]]:
    """Follow the image through the recorded ops; a parameter joins it at the first op that has image data.

    Returns:
        Of each parameter that the network uses once its bit, all parameters that the data met before, and all that
        join the data at the same op; the parameters of a network that computes from constants only, such as positions.
    """
    ops, order = flow.ops, flow.order
    image = [False] * len(ops)
    carried: list[set[str]] = [set() for _ in ops]
    sites: dict[str, list[int]] = {}
    aside: set[str] = set()
    for i in order:
        children = ops[i].children
        image[i] = ops[i].reads_image or any(image[child] for child in children)
        joining = set(ops[i].parameters).union(*(carried[child] for child in children if not image[child]))
        if not image[i]:
            carried[i] = joining
            # A chain of ops that computes from constants only and multiplies is a network of its own: its weights have
            # no place in the order along the image, but come before all that their result meets.
            aside |= joining if ops[i].kind in MULTIPLIES or joining & aside else set()
            continue
        for name in joining:
            sites.setdefault(name, []).append(i)
    bit = {name: 1 << k for k, name in enumerate(name for name, where in sites.items() if len(where) == 1)}
    here, met = [0] * len(ops), [0] * len(ops)
    for name, own in bit.items():
        here[sites[name][0]] |= own
    for i in order:
        for child in ops[i].children:
            met[i] |= met[child] | here[child]
    before, beside = ({name: sets[sites[name][0]] for name in bit} for sets in (met, here))
    return bit, before, beside, aside


def _labels(graph: Graph, nodes: Iterable[int]) -> str:
    """At most four of them by name."""
    names = [graph.nodes[i].label for i in sorted(nodes)]
    return ', '.join(names[:4]) + (f' and {len(names) - 4} more' if len(names) > 4 else '')
