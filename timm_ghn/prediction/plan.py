"""What happens to each parameter of a model: predicted from which node and how, or kept and why."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any

import torch

from timm_ghn.errors import ConfigError
from timm_ghn.graph.channels import channel_layouts
from timm_ghn.graph.graph import Graph, ParameterInfo
from timm_ghn.graph.primitives import Primitive
from timm_ghn.graph.vocabulary import NO_ELEMENTS, NOT_FLOATING, encoded_position, positional_size
from timm_ghn.nn.config import GHNConfig
from timm_ghn.nn.requests import DecodeKind, DecodeRequest
from timm_ghn.prediction.fit import Fit, fit_of

#: A plan is made for a GHN. Which parameters are predicted, and which are layers, does not depend on it, so this one
#: stands for any.
ANY_GHN = GHNConfig(hid=4, max_shape=(1, 1, 1, 1), num_classes=1, gnn='mlp')

#: What can be asked of the classifier.
HEAD_OPTIONS = ('auto', 'predict', 'keep')


@dataclasses.dataclass(frozen=True, slots=True)
class ParameterRow:
    """One parameter of the plan.

    Attributes:
        owner: Class of the module that holds it.
        aliases: Its other names, when it is tied.
        role: 'weight', 'bias', 'norm weight', 'norm bias', 'position', 'head weight', 'head bias', or 'kept'.
        node: Index of the graph node that predicts it, None when it is kept.
        request: What the GHN decodes for it.
        fit: How that is tiled and scaled to the parameter.
        reason: Why it keeps its own initialisation, None when it is predicted.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    owner: str
    aliases: tuple[str, ...]
    role: str
    node: int | None = None
    request: DecodeRequest | None = None
    fit: Fit | None = None
    reason: str | None = None

    @property
    def predicted(self) -> bool:
        """Whether the GHN predicts it."""
        return self.request is not None

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def how(self) -> str:
        """How it comes about, in words."""
        return f'kept: {self.reason}' if self.fit is None else self.fit.describe(self.shape)

    def to_dict(self) -> dict[str, Any]:
        """Plain values that ``json`` can write."""
        facts = {name: getattr(self, name) for name in ('name', 'owner', 'role', 'node', 'how', 'reason')}
        lists = {'shape': list(self.shape), 'aliases': list(self.aliases)}
        return {**facts, **lists, 'dtype': str(self.dtype).removeprefix('torch.')}


@dataclasses.dataclass(frozen=True, eq=False)
class ParameterPlan:
    """Every parameter of a model, exactly once, in the order of ``model.named_parameters()``.

    Plans are compared by identity, as graphs are.
    """

    rows: tuple[ParameterRow, ...]
    graph: Graph

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[ParameterRow]:
        return iter(self.rows)

    @functools.cached_property
    def predicted(self) -> tuple[ParameterRow, ...]:
        """Rows that the GHN predicts."""
        return tuple(row for row in self.rows if row.predicted)

    @functools.cached_property
    def kept(self) -> tuple[ParameterRow, ...]:
        """Rows that keep their own initialisation."""
        return tuple(row for row in self.rows if not row.predicted)

    def summary(self) -> dict[str, Any]:
        """Totals: numbers of tensors and of elements, predicted, and kept by reason."""
        reasons: dict[str, dict[str, int]] = {}
        for row in self.kept:
            total = reasons.setdefault(row.reason or '', {'tensors': 0, 'elements': 0})
            total['tensors'] += 1
            total['elements'] += row.numel
        return {
            'nodes': len(self.graph),
            'edges': len(self.graph.edges_E2),
            'rules': self.graph.rules,
            'tensors': len(self.rows),
            'elements': sum(row.numel for row in self.rows),
            'predicted_tensors': len(self.predicted),
            'predicted_elements': sum(row.numel for row in self.predicted),
            'kept': reasons,
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain values that ``json`` can write: the summary and all rows."""
        return {'summary': self.summary(), 'rows': [row.to_dict() for row in self.rows]}

    def totals(self) -> str:
        """A table of tensors and elements: predicted, and kept by reason."""
        summary = self.summary()
        rows = [(summary['predicted_tensors'], summary['predicted_elements'], f'predicted, of {len(self.graph)} nodes')]
        rows += [(kept['tensors'], kept['elements'], f'kept: {why}') for why, kept in summary['kept'].items()]
        rows.append((summary['tensors'], summary['elements'], 'all'))
        lines = [f'{n:>9,}{size:>17,}  {text}' for n, size, text in rows]
        return '\n'.join([f'{"tensors":>9}{"elements":>17}  parameters', *lines])

    def __str__(self) -> str:
        cells = [('parameter', 'shape', 'role', 'node', 'how')]
        for row in self.rows:
            shape = 'x'.join(map(str, row.shape)) or 'scalar'
            cells.append((row.name, shape, row.role, '-' if row.node is None else str(row.node), row.how))
        widths = [max(len(line[column]) for line in cells) for column in range(4)]
        table = ['  '.join([*(c.ljust(w) for c, w in zip(line, widths, strict=False)), line[4]]) for line in cells]
        return '\n'.join([*table, '', self.totals()])


def plan_parameters(graph: Graph, config: GHNConfig, *, head: str = 'auto') -> ParameterPlan:
    """Decide for each parameter of a traced model whether and how it is predicted.

    Args:
        graph: The traced model.
        config: Of the GHN that will predict.
        head: 'auto': predict the classifier if it has as many classes as the GHN was trained with. 'predict': always
            (rows are repeated where there are more classes). 'keep': never.

    Raises:
        ConfigError: if ``head`` is something else.
    """
    if head not in HEAD_OPTIONS:
        raise ConfigError(f'expected head to be one of {", ".join(HEAD_OPTIONS)} (got {head!r})')
    kept = dict(graph.kept)
    if head == 'keep':
        kept |= dict.fromkeys(graph.classifier, 'head kept on request')
    elif head == 'auto' and graph.num_classes != config.num_classes:
        why = f'head for {graph.num_classes} classes, the GHN was trained with {config.num_classes}'
        kept |= dict.fromkeys(graph.classifier, why)
    layouts = channel_layouts(graph)
    rows = []
    for info in graph.parameters:
        facts = info.name, info.shape, info.dtype, info.owner, info.aliases
        reason = kept.get(info.name)
        if reason is None and not info.dtype.is_floating_point:
            reason = NOT_FLOATING
        elif reason is None and not info.numel:
            reason = NO_ELEMENTS
        if reason is not None:
            rows.append(ParameterRow(*facts, 'kept', reason=reason))
            continue
        index = graph.node_of[info.name]
        node, (kind, role) = graph.nodes[index], _kind(info, graph, index)
        at = role == 'position'
        size, fit = fit_of(kind, info.shape, config, position=at, kernel=node.kernel, blocks=node.blocks)
        rows.append(ParameterRow(*facts, role, index, DecodeRequest(kind, index, size, layouts[index]), fit))
    return ParameterPlan(tuple(rows), graph)


def _kind(info: ParameterInfo, graph: Graph, index: int) -> tuple[DecodeKind, str]:
    """Which decoder a parameter needs, and its role in words."""
    node = graph.nodes[index]
    if info.name == node.norm_bias:
        return DecodeKind.BIAS_1D, 'norm bias'
    if info.name in graph.class_weights:
        return DecodeKind.HEAD_WEIGHT, 'head weight'
    if info.name in graph.class_biases:
        return DecodeKind.HEAD_BIAS, 'head bias'
    if node.primitive is Primitive.BIAS:
        return DecodeKind.BIAS_1D, 'bias'
    if node.primitive in (Primitive.BN, Primitive.LN) or len(info.shape) < 2:
        return DecodeKind.WEIGHT_1D, 'norm weight'
    encoded = positional_size(info.shape) and node.shape == encoded_position(info.shape)
    return DecodeKind.TENSOR, 'position' if node.primitive is Primitive.POS_ENC and encoded else 'weight'
