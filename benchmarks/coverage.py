"""Traces and plans every timm architecture, and checks that its graph is right.

    python benchmarks/coverage.py
    python benchmarks/coverage.py --rules operators

Each architecture is built on the meta device, in a worker process. Results are appended to <out>/coverage.jsonl one by
one, so that an interrupted run goes on where it stopped; at the end <out>/coverage-<date>.csv has a row for each
architecture and <out>/coverage-<date>.md a summary by family. `flaws_of` in graph_checks.py lists what makes a graph
wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import dataclasses
import datetime
import itertools
import json
import multiprocessing
import sys
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import timm
import torch
from graph_checks import flaws_of
from torch import nn
from tqdm import tqdm

import timm_ghn
from timm_ghn import GHNConfig
from timm_ghn.graph.build import RULES
from timm_ghn.graph.vocabulary import ARCHITECTURAL

RESULTS = Path(__file__).resolve().parent / 'results'
CONFIG = GHNConfig(hid=64, max_shape=(64, 64, 16, 16), num_classes=1000, layers=3, heads=8, name='ghn3tm8')
#: Least share of an architecture's elements to be predicted, or kept for what they are.
LEAST_EXPLAINED = 0.99
#: Least share of a family's elements to be predicted.
LEAST_PREDICTED = 0.90


@dataclasses.dataclass(frozen=True)
class Result:
    """What became of one architecture; without totals where ``error`` says why there are none.

    ``kept`` maps a reason to its numbers of tensors and of elements. ``unexplained`` lists name and shape of what is
    kept for another reason than what it is.
    """

    family: str
    architecture: str
    device: str = ''
    rules: str = ''
    nodes: int = 0
    edges: int = 0
    tensors: int = 0
    elements: int = 0
    predicted_tensors: int = 0
    predicted_elements: int = 0
    explained_elements: int = 0
    kept: dict[str, tuple[int, int]] = dataclasses.field(default_factory=dict)
    unexplained: list[tuple[str, list[int]]] = dataclasses.field(default_factory=list)
    seconds_to_build: float = 0.0
    seconds_to_trace: float = 0.0
    seconds_to_plan: float = 0.0
    flaws: list[str] = dataclasses.field(default_factory=list)
    error: str = ''

    @property
    def tensors_predicted(self) -> float:
        return self.predicted_tensors / max(self.tensors, 1)

    @property
    def elements_predicted(self) -> float:
        return self.predicted_elements / max(self.elements, 1)

    @property
    def elements_explained(self) -> float:
        return self.explained_elements / max(self.elements, 1)


# One architecture.


def build(name: str) -> tuple[nn.Module, str]:
    """The model, on the meta device where its constructor allows that."""
    try:
        with torch.device('meta'):
            return timm.create_model(name), 'meta'
    except (RuntimeError, NotImplementedError):
        return timm.create_model(name), 'cpu'


def examine(family: str, name: str, rules: str = RULES[0]) -> Result:
    """Build, trace, plan and check one architecture."""
    times = [time.perf_counter()]
    model, device = build(name)
    times.append(time.perf_counter())
    graph = timm_ghn.trace(model, rules=rules)
    times.append(time.perf_counter())
    plan = timm_ghn.plan_parameters(graph, CONFIG, head='predict')
    times.append(time.perf_counter())
    seconds = [round(b - a, 4) for a, b in itertools.pairwise(times)]
    total = plan.summary()
    explained = [row for row in plan if row.predicted or row.reason in ARCHITECTURAL]
    return Result(
        family,
        name,
        device,
        graph.rules,
        total['nodes'],
        total['edges'],
        total['tensors'],
        total['elements'],
        total['predicted_tensors'],
        total['predicted_elements'],
        sum(row.numel for row in explained),
        {reason: (count['tensors'], count['elements']) for reason, count in total['kept'].items()},
        [(row.name, list(row.shape)) for row in plan.kept if row.reason not in ARCHITECTURAL],
        *seconds,
        flaws=flaws_of(model, plan),
    )


# All of them, in worker processes.


def work(connection: Connection) -> None:
    """Examine what comes in through the connection, until nothing does."""
    torch.set_num_threads(1)
    warnings.simplefilter('ignore')
    with contextlib.suppress(EOFError):
        while True:
            family, name, rules = connection.recv()
            try:
                result = examine(family, name, rules)
            except Exception as error:  # whatever goes wrong belongs into the table
                result = Result(family, name, error=f'{type(error).__name__}: {error}')
            connection.send(result)


class Worker:
    """A process that examines one architecture at a time, and is replaced if it dies or hangs."""

    def __init__(self, timeout: float, rules: str) -> None:
        self.timeout = timeout
        self.rules = rules
        self.task: tuple[str, str] | None = None
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context('spawn')
        self.connection, other = context.Pipe()
        self.process = context.Process(target=work, args=(other,), daemon=True)
        self.process.start()
        other.close()

    def give(self, task: tuple[str, str]) -> None:
        self.task, self.deadline = task, time.monotonic() + self.timeout
        self.connection.send((*task, self.rules))

    def collect(self) -> Result | None:
        """The result if there is one by now, or what prevented it."""
        if self.task is None:
            return None
        task = self.task
        if self.connection.poll():
            try:
                result: Result = self.connection.recv()
                self.task = None
                return result
            except EOFError:
                self.process.join()
                reason = f'the worker ended with exit code {self.process.exitcode}'
        elif time.monotonic() > self.deadline:
            reason = f'not done after {self.timeout:g} s'
        else:
            return None
        self.stop()
        self.task = None
        self._start()
        return Result(*task, error=reason)

    def stop(self) -> None:
        self.connection.close()
        self.process.kill()
        self.process.join()


def examine_all(
    tasks: Sequence[tuple[str, str]], *, workers: int, timeout: float, rules: str = RULES[0]
) -> Iterator[Result]:
    """Examine architectures, in no particular order."""
    waiting = list(reversed(tasks))
    crew = [Worker(timeout, rules) for _ in range(min(workers, len(tasks)))]
    try:
        while waiting or any(worker.task for worker in crew):
            for worker in crew:
                if worker.task is None and waiting:
                    worker.give(waiting.pop())
            wait([worker.connection for worker in crew if worker.task], timeout=1.0)
            yield from filter(None, (worker.collect() for worker in crew))
    finally:
        for worker in crew:
            worker.stop()


def families(pattern: str) -> dict[str, str]:
    """Family of each architecture: the timm module that defines it."""
    family = {name: module for module in timm.models.list_modules() for name in timm.list_models(module=module)}
    return {name: family[name] for name in timm.list_models(pattern)}


def read_results(path: Path) -> dict[str, Result]:
    """Results of an earlier run."""
    if not path.exists():
        return {}
    results = [Result(**json.loads(line)) for line in path.read_text(encoding='utf-8').splitlines()]
    return {result.architecture: result for result in results}


# The tables.

COLUMNS: dict[str, Callable[[Result], Any]] = {
    'family': lambda result: result.family,
    'architecture': lambda result: result.architecture,
    'rules': lambda result: result.rules,
    'nodes': lambda result: result.nodes,
    'edges': lambda result: result.edges,
    'tensors': lambda result: result.tensors,
    'parameters': lambda result: result.elements,
    '% of tensors predicted': lambda result: percent(result.tensors_predicted),
    '% of elements predicted': lambda result: percent(result.elements_predicted),
    '% predicted or kept for what they are': lambda result: percent(result.elements_explained),
    'kept': lambda result: in_words(result.kept),
    's to build': lambda result: result.seconds_to_build,
    's to trace': lambda result: result.seconds_to_trace,
    's to plan': lambda result: result.seconds_to_plan,
    'built on': lambda result: result.device,
    'flaws': lambda result: '; '.join(result.flaws),
    'error': lambda result: result.error,
}


def percent(share: float) -> str:
    """In per cent, rounded down: 100 means all."""
    return f'{int(share * 10_000) / 100:.2f}'


def in_words(kept: dict[str, tuple[int, int]]) -> str:
    ordered = sorted(kept.items(), key=lambda item: -item[1][1])
    return '; '.join(f'{reason}: {elements:,} in {tensors}' for reason, (tensors, elements) in ordered)


def write_csv(results: Sequence[Result], path: Path) -> None:
    with path.open('w', newline='', encoding='utf-8') as file:
        table = csv.writer(file, lineterminator='\n')
        table.writerow(COLUMNS)
        table.writerows([column(result) for column in COLUMNS.values()] for result in results)


def write_summary(results: Sequence[Result], path: Path, *, date: str, command: str) -> None:
    good = [result for result in results if not result.error]
    by_family: dict[str, list[Result]] = defaultdict(list)
    for result in results:
        by_family[result.family].append(result)
    predicted = sum(r.predicted_elements for r in good) / max(sum(r.elements for r in good), 1)
    short = [r for r in good if r.elements_explained < LEAST_EXPLAINED]
    lines = [
        f'# Coverage of timm, {date}',
        '',
        f'`{command}` with timm_ghn {timm_ghn.__version__}, timm {timm.__version__}, torch {torch.__version__}, '
        f'Python {sys.version.split()[0]}. Seconds are those of one thread on a shared machine.',
        '',
        f'- {len(results)} architectures in {len(by_family)} families, {len(results) - len(good)} with an error, '
        f'{sum(bool(r.flaws) for r in good)} with a flaw in the graph.',
        f'- {percent(predicted)} % of all elements are predicted.',
        f'- {sum(r.rules == "published" for r in good)} architectures have the published graph, '
        f'{sum(r.rules == "operators" for r in good)} the one by the operators.',
        f'- {len(short)} architectures have less than {LEAST_EXPLAINED:.0%} of their elements predicted or kept for '
        'what they are.',
        f'- Tracing takes {median([r.seconds_to_trace for r in good]):.2f} s (median), '
        f'{max((r.seconds_to_trace for r in good), default=0):.2f} s at most.',
        '',
        '`%` is the share of elements predicted in the family and in its worst architecture; `explained` adds what is '
        'kept for what it is, in the worst architecture.',
        '',
        '| family | architectures | nodes | % | worst % | explained | s to trace | flaws | errors | most kept |',
        '|---|---:|---:|---:|---:|---:|---:|---:|---:|---|',
        *(family_row(family, by_family[family]) for family in sorted(by_family)),
        '',
        *listing('Errors', [(r.architecture, r.error) for r in results if r.error]),
        *listing('Flaws', [(r.architecture, '; '.join(r.flaws)) for r in good if r.flaws]),
        *listing(
            f'Less than {LEAST_EXPLAINED:.0%} explained',
            [(r.architecture, f'{percent(r.elements_explained)} %: {shapes_in_words(r.unexplained)}') for r in short],
        ),
        *listing(
            f'Less than {LEAST_PREDICTED:.0%} predicted',
            [
                (r.architecture, f'{percent(r.elements_predicted)} %: {in_words(r.kept)}')
                for r in good
                if r.elements_predicted < LEAST_PREDICTED
            ],
        ),
    ]
    path.write_text('\n'.join(lines).rstrip() + '\n', encoding='utf-8')


def family_row(family: str, results: Sequence[Result]) -> str:
    good = [result for result in results if not result.error]
    elements = sum(r.elements for r in good)
    kept = Counter[str]()
    for result in good:
        kept.update({reason: count for reason, (_, count) in result.kept.items()})
    cells = [
        family,
        len(results),
        f'{min((r.nodes for r in good), default=0)}-{max((r.nodes for r in good), default=0)}',
        percent(sum(r.predicted_elements for r in good) / max(elements, 1)),
        percent(min((r.elements_predicted for r in good), default=0)),
        percent(min((r.elements_explained for r in good), default=0)),
        f'{max((r.seconds_to_trace for r in good), default=0):.2f}',
        sum(bool(r.flaws) for r in good),
        len(results) - len(good),
        '; '.join(f'{reason} ({percent(count / elements)} %)' for reason, count in kept.most_common(1)),
    ]
    return '| ' + ' | '.join(map(str, cells)) + ' |'


def median(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2] if values else 0.0


def shapes_in_words(tensors: Sequence[tuple[str, list[int]]]) -> str:
    found = [f'{name} {"x".join(map(str, shape))}' for name, shape in tensors[:3]]
    return ', '.join(found) + (f' and {len(tensors) - 3} more' if len(tensors) > 3 else '')


def listing(title: str, items: Sequence[tuple[str, str]]) -> list[str]:
    return [f'## {title}', '', *(f'- {name}: {text}' for name, text in items), ''] if items else []


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--workers', type=int, default=2, help='processes (default: 2)')
    parser.add_argument('--filter', default='', help="architectures by name, with wildcards, e.g. 'resnet*'")
    parser.add_argument('--limit', type=int, help='the first so many only')
    parser.add_argument('--timeout', type=float, default=300.0, help='seconds for one architecture (default: 300)')
    parser.add_argument('--out', type=Path, default=RESULTS, help=f'folder for the results (default: {RESULTS})')
    parser.add_argument(
        '--rules', choices=RULES, default=RULES[0], help=f'rule set of the graphs (default: {RULES[0]})'
    )
    parser.add_argument('--fresh', action='store_true', help='forget earlier results instead of going on from them')
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    kind = 'coverage' if args.rules == RULES[0] else f'coverage-{args.rules}'
    log = args.out / f'{kind}.jsonl'
    if args.fresh:
        log.unlink(missing_ok=True)
    family = dict(list(families(args.filter).items())[: args.limit])
    done = {name: result for name, result in read_results(log).items() if name in family}
    tasks = [(module, name) for name, module in family.items() if name not in done]
    new = examine_all(tasks, workers=args.workers, timeout=args.timeout, rules=args.rules)
    with log.open('a', encoding='utf-8') as file:
        for result in tqdm(new, total=len(family), initial=len(done), unit='model'):
            file.write(json.dumps(dataclasses.asdict(result)) + '\n')
            file.flush()
            done[result.architecture] = result
    results = [done[name] for name in family]
    date = datetime.date.today().isoformat()
    write_csv(results, args.out / f'{kind}-{date}.csv')
    command = ' '.join(['python', 'benchmarks/coverage.py', *(sys.argv[1:] if argv is None else argv)])
    write_summary(results, args.out / f'{kind}-{date}.md', date=date, command=command)
    print(f'{len(results)} architectures, {sum(bool(r.error) for r in results)} errors: {args.out}')


if __name__ == '__main__':
    main()
