"""Graph rules for any network, from its operators instead of their names and positions.

They give the networks that the published rules were made for the same graph (the tests compare timm's and
torchvision's versions of one network), and extend it to what those rules cannot read: subclasses of known layers,
other normalisations, parameters that a module uses directly, layers that are used several times, gates and
attention in any form.

The graph is built along the data: every op that depends on the image is represented by the parameters that it (or a
chain of ops without data) brings in, or by itself where it is an op of the vocabulary; all else is transparent.
"""

from __future__ import annotations

from collections.abc import Iterator

from timm_ghn.graph.attention import Attention
from timm_ghn.graph.flow import COMPUTE, Flow
from timm_ghn.graph.primitives import Primitive
from timm_ghn.graph.published import Draft, Label, pool_shape
from timm_ghn.graph.vocabulary import operator_primitive, parameter_primitive

#: Ops whose output lies in a fixed interval: what they scale is gated.
GATES = frozenset({'Sigmoid', 'Hardsigmoid', 'Tanh', 'Hardtanh', 'Clamp', 'Softmax', 'SafeSoftmax'})

#: Readers of a mean that make it a statistic of a normalisation, not a pooling.
STATISTICS = frozenset({'Rsqrt', 'Sqrt', 'Sub', 'Pow', 'Div', 'Reciprocal'})

_PASSES_STATISTICS = frozenset({'Add', 'View', 'Expand', 'Unsqueeze', 'UnsafeView', 'ToCopy'})


class OperatorRules:
    """Builds the graph of one recording; see :func:`operator_draft`."""

    def __init__(self, flow: Flow, attention: Attention) -> None:
        self.flow, self.attention = flow, attention
        self.recording = flow.recording
        self.ops = flow.ops
        self.draft = Draft([Label('input', primitive=Primitive.INPUT)])
        self.out: dict[int, frozenset[int]] = {}
        self.gated: list[tuple[int, frozenset[int]]] = []

    def build(self) -> Draft:
        """Visit the ops along the data."""
        for index in self.flow.order:
            if self.flow.data[index]:
                self.out[index] = self._visit(index)
        self._drop_squeezes()
        self.draft.contract(
            {
                x
                for x in self.draft.order
                if self.draft.labels[x].primitive in (Primitive.SUM, Primitive.CONCAT)
                and len(self.draft.predecessors[x]) < 2
            }
        )
        return self.draft

    def _visit(self, index: int) -> frozenset[int]:
        """Add the nodes of one op; returns the positions that hold its output."""
        op = self.ops[index]
        inputs = [self.out[child] for child in self.flow.data_inputs(index)]
        before = frozenset().union(*inputs)
        if op.reads_image or not inputs:
            before |= {0}
        primitive = operator_primitive(op.kind)
        attended = self._attended(index)
        if attended is not None:
            return attended
        if primitive is Primitive.CSE:
            gate = self._gate(index)
            if gate is not None:
                x = self._add(Label(op.name, None, None, Primitive.CSE), before)
                self.gated.append((x, gate))
                before = frozenset({x})
        elif primitive is Primitive.GLOB_AVG and self._is_pooling(index):
            before = frozenset({self._add(Label(op.name, None, None, primitive), before)})
        elif primitive is Primitive.MSA and index in self.attention.softmaxes:
            before = frozenset({self._add(Label(op.name, None, None, primitive), before)})
        elif primitive in (Primitive.MAX_POOL, Primitive.AVG_POOL):
            before = frozenset({self._add(Label(op.name, None, pool_shape(op), primitive), before)})
        elif op.kind in ('Add', 'Cat', 'Stack') and len(before) > 1:
            joined = Primitive.SUM if op.kind == 'Add' else Primitive.CONCAT
            before = frozenset({self._add(Label(op.name, None, None, joined), before)})
        return self._insert_parameters(index, before)

    def _add(self, label: Label, before: frozenset[int]) -> int:
        x = self.draft.append(label)
        for p in before:
            self.draft.connect(p, x)
        return x

    def _insert_parameters(self, index: int, before: frozenset[int]) -> frozenset[int]:
        """Chain the parameters that an op brings in behind its data inputs: weights first, then biases."""
        found = list(joined_labels(self.flow, self.attention, index))
        for label in sorted(found, key=lambda item: item.primitive is Primitive.BIAS):
            if label.primitive is Primitive.POS_ENC:
                total = self._add(Label('PositionalAdd', primitive=Primitive.SUM), before)
                self.draft.connect(self.draft.append(label), total)
                before = frozenset({total})
            else:
                before = frozenset({self._add(label, before)})
        return before

    def _attended(self, index: int) -> frozenset[int] | None:
        """What attention weights multiply reaches the output through the softmax, not around it.

        Returns:
            The positions that hold the output of a product of weights with values, or with what scales the weights;
            None for all other ops.
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
            if softmaxes and not any(self._leads_to(x, values) for x in softmaxes):
                for x in softmaxes:
                    for p in values:
                        self.draft.connect(p, x)
                return self.out[child]
        return None

    def _softmaxes(self, positions: frozenset[int], *, through_sums: bool) -> frozenset[int]:
        """The attention's softmax that one position holds, or the softmaxes that it adds up; empty for others."""
        if len(positions) != 1:
            return frozenset()
        (x,) = positions
        if self.draft.labels[x].primitive is Primitive.SUM and through_sums:
            parts = [self._softmaxes(frozenset({p}), through_sums=True) for p in self.draft.predecessors[x]]
            return frozenset().union(*parts) if all(parts) else frozenset()
        return positions if self.draft.labels[x].primitive is Primitive.MSA else frozenset()

    def _leads_to(self, source: int, targets: frozenset[int]) -> bool:
        """Whether a position leads to one of others."""
        seen, stack = {source}, [source]
        while stack:
            for x in self.draft.successors[stack.pop()] - seen:
                if x in targets:
                    return True
                seen.add(x)
                stack.append(x)
        return False

    def _is_pooling(self, index: int) -> bool:
        """Whether a mean is taken over positions, not over features as in a normalisation."""
        op = self.ops[index]
        if op.rank is None or op.dims is None:
            return True
        if op.rank < 3 or (op.rank == 4 and len(op.dims) == 1):
            return False
        seen, stack = set(), list(self.flow.readers[index])
        while stack:
            reader = stack.pop()
            kind = self.ops[reader].kind
            if kind in STATISTICS:
                return False
            if kind in _PASSES_STATISTICS and reader not in seen and not self.ops[reader].parameters:
                seen.add(reader)
                stack.extend(self.flow.readers[reader])
        return True

    def _gate(self, index: int) -> frozenset[int] | None:
        """Positions that hold the gate of a product, None if it is no squeeze and excite.

        x * sigmoid(x) is an activation: its gate comes from where the data comes from.
        """
        children = self.flow.data_inputs(index)
        if len(children) != 2:
            return None
        for gate, trunk in (children, children[::-1]):
            bounded = self._bounded(gate)
            if bounded is not None and self.out[bounded] - self.out[trunk]:
                return self.out[bounded]
        return None

    def _bounded(self, index: int) -> int | None:
        """The bounded function that an op passes on, through reshapes and constants only."""
        while True:
            op = self.ops[index]
            if op.kind in GATES:
                return index
            below = self.flow.data_inputs(index)
            if len(below) != 1 or op.parameters or op.kind in COMPUTE or op.kind.startswith('Native'):
                return None
            index = below[0]

    def _drop_squeezes(self) -> None:
        """A mean that leads nowhere but into gates is the squeeze of a squeeze and excite, part of the gate."""
        if not self.gated:
            return
        cut = {(p, x) for x, gate in self.gated for p in gate}
        trunk = set(self._ends())
        stack = list(trunk)
        while stack:
            x = stack.pop()
            for p in self.draft.predecessors[x]:
                if (p, x) not in cut and p not in trunk:
                    trunk.add(p)
                    stack.append(p)
        self.draft.contract(
            {x for x in self.draft.order if x not in trunk and self.draft.labels[x].primitive is Primitive.GLOB_AVG}
        )

    def _ends(self) -> frozenset[int]:
        """Positions that hold an output of the network."""
        return frozenset().union(*(self.out.get(index, frozenset()) for index in self.recording.outputs))


def operator_draft(flow: Flow, attention: Attention) -> tuple[Draft, list[int]]:
    """Build the graph of a recording from its operators.

    Returns:
        The graph and its positions in topological order; the input comes first.
    """
    draft = OperatorRules(flow, attention).build()
    order = draft.sort()
    if order is None:  # unreachable: edges follow the data
        raise AssertionError('operator rules made a cycle')
    return draft, [0, *(x for x in order if x != 0)]


def joined_labels(flow: Flow, attention: Attention, index: int) -> Iterator[Label]:
    """The parameters that an op brings to the data and that have a node, each with what it is."""
    kind = flow.ops[index].kind
    for joined in flow.joining(index):
        name = joined.name
        owner, shape = flow.owner(name), flow.shapes[name]
        table, unchanged = name in attention.tables, joined.unchanged
        primitive = parameter_primitive(name, owner, shape, kind, table=table, unchanged=unchanged)
        if primitive is None or name in flow.norms_apart:
            continue
        kernel = flow.kernel_of(index, joined, shape) if primitive is Primitive.CONV else None
        blocks = flow.blocks_of(index, shape) if primitive is Primitive.POS_ENC else None
        yield Label(name, owner, shape, primitive, kernel, blocks)
