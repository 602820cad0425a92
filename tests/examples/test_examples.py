"""Every example runs, on small settings, offline, and says what it promises."""

from __future__ import annotations

import json
import runpy
import sys
import types
from pathlib import Path

import pytest
from pictures import make_dataset, save_dataset

EXAMPLES = Path(__file__).resolve().parents[2] / 'examples'
#: Run elsewhere: by `make demo`, and by test_space.py.
ELSEWHERE = {'demo.py', 'space/app.py'}

CASES = {
    'quickstart.py': ('test_resnet', ['42 nodes, 45 edges', 'predicted, of 42 nodes', 'output: (8, 10)']),
    'custom_module.py': ('', ['temperature', 'kept: layer scale or gain', 'output: (4, 10)']),
    'channels.py': ('test_convnext', [' 1 channels: stem (24, 1, 4, 4)', '12 channels: stem (24, 12, 4, 4)']),
    'train_ghn.py': ('4', ['my-ghn', 'parameters, predicted']),
    'plug_in_gnn.py': ('4 colours', ['neighbours', 'resnet10t by a GHN with neighbours', 'predicted, of']),
    'push_and_reload.py': ('user/test_resnet test_resnet', ['user/test_resnet/commit/', 'every tensor is the same']),
}


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """Run a script as Python does, in an empty folder: what it prints."""
    monkeypatch.chdir(tmp_path)

    def call(name, line=''):
        monkeypatch.setattr(sys, 'argv', [name, *line.split()])
        runpy.run_path(str(EXAMPLES / name), run_name='__main__')
        return capsys.readouterr().out

    return call


def test_every_example_is_run_and_named():
    found = {path.relative_to(EXAMPLES).as_posix() for path in EXAMPLES.rglob('*.py')}
    assert found == {*CASES, *ELSEWHERE}
    readme = (EXAMPLES / 'README.md').read_text()
    assert all(f']({path.name}' in readme for path in EXAMPLES.iterdir() if path.name != 'README.md')


@pytest.mark.filterwarnings('ignore:Use .content=:DeprecationWarning')  # of huggingface_hub
@pytest.mark.parametrize('name', CASES)
def test_an_example_runs(name, run, hub, tmp_path, monkeypatch):
    monkeypatch.setenv('HF_TOKEN', 'hf_writer')
    save_dataset(tmp_path / 'colours', make_dataset(120), make_dataset(40, seed=1))
    line, expected = CASES[name]
    out = run(name, line)
    for text in expected:
        assert text in out


def test_the_notebook_is_valid_and_its_cells_run(monkeypatch, tmp_path, capsys):
    notebook = json.loads((EXAMPLES / 'quickstart.ipynb').read_text())
    assert (notebook['nbformat'], notebook['nbformat_minor']) == (4, 5)
    assert len({cell['id'] for cell in notebook['cells']}) == len(notebook['cells'])
    code = [cell for cell in notebook['cells'] if cell['cell_type'] == 'code']
    assert all(cell['outputs'] == [] and cell['execution_count'] is None for cell in code), 'kept without outputs'
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, 'IPython.display', types.SimpleNamespace(Image=Path))
    small = {"name = 'resnet18'": "name = 'test_resnet'", 'steps = 40': 'steps = 2'}
    names = {}
    for cell in code:
        text = ''.join(cell['source'])
        for before in [line for line in small if line in text]:
            text = text.replace(before, small.pop(before))
        exec(compile(text, cell['id'], 'exec'), names)
    assert not small
    assert (tmp_path / 'graph.png').stat().st_size > 10_000
    assert 'test_resnet.ghn_tiny: ' in capsys.readouterr().out
