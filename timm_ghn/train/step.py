"""One step of meta-training: parameters of several networks in one prediction, and the gradient of their losses.

L = 1/m sum_a cross_entropy(a(x; H(a)), y) over the m architectures a of a meta-batch, all on the same images x (arXiv
2110.13100, equation 2; arXiv 2303.04143 keeps it), or each on its own. The loss of each network is differentiated with
respect to its parameters by itself, so that only one network's activations exist at a time and one whose loss is not
finite can be left out; the GHN is differentiated once for all.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from timm_ghn.nn.ghn import GHN
from timm_ghn.prediction.fit import fitted
from timm_ghn.train.blueprints import Blueprint


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of the networks of a meta-batch.

    Attributes:
        losses: Cross-entropy of each network that was not left out.
        accuracies: Share of the images that it classifies rightly.
        skipped: Networks that were left out, since their loss or gradient was not finite.
    """

    losses: tuple[float, ...]
    accuracies: tuple[float, ...]
    skipped: int


def predict_parameters(ghn: GHN, blueprints: Sequence[Blueprint]) -> list[dict[str, Tensor]]:
    """Predict the parameters of several networks at once; differentiable.

    Returns:
        For each network its predicted parameters by name, all names of a tied one.
    """
    embeddings_Nd = ghn.encode([blueprint.graph for blueprint in blueprints])
    requests, places = [], []
    offset = 0
    for which, blueprint in enumerate(blueprints):
        for row in blueprint.plan.predicted:
            request = row.request
            if request is not None:
                requests.append(dataclasses.replace(request, node=request.node + offset))
                places.append((which, row))
        offset += len(blueprint.graph)
    found: list[dict[str, Tensor]] = [{} for _ in blueprints]
    # Random tokens are those of the network alone as well: drawn in the order of its plan.
    generators = [torch.Generator().manual_seed(0) for _ in blueprints]
    decoded = dict(ghn.decode(embeddings_Nd, requests))
    for index, (which, row) in enumerate(places):
        if row.fit is not None:
            tensor = fitted(decoded.pop(index), row.fit, row.shape, generators[which])
            found[which].update(dict.fromkeys((row.name, *row.aliases), tensor))
    return found


def train_step(
    ghn: GHN,
    blueprints: Sequence[Blueprint],
    images: Tensor,
    labels: Tensor,
    *,
    networks: int | None = None,
    clip: float | None = None,
    smoothing: float = 0.0,
    autocast: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
) -> Outcome:
    """Add the gradient of the mean loss of networks to that of the GHN.

    Args:
        ghn: The GHN.
        blueprints: Of the networks.
        images: A normalised batch (B, channels, height, width) for all networks, or one for each of them (networks, B,
            channels, height, width).
        labels: (B,), or (networks, B).
        networks: Number of networks m of the mean, where these are a part of them.
        clip: Largest norm of the gradient of a network's loss with respect to its parameters. Without it, one deep
            network without norm layers outweighs all others of a step.
        smoothing: Label smoothing.
        autocast: Context in which the networks compute; the GHN itself is always in float32.
    """
    predicted = predict_parameters(ghn, blueprints)
    if labels.dim() == 1:
        batches = [(_to_channels_last(images), labels)] * len(blueprints)
    else:
        batches = [(_to_channels_last(own), targets) for own, targets in zip(images, labels, strict=True)]
    share = 1 / (networks or len(blueprints))
    tensors: list[Tensor] = []
    gradients: list[Tensor] = []
    losses, accuracies = [], []
    for blueprint, parameters, (inputs, targets) in zip(blueprints, predicted, batches, strict=True):
        leaves = {id(tensor): _to_channels_last(tensor.detach()).requires_grad_() for tensor in parameters.values()}
        own = {id(tensor): tensor for tensor in parameters.values()}
        with autocast():
            logits = blueprint({name: leaves[id(tensor)] for name, tensor in parameters.items()}, inputs)
        loss = F.cross_entropy(logits.float(), targets, label_smoothing=smoothing)
        found = torch.autograd.grad(loss * share, list(leaves.values()), allow_unused=True)
        used = [(own[key], gradient) for key, gradient in zip(leaves, found, strict=True) if gradient is not None]
        parts = [gradient for _, gradient in used]
        value, norm = torch.stack([loss.detach(), torch.nn.utils.get_total_norm(parts).to(loss)]).tolist()
        if not (math.isfinite(value) and math.isfinite(norm)):
            continue
        tensors += [tensor for tensor, _ in used]
        if clip is not None and norm > clip * share:
            parts = [gradient * (clip * share / norm) for gradient in parts]
        gradients += parts
        losses.append(value)
        accuracies.append(float((logits.argmax(1) == targets).float().mean()))
    if tensors:
        torch.autograd.backward(tensors, gradients)
    return Outcome(tuple(losses), tuple(accuracies), len(blueprints) - len(losses))


def sum_gradients(ghn: GHN, reduce: Callable[[Tensor], Tensor]) -> None:
    """Put the sum over processes, which ``reduce`` gives, in place of each gradient, in a single message.

    Which parameters of the GHN have a gradient depends on the architectures of a process.
    """
    parameters = [parameter for parameter in ghn.parameters() if parameter.requires_grad]
    gradients = [torch.zeros_like(one) if one.grad is None else one.grad for one in parameters]
    flat = reduce(torch.cat([gradient.flatten() for gradient in gradients]))
    for parameter, gradient in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = gradient.view_as(parameter)


def _to_channels_last(tensor: Tensor) -> Tensor:
    """Images and kernels in the order of axes that convolutions on a CPU are faster with, by a third to a half."""
    if tensor.device.type != 'cpu' or tensor.dim() != 4:
        return tensor
    return tensor.contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def accuracies_of(ghn: GHN, blueprint: Blueprint, batches: Sequence[tuple[Tensor, Tensor]]) -> tuple[float, float]:
    """Accuracy in percent and cross-entropy of a predicted network that was never trained.

    Batch normalisation uses the statistics of each batch, as in arXiv 2110.13100.
    """
    (parameters,) = predict_parameters(ghn, [blueprint])
    return accuracy_with(blueprint, parameters, batches)


@torch.no_grad()
def accuracy_with(
    blueprint: Blueprint, parameters: Mapping[str, Tensor], batches: Sequence[tuple[Tensor, Tensor]]
) -> tuple[float, float]:
    """Accuracy in percent and cross-entropy of a network with given parameters."""
    right = count = 0
    loss = 0.0
    for images, labels in batches:
        logits = blueprint(parameters, images).float()
        right += int((logits.argmax(1) == labels).sum())
        loss += float(F.cross_entropy(logits, labels, reduction='sum'))
        count += len(labels)
    return 100 * right / count, loss / count
