"""Command line: ``timm-ghn COMMAND``; ``timm-ghn --help`` lists the commands.

Results go to the standard output, progress and errors to the standard error. Exit code 0: done; 1: ``verify`` found a
network whose norm differs, or that failed; 2: an error, told in one line.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from timm_ghn.cli import hub as hub_commands
from timm_ghn.errors import LONGEST, GHNError, printable

if TYPE_CHECKING:
    from torch import nn


_EXAMPLES = {
    'list': 'timm-ghn list',
    'predict': 'timm-ghn predict resnet50 --num-classes 10 -o out.safetensors',
    'inspect': 'timm-ghn inspect convnext_base',
    'finetune': 'timm-ghn finetune --model resnet18 --dataset uoft-cs/cifar10 --image-size 32 --shots 100',
    'push': 'timm-ghn push out.safetensors user/resnet50.ghn --private',
    'train': 'timm-ghn train --config examples/recipes/ghn_tiny.yaml --dataset uoft-cs/cifar10',
    'evaluate': 'timm-ghn evaluate --ghn train-out/ghn --dataset uoft-cs/cifar10',
    **hub_commands.EXAMPLES,
    'verify': 'timm-ghn verify ghn3_tm8 --arch resnet50 --arch vit_b_16',
}


#: What may be a token of the Hub.
_TOKEN = re.compile(r'\bhf_[A-Za-z0-9]{16,}')

#: Most digits of a number.
_DIGITS = 18

#: Commands whose options are a dataclass: its module and name, and the name of the headings.
_RUNS = {
    'finetune': ('timm_ghn.finetune.options', 'FinetuneOptions', 'GROUPS'),
    'train': ('timm_ghn.train.options', 'TrainOptions', 'GROUPS'),
    'evaluate': ('timm_ghn.train.evaluate', 'EvaluateOptions', 'GROUPS'),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: Arguments without the program's name; those of the process if None.

    Returns:
        The exit code.
    """
    # Python has none where the shell closed it. The next file that is opened would take its place.
    if sys.stdout is None:
        return _fail('the standard output is closed')
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors='backslashreplace')  # as the standard error
    given = sys.argv[1:] if argv is None else list(argv)
    try:
        try:
            args = _parser(given).parse_args(given)
            command: Callable[[argparse.Namespace], int] = args.command
            with warnings.catch_warnings():
                warnings.showwarning = _show_warning
                return command(args)
        finally:
            _flush()
    except BrokenPipeError:
        return 0  # the reader (`| head`) has enough
    except KeyboardInterrupt:
        return _fail('interrupted', code=130)
    except (GHNError, OSError) as error:
        return _fail(str(error) or type(error).__name__)


def _flush() -> None:
    """Write out what was printed. If that fails, Python is kept from trying, and complaining, again when it ends."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise


def _fail(message: str, *, code: int = 2) -> int:
    _say('error', message)
    return code


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    _say('warning', str(message))


def _say(kind: str, message: str) -> None:
    if sys.stderr is not None:
        print(f'timm-ghn: {kind}:', printable(_TOKEN.sub('hf_...', message), LONGEST), file=sys.stderr)


class _Parser(argparse.ArgumentParser):
    """Tells a usage error in one line."""

    def error(self, message: str) -> NoReturn:
        if re.search(r'-token\b', message) or _TOKEN.search(message):
            # The message would show it, in logs too.
            message = 'a token is no option, where others could read it: set HF_TOKEN or log in with `hf auth login`'
        raise SystemExit(_fail(f"{message}; see '{self.prog} --help'"))


def _parser(argv: Sequence[str] = ()) -> argparse.ArgumentParser:
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
    _add_model_options(predict, postprocess='none')
    predict.add_argument('-o', '--output', type=Path, required=True, metavar='FILE', help='file.safetensors to write')
    predict.add_argument('--device', help="where the GHN computes, e.g. 'cuda' (default: the CPU)")

    inspect = add('inspect', inspect_model, 'Print what a GHN would predict of a timm model, or how diverse it is.')
    _add_model_options(inspect, postprocess='auto')
    inspect.add_argument(
        '--diversity',
        action='store_true',
        help='predict, and print how different the channels of each layer are: predicted, post-processed, random',
    )
    inspect.add_argument('--plot', type=Path, metavar='FILE', help='also draw that into FILE (.png, .pdf or .svg)')

    add('finetune', finetune_model, 'Fine-tune a timm model from a predicted, random or pretrained start.')
    push = add('push', push_model, 'Push a predicted or fine-tuned model, or a GHN, to the Hub, with a model card.')
    push.add_argument(
        'source',
        type=Path,
        metavar='FILE|DIR',
        help="file of 'predict', output folder of 'finetune', or folder of a GHN ('ghn' in the output of 'train')",
    )
    push.add_argument('repo', metavar='USER/NAME', help='repository on the Hub; it is made if it does not exist')
    push.add_argument('--private', action='store_true', help='refuse a public repository, make a private one')
    push.add_argument('--revision', metavar='BRANCH', help='branch; it is made if it does not exist (default: main)')
    push.add_argument('--create-pr', action='store_true', help='open a pull request instead')
    push.add_argument('--message', metavar='TEXT', help='first line of the message of the commit')
    push.add_argument('--license', metavar='ID', help="licence of the model (default: that of the catalogue's GHN)")

    add('train', train_ghn, 'Train a GHN on architectures of timm and a data set of images.')
    add('evaluate', evaluate_ghn, 'Accuracy of predicted networks without any training.')
    if argv[:1] and argv[0] in _RUNS:
        # Their options come from modules that need the packages of the extra 'finetune'.
        recipes, kind, groups = _run_options(argv[0])
        recipes.add_arguments(commands.choices[argv[0]], kind, groups)

    hub_commands.add_commands(add)
    verify = add('verify', verify_ghn, 'Compare the norms of predicted torchvision networks with the published ones.')
    verify.add_argument(
        'name',
        metavar='NAME',
        help='ghn2, ghn3_tm8 or ghn3_xlm16 (norms of the others were not published); it is downloaded where necessary',
    )
    verify.add_argument('--arch', action='append', metavar='ARCH', help='only this network (may be repeated)')
    verify.add_argument('--device', help="where the GHN computes, e.g. 'cuda' (default: the CPU)")
    return parser


def _add_model_options(parser: argparse.ArgumentParser, *, postprocess: str) -> None:
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
    parser.add_argument(
        '--postprocess',
        choices=('auto', 'orth', 'noise', 'none'),
        default=postprocess,
        help='what is done to predicted weights as a start for training: nothing, one of these, or what the GHN '
        f'recommends (auto); default: {postprocess}',
    )
    parser.add_argument('--json', action='store_true', help='print JSON')


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit()) or len(text) > _DIGITS:
        shown = printable(text)
        raise argparse.ArgumentTypeError(f'expected a whole number of at most {_DIGITS} digits (got {shown!r})')
    return int(text)


def _positive(text: str) -> int:
    if _count(text) == 0:
        raise argparse.ArgumentTypeError('expected a whole number, 1 or more (got 0)')
    return _count(text)


def list_ghns(args: argparse.Namespace) -> int:
    """Print the catalogue."""
    from timm_ghn.cli.tables import aligned
    from timm_ghn.hub.catalogue import known_ghns

    entries = known_ghns()
    if args.json:
        _print_json({name: entry.to_dict() for name, entry in entries.items()})
        return 0
    rows = [
        (
            name,
            f'{entry.num_parameters:,}' if entry.num_parameters else '-',
            str(entry.config.num_classes),
            entry.source,
            printable(entry.description),
        )
        for name, entry in entries.items()
    ]
    _print_lines(aligned(('name', 'parameters', 'classes', 'from', 'what it is'), rows))
    return 0


def predict_weights(args: argparse.Namespace) -> int:
    """Predict the weights of a timm model and write them with those that are kept, raw unless asked otherwise."""
    from timm_ghn.cli.tables import totals_table
    from timm_ghn.files import check_output, write_state_dict
    from timm_ghn.hub.load import load_ghn
    from timm_ghn.prediction.checks import device_of
    from timm_ghn.prediction.postprocess import PostProcess, postprocess_
    from timm_ghn.prediction.predict import predict, provenance

    check_output(args.output)
    model = build_model(args)
    ghn = load_ghn(args.ghn, device=args.device and device_of(args.device))
    options = PostProcess.of(args.postprocess, seed=args.seed, auto=ghn.config.postprocess)
    prediction = predict(model, ghn, input_size=_input_size(args, model), head=args.head, seed=args.seed)
    model.load_state_dict(prediction.state_dict, strict=False)
    postprocess_(model, options, plan=prediction.plan)
    recipe = {'architecture': args.model, **_model_options(args)}
    facts = provenance(ghn, prediction.plan, head=args.head, seed=args.seed, postprocess=options)
    write_state_dict(model.state_dict(), args.output, {**recipe, 'provenance': facts})
    if args.json:
        _print_json({'file': str(args.output), **recipe, 'provenance': facts})
        return 0
    _print_lines(totals_table(prediction.plan))
    raw = 'none: as predicted; --postprocess auto makes it the start for training that the GHN recommends'
    print(f'\npost-processing: {options.describe() if options else raw}')
    given = ''.join(f', {name}={value}' for name, value in _model_options(args).items())
    print(f"\n{args.output} is read by\n  timm.create_model('{args.model}'{given}, checkpoint_path='{args.output}')")
    return 0


def inspect_model(args: argparse.Namespace) -> int:
    """Print the plan of a timm model, or the diversity of the weights that are predicted for it."""
    from timm_ghn.cli.tables import plan_table, totals_table
    from timm_ghn.graph.build import trace
    from timm_ghn.hub.load import load_ghn
    from timm_ghn.prediction.plan import plan_parameters

    if args.diversity or args.plot:
        return _inspect_diversity(args)
    model = build_model(args)
    ghn = load_ghn(args.ghn)
    graph = trace(model, input_size=_input_size(args, model), rules=ghn.config.rules)
    plan = plan_parameters(graph, ghn.config, head=args.head)
    if args.json:
        _print_json({'architecture': args.model, **_model_options(args), 'ghn': ghn.config.name, **plan.to_dict()})
        return 0
    _print_lines(plan_table(plan))
    print()
    _print_lines(totals_table(plan))
    return 0


def _inspect_diversity(args: argparse.Namespace) -> int:
    """Print, and draw, how different the channels are: predicted, post-processed and random."""
    from tqdm import tqdm

    from timm_ghn.cli.tables import diversity_table
    from timm_ghn.files import check_output
    from timm_ghn.hub.load import load_ghn
    from timm_ghn.prediction.diversity import compare
    from timm_ghn.prediction.postprocess import PostProcess, layers
    from timm_ghn.prediction.predict import predict

    if args.plot:
        from timm_ghn.plots import SUFFIXES, draw

        check_output(args.plot, SUFFIXES)
    model = build_model(args)
    ghn = load_ghn(args.ghn)
    options = PostProcess.of(args.postprocess, seed=args.seed, auto=ghn.config.postprocess)
    prediction = predict(model, ghn, input_size=_input_size(args, model), head=args.head, seed=args.seed)
    plan = prediction.plan
    found = compare(prediction.state_dict, dict(model.named_parameters()), plan, options)
    comparisons = list(tqdm(found, desc='measuring', unit='layer', total=len(layers(plan)), disable=None))
    if args.plot:
        how = options.describe() if options else 'none'
        name = printable(ghn.config.name or args.ghn)
        draw(comparisons, args.plot, title=f'{args.model}, {name}; post-processing: {how}')
    if args.json:
        facts = {'architecture': args.model, **_model_options(args), 'ghn': ghn.config.name}
        facts['postprocess'] = options.to_dict() if options else None
        _print_json({**facts, 'diversity': [comparison.to_dict() for comparison in comparisons]})
        return 0
    _print_lines(diversity_table(comparisons))
    return 0


def _run_options(command: str) -> tuple[Any, Any, dict[str, str]]:
    """The module of recipes, and the options of a command and their headings."""
    import importlib

    module, kind, groups = _RUNS[command]
    try:
        from timm_ghn.runs import recipes

        options = importlib.import_module(module)
    except ImportError as error:
        raise SystemExit(
            _fail(
                f"'{command}' needs more packages ({error}): install timm_ghn with its extra "
                "'finetune', in a checkout with pip install '.[finetune]'"
            )
        ) from error
    return recipes, getattr(options, kind), getattr(options, groups)


def _options(command: str, args: argparse.Namespace) -> Any:
    recipes, kind, _ = _run_options(command)
    return recipes.options_of(args, kind)


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """Show what the loops log."""
    import logging

    class Line(logging.Formatter):
        """One printable line for each record."""

        def format(self, record: logging.LogRecord) -> str:
            return printable(record.getMessage(), LONGEST)

    logger = logging.getLogger('timm_ghn')
    logger.setLevel(logging.INFO)
    handler = logging.StreamHandler()
    handler.setFormatter(Line())
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


def finetune_model(args: argparse.Namespace) -> int:
    """Fine-tune a model."""
    options = _options('finetune', args)
    from timm_ghn.finetune.loop import finetune

    with _told():
        result = finetune(options)
    if int(os.environ.get('RANK', 0)) == 0:
        print(result.output)
        if result.pushed is not None:
            print(result.pushed)
    return 0


def push_model(args: argparse.Namespace) -> int:
    """Push a model or a GHN; the token is that of HF_TOKEN or ``hf auth login``."""
    from timm_ghn.publish.push import Target, push_path

    target = Target(args.repo, args.private or None, args.revision, args.create_pr)
    commit = push_path(args.source, target, license=args.license, commit_message=args.message)
    print(commit.pr_url or commit.commit_url)
    return 0


def train_ghn(args: argparse.Namespace) -> int:
    """Train a GHN."""
    options = _options('train', args)
    from timm_ghn.train.loop import train

    with _told():
        result = train(options)
    if int(os.environ.get('RANK', 0)) == 0:
        print(result.output)
    return 0


def evaluate_ghn(args: argparse.Namespace) -> int:
    """Print the accuracy of predicted networks."""
    options = _options('evaluate', args)
    from timm_ghn.cli.tables import aligned
    from timm_ghn.train.evaluate import evaluate

    rows = evaluate(options)
    cells = [(row.family, row.name, f'{row.parameters:,}', f'{row.top1:.2f}', f'{row.loss:.3f}') for row in rows]
    header = ('family', 'architecture', 'parameters', 'accuracy, %', 'cross-entropy')
    print('\n'.join(aligned(header, cells)))
    return 0


def verify_ghn(args: argparse.Namespace) -> int:
    """Compare parameter norms with the published ones, a row for each network as it comes; 1 if any does not agree."""
    from timm_ghn.analysis.norms import NORM_TOLERANCE, predicted_norm, published_norms
    from timm_ghn.hub.catalogue import known_ghns
    from timm_ghn.hub.load import load_ghn
    from timm_ghn.prediction.checks import device_of

    norms = published_norms(args.name, known_ghns(), args.arch)
    ghn = load_ghn(args.name, device=args.device and device_of(args.device))
    width = max(map(len, (*norms, 'network')))
    print(
        f'{"network":{width}}  {"published":>10}  {"predicted":>10}  {"difference":>10}  below {NORM_TOLERANCE}',
        flush=True,
    )
    agreed = 0
    for arch, published in norms.items():
        try:
            measured = predicted_norm(arch, ghn)
        except (GHNError, RuntimeError) as error:  # torch raises the latter for want of memory
            cells, verdict = f'{"-":>10}  {"-":>10}', f'FAILED: {" ".join(str(error).split())}'
        else:
            agrees = abs(measured - published) < NORM_TOLERANCE
            agreed += agrees
            cells, verdict = f'{measured:10.4f}  {measured - published:+10.4f}', 'yes' if agrees else 'NO'
        print(f'{arch:{width}}  {published:10.4f}  {cells}  {verdict}', flush=True)
    print(f'\n{agreed} of {len(norms)} norms agree')
    return 0 if agreed == len(norms) else 1


def build_model(args: argparse.Namespace) -> nn.Module:
    """The timm model of the command line, with timm's own initialisation drawn from ``--seed``."""
    from timm_ghn.architectures.timm_models import build_timm_model, check_model_name, check_side

    check_model_name(args.model)  # before timm is asked what its configuration says
    check_side(args.img_size)
    return build_timm_model(args.model, _model_options(args), seed=args.seed)


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


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2))


def _print_lines(lines: Iterable[str]) -> None:
    print('\n'.join(lines))
