"""GHNs on the Hub: what arrives is what was sent, and the card says what happened, through the real client."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
import timm
import torch
from hub_fixtures import expect_same
from hub_server import HubServer
from huggingface_hub import ModelCard
from official import official_state, write_joblib
from pictures import make_dataset, save_dataset

from timm_ghn import GHN, CheckpointError, ConfigError, GHNConfig, load_ghn, push_to_hub
from timm_ghn.hub import known_ghns
from timm_ghn.hub.catalogue import EMBEDDED, PUBLISHED
from timm_ghn.hub.storage import save_ghn
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


def code_of(card: ModelCard) -> str:
    return re.search(r'```python\n(.*?)```', card.text, re.DOTALL)[1]


# What arrives


def test_what_is_pushed_comes_back_and_the_same_twice_makes_no_new_commit(hub: HubServer, small_ghn):
    commit = push_to_hub(small_ghn, REPO, token=TOKEN, private=True)
    assert hub.repo(REPO)['private']
    assert hub.files(REPO).keys() == FILES
    found = load_ghn(REPO, token=TOKEN)
    assert found.config == small_ghn.config
    expect_same(found, small_ghn)
    assert push_to_hub(small_ghn, REPO, token=TOKEN).oid == commit.oid
    assert hub.commits(REPO)[1:] == ['small, a graph hypernetwork']


def test_the_card_in_a_branch_loads_from_there(hub: HubServer, small_ghn):
    push_to_hub(small_ghn, REPO, token=TOKEN, revision='v1')
    assert hub.files(REPO) == {}
    expect_same(load_ghn(REPO, revision='v1'), small_ghn)
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
    parameters = sum(p.numel() for p in small_ghn.parameters())
    for told in ('not recorded', f'| parameters | {parameters:,} |', 'not a trained network',
                 '| graph network | graphormer, 2 layers, 2 heads |', '8 x 8 x 3 x 3'):  # fmt: skip
        assert told in card.text
    names: dict[str, object] = {}
    exec(code_of(card).replace('resnet18', 'test_resnet'), names)
    expect_same(names['ghn'], small_ghn)
    assert names['model'].num_classes == small_ghn.config.num_classes


def test_an_untrained_ghn_is_called_so(hub: HubServer):
    push_to_hub(GHN(dataclasses.replace(load_ghn(EMBEDDED).config, trained=False)), REPO, token=TOKEN)
    assert 'random, not trained' in card_of(hub).text


def test_a_ghn_of_the_catalogue_says_where_it_was_loaded_from(
    hub: HubServer, small: GHNConfig, small_ghn, tmp_path, monkeypatch
):
    known = known_ghns()
    entry = dataclasses.replace(known[PUBLISHED], config=dataclasses.replace(small, name=PUBLISHED))
    monkeypatch.setattr('timm_ghn.hub.catalogue._entries', lambda: {**known, PUBLISHED: entry})
    content = write_joblib(official_state(small_ghn), tmp_path / 'official').read_bytes()
    hub.put(entry.repo_id, {entry.filename: content})
    ghn = load_ghn(PUBLISHED)
    push_to_hub(ghn, REPO, token=TOKEN)
    card, origin = card_of(hub), ghn.origin
    for told in (f'| {origin.revision} |', f'| {origin.sha256} |', f'| {entry.filename} |', entry.paper,
                 f'https://huggingface.co/{entry.repo_id}', 'since was not recorded'):  # fmt: skip
        assert told in card.text
    assert Path(origin.file).parent.as_posix() not in str(card)
    assert card.data.license == entry.license
    expect_same(load_ghn(REPO), ghn)


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
    expect_same(load_ghn(REPO), load_ghn(trained / 'ghn'))
    card = card_of(hub)
    evaluation = [line for line in read_results(trained / 'results.jsonl') if line['kind'] == 'eval'][-1]
    for told in ('Trained with timm_ghn for 2 steps on colours', f'| {evaluation["known"]:.2f} % |', '| seed | 3 |',
                 '| accuracy, predicted, no training: ', '| architectures | timm: resnet_basic, vgg |'):  # fmt: skip
        assert told in card.text
    assert (card.data.license, card.data.datasets) == ('mit', None)
    assert str(trained.parent) not in str(card)
    assert run(f'push {trained / "ghn"} {REPO} --license mit')[0] == 0
    assert len(hub.commits(REPO)) == 2


def test_results_are_those_of_this_ghn_and_of_its_last_step(hub: HubServer, trained, small_ghn, tmp_path):
    with pytest.raises(ConfigError, match='another GHN: hid, '):
        push_to_hub(small_ghn, REPO, token=TOKEN, results=trained)
    ghn = load_ghn(trained / 'ghn')
    save_ghn(ghn, tmp_path / 'elsewhere')
    lines = read_results(trained / 'results.jsonl')
    lines[0]['arguments']['init'] = '/home/someone/first/ghn'
    lines[0]['local'].append('init')
    lines[0]['config']['format_version'] = 1  # of an older version
    lines[-1]['step'] = 3
    file = tmp_path / 'results.jsonl'
    file.write_text(''.join(json.dumps(line) + '\n' for line in lines))
    push_to_hub(load_ghn(tmp_path / 'elsewhere'), REPO, token=TOKEN, results=tmp_path)
    card = card_of(hub)
    assert 'steps on colours, begun with the GHN ghn.' in card.text
    assert 'someone' not in str(card)
    assert 'accuracy' not in card.text, 'a number of an earlier step is not that of the weights'
    file.write_text(''.join(json.dumps(line) + '\n' for line in lines[:-1]))
    with pytest.raises(ConfigError, match="no line 'end'"):
        push_to_hub(ghn, REPO, token=TOKEN, results=tmp_path)


def test_a_folder_of_timm_is_not_taken_for_a_ghn(run, hub: HubServer, tmp_path):
    timm.models.save_for_hf(timm.create_model('test_vit'), str(tmp_path / 'model'), safe_serialization=True)
    for _ in range(2):
        code, _, err = run(f'push model {REPO}')
        assert (code, err.count('\n')) == (2, 1)
        (tmp_path / 'model' / 'config.json').write_text('{')
    assert 'config.json' in err
    assert not hub.requests
