"""Which runs are missing, and running them: by cell, in several processes, each line on the disk as it is made.

The rate of an arm in a cell is chosen by successive halving on images and seeds of its own: all rates with half of the
steps, the best two of them with all steps and another seed. The better one of these is reported, with the paired seeds.
"""

from __future__ import annotations

import concurrent.futures
import fcntl
import json
import multiprocessing
import os
import sys
import time
import traceback
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.initperf.arms import NotApplicableError
from benchmarks.initperf.cells import NETWORKS, Cell, Tier, load_part
from benchmarks.initperf.protocol import BATCH, RATES, SELECTION_SEED, Run, Setting, execute

Line = dict[str, Any]

#: Rates that go on to the second rung.
KEPT = 2


def read_lines(path: Path) -> list[Line]:
    """The lines of the results; one that was cut off when a process was killed is passed over."""
    found = []
    for text in path.read_text(encoding='utf-8').splitlines() if path.exists() else []:
        try:
            found.append(json.loads(text))
        except ValueError:
            continue
    return found


def add_line(path: Path, line: Mapping[str, Any]) -> None:
    """Append a line, whole; processes may do so at once."""
    with path.open('a+b') as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        end = file.seek(0, os.SEEK_END)
        file.seek(max(0, end - 1))
        whole = not end or file.read(1) == b'\n'
        file.write((b'' if whole else b'\n') + json.dumps(line, allow_nan=False, default=str).encode() + b'\n')


def first_rung(cell: Cell, arm: str) -> list[Run]:
    """All rates with half of the steps."""
    return [Run(cell, arm, 'select', rate, SELECTION_SEED, max(1, cell.steps // 2)) for rate in RATES]


def second_rung(cell: Cell, arm: str, lines: Mapping[Run, Line]) -> list[Run]:
    """The best rates of the first rung with all steps."""
    ranked = _ranked(first_rung(cell, arm), lines)
    return [Run(cell, arm, 'select', run.rate, SELECTION_SEED + 1, cell.steps) for run in ranked[:KEPT]]


def chosen(cell: Cell, arm: str, lines: Mapping[Run, Line]) -> Line | None:
    """The line of the second rung that won; None while the choice is not made."""
    first = first_rung(cell, arm)
    if any(run not in lines for run in first):
        return None
    second = second_rung(cell, arm, lines)
    return lines[_ranked(second, lines)[0]] if all(run in lines for run in second) else None


def reported(cell: Cell, arm: str, rate: float, seeds: int) -> list[Run]:
    """The runs that count."""
    return [Run(cell, arm, 'report', rate, seed, cell.steps) for seed in range(seeds)]


def _ranked(runs: Sequence[Run], lines: Mapping[Run, Line]) -> list[Run]:
    """Best accuracy first; among equals the lower loss."""
    return sorted(runs, key=lambda run: (-lines[run]['accuracy'], _loss(lines[run])))


def _loss(line: Line) -> float:
    return float('inf') if line['loss'] is None else float(line['loss'])


def runs_by(lines: Iterable[Line]) -> dict[Run, Line]:
    """Lines of finished runs."""
    return {Run.of(line): line for line in lines if line['kind'] == 'run'}


def skipped(lines: Iterable[Line]) -> dict[tuple[str, str], str]:
    """Why an arm has nothing to do for a network, by network and arm."""
    return {(line['network'], line['arm']): line['reason'] for line in lines if line['kind'] == 'skip'}


def is_done(cell: Cell, arm: str, seeds: int, lines: Mapping[Run, Line]) -> bool:
    """Whether all runs of an arm in a cell are there."""
    best = chosen(cell, arm, lines)
    return best is not None and all(run in lines for run in reported(cell, arm, best['rate'], seeds))


def measure_arm(cell: Cell, arm: str, seeds: int, done: Mapping[Run, Line], out: Path, setting: Setting) -> int:
    """Do what is missing of an arm in a cell, a line for each run; how many runs that were."""
    lines = dict(done)
    before = len(lines)

    def complete(runs: Sequence[Run]) -> None:
        for run in runs:
            if run not in lines:
                line = _jsonable({'kind': 'run', **execute(run, setting)})
                add_line(out, line)
                lines[run] = line

    try:
        complete(first_rung(cell, arm))
        complete(second_rung(cell, arm, lines))
        best = _ranked(second_rung(cell, arm, lines), lines)[0]
        complete(reported(cell, arm, best.rate, seeds))
    except NotApplicableError as reason:
        add_line(out, {'kind': 'skip', 'network': cell.network, 'arm': arm, 'reason': str(reason)})
    return len(lines) - before


def _jsonable(line: Line) -> Line:
    """Numbers that JSON has no word for become null."""
    return {key: None if isinstance(value, float) and value - value != 0 else value for key, value in line.items()}


def _begin() -> None:
    """Set a worker process up."""
    torch.set_num_threads(1)
    warnings.simplefilter('ignore')
    os.environ['HF_DATASETS_DISABLE_PROGRESS_BARS'] = '1'


def _pretrain(network: str, minutes: Sequence[float], setting: Setting) -> int:
    setting.donors.prepare(NETWORKS[network], minutes)
    return 0


def jobs_of(
    tier: Tier, lines: Sequence[Line], out: Path, setting: Setting
) -> Iterator[tuple[str, Any, tuple[Any, ...]]]:
    """Name, function and arguments of each job: cell by cell; a network is pretrained while other arms are measured."""
    done, skips = runs_by(lines), skipped(lines)
    by_cell: dict[tuple[Cell, str], dict[Run, Line]] = defaultdict(dict)
    for run, line in done.items():
        by_cell[run.cell, run.arm][run] = line
    prepared: set[str] = set()

    def pretraining(cells: Sequence[Cell]) -> Iterator[tuple[str, Any, tuple[Any, ...]]]:
        for cell in cells:
            minutes = pretraining_minutes(tier.arms[cell.steps])
            if minutes and cell.network not in prepared:
                prepared.add(cell.network)
                yield f'pretrain {cell.network}', _pretrain, (cell.network, minutes, setting)

    for place, cell in enumerate(tier.cells):
        missing = [
            arm
            for arm in tier.arms[cell.steps]
            if (cell.network, arm) not in skips and not is_done(cell, arm, tier.seeds, done)
        ]
        missing.sort(key=lambda arm: arm.startswith('pretrain:'))
        waiting = pretraining_minutes(missing)
        yield from pretraining([cell] if waiting else [])
        for arm in missing:
            if arm.startswith('pretrain:'):
                yield from pretraining(tier.cells[place + 1 : place + 2])
            arguments = (cell, arm, tier.seeds, by_cell[cell, arm], out, setting)
            yield f'{cell.network} {cell.data} {cell.steps} {arm}', measure_arm, arguments


def pretraining_minutes(arms: Iterable[str]) -> list[float]:
    """The CPU-minutes of the donors that arms name."""
    return sorted(float(arm.partition(':')[2]) for arm in arms if arm.startswith('pretrain:'))


def measure(tier: Tier, out: Path, setting: Setting, *, workers: int) -> int:
    """Do what is missing of a tier; how many jobs failed.

    Args:
        tier: What to measure.
        out: The results, JSON lines; what is there already is not done again.
        setting: Where things are.
        workers: Processes, of one thread each.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    jobs = list(jobs_of(tier, read_lines(out), out, setting))
    failures = 0
    context = multiprocessing.get_context('spawn')
    with concurrent.futures.ProcessPoolExecutor(workers, context, _begin) as pool:
        futures = {pool.submit(function, *arguments): name for name, function, arguments in jobs}
        bar = tqdm(concurrent.futures.as_completed(futures), total=len(futures), desc='jobs', unit='job', mininterval=5)
        for future in bar:
            error = future.exception()
            if error is None:
                print(f'{time.strftime("%H:%M:%S")} {futures[future]}: {future.result()} runs', flush=True)
            else:
                failures += 1
                print(f'{futures[future]} failed:', file=sys.stderr)
                traceback.print_exception(error)
    return failures


def estimate(tier: Tier, lines: Sequence[Line], setting: Setting) -> tuple[float, list[str]]:
    """CPU seconds that the missing runs will take, by timing two steps of each network; and a line for each network."""
    done, skips = runs_by(lines), skipped(lines)
    steps: dict[str, float] = defaultdict(float)
    pretraining: dict[str, float] = {}
    for cell in tier.cells:
        for arm in tier.arms[cell.steps]:
            if (cell.network, arm) in skips or is_done(cell, arm, tier.seeds, done):
                continue
            runs = sum(run.cell == cell and run.arm == arm for run in done)
            share = 1 - runs / (len(RATES) + KEPT + tier.seeds)
            # An image that is only evaluated costs a third.
            evaluated = (7 * 400 + tier.seeds * (1000 + 3 * 256)) / 3 / BATCH
            trained = (len(RATES) / 2 + KEPT + tier.seeds) * cell.steps
            steps[cell.network] += share * (trained + evaluated)
        minutes = pretraining_minutes(tier.arms[cell.steps])
        missing = [each for each in minutes if not setting.donors.path(NETWORKS[cell.network], each).exists()]
        if missing and steps[cell.network]:
            # The trunk of the longest, and a branch of a fifth for each.
            pretraining[cell.network] = 60 * (0.8 * max(missing) + 0.2 * sum(missing))
    total, rows = 0.0, []
    for network, count in steps.items():
        second = _step_seconds(network, setting, tier)
        seconds = count * second + pretraining.get(network, 0)
        total += seconds
        rows.append(f'{network}: {second * 1000:.0f} ms a step, {seconds / 60:.0f} CPU-minutes')
    return total, rows


def _step_seconds(network: str, setting: Setting, tier: Tier) -> float:
    """CPU seconds of a step: the shorter of two, after a first one."""
    cell = next(cell for cell in tier.cells if cell.network == network)
    size = NETWORKS[network].image_size
    model = NETWORKS[network].start(load_part(setting.data[cell.data], size, 'select').num_classes, 0).model.train()
    images, taken = torch.randn(BATCH, 3, size, size), []
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(3):
        began = time.process_time()
        optimizer.zero_grad()
        model(images).logsumexp(dim=1).sum().backward()
        optimizer.step()
        taken.append(time.process_time() - began)
    return min(taken[1:])
