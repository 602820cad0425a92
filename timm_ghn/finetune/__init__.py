"""Fine-tune a model from a predicted, a random or a pretrained start: ``accelerate launch -m timm_ghn.finetune``.

In Python: ``from timm_ghn.finetune import FinetuneOptions, finetune``.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from timm_ghn.finetune.loop import finetune as finetune
    from timm_ghn.finetune.options import FinetuneOptions as FinetuneOptions


_MODULES = {'finetune': 'loop', 'FinetuneOptions': 'options'}


def __getattr__(name: str) -> Any:
    """Import what is asked for: the loop needs accelerate and datasets, which are optional."""
    if name in _MODULES:
        return getattr(importlib.import_module(f'{__name__}.{_MODULES[name]}'), name)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
