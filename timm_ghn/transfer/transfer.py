"""Weights from a related network: planned, shown, written whole or not at all.

Layers are matched by their places in the two graphs (:mod:`timm_ghn.transfer.match`), and each tensor is cut or filled
to its new shape (:mod:`timm_ghn.transfer.resize`). What has no partner is predicted by a GHN at the scale of its
neighbours, or kept.
"""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from timm_ghn.contexts import preserve_modes, preserve_rng
from timm_ghn.errors import ConfigError, PredictionError, UnsupportedModelError
from timm_ghn.graph.build import trace
from timm_ghn.graph.graph import Graph
from timm_ghn.nn.ghn import GHN
from timm_ghn.prediction.checks import check_dtype, check_finite, check_storage, check_writable, write_all_
from timm_ghn.prediction.predict import Prediction, predict
from timm_ghn.transfer.donors import load_donor
from timm_ghn.transfer.layers import Layer, blocks_of, last_of_branch, layers_of
from timm_ghn.transfer.match import align, partners
from timm_ghn.transfer.resize import resize_other, resize_positions, resize_vector, resize_weight

#: Largest difference of two outputs that are to be the same, as a share of the largest output.
_SAME = 1e-3


@dataclasses.dataclass(frozen=True, slots=True)
class TransferRow:
    """One parameter or buffer of the network.

    Attributes:
        name: Its name.
        shape: Its shape.
        action: 'copied' (as it is), 'resized', 'zero' (so that its block is the identity), 'predicted' or 'kept'.
        source: Name of the donor's tensor.
        detail: The donor's shape, how it was predicted, or why it is kept.
    """

    name: str
    shape: tuple[int, ...]
    action: str
    source: str | None
    detail: str

    @property
    def how(self) -> str:
        """What becomes of it, in words."""
        source = f' from {self.source}' if self.source else ''
        return f'{self.action}{source}{f": {self.detail}" if self.detail else ""}'


@dataclasses.dataclass(frozen=True)
class Transfer:
    """What a network gets from a donor.

    Attributes:
        state_dict: Tensors that are to be written, by the network's own names (all names of a tied one).
        rows: Every parameter and every buffer of the state dict once.
        provenance: Facts about the donor and the call, as plain values.
    """

    state_dict: dict[str, Tensor]
    rows: tuple[TransferRow, ...]
    provenance: dict[str, Any]

    def apply_(self, model: nn.Module) -> None:
        """Write it into the model that it was made for, in place: all of it or, if anything fails, none.

        Raises:
            UnsupportedModelError: if a tensor cannot be written in place.
            PredictionError: if writing fails.
        """
        targets = _tensors(model)
        wanted = {row.name: targets[row.name] for row in self.rows if row.action != 'kept'}
        for name, tensor in wanted.items():
            (check_writable if tensor.is_floating_point() else check_storage)(name, tensor)
        write_all_(wanted, lambda name, tensor: tensor.copy_(self.state_dict[name]))

    def summary(self) -> dict[str, dict[str, int]]:
        """Numbers of tensors and elements by action."""
        found: dict[str, dict[str, int]] = {}
        for row in self.rows:
            total = found.setdefault(row.action, {'tensors': 0, 'elements': 0})
            total['tensors'] += 1
            total['elements'] += torch.Size(row.shape).numel()
        return found

    def __str__(self) -> str:
        cells = [(row.name, _words(row.shape), row.how) for row in self.rows]
        widths = [max((len(cell[column]) for cell in cells), default=0) for column in range(2)]
        lines = [f'{name:{widths[0]}}  {shape:{widths[1]}}  {how}' for name, shape, how in cells]
        totals = ', '.join(f'{n["elements"]:,} {action}' for action, n in self.summary().items())
        return '\n'.join((*lines, f'elements from {self.provenance["donor"]}: {totals}'))


def plan_transfer(
    model: nn.Module,
    donor: nn.Module | str | os.PathLike[str],
    *,
    ghn: GHN | str | os.PathLike[str] | None = None,
    function_preserving: bool = False,
    input_size: int | Sequence[int] | None = None,
    seed: int = 0,
) -> Transfer:
    """Plan what a network gets from a donor, without touching either.

    Args:
        model: Any network that takes a batch of images.
        donor: A network; a timm name with a tag, 'resnet18.a1_in1k', or 'hf-hub:user/name', for timm's weights; or a
            safetensors file of ``timm-ghn predict`` or ``finetune``.
        ghn: What predicts the weights that have no partner: a GHN, or the name or path of one; None keeps them.
        function_preserving: Have the network compute what the donor computes (Net2Net, arXiv 1511.05641): no noise on
            copies, larger kernels with zeros around, and additional residual blocks that begin as the identity. It
            holds for wider and deeper relatives; layer norms ask for whole multiples of the width. Both networks are
            run on random images to check it.
        input_size: Image size, see :func:`timm_ghn.trace`.
        seed: Of the noise on copied channels, and of what a GHN draws.

    Returns:
        The plan with its tensors; the same call gives the same one.

    Raises:
        ConfigError: if ``function_preserving`` is asked of networks with other inputs or classes.
        UnsupportedModelError: if a network cannot be traced, timm cannot load the donor, or nothing corresponds.
        PredictionError: if a value is not finite, or ``function_preserving`` does not hold.
        GHNError: if the GHN or a file cannot be loaded.
    """
    name = type(donor).__name__ if isinstance(donor, nn.Module) else str(donor)
    giver = load_donor(donor)
    graph = trace(model, input_size=input_size, rules='operators')
    # timm's networks say what they read; others are read as the model is.
    own = giver is not model and hasattr(giver, 'pretrained_cfg')
    graphs = graph, trace(giver, input_size=None if own else input_size, rules='operators')
    channels, classes = ([one.input_size[0] for one in graphs], [one.num_classes for one in graphs])
    if function_preserving and (len(set(channels)) > 1 or len(set(classes)) > 1):
        raise ConfigError(
            f'expected as many input channels and classes as the donor has for function_preserving (got {channels[0]} '
            f'and {classes[0]} for {channels[1]} and {classes[1]}): leave it out'
        )
    found = _Matched(model, giver, graphs, preserve=function_preserving, seed=seed)
    if not found.tensors:
        raise UnsupportedModelError(f'no layer of {type(model).__name__} corresponds to one of the donor {name}')
    prediction = None if ghn is None else predict(model, ghn, input_size=input_size, seed=seed)
    if prediction is not None:
        found.predict(prediction)
    for row in found.rows:
        if row.name in found.tensors and found.tensors[row.name].is_floating_point():
            check_dtype(row.name, found.tensors[row.name].dtype)
            check_finite(f"'{row.name}': values", found.tensors[row.name])
    if function_preserving:
        _check_same(model, giver, found.tensors, graph.input_size)
    aliases = {info.name: info.aliases for info in graph.parameters}
    state = {alias: value for key, value in found.tensors.items() for alias in (key, *aliases.get(key, ()))}
    facts = {
        'donor': name,
        'function_preserving': function_preserving,
        'seed': seed,
        'ghn': None if prediction is None else prediction.provenance,
    }
    return Transfer(state, tuple(found.rows), facts)


def transfer_(
    model: nn.Module,
    donor: nn.Module | str | os.PathLike[str],
    *,
    ghn: GHN | str | os.PathLike[str] | None = None,
    function_preserving: bool = False,
    input_size: int | Sequence[int] | None = None,
    seed: int = 0,
) -> Transfer:
    """Give a network the weights of a related one, in place: all of them or, if anything fails, none.

    Arguments and errors are those of :func:`plan_transfer`.

    Returns:
        What came from where; print it.

    Raises:
        UnsupportedModelError: also if the model is on the meta device, or a tensor cannot be written.
        PredictionError: also if writing fails.
    """
    for name, tensor in _tensors(model).items():
        check_storage(name, tensor)
    found = plan_transfer(
        model, donor, ghn=ghn, function_preserving=function_preserving, input_size=input_size, seed=seed
    )
    found.apply_(model)
    return found


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters (each once, under its first name) and the buffers of the state dict."""
    parameters = dict(model.named_parameters())
    everything = dict(model.named_parameters(remove_duplicate=False))
    buffers = dict(model.named_buffers())
    return parameters | {key: buffers[key] for key in model.state_dict() if key in buffers and key not in everything}


class _Matched:
    """Pairs the tensors of two networks and resizes those of the donor.

    Attributes:
        rows: What becomes of each tensor of the network.
        tensors: What is to be written, by name.
    """

    @torch.no_grad()
    def __init__(
        self, model: nn.Module, donor: nn.Module, graphs: tuple[Graph, Graph], *, preserve: bool, seed: int
    ) -> None:
        self.model, self.graphs, self.preserve = model, graphs, preserve
        self.targets, self.given = _tensors(model), _tensors(donor)
        for name, tensor in self.given.items():
            check_storage(f'{name} of the donor', tensor)
        mine, theirs = layers_of(model, graphs[0]), layers_of(donor, graphs[1])
        found = align(mine, theirs)
        pairs = {one.name: theirs[index] for one, index in zip(mine, found, strict=True) if index is not None}
        self.layers = {one.name: (one, pairs[one.name]) for one in mine if one.name in pairs}
        self.modules = {name.rpartition('.')[0]: pair for name, pair in self.layers.items()}
        self.sources = partners({name: one.name for name, one in pairs.items()}, self.targets, self.given)
        zero = self._identities(mine, pairs) if preserve else frozenset()
        self.order = [one.name for one in mine]
        self.generator = torch.Generator().manual_seed(seed)
        self.rows: list[TransferRow] = []
        self.tensors: dict[str, Tensor] = {}
        for name, tensor in self.targets.items():
            shape, source = tuple(tensor.shape), self.sources.get(name)
            value, reason = self._value(name, source)
            if value is None or source is None:
                self.rows.append(TransferRow(name, shape, 'kept', None, reason))
            elif name in zero:
                self.rows.append(TransferRow(name, shape, 'zero', None, 'its block begins as the identity'))
                self.tensors[name] = tensor * 0
            else:
                same = value is self.given[source] or value.data_ptr() == self.given[source].data_ptr()
                detail = '' if same else f'{_words(self.given[source].shape)} to {_words(shape)}'
                self.rows.append(TransferRow(name, shape, 'copied' if same else 'resized', source, detail))
                self.tensors[name] = value.detach().to(tensor.device, tensor.dtype, copy=True)

    def _value(self, name: str, source: str | None) -> tuple[Tensor | None, str]:
        """The donor's tensor in the shape of a tensor of the network, or why there is none."""
        if source is None:
            return None, 'no layer of its kind at its place in the donor' if name in self.order else 'no partner'
        tensor, shape = self.given[source], tuple(self.targets[name].shape)
        no_rule = f'{_words(tensor.shape)} of {source} does not become {_words(shape)}'
        graph, donor = self.graphs
        if (name in graph.classifier or source in donor.classifier) and graph.num_classes != donor.num_classes:
            return None, f'classifier of {graph.num_classes} classes, the donor has {donor.num_classes}'
        if tensor.is_floating_point() != self.targets[name].is_floating_point():
            return None, no_rule
        pair = self.layers.get(name)
        owner = self.modules.get(name.rpartition('.')[0])
        if name not in graph.node_of and name not in graph.kept and owner is None:  # a buffer
            return (tensor, '') if tuple(tensor.shape) == shape else (None, no_rule)
        if pair is not None:
            value = self._layer(tensor, *pair)
        elif owner is not None and shape == owner[0].shape[:1] and tuple(tensor.shape) == owner[1].shape[:1]:
            # A number for each row of the layers whose modules hold the two vectors.
            value = resize_vector(tensor, owner[0].rows, owner[1].rows, shape[0])
        elif 'relative position' in graph.kept.get(name, '') and tensor.shape[:-1] != shape[:-1]:
            value = resize_positions(tensor, shape)
        else:
            value = resize_other(tensor, shape)
        fits = value is not None and tuple(value.shape) == shape
        return (value, '') if fits else (None, no_rule)

    def _layer(self, tensor: Tensor, target: Layer, donor: Layer) -> Tensor | None:
        nodes = self.graphs[0].nodes[target.node], self.graphs[1].nodes[donor.node]
        if any(node.kernel or node.blocks for node in nodes):  # stored in a form of its own
            return tensor if tuple(tensor.shape) == target.shape else None
        if target.kind == 'position':
            return resize_positions(tensor, target.shape)
        module = self.model.get_submodule(target.name.rpartition('.')[0])
        patches = target.kind == 'stem' and getattr(module, 'stride', None) == target.shape[2:]
        return resize_weight(tensor, target, donor, patches=patches, preserve=self.preserve, generator=self.generator)

    def _identities(self, mine: Sequence[Layer], pairs: Mapping[str, Layer]) -> frozenset[str]:
        """Tensors that are zero so that the second and further copies of a residual block compute nothing."""
        seen: Counter[tuple[int, ...]] = Counter()
        found: set[str] = set()
        for layers in blocks_of(mine).values():
            copied = tuple(sorted({pairs[layer.name].block for layer in layers if layer.name in pairs}))
            seen[copied] += 1
            if copied and seen[copied] > 1:
                for layer in last_of_branch(self.graphs[0], layers):
                    bias = layer.name.replace('weight', 'bias')
                    found |= {layer.name, *({bias} if bias in self.targets else ())}
        return frozenset(found)

    @torch.no_grad()
    def predict(self, prediction: Prediction) -> None:
        """Have a GHN's prediction serve where the donor has nothing, at the scale of the transferred neighbours.

        The factor of a weight is the geometric mean of that between donor and prediction, of the nearest transferred
        weights on both sides of it.
        """
        predicted = {row.name for row in prediction.plan.predicted}
        ratios: dict[int, float] = {}
        for position, name in enumerate(self.order):
            if name in predicted and name in self.tensors and self.targets[name].dim() > 1:
                norms = [value.float().norm() for value in (self.tensors[name], prediction.state_dict[name])]
                if min(map(float, norms)) > 0:
                    ratios[position] = float((norms[0] / norms[1]).log())
        for index, row in enumerate(self.rows):
            if row.action != 'kept' or row.name not in predicted:
                continue
            value, factor = prediction.state_dict[row.name], 1.0
            if row.name in self.order and value.dim() > 1 and ratios and row.name not in self.graphs[0].classifier:
                at = self.order.index(row.name)
                before = [ratios[p] for p in sorted(ratios) if p < at][-1:]
                after = [ratios[p] for p in sorted(ratios) if p > at][:1]
                factor = float(torch.tensor(before + after).mean().exp())
            detail = f'{prediction.provenance["ghn"]}{f", times {factor:.3g}" if factor != 1 else ""} ({row.detail})'
            self.rows[index] = TransferRow(row.name, row.shape, 'predicted', None, detail)
            self.tensors[row.name] = (value * factor).to(self.targets[row.name])


def _words(shape: Sequence[int]) -> str:
    return 'x'.join(map(str, shape)) or 'scalar'


@torch.no_grad()
def _check_same(model: nn.Module, donor: nn.Module, tensors: Mapping[str, Tensor], size: tuple[int, int, int]) -> None:
    """Run both networks on random images.

    Raises:
        PredictionError: if their outputs differ.
    """
    like = next(iter(tensors.values()))
    with preserve_rng(0), preserve_modes(model), preserve_modes(donor):
        model.eval()
        donor.eval()
        images = torch.randn(2, *size).to(like)
        given = next(iter(donor.parameters()))
        wanted = donor(images.to(given)).to(like)
        found = torch.func.functional_call(model, dict(tensors), (images,))
    difference = float((found - wanted).abs().max() / wanted.abs().max().clamp_min(1e-12))
    if difference > _SAME:
        raise PredictionError(
            f'the network would not compute what the donor computes: outputs differ by {difference:.2g} of the largest '
            'one; function_preserving holds for wider and deeper networks of one design, of whole multiples of the '
            'width where there are layer norms. Leave it out to transfer what can be'
        )
