"""The command line: what it prints, what it writes, and how it fails."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import timm_ghn
from timm_ghn import PostProcess
from timm_ghn.analysis import norms
from timm_ghn.cli import main as cli
from timm_ghn.cli.tables import aligned
from timm_ghn.errors import GHNNotFoundError
from timm_ghn.hub import load
from timm_ghn.hub.catalogue import EMBEDDED, known_ghns
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


def test_list_names_every_ghn_of_the_catalogue(run):
    code, out, err = run('list')
    assert (code, err) == (0, '')
    assert [line.split()[0] for line in out.splitlines()[2:]] == list(known_ghns())


def test_list_as_json_is_the_catalogue(run):
    code, out, _ = run('list --json')
    assert code == 0
    assert {name: entry['config']['hid'] for name, entry in json.loads(out).items()} == {
        name: entry.config.hid for name, entry in known_ghns().items()
    }


@pytest.mark.parametrize('ghn_recommends', ['orth', 'none'])
def test_predict_writes_the_raw_prediction_as_in_python(run, tmp_path, ghn_recommends):
    ghn = timm_ghn.load_ghn(EMBEDDED)
    ghn.config = dataclasses.replace(ghn.config, postprocess=ghn_recommends)
    timm_ghn.save_ghn(ghn, tmp_path / 'ghn')
    code, out, err = run('predict test_resnet --ghn ./ghn --seed 3 -o out.safetensors')
    assert (code, err) == (0, '')
    torch.manual_seed(3)
    prediction = timm_ghn.predict(timm.create_model('test_resnet'), './ghn', seed=3)
    read = load_file('out.safetensors')
    assert all(torch.equal(tensor, read[name]) for name, tensor in prediction.state_dict.items())
    with safe_open('out.safetensors', framework='pt') as file:
        assert json.loads(file.metadata()['provenance']) == prediction.provenance
    assert prediction.provenance['postprocess'] is None
    assert 'post-processing: none: as predicted; --postprocess auto' in out


def test_predict_writes_what_plain_timm_reads(run, tmp_path):
    code, out, err = run('predict test_resnet --num-classes 10 --seed 3 --postprocess auto -o out.safetensors')
    assert (code, err) == (0, '')
    torch.manual_seed(3)
    expected = timm.create_model('test_resnet', num_classes=10)
    timm_ghn.ghn_init(expected, EMBEDDED, seed=3)
    read = timm.create_model('test_resnet', num_classes=10, checkpoint_path='out.safetensors')
    for (name, tensor), other in zip(expected.state_dict().items(), read.state_dict().values(), strict=True):
        assert torch.equal(tensor, other), name
    assert "timm.create_model('test_resnet', num_classes=10, checkpoint_path='out.safetensors')" in out
    assert os.listdir(tmp_path) == ['out.safetensors']


@pytest.mark.parametrize('choice', ['noise', 'none', 'orth', 'auto'])
def test_predict_post_processes_as_asked(run, choice):
    code, out, _ = run(f'predict test_vit --seed 3 --postprocess {choice} -o out.safetensors --json')
    assert code == 0
    torch.manual_seed(3)
    expected = timm.create_model('test_vit')
    timm_ghn.ghn_init(expected, EMBEDDED, seed=3, postprocess=choice)
    read = load_file('out.safetensors')
    assert all(torch.equal(tensor, read[name]) for name, tensor in expected.state_dict().items())
    resolved = PostProcess.of(choice, seed=3, auto=timm_ghn.load_ghn(EMBEDDED).config.postprocess)
    assert json.loads(out)['provenance']['postprocess'] == (resolved.to_dict() if resolved else None)


def test_the_command_line_knows_every_named_post_processing():
    args = ['predict', 'test_vit', '-o', 'out.safetensors']
    for name in (*NAMED, 'none', 'auto'):
        assert cli._parser().parse_args([*args, '--postprocess', name]).postprocess == name


def test_diversity_compares_predicted_post_processed_and_random_weights(run, tmp_path):
    code, out, err = run('inspect test_resnet --diversity --postprocess orth')
    assert (code, err) == (0, '')
    table = out.split('\n\n')[0].splitlines()[2:]
    code, out, _ = run('inspect test_resnet --postprocess orth --json --plot out.png')
    assert code == 0, '--plot implies --diversity'
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


def test_diversity_follows_the_choice_of_post_processing(run):
    _, out, _ = run('inspect test_resnet --diversity --postprocess none --json')
    answer = json.loads(out)
    assert answer['postprocess'] is None
    assert all(layer['predicted'] == layer['postprocessed'] for layer in answer['diversity'])


def test_a_plot_without_matplotlib_says_what_to_install(run, monkeypatch):
    monkeypatch.setitem(sys.modules, 'matplotlib.figure', None)
    monkeypatch.delitem(sys.modules, 'timm_ghn.plots', raising=False)
    code, out, err = run('inspect test_resnet --plot out.png')
    assert (code, out) == (2, '')
    assert 'pip install matplotlib' in err
    assert not os.listdir()


def test_the_header_says_where_the_weights_come_from(run):
    run('predict test_resnet --in-chans 1 --img-size 64 --head keep -o out.safetensors')
    with safe_open('out.safetensors', framework='pt') as file:
        header = file.metadata()
    provenance = json.loads(header['provenance'])
    assert header['architecture'] == 'test_resnet'
    assert header['in_chans'] == '1'
    assert provenance['ghn'] == EMBEDDED
    assert provenance['input_size'] == [1, 64, 64]
    assert provenance['head'] == 'keep'
    assert len(provenance['origin']['sha256']) == 64


def test_predict_is_repeatable_and_replaces_the_file(run):
    def tensors(options: str) -> dict[str, torch.Tensor]:
        assert run(f'predict test_vit {options} -o out.safetensors')[0] == 0
        return {name: tensor.clone() for name, tensor in load_file('out.safetensors').items()}

    first, second, other = tensors(''), tensors(''), tensors('--seed 1')
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    assert not all(torch.equal(tensor, other[name]) for name, tensor in first.items())


def test_predict_as_json_repeats_the_provenance(run):
    code, out, _ = run('predict test_resnet --num-classes 7 -o out.safetensors --json')
    answer = json.loads(out)
    assert code == 0
    assert (answer['architecture'], answer['num_classes'], answer['file']) == ('test_resnet', 7, 'out.safetensors')
    assert answer['provenance']['predicted_tensors'] < answer['provenance']['tensors']


def test_a_model_of_fixed_size_is_built_for_the_size_that_is_asked_for(run):
    code, out, _ = run('predict test_vit --img-size 192 -o out.safetensors')
    assert code == 0
    assert "timm.create_model('test_vit', img_size=192, checkpoint_path='out.safetensors')" in out
    expected = timm.create_model('test_vit', img_size=192).pos_embed.shape
    assert load_file('out.safetensors')['pos_embed'].shape == expected


def test_a_failed_write_leaves_the_old_file(run, tmp_path, monkeypatch):
    path = tmp_path / 'out.safetensors'
    path.write_text('old')

    def fail(tensors, part, metadata):
        part.write_text('half')
        raise OSError('no space left on device')

    monkeypatch.setattr('timm_ghn.files.save_file', fail)
    code, _, err = run('predict test_resnet -o out.safetensors')
    assert (code, err) == (2, 'timm-ghn: error: no space left on device\n')
    assert path.read_text() == 'old'
    assert os.listdir(tmp_path) == ['out.safetensors']


@pytest.mark.parametrize('model', ['test_resnet', 'test_vit', 'test_convnext'])
def test_inspect_shows_each_parameter_once(run, model):
    code, out, err = run(f'inspect {model}')
    assert (code, err) == (0, '')
    table, totals = (part.splitlines()[2:] for part in out.split('\n\n'))
    parameters = dict(timm.create_model(model).named_parameters())
    assert [line.split()[0] for line in table] == list(parameters)
    tensors, elements = totals[-1].replace(',', '').split()[-2:]
    assert (int(tensors), int(elements)) == (len(parameters), sum(p.numel() for p in parameters.values()))
    counts = [int(line.replace(',', '').split()[-2]) for line in totals[:-1]]
    assert sum(counts) == len(parameters)


def test_inspect_says_why_a_parameter_is_kept(run):
    _, out, _ = run('inspect test_resnet --num-classes 10 --json')
    reasons = {row['name']: row['reason'] for row in json.loads(out)['rows']}
    assert next(iter(reasons.values())) is None
    assert 'classes' in reasons['fc.weight']
    _, out, _ = run('inspect test_resnet --num-classes 10 --head predict --json')
    assert {row['name']: row['reason'] for row in json.loads(out)['rows']}['fc.weight'] is None


ERRORS = {
    'no command': '',
    'unknown command': 'predicted',
    'unknown model': 'inspect resnet51',
    'unknown model, no similar one': 'inspect qqqqqqqq',
    'unknown tag of a model': 'inspect resnet50.nobody',
    'tag that names a GHN': f'inspect resnet50.{EMBEDDED}',
    'model of another library': 'inspect hf-hub:somebody/model',
    'unknown GHN': 'inspect test_resnet --ghn ghn3_tm9',
    'no such GHN file': 'inspect test_resnet --ghn ./nothing.pt',
    'damaged GHN file': 'inspect test_resnet --ghn damaged.pt',
    'option that the model refuses': 'inspect test_vit --img-size 7',
    'not a number': 'inspect test_resnet --num-classes ten',
    'a digit that is no number': 'inspect test_resnet --num-classes ²',
    'a number of too many digits': f'inspect test_resnet --seed 1{"0" * 5000}',
    'a side that cannot be meant': 'inspect test_resnet --img-size 1000000000',
    'a side that cannot be meant, of a fixed size': 'predict test_vit --img-size 1000000000 -o out.safetensors',
    'classes that no memory holds': f'predict test_resnet --num-classes {10**17} -o out.safetensors',
    'classes that are a digit and no number': 'finetune --model test_resnet --dataset x --num-classes ²',
    'negative': 'inspect test_resnet --num-classes -1',
    'zero channels': 'inspect test_resnet --in-chans 0',
    'unknown head': 'inspect test_resnet --head maybe',
    'no output': 'predict test_resnet',
    'other kind of file': 'predict test_resnet -o out.pt',
    'no such folder': 'predict test_resnet -o nothing/out.safetensors',
    'folder': 'predict test_resnet -o folder.safetensors',
    'unknown post-processing': 'predict test_resnet -o out.safetensors --postprocess maybe',
    'other kind of picture': 'inspect test_resnet --plot out.jpg',
    'no such folder for the picture': 'inspect test_resnet --plot nothing/out.png',
    'GHN without published norms': f'verify {EMBEDDED}',
    'unknown GHN to verify': 'verify ghn4',
    'network without a published norm': 'verify ghn2 --arch resnet51',
    'unknown device': 'predict test_resnet -o out.safetensors --device gpu',
    'device without values': 'predict test_resnet -o out.safetensors --device meta',
    'device to evaluate on without values': 'evaluate --dataset x --device meta',
    'device that is not there': 'predict test_resnet -o out.safetensors --device cuda:77',
    'no images to evaluate on': 'evaluate --dataset x --images 0',
    'other kind of file for the numbers': 'evaluate --dataset x --json out.txt',
    'no such folder for the numbers': 'evaluate --dataset x --json nothing/out.json',
    'device to evaluate on that is not there': 'evaluate --dataset x --device cuda:77',
}


@pytest.mark.parametrize('line', ERRORS.values(), ids=ERRORS.keys())
def test_an_error_is_one_line_and_exit_code_2(run, tmp_path, line):
    (tmp_path / 'damaged.pt').write_bytes(b'\x80\x04nonsense')
    (tmp_path / 'folder.safetensors').mkdir()
    before = sorted(os.listdir(tmp_path))
    code, out, err = run(line)
    assert code == 2
    assert out == ''
    assert err.startswith('timm-ghn: error: ')
    assert err.count('\n') == 1
    assert len(err) > len('timm-ghn: error: \n')
    assert sorted(os.listdir(tmp_path)) == before


def test_an_unknown_model_is_answered_with_similar_names(run):
    assert 'did you mean resnet50' in run('inspect resnet_50')[2].replace('?', ' or')


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


@pytest.fixture
def publish(monkeypatch):
    """Let the embedded GHN have published norms."""

    def give(norms: dict[str, float]) -> None:
        entry = dataclasses.replace(known_ghns()[EMBEDDED], norms=norms)
        monkeypatch.setattr('timm_ghn.hub.catalogue.known_ghns', lambda: {EMBEDDED: entry})

    return give


def norm_of(arch: str) -> float:
    """The norm as its authors compute it: of the vector of the parameters' norms."""
    model = torchvision.models.get_model(arch, weights=None)
    timm_ghn.ghn_init(model, EMBEDDED, head='predict', postprocess=None, rules='published')
    return float(torch.linalg.vector_norm(torch.stack([p.detach().norm() for p in model.parameters()])))


def test_verify_passes_where_norms_agree_and_fails_where_one_differs(run, publish):
    published = {arch: norm_of(arch) for arch in ('squeezenet1_1', 'shufflenet_v2_x0_5')}
    publish(published)
    code, out, _ = run(f'verify {EMBEDDED}')
    assert code == 0
    assert '2 of 2 norms agree' in out
    publish({**published, 'squeezenet1_1': published['squeezenet1_1'] + 2 * norms.NORM_TOLERANCE})
    code, out, _ = run(f'verify {EMBEDDED}')
    assert code == 1
    assert '1 of 2 norms agree' in out
    assert [line.split()[0] for line in out.splitlines() if line.endswith('NO')] == ['squeezenet1_1']
    assert run(f'verify {EMBEDDED} --arch shufflenet_v2_x0_5')[0] == 0


def test_a_norm_that_is_not_a_number_does_not_agree(run, publish, monkeypatch):
    publish({'squeezenet1_1': 1.0})
    monkeypatch.setattr(norms, 'predicted_norm', lambda arch, ghn: math.nan)
    assert run(f'verify {EMBEDDED}')[0] == 1


@pytest.mark.parametrize('command', ['', 'list', 'predict', 'inspect', 'finetune', 'verify'])
def test_help_has_an_example(run, command):
    code, out, _ = run(f'{command} --help')
    assert code == 0
    assert f'timm-ghn {command}'.strip() in out
    assert 'example' in out


def test_every_command_of_the_readme_is_understood():
    lines = [
        line.split('#')[0]
        for line in (ROOT / 'README.md').read_text(encoding='utf-8').splitlines()
        if line.startswith('timm-ghn ')
    ]
    assert len(lines) >= 4
    for line in [*lines, *cli._EXAMPLES.values()]:
        arguments = shlex.split(line)[1:]
        cli._parser(arguments).parse_args(arguments)


def test_the_module_is_the_command():
    run = subprocess.run([sys.executable, '-m', 'timm_ghn', '--version'], capture_output=True, text=True, check=True)
    assert run.stdout == f'timm_ghn {timm_ghn.__version__}\n'


def test_a_reader_that_has_enough_is_no_error():
    command = [sys.executable, '-m', 'timm_ghn', 'list', '--json']
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b''
    assert process.returncode == 0


def test_a_reader_of_the_help_that_has_enough_is_no_error():
    command = [sys.executable, '-m', 'timm_ghn', '--help']
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b''
    assert process.returncode == 0


@pytest.mark.skipif(os.name == 'nt', reason='needs a POSIX shell')
@pytest.mark.parametrize(
    ('output', 'message'), [('>&-', 'the standard output is closed'), ('>/dev/full', 'No space left on device')]
)
def test_an_output_that_cannot_be_written_is_one_line(output, message):
    if 'full' in output and not os.path.exists('/dev/full'):
        pytest.skip('there is no /dev/full')
    line = f'exec "$0" -m timm_ghn list {output}'
    done = subprocess.run(['sh', '-c', line, sys.executable], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith('timm-ghn: error: ')
    assert done.stderr.endswith(f'{message}\n')
    assert done.stderr.count('\n') == 1


INTERRUPTED = """
import importlib, re, sys
from pathlib import Path

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == 'torch':
            raise KeyboardInterrupt  # as Ctrl-C while it is imported

sys.meta_path.insert(0, Finder())
declared = re.search(r"^timm-ghn = '(.+):(.+)'", Path(sys.argv[1]).read_text(), flags=re.MULTILINE)
sys.argv[1:] = ['list']
sys.exit(getattr(importlib.import_module(declared[1]), declared[2])())
"""


def test_an_interrupt_while_the_command_is_imported_is_one_line():
    command = [sys.executable, '-c', INTERRUPTED, str(ROOT / 'pyproject.toml')]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (130, 'timm-ghn: error: interrupted\n')


def test_an_interrupt_while_options_are_imported_is_one_line(run, monkeypatch):
    def interrupted(command):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, '_run_options', interrupted)
    assert run('finetune --help') == (130, '', 'timm-ghn: error: interrupted\n')


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
        'inspect test_resnet --ghn ./ghn --plot out.png': 0,
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
    with cli._told():
        logging.getLogger('timm_ghn.finetune').info('epoch %d of %s', 1, '\x1b[2Jdata\nset')
    assert capsys.readouterr().err == 'epoch 1 of \\x1b[2Jdata set\n'


def test_a_token_is_not_repeated(run):
    secret = 'hf_' + 'a1B2' * 8
    for line in (f'push out.safetensors {secret}', f'inspect {secret}', f'inspect test_resnet --ghn {secret}'):
        code, out, err = run(line)
        assert (code, out) == (2, '')
        assert secret not in err
        assert err.count('\n') == 1


def test_columns_of_numbers_are_aligned_to_the_right():
    lines = list(aligned(('name', 'size'), [('a', '7'), ('bcdef', '1,024')]))
    assert lines == ['name    size', '-----  -----', 'a          7', 'bcdef  1,024']
