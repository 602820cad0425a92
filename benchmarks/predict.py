"""CPU seconds and memory of predictions: beside another implementation's, stage by stage, and of timm's tags.

    python benchmarks/predict.py --compare 'python other.py' --out FILE   # everything, into a Markdown file
    python benchmarks/predict.py --parts tag                              # ghn_tiny: prediction, timm's tag, 'orth'
    python benchmarks/predict.py --parts speed --ghn ghn3_xlm16           # stages, full size, random weights
    python benchmarks/predict.py --parts scaling memory load imports
    python benchmarks/predict.py --seconds ghn3_tm8                       # makes this script such a command

Predictions are raw: post-processing is only in what a tag costs, and in its own split. Weights of GHNs of the catalogue
are random, except ghn_tiny's, with the hyper-parameters of hub_configs; a path is a GHN on disk. Times are CPU seconds
of one thread (on a GPU: seconds), the least of --repeat runs.

--compare measures both implementations in turns, so that whatever else the machine does falls on both, on torchvision's
networks, after one run of each that does not count: graph, prediction and writing, and the last two without the graph.
The command is started with the name of a GHN as its last argument; for each name of a network that it reads, it prints
a line with the two numbers of seconds. The graphs are those of the published rules.

The limit of a stage table is the decoder's least number of multiplications at the rate of a large matrix product, plus
the time to fill as many bytes as are written, both measured in the same run.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import gc
import math
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType

import fresh_process
import timm
import torch
import torchvision
from timm.models.resnet import Bottleneck, ResNet
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import timm_ghn
from timm_ghn.hub.catalogue import known_ghns
from timm_ghn.nn import DecodeKind
from timm_ghn.prediction.postprocess import (
    PostProcess,
    correlation_spread,
    orthogonalised,
    postprocess_,
    processed_layers,
)

#: torchvision's networks that are compared: the reference reads these.
COMPARED = ('resnet18', 'resnet50', 'vit_b_16', 'convnext_base', 'swin_t', 'efficientnet_b0', 'densenet121')
TAGGED = ('resnet50', 'vit_base_patch16_224', 'convnext_base')
NETWORKS = (
    'resnet50',
    'convnext_base',
    'vit_base_patch16_224',
    'swin_tiny_patch4_window7_224',
    'densenet121',
    'efficientnet_b0',
    'regnety_004',
    'mobilenetv3_large_100',
)
#: What can be measured, with which GHNs and networks unless others are named.
PARTS = {
    'compare': (('ghn3_tm8', 'ghn2', 'ghn3_xlm16'), COMPARED),
    'tag': (('ghn_tiny',), TAGGED),
    'speed': (('ghn3_tm8', 'ghn2'), NETWORKS),
    'scaling': (('ghn3_tm8',), ()),
    'memory': (('ghn3_tm8',), ('resnet50', 'convnext_base')),
    'load': (('ghn3_xlm16',), ()),
    'imports': ((), ()),
}
STAGES = ('trace', 'plan', 'encode', 'decode and write')
#: How the README calls them, and the columns of its table.
TITLES = {'ghn3_tm8': 'GHN-3-T', 'ghn2': 'GHN-2', 'ghn3_xlm16': 'GHN-3-XL'}
COLUMNS = (('resnet50',), ('vit_b_16', 'vit_base_patch16_224'), ('convnext_base',))


@dataclasses.dataclass(frozen=True)
class Machine:
    """Where to compute, and how fast it is: multiplications with addition, and float32 elements filled, in a second."""

    device: torch.device
    repeat: int
    macs: float
    fills: float

    def clock(self) -> float:
        """CPU seconds of this process; on a GPU seconds of the wall clock, when it has finished."""
        if self.device.type == 'cuda':
            torch.cuda.synchronize(self.device)
            return time.perf_counter()
        return time.process_time()

    def least(self, action: Callable[[], object], repeat: int | None = None) -> float:
        """Least seconds that an action takes."""
        seconds = []
        for _ in range(repeat or self.repeat):
            start = self.clock()
            action()
            seconds.append(self.clock() - start)
        return min(seconds)


def measure_machine(device: torch.device, repeat: int) -> Machine:
    """Measure the rates of a large float32 product and of filling memory."""
    machine = Machine(device, repeat, 1, 1)
    a, b = torch.randn(1024, 1024, device=device), torch.empty(2**26, device=device)
    product, fill = machine.least(lambda: a @ a, 20), machine.least(lambda: b.fill_(1.0), 10)
    return Machine(device, repeat, a.shape[0] ** 3 / product, b.numel() / fill)


def ghn_of(name: str, device: torch.device, rules: str | None = None) -> timm_ghn.GHN:
    """A GHN on disk or in the package, or one of the size of a known one with random weights, quickly drawn."""
    if name not in known_ghns() or known_ghns()[name].path is not None:
        return timm_ghn.load_ghn(name, device=device)
    config = known_ghns()[name].config
    with torch.device('meta'):
        ghn = timm_ghn.GHN(dataclasses.replace(config, rules=rules or config.rules))
    ghn.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for parameter in ghn.parameters():
            parameter.uniform_(-0.02, 0.02, generator=generator)
    return ghn.eval()


def decoder_macs(ghn: timm_ghn.GHN, plan: timm_ghn.ParameterPlan) -> int:
    """Least number of multiplications of the decoders, each layer sliced to what a parameter needs."""
    config = ghn.config
    d, (outputs, inputs, height, width) = config.hid, config.max_shape
    longest = max(outputs, inputs)
    total = 0
    for row in plan.predicted:
        kind, (o, i, h, w) = row.request.kind, row.request.size
        if kind is DecodeKind.TENSOR:
            total += min(h, height) * min(w, width) * (36 * d * d + 8 * d * min(o, outputs) * min(i, inputs))
        elif kind is DecodeKind.HEAD_WEIGHT:
            i = min(i, inputs)
            total += 36 * d * d + 8 * d * outputs * i + i * outputs * min(o, config.num_classes)
        elif kind is DecodeKind.HEAD_BIAS:
            total += 2 * d * d + 2 * d * longest + longest * min(o, config.num_classes)
        else:  # a normalisation layer's weight and bias share a node, counted with the weight
            shared = row.role == 'norm bias'
            total += (0 if shared else 2 * d * d) + 2 * d * min(o, longest)
    return total


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds of each stage, of all of them in ghn_init, and what they are compared with."""

    stages: dict[str, float]
    total: float
    forward_on_meta: float
    limit: float
    parameters: int
    nodes: int


def measure(model: nn.Module, ghn: timm_ghn.GHN, machine: Machine) -> Times:
    """Time stages by themselves, and all of them in ghn_init; the model is on the meta device afterwards."""
    graph = timm_ghn.trace(model, rules=ghn.config.rules)
    plan = timm_ghn.plan_parameters(graph, ghn.config, head='predict')

    def encode() -> None:
        graph.__dict__.pop('_distances_NN', None)  # a graph remembers its shortest paths
        with torch.no_grad():
            ghn.encode(graph)

    trace = machine.least(lambda: timm_ghn.trace(model, rules=ghn.config.rules))
    planning = machine.least(lambda: timm_ghn.plan_parameters(graph, ghn.config, head='predict'))
    encoding = machine.least(encode)
    total = machine.least(lambda: timm_ghn.ghn_init(model, ghn, head='predict', postprocess=None))
    predicted = sum(row.numel for row in plan.predicted)
    image, bare = torch.empty(2, *graph.input_size, device='meta'), model.to('meta').train()
    return Times(
        stages=dict(zip(STAGES, (trace, planning, encoding, total - trace - planning - encoding), strict=True)),
        total=total,
        forward_on_meta=machine.least(lambda: bare(image)),
        limit=decoder_macs(ghn, plan) / machine.macs + predicted / machine.fills,
        parameters=sum(row.numel for row in plan),
        nodes=len(graph),
    )


def timm_networks(names: Sequence[str], device: torch.device) -> Iterator[tuple[str, nn.Module]]:
    """timm architectures by name."""
    for name in names:
        yield name, timm.create_model(name).to(device)


def deeper_networks(device: torch.device) -> Iterator[tuple[str, nn.Module]]:
    """Vision transformers of 12 to 96 blocks, ResNets of 26 to 1001 layers."""
    for depth in (12, 24, 48, 96):
        yield f'vit, {depth} blocks', VisionTransformer(depth=depth, embed_dim=192, num_heads=3).to(device)
    for layers in ((2, 2, 2, 2), (3, 4, 6, 3), (3, 4, 23, 3), (3, 8, 85, 3), (3, 24, 303, 3)):
        yield f'resnet, {3 * sum(layers) + 2} layers', ResNet(Bottleneck, layers).to(device)


@dataclasses.dataclass(frozen=True)
class Seconds:
    """What a prediction took: as a whole, and without the graph."""

    whole: float
    prediction: float


def predict_once(model: nn.Module, ghn: timm_ghn.GHN, machine: Machine) -> Seconds:
    """Predict and write all parameters, and time it."""
    gc.collect()
    start = machine.clock()
    timm_ghn.ghn_init(model, ghn, head='predict', postprocess=None)
    middle = machine.clock()
    timm_ghn.trace(model, rules=ghn.config.rules)
    whole, graph = middle - start, machine.clock() - middle
    return Seconds(whole, whole - graph)


def build(name: str) -> nn.Module:
    """A network of torchvision, or else of timm."""
    if name in torchvision.models.list_models():
        model: nn.Module = torchvision.models.get_model(name, weights=None)
        return model
    return timm.create_model(name)


class Other:
    """Another implementation, in a process of its own that predicts whenever it is given the name of a network."""

    def __init__(self, command: str, ghn: str) -> None:
        self.command = [*shlex.split(command), ghn]
        self.process = subprocess.Popen(self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def predict_once(self, network: str) -> Seconds:
        with contextlib.suppress(BrokenPipeError):  # where it has ended, so has its output
            self.process.stdin.write(f'{network}\n')
            self.process.stdin.flush()
        line = self.process.stdout.readline()
        if len(line.split()) != 2:
            raise SystemExit(f'expected two numbers of seconds from {shlex.join(self.command)} (got {line!r})')
        return Seconds(*map(float, line.split()))

    def __enter__(self) -> Other:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(BrokenPipeError), self.process:
            pass  # its input is closed, and it is waited for


@dataclasses.dataclass(frozen=True)
class Compared:
    """Runs of both implementations, in turns, for a network."""

    network: str
    ours: tuple[Seconds, ...]
    others: tuple[Seconds, ...]

    def ratio(self, field: str = 'whole', choose: Callable[[list[float]], float] = min) -> float:
        """How many times faster ours is, by the least or the median of the runs."""
        return self.chosen(self.others, field, choose) / self.chosen(self.ours, field, choose)

    @staticmethod
    def chosen(runs: Sequence[Seconds], field: str, choose: Callable[[list[float]], float]) -> float:
        return choose([getattr(run, field) for run in runs])


def compare(name: str, networks: Sequence[str], command: str, machine: Machine) -> list[Compared]:
    """Measure a GHN of ours and the same of another implementation, in turns."""
    ghn, rows = ghn_of(name, machine.device, rules='published'), []
    with Other(command, name) as other:
        for network in networks:
            model = build(network)
            predict_once(model, ghn, machine)
            other.predict_once(network)
            runs = [(predict_once(model, ghn, machine), other.predict_once(network)) for _ in range(machine.repeat)]
            rows.append(Compared(network, *map(tuple, zip(*runs, strict=True))))
            print(name, rows[-1], file=sys.stderr, flush=True)
    return rows


def geometric_mean(ratios: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, ratios)) / len(ratios))


def span(ratios: Sequence[float]) -> str:
    return f'{geometric_mean(ratios):.1f} times ({min(ratios):.1f} to {max(ratios):.1f})'


def comparison(rows: Sequence[Compared]) -> str:
    """Table of both implementations, with and without the graph."""
    head = ['torchvision network']
    for field in ('whole', 'without graph'):
        head += [f'{field}: ours', 'other', 'times']
    lines = []
    for row in rows:
        cells = [row.network]
        for field in ('whole', 'prediction'):
            for runs in (row.ours, row.others):
                cells.append(f'{row.chosen(runs, field, min):.3f} ({row.chosen(runs, field, statistics.median):.3f})')
            cells.append(f'{row.ratio(field):.1f}')
        lines.append(cells)
    text = markdown(head, lines)
    text += (
        f'\nCPU seconds: least (median) of {len(rows[0].ours)} runs of each, in turns. Geometric mean over networks:\n'
    )
    for field, words in (('whole', 'as a whole'), ('prediction', 'without the graph')):
        least, median = ([row.ratio(field, choose) for row in rows] for choose in (min, statistics.median))
        text += f'- {words}: {span(least)}; by medians {span(median)}\n'
    return text


@dataclasses.dataclass(frozen=True)
class Tag:
    """Seconds of a raw prediction, of the tag and of plain timm, and of post-processing with what it consists of."""

    network: str
    raw: float
    tag: float
    plain: float
    orth: float
    decomposition: float
    correlations: float


def tag(name: str, network: str, machine: Machine) -> Tag:
    """Measure what a tag of timm costs, in turns with a model without it."""
    ghn, options = timm_ghn.load_ghn(name), PostProcess.of('orth')
    model = timm.create_model(network)
    plan = timm_ghn.plan_parameters(timm_ghn.trace(model, rules=ghn.config.rules), ghn.config)
    parameters = dict(model.named_parameters())
    weights = [parameters[row.name].detach() for row in processed_layers(plan, options)]
    actions: dict[str, Callable[[], object]] = {
        'raw': lambda: timm_ghn.ghn_init(model, ghn, postprocess=None),
        'tag': lambda: timm.create_model(f'{network}.{name}'),
        'plain': lambda: timm.create_model(network),
        'orth': lambda: postprocess_(model, options, plan=plan),
        'decomposition': lambda: [orthogonalised(weight) for weight in weights],
        'correlations': lambda: [correlation_spread(weight) for weight in weights],
    }
    timm.create_model(f'{network}.{name}')  # reads the GHN
    runs = [{part: machine.least(action, 1) for part, action in actions.items()} for _ in range(machine.repeat)]
    return Tag(network, **{part: min(run[part] for run in runs) for part in actions})


def tags(name: str, rows: Sequence[Tag]) -> str:
    """Table of what the tag costs, and of what post-processing consists of."""
    head = ['timm network', 'raw prediction', f"create_model('X.{name}')", "create_model('X')", 'times']
    head += ["'orth'", 'of it QR', 'of it correlations']
    lines = []
    for row in rows:
        cells = [row.network, *(f'{value:.2f}' for value in (row.raw, row.tag, row.plain))]
        lines.append(
            [
                *cells,
                f'{row.tag / row.plain:.1f}',
                *(f'{v:.2f}' for v in (row.orth, row.decomposition, row.correlations)),
            ]
        )
    return markdown(head, lines) + '\nCPU seconds. The raw prediction is ghn_init without post-processing.\n'


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    lines = [head, ['---', *['---:'] * (len(head) - 1)], *rows]
    return '\n'.join('| ' + ' | '.join(line) + ' |' for line in lines) + '\n'


def speed(measured: Sequence[tuple[str, Times]]) -> str:
    """Table of milliseconds and of shares."""
    head = ['network', 'M parameters', 'nodes', *STAGES, 'total', 'limit', 'total / limit', 'trace / meta forward']
    rows = []
    for network, times in measured:
        cells = [network, f'{times.parameters / 1e6:.1f}', str(times.nodes)]
        cells += [f'{1e3 * times.stages[stage]:.1f} ({times.stages[stage] / times.total:.0%})' for stage in STAGES]
        cells += [f'{1e3 * times.total:.0f}', f'{1e3 * times.limit:.1f}', f'{times.total / times.limit:.1f}']
        rows.append([*cells, f'{times.stages["trace"] / times.forward_on_meta:.2f}'])
    return markdown(head, rows)


def readme_rows(compared: dict[str, list[Compared]], tagged: dict[str, list[Tag]]) -> str:
    """The rows of the README's table."""

    def row(title: str, cells: dict[str, str], remark: str) -> str:
        found = [next((cells[name] for name in names if name in cells), '') for names in COLUMNS]
        return '| ' + ' | '.join([title, *found, remark]) + ' |\n'

    text = ''
    for name, rows in compared.items():
        for field, words in (('whole', ''), ('prediction', ', without the graph')):
            if field == 'whole' or name == 'ghn3_xlm16':
                seconds = {r.network: [r.chosen(runs, field, min) for runs in (r.ours, r.others)] for r in rows}
                cells = {network: f'{ours:.2f} s ({other:.2f} s)' for network, (ours, other) in seconds.items()}
                remark = f'the reference takes {span([r.ratio(field) for r in rows])}'
                text += row(TITLES.get(name, name) + words, cells, f'{remark} as long')
    for name, rows in tagged.items():
        text += row(f'`{name}`', {r.network: f'{r.raw:.2f} s' for r in rows}, '')
        remark = f"{span([r.tag / r.plain for r in rows])} as long as `create_model('X')`"
        text += row(f'the tag `X.{name}`', {r.network: f'{r.tag:.2f} s' for r in rows}, remark)
    return text


def cpu_name() -> str:
    """Name of the processor."""
    info = Path('/proc/cpuinfo')
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(':')[2].strip() for line in lines if line.startswith('model name')]
    return names[0] if names else platform.processor() or platform.machine()


def describe(machine: Machine) -> str:
    """Versions, processor and rates."""
    cuda = machine.device.type == 'cuda'
    where = torch.cuda.get_device_name(machine.device) if cuda else f'{cpu_name()}, one thread'
    return (
        f'Python {platform.python_version()}, timm_ghn {timm_ghn.__version__}, timm {timm.__version__}, '
        f'torch {torch.__version__}; {where}: {2 * machine.macs / 1e9:.0f} GFLOP/s in a matrix product, '
        f'{4 * machine.fills / 1e9:.1f} GB/s in a fill.\n'
    )


def sections(args: argparse.Namespace, machine: Machine) -> Iterator[str]:
    """Measure what is asked for; a section of Markdown at a time."""
    compared: dict[str, list[Compared]] = {}
    tagged: dict[str, list[Tag]] = {}
    for part in args.parts:
        ghns, networks = PARTS[part]
        networks = args.networks or networks
        for name in args.ghn or ghns:
            if part == 'compare':
                compared[name] = compare(name, networks, args.compare, machine)
                yield f'## {name}: side by side with another implementation\n\n{comparison(compared[name])}'
            elif part == 'tag':
                tagged[name] = [tag(name, network, machine) for network in networks]
                yield f"## {name}: prediction, timm's tag, post-processing\n\n{tags(name, tagged[name])}"
            elif part in ('speed', 'scaling'):
                ghn, measured = ghn_of(name, machine.device), []
                models = (
                    deeper_networks(machine.device) if part == 'scaling' else timm_networks(networks, machine.device)
                )
                for network, model in models:
                    measured.append((network, measure(model, ghn, machine)))
                    print(*measured[-1], file=sys.stderr, flush=True)
                yield f'## {name}: {part}, milliseconds and share\n\n{speed(measured)}'
            elif part == 'memory':
                measured = [(network, *fresh_process.memory(name, network)) for network in networks]
                rows = [
                    [network, f'{size:.0f}', f'{extra:.0f}', f'{extra / size:.0%}'] for network, size, extra in measured
                ]
                head = ['network', 'model MiB', 'peak above GHN and model, MiB', 'share of the model']
                yield f'## {name}: memory of a prediction\n\n{markdown(head, rows)}'
            elif part == 'load':
                cpu, wall, extra, peak = fresh_process.load(ghn_of(name, torch.device('cpu')))
                head = ['GHN', 'CPU s', 's', 'peak above the start, MiB', 'peak of the process, MiB']
                row = [name, f'{cpu:.2f}', f'{wall:.2f}', f'{extra:.0f}', f'{peak:.0f}']
                yield f'## {name}: loading from our own format\n\n{markdown(head, [row])}'
    if 'imports' in args.parts:
        yield f'## Import of timm_ghn beyond that of timm\n\n{fresh_process.imports(args.repeat):.3f} CPU s.\n'
    print(readme_rows(compared, tagged), file=sys.stderr)


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--parts', nargs='+', choices=PARTS, help='what to measure (default: all that can be)')
    parser.add_argument('--ghn', nargs='+', help='names of the catalogue, or paths (default: what belongs to a part)')
    parser.add_argument('--networks', nargs='+', help='architectures (default: what belongs to a part)')
    parser.add_argument('--repeat', type=int, default=5, help='runs of which the fastest counts (default: 5)')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--compare', metavar='COMMAND', help='another implementation')
    parser.add_argument('--seconds', metavar='GHN', help='print the seconds for each name of a network that is read')
    parser.add_argument('--out', type=Path, help='Markdown file to write the tables to')
    args = parser.parse_args(argv)
    if args.parts is None:
        args.parts = [part for part in PARTS if part != 'compare' or args.compare]
    if 'compare' in args.parts and not args.compare:
        parser.error('the part compare needs --compare COMMAND')
    return args


def answer(name: str, machine: Machine) -> None:
    """Be what --compare runs."""
    ghn, network, model = ghn_of(name, machine.device, rules='published'), '', None
    for line in sys.stdin:
        if line.strip() != network:
            network = line.strip()
            model = build(network).to(machine.device)
        seconds = predict_once(model, ghn, machine)
        print(seconds.whole, seconds.prediction, flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, and write the tables."""
    args = arguments(argv)
    torch.set_num_threads(1)
    device = torch.device(args.device)
    if args.seconds:
        answer(args.seconds, Machine(device, args.repeat, 1, 1))
        return
    machine = measure_machine(device, args.repeat)
    given = list(sys.argv[1:] if argv is None else argv)
    command = shlex.join(arg.replace(args.compare, 'COMMAND') if args.compare else arg for arg in given)
    text = f'# Prediction, {datetime.date.today()}\n\n`python benchmarks/predict.py {command}`\n\n{describe(machine)}'
    print(text)
    for section in sections(args, machine):
        print(section, flush=True)
        text += f'\n{section}'
        if args.out is not None:
            args.out.write_text(text)


if __name__ == '__main__':
    main()
