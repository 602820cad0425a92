"""The report of a file of results: a table, a picture of the gains by family, a performance profile.

``ignorant`` is, in each cell, the arm that has seen no data and had the best accuracy where the rates were chosen: on
other images and seeds than those that are reported, so that the best of several noisy numbers flatters it by nothing.
"""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from benchmarks.initperf.arms import find_arm
from benchmarks.initperf.cells import NETWORKS, Cell, Tier
from benchmarks.initperf.schedule import Line, chosen, read_lines, reported, runs_by, skipped
from benchmarks.initperf.statistics import (
    Interval,
    bootstrap,
    holm,
    performance_profile,
    pretraining_equivalent,
    steps_to,
)


@dataclasses.dataclass(frozen=True)
class Result:
    """An arm in a cell.

    Attributes:
        chosen: Accuracy where its rate was chosen.
        rate: The rate.
        accuracies: Reported, of each seed.
        curve: (step, accuracy), the mean over the seeds.
        images: Images of its pretraining; 0 for other arms.
    """

    chosen: float
    rate: float
    accuracies: tuple[float, ...]
    curve: tuple[tuple[float, float], ...]
    images: int

    @property
    def mean(self) -> float:
        return float(np.mean(self.accuracies))


Results = Mapping[Cell, Mapping[str, Result]]


def results_of(lines: Sequence[Line], seeds: int) -> dict[Cell, dict[str, Result]]:
    """Whatever is finished: arms of which all seeds of the chosen rate are there."""
    runs = runs_by(lines)
    found: dict[Cell, dict[str, Result]] = defaultdict(dict)
    for cell, arm in dict.fromkeys((run.cell, run.arm) for run in runs):
        best = chosen(cell, arm, runs)
        if best is None:
            continue
        own = [runs[run] for run in reported(cell, arm, best['rate'], seeds) if run in runs]
        if len(own) == seeds:
            curves = np.array([line['curve'] for line in own], dtype=float).mean(axis=0)
            accuracies = tuple(line['accuracy'] for line in own)
            images = own[0].get('pretraining_images', 0)
            curve = tuple((float(step), float(value)) for step, value in curves)
            found[cell][arm] = Result(best['accuracy'], best['rate'], accuracies, curve, images)
    return dict(found)


def ignorant_arm(arms: Mapping[str, Result]) -> str | None:
    """The ignorant arm of a cell, see above."""
    known = [arm for arm in arms if find_arm(arm).ignorant]
    return max(known, key=lambda arm: arms[arm].chosen) if known else None


def gains_of(results: Results, arm: str, steps: int) -> dict[tuple[str, str], list[float]]:
    """Paired differences to the ignorant arm, of each seed, by network and data set."""
    found = {}
    for cell, arms in results.items():
        base = ignorant_arm(arms)
        if cell.steps == steps and arm in arms and base is not None:
            pairs = zip(arms[arm].accuracies, arms[base].accuracies, strict=True)
            found[cell.network, cell.data] = [one - other for one, other in pairs]
    return found


def equivalent_of(arms: Mapping[str, Result], arm: str, *, images: bool = False) -> float | None:
    """Pretraining equivalent of an arm in a cell, in CPU-minutes or images; None without two donors at least."""
    donors = sorted((float(name.partition(':')[2]), name) for name in arms if name.startswith('pretrain:'))
    if len(donors) < 2:
        return None
    amounts = [arms[name].images if images else minutes for minutes, name in donors]
    return pretraining_equivalent(amounts, [arms[name].mean for _, name in donors], arms[arm].mean)


def speed_of(arms: Mapping[str, Result], arm: str, steps: int) -> float | None:
    """Share of the steps after which an arm is where the ignorant one ends."""
    base = ignorant_arm(arms)
    return None if base is None else steps_to(arms[arm].curve, arms[base].mean) / steps


def table(results: Results, steps: int, order: Sequence[str]) -> list[str]:
    """Rows of the table for a number of steps."""
    intervals: dict[str, Interval] = {}
    cells: dict[str, dict[tuple[str, str], list[float]]] = {}
    for arm in order:
        gains = gains_of(results, arm, steps)
        if gains:
            cells[arm], intervals[arm] = gains, bootstrap(gains)
    adjusted = holm({arm: interval.p for arm, interval in intervals.items()})
    rows = []
    for arm, interval in intervals.items():
        means = {key: float(np.mean(values)) for key, values in cells[arm].items()}
        worst = min(means, key=lambda key: means[key])
        found = [group for cell, group in results.items() if cell.steps == steps and arm in group]
        speeds = [value for group in found if (value := speed_of(group, arm, steps)) is not None]
        shown = [
            f'{steps}',
            arm,
            f'{np.mean([group[arm].mean for group in found]):.1f}',
            f'{interval.mean:+.1f} ({interval.low:+.1f} to {interval.high:+.1f})',
            f'{adjusted[arm]:.2g}',
            f'{sum(value > 0 for value in means.values())} of {len(means)}',
            f'{means[worst]:+.1f} {worst[0]}, {worst[1]}',
            _median(speeds, '{:.0%}', 'never'),
            *(
                _median([v for group in found if (v := equivalent_of(group, arm, images=images)) is not None], form)
                for images, form in ((False, '{:.2g}'), (True, '{:,.0f}'))
            ),
        ]
        rows.append('| ' + ' | '.join(shown) + ' |')
    return rows


def _median(values: Sequence[float], form: str, beyond: str = 'more') -> str:
    """Median; below or above what was measured it is said in words."""
    if not values:
        return ''
    middle = float(np.median(values)) if all(map(math.isfinite, values)) else sorted(values)[len(values) // 2]
    if math.isinf(middle):
        return beyond
    return 'less' if middle == 0 else form.format(middle)


HEADER = (
    '| steps | arm | accuracy | gain over ignorant | p (Holm) | cells ahead | worst cell | '
    'steps to ignorant | pretraining: minutes | images |\n'
    '| ---: | --- | ---: | --- | ---: | ---: | --- | ---: | ---: | ---: |'
)


def write_report(path: Path, tier: Tier, folder: Path, *, command: str) -> Path:
    """Write report.md, gains.png and profile.png from the results alone; gives the first.

    Args:
        path: The results.
        tier: What was to be measured; what is missing is named.
        folder: Where to write.
        command: Stands in the report.
    """
    lines = read_lines(path)
    results = results_of(lines, tier.seeds)
    arms = list(dict.fromkeys(arm for names in tier.arms.values() for arm in names))
    arms += sorted({arm for group in results.values() for arm in group if arm not in arms})
    budgets = sorted({cell.steps for cell in results})
    minutes = [float(arm.partition(':')[2]) for arm in arms if arm.startswith('pretrain:')]
    spans = f'The pretraining curve has {", ".join(f"{each:g}" for each in sorted(minutes))} CPU-minutes. '
    text = [
        '# What a start is worth',
        f'`{command}`',
        f'{len(runs_by(lines)):,} runs, {sum(line.get("cpu_seconds", 0) for line in lines) / 3600:.1f} CPU-hours. '
        f'Accuracies in percent, fine-tuned for so many steps of 32 images, mean over cells of {tier.seeds} paired '
        'seeds, each arm at the best of five rates, chosen on other images and seeds. "ignorant" is the arm without '
        'data that was best there, in each cell. Intervals: 95 %, bootstrap over architectures, data sets and seeds; '
        'p: of the same, corrected over arms. "steps to ignorant": median share of the steps after which the arm is '
        'where the ignorant one ends. "pretraining": median over cells of how much ordinary pretraining of that very '
        f'network on Tiny-ImageNet ends at the same accuracy. {spans if minutes else ""}"less" and "more" are outside.',
        '\n'.join([HEADER, *(row for steps in budgets for row in table(results, steps, arms))]),
        _choices(results),
        _missing(tier, results, lines),
    ]
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / 'report.md'
    target.write_text('\n\n'.join(filter(None, text)) + '\n', encoding='utf-8')
    (folder / 'cells.csv').write_text(_cells(results), encoding='utf-8')
    if results:
        draw_gains(results, arms, folder / 'gains.png')
        draw_profile(results, arms, folder / 'profile.png')
    return target


def _cells(results: Results) -> str:
    """Each arm in each cell."""
    rows = ['network,data,steps,arm,rate,accuracy,ignorant,minutes']
    for cell, arms in results.items():
        for arm, result in arms.items():
            minutes = equivalent_of(arms, arm)
            facts = [cell.network, cell.data, cell.steps, arm, f'{result.rate:g}', f'{result.mean:.2f}']
            facts += [ignorant_arm(arms) or '', '' if minutes is None else f'{minutes:.3g}']
            rows.append(','.join(map(str, facts)))
    return '\n'.join(rows) + '\n'


def _choices(results: Results) -> str:
    counts: dict[str, int] = defaultdict(int)
    for arms in results.values():
        counts[ignorant_arm(arms) or 'none'] += 1
    return 'Ignorant arms: ' + ', '.join(f'{arm} in {count} cells' for arm, count in sorted(counts.items())) + '.'


def _missing(tier: Tier, results: Results, lines: Sequence[Line]) -> str:
    skips = skipped(lines)
    missing = {
        cell: [
            arm
            for arm in tier.arms[cell.steps]
            if arm not in results.get(cell, {}) and (cell.network, arm) not in skips
        ]
        for cell in tier.cells
    }
    missing = {cell: arms for cell, arms in missing.items() if arms}
    if not missing:
        return f'All {len(tier.cells)} cells are complete.'
    named = '; '.join(
        f'{cell.network} on {cell.data}, {cell.steps} steps ({len(arms)} arms)' for cell, arms in missing.items()
    )
    return f'{len(missing)} of {len(tier.cells)} cells are not complete: {named}.'


def draw_gains(results: Results, arms: Sequence[str], path: Path) -> None:
    """Gains over ignorant by family, mean over networks and data sets with 95 % intervals."""
    from timm_ghn.plots import new_figure

    budgets = sorted({cell.steps for cell in results})
    shown = [arm for arm in arms if arm == 'timm' or arm == 'shuffled' or arm.startswith(('ghn_orth', 'pretrain:2'))]
    families = list(dict.fromkeys(NETWORKS[cell.network].family for cell in results))
    figure = new_figure((9, 1.5 + 0.45 * len(families) * len(budgets)), 'Gain over the best start without data')
    axes = figure.subplots(len(budgets), 1, squeeze=False, sharex=True)[:, 0]
    for ax, steps in zip(axes, budgets, strict=True):
        for number, arm in enumerate(shown):
            gains = gains_of(results, arm, steps)
            for row, family in enumerate(families):
                own = {key: value for key, value in gains.items() if NETWORKS[key[0]].family == family}
                if own:
                    found = bootstrap(own)
                    ax.errorbar(
                        found.mean,
                        row + 0.15 * (number - (len(shown) - 1) / 2),
                        xerr=[[max(0, found.mean - found.low)], [max(0, found.high - found.mean)]],
                        fmt='o',
                        color=f'C{number}',
                        capsize=2,
                    )
            ax.plot([], [], 'o', color=f'C{number}', label=arm)
        seen = {network.family for network in NETWORKS.values() if network.seen}
        ax.set_yticks(range(len(families)), [name if name in seen else f'{name} (not trained on)' for name in families])
        ax.axvline(0, color='grey', linewidth=0.8)
        ax.invert_yaxis()
        ax.set_title(f'{steps} steps')
    axes[0].legend(fontsize=8)
    axes[-1].set_xlabel('points of accuracy')
    figure.savefig(path, dpi=120)


def draw_profile(results: Results, arms: Sequence[str], path: Path) -> None:
    """Performance profile over all cells of the arms that have them all."""
    from timm_ghn.plots import new_figure

    by_arm = {arm: {f'{cell}': group[arm].mean for cell, group in results.items() if arm in group} for arm in arms}
    most = max(map(len, by_arm.values()))
    whole = {arm: values for arm, values in by_arm.items() if len(values) == most}
    whole['ignorant'] = {
        f'{cell}': group[base].mean for cell, group in results.items() if (base := ignorant_arm(group)) is not None
    }
    ratios = np.linspace(1, 3, 201)
    figure = new_figure((7, 4.5), 'Performance profile')
    ax = figure.subplots()
    for arm, shares in performance_profile(whole, list(ratios)).items():
        ax.plot(ratios, shares, label=arm, drawstyle='steps-post', linestyle='--' if arm == 'ignorant' else '-')
    ax.set_xlabel('best accuracy of the cell / accuracy of the arm')
    ax.set_ylabel('share of the cells')
    ax.legend(fontsize=7)
    figure.savefig(path, dpi=120)
