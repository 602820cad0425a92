"""Networks to train a GHN on: timm's by name, and drawn ones.

Importing the package makes all families and samplers known, also to a process that only unpickles an architecture.
"""

from timm_ghn.architectures import families, samplers
from timm_ghn.architectures.deepnets import sampler as deepnets_sampler

__all__ = ['deepnets_sampler', 'families', 'samplers']
