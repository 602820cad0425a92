"""A decoder that gives every channel of a layer weights of its own, however wide the layer is.

The published decoders put out at most ``max_shape`` channels and repeat them; copies are what takes the diversity from
a predicted network. Here, as in LoGAH (arXiv 2405.16287), a weight is a product of low rank. Its factors are read from
codes that channels have in all layers and networks:

    W[o, i, p] = sum_r A[o, r] B[i, r, p],  A = T U(z)^T,  B[i, r, p] = sum_q (T V_q(z)^T)[i, r] S[p, q]

with a code T[c] for channel c, a code S[p] for position p of a kernel, and U, V linear in the embedding z of the node.
Each weight is brought to a root mean square of one, and mixed with a fixed random tensor of the same scale,

    W' = g(z) (cos(t) W / rms(W) + sin(t) R),

whose share t and gain g are predicted as well: what has rank r alone is not diverse enough to be trained further.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_ghn.nn.bounds import largest_output, largest_weight
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
_LOG_HEAD = math.log(0.2)
#: Bound on the values of one-dimensional parameters, which keeps the gains of norm layers between 0.54 and 1.46.
_VECTOR = 2.0
#: Factor of what decides scales. They have the largest gradients at first, when a network that puts out nothing is
#: better than one that puts out noise; a GHN that follows them too fast never learns anything else.
_SLOW = 0.1


class LowRankDecoder(TensorDecoder):
    """Tensors of low rank from codes of their channels; see the module.

    Args:
        config: Its ``hid``, ``max_shape`` (channels that have codes, and the largest kernel), ``num_classes``,
            ``rank`` and ``codes`` are used.
    """

    def __init__(self, config: GHNConfig) -> None:
        super().__init__(config)
        hid, rank, codes, side = config.hid, config.rank, config.codes, config.max_shape[2]
        self.spatial = min(side * side, 9)
        self.channels = nn.Embedding(max(config.max_shape[:2]), codes)
        self.classes = nn.Embedding(config.num_classes, codes)
        self.positions = nn.Embedding(side * side, self.spatial)
        self.hidden = nn.Sequential(nn.Linear(hid, 2 * hid), nn.GELU())
        self.left = nn.Linear(2 * hid, rank * codes)
        self.right = nn.Linear(2 * hid, self.spatial * rank * codes)
        self.scale = nn.Linear(2 * hid, 2)
        # Made when it is first needed; not a buffer, since it is no part of a state.
        self._source: Tensor | None = None
        with torch.no_grad():
            for table in (self.channels, self.classes, self.positions):
                nn.init.normal_(table.weight)
            self.scale.weight.mul_(0.1)
            # A small random share at first: sin(t) = 0.19.
            self.scale.bias.copy_(torch.tensor([0.0, -2.0 / _SLOW]))

    @property
    def last(self) -> nn.Linear:
        """See the base class."""
        return self.right

    @property
    def class_predictor(self) -> nn.Linear:
        """See the base class."""
        return self.left

    def bound(self, limit: float) -> float:
        """See the base class: normalised values are bounded by the number of elements, so only factors count."""
        first = linear_of(self.hidden, 0)
        codes = max(largest_weight(table.weight) for table in (self.channels, self.classes, self.positions))
        left, right = (largest_output((first, layer), limit) for layer in (self.left, self.right))
        width = self.config.codes * codes
        factors = (left * width) * (right * width * codes * self.spatial) * self.config.rank
        return factors + 10 * math.sqrt(float(max(self.config.max_shape[:2])) ** 2 * self.config.max_shape[2] ** 2)

    def decode_jobs(self, z_Nd: Tensor, jobs: Sequence[Job], *, chunk_elements: int) -> Iterator[Block]:
        """See the base class."""
        if not jobs:
            return
        config = self.config
        with full_precision(z_Nd.device):
            kernels: dict[tuple[object, tuple[int, int]], list[Job]] = {}
            for job in jobs:
                kernels.setdefault((job.window, job.size), []).append(job)
            for group in kernels.values():
                widest = max(job.inputs for job in group)
                area = group[0].size[0] * group[0].size[1]
                cost = config.rank * config.codes * self.spatial + area * config.rank * widest
                for chunk in chunks(group, [cost] * len(group), chunk_elements):
                    yield from self._decode_alike(z_Nd, chunk)

    def _decode_alike(self, z_Nd: Tensor, jobs: Sequence[Job]) -> Iterator[Block]:
        """Decode tensors whose kernels have one size: what depends on the node alone is computed for all of them."""
        rank, codes = self.config.rank, self.config.codes
        nodes = torch.tensor([job.node for job in jobs], device=z_Nd.device)
        hidden_Jk = F.gelu(apply_linear(linear_of(self.hidden, 0), z_Nd[nodes]))
        left_Jrc = apply_linear(self.left, hidden_Jk).view(-1, rank, codes)
        right_Jqrc = apply_linear(self.right, hidden_Jk).view(-1, self.spatial, rank, codes)
        right_Jprc = torch.einsum('pq,jqrc->jprc', self._kernel_codes(jobs[0]).to(right_Jqrc.dtype), right_Jqrc)
        inputs_ic = self.channels.weight[: max(job.inputs for job in jobs)].to(left_Jrc.dtype)
        factors_Jpri = right_Jprc @ inputs_ic.t()
        rows: dict[bool, int] = {}
        for job in jobs:
            head = bool(job.classes)
            rows[head] = max(rows.get(head, 0), job.classes or job.outputs)
        factors_oJr = {}
        for head, count in rows.items():
            codes_oc = (self.classes if head else self.channels).weight[:count].to(left_Jrc.dtype)
            factors_oJr[head] = (codes_oc @ left_Jrc.flatten(0, 1).t()).view(count, -1, rank)
        kept_J, mixed_J = self._shares(hidden_Jk, jobs)
        for row, job in enumerate(jobs):
            factor_or = factors_oJr[bool(job.classes)][: job.classes or job.outputs, row]
            weight_poi = factor_or @ factors_Jpri[row, :, :, : job.inputs]
            scale = kept_J[row] * weight_poi.square().mean().add(1e-12).rsqrt()
            weight_oip = weight_poi.permute(1, 2, 0) * scale
            weight_oip = weight_oip + mixed_J[row] * self._random(weight_oip, job.salt)
            shape = weight_oip.shape[:2] if job.classes else (*weight_oip.shape[:2], *job.size)
            yield Block(job.index, weight_oip.reshape(shape))

    def _shares(self, hidden_Jk: Tensor, jobs: Sequence[Job]) -> tuple[Tensor, Tensor]:
        """g cos(t) and g sin(t) of each tensor."""
        gain_J, share_J = (_SLOW * apply_linear(self.scale, hidden_Jk)).unbind(1)
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

    def _random(self, like_oip: Tensor, salt: int) -> Tensor:
        """A fixed normal tensor of a shape; that of another salt is another one."""
        if self._source is None or self._source.device != like_oip.device:
            generator = torch.Generator().manual_seed(SEED)
            drawn = torch.randn(_RANDOM, generator=generator, dtype=torch.float32, device='cpu')
            self._source = drawn.to(like_oip.device)
        count = like_oip.numel()
        # Tensors overlap in the source, but begin far apart.
        start = (salt * 7_919_993) % _RANDOM
        repeats = -(-(start + count) // _RANDOM)
        source = self._source if repeats == 1 else self._source.repeat(repeats)
        return source[start : start + count].view(like_oip.shape).to(like_oip.dtype)


class LowRankVectorDecoder(nn.Module):
    """One-dimensional parameters from the codes of their channels: p[c] = <T[c], u(z)> + v(z).

    Args:
        config: Its ``hid``, ``max_shape``, ``num_classes`` and ``codes`` are used.
        tensors: The decoder whose codes are used.
    """

    def __init__(self, config: GHNConfig, tensors: LowRankDecoder) -> None:
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

    def bound(self, limit: float) -> float:
        """Bound on all that is computed from embeddings whose absolute values are at most ``limit``."""
        tables = self._tensors[0].channels.weight, self._tensors[0].classes.weight
        codes = max(map(largest_weight, tables))
        return (self.config.codes * codes + 1) * largest_output((linear_of(self.fc, 0), self.last), limit)

    def decode(self, z_Nd: Tensor, requests: Sequence[Request]) -> Iterator[Block]:
        """Decode requests of the 1-D kinds; see :meth:`timm_ghn.nn.ghn.GHN.decode_blocks`."""
        if not requests:
            return
        with full_precision(z_Nd.device):
            nodes = torch.tensor([request.node for _, request in requests], device=z_Nd.device)
            hidden = F.gelu(apply_linear(linear_of(self.fc, 0), z_Nd[nodes]))
            factors_J2c = apply_linear(self.last, hidden).view(len(requests), 2, -1)
            factors_J2c = _SLOW * factors_J2c
            scale = self.config.codes**-0.5
            for row, (index, request) in enumerate(requests):
                factor_c = factors_J2c[row, 0 if request.kind is DecodeKind.WEIGHT_1D else 1]
                head = request.kind is DecodeKind.HEAD_BIAS
                table = self._tensors[0].classes if head else self._tensors[0].channels
                codes_nc = table.weight[: request.size[0]].to(factor_c.dtype)
                values_n = codes_nc @ (factor_c[:-1] * scale) + factor_c[-1]
                yield Block(index, _VECTOR * torch.tanh(values_n / _VECTOR))
