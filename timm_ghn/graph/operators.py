"""Graph rules for any network, from its operators instead of names and positions.

For the networks that the published rules were made for they give the same graph. Beyond these they read subclasses of
known layers, other normalisations, parameters that a module uses directly, layers that are used several times, gates
and attention in any form.

The graph is built along the data: every op that depends on the image is represented by the parameters that it (or a
chain of ops without data) brings in, or by itself where it is an op of the vocabulary; other ops are transparent.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

from timm_ghn.graph.attention import Attention
from timm_ghn.graph.flow import Flow
from timm_ghn.graph.paths import reachable
from timm_ghn.graph.primitives import Primitive
from timm_ghn.graph.published import Draft, Label, pool_shape
from timm_ghn.graph.vocabulary import MULTIPLIES, operator_primitive, parameter_primitive

#: Ops whose output lies in a fixed interval: a product with one is a gate.
GATES = frozenset({'Sigmoid', 'Hardsigmoid', 'Tanh', 'Hardtanh', 'Clamp', 'Softmax', 'SafeSoftmax'})

#: Readers of a mean that make it a statistic of a normalisation, not a pooling.
STATISTICS = frozenset({'Rsqrt', 'Sqrt', 'Sub', 'Pow', 'Div', 'Reciprocal'})

_PASSES_STATISTICS = frozenset({'Add', 'View', 'Expand', 'Unsqueeze', 'UnsafeView', 'ToCopy'})


class _OperatorRules:
    """Builds the graph of one recording.

    Attributes:
        out: Positions in the draft that hold the output of each op.
        gates: Positions that hold the gate of each product with one.
    """

    def __init__(self, flow: Flow, attention: Attention) -> None:
        self.flow, self.attention, self.ops = flow, attention, flow.ops
        self.draft = Draft([Label('input', primitive=Primitive.INPUT)])
        self.out: dict[int, frozenset[int]] = {}
        self.gates: dict[int, frozenset[int]] = {}

    def build(self) -> tuple[Draft, list[int]]:
        """Visit the ops in topological order; drop joins of a single input. Returns as :func:`operator_draft`."""
        for index in self.flow.order:
            if self.flow.data[index]:
                self.out[index] = self._visit(index)
        if self.gates:
            self._drop_squeezes()
        labels, predecessors = self.draft.labels, self.draft.predecessors
        joins = {x for x in self.draft.order if labels[x].primitive in (Primitive.SUM, Primitive.CONCAT)}
        self.draft.contract({x for x in joins if len(predecessors[x]) < 2})
        order = self.draft.sort()
        assert order is not None, 'edges follow the data'
        return self.draft, [0, *(x for x in order if x != 0)]

    def _visit(self, index: int) -> frozenset[int]:
        """Add the nodes of one op; returns the positions that hold its output."""
        op = self.ops[index]
        attended = self._attended(index)
        if attended is not None:
            return attended
        inputs = [self.out[child] for child in self.flow.data_inputs(index)]
        before = frozenset().union(*inputs)
        if op.reads_image or not inputs:
            before |= {0}
        primitive = operator_primitive(op.kind)
        gate = self._gate(index) if primitive is Primitive.CSE else None
        if op.kind in ('Add', 'Cat', 'Stack'):
            primitive = Primitive.SUM if op.kind == 'Add' else Primitive.CONCAT
            is_node = len(before) > 1
        else:
            is_node = (
                gate is not None
                or (primitive is Primitive.GLOB_AVG and self._is_pooling(index))
                or (primitive is Primitive.MSA and index in self.attention.softmaxes)
                or primitive in (Primitive.MAX_POOL, Primitive.AVG_POOL)
            )
        if is_node:
            before = self._add(Label(op.name, shape=pool_shape(op), primitive=primitive), before)
        if gate is not None:
            self.gates |= dict.fromkeys(before, gate)
        # Weights first, then biases.
        labels = joined_labels(self.flow, self.attention, index)
        for label in sorted(labels, key=lambda item: item.primitive is Primitive.BIAS):
            if label.primitive is Primitive.POS_ENC:
                before = self._add(Label('PositionalAdd', primitive=Primitive.SUM), before)
                for total in before:
                    self.draft.connect(self.draft.append(label), total)
            else:
                before = self._add(label, before)
        return before

    def _add(self, label: Label, before: frozenset[int]) -> frozenset[int]:
        """Add a position with its predecessors."""
        x = self.draft.append(label)
        for p in before:
            self.draft.connect(p, x)
        return frozenset({x})

    def _attended(self, index: int) -> frozenset[int] | None:
        """Route the values of an attention through its softmax, so that no edge bypasses it.

        Returns:
            The positions that hold the output of a product of attention weights with values, or with data that scales
            the weights; None for all other ops.
        """
        kind, children = self.ops[index].kind, self.flow.data_inputs(index)
        if len(children) != 2:
            return None
        carriers = [child for child in children if child in self.attention.weights]
        if kind in ('Mul', 'Div') and len(carriers) == 2:
            return self.out[children[0]] | self.out[children[1]]
        if kind not in ('Bmm', 'Baddbmm', 'Mm') and not (kind in ('Mul', 'Div') and carriers):
            return None
        for child in carriers if kind in ('Mul', 'Div') else children:
            softmaxes = self._softmaxes(self.out[child], through_sums=child in carriers)
            values = (self.out[children[0]] | self.out[children[1]]) - self.out[child]
            successors = self.draft.successors
            behind = reachable((s for x in softmaxes for s in successors[x]), successors.__getitem__)
            if softmaxes and behind.isdisjoint(values):
                for x in softmaxes:
                    for p in values:
                        self.draft.connect(p, x)
                return self.out[child]
        return None

    def _softmaxes(self, positions: frozenset[int], *, through_sums: bool) -> frozenset[int]:
        """The attention's softmax at the one position, or the softmaxes that a sum there adds up; empty for others."""
        if len(positions) != 1:
            return frozenset()
        (x,) = positions
        if self.draft.labels[x].primitive is Primitive.SUM and through_sums:
            parts = [self._softmaxes(frozenset({p}), through_sums=True) for p in self.draft.predecessors[x]]
            return frozenset().union(*parts) if all(parts) else frozenset()
        return positions if self.draft.labels[x].primitive is Primitive.MSA else frozenset()

    def _is_pooling(self, index: int) -> bool:
        """Whether a mean is taken over positions, not over features as in a normalisation."""
        op = self.ops[index]
        if op.rank is None or op.dims is None:
            return True
        if op.rank < 3 or (op.rank == 4 and len(op.dims) == 1):
            return False
        readers = self.flow.recording.readers

        def passed_on(reader: int) -> tuple[int, ...]:
            op = self.ops[reader]
            return readers[reader] if op.kind in _PASSES_STATISTICS and not op.parameters else ()

        return not any(self.ops[reader].kind in STATISTICS for reader in reachable(readers[index], passed_on))

    def _gate(self, index: int) -> frozenset[int] | None:
        """Positions that hold the gate of a product, None if it is no squeeze and excite.

        x * sigmoid(x) is an activation: its gate comes from where the data comes from. DeepNets-1M gates by hard swish,
        which elsewhere is the activation of the data that a hard sigmoid gates.
        """
        children = self.flow.data_inputs(index)
        if len(children) != 2:
            return None
        for kinds in (GATES, ('Hardswish',)):
            for gate, trunk in (children, children[::-1]):
                function = self._function(gate, kinds)
                if function is not None and self.out[function] - self.out[trunk]:
                    return self.out[function]
        return None

    def _function(self, index: int, kinds: Collection[str]) -> int | None:
        """The op of some kinds whose output an op passes on, through reshapes and constants only."""
        while True:
            op = self.ops[index]
            if op.kind in kinds:
                return index
            below = self.flow.data_inputs(index)
            if len(below) != 1 or op.parameters or op.kind in MULTIPLIES or op.kind.startswith('Native'):
                return None
            index = below[0]

    def _drop_squeezes(self) -> None:
        """Contract means that lead only to gates: each is the squeeze of a squeeze and excite, part of the gate."""
        outputs = [x for index in self.flow.recording.outputs for x in self.out.get(index, ())]
        trunk = reachable(outputs, lambda x: self.draft.predecessors[x] - self.gates.get(x, frozenset()))
        labels = self.draft.labels
        self.draft.contract(
            {x for x in self.draft.order if labels[x].primitive is Primitive.GLOB_AVG and x not in trunk}
        )


def operator_draft(flow: Flow, attention: Attention) -> tuple[Draft, list[int]]:
    """Build the graph of a recording from its operators.

    Returns:
        The graph and its positions in topological order; the input comes first.
    """
    return _OperatorRules(flow, attention).build()


def joined_labels(flow: Flow, attention: Attention, index: int) -> Iterator[Label]:
    """Parameters that an op brings to the data, as labels; those that have no node are left out."""
    kind = flow.ops[index].kind
    for name, unchanged in flow.joining(index).items():
        owner, shape = flow.owner(name), flow.recording.shapes[name]
        table = name in attention.tables
        primitive = parameter_primitive(name, owner, shape, kind, table=table, unchanged=unchanged)
        if primitive is None or name in flow.norms_apart:
            continue
        kernel = flow.kernel_of(index, name, shape) if primitive is Primitive.CONV else None
        blocks = flow.blocks_of(index, shape) if primitive is Primitive.POS_ENC else None
        yield Label(name, owner, shape, primitive, kernel, blocks)
