"""Which layer of a donor each layer of a network corresponds to, by their places in the two graphs."""

from __future__ import annotations

import collections
import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from timm_ghn.transfer.layers import Layer

#: What it costs to read the donor's layers in another order than one after the other: to repeat a block, or skip one.
_JUMP = 1.0
#: The same in the middle of a block, whose layers then come from different ones.
_JUMP_INSIDE = 3.0
#: What it costs to leave a layer without a partner.
_ALONE = 4.0


def align(target: Sequence[Layer], donor: Sequence[Layer]) -> tuple[int | None, ...]:
    """The donor's layer for each layer of a network; None where no layer of its kind fits.

    The cheapest path through both sequences, by dynamic programming (Viterbi, 1967). A pair of layers costs what their
    places differ by: stage, depth of the block in the stage, place in the block, kernel, ratio of the channels. A step
    to the donor's next layer is free; any other, such as one back to the begin of a block that is repeated, costs the
    same. Networks that are the same are aligned layer by layer.
    """
    if not target or not donor:
        return (None,) * len(target)
    costs = _costs(target, donor)
    count = len(donor)
    # ahead[p]: cost of the best path after which the donor's layer p is the next one.
    ahead = torch.full((count + 1,), _JUMP, dtype=torch.float64)
    ahead[0] = 0
    steps: list[tuple[Tensor, Tensor, int]] = []  # of each layer: paired or alone, coming by a jump or not, from where
    block = -1
    for layer, row in zip(target, costs, strict=True):
        jump = ahead.min() + (_JUMP if layer.block != block else _JUMP_INSIDE)
        cheapest, block = int(ahead.argmin()), layer.block
        jumps = ahead[:-1] > jump
        paired = row + torch.where(jumps, jump, ahead[:-1])
        alone = ahead + _ALONE
        after = torch.cat((torch.full((1,), math.inf, dtype=torch.float64), paired))
        steps.append((after <= alone, jumps, cheapest))
        ahead = torch.minimum(after, alone)
    at = int(ahead.argmin())
    found: list[int | None] = []
    for is_pair, jumps, cheapest in reversed(steps):
        if bool(is_pair[at]):
            at -= 1
            found.append(at)
            at = cheapest if bool(jumps[at]) else at
        else:
            found.append(None)
    return tuple(reversed(found))


def _costs(target: Sequence[Layer], donor: Sequence[Layer]) -> Tensor:
    """float64 (T, D): what each pair of layers costs; infinite for those of different kinds."""

    def pairs(values: Sequence[Sequence[float]], others: Sequence[Sequence[float]]) -> Tensor:
        return torch.cdist(torch.tensor(values, dtype=torch.float64), torch.tensor(others, dtype=torch.float64), p=1.0)

    cost = pairs([_place(layer) for layer in target], [_place(layer) for layer in donor])
    for weight, mine, theirs in (
        (math.inf, [layer.kind for layer in target], [layer.kind for layer in donor]),
        (1.0, [layer.signature for layer in target], [layer.signature for layer in donor]),
    ):
        ids = {key: number for number, key in enumerate({*mine, *theirs})}
        same = torch.tensor([ids[key] for key in mine])[:, None] == torch.tensor([ids[key] for key in theirs])
        cost = torch.where(same, cost, cost + weight)
    return cost


def _place(layer: Layer) -> tuple[float, ...]:
    """Place of a layer; the numbers are scaled so that their differences are costs."""
    outputs, inputs, *kernel = *layer.shape, *(1,) * (2 - len(layer.shape))
    is_weight = layer.columns is not None and layer.kind != 'stem'
    ratio = math.log2(outputs / inputs) if is_weight and outputs and inputs else 0.0
    size = math.log2(max(math.prod(kernel), 1)) if layer.kind != 'position' else 0.0
    enters = 2.0 * layer.enters
    return 4.0 * layer.level, 4.0 * layer.run, 4.0 * layer.depth, enters, layer.place, 0.5 * size, 0.5 * ratio


def partners(pairs: Mapping[str, str], targets: Iterable[str], donors: Iterable[str]) -> dict[str, str]:
    """Partners of all that has no place of its own in a graph: biases, layer scales, tokens, running statistics.

    Where most layers below a module correspond to layers below one of the donor's, what else the two modules hold under
    the same names corresponds too.

    Args:
        pairs: Names of the donor's layers by those of the network's.
        targets: Names of the network's tensors.
        donors: Names of the donor's tensors.
    """
    votes: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for name, source in pairs.items():
        mine, theirs = name.split('.'), source.split('.')
        shared = 0
        while shared < min(len(mine), len(theirs)) and mine[-1 - shared] == theirs[-1 - shared]:
            shared += 1
        for cut in range(1, max(shared, 1) + 1):
            votes['.'.join(mine[:-cut])]['.'.join(theirs[:-cut])] += 1
    available, found = set(donors), dict(pairs)
    for name in targets:
        if name in found:
            continue
        parts = name.split('.')
        weight = '.'.join((*parts[:-1], parts[-1].replace('bias', 'weight')))
        if weight in pairs and weight != name and (source := pairs[weight].replace('weight', 'bias')) in available:
            found[name] = source
            continue
        for length in range(len(parts) - 1, -1, -1):
            module = '.'.join(parts[:length])
            if module in votes:
                likely = votes[module].most_common(1)[0][0]
                source = '.'.join(filter(None, (likely, *parts[length:])))
                if source in available:
                    found[name] = source
                break
    return found
