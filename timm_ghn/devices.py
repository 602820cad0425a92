"""Devices that users name."""

from __future__ import annotations

import torch

from timm_ghn.errors import ConfigError


def device_of(name: torch.device | str) -> torch.device:
    """The device of a name like 'cuda:1'.

    Raises:
        ConfigError: if there is no such device here, or if it is the meta device, which holds no values.
    """
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, TypeError) as error:
        # torch's message may have pages of advice behind its first line.
        cause = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(
            f"the device '{name}' cannot be used: {cause}; expected one like 'cpu' or 'cuda:0'"
        ) from error
    if device.type == 'meta':
        raise ConfigError(f"the device '{name}' holds no values; expected one like 'cpu' or 'cuda:0'")
    return device
