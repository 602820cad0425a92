"""The command line: what it prints, what it writes, and how it fails."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import timm_ghn
from timm_ghn import PostProcess
from timm_ghn.cli import main as cli
from timm_ghn.cli.runs import log_to_stderr
from timm_ghn.errors import GHNNotFoundError
from timm_ghn.hub import load
from timm_ghn.hub.catalogue import EMBEDDED
from timm_ghn.prediction.postprocess import NAMED

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _embedded_is_the_default(monkeypatch):
    monkeypatch.setenv('TIMM_GHN_DEFAULT', EMBEDDED)


@pytest.fixture
def run(call_cli, monkeypatch, tmp_path):
    """Run a command in an empty folder: exit code, standard output, standard error."""
    monkeypatch.chdir(tmp_path)
    return call_cli


@pytest.mark.parametrize('choice', [*NAMED, None])
def test_predict_writes_what_plain_timm_reads_post_processed_as_asked_and_else_not(run, tmp_path, choice):
    asked = '' if choice is None else f'--postprocess {choice}'
    code, out, err = run(f'predict test_resnet --num-classes 10 --seed 3 {asked} -o out.safetensors')
    assert (code, err) == (0, '')
    torch.manual_seed(3)
    expected = timm.create_model('test_resnet', num_classes=10)
    timm_ghn.ghn_init(expected, EMBEDDED, seed=3, postprocess=choice or 'none')
    read = timm.create_model('test_resnet', num_classes=10, checkpoint_path='out.safetensors')
    for (name, tensor), other in zip(expected.state_dict().items(), read.state_dict().values(), strict=True):
        assert torch.equal(tensor, other), name
    assert "timm.create_model('test_resnet', num_classes=10, checkpoint_path='out.safetensors')" in out
    assert os.listdir(tmp_path) == ['out.safetensors']
    with safe_open('out.safetensors', framework='pt') as file:
        written = json.loads(file.metadata()['provenance'])['postprocess']
    resolved = PostProcess.of(choice or 'none', seed=3, auto=timm_ghn.load_ghn(EMBEDDED).config.postprocess)
    assert written == (resolved.to_dict() if resolved else None)


def test_diversity_compares_predicted_post_processed_and_random_weights(run, tmp_path):
    code, out, err = run('inspect test_resnet --diversity --postprocess orth')
    assert (code, err) == (0, '')
    table = out.split('\n\n')[0].splitlines()[2:]
    code, out, _ = run('inspect test_resnet --postprocess orth --json --diversity --plot out.png')
    assert code == 0
    answer = json.loads(out)
    assert answer['postprocess'] == NAMED['orth'].to_dict()
    assert len(answer['diversity']) == len(table) > 1
    assert [line.split()[1] for line in table] == [layer['name'] for layer in answer['diversity']]
    marked = [line.split()[0].endswith('*') for line in table]
    assert marked == [layer['processed'] for layer in answer['diversity']]
    assert True in marked
    for layer in answer['diversity']:
        assert (layer['predicted'] != layer['postprocessed']) is layer['processed']
        assert layer['predicted'] != layer['random']
    assert (tmp_path / 'out.png').read_bytes().startswith(b'\x89PNG')


@pytest.fixture
def no_matplotlib(monkeypatch):
    for name in list(sys.modules):
        if name.startswith(('timm_ghn.plots', 'timm_ghn.drawing', 'matplotlib.')):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, 'matplotlib', None)


def test_a_plot_needs_matplotlib_and_a_page_does_not(run, no_matplotlib):
    for option in ('', '--diversity'):
        code, out, err = run(f'inspect test_resnet {option} --plot out.png')
        assert (code, out) == (2, '')
        assert 'pip install matplotlib' in err
        assert not os.listdir()
    code, _, err = run('inspect test_resnet --plot out.html')
    assert (code, err) == (0, '')
    assert os.listdir() == ['out.html']


def test_inspect_draws_the_graph_beside_the_plan(run, tmp_path):
    _, plan, _ = run('inspect test_resnet')
    code, out, err = run('inspect test_resnet --plot graph.html --virtual-edges 3')
    assert (code, out, err) == (0, plan, '')
    graph = timm_ghn.trace(timm.create_model('test_resnet'), rules=timm_ghn.load_ghn(EMBEDDED).config.rules)
    assert f'test_resnet: {len(graph)} nodes, {len(graph.edges_E2)} edges' in (tmp_path / 'graph.html').read_text()


def test_the_header_and_the_json_say_where_the_weights_come_from(run):
    code, out, _ = run('predict test_resnet --in-chans 1 --img-size 64 --head keep -o out.safetensors --json')
    assert code == 0
    with safe_open('out.safetensors', framework='pt') as file:
        header = file.metadata()
    provenance = json.loads(header['provenance'])
    assert (header['architecture'], header['in_chans']) == ('test_resnet', '1')
    assert (provenance['ghn'], provenance['input_size'], provenance['head']) == (EMBEDDED, [1, 64, 64], 'keep')
    assert len(provenance['origin']['sha256']) == 64
    expected = {'file': 'out.safetensors', 'architecture': 'test_resnet', 'in_chans': 1, 'provenance': provenance}
    assert json.loads(out) == expected


def test_a_model_of_fixed_size_is_built_for_the_size_that_is_asked_for(run):
    code, out, _ = run('predict test_vit --img-size 192 -o out.safetensors')
    assert code == 0
    assert "timm.create_model('test_vit', img_size=192, checkpoint_path='out.safetensors')" in out
    expected = timm.create_model('test_vit', img_size=192).pos_embed.shape
    assert load_file('out.safetensors')['pos_embed'].shape == expected


def test_inspect_shows_each_parameter_once(run):
    code, out, err = run('inspect test_vit')
    assert (code, err) == (0, '')
    table, totals = (part.splitlines()[1:] for part in out.split('\n\n'))
    parameters = dict(timm.create_model('test_vit').named_parameters())
    assert [line.split()[0] for line in table] == list(parameters)
    tensors, elements = totals[-1].replace(',', '').split()[:2]
    assert (int(tensors), int(elements)) == (len(parameters), sum(p.numel() for p in parameters.values()))
    counts = [int(line.replace(',', '').split()[0]) for line in totals[:-1]]
    assert sum(counts) == len(parameters)


ERRORS = {
    'unknown command': 'predicted',
    'unknown model': 'inspect resnet51',
    'tag that names a GHN': f'inspect resnet50.{EMBEDDED}',
    'unknown GHN': 'inspect test_resnet --ghn ghn3_tm9',
    'damaged GHN file': 'inspect test_resnet --ghn damaged.pt',
    'option that the model refuses': 'inspect test_vit --img-size 7',
    'a digit that is no number': 'inspect test_resnet --num-classes ²',
    'a side that cannot be meant': 'inspect test_resnet --img-size 1000000000',
    'classes that no memory holds': f'predict test_resnet --num-classes {10**17} -o out.safetensors',
    'no output': 'predict test_resnet',
    'other kind of file': 'predict test_resnet -o out.pt',
    'no such folder': 'predict test_resnet -o nothing/out.safetensors',
    'unknown post-processing': 'predict test_resnet -o out.safetensors --postprocess maybe',
    'other kind of picture': 'inspect test_resnet --plot out.jpg',
    'virtual edges of no picture': 'inspect test_resnet --virtual-edges 2',
    'GHN without published norms': f'verify {EMBEDDED}',
    'network without a published norm': 'verify ghn2 --arch resnet51',
    'unknown device': 'predict test_resnet -o out.safetensors --device gpu',
    'device that is not there': 'predict test_resnet -o out.safetensors --device cuda:77',
    'other kind of file for the numbers': 'evaluate --dataset x --json out.txt',
}


@pytest.mark.parametrize('line', ERRORS.values(), ids=ERRORS.keys())
def test_an_error_is_one_line_and_exit_code_2(run, tmp_path, line):
    (tmp_path / 'damaged.pt').write_bytes(b'\x80\x04nonsense')
    before = sorted(os.listdir(tmp_path))
    code, out, err = run(line)
    assert (code, out, err.count('\n')) == (2, '', 1)
    assert re.match('timm-ghn: error: .', err)
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.filterwarnings('default')
def test_a_warning_is_one_line_too(run, monkeypatch):
    def unreachable(*_, **__):
        raise GHNNotFoundError('the Hub cannot be reached')

    monkeypatch.setattr(load, 'fetch', unreachable)
    monkeypatch.delenv('TIMM_GHN_DEFAULT')
    code, out, err = run('inspect test_resnet')
    assert code == 0
    assert err.startswith('timm-ghn: warning: ')
    assert 'the Hub cannot be reached' in err
    assert err.count('\n') == 1
    assert 'warning' not in out


@pytest.mark.parametrize('command', ['', *cli.COMMANDS])
def test_help_has_an_example(run, command):
    code, out, _ = run(f'{command} --help')
    assert code == 0
    assert f'timm-ghn {command}'.strip() in out
    assert 'example' in out


def test_every_command_of_the_readme_and_the_pages_is_understood():
    lines = [
        line.split('#')[0]
        for path in (ROOT / 'README.md', *(ROOT / 'docs').glob('*.md'))
        for line in path.read_text(encoding='utf-8').splitlines()
        if line.startswith('timm-ghn ')
    ]
    assert len(lines) >= 20
    for line in [*lines, *(f'timm-ghn {name} {words}' for name, (_, words, _) in cli.COMMANDS.items())]:
        arguments = shlex.split(line)[1:]
        cli.build_parser(arguments).parse_args(arguments)


#: The console script.
SCRIPT = [sys.executable, '-c', 'import sys, timm_ghn_command; sys.exit(timm_ghn_command.main())']
MODULE = [sys.executable, '-m', 'timm_ghn']


def test_help_and_version_import_no_torch():
    code = (
        'import contextlib, sys, timm_ghn_command\n'
        'with contextlib.suppress(SystemExit):\n    timm_ghn_command.main()\n'
        "print({'torch', 'timm', 'numpy'} & set(sys.modules), 'timm_ghn.cli.main' in sys.modules)"
    )
    for option in ('--help', '--version'):
        run = subprocess.run([sys.executable, '-c', code, option], capture_output=True, text=True, check=True)
        assert run.stdout.endswith('set() True\n')


def test_the_script_imports_the_package_for_a_command():
    code = (
        'import sys, timm_ghn_command\nassert timm_ghn_command.main() == 0\n'
        'import timm, timm_ghn\nassert timm_ghn.predict\n'
        f"timm.create_model('test_resnet.{EMBEDDED}')"
    )
    run = subprocess.run([sys.executable, '-c', code, 'list'], capture_output=True, text=True, check=True)
    assert EMBEDDED in run.stdout


def test_a_reader_that_has_enough_is_no_error():
    with subprocess.Popen([*SCRIPT, '--help'], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b''
    assert process.returncode == 0


@pytest.mark.parametrize('command', [SCRIPT, MODULE], ids=['script', 'module'])
def test_an_interrupt_while_the_package_is_imported_is_one_line(tmp_path, command):
    (tmp_path / 'torch.py').write_text('raise KeyboardInterrupt')  # as Ctrl-C while it is imported
    paths = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    environment = {**os.environ, 'PYTHONPATH': paths}
    done = subprocess.run([*command, 'list'], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode in (130, -signal.SIGINT)
    assert done.stderr == 'timm-ghn: error: interrupted\n'


def test_no_text_of_a_file_commands_the_terminal(run, tmp_path):
    hostile = '\x1b]0;owned\x07\x1b[2J\r| a |\n'
    ghn = timm_ghn.load_ghn(EMBEDDED)
    ghn.config = dataclasses.replace(ghn.config, name=hostile, postprocess='none')
    timm_ghn.save_ghn(ghn, tmp_path / 'ghn')
    save_file({'a': torch.zeros(1)}, 'odd.safetensors', {'architecture': hostile, 'provenance': '{}'})
    (tmp_path / 'bad').mkdir()
    (tmp_path / 'bad' / 'config.json').write_text(json.dumps({hostile: 1}))
    (tmp_path / 'bad' / 'model.safetensors').touch()
    lines = {
        'inspect test_resnet --ghn ./ghn --json': 0,
        'inspect test_resnet --ghn ./ghn --diversity --plot out.png': 0,
        'predict test_resnet --ghn ./ghn -o out.safetensors': 0,
        'push odd.safetensors user/name': 2,
        'inspect test_resnet --ghn ./bad': 2,
    }
    for line, expected in lines.items():
        code, out, err = run(line)
        assert code == expected, (line, err)
        for shown in (out, err):
            assert not set('\x1b\x07\r') & set(shown), line


def test_what_a_run_logs_is_printable(capsys):
    with log_to_stderr():
        logging.getLogger('timm_ghn.finetune').info('epoch %d of %s', 1, '\x1b[2Jdata\nset')
    assert capsys.readouterr().err == 'epoch 1 of \\x1b[2Jdata set\n'


def test_a_token_is_not_repeated(run):
    secret = 'hf_' + 'a1B2' * 8
    for line in (f'push out.safetensors {secret}', f'inspect {secret}', f'inspect test_resnet --ghn {secret}'):
        code, out, err = run(line)
        assert (code, out) == (2, '')
        assert secret not in err
        assert err.count('\n') == 1


def test_bash_completes_commands_options_and_files(run, tmp_path):
    code, script, err = run('completion bash')
    assert (code, err) == (0, '')
    assert all(word in script for word in (*cli.COMMANDS, 'virtual-edges', 'shots', 'meta-batch', 'max-params'))
    (tmp_path / 'script').write_text(script)
    (tmp_path / 'recipe.yaml').touch()
    asked = {'insp': 'inspect', 'inspect --virt': '--virtual-edges', 'finetune --shots-': '--shots-seed'}
    asked |= {'train --config rec': 'recipe.yaml', 'inspect --head pre': 'predict'}
    for line, expected in asked.items():
        words = ['timm-ghn', *line.split()]
        code = (
            f'source ./script; COMP_WORDS=({shlex.join(words)}); COMP_CWORD={len(words) - 1}; '
            f'$(complete -p timm-ghn | sed "s/.*-F //; s/ .*//") timm-ghn {words[-1]} {words[-2]}; '
            'echo ${COMPREPLY[@]}'
        )
        done = subprocess.run(['bash', '-c', code], capture_output=True, text=True, check=True, cwd=tmp_path)
        assert done.stdout == f'{expected}\n', line
