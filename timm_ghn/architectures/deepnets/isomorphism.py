"""Whether two networks have the same graph but for the order of its nodes."""

from __future__ import annotations

import hashlib
from collections import Counter

from timm_ghn.architectures.deepnets.records import NetRecord

#: Rounds of the Weisfeiler-Lehman refinement: how far a node looks.
ROUNDS = 4


def _colours(record: NetRecord) -> list[str]:
    """A digest of each node's surroundings: two nodes that an isomorphism maps to each other have one."""
    before, behind = record.neighbours
    colours = list(record.primitives)
    for _ in range(ROUNDS):
        colours = [
            _digest([own, '<', *sorted(colours[p] for p in before[v]), '>', *sorted(colours[s] for s in behind[v])])
            for v, own in enumerate(colours)
        ]
    return colours


def _digest(parts: list[str]) -> str:
    return hashlib.blake2b(' '.join(parts).encode(), digest_size=8).hexdigest()


def wl_hash(record: NetRecord) -> str:
    """Weisfeiler-Lehman hash of a graph: equal for isomorphic ones, and rarely for others."""
    return _digest(sorted(_colours(record)))


def is_isomorphic(first: NetRecord, second: NetRecord, *, most: int = 100_000) -> bool:
    """Whether a one-to-one map keeps primitives and edges.

    Nodes of the first graph are mapped one after the other, in its topological order, to free nodes of the same colour
    whose predecessors are those that the node's own predecessors went to; where none is left, the search goes back.

    Args:
        first: A network.
        second: Another.
        most: Steps after which the search ends with True: a network too many is left out rather than kept.
    """
    colours, other = _colours(first), _colours(second)
    if Counter(colours) != Counter(other) or len(first.edges) != len(second.edges):
        return False
    before, _ = first.neighbours
    before_other = [frozenset(nodes) for nodes in second.neighbours[0]]
    by_colour: dict[str, list[int]] = {}
    for node, colour in enumerate(other):
        by_colour.setdefault(colour, []).append(node)
    image: list[int] = []
    used: set[int] = set()
    choices: list[list[int]] = []
    for _ in range(most):
        if len(image) == len(colours):
            return True
        if len(choices) == len(image):
            node = len(image)
            wanted = frozenset(image[p] for p in before[node])
            choices.append([x for x in by_colour[colours[node]] if x not in used and before_other[x] == wanted])
        if choices[-1]:
            image.append(choices[-1].pop())
            used.add(image[-1])
        else:
            choices.pop()
            if not choices:
                return False
            used.discard(image.pop())
    return True
