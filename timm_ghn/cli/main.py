"""Command line: ``timm-ghn COMMAND``; ``timm-ghn --help`` lists the commands.

Results go to the standard output, progress and errors to the standard error. Exit code 0: done; 1: ``verify`` found a
network whose norm differs, or that failed; 2: an error, in one line; 130: interrupted.

This module holds the parser and the errors. It imports the modules of the commands, and with them torch, only when a
command runs.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from timm_ghn.errors import LONGEST, GHNError, printable
from timm_ghn.version import __version__

#: Of each command: the module that has its function ``run_COMMAND``, arguments of an example, and what it does.
COMMANDS = {
    'list': ('hub', '', 'List the GHNs that can be named.'),
    'predict': ('models', 'resnet50 -o out.safetensors', 'Predict the weights of a timm model, into a file.'),
    'inspect': ('models', 'convnext_base --plot graph.html', 'Print the plan of a prediction, or how diverse it is.'),
    'finetune': ('runs', '--config examples/recipes/quick.yaml', 'Fine-tune a timm model from a start of your choice.'),
    'push': ('hub', 'out.safetensors user/resnet50.ghn', 'Push a model or a GHN to the Hub, with a model card.'),
    'train': ('runs', '--config examples/recipes/ghn_tiny.yaml', 'Train a GHN on architectures of timm and images.'),
    'evaluate': ('runs', '--ghn train-out/ghn --dataset FOLDER', 'Accuracy of predicted networks, without training.'),
    'search': ('runs', '--ghn train-out/ghn --dataset FOLDER', 'Rank architectures by the accuracy of predictions.'),
    'convert': ('hub', 'ghn3_tm8 -o ghn3-t', 'Convert a GHN to the native format: config.json and safetensors.'),
    'cache': ('hub', '--remove ghn3_tm8', 'List the official checkpoints that were converted when first loaded.'),
    'verify': ('hub', 'ghn3_tm8 --arch resnet50', 'Compare norms of predicted networks with the published ones.'),
    'deepnets': ('deepnets', 'stats nets.arrow', 'Generate, convert and describe networks of DeepNets-1M.'),
    'completion': ('completion', 'bash', 'Print a script that completes commands, options and files in a shell.'),
}

#: Commands whose options are the fields of a dataclass.
RUNS = tuple(name for name, (module, _, _) in COMMANDS.items() if module == 'runs')

#: What may be a token of the Hub.
_TOKEN = re.compile(r'\bhf_[A-Za-z0-9]{16,}')


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command, by arguments without the program's name (those of the process if None); gives the exit code."""
    given = sys.argv[1:] if argv is None else list(argv)
    try:
        try:
            args = build_parser(given).parse_args(given)
            module = _module_of(COMMANDS[args.command][0])
            with warnings.catch_warnings():
                warnings.showwarning = lambda message, *_, **__: _say('warning', str(message))
                code: int = getattr(module, f'run_{args.command}')(args)
                return code
        finally:
            if sys.stdout is not None:  # closed by the caller
                sys.stdout.flush()
    except BrokenPipeError:  # the reader (`| head`) has enough; Python would flush again when it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return _fail('interrupted', code=130)
    except (GHNError, OSError) as error:
        return _fail(str(error) or type(error).__name__)


def _module_of(name: str) -> Any:
    """Import a module of commands, and before it the package itself where the script put that off."""
    package = sys.modules['timm_ghn']
    if not hasattr(package, '__version__'):
        package.__spec__.loader.exec_module(package)  # type: ignore[union-attr]
    return importlib.import_module(f'timm_ghn.cli.{name}')


def _say(kind: str, message: str) -> None:
    print(f'timm-ghn: {kind}:', printable(_TOKEN.sub('hf_...', message), LONGEST), file=sys.stderr)


def _fail(message: str, *, code: int = 2) -> int:
    _say('error', message)
    return code


class _Parser(argparse.ArgumentParser):
    """Reports a usage error in one line."""

    def error(self, message: str) -> NoReturn:
        if re.search(r'-token\b', message) or _TOKEN.search(message):
            # The message would show it, in logs too.
            message = 'a token is no option, where others could read it: set HF_TOKEN or log in with `hf auth login`'
        raise SystemExit(_fail(f"{message}; see '{self.prog} --help'"))


def build_parser(argv: Sequence[str] = (), *, every: bool = False) -> argparse.ArgumentParser:
    """The parser of the command line.

    Args:
        argv: Arguments to parse: of the commands in :data:`RUNS` only the one that they name has its options.
        every: Whether all of these have theirs.
    """
    examples = '\n'.join(f'  timm-ghn {name} {words}'.rstrip() for name, (_, words, _) in COMMANDS.items())
    parser = _Parser(
        prog='timm-ghn',
        description='Predict the parameters of timm models with graph hypernetworks.',
        epilog=f'examples:\n{examples}',
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('--version', action='version', version=f'timm_ghn {__version__}')
    commands = parser.add_subparsers(dest='command', metavar='COMMAND', required=True, parser_class=_Parser)
    of = {
        name: commands.add_parser(name, help=text, description=text, epilog=f'example: timm-ghn {name} {words}')
        for name, (_, words, text) in COMMANDS.items()
    }
    for name in RUNS if every else set(argv[:1]).intersection(RUNS):
        try:
            options = _module_of('runs')
            options.add_arguments(of[name], options.OPTIONS[name])
        except ImportError as error:
            message = f"'{name}' needs more packages ({error}): install timm_ghn with its extra 'finetune'"
            raise SystemExit(_fail(message)) from error

    _add_model_options(of['predict'], postprocess='none')
    add = of['predict'].add_argument
    add('-o', '--output', type=Path, required=True, metavar='FILE', help='file.safetensors to write')
    add('--device', help="where the GHN computes, e.g. 'cuda' (default: the CPU)")

    _add_model_options(of['inspect'], postprocess='auto')
    add = of['inspect'].add_argument
    text = 'predict, and print how different the channels of each layer are: predicted, post-processed, random'
    add('--diversity', action='store_true', help=text)
    text = 'also draw the graph into FILE (.png, .pdf, .svg or .html), or with --diversity that (no .html)'
    add('--plot', type=Path, metavar='FILE', help=text)
    text = 'draw virtual edges up to this length, too (default: 1, none)'
    add('--virtual-edges', type=_at_least(1), metavar='N', default=1, help=text)

    add = of['push'].add_argument
    text = "file of 'predict', output folder of 'finetune', or folder of a GHN ('ghn' in the output of 'train')"
    add('source', type=Path, metavar='FILE|DIR', help=text)
    add('repo', metavar='USER/NAME', help='repository on the Hub; it is made if it does not exist')
    add('--private', action='store_true', help='refuse a public repository, make a private one')
    add('--revision', metavar='BRANCH', help='branch; it is made if it does not exist (default: main)')
    add('--create-pr', action='store_true', help='open a pull request instead')
    add('--message', metavar='TEXT', help='first line of the message of the commit')
    add('--license', metavar='ID', help="licence of the model (default: that of the catalogue's GHN)")

    add = of['convert'].add_argument
    add('source', metavar='NAME|PATH', help='a GHN; it is downloaded where necessary')
    add('-o', '--output', type=Path, required=True, metavar='FOLDER', help='folder to make')

    of['cache'].add_argument('--remove', metavar='NAME|all', help='remove a conversion, or all; downloads stay')

    add = of['verify'].add_argument
    text = 'ghn2, ghn3_tm8 or ghn3_xlm16 (norms of the others were not published); it is downloaded where necessary'
    add('name', metavar='NAME', help=text)
    add('--arch', action='append', metavar='ARCH', help='only this network (may be repeated)')
    add('--device', help="where the GHN computes, e.g. 'cuda' (default: the CPU)")

    _add_deepnets_options(of['deepnets'])
    text = 'source what is printed, or save it where the shell looks for completions'
    of['completion'].add_argument('shell', choices=('bash', 'zsh', 'tcsh'), help=text)
    for name in ('list', 'predict', 'inspect', 'convert', 'cache'):
        of[name].add_argument('--json', action='store_true', help='print JSON')
    return parser


def _add_deepnets_options(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest='action', metavar='ACTION', required=True, parser_class=_Parser)
    text = 'draw networks of a split; a run that was interrupted goes on'
    add = actions.add_parser('generate', help=text).add_argument
    add('--split', required=True, help='train, val, test, wide, deep, dense, bnfree or search')
    add('--num', type=_at_least(1), required=True, metavar='N', help='how many networks')
    add('--seed', type=_at_least(0), default=0, help='of the draws (default: 0)')
    add('--workers', type=_at_least(1), default=1, metavar='N', help='processes (default: 1)')
    add('-o', '--output', type=Path, required=True, metavar='FILE', help='file.arrow to write')
    add = actions.add_parser('stats', help='print nodes, parameters, degrees, paths and primitives').add_argument
    add('file', type=Path, metavar='FILE', help='Arrow file, or official HDF5 file')
    add('--split', help='only this split')
    add('--json', action='store_true', help='print JSON')
    add = actions.add_parser('convert', help='convert official HDF5 and JSON to Arrow, or back').add_argument
    add('file', type=Path, metavar='IN', help='file.hdf5 (with file_meta.json beside it) or file.arrow')
    add('output', type=Path, metavar='OUT', help='file.arrow or file.hdf5')


def _add_model_options(parser: argparse.ArgumentParser, *, postprocess: str) -> None:
    add = parser.add_argument
    add('model', metavar='MODEL', help="timm model, e.g. 'resnet50'")
    add('--ghn', default='ghn', metavar='NAME|PATH', help='GHN to use (default: the default GHN)')
    add('--num-classes', type=_at_least(0), metavar='N', help="classes (default: the model's own)")
    add('--in-chans', type=_at_least(1), metavar='N', help="image channels (default: the model's own)")
    add('--img-size', type=_at_least(1), metavar='N', help="side of the image (default: the model's own)")
    add('--seed', type=_at_least(0), default=0, help='for everything random (default: 0)')
    text = 'the classifier: predict it, keep it as timm initialises it, or predict it where it fits the GHN (auto)'
    add('--head', choices=('auto', 'predict', 'keep'), default='auto', help=f'{text}; default: auto')
    text = 'post-processing of predicted weights as a start for training; auto: what the GHN recommends'
    choices = ('auto', 'orth', 'noise', 'none')
    add('--postprocess', choices=choices, default=postprocess, help=f'{text}; default: {postprocess}')


def _at_least(least: int) -> Callable[[str], int]:
    """A type of argparse for whole numbers from ``least`` on."""

    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f'expected a whole number of {least} or more (got {text!r})')
        return int(text)

    return parse
