"""GHNs on the Hub: what arrives is what was sent, and the card says what happened, through the real client."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from pathlib import Path

import pytest
import timm
import torch
from hub_server import HubServer
from huggingface_hub import ModelCard
from official import official_state, write_joblib
from pictures import make_dataset, save_dataset

from timm_ghn import GHN, CheckpointError, ConfigError, GHNConfig, load_ghn, push_to_hub
from timm_ghn.hub import known_ghns
from timm_ghn.hub.catalogue import EMBEDDED, PUBLISHED
from timm_ghn.hub.storage import save_ghn
from timm_ghn.nn.config import Origin
from timm_ghn.publish.card import make_card
from timm_ghn.publish.facts import ghn_facts
from timm_ghn.publish.training import MetaTraining
from timm_ghn.runs.results import read_results
from timm_ghn.train.loop import train
from timm_ghn.train.options import TrainOptions

pytestmark = pytest.mark.filterwarnings('ignore:Use .content=:DeprecationWarning')

REPO = 'user/ghn'
TOKEN = 'hf_writer'
FILES = {'model.safetensors', 'config.json', 'README.md'}


def card_of(hub: HubServer, revision: str = 'main') -> ModelCard:
    """The card, which the server has validated, and which the library reads back as it is."""
    assert hub.asked('validate-yaml')
    card = ModelCard(hub.files(REPO, revision)['README.md'].decode())
    assert str(ModelCard(str(card))) == str(card)
    return card


def same(found: GHN, expected: GHN) -> bool:
    state = expected.state_dict()
    return found.config == expected.config and all(torch.equal(v, state[k]) for k, v in found.state_dict().items())


def code_of(card: ModelCard) -> str:
    return re.search(r'```python\n(.*?)```', card.text, re.DOTALL)[1]


def changed(ghn: GHN) -> GHN:
    with torch.no_grad():
        ghn.embed.weight[0, 0] += 1
    return ghn


# What arrives


def test_what_is_pushed_comes_back(hub: HubServer, small_ghn):
    before, generator = {k: v.clone() for k, v in small_ghn.state_dict().items()}, torch.get_rng_state()
    commit = push_to_hub(small_ghn, REPO, token=TOKEN, private=True)
    assert commit.oid == hub.repo(REPO)['refs']['main']
    assert hub.repo(REPO)['private']
    assert hub.files(REPO).keys() == FILES
    assert hub.commits(REPO)[1:] == ['small, a graph hypernetwork']
    assert same(load_ghn(REPO, token=TOKEN), small_ghn)
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(torch.equal(value, before[key]) for key, value in small_ghn.state_dict().items())


def test_the_same_twice_makes_no_new_commit(hub: HubServer, small_ghn):
    first = push_to_hub(small_ghn, REPO, token=TOKEN)
    assert push_to_hub(small_ghn, REPO, token=TOKEN).oid == first.oid
    assert len(hub.commits(REPO)) == 2
    assert len(hub.asked('^storage PUT')) == 1
    push_to_hub(changed(small_ghn), REPO, token=TOKEN, commit_message='another')
    assert hub.commits(REPO)[2:] == ['another']


def test_what_came_from_a_repository_goes_back_without_a_commit(hub: HubServer, small_ghn):
    push_to_hub(small_ghn, REPO, token=TOKEN, license='mit')
    push_to_hub(load_ghn(REPO), REPO, token=TOKEN)
    assert len(hub.commits(REPO)) == 2
    push_to_hub(changed(load_ghn(REPO)), REPO, token=TOKEN)
    assert 'How its weights were made was not recorded' in card_of(hub).text


def test_the_card_in_a_branch_loads_from_there(hub: HubServer, small_ghn):
    push_to_hub(small_ghn, REPO, token=TOKEN, revision='v1')
    assert hub.files(REPO) == {}
    assert same(load_ghn(REPO, revision='v1'), small_ghn)
    assert f"load_ghn('{REPO}', revision='v1')" in code_of(card_of(hub, 'v1'))


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ({'model_args': {'img_size': 32}}, 'timm models, not GHNs'),
        ({'prediction': {}}, 'timm models, not GHNs'),
        ({'results': '/no/such/folder'}, 'timm-ghn train'),
    ],
)
def test_a_wrong_argument_is_refused(hub: HubServer, small_ghn, arguments, message):
    with pytest.raises(ConfigError, match=message):
        push_to_hub(small_ghn, REPO, token=TOKEN, **arguments)
    assert not hub.requests


def test_what_nobody_could_use_is_not_sent(hub: HubServer, small: GHNConfig, small_ghn):
    with torch.device('meta'):
        empty = GHN(small)
    with pytest.raises(CheckpointError, match='meta device'):
        push_to_hub(empty, REPO, token=TOKEN)
    with torch.no_grad():
        small_ghn.embed.weight[0, 0] = float('nan')
    with pytest.raises(CheckpointError, match='not finite'):
        push_to_hub(small_ghn, REPO, token=TOKEN)
    assert not hub.requests


# What the card says


def test_the_card_of_a_ghn_of_unknown_training(hub: HubServer, small_ghn):
    push_to_hub(small_ghn, REPO, token=TOKEN)
    card = card_of(hub)
    data = card.data.to_dict()
    assert data['library_name'] == 'timm_ghn'
    assert {'timm_ghn', 'graph-hypernetwork', 'arxiv:2303.04143', 'arxiv:2110.13100'} <= set(data['tags'])
    assert not {'license', 'model-index', 'datasets', 'metrics'} & data.keys()
    assert 'not recorded' in card.text
    assert f'| parameters | {sum(p.numel() for p in small_ghn.parameters()):,} |' in card.text
    assert '| graph network | graphormer, 2 layers, 2 heads |' in card.text
    assert '| decoded at once | 8 x 8 x 3 x 3 (out, in, height, width) |' in card.text
    assert 'not a trained network' in card.text
    assert card.text.count('@article{') == 3


def test_its_three_lines_run(hub: HubServer, small_ghn):
    push_to_hub(small_ghn, REPO, token=TOKEN)
    code = code_of(card_of(hub))
    assert len(code.splitlines()) == 3
    names: dict[str, object] = {}
    exec(code.replace('resnet18', 'test_resnet'), names)
    assert same(names['ghn'], small_ghn)
    assert names['model'].num_classes == small_ghn.config.num_classes


def test_an_untrained_ghn_is_called_so(hub: HubServer):
    push_to_hub(GHN(dataclasses.replace(load_ghn(EMBEDDED).config, trained=False)), REPO, token=TOKEN)
    assert 'random, not trained' in card_of(hub).text


@pytest.fixture
def converted(hub: HubServer, small: GHNConfig, small_ghn, tmp_path, monkeypatch) -> GHN:
    """A GHN of the catalogue, made small, loaded from the authors' repository in their form."""
    known = known_ghns()
    known[PUBLISHED] = dataclasses.replace(known[PUBLISHED], config=dataclasses.replace(small, name=PUBLISHED))
    monkeypatch.setattr('timm_ghn.hub.catalogue._entries', lambda: known)
    content = write_joblib(official_state(small_ghn), tmp_path / 'official').read_bytes()
    hub.put(known[PUBLISHED].repo_id, {known[PUBLISHED].filename: content})
    return load_ghn(PUBLISHED)


def test_a_converted_ghn_says_from_what(hub: HubServer, converted):
    push_to_hub(converted, REPO, token=TOKEN)
    card, origin, entry = card_of(hub), converted.origin, known_ghns()[PUBLISHED]
    assert f'Converted from `{PUBLISHED}`' in card.text
    assert 'every weight was compared' in card.text
    for fact in (f'`{origin.revision}`', f'`{origin.sha256}`', f'`{entry.filename}`', entry.paper,
                 f'https://huggingface.co/{entry.repo_id}'):  # fmt: skip
        assert fact in card.text
    assert Path(origin.file).parent.as_posix() not in str(card)
    assert card.data.license == entry.license
    assert same(load_ghn(REPO), converted)
    push_to_hub(converted, REPO, token=TOKEN)
    assert len(hub.commits(REPO)) == 2


def test_a_converted_ghn_that_was_changed_since_is_not_called_so(hub: HubServer, converted):
    push_to_hub(changed(converted), REPO, token=TOKEN)
    text = card_of(hub).text
    assert 'Converted from' not in text
    assert f'It began as `{PUBLISHED}`' in text
    assert 'since was not recorded' in text


# What training left


@pytest.fixture(scope='module')
def trained(tmp_path_factory) -> Path:
    """A run of ``timm-ghn train``."""
    folder = tmp_path_factory.mktemp('train')
    data = save_dataset(folder / 'colours', make_dataset(60), make_dataset(30, seed=1))
    cheap = {
        'families': ['resnet_basic', 'vgg'], 'macs': 600_000, 'parameters': [1_000, 60_000], 'activations': 30_000,
        'attempts': 2000,
    }  # fmt: skip
    options = TrainOptions(
        name='colours', dataset=str(data), hid=16, layers=1, templates=4, codes=8, max_channels=64, sampler_args=cheap,
        held_out=(), pool=2, steps=2, meta_batch=1, batch_size=8, warmup_steps=1, eval_steps=2, eval_count=1,
        eval_images=30, log_steps=1, checkpoint_steps=2, output=folder / 'out', seed=3,
    )  # fmt: skip
    train(options)
    return folder / 'out'


@pytest.fixture
def run(call_cli, hub: HubServer, monkeypatch, tmp_path):
    """Run a command as the user whose token is in the environment; gives code, output and errors."""
    monkeypatch.setenv('HF_TOKEN', TOKEN)
    monkeypatch.chdir(tmp_path)
    return call_cli


def test_the_command_pushes_a_trained_ghn_with_what_its_results_say(run, hub: HubServer, trained):
    code, out, _ = run(f'push {trained / "ghn"} {REPO} --license mit --message hello')
    assert code == 0
    assert out == f'{hub.endpoint}/{REPO}/commit/{hub.repo(REPO)["refs"]["main"]}\n'
    assert hub.commits(REPO)[1:] == ['hello']
    assert same(load_ghn(REPO), load_ghn(trained / 'ghn'))
    card, lines = card_of(hub), read_results(trained / 'results.jsonl')
    evaluation = [line for line in lines if line['kind'] == 'eval'][-1]
    assert 'Trained with timm_ghn for 2 steps on colours' in card.text
    assert f'{evaluation["known"]:.2f} %, **predicted, no training**' in card.text
    assert '| architectures | sampler `timm`, 2 of them: resnet_basic, vgg |' in card.text
    assert '| seed | 3 |' in card.text
    assert '| processes | 1 (cpu) |' in card.text
    assert f'| seconds | {lines[-1]["seconds"]:,.0f} |' in card.text
    (result,) = card.data.eval_results
    assert (result.metric_value, result.dataset_name) == (round(evaluation['known'], 4), 'colours')
    assert 'no training' in result.metric_name
    assert (card.data.license, card.data.datasets) == ('mit', None)
    assert str(trained.parent) not in str(card)
    assert run(f'push {trained / "ghn"} {REPO} --license mit')[0] == 0
    assert len(hub.commits(REPO)) == 2


def test_the_card_names_the_ghn_that_training_began_with_and_no_folder(trained, tmp_path):
    lines = (trained / 'results.jsonl').read_text().splitlines()
    first = json.loads(lines[0])
    first['arguments']['init'] = '/home/someone/first/ghn'
    first['config']['format_version'] = 1  # of an older version
    results = tmp_path / 'results.jsonl'
    results.write_text('\n'.join([json.dumps(first), *lines[1:]]) + '\n')
    ghn = load_ghn(trained / 'ghn')
    card = str(make_card(ghn_facts(ghn, REPO, None, training=MetaTraining.read(results), license='mit')))
    assert 'steps on colours, begun with the GHN ghn.' in card
    assert '| begun with | ghn |' in card
    assert 'someone' not in card


def test_results_are_given_or_lie_beside_a_ghn_that_did_not_change(hub: HubServer, trained, small_ghn, tmp_path):
    push_to_hub(changed(load_ghn(trained / 'ghn')), REPO, token=TOKEN)
    assert 'Trained with' not in card_of(hub).text
    push_to_hub(load_ghn(trained / 'ghn'), REPO, token=TOKEN)
    assert 'Trained with' in card_of(hub).text
    save_ghn(load_ghn(trained / 'ghn'), tmp_path / 'elsewhere')
    push_to_hub(load_ghn(tmp_path / 'elsewhere'), REPO, token=TOKEN, results=trained)
    assert 'Trained with' in card_of(hub).text
    with pytest.raises(ConfigError, match='another GHN: hid is 16 there and 8 here'):
        push_to_hub(small_ghn, REPO, token=TOKEN, results=trained)


def test_a_number_of_an_earlier_step_is_not_that_of_the_weights(hub: HubServer, trained, tmp_path):
    lines = read_results(trained / 'results.jsonl')
    for line in lines:
        if line['kind'] == 'end':
            line['step'] = 3
    (tmp_path / 'results.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
    push_to_hub(load_ghn(trained / 'ghn'), REPO, token=TOKEN, results=tmp_path)
    card = card_of(hub)
    assert card.data.eval_results is None
    assert '(step 2, 6 images' in card.text
    unfinished = [line for line in lines if line['kind'] != 'end']
    (tmp_path / 'results.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in unfinished))
    with pytest.raises(ConfigError, match='no end'):
        MetaTraining.read(tmp_path)


def test_no_text_of_a_file_reaches_a_card_or_a_commit_as_it_is(hub: HubServer, small: GHNConfig):
    hostile = '\x1b[2J\r\n| a | <img src=x> [here](https://evil.example) **b** ' + 'z' * 500
    found = MetaTraining.read(Path(__file__).parents[2] / 'benchmarks' / 'results' / 'meta_training-2026-11-21.jsonl')
    arguments = {key: hostile if isinstance(value, str) else value for key, value in found.arguments.items()}
    arguments |= {'subset': hostile, 'init': hostile, 'sampler_args': {'families': [hostile]}}
    evaluation = {**found.evaluation, f'known/{hostile}': 5.0}
    run = {**found.run, 'arguments': arguments, 'device': hostile, 'config': {}, 'local': []}
    results = dataclasses.replace(found, run=run, evaluation=evaluation)
    ghn = GHN(dataclasses.replace(small, name=hostile))
    for origin in (None, Origin(*[hostile] * 5), Origin(file=hostile)):
        ghn.origin = origin
        for told in (results, None):
            card = str(make_card(ghn_facts(ghn, REPO, None, training=told, license=None)))
            assert all(line.isprintable() for line in card.split('\n'))
            prose = re.sub(r'```.*?```', '', card.partition('\n---\n')[2], flags=re.DOTALL)
            prose = re.sub(r'`[^`\n]*`', '', prose)
            for markup in (r'<img', r'\[here\]\(', r'\*\*b', r'\| a \|', r'https://evil'):
                assert not re.search(rf'(?<!\\){markup}', prose), markup
            assert 'z' * 100 not in prose
    push_to_hub(ghn, REPO, token=TOKEN)
    (*_, message) = hub.commits(REPO)
    assert message.isprintable()
    assert len(message) < 150


def test_a_folder_of_timm_is_not_taken_for_a_ghn(run, hub: HubServer, tmp_path):
    timm.models.save_for_hf(timm.create_model('test_vit'), str(tmp_path / 'model'), safe_serialization=True)
    code, _, err = run(f'push model {REPO}')
    assert code == 2
    assert 'there is no file' in err
    (tmp_path / 'model' / 'config.json').write_text('{')
    code, _, err = run(f'push model {REPO}')
    assert (code, err.count('\n')) == (2, 1)
    assert 'config.json' in err
    assert not hub.requests


def test_weights_are_those_that_the_card_is_beside(hub: HubServer, small_ghn):
    push_to_hub(small_ghn, REPO, token=TOKEN)
    digest = hashlib.sha256(hub.files(REPO)['model.safetensors']).hexdigest()
    ghn = load_ghn(REPO)
    assert ghn.origin.sha256 == digest
    push_to_hub(ghn, 'user/copy', token=TOKEN)
    text = hub.files('user/copy')['README.md'].decode()
    assert f'A copy of [{REPO}]' in text
    assert f'`{digest}`' in text
