"""The benchmark runs and reports what it measured; nothing here looks at the numbers."""

import pytest
import torch

from timm_ghn import trace
from timm_ghn.graph.graph import GraphBatch


@pytest.fixture
def benchmark(script):
    return script('scatter')


def test_tables_of_both_parts_are_written(benchmark, tmp_path, capsys):
    out = tmp_path / 'tables.md'
    options = ['--graphs', '1', '2', '--edges', '50', '--features', '3', '--budget', '0', '--repeat', '1']
    benchmark.main([*options, '--device', 'cpu', '--out', str(out)])
    text = out.read_text()
    for title in ('Sum, forward', 'Sum with gradients', 'Passes of GHN-2'):
        assert f'## {title}' in text
    assert (
        sum(line.startswith(('| 1 timm model ', '| 2 timm models ', '| random ')) for line in text.splitlines()) == 10
    )
    assert 'Left out: triton needs a GPU' in text or torch.cuda.is_available()
    assert text.strip() == capsys.readouterr().out.strip()


def test_what_is_compared_is_the_same(benchmark):
    """Node by node and level by level the results are equal, so that their times can be compared."""
    import timm

    graph = trace(timm.create_model('test_resnet'))
    network = benchmark.ghn_of('ghn2', torch.device('cpu')).gnn
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x = torch.randn(len(graph), 32)
    visits = benchmark.visits_of(graph, torch.device('cpu'))
    expected = benchmark.node_by_node(network, graph, x, visits)
    assert torch.allclose(network(x, GraphBatch.of(graph)), expected, rtol=0, atol=1e-4)
    assert not torch.allclose(x, expected, atol=1e-1)


def test_the_bytes_of_a_sum_are_counted(benchmark):
    """Two edges, one target, four float32 features: 2 (16 + 4 + 8) + (16 + 8) bytes."""
    edges, bare = benchmark.of_chance(10, torch.device('cpu'))
    edges = type(edges)(edges.source_E[:2], torch.tensor([0, 2]), 1, edges.weight_E[:2])
    problem = benchmark.Problem('two', edges, bare, 4, torch.float32)

    class Copies:
        device = torch.device('cpu')

        def least(self, action, repeat):
            return 2.0**29  # seconds for twice 2 ** 28 bytes: a byte in a second

    shares = benchmark.roofline(problem, {'bag': 80.0, 'auto': 160.0}, Copies())
    assert [share for share in shares if share] == ['100%', '50%']
