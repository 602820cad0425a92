"""Fine-tune a model from a predicted, a random or a pretrained start: ``accelerate launch -m timm_ghn.finetune``.

In Python: ``from timm_ghn.finetune import FinetuneOptions, finetune``.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from timm_ghn.finetune.loop import finetune as finetune
    from timm_ghn.finetune.options import FinetuneOptions as FinetuneOptions


def __getattr__(name: str) -> Any:
    """Import what is asked for: the loop needs accelerate and datasets, which are optional."""
    if name == 'finetune':
        from timm_ghn.finetune.loop import finetune

        return finetune
    if name == 'FinetuneOptions':
        from timm_ghn.finetune.options import FinetuneOptions

        return FinetuneOptions
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
