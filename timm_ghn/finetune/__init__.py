"""Fine-tune a model from a predicted, a random or a pretrained start: ``accelerate launch -m timm_ghn.finetune``.

In Python: ``from timm_ghn.finetune import FinetuneOptions, finetune``.
"""

from timm_ghn.finetune.loop import finetune as finetune
from timm_ghn.finetune.options import FinetuneOptions as FinetuneOptions
