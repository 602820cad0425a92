"""Model cards: what they say is what happened, and the library can read it back."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import timm
import torch
from hub_server import HubServer
from huggingface_hub import ModelCard
from pictures import make_dataset, save_dataset
from torch import nn

import timm_ghn
from timm_ghn import GHN, ConfigError, PostProcess, ghn_init, load_ghn, predict, push_to_hub
from timm_ghn.files import crc32_of
from timm_ghn.finetune.loop import finetune
from timm_ghn.finetune.options import FinetuneOptions
from timm_ghn.hub.catalogue import EMBEDDED, known_ghns
from timm_ghn.nn import GHNConfig
from timm_ghn.nn.config import Origin
from timm_ghn.prediction.predict import initialise
from timm_ghn.publish.card import ghn_card, model_card
from timm_ghn.publish.facts import ModelFacts
from timm_ghn.publish.files import read_source
from timm_ghn.publish.training import MetaTraining, Training

pytestmark = pytest.mark.filterwarnings('ignore:Use .content=:DeprecationWarning')

REPO = 'user/test.ghn'
TOKEN = 'hf_writer'
PREDICTED = '**predicted, no training**'


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


def expect_reproduced(card: ModelCard, model: nn.Module) -> None:
    """These lines make the predicted parameters of the model again."""
    names: dict[str, object] = {}
    exec(code_of(card), names)
    for row in predict(model, EMBEDDED).plan.predicted:
        assert torch.equal(names['model'].get_parameter(row.name), model.get_parameter(row.name)), row.name


def tagged(name: str = 'test_resnet', **arguments) -> nn.Module:
    return timm.create_model(f'{name}.{EMBEDDED}', **{'num_classes': 10, **arguments})


# Predictions


def test_a_model_made_by_a_tag(push):
    model = tagged()
    card, totals = push(model), predict(model, EMBEDDED).plan.summary()
    done = PostProcess.of('auto', auto=load_ghn(EMBEDDED).config.postprocess)
    for told in (PREDICTED, f'| GHN | {EMBEDDED} |', load_ghn(EMBEDDED).origin.sha256, '| input size | 3 x 160 x 160 |',
                 f'{totals["predicted_elements"]:,} of {totals["elements"]:,}', f'timm_ghn {timm_ghn.__version__}',
                 f'| post-processing | {done.describe() if done else "none"} |'):  # fmt: skip
        assert told in card.text
    assert 'itself is untrained' not in card.text
    expect_reproduced(card, model)


def test_the_metadata(push):
    data = push(tagged('test_vit')).data.to_dict()
    assert (data['license'], data['library_name'], data['pipeline_tag']) == ('mit', 'timm', 'image-classification')
    assert known_ghns()[EMBEDDED].license == 'mit'
    assert {'timm', 'timm_ghn', 'arxiv:2110.13100', 'arxiv:2207.10049', 'arxiv:2303.04143'} <= set(data['tags'])
    assert not {'model-index', 'datasets', 'metrics'} & data.keys()
    data = push(tagged('test_vit', num_classes=0), license='cc-by-4.0').data.to_dict()
    assert (data['license'], data['pipeline_tag']) == ('cc-by-4.0', 'image-feature-extraction')


CHANGES = {
    'a weight': lambda model: model.layer1[0].conv1.weight.data.add_(1),
    'a head that is not predicted': lambda model: model.fc.weight.data.mul_(2),
    'statistics': lambda model: model.bn1.running_mean.add_(1),
    'a type': lambda model: model.bfloat16(),
}


@pytest.mark.parametrize('change', CHANGES.values(), ids=CHANGES.keys())
def test_a_model_that_was_changed_since_is_not_called_predicted(push, change):
    model = tagged()
    change(model)
    card = push(model)
    assert PREDICTED not in card.text
    assert 'begun with' in card.text
    assert '## Reproduce it' not in card.text


def test_the_facts_of_a_prediction(push):
    model, options = timm.create_model('test_resnet', num_classes=1000), PostProcess(layer=0.7, seed=3)
    _, said = initialise(model, EMBEDDED, seed=3, postprocess=options)
    card = push(model, prediction=said)
    assert PREDICTED not in card.text, 'nothing says that these are the weights'
    card = push(model, prediction=said | {'weights': crc32_of(model.state_dict())})
    for told in (PREDICTED, f'| post-processing | {options.describe()} |', '| seed | 3 |'):
        assert told in card.text
    expect_reproduced(card, model)


def test_a_raw_prediction(push):
    model = timm.create_model('test_resnet')
    prediction = predict(model, EMBEDDED)
    card = push(prediction.apply_(model), prediction=prediction)
    assert PREDICTED in card.text
    assert '| post-processing | none |' in card.text
    expect_reproduced(card, model)
    text = push(ghn_init(model, EMBEDDED), prediction=prediction).text
    assert PREDICTED not in text
    assert '| post-processing | not recorded |' in text


def test_an_untrained_ghn_is_called_so(push):
    ghn = GHN(dataclasses.replace(load_ghn(EMBEDDED).config, trained=False))
    model = timm.create_model('test_resnet', num_classes=10)
    assert 'itself is untrained' in push(model, prediction=predict(model, ghn)).text


def test_a_model_of_unknown_origin(push):
    card = push(timm.create_model('test_resnet'))
    assert 'was not recorded' in card.text
    assert '| GHN |' not in card.text
    assert card.data.license is None


FACTS = ModelFacts(
    repo_id=REPO, revision=None, license=None, architecture='test_resnet', model_args={}, input_size=(3, 160, 160),
    num_classes=1000, parameters=400_000, provenance=None, unchanged=False, training=None,
)  # fmt: skip


def predicted_facts(said: dict[str, object]) -> ModelFacts:
    return dataclasses.replace(FACTS, provenance=said, unchanged=True)


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
    card = model_card(predicted_facts(said))
    assert f'timm_ghn.ghn_init(model, {expected}, head=' in code_of(card)
    assert 'secret' not in str(card)
    assert not origin.revision or f'https://huggingface.co/{origin.repo_id}' in card.text


@pytest.mark.parametrize(
    'facts',
    [[], {'origin': 5}, {'origin': {'file': 5}}, {'elements': 'many'}, {'elements': 5}, {'postprocess': {'x': 1}},
     {'postprocess': {'beta': -1}}, {'mean': 5}],
    ids=str,
)  # fmt: skip
def test_facts_that_no_prediction_gives_are_refused(hub: HubServer, facts):
    with pytest.raises(ConfigError):
        push_to_hub(timm.create_model('test_resnet'), REPO, prediction=facts, token=TOKEN)
    assert not hub.requests


# Fine-tuning


@pytest.fixture(scope='module')
def trained(tmp_path_factory) -> Path:
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
    for told in ('**fine-tuned for 1 epochs** on colours', f'hypernetwork {EMBEDDED} predicted',
                 f'| validation accuracy, fine-tuned for 1 epochs | {best:.2f} % on 0.1 of train |',
                 f'| test accuracy, fine-tuned for 1 epochs | {tested:.2f} % (21 images) |'):  # fmt: skip
        assert told in card.text
    assert PREDICTED not in card.text
    assert f"init='{EMBEDDED}'" in code_of(card)
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
    last, best = Training.read(trained / 'model.safetensors'), Training.read(trained)
    assert (last.top1, last.epoch, last.test_top1) == (lines[-2]['val_top1'], 1, None)
    assert (best.top1, best.test_top1) == (lines[-2]['best_top1'], lines[-1]['test_top1'])
    card = model_card(dataclasses.replace(FACTS, training=last))
    (result,) = card.data.eval_results
    assert result.metric_name == 'top-1 validation accuracy in percent, fine-tuned for 1 epochs'
    assert (result.dataset_split, result.metric_value) == ('0.1 of train', round(last.top1, 4))
    assert 'test accuracy' not in card.text


def with_run(training: Training, **changes) -> Training:
    return dataclasses.replace(training, run={**training.run, **changes})


def test_a_data_set_of_the_hub_is_linked_and_a_folder_is_not_told(trained):
    training = Training.read(trained)
    assert training.run['local'] == ['dataset']
    arguments = {**training.arguments, 'dataset': 'uoft-cs/cifar10', 'subset': 'plain_text'}
    data = model_card(dataclasses.replace(FACTS, training=with_run(training, arguments=arguments, local=[]))).data
    assert data.datasets == [data.eval_results[0].dataset_type] == ['uoft-cs/cifar10']
    assert data.eval_results[0].dataset_config == 'plain_text'
    arguments = {**training.arguments, 'dataset': 'data/clothes-private', 'init': 'secret-project/ghn'}
    for more in ({}, {'init': 'donor:/home/secret-project/ghn.safetensors'}):
        private = with_run(training, arguments=arguments | more, local=['dataset', 'init'], provenance=None)
        card = str(model_card(dataclasses.replace(FACTS, training=private)))
        assert 'clothes-private' in card
        assert 'data/' not in card
        assert 'secret-project' not in card


@pytest.mark.parametrize('key', ['images', 'splits', 'arguments'])
def test_results_that_are_not_whole_are_refused(trained, key):
    training = Training.read(trained)
    training = dataclasses.replace(training, run={k: v for k, v in training.run.items() if k != key})
    with pytest.raises(ConfigError, match='incomplete'):
        model_card(dataclasses.replace(FACTS, training=training))


# Text that comes from a file

HOSTILE = '\x1b[2J\r\n| a | <img src=x> [here](https://evil.example) `x` **b** $y$ # t\u202e ' + 'z' * 500


def hostile_cards(trained: Path, small: GHNConfig) -> Iterator[ModelCard]:
    origin = dict.fromkeys(('name', 'repo_id', 'revision', 'file', 'sha256'), HOSTILE)
    said = {'ghn': HOSTILE, 'origin': origin, 'timm_ghn': HOSTILE, 'head': HOSTILE, 'seed': 0, 'postprocess': None}
    predicted = dataclasses.replace(predicted_facts(said), model_args={HOSTILE: HOSTILE})
    yield model_card(predicted)
    yield model_card(dataclasses.replace(predicted, unchanged=False, provenance={**said, 'postprocess': HOSTILE}))
    run = Training.read(trained)
    arguments = {key: HOSTILE if isinstance(value, str) else value for key, value in run.arguments.items()}
    changes = {'arguments': {**arguments, 'subset': HOSTILE}, 'splits': [HOSTILE] * 2, 'provenance': None}
    for local in ([], ['dataset', 'init']):
        yield model_card(dataclasses.replace(FACTS, training=with_run(run, **changes, local=local)))
    options = {'dataset': HOSTILE, 'subset': HOSTILE, 'init': HOSTILE, 'sampler': HOSTILE, 'steps': 5, 'seed': HOSTILE,
               'image_size': 32, 'sampler_args': {'families': [HOSTILE]}}  # fmt: skip
    results = MetaTraining({'arguments': options, 'images': {'train': 3}, 'local': []}, 5, {'step': 5, 'known': 5.0})
    ghn = GHN(dataclasses.replace(small, name=HOSTILE))
    ghn.origin = Origin(*[HOSTILE] * 5)
    for training in (None, results):
        yield ghn_card(ghn, REPO, None, training=training, license=None)


def test_no_text_of_a_file_reaches_a_card_as_it_is(trained, small):
    for card in hostile_cards(trained, small):
        text = str(card)
        assert all(line.isprintable() for line in text.split('\n'))
        prose = re.sub(r'```.*?```', '', text.partition('\n---\n')[2], flags=re.DOTALL)
        outside = re.sub(r'`[^`\n]*`', '', prose)
        for markup in (r'<img', r'\[here\]\(', r'\*\*b', r'\$y', r'\| a \|', r'https://evil'):
            assert not re.search(rf'(?<!\\){markup}', outside), markup
        tables = [line for line in prose.splitlines() if line.startswith('|')]
        assert tables
        assert all(len(re.findall(r'(?<!\\)\|', line)) == 3 for line in tables)
