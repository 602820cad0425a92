"""Meta-training of GHNs: ``accelerate launch -m timm_ghn.train``.

In Python: ``from timm_ghn.train import TrainOptions, train``.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from timm_ghn.train.loop import train as train
    from timm_ghn.train.options import TrainOptions as TrainOptions

#: The modules of the public names. They are imported when they are asked for: accelerate and datasets are optional.
_MODULES = {'train': 'loop', 'TrainOptions': 'options'}


def __getattr__(name: str) -> Any:
    """A public name."""
    if name not in _MODULES:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    return getattr(importlib.import_module(f'{__name__}.{_MODULES[name]}'), name)
