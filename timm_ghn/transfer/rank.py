"""Which of timm's pretrained networks resemble a network: compared by what layers they consist of."""

from __future__ import annotations

import collections
import dataclasses
import json
import math
import warnings
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path

import timm
import torch
from huggingface_hub import try_to_load_from_cache
from timm.models import split_model_name_tag
from torch import nn
from tqdm import tqdm

from timm_ghn.architectures.architecture import SkipInitialisation
from timm_ghn.architectures.timm_models import check_model_name
from timm_ghn.files import atomic_write
from timm_ghn.graph.vocabulary import is_layer, norm_primitive
from timm_ghn.hub.converted import cache_folder

#: Raise it when fingerprints change, so that cached ones are made anew.
_VERSION = 1
#: What an architecture of another file of timm's is farther away by.
_OTHER_FAMILY = 0.25
#: Files under which timm's repositories on the Hub hold weights.
_WEIGHT_FILES = ('model.safetensors', 'pytorch_model.bin')


@dataclasses.dataclass(frozen=True, slots=True)
class RankedDonor:
    """A pretrained network of timm's.

    Attributes:
        name: Architecture and tag, as ``timm.create_model`` takes it.
        distance: From 0, for a network of the same layers, to 1.25.
        download: Size of the weights in bytes, in float32.
        cached: Whether they are in the local cache of the Hub.
    """

    name: str
    distance: float
    download: int
    cached: bool

    def __str__(self) -> str:
        size = 'in the cache' if self.cached else f'a download of {self.download / 1e6:,.0f} MB'
        return f'{self.name} (distance {self.distance:.2f}, {size})'


@dataclasses.dataclass(frozen=True)
class Fingerprint:
    """What layers a network consists of.

    Attributes:
        family: Module of the network's class.
        layers: How many layers there are of each kind and shape, as in 'conv 3x3 64 128'.
        elements: Number of elements of all parameters.
    """

    family: str
    layers: dict[str, int]
    elements: int

    @classmethod
    def of(cls, model: nn.Module) -> Fingerprint:
        """The fingerprint of a network, on any device."""
        layers: collections.Counter[str] = collections.Counter()
        for module in model.modules():
            weight = module._parameters.get('weight')
            norm = norm_primitive(module)
            if norm is not None:
                layers[f'{norm.name.lower()} - {0 if weight is None else len(weight)} 1'] += 1
            elif is_layer(module) and weight is not None:
                kind = 'linear' if weight.dim() == 2 or math.prod(weight.shape[2:]) == 1 else 'conv'
                groups = int(getattr(module, 'groups', 1))
                kind = kind if groups == 1 else 'depthwise' if weight.shape[1] == 1 else 'grouped'
                kernel = 'x'.join(map(str, weight.shape[2:])) if kind != 'linear' else '-'
                layers[f'{kind} {kernel} {weight.shape[0]} {weight.shape[1]}'] += 1
        return cls(type(model).__module__, dict(layers), sum(p.numel() for p in model.parameters()))

    def distance(self, other: Fingerprint) -> float:
        """0 for networks of the same layers, 1 for those that share none.

        One less the mean of four likenesses: of the shares of each kind of layer, of the layers with their shapes, of
        the widths, and of the numbers of layers. A network of another family is farther away.
        """
        kinds = [_shares(one.layers) for one in (self, other)]
        same_kinds = sum(min(share, kinds[1].get(kind, 0.0)) for kind, share in kinds[0].items())
        names = self.layers.keys() | other.layers.keys()
        pairs = [(self.layers.get(name, 0), other.layers.get(name, 0)) for name in names]
        shared = sum(map(min, pairs)) / max(sum(map(max, pairs)), 1)
        widths = [_log_width(one.layers) for one in (self, other)]
        counts = [max(sum(one.layers.values()), 1) for one in (self, other)]
        alike = (same_kinds, shared, math.exp(-abs(widths[0] - widths[1])), min(counts) / max(counts))
        return 1 - sum(alike) / len(alike) + _OTHER_FAMILY * (self.family != other.family)


def _shares(layers: dict[str, int]) -> dict[str, float]:
    found: dict[str, float] = collections.defaultdict(float)
    for name, count in layers.items():
        found[' '.join(name.split()[:2])] += count / sum(layers.values())
    return found


def _log_width(layers: dict[str, int]) -> float:
    """Mean logarithm of the numbers of outputs."""
    widths = [(math.log(max(int(name.split()[2]), 1)), count) for name, count in layers.items()]
    return sum(width * count for width, count in widths) / max(sum(layers.values()), 1)


def rank_donors(model: nn.Module, candidates: Iterable[str] | None = None) -> list[RankedDonor]:
    """Rank timm's pretrained networks by how much they resemble a network. Nothing is downloaded.

    Architectures are built on the meta device, which takes about two minutes for all of timm's; what layers they
    consist of is kept beside the Hub's cache (TIMM_GHN_CACHE names another folder, or is 'off').

    Args:
        model: Any network.
        candidates: timm names, with a tag or for all tags of an architecture; all that timm has weights for if None.

    Returns:
        The nearest first; timm's default tag before the other ones of an architecture.

    Raises:
        UnsupportedModelError: if timm has no such model.
    """
    names = timm.list_pretrained() if candidates is None else []
    for name in candidates or ():
        check_model_name(name)
        names += [name] if split_model_name_tag(name)[1] else timm.list_pretrained(f'{name}.*')
    own = Fingerprint.of(model)
    known = fingerprints({split_model_name_tag(name)[0] for name in names})
    found = []
    for name in names:
        architecture, tag = split_model_name_tag(name)
        if architecture in known:
            default = timm.get_pretrained_cfg(architecture)
            donor = known[architecture]
            ranked = RankedDonor(name, own.distance(donor), 4 * donor.elements, is_cached(name))
            found.append((ranked.distance, architecture, default is None or default.tag != tag, name, ranked))
    return [one[-1] for one in sorted(found, key=lambda one: one[:-1])]


def is_cached(name: str) -> bool:
    """Whether the weights of a timm name are in the local cache of the Hub."""
    cfg = timm.get_pretrained_cfg(name)
    if cfg is None or cfg.hf_hub_id is None:
        return False
    files = (cfg.hf_hub_filename,) if cfg.hf_hub_filename else _WEIGHT_FILES
    return any(isinstance(try_to_load_from_cache(cfg.hf_hub_id, file), str) for file in files)


def fingerprints(architectures: Iterable[str]) -> dict[str, Fingerprint]:
    """Fingerprints of timm's architectures, those that cannot be built left out; from the cache where they are."""
    folder = cache_folder()
    path = None if folder is None else folder.parent / f'fingerprints-{_VERSION}-timm-{version("timm")}.json'
    known = {} if path is None else _read(path)
    wanted = sorted(set(architectures))
    missing = [name for name in wanted if name not in known]
    try:
        for name in tqdm(missing, desc='architectures', leave=False, disable=len(missing) < 20):
            known[name] = _built(name)
    finally:
        if missing and path is not None:
            _write(path, known)
    return {name: found for name in wanted if (found := known[name]) is not None}


def _read(path: Path) -> dict[str, Fingerprint | None]:
    """What was kept; nothing if it is damaged."""
    try:
        values = json.loads(path.read_text(encoding='utf-8'))
        return {name: one and Fingerprint(**one) for name, one in values.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _write(path: Path, known: Mapping[str, Fingerprint | None]) -> None:
    values = {name: one and dataclasses.asdict(one) for name, one in known.items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as part:
            part.write_text(json.dumps(values), encoding='utf-8')
    except OSError as error:
        warnings.warn(f'what layers the networks consist of cannot be kept in {path}: {error}', stacklevel=2)


def _built(name: str) -> Fingerprint | None:
    try:
        with warnings.catch_warnings(), torch.device('meta'), SkipInitialisation():
            warnings.simplefilter('ignore')
            return Fingerprint.of(timm.create_model(name))
    except Exception:  # a network that reads values of its weights when it is built
        return None
