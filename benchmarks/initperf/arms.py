"""The arms: functions that write a start into a network, by name.

An arm gets a network as timm initialises it and may write all of it in place but the classifier, which is the same in
all arms of a seed. Anyone can add one::

    @arm('mine', ignorant=True)
    def mine(model, data): ...
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from benchmarks.initperf.cells import NETWORKS, Network
from benchmarks.initperf.donors import CLASSES, Donors, resize_into_
from timm_ghn import batch_statistics, ghn_init, transfer_
from timm_ghn.contexts import preserve_rng
from timm_ghn.errors import GHNError
from timm_ghn.transfer.race import OWN, Race, race_


class NotApplicableError(Exception):
    """The arm has nothing to do for this network, or lacks something; the reason goes into the results."""


@dataclasses.dataclass(frozen=True)
class ArmData:
    """What an arm may use.

    Attributes:
        network: What the model is.
        batches: Images and labels of the first epoch of training, two batches at least.
        input_size: (channels, height, width).
        num_classes: Classes.
        seed: Of all that is drawn.
        argument: What stands behind the colon of the arm's name.
        ghn: Name or folder of the GHN.
        donors: Pretrained networks.
    """

    network: Network
    batches: tuple[tuple[Tensor, Tensor], ...]
    input_size: tuple[int, int, int]
    num_classes: int
    seed: int
    argument: str = ''
    ghn: str = 'ghn_tiny'
    donors: Donors | None = None

    @property
    def images_bchw(self) -> Tensor:
        """Images of the first two batches, which LSUV reads."""
        return torch.cat([images for images, _ in self.batches[:2]])


#: Learning rates of a race, and its steps in the first round.
RACE_RATES, RACE_STEPS = (1e-3, 4e-3), 10

ArmFunction = Callable[[nn.Module, ArmData], None]


@dataclasses.dataclass(frozen=True)
class Arm:
    """A registered arm.

    Attributes:
        name: Without its argument.
        write: The function.
        ignorant: Whether it has seen no data but the two batches of the problem itself that LSUV reads.
        of_ghn: Whether it depends on the GHN.
    """

    name: str
    write: ArmFunction
    ignorant: bool
    of_ghn: bool


ARMS: dict[str, Arm] = {}


def arm(name: str, *, ignorant: bool = False, of_ghn: bool = False) -> Callable[[ArmFunction], ArmFunction]:
    """Register an arm.

    Raises:
        ValueError: if the name is taken.
    """

    def register(function: ArmFunction) -> ArmFunction:
        if name in ARMS:
            raise ValueError(f'there is an arm {name!r} already')
        ARMS[name] = Arm(name, function, ignorant, of_ghn)
        return function

    return register


def find_arm(name: str) -> Arm:
    """The arm of a name as it stands in the results: ``name[:argument][@GHN]``."""
    base = name.partition('@')[0].partition(':')[0]
    if base not in ARMS:
        raise ValueError(f'there is no arm {name!r}; there are {", ".join(ARMS)}')
    return ARMS[base]


def write_start(name: str, model: nn.Module, data: ArmData) -> None:
    """Write the start of an arm into a model; its classifier stays as it is.

    Raises:
        NotApplicableError: if the arm has nothing to do here.
        ValueError: if a parameter is not finite.
    """
    chosen = find_arm(name)
    data = dataclasses.replace(data, argument=name.partition('@')[0].partition(':')[2])
    head = {key: value.detach().clone() for key, value in model.named_parameters() if is_head(model, key)}
    with preserve_rng(data.seed):
        chosen.write(model, data)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for key, value in head.items():
            parameters[key].copy_(value)
    for key, value in parameters.items():
        if not bool(value.isfinite().all()):
            raise ValueError(f"the arm {name} wrote values that are not finite into '{key}'")


def is_head(model: nn.Module, name: str) -> bool:
    """Whether a parameter belongs to the classifier, by timm's ``pretrained_cfg``."""
    classifiers = getattr(model, 'pretrained_cfg', {}).get('classifier') or ()
    classifiers = (classifiers,) if isinstance(classifiers, str) else classifiers
    return any(name.startswith(f'{classifier}.') for classifier in classifiers)


# ---------------------------------------------------------------------------------------------------------------------
# Arms that have seen no data.


@arm('timm', ignorant=True)
def timm_init(model: nn.Module, data: ArmData) -> None:
    """timm's own initialisation."""


@arm('timm_open', ignorant=True)
def timm_open(model: nn.Module, data: ArmData) -> None:
    """timm's own, with open gates: last norm gains (and other gains that begin at 0) at 1, layer scales at 0.1."""
    gates = closed_gates(model)
    if not gates:
        raise NotApplicableError('no gate of this network is closed: it is the same as timm')
    open_gates_(model, gates)


@arm('kaiming', ignorant=True)
def kaiming(model: nn.Module, data: ArmData) -> None:
    """Fan-in normal weights (arXiv 1502.01852), with open gates."""
    open_gates_(model, closed_gates(model))
    with torch.no_grad():
        for layer, weight in weight_layers(model):
            fan_in = weight[0].numel()
            weight.normal_(0, _gain(layer) / math.sqrt(fan_in))


@arm('orthogonal', ignorant=True)
def orthogonal(model: nn.Module, data: ArmData) -> None:
    """Orthogonal weights (arXiv 1312.6120), each group of channels by itself, with open gates."""
    open_gates_(model, closed_gates(model))
    with torch.no_grad():
        for layer, weight in weight_layers(model):
            for block in weight.chunk(getattr(layer, 'groups', 1)):
                nn.init.orthogonal_(block.view(len(block), -1), _gain(layer))


@arm('lsuv', ignorant=True)
def lsuv(model: nn.Module, data: ArmData) -> None:
    """Layer-sequential unit variance (arXiv 1511.06422): orthogonal, then each output scaled to variance 1.

    The layers are scaled in the order in which they run, in a forward pass over two batches, each before the next sees
    its output. Normalisation uses the statistics of the batches.
    """
    orthogonal(model, data)
    done: set[nn.Module] = set()

    def scale(layer: nn.Module, _: object, output: Tensor) -> Tensor | None:
        if layer in done:
            return None
        done.add(layer)
        bias = layer.bias
        shift = 0.0 if bias is None else bias if isinstance(layer, nn.Linear) else bias[:, None, None]
        centred = output - shift
        deviation = float(centred.std())
        if not math.isfinite(deviation) or deviation < 1e-6:
            return None
        layer.weight.div_(deviation)
        return shift + centred / deviation

    handles = [layer.register_forward_hook(scale) for layer, _ in weight_layers(model) if isinstance(layer, _LAYERS)]
    try:
        with torch.no_grad(), batch_statistics(model):
            model(data.images_bchw)
    finally:
        for handle in handles:
            handle.remove()


@arm('mimetic', ignorant=True)
def mimetic(model: nn.Module, data: ArmData) -> None:
    """Mimetic self-attention (arXiv 2305.09828) and sinusoidal positions.

    W_q W_k^T = 0.7 Z + 0.7 I for each head, cut to its rank; W_v W_proj = 0.4 Z - 0.4 I, with Z ~ N(0, 1 / d).
    """
    for attention in _attentions(model):
        dim = attention.qkv.in_features
        for query, key in _heads(attention):
            left, right = _factors(0.7 * torch.randn(dim, dim) / math.sqrt(dim) + 0.7 * torch.eye(dim), len(query))
            query.copy_(left.t())
            key.copy_(right)
        left, right = _factors(0.4 * torch.randn(dim, dim) / math.sqrt(dim) - 0.4 * torch.eye(dim), dim)
        attention.qkv.weight.detach()[2 * dim :].copy_(left.t())
        attention.proj.weight.detach().copy_(right.t())
    _write_positions_(model)


@arm('impulse', ignorant=True)
def impulse(model: nn.Module, data: ArmData) -> None:
    """Structured attention (arXiv 2404.01139, 2505.19985): each head looks at one neighbour, as a filter of one tap.

    The papers optimise queries and keys until softmax(P W_q W_k^T P^T) is a shift of the image by a place of a 3x3
    window, with P the positions. Here it is solved for: W_q W_k^T is the pseudo-inverse of P on both sides of the
    shift, cut to the rank of a head, and scaled so that the largest logit of a row is about 8 above the others.
    Values and projection stay timm's.
    """
    positions = _write_positions_(model)
    side = math.isqrt(len(positions))
    normed = nn.functional.layer_norm(positions, positions.shape[-1:])
    inverse = torch.linalg.pinv(normed, rtol=1e-2)
    shifts = [(row, column) for row in (-1, 0, 1) for column in (-1, 0, 1)]
    drawn = torch.Generator().manual_seed(data.seed)
    for attention in _attentions(model):
        order = torch.randperm(len(shifts), generator=drawn).tolist()
        for number, (query, key) in enumerate(_heads(attention)):
            target = _shift(side, *shifts[order[number % len(order)]])
            left, right = _factors(inverse @ (target - target.mean(dim=1, keepdim=True)) @ inverse.t(), len(query))
            logits = normed @ left @ right @ normed.t()
            factor = 8 * math.sqrt(len(query)) / float((logits.amax(dim=1) - logits.mean(dim=1)).mean())
            query.copy_(left.t() * math.sqrt(factor))
            key.copy_(right * math.sqrt(factor))


# ---------------------------------------------------------------------------------------------------------------------
# Arms of a GHN.


def _predict(model: nn.Module, data: ArmData, postprocess: str | None) -> None:
    try:
        ghn_init(model, data.ghn, input_size=data.input_size, head='keep', seed=data.seed, postprocess=postprocess)
    except GHNError as error:
        raise NotApplicableError(f'the GHN predicts nothing for it: {error}') from error


@arm('ghn_raw', of_ghn=True)
def ghn_raw(model: nn.Module, data: ArmData) -> None:
    """The prediction as it is."""
    _predict(model, data, None)


@arm('ghn_noise', of_ghn=True)
def ghn_noise(model: nn.Module, data: ArmData) -> None:
    """The prediction with noise (the trainer of arXiv 2303.04143)."""
    _predict(model, data, 'noise')


@arm('ghn_orth', of_ghn=True)
def ghn_orth(model: nn.Module, data: ArmData) -> None:
    """The prediction orthogonalised (arXiv 2207.10049)."""
    _predict(model, data, 'orth')


@arm('ghn_open', of_ghn=True)
def ghn_open(model: nn.Module, data: ArmData) -> None:
    """The prediction orthogonalised, and the gates that timm closes opened as timm_open opens them."""
    gates = closed_gates(model)
    if not gates:
        raise NotApplicableError('timm closes no gate of this network: it is the same as ghn_orth')
    _predict(model, data, 'orth')
    open_gates_(model, gates)


@arm('shuffled', of_ghn=True)
def shuffled(model: nn.Module, data: ArmData) -> None:
    """ghn_orth with the elements of each weight shuffled: scales, norms and biases stay, structure goes."""
    _predict(model, data, 'orth')
    shuffle_weights_(model, data.seed)


@arm('norms_only', of_ghn=True)
def norms_only(model: nn.Module, data: ArmData) -> None:
    """The prediction's parameters of one axis (norms, biases, layer scales) with timm's weights."""
    before = {name: value.detach().clone() for name, value in model.named_parameters() if value.ndim > 1}
    _predict(model, data, None)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in before.items():
            parameters[name].copy_(value)


# ---------------------------------------------------------------------------------------------------------------------
# Arms of pretraining.


@arm('pretrain')
def pretrain(model: nn.Module, data: ArmData) -> None:
    """This very network after ``argument`` CPU-minutes of ordinary pretraining, see donors.py."""
    _donors(data).load_into_(model, data.network, float(data.argument))


@arm('donor')
def donor(model: nn.Module, data: ArmData) -> None:
    """A small network of the family after ``argument`` CPU-minutes of pretraining, resized by place and depth."""
    if not data.network.donor:
        raise NotApplicableError('its family has no smaller network here')
    small = NETWORKS[data.network.donor]
    resize_into_(model, _donors(data).weights(small, float(data.argument)), small.start(data.num_classes, 0).model)


@arm('relative')
def relative(model: nn.Module, data: ArmData) -> None:
    """The same donor's weights by :func:`timm_ghn.transfer_`."""
    transfer_(model, small_network(data), input_size=data.input_size, seed=data.seed)


def small_network(data: ArmData) -> nn.Module:
    """The pretrained network that is to be resized, after ``argument`` CPU-minutes or the fewest that are kept."""
    if not data.network.donor:
        raise NotApplicableError('its family has no smaller network here')
    donors, small = _donors(data), NETWORKS[data.network.donor]
    model = small.start(CLASSES, 0).model
    model.load_state_dict(donors.weights(small, float(data.argument or donors.minutes[0])))
    return model


def _donors(data: ArmData) -> Donors:
    if data.donors is None:
        raise NotApplicableError('there are no images to pretrain on')
    return data.donors


@arm('race', of_ghn=True)
def race(model: nn.Module, data: ArmData) -> None:
    """What a race on the training images chooses, begun anew: the model's own start, or one of ``argument``.

    ``race:ghn_orth+relative:8`` names two; ``race`` is ``race:ghn_orth``.
    """
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = race_between(model, data, (data.argument or 'ghn_orth').split('+'))
    model.load_state_dict(before)
    if found.winner.start != OWN:
        write_start(found.winner.start, model, data)


def race_between(model: nn.Module, data: ArmData, arms: Sequence[str]) -> Race:
    """Let the starts of arms, and the model's own, race on the training images."""
    starts = {name: functools.partial(write_start, name, data=data) for name in arms}
    return race_(model, starts, data.batches, lrs=RACE_RATES, steps=RACE_STEPS, seed=data.seed)


@arm('pretrained')
def pretrained(model: nn.Module, data: ArmData) -> None:
    """timm's pretrained weights, where the Hub or its cache has them."""
    try:
        other = data.network.start(data.num_classes, data.seed, pretrained=True).model
    except GHNError as error:
        raise NotApplicableError(f'no pretrained weights: {error}') from error
    model.load_state_dict(other.state_dict())


# ---------------------------------------------------------------------------------------------------------------------
# What they share.

_LAYERS = (nn.Conv2d, nn.Linear)

#: Last part of the name of a parameter that multiplies: gains of norms, layer scales.
_MULTIPLIES = re.compile(r'weight|gamma.*|.*scale.*|.*gain|ls_?\d?')


def weight_layers(model: nn.Module) -> Iterator[tuple[nn.Module, nn.Parameter]]:
    """Convolutions and linear layers with their weights, but for the classifier."""
    for name, layer in model.named_modules():
        if isinstance(layer, _LAYERS) and not is_head(model, f'{name}.weight'):
            yield layer, layer.weight


def closed_gates(model: nn.Module) -> dict[str, float]:
    """Gains and layer scales of a network as timm initialises it that begin at 0 or near it, and their open value."""
    found = {}
    for name, value in model.named_parameters():
        if value.squeeze().ndim > 1 or not _MULTIPLIES.fullmatch(name.rpartition('.')[2]) or is_head(model, name):
            continue
        first = float(value.detach().flatten()[0])
        if abs(first) < 0.1 and bool((value == first).all()):
            found[name] = 0.1 if first else 1.0
    return found


def open_gates_(model: nn.Module, gates: dict[str, float]) -> None:
    """Set the gates to their open values."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in gates.items():
            parameters[name].fill_(value)


def shuffle_weights_(model: nn.Module, seed: int) -> None:
    """Shuffle the elements of each parameter with two axes or more, but for the classifier."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.squeeze().ndim > 1 and not is_head(model, name):
                order = torch.randperm(value.numel(), generator=generator)
                value.copy_(value.flatten()[order].view_as(value))


def _gain(layer: nn.Module) -> float:
    """sqrt(2) for a convolution, which a ReLU or its like follows; 1 for a linear layer."""
    return math.sqrt(2) if isinstance(layer, nn.Conv2d) else 1.0


def _attentions(model: nn.Module) -> list[nn.Module]:
    """Self-attentions that a projection of queries, keys and values begins."""
    found = [
        module
        for module in model.modules()
        if isinstance(getattr(module, 'qkv', None), nn.Linear)
        and isinstance(getattr(module, 'proj', None), nn.Linear)
        and isinstance(getattr(model, 'pos_embed', None), nn.Parameter)
        and module.qkv.out_features == 3 * module.qkv.in_features == 3 * module.proj.out_features
    ]
    if not found:
        raise NotApplicableError("it has no vision transformer's self-attention")
    return found


def _heads(attention: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows of the queries and of the keys of each head, (channels of a head, channels)."""
    query, key, _ = attention.qkv.weight.detach().chunk(3)
    yield from zip(query.chunk(attention.num_heads), key.chunk(attention.num_heads), strict=True)


def _factors(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Left (n, rank) and right (rank, n), whose product is the matrix as far as the rank goes."""
    left, values, right = torch.linalg.svd(matrix)
    root = values[:rank].sqrt()
    return left[:, :rank] * root, root[:, None] * right[:rank]


def _write_positions_(model: nn.Module) -> Tensor:
    """Write sinusoidal positions (ViT of arXiv 2205.01580) into the positional embedding; those of the patches."""
    _attentions(model)
    embedding = model.pos_embed.detach()
    tokens, dim = embedding.shape[1:]
    side = math.isqrt(tokens)
    if dim % 4:
        raise NotApplicableError('its width is no multiple of four, which sinusoidal positions need')
    place = torch.arange(side, dtype=torch.float32)
    waves = place[:, None] / 10000 ** (torch.arange(dim // 4) / (dim // 4 - 1))
    axis = torch.cat([waves.sin(), waves.cos()], dim=1)
    positions = torch.cat([axis.repeat(side, 1), axis.repeat_interleave(side, 0)], dim=1)
    embedding[0, tokens - len(positions) :].copy_(positions)
    return positions


def _shift(side: int, down: int, right: int) -> Tensor:
    """Matrix (side * side, side * side) that takes each position to its neighbour, the border to itself."""
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing='ij')
    neighbours = (rows + down).clamp(0, side - 1) * side + (columns + right).clamp(0, side - 1)
    return torch.eye(side * side)[neighbours.flatten()]


@contextlib.contextmanager
def registered(name: str, function: ArmFunction, *, ignorant: bool = False) -> Iterator[None]:
    """An arm within a context; for tests."""
    arm(name, ignorant=ignorant)(function)
    try:
        yield
    finally:
        del ARMS[name]
