"""Fine-tunes models from several initialisations with one recipe, and compares the accuracies.

    python benchmarks/init_grid.py --ghn GHN --dataset cifar10=FOLDER --dataset clothing=FOLDER

Every cell (data set, model, arm, learning rate, seed) is one run of timm_ghn.finetune in <out>/runs, so that a grid
that was interrupted goes on where it stopped. At the end, or with --report alone, <out>/init_grid-<date>.md has the
table, <out>/init_grid-<date>.png the curves and <out>/init_grid-<date>.jsonl all numbers. Where there are several
learning rates, each arm is reported at the one with its best mean final accuracy, of those that most seeds were run
with, and a second table has the others. So that no rate is chosen on the images that it is reported on, a first grid
may choose them on other images (--split), and the second one take them from its numbers (--rates).

Arms: 'random' is timm's own initialisation; 'random+orth' the same, post-processed; 'raw', 'noise' and 'orth' are
predicted by the GHN, and post-processed as they say; 'orth-keep' keeps the norm of each weight, 'orth-all' takes all
layers.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import logging
import math
import multiprocessing
import os
import shlex
import statistics
import sys
import warnings
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from timm_ghn.errors import GHNError
from timm_ghn.finetune.options import FinetuneOptions
from timm_ghn.runs.recipes import read_recipe
from timm_ghn.runs.results import read_results, versions

RESULTS = Path(__file__).resolve().parent / 'results'
MODELS = ('test_resnet', 'test_efficientnet', 'test_convnext', 'test_vit')
#: Start and post-processing of each arm; None stands for the GHN.
ARMS: dict[str, tuple[str | None, str]] = {
    'random': ('random', 'none'),
    'random+orth': ('random', 'orth'),
    'raw': (None, 'none'),
    'noise': (None, 'noise'),
    'orth': (None, 'orth'),
    'orth-keep': (None, 'orth,scale=keep'),
    'orth-all': (None, 'orth,layer=0'),
}
COLOURS = ('#555555', '#999999', '#d1495b', '#edae49', '#00798c', '#66a182', '#2e4057')


@dataclasses.dataclass(frozen=True, order=True)
class Cell:
    """One run."""

    dataset: str
    model: str
    arm: str
    lr: float
    seed: int

    @property
    def name(self) -> str:
        return f'{self.dataset}-{self.model}-{self.arm}-{self.lr:g}-{self.seed}'


def sweep_of(args: argparse.Namespace) -> list[Cell]:
    """The runs with all learning rates; seeds last, so that a grid that is cut short has whole comparisons."""
    return [
        Cell(dataset, model, arm, lr, seed)
        for seed in range(min(args.seeds, args.sweep_seeds or args.seeds))
        for lr in args.lr
        for dataset in args.datasets
        for model in args.models
        for arm in args.arms
    ]


def cells_of(args: argparse.Namespace) -> list[Cell]:
    """All runs of the grid: the sweep and, where that is done, the other seeds at the best rate of their arm."""
    if args.rates is not None:
        best = rates_of(args.rates, args)
        return [Cell(*key, best[key], seed) for seed in range(args.seeds) for key in best]
    cells = sweep_of(args)
    if args.sweep_seeds and args.sweep_seeds < args.seeds:
        swept = curves_of(cells, args)
        if len(swept) == len(cells):
            best = summaries(swept)
            cells += [Cell(*key, best[key].lr, seed) for seed in range(args.sweep_seeds, args.seeds) for key in best]
    return cells


def rates_of(path: Path, args: argparse.Namespace) -> dict[tuple[str, str, str], float]:
    """The best learning rate of each data set, model and arm of this grid in the numbers of another one."""
    curves = {}
    for line in path.read_text(encoding='utf-8').splitlines():
        values = json.loads(line)
        epochs = values.pop('epochs')
        curves[Cell(**values)] = epochs
    best = summaries(curves)
    keys = [(dataset, model, arm) for dataset in args.datasets for model in args.models for arm in args.arms]
    missing = [' '.join(key) for key in keys if key not in best]
    if missing:
        raise SystemExit(f'{path} has no learning rate for {missing[0]!r}; run it with the same models and arms')
    return {key: best[key].lr for key in keys}


def options_of(cell: Cell, args: argparse.Namespace) -> FinetuneOptions:
    """The recipe, which is the same for all arms, with what the cell says."""
    init, postprocess = ARMS[cell.arm]
    return FinetuneOptions(
        **{
            'dataset': args.datasets[cell.dataset],
            'image_size': 32,
            'train_crop_mode': 'pad',
            'warmup_epochs': min(1, args.recipe['epochs'] - 1),
            'clip_grad': 5.0,
            'batch_size': 32,
            'checkpoint_hist': 1,
            **args.recipe,
            **args.splits.get(cell.dataset, {}),
            'model': cell.model,
            'init': args.ghn if init is None else init,
            'postprocess': postprocess,
            'lr': cell.lr,
            'seed': cell.seed,
            'output': args.out / 'runs' / cell.name,
            'resume': True,
        }
    )


def is_done(cell: Cell, args: argparse.Namespace) -> bool:
    path = args.out / 'runs' / cell.name / 'results.jsonl'
    return path.exists() and any(line['kind'] == 'end' and line['finished'] for line in read_results(path))


def work(cell: Cell, args: argparse.Namespace) -> tuple[Cell, str | None]:
    """Run a cell in a worker process; the error, if any."""
    from timm_ghn.finetune.loop import finetune

    logging.disable(logging.INFO)
    warnings.simplefilter('ignore')
    try:
        finetune(options_of(cell, args))
    except GHNError as error:
        return cell, f'{type(error).__name__}: {error}'
    # Only the curves are wanted.
    folder = args.out / 'runs' / cell.name
    for path in sorted(folder.rglob('*'), reverse=True):
        if path.is_dir():
            path.rmdir()
        elif path.name != 'results.jsonl':
            path.unlink()
    return cell, None


def prepare(threads: int) -> None:
    import torch

    torch.set_num_threads(threads)
    os.environ['HF_DATASETS_DISABLE_PROGRESS_BARS'] = '1'


def run(args: argparse.Namespace) -> dict[Cell, str]:
    """Run what is not done yet; the errors."""
    errors = run_cells(sweep_of(args), args) if args.rates is None else {}
    return errors or run_cells(cells_of(args), args)


def run_cells(cells: list[Cell], args: argparse.Namespace) -> dict[Cell, str]:
    left = [cell for cell in cells if not is_done(cell, args)]
    errors: dict[Cell, str] = {}
    context = multiprocessing.get_context('spawn')
    with context.Pool(args.workers, prepare, (args.threads,), maxtasksperchild=8) as pool:
        jobs = [pool.apply_async(work, (cell, args)) for cell in left]
        for job in tqdm(jobs, desc='runs', unit='run', initial=len(cells) - len(left), total=len(cells)):
            cell, error = job.get()
            if error is not None:
                errors[cell] = error
                print(f'{cell.name}: {error}', file=sys.stderr)
        pool.close()
        pool.join()
    return errors


def curves_of(cells: list[Cell], args: argparse.Namespace) -> dict[Cell, list[dict[str, Any]]]:
    """Metrics after each epoch of the finished cells."""
    found = {}
    for cell in cells:
        if is_done(cell, args):
            lines = read_results(args.out / 'runs' / cell.name / 'results.jsonl')
            # A run that was stopped and went on may tell of an epoch twice.
            found[cell] = list({line['epoch']: line for line in lines if line['kind'] == 'epoch'}.values())
    return found


@dataclasses.dataclass(frozen=True)
class Summary:
    """An arm on a data set and a model, at its best learning rate.

    ``curves`` has the accuracies of a seed after each epoch, in percent.
    """

    lr: float
    seeds: tuple[int, ...]
    curves: tuple[tuple[float, ...], ...]

    @property
    def final(self) -> tuple[float, ...]:
        return tuple(curve[-1] for curve in self.curves)

    @property
    def mean(self) -> float:
        return statistics.fmean(self.final)

    @property
    def spread(self) -> float:
        return statistics.stdev(self.final) if len(self.final) > 1 else 0.0


def summaries(curves: dict[Cell, list[dict[str, Any]]]) -> dict[tuple[str, str, str], Summary]:
    """One summary for each data set, model and arm."""
    by_rate: dict[tuple[str, str, str], dict[float, list[Cell]]] = defaultdict(lambda: defaultdict(list))
    for cell in sorted(curves):
        by_rate[cell.dataset, cell.model, cell.arm][cell.lr].append(cell)
    found = {}
    for key, rates in by_rate.items():
        options = [
            Summary(lr, tuple(c.seed for c in cells), tuple(tuple(e['val_top1'] for e in curves[c]) for c in cells))
            for lr, cells in rates.items()
        ]
        most = max(len(option.seeds) for option in options)
        found[key] = max((option for option in options if len(option.seeds) == most), key=lambda option: option.mean)
    return found


def difference(first: Summary, second: Summary) -> tuple[float, float | None]:
    """Difference of two arms over the seeds that both have, paired: the mean, and its standard error."""
    pairs = [(a, b) for s, a in zip(first.seeds, first.final, strict=True)
             for t, b in zip(second.seeds, second.final, strict=True) if s == t]  # fmt: skip
    differences = [a - b for a, b in pairs]
    if not differences:
        return math.nan, None
    error = statistics.stdev(differences) / len(differences) ** 0.5 if len(differences) > 1 else None
    return statistics.fmean(differences), error


def against(first: Summary, second: Summary) -> str:
    """Difference of two arms in words."""
    mean, error = difference(first, second)
    return '-' if error is None else f'{mean:+.1f} ± {error:.1f}'


def table(found: dict[tuple[str, str, str], Summary], arms: Sequence[str]) -> list[str]:
    """Markdown: the final accuracy of each arm, and its difference from the first arm."""
    lines = ['| data | model | ' + ' | '.join(arms) + ' |', '| --- | --- |' + ' --- |' * len(arms)]
    for dataset, model in dict.fromkeys((key[0], key[1]) for key in found):
        cells = []
        base = found.get((dataset, model, arms[0]))
        for arm in arms:
            summary = found.get((dataset, model, arm))
            if summary is None:
                cells.append('')
                continue
            text = f'{summary.mean:.1f} ± {summary.spread:.1f}'
            if base is not None and arm != arms[0]:
                text += f' ({against(summary, base)})'
            cells.append(text)
        lines.append(f'| {dataset} | {model} | ' + ' | '.join(cells) + ' |')
    return lines


def verdicts(found: dict[tuple[str, str, str], Summary], arms: Sequence[str]) -> list[str]:
    """How each arm does against the first one over all cells; two standard errors count as significant."""
    lines = []
    for arm in arms[1:]:
        differences = []
        for dataset, model in dict.fromkeys((key[0], key[1]) for key in found):
            pair = found.get((dataset, model, arm)), found.get((dataset, model, arms[0]))
            if pair[0] is not None and pair[1] is not None:
                differences.append(difference(pair[0], pair[1]))
        differences = [(mean, error) for mean, error in differences if not math.isnan(mean)]
        if not differences:
            continue
        better = sum(mean > 0 for mean, _ in differences)
        surely = sum(mean > 2 * error for mean, error in differences if error is not None)
        worse = sum(mean < -2 * error for mean, error in differences if error is not None)
        lines.append(
            f'- {arm}: {statistics.fmean(mean for mean, _ in differences):+.1f} points on average over '
            f'{len(differences)} cells; ahead of {arms[0]} in {better} ({surely} by more than two standard errors), '
            f'behind by more than two in {worse}'
        )
    return lines


def draw(found: dict[tuple[str, str, str], Summary], arms: Sequence[str], path: Path) -> None:
    """A panel for each data set and model: mean and spread of the accuracy over epochs."""
    from matplotlib.figure import Figure

    rows = list(dict.fromkeys(key[0] for key in found))
    columns = list(dict.fromkeys(key[1] for key in found))
    figure = Figure(figsize=(3.3 * len(columns), 2.7 * len(rows)), layout='constrained')
    panels = figure.subplots(len(rows), len(columns), squeeze=False, sharex=True)
    for row, dataset in enumerate(rows):
        for column, model in enumerate(columns):
            axis = panels[row][column]
            for arm, colour in zip(arms, COLOURS, strict=False):
                summary = found.get((dataset, model, arm))
                if summary is None:
                    continue
                steps = list(zip(*summary.curves, strict=True))
                means = [statistics.fmean(step) for step in steps]
                spreads = [statistics.stdev(step) if len(step) > 1 else 0.0 for step in steps]
                epochs = range(len(steps))
                axis.plot(epochs, means, color=colour, label=f'{arm}', linewidth=1.4)
                low = [mean - spread for mean, spread in zip(means, spreads, strict=True)]
                high = [mean + spread for mean, spread in zip(means, spreads, strict=True)]
                axis.fill_between(epochs, low, high, color=colour, alpha=0.15, linewidth=0)
            axis.set_title(f'{model} on {dataset}', fontsize=9)
            axis.grid(alpha=0.3)
            if column == 0:
                axis.set_ylabel('accuracy, %', fontsize=8)
            if row == len(rows) - 1:
                axis.set_xlabel('epochs of fine-tuning', fontsize=8)
    panels[0][0].legend(fontsize=7)
    figure.savefig(path, dpi=130)


def report(args: argparse.Namespace, errors: dict[Cell, str]) -> None:
    """Write the table, the picture and the numbers."""
    cells = cells_of(args)
    curves = curves_of(cells, args)
    if not curves:
        print('nothing is finished yet', file=sys.stderr)
        return
    found = summaries(curves)
    stem = args.out / f'init_grid-{args.name}'
    with stem.with_suffix('.jsonl').open('w', encoding='utf-8') as file:
        for cell, epochs in sorted(curves.items()):
            keep = ('epoch', 'train_loss', 'val_loss', 'val_top1')
            rows = [{key: round(epoch[key], 4) for key in keep if epoch.get(key) is not None} for epoch in epochs]
            file.write(json.dumps({**dataclasses.asdict(cell), 'epochs': rows}) + '\n')
    text = [
        f'# Initialisations after fine-tuning, {args.name}',
        '',
        f'`{args.command}`',
        '',
        f'GHN: {Path(args.ghn).name}. {args.note}'.rstrip(),
        '',
        f'{len(curves)} of {len(cells)} runs are finished; {len(errors)} failed. '
        f'Versions: {", ".join(f"{name} {number}" for name, number in versions().items())}.',
        '',
        f'Accuracy in percent, fine-tuned for {max(len(epochs) for epochs in curves.values()) - 1} epochs: mean ± '
        'standard deviation over seeds, at the best learning rate of the arm (of those that most seeds were run with); '
        f'in parentheses the difference from {args.arms[0]!r}, paired by seed, ± its standard error.',
        '',
        *table(found, args.arms),
        '',
        *verdicts(found, args.arms),
        '',
        'Before any training (batch statistics calibrated where there are any):',
        '',
        *table(_first(found), args.arms),
        '',
        *_rates(found),
        *_by_rate(curves, args.arms),
        *[f'- {cell.name}: {error}' for cell, error in errors.items()],
    ]
    stem.with_suffix('.md').write_text('\n'.join(text).rstrip() + '\n', encoding='utf-8')
    draw(found, args.arms, stem.with_suffix('.png'))
    print('\n'.join(table(found, args.arms)))


def _rates(found: dict[tuple[str, str, str], Summary]) -> list[str]:
    """The learning rates chosen, of the arms in a line for each data set and model."""
    rates: dict[tuple[str, str], list[str]] = defaultdict(list)
    for (dataset, model, arm), summary in found.items():
        rates[dataset, model].append(f'{arm} {summary.lr:g}')
    chosen = [f'{dataset} {model}: {", ".join(words)}' for (dataset, model), words in rates.items()]
    return [f'Learning rates: {"; ".join(chosen)}.', '']


def _by_rate(curves: dict[Cell, list[dict[str, Any]]], arms: Sequence[str]) -> list[str]:
    """Markdown: the final accuracy of the first seed at each learning rate; nothing where no arm has several."""
    finals: dict[tuple[str, str, str], dict[float, float]] = defaultdict(dict)
    for cell, epochs in curves.items():
        if cell.seed == 0:
            finals[cell.dataset, cell.model, cell.arm][cell.lr] = epochs[-1]['val_top1']
    if all(len(rates) < 2 for rates in finals.values()):
        return []
    tried = sorted({lr for rates in finals.values() for lr in rates})
    lines = [
        'By learning rate, the first seed:',
        '',
        '| data | model | arm | ' + ' | '.join(f'{lr:g}' for lr in tried) + ' |',
        '| --- | --- | --- |' + ' ---: |' * len(tried),
    ]
    for dataset, model, arm in sorted(finals, key=lambda key: (*key[:2], arms.index(key[2]))):
        accuracies = finals[dataset, model, arm]
        cells = [f'{accuracies[lr]:.1f}' if lr in accuracies else '' for lr in tried]
        lines.append(f'| {dataset} | {model} | {arm} | ' + ' | '.join(cells) + ' |')
    return [*lines, '']


def _first(found: dict[tuple[str, str, str], Summary]) -> dict[tuple[str, str, str], Summary]:
    return {key: dataclasses.replace(s, curves=tuple(curve[:1] for curve in s.curves)) for key, s in found.items()}


def _pair(text: str) -> tuple[str, str]:
    name, equals, place = text.partition('=')
    if not equals:
        raise argparse.ArgumentTypeError(f'expected NAME=PLACE (got {text!r})')
    return name, place


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--ghn', default='ghn', help='name or path')
    parser.add_argument('--dataset', dest='pairs', type=_pair, action='append', required=True, metavar='NAME=PLACE')
    parser.add_argument('--split', dest='split_pairs', action='append', default=[], metavar='NAME:train=S,val=S',
                        help='splits of a data set')  # fmt: skip
    parser.add_argument('--models', nargs='+', default=list(MODELS))
    parser.add_argument('--arms', nargs='+', default=list(ARMS), choices=list(ARMS))
    parser.add_argument('--lr', nargs='+', type=float, default=[3e-3])
    parser.add_argument('--seeds', type=int, default=3)
    parser.add_argument(
        '--sweep-seeds', type=int, default=0, help='seeds that try all rates, the others the best of their arm (0: all)'
    )
    parser.add_argument(
        '--rates', type=Path, metavar='JSONL', help='take the best rate of each arm from the numbers of another grid'
    )
    parser.add_argument('--config', type=Path, help='recipe whose options all runs share')
    parser.add_argument('--epochs', type=int, default=10)
    parser.add_argument('--shots', type=int)
    parser.add_argument('--workers', type=int, default=2, help='runs at once')
    parser.add_argument('--threads', type=int, default=1, help='threads of each')
    parser.add_argument('--out', type=Path, default=RESULTS)
    parser.add_argument('--name', default=str(datetime.date.today()), help='of the files of the report')
    parser.add_argument('--note', default='', help='a sentence for the report')
    parser.add_argument('--report', action='store_true', help='only write the report of what is finished')
    args = parser.parse_args(argv)
    args.datasets = dict(args.pairs)
    args.splits = {}
    for text in args.split_pairs:
        name, _, parts = text.partition(':')
        named = dict(part.partition('=')[::2] for part in parts.split(','))
        args.splits[name] = {f'{key}_split': value for key, value in named.items()}
    args.recipe = read_recipe(args.config, FinetuneOptions) if args.config else {}
    args.recipe.setdefault('epochs', args.epochs)
    if args.shots:
        args.recipe['shots'] = args.shots
    args.command = f'python benchmarks/init_grid.py {shown(sys.argv[1:] if argv is None else argv, args)}'
    return args


def shown(argv: Sequence[str], args: argparse.Namespace) -> str:
    """The command for the report: without folders of this machine, and without what decides no number."""
    parts = list(argv)
    for option in ('--out', '--note', '--name', '--workers', '--report'):
        if option in parts:
            place = parts.index(option)
            del parts[place : place + (1 if option == '--report' else 2)]
    names = {f'{name}={place}': f'{name}=FOLDER' for name, place in args.pairs} | {args.ghn: Path(args.ghn).name}
    names |= {str(args.rates): args.rates.name} if args.rates is not None else {}
    return shlex.join(names.get(part, part) for part in parts)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    errors = {} if args.report else run(args)
    report(args, errors)
    return 1 if errors else 0


if __name__ == '__main__':
    sys.exit(main())
