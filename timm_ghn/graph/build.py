"""From a network to the graph that a GHN reads."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from timm_ghn.errors import ConfigError, UnsupportedModelError
from timm_ghn.graph.attention import Attention
from timm_ghn.graph.flow import Flow
from timm_ghn.graph.operators import needs_operator_rules, operator_draft
from timm_ghn.graph.primitives import Primitive
from timm_ghn.graph.rewrite import Draft, published_draft
from timm_ghn.graph.structure import Graph, Node, ParameterInfo
from timm_ghn.graph.trace import Recording, record
from timm_ghn.graph.vocabulary import (
    ARCHITECTURAL,
    NO_ELEMENTS,
    NOT_FLOATING,
    encoded_position,
    encoded_shape,
    kept_reason,
)

#: Rule sets that :func:`trace` knows.
RULES = ('published', 'operators')


def trace(
    model: nn.Module,
    *,
    input_size: int | Sequence[int] | None = None,
    example_inputs: Any = None,
    rules: str = 'published',
) -> Graph:
    """Read the computational graph of a network, without computing anything.

    The forward pass runs on the meta device, in training mode. The model is left exactly as it was: its parameters,
    buffers, mode, attributes and the state of all random generators.

    One network is traced at a time; other threads wait. Until the trace is done, the model must not be used elsewhere,
    the process's default dtype is float32, and what other threads draw from the global random generators of Python,
    NumPy and torch, they draw again afterwards: give such threads generators of their own.

    Args:
        model: Any network that takes a batch of images, on any device (the meta device included) and of any dtype.
        input_size: Side, (height, width) or (channels, height, width) of the image; by default what the model says
            of itself (timm's ``pretrained_cfg``, or its patch embedding), else 224.
        example_inputs: Arguments for a network that takes something else: a tensor, a tuple or a dictionary. Only
            shapes and dtypes of its tensors are read.
        rules: 'published': the rules with which the published GHNs were trained, for the networks that their authors'
            code can read; all others, such as those with subclasses of known layers, follow the operator rules.
            'operators': the operator rules for every network.

    Returns:
        The graph, its nodes in topological order.

    Raises:
        UnsupportedModelError: if the network cannot be run on the meta device, with the module that failed.
        ConfigError: if ``rules`` is unknown.
    """
    if rules not in RULES:
        raise ConfigError(f'expected rules to be one of {", ".join(RULES)} (got {rules!r})')
    recording = record(model, input_size=input_size, example_inputs=example_inputs)
    reading = _Reading.of(recording)
    if rules == 'published' and not needs_operator_rules(recording, reading.reached):
        try:
            draft, order, is_sorted = published_draft(recording)
        except UnsupportedModelError:
            pass  # a layer is used again behind itself: the published rules have no graph for it
        else:
            if is_sorted or not _uses_a_parameter_twice(recording):
                return _supplemented(_published_graph(reading, draft, order), reading)
    return _operator_graph(reading)


@dataclasses.dataclass(frozen=True)
class _Reading:
    """What is known of a network, whatever the rules that make its graph.

    Attributes:
        recording: What the forward pass did.
        flow: How data flows through it.
        attention: What its attentions consist of.
        reached: Parameters that the forward pass uses.
    """

    recording: Recording
    flow: Flow
    attention: Attention
    reached: frozenset[str]

    @classmethod
    def of(cls, recording: Recording) -> _Reading:
        flow = Flow.of(recording)
        reached = frozenset(name for op in recording.ops for name in op.parameters)
        return cls(recording, flow, Attention.of(flow), reached)

    def kept_reason(self, info: ParameterInfo) -> str:
        """Why no node predicts a parameter."""
        if info.numel == 0:
            return NO_ELEMENTS
        if not info.dtype.is_floating_point:
            return NOT_FLOATING
        return kept_reason(
            info.name,
            self.recording.owners[info.name],
            info.shape,
            reached=info.name in self.reached,
            table=info.name in self.attention.tables,
            apart=info.name in self.flow.norms_apart,
        )


def _uses_a_parameter_twice(recording: Recording) -> bool:
    """Whether a layer is used several times: a cycle then is no accident of the published rules, as Swin's is."""
    read = [name for op in recording.ops for name in set(op.parameters)]
    return len(read) > len(set(read))


def _supplemented(graph: Graph, reading: _Reading) -> Graph:
    """Add the graph by the operator rules where it predicts parameters that the published rules leave out."""
    if all(reason in ARCHITECTURAL for reason in graph.kept.values()):
        return graph
    supplement = _operator_graph(reading)
    kept = {name: reason for name, reason in graph.kept.items() if name not in supplement.node_of}
    if len(kept) == len(graph.kept):
        return graph
    return dataclasses.replace(graph, kept=kept, supplement=supplement)


def _operator_graph(reading: _Reading) -> Graph:
    """The classifier is what timm's metadata names, else the layer that makes the output."""
    recording = reading.recording
    draft, order = operator_draft(reading.flow, reading.attention)
    names = _first_names(recording.model)
    layers = metadata_classifier(recording.model) or _output_layer(recording)
    of_head = {names[id(p)] for layer in layers for p in _own_parameters(layer).values()}
    found = {draft.name(x): draft.labels[x] for x in order if draft.name(x) in of_head}
    weights = tuple(
        name
        for name, label in found.items()
        if label.primitive is Primitive.CONV and label.shape is not None and set(label.shape[2:]) <= {1}
    )
    biases = tuple(name for name, label in found.items() if label.primitive is Primitive.BIAS)
    return _assemble(reading, draft, order, weights, biases, 'operators')


#: Where :mod:`torch.nn.utils.parametrizations` keeps what it computes a weight from.
_REPARAMETRISED = tuple(f'parametrizations.weight.original{index}' for index in ('', 0, 1))


def _own_parameters(layer: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters of a layer itself, those that its weight is computed from included."""
    return {name: p for name, p in layer.named_parameters() if '.' not in name or name in _REPARAMETRISED}


def _published_graph(reading: _Reading, draft: Draft, order: list[int]) -> Graph:
    """The classifier of a published graph is what stands at its last two positions."""
    weights, biases = ((), ()) if _class_count(reading.recording.model) == 0 else _last_layer(draft, order)
    return _assemble(reading, draft, order, weights, biases, 'published')


def _last_layer(draft: Draft, order: list[int]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of the weight and the bias at the end of a graph, where they look like a classifier's."""
    if len(order) < 2:
        return (), ()
    weight, bias = draft.labels[order[-2]], draft.labels[order[-1]]
    is_weight = weight.shape is not None and len(weight.shape) > 1 and set(weight.shape[2:]) <= {1}
    weights = (weight.name,) if weight.is_parameter and '.weight' in weight.key and is_weight else ()
    biases = (bias.name,) if bias.is_parameter and '.bias' in bias.key and bias.primitive is Primitive.BIAS else ()
    return weights, biases


def _assemble(
    reading: _Reading,
    draft: Draft,
    order: list[int],
    weights: tuple[str, ...],
    biases: tuple[str, ...],
    rules: str,
) -> Graph:
    """Freeze a draft."""
    recording, model = reading.recording, reading.recording.model
    names = _first_names(model)
    nodes = tuple(_node(draft, x, names, rules) for x in order)
    position = {x: index for index, x in enumerate(order)}
    edges = [(position[x], position[s]) for x in order for s in sorted(draft.successors[x], key=position.__getitem__)]
    predicted = {name for node in nodes for name in (node.parameter, node.norm_bias) if name is not None}
    kept = {info.name: reading.kept_reason(info) for info in recording.parameters if info.name not in predicted}
    layers = metadata_classifier(model) or _output_layer(recording)
    of_head = {names[id(p)] for layer in layers for p in layer.parameters()} | {*weights, *biases}
    return Graph(
        nodes=nodes,
        edges_E2=torch.tensor(edges, dtype=torch.int64, device='cpu').view(-1, 2),
        start=0,
        class_weights=weights,
        class_biases=biases,
        classifier=tuple(info.name for info in recording.parameters if info.name in of_head),
        parameters=recording.parameters,
        kept=kept,
        input_size=recording.input_size,
        num_classes=_num_classes(model, layers),
        rules=rules,
    )


def _node(draft: Draft, x: int, names: dict[int, str], rules: str) -> Node:
    label = draft.labels[x]
    primitive = label.primitive
    if primitive is None:
        raise AssertionError(f'{label.name} is in the graph without a primitive')
    shape = None if label.shape is None else encoded_shape(label.shape)
    if label.module is None:
        return Node(primitive, label.name, None, shape)
    if rules == 'operators' and primitive is Primitive.POS_ENC and label.shape is not None:
        shape = encoded_position(label.shape)
    norm_bias = None
    if primitive in (Primitive.BN, Primitive.LN):
        bias = label.module._parameters.get('bias')
        norm_bias = None if bias is None else names[id(bias)]
    return Node(primitive, label.name, label.name, shape, norm_bias, label.kernel, label.blocks)


def _first_names(model: nn.Module) -> dict[int, str]:
    """First name of every parameter by identity."""
    return {id(parameter): name for name, parameter in model.named_parameters()}


def metadata_classifier(model: nn.Module) -> tuple[nn.Module, ...]:
    """Classification layers that timm's metadata names (several for distilled models)."""
    config = getattr(model, 'pretrained_cfg', None) or {}
    get: Callable[..., Any] | None = getattr(config, 'get', None)
    named = get('classifier') if get else None
    found = []
    for name in (named,) if isinstance(named, str) else tuple(named or ()):
        try:
            layer = model.get_submodule(name)
        except AttributeError:
            continue
        if any(True for _ in layer.parameters(recurse=False)):
            found.append(layer)
    return tuple(found)


def _class_count(model: nn.Module) -> int | None:
    """Number of classes that the model states, if it does."""
    count = getattr(model, 'num_classes', None)
    return count if isinstance(count, int) else None


def _output_layer(recording: Recording) -> tuple[nn.Module, ...]:
    """The layer that makes the first output: the classifier of a network without metadata."""
    if _class_count(recording.model) == 0 or not recording.outputs:
        return ()
    index: int | None = recording.outputs[0]
    while index is not None:
        op = recording.ops[index]
        below = [child for child in op.inputs if isinstance(child, int)]
        names = op.parameters or tuple(name for child in below for name in recording.ops[child].parameters)
        if names and (op.parameters or op.kind == 'Mm'):
            layer = recording.owners[names[0]]
            path = names[0].split('.')
            if 'parametrizations' in path:
                layer = recording.model.get_submodule('.'.join(path[: path.index('parametrizations')]))
            own = _own_parameters(layer)
            weights = [p for name, p in own.items() if name in ('weight', *_REPARAMETRISED) and p.dim() > 1]
            return (layer,) if weights else ()
        index = below[0] if below else None
    return ()


def _num_classes(model: nn.Module, layers: tuple[nn.Module, ...]) -> int | None:
    """Number of classes: what the model states, else the outputs of its last layer."""
    stated = _class_count(model)
    if stated is not None:
        return stated or None
    return int(next(layers[0].parameters()).shape[0]) if layers else None
