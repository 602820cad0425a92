"""Norms of predicted torchvision networks, compared with those that the authors of a GHN published."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torchvision

from timm_ghn.errors import ConfigError
from timm_ghn.nn.ghn import GHN
from timm_ghn.prediction.predict import ghn_init

#: A norm agrees with the published one when it differs by less (GHN-3's authors use the same bound).
NORM_TOLERANCE = 0.01

#: torchvision networks that warn, and take minutes, unless told not to draw weights that are then overwritten.
_SLOW_INITIALISATION = ('googlenet', 'inception_v3')


def published_norms(name: str, known: Mapping[str, Any], archs: Iterable[str] | None = None) -> dict[str, float]:
    """Norms that the authors of a GHN published: over all parameters, for each torchvision network, or for ``archs``.

    Raises:
        ConfigError: if nothing was published for the GHN, or not for one of ``archs``.
    """
    with_norms = sorted(other for other, entry in known.items() if entry.norms)
    if name not in with_norms:
        raise ConfigError(f'no norms were published for {name!r}; there are some for {", ".join(with_norms)}')
    norms: dict[str, float] = dict(known[name].norms)
    chosen = list(archs or norms)
    for arch in chosen:
        if arch not in norms:
            near = difflib.get_close_matches(arch, norms, n=3) or sorted(norms)[:3]
            raise ConfigError(f'no norm was published for {arch!r} (try {", ".join(near)})')
        if arch not in torchvision.models.list_models(module=torchvision.models):
            raise ConfigError(f'torchvision has no network {arch!r}, of which {name!r} states a norm')
    return {arch: norms[arch] for arch in chosen}


def image_side(arch: str) -> int:
    """Side of the smallest images that torchvision's weights of a network take: 299 for inception_v3, mostly 224."""
    sides: list[int] = [weights.transforms().crop_size[0] for weights in torchvision.models.get_model_weights(arch)]
    return min(sides)


def predicted_norm(arch: str, ghn: GHN) -> float:
    """L2 norm over all parameters of a torchvision network after prediction, unpredicted ones included.

    The network is as its constructor leaves it, in train mode: auxiliary classifiers count.

    Raises:
        GHNError: if the network cannot be traced or predicted.
    """
    options = {'init_weights': False} if arch in _SLOW_INITIALISATION else {}
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = torchvision.models.get_model(arch, weights=None, **options)
    ghn_init(model, ghn, input_size=image_side(arch), head='predict', postprocess=None, rules='published')
    return math.sqrt(sum(float(p.detach().double().square().sum()) for p in model.parameters()))
