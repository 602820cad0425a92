"""Meta-training of GHNs: ``accelerate launch -m timm_ghn.train``.

In Python: ``from timm_ghn.train import TrainOptions, train``.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from timm_ghn.train.loop import train as train
    from timm_ghn.train.options import TrainOptions as TrainOptions


_MODULES = {'train': 'loop', 'TrainOptions': 'options'}


def __getattr__(name: str) -> Any:
    """Import what is asked for: the loop needs accelerate and datasets, which are optional."""
    if name in _MODULES:
        return getattr(importlib.import_module(f'{__name__}.{_MODULES[name]}'), name)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
