"""Meta-training of GHNs: ``accelerate launch -m timm_ghn.train``.

In Python: ``from timm_ghn.train import TrainOptions, train``.
"""

from timm_ghn.train.loop import train as train
from timm_ghn.train.options import TrainOptions as TrainOptions
