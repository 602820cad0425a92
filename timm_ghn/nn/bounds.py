"""How large the outputs of a layer can be, from the sizes of its weights."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

#: What was found for a tensor: its version and address then, and its largest absolute value.
_FOUND: WeakIdKeyDictionary = WeakIdKeyDictionary()


@torch.no_grad()
def largest(tensor: Tensor) -> float:
    """Largest absolute value of a tensor, NaN if there is one in it; 0 for no elements."""
    if not tensor.numel():
        return 0.0
    least, most = torch.aminmax(tensor)
    return float(torch.maximum(-least, most))


def largest_weight(weight: Tensor) -> float:
    """:func:`largest` of a weight, which is remembered until the weight changes."""
    if weight.is_inference():  # has no version
        return largest(weight)
    state = weight._version, weight.data_ptr()
    found = _FOUND.get(weight)
    if found is None or found[0] != state:
        found = _FOUND[weight] = (state, largest(weight))
    return float(found[1])


def largest_output(layers: Iterable[nn.Linear], limit: float) -> float:
    """Bound on the absolute values of the outputs of all of a sequence of linear layers, with ReLU between them.

    |W x + b| <= n max|W| max|x| + max|b| for n inputs. Twice that is taken for each layer, to have room for rounding.

    Args:
        layers: In their order.
        limit: Bound on the absolute values of the inputs of the first layer.
    """
    bounds = []
    for layer in layers:
        limit = 2 * (layer.in_features * largest_weight(layer.weight) * limit + largest_weight(layer.bias))
        bounds.append(limit)
    # Unlike max(), a sum is not a number where one of them is not.
    return sum(bounds)
