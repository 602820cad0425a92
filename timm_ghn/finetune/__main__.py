"""``accelerate launch -m timm_ghn.finetune`` is the command ``timm-ghn finetune`` in several processes."""

import sys

from timm_ghn.cli.main import main

sys.exit(main(['finetune', *sys.argv[1:]]))
