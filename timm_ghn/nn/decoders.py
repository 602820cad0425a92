"""Decoders: from node embeddings to raw tensors (arXiv 1810.05749, 2110.13100, 2303.04143).

The published decoders compute the largest tensor for every node and crop it. These slice the weights first: of the
first layer only the rows of the pixels that a kernel needs, of the last only the rows of its channels. Each element
is the same sum of the same products. All tensors that need the same rows of the last layer share a matrix product.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_ghn.nn.config import GHNConfig
from timm_ghn.nn.precision import apply_linear, full_precision, linear, linear_of
from timm_ghn.nn.requests import (
    Block,
    Cell,
    DecodeKind,
    DecodeRequest,
    Job,
    Window,
    by_window,
    cells_of,
    chunks,
    job_of,
    joined,
)
from timm_ghn.ops.slices import take_slices

Request = tuple[int, DecodeRequest]
#: Weight and bias of some outputs of a layer; the axes before the weight's last are those of the bias.
Rows = tuple[Tensor, Tensor]
#: Up to so many channels, copying the sliced rows is faster than products without a copy.
_FEW_CHANNELS = 512


class TensorDecoder(nn.Module):
    """Decodes tensors with two channel axes and two spatial ones, and the weight of the classifier."""

    def __init__(self, config: GHNConfig) -> None:
        super().__init__()
        self.config = config

    def decode(self, z_Nd: Tensor, requests: Sequence[Request], *, chunk_elements: int) -> Iterator[Block]:
        """Decode requests of the kinds TENSOR and HEAD_WEIGHT; see :meth:`timm_ghn.nn.ghn.GHN.decode`."""
        raise NotImplementedError


def _enlarge(decoded_oihw: Tensor, size: tuple[int, int]) -> Tensor:
    """Interpolate a map to a kernel that exceeds it, bilinearly; leave it as it is if it has the wanted size."""
    if decoded_oihw.shape[2:] == size:
        return decoded_oihw
    return F.interpolate(decoded_oihw, size=size, mode='bilinear', align_corners=False)


def _cut_layer(layer: nn.Linear, grid: tuple[int, ...], cuts: Sequence[tuple[slice, ...]]) -> list[Rows]:
    """Blocks of the outputs of a layer, which are read as a grid."""
    weights, biases = take_slices(layer.weight.view(*grid, -1), cuts), take_slices(layer.bias.view(grid), cuts)
    return list(zip(weights, biases, strict=True))


class ConvDecoder(TensorDecoder):
    """Decoder of 1x1 convolutions, written as linear layers on the pixels.

        u = ReLU(W_fc z + b_fc), read as (4d, H, W); for each pixel s = ReLU(W_a u + b_a), r = W_b s + b_b.

    Output channel o, input channel i is element o C1 + i of r. A classifier is decoded from one pixel:
    y = W_cls ReLU(r[:, i]) + b_cls for each input channel i, over all C0 rows of r.
    """

    def __init__(self, config: GHNConfig) -> None:
        super().__init__(config)
        hid, (outputs, inputs, height, width) = config.hid, config.max_shape
        self.fc = nn.Sequential(nn.Linear(hid, 4 * hid * height * width), nn.ReLU())
        self.conv = nn.Sequential(nn.Linear(4 * hid, 8 * hid), nn.ReLU(), nn.Linear(8 * hid, outputs * inputs))
        self.class_layer_predictor = nn.Sequential(nn.ReLU(), nn.Linear(outputs, config.num_classes))

    @property
    def last(self) -> nn.Linear:
        """The layer that puts out tensors."""
        return linear_of(self.conv, 2)

    @property
    def class_predictor(self) -> nn.Linear:
        """The layer that puts out rows of the classifier."""
        return linear_of(self.class_layer_predictor, 1)

    def decode(self, z_Nd: Tensor, requests: Sequence[Request], *, chunk_elements: int) -> Iterator[Block]:
        """See the base class."""
        jobs = [job_of(index, request, self.config) for index, request in requests]
        groups = by_window(jobs)
        first = dict(zip(groups, self.first_rows(list(groups)), strict=True))
        listed = [job for group in groups.values() for job in group]
        costs = [job.window.area * self.last.in_features for job in listed]
        for chunk in chunks(listed, costs, chunk_elements):
            with full_precision(z_Nd.device):
                pixels = [self.pixels(z_Nd, group, first[window]) for window, group in by_window(chunk).items()]
                hidden_Pk = torch.cat(pixels) if len(pixels) > 1 else pixels[0]
            yield from self._decode_pixels(hidden_Pk, chunk, chunk_elements)

    def first_rows(self, windows: Sequence[Window]) -> list[Rows]:
        """Rows of W_fc: (4d, height, width, d) for each window."""
        grid = (4 * self.config.hid, *self.config.max_shape[2:])
        return _cut_layer(linear_of(self.fc, 0), grid, [(slice(None), *window.slices) for window in windows])

    def pixels(self, z_Nd: Tensor, jobs: Sequence[Job], rows: Rows) -> Tensor:
        """The hidden states s (S B, 8d) of the S pixels of one window, for B jobs: one job after the other in each.

        A product for each row of pixels: the weights of one pixel are a matrix with gaps between its rows, which
        need not be copied together.
        """
        weight_chwd, bias_chw = rows[0].to(z_Nd.dtype), rows[1].to(z_Nd.dtype)
        z_Bd = z_Nd[torch.tensor([job.node for job in jobs], device=z_Nd.device)]
        lines = [
            torch.baddbmm(bias_cw.t()[:, None], z_Bd.expand(bias_cw.shape[1], -1, -1), weight_cwd.permute(1, 2, 0))
            for weight_cwd, bias_cw in zip(weight_chwd.unbind(1), bias_chw.unbind(1), strict=True)
        ]
        u_Pc = torch.cat(lines).relu().flatten(0, 1)
        return apply_linear(linear_of(self.conv, 0), u_Pc).relu()

    def _decode_pixels(self, hidden_Pk: Tensor, jobs: Sequence[Job], chunk_elements: int) -> Iterator[Block]:
        """Decode tensors whose hidden states are known: listed by window, and in each as :meth:`pixels` gives them."""
        places = _places(jobs)
        # Half of the budget: what the cell before put out is still there.
        cells = cells_of(jobs, work=self.last.in_features, elements=chunk_elements // 2)
        cuts = [(cell.outputs, cell.inputs) for cell in cells]
        left = Counter(job.index for cell in cells for job in cell.jobs)
        heads: dict[int, list[Block]] = {}
        gathered: tuple[Job, ...] = ()
        for cell, rows in zip(cells, _cut_layer(self.last, self.config.max_shape[:2], cuts), strict=True):
            if cell.jobs != gathered:
                gathered = cell.jobs
                chosen = torch.tensor([place for job in gathered for place in places[job.index]], device='cpu')
                pixels_Pk = hidden_Pk[chosen.to(hidden_Pk.device)]
            left.subtract(job.index for job in gathered)
            for block, job in zip(self._decode_cell(pixels_Pk, cell, rows), gathered, strict=True):
                last = not left[job.index]
                if not job.classes:
                    yield Block(job.index, _enlarge(block, job.size), cell.outputs.start, cell.inputs.start, last)
                    continue
                own = block.flatten(1).clone()  # a view would keep what the whole cell put out
                parts = heads.setdefault(job.index, [])
                parts.append(Block(job.index, own, cell.outputs.start, cell.inputs.start))
                if last:
                    yield Block(job.index, self.classes(joined(heads.pop(job.index)), job.classes))

    def _decode_cell(self, pixels_Pk: Tensor, cell: Cell, rows: Rows) -> list[Tensor]:
        """Decoded (o, i, height, width) of each tensor of a cell, cut to its own channels."""
        with full_precision(pixels_Pk.device):
            decoded_oiP = self.channels(pixels_Pk, rows)
        found = []
        parts = decoded_oiP.split([job.window.area for job in cell.jobs], 2)
        for job, part_oiS in zip(cell.jobs, parts, strict=True):
            cut = part_oiS[: job.outputs - cell.outputs.start, : job.inputs - cell.inputs.start]
            found.append(cut.unflatten(2, (job.window.height, job.window.width)))
        return found

    def channels(self, pixels_Pk: Tensor, rows: Rows) -> Tensor:
        """Channels (o, i, P) of pixels; ``rows`` are (o, i, 8d) of W_b.

        As many products as the shorter axis has channels: the weights of a row or column of channels are a matrix,
        if not without gaps, and need not be copied. Few of them are, for a single product.
        """
        weight_oik, bias_oi = rows[0].to(pixels_Pk.dtype), rows[1].to(pixels_Pk.dtype)
        outputs, inputs = bias_oi.shape
        if outputs * inputs <= _FEW_CHANNELS:
            return linear(pixels_Pk, weight_oik.flatten(0, 1), bias_oi.flatten()).t().view(outputs, inputs, -1)
        if outputs > inputs:
            return self.channels(pixels_Pk, (weight_oik.transpose(0, 1), bias_oi.t())).transpose(0, 1)
        decoded_oPi = torch.baddbmm(bias_oi[:, None], pixels_Pk.expand(outputs, -1, -1), weight_oik.transpose(1, 2))
        return decoded_oPi.transpose(1, 2)

    def classes(self, columns_Ci: Tensor, classes: int) -> Tensor:
        """Weight of the classifier (classes, i) from the channels of one pixel."""
        predictor = self.class_predictor
        weight_kC, bias_k = (weight[:classes].to(columns_Ci.dtype) for weight in (predictor.weight, predictor.bias))
        with full_precision(columns_Ci.device):
            decoded_ki: Tensor = torch.addmm(bias_k[:, None], weight_kC, columns_Ci.relu())
        return decoded_ki


def _places(jobs: Sequence[Job]) -> dict[int, range]:
    """Rows of the pixels of each tensor by the index of its request, if they are listed by window."""
    places: dict[int, range] = {}
    start = 0
    for window, group in by_window(jobs).items():
        end = start + window.area * len(group)
        places |= {job.index: range(start + b, end, len(group)) for b, job in enumerate(group)}
        start = end
    return places


class MLPDecoder(TensorDecoder):
    """Baseline decoder: W_2 ReLU(W_1 z + b_1) + b_2, read as (C0, C1, H, W).

    A classifier is W_cls ReLU(W_1 z + b_1) + b_cls, read as (K, C1).
    """

    def __init__(self, config: GHNConfig) -> None:
        super().__init__(config)
        hid, (outputs, inputs, height, width) = config.hid, config.max_shape
        fc = nn.Sequential(nn.Linear(hid, 2 * hid), nn.ReLU(), nn.Linear(2 * hid, outputs * inputs * height * width))
        self.mlp = nn.ModuleDict({'fc': fc})
        self.class_layer_predictor = nn.Sequential(nn.ReLU(), nn.Linear(2 * hid, config.num_classes * inputs))

    @property
    def last(self) -> nn.Linear:
        """The layer that puts out tensors."""
        return linear_of(self.mlp['fc'], 2)

    @property
    def class_predictor(self) -> nn.Linear:
        """The layer that puts out rows of the classifier."""
        return linear_of(self.class_layer_predictor, 1)

    def decode(self, z_Nd: Tensor, requests: Sequence[Request], *, chunk_elements: int) -> Iterator[Block]:
        """See the base class."""
        jobs = [job_of(index, request, self.config) for index, request in requests]
        alike: dict[tuple[Window, int, int, int], list[Job]] = {}
        for job in jobs:
            alike.setdefault((job.window, job.outputs, job.inputs, job.classes), []).append(job)
        for group in alike.values():
            weight, bias = self._rows(group[0])
            for chunk in chunks(group, [bias.numel()] * len(group), chunk_elements):
                with full_precision(z_Nd.device):
                    z_Bd = z_Nd[torch.tensor([job.node for job in chunk], device=z_Nd.device)]
                    hidden_Bk = apply_linear(linear_of(self.mlp['fc'], 0), z_Bd).relu()
                    decoded = linear(hidden_Bk, weight.flatten(0, -2), bias.flatten()).view(-1, *bias.shape)
                for job, values in zip(chunk, decoded.unbind(), strict=True):
                    yield Block(job.index, values if job.classes else _enlarge(values, job.size))

    def _rows(self, job: Job) -> Rows:
        """What a tensor needs of the last layer, or of the class predictor."""
        if job.classes:
            grid = (self.config.num_classes, self.config.max_shape[1])
            return _cut_layer(self.class_predictor, grid, [(slice(job.classes), slice(job.inputs))])[0]
        cut = (slice(job.outputs), slice(job.inputs), *job.window.slices)
        return _cut_layer(self.last, self.config.max_shape, [cut])[0]


class VectorDecoder(nn.Module):
    """Decoder of one-dimensional parameters: g = W_2 ReLU(W_1 z + b_1) + b_2, read as (2, M), M = max(C0, C1).

    Row 0 is a weight (of a normalisation layer), row 1 a bias. The bias of a classifier is row 1 passed through
    b_cls + W_cls ReLU(g[1]).
    """

    def __init__(self, config: GHNConfig) -> None:
        super().__init__()
        self.max_size = max(config.max_shape[:2])
        self.fc = nn.Sequential(
            nn.Linear(config.hid, 2 * config.hid), nn.ReLU(), nn.Linear(2 * config.hid, 2 * self.max_size)
        )
        # Not a submodule: published checkpoints keep it beside the decoder, so the GHN registers it.
        self._bias_class = (nn.Sequential(nn.ReLU(), nn.Linear(self.max_size, config.num_classes)),)

    @property
    def bias_class(self) -> nn.Sequential:
        """What computes the bias of a classifier, for the GHN to register under the published name."""
        return self._bias_class[0]

    @property
    def last(self) -> nn.Linear:
        """The layer that puts out vectors."""
        return linear_of(self.fc, 2)

    def decode(self, z_Nd: Tensor, requests: Sequence[Request], *, chunk_elements: int) -> Iterator[Block]:
        """Decode requests of the 1-D kinds; see :meth:`timm_ghn.nn.ghn.GHN.decode`.

        A normalisation layer's weight and bias come from the same node, so nodes are computed once.
        """
        classes = linear_of(self.bias_class, 1)
        heads = [job for job in requests if job[1].kind is DecodeKind.HEAD_BIAS]
        others = [job for job in requests if job[1].kind is not DecodeKind.HEAD_BIAS]
        for jobs, size in ((others, max((job[1].size[0] for job in others), default=0)), (heads, self.max_size)):
            by_node: dict[int, list[Request]] = {}
            for job in jobs:
                by_node.setdefault(job[1].node, []).append(job)
            size = min(size, self.max_size)
            cost = self.last.in_features + 2 * size + (classes.out_features if jobs is heads else 0)
            for chunk in chunks(list(by_node.values()), [cost] * len(by_node), chunk_elements):
                yield from self._decode_chunk(z_Nd, chunk, size)

    def _decode_chunk(self, z_Nd: Tensor, chunk: Sequence[list[Request]], size: int) -> list[Block]:
        found: list[Block] = []
        with full_precision(z_Nd.device):
            nodes = torch.tensor([jobs[0][1].node for jobs in chunk], device=z_Nd.device)
            hidden = apply_linear(linear_of(self.fc, 0), z_Nd[nodes]).relu()
            weight = self.last.weight.view(2, self.max_size, -1)[:, :size].flatten(0, 1)
            bias = self.last.bias.view(2, self.max_size)[:, :size].flatten()
            weights, biases = linear(hidden, weight, bias).view(-1, 2, size).unbind(1)
            for weight_n, bias_n, jobs in zip(weights.unbind(), biases.unbind(), chunk, strict=True):
                for index, request in jobs:
                    row = weight_n if request.kind is DecodeKind.WEIGHT_1D else bias_n
                    if request.kind is DecodeKind.HEAD_BIAS:
                        row = apply_linear(linear_of(self.bias_class, 1), row.relu())
                    found.append(Block(index, row[: request.size[0]]))
        return found
