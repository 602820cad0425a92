"""A decoder that gives every channel of a layer weights of its own, up to some thousands of channels.

The published decoders put out at most ``max_shape`` channels and repeat them; copies are what takes the diversity from
a predicted network. Here a weight is a mixture of templates, which all layers of one role share. They live in a space
of channel codes, so that their size does not depend on the width of a layer (LoGAH, arXiv 2405.16287, predicts
products of low rank for the same reason):

    W[o, i, p] = g(z) / rms * sum_ab T[o, a] M[a, b, p] T[i, b],  M[a, b, p] = sum_k m_k(z) sum_q S[p, q] B_k[q, a, b]

with a code T[c] for channel c, a code S[p] for position p of a kernel, templates B, and the shares m(z) and gain g(z)
of a node with embedding z; rms is the root mean square of the sum.

Each role has templates, position codes and shares of its own: what a depthwise kernel learns does not disturb a linear
layer. The layout of a weight (:mod:`timm_ghn.graph.channels`) says which channel a row or column is. Fused queries,
keys and values are three parts with shares of their own and the same codes, so that the product of a query and a key
has the same meaning in any width and any number of heads, and the projection reads the codes that the values have.

What was tried to make it learn fast:

- The shares are linear in sines of a random projection of z, as random Fourier features (Rahimi and Recht, 2007) of a
  Gaussian kernel: layers at the same place of two networks begin with nearly the same shares, others with unrelated
  ones. From a GELU layer, all layers begin nearly alike, and a fast optimiser makes them quite so.
- Templates begin small against the normalisation, which lets Adam change them by percents a step; node embeddings and
  shares change far slower.
- The codes of the first channels are a basis, and so are those of each further block of as many. Random codes overlap,
  so that what one channel learns disturbs the others.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_ghn.nn.config import GHNConfig
from timm_ghn.nn.decoders import Request, TensorDecoder
from timm_ghn.nn.precision import apply_linear, full_precision, linear_of
from timm_ghn.nn.requests import Block, DecodeKind, DecodeRequest, chunks

#: Bound on |log g|: a predicted weight has between a tenth and ten times the norm of its fan-in scale.
_LOG_GAIN = math.log(10.0)
#: log g of classifiers at first. Large logits that mean nothing would be all that is unlearnt at first.
_LOG_HEAD = math.log(0.5)
#: Bound on the values of one-dimensional parameters, which keeps the gains of norm layers between 0.54 and 1.46.
_VECTOR = 2.0
#: Factor of what decides scales. They have the largest gradients at first, when a network that puts out nothing is
#: better than one that puts out noise; a GHN that follows them too fast never learns anything else.
_SLOW = 0.1
#: Standard deviation of the templates at first; only the speed of learning depends on it.
_TEMPLATE = 1 / 20
#: Standard deviation of the random projection behind the sines. Embeddings have norm d^1/2, so that two with a cosine
#: of 0.9 begin with shares of a cosine of about 0.7 (d = 64).
_FREQUENCY = 0.25
#: Sines for each feature of an embedding.
_SINES = 4
#: Most parts of a weight: three of rows, or four of columns.
_PARTS = 12


@dataclasses.dataclass(frozen=True, slots=True)
class _Role:
    """What the templates of a role look like.

    Attributes:
        share: Number of templates, in units of the configuration's.
        side: The position codes are those of a square of this side: a kernel of it has any values.
        rows: Whether rows have channel codes; else there is one row.
        columns: Number of column codes: None for channel codes, 1 for one column, or that of the channels of an image.
        resized: Whether position codes are resized to what is wanted, instead of cut from the middle.
    """

    share: float
    side: int = 1
    rows: bool = True
    columns: int | None = None
    resized: bool = False


_ROLES = {
    'dense': _Role(2),
    'conv': _Role(1, side=3),
    'depthwise': _Role(1, side=7, columns=1),
    'stem': _Role(0.5, side=7, columns=4),
    'position': _Role(0.5, side=4, rows=False, resized=True),
    'head': _Role(0.5),
}


class Bank(nn.Module):
    """Templates of a role, and the shares and position codes by which they are mixed."""

    def __init__(self, role: _Role, config: GHNConfig, hidden: int) -> None:
        super().__init__()
        self.resized, self.side = role.resized, config.max_shape[2]
        self.shape_qab = (
            min(role.side, self.side) ** 2,
            config.codes if role.rows else 1,
            config.codes if role.columns is None else role.columns,
        )
        count = max(1, round(config.templates * role.share))
        # One row for each template, (q, a, b) one after the other: a matrix, as optimisers of matrices expect it.
        self.templates = nn.Parameter(torch.empty(count, math.prod(self.shape_qab)))
        self.shares = nn.Linear(hidden, count)
        self.positions = nn.Embedding(self.side**2, self.shape_qab[0]) if role.side > 1 else None
        nn.init.normal_(self.templates, std=_TEMPLATE)
        nn.init.normal_(self.shares.weight, std=hidden**-0.5)
        nn.init.zeros_(self.shares.bias)
        if self.positions is not None:
            self._initialise_positions(self.positions)

    @torch.no_grad()
    def _initialise_positions(self, positions: nn.Embedding) -> None:
        basis = math.isqrt(self.shape_qab[0])
        if self.resized:
            # The lowest frequencies of a discrete cosine transform: smooth, and orthogonal.
            steps = torch.arange(basis)[:, None] * (torch.arange(self.side)[None, :] + 0.5) * math.pi / self.side
            waves = torch.cos(steps)
            positions.weight.copy_(torch.einsum('ix,jy->xyij', waves, waves).reshape_as(positions.weight))
            return
        nn.init.normal_(positions.weight, std=0.3)
        # Kernels up to the side of the basis are those of the templates.
        first = self.side // 2 - basis // 2
        grid = positions.weight.view(self.side, self.side, -1)
        middle = grid[first : first + basis, first : first + basis]
        middle.copy_(torch.eye(self.shape_qab[0]).view_as(middle))

    def forward(self, hidden_Jh: Tensor, size: tuple[int, int]) -> Tensor:
        """M (J, a, p, b) of each node, for the positions of a kernel."""
        shares_Jk = apply_linear(self.shares, hidden_Jh)
        shares_Jk = shares_Jk * shares_Jk.square().mean(1, keepdim=True).add(1e-6).rsqrt()
        templates_km = self.templates.to(hidden_Jh.dtype)
        positions, rows, columns = self.shape_qab
        if self.positions is None:
            return (shares_Jk @ templates_km).view(-1, rows, 1, columns)
        kernel_pq = self._kernel_codes(self.positions.weight.to(hidden_Jh.dtype), size)
        if len(kernel_pq) < positions:
            # Fewer positions than templates have: cut first.
            templates_km = torch.einsum('pq,kqm->kpm', kernel_pq, templates_km.unflatten(1, (positions, -1))).flatten(1)
            mixed_Jpab = (shares_Jk @ templates_km).view(-1, len(kernel_pq), rows, columns)
        else:
            mixed_Jqm = (shares_Jk @ templates_km).view(len(shares_Jk), positions, -1)
            mixed_Jpab = (kernel_pq @ mixed_Jqm).view(-1, len(kernel_pq), rows, columns)
        return mixed_Jpab.transpose(1, 2).contiguous()

    def _kernel_codes(self, table_sq: Tensor, size: tuple[int, int]) -> Tensor:
        """Codes (p, q) of the positions of a kernel: the middle of the table, enlarged for what exceeds it."""
        grid_hwq = table_sq.view(self.side, self.side, -1)
        if not self.resized:
            height, width = (min(wanted, self.side) for wanted in size)
            top, left = (self.side // 2 - wanted // 2 for wanted in (height, width))
            grid_hwq = grid_hwq[top : top + height, left : left + width]
        if grid_hwq.shape[:2] != size:
            grid_1qhw = F.interpolate(grid_hwq.permute(2, 0, 1)[None], size=size, mode='bilinear')
            grid_hwq = grid_1qhw[0].permute(1, 2, 0)
        return grid_hwq.flatten(0, 1)


@dataclasses.dataclass(frozen=True, slots=True)
class _Part:
    """Part of a weight to decode: all of it, or some of its rows and columns.

    Attributes:
        index: Of the request.
        node: Row of the node embeddings.
        number: Of the part within the weight; parts have shares of their own.
        role: Which templates it is mixed from.
        rows: Number of rows.
        columns: Number of columns.
        groups: Groups of channels that rows and columns belong to.
        size: Height and width.
        first: First row and column in the weight.
        last: Whether it completes the weight.
    """

    index: int
    node: int
    number: int
    role: str
    rows: int
    columns: int
    groups: int
    size: tuple[int, int]
    first: tuple[int, int] = (0, 0)
    last: bool = True


class TemplateDecoder(TensorDecoder):
    """Tensors as mixtures of templates; see the module."""

    def __init__(self, config: GHNConfig) -> None:
        super().__init__(config)
        hidden = _SINES * config.hid
        self.channels = nn.Embedding(max(config.max_shape[:2]), config.codes)
        self.classes = nn.Embedding(config.num_classes, config.codes)
        self.hidden = nn.Linear(config.hid, hidden)
        self.parts = nn.Embedding(_PARTS, hidden)
        self.gain = nn.Linear(hidden, 1)
        self.banks = nn.ModuleDict({name: Bank(role, config, hidden) for name, role in _ROLES.items()})
        self._initialise()

    @torch.no_grad()
    def _initialise(self) -> None:
        for table in (self.channels, self.classes):
            _basis_(table.weight)
        nn.init.normal_(self.hidden.weight, std=_FREQUENCY)
        nn.init.uniform_(self.hidden.bias, -math.pi, math.pi)
        # Random phases: the shares of another part are others, those of the first are the node's own.
        nn.init.uniform_(self.parts.weight, -math.pi, math.pi)
        self.parts.weight[0] = 0
        self.gain.weight.mul_(0.1)
        self.gain.bias.zero_()

    def decode(self, z_Nd: Tensor, requests: Sequence[Request], *, chunk_elements: int) -> Iterator[Block]:
        """See the base class."""
        if not requests:
            return
        with full_precision(z_Nd.device):
            codes = _Codes(self, z_Nd.dtype)
            alike: dict[tuple[str, tuple[int, int]], list[_Part]] = {}
            for index, request in requests:
                for part in self._parts_of(index, request):
                    alike.setdefault((part.role, part.size), []).append(part)
            for (role, size), parts in alike.items():
                positions, rows, columns = cast(Bank, self.banks[role]).shape_qab
                cost = rows * columns * max(math.prod(size), positions)
                for some in chunks(parts, [cost] * len(parts), chunk_elements):
                    yield from self._decode_alike(z_Nd, some, codes)

    def _parts_of(self, index: int, request: DecodeRequest) -> Iterator[_Part]:
        """The parts of a weight, in the order of its rows."""
        layout, (outputs, inputs, height, width) = request.layout, request.size
        if request.kind is DecodeKind.HEAD_WEIGHT:
            rows, columns = min(outputs, self.config.num_classes), min(inputs, self.config.max_shape[1])
            yield _Part(index, request.node, 0, 'head', rows, columns, 1, (1, 1))
            return
        rows, columns = min(outputs, self.config.max_shape[0]), min(inputs, self.config.max_shape[1])
        groups = layout.groups if rows == outputs else 1
        role = 'conv' if layout.role == 'dense' and height * width > 1 else layout.role
        tops, lefts = (range(0, n, -(-n // parts)) for n, parts in ((rows, layout.rows), (columns, layout.columns)))
        places = list(itertools.product(tops, lefts))
        for number, (top, left) in enumerate(places):
            yield _Part(
                index, request.node, number, role, min(tops.step, rows - top), min(lefts.step, columns - left),
                groups, (height, width), (top, left), number == len(places) - 1,
            )  # fmt: skip

    def _decode_alike(self, z_Nd: Tensor, parts: Sequence[_Part], codes: _Codes) -> Iterator[Block]:
        """Decode parts of one role whose kernels have one size."""
        nodes, numbers = torch.tensor([(part.node, part.number) for part in parts], device=z_Nd.device).unbind(1)
        phases_Jh = apply_linear(self.hidden, z_Nd[nodes]) + self.parts(numbers).to(z_Nd.dtype)
        hidden_Jh = math.sqrt(2) * torch.sin(phases_Jh)
        role = parts[0].role
        mixed_Japb = self.banks[role](hidden_Jh, parts[0].size)
        gain_J = _SLOW * apply_linear(self.gain, hidden_Jh)[:, 0]
        gain_J = (_LOG_GAIN * torch.tanh(gain_J / _LOG_GAIN) + (_LOG_HEAD if role == 'head' else 0)).exp()
        # Taken apart at once: the gradient of a row by itself would be as large as that of all.
        for part, mixed_apb, gain in zip(parts, mixed_Japb.unbind(), gain_J.unbind(), strict=True):
            weight_opi = _Weight.apply(mixed_apb, *codes.of(part), gain)
            # In memory the channels are last, as convolutions on a CPU are fastest with.
            weight_oip = weight_opi.transpose(1, 2)
            values = weight_oip.flatten(1) if role == 'head' else weight_oip.unflatten(2, part.size)
            yield Block(part.index, values, *part.first, last=part.last)


class _Weight(torch.autograd.Function):
    """g W / rms(W) with W[o, p, i] = sum_ab T[o, a] M[a, p, b] U[i, b], in few operations either way.

    Training decodes hundreds of small tensors a step, whose time is that of the number of operations.
    """

    @staticmethod
    def forward(ctx: Any, mixed_apb: Tensor, rows_oa: Tensor, columns_gib: Tensor, gain: Tensor) -> Tensor:
        """Weight (o, p, i) from mixture, codes of the rows and of the columns of each group, and g."""
        codes, positions, _ = mixed_apb.shape
        left_gxb = (rows_oa @ mixed_apb.view(codes, -1)).view(len(columns_gib), -1, columns_gib.shape[2])
        weight_gxi = left_gxb @ columns_gib.mT
        inverse = weight_gxi.square().mean().add_(1e-12).rsqrt_()
        ctx.save_for_backward(mixed_apb, rows_oa, columns_gib, left_gxb, weight_gxi, inverse, gain)
        return (weight_gxi * (gain * inverse)).view(-1, positions, columns_gib.shape[1])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient_opi: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of all."""
        mixed_apb, rows_oa, columns_gib, left_gxb, weight_gxi, inverse, gain = ctx.saved_tensors
        gradient_gxi = gradient_opi.reshape(weight_gxi.shape)
        along = torch.dot(gradient_gxi.flatten(), weight_gxi.flatten()) * inverse
        scale = gain * inverse
        # What only makes the weight larger is undone by the normalisation.
        changed_gxi = torch.addcmul(
            gradient_gxi * scale, weight_gxi, scale * inverse * along, value=-1 / weight_gxi.numel()
        )
        left_grad_oy = (changed_gxi @ columns_gib).view(len(rows_oa), -1)
        return (
            (rows_oa.t() @ left_grad_oy).view_as(mixed_apb),
            left_grad_oy @ mixed_apb.view(len(mixed_apb), -1).t() if ctx.needs_input_grad[1] else None,
            changed_gxi.mT @ left_gxb if ctx.needs_input_grad[2] else None,
            along,
        )


class _Codes:
    """Codes of the rows and columns of weights, cut once for each number of them: each cut costs a gradient."""

    def __init__(self, decoder: TemplateDecoder, dtype: torch.dtype) -> None:
        self._tables = {True: decoder.channels.weight.to(dtype), False: decoder.classes.weight.to(dtype)}
        self._cut: dict[tuple[bool, int], Tensor] = {}

    def of(self, part: _Part) -> tuple[Tensor, Tensor]:
        """Codes (o, a) of the rows and (g, i, b) of the columns of a part."""
        role, table = _ROLES[part.role], self._tables[True]
        rows_oa = self._first(part.role != 'head', part.rows) if role.rows else table.new_ones(1, 1)
        if role.columns is not None:
            return rows_oa, torch.eye(role.columns, dtype=table.dtype, device=table.device)[None, : part.columns]
        columns_ca = self._first(True, min(part.groups * part.columns, len(table)))
        if len(columns_ca) < part.groups * part.columns:
            columns_ca = columns_ca.repeat(-(-part.groups * part.columns // len(table)), 1)
        return rows_oa, columns_ca[: part.groups * part.columns].view(part.groups, part.columns, -1)

    def _first(self, channels: bool, count: int) -> Tensor:
        if (channels, count) not in self._cut:
            self._cut[channels, count] = self._tables[channels][:count]
        return self._cut[channels, count]


class TemplateVectorDecoder(nn.Module):
    """One-dimensional parameters from the codes of their channels: p[c] = <T[c], u(z)> + v(z).

    Args:
        config: Its ``hid``, ``max_shape``, ``num_classes`` and ``codes`` are used.
        tensors: The decoder whose codes are used.
    """

    def __init__(self, config: GHNConfig, tensors: TemplateDecoder) -> None:
        super().__init__()
        self.config = config
        self.max_size = max(config.max_shape[:2])
        self.fc = nn.Sequential(
            nn.Linear(config.hid, 2 * config.hid), nn.GELU(), nn.Linear(2 * config.hid, 2 * (config.codes + 1))
        )
        # Not a submodule: its parameters are those of the other decoder.
        self._tensors = (tensors,)
        with torch.no_grad():
            # Gains of one and shifts of zero at first.
            self.last.weight.mul_(0.1)
            self.last.bias.zero_()

    @property
    def last(self) -> nn.Linear:
        """The layer that puts out factors."""
        return linear_of(self.fc, 2)

    def decode(self, z_Nd: Tensor, requests: Sequence[Request], *, chunk_elements: int) -> Iterator[Block]:
        """Decode requests of the 1-D kinds; see :meth:`timm_ghn.nn.ghn.GHN.decode`."""
        if not requests:
            return
        with full_precision(z_Nd.device):
            nodes = torch.tensor([request.node for _, request in requests], device=z_Nd.device)
            hidden = F.gelu(apply_linear(linear_of(self.fc, 0), z_Nd[nodes]))
            factors_J2c = _SLOW * apply_linear(self.last, hidden).view(len(requests), 2, -1)
            # Which of the two kinds of factors, then what many vectors share: one product for all of a length.
            second = [int(request.kind is not DecodeKind.WEIGHT_1D) for _, request in requests]
            factors_Jc = factors_J2c[range(len(requests)), second]
            alike: dict[tuple[bool, int], list[int]] = {}
            for row, (_, request) in enumerate(requests):
                alike.setdefault((request.kind is DecodeKind.HEAD_BIAS, request.size[0]), []).append(row)
            for (head, size), rows in alike.items():
                table = self._tensors[0].classes if head else self._tensors[0].channels
                codes_nc = table.weight[:size].to(factors_Jc.dtype)
                for some in chunks(rows, [size] * len(rows), chunk_elements):
                    factors_Rc = factors_Jc[torch.tensor(some, device=factors_Jc.device)]
                    values_Rn = factors_Rc[:, :-1] @ codes_nc.t() + factors_Rc[:, -1:]
                    values_Rn = _VECTOR * torch.tanh(values_Rn / _VECTOR)
                    for row, values_n in zip(some, values_Rn.unbind(), strict=True):
                        yield Block(requests[row][0], values_n)


@torch.no_grad()
def _basis_(table_ca: Tensor) -> None:
    """Fill a table of codes, in place: the first block of rows is the standard basis, each further one a random one."""
    count, codes = table_ca.shape
    blocks = [torch.eye(codes)] + [torch.linalg.qr(torch.randn(codes, codes))[0] for _ in range((count - 1) // codes)]
    table_ca.copy_(torch.cat(blocks)[:count])
