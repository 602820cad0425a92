"""Whether two networks have the same graph but for the order of its nodes."""

from __future__ import annotations

import hashlib

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


def is_isomorphic(first: NetRecord, second: NetRecord) -> bool:
    """Whether a one-to-one map keeps primitives and edges."""
    import networkx  # torch needs it, too

    graphs = []
    for record in (first, second):
        graph = networkx.DiGraph(record.edges)
        graph.add_nodes_from((node, {'colour': colour}) for node, colour in enumerate(_colours(record)))
        graphs.append(graph)
    return bool(networkx.vf2pp_is_isomorphic(*graphs, node_label='colour'))
