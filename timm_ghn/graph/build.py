"""From a network to the graph that a GHN reads."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from timm_ghn.errors import ConfigError, UnsupportedModelError
from timm_ghn.graph.attention import Attention
from timm_ghn.graph.checks import flaws_of
from timm_ghn.graph.flow import Flow
from timm_ghn.graph.graph import Graph, Node, ParameterInfo
from timm_ghn.graph.operators import joined_labels, operator_draft
from timm_ghn.graph.primitives import Primitive
from timm_ghn.graph.published import Draft, Label, published_draft
from timm_ghn.graph.trace import Recording, record
from timm_ghn.graph.vocabulary import (
    NO_ELEMENTS,
    NOT_FLOATING,
    encoded_position,
    encoded_shape,
    kept_reason,
)

#: What :func:`trace` can be asked for: one of two rule sets, or the one that suits the network.
RULES = ('auto', 'published', 'operators')


def trace(
    model: nn.Module,
    *,
    input_size: int | Sequence[int] | None = None,
    example_inputs: Any = None,
    rules: str = 'auto',
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
        rules: 'published': the graph that the reference's own code gives, accidents included, as the published GHNs
            were trained on; what it leaves out is kept. 'operators': the graph that follows from the operators.
            'auto': the published graph where there is one that is sound (:mod:`timm_ghn.graph.checks`) and reaches
            every parameter that the other one reaches, else the one by the operators.

    Returns:
        The graph, its nodes in topological order. Its ``rules`` are 'published' or 'operators'.

    Raises:
        UnsupportedModelError: if the network cannot be run on the meta device, with the module that failed; or if
            ``rules`` is 'published' and the reference cannot read the network.
        ConfigError: if ``rules`` is unknown.
    """
    if rules not in RULES:
        raise ConfigError(f'expected rules to be one of {", ".join(RULES)} (got {rules!r})')
    reading = _Reading(record(model, input_size=input_size, example_inputs=example_inputs))
    if rules == 'operators':
        return _operator_graph(reading)
    try:
        graph = _published_graph(reading)
    except UnsupportedModelError:
        if rules == 'published':
            raise
        return _operator_graph(reading)
    if rules == 'published' or not (reading.left_out(graph.kept) or flaws_of(graph, reading.flow)):
        return graph
    return _operator_graph(reading)


@dataclasses.dataclass(frozen=True, eq=False)
class _Reading:
    """What is known of a network, whatever the rules that make its graph.

    Attributes:
        recording: What the forward pass did.
    """

    recording: Recording

    @functools.cached_property
    def flow(self) -> Flow:
        """How data flows through the network."""
        return Flow.of(self.recording)

    @functools.cached_property
    def attention(self) -> Attention:
        """What its attentions consist of."""
        return Attention.of(self.flow)

    @functools.cached_property
    def reached(self) -> frozenset[str]:
        """Parameters that the forward pass uses."""
        return frozenset(name for op in self.recording.ops for name in op.parameters)

    def left_out(self, kept: Collection[str]) -> frozenset[str]:
        """Which of some parameters the graph by the operators predicts."""
        wanted = self.reached.intersection(kept)
        if not wanted:
            return frozenset()
        flow = self.flow
        sites: set[int] = set()  # ops that bring them to the data
        stack = [index for index, op in enumerate(flow.ops) if not wanted.isdisjoint(op.parameters)]
        seen = set(stack)
        while stack:
            index = stack.pop()
            if flow.data[index]:
                sites.add(index)
            else:
                stack += [reader for reader in flow.readers[index] if reader not in seen]
                seen.update(flow.readers[index])
        names = self.recording.names
        labels = [label for index in sites for label in joined_labels(flow, self.attention, index)]
        return frozenset(name for label in labels for name in (label.name, _norm_bias(label, names)) if name in wanted)

    def kept_reason(self, info: ParameterInfo, *, left_out: bool) -> str:
        """Why no node predicts a parameter."""
        if info.numel == 0:
            return NO_ELEMENTS
        if not info.dtype.is_floating_point:
            return NOT_FLOATING
        reached = info.name in self.reached
        return kept_reason(
            info.name,
            self.recording.owners[info.name],
            info.shape,
            reached=reached,
            table=reached and info.name in self.attention.tables,
            apart=reached and info.name in self.flow.norms_apart,
            left_out=left_out,
        )


def _operator_graph(reading: _Reading) -> Graph:
    """The classifier is what timm's metadata names, else the layer that makes the output."""
    recording = reading.recording
    draft, order = operator_draft(reading.flow, reading.attention)
    names = recording.names
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


def _published_graph(reading: _Reading) -> Graph:
    """The classifier of a published graph is what stands at its last two positions."""
    draft, order = published_draft(reading.recording)
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
    recording, model, names = reading.recording, reading.recording.model, reading.recording.names
    nodes = tuple(_node(draft, x, names, rules) for x in order)
    position = {x: index for index, x in enumerate(order)}
    edges = [(position[x], position[s]) for x in order for s in sorted(draft.successors[x], key=position.__getitem__)]
    predicted = {name for node in nodes for name in (node.parameter, node.norm_bias) if name is not None}
    rest = [info for info in recording.parameters if info.name not in predicted]
    left_out = reading.left_out([info.name for info in rest]) if rules == 'published' else frozenset()
    kept = {info.name: reading.kept_reason(info, left_out=info.name in left_out) for info in rest}
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


def _node(draft: Draft, x: int, names: Mapping[int, str], rules: str) -> Node:
    label = draft.labels[x]
    primitive = label.primitive
    if primitive is None:
        raise AssertionError(f'{label.name} is in the graph without a primitive')
    shape = None if label.shape is None else encoded_shape(label.shape)
    if label.module is None:
        return Node(primitive, label.name, None, shape)
    if rules == 'operators' and primitive is Primitive.POS_ENC and label.shape is not None:
        shape = encoded_position(label.shape)
    return Node(primitive, label.name, label.name, shape, _norm_bias(label, names), label.kernel, label.blocks)


def _norm_bias(label: Label, names: Mapping[int, str]) -> str | None:
    """Name of the bias that the node of a normalisation layer's weight predicts too."""
    if label.module is None or label.primitive not in (Primitive.BN, Primitive.LN):
        return None
    bias = label.module._parameters.get('bias')
    return None if bias is None else names[id(bias)]


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
        below = op.children
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
