"""Command line: ``timm-ghn list | predict | inspect | verify``.

Results go to the standard output, progress and errors to the standard error. Exit code 0: done; 1: ``verify`` found a
network whose norm differs; 2: an error, told in one line.
"""

from __future__ import annotations

import argparse
import difflib
import json
import math
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from timm_ghn.errors import ConfigError, GHNError, UnsupportedModelError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from timm_ghn.nn.ghn import GHN
    from timm_ghn.params.plan import ParameterPlan

#: A norm agrees with the published one when it differs by less (GHN-3's authors use the same bound).
NORM_TOLERANCE = 0.01

#: torchvision networks that warn, and take minutes, unless told not to draw weights that are then overwritten.
_SLOW_INITIALISATION = ('googlenet', 'inception_v3')

_EXAMPLES = {
    'list': 'timm-ghn list',
    'predict': 'timm-ghn predict resnet50 --num-classes 10 -o out.safetensors',
    'inspect': 'timm-ghn inspect convnext_base',
    'verify': 'timm-ghn verify ghn3_tm8 --arch resnet50 --arch vit_b_16',
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: Arguments without the program's name; those of the process if None.

    Returns:
        The exit code.
    """
    args = _parser().parse_args(argv)
    command: Callable[[argparse.Namespace], int] = args.command
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            code = command(args)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader (`| head`) has enough. Python would complain once more when it closes the stream.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return _fail('interrupted', code=130)
    except (GHNError, OSError) as error:
        return _fail(str(error) or type(error).__name__)
    return code


def _fail(message: str, *, code: int = 2) -> int:
    _say('error', message)
    return code


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    _say('warning', str(message))


def _say(kind: str, message: str) -> None:
    print(f'timm-ghn: {kind}:', ' '.join(message.split()), file=sys.stderr)


class _Parser(argparse.ArgumentParser):
    """Tells a usage error in one line."""

    def error(self, message: str) -> NoReturn:
        raise SystemExit(_fail(f"{message}; see '{self.prog} --help'"))


def _parser() -> argparse.ArgumentParser:
    from timm_ghn.version import __version__

    parser = _Parser(
        prog='timm-ghn',
        description='Predict the parameters of timm models with graph hypernetworks.',
        epilog='examples:\n' + '\n'.join(f'  {example}' for example in _EXAMPLES.values()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('--version', action='version', version=f'timm_ghn {__version__}')
    commands = parser.add_subparsers(metavar='COMMAND', required=True, parser_class=_Parser)

    def add(name: str, command: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text, epilog=f'example: {_EXAMPLES[name]}')
        added.set_defaults(command=command)
        return added

    listing = add('list', list_ghns, 'List the GHNs that can be named.')
    listing.add_argument('--json', action='store_true', help='print JSON')

    predict = add('predict', predict_weights, 'Predict the weights of a timm model and write them to a file.')
    _add_model_options(predict)
    predict.add_argument('-o', '--output', type=Path, required=True, metavar='FILE', help='file.safetensors to write')
    predict.add_argument('--device', help="where the GHN computes, e.g. 'cuda' (default: the CPU)")

    inspect = add('inspect', inspect_model, 'Print what a GHN would predict of a timm model, without predicting it.')
    _add_model_options(inspect)

    verify = add('verify', verify_ghn, 'Compare the norms of predicted torchvision networks with the published ones.')
    verify.add_argument('name', metavar='NAME', help="a GHN of 'timm-ghn list'; it is downloaded where necessary")
    verify.add_argument('--arch', action='append', metavar='ARCH', help='only this network (may be repeated)')
    verify.add_argument('--device', help="where the GHN computes, e.g. 'cuda' (default: the CPU)")
    return parser


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('model', metavar='MODEL', help="timm model, e.g. 'resnet50'")
    parser.add_argument('--ghn', default='ghn', metavar='NAME|PATH', help='GHN to use (default: the default GHN)')
    parser.add_argument('--num-classes', type=_count, metavar='N', help="classes (default: the model's own)")
    parser.add_argument('--in-chans', type=_positive, metavar='N', help="image channels (default: the model's own)")
    parser.add_argument('--img-size', type=_positive, metavar='N', help="side of the image (default: the model's own)")
    parser.add_argument('--seed', type=_count, default=0, help='of what is drawn, not predicted (default: 0)')
    parser.add_argument(
        '--head',
        choices=('auto', 'predict', 'keep'),
        default='auto',
        help='the classifier: predict it, keep it as drawn, or predict it where it fits the GHN (auto, the default)',
    )
    parser.add_argument('--json', action='store_true', help='print JSON')


def _count(text: str) -> int:
    value = int(text) if text.isascii() and text.isdigit() else -1
    if value < 0:
        raise argparse.ArgumentTypeError(f'expected a whole number, 0 or more (got {text!r})')
    return value


def _positive(text: str) -> int:
    if _count(text) == 0:
        raise argparse.ArgumentTypeError('expected a whole number, 1 or more (got 0)')
    return _count(text)


def list_ghns(args: argparse.Namespace) -> int:
    """Print the catalogue."""
    from timm_ghn.hub.catalogue import known_ghns

    entries = known_ghns()
    if args.json:
        _print_json({name: entry.to_dict() for name, entry in entries.items()})
        return 0
    rows = [
        (name, f'{entry.num_parameters:,}', str(entry.config.num_classes), entry.source, entry.description)
        for name, entry in entries.items()
    ]
    _print_table(('name', 'parameters', 'classes', 'from', 'what it is'), rows)
    return 0


def predict_weights(args: argparse.Namespace) -> int:
    """Predict the weights of a timm model and write them with those that are kept."""
    from timm_ghn.hub.load import load_ghn
    from timm_ghn.prediction import predict

    _check_output(args.output)
    model = build_model(args)
    ghn = load_ghn(args.ghn, device=args.device)
    prediction = predict(model, ghn, input_size=_input_size(args, model), head=args.head, seed=args.seed)
    recipe = {'architecture': args.model, **_model_options(args)}
    state_dict = {**model.state_dict(), **prediction.state_dict}
    write_state_dict(state_dict, args.output, {**recipe, 'provenance': prediction.provenance})
    if args.json:
        _print_json({'file': str(args.output), **recipe, 'provenance': prediction.provenance})
        return 0
    _print_totals(prediction.plan)
    options = ''.join(f', {name}={value}' for name, value in _model_options(args).items())
    print(f"\n{args.output} is read by\n  timm.create_model('{args.model}'{options}, checkpoint_path='{args.output}')")
    return 0


def inspect_model(args: argparse.Namespace) -> int:
    """Print the plan of a timm model."""
    from timm_ghn.graph.build import trace
    from timm_ghn.hub.load import load_ghn
    from timm_ghn.params.plan import plan_parameters

    model = build_model(args)
    ghn = load_ghn(args.ghn)
    graph = trace(model, input_size=_input_size(args, model), rules=ghn.config.rules)
    plan = plan_parameters(graph, ghn.config, head=args.head)
    if args.json:
        _print_json({'architecture': args.model, **_model_options(args), 'ghn': ghn.config.name, **plan.to_dict()})
        return 0
    rows = [
        (row.name, 'x'.join(map(str, row.shape)), row.role, '-' if row.node is None else str(row.node), row.how)
        for row in plan
    ]
    _print_table(('parameter', 'shape', 'role', 'node', 'how'), rows)
    print()
    _print_totals(plan)
    return 0


def _print_totals(plan: ParameterPlan) -> None:
    """Tensors and elements of a model: predicted, and kept by reason."""
    totals = plan.summary()
    rows = [('predicted', totals['predicted_tensors'], totals['predicted_elements'])]
    rows += [(f'kept: {reason}', kept['tensors'], kept['elements']) for reason, kept in totals['kept'].items()]
    rows.append(('all', totals['tensors'], totals['elements']))
    _print_table(('parameters', 'tensors', 'elements'), [(name, f'{n:,}', f'{size:,}') for name, n, size in rows])


def verify_ghn(args: argparse.Namespace) -> int:
    """Compare parameter norms with the published ones; 1 if any differs."""
    from tqdm import tqdm

    from timm_ghn.hub.catalogue import known_ghns
    from timm_ghn.hub.load import load_ghn

    norms = published_norms(args.name, known_ghns(), args.arch)
    ghn = load_ghn(args.name, device=args.device)
    rows, failed = [], 0
    for arch, published in tqdm(norms.items(), desc='predicting', unit='network', disable=None):
        measured = predicted_norm(arch, ghn)
        agrees = abs(measured - published) < NORM_TOLERANCE
        failed += not agrees
        rows.append(
            (arch, f'{published:.4f}', f'{measured:.4f}', f'{measured - published:+.4f}', 'yes' if agrees else 'NO')
        )
    _print_table(('network', 'published', 'predicted', 'difference', f'below {NORM_TOLERANCE}'), rows)
    print(f'\n{len(rows) - failed} of {len(rows)} norms agree')
    return 1 if failed else 0


def published_norms(name: str, known: Mapping[str, Any], archs: Iterable[str] | None = None) -> dict[str, float]:
    """Norms that the authors of a GHN published.

    Args:
        name: A GHN of the catalogue.
        known: The catalogue.
        archs: Only these networks.

    Returns:
        Norm over all parameters for each torchvision network.

    Raises:
        ConfigError: if nothing was published for the GHN, or not for one of ``archs``.
    """
    with_norms = sorted(other for other, entry in known.items() if entry.norms)
    if name not in with_norms:
        raise ConfigError(f'no norms were published for {name!r}; there are some for {", ".join(with_norms)}')
    norms: dict[str, float] = dict(known[name].norms)
    missing = [arch for arch in archs or () if arch not in norms]
    if missing:
        near = difflib.get_close_matches(missing[0], norms, n=3) or sorted(norms)[:3]
        raise ConfigError(f'no norm was published for {missing[0]!r} (try {", ".join(near)})')
    return {arch: norms[arch] for arch in archs} if archs else norms


def predicted_norm(arch: str, ghn: GHN) -> float:
    """L2 norm over all parameters of a torchvision network after prediction, unpredicted ones included.

    The network is as its constructor leaves it, in train mode: auxiliary classifiers count.
    """
    import torch
    import torchvision

    from timm_ghn.prediction import ghn_init

    options = {'init_weights': False} if arch in _SLOW_INITIALISATION else {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = torchvision.models.get_model(arch, weights=None, **options)
    ghn_init(model, ghn, head='predict')
    return math.sqrt(sum(float(p.detach().double().square().sum()) for p in model.parameters()))


def build_model(args: argparse.Namespace) -> nn.Module:
    """The timm model of the command line, with timm's own initialisation drawn from ``--seed``.

    Raises:
        UnsupportedModelError: if timm has no such model, or refuses the options.
    """
    import timm
    import torch

    from timm_ghn.hub.catalogue import known_ghns

    architecture, _, tag = args.model.partition('.')
    if not timm.is_model(architecture):
        near = difflib.get_close_matches(architecture, timm.list_models(), n=3)
        hint = f'did you mean {" or ".join(near)}?' if near else 'timm.list_models() lists them'
        raise UnsupportedModelError(f'timm has no model {args.model!r}; {hint}')
    if tag == 'ghn' or tag in known_ghns():
        raise UnsupportedModelError(f'{args.model!r} names a GHN: write {architecture} --ghn {tag}')
    try:
        options = _model_options(args)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(args.seed)
            model: nn.Module = timm.create_model(args.model, pretrained=False, **options)
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        raise UnsupportedModelError(f'timm cannot build {args.model!r} as asked: {error}') from error
    return model


def _model_options(args: argparse.Namespace) -> dict[str, Any]:
    """What ``create_model`` is given beside the name. Only models of a fixed image size are told the size."""
    import timm

    cfg = timm.get_pretrained_cfg(args.model)
    fixed = cfg is not None and cfg.fixed_input_size
    options = {
        'num_classes': args.num_classes,
        'in_chans': args.in_chans,
        'img_size': args.img_size if fixed else None,
    }
    return {name: value for name, value in options.items() if value is not None}


def _input_size(args: argparse.Namespace, model: nn.Module) -> tuple[int, int, int] | None:
    """Size of the image to trace with; None leaves it to the model's own metadata."""
    if args.in_chans is None and args.img_size is None:
        return None
    cfg: Any = model.pretrained_cfg
    channels, height, width = cfg['input_size']
    return (args.in_chans or channels, args.img_size or height, args.img_size or width)


def _check_output(path: Path) -> None:
    """Refuse a file that cannot be written before minutes go into the prediction."""
    if path.suffix != '.safetensors':
        raise ConfigError(f'expected a name that ends in .safetensors (got {str(path)!r})')
    if path.is_dir():
        raise IsADirectoryError(f'{str(path)!r} is a folder')
    if not path.parent.is_dir():
        raise FileNotFoundError(f'the folder {str(path.parent)!r} does not exist')
    if not os.access(path.parent, os.W_OK):
        raise PermissionError(f'the folder {str(path.parent)!r} cannot be written')


def write_state_dict(state_dict: Mapping[str, Tensor], path: Path, metadata: Mapping[str, Any]) -> None:
    """Write a state dict as safetensors: the whole file, or nothing.

    Args:
        state_dict: What to write.
        path: The file; one that exists is replaced.
        metadata: Goes into the file's header, as JSON where it is not text.

    Raises:
        OSError: if the file cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    # Tied parameters share memory, which the format has no word for: each name gets its own copy.
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state_dict.items()}
    header = {key: value if isinstance(value, str) else json.dumps(value) for key, value in metadata.items()}
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f'.{path.name}.') as folder:
        part = Path(folder) / path.name
        try:
            save_file(tensors, part, metadata={'format': 'pt', **header})
        except SafetensorError as error:
            raise OSError(f'{str(path)!r} cannot be written: {error}') from error
        os.replace(part, path)


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2))


def _print_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    print('\n'.join(aligned(header, rows)))


def aligned(header: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """Lines of a table; columns of numbers are aligned to the right."""
    body = [tuple(row) for row in rows]
    columns = list(zip(header, *body, strict=True))
    widths = [max(map(len, column)) for column in columns]
    right = [all(_is_number(cell) for cell in column[1:]) for column in columns]
    for row in (header, ['-' * width for width in widths], *body):
        cells = (
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(row, widths, right, strict=True)
        )
        yield '  '.join(cells).rstrip()


def _is_number(text: str) -> bool:
    return text == '-' or text.replace(',', '').replace('.', '', 1).lstrip('+-').isdigit()
