"""Small GHNs of every kind and random graphs to run them on."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from variants import VARIANTS

from timm_ghn.graph.graph import Graph, Node
from timm_ghn.graph.primitives import Primitive
from timm_ghn.nn import GHN, GHNConfig


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS.keys())
def config(request: pytest.FixtureRequest) -> GHNConfig:
    return request.param


@pytest.fixture
def make_ghn() -> Callable[..., GHN]:
    """A GHN in float64 with random weights; biases too, so that a forgotten one shows."""

    def make(config: GHNConfig, seed: int = 0) -> GHN:
        torch.manual_seed(seed)
        ghn = GHN(config).double()
        with torch.no_grad():
            for name, parameter in ghn.named_parameters():
                if name.endswith(('bias', 'bias_ih', 'bias_hh')):
                    parameter.normal_(std=0.5)
        return ghn

    return make


@pytest.fixture
def make_graph() -> Callable[..., Graph]:
    """A random acyclic graph whose nodes are in a topological order; the start is any node."""

    def make(size: int, seed: int = 0) -> Graph:
        rng = random.Random(1000 * size + seed)
        edges = {(rng.randrange(max(0, v - 3), v), v) for v in range(1, size)}
        edges |= {tuple(sorted(rng.sample(range(size), 2))) for _ in range(size // 2)} if size > 1 else set()
        channels = (1, 2, 3, 5, 9, 12, 16, 30, 64, 72, 100, 1000, 4097, 9000)
        nodes = tuple(
            Node(
                rng.choice(list(Primitive)),
                f'node{v}',
                shape=None
                if rng.random() < 0.3
                else (rng.choice(channels), rng.choice(channels), rng.randint(1, 20), rng.randint(1, 20)),
            )
            for v in range(size)
        )
        return Graph(
            nodes=nodes,
            edges_E2=torch.tensor(sorted(edges), dtype=torch.int64).view(-1, 2),
            start=rng.randrange(size),
            class_weights=(),
            class_biases=(),
            classifier=(),
            parameters=(),
            kept={},
            input_size=(3, 32, 32),
            num_classes=None,
            rules='published',
        )

    return make
