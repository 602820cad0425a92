"""The attentions of a network: their softmaxes, their weights and their tables of relative positions."""

from __future__ import annotations

import dataclasses

from timm_ghn.graph.flow import Flow
from timm_ghn.graph.paths import reachable
from timm_ghn.graph.primitives import Primitive
from timm_ghn.graph.vocabulary import MULTIPLIES, is_layer, operator_primitive

#: Ops that add a table to the logits (``CopySlices`` to a slice in place).
_ADDS = frozenset({'Add', 'Sub', 'Baddbmm', 'CopySlices'})


@dataclasses.dataclass(frozen=True)
class Attention:
    """What the attentions of a network consist of.

    Attributes:
        softmaxes: Ops that make the weights of an attention.
        weights: Ops that carry such weights, from the softmax to the product with the values.
        tables: Tables of relative positions: parameters that are added to the logits of an attention.
    """

    softmaxes: frozenset[int]
    weights: frozenset[int]
    tables: frozenset[str]

    @classmethod
    def of(cls, flow: Flow) -> Attention:
        """Find the attentions of a network."""
        softmaxes, weights = _weights(flow)
        return cls(softmaxes, weights, _tables(flow))


def is_softmax(flow: Flow, index: int) -> bool:
    """Whether an op is a softmax of any kind."""
    return operator_primitive(flow.ops[index].kind) is Primitive.MSA


def _weights(flow: Flow) -> tuple[frozenset[int], frozenset[int]]:
    """Softmaxes that enter a matrix product with values (the softmax of a gate does not), and the ops in between.

    Between the two, the weights may be reshaped, masked, scaled, mixed with other attention weights, and multiplied by
    data. After a multiplication by data, only a product of data with data is an attention: data that a gate scales
    enters layers too.
    """
    carried: dict[int, frozenset[int]] = {}
    scaled: set[int] = set()
    found: set[int] = set()
    for index in flow.order:
        if not flow.data[index]:
            continue
        op, children = flow.ops[index], flow.data_inputs(index)
        if is_softmax(flow, index):
            carried[index] = frozenset({index})
            continue
        carriers = [child for child in children if child in carried]
        if not carriers:
            continue
        softmaxes = frozenset().union(*(carried[child] for child in carriers))
        by_data = any(child in scaled for child in carriers)
        if op.kind in MULTIPLIES:
            if len(children) > 1 or not by_data:
                found |= softmaxes
            continue
        alone = len(carriers) == len(children)
        if alone and len(children) == 1 and op.parameters and op.kind not in ('Add', 'Mul', 'Div'):
            continue
        if alone and len(children) > 1 and op.kind not in ('Add', 'Sub', 'Mul', 'Div'):
            continue
        if not alone and op.kind not in ('Mul', 'Div'):
            continue
        carried[index] = softmaxes
        if by_data or not alone:
            scaled.add(index)
    return frozenset(found), frozenset(index for index, softmaxes in carried.items() if softmaxes & found)


def _tables(flow: Flow) -> frozenset[str]:
    """Parameters that are added to logits, as they are or multiplied with the queries.

    Logits are a product of data with data that becomes the argument of a softmax. One layer may lie between, such as a
    convolution over the heads (talking heads).
    """
    product, softmax = _layers_behind_product(flow), _layers_before_softmax(flow)
    logits = {index for index in product.keys() & softmax.keys() if product[index] + softmax[index] <= 1}
    sums = [index for index in logits if flow.ops[index].kind in _ADDS and len(flow.data_inputs(index)) > 1]
    added = reachable(  # ops whose output is added to logits
        (child for index in sums for child in flow.data_inputs(index)),
        lambda index: () if flow.ops[index].kind in MULTIPLIES else flow.data_inputs(index),
    )
    found: set[str] = set()
    for index in logits | added:
        kind = flow.ops[index].kind
        if kind in _ADDS or (kind in MULTIPLIES and index in added and len(flow.data_inputs(index)) == 1):
            found.update(flow.joining(index))
    return frozenset(name for name in found if len(flow.recording.shapes[name]) > 1 and not is_layer(flow.owner(name)))


def _layers_behind_product(flow: Flow) -> dict[int, int]:
    """Number of layers between a product of data with data and each op that it reaches."""
    found: dict[int, int] = {}
    for index in flow.order:
        if not flow.data[index] or _stops(flow, index):
            continue
        children = flow.data_inputs(index)
        multiplies = flow.ops[index].kind in MULTIPLIES
        if multiplies and len(children) > 1:
            found[index] = 0
        elif reached := [found[child] + multiplies for child in children if child in found]:
            found[index] = min(reached)
    return found


def _layers_before_softmax(flow: Flow) -> dict[int, int]:
    """Number of layers between each op and a softmax that it leads to."""
    found: dict[int, int] = {}
    for index in reversed(flow.order):
        if not flow.data[index]:
            continue
        for reader in flow.recording.readers[index]:
            multiplies = flow.ops[reader].kind in MULTIPLIES
            if is_softmax(flow, reader):
                found[index] = 0
            elif reader in found and not (multiplies and len(flow.data_inputs(reader)) > 1):
                found[index] = min(found.get(index, 2), found[reader] + multiplies)
    return {index: count for index, count in found.items() if not _stops(flow, index)}


def _stops(flow: Flow, index: int) -> bool:
    """Whether logits do not pass through an op: a softmax or a normalisation."""
    return is_softmax(flow, index) or flow.ops[index].kind.startswith('Native')
