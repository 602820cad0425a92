"""The command ``timm-ghn``. Its imports take seconds, and Ctrl-C meanwhile is to be one line as well."""

from __future__ import annotations

import sys


def main() -> int:
    """Run :func:`timm_ghn.cli.main.main`.

    Returns:
        The exit code.
    """
    try:
        from timm_ghn.cli import main as cli
    except KeyboardInterrupt:
        print('timm-ghn: error: interrupted', file=sys.stderr)
        return 130
    return cli.main()
