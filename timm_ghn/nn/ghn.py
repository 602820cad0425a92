"""The graph hypernetwork: embeds the nodes of networks and decodes their parameters."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from timm_ghn.errors import ConfigError
from timm_ghn.graph.graph import Graph, GraphBatch
from timm_ghn.graph.primitives import Primitive
from timm_ghn.nn.config import GNNS, GHNConfig, Origin
from timm_ghn.nn.decoders import ConvDecoder, MLPDecoder, TensorDecoder, VectorDecoder
from timm_ghn.nn.features import SmoothEncoder, node_features
from timm_ghn.nn.gated import GatedGNN, NodeMLP
from timm_ghn.nn.graphormer import Graphormer
from timm_ghn.nn.precision import apply_layer_norm, compute_dtype, full_precision, look_up
from timm_ghn.nn.requests import CHUNK_ELEMENTS, Block, DecodeKind, DecodeRequest, joined
from timm_ghn.nn.shape_encoder import ShapeEncoder
from timm_ghn.nn.templates import TemplateDecoder, TemplateVectorDecoder

_TENSOR_KINDS = (DecodeKind.TENSOR, DecodeKind.HEAD_WEIGHT)

ModuleType = TypeVar('ModuleType', bound=type[nn.Module])


def register_gnn(name: str) -> Callable[[ModuleType], ModuleType]:
    """Class decorator: make a graph network available as ``GHNConfig(gnn=name)``.

    The class is built as ``cls(config)`` and maps node features (N, d) and a
    :class:`~timm_ghn.graph.graph.GraphBatch` of N nodes to node features (N, d).

    Raises:
        ConfigError: if another graph network has this name.
    """

    def register(cls: ModuleType) -> ModuleType:
        if name in GNNS:
            raise ConfigError(f'expected a new name for a graph network (got {name!r}, which exists)')
        GNNS[name] = cls
        return cls

    return register


register_gnn('graphormer')(Graphormer)
register_gnn('gated')(GatedGNN)
register_gnn('mlp')(NodeMLP)


class GHN(nn.Module):
    """Graph hypernetwork: GHN-1, GHN-2, GHN-3 or the baseline, as its configuration says.

    A prediction takes two steps, :meth:`encode` and :meth:`decode`. Both are differentiable, compute in at least
    float32 and ignore autocast. Names and shapes of the parameters are those of the published checkpoints.

    A new GHN has random weights, drawn from the global generator. On the meta device nothing is drawn; load with
    ``load_state_dict(..., assign=True)``.

    Args:
        config: Hyper-parameters.

    Attributes:
        config: Hyper-parameters.
        origin: Where the weights came from, if they were loaded.
    """

    def __init__(self, config: GHNConfig) -> None:
        super().__init__()
        self.config = config
        self.origin: Origin | None = None
        self.ln = nn.LayerNorm(config.hid) if config.layernorm else None
        self.embed = nn.Embedding(len(Primitive), config.hid)
        self.shape_enc = ShapeEncoder(config)
        self.smooth_enc = SmoothEncoder(config) if config.smooth else None
        self.gnn = GNNS[config.gnn](config)
        self.decoder: TensorDecoder
        self.decoder_1d: VectorDecoder | TemplateVectorDecoder
        if config.decoder == 'templates':
            self.decoder = tensors = TemplateDecoder(config)
            self.decoder_1d = TemplateVectorDecoder(config, tensors)
        else:
            self.decoder = {'conv': ConvDecoder, 'mlp': MLPDecoder}[config.decoder](config)
            self.decoder_1d = vectors = VectorDecoder(config)
            self.bias_class = vectors.bias_class
        if config.gnn == 'graphormer':
            self._initialise_as_ghn3()
        if config.smooth:
            self._scale_down()

    @torch.no_grad()
    def _initialise_as_ghn3(self) -> None:
        """Initialise as GHN-3 does; GHNs with other graph networks keep PyTorch's defaults.

        The last layers start with small weights and no bias, embeddings with a standard deviation of
        (their width)^-1/2, cut off at +-2.
        """
        if isinstance(self.decoder, ConvDecoder | MLPDecoder):  # templates have an initialisation of their own
            for layer in (self.decoder.last, self.decoder.class_predictor, self.decoder_1d.last):
                layer.weight.div_(5)
                layer.bias.zero_()
        for name, module in self.named_modules():
            if isinstance(module, nn.Embedding) and not name.startswith('decoder'):
                nn.init.trunc_normal_(module.weight, std=module.embedding_dim**-0.5)

    @torch.no_grad()
    def _scale_down(self) -> None:
        """Scale embedding tables and residual branches by 0.1, in place.

        So embeddings begin as smooth functions of sizes and depth, and similar networks share what they learn.
        """
        for name, parameter in self.named_parameters():
            if name.startswith('shape_enc') or 'centrality' in name or 'input_dist' in name:
                parameter.mul_(0.1)
        if isinstance(self.gnn, Graphormer):
            self.gnn.scale_down_()

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return self.embed.weight.device

    def encode(self, graphs: Graph | GraphBatch | Iterable[Graph]) -> Tensor:
        """Embed the nodes of graphs.

        Args:
            graphs: One graph or several; each is embedded as it would be alone.

        Returns:
            (N, d) for the N nodes of all graphs, in the numbering of :class:`GraphBatch`.
        """
        batch = GraphBatch.of(graphs)
        with full_precision(self.device):
            x_Nd = look_up(self.embed, torch.cat([graph.primitives_N for graph in batch.graphs]))
            x_Nd = x_Nd + self.shape_enc(torch.cat([graph.shapes_N4 for graph in batch.graphs]))
            if self.smooth_enc is not None:
                x_Nd = x_Nd + self.smooth_enc(torch.cat([node_features(graph) for graph in batch.graphs]))
            x_Nd = self.gnn(x_Nd, batch)
            return x_Nd if self.ln is None else apply_layer_norm(self.ln, x_Nd)

    def decode(
        self, embeddings_Nd: Tensor, requests: Sequence[DecodeRequest], *, chunk_elements: int = CHUNK_ELEMENTS
    ) -> Iterator[tuple[int, Tensor]]:
        """Decode raw tensors: not tiled to the size of the target and not scaled.

        Sizes are clipped to what the GHN decodes at once, with ``max_shape`` (C0, C1, H, W), K classes and
        M = max(C0, C1):

        ===========  ================================================================
        TENSOR       (min(out, C0), min(in, C1), height, width); where a kernel exceeds the map in height or width,
                     the map is interpolated bilinearly
        HEAD_WEIGHT  (min(out, K), min(in, C1))
        WEIGHT_1D    (min(n, M),)
        BIAS_1D      (min(n, M),)
        HEAD_BIAS    (min(n, K),)
        ===========  ================================================================

        Args:
            embeddings_Nd: What :meth:`encode` gave.
            requests: What to decode.
            chunk_elements: Bound on the elements of each temporary tensor; a request or a row of channels that
                needs more comes alone.

        Yields:
            Index of a request, and its tensor. Requests that share matrix products come together, so the order is
            another one than that of ``requests``. A tensor may be a view of a chunk's: copy what you keep.

        Raises:
            ValueError: if a request names a row that the embeddings do not have.
        """
        rows = len(embeddings_Nd)
        for request in requests:
            if request.node >= rows:
                raise ValueError(f'expected requests for rows 0..{rows - 1} of the embeddings (got row {request.node})')
        z_Nd = embeddings_Nd.to(torch.promote_types(embeddings_Nd.dtype, compute_dtype(self.embed.weight)))
        jobs = list(enumerate(requests))
        tensors = [job for job in jobs if job[1].kind in _TENSOR_KINDS]
        vectors = [job for job in jobs if job[1].kind not in _TENSOR_KINDS]
        blocks: dict[int, list[Block]] = {}
        for block in itertools.chain(
            self.decoder.decode(z_Nd, tensors, chunk_elements=chunk_elements),
            self.decoder_1d.decode(z_Nd, vectors, chunk_elements=chunk_elements),
        ):
            blocks.setdefault(block.index, []).append(block)
            if block.last:
                yield block.index, joined(blocks.pop(block.index))

    def forward(self, graphs: Graph | GraphBatch | Iterable[Graph], requests: Sequence[DecodeRequest]) -> list[Tensor]:
        """Embed graphs and decode all requests, in their order; the form that data-parallel wrappers call."""
        decoded = dict(self.decode(self.encode(graphs), requests))
        return [decoded[index] for index in range(len(requests))]
