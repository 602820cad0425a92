"""Decoders: from node embeddings to raw tensors (arXiv 1810.05749, 2110.13100, 2303.04143).

The published decoders compute the largest tensor for every node and crop it. These slice the weights first: of the
first layer only the rows of the pixels that a kernel needs, of the last only the rows of its channels. Each element
is the same sum of the same products.
"""

from __future__ import annotations

import abc
import itertools
from collections.abc import Iterator, Mapping, Sequence
from operator import itemgetter

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_ghn.nn.config import GHNConfig
from timm_ghn.nn.precision import apply_linear, full_precision, linear, linear_of
from timm_ghn.nn.requests import CHUNK_ELEMENTS, Cut, DecodeKind, DecodeRequest, Window, chunks, group_requests
from timm_ghn.ops.slices import take_slices

__all__ = [
    'CHUNK_ELEMENTS',
    'ConvDecoder',
    'DecodeKind',
    'DecodeRequest',
    'MLPDecoder',
    'TensorDecoder',
    'VectorDecoder',
    'build_decoder',
]

Request = tuple[int, DecodeRequest]
#: Weight and bias of some outputs of a layer; the axes before the weight's last are those of the bias.
Rows = tuple[Tensor, Tensor]
#: Below this many input channels, copying the sliced rows is faster than a batched product without a copy.
_FEW_INPUTS = 16


class TensorDecoder(nn.Module, abc.ABC):
    """Decodes tensors with two channel axes and two spatial ones, and the weight of the classifier.

    Args:
        config: Its ``hid``, ``max_shape``, ``num_classes`` and ``window`` are used.
    """

    def __init__(self, config: GHNConfig) -> None:
        super().__init__()
        self.config = config

    @abc.abstractmethod
    def first_rows(self, windows: Sequence[Window]) -> list[Rows]:
        """Rows of the first layer that each window needs."""

    @abc.abstractmethod
    def last_rows(self, blocks: Sequence[tuple[Window, int, int]]) -> list[Rows]:
        """Rows of the last layer that the first o x i channels of a window need, for each (window, o, i)."""

    @abc.abstractmethod
    def hidden(self, z_Bd: Tensor, rows: Rows) -> Tensor:
        """Last hidden layer (B, ...) of B nodes; ``rows`` are of the first layer."""

    @abc.abstractmethod
    def tensors(self, hidden: Tensor, window: Window, rows: Rows) -> Tensor:
        """Decoded (B, o, i, height, width); ``rows`` are of the last layer."""

    @abc.abstractmethod
    def classes(self, hidden: Tensor, window: Window, rows: Rows, classes: int) -> Tensor:
        """Weight of the classifier (B, classes, i) from a window of one pixel; ``rows`` are of the last layer."""

    @property
    @abc.abstractmethod
    def last(self) -> nn.Linear:
        """The layer that puts out tensors."""

    @property
    @abc.abstractmethod
    def class_predictor(self) -> nn.Linear:
        """The layer that puts out rows of the classifier."""

    @property
    @abc.abstractmethod
    def hidden_width(self) -> int:
        """Elements of all hidden layers for one pixel."""

    def decode(self, z_Nd: Tensor, requests: Sequence[Request], *, chunk_elements: int) -> Iterator[tuple[int, Tensor]]:
        """Decode requests of the kinds TENSOR and HEAD_WEIGHT; see :meth:`timm_ghn.nn.ghn.GHN.decode`."""
        groups = group_requests(requests, self.config)
        blocks = list(dict.fromkeys(self._block(window, job[0]) for window, jobs in groups.items() for job in jobs))
        last = dict(zip(blocks, self.last_rows(blocks), strict=True))
        for (window, jobs), (weight, bias) in zip(groups.items(), self.first_rows(list(groups)), strict=True):
            first = (weight.flatten(0, -2), bias.flatten())
            costs = [self._cost(window, cut) for cut, _, _ in jobs]
            for chunk in chunks(jobs, costs, chunk_elements):
                yield from self._decode_chunk(z_Nd, window, chunk, first, last)

    def _block(self, window: Window, cut: Cut) -> tuple[Window, int, int]:
        return window, self.config.max_shape[0] if cut.head else cut.outputs, cut.inputs

    def _cost(self, window: Window, cut: Cut) -> int:
        """Elements of the temporary tensors that one request needs."""
        if cut.head:
            return self.hidden_width + (2 * self.config.max_shape[0] + cut.outputs) * cut.inputs
        channels = cut.outputs * cut.inputs
        return window.area * (self.hidden_width + 2 * channels) + cut.height * cut.width * channels

    def _decode_chunk(
        self,
        z_Nd: Tensor,
        window: Window,
        chunk: Sequence[tuple[Cut, int, int]],
        first: Rows,
        last: Mapping[tuple[Window, int, int], Rows],
    ) -> list[tuple[int, Tensor]]:
        found: list[tuple[int, Tensor]] = []
        with full_precision(z_Nd.device):
            hidden = self.hidden(z_Nd[torch.tensor([node for _, _, node in chunk], device=z_Nd.device)], first)
            for cut, jobs in itertools.groupby(chunk, key=itemgetter(0)):
                indices = [index for _, index, _ in jobs]
                part, rows = hidden[len(found) : len(found) + len(indices)], last[self._block(window, cut)]
                if cut.head:
                    decoded = self.classes(part, window, rows, cut.outputs)
                else:
                    decoded = _enlarge(self.tensors(part, window, rows), cut.height, cut.width)
                found.extend(zip(indices, decoded.unbind(0), strict=True))
        return found


def _enlarge(decoded_Boihw: Tensor, height: int, width: int) -> Tensor:
    """Interpolate a map to a kernel that exceeds it, bilinearly; leave it as it is if it has the wanted size."""
    if decoded_Boihw.shape[3:] == (height, width):
        return decoded_Boihw
    enlarged = F.interpolate(decoded_Boihw.flatten(1, 2), size=(height, width), mode='bilinear', align_corners=False)
    return enlarged.view(*decoded_Boihw.shape[:3], height, width)


def _cut_layer(layer: nn.Linear, grid: tuple[int, ...], cuts: Sequence[tuple[slice, ...]]) -> list[Rows]:
    """Blocks of the outputs of a layer, which are read as a grid."""
    weights, biases = take_slices(layer.weight.view(*grid, -1), cuts), take_slices(layer.bias.view(grid), cuts)
    return list(zip(weights, biases, strict=True))


class ConvDecoder(TensorDecoder):
    """Decoder of 1x1 convolutions, written as linear layers on the pixels.

        u = ReLU(W_fc z + b_fc), read as (4d, H, W); for each pixel s = ReLU(W_a u + b_a), r = W_b s + b_b.

    Output channel o, input channel i is element o C1 + i of r. A classifier is decoded from one pixel:
    y = W_cls ReLU(r[:, i]) + b_cls for each input channel i, over all C0 rows of r.

    Args:
        config: Its ``hid``, ``max_shape``, ``num_classes`` and ``window`` are used.
    """

    def __init__(self, config: GHNConfig) -> None:
        super().__init__(config)
        hid, (outputs, inputs, height, width) = config.hid, config.max_shape
        self.fc = nn.Sequential(nn.Linear(hid, 4 * hid * height * width), nn.ReLU())
        self.conv = nn.Sequential(nn.Linear(4 * hid, 8 * hid), nn.ReLU(), nn.Linear(8 * hid, outputs * inputs))
        self.class_layer_predictor = nn.Sequential(nn.ReLU(), nn.Linear(outputs, config.num_classes))

    @property
    def last(self) -> nn.Linear:
        """See the base class."""
        return linear_of(self.conv, 2)

    @property
    def class_predictor(self) -> nn.Linear:
        """See the base class."""
        return linear_of(self.class_layer_predictor, 1)

    @property
    def hidden_width(self) -> int:
        """See the base class."""
        return 16 * self.config.hid  # u twice, as it comes and pixel by pixel, and s

    def first_rows(self, windows: Sequence[Window]) -> list[Rows]:
        """Rows of W_fc: (4d, height, width, d) for each window."""
        grid = (4 * self.config.hid, *self.config.max_shape[2:])
        return _cut_layer(linear_of(self.fc, 0), grid, [(slice(None), *window.slices) for window in windows])

    def last_rows(self, blocks: Sequence[tuple[Window, int, int]]) -> list[Rows]:
        """Rows of W_b: (o, i, 8d) for each block."""
        channels = list(dict.fromkeys((outputs, inputs) for _, outputs, inputs in blocks))
        cuts = [(slice(outputs), slice(inputs)) for outputs, inputs in channels]
        rows = dict(zip(channels, _cut_layer(self.last, self.config.max_shape[:2], cuts), strict=True))
        return [rows[block[1:]] for block in blocks]

    def hidden(self, z_Bd: Tensor, rows: Rows) -> Tensor:
        """The hidden state s (B, S, 8d) of S pixels."""
        u_BSc = linear(z_Bd, *rows).relu().view(len(z_Bd), 4 * self.config.hid, -1).transpose(1, 2)
        return apply_linear(linear_of(self.conv, 0), u_BSc).relu()

    def tensors(self, hidden: Tensor, window: Window, rows: Rows) -> Tensor:
        """See the base class."""
        weight_oik, bias_oi = rows[0], rows[1].to(hidden.dtype)
        outputs, inputs = bias_oi.shape
        size = (len(hidden), outputs, inputs, window.height, window.width)
        if weight_oik.is_contiguous() or inputs < _FEW_INPUTS:
            r_BSc = linear(hidden, weight_oik.flatten(0, 1), bias_oi.flatten())
            return r_BSc.transpose(1, 2).reshape(size)
        # Copying the rows would cost more than the product.
        pixels_opk = hidden.flatten(0, 1).expand(outputs, -1, -1)
        r_opi = torch.baddbmm(bias_oi[:, None], pixels_opk, weight_oik.to(hidden.dtype).transpose(1, 2))
        return r_opi.view(outputs, *hidden.shape[:2], inputs).permute(1, 0, 3, 2).reshape(size)

    def classes(self, hidden: Tensor, window: Window, rows: Rows, classes: int) -> Tensor:
        """See the base class."""
        columns_BCi = self.tensors(hidden, window, rows).flatten(2).relu()
        predictor = self.class_predictor
        bias_k1 = predictor.bias[:classes, None].to(hidden.dtype)
        return predictor.weight[:classes].to(hidden.dtype) @ columns_BCi + bias_k1


class MLPDecoder(TensorDecoder):
    """Baseline decoder: W_2 ReLU(W_1 z + b_1) + b_2, read as (C0, C1, H, W).

    A classifier is W_cls ReLU(W_1 z + b_1) + b_cls, read as (K, C1).

    Args:
        config: Its ``hid``, ``max_shape``, ``num_classes`` and ``window`` are used.
    """

    def __init__(self, config: GHNConfig) -> None:
        super().__init__(config)
        hid, (outputs, inputs, height, width) = config.hid, config.max_shape
        fc = nn.Sequential(nn.Linear(hid, 2 * hid), nn.ReLU(), nn.Linear(2 * hid, outputs * inputs * height * width))
        self.mlp = nn.ModuleDict({'fc': fc})
        self.class_layer_predictor = nn.Sequential(nn.ReLU(), nn.Linear(2 * hid, config.num_classes * inputs))

    @property
    def last(self) -> nn.Linear:
        """See the base class."""
        return linear_of(self.mlp['fc'], 2)

    @property
    def class_predictor(self) -> nn.Linear:
        """See the base class."""
        return linear_of(self.class_layer_predictor, 1)

    @property
    def hidden_width(self) -> int:
        """See the base class."""
        return 4 * self.config.hid

    def first_rows(self, windows: Sequence[Window]) -> list[Rows]:
        """The whole first layer: it is the same for all pixels."""
        first = linear_of(self.mlp['fc'], 0)
        return [(first.weight, first.bias)] * len(windows)

    def last_rows(self, blocks: Sequence[tuple[Window, int, int]]) -> list[Rows]:
        """Rows of W_2: (o, i, height, width, 2d) for each block."""
        cuts = [(slice(outputs), slice(inputs), *window.slices) for window, outputs, inputs in blocks]
        return _cut_layer(self.last, self.config.max_shape, cuts)

    def hidden(self, z_Bd: Tensor, rows: Rows) -> Tensor:
        """The hidden state (B, 2d)."""
        return linear(z_Bd, *rows).relu()

    def tensors(self, hidden: Tensor, window: Window, rows: Rows) -> Tensor:
        """See the base class."""
        weight_oihwk, bias_oihw = rows
        return linear(hidden, weight_oihwk.flatten(0, 3), bias_oihw.flatten()).view(-1, *bias_oihw.shape)

    def classes(self, hidden: Tensor, window: Window, rows: Rows, classes: int) -> Tensor:
        """See the base class."""
        inputs = rows[1].shape[1]
        grid = (self.config.num_classes, self.config.max_shape[1])
        weight = self.class_predictor.weight.view(*grid, -1)[:classes, :inputs].flatten(0, 1)
        bias = self.class_predictor.bias.view(grid)[:classes, :inputs].flatten()
        return linear(hidden, weight, bias).view(-1, classes, inputs)


class VectorDecoder(nn.Module):
    """Decoder of one-dimensional parameters: g = W_2 ReLU(W_1 z + b_1) + b_2, read as (2, M), M = max(C0, C1).

    Row 0 is a weight (of a normalisation layer), row 1 a bias. The bias of a classifier is row 1 passed through
    b_cls + W_cls ReLU(g[1]).

    Args:
        config: Its ``hid`` and ``max_shape`` are used.
    """

    def __init__(self, config: GHNConfig) -> None:
        super().__init__()
        self.max_size = max(config.max_shape[:2])
        self.fc = nn.Sequential(
            nn.Linear(config.hid, 2 * config.hid), nn.ReLU(), nn.Linear(2 * config.hid, 2 * self.max_size)
        )

    @property
    def last(self) -> nn.Linear:
        """The layer that puts out vectors."""
        return linear_of(self.fc, 2)

    def decode(
        self, z_Nd: Tensor, requests: Sequence[Request], class_predictor: nn.Linear, *, chunk_elements: int
    ) -> Iterator[tuple[int, Tensor]]:
        """Decode requests of the 1-D kinds; see :meth:`timm_ghn.nn.ghn.GHN.decode`.

        A normalisation layer's weight and bias come from the same node, so nodes are computed once.
        """
        heads = [job for job in requests if job[1].kind is DecodeKind.HEAD_BIAS]
        others = [job for job in requests if job[1].kind is not DecodeKind.HEAD_BIAS]
        for jobs, size in ((others, max((job[1].size[0] for job in others), default=0)), (heads, self.max_size)):
            by_node: dict[int, list[Request]] = {}
            for job in jobs:
                by_node.setdefault(job[1].node, []).append(job)
            size = min(size, self.max_size)
            cost = self.last.in_features + 2 * size + (class_predictor.out_features if jobs is heads else 0)
            for chunk in chunks(list(by_node.values()), [cost] * len(by_node), chunk_elements):
                yield from self._decode_chunk(z_Nd, chunk, class_predictor, size)

    def _decode_chunk(
        self, z_Nd: Tensor, chunk: Sequence[list[Request]], class_predictor: nn.Linear, size: int
    ) -> list[tuple[int, Tensor]]:
        found: list[tuple[int, Tensor]] = []
        with full_precision(z_Nd.device):
            nodes = torch.tensor([jobs[0][1].node for jobs in chunk], device=z_Nd.device)
            hidden = apply_linear(linear_of(self.fc, 0), z_Nd[nodes]).relu()
            weight = self.last.weight.view(2, self.max_size, -1)[:, :size].flatten(0, 1)
            bias = self.last.bias.view(2, self.max_size)[:, :size].flatten()
            pairs = linear(hidden, weight, bias).view(-1, 2, size).unbind(0)
            for pair, jobs in zip(pairs, chunk, strict=True):
                for index, request in jobs:
                    row = pair[0] if request.kind is DecodeKind.WEIGHT_1D else pair[1]
                    if request.kind is DecodeKind.HEAD_BIAS:
                        row = apply_linear(class_predictor, row.relu())
                    found.append((index, row[: request.size[0]]))
        return found


def build_decoder(config: GHNConfig) -> TensorDecoder:
    """The tensor decoder that a configuration names."""
    decoders: dict[str, type[TensorDecoder]] = {'conv': ConvDecoder, 'mlp': MLPDecoder}
    return decoders[config.decoder](config)
