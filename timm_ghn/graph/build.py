"""From a network to the graph that a GHN reads."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from timm_ghn.errors import ConfigError, UnsupportedModelError
from timm_ghn.graph.attention import Attention
from timm_ghn.graph.checks import flaws_of
from timm_ghn.graph.flow import Flow
from timm_ghn.graph.graph import Graph, Node, ParameterInfo
from timm_ghn.graph.operators import joined_labels, operator_draft
from timm_ghn.graph.paths import reachable
from timm_ghn.graph.primitives import Primitive
from timm_ghn.graph.published import Draft, Label, published_draft
from timm_ghn.graph.trace import Recording, named_layers, record
from timm_ghn.graph.vocabulary import (
    AXIS_POSITIONS,
    GAIN,
    GAIN_NAMES,
    NO_ELEMENTS,
    NORM_APART,
    NOT_FLOATING,
    RELATIVE_POSITIONS,
    TOKEN,
    UNUSED,
    encoded_position,
    encoded_shape,
    is_token,
    norm_primitive,
    positional_size,
)

#: Arguments of :func:`trace`: one of two rule sets, or the one that suits the network.
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
    buffers, mode, attributes and the state of all random generators. One network is traced at a time; other threads
    wait. Until the trace is done, the model must not be used elsewhere, and the process's default dtype is float32.

    Args:
        model: Any network that takes a batch of images, on any device (the meta device included) and of any dtype.
        input_size: Side, (height, width) or (channels, height, width) of the image; by default that of the model
            (timm's ``pretrained_cfg``, or its patch embedding), else 224.
        example_inputs: Arguments of ``model.forward`` for a network that takes something else than one batch of
            images: a tensor, a tuple of positional or a dictionary of keyword arguments. Only shapes and dtypes are
            read from its tensors.
        rules: 'published': the graph that the reference's own code gives, accidents included, as the published GHNs
            were trained on. 'operators': the graph that follows from the operators. 'auto': the attribute
            ``graph_rules`` of the model; without one, the published graph if there is one that is sound
            (:mod:`timm_ghn.graph.checks`) and has a node for every parameter for which the other graph has one.

    Returns:
        The graph, its nodes in topological order. Its ``rules`` are 'published' or 'operators'.

    Raises:
        UnsupportedModelError: if the network cannot be run on the meta device (the error names the module that
            failed), or if ``rules`` is 'published' and the reference cannot read the network.
        ConfigError: if ``rules`` is unknown.
    """
    if rules not in RULES:
        raise ConfigError(f'expected rules to be one of {", ".join(RULES)} (got {rules!r})')
    if rules == 'auto':
        rules = getattr(model, 'graph_rules', rules)
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
    """A recording and what follows from it, whatever the rules that make the graph; each is computed when needed."""

    recording: Recording

    @functools.cached_property
    def flow(self) -> Flow:
        return Flow.of(self.recording)

    @functools.cached_property
    def attention(self) -> Attention:
        return Attention.of(self.flow)

    @functools.cached_property
    def reached(self) -> frozenset[str]:
        """Parameters that the forward pass uses."""
        return frozenset(name for op in self.recording.ops for name in op.parameters)

    @functools.cached_property
    def classifier(self) -> tuple[nn.Module, ...]:
        """The layers that timm's metadata names (several for distilled models), else the layer of the output."""
        named = named_layers(self.recording.model, 'classifier')
        found = tuple(layer for layer in named if any(True for _ in layer.parameters(recurse=False)))
        return found or _output_layer(self.flow)

    @property
    def num_classes(self) -> int | None:
        """Number of classes: the model's own, else the number of outputs of its classifier."""
        stated = _class_count(self.recording.model)
        if stated is not None:
            return stated or None
        return int(next(self.classifier[0].parameters()).shape[0]) if self.classifier else None

    def left_out(self, kept: Collection[str]) -> frozenset[str]:
        """Those of some kept parameters that the operator rules would predict."""
        wanted = self.reached.intersection(kept)
        if not wanted:
            return frozenset()
        flow, names, readers = self.flow, self.recording.names, self.recording.readers
        start = (index for index, op in enumerate(flow.ops) if not wanted.isdisjoint(op.parameters))
        on_the_way = reachable(start, lambda index: () if flow.data[index] else readers[index])
        sites = [index for index in on_the_way if flow.data[index]]  # ops that bring them to the data
        labels = [label for index in sites for label in joined_labels(flow, self.attention, index)]
        return frozenset(name for label in labels for name in (label.name, _norm_bias(label, names)) if name in wanted)

    def kept_reason(self, info: ParameterInfo, *, left_out: bool) -> str:
        """Why no node predicts a parameter, in words for the plan."""
        name, shape, module = info.name, info.shape, self.recording.owners[info.name]
        leaf = name.rpartition('.')[2]
        if info.numel == 0:
            return NO_ELEMENTS
        if not info.dtype.is_floating_point:
            return NOT_FLOATING
        if name not in self.reached:
            return UNUSED
        if left_out:
            return f'{type(module).__name__}.{leaf} is left out by the published rules'
        if name in self.attention.tables:
            return RELATIVE_POSITIONS
        if name in self.flow.norms_apart:
            return NORM_APART
        leaf = leaf.lower()
        if 'token' in leaf or (is_token(shape) and 'pos' not in leaf and leaf not in GAIN_NAMES):
            return TOKEN
        if norm_primitive(module) is None and sum(n > 1 for n in shape) <= 1 and 'bias' not in leaf:
            return GAIN
        if leaf.split('_')[-1] in GAIN_NAMES:
            return GAIN
        if leaf == 'freqs' or ('pos' in leaf and positional_size(shape) is None):
            return AXIS_POSITIONS
        if 'pos' in leaf:
            return 'positional parameter that the rules of this graph do not know'
        return f'{type(module).__name__}.{leaf} is not in the vocabulary of the rules of this graph'


def _operator_graph(reading: _Reading) -> Graph:
    """The class predictor decodes the weights and biases of the classifier's layers."""
    names = reading.recording.names
    draft, order = operator_draft(reading.flow, reading.attention)
    of_head = {names[id(p)] for layer in reading.classifier for p in layer.parameters()}
    found = {draft.name(x): draft.labels[x] for x in order if draft.name(x) in of_head}
    weights = tuple(
        name
        for name, label in found.items()
        if label.primitive is Primitive.CONV and label.shape is not None and set(label.shape[2:]) <= {1}
    )
    biases = tuple(name for name, label in found.items() if label.primitive is Primitive.BIAS)
    return _assemble(reading, draft, order, weights, biases, 'operators')


def _published_graph(reading: _Reading) -> Graph:
    """The class predictor decodes the last two nodes of a published graph, as in the reference."""
    draft, order = published_draft(reading.recording)
    weights, biases = ((), ()) if _class_count(reading.recording.model) == 0 else _last_layer(draft, order)
    return _assemble(reading, draft, order, weights, biases, 'published')


def _last_layer(draft: Draft, order: list[int]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of the weight and the bias at the end of a graph, if they look like a classifier's."""
    if len(order) < 2:
        return (), ()
    weight, bias = draft.labels[order[-2]], draft.labels[order[-1]]
    is_weight = weight.shape is not None and len(weight.shape) > 1 and set(weight.shape[2:]) <= {1}
    weights = (weight.name,) if weight.module is not None and '.weight' in weight.key and is_weight else ()
    is_bias = bias.module is not None and bias.primitive is Primitive.BIAS
    biases = (bias.name,) if is_bias and '.bias' in bias.key else ()
    return weights, biases


def _assemble(
    reading: _Reading,
    draft: Draft,
    order: list[int],
    weights: tuple[str, ...],
    biases: tuple[str, ...],
    rules: str,
) -> Graph:
    """Make a graph of a draft."""
    recording, names = reading.recording, reading.recording.names
    nodes = tuple(_node(draft, x, names, rules) for x in order)
    position = {x: index for index, x in enumerate(order)}
    edges = [(position[x], position[s]) for x in order for s in sorted(draft.successors[x], key=position.__getitem__)]
    predicted = {name for node in nodes for name in (node.parameter, node.norm_bias) if name is not None}
    rest = [info for info in recording.parameters if info.name not in predicted]
    left_out = reading.left_out([info.name for info in rest]) if rules == 'published' else frozenset()
    kept = {info.name: reading.kept_reason(info, left_out=info.name in left_out) for info in rest}
    of_head = {names[id(p)] for layer in reading.classifier for p in layer.parameters()} | {*weights, *biases}
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
        num_classes=reading.num_classes,
        rules=rules,
    )


def _node(draft: Draft, x: int, names: Mapping[int, str], rules: str) -> Node:
    label = draft.labels[x]
    primitive = label.primitive
    assert primitive is not None, label.name
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


def _class_count(model: nn.Module) -> int | None:
    """Number of classes that the model states, if any."""
    count = getattr(model, 'num_classes', None)
    return count if isinstance(count, int) else None


def _output_layer(flow: Flow) -> tuple[nn.Module, ...]:
    """The layer that makes the first output, in a tuple; empty if it is no linear layer or convolution."""
    at = flow.recording.outputs[:1] if _class_count(flow.recording.model) != 0 else ()
    while at:
        op = flow.ops[at[0]]
        names = op.parameters or tuple(name for child in op.children for name in flow.ops[child].parameters)
        if names and (op.parameters or op.kind == 'Mm'):
            layer = flow.owner(names[0])
            is_layer = any(name in _WEIGHTS and p.dim() > 1 for name, p in layer.named_parameters())
            return (layer,) if is_layer else ()
        at = op.children[:1]
    return ()


#: Names of a layer's weight, and of the parameters that torch.nn.utils.parametrizations computes it from.
_WEIGHTS = ('weight', *(f'parametrizations.weight.original{index}' for index in ('', 0, 1)))
