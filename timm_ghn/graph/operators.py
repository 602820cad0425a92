"""Graph rules for any network, from its operators instead of their names and positions.

They give the networks that the published rules were made for the same graph (the tests compare timm's and
torchvision's versions of one network), and extend it to what those rules cannot read: subclasses of known layers,
other normalisations, parameters that a module uses directly, layers that are used several times, gates and
attention in any form.

The graph is built along the data: every op that depends on the image is represented by the parameters that it (or a
chain of ops without data) brings in, or by itself where it is an op of the vocabulary; all else is transparent.
"""

from __future__ import annotations

from torch import nn

from timm_ghn.graph.primitives import Primitive
from timm_ghn.graph.rewrite import Draft, Label, pool_shape
from timm_ghn.graph.trace import Op, Recording
from timm_ghn.graph.vocabulary import is_published_exactly, operator_primitive, parameter_primitive, published_kind

#: Ops that multiply data with weights; a chain of ops without data that contains one is a network of its own, if it
#: has several weights or is added to the data (and not multiplied, as a computed kernel is).
COMPUTE = frozenset(
    {'Addmm', 'Mm', 'Bmm', 'Baddbmm', 'Addbmm', 'Convolution', 'ConvolutionOverrideable', 'Mv', 'Addmv'}
)

#: Ops whose output lies in a fixed interval: what they scale is gated.
GATES = frozenset({'Sigmoid', 'Hardsigmoid', 'Tanh', 'Hardtanh', 'Clamp', 'Softmax', 'SafeSoftmax'})

#: Readers of a mean that make it a statistic of a normalisation, not a pooling.
STATISTICS = frozenset({'Rsqrt', 'Sqrt', 'Sub', 'Pow', 'Div', 'Reciprocal'})

_PASSES_STATISTICS = frozenset({'Add', 'View', 'Expand', 'Unsqueeze', 'UnsafeView', 'ToCopy'})


class OperatorRules:
    """Builds the graph of one recording; see :func:`operator_draft`."""

    def __init__(self, recording: Recording) -> None:
        self.recording = recording
        self.ops = recording.ops
        self.shapes = {info.name: info.shape for info in recording.parameters}
        self.order = _inputs_first(self.ops)
        self.readers: list[list[int]] = [[] for _ in self.ops]
        for index, op in enumerate(self.ops):
            for child in _ops_of(op):
                self.readers[child].append(index)
        self.data = self._follow_data()
        self.draft = Draft([Label('input', primitive=Primitive.INPUT)])
        self.out: dict[int, frozenset[int]] = {}
        self.gated: list[tuple[int, frozenset[int]]] = []

    def _follow_data(self) -> list[bool]:
        """Which ops depend on the image, or belong to a network that computes from constants (a position MLP)."""
        data = [False] * len(self.ops)
        computes = [False] * len(self.ops)
        weights: list[frozenset[str]] = [frozenset()] * len(self.ops)
        for index in self.order:
            op = self.ops[index]
            data[index] = op.reads_image or any(data[child] for child in _ops_of(op))
            computes[index] = op.kind in COMPUTE or any(computes[child] for child in _ops_of(op))
            own = {name for name in op.parameters if len(self.shapes[name]) > 1}
            weights[index] = frozenset(own).union(*(weights[child] for child in _ops_of(op)))
        stack = [
            child
            for index, op in enumerate(self.ops)
            if data[index]
            for child in _ops_of(op)
            if not data[child] and computes[child] and (len(weights[child]) > 1 or op.kind == 'Add')
        ]
        while stack:
            index = stack.pop()
            if not data[index] and computes[index]:
                data[index] = True
                stack.extend(_ops_of(self.ops[index]))
        return data

    def build(self) -> Draft:
        """Visit the ops along the data."""
        for index in self.order:
            if self.data[index]:
                self.out[index] = self._visit(index)
        self._drop_squeezes()
        self._drop_dead_ends()
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
        inputs = [self.out[child] for child in _ops_of(op) if self.data[child]]
        before = frozenset().union(*inputs)
        if op.reads_image or not inputs:
            before |= {0}
        primitive = operator_primitive(op.kind)
        attended = self._attention(op, inputs)
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
        elif primitive is Primitive.MSA and self._is_attention(index):
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
        op = self.ops[index]
        found: list[tuple[Primitive, str]] = []
        for name in dict.fromkeys(self._brought_in(index)):
            owner = self.recording.owners[name]
            primitive = parameter_primitive(name, owner, self.shapes[name], op.kind, self._is_logits(index))
            if primitive is not None:
                found.append((primitive, name))
        for primitive, name in sorted(found, key=lambda item: item[0] is Primitive.BIAS):
            label = Label(name, self.recording.owners[name], self.shapes[name], primitive)
            if primitive is Primitive.POS_ENC:
                total = self._add(Label('PositionalAdd', primitive=Primitive.SUM), before)
                self.draft.connect(self.draft.append(label), total)
                before = frozenset({total})
            else:
                before = frozenset({self._add(label, before)})
        return before

    def _brought_in(self, index: int) -> list[str]:
        """Parameters that an op reads directly or through ops without data."""
        found: list[str] = []
        stack: list[int | str] = list(reversed(self.ops[index].inputs))
        while stack:
            item = stack.pop()
            if isinstance(item, str):
                found.append(item)
            elif not self.data[item]:
                stack.extend(reversed(self.ops[item].inputs))
        return found

    def _attention(self, op: Op, inputs: list[frozenset[int]]) -> frozenset[int] | None:
        """The product of attention and values: values reach the output through the softmax, not around it."""
        if op.kind not in ('Bmm', 'Baddbmm', 'Mm') or len(inputs) != 2:
            return None
        for attention, values in (inputs, inputs[::-1]):
            if len(attention) == 1:
                (x,) = attention
                if self.draft.labels[x].primitive is Primitive.MSA:
                    for p in values - attention:
                        self.draft.connect(p, x)
                    return attention
        return None

    def _is_attention(self, index: int) -> bool:
        """Whether a softmax weighs a matrix product (as attention does) and not a feature map (as a gate does)."""
        return any(
            self.ops[reader].kind in ('Bmm', 'Baddbmm', 'Mm', 'Convolution', 'Addmm')
            for reader in self._readers_through(index)
        )

    def _readers_through(self, index: int) -> list[int]:
        """First readers of an op that do more than reshape, mask or scale it by a constant."""
        found, seen, stack = [], {index}, list(self.readers[index])
        while stack:
            reader = stack.pop()
            if reader in seen:
                continue
            seen.add(reader)
            op = self.ops[reader]
            if op.kind not in COMPUTE and sum(self.data[child] for child in _ops_of(op)) == 1 and not op.parameters:
                stack.extend(self.readers[reader])
            else:
                found.append(reader)
        return found

    def _is_logits(self, index: int) -> bool:
        """Whether an op's output becomes the argument of a softmax: what is added there is a relative position."""
        seen, stack = set(), [index]
        while stack:
            for reader in self.readers[stack.pop()]:
                kind = self.ops[reader].kind
                if 'Softmax' in kind:
                    return True
                if reader not in seen and kind in (
                    'View',
                    'UnsafeView',
                    'Add',
                    'Mul',
                    'Div',
                    'Expand',
                    'Unsqueeze',
                    'MaskedFill',
                    'Permute',
                    'Transpose',
                    'Clone',
                    'Where',
                ):
                    seen.add(reader)
                    stack.append(reader)
        return False

    def _is_pooling(self, index: int) -> bool:
        """Whether a mean is taken over positions, not over features as in a normalisation."""
        op = self.ops[index]
        if op.rank is None or op.dims is None:
            return True
        if op.rank < 3 or (op.rank == 4 and len(op.dims) == 1):
            return False
        seen, stack = set(), list(self.readers[index])
        while stack:
            reader = stack.pop()
            kind = self.ops[reader].kind
            if kind in STATISTICS:
                return False
            if kind in _PASSES_STATISTICS and reader not in seen and not self.ops[reader].parameters:
                seen.add(reader)
                stack.extend(self.readers[reader])
        return True

    def _gate(self, index: int) -> frozenset[int] | None:
        """Positions that hold the gate of a product, None if it is no squeeze and excite.

        x * sigmoid(x) is an activation: its gate comes from where the data comes from.
        """
        children = [child for child in _ops_of(self.ops[index]) if self.data[child]]
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
            below = [child for child in _ops_of(op) if self.data[child]]
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

    def _drop_dead_ends(self) -> None:
        """Everything leads to an output: what a softmax or a gate absorbed may not."""
        alive = set(self._ends())
        stack = list(alive)
        while stack:
            for p in self.draft.predecessors[stack.pop()]:
                if p not in alive:
                    alive.add(p)
                    stack.append(p)
        dead = {x for x in self.draft.order if x not in alive and x != 0}
        if dead:
            self.draft.contract(dead)


def _ops_of(op: Op) -> list[int]:
    return [child for child in op.inputs if isinstance(child, int)]


def _inputs_first(ops: tuple[Op, ...]) -> list[int]:
    """Order in which every op comes behind its inputs."""
    waiting = [len(set(_ops_of(op))) for op in ops]
    readers: list[list[int]] = [[] for _ in ops]
    for index, op in enumerate(ops):
        for child in set(_ops_of(op)):
            readers[child].append(index)
    order = [index for index, count in enumerate(waiting) if not count]
    for index in order:
        for reader in readers[index]:
            waiting[reader] -= 1
            if not waiting[reader]:
                order.append(reader)
    return order


def operator_draft(recording: Recording) -> tuple[Draft, list[int]]:
    """Build the graph of a recording from its operators.

    Returns:
        The graph and its positions in topological order; the input comes first.
    """
    draft = OperatorRules(recording).build()
    order = draft.sort()
    if order is None:  # unreachable: edges follow the data
        raise AssertionError('operator rules made a cycle')
    return draft, [0, *(x for x in order if x != 0)]


def needs_operator_rules(recording: Recording, reached: set[str]) -> bool:
    """Whether the reference fails on a network: one with a subclass of a layer that it knows."""
    owners: dict[int, nn.Module] = {id(recording.owners[name]): recording.owners[name] for name in reached}
    return any(published_kind(owner) and not is_published_exactly(owner) for owner in owners.values())
