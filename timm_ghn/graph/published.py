"""The published graph rules, one function each, as the code of GHN-3 (SamsungSAILMontreal/ghn3) applies them.

They turn the ops that autograd recorded into the graph that the published GHNs were trained on. Some look at names and
at positions in a list, as the reference does: for the networks that it knows these accidents *define* the graph.
:mod:`timm_ghn.graph.operators` holds the rules for all other networks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping

from torch import nn

from timm_ghn.errors import UnsupportedModelError
from timm_ghn.graph.autograd import Op
from timm_ghn.graph.paths import reachable, topological_order
from timm_ghn.graph.primitives import Primitive
from timm_ghn.graph.trace import Recording
from timm_ghn.graph.vocabulary import class_path, operator_primitive, published_kind, published_primitive


@dataclasses.dataclass(eq=False, slots=True)
class Label:
    """A parameter (with its module) or an operator in a draft; kernel and blocks are those of a :class:`Node`."""

    name: str
    module: nn.Module | None = None
    shape: tuple[int, ...] | None = None
    primitive: Primitive | None = None
    kernel: tuple[int, ...] | None = None
    blocks: tuple[int, int, int, int] | None = None

    @property
    def key(self) -> str:
        """The name by which the reference knows it: with a leading dot for a parameter of the model itself."""
        return f'.{self.name}' if self.module is not None and '.' not in self.name else self.name


class Draft:
    """A graph under construction: labels by position, and the edges between positions.

    Rules swap labels, edit edges and remove positions. ``order`` lists the positions that are left, ascending.
    """

    def __init__(self, labels: Iterable[Label]) -> None:
        self.labels = list(labels)
        self.order = list(range(len(self.labels)))
        self.successors: list[set[int]] = [set() for _ in self.labels]
        self.predecessors: list[set[int]] = [set() for _ in self.labels]

    def append(self, label: Label) -> int:
        """Add a position at the end of the list."""
        self.order.append(len(self.labels))
        self.labels.append(label)
        self.successors.append(set())
        self.predecessors.append(set())
        return len(self.labels) - 1

    def connect(self, source: int, target: int) -> None:
        """Add an edge, unless it leads from a position to itself."""
        if source != target:
            self.successors[source].add(target)
            self.predecessors[target].add(source)

    def cut(self, source: int, target: int) -> None:
        """Remove an edge if it is there."""
        self.successors[source].discard(target)
        self.predecessors[target].discard(source)

    def name(self, position: int) -> str:
        """Name at a position."""
        return self.labels[position].name

    def contract(self, removed: set[int]) -> None:
        """Remove positions, connecting the predecessors of each with its successors."""
        for x in self.order:
            if x not in removed:
                continue
            before, behind = set(self.predecessors[x]), set(self.successors[x])
            for p in before:
                self.cut(p, x)
            for s in behind:
                self.cut(x, s)
            for p in before:
                for s in behind:
                    self.connect(p, s)
        self.order = [x for x in self.order if x not in removed]

    def sort(self) -> list[int] | None:
        """Positions in topological order, as :func:`topological_order` lists them; None if there is a cycle."""
        return topological_order({x: self.predecessors[x] for x in self.order})


def listing(recording: Recording) -> Draft:
    """The raw graph: each op is represented by the parameters that it reads, or else by itself.

    Ops that depend on no parameter are not in the reference's autograd graph. Dropout and stochastic depth are products
    here, as in the reference: rules that count positions in the list see them, and may take one for a gate.
    """
    ops, shapes = recording.ops, recording.shapes
    wanted = reachable((index for index, op in enumerate(ops) if op.parameters), recording.readers.__getitem__)
    draft = Draft([])
    of_parameter: dict[str, int] = {}
    of_op: dict[int, tuple[int, int]] = {}
    for index, op in enumerate(ops):
        if index not in wanted:
            continue
        for name in op.parameters:
            if name not in of_parameter:
                owner = recording.owners[name]
                label = Label(name, owner, shapes[name], published_primitive(name, owner))
                of_parameter[name] = draft.append(label)
        if op.parameters:
            of_op[index] = of_parameter[op.parameters[0]], of_parameter[op.parameters[-1]]
        else:
            x = draft.append(Label(op.name, None, pool_shape(op), operator_primitive(op.kind)))
            of_op[index] = x, x
    for index, (entry, _) in of_op.items():
        for child in ops[index].inputs:
            if isinstance(child, int):
                if child in of_op:
                    draft.connect(of_op[child][1], entry)
            elif 'bias' in child:
                # A bias comes after its weight: data flows through it towards the output.
                draft.connect(entry, of_parameter[child])
            else:
                draft.connect(of_parameter[child], entry)
    return draft


def pool_shape(op: Op) -> tuple[int, ...] | None:
    """Shape of a pooling node: its kernel size, 3x3 where autograd did not save it."""
    if operator_primitive(op.kind) not in (Primitive.MAX_POOL, Primitive.AVG_POOL):
        return None
    return (1, 1, *(op.kernel_size or (3, 3)))


def filter_operators(draft: Draft) -> None:
    """Contract what is not in the vocabulary, products that are no gates, and means and sums without a meaning."""
    fan_in = {x: len(draft.predecessors[x]) for x in draft.order}
    keys = {x: draft.labels[x].key for x in draft.order}
    names = [key.lower() for key in keys.values()]
    gated = any('sigmoid' in name or 'swish' in name for name in names)
    removed = {x for index, x in enumerate(draft.order) if 'Mul' in keys[x] and not (gated and _is_gate(names, index))}
    removed |= _containing(keys, [keys[x] for x in draft.order if draft.labels[x].primitive is None])
    rest = [x for x in draft.order if x not in removed]
    if gated:
        names = [keys[x].lower() for x in rest]
        removed |= {x for index, x in enumerate(rest) if 'Mean' in keys[x] and not _before_head(names, index)}
    removed |= {x for x in rest if _joins(draft, x) and fan_in[x] <= 1}
    draft.contract(removed)


def _joins(draft: Draft, x: int) -> bool:
    """Whether a position is a sum or a concatenation, by its name as the reference does."""
    return 'Add' in draft.name(x) or 'Cat' in draft.name(x)


def _is_gate(names: list[str], index: int) -> bool:
    """Whether a multiplication is a channel gate (squeeze and excite), judged by its neighbours in the list."""
    if _before_head(names, index):
        return False
    # Negative offsets wrap around, as they do in the reference.
    return (
        names[index - 2].startswith(('hard', 'sigmoid'))
        or names[index - 3].startswith(('relu', 'mean'))
        or names[index + 1].startswith(('hard', 'sigmoid', 'relu'))
    )


def _before_head(names: list[str], index: int) -> bool:
    """Whether the classifier is next in the list, or nothing."""
    if index + 1 >= len(names):
        return True
    return any(names[index - k].startswith(('classifier', 'fc', 'head')) for k in (1, 2))


def _containing(keys: Mapping[int, str], unknown: list[str]) -> set[int]:
    """Positions of unknown names, and of names that contain one: the published filter matches substrings."""
    everything = '\n'.join(keys.values())
    exact = set(unknown)
    partial = [name for name in exact if everything.count(name) > unknown.count(name)]
    return {x for x, key in keys.items() if key in exact or any(name in key for name in partial)}


def filter_joins(draft: Draft) -> None:
    """Contract sums and concatenations that have one input left."""
    draft.contract({x for x in draft.order if _joins(draft, x) and len(draft.predecessors[x]) <= 1})


def insert_weights(draft: Draft) -> None:
    """Put each weight without a predecessor between its layer's input and its bias."""
    for i in draft.order:
        if draft.predecessors[i] or 'weight' not in draft.name(i):
            continue
        module = draft.labels[i].module
        for o in sorted(draft.successors[i]):
            same_layer = module is not None and draft.labels[o].module is module
            if not (same_layer or (not draft.predecessors[i] and 'softmax' in draft.name(o).lower())):
                continue
            fan_out = len(draft.successors[i])
            if not draft.predecessors[o] - {i}:
                continue
            draft.labels[i], draft.labels[o] = draft.labels[o], draft.labels[i]
            draft.cut(i, o)
            draft.connect(o, i)
            if fan_out == 1:
                for s in draft.successors[o] - {i}:
                    draft.cut(o, s)
                    draft.connect(i, s)


def route_values_through_softmax(draft: Draft) -> None:
    """Route the values of an attention through its softmax, so that no edge bypasses it."""
    if not any('softmax' in draft.name(x).lower() for x in draft.order):
        return
    several = _path_counter(draft)
    for i in draft.order:
        if 'softmax' not in draft.name(i).lower():
            continue
        for o in sorted(draft.successors[i]):
            for j in sorted(draft.predecessors[o] - {i}):
                bypassed = several(j, o)
                from_softmax = j in draft.successors[i]
                if bypassed or not from_softmax:
                    draft.cut(j, o)
                if not bypassed and not from_softmax:
                    draft.connect(j, i)


def _path_counter(draft: Draft) -> Callable[[int, int], bool]:
    """Whether more than one path leads from one position to another, in the graph as it is now."""
    order = draft.sort()
    if order is None:
        raise _used_again()
    rank = {x: place for place, x in enumerate(order)}
    predecessors = [set(before) for before in draft.predecessors]

    def several(source: int, target: int) -> bool:
        count = {source: 1}
        for x in order[rank[source] + 1 : rank[target] + 1]:
            paths = sum(count.get(p, 0) for p in predecessors[x])
            if paths:
                count[x] = min(paths, 2)
        return count.get(target, 0) > 1

    return several


def connect_swin_stages(draft: Draft, model: nn.Module) -> None:
    """torchvision's Swin: put the reduction of the patch merging between the stages."""
    if class_path(model) != 'torchvision.models.swin_transformer.SwinTransformer':
        return

    def first_containing(text: str) -> int | None:
        return next((x for x in draft.order if text in draft.name(x)), None)

    for x in draft.order:
        name = draft.name(x)
        if name.endswith('norm.weight'):
            for s in sorted(draft.successors[x]):
                reduction = first_containing(name.replace('norm', 'reduction'))
                if reduction is not None and (draft.name(s).endswith('norm1.weight') or 'Add' in draft.name(s)):
                    draft.cut(x, s)
                    draft.connect(x, reduction)
        elif name.endswith('attn.proj.bias'):
            for s in sorted(draft.successors[x]):
                if draft.name(s).endswith('reduction.weight'):
                    draft.cut(x, s)
                    for target in sorted(draft.successors[s]):
                        if 'Add' in draft.name(target):
                            draft.connect(x, target)


def add_input(draft: Draft) -> None:
    """Add the input, and connect it with every weight that has no predecessor."""
    orphans = [x for x in draft.order if not draft.predecessors[x] and 'weight' in draft.name(x)]
    image = draft.append(Label('input', primitive=Primitive.INPUT))
    for x in orphans:
        draft.connect(image, x)


def add_positional_sum(draft: Draft, order: list[int]) -> list[int]:
    """Add positional encodings to the data in sums of their own; returns the order with the sums."""
    result: list[int] = []
    for x in order:
        result.append(x)
        label = draft.labels[x]
        if label.primitive is not Primitive.POS_ENC or class_path(label.module or type(None)).endswith('Embedding'):
            continue
        total = draft.append(Label('PositionalAdd', primitive=Primitive.SUM))
        for p in list(draft.predecessors[x]):
            draft.cut(p, x)
            draft.connect(p, total)
        for s in list(draft.successors[x]):
            draft.cut(x, s)
            draft.connect(total, s)
        draft.connect(x, total)
        result.append(total)
    return result


def rotate_squeezenet_head(draft: Draft, order: list[int], model: nn.Module) -> None:
    """Put the pooling of torchvision's SqueezeNet before the classifier, as the published graphs have it."""
    if class_path(model) != 'torchvision.models.squeezenet.SqueezeNet' or len(order) < 3:
        return
    weight, bias, mean = order[-3:]
    labels = draft.labels
    if labels[mean].primitive is Primitive.GLOB_AVG and labels[weight].name.startswith('classifier'):
        labels[weight], labels[bias], labels[mean] = labels[mean], labels[weight], labels[bias]


def published_draft(recording: Recording) -> tuple[Draft, list[int]]:
    """Apply the published rules.

    Returns:
        The rewritten graph and its positions in topological order. Where a rule closes a cycle, as the Swin rule does
        on torchvision's Swin v2, they are in the order of the list, as in the reference.

    Raises:
        UnsupportedModelError: if the reference fails on a layer, or if one is used again behind itself.
    """
    _expect_known_classes(recording)
    draft = listing(recording)
    if draft.sort() is None:
        raise _used_again()
    filter_operators(draft)
    insert_weights(draft)
    route_values_through_softmax(draft)
    connect_swin_stages(draft, recording.model)
    filter_joins(draft)
    add_input(draft)
    order = draft.sort()
    if order is None:
        readers = [name for op in recording.ops for name in set(op.parameters)]
        if len(readers) > len(set(readers)):
            raise _used_again()
        return draft, draft.order
    order = add_positional_sum(draft, order)
    rotate_squeezenet_head(draft, order, recording.model)
    return draft, order


def _expect_known_classes(recording: Recording) -> None:
    """Refuse a subclass of a layer that the reference knows: the reference fails on it."""
    for name in dict.fromkeys(name for op in recording.ops for name in op.parameters):
        owner = recording.owners[name]
        kind = published_kind(owner)
        if kind is not None and kind != class_path(owner):
            raise UnsupportedModelError(
                f'the published rules have no graph for {type(recording.model).__name__}: they know {kind}, but not '
                f"{class_path(owner)}, which holds '{name}'; {_WAY_OUT}"
            )


def _used_again() -> UnsupportedModelError:
    return UnsupportedModelError(
        f'the published rules have no graph for a network in which a layer is used again behind itself; {_WAY_OUT}'
    )


_WAY_OUT = "rules='auto' gives the graph by its operators"
