"""Meta-training of GHNs; so far, where its architectures come from.

Importing the package makes all families and samplers known, also to a process that only unpickles an architecture.
"""

from timm_ghn.train import families as families, samplers as samplers
