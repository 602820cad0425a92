"""``accelerate launch -m timm_ghn.train`` is the command ``timm-ghn train`` in several processes."""

import sys

from timm_ghn.cli.main import main

sys.exit(main(['train', *sys.argv[1:]]))
