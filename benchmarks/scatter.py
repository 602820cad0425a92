"""Times the sums over edges, backend by backend, and the passes of GHN-2 over batches of graphs.

    python benchmarks/scatter.py --out benchmarks/results/scatter-DATE.md    # all of it, two to three minutes on a CPU
    python benchmarks/scatter.py --parts backends --edges 1000 --features 32 --graphs
    python benchmarks/scatter.py --parts passes --graphs 1 8 64

Backends are called through timm_ghn.ops.aggregate on the same schedule, one after another in rounds until --budget
seconds are spent; the least time of each counts. 'forward' has its factors in the schedule, 'with gradients' is a
forward and a backward pass for messages and factors. Times are CPU seconds of one thread (on a GPU: of the wall clock).
Real graphs are timm models with their virtual edges up to distance 50, as GHN-2 reads them; synthetic ones have random
edges, ten times as many as nodes.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import functools
import platform
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import timm
import torch
from predict import Machine, cpu_name, ghn_of, markdown
from torch import Tensor

import timm_ghn
from timm_ghn import Graph
from timm_ghn.graph.graph import GraphBatch
from timm_ghn.nn.gated import GatedGNN, plan_traversal
from timm_ghn.ops import Edges, aggregate
from timm_ghn.ops.backends import BACKENDS, choose_backend

#: Small and medium networks of many families, of 20 to 450 nodes; a batch of n takes the first n.
NETWORKS = (
    'resnet18', 'mobilenetv3_small_100', 'efficientnet_b0', 'vit_tiny_patch16_224', 'densenet121', 'convnext_tiny',
    'regnety_004', 'resnet50', 'resnet10t', 'resnet14t', 'resnet18d', 'resnet26', 'resnet26d', 'resnet34',
    'resnet34d', 'resnet50d', 'resnet101', 'resnext26ts', 'resnext50_32x4d', 'seresnet50', 'wide_resnet50_2',
    'resnetblur50', 'densenet169', 'dla34', 'dla60', 'dpn68', 'hrnet_w18_small', 'vgg11', 'vgg16_bn',
    'inception_v3', 'xception41', 'repvgg_a0', 'res2net50_26w_4s', 'selecsls42b', 'darknet53', 'cspresnet50',
    'vovnet39a', 'mobilenetv2_050', 'mobilenetv2_100', 'mobilenetv3_large_100', 'mnasnet_100', 'efficientnet_b1',
    'efficientnet_lite0', 'fbnetc_100', 'ghostnet_100', 'lcnet_100', 'tinynet_a', 'regnetx_002', 'regnetx_008',
    'regnety_016', 'convnext_atto', 'convnext_pico', 'convnextv2_nano', 'nfnet_l0', 'poolformer_s12',
    'edgenext_small', 'mobilevit_s', 'vit_small_patch16_224', 'deit_tiny_patch16_224', 'beit_base_patch16_224',
    'mixer_s32_224', 'gmlp_s16_224', 'swin_tiny_patch4_window7_224', 'pvt_v2_b0',
)  # fmt: skip
CUTOFF = 50
PARTS = ('backends', 'passes')


@dataclasses.dataclass(frozen=True)
class Problem:
    """Edges with factors to sum over, and the features and dtype of the messages."""

    name: str
    edges: Edges
    width: int
    dtype: torch.dtype = torch.float32


def traced(count: int) -> list[Graph]:
    """The first networks, as graphs."""
    graphs = []
    for name in NETWORKS[:count]:
        # RegNet computes its widths with tensors, which must hold values.
        with torch.device('cpu' if name.startswith('regnet') else 'meta'):
            graphs.append(timm_ghn.trace(timm.create_model(name)))
    return graphs


def of_graphs(graphs: Sequence[Graph], device: torch.device) -> Edges:
    """Virtual edges of all graphs, whose nodes are numbered through."""
    parts, nodes = [], 0
    for graph in graphs:
        distances_NN = graph.distances_NN(CUTOFF)
        source, target = distances_NN.nonzero(as_tuple=True)
        parts.append((source + nodes, target + nodes, 1 / distances_NN[source, target].float()))
        nodes += len(graph)
    source, target, weight = (torch.cat(part).to(device) for part in zip(*parts, strict=True))
    return Edges.of(source, target, num_sources=nodes, num_targets=nodes, weight_E=weight)


def of_chance(count: int, device: torch.device) -> Edges:
    """Random edges, ten for each node."""
    generator = torch.Generator().manual_seed(0)
    nodes = max(1, count // 10)
    source, target = torch.randint(nodes, (2, count), generator=generator).to(device)
    weight = torch.rand(count, generator=generator).to(device)
    return Edges.of(source, target, num_sources=nodes, num_targets=nodes, weight_E=weight)


def problems(args: argparse.Namespace, graphs: Sequence[Graph]) -> Iterator[Problem]:
    """What is timed: float32 for all, other dtypes for one of the synthetic graphs."""
    device = torch.device(args.device)
    for count in args.graphs:
        edges = of_graphs(graphs[:count], device)
        name = '1 timm model' if count == 1 else f'{count} timm models'
        yield from (Problem(name, edges, width) for width in args.features)
    random = [of_chance(count, device) for count in args.edges]
    yield from (Problem('random', edges, width) for edges in random for width in args.features)
    for dtype in (torch.float64, torch.bfloat16) if random else ():
        edges = random[len(random) // 2]
        weighted = dataclasses.replace(edges, weight_E=edges.weight_E.to(dtype))
        yield Problem('random', weighted, args.features[0], dtype)


def actions(problem: Problem, *, gradients: bool, device: torch.device) -> dict[str, Callable[[], object]]:
    """One call for each backend that can run, and for the automatic choice."""
    edges, dtype = problem.edges, problem.dtype
    messages = torch.randn(edges.num_sources, problem.width, device=device).to(dtype).requires_grad_(gradients)
    outer = torch.ones(edges.num_targets, problem.width, device=device, dtype=dtype)
    # Factors that are learned are given in the order of the caller; here it is the sorted one.
    bare = dataclasses.replace(edges, weight_E=None, order_E=None)
    weight = edges.weight_E.clone().requires_grad_()

    def call(name: str) -> object:
        if not gradients:
            return aggregate(messages, edges, backend=name)
        return torch.autograd.grad(aggregate(messages, bare, weight, backend=name), (messages, weight), outer)

    usable = [name for name, b in BACKENDS.items() if b.problem(device.type, dtype, deterministic=False) is None]
    return {name: functools.partial(call, name) for name in (*usable, 'auto')}


def least_times(calls: dict[str, Callable[[], object]], machine: Machine, budget: float) -> dict[str, float]:
    """Least seconds of each call, measured in rounds, so that what slows the machine down hits all of them.

    A call of microseconds is repeated until a measurement takes a millisecond. One that takes three times as long as
    the fastest is called three times only.
    """
    best = {name: machine.least(call, 3) for name, call in calls.items()}
    repeat = {name: max(1, int(1e-3 / max(seconds, 1e-6))) for name, seconds in best.items()}
    start, rounds = machine.clock(), 0
    while rounds < 3 or machine.clock() - start < budget:
        for name, call in calls.items():
            if name == 'auto' or best[name] < 3 * min(best.values()):
                seconds = machine.least(lambda call=call, name=name: [call() for _ in range(repeat[name])], 1)
                best[name] = min(best[name], seconds / repeat[name])
        rounds += 1
    return best


def backends_table(args: argparse.Namespace, machine: Machine, graphs: Sequence[Graph]) -> Iterator[str]:
    """Milliseconds of each backend, and how far the automatic choice is from the best."""
    names = [*BACKENDS, 'auto']
    head = ['edges of', 'nodes', 'edges', 'features', 'dtype', *names, 'chosen', 'auto / best']
    for gradients in (False, True):
        rows, excess = [], []
        for problem in problems(args, graphs):
            edges = problem.edges
            best = least_times(actions(problem, gradients=gradients, device=machine.device), machine, args.budget)
            chosen = choose_backend(torch.empty(0, device=machine.device, dtype=problem.dtype), 'auto').name
            excess.append(best['auto'] / min(seconds for name, seconds in best.items() if name != 'auto'))
            cells = [f'{1e3 * best[name]:.4g}' if name in best else '' for name in names]
            size = [f'{edges.num_sources:,}', f'{len(edges):,}', str(problem.width)]
            dtype = str(problem.dtype).removeprefix('torch.')
            rows.append([problem.name, *size, dtype, *cells, chosen, f'{excess[-1]:.2f}'])
        title = 'Sum with gradients' if gradients else 'Sum, forward'
        yield f'## {title}, milliseconds\n\n{markdown(head, rows)}\nauto / best: at most {max(excess):.2f}.\n'


@torch.no_grad()
def node_by_node(network: GatedGNN, graph: Graph, x_Nd: Tensor, prepared: Sequence[Sequence[Tensor]]) -> Tensor:
    """The definition, as the published code computes it: one node after another, a message for each of its edges."""
    h_Nd = x_Nd.clone()
    for visits, nodes in zip(prepared, (range(len(graph)), reversed(range(len(graph)))), strict=True):
        for node, (near, all_sources, weight) in zip(nodes, visits, strict=True):
            message_d = network.mlp(h_Nd[near]).sum(0)
            if network.mlp_ve is not None:
                message_d = message_d + (network.mlp_ve(h_Nd[all_sources]) * weight).sum(0)
            h_Nd[node] = network.gru(message_d[None], h_Nd[node : node + 1])[0]
    return h_Nd


def visits_of(graph: Graph, device: torch.device) -> list[list[tuple[Tensor, Tensor, Tensor]]]:
    """For each pass and node: its direct sources, all sources, and the factors of these."""
    found = []
    for distances_NN in (graph.distances_NN(CUTOFF).T, graph.distances_NN(CUTOFF).flip(0)):
        visits = []
        for row in distances_NN:
            sources = row.nonzero().flatten()
            weight = 1 / row[sources].float()[:, None]
            visits.append((row.eq(1).nonzero().flatten().to(device), sources.to(device), weight.to(device)))
        found.append(visits)
    return found


def passes_table(args: argparse.Namespace, machine: Machine, graphs: Sequence[Graph]) -> Iterator[str]:
    """Milliseconds of GHN-2's encoder on batches, by level and node by node."""
    ghn = ghn_of('ghn2', machine.device)
    network = ghn.gnn
    rows, worst = [], 0.0
    sparse = choose_backend(torch.empty(0, device=machine.device), 'auto').name
    for count in args.graphs:
        chosen = graphs[:count]
        batch = GraphBatch.of(chosen)
        x_Nd = torch.randn(sum(batch.sizes), ghn.config.hid, device=machine.device)
        prepared = [visits_of(graph, machine.device) for graph in chosen]
        parts = x_Nd.split(batch.sizes)

        def visit(chosen=chosen, parts=parts, prepared=prepared) -> Tensor:
            triples = zip(chosen, parts, prepared, strict=True)
            return torch.cat([node_by_node(network, graph, x, visits) for graph, x, visits in triples])

        with torch.no_grad():
            worst = max(worst, float((visit() - network(x_Nd, batch)).abs().max()))
            times = {
                'node by node': machine.least(visit, 1),
                'encode, new batch': machine.least(lambda chosen=chosen: ghn.encode(chosen)),
                'encode, batch kept': machine.least(lambda batch=batch: ghn.encode(batch)),
            }
            alone = [GraphBatch.of(graph) for graph in chosen]
            one_each = machine.least(lambda alone=alone: [ghn.encode(one) for one in alone])
            rows_times = [backend_time(network, batch, x_Nd, name, machine) for name in ('dense', sparse)]
        training = machine.least(
            lambda batch=batch, x=x_Nd: network(x.clone().requires_grad_(), batch).sum().backward()
        )
        cells = [times['node by node'], one_each, *rows_times]
        encodes = [times['encode, new batch'], times['encode, batch kept']]
        ratios = [f'{times["node by node"] / seconds:.1f}' for seconds in encodes]
        plan = plan_traversal(batch, CUTOFF, backward=False, like=x_Nd)
        kind = type(plan.receiving[0]).__name__.removesuffix('Rows').lower()
        sizes = [str(count), f'{sum(batch.sizes):,}', str(len(plan.sizes)), f'{len(plan.edges):,}', kind]
        rows.append([*sizes, *(_ms(cell) for cell in (*cells, *encodes, training)), *ratios])
    head = [
        'graphs', 'nodes', 'levels', 'messages', 'layout', 'node by node', 'graph by graph', 'passes, dense',
        'passes, sparse', 'encode, new batch', 'encode, batch kept', 'with gradients', 'speed-up, new batch',
        'speed-up, batch kept',
    ]  # fmt: skip
    yield (
        f'## Passes of GHN-2 (d = {ghn.config.hid}), milliseconds\n\n{markdown(head, rows)}\n'
        'node by node: the passes alone, lists of sources prepared; graph by graph: one encode for each graph, plans '
        'kept. A new batch is planned within its time. '
        f'Largest difference between the two ways, over all batches: {worst:.1e}.\n'
    )


def _ms(seconds: float | None) -> str:
    return '' if seconds is None else f'{1e3 * seconds:.1f}'


def backend_time(network: GatedGNN, batch: GraphBatch, x_Nd: Tensor, name: str, machine: Machine) -> float | None:
    """Seconds of both passes with one backend; None where matrices would take over a gigabyte."""
    if name == 'dense' and sum(batch.sizes) ** 2 > 2**25:
        return None
    plans = tuple(
        plan_traversal(batch, CUTOFF, backward=backward, like=x_Nd, backend=name) for backward in (False, True)
    )
    other = GraphBatch(batch.graphs)
    vars(other)['_traversals'] = {(CUTOFF, x_Nd.device, x_Nd.dtype, x_Nd.shape[1], 'auto'): plans}
    network(x_Nd, other)
    return machine.least(lambda: network(x_Nd, other))


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--parts', nargs='+', default=list(PARTS), choices=PARTS, help='what to measure')
    parser.add_argument('--graphs', nargs='*', type=int, default=[1, 8, 64], help='batches of timm models')
    parser.add_argument('--edges', nargs='*', type=int, default=[10**3, 10**4, 10**5, 10**6], help='synthetic graphs')
    parser.add_argument('--features', nargs='+', type=int, default=[32, 128, 512])
    parser.add_argument('--budget', type=float, default=0.3, help='seconds for a row (default: 0.3)')
    parser.add_argument('--repeat', type=int, default=3, help='runs of a pass of which the fastest counts')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--out', type=Path, help='Markdown file to write the tables to')
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, and write the tables."""
    args = arguments(argv)
    torch.set_num_threads(1)
    device = torch.device(args.device)
    machine = Machine(device, args.repeat, 1, 1)
    where = torch.cuda.get_device_name(device) if device.type == 'cuda' else f'{cpu_name()}, one thread'
    absent = [
        f'{name} {problem}'
        for name, backend in BACKENDS.items()
        if (problem := backend.problem(device.type, torch.float32, deterministic=False)) is not None
    ]
    command = shlex.join(sys.argv[1:] if argv is None else argv)
    text = (
        f'# Sums over edges, {datetime.date.today()}\n\n`python benchmarks/scatter.py {command}`\n\n'
        f'Python {platform.python_version()}, timm_ghn {timm_ghn.__version__}, timm {timm.__version__}, '
        f'torch {torch.__version__}; {where}.' + ''.join(f' Left out: {line}.' for line in absent) + '\n'
    )
    print(text)
    graphs = traced(max(args.graphs, default=0))
    tables = {'backends': backends_table, 'passes': passes_table}
    for part in args.parts:
        for section in tables[part](args, machine, graphs):
            print(section, flush=True)
            text += f'\n{section}'
    if args.out is not None:
        args.out.write_text(text, encoding='utf-8')


if __name__ == '__main__':
    main()
