"""Times ghn_init stage by stage, beside the least that its arithmetic can take.

    python benchmarks/predict.py                                  # GHN-3-T and GHN-2, eight networks
    python benchmarks/predict.py --ghn ghn3_xlm16                 # full size, random weights
    python benchmarks/predict.py --parts scaling memory load imports
    python benchmarks/predict.py --compare 'python other.py'      # another implementation, in the same run
    python benchmarks/predict.py --seconds ghn3_tm8 resnet50      # one number: makes this script such a command

Predictions are raw: post-processing is no part of them, nor of the reference's figures. Weights are random,
hyper-parameters those of hub_configs; a path is a GHN on disk. Times are CPU seconds of one thread
(on a GPU: seconds), the least of --repeat runs. The limit is the decoder's least number of multiplications at the rate
of a large matrix product, plus the time to fill as many bytes as are written, both measured in the same run. --compare
runs a command after each of our measurements, with the names of the GHN and the network as its last arguments; its
last line of output is the seconds that it took.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import gc
import math
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import timm
import torch
from timm.models.resnet import Bottleneck, ResNet
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import timm_ghn
from timm_ghn.hub.catalogue import known_ghns
from timm_ghn.nn import DecodeKind

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
#: Seconds that the reference took on two cores of such a machine, graph plus prediction; for GHN-3-XL CPU seconds of
#: one thread for the prediction alone. Measured once, with random weights and torchvision's networks.
REFERENCE = {
    ('ghn3_tm8', 'resnet50'): 0.42,
    ('ghn3_tm8', 'vit_base_patch16_224'): 0.93,
    ('ghn3_tm8', 'convnext_base'): 1.45,
    ('ghn3_tm8', 'densenet121'): 1.09,
    ('ghn2', 'resnet50'): 0.68,
    ('ghn2', 'convnext_base'): 2.29,
    ('ghn3_xlm16', 'resnet18'): 8.7,
    ('ghn3_xlm16', 'resnet50'): 12.5,
    ('ghn3_xlm16', 'vit_base_patch16_224'): 14.8,
    ('ghn3_xlm16', 'efficientnet_b0'): 22.0,
    ('ghn3_xlm16', 'convnext_base'): 47.0,
}
#: Of these the reference's time is that of the prediction without the graph.
WITHOUT_GRAPH = ('ghn3_xlm16',)
STAGES = ('trace', 'edges', 'plan', 'encode', 'decode', 'fit', 'write')
PARTS = ('speed', 'scaling', 'memory', 'load', 'imports')


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


def ghn_of(name: str, device: torch.device) -> timm_ghn.GHN:
    """A GHN on disk, or one of the size of a known one with random weights, quickly drawn."""
    if name not in known_ghns():
        return timm_ghn.load_ghn(name, device=device)
    with torch.device('meta'):
        ghn = timm_ghn.GHN(known_ghns()[name].config)
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

    @property
    def prediction(self) -> float:
        """Without the graph."""
        return self.total - sum(self.stages[stage] for stage in ('trace', 'edges', 'plan'))


def measure(model: nn.Module, ghn: timm_ghn.GHN, machine: Machine) -> Times:
    """Time every stage by itself, and all of them in ghn_init; the model is on the meta device afterwards."""
    from timm_ghn.params.fit import scaled, write_repeated
    from timm_ghn.writable import check_finite, write_all_

    graph = timm_ghn.trace(model, rules=ghn.config.rules)
    plan = timm_ghn.plan_parameters(graph, ghn.config, head='predict')
    requests, fits = [row.request for row in plan.predicted], {row.name: row.fit for row in plan.predicted}
    parameters = dict(model.named_parameters())

    def edges() -> None:
        for part in graph.parts:
            part.__dict__.pop('_distances_NN', None)
            part.distances_NN(ghn.config.virtual_edges)

    def fit() -> None:
        for index, tensor in decoded.items():
            row = plan.predicted[index]
            values[row.name] = scaled(tensor, row.fit).to(row.dtype).contiguous()
            check_finite(row.name, values[row.name])

    with torch.no_grad():
        nodes = ghn.encode(graph.parts)
        decoded, values = dict(ghn.decode(nodes, requests)), {}
        actions: dict[str, Callable[[], object]] = {
            'trace': lambda: timm_ghn.trace(model, rules=ghn.config.rules),
            'edges': edges,
            'plan': lambda: timm_ghn.plan_parameters(graph, ghn.config, head='predict'),
            'encode': lambda: ghn.encode(graph.parts),
            'fit': fit,
            'write': lambda: write_all_(
                {row.name: parameters[row.name] for row in plan.predicted},
                lambda name, target: write_repeated(target, values[name], fits[name]),
            ),
            'decode': lambda: [None for _ in ghn.decode(nodes, requests)],
        }
        seconds = {}
        for stage, action in actions.items():
            if stage == 'decode':
                decoded.clear()
            seconds[stage] = machine.least(action)
    total = machine.least(lambda: timm_ghn.ghn_init(model, ghn, head='predict', postprocess=None))
    predicted = sum(row.numel for row in plan.predicted)
    image, bare = torch.empty(2, *graph.input_size, device='meta'), model.to('meta').train()
    return Times(
        stages={stage: seconds[stage] for stage in STAGES},
        total=total,
        forward_on_meta=machine.least(lambda: bare(image)),
        limit=decoder_macs(ghn, plan) / machine.macs + predicted / machine.fills,
        parameters=sum(row.numel for row in plan),
        nodes=sum(map(len, graph.parts)),
    )


def networks(names: Sequence[str], device: torch.device) -> Iterator[tuple[str, nn.Module]]:
    """timm architectures by name."""
    for name in names:
        yield name, timm.create_model(name).to(device)


def deeper_networks(device: torch.device) -> Iterator[tuple[str, nn.Module]]:
    """Vision transformers of 12 to 96 blocks, ResNets of 26 to 1001 layers."""
    for depth in (12, 24, 48, 96):
        yield f'vit, {depth} blocks', VisionTransformer(depth=depth, embed_dim=192, num_heads=3).to(device)
    for layers in ((2, 2, 2, 2), (3, 4, 6, 3), (3, 4, 23, 3), (3, 8, 85, 3), (3, 24, 303, 3)):
        yield f'resnet, {3 * sum(layers) + 2} layers', ResNet(Bottleneck, layers).to(device)


def other_seconds(command: str | None, ghn: str, network: str) -> float | None:
    """Run another implementation."""
    if command is None:
        return None
    done = subprocess.run([*shlex.split(command), ghn, network], capture_output=True, text=True, check=True)
    return float(done.stdout.strip().splitlines()[-1])


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    lines = [head, ['---', *['---:'] * (len(head) - 1)], *rows]
    return '\n'.join('| ' + ' | '.join(line) + ' |' for line in lines) + '\n'


def mean_of(ratios: Sequence[float]) -> str:
    """Geometric mean in words."""
    return f'{math.exp(sum(map(math.log, ratios)) / len(ratios)):.1f} (geometric mean over {len(ratios)} networks)'


def speed(name: str, measured: Sequence[tuple[str, Times, float | None]]) -> str:
    """Table of milliseconds and of shares, and what they are compared with."""
    head = ['network', 'M parameters', 'nodes', *STAGES, 'total', 'limit', 'total / limit', 'trace / meta forward']
    head += ['reference s', 'speed-up', 'other s', 'speed-up']
    rows, ratios, others = [], [], []
    for network, times, other in measured:
        whole = sum(times.stages.values())
        cells = [network, f'{times.parameters / 1e6:.1f}', str(times.nodes)]
        cells += [f'{1e3 * times.stages[stage]:.1f} ({times.stages[stage] / whole:.0%})' for stage in STAGES]
        cells += [f'{1e3 * times.total:.0f}', f'{1e3 * times.limit:.1f}', f'{times.total / times.limit:.1f}']
        cells += [f'{times.stages["trace"] / times.forward_on_meta:.2f}']
        known = REFERENCE.get((name, network))
        if known is not None:
            ratios.append(known / (times.prediction if name in WITHOUT_GRAPH else times.total))
        if other is not None:
            others.append(other / times.total)
        cells += ['', ''] if known is None else [f'{known:.2f}', f'{ratios[-1]:.1f}']
        cells += ['', ''] if other is None else [f'{other:.3f}', f'{others[-1]:.1f}']
        rows.append(cells)
    text = markdown(head, rows)
    if ratios:
        what = ' without the graph' if name in WITHOUT_GRAPH else ''
        text += f'\nSpeed-up over the reference{what}: {mean_of(ratios)}.\n'
    if others:
        text += f'\nSpeed-up over the other command: {mean_of(others)}.\n'
    return text


def in_new_process(code: str, *argv: str) -> list[float]:
    """Numbers that a fresh interpreter prints on its last line."""
    script = [sys.executable, '-W', 'ignore', '-c', code, *argv]
    done = subprocess.run(script, capture_output=True, text=True, check=True)
    return [float(number) for number in done.stdout.strip().splitlines()[-1].split()]


_PEAK = """
import re, sys, time
from pathlib import Path
import torch, timm, timm_ghn
sys.path.insert(0, sys.argv[1])
import predict
torch.set_num_threads(1)

def memory(field):
    return int(re.search(field + r':\\s+(\\d+) kB', Path('/proc/self/status').read_text())[1]) / 1024

def forget_peak():
    Path('/proc/self/clear_refs').write_text('5')
"""

_PREDICTING = (
    _PEAK
    + """
ghn, model = predict.ghn_of(sys.argv[2], torch.device('cpu')), timm.create_model(sys.argv[3])
timm_ghn.ghn_init(timm.create_model('test_resnet'), ghn, postprocess=None)  # buffers of libraries, lazy imports
size = sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20
forget_peak()
before = memory('VmRSS')
timm_ghn.ghn_init(model, ghn, head='predict', postprocess=None)
print(size, memory('VmHWM') - before)
"""
)

_LOADING = (
    _PEAK
    + """
timm_ghn.load_ghn('ghn_tiny') if 'ghn_tiny' in predict.known_ghns() else None
forget_peak()
before, start, wall = memory('VmRSS'), time.process_time(), time.perf_counter()
ghn = timm_ghn.load_ghn(sys.argv[2])
print(time.process_time() - start, time.perf_counter() - wall, memory('VmHWM') - before, memory('VmHWM'))
"""
)

_IMPORTING = """
import sys, time
import timm
start = time.process_time()
import timm_ghn
print(time.process_time() - start)
"""


def memory(name: str, names: Sequence[str]) -> str:
    """Most memory that ghn_init takes beside the GHN and the model, each in a process of its own (Linux only)."""
    rows = []
    for network in names:
        size, extra = in_new_process(_PREDICTING, str(Path(__file__).parent), name, network)
        rows.append([network, f'{size:.0f}', f'{extra:.0f}', f'{extra / size:.0%}'])
    return markdown(['network', 'model MiB', 'peak above GHN and model, MiB', 'share of the model'], rows)


def load(name: str) -> str:
    """Time and memory of loading a GHN from this package's own form, the file being in the disk cache."""
    from timm_ghn.nn.storage import save_ghn

    with tempfile.TemporaryDirectory() as folder:
        ghn = ghn_of(name, torch.device('cpu'))
        size = sum(p.numel() * p.element_size() for p in ghn.parameters()) / 2**20
        save_ghn(ghn, folder)
        del ghn
        gc.collect()
        cpu, wall, extra, peak = in_new_process(_LOADING, str(Path(__file__).parent), folder)
    head = ['GHN', 'weights MiB', 'CPU s', 's', 'peak above the start, MiB', 'peak of the process, MiB']
    return markdown(head, [[name, f'{size:.0f}', f'{cpu:.2f}', f'{wall:.2f}', f'{extra:.0f}', f'{peak:.0f}']])


def imports(repeat: int) -> str:
    """CPU time of importing this package when timm is imported already."""
    seconds = min(in_new_process(_IMPORTING)[0] for _ in range(repeat))
    return f'Import of timm_ghn beyond that of timm: {seconds:.3f} CPU s.\n'


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
    for name in args.ghn:
        for part in args.parts:
            if part in ('speed', 'scaling'):
                ghn, measured = ghn_of(name, machine.device), []
                chosen = (
                    deeper_networks(machine.device) if part == 'scaling' else networks(args.networks, machine.device)
                )
                for network, model in chosen:
                    times = measure(model, ghn, machine)
                    other = other_seconds(args.compare if part == 'speed' else None, name, network)
                    measured.append((network, times, other))
                    print(network, times, file=sys.stderr, flush=True)
                yield f'## {name}: {part}, milliseconds and share\n\n{speed(name, measured)}'
                del ghn
            elif part == 'memory':
                yield f'## {name}: memory of a prediction\n\n{memory(name, args.networks)}'
            elif part == 'load':
                yield f'## {name}: loading\n\n{load(name)}'
    if 'imports' in args.parts:
        yield f'## Import\n\n{imports(args.repeat)}'


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--ghn', nargs='+', default=['ghn3_tm8', 'ghn2'], help='names of the catalogue, or paths')
    parser.add_argument('--networks', nargs='+', default=list(NETWORKS), help='timm architectures')
    parser.add_argument('--parts', nargs='+', default=['speed'], choices=PARTS, help='what to measure')
    parser.add_argument('--repeat', type=int, default=3, help='runs of which the fastest counts (default: 3)')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--compare', metavar='COMMAND', help='another implementation')
    parser.add_argument('--seconds', nargs=2, metavar=('GHN', 'NETWORK'), help='print the seconds of ghn_init only')
    parser.add_argument('--out', type=Path, help='Markdown file to write the tables to')
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, and write the tables."""
    args = arguments(argv)
    torch.set_num_threads(1)
    device = torch.device(args.device)
    if args.seconds:
        ghn, model = ghn_of(args.seconds[0], device), timm.create_model(args.seconds[1]).to(device)
        machine = Machine(device, args.repeat, 1, 1)
        print(machine.least(lambda: timm_ghn.ghn_init(model, ghn, head='predict', postprocess=None)))
        return
    machine = measure_machine(device, args.repeat)
    command = shlex.join(sys.argv[1:] if argv is None else argv)
    text = f'# Prediction, {datetime.date.today()}\n\n`python benchmarks/predict.py {command}`\n\n{describe(machine)}'
    print(text)
    for section in sections(args, machine):
        print(section, flush=True)
        text += f'\n{section}'
    if args.out is not None:
        args.out.write_text(text)


if __name__ == '__main__':
    main()
