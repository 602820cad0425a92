"""Meta-training of GHNs: ``accelerate launch -m timm_ghn.train``.

In Python: ``from timm_ghn.train import TrainOptions, train``.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from timm_ghn.train.loop import train as train
    from timm_ghn.train.options import TrainOptions as TrainOptions


def __getattr__(name: str) -> Any:
    """Import what is asked for: the loop needs accelerate and datasets, which are optional."""
    if name == 'train':
        from timm_ghn.train.loop import train

        return train
    if name == 'TrainOptions':
        from timm_ghn.train.options import TrainOptions

        return TrainOptions
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
