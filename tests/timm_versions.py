"""What the installed timm does that other versions that we support do not."""

from __future__ import annotations

import timm

#: It notes itself which arguments a model was created with, sizes as the model has them. Versions before 1.0.31 leave
#: that to us, who write what was given.
TIMM_RECORDS = tuple(int(part) for part in timm.__version__.split('.')[:3]) >= (1, 0, 31)
