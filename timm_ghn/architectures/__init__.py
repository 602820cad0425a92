"""Networks to train a GHN on: timm's by name, and drawn ones.

Importing the package makes all families and samplers known, also to a process that only unpickles an architecture.
"""

from timm_ghn.architectures import families as families, samplers as samplers
