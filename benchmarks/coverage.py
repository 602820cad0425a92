"""Traces and plans every timm architecture, and checks that its graph is right.

    python benchmarks/coverage.py

Each architecture is built on the meta device, in a worker process. Results are appended to <out>/coverage.jsonl one by
one, so that an interrupted run goes on where it stopped; at the end <out>/coverage-<date>.csv has a row for each
architecture and <out>/coverage-<date>.md a summary by family. What makes a graph wrong is listed at `flaws_of`.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import dataclasses
import datetime
import json
import multiprocessing
import sys
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn
from tqdm import tqdm

import timm_ghn
from timm_ghn import GHNConfig, Graph, ParameterPlan
from timm_ghn.graph.primitives import Primitive
from timm_ghn.graph.trace import Op, Recording, record
from timm_ghn.graph.vocabulary import ARCHITECTURAL

RESULTS = Path(__file__).resolve().parent / 'results'
CONFIG = GHNConfig(hid=64, max_shape=(64, 64, 16, 16), num_classes=1000, layers=3, heads=8, name='ghn3tm8')
WEIGHTS = frozenset(
    {Primitive.CONV, Primitive.SEP_CONV, Primitive.DIL_CONV, Primitive.BN, Primitive.LN, Primitive.BIAS}
)

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
    supplement_nodes: int = 0
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


def examine(family: str, name: str) -> Result:
    """Build, trace, plan and check one architecture."""
    times = [time.perf_counter()]
    model, device = build(name)
    times.append(time.perf_counter())
    graph = timm_ghn.trace(model)
    times.append(time.perf_counter())
    plan = timm_ghn.plan_parameters(graph, CONFIG, head='predict')
    times.append(time.perf_counter())
    seconds = [round(b - a, 4) for a, b in zip(times, times[1:], strict=False)]
    total = plan.summary()
    explained = [row for row in plan if row.predicted or row.reason in ARCHITECTURAL]
    return Result(
        family,
        name,
        device,
        graph.rules,
        total['nodes'],
        total['edges'],
        total['supplement_nodes'],
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


def flaws_of(model: nn.Module, plan: ParameterPlan) -> list[str]:
    """What is wrong with a plan and its graphs, in words; empty if nothing is.

    - Each parameter of the model is in the plan exactly once.
    - Each graph is acyclic, has one input, and all leads from it (positional encodings apart) to an output.
    - Each weight stands between its data input and its data output: of two weights, one comes behind the other in the
      graph exactly if it does in the network, as autograd recorded it.
    - The classifier is found.
    """
    flaws = []
    listed = Counter(name for row in plan for name in (row.name, *row.aliases))
    if listed != Counter(name for name, _ in model.named_parameters(remove_duplicate=False)):
        flaws.append('the plan does not list each parameter once')
    recording = record(model)
    before = weights_before(recording)
    for graph in plan.graph.parts:
        where = '' if graph is plan.graph else 'supplement: '
        found = shape_flaws(graph, len(recording.outputs))
        if graph.is_acyclic:
            found += order_flaws(graph, before)
        flaws += [where + flaw for flaw in found]
    return flaws + head_flaws(plan.graph)


def shape_flaws(graph: Graph, outputs: int) -> list[str]:
    """One connected directed acyclic graph from the input to the outputs."""
    if not graph.is_acyclic:
        return ['cyclic']
    flaws = []
    successors, predecessors = neighbours(graph)
    inputs = [i for i, node in enumerate(graph.nodes) if node.primitive is Primitive.INPUT]
    if len(inputs) != 1:
        flaws.append(f'{len(inputs)} inputs')
    sources = {i for i, node in enumerate(graph.nodes) if node.primitive is Primitive.POS_ENC}
    cut_off = set(range(len(graph))) - reachable(successors, inputs) - sources
    if cut_off:
        flaws.append(f'not reached from the input: {labels(graph, cut_off)}')
    ends = [i for i in range(len(graph)) if not successors[i]]
    if len(ends) > outputs:
        flaws.append(f'{len(ends)} ends for {outputs} outputs: {labels(graph, ends)}')
    orphans = [i for i, node in enumerate(graph.nodes) if node.primitive in WEIGHTS and not predecessors[i]]
    if orphans:
        flaws.append(f'weights without an input: {labels(graph, orphans)}')
    return flaws


def head_flaws(graph: Graph) -> list[str]:
    """The classifier's weights give as many numbers as there are classes."""
    if graph.num_classes is None:
        return []
    shapes = {info.name: info.shape for info in graph.parameters}
    if not graph.class_weights:
        return [f'no classifier found for {graph.num_classes} classes']
    return [
        f'classifier {name} of shape {shapes[name]} for {graph.num_classes} classes'
        for name in (*graph.class_weights, *graph.class_biases)
        if shapes[name][0] != graph.num_classes
    ]


def order_flaws(graph: Graph, before: WeightsBefore) -> list[str]:
    """Compare the order of the weights in the graph with that in the network."""
    bit = before.bit
    _, predecessors = neighbours(graph)
    known, reach = 0, [0] * len(graph)
    for node in graph.nodes:
        known |= bit.get(node.parameter or '', 0)
    for i in torch.argsort(graph.forward_levels_N, stable=True).tolist():
        for p in predecessors[i]:
            reach[i] |= reach[p] | bit.get(graph.nodes[p].parameter or '', 0)
    lost, invented = Counter[str](), Counter[str]()
    for i, node in enumerate(graph.nodes):
        if node.parameter not in bit or node.primitive is Primitive.POS_ENC:
            continue
        right = before.masks[node.parameter] & known
        lost[node.parameter] = (right & ~reach[i]).bit_count()
        invented[node.parameter] = (reach[i] & ~right & ~before.beside[node.parameter]).bit_count()
    flaws = []
    for what, count in (('behind a weight but not so in the graph', lost), ('in the graph only behind', invented)):
        if count.total():
            name, most = count.most_common(1)[0]
            flaws.append(f'{count.total()} pairs {what} (of {name}: {most})')
    return flaws


@dataclasses.dataclass(frozen=True)
class WeightsBefore:
    """Order of the parameters that a network uses once. Sets of them are bit masks; ``bit`` has that of each.

    ``masks`` has all that the data has met before each parameter, ``beside`` what joins the data at the same place.
    """

    bit: dict[str, int]
    masks: dict[str, int]
    beside: dict[str, int]


def weights_before(recording: Recording) -> WeightsBefore:
    """Follow the image through the recorded ops; a parameter joins it at the first op that has image data."""
    ops = recording.ops
    order = inputs_first(ops)
    image = [False] * len(ops)
    carried: list[set[str]] = [set() for _ in ops]
    sites: dict[str, list[int]] = defaultdict(list)
    for i in order:
        children = [child for child in ops[i].inputs if isinstance(child, int)]
        image[i] = ops[i].reads_image or any(image[child] for child in children)
        joining = set(ops[i].parameters).union(*(carried[child] for child in children if not image[child]))
        if not image[i]:
            carried[i] = joining
            continue
        for name in joining:
            sites[name].append(i)
    bit = {name: 1 << k for k, name in enumerate(name for name, where in sites.items() if len(where) == 1)}
    here = [0] * len(ops)
    for name, own in bit.items():
        here[sites[name][0]] |= own
    met = [0] * len(ops)
    for i in order:
        for child in ops[i].inputs:
            if isinstance(child, int):
                met[i] |= met[child] | here[child]
    return WeightsBefore(bit, {n: met[sites[n][0]] for n in bit}, {n: here[sites[n][0]] for n in bit})


def inputs_first(ops: Sequence[Op]) -> list[int]:
    """Order in which every op comes behind its inputs."""
    children = [{child for child in op.inputs if isinstance(child, int)} for op in ops]
    readers: list[list[int]] = [[] for _ in ops]
    for i, below in enumerate(children):
        for child in below:
            readers[child].append(i)
    waiting = [len(below) for below in children]
    order = [i for i, count in enumerate(waiting) if not count]
    for i in order:
        for reader in readers[i]:
            waiting[reader] -= 1
            if not waiting[reader]:
                order.append(reader)
    return order


def neighbours(graph: Graph) -> tuple[list[list[int]], list[list[int]]]:
    """Successors and predecessors of each node."""
    successors: list[list[int]] = [[] for _ in graph.nodes]
    predecessors: list[list[int]] = [[] for _ in graph.nodes]
    for source, target in graph.edges_E2.tolist():
        successors[source].append(target)
        predecessors[target].append(source)
    return successors, predecessors


def reachable(successors: list[list[int]], start: Iterable[int]) -> set[int]:
    """Nodes that edges lead to, the start included."""
    stack = list(start)
    found = set(stack)
    while stack:
        new = [s for s in successors[stack.pop()] if s not in found]
        found.update(new)
        stack += new
    return found


def labels(graph: Graph, nodes: Iterable[int]) -> str:
    """A few of them by name."""
    names = [graph.nodes[i].label for i in sorted(nodes)]
    return ', '.join(names[:4]) + (f' and {len(names) - 4} more' if len(names) > 4 else '')


# All of them, in worker processes.


def work(connection: Connection) -> None:
    """Examine what comes in through the connection, until nothing does."""
    torch.set_num_threads(1)
    warnings.simplefilter('ignore')
    with contextlib.suppress(EOFError):
        while True:
            family, name = connection.recv()
            try:
                result = examine(family, name)
            except Exception as error:  # whatever goes wrong belongs into the table
                result = Result(family, name, error=f'{type(error).__name__}: {error}')
            connection.send(result)


class Worker:
    """A process that examines one architecture at a time, and is replaced if it dies or hangs."""

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout
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
        self.connection.send(task)

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


def examine_all(tasks: Sequence[tuple[str, str]], *, workers: int, timeout: float) -> Iterator[Result]:
    """Examine architectures, in no particular order."""
    waiting = list(reversed(tasks))
    crew = [Worker(timeout) for _ in range(min(workers, len(tasks)))]
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
