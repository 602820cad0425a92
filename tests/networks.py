"""Small networks, one for each way in which a model can be unusual. The laws of tracing and predicting hold for all."""

from __future__ import annotations

import dataclasses
import random
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

SIZE = 16


@dataclasses.dataclass(frozen=True)
class Case:
    """A network and what :func:`timm_ghn.trace` must be told about it."""

    model: nn.Module
    options: dict[str, Any] = dataclasses.field(default_factory=lambda: {'input_size': SIZE})


def plain(classes: int = 1000) -> nn.Module:
    """Convolution, norm, activation, pooling, classifier."""
    body = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2))
    return nn.Sequential(
        OrderedDict(body=body, pool=nn.AdaptiveAvgPool2d(1), flat=nn.Flatten(), head=nn.Linear(8, classes))
    )


def partly_in_eval_mode() -> nn.Module:
    model = plain().eval()
    model.head.train()
    return model


def mixed_dtypes() -> nn.Module:
    model = plain().half()
    model.body[1].bfloat16()
    return model


def hooked() -> nn.Module:
    """Hooks of every kind; one changes the output, as hooks may."""
    model = plain()
    model.body.register_forward_hook(lambda _module, _args, output: output * 2)
    model.body.register_forward_pre_hook(lambda _module, args: (args[0] + 1,))
    model.body.register_full_backward_hook(lambda _module, _inputs, _outputs: None)
    model.register_state_dict_pre_hook(lambda *_: None)
    model.head.weight.register_hook(lambda gradient: gradient)
    return model


def tied() -> nn.Module:
    """Two layers share a weight, and a whole module stands at two places."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    model[5].weight = model[3].weight
    model.add_module('again', model[1])
    return nn.Sequential(OrderedDict(pool=nn.AdaptiveAvgPool2d(1), body=model[:6], same=model[5], again=nn.Identity()))


def reparametrised() -> nn.Module:
    """Weights that are computed from other parameters in every forward pass."""
    model = plain()
    parametrizations.weight_norm(model.body[0])
    parametrizations.weight_norm(model.head)
    return model


class Remembering(nn.Module):
    """Keeps what passes through it, and counts: in attributes, containers and buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.norm = nn.BatchNorm2d(8, momentum=None)
        self.head = nn.Linear(8, 1000)
        self.register_buffer('calls', torch.zeros((), dtype=torch.int64))
        self.register_buffer('grid', None, persistent=False)
        self.last: Tensor | None = None
        self.count = 0
        self.history: list[Tensor] = []
        self.by_layer: defaultdict[str, list[Tensor]] = defaultdict(list)
        self.nested: dict[str, dict[str, list[int]]] = {'seen': {'widths': [3]}}
        self.noise = torch.zeros(3)
        self.average = [torch.zeros(3)]
        self.extra = nn.ParameterDict({'kept': nn.Parameter(torch.zeros(2))})

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x))
        self.calls += 1
        self.grid = torch.arange(x.shape[-1])
        self.last = x
        self.count += 1
        self.history.append(x)
        self.by_layer['conv'].append(x)
        self.nested['seen']['widths'].append(x.shape[-1])
        self.noise.uniform_()
        self.average[0].mul_(0.9).add_(random.random() + np.random.rand())
        self.train(not self.training)
        self.conv.requires_grad_(False)
        return self.head(x.mean((2, 3)) + torch.rand(8))


class PlainTensors(nn.Module):
    """Tensors that are neither parameters nor buffers, as attributes and in containers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.mean = torch.tensor([0.5, 0.5, 0.5])[:, None, None]
        self.scales = [torch.ones(8, 1, 1), torch.full((8, 1, 1), 2.0)]
        self.head = nn.Linear(8, 1000)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv((x - self.mean) / self.mean)
        for scale in self.scales:
            x = torch.mul(x, scale)
        x = torch.where(torch.ones(8, dtype=torch.bool)[:, None, None], x, self.scales[0])
        return self.head(x.mean((2, 3)))


class Direct(nn.Module):
    """Parameters on the model itself; some are odd."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.projection = nn.Parameter(torch.randn(8, 3))
        self.pos_embed = nn.Parameter(torch.zeros(1, SIZE * SIZE + 1, 8))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 8))
        self.empty = nn.Parameter(torch.zeros(0, 8))
        self.unused = nn.Parameter(torch.ones(3, 3))
        self.counts = nn.Parameter(torch.ones(8, dtype=torch.int64), requires_grad=False)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 1000)
        self.register_parameter('absent', None)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(2).transpose(1, 2) @ self.projection.t()
        x = torch.cat((self.cls_token.expand(len(x), -1, -1), x, self.empty.expand(len(x), -1, -1)), 1)
        x = (x + self.pos_embed) * self.scale * self.counts
        return self.head(self.norm(x)[:, 0])


class TwoInputs(nn.Module):
    """An image and a vector, joined."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Conv2d(1, 8, 3)
        self.vector = nn.Linear(5, 8)
        self.head = nn.Linear(16, 1000)

    def forward(self, image: Tensor, vector: Tensor, scale: float = 1.0) -> Tensor:
        return self.head(torch.cat((self.image(image).mean((2, 3)), self.vector(vector) * scale), 1))


class Tokens(nn.Module):
    """Reads integers."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.head = nn.Linear(8, 1000)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.embedding(tokens).mean(1))


class Answering(nn.Module):
    """Returns its logits in a container."""

    def __init__(self, wrap: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.head = nn.Linear(8, 1000)
        self.side = nn.Conv2d(8, 4, 1)
        self.wrap = wrap

    def forward(self, x: Tensor) -> Any:
        x = self.conv(x)
        return self.wrap(self.head(x.mean((2, 3))), self.side(x))


class Branching(nn.Module):
    """Runs different layers in training and in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.drop = nn.Dropout(0.5)
        self.aux = nn.Linear(8, 10)
        self.head = nn.Linear(8, 1000)

    def forward(self, x: Tensor) -> Any:
        x = self.drop(self.conv(x).mean((2, 3)))
        return (self.head(x), self.aux(x)) if self.training else self.head(x)


class InPlace(nn.Module):
    """Works on its input and on its activations in place."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 1000)

    def forward(self, x: Tensor) -> Tensor:
        x.mul_(2).clamp_(0, 1)
        x = nn.functional.relu_(self.norm(self.conv(x)))
        x[:, :4] = 0
        return self.head(x.mean((2, 3)).add_(1))


NETWORKS: dict[str, Callable[[], Case]] = {
    'plain': lambda: Case(plain()),
    'few classes': lambda: Case(plain(10)),
    'frozen': lambda: Case(plain().requires_grad_(False)),
    'partly in eval mode': lambda: Case(partly_in_eval_mode()),
    'mixed dtypes': lambda: Case(mixed_dtypes()),
    'double': lambda: Case(plain().double()),
    'hooked': lambda: Case(hooked()),
    'tied': lambda: Case(tied()),
    'reparametrised': lambda: Case(reparametrised()),
    'remembering': lambda: Case(Remembering()),
    'plain tensors': lambda: Case(PlainTensors()),
    'direct': lambda: Case(Direct()),
    'two inputs': lambda: Case(TwoInputs(), {'example_inputs': (torch.ones(2, 1, 9, 9), torch.ones(2, 5))}),
    'named inputs': lambda: Case(
        TwoInputs(), {'example_inputs': {'vector': torch.ones(2, 5), 'image': torch.ones(2, 1, 9, 9), 'scale': 2.0}}
    ),
    'tokens': lambda: Case(Tokens(), {'example_inputs': torch.ones(2, 7, dtype=torch.int64)}),
    'tuple': lambda: Case(Answering(lambda logits, side: (logits, side))),
    'dictionary': lambda: Case(Answering(lambda logits, side: {'out': logits, 'more': {'side': [side, None]}})),
    'branching': lambda: Case(Branching()),
    'in place': lambda: Case(InPlace()),
}
