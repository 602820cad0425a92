"""Models of timm by name: the one place where this package has timm build them."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

import timm
from timm.models import split_model_name_tag
from torch import nn

from timm_ghn.contexts import preserve_rng
from timm_ghn.errors import UnsupportedModelError
from timm_ghn.hub.catalogue import known_ghns
from timm_ghn.timm_source import DEFAULT_TAG

#: Largest side of an image in pixels. A larger one is a slip of the pen, which takes all memory or overflows.
MAX_SIDE = 2**14

#: Arguments of ``timm.create_model`` that bring weights of their own, whatever else is said of the model's.
_OF_WEIGHTS = ('pretrained', 'pretrained_cfg', 'pretrained_cfg_overlay', 'checkpoint_path')


def check_model_name(name: str, *, ghn_option: str = '--ghn') -> None:
    """Refuse a name by which timm builds no model, or, as the tag names a GHN, a predicted one.

    Raises:
        UnsupportedModelError: if it is refused; it says by which option a GHN is to be named.
    """
    architecture, tag = split_model_name_tag(name)
    if not timm.is_model(architecture):
        near = difflib.get_close_matches(architecture, timm.list_models(), n=3)
        hint = f'did you mean {" or ".join(near)}?' if near else 'timm.list_models() lists them'
        raise UnsupportedModelError(f'timm has no model {name!r}; {hint}')
    if tag == DEFAULT_TAG or tag in known_ghns():
        raise UnsupportedModelError(f'{name!r} names a GHN: write {architecture} {ghn_option} {tag}')
    try:
        timm.get_pretrained_cfg(name)
    except RuntimeError as error:
        hint = f'timm.list_pretrained({architecture!r}) lists its tags'
        raise UnsupportedModelError(f'timm has no model {name!r}; {hint}') from error


def build_timm_model(
    name: str, arguments: Mapping[str, Any], *, seed: int, pretrained: bool = False, ghn_option: str = '--ghn'
) -> nn.Module:
    """Have timm build a model, with its own initialisation or its own weights.

    Args:
        name: Architecture, with or without a tag of timm's.
        arguments: More of ``timm.create_model``.
        seed: Of timm's initialisation. The global random generator stays as it is.
        pretrained: Whether to load timm's weights.
        ghn_option: Option by which a GHN is to be named, for error messages.

    Raises:
        UnsupportedModelError: if timm has no such model or refuses the arguments, or if they ask for other weights.
    """
    check_model_name(name, ghn_option=ghn_option)
    weights = [key for key in _OF_WEIGHTS if key in arguments]
    if weights:
        raise UnsupportedModelError(f'expected arguments for {name!r} that bring no weights (got {weights[0]})')
    size = arguments.get('img_size')
    for side in size if isinstance(size, list | tuple) else (size,):
        check_side(side)
    try:
        with preserve_rng(seed):
            model: nn.Module = timm.create_model(name, pretrained=pretrained, **arguments)
    # The classes of models check their arguments little: what does not fit is whatever error comes of it.
    except Exception as error:
        what = 'build and load' if pretrained else 'build'
        given = f' with {dict(arguments)}' if arguments else ''
        # torch's message may have pages about its own code behind the first line.
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UnsupportedModelError(f'timm cannot {what} {name!r}{given}: {reason}') from error
    return model


def check_side(side: object) -> None:
    """Refuse, by an :class:`UnsupportedModelError`, a side of an image above :data:`MAX_SIDE`."""
    if isinstance(side, int) and side > MAX_SIDE:
        raise UnsupportedModelError(f'expected images with sides of at most {MAX_SIDE:,} pixels (got {side:,})')
