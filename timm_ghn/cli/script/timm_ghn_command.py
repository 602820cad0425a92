"""The command ``timm-ghn``: it reads its arguments before it imports torch and timm, which takes seconds."""

from __future__ import annotations

import importlib.util
import sys


def main() -> int:
    """Run :func:`timm_ghn.cli.main.main`, which imports the package itself when a command needs it.

    Returns:
        The exit code.
    """
    spec = importlib.util.find_spec('timm_ghn')
    assert spec is not None
    # Not run yet: its submodules can be imported meanwhile.
    sys.modules['timm_ghn'] = importlib.util.module_from_spec(spec)
    from timm_ghn.cli.main import main as run

    return run()
