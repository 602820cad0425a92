"""Model cards: what they say is what happened, and the library can read it back."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest
import timm
import torch
from hub_server import HubServer
from huggingface_hub import ModelCard
from pictures import make_dataset, save_dataset
from torch import nn

import timm_ghn
from timm_ghn import GHN, ConfigError, PostProcess, ghn_init, postprocess_, predict, push_to_hub
from timm_ghn.finetune.loop import finetune
from timm_ghn.finetune.options import FinetuneOptions
from timm_ghn.hub import load_ghn
from timm_ghn.hub.catalogue import EMBEDDED, known_ghns
from timm_ghn.hub.storage import save_ghn
from timm_ghn.nn.config import Origin
from timm_ghn.prediction.predict import provenance
from timm_ghn.publish.card import make_card
from timm_ghn.publish.facts import ModelFacts
from timm_ghn.publish.files import read_source
from timm_ghn.publish.training import Training

pytestmark = pytest.mark.filterwarnings('ignore:Use .content=:DeprecationWarning')

REPO = 'user/test.ghn'
TOKEN = 'hf_writer'


@pytest.fixture
def push(hub: HubServer):
    """Push a model; gives its card, which the server has validated."""

    def do(model: nn.Module, **arguments) -> ModelCard:
        push_to_hub(model, REPO, token=TOKEN, **arguments)
        card = ModelCard(hub.files(REPO)['README.md'].decode())
        assert hub.asked('validate-yaml')
        assert str(ModelCard(str(card))) == str(card)
        return card

    return do


def code_of(card: ModelCard) -> str:
    """The lines that do it again."""
    return re.search(r'## Reproduce it.*?```python\n(.*?)```', card.text, re.DOTALL)[1]


def run(card: ModelCard) -> nn.Module:
    """The model that these lines make."""
    assert len(code_of(card).splitlines()) == 3
    names: dict[str, object] = {}
    exec(code_of(card), names)
    return names['model']


def expect_predicted_alike(model: nn.Module, other: nn.Module) -> None:
    found = dict(other.named_parameters())
    rows = predict(model, EMBEDDED).plan.predicted
    assert rows
    for row in rows:
        assert torch.equal(found[row.name], model.get_parameter(row.name)), row.name


def test_an_untrained_ghn_is_called_so(push):
    ghn = GHN(dataclasses.replace(load_ghn(EMBEDDED).config, trained=False))
    model = timm.create_model('test_resnet', num_classes=10)
    prediction = predict(model, ghn)
    assert 'itself is untrained' in push(ghn_init(model, ghn), prediction=prediction).text


def test_a_model_made_by_a_tag(push):
    model = timm.create_model(f'test_resnet.{EMBEDDED}', num_classes=10)
    card, plan = push(model), predict(model, EMBEDDED).plan
    totals = plan.summary()
    assert '**predicted, no training**' in card.text
    assert 'itself is untrained' not in card.text
    assert f'| GHN | {EMBEDDED} |' in card.text
    assert f'`{load_ghn(EMBEDDED).origin.sha256}`' in card.text
    assert f'{totals["predicted_elements"]:,} of {totals["elements"]:,}' in card.text
    done = PostProcess.of('auto', auto=load_ghn(EMBEDDED).config.postprocess)
    assert f'| post-processing | {done.describe() if done else "none"} |' in card.text
    assert '| input size | 3 x 160 x 160 |' in card.text
    assert f'timm_ghn {timm_ghn.__version__}' in card.text
    expect_predicted_alike(model, run(card))


def test_the_metadata(push):
    data = push(timm.create_model(f'test_vit.{EMBEDDED}', num_classes=10)).data.to_dict()
    assert (data['license'], data['library_name'], data['pipeline_tag']) == ('mit', 'timm', 'image-classification')
    assert known_ghns()[EMBEDDED].license == 'mit'
    assert {'timm', 'timm_ghn', 'arxiv:2110.13100', 'arxiv:2207.10049', 'arxiv:2303.04143'} <= set(data['tags'])
    assert not {'model-index', 'datasets', 'metrics'} & data.keys()
    data = push(timm.create_model(f'test_vit.{EMBEDDED}', num_classes=0), license='cc-by-4.0').data.to_dict()
    assert (data['license'], data['pipeline_tag']) == ('cc-by-4.0', 'image-feature-extraction')


def test_a_model_that_was_changed_since_is_not_called_predicted(push):
    model = timm.create_model(f'test_resnet.{EMBEDDED}', num_classes=10)
    with torch.no_grad():
        model.layer1[0].conv1.weight.add_(1)
    text = push(model).text
    assert '**predicted, no training**' not in text
    assert 'since was not recorded' in text


@pytest.mark.parametrize('options', [None, PostProcess(layer=0.7, seed=3)], ids=repr)
def test_post_processing_is_found_by_doing_it_again(push, options):
    model = timm.create_model('test_resnet', num_classes=1000)
    prediction = predict(model, EMBEDDED, seed=3)
    ghn_init(model, EMBEDDED, seed=3, postprocess=options)
    card = push(model, prediction=prediction)
    assert f'| post-processing | {options.describe() if options else "none"} |' in card.text
    assert '| seed | 3 |' in card.text
    assert '**predicted, no training**' in card.text
    expect_predicted_alike(model, run(card))


def test_post_processing_that_cannot_be_found_is_not_made_up(push):
    model = timm.create_model('test_resnet')
    prediction = predict(model, EMBEDDED)
    model.load_state_dict(prediction.state_dict, strict=False)
    postprocess_(model, PostProcess(layer=3), plan=prediction.plan)
    text = push(model, prediction=prediction).text
    assert '| post-processing | not recorded |' in text
    assert '## Reproduce it' not in text


def test_facts_that_cannot_be_checked_are_told_as_the_start_only(push, small_ghn: GHN, tmp_path):
    model = timm.create_model('test_resnet')
    save_ghn(small_ghn, tmp_path / 'mine')
    for ghn, checked in ((load_ghn(tmp_path / 'mine'), True), (small_ghn, False)):
        plan = predict(model, ghn).plan
        ghn_init(model, ghn)
        said = provenance(ghn, plan, head='auto', seed=0, postprocess=PostProcess.of('orth'))
        text = push(model, prediction=said).text
        assert ('**predicted, no training**' in text) is checked
        assert '| GHN | small |' in text
        assert str(tmp_path) not in text


def test_a_model_of_unknown_origin(push):
    card = push(timm.create_model('test_resnet'))
    assert 'was not recorded' in card.text
    assert '| GHN |' not in card.text
    assert '## Reproduce it' not in card.text
    assert card.data.license is None


FACTS = ModelFacts(
    repo_id=REPO, revision=None, parameters=400_000, license=None, architecture='test_resnet', model_args={},
    input_size=(3, 160, 160), num_classes=1000, provenance={}, raw=True, training=None,
)  # fmt: skip


@pytest.mark.parametrize(
    ('origin', 'name', 'expected'),
    [
        (Origin(name='ghn3_tm8', repo_id='SamsungSAILMontreal/ghn3', revision='c0ffee'), None,
         "timm_ghn.load_ghn('ghn3_tm8', revision='c0ffee')"),
        (Origin(name='mine', repo_id='user/ghn', revision='c0ffee'), 'mine',
         "timm_ghn.load_ghn('user/ghn', revision='c0ffee')"),
        (Origin(name='ghn3_tm8', repo_id='user/copy'), 'ghn3_tm8', "'user/copy'"),
        (Origin(file='/home/me/secret/ghn.pt'), None, "'ghn.pt'"),
        (Origin(name=EMBEDDED, embedded=True), EMBEDDED, repr(EMBEDDED)),
    ],
    ids=['of the catalogue', 'of the Hub', 'another of that name', 'a file', 'embedded'],
)  # fmt: skip
def test_the_ghn_is_named_so_that_it_can_be_loaded(origin, name, expected):
    said = {'ghn': name, 'origin': dataclasses.asdict(origin), 'seed': 0, 'head': 'auto', 'postprocess': None}
    card = make_card(dataclasses.replace(FACTS, provenance=said))
    assert f'timm_ghn.ghn_init(model, {expected}, head=' in code_of(card)
    assert 'secret' not in str(card)
    if origin.revision:
        assert f'`{origin.revision}`' in card.text
        assert f'https://huggingface.co/{origin.repo_id}' in card.text


# Fine-tuning


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """A run of the fine-tuner."""
    folder = tmp_path_factory.mktemp('runs')
    data = save_dataset(folder / 'colours', make_dataset(50), make_dataset(21, seed=1))
    options = FinetuneOptions(
        model='test_vit', init=EMBEDDED, dataset=str(data), image_size=32, epochs=1, batch_size=12, lr=3e-3,
        output=folder / 'out',
    )  # fmt: skip
    finetune(options)
    return folder / 'out'


def test_a_fine_tuned_model(push, hub: HubServer, trained):
    source = read_source(trained)
    lines = [json.loads(line) for line in (trained / 'results.jsonl').read_text().splitlines()]
    best, tested = lines[-2]['best_top1'], lines[-1]['test_top1']
    card = push(source.model, results=trained, model_args=source.model_args)
    (result,) = card.data.eval_results
    assert (result.dataset_name, result.dataset_split, result.metric_type) == ('colours', 'test', 'accuracy')
    assert result.metric_value == round(tested, 4)
    assert result.metric_name == 'top-1 test accuracy in percent, fine-tuned for 1 epochs'
    assert card.data.datasets is None  # a folder, not a data set of the Hub
    assert f'{best:.2f} % validation accuracy on its split `0.1 of train`. On the test split' in card.text
    assert f'| validation accuracy, fine-tuned for 1 epochs | {best:.2f} % |' in card.text
    assert f'| test accuracy, fine-tuned for 1 epochs | {tested:.2f} % (21 images) |' in card.text
    assert '**predicted, no training**' not in card.text
    assert 'lr=0.003' in code_of(card)
    assert str(trained.parent) not in str(card)
    config = json.loads(hub.files(REPO)['config.json'])
    assert config['label_names'] == ['red', 'green', 'blue']
    assert config['pretrained_cfg']['input_size'] == [3, 32, 32]
    assert config['pretrained_cfg']['crop_pct'] == 1.0
    loaded = timm.create_model(f'hf-hub:{REPO}', pretrained=True)
    assert torch.equal(loaded.head.weight, source.model.head.weight)


def test_the_accuracy_is_that_of_the_weights(trained):
    lines = [json.loads(line) for line in (trained / 'results.jsonl').read_text().splitlines()]
    last = Training.read(trained / 'model.safetensors')
    assert (last.top1, last.epoch, last.test_top1) == (lines[-2]['val_top1'], 1, None)
    best = Training.read(trained)
    assert (best.top1, best.test_top1) == (lines[-2]['best_top1'], lines[-1]['test_top1'])


def test_an_accuracy_that_weights_were_chosen_by_is_that_of_validation(trained):
    training = dataclasses.replace(Training.read(trained), test_top1=None)
    card = make_card(dataclasses.replace(FACTS, provenance=None, raw=False, training=training))
    (result,) = card.data.eval_results
    assert result.metric_name == 'top-1 validation accuracy in percent, fine-tuned for 1 epochs'
    assert (result.dataset_split, result.metric_value) == ('0.1 of train', round(training.top1, 4))
    assert 'test accuracy' not in card.text


def test_a_data_set_of_the_hub_is_linked(trained):
    training = Training.read(trained)
    arguments = {**training.arguments, 'dataset': 'uoft-cs/cifar10', 'subset': 'plain_text'}
    training = dataclasses.replace(training, run={**training.run, 'arguments': arguments, 'local': []})
    data = make_card(dataclasses.replace(FACTS, provenance=None, raw=False, training=training)).data
    assert data.datasets == ['uoft-cs/cifar10']
    assert data.eval_results[0].dataset_type == 'uoft-cs/cifar10'
    assert data.eval_results[0].dataset_config == 'plain_text'


# Text that comes from a file


HOSTILE = '\x1b[2J\r\n| a | <img src=x> [here](https://evil.example) `x` **b** $y$ # t\u202e ' + 'z' * 500


def expect_no_markup_of_others(card: ModelCard | str) -> None:
    text = str(card)
    assert all(line.isprintable() for line in text.split('\n'))
    prose = re.sub(r'```.*?```', '', text.partition('\n---\n')[2], flags=re.DOTALL)
    outside = re.sub(r'`[^`\n]*`', '', prose)
    for markup in (r'<img', r'\[here\]\(', r'\*\*b', r'\$y', r'\| a \|', r'https://evil'):
        assert not re.search(rf'(?<!\\){markup}', outside), markup
    tables = [line for line in prose.splitlines() if line.startswith('|')]
    assert tables
    assert all(len(re.findall(r'(?<!\\)\|', line)) == 3 for line in tables)
    assert 'z' * 100 not in prose


def test_every_fact_of_a_prediction_is_escaped():
    origin = dict.fromkeys(('name', 'repo_id', 'revision', 'file', 'sha256'), HOSTILE)
    said = {'ghn': HOSTILE, 'origin': origin, 'timm_ghn': HOSTILE, 'head': HOSTILE, 'seed': 0, 'postprocess': HOSTILE}
    facts = dataclasses.replace(FACTS, provenance=said, model_args={HOSTILE: HOSTILE})
    for raw in (True, False):
        card = make_card(dataclasses.replace(facts, raw=raw))
        expect_no_markup_of_others(card)
    said['postprocess'] = None
    card = make_card(facts)
    expect_no_markup_of_others(card)
    assert len(code_of(card).splitlines()) == 3


def test_every_fact_of_a_run_is_escaped(trained):
    training = Training.read(trained)
    arguments = {key: HOSTILE if isinstance(value, str) else value for key, value in training.arguments.items()}
    run = {**training.run, 'arguments': {**arguments, 'subset': HOSTILE}, 'splits': [HOSTILE] * 2, 'provenance': None}
    for local in ([], ['dataset', 'init']):
        facts = dataclasses.replace(FACTS, provenance=None, raw=False)
        card = make_card(
            dataclasses.replace(facts, training=dataclasses.replace(training, run={**run, 'local': local}))
        )
        expect_no_markup_of_others(card)


@pytest.mark.parametrize(
    ('facts', 'message'),
    [
        ([], 'facts about a prediction'),
        ({'origin': 5}, 'expected origin'),
        ({'origin': {'file': 5}}, 'expected file'),
        ({'seed': 'x'}, 'expected seed'),
        ({'elements': 'many'}, 'expected elements'),
        ({'elements': 5}, 'incomplete'),
        ({'postprocess': {'beta': 0, 'surprise': 1}}, 'options of post-processing'),
        ({'postprocess': {'beta': -1}}, 'beta'),
    ],
)
def test_facts_that_no_prediction_gives_are_refused(hub: HubServer, facts, message):
    with pytest.raises(ConfigError, match=message):
        push_to_hub(timm.create_model('test_resnet'), REPO, prediction=facts, token=TOKEN)
    assert not hub.requests


def test_results_that_are_not_whole_are_refused(hub: HubServer, trained):
    source = read_source(trained)
    training = Training.read(trained)
    for key in ('images', 'splits', 'data_config'):
        run = {k: v for k, v in training.run.items() if k != key}
        with pytest.raises(ConfigError, match='incomplete'):
            push_to_hub(
                source.model, REPO, results=dataclasses.replace(training, run=run), model_args=source.model_args,
                token=TOKEN,
            )  # fmt: skip
    assert not hub.requests
