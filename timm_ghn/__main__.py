"""``python -m timm_ghn`` is the command ``timm-ghn``."""

import sys

from timm_ghn.cli.main import main

sys.exit(main())
