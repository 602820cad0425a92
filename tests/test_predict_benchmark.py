"""The benchmark runs and reports what it measured; nothing here looks at the numbers."""

import runpy
import shlex
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / 'benchmarks' / 'predict.py'


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPT.parent)
    return runpy.run_path(str(SCRIPT))


def test_tables_of_every_part_are_written(benchmark, tmp_path, capsys):
    out = tmp_path / 'tables.md'
    other = f'{sys.executable} -c {shlex.quote("import sys; print(sys.argv[1:]); print(12.5)")}'
    parts = ['speed', 'memory', 'load', 'imports']
    options = ['--ghn', 'ghn_tiny', '--networks', 'test_resnet', '--repeat', '1', '--device', 'cpu']
    benchmark['main']([*options, '--parts', *parts, '--compare', other, '--out', str(out)])
    text = out.read_text()
    for title in ('speed, milliseconds and share', 'memory of a prediction', 'loading', 'Import of timm_ghn beyond'):
        assert title in text
    rows = [line for line in text.splitlines() if line.startswith('| test_resnet')]
    assert len(rows) == 2
    assert '12.5' in rows[0]
    assert text.strip() == capsys.readouterr().out.strip()


def test_seconds_alone_are_one_number(benchmark, capsys):
    benchmark['main'](['--seconds', 'ghn_tiny', 'test_resnet', '--repeat', '1', '--device', 'cpu'])
    assert float(capsys.readouterr().out) > 0
