"""Fine-tune a model from a predicted, a random or a pretrained start: ``accelerate launch -m timm_ghn.finetune``.

In Python: ``from timm_ghn.finetune import FinetuneOptions, finetune``.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from timm_ghn.finetune.loop import finetune as finetune
    from timm_ghn.finetune.options import FinetuneOptions as FinetuneOptions

#: The modules of the public names. They are imported when they are asked for: accelerate and datasets are optional.
_MODULES = {'finetune': 'loop', 'FinetuneOptions': 'options'}


def __getattr__(name: str) -> Any:
    """A public name."""
    if name not in _MODULES:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    return getattr(importlib.import_module(f'{__name__}.{_MODULES[name]}'), name)
