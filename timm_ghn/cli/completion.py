"""The command ``timm-ghn completion``: a script by which a shell completes commands, options and names of files."""

from __future__ import annotations

import argparse

from timm_ghn.cli.main import build_parser
from timm_ghn.errors import ConfigError

try:
    import shtab
except ImportError as error:
    raise ConfigError('completion needs shtab: pip install shtab') from error


def run_completion(args: argparse.Namespace) -> int:
    """Print the script."""
    parser = build_parser(every=True)
    _complete_files(parser)
    print(shtab.complete(parser, args.shell))
    return 0


def _complete_files(parser: argparse.ArgumentParser) -> None:
    """Have the shell complete what the help calls a file or a folder."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                _complete_files(command)
        if set(str(action.metavar).split('|')) & {'FILE', 'PATH', 'IN', 'OUT', 'DIR', 'FOLDER'}:
            action.complete = shtab.FILE  # type: ignore[attr-defined]
