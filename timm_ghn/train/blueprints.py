"""What training needs of an architecture: its graph, and a network without weights that computes with given ones."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from timm_ghn.architectures.architecture import Architecture
from timm_ghn.contexts import preserve_rng
from timm_ghn.errors import CheckpointError
from timm_ghn.files import atomic_write
from timm_ghn.graph.build import trace
from timm_ghn.graph.graph import Graph, graph_from_dict, graph_to_dict
from timm_ghn.nn.config import GHNConfig
from timm_ghn.prediction.plan import ANY_GHN, ParameterPlan, plan_parameters
from timm_ghn.version import __version__


@dataclasses.dataclass(frozen=True)
class Blueprint:
    """An architecture, ready to compute with predicted parameters.

    Attributes:
        architecture: What it is.
        graph: Its graph.
        plan: What the GHN predicts of it.
        network: The network on the meta device; batch normalisation uses the statistics of each batch.
        fixed: Tensors that are not predicted: kept parameters with the initialisation of their class, and buffers.
    """

    architecture: Architecture
    graph: Graph
    plan: ParameterPlan
    network: nn.Module
    fixed: Mapping[str, Tensor]

    def __call__(self, parameters: Mapping[str, Tensor], images: Tensor) -> Tensor:
        """Logits of images, computed with predicted parameters; the network itself stays without."""
        fixed = {name: tensor.to(images.device) for name, tensor in self.fixed.items()}
        logits: Tensor = torch.func.functional_call(self.network, {**fixed, **parameters}, (images,))
        return logits


class Blueprints:
    """Blueprints of architectures for a GHN: traced once, then read from a folder, if there is one."""

    def __init__(self, config: GHNConfig, folder: Path | None = None) -> None:
        self.config = config
        self.folder = folder
        # Those in use are kept in memory.
        self._made = functools.lru_cache(maxsize=2000)(self._make)

    def __call__(self, architecture: Architecture) -> Blueprint:
        """The blueprint of an architecture; an :class:`UnsupportedModelError` if it cannot be traced."""
        return self._made(architecture)

    def _make(self, architecture: Architecture) -> Blueprint:
        rules = self.config.rules
        if self.folder is None:
            graph, fixed = _examine(architecture, rules)
        else:
            path = self.folder / f'{architecture.key}.safetensors'
            found = _read(path, rules)
            graph, fixed = found or _examine(architecture, rules)
            if not found:
                _write(path, rules, graph, fixed)
        plan = plan_parameters(graph, self.config, head='predict')
        network = use_batch_statistics_(architecture.build('meta').eval().requires_grad_(False))
        return Blueprint(architecture, graph, plan, network, fixed)


def use_batch_statistics_(network: nn.Module) -> nn.Module:
    """Let batch normalisation have no running statistics, in place: predicted networks have none (GHN_2, section 4)."""
    for module in network.modules():
        if isinstance(module, _BatchNorm):
            module.track_running_stats = False
            module.running_mean = module.running_var = module.num_batches_tracked = None
    return network


def _examine(architecture: Architecture, rules: str) -> tuple[Graph, dict[str, Tensor]]:
    """Trace an architecture, and initialise what is not predicted, always the same."""
    with preserve_rng(0):
        model = architecture.build('cpu').eval()
    graph = trace(model, input_size=architecture.input_size, rules=rules)
    plan = plan_parameters(graph, ANY_GHN, head='predict')
    use_batch_statistics_(model)
    parameters = dict(model.named_parameters())
    fixed = {row.name: parameters[row.name].detach() for row in plan.kept}
    fixed |= dict(model.named_buffers())
    return graph, {name: tensor.clone().contiguous() for name, tensor in fixed.items()}


@functools.cache
def _stamp() -> str:
    """What a file must come from: another version may trace otherwise."""
    return f'timm_ghn {__version__}, timm {version("timm")}, torch {torch.__version__}'


def _read(path: Path, rules: str) -> tuple[Graph, dict[str, Tensor]] | None:
    """What a file holds; None where it is missing, damaged, or of other versions."""
    try:
        with safe_open(path, 'pt') as file:
            header = file.metadata() or {}
            if header.get('stamp') != _stamp() or header.get('rules') != rules:
                return None
            return graph_from_dict(json.loads(header['graph'])), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, CheckpointError, KeyError, ValueError):
        return None


def _write(path: Path, rules: str, graph: Graph, fixed: Mapping[str, Tensor]) -> None:
    # With the rules that were asked for: those of the graph may be others.
    path.parent.mkdir(parents=True, exist_ok=True)
    header = {'stamp': _stamp(), 'rules': rules, 'graph': json.dumps(graph_to_dict(graph))}
    with atomic_write(path) as file:
        save_file(dict(fixed), file, metadata=header)
