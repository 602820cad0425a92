"""Times ghn_init stage by stage, beside the least that its arithmetic can take.

    python benchmarks/predict.py                       # GHN-3-T and GHN-2, eight networks
    python benchmarks/predict.py --ghn ghn3_xlm16      # full size, random weights
    python benchmarks/predict.py --scaling             # deeper and deeper networks
    python benchmarks/predict.py --compare 'python other.py'

Weights are random, hyper-parameters those of hub_configs. Times are CPU seconds of one thread (on a GPU: seconds), the
least of --repeat runs. The limit is the decoder's least number of multiplications at the rate of a large matrix product
measured in the same run, plus the time to copy as many bytes as are written. --compare runs a command once for each
GHN and network, with both names as its last arguments; its last line of output is the seconds that it took.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import platform
import resource
import shlex
import subprocess
import sys
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
from timm_ghn.nn.requests import DecodeKind, window_of
from timm_ghn.params.fit import write

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
#: one thread for the prediction alone. Measured by us once, with random weights.
REFERENCE = {
    ('ghn3_tm8', 'resnet50'): 0.42,
    ('ghn3_tm8', 'vit_base_patch16_224'): 0.93,
    ('ghn3_tm8', 'convnext_base'): 1.45,
    ('ghn3_tm8', 'densenet121'): 1.09,
    ('ghn2', 'resnet50'): 0.68,
    ('ghn2', 'convnext_base'): 2.29,
    ('ghn3_xlm16', 'resnet50'): 12.5,
    ('ghn3_xlm16', 'vit_base_patch16_224'): 14.8,
    ('ghn3_xlm16', 'efficientnet_b0'): 22.0,
    ('ghn3_xlm16', 'convnext_base'): 47.0,
}


@dataclasses.dataclass
class Times:
    """Seconds of each stage."""

    trace: float
    edges: float
    plan: float
    encode: float
    decode: float
    write: float
    total: float
    forward_on_meta: float
    limit: float
    parameters: int
    nodes: int


def clock(device: torch.device) -> float:
    """CPU seconds of this process; on a GPU seconds of the wall clock, when it has finished."""
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time()


def least(action: Callable[[], object], repeat: int, device: torch.device) -> float:
    """Least seconds that an action takes."""
    seconds = []
    for _ in range(repeat):
        start = clock(device)
        action()
        seconds.append(clock(device) - start)
    return min(seconds)


def random_ghn(name: str, device: torch.device) -> timm_ghn.GHN:
    """A GHN of the size of a known one, without the time that drawing its weights as in training would take."""
    with torch.device('meta'):
        ghn = timm_ghn.GHN(known_ghns()[name].config)
    ghn.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for parameter in ghn.parameters():
            parameter.uniform_(-0.02, 0.02, generator=generator)
    return ghn.eval()


def matmul_rate(device: torch.device, repeat: int) -> float:
    """Multiplications with addition in a second, in a large float32 product."""
    a = torch.randn(1024, 1024, device=device)
    return 1024**3 / least(lambda: a @ a, repeat * 3, device)


def copy_rate(device: torch.device, repeat: int) -> float:
    """Float32 elements written in a second."""
    a = torch.randn(2**24, device=device)
    b = torch.empty_like(a)
    return 2**24 / least(lambda: b.copy_(a), repeat * 3, device)


def decoder_macs(ghn: timm_ghn.GHN, plan: timm_ghn.ParameterPlan) -> int:
    """Least number of multiplications that decoding takes when every layer is sliced to what a parameter needs."""
    config = ghn.config
    d, (outputs, inputs, _, _) = config.hid, config.max_shape
    longest = max(outputs, inputs)
    total = 0
    for row in plan.predicted:
        kind, (o, i, height, width) = row.request.kind, row.request.size
        if kind is DecodeKind.TENSOR:
            area = window_of(height, width, config).area
            total += area * (36 * d * d + 8 * d * min(o, outputs) * min(i, inputs))
        elif kind is DecodeKind.HEAD_WEIGHT:
            i = min(i, inputs)
            total += 36 * d * d + 8 * d * outputs * i + i * outputs * min(o, config.num_classes)
        else:
            total += 2 * d * d + 2 * d * min(o, longest)
    return total


def measure(
    model: nn.Module, ghn: timm_ghn.GHN, repeat: int, device: torch.device, rates: tuple[float, float]
) -> Times:
    """Time every stage by itself, and all of them in ghn_init."""
    graph = timm_ghn.trace(model, rules=ghn.config.rules)
    plan = timm_ghn.plan_parameters(graph, ghn.config, head='predict')
    requests = [row.request for row in plan.predicted]
    parameters = dict(model.named_parameters())
    image = torch.empty(2, *graph.input_size, device='meta')

    def fresh() -> object:
        graph.__dict__.pop('_distances_NN', None)
        return graph.distances_NN(ghn.config.virtual_edges)

    with torch.no_grad():
        nodes = ghn.encode(graph.parts)
        decoded = dict(ghn.decode(nodes, requests))
        fits = [(parameters[row.name].detach(), decoded[k], row.fit) for k, row in enumerate(plan.predicted)]
        times = Times(
            trace=least(lambda: timm_ghn.trace(model, rules=ghn.config.rules), repeat, device),
            edges=least(fresh, repeat, device),
            plan=least(lambda: timm_ghn.plan_parameters(graph, ghn.config, head='predict'), repeat, device),
            encode=least(lambda: ghn.encode(graph.parts), repeat, device),
            decode=least(lambda: [None for _ in ghn.decode(nodes, requests)], repeat, device),
            write=least(lambda: [write(*fit) for fit in fits], repeat, device),
            total=0.0,
            forward_on_meta=0.0,
            limit=decoder_macs(ghn, plan) / rates[0] + sum(row.numel for row in plan.predicted) / rates[1],
            parameters=sum(row.numel for row in plan),
            nodes=len(graph),
        )
    times.total = least(lambda: timm_ghn.ghn_init(model, ghn, head='predict'), repeat, device)
    bare = model.to('meta')
    times.forward_on_meta = least(lambda: bare(image), repeat, device)
    return times


def other_seconds(command: str | None, ghn: str, network: str) -> float | None:
    """Run another implementation."""
    if command is None:
        return None
    done = subprocess.run([*shlex.split(command), ghn, network], capture_output=True, text=True, check=True)
    return float(done.stdout.strip().splitlines()[-1])


def networks(names: Sequence[str], device: torch.device) -> Iterator[tuple[str, nn.Module]]:
    """timm architectures by name."""
    for name in names:
        yield name, timm.create_model(name).to(device)


def deeper_networks(device: torch.device) -> Iterator[tuple[str, nn.Module]]:
    """Vision transformers of 12 to 96 blocks, ResNets of 26 to 998 layers."""
    for depth in (12, 24, 48, 96):
        yield f'vit, {depth} blocks', VisionTransformer(depth=depth, embed_dim=192, num_heads=3).to(device)
    for layers in ((2, 2, 2, 2), (3, 4, 23, 3), (8, 36, 280, 8)):
        yield f'resnet, {3 * sum(layers) + 2} layers', ResNet(Bottleneck, layers).to(device)


def table(title: str, name: str, rows: Sequence[tuple[str, Times, float | None]]) -> str:
    """A Markdown table of milliseconds."""
    stages = ('trace', 'edges', 'plan', 'encode', 'decode', 'write', 'total', 'limit')
    lines = [f'## {title}', '']
    head = [
        'network',
        'M parameters',
        'nodes',
        *(f'{stage} ms' for stage in stages),
        'trace / meta forward',
        'speed-up',
    ]
    lines += ['| ' + ' | '.join(head) + ' |', '|---' * len(head) + '|']
    ratios = []
    for network, times, other in rows:
        other = other if other is not None else REFERENCE.get((name, network))
        compared = times.encode + times.decode + times.write if name == 'ghn3_xlm16' else times.total
        ratio = '' if other is None else f'{other / compared:.1f}x'
        ratios += [] if other is None else [other / compared]
        cells = [network, f'{times.parameters / 1e6:.1f}', str(times.nodes)]
        cells += [f'{1000 * getattr(times, stage):.1f}' for stage in stages]
        lines.append('| ' + ' | '.join([*cells, f'{times.trace / times.forward_on_meta:.2f}', ratio]) + ' |')
    if ratios:
        mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
        lines.append(f'\nGeometric mean of the speed-up over {len(ratios)} networks: {mean:.1f}x.')
    return '\n'.join(lines) + '\n'


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--ghn', nargs='+', default=['ghn3_tm8', 'ghn2'], help='names of the catalogue')
    parser.add_argument('--networks', nargs='+', default=list(NETWORKS), help='timm architectures')
    parser.add_argument('--scaling', action='store_true', help='deeper and deeper networks instead')
    parser.add_argument('--repeat', type=int, default=3, help='runs of which the fastest counts (default: 3)')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--compare', metavar='COMMAND', help='another implementation')
    parser.add_argument('--out', type=Path, help='Markdown file to write the tables to')
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, and write the tables."""
    args = arguments(argv)
    torch.set_num_threads(1)
    device = torch.device(args.device)
    rates = matmul_rate(device, args.repeat), copy_rate(device, args.repeat)
    where = torch.cuda.get_device_name(device) if device.type == 'cuda' else platform.processor() or platform.machine()
    text = (
        f'timm_ghn {timm_ghn.__version__}, timm {timm.__version__}, torch {torch.__version__}, {where}, one thread; '
        f'{2 * rates[0] / 1e9:.1f} GFLOP/s in a matrix product, {4 * rates[1] / 1e9:.1f} GB/s in a copy.\n'
    )
    print(text)
    for name in args.ghn:
        ghn = random_ghn(name, device)
        rows = []
        for network, model in deeper_networks(device) if args.scaling else networks(args.networks, device):
            rows.append(
                (network, measure(model, ghn, args.repeat, device, rates), other_seconds(args.compare, name, network))
            )
            print(network, dataclasses.asdict(rows[-1][1]), file=sys.stderr, flush=True)
        part = table(name, name, rows)
        print(part)
        text += '\n' + part
    text += f'\nPeak memory: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB.\n'
    if args.out is not None:
        args.out.write_text(
            f'# Prediction time\n\n`python benchmarks/predict.py {shlex.join(argv or sys.argv[1:])}`\n\n{text}'
        )


if __name__ == '__main__':
    main()
