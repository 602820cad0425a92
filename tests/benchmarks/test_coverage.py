"""The benchmark that traces every architecture: on one, in a worker process."""

from __future__ import annotations

import csv
import dataclasses
import json

import pytest
import timm
import torch

from timm_ghn import GHNConfig, plan_parameters, trace

CONFIG = GHNConfig(hid=16, max_shape=(16, 16, 7, 7), num_classes=1000, layers=2, heads=4)


@pytest.fixture
def run(script, tmp_path):
    """Run the script on one architecture: the rows of its table."""

    def run_on_one(*options: str) -> list[dict[str, str]]:
        script('coverage').main(
            ['--filter', 'test_convnext', '--out', str(tmp_path), '--workers', '1', *options],
        )
        (table,) = tmp_path.glob('coverage-*.csv')
        with table.open(newline='', encoding='utf-8') as file:
            return list(csv.DictReader(file))

    return run_on_one


def test_an_architecture_has_a_row_and_is_examined_once(run, tmp_path):
    (row,) = rows = run()
    assert (row['architecture'], row['family'], row['rules']) == ('test_convnext', 'convnext', 'operators')
    assert row['error'] == row['flaws'] == ''
    assert int(row['nodes']) <= int(row['edges'])
    assert row['% predicted or kept for what they are'] == '100.00'
    # A second run goes on from what is there: nothing is left to do, and the table is the same.
    log = tmp_path / 'coverage.jsonl'
    before = log.read_text(encoding='utf-8')
    assert [json.loads(line)['architecture'] for line in before.splitlines()] == ['test_convnext']
    assert run() == rows
    assert log.read_text(encoding='utf-8') == before
    (summary,) = tmp_path.glob('coverage-*.md')
    text = summary.read_text(encoding='utf-8')
    assert '1 architectures in 1 families, 0 with an error' in text
    assert '0 architectures have the published graph, 1 the one by the operators' in text


def test_a_worker_that_hangs_is_replaced(run):
    assert [row['error'] for row in run('--timeout', '0')] == ['not done after 0 s']


def test_right_graphs_have_no_flaw_and_wrong_ones_have(script):
    flaws_of = script('graph_checks').flaws_of
    with torch.device('meta'):
        model, other = timm.create_model('test_vit'), timm.create_model('test_vit', num_classes=0)
    graph = trace(model)
    assert flaws_of(model, plan_parameters(graph, CONFIG, head='predict')) == []
    incomplete = plan_parameters(trace(other), CONFIG, head='predict')
    assert 'the plan does not list each parameter once' in flaws_of(model, incomplete)
    backwards = dataclasses.replace(graph, edges_E2=graph.edges_E2.flip(1))
    found = flaws_of(model, plan_parameters(backwards, CONFIG, head='predict'))
    assert any('not reached from the input' in flaw for flaw in found)
