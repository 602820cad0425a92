"""GHNs as a source of pretrained weights for timm: ``timm.create_model('resnet50.ghn')``.

A tag that names a GHN asks for predicted weights: ``ghn`` is the default GHN, every name of the catalogue is a tag as
well. The tag alone is the request, and ``pretrained=True`` adds nothing to it; ``pretrained=False`` takes it back, as
it does with timm's own tags: the model is then that of the untagged name, with timm's initialisation.

How it works: ``timm.create_model`` looks up the entrypoint of an architecture in its own module each time. There, and
nowhere else, timm is made to call :func:`_create`, which lets the entrypoint build the model without weights and then
predicts them. So it does not matter who imported ``create_model`` before this package, when an architecture was
registered, or whether its entrypoint uses timm's builder. The default of ``pretrained`` becomes None, which tells a
call that says False from one that says nothing. Two containers of timm's registry answer for the tags when they are
asked about one name; timm's listings iterate over the containers, which hold timm's own names only. :data:`PRIVATE`
lists all that is used of timm's internals; no other module uses any.

An entrypoint that is called directly, ``timm.models.resnet50(pretrained_cfg='ghn')``, does not pass through
``create_model``: nothing is predicted for it.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import json
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import timm
from timm.models import PretrainedCfg, get_deprecated_models, split_model_name_tag

from timm_ghn.errors import printable

if TYPE_CHECKING:
    from torch import nn

    from timm_ghn.nn.ghn import GHN

__all__ = ['DEFAULT_TAG', 'disable_timm_tags', 'enable_timm_tags']

#: The tag that asks for the default GHN. It also is the name under which ``load_ghn`` knows the default.
DEFAULT_TAG = 'ghn'

_LOOKUP = 'timm.models._factory.model_entrypoint'
_CFGS = 'timm.models._registry._model_pretrained_cfgs'
_PRETRAINED = 'timm.models._registry._model_has_pretrained'

#: Entries of a pretrained cfg that say where weights come from. Where one is set, the weights are not ours.
_WEIGHTS = ('url', 'file', 'state_dict', 'hf_hub_id')

#: Entries that describe the architecture or its input; all others describe weights, and are not inherited by a GHN's.
_ARCHITECTURE = (
    'input_size', 'test_input_size', 'min_input_size', 'fixed_input_size', 'interpolation', 'crop_pct',
    'test_crop_pct', 'crop_mode', 'num_classes', 'pool_size', 'test_pool_size', 'first_conv', 'classifier',
)  # fmt: skip

#: Arguments that only a feature extractor takes: without them an entrypoint builds the whole model.
_FEATURES = ('features_only', 'out_indices', 'feature_cls', 'feature_cfg', 'feature_location')

Entrypoint = Callable[..., 'nn.Module']
Cfg = str | dict[str, Any] | PretrainedCfg | None

#: What :func:`enable_timm_tags` replaced, by its name in :data:`PRIVATE`; empty while nothing is replaced.
_originals: dict[str, Any] = {}
_lock = threading.RLock()


class _PretrainedCfgs(dict[str, PretrainedCfg]):
    """timm's pretrained cfgs; one of a GHN is derived from that of its architecture when it is asked for."""

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) or _names_ghn(name)

    def __missing__(self, name: str) -> PretrainedCfg:
        if not _names_ghn(name):
            raise KeyError(name)
        architecture, tag = split_model_name_tag(name)
        return dataclasses.replace(_blank_cfg(architecture), tag=tag)


class _HasPretrained(set[str]):
    """timm's names that have weights; so has the tag of a GHN, when it is asked for."""

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) or _names_ghn(name)


def _with_ghns(lookup: Callable[..., Entrypoint]) -> Callable[..., Entrypoint]:
    """``timm.models.model_entrypoint`` for ``timm.create_model``, such that entrypoints know the tags of GHNs."""

    @functools.wraps(lookup)
    def model_entrypoint(model_name: str, *args: Any, **kwargs: Any) -> Entrypoint:
        entrypoint = lookup(model_name, *args, **kwargs)
        # If another package wraps this function, it stays below theirs, and does nothing once it is unregistered.
        return functools.partial(_create, entrypoint, split_model_name_tag(model_name)[0]) if _originals else entrypoint

    return model_entrypoint


#: What is used of timm's internals: the type that it is expected to have, and what stands in for it.
PRIVATE: dict[str, tuple[Any, Callable[[Any], Any]]] = {
    _LOOKUP: (Callable, _with_ghns), _CFGS: (dict, _PretrainedCfgs), _PRETRAINED: (set, _HasPretrained)
}  # fmt: skip


def enable_timm_tags() -> None:
    """Make GHNs a source of pretrained weights of timm. Importing the package does this; again changes nothing.

    A timm whose internals are not as expected is left alone, and a warning says so.
    """
    with _lock:
        if _originals:
            return
        missing = _missing()
        if missing:
            warnings.warn(
                f'timm {timm.__version__} does not have {", ".join(missing)} as expected, so tags that name a GHN '
                f"('resnet50.{DEFAULT_TAG}') are unknown to timm; timm_ghn.ghn_init(model) works without them",
                RuntimeWarning,
                stacklevel=2,
            )
            return
        for path, (_, stand_in) in PRIVATE.items():
            module, name = _parts(path)
            _originals[path] = getattr(module, name)
            setattr(module, name, stand_in(_originals[path]))
        _set_default(None)


def disable_timm_tags() -> None:
    """Undo :func:`enable_timm_tags`: timm is as it was, with what was registered in it meanwhile."""
    with _lock:
        if not _originals:
            return
        _set_default(False)
        for path, original in _originals.items():
            module, name = _parts(path)
            current = getattr(module, name)
            if path != _LOOKUP:
                original.clear()
                original.update(current)
            elif getattr(current, '__wrapped__', None) is not original:
                continue  # another package's, which is theirs to take away
            setattr(module, name, original)
        _originals.clear()


def _parts(path: str) -> tuple[ModuleType, str]:
    module, _, name = path.rpartition('.')
    return importlib.import_module(module), name


def _missing() -> list[str]:
    """Those of timm's internals that this timm does not have, or has with another type."""
    missing = []
    for path, (kind, _) in PRIVATE.items():
        try:
            found = getattr(*_parts(path))
        except (ImportError, AttributeError):
            found = None
        if not isinstance(found, kind):
            missing.append(path)
    if not missing:
        second = list(inspect.signature(_create_model()).parameters.values())[1]
        if (second.name, second.default) != ('pretrained', False):
            missing.append('timm.create_model(model_name, pretrained=False)')
    return missing


def _create_model() -> Any:
    """``timm.create_model`` itself, also where another package replaced that name by a function of its own."""
    return _parts(_LOOKUP)[0].create_model


def _set_default(pretrained: bool | None) -> None:
    """Change the default of ``pretrained`` in ``timm.create_model`` itself, which others may have imported."""
    _create_model().__defaults__ = (pretrained, *_create_model().__defaults__[1:])


def _names_ghn(name: object) -> bool:
    """Whether 'architecture.tag' names a GHN. A tag that the architecture itself defines never does."""
    if not isinstance(name, str) or not _originals:
        return False
    architecture, tag = split_model_name_tag(name)
    if not tag or not timm.is_model(architecture) or dict.__contains__(getattr(*_parts(_CFGS)), name):
        return False
    from timm_ghn.hub.catalogue import known_ghns

    return tag == DEFAULT_TAG or tag in known_ghns()


def _blank_cfg(architecture: str) -> PretrainedCfg:
    """The default pretrained cfg of an architecture without the entries that describe its weights."""
    name, default = _default_cfg(architecture)
    return PretrainedCfg(architecture=name, **_architecture_entries(default or PretrainedCfg()))


def _default_cfg(architecture: str) -> tuple[str, PretrainedCfg | None]:
    """Current name of an architecture, and its default pretrained cfg, if it has one."""
    name = get_deprecated_models().get(architecture) or architecture  # a deprecated one maps to a name with a tag
    return split_model_name_tag(name)[0], timm.get_pretrained_cfg(name)


def _architecture_entries(cfg: PretrainedCfg) -> dict[str, Any]:
    return {key: getattr(cfg, key) for key in _ARCHITECTURE if hasattr(cfg, key)}


def _create(
    entrypoint: Entrypoint,
    architecture: str,
    *,
    pretrained: bool | None = None,
    pretrained_cfg: Cfg = None,
    pretrained_cfg_overlay: dict[str, Any] | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Call an entrypoint as ``timm.create_model`` would; with predicted weights, if the pretrained cfg names a GHN."""
    tag = _asked_for(architecture, pretrained_cfg)
    replaced = any((pretrained_cfg_overlay or {}).get(key) for key in _WEIGHTS)
    if tag is None or replaced or (pretrained is not None and not pretrained):
        if tag is not None and replaced:
            # An overlay that names other weights wins over the tag, as it wins over the weights of timm's own tags.
            pretrained_cfg = _blank_cfg(architecture)
        elif tag is not None and isinstance(pretrained_cfg, str):
            pretrained_cfg = None
        return entrypoint(
            pretrained=pretrained or False,
            pretrained_cfg=pretrained_cfg,
            pretrained_cfg_overlay=pretrained_cfg_overlay,
            **kwargs,
        )
    from timm_ghn.hub.load import shared_ghn

    ghn = shared_ghn(tag, cache_dir=kwargs.get('cache_dir'))
    cfg = _cfg_of(ghn, tag, architecture, pretrained_cfg or tag)
    # The overlay is applied here: an entrypoint need not pass it on to timm's builder.
    cfg = dataclasses.replace(cfg, **(pretrained_cfg_overlay or {}))
    return _predicted(entrypoint, architecture, ghn, cfg, kwargs)


def _asked_for(architecture: str, pretrained_cfg: Cfg) -> str | None:
    """The tag of the GHN that a pretrained cfg asks for; None if it asks for none, or brings weights of its own."""
    if isinstance(pretrained_cfg, str):
        tag = pretrained_cfg
    else:
        entries = pretrained_cfg if isinstance(pretrained_cfg, dict) else vars(pretrained_cfg or PretrainedCfg())
        tag = '' if any(entries.get(key) for key in _WEIGHTS) else entries.get('tag') or ''
    return tag if _names_ghn(f'{architecture}.{tag}') else None


def _cfg_of(
    ghn: GHN, tag: str, architecture: str, pretrained_cfg: str | dict[str, Any] | PretrainedCfg
) -> PretrainedCfg:
    """The pretrained cfg of a model that a GHN predicts.

    Facts about the prediction stand in ``notes``: timm refuses a cfg with entries that it does not know.
    """
    origin = ghn.origin
    name = printable((origin and origin.name) or ghn.config.name or tag)
    blank = _blank_cfg(architecture)
    entries: dict[str, Any] = {'mean': tuple(ghn.config.mean), 'std': tuple(ghn.config.std)}
    if not isinstance(pretrained_cfg, str):
        cfg = PretrainedCfg(**pretrained_cfg) if isinstance(pretrained_cfg, dict) else pretrained_cfg
        entries |= _architecture_entries(cfg)
        if not cfg.notes:
            # Without notes it was not read from a predicted model: normalisation that differs was set by the caller.
            given = {key: tuple(getattr(cfg, key)) for key in ('mean', 'std')}
            entries |= {key: value for key, value in given.items() if value != tuple(getattr(blank, key))}
    entries |= {
        'tag': tag,
        'source': DEFAULT_TAG,
        'description': f'Parameters predicted by the graph hypernetwork {name}, without training.',
        'notes': (f'ghn: {name}',),
    }
    return dataclasses.replace(blank, **entries)


def _predicted(
    entrypoint: Entrypoint, architecture: str, ghn: GHN, cfg: PretrainedCfg, kwargs: dict[str, Any]
) -> nn.Module:
    """Build a model and predict it; timm loads a feature extractor's weights from the state dict of the whole model."""
    from timm_ghn.files import crc32_of
    from timm_ghn.prediction.predict import initialise

    # Some entrypoints choose a variant by the tag: build that of the untagged name.
    default = _default_cfg(architecture)[1]
    built = dataclasses.replace(cfg, tag=default.tag if default else None)
    features = bool(kwargs.get('features_only'))
    whole = {key: value for key, value in kwargs.items() if key not in _FEATURES} if features else kwargs
    input_size = _input_size(cfg, kwargs)
    undescribed = default is None and input_size == PretrainedCfg().input_size
    model = entrypoint(pretrained=False, pretrained_cfg=built, pretrained_cfg_overlay=None, **whole)
    _, facts = initialise(model, ghn, input_size=None if undescribed else input_size, seed=0)
    facts['weights'] = crc32_of(model.state_dict())
    if facts['origin'] and facts['origin']['file']:
        # timm uploads the cfg with the weights, and paths of this machine are private.
        facts['origin']['file'] = Path(facts['origin']['file']).name
    cfg = dataclasses.replace(cfg, notes=(*(cfg.notes or ()), f'provenance: {json.dumps(facts)}'))
    if features:
        # They were predicted for the channels that the model takes: timm has nothing to adapt, and older ones would.
        adapted = None if input_size[0] != PretrainedCfg().input_size[0] else built.first_conv
        weights = dict(model.state_dict())
        built = dataclasses.replace(built, input_size=input_size, first_conv=adapted, state_dict=weights)
        model = entrypoint(pretrained=True, pretrained_cfg=built, pretrained_cfg_overlay=None, **kwargs)
    _describe(model, cfg, features=features)
    return model


def _input_size(cfg: PretrainedCfg, kwargs: dict[str, Any]) -> tuple[int, int, int]:
    """(channels, height, width) of the input of a model that is built from a pretrained cfg and arguments."""
    channels, *size = cfg.input_size
    size = kwargs.get('img_size') or size
    height, width = (size, size) if isinstance(size, int) else size
    return kwargs.get('in_chans', channels), height, width


def _describe(model: nn.Module, cfg: PretrainedCfg, *, features: bool) -> None:
    """Write the pretrained cfg into a model where timm keeps it, in place of the one that it was built with."""
    inner = [module for module in model.modules() if 'state_dict' in (getattr(module, 'pretrained_cfg', None) or ())]
    for module in (*inner, model):
        described = cfg.to_dict()
        if features and module is model:  # as timm does
            described = {key: value for key, value in described.items() if key not in ('num_classes', 'classifier')}
        # timm models have both names for one dictionary.
        module.pretrained_cfg = module.default_cfg = described
