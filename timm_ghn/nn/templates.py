"""A decoder that gives every channel of a layer weights of its own, up to some thousands of channels.

The published decoders put out at most ``max_shape`` channels and repeat them; copies are what takes the diversity from
a predicted network. Here a weight is a mixture of templates, which all layers of all networks share. They live in a
space of channel codes, so that their size does not depend on the width of a layer (LoGAH, arXiv 2405.16287, predicts
products of low rank for the same reason):

    W[o, i, p] = sum_ab T[o, a] M[a, b, p] T[i, b],  M[a, b, p] = sum_k m_k(z) sum_q S[p, q] B_k[q, a, b]

with a code T[c] for channel c, a code S[p] for position p of a kernel, templates B, and the shares m(z) of a node with
embedding z. Each weight is brought to a root mean square of one, and mixed with a fixed random tensor of that scale,

    W' = g(z) (cos(t) W / rms(W) + sin(t) R),

whose share t and gain g are predicted as well: what has the rank of the codes alone is not diverse enough to be trained
further. What was tried to make it learn fast:

- The shares are linear in sines of a random projection of z, as random Fourier features (Rahimi and Recht, 2007) of a
  Gaussian kernel: layers at the same place of two networks begin with nearly the same shares, others with unrelated
  ones. From a GELU layer, all layers begin nearly alike, and a fast optimiser makes them quite so.
- Templates begin small against the normalisation, which lets Adam change them by percents a step; node embeddings and
  shares change far slower.
- The codes of the first channels are a basis, and so are those of each further block of as many. Random codes overlap,
  so that what one channel learns disturbs the others.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_ghn.nn.config import GHNConfig
from timm_ghn.nn.decoders import Request, TensorDecoder
from timm_ghn.nn.precision import apply_linear, full_precision, linear_of
from timm_ghn.nn.requests import Block, DecodeKind, Job, chunks

#: Seed of the random tensors that predictions are mixed with; part of what a trained GHN means.
SEED = 20_211_013
#: Elements of the random tensor that the others are cut from.
_RANDOM = 2**20
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


class TemplateDecoder(TensorDecoder):
    """Tensors as mixtures of templates; see the module.

    Args:
        config: Its ``hid``, ``max_shape`` (channels that have codes, and the largest kernel), ``num_classes``,
            ``templates`` and ``codes`` are used.
    """

    def __init__(self, config: GHNConfig) -> None:
        super().__init__(config)
        hid, codes, side = config.hid, config.codes, config.max_shape[2]
        self.spatial = min(side, 3) ** 2
        self.channels = nn.Embedding(max(config.max_shape[:2]), codes)
        self.classes = nn.Embedding(config.num_classes, codes)
        self.positions = nn.Embedding(side * side, self.spatial)
        # One row for each template, (q, a, b) one after the other: a matrix, as optimisers of matrices expect it.
        self.templates = nn.Parameter(torch.empty(config.templates, self.spatial * codes * codes))
        self.hidden = nn.Linear(hid, 2 * hid)
        self.shares = nn.Linear(2 * hid, config.templates)
        self.scale = nn.Linear(2 * hid, 2)
        # Made when it is first needed; not a buffer, since it is no part of a state.
        self._source: Tensor | None = None
        self._initialise()

    @torch.no_grad()
    def _initialise(self) -> None:
        for table in (self.channels, self.classes):
            _basis_(table.weight)
        side = self.config.max_shape[2]
        nn.init.normal_(self.positions.weight, std=0.3)
        # The kernels of side 3 and 1 are those of the templates.
        first, count = max(0, side // 2 - 1), min(side, 3)
        middle = self.positions.weight.view(side, side, -1)[first : first + count, first : first + count]
        middle.copy_(torch.eye(self.spatial, device=middle.device).view_as(middle))
        nn.init.normal_(self.templates, std=_TEMPLATE)
        nn.init.normal_(self.hidden.weight, std=_FREQUENCY)
        nn.init.uniform_(self.hidden.bias, -math.pi, math.pi)
        nn.init.normal_(self.shares.weight, std=self.shares.in_features**-0.5)
        nn.init.zeros_(self.shares.bias)
        self.scale.weight.mul_(0.1)
        # A small random share at first: sin(t) = 0.19.
        self.scale.bias.copy_(torch.tensor([0.0, -2.0 / _SLOW]))

    def decode_jobs(self, z_Nd: Tensor, jobs: Sequence[Job], *, chunk_elements: int) -> Iterator[Block]:
        """See the base class."""
        if not jobs:
            return
        config = self.config
        with full_precision(z_Nd.device):
            kernels: dict[tuple[object, tuple[int, int]], list[Job]] = {}
            for job in jobs:
                kernels.setdefault((job.window, job.size), []).append(job)
            codes = _Codes(self, jobs, z_Nd.dtype)
            for group in kernels.values():
                area = group[0].size[0] * group[0].size[1]
                cost = config.codes**2 * max(area, self.spatial)
                for chunk in chunks(group, [cost] * len(group), chunk_elements):
                    yield from self._decode_alike(z_Nd, chunk, codes)

    def _decode_alike(self, z_Nd: Tensor, jobs: Sequence[Job], codes: _Codes) -> Iterator[Block]:
        """Decode tensors whose kernels have one size."""
        nodes = torch.tensor([job.node for job in jobs], device=z_Nd.device)
        hidden_Jh = math.sqrt(2) * torch.sin(apply_linear(self.hidden, z_Nd[nodes]))
        mixed_Japb = self._mixtures(hidden_Jh, self._kernel_codes(jobs[0]))
        # Taken apart at once: the gradient of a row by itself would be as large as that of all.
        kept_J, random_J = self._scales(hidden_Jh, jobs)
        rows = zip(jobs, mixed_Japb.unbind(), kept_J.unbind(), random_J.unbind(), strict=True)
        for job, mixed_apb, kept, random in rows:
            codes_oa = codes.classes(job.classes) if job.classes else codes.channels(job.outputs)
            noise = self._random(len(codes_oa) * mixed_apb.shape[1] * job.inputs, job.salt, codes_oa)
            weight_opi = _Weight.apply(mixed_apb, codes_oa, codes.channels(job.inputs), kept, random, noise)
            # In memory the channels are last, as convolutions on a CPU are fastest with.
            weight_oip = weight_opi.transpose(1, 2)
            yield Block(job.index, weight_oip.flatten(1) if job.classes else weight_oip.unflatten(2, job.size))

    def _mixtures(self, hidden_Jh: Tensor, kernel_pq: Tensor) -> Tensor:
        """M (J, a, p, b) of each node, for the positions of a kernel."""
        shares_Jk = apply_linear(self.shares, hidden_Jh)
        shares_Jk = shares_Jk * shares_Jk.square().mean(1, keepdim=True).add(1e-6).rsqrt()
        templates_km = self.templates.to(hidden_Jh.dtype)
        codes = self.config.codes
        if len(kernel_pq) <= self.spatial:
            # Fewer positions than templates have: cut first.
            cut_kpm = torch.einsum('pq,kqm->kpm', kernel_pq, templates_km.unflatten(1, (self.spatial, -1)))
            cut_kapb: Tensor = cut_kpm.unflatten(2, (codes, codes)).transpose(1, 2).flatten(1)
            return (shares_Jk @ cut_kapb).view(len(shares_Jk), codes, -1, codes)
        mixed_Jqm = (shares_Jk @ templates_km).view(len(shares_Jk), self.spatial, -1)
        return (kernel_pq @ mixed_Jqm).view(len(shares_Jk), -1, codes, codes).transpose(1, 2).contiguous()

    def _scales(self, hidden_Jh: Tensor, jobs: Sequence[Job]) -> tuple[Tensor, Tensor]:
        """g cos(t) and g sin(t) of each tensor."""
        gain_J, share_J = (_SLOW * apply_linear(self.scale, hidden_Jh)).unbind(1)
        heads_J = torch.tensor([_LOG_HEAD if job.classes else 0.0 for job in jobs], device=gain_J.device)
        gain_J = (heads_J + _LOG_GAIN * torch.tanh(gain_J / _LOG_GAIN)).exp()
        share_J = share_J.sigmoid() * (math.pi / 2)
        return gain_J * share_J.cos(), gain_J * share_J.sin()

    def _kernel_codes(self, job: Job) -> Tensor:
        """Codes (p, q) of the positions of a kernel: the middle of the table, enlarged for what exceeds it."""
        side = self.config.max_shape[2]
        rows, columns = job.window.slices
        grid_hwq = self.positions.weight.view(side, side, -1)[rows, columns]
        if grid_hwq.shape[:2] != job.size:
            grid_1qhw = F.interpolate(grid_hwq.permute(2, 0, 1)[None], size=job.size, mode='bilinear')
            grid_hwq = grid_1qhw[0].permute(1, 2, 0)
        return grid_hwq.flatten(0, 1)

    def _random(self, count: int, salt: int, like: Tensor) -> Tensor:
        """Fixed normal values (count,); those of another salt are others."""
        if self._source is None or self._source.device != like.device:
            generator = torch.Generator().manual_seed(SEED)
            drawn = torch.randn(_RANDOM, generator=generator, dtype=torch.float32, device='cpu')
            # Twice, so that what begins near the end goes on at the start.
            self._source = drawn.to(like.device).repeat(2)
        # Tensors overlap in the source, but begin far apart.
        start = (salt * 7_919_993) % _RANDOM
        repeats = -(-(start + count) // len(self._source))
        source = self._source if repeats == 1 else self._source.repeat(repeats)
        return source[start : start + count].to(like.dtype)


class _Weight(torch.autograd.Function):
    """k W / rms(W) + s R with W[o, p, i] = sum_ab T[o, a] M[a, p, b] U[i, b], in few operations either way.

    Training decodes hundreds of small tensors a step, whose time is that of the number of operations.
    """

    @staticmethod
    def forward(
        ctx: Any, mixed_apb: Tensor, rows_oa: Tensor, columns_ib: Tensor, kept: Tensor, random: Tensor, noise: Tensor
    ) -> Tensor:
        """Weight (o, p, i) from mixture, codes, factors k and s, and R (o p i,)."""
        codes, positions, _ = mixed_apb.shape
        left_xb = (rows_oa @ mixed_apb.view(codes, -1)).view(-1, codes)
        weight_xi = left_xb @ columns_ib.t()
        inverse = weight_xi.square().mean().add_(1e-12).rsqrt_()
        noise_xi = noise.view_as(weight_xi)
        ctx.save_for_backward(mixed_apb, rows_oa, columns_ib, left_xb, weight_xi, inverse, noise_xi, kept)
        return torch.addcmul(weight_xi * (kept * inverse), noise_xi, random).view(-1, positions, len(columns_ib))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient_opi: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of all but R."""
        mixed_apb, rows_oa, columns_ib, left_xb, weight_xi, inverse, noise_xi, kept = ctx.saved_tensors
        gradient_xi = gradient_opi.reshape(weight_xi.shape)
        along = torch.dot(gradient_xi.flatten(), weight_xi.flatten()) * inverse
        scale = kept * inverse
        # What only makes the weight larger is undone by the normalisation.
        changed_xi = torch.addcmul(
            gradient_xi * scale, weight_xi, scale * inverse * along, value=-1 / weight_xi.numel()
        )
        left_grad_oy = (changed_xi @ columns_ib).view(len(rows_oa), -1)
        flat_ay = mixed_apb.view(len(mixed_apb), -1)
        return (
            (rows_oa.t() @ left_grad_oy).view_as(mixed_apb),
            left_grad_oy @ flat_ay.t() if ctx.needs_input_grad[1] else None,
            changed_xi.t() @ left_xb if ctx.needs_input_grad[2] else None,
            along,
            torch.dot(gradient_xi.flatten(), noise_xi.flatten()),
            None,
        )


class _Codes:
    """The codes of the first channels, cut once for each number of them: each cut costs a gradient of its own."""

    def __init__(self, decoder: TemplateDecoder, jobs: Sequence[Job], dtype: torch.dtype) -> None:
        most = max(max(job.outputs, job.inputs) for job in jobs)
        self._channels_ca = decoder.channels.weight[:most].to(dtype)
        self._classes_ca = decoder.classes.weight.to(dtype)
        self._cut: dict[tuple[bool, int], Tensor] = {}

    def channels(self, count: int) -> Tensor:
        """Codes (count, a) of channels."""
        if (False, count) not in self._cut:
            self._cut[False, count] = self._channels_ca[:count]
        return self._cut[False, count]

    def classes(self, count: int) -> Tensor:
        """Codes (count, a) of classes."""
        if (True, count) not in self._cut:
            self._cut[True, count] = self._classes_ca[:count]
        return self._cut[True, count]


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

    def rescale_(self) -> None:
        """It has an initialisation of its own."""

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
