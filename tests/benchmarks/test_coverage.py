"""The benchmark that traces every architecture, on three small ones and in its own processes."""

from __future__ import annotations

import csv
import dataclasses
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch

from timm_ghn import GHNConfig, plan_parameters, trace

FOLDER = Path(__file__).resolve().parents[2] / 'benchmarks'
CONFIG = GHNConfig(hid=16, max_shape=(16, 16, 7, 7), num_classes=1000, layers=2, heads=4)


def run(out: Path, *options: str) -> list[dict[str, str]]:
    command = [sys.executable, FOLDER / 'coverage.py', '--filter', 'test_convnext*', '--limit', '3', '--out', out]
    subprocess.run([*command, '--workers', '1', *options], check=True, capture_output=True, text=True)
    (table,) = out.glob('coverage-*.csv')
    with table.open(newline='', encoding='utf-8') as file:
        return list(csv.DictReader(file))


def test_each_architecture_has_a_row_and_is_examined_once(tmp_path):
    first = timm.list_models('test_convnext*')[:3]
    rows = run(tmp_path)
    assert [row['architecture'] for row in rows] == first
    for row in rows:
        assert row['family'] == 'convnext'
        assert row['rules'] == 'operators'
        assert row['error'] == row['flaws'] == ''
        assert int(row['nodes']) <= int(row['edges'])
        assert row['% predicted or kept for what they are'] == '100.00'
    # A second run goes on from what is there: nothing is left to do, and the table is the same.
    log = tmp_path / 'coverage.jsonl'
    before = log.read_text(encoding='utf-8')
    assert sorted(json.loads(line)['architecture'] for line in before.splitlines()) == first
    assert run(tmp_path) == rows
    assert log.read_text(encoding='utf-8') == before
    (summary,) = tmp_path.glob('coverage-*.md')
    text = summary.read_text(encoding='utf-8')
    assert f'{len(rows)} architectures in 1 families, 0 with an error' in text
    assert f'0 architectures have the published graph, {len(rows)} the one by the operators' in text


@pytest.fixture
def checks(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module('graph_checks')


@pytest.mark.parametrize('name', ['test_vit', 'test_efficientnet'])
def test_a_right_graph_has_no_flaw(checks, name):
    with torch.device('meta'):
        model = timm.create_model(name)
    assert checks.flaws_of(model, plan_parameters(trace(model), CONFIG, head='predict')) == []


def test_a_parameter_that_the_plan_lacks_and_a_wrong_graph_are_found(checks):
    with torch.device('meta'):
        model, other = timm.create_model('test_vit'), timm.create_model('test_vit', num_classes=0)
    assert 'the plan does not list each parameter once' in checks.flaws_of(
        model, plan_parameters(trace(other), CONFIG, head='predict')
    )
    graph = trace(model)
    backwards = dataclasses.replace(graph, edges_E2=graph.edges_E2.flip(1))
    found = checks.flaws_of(model, plan_parameters(backwards, CONFIG, head='predict'))
    assert any('not reached from the input' in flaw for flaw in found)


def test_a_worker_that_hangs_is_replaced(tmp_path):
    rows = run(tmp_path, '--timeout', '0')
    assert [row['error'] for row in rows] == ['not done after 0 s'] * 3
